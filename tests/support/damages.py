"""Ways in which disks and copies damage a file."""

from collections.abc import Callable
from pathlib import Path


def truncate(path: Path) -> None:
    """Half of it is left."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path: Path) -> None:
    """As a file system leaves a block that was never written: the size is right."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 512] = bytes(len(data[middle : middle + 512]))
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {"truncated": truncate, "zeroed": zero, "missing": Path.unlink}
