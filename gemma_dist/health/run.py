"""The check of all nodes: each looks at itself, the first one judges, and all end with the same exit code.

They meet in a TCPStore of the first node, where each read has a time limit: no dead node holds up the others.

    hello/<rank>     its host, before it looks at anything
    facts/<rank>     what it found
    tick             from the first node, once the facts are there: what to do now. All read their clocks
    moment/<rank>    its clock, and whether it sees the first node's mark in the output folder
    reduce/<rank>    what came of the all-reduce
    verdict          the exit code, from the first node
    bye/<rank>       it has read that
"""

import contextlib
import datetime
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import DistError, TCPStore

from gemma_dist import exits, signals, world
from gemma_dist.config import HealthConfig
from gemma_dist.files import writing
from gemma_dist.health.facts import Facts, existing, look, read_facts
from gemma_dist.health.judge import Node, Verdict, judge
from gemma_dist.visible import shown

BAD_NODES = "bad-nodes"  # file in the folder of exit codes: their hosts, one a line
MOMENT_S = 30.0  # for what takes no time
SEEN_WITHIN_S = 10.0  # network disks show a new file late
OWN_CHECKS = 0.8  # of the time limit


class _UnreachableError(Exception):
    """The first node does not answer."""


@dataclass(frozen=True)
class Meeting:
    """Where the nodes meet: a store of the first one."""

    store: Any
    rank: int
    world_size: int

    def say(self, what: str, value: str) -> None:
        """For the others."""
        self.store.set(f"{what}/{self.rank}", value)

    def hear(self, key: str, timeout_s: float) -> str | None:
        """What was said, waiting for it at most `timeout_s` seconds; None: nothing. Raises _UnreachableError."""
        try:
            self.store.wait([key], datetime.timedelta(seconds=max(0.01, timeout_s)))
            return bytes(self.store.get(key)).decode()
        except DistError as error:
            if "timeout" in str(error).lower():
                return None
            raise _UnreachableError(str(error)) from error

    def hear_all(self, what: str, ranks: Iterable[int], timeout_s: float) -> dict[int, str | None]:
        """What nodes said, all of them within `timeout_s` seconds."""
        end = time.monotonic() + timeout_s
        return {rank: self.hear(f"{what}/{rank}", end - time.monotonic()) for rank in ranks}


def check_health(
    settings: HealthConfig, *, clock: Callable[[], float] = time.time, look: Callable[[HealthConfig], Facts] = look
) -> int:
    """Check this node, with all others if RANK and WORLD_SIZE say that there are some, and print what is found.

    Args:
        clock, look: what a node reads its time from, and how it looks at itself.

    Returns:
        The exit code, the same on all nodes: 0, or exits.NODE_UNFIT.
    """
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = int(os.environ.get("MASTER_PORT", "0"))
    try:
        store = _store(address, port, settings.timeout_s, is_master=world.rank() == 0)
        return _check(Meeting(store, world.rank(), world.world_size()), settings, clock, look)
    except (_UnreachableError, DistError) as error:
        print(shown(_first_node_is_missing(address, port, settings, error)), flush=True)
        return exits.NODE_UNFIT


def _store(address: str, port: int, timeout_s: float, *, is_master: bool) -> Any:
    """The store of the first node, or a connection to it."""
    return TCPStore(
        address,
        port,
        world.world_size(),
        is_master,
        datetime.timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )


def _check(
    meeting: Meeting, settings: HealthConfig, clock: Callable[[], float], look: Callable[[HealthConfig], Facts]
) -> int:
    """One node's part. Returns the exit code."""
    meeting.say("hello", socket.gethostname())
    end = time.monotonic() + settings.timeout_s
    own = within(OWN_CHECKS * settings.timeout_s, lambda: look(settings))
    if own is not None:
        meeting.say("facts", own.to_json())
    if meeting.rank == 0:
        return _judge(meeting, settings, clock, end)
    tick = meeting.hear("tick", end - time.monotonic() + MOMENT_S)
    if tick is None:
        raise _UnreachableError("it says nothing any more")
    _moment(meeting, clock, json.loads(tick))
    if (said := meeting.hear("verdict", 2 * settings.timeout_s + MOMENT_S)) is None:
        raise _UnreachableError("it says nothing any more")
    _decided()
    meeting.say("bye", "")
    code: int = json.loads(said)["code"]
    return code


def _judge(meeting: Meeting, settings: HealthConfig, clock: Callable[[], float], end: float) -> int:
    """The first node's part, once it has looked at itself."""
    everyone = range(meeting.world_size)
    facts = {}
    for rank, text in meeting.hear_all("facts", everyone, end - time.monotonic()).items():
        facts[rank] = read_facts(text) if text else None
    came = [rank for rank in everyone if meeting.store.check([f"hello/{rank}"])]
    with _mark(settings.output_dir) as (mark, problem):
        todo = {
            "mark": mark,
            "reduce": len(everyone) > 1 and all(facts.values()),
            "nccl": all(one is not None and one.num_gpus > 0 for one in facts.values()),
            "timeout_s": settings.timeout_s,
        }
        meeting.store.set("tick", json.dumps(todo))
        _moment(meeting, clock, todo)
        moments = meeting.hear_all("moment", came, MOMENT_S)
        reduced = meeting.hear_all("reduce", came, settings.timeout_s + MOMENT_S) if todo["reduce"] else {}
    hosts = _hosts(meeting, came)
    nodes = []
    for rank in everyone:
        moment = json.loads(moments.get(rank) or "{}")
        nodes.append(Node(rank, hosts[rank], rank in came, facts[rank], moment.get("clock"), moment.get("sees")))
    verdicts = judge(nodes, settings.timeout_s)
    if problem:
        verdicts[0].problems.append(problem)
    failed, words = _of_exchange(verdicts, reduced)
    lines = [*(verdict.line for verdict in verdicts), *words]
    bad = [verdict for verdict in verdicts if verdict.problems]
    code = exits.NODE_UNFIT if bad or failed else 0
    if code:
        _note_bad([verdict.node.host for verdict in bad])
    print(shown("\n".join(lines)), flush=True)  # before the others end, see `_decided`
    _decided()
    meeting.store.set("verdict", json.dumps({"code": code}))
    answering = [rank for rank, moment in moments.items() if moment and rank > 0]
    meeting.hear_all("bye", answering, MOMENT_S)  # the store goes with this process
    return code


def _decided() -> None:
    """It is known how this process ends: with Slurm's --kill-on-bad-exit, the first one that ends has all others told
    to end as well, which would hide their exit codes."""
    if world.world_size() > 1:
        signals.take([signal.SIGTERM], lambda *_: None)


def _moment(meeting: Meeting, clock: Callable[[], float], todo: dict[str, Any]) -> None:
    """What all nodes do at once: read the clock, look for the mark, exchange."""
    moment: dict[str, object] = {"clock": clock()}
    if todo["mark"] is not None:
        moment["sees"] = _sees(Path(todo["mark"]))
    meeting.say("moment", json.dumps(moment))
    if todo["reduce"]:
        from gemma_dist.health.reduce import all_reduce

        timeout_s = float(todo["timeout_s"])
        host, port = meeting.store.host, meeting.store.port
        result = all_reduce(
            lambda: _store(host, port, timeout_s, is_master=False),
            meeting.rank,
            meeting.world_size,
            timeout_s,
            nccl=bool(todo["nccl"]),
        )
        meeting.say("reduce", result)


def _of_exchange(verdicts: list[Verdict], reduced: dict[int, str | None]) -> tuple[bool, list[str]]:
    """Whether the all-reduce failed, and what to say of it. It is the fault of nodes that say nothing any more, where
    they are few; else nobody knows whose."""
    if not reduced:
        return False, []
    results = {rank: json.loads(text or '{"error": "says nothing any more"}') for rank, text in reduced.items()}
    errors = [f"{verdicts[rank].node.name}: {of['error']}" for rank, of in results.items() if "error" in of]
    if not errors:
        times = {backend: max(result[backend] for result in results.values()) for backend in results[0]}
        told = ", ".join(f"{backend} {milliseconds:.1f} ms" for backend, milliseconds in times.items())
        return False, [f"all-reduce of 1 MiB over {len(results)} nodes: {told}"]
    silent = [rank for rank, text in reduced.items() if text is None]
    if len(silent) < len(results) / 2:
        for rank in silent:
            verdicts[rank].problems.append("says nothing any more during the all-reduce")
    return True, [f"the all-reduce of all nodes failed: {'; '.join(errors)}"]


def within(timeout_s: float, work: Callable[[], Facts]) -> Facts | None:
    """What `work` gives, errors of it as a problem of this node, or None where it takes longer: then a thread of it is
    left behind."""
    found: list[Facts] = []

    def run() -> None:
        """Look."""
        try:
            found.append(work())
        except Exception as error:  # whatever it is, this node is not fit
            found.append(Facts(socket.gethostname(), 0, {}, "", [f"{type(error).__name__}: {error}"]))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return found[0] if found else None


def _hosts(meeting: Meeting, came: list[int]) -> list[str | None]:
    """Of each node: as it said itself, or, of one that never came, as Slurm calls it."""
    named = slurm_hosts()
    hosts: list[str | None] = [*named] if len(named) == meeting.world_size else [None] * meeting.world_size
    for rank in came:
        hosts[rank] = meeting.hear(f"hello/{rank}", MOMENT_S)
    return hosts


def slurm_hosts() -> list[str]:
    """The hosts of this job in the order of their ranks, one a node; none outside of Slurm."""
    names = os.environ.get("SLURM_JOB_NODELIST")
    if not names or shutil.which("scontrol") is None:
        return []
    command = ["scontrol", "show", "hostnames", names]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=MOMENT_S, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []


@contextlib.contextmanager
def _mark(output_dir: Path | None) -> Iterator[tuple[str | None, str | None]]:
    """A file in the output folder, or in the nearest one around it that is there; else what keeps it from being."""
    if output_dir is None:
        yield None, None
        return
    mark = existing(output_dir).absolute() / f".{uuid.uuid4().hex}"
    try:
        mark.touch()
    except OSError as error:
        yield None, f"{mark.parent}: nothing can be written there ({error.strerror})"
        return
    try:
        yield str(mark), None
    finally:
        with contextlib.suppress(OSError):
            mark.unlink()


def _sees(mark: Path) -> bool:
    """Whether a file of another node can be seen, after a while at most."""
    end = time.monotonic() + SEEN_WITHIN_S
    while not mark.exists():
        if time.monotonic() > end:
            return False
        with contextlib.suppress(OSError):
            os.listdir(mark.parent)  # has some network disks look anew
        time.sleep(0.2)
    return True


def _first_node_is_missing(address: str, port: int, settings: HealthConfig, error: Exception) -> str:
    """What to say where there is no store. The first node's host is noted as bad, unless that node has named others."""
    if world.rank() == 0:
        _note_bad([socket.gethostname()])
        return (
            f"{socket.gethostname()} (rank 0): no store can be opened at {address}:{port} ({error}); is the port free?"
        )
    named = slurm_hosts()
    host = named[0] if named else address
    time.sleep(min(MOMENT_S, settings.timeout_s) / 3)  # it may be this node that the others do not reach
    folder = os.environ.get(exits.FOLDER)
    if folder and not (Path(folder) / BAD_NODES).exists():
        _note_bad([host])
    return (
        f"{host} (rank 0): DOES NOT ANSWER within {settings.timeout_s:g} s at {address}:{port}, as "
        f"{socket.gethostname()} (rank {world.rank()}) sees it: {str(error).splitlines()[0]}"
    )


def _note_bad(hosts: list[str | None]) -> None:
    """Leave the hosts of unfit nodes to whoever launched this."""
    folder = os.environ.get(exits.FOLDER)
    names = dict.fromkeys(host for host in hosts if host)
    if not folder or not names:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    with writing(Path(folder) / BAD_NODES) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
