"""How the package is built: who may import whom, what stays light, and how long a reader has to hold his breath."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gemma_dist"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# From the ground up. A room (a folder, or a file of its own) imports from lower floors and from itself alone, so rooms
# of one floor never import one another: train, evaluate and merge meet on disk.
FLOORS = [
    {"errors", "visible"},
    {"aliases", "contradictions", "family", "files", "gemma_format", "settings", "shipped", "translate_names"},
    {"config_data"},
    {"config", "costs", "world"},
    {"batch_plan", "config_chat", "config_merge", "config_server", "fsdp_config", "logs", "ranklog", "static_page"},
    {"config_act", "topology", "exits"},
    {"recipe", "tensorfile", "failures"},
    {"options", "signals", "meeting", "translate"},
    {"health", "model"},
    {"data"},
    {"shards"},
    {"stream"},
    {"resolve"},
    {"train", "evaluate", "merge", "show"},
    {"serving"},
    {"chat", "export", "plan"},
    {"act"},
    {"api", "start"},
    {"cli_act", "cli_chat", "cli_evaluate", "cli_look", "cli_merge", "cli_serving", "cli_start"},
    {"cli"},
    {"__main__", "reference"},
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# The brains of the project, tested in milliseconds.
WITHOUT_TORCH = [
    "cli",
    "config",
    "options",
    "costs",
    "evaluate.compare_page",
    "evaluate.markdown",
    "evaluate.message",
    "evaluate.metrics",
    "evaluate.page",
    "evaluate.tree",
    "data.read",
    "evaluate.score",
    "merge.plan",
    "plan.activations",
    "plan.estimate",
    "plan.flops",
    "plan.margin",
    "plan.run",
    "plan.show",
    "plan.workload",
    "recipe",
    "show.plot",
    "stream.order",
    "stream.packing",
    "topology",
    "translate",
]
MAX_LINES, MAX_FUNCTION_LINES = 400, 60
LITERALS = {"tiny_config"}  # a table of sizes


def imports_of(module: str) -> Iterator[str]:
    """The modules of the package that a module imports anywhere, within functions too."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gemma_dist":
            inside = (node.module or "").removeprefix("gemma_dist").removeprefix(".")
            for alias in node.names:
                name = f"{inside}.{alias.name}".removeprefix(".")
                yield name if name in MODULES else inside
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("gemma_dist."))


def room(module: str) -> str:
    return module.partition(".")[0]


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) not in ("__init__", "")])
def test_a_module_imports_from_lower_floors_and_its_own_room(module: str) -> None:
    floor = FLOOR_OF[room(module)]
    for imported in filter(None, imports_of(module)):
        same_room = room(imported) == room(module)
        assert same_room or FLOOR_OF[room(imported)] < floor, f"{module} imports {imported}"


def test_no_modules_import_one_another() -> None:
    arrows = {module: set(imports_of(module)) & MODULES.keys() for module in MODULES}
    while free := [module for module, targets in arrows.items() if not targets & arrows.keys()]:
        for module in free:
            del arrows[module]
    assert not arrows, f"a circle: {sorted(arrows)}"


def test_the_arithmetic_and_the_command_line_do_without_torch() -> None:
    names = ", ".join(f"gemma_dist.{module}" for module in WITHOUT_TORCH)
    code = f"import sys, {names}; print(*sorted({{'torch', 'transformers', 'PIL'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_short(module: str) -> None:
    text = MODULES[module].read_text()
    assert len(text.splitlines()) <= MAX_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name not in LITERALS:
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{module}.{node.name}: {length} lines"


@pytest.mark.parametrize("module", MODULES)
def test_what_is_public_says_what_it_is(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module}.{node.name}"


def test_every_test_that_the_page_on_trust_names_is_there() -> None:
    folder = Path(__file__).parent
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", (folder.parent / "docs/trust.md").read_text(encoding="utf-8"))
    assert named
    for file, name in named:
        assert re.search(rf"^def {name}\(", (folder / file).read_text(encoding="utf-8"), re.MULTILINE), (file, name)
