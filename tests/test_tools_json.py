"""`tools.json` beside the shards: each declaration once, in any number of pieces and processes, after appends too."""

import json
from pathlib import Path
from typing import Any

import pytest

from gemma_dist.config import ShardConfig
from gemma_dist.errors import DataError
from gemma_dist.shards import assemble, sharding
from gemma_dist.shards.manifest import read_manifest, write_manifest
from gemma_dist.shards.sharding import run_shard
from gemma_dist.show.row import inspect_row
from tests.support.corpus import write_rows


def tool(name: str, **parameter: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"x": parameter}}
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}


ADD, NOW, PLOT = tool("add", type="integer"), tool("now", type="string"), tool("plot", type="array")
OTHER_ADD = tool("add", type="number")


def row(name: str, *tools: dict[str, Any], calls: bool = False) -> dict[str, Any]:
    said: dict[str, Any] = {"role": "assistant", "content": "Hello."}
    if calls:
        said = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    return {"id": name, "messages": [{"role": "user", "content": "Hi"}, said], "tools": list(tools)}


ROWS = [row("a", NOW), row("b", NOW, ADD), row("c"), row("d", PLOT), row("e", json.loads(json.dumps(ADD)))]


def shard(folder: Path, rows: list[Any], model: str, name: str = "rows", **options: Any) -> Any:
    source = write_rows(folder / f"{name}.jsonl", rows)
    settings = options.pop("settings", ShardConfig())
    return run_shard([source], folder / "out", model, settings, False, **{"num_workers": 1, **options})


def listed(folder: Path) -> Any:
    return json.loads((folder / "out" / "tools.json").read_text())


def test_each_declaration_once_in_any_number_of_processes(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "PIECE_BYTES", 400)
    found = []
    for num_workers in (1, 2):
        folder = tmp_path / str(num_workers)
        folder.mkdir()
        shard(folder, ROWS, model, num_workers=num_workers)
        assert listed(folder) == [NOW, ADD, PLOT]
        found.append((folder / "out" / "tools.json").read_bytes())
        assert {path.name for path in (folder / "out").iterdir()} == {
            ".finished",
            "manifest.arrow",
            "tools.json",
            *(path.name for path in (folder / "out").glob("train-*.parquet")),
        }
    assert found[0] == found[1]


def test_no_tools_no_file(tmp_path: Path, model: str) -> None:
    shard(tmp_path, [row("a")], model)
    assert not (tmp_path / "out" / "tools.json").exists()


def test_tools_are_listed_as_they_are_trained(tmp_path: Path, model: str) -> None:
    rows = [row("a", tool("f", anyOf=[{"type": "integer"}, {"type": "null"}]))]
    shard(tmp_path, rows, model, settings=ShardConfig(schemas="simplify"))
    assert listed(tmp_path) == [tool("f", type="integer", nullable=True)]


def test_one_name_declared_in_two_ways_is_listed_twice_and_said(tmp_path: Path, model: str) -> None:
    report = shard(tmp_path, [row("a", ADD), row("b", OTHER_ADD), row("c", ADD)], model)
    assert listed(tmp_path) == [ADD, OTHER_ADD]
    assert report.summary().endswith("1 x tools are declared in different ways, such as add; tools.json holds each")


def test_an_append_adds_its_tools(tmp_path: Path, model: str) -> None:
    shard(tmp_path, [row("a", ADD)], model)
    shard(tmp_path, [row("b", NOW, ADD)], model, "more", append=True)
    assert listed(tmp_path) == [ADD, NOW]


def test_a_killed_append_leaves_no_tools_behind(tmp_path: Path, model: str) -> None:
    shard(tmp_path, [row("a", ADD)], model)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            shard(tmp_path, [row("b", PLOT)], model, "killed", append=True)
    shard(tmp_path, [row("c", NOW)], model, "more", append=True)
    assert listed(tmp_path) == [ADD, NOW]


def forget_tools(out: Path) -> None:
    """Make the folder one of an earlier version, which listed no tools."""
    manifest = read_manifest(out / "manifest.arrow", "")
    table = manifest.table.replace_schema_metadata(None)
    write_manifest(out, manifest.header, manifest.header["shards"], lambda: [table], num_tools=None)
    (out / "tools.json").unlink()


def test_an_append_to_shards_of_an_earlier_version_lists_their_tools_too(tmp_path: Path, model: str) -> None:
    shard(tmp_path, [row("a", ADD), row("b", ADD)], model)
    forget_tools(tmp_path / "out")
    shard(tmp_path, [row("c", NOW)], model, "more", append=True)
    assert listed(tmp_path) == [ADD, NOW]


def test_a_file_of_the_user_is_not_replaced(tmp_path: Path, model: str) -> None:
    shard(tmp_path, [row("a", ADD)], model)
    forget_tools(tmp_path / "out")
    (tmp_path / "out" / "tools.json").write_text("mine")
    with pytest.raises(DataError, match="move it to another folder"):
        shard(tmp_path, [row("b", NOW)], model, "more", append=True)
    assert (tmp_path / "out" / "tools.json").read_text() == "mine"


def test_refused_rows_leave_no_list(tmp_path: Path, model: str) -> None:
    with pytest.raises(DataError, match="1 of 2 rows were refused"):
        shard(tmp_path, [row("a", ADD), {"id": "b", "messages": []}], model)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rejected.jsonl"]


# ---- the report ------------------------------------------------------------------------------------------------------


def test_the_report_counts_rows_that_call_without_declarations(tmp_path: Path, model: str) -> None:
    report = shard(tmp_path, [row("a", calls=True), row("b", calls=True), row("c", ADD, calls=True)], model)
    assert report.notes == {"rows call tools but declare none": 2}
    assert report.summary().endswith("\n2 x rows call tools but declare none")


def test_report_and_inspect_spell_what_to_do(tmp_path: Path, model: str) -> None:
    rows = [row("a", tool("f", type="integer", default=1)), row("b", tool("f", type="integer", default=1))]
    report = shard(tmp_path, rows, model)
    said = "tool f: the chat template does not show `default` of x; use --schemas simplify"
    assert report.summary().endswith(f"2 x {said}")
    assert inspect_row(tmp_path / "rows.jsonl", model, 1, ShardConfig()).notes == {said: 1}


def test_a_long_report_is_cut(tmp_path: Path, model: str) -> None:
    tools = [tool(f"f{number:02}", type="integer", default=1) for number in range(30)]
    report = shard(tmp_path, [row("a", *tools), row("b", tools[29])], model)
    lines = report.summary().splitlines()
    assert lines[2].startswith("2 x tool f29: ")
    assert lines[3].startswith("1 x tool f00: ")
    assert lines[22:] == ["and 10 more such notes: `gemma-dist shard … --json` prints all"]
    assert len(report.to_json()["notes"]) == 30
