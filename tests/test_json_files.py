"""Files of JSON that are one value: an array of rows, an object around one, a row that is pretty-printed."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from gemma_dist.data.places import InputRange
from gemma_dist.data.rows import read_rows, split_input
from gemma_dist.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"{number} \u2028"}, {"role": "assistant", "content": "ok"}]}
    for number in range(3)
]
LINES = "\n".join(map(json.dumps, ROWS))


def rows_of(file: Path) -> list[tuple[str, Any]]:
    return [(str(where), row) for where, row in read_rows([file])]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.json.gz"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        json.dumps(ROWS, indent=2, ensure_ascii=False).replace("\n", "\r\n"),
        f"\n[\n{LINES.replace(chr(10), ',' + chr(10))}\n]\n",
        f"[{LINES.replace(chr(10), ',' + chr(10))}]",
    ],
)
def test_an_array_is_its_rows(tmp_path: Path, text: str, mark: str, name: str) -> None:
    data = (mark + text).encode()
    file = tmp_path / name
    file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert rows_of(file) == [(f"{file}:{number}", row) for number, row in enumerate(ROWS, start=1)]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("key", ["data", "rows"])
def test_an_object_around_one_list_of_rows(tmp_path: Path, key: str, indent: int | None) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"version": "1", "tags": ["a"], key: ROWS}, indent=indent))
    assert rows_of(file) == [(f"{file}:{number}", row) for number, row in enumerate(ROWS, start=1)]


@pytest.mark.parametrize("row", [ROWS[0], {"data": ROWS, "test": ROWS}, {"data": [1]}, ROWS[0] | {"data": [{}]}])
@pytest.mark.parametrize("indent", [None, 2])
def test_any_other_object_is_one_row(tmp_path: Path, row: Any, indent: int | None) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(row, indent=indent))
    assert rows_of(file) == [(f"{file}:1", row)]


def test_lines_of_objects_in_a_json_file_are_lines(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(f"{LINES}\n{{broken\n")
    *whole, (where, error) = rows_of(file)
    assert [row for _, row in whole] == ROWS
    assert where == f"{file}:4"
    assert isinstance(error, DataError)


def test_what_is_no_object_in_an_array_is_an_error_of_its_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([ROWS[0], "x", ROWS[1]]))
    first, (_, error), last = rows_of(file)
    assert (first[1], last[1]) == (ROWS[0], ROWS[1])
    assert str(error) == f"{file}:2: the array holds 'x', not a JSON object; write one object a row"


def test_an_array_is_not_cut_into_ranges(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(ROWS, indent=1))
    assert list(split_input(file, 20)) == [(InputRange(file), file.stat().st_size)]
    file.write_text(LINES)
    assert len(list(split_input(file, 20))) == 3


def test_objects_printed_one_after_the_other_are_refused_with_the_way_out(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text("\n".join(json.dumps(row, indent=2) for row in ROWS))
    with pytest.raises(DataError, match=r"rows.json: not JSON at column .*one object a line: jq -c \. .*rows.json"):
        rows_of(file)


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("\n")
    assert rows_of(tmp_path / "rows.json") == []
