"""How the ranks of several machines meet, or learn that they will not.

Each machine has a launcher of its own, which watches its own ranks alone. Until all ranks are connected nobody would
tell those of one machine that another one's ended over a typo, or never came: torch lets them wait for hours, without a
word. So a thread of each rank looks into the store in which torch lets them meet (MASTER_ADDR, MASTER_PORT): there each
leaves a word that it has come, or why it could not.
"""

import contextlib
import datetime
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from gemma_dist import exits, world
from gemma_dist.logs import log

TIMEOUT_S = 900.0  # as the launchers wait for one another
GONE_S = 30.0  # how long a launcher's store, which was there before its ranks, may not answer
SAY_S, LOOK_S = 60.0, 1.0  # between lines of what is waited for; between looks
LINGER_S = 60.0  # a rank that could not start lets the others hear it, before its launcher ends, and the store with it


def over_machines() -> bool:
    """Whether some ranks may be on another machine; without a launcher nobody says where they are."""
    return world.world_size() > int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextlib.contextmanager
def waiting(timeout_s: float = TIMEOUT_S) -> Iterator[None]:
    """Within, the ranks connect. One that waits for others says for whom; where they end, or do not come within
    `timeout_s` seconds, it ends its process, in words: with the exit code of a user error, or of a step that hangs."""
    if not over_machines():
        yield
        return
    met = threading.Event()
    thread = threading.Thread(target=_look, args=(met, timeout_s), daemon=True)
    thread.start()
    try:
        yield
    finally:
        met.set()
        thread.join(2 * LOOK_S)


def tell(problem: str, code: int) -> None:
    """Let the ranks of other machines know why this one ends, and with which exit code, if it does so before they have
    met."""
    if not over_machines() or ("torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()):
        return
    with contextlib.suppress(Exception):  # nothing of it is worth the message that it is about
        end, store = time.monotonic() + LINGER_S, None
        while time.monotonic() < end and not (store := store or _store()) and _by_launcher():
            time.sleep(LOOK_S)
        if store is None:
            return
        reason = f"on {socket.gethostname()} could not start, so this one stops: {problem}"
        store.set(_key("ended", world.rank()), f"{code} {reason}")
        store.set(_key("heard", world.rank()), "")
        while time.monotonic() < end and not store.check([_key("heard", rank) for rank in range(world.world_size())]):
            time.sleep(0.1)


def _look(met: threading.Event, timeout_s: float) -> None:
    """The thread: from now on until all have met, or this process ends."""
    begin = answered = said = time.monotonic()
    store: Any = None
    while not met.wait(LOOK_S):
        store = store or _store()
        try:
            if store is not None:
                store.set(_key("came", world.rank()), socket.gethostname())
                _end_with_others(store)
                answered = time.monotonic()
        except Exception:  # torch's own, of a store that does not answer
            store = None
        now = time.monotonic()
        gone = now - answered > GONE_S and _by_launcher()
        if met.is_set():
            return
        if now - said > SAY_S and world.local_rank() == 0:
            said = now
            log.warning("waiting since %.0f s: %s", now - begin, _missing(store))
        if gone or now - begin > timeout_s:
            _end(f"{_missing(store)} after {now - begin:.0f} s. {_remedy()}", exits.HUNG)


def _end_with_others(store: Any) -> None:
    """End this process as another rank did that said that it could not start."""
    for rank in range(world.world_size()):
        if store.check([_key("ended", rank)]):
            store.set(_key("heard", world.rank()), "")
            code, _, reason = store.get(_key("ended", rank)).decode(errors="replace").partition(" ")
            _end(f"rank {rank} {reason}", int(code))


def _missing(store: Any) -> str:
    """Who has not come, in words."""
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if store is None:
        return f"nobody answers at {address}, where the ranks meet (the main machine's address and port)"
    with contextlib.suppress(Exception):
        missing = [rank for rank in range(world.world_size()) if not store.check([_key("came", rank)])]
        return (
            f"rank {', '.join(map(str, missing))} of {world.world_size()} did not come to {address}"
            if missing
            else (f"all {world.world_size()} ranks came to {address}, but cannot reach one another")
        )
    return f"{address}, where the ranks meet, does not answer any more"


def _remedy() -> str:
    return (
        "Look at what that machine says: it has to be started by the same command, with the same number of machines "
        "and a rank of its own, and to reach this one over the network (GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name "
        "its interface)"
    )


def _end(problem: str, code: int) -> NoReturn:
    """Say why on each machine, and end the process: no exception reaches a thread that waits in torch."""
    if world.local_rank() == 0:
        log.error("error: %s", problem)
    exits.leave(code)


def _key(kind: str, rank: int) -> str:
    """Of this attempt: a launcher that starts its ranks anew keeps the store."""
    return f"gemma_dist/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{kind}/{rank}"


def _by_launcher() -> bool:
    """Whether the store is a launcher's, which was there before the ranks; else it is rank 0's, which may come last."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store() -> Any:
    """A connection of this thread to the store in which all ranks meet; None while nobody answers."""
    address, port = os.environ.get("MASTER_ADDR", "localhost"), int(os.environ.get("MASTER_PORT", "29500"))
    wait = datetime.timedelta(seconds=LOOK_S)
    with contextlib.suppress(Exception):  # refused, no such host, a time-out
        socket.create_connection((address, port), LOOK_S).close()  # torch would say on every try that nobody answers
        import torch  # which takes seconds, where somebody answers

        return torch.distributed.TCPStore(address, port, None, False, wait, wait_for_workers=False)
    return None
