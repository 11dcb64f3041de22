"""Inspect shows exactly what the model is given, from raw rows and from shards alike."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from gemma_dist.__main__ import main
from gemma_dist.config import EncodingConfig, ShardConfig
from gemma_dist.data.encode import load_encoder
from gemma_dist.data.encoded import IGNORE_INDEX
from gemma_dist.data.rows import read_rows
from gemma_dist.errors import DataError
from gemma_dist.shards.reader import load_trajectories, open_shards
from gemma_dist.show.row import inspect_row
from tests.support.corpus import row, shard_rows, write_rows
from tests.support.store import serve

ROWS = [row(number) for number in range(4)]


def test_raw_rows_and_shards_show_what_the_encoder_gives(tmp_path: Path, model: str) -> None:
    shard_rows(tmp_path, model, ROWS)
    encoder = load_encoder(model, EncodingConfig())
    for number, trajectory in enumerate(load_trajectories(tmp_path / "rows.jsonl", ShardConfig())):
        encoded = encoder.encode(trajectory)
        raw = inspect_row(tmp_path / "rows.jsonl", model, number + 1, ShardConfig())
        for data in (tmp_path / "rows.jsonl", tmp_path / "shards"):
            assert raw == inspect_row(data, model, number + 1, ShardConfig())
            assert raw == inspect_row(data, model, f"row-{number}", ShardConfig())
        shown = json.loads(json.dumps(raw.to_json()))
        assert (shown["id"], shown["ids"], shown["labels"]) == (
            f"row-{number}",
            encoded.input_ids,
            encoded.labels,
        )
        assert shown["tokens"] == [encoder.tokenizer.decode([token]) for token in encoded.input_ids]
        assert shown["num_text_tokens"] + shown["num_image_tokens"] == len(encoded.input_ids)
        assert shown["num_target_tokens"] == sum(label != IGNORE_INDEX for label in shown["labels"])


def test_a_rendered_row_marks_what_is_trained_and_shortens_images(tmp_path: Path, model: str) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    inspection = inspect_row(tmp_path / "rows.jsonl", model, 4, ShardConfig())
    plain, colored = inspection.render(color=False), inspection.render(color=True)
    assert re.findall("⟦(.*?)⟧", plain, re.DOTALL) == [
        "<|tool_call>call:plot{n:300}<tool_call|><|tool_response>",
        "Here is chart 3: étude ✓.<turn|>",
    ]
    assert f"<|image><|image|> x {inspection.num_image_tokens}<image|>" in plain
    assert plain.startswith(f"row-3: {len(inspection.ids)} tokens")
    assert "\x1b" not in plain
    assert re.sub(r"\x1b\[\d+m", "", colored) == plain
    assert "\x1b[32m⟦Here is chart 3" in colored


def test_a_row_that_is_not_there_says_how_many_there_are(tmp_path: Path, model: str) -> None:
    shard_rows(tmp_path, model, ROWS)
    for data in (tmp_path / "rows.jsonl", tmp_path / "shards"):
        for number in (5, 0, -1):
            with pytest.raises(DataError, match=f"has no row {number}: rows are counted from 1, and the last one is 4"):
                inspect_row(data, model, number, ShardConfig())
        for unknown in ("row-4", "row-4\udcff"):
            with pytest.raises(DataError, match="has no row with the id 'row-4"):
                inspect_row(data, model, unknown, ShardConfig())


def test_bad_rows_before_the_row_do_not_hide_it_and_a_bad_row_says_why(tmp_path: Path, model: str) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": []}, ROWS[1]])
    data.write_text("{broken\n" + data.read_text())
    for chosen in (3, "row-1"):
        assert inspect_row(data, model, chosen, ShardConfig()).id == "row-1"
    for number in (1, 2):
        with pytest.raises(DataError, match=rf"rows\.jsonl:{number}: "):
            inspect_row(data, model, number, ShardConfig())


PLACE = re.compile(r"^(?:error: )?(\S+):(\d+): ")


def test_the_place_in_a_message_names_the_row_to_inspect(tmp_path: Path, model: str) -> None:
    """Of each kind of data, whatever stands between the rows."""
    lines = [json.dumps(row) for row in ROWS[:3]]
    blank = tmp_path / "blank.jsonl"
    blank.write_text("\n\n" + "\n\n".join([*lines, '{"id": "bad", "messages": [{"role": "judge"}]}']) + "\n")
    with pytest.raises(DataError) as caught:
        list(load_trajectories(blank, ShardConfig()))
    file, line = PLACE.match(str(caught.value)).groups()  # type: ignore[union-attr]
    assert (file, line) == (str(blank), "9")
    with pytest.raises(DataError, match=re.escape(str(caught.value))):
        inspect_row(file, model, int(line), ShardConfig())
    assert [inspect_row(file, model, number, ShardConfig()).id for number in (3, 5, 7)] == ["row-0", "row-1", "row-2"]
    with pytest.raises(DataError, match=r"blank\.jsonl:4 is a blank line; the row after it is 5"):
        inspect_row(file, model, 4, ShardConfig())

    table = pa.Table.from_pylist([{"id": row["id"], "messages": json.dumps(row["messages"])} for row in ROWS])
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
    Dataset(table).save_to_disk(str(tmp_path / "saved"))
    for data in (tmp_path / "rows.parquet", tmp_path / "saved"):
        for where, found in read_rows([data]):
            assert isinstance(found, dict)
            assert inspect_row(where.file, model, where.line, ShardConfig()).id == found["id"]

    shard_rows(tmp_path, model, ROWS)
    (tmp_path / "more").mkdir()
    shard_rows(tmp_path / "more", model, ROWS[:2])
    shards = open_shards(tmp_path / "shards", tmp_path / "more/shards")
    for index in range(len(shards)):
        folder, _, number = shards.place(index).rpartition(":")
        assert inspect_row(folder, model, int(number), ShardConfig()).id == shards.id(index)


def test_an_id_that_is_missing_or_not_alone_is_refused_with_the_places(tmp_path: Path, model: str) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [ROWS[0], {**ROWS[1], "id": ""}, ROWS[0], {**ROWS[2], "id": 7}])
    with pytest.raises(DataError, match=r"has 2 rows with the id 'row-0': \S+rows\.jsonl:1, \S+rows\.jsonl:3"):
        inspect_row(data, model, "row-0", ShardConfig())
    assert inspect_row(data, model, "rows.jsonl:2", ShardConfig()).id == "rows.jsonl:2", "as a row without id is called"
    assert inspect_row(data, model, "7", ShardConfig()).id == "7"


def test_the_command_line_takes_a_number_or_an_id(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shard_rows(tmp_path, model, ROWS)

    def id_of(data: object, *words: str) -> str:
        capsys.readouterr()
        assert main(["inspect", str(data), "--model", model, "--json", *words]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])["id"]

    shards = tmp_path / "shards"
    assert id_of(shards, "--row", "2") == "row-1"
    assert id_of(shards, "--id", "row-1") == "row-1"
    assert main(["inspect", str(shards), "--model", model, "--json", "--id", ""]) == 2  # an unset variable of the shell
    assert "--id has no value" in capsys.readouterr().err
    with serve({path.name: path.read_bytes() for path in shards.iterdir()}) as server:
        assert id_of(server.url, "--row", "4") == "row-3"


def test_a_too_long_row_is_shown_as_the_shards_would_hold_it(tmp_path: Path, model: str) -> None:
    long = row(1, num_calls=5)
    data = write_rows(tmp_path / "rows.jsonl", [long])
    whole = inspect_row(data, model, 1, ShardConfig())
    limit = len(whole.ids) - 1
    cut = inspect_row(data, model, 1, ShardConfig(max_length=limit, too_long="cut_turns"))
    assert cut.ids == whole.ids[: len(cut.ids)]
    for too_long in ("drop", "error"):
        with pytest.raises(DataError, match=f"max_length is {limit}"):
            inspect_row(data, model, 1, ShardConfig(max_length=limit, too_long=too_long))
