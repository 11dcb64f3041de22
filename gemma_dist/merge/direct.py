"""A file that several threads write, past the kernel's page cache where that is faster.

Through the page cache each byte is copied once more, and pages are found for it first: on two cores that takes as long
as the sums of a merge. A local disk takes whole pages right from a thread's memory (`O_DIRECT` of open(2)).
"""

import os
from pathlib import Path

from gemma_dist.files import naming

PAGE_BYTES = 4096  # memory, place and length of a direct write are multiples of it
# File systems on a disk of this machine. Over a network, writes that each thread waits for are slower than those that
# the kernel gathers.
ON_LOCAL_DISK = {"ext4", "xfs"}


class SharedFile:
    """A new file of a known length, written at any place by several threads at once. A context manager.

    Direct writes come first, those through the page cache after `end_direct`: the kernel keeps the two apart by page
    at best, and warns of doing both at once.
    """

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.path, self.num_bytes = path, num_bytes

    def __enter__(self) -> "SharedFile":
        self.handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._direct = _open_direct(self.path)
        if self._direct is None:
            os.truncate(self.handle, self.num_bytes)
        else:
            os.posix_fallocate(self.handle, 0, self.num_bytes)  # so that its parts lie side by side on the disk
        return self

    def __exit__(self, *_: object) -> None:
        self.end_direct()
        os.close(self.handle)

    @property
    def is_direct(self) -> bool:
        """Whether writes go past the page cache now."""
        return self._direct is not None

    def end_direct(self) -> None:
        """From now on the page cache is used. No write may be under way."""
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def write(self, data: memoryview, at: int) -> None:
        """Write all bytes of `data` to the file from byte `at` on; in whole pages of the file and of memory while
        `is_direct`."""
        handle = self.handle if self._direct is None else self._direct
        with naming(self.path):
            while data:
                done = os.pwrite(handle, data, at)
                data, at = data[done:], at + done


def _open_direct(path: Path) -> int | None:
    """A file opened for direct writes; None where that is slower or impossible."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        if any(fields[2] == number and fields[fields.index("-") + 1] in ON_LOCAL_DISK for fields in mounts):
            return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError:
        pass
    return None
