"""WebDataset tars: rows and their images by the names of their members."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from gemma_dist.config import RowConfig
from gemma_dist.data.formats import tars
from gemma_dist.data.rows import read_ranges, read_rows, split_input
from gemma_dist.data.trajectory import parse_row
from gemma_dist.errors import DataError
from tests.support.corpus import picture

NEXT = {"type": "image"}
Members = list[tuple[str, bytes]]


def named(source: str) -> dict[str, Any]:
    return {"type": "image", "image": source}


def row(*parts: Any, **fields: Any) -> bytes:
    messages = [{"role": "user", "content": [{"type": "text", "text": "Look."}, *parts]}]
    return json.dumps({"messages": [*messages, {"role": "assistant", "content": "ok"}], **fields}).encode()


def write(path: Path, members: Members) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def images_of(path: Path) -> list[bytes]:
    ((where, raw),) = read_rows([path])
    if isinstance(raw, DataError):
        raise raw
    return parse_row(raw, where, RowConfig()).images


SAMPLES: dict[str, tuple[Members, list[int]]] = {
    "by number": (
        [("a/1.json", row(NEXT, NEXT, NEXT)), *((f"a/1.{n}.png", picture(n)) for n in (10, 2, 0))],
        [0, 2, 10],
    ),
    "one": ([("1.PNG", picture(1)), ("1.json", row(NEXT))], [1]),
    "by extension": (
        [("1.json", row(named("1.png"), named("0.png"))), ("1.0.png", picture(0)), ("1.1.png", picture(1))],
        [1, 0],
    ),
    "by name": ([("b/é.json", row(named("é.png"))), ("b/é.png", picture(4))], [4]),
    "by path": ([("./b/1.json", row(named("b/1.png"))), ("./b/1.png", picture(4))], [4]),
    "by its own column": ([("1.json", row(NEXT, images=["1.webp"])), ("1.webp", picture(5))], [5]),
    "in JSON text": (
        [
            ("1.json", json.dumps({"messages": json.dumps(json.loads(row(named("1.png")))["messages"])}).encode()),
            ("1.png", picture(6)),
        ],
        [6],
    ),
    "others beside": (
        [("LICENSE", b"x"), ("__meta__/a.json", b"x"), ("1.json", row(NEXT)), ("1.cls", b"3"), ("1.png", picture(7))],
        [7],
    ),
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_the_images_of_a_row_are_found(tmp_path: Path, kind: str) -> None:
    members, numbers = SAMPLES[kind]
    assert images_of(write(tmp_path / "a.tar", members)) == [picture(number) for number in numbers]


REFUSED: dict[str, tuple[Members, str]] = {
    "no row": ([("1.png", picture(0))], r"no member .json with the row beside '1.png'"),
    "no order": (
        [("1.json", row(NEXT, NEXT)), ("1.l.png", picture(0)), ("1.r.png", picture(1))],
        r"the order of the images 'l.png', 'r.png' is not known; name them in the row, or number them",
    ),
    "two rows": ([("1.json", row()), ("1.JSON", row())], r"two members '1.JSON'"),
    "not JSON": ([("1.json", b"{")], r"the member '1.json': not JSON at column 2"),
    "no object": ([("1.json", b"[]")], r"the member '1.json' holds \[\], not a JSON object"),
    "some named": (
        [("1.json", row(named("0.png"))), ("1.0.png", picture(0)), ("1.1.png", picture(1))],
        r"names some of its images, but not '1.png'",
    ),
    "two of a name": (
        [("0.json", row(named("0.png"))), ("0.png", picture(0)), ("0.0.png", picture(1))],
        r"'0.png' may be either of two members",
    ),
    "another's": ([("1.json", row(named("2.png"), NEXT)), ("1.png", picture(0))], r"'2.png' is none of the files"),
    "a path out": ([("1.json", row(named("/etc/passwd")))], r"the image '/etc/passwd' is none of the files of the row"),
    "video": ([("1.json", row()), ("1.mp4", b"")], r"the member '1.mp4' is no image"),
    "more images than parts": (
        [("1.json", row()), ("1.0.png", picture(0))],
        r"`images` holds 1 images for 0 image parts",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_ambiguous_is_refused_by_tar_sample_and_member(tmp_path: Path, kind: str) -> None:
    members, words = REFUSED[kind]
    path = write(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=rf"^{path}:1: .*{words}"):
        images_of(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("1.json")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(DataError, match=r"the member '1.json' is a link, a device or a sparse file"):
        images_of(tmp_path / "a.tar")


def test_ranges_are_the_tar_and_hold_whole_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "MEMBERS_HELD", 3)
    long = "long/" * 40  # in a header of its own
    members = [
        member
        for n in range(40)
        for member in ((f"{long}{n}.json", row(NEXT, id=f"r{n}")), (f"{long}{n}.png", picture(n)))
    ]
    path = write(tmp_path / "a.tar", members)
    rows = list(read_rows([path]))
    assert [where.line for where, _ in rows] == list(range(1, 41))
    for range_bytes in (1, 9000, 10**6):
        ranges = list(split_input(path, range_bytes))
        assert list(read_ranges(one for one, _ in ranges)) == rows
        assert (len(ranges) > 1) == (range_bytes < 10**6)
        assert [row for one, _ in ranges for row in read_ranges([one])] == rows


def test_a_tar_that_was_cut_or_damaged_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", [("1.json", row()), ("2.json", row()), ("3.json", row())])
    data = path.read_bytes()
    for broken in (data[:1536], data[:1700], data[:1024] + b"x" + data[1025:], b"", b"x" * 2000):
        path.write_bytes(broken)
        with pytest.raises(DataError, match="cannot be read to its end"):
            list(split_input(path, 1))
        with pytest.raises(DataError, match="cannot be read to its end"):
            list(read_rows([path]))


def test_a_sample_of_too_many_bytes_is_not_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.tar", [("1.json", row(id="a")), ("2.json", row()), ("2.txt", bytes(9000)), ("3.json", row())]
    )
    first, large, last = (found for _, found in read_rows([path], 5000))
    assert isinstance(large, DataError)
    assert f"{path}:2: the row has 9," in str(large)
    assert not isinstance(first, DataError)
    assert not isinstance(last, DataError)
