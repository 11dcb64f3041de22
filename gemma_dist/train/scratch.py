"""A folder for a while: gone when its process ends, however that ends.

A signal, or a launcher that ends its ranks, leaves a process no time to clear up. So a small process of its own waits
for the end of the one that made the folder (the end of its standard input) and removes the folder then.

    python -m gemma_dist.train.scratch FOLDER MADE...       MADE: folders around it to remove where they are empty
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

DONE = b"done"  # what the process says where no other rank is at work in the folder any more
PROMPT_S = 5.0  # for it to let go of its locks
LINGER_S = 40.0  # else: how long others may go on to write there, until their launcher has ended them
PATIENCE_S = 60.0  # of the process that made the folder, for it to be gone


@contextlib.contextmanager
def scratch_folder(folder: Path, num_ranks: int = 1) -> Iterator[None]:
    """Within, `folder` is there, made anew; afterwards neither it nor a folder around it that was made for it.

    Args:
        num_ranks: that write to it.
    """
    made = [path for path in (folder.parent, *folder.parent.parents) if not path.exists()]
    command = [sys.executable, "-P", "-m", "gemma_dist.train.scratch", str(folder), *map(str, made)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    quiet = subprocess.DEVNULL  # whoever reads our output is not to wait for that process
    waits = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True, env=environment
    )
    assert waits.stdin is not None, "a pipe"
    ended_well = False
    try:
        folder.mkdir(parents=True)
        yield
        ended_well = True
    finally:
        with contextlib.suppress(OSError):
            waits.stdin.write(DONE if ended_well or num_ranks == 1 else b"")
        with contextlib.suppress(OSError):
            waits.stdin.close()
        end = time.monotonic() + PATIENCE_S
        while (folder.exists() or any(path.exists() for path in made)) and time.monotonic() < end:
            if waits.poll() is not None:
                break
            time.sleep(0.01)


def remove(folder: Path, made: list[Path]) -> None:
    """Remove a folder with all that is in it, and those around it, innermost first, as far as nothing is in them and
    no other process has locked them."""
    shutil.rmtree(folder, ignore_errors=True)
    for path in made:
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.rmdir()
            finally:
                os.close(handle)


def main(folder: Path, made: list[Path]) -> None:
    """Wait for the end of the standard input, and remove: again where that process had not let go of its locks yet, or
    where another rank has made the folder anew."""
    is_done = sys.stdin.buffer.read() == DONE
    end = time.monotonic() + (PROMPT_S if is_done else LINGER_S)
    while time.monotonic() < end:
        if any(path.exists() for path in (folder, *made)):
            remove(folder, made)
        elif is_done:
            return
        time.sleep(0.05)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(word) for word in sys.argv[2:]])
