"""Whether the files of a checkpoint are still what was written: their sizes and checksums stand in its marker.

CRC-32 (zlib): it finds what disks and copies damage, not what somebody forges.
"""

import errno
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict

from gemma_dist.errors import CheckpointError
from gemma_dist.files import naming
from gemma_dist.logs import to_json

READ_BYTES = 4 << 20
# What the system says of blocks that do not hold what was written. Other errors are no damage: a folder of another
# user, a network that is down.
UNREADABLE = {errno.EIO, errno.EBADMSG, errno.EUCLEAN}


class FileDigest(TypedDict):
    """What a marker says of one file."""

    bytes: int
    crc32: int


def digest_files(paths: Iterable[Path]) -> dict[str, FileDigest]:
    """By the files' names. Reads them whole: of files just written, from the page cache."""
    return {path.name: FileDigest(bytes=path.stat().st_size, crc32=_crc32(path)) for path in paths}


def visible_damage(folder: Path, files: Mapping[str, FileDigest]) -> list[str]:
    """What can be seen without reading: `files` that are missing or of another size, in words."""
    problems = []
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif (size := path.stat().st_size) != digest["bytes"]:
            problems.append(f"{name} has {size:,} of its {digest['bytes']:,} bytes")
    return problems


def damage(folder: Path, files: Mapping[str, FileDigest]) -> list[str]:
    """What of `files` is missing, of another size, unreadable or other bytes than were written, in words.

    Raises:
        OSError: one cannot be read for another reason than damage.
    """
    problems = visible_damage(folder, files)
    if problems:
        return problems
    for name, digest in files.items():
        try:
            if _crc32(folder / name) != digest["crc32"]:
                problems.append(f"{name} holds other bytes than were written (its CRC-32 differs)")
        except OSError as error:
            if error.errno not in UNREADABLE:
                raise
            problems.append(f"{name} cannot be read ({error.strerror})")
    return problems


def require_digests(value: object, path: Path) -> dict[str, FileDigest]:
    """The files of a marker, as read from JSON. CheckpointError where they are something else."""
    if not isinstance(value, dict) or not all(map(_is_digest, value.values())):
        raise CheckpointError(f"{path.name} is damaged: its list of files is none")
    return {name: FileDigest(bytes=one["bytes"], crc32=one["crc32"]) for name, one in value.items()}


def _is_digest(value: object) -> bool:
    return isinstance(value, dict) and all(type(value.get(name)) is int for name in ("bytes", "crc32"))


def json_crc32(value: object) -> int:
    """Of a value of JSON, as `to_json` writes it."""
    return zlib.crc32(to_json(value).encode())


def _crc32(path: Path) -> int:
    crc32 = 0
    with naming(path), path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            crc32 = zlib.crc32(piece, crc32)
    return crc32
