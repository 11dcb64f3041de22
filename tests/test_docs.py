"""What README.md and docs/ tell a reader to type exists, links lead somewhere, and what is generated is of today."""

import ast
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from gemma_dist import recipe, reference
from gemma_dist.cli import cli
from gemma_dist.config import RowConfig, ShardConfig
from gemma_dist.errors import ConfigError
from gemma_dist.shards.reader import load_trajectories
from gemma_dist.show.stats import collect_stats

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
OPERATORS = {"|", "&&", ";", ">", "<", "2>&1", "&"}


# ---- commands --------------------------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[tuple[int, str]]:
    """Lines of code blocks, those that end with a backslash joined, and code within sentences."""
    text = page.read_text(encoding="utf-8")
    joined = re.sub(r"\\\n\s*", "", text)
    for number, line in enumerate(joined.splitlines(), start=1):
        if line.startswith("    "):
            yield number, line.strip()
    for found in SPAN.finditer(re.sub(r"(?m)^    .*$", "", text)):  # a sentence's code may go on in the next line
        yield text.count("\n", 0, found.start()) + 1, " ".join(found[1].split())


def words_of(line: str) -> list[str]:
    """The words of one command, up to the shell's own."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # a quote that is none of the shell's
        words = line.split()
    end = next((place for place, word in enumerate(words) if word in OPERATORS), len(words))
    return words[:end]


def our_words(line: str) -> list[str]:
    """What follows `gemma-dist`, or the module's name behind a launcher; empty for other programs."""
    words = words_of(line)
    if words[:1] == ["gemma-dist"] or words[:1] == [".venv/bin/gemma-dist"]:
        return words[1:]
    for place in range(len(words) - 1):
        if words[place : place + 2] == ["-m", "gemma_dist"]:
            return words[place + 2 :]
    return []


def require_options(words: list[str]) -> None:
    """Every option that is typed behind a verb is one of the verb's, with a value of its kind where it is a choice."""
    verb, *rest = words
    assert verb in cli.commands, f"no verb {verb}"
    command = cli.commands[verb]
    params = command.get_params(click.Context(command))
    known = {name: param for param in params for name in (*param.opts, *param.secondary_opts)}
    takes_more = command.context_settings.get("ignore_unknown_options") and verb == "serve"
    for place, word in enumerate(rest):
        name, equals, value = word.partition("=")
        if not word.startswith("--") or word == "--" or takes_more:
            continue
        assert name in known, f"{verb} has no {name}"
        value = value if equals else next(iter(rest[place + 1 :]), "")
        kind = known[name].type
        if isinstance(kind, click.Choice) and value and not re.search("…|/|^[A-Z]+$", value):
            kind.convert(value, known[name], None)


def require_settings(words: list[str]) -> None:
    """Every key=value behind a recipe is a setting that takes the value, and the recipe is there."""
    recipes = [word for word in words if re.fullmatch(r"launch/[a-z0-9_]+\.yaml", word)]
    for word in recipes:
        assert (ROOT / word).is_file(), word
    overrides = [word for word in words if re.fullmatch(r"[a-z_.]+=[^=…]+", word)]
    if recipes and not any("…" in word for word in words):
        try:
            recipe.load_config(ROOT / recipes[0], ["data.train=shards", *overrides])
        except ConfigError as error:
            pytest.fail(str(error))
    for word in overrides:
        key = word.partition("=")[0]
        assert key in recipe.KEYS or [one for one in recipe.KEYS if one.endswith(f".{key}")], f"no setting {key}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_can_be_typed(page: Path) -> None:
    for number, line in commands(page):
        words = [word for word in our_words(line) if word not in ("…", "...")]
        if words and re.fullmatch(r"[a-z][a-z-]*", words[0]):
            try:
                require_options(words)
                if words[0] in ("check", "plan", "train", "batches"):
                    require_settings(words)
            except (AssertionError, click.BadParameter, pytest.fail.Exception) as error:
                pytest.fail(f"{page.name}, about line {number}: {line}\n{error}")


def test_commands_of_the_pages_are_found() -> None:
    found = [our_words(line) for page in PAGES for _, line in commands(page)]
    verbs = {words[0] for words in found if words}
    assert {"shard", "train", "evaluate", "merge", "plan", "inspect", "stats"} <= verbs
    with pytest.raises(AssertionError, match="shard has no --outt"):
        require_options(["shard", "a.jsonl", "--outt", "b"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_and_scripts_are_there(page: Path) -> None:
    targets = set(re.findall(r"^([a-z.-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for _, line in commands(page):
        words = words_of(line)
        if words[:1] == ["make"] and len(words) > 1:
            assert words[1] in targets, line
        if words[:1] in (["python"], ["sbatch"], ["accelerate"]):
            for word in words:
                if re.fullmatch(r"(benchmarks|examples|slurm|accelerate_configs|launch)/[a-z0-9_/]+\.\w+", word):
                    assert (ROOT / word).is_file(), line


def test_the_row_of_the_readme_can_be_pasted_and_the_walk_has_whole_rows(tmp_path: Path) -> None:
    walk = ROOT / "examples/walk"
    (pasted,) = re.findall(r"```json\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my.json").write_text(pasted, encoding="utf-8")
    (tmp_path / "charts").symlink_to(walk / "charts")
    settings = ShardConfig(media_root=walk)
    (trajectory,) = load_trajectories(tmp_path / "my.json", settings)
    assert len(trajectory.images) == 1
    ids = []
    for name, num_rows in (("train", 20), ("held_out", 5)):
        rows = list(load_trajectories(walk / f"{name}.jsonl", ShardConfig()))
        assert len(rows) == num_rows
        assert sum(len(row.images) for row in rows) >= 2
        ids += [row.id for row in rows]
    assert len(set(ids)) == 25
    stats = collect_stats([str(walk / "train.jsonl")], [str(walk / "held_out.jsonl")], None, RowConfig())
    assert stats.against is not None
    assert (stats.against.exact.num_rows, stats.against.near.num_rows) == (0, 0)


# ---- links -----------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The headings of a page, as GitHub and MkDocs name them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = Path(os.path.normpath(page.parent / name)) if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


def test_every_page_is_in_the_site() -> None:
    listed = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in PAGES[1:])


# ---- what is made from the code --------------------------------------------------------------------------------------


def test_the_reference_is_of_today() -> None:
    page = (ROOT / reference.PAGE).read_text(encoding="utf-8")
    assert page == reference.page(), "write it anew: python -m gemma_dist.reference"


def test_the_reference_has_every_setting_and_every_option() -> None:
    page = reference.page()
    for key in recipe.KEYS:
        assert f"| `{key}` |" in page
    for command in cli.commands.values():
        for param in command.get_params(click.Context(command)):
            if isinstance(param, click.Option) and param.opts[0] not in ("--help", "-h"):
                assert f"| `{param.opts[0]}` |" in page, (command.name, param.opts)


def test_the_tour_lists_every_module_and_no_other() -> None:
    package = ROOT / "gemma_dist"
    tour = (ROOT / "docs/tour.md").read_text(encoding="utf-8")
    listed = tour.partition("## Every file\n")[2].partition("    launch/")[0]
    parts = re.split(r"(?m)^ {4,6}([a-z_/]+)/ *", listed)[1:]
    named = {
        f"{folder}/{name}".removeprefix("gemma_dist/")
        for folder, names in zip(parts[::2], parts[1::2], strict=True)
        for name in re.findall(r"(?<![\w/])\w+\.py", names)
    }
    modules = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    assert named == {path for path in modules if not path.endswith("/__init__.py")}


def said_in_code() -> str:
    """The strings of the package, those that stand together joined, `…` for what is filled in; and the Makefile."""
    found = [(ROOT / "Makefile").read_text(encoding="utf-8")]
    for path in sorted((ROOT / "gemma_dist").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found).replace("`", "")


def test_every_message_of_troubleshooting_is_said_by_the_code() -> None:
    said = said_in_code()
    rows = re.findall(r"^\| (.*?) \| ", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    quoted = [words for row in rows for words in re.findall(r"^`([^`]+)`$", row)]
    assert len(quoted) > 30
    for words in quoted:
        for part in words.split("…"):
            assert part.strip() in said, words
