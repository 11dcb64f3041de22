"""Inspect shows exactly what the model is given, from raw rows and from shards alike."""

import json
import re
from pathlib import Path

import pytest
from corpus import row, shard_rows, write_rows

from gemma_dist.config import DataConfig
from gemma_dist.data.encode import IGNORE_INDEX, load_encoder
from gemma_dist.data.inspect import inspect_row
from gemma_dist.data.shards import load_trajectories
from gemma_dist.errors import DataError

ROWS = [row(number) for number in range(4)]


def test_raw_rows_and_shards_show_what_the_encoder_gives(tmp_path: Path, model: str) -> None:
    shard_rows(tmp_path, model, ROWS)
    encoder = load_encoder(model, chat_template=None, enable_thinking=False)
    for number, trajectory in enumerate(load_trajectories(tmp_path / "rows.jsonl", DataConfig())):
        encoded = encoder.encode(trajectory)
        raw = inspect_row(tmp_path / "rows.jsonl", model, number, DataConfig())
        assert raw == inspect_row(tmp_path / "shards", model, number, DataConfig())
        shown = json.loads(json.dumps(raw.to_json()))
        assert (shown["id"], shown["ids"], shown["labels"]) == (
            f"row-{number}",
            encoded.input_ids,
            encoded.labels,
        )
        assert shown["tokens"] == [encoder.tokenizer.decode([token]) for token in encoded.input_ids]
        assert shown["num_text_tokens"] + shown["num_image_tokens"] == len(encoded.input_ids)
        assert shown["num_target_tokens"] == sum(label != IGNORE_INDEX for label in shown["labels"])


def test_the_picture_of_a_row_marks_what_is_trained_and_shortens_images(tmp_path: Path, model: str) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    inspection = inspect_row(tmp_path / "rows.jsonl", model, 3, DataConfig())
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
        for number in (4, -1):
            with pytest.raises(DataError, match="has 4 rows"):
                inspect_row(data, model, number, DataConfig())


def test_bad_rows_before_the_row_do_not_hide_it_and_a_bad_row_says_why(tmp_path: Path, model: str) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": []}, ROWS[1]])
    data.write_text("{broken\n" + data.read_text())
    assert inspect_row(data, model, 2, DataConfig()).id == "row-1"
    for number in (0, 1):
        with pytest.raises(DataError, match=rf"rows\.jsonl:{number + 1}: "):
            inspect_row(data, model, number, DataConfig())


def test_a_too_long_row_is_shown_as_the_shards_would_hold_it(tmp_path: Path, model: str) -> None:
    long = row(1, num_calls=5)
    data = write_rows(tmp_path / "rows.jsonl", [long])
    whole = inspect_row(data, model, 0, DataConfig())
    limit = len(whole.ids) - 1
    cut = inspect_row(data, model, 0, DataConfig(max_length=limit, too_long="cut_turns"))
    assert cut.ids == whole.ids[: len(cut.ids)]
    for too_long in ("drop", "error"):
        with pytest.raises(DataError, match=f"max_length is {limit}"):
            inspect_row(data, model, 0, DataConfig(max_length=limit, too_long=too_long))
