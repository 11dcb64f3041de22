"""What a signal does to a command. A thread sees each at once, since the main one may be waiting for another rank, in
code that no signal interrupts.

At SIGTERM a rank looks first whether another one has ended: that is why the launcher ends the rest. Else the command
decides, if it takes the signal (`take`); else SIGTERM ends the process, and the other signals do what they always do.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable

from gemma_dist import exits, failures, world
from gemma_dist.logs import log

Taker = Callable[[str, float], None]

_say: list[Callable[[str], None]] = []
_listening: list[int] = []  # the pipe that Python's runtime writes the number of every signal to that has a handler
_takers: dict[int, Taker] = {}
_regardless: list[bool] = []  # of other ranks' ends


def explain_sigterm(say: Callable[[str], None]) -> None:
    """Let a rank that is told to end `say` first whether another one has, and which way."""
    _say[:] = [say]
    _listen()
    _handle(signal.SIGTERM)


def take(numbers: Iterable[signal.Signals], taker: Taker) -> None:
    """Let `taker` decide what `numbers` do. It is called in a thread, with the name of the signal and the time of
    `time.monotonic` that it came at. Nothing changes where this is not the main thread of the process."""
    _regardless.clear()
    if threading.current_thread() is not threading.main_thread():
        return
    _listen()
    for number in numbers:
        _takers[number] = taker
        _handle(number)


def let_others_end() -> None:
    """From now on, it means nothing that another rank has ended: all of them are done with what they do together."""
    _regardless[:] = [True]


def _handle(number: int) -> None:
    """Give a signal a handler, which it has to have for its number to be written."""
    signal.signal(number, lambda *_: None)
    signal.siginterrupt(number, False)  # no write of a library to a network disk fails because of it


def _listen() -> None:
    if _listening:
        return
    arrived, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    _listening.append(arrived)
    threading.Thread(target=_wait, args=(arrived,), name="signals", daemon=True).start()


def _wait(arrived: int) -> None:
    """The thread that sees signals, whatever goes wrong with one: without it they would do nothing any more."""
    while number := os.read(arrived, 1):
        try:
            _answer(number[0], time.monotonic())
        except Exception as error:
            log.error("a signal was lost: %r", error)


def _answer(arrival: int, came: float) -> None:
    """Do what a signal asks for."""
    if arrival == signal.SIGTERM and not _regardless and (ended := world.ended_ranks(patience_s=0)):
        message = failures.of_ranks(ended)
        with contextlib.suppress(OSError, ValueError):  # nobody may read that any more
            for say in _say if message else ():
                say(message)
        exits.leave(failures.code_after(ended))
    if taker := _takers.get(arrival):
        taker(signal.Signals(arrival).name, came)
    elif arrival == signal.SIGTERM:
        exits.leave(exits.ENDED)
