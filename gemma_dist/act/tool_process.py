"""The other side of `tools.py`: a process that imports the user's functions, and forks one for each run.

It is started as `python -m gemma_dist.act.tool_process HANDLE OPTIONS` with one end of a socket.
"""

import base64
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gemma_dist.chat.tools import Function, Result, declare, load, load_functions, run
from gemma_dist.errors import ConfigError, GemmaDistError


def main() -> None:
    """Import, tell of it, and fork until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other side sees to an interrupt
    server = socket.socket(fileno=int(sys.argv[1]))
    options = json.loads(sys.argv[2])
    try:
        functions = load_functions(options["tools"])
        check, setup = (_load_one(options[name], f"--{name}") for name in ("check", "setup"))
    except GemmaDistError as error:
        _tell(server, {"error": str(error)})
        return
    _tell_names(server, functions, with_declarations=options["declare"])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended runs leave nothing to wait for
    while True:
        mark, handles, _, _ = socket.recv_fds(server, 1, 1)
        if not mark:
            return
        if os.fork() == 0:
            server.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.setsid()  # so that all it starts can be killed with it
            try:
                _serve(socket.socket(fileno=handles[0]), functions, check, setup)
            finally:
                os._exit(0)
        os.close(handles[0])


def _load_one(given: str | None, option: str) -> Callable[..., Any] | None:
    """The function that an option names, if it was given. ConfigError: it names none."""
    found = load(given, option) if given is not None else None
    if found is not None and not callable(found):
        raise ConfigError(f"{option} {given} is {type(found).__name__}, no function; name one")
    return found


def _tell_names(server: socket.socket, functions: Mapping[str, Function], *, with_declarations: bool) -> None:
    """What the functions are called, and how they are declared: by another process, since that imports transformers,
    which no run needs."""
    process = os.fork() if with_declarations else 0
    if process:
        os.waitpid(process, 0)
        return
    try:
        declared = declare(functions) if with_declarations else []
        _tell(server, {"names": list(functions), "declared": declared})
    except GemmaDistError as error:
        _tell(server, {"error": str(error)})
    finally:
        if with_declarations:
            os._exit(0)


def _tell(connection: socket.socket, value: object) -> None:
    connection.sendall(json.dumps(value).encode() + b"\n")


def _serve(
    connection: socket.socket,
    functions: Mapping[str, Function],
    check: Callable[..., Any] | None,
    setup: Callable[..., Any] | None,
) -> None:
    """Answer what one run asks, in order."""
    lines = connection.makefile("rb")
    task = json.loads(lines.readline())
    row, timeout_s = task["row"], task["timeout_s"]
    _tell(connection, {"process": os.getpid()})
    problem = ""
    if setup is not None:
        with _limit(timeout_s):
            _, problem = _value(setup, row)
    _tell(connection, {"problem": problem})
    for line in lines:
        asked = json.loads(line)
        if "call" in asked:
            with _limit(timeout_s):
                result = _call(functions, asked["call"], asked["arguments"])
            images = [base64.b64encode(image).decode() for image in result.images]
            _tell(connection, {"text": result.text, "images": images})
        else:
            assert check is not None
            with _limit(timeout_s):
                value, problem = _value(check, row, asked["check"])
            reward, wrong = _reward(value)
            _tell(connection, {"reward": reward, "problem": problem or wrong})


def _call(functions: Mapping[str, Function], name: str, arguments: Mapping[str, Any]) -> Result:
    if name not in functions:
        return Result(f"Error: there is no tool {name}; there are: {', '.join(functions)}")
    try:
        return run(functions[name], arguments)
    except TimeoutError as error:  # between the function and its end
        return Result(f"Error: TimeoutError: {error}")


def _value(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """What a function returns, and "", or what it raised."""
    try:
        return function(*arguments), ""
    except (Exception, SystemExit) as error:
        return None, f"{type(error).__name__}: {error}"


def _reward(value: object) -> tuple[float, str]:
    """A checker's word as a number, and "", or why it is none."""
    if value is None:
        return 0.0, "the checker returned None; return True, False or a number"
    try:
        reward = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        reward = float("nan")
    if not abs(reward) < float("inf"):
        return 0.0, f"the checker returned {value!r}, which is no number; return True, False or a number"
    return reward, ""


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Within, TimeoutError is raised after so many seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"no answer within {seconds:g} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
