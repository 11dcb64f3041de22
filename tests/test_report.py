"""What a run leaves in files: every text survives, and so does every record beside it."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_dist.logs import JsonlWriter, RunLog, read_jsonl, to_json, write_json

# What ends a line for somebody, and what UTF-8 cannot encode.
HARD = [
    "a\u2028b",
    "\u2029",
    "x\u0085y",
    "\r",
    "\r\n",
    "\v\f\x1c\x1d\x1e",
    "half \ud83d",
    "\udcff",
    "\\u2028",
    "東京 🌍",
]


@pytest.mark.parametrize("text", HARD, ids=ascii)
def test_records_survive_the_files(tmp_path: Path, text: str) -> None:
    rows: list[dict[str, Any]] = [{"text": text, text: [text]}, {"next": 1}]
    writer = JsonlWriter(tmp_path / "rows.jsonl", append=False)
    for row in rows:
        writer.write(row)
    writer.close()
    assert list(read_jsonl(tmp_path / "rows.jsonl")) == rows
    assert len((tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()) == 2, (
        "for readers of other tools too"
    )
    write_json(tmp_path / "value.json", rows)
    assert json.loads((tmp_path / "value.json").read_bytes()) == rows


@given(st.text(st.characters() | st.sampled_from('\ud800\u2028\u2029\x85\r\n\\"')))
def test_any_text_is_one_line_that_utf8_can_encode(text: str) -> None:
    line = to_json({"text": text})
    assert json.loads(line.encode()) == json.loads(json.dumps({"text": text}))
    assert line.splitlines() == [line]


def test_text_stays_readable() -> None:
    assert to_json({"city": "東京 🌍"}) == '{"city": "東京 🌍"}'


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    """As other writers leave them: not escaped, and with carriage returns between the tokens."""
    (tmp_path / "rows.jsonl").write_bytes('{"a":\r"x\u2028\x85y"}\r\n{"a": 2}'.encode())
    assert list(read_jsonl(tmp_path / "rows.jsonl")) == [{"a": "x\u2028\x85y"}, {"a": 2}]


def test_a_resumed_log_keeps_the_steps_that_are_done(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}, "loss": 0.5, "note": "\u2028"}}\n' for step in (1, 2, 3)))
    RunLog(path, start_step=2, num_steps=3).close()
    assert [row["step"] for row in read_jsonl(path)] == [1, 2]
    RunLog(path, start_step=0, num_steps=3).close()
    assert list(read_jsonl(path)) == []
