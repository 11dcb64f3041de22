"""What a GGUF file says of itself, its chat template among it, without a package for it: the tensors are not read.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian: "GGUF"; the version, a uint32 (2
or 3); the numbers of tensors and of entries, two uint64; then each entry: its key, a uint32 for the type of its value,
and the value. A string is a uint64 for its length and so many bytes of UTF-8; an array the type of its items, a uint64
for their number, and the items.
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO

from gemma_dist.errors import ConfigError

MAGIC = b"GGUF"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_ITEMS = 10_000_000  # of an array, or bytes of a string: Gemma's vocabulary has 262,144 tokens


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF does."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_metadata(path: Path) -> dict[str, Any]:
    """All entries of a GGUF file, by their keys.

    Raises:
        ConfigError: it is no GGUF of a version that is known, or cut short.
    """
    try:
        with path.open("rb") as file:
            magic, version = file.read(4), _scalar(file, "I")
            if magic != MAGIC or version not in (2, 3):
                raise ValueError(f"it begins with {magic!r}, version {version}")
            _, num_entries = _scalar(file, "Q"), _scalar(file, "Q")
            return {_string(file): _value(file, _scalar(file, "I")) for _ in range(min(num_entries, MAX_ITEMS))}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); check the path") from error
    except (ValueError, struct.error, RecursionError) as error:
        raise ConfigError(f"{path} is not a whole GGUF file ({error}); convert or download it again") from None


def _scalar(file: BinaryIO, code: str) -> Any:
    size = struct.calcsize(f"<{code}")
    return struct.unpack(f"<{code}", file.read(size))[0]


def _string(file: BinaryIO) -> str:
    return _bytes(file, _scalar(file, "Q")).decode("utf-8", errors="replace")


def _bytes(file: BinaryIO, num_bytes: int) -> bytes:
    data = file.read(num_bytes) if num_bytes <= MAX_ITEMS else b""
    if len(data) != num_bytes:
        raise ValueError(f"{num_bytes:,} bytes were announced that are not there")
    return data


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _string(file)
    if kind == ARRAY:
        kind, number = _scalar(file, "I"), _scalar(file, "Q")
        if number > MAX_ITEMS:
            raise ValueError(f"an array of {number:,} items")
        if kind in SCALARS:
            form = f"<{number}{SCALARS[kind]}"
            return list(struct.unpack(form, _bytes(file, struct.calcsize(form))))
        return [_value(file, kind) for _ in range(number)]
    if kind not in SCALARS:
        raise ValueError(f"a value of the unknown type {kind}")
    return _scalar(file, SCALARS[kind])
