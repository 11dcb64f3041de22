"""Work that waits for others, done by several threads at a time."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, cast

T = TypeVar("T")
R = TypeVar("R")


def in_parallel(
    jobs: Sequence[T],
    work: Callable[[T], R],
    num_threads: int,
    ends: Callable[[Exception], bool],
    stopped: threading.Event,
) -> Iterator[tuple[T, R | Exception]]:
    """Each job with what `work` makes of it, or what it raised, as they come from so many threads.

    None is begun any more once what `work` raises `ends` all of it, or who asks sets `stopped`; those under way still
    come. The threads end with the process: who leaves early,
    as by Ctrl-C, does not wait for them.
    """
    waiting, lock = iter(jobs), threading.Lock()
    results: queue.SimpleQueue[tuple[T, R | Exception] | None] = queue.SimpleQueue()

    def run() -> None:
        """Work until there is nothing left."""
        while not stopped.is_set():
            with lock:
                job = next(waiting, results)
            if job is results:
                break
            taken = cast(T, job)
            try:
                results.put((taken, work(taken)))
            except Exception as error:
                if ends(error):
                    stopped.set()
                results.put((taken, error))
        results.put(None)

    num_threads = min(num_threads, len(jobs))
    for _ in range(num_threads):
        threading.Thread(target=run, daemon=True).start()
    try:
        working = num_threads
        while working:
            result = results.get()
            if result is None:
                working -= 1
            else:
                yield result
    finally:
        stopped.set()
