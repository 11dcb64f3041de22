"""Rows of WebDataset tars: the members of one key, which stand one behind the other, are a row.

    0001.json       the row, in any layout
    0001.0.png      an image of it
    0001.1.png

The key is the path up to the first dot of the name, as WebDataset has it; what comes behind, in lower case, is the
extension. A row may name an image by its whole path, its name, or its extension ("a/0001.0.png", "0001.0.png",
"0.png"). Where it names none, the images are its `images`, in the order of their numbers. Other members are ignored,
as other keys of a row are; nothing is ever written to disk, and no path of a member leads anywhere.
"""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO

from gemma_dist.data.places import InputRange, ReadRow, SizedRange, Where, read_row, too_large
from gemma_dist.data.strict import is_json_text, parse_json, short
from gemma_dist.data.types import RawRow, RowWithFiles
from gemma_dist.errors import DataError

_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # key and extension of a path
_META = re.compile(r"__[^/]*__($|/)")  # of WebDataset itself
_NUMBER = re.compile(r"\d+")
ROW = "json"
IMAGES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")
REFUSED = ("jsonl", "mp4", "webm", "avi", "mov", "mp3", "wav", "flac", "ogg", "m4a")  # what a row would lose with it
BLOCK_BYTES = 512  # of a tar: a header is one, and one of zeros ends it
MEMBERS_HELD = 1000  # by tarfile, which never asks for them again


@dataclass(frozen=True)
class _Sample:
    """The members of one key."""

    start: int  # byte of the tar
    end: int
    members: list[tarfile.TarInfo]

    @property
    def num_bytes(self) -> int:
        return sum(member.size for member in self.members)


def split(path: Path, range_bytes: int) -> Iterator[SizedRange]:
    """Ranges of whole samples, in bytes of the tar."""
    start, line, num_samples, end = 0, 1, 0, 0
    with path.open("rb") as file:
        for sample in _samples(file, 0, None):
            num_samples, end = num_samples + 1, sample.end
            if end - start >= range_bytes:
                yield InputRange(path, line, start, end), end - start
                start, line, num_samples = end, line + num_samples, 0
    if end > start or not end:
        yield InputRange(path, line, start, end), end - start


def read(input_range: InputRange, max_row_bytes: int) -> Iterator[ReadRow]:
    """The rows of the range's samples."""
    with input_range.file.open("rb") as file:
        samples = _samples(file, input_range.start, input_range.end)
        for number, sample in enumerate(samples, start=input_range.first_line):
            where = Where(input_range.file, number)
            if sample.num_bytes > max_row_bytes:
                yield too_large(where, sample.num_bytes, max_row_bytes)
            else:
                yield read_row(where, lambda sample: _read_sample(file, sample), sample)


def _samples(file: IO[bytes], start: int, end: int | None) -> Iterator[_Sample]:
    """The samples that begin in bytes [start, end) of a tar, found by the headers alone."""
    members = _members(file, start, end)
    for _, group in groupby(members, lambda member: _split_name(member.name)[0]):
        together = list(group)
        yield _Sample(together[0].offset, _end(together[-1]), together)


def _members(file: IO[bytes], start: int, end: int | None) -> Iterator[tarfile.TarInfo]:
    """The members that belong to a sample.

    Raises:
        EOFError: no block of zeros ends the tar: it was cut short, or is damaged.
    """
    file.seek(start)
    if not file.read(1):
        raise EOFError("it is empty")
    file.seek(start)
    position = start
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while end is None or position < end:
            member = tar.next()
            if member is None:
                file.seek(tar.offset)
                if file.read(BLOCK_BYTES) != bytes(BLOCK_BYTES):
                    raise EOFError("no block of zeros stands at its end")
                return
            position = _end(member)
            if len(tar.members) > MEMBERS_HELD:  # type: ignore[attr-defined]
                tar.members.clear()  # type: ignore[attr-defined]
            if not member.isdir() and not _META.match(member.name) and _split_name(member.name)[0]:
                yield member


def _end(member: tarfile.TarInfo) -> int:
    """Where the next member begins."""
    return member.offset_data + (-(-member.size // BLOCK_BYTES) * BLOCK_BYTES if member.isreg() else 0)


def _split_name(name: str) -> tuple[str, str]:
    """Key and extension: "a/0001.0.PNG" -> "a/0001", "0.png"; two empty strings where a name has no extension."""
    found = _NAME.fullmatch(name)
    return (found[1], found[2].lower()) if found else ("", "")


def _read_sample(file: IO[bytes], sample: _Sample) -> RawRow:
    """The row in the .json of a sample, with its images."""
    by_extension: dict[str, tarfile.TarInfo] = {}
    for member in sample.members:
        extension = _split_name(member.name)[1]
        kind = extension.rpartition(".")[2]
        if not member.isreg() or member.sparse is not None:
            raise DataError(
                f"the member {short(member.name)} is a link, a device or a sparse file; store the file itself"
            )
        if extension in by_extension:
            raise DataError(f"two members {short(member.name)} (capitals aside) in one sample; leave one of them out")
        if kind in REFUSED:
            raise DataError(f"the member {short(member.name)} is no image and no single row; leave it out")
        by_extension[extension] = member
    if ROW not in by_extension:
        names = ", ".join(short(member.name) for member in sample.members[:4])
        raise DataError(
            f"no member .{ROW} with the row beside {names}; the members of a sample stand one behind the other, under "
            "one name up to its first dot"
        )
    text = _read(file, by_extension[ROW])
    try:
        row = parse_json(text.decode())
    except (UnicodeDecodeError, DataError) as error:
        raise DataError(f"the member {short(by_extension[ROW].name)}: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"the member {short(by_extension[ROW].name)} holds {short(row)}, not a JSON object")
    images = {name: found for name, found in by_extension.items() if name.rpartition(".")[2] in IMAGES}
    return _with_images(file, row, images)


def _with_images(file: IO[bytes], row: RawRow, images: dict[str, tarfile.TarInfo]) -> RawRow:
    """The row with the files of its images, by each name that it may give them; as its `images`, where it gives none.

    Raises:
        DataError: a name may mean two of them, it names some only, or their order is not known.
    """
    files: dict[str, bytes] = {}
    unnamed = []
    texts = list(_strings(row)) if images else []
    for extension, member in images.items():
        data = _read(file, member)
        names = {member.name, member.name.removeprefix("./"), member.name.rpartition("/")[2], extension}
        for name in names:
            if files.setdefault(name, data) is not data:
                raise DataError(f"{short(name)} may be either of two members; name the images by number: KEY.0.png")
        if not any(_is_named(name, texts) for name in names):
            unnamed.append(extension)
    if len(unnamed) < len(images):
        if unnamed:
            raise DataError(f"the row names some of its images, but not {short(unnamed[0])}; name it, or leave it out")
    elif images:
        if row.get("images"):
            raise DataError(f"`images` of the row names none of the members, such as {short(unnamed[0])}")
        row = {**row, "images": _in_order(unnamed)}
    return RowWithFiles(row, files)


def _strings(row: RawRow) -> Iterator[str]:
    """All strings of a row, keys aside."""
    left: list[object] = [row]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, (dict, list)):
            left += value.values() if isinstance(value, dict) else value


def _is_named(name: str, texts: list[str]) -> bool:
    """Whether one of the strings is a name, or JSON text in which one is."""
    return any(text in (name, f"./{name}") or (is_json_text(text) and f'"{name}"' in text) for text in texts)


def _in_order(extensions: list[str]) -> list[str]:
    """The images by their numbers: "0.png", "2.png", "10.png"."""
    numbers = [tuple(map(int, _NUMBER.findall(extension))) for extension in extensions]
    if len(set(numbers)) < len(extensions):
        raise DataError(
            f"the order of the images {', '.join(map(short, extensions[:4]))} is not known; name them in the row, or "
            "number them: KEY.0.png, KEY.1.png"
        )
    return [extension for _, extension in sorted(zip(numbers, extensions, strict=True))]


def _read(file: IO[bytes], member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    data = file.read(member.size)
    if len(data) < member.size:
        raise EOFError("it ends within a member")
    return data
