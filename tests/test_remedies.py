"""What a message tells the user to do can be typed: each setting that it names, as the verb that prints it takes it."""

import ast
import functools
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from PIL import Image

import gemma_dist as package
from gemma_dist import config, recipe
from gemma_dist.__main__ import main
from gemma_dist.cli import cli
from gemma_dist.data.fit import parse
from gemma_dist.data.places import Where
from gemma_dist.errors import DataError, setting, spell
from gemma_dist.options import spellings
from gemma_dist.shards import sharding
from tests.support.corpus import row, shard_rows, write_rows
from tests.support.ranks import gemma_dist

FOLDER = Path(package.__file__).parent
RECIPE = Path(__file__).parents[1] / "launch" / "cpu_lora.yaml"

# Modules that one verb alone reaches may name its own options.
OWNERS = {
    "act/changes.py": "act",
    "act/finish.py": "act",
    "act/run.py": "act",
    "act/served.py": "act",
    "act/tools.py": "act",
    "config_act.py": "act",
    "chat/run.py": "chat",
    "chat/tools.py": "chat",
    "start/init.py": "init",
    "translate.py": "shard",
    "evaluate/client.py": "evaluate",
    "shards/assemble.py": "shard",
    "shards/folder.py": "shard",
    "shards/sharding.py": "shard",
    "plan/levers.py": "plan",
    "plan/margin.py": "plan",
    "plan/show.py": "plan",
    "plan/watch.py": "train",
    "plan/workload.py": "plan",
    "show/stats_report.py": "stats",
    "evaluate/compare.py": "compare",
    "evaluate/extra_body.py": "evaluate",
    "evaluate/faults.py": "evaluate",
    "evaluate/rescore.py": "score",
    "evaluate/room.py": "evaluate",
    "evaluate/run.py": "evaluate",
    "evaluate/server.py": "evaluate",
    "export/extract.py": "extract",
    "export/lora.py": "export",
    "export/rollouts.py": "export-rollouts",
    "export/run.py": "export",
    "export/weights.py": "export",
    "merge/folders.py": "merge",
    "merge/four_bit.py": "merge",
    "merge/layerwise.py": "merge",
    "merge/run.py": "merge",
    "model/card.py": "merge",
}


def syntax_trees() -> Iterator[tuple[str, ast.Module]]:
    """Each module of the package but those of the command line, by its path."""
    for path in sorted(FOLDER.rglob("*.py")):
        if path.name not in ("__main__.py", "cli.py") and not path.name.startswith("cli_"):
            yield str(path.relative_to(FOLDER)), ast.parse(path.read_text(encoding="utf-8"))


def option(verb: str, name: str) -> click.Parameter | None:
    """The option of a verb that is typed as `name`."""
    command = cli.commands[verb]
    return next(
        (param for param in command.get_params(click.Context(command)) if name in (*param.opts, *param.secondary_opts)),
        None,
    )


# ---- every place in the code -----------------------------------------------------------------------------------------


@functools.cache
def named_settings() -> set[tuple[str, str]]:
    """Name and value of each `setting(…)` of the package; 7 for a value that is known only when it runs."""
    found = set()
    for path, tree in syntax_trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setting":
                name, value = node.args
                assert isinstance(name, ast.Constant), f"{path}:{node.lineno}"
                found.add((str(name.value), str(value.value) if isinstance(value, ast.Constant) else "7"))
    return found


def require_accepted(verb: str, name: str, value: str, words: str) -> None:
    """`words` change the setting to the value in a call of `verb`, or of the verb that they name themselves."""
    if quoted := re.fullmatch(r"`gemma-dist (\S+) … (.+)`", words):
        verb, words = quoted.groups()
    if words.startswith("--"):
        typed, _, text = words.partition(" ")
        found = option(verb, typed)
        assert found is not None, f"{verb} has no {typed}"
        assert str(found.type_cast_value(click.Context(cli.commands[verb]), text)).lower() == value.lower()
    else:
        assert any(param.name == "overrides" for param in cli.commands[verb].params), f"{verb} takes no {words}"
        section = getattr(recipe.load_config(RECIPE, [words]), words.partition(".")[0])
        assert str(getattr(section, name)).lower() == value.lower()


@pytest.mark.parametrize("verb", cli.commands)
def test_every_setting_that_a_remedy_names_can_be_typed(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    Path("FOLDER").mkdir()
    assert len({name for name, _ in named_settings()}) >= 8
    for name, value in named_settings():
        words = spell(setting(name, value), spellings(cli.commands[verb]))
        require_accepted(verb, name, value, words)


def texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The strings of a module with their lines, docstrings left out, `{}` for what an f-string fills in."""
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    inside = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield (
                node.lineno,
                "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values),
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not {node} & (docstrings | inside):
            yield node.lineno, node.value


def test_below_the_command_line_no_message_spells_an_option() -> None:
    seen = set()
    for path, tree in syntax_trees():
        for line, text in texts(tree):
            text = re.sub(
                r"(vllm serve|sglang serve|convert_hf_to_gguf\.py|llama-server) [^`\n]*", "", text
            )  # of servers
            text = re.sub(r"accelerate launch [^`\n]*", "", text)  # its options are its own
            text = re.sub(r"^--(query-(gpu|compute-apps)|format)=.*", "", text)  # and so are those of nvidia-smi
            text = re.sub(r"^--(no-optional-locks|always|abbrev=40|dirty|exclude=\*)$", "", text)  # and of git
            for verb, typed in re.findall(r"(?:gemma-dist ([a-z-]+) [^`]*?)?(--[a-z][\w-]*)", text):
                verb = verb or OWNERS.get(path)
                assert verb, f"{path}:{line}: {typed} where several verbs may come by: use errors.setting"
                assert option(verb, typed), f"{path}:{line}: {verb} has no {typed}"
                seen.add(path)
    assert OWNERS.keys() <= seen


# ---- as typed --------------------------------------------------------------------------------------------------------


def said(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a call that ends with a user error."""
    capsys.readouterr()
    assert main([str(word) for word in arguments]) == 2
    return capsys.readouterr().err


@pytest.fixture
def reading(tmp_path: Path, model: str) -> Callable[[str, Path], list[object]]:
    """The call of a verb that reads raw rows, for a file of such rows."""

    def words(verb: str, rows: Path) -> list[object]:
        return {
            "shard": ["shard", rows, "--model", model, "--out", tmp_path / "out", "--num-workers", 1],
            "inspect": ["inspect", rows, "--model", model],
            "evaluate": [
                "evaluate",
                "--data",
                rows,
                "--model",
                model,
                "--out",
                tmp_path / "out",
                "--max-new-tokens",
                2,
            ],
        }[verb]

    return words


def asked(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "Done."}]}


def image_row(source: object) -> dict[str, Any]:
    return asked([{"type": "image", "image": str(source)}])


@pytest.mark.parametrize("verb", ["shard", "inspect", "evaluate"])
@pytest.mark.parametrize("fault", ["control token", "large image", "image elsewhere", "image of another root"])
def test_a_row_is_taken_with_the_remedy_as_it_was_printed(
    verb: str, fault: str, tmp_path: Path, reading: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("rows", "images"):
        (tmp_path / name).mkdir()
    Image.new("1", (50, 40)).save(tmp_path / "images" / "small.png")
    if fault == "large image":
        Image.new("1", (8000, 6300)).save(tmp_path / "rows" / "large.png")
    bad = {
        "control token": asked("Say <turn|> twice."),
        "large image": image_row("large.png"),
        "image elsewhere": image_row(tmp_path / "images" / "small.png"),
        "image of another root": image_row("small.png"),
    }[fault]
    words = reading(verb, write_rows(tmp_path / "rows" / "rows.jsonl", [bad]))
    printed = re.search(r" use (--[\w-]+) (\S+)", said(words, capsys))
    assert printed
    value = str(tmp_path / "images") if printed[2] == "FOLDER" else printed[2]
    assert main([*map(str, words), printed[1], value]) == 0


def test_a_path_that_leads_up_is_taken_from_another_media_root(
    tmp_path: Path, reading: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows").mkdir()
    Image.new("1", (50, 40)).save(tmp_path / "rows" / "small.png")
    rows = write_rows(tmp_path / "rows.jsonl", [image_row("../rows/small.png")])
    words = reading("inspect", rows)
    message = said(words, capsys)
    assert "move it there or use --media-root FOLDER" in message
    assert main([*map(str, words), "--media-root", str(tmp_path / "rows")]) == 0


def test_a_long_row_is_shown_by_what_inspect_advises(
    tmp_path: Path, reading: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*map(str, reading("inspect", write_rows(tmp_path / "rows.jsonl", [row(1, num_calls=5)])))]
    words += ["--max-length", "60"]
    for expected in (["--too-long", "drop"], ["--max-length"]):
        printed = re.search(r" use (--[\w-]+) (\S+)", said(words, capsys))
        assert printed
        assert [*printed.groups()][: len(expected)] == expected
        words += printed.groups()
    assert main(words) == 0


def test_the_list_of_refused_rows_shows_what_shard_takes_in_many_processes_too(
    tmp_path: Path, reading: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "PIECE_BYTES", 1)
    words = reading("shard", write_rows(tmp_path / "rows.jsonl", [asked("<bos>"), asked("<eos> `content: x`")]))
    message = said([*words, "--num-workers", 2], capsys)
    logged = [json.loads(line)["error"] for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert len(logged) == 2
    for error in logged:
        assert error in message
        assert error.endswith("use --control-tokens escape")
    assert "`content: x`" in logged[1], "what the user wrote stays as it is"


def test_train_names_the_key_for_a_model_without_a_chat_template(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("chat_template.jinja"))
    shard_rows(tmp_path, str(bare), [row(1)], chat_template="gemma4_v5")
    words = ["train", RECIPE, f"model_name_or_path={bare}", f"data.train={tmp_path / 'shards'}",
             f"output_dir={tmp_path / 'out'}", "max_steps=1"]  # fmt: skip
    printed = re.search(r" or (data\.\S+=\w+)", said(words, capsys))
    assert printed
    gemma_dist(*words, printed[1])
    printed_by_inspect = said(["inspect", tmp_path / "rows.jsonl", "--model", bare], capsys)
    assert " or --chat-template gemma4_v5, " in printed_by_inspect


def test_a_damaged_row_group_is_left_out_as_inspect_advises(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shard_rows(tmp_path, model, [row(1)])
    file = tmp_path / "shards" / "train-00000.parquet"
    damaged = bytearray(file.read_bytes())
    damaged[100] ^= 1
    file.write_bytes(damaged)
    message = said(["inspect", tmp_path / "shards", "--model", model], capsys)
    (line,) = [line.strip() for line in message.splitlines() if line.startswith("    ")]
    printed = re.search(r"use `gemma-dist train … (data\.quarantine=)FILE`", message)
    assert printed
    (tmp_path / "bad.txt").write_text(line)
    (tmp_path / "whole").mkdir()
    shard_rows(tmp_path / "whole", model, [row(2)])  # without it nothing would be left to train on
    sources = f"data.train=[{tmp_path / 'shards'}, {tmp_path / 'whole' / 'shards'}]"
    words = [RECIPE, f"model_name_or_path={model}", sources]
    assert main(["check", *map(str, words), f"{printed[1]}{tmp_path / 'bad.txt'}"]) == 0


def test_from_python_a_remedy_names_the_setting() -> None:
    with pytest.raises(DataError, match=r"use `control_tokens: escape`$"):
        parse(asked("<turn|>"), Where(Path("a.jsonl"), 1), config.RowConfig())
