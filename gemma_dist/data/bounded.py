"""What strangers wrote, run in a process of its own that may take so much time and memory, and no more.

A chat template is a program, and a pattern or a schema can take hours of a row of 40 bytes. No rule of ours tells all
of these from harmless ones, so the system counts: seconds of the processor's time (not of the clock, so that a busy
machine refuses nothing) and bytes of memory. What goes over is stopped with its process, and the next gets a new one.

The process answers lines of JSON with lines of JSON: {"call": [...]} -> {"returned": ..., "seconds": 0.1}, or
{"refused": "why", "seconds": 0.1}.
"""

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import IO, Any

ENDED_BY_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
OUT_OF_MEMORY = 77  # an exit code of ours
MAX_SAID = 2000  # characters of a refusal: a template may raise gigabytes


class RefusedError(Exception):
    """The function raised: the message is its own."""


class OverLimitError(RefusedError):
    """The function took more than it may: the message says of what."""


_left: ContextVar[float | None] = ContextVar("_left", default=None)  # seconds; None: no limit


@contextmanager
def together(seconds: float) -> Iterator[None]:
    """Within, what this thread calls may take so many seconds of processor time in all: a row may have a thousand calls
    that each take a little less than one may."""
    token = _left.set(seconds)
    try:
        yield
    finally:
        _left.reset(token)


def spend(seconds: float) -> None:
    """Take processor time from what `together` gives. OverLimitError where that has none left."""
    left = _left.get()
    if left is not None:
        _left.set(left - seconds)
        if seconds > left:
            raise OverLimitError("with the others of its row it takes more processor time than a row may")


class Bounded:
    """A function that runs in another process, one call at a time. Threads may share it, and a fork gets its own."""

    def __init__(self, function: str, *, seconds: int, num_bytes: int) -> None:
        """No process is started before the first call.

        Args:
            function: where it is: "gemma_dist.data.module:name". It takes and gives what JSON can say.
            seconds: of processor time that a call may take (up to one more).
            num_bytes: of memory that the process may hold, Python's own 40 MB and its libraries among them.
        """
        # -P: else Python looks for modules in the current folder first, which may be one of strangers' rows.
        self._command = [sys.executable, "-P", "-m", "gemma_dist.data.bounded", function, str(seconds), str(num_bytes)]
        self._seconds, self._num_bytes = seconds, num_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._forget()

    def __call__(self, *args: object) -> Any:
        """What the function gives. RefusedError where it raises, OverLimitError where it takes more than it may."""
        if self._pid != os.getpid():
            self._forget()  # of the process that was forked
        line = json.dumps({"call": args}).encode() + b"\n"
        with self._lock:
            is_fresh = self._process is None
            answer, code = self._ask(line)
            if code == OUT_OF_MEMORY and not is_fresh:  # it may have held what earlier calls left
                answer, code = self._ask(line)
        if code is not None:
            raise OverLimitError(self._why(code))
        said = json.loads(answer)
        spend(said["seconds"])
        if "refused" in said:
            raise RefusedError(said["refused"])
        return said["returned"]

    def _ask(self, line: bytes) -> tuple[bytes, int | None]:
        """The process's answer, and its exit code where it died of the question."""
        if self._process is None:
            self._process = _start(self._command)
        process = self._process
        stdin, stdout = _pipes(process)
        try:
            with suppress(BrokenPipeError):
                stdin.write(line)
                stdin.flush()
            answer = stdout.readline()
        except BaseException:  # such as Ctrl-C: what it still answers is to no later question
            self._process = None
            process.kill()
            _close(process)
            raise
        if answer.endswith(b"\n"):
            return answer, None
        self._process = None
        return answer, _close(process)

    def close(self) -> None:
        """End the process. The next call would start another."""
        with self._lock:
            if self._process is not None:
                _close(self._process)
                self._process = None

    def __del__(self) -> None:
        if getattr(self, "_process", None) is not None and self._pid == os.getpid():
            self.close()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._lock, self._process = threading.Lock(), None

    def _why(self, code: int) -> str:
        if code == -signal.SIGXCPU:
            return f"it takes more than {self._seconds} seconds of processor time"
        if code == OUT_OF_MEMORY or code == -signal.SIGKILL:
            return f"it takes more than {self._num_bytes / 2**20:,.0f} MiB of memory"
        return f"it ends the process that runs it (exit code {code})"


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    """The process, which finds the modules that this one finds."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def _close(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a process that has ended, or is told so by the end of its input."""
    for pipe in _pipes(process):
        with suppress(BrokenPipeError):
            pipe.close()
    return process.wait()


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin
    assert process.stdout
    return process.stdin, process.stdout


# ---- in the other process --------------------------------------------------------------------------------------------


def _serve(function: Callable[..., object], seconds: int, num_bytes: int) -> None:
    """Answer calls until the input ends."""
    for number in ENDED_BY_PARENT:  # which closes the input when it ends itself
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(ValueError, OSError):  # a Mac knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    for line in sys.stdin.buffer:
        used = time.process_time()
        resource.setrlimit(resource.RLIMIT_CPU, (int(used) + 1 + seconds, resource.RLIM_INFINITY))
        try:
            said = _answer(function, json.loads(line)["call"])
            answer = json.dumps(said | {"seconds": time.process_time() - used})
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


def _answer(function: Callable[..., object], args: list[object]) -> dict[str, object]:
    try:
        return {"returned": function(*args)}
    except (MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        return {"refused": str(error)[:MAX_SAID] or type(error).__name__}


if __name__ == "__main__":
    module, _, name = sys.argv[1].partition(":")
    _serve(getattr(importlib.import_module(module), name), int(sys.argv[2]), int(sys.argv[3]))
