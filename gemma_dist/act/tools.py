"""The user's functions, each run of a task with a process of its own: it can be killed, and its state is the run's own.

    this process  ──  a process that has imported the functions  ──fork──  one process a run: calls, then the check

The one in the middle imports MODULE once and forks for each run, so a run begins with the module as it was imported,
within milliseconds, and what its calls change (a database in memory, a counter) is seen by its later calls and by its
checker, and by no other run. A call that takes too long is interrupted (TimeoutError), and where it does not heed that,
its process is killed with all that it started, and the next call begins with a new one. Messages are JSON, a line each:
this process unpickles nothing, imports nothing of the user's, and its GPU is not forked.
"""

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_dist.chat.tools import Result
from gemma_dist.errors import ConfigError, EvaluationError

GRACE_S = 1.0  # from the interrupt of a call to the kill of its process
START_S = 600  # for the import of the user's module


@dataclass(frozen=True)
class Functions:
    """What the user names, each as MODULE:FUNCTION."""

    tools: str
    check: str | None = None
    setup: str | None = None


class ToolServer:
    """The process that has imported the user's functions. Close it at the end: the runs' processes end with it."""

    def __init__(self, functions: Functions, *, timeout_s: float, declare: bool) -> None:
        """Import the functions. Raises ConfigError where that fails, or one cannot be declared and has to be."""
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        ours, theirs = socket.socketpair()
        self._socket, handle = ours, theirs.fileno()
        given = json.dumps({**vars(functions), "declare": declare})
        # What functions print goes to standard error, as all that is said beside results.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gemma_dist.act.tool_process", str(handle), given],
            pass_fds=[handle],
            stdin=subprocess.DEVNULL,
            stdout=2,
        )
        theirs.close()
        ours.settimeout(START_S)
        try:
            told = json.loads(ours.makefile("rb").readline() or b"null")
        except (OSError, ValueError):
            told = None
        if told is None or "error" in told:
            self.close()
            raise ConfigError(told["error"] if told else f"--tools {functions.tools}: its process ended as it started")
        self.names: list[str] = told["names"]
        self.declared: list[Any] = told["declared"]  # [] where that was not asked for

    def begin(self) -> socket.socket:
        """A connection to a new process of a run. Raises EvaluationError where there is none to be had."""
        ours, theirs = socket.socketpair()
        try:
            with self._lock:
                socket.send_fds(self._socket, [b"+"], [theirs.fileno()])
        except OSError as error:
            ours.close()
            raise EvaluationError(
                f"the process that holds the tools has ended ({error}); run the same command"
            ) from None
        finally:
            theirs.close()
        return ours

    def close(self) -> None:
        """End the process."""
        self._socket.close()
        self._process.terminate()
        self._process.wait()


class Box:
    """A run's process: calls one after the other, then the check. Close it when the run ends."""

    def __init__(self, server: ToolServer, row: Mapping[str, Any]) -> None:
        """`row` is the task, for those of the user's functions that want it."""
        self._server, self._row = server, json.dumps(row, default=lambda _: None)
        self._connection: socket.socket | None = None
        self._process = 0
        self._buffer: Any = None

    @property
    def names(self) -> Sequence[str]:
        """What may be called."""
        return self._server.names

    def call(self, name: str, arguments: Mapping[str, Any]) -> Result:
        """What a tool answers; errors are answers, too."""
        told = self._ask({"call": name, "arguments": arguments})
        if isinstance(told, str):
            return Result(f"Error: {told}")
        return Result(told["text"], tuple(map(base64.b64decode, told["images"])))

    def check(self, messages: Sequence[Any]) -> tuple[float, str]:
        """What the checker says of a whole run: its reward, and "", or what it raised."""
        told = self._ask({"check": messages})
        return (0.0, told) if isinstance(told, str) else (told["reward"], told["problem"])

    def close(self) -> None:
        """End the process, and what it started."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
            if self._process:
                with contextlib.suppress(OSError):
                    os.killpg(self._process, signal.SIGKILL)

    def _ask(self, question: Mapping[str, Any]) -> Any:
        """The answer of the process, which is begun if need be; words where there was none."""
        if self._connection is None:
            self._begin()
        return self._exchange(json.dumps(question, default=lambda _: None))

    def _begin(self) -> None:
        """Start a process with the task. Raises EvaluationError where its setup fails."""
        self._connection, self._process = self._server.begin(), 0
        self._buffer = self._connection.makefile("rwb")
        told = self._exchange(f'{{"row": {self._row}, "timeout_s": {self._server.timeout_s}}}')
        if not isinstance(told, str):
            self._process = told["process"]
            told = self._exchange("")
        problem = told if isinstance(told, str) else told["problem"]
        if problem:
            self.close()
            raise EvaluationError(f"the tools could not be set up for this task: {problem}")

    def _exchange(self, line: str) -> Any:
        """Send a line, unless it is empty, and wait for one."""
        assert self._connection is not None
        timeout_s = self._server.timeout_s
        self._connection.settimeout(timeout_s + GRACE_S)
        try:
            if line:
                self._buffer.write(line.encode() + b"\n")
                self._buffer.flush()
            answer = self._buffer.readline()
            if answer.endswith(b"\n"):
                return json.loads(answer)
            problem = "the process of the tools ended; it was begun anew, and what they kept is lost"
        except TimeoutError:
            problem = f"TimeoutError: no answer within {timeout_s:g} s; the process of the tools was begun anew"
        except OSError as error:
            problem = f"the process of the tools ended ({error}); it was begun anew, and what they kept is lost"
        self.close()
        return problem
