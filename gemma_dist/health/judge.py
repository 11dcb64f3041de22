"""Which nodes are unfit, from what all of them said: arithmetic.

Where nodes differ, the majority is right; of two halves the one with the first node.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gemma_dist.health.facts import Facts

MAX_CLOCK_S = 5.0  # that two clocks may be apart


@dataclass(frozen=True)
class Node:
    """What is known of one node."""

    rank: int
    host: str | None  # None: it never said, and nobody knows
    came: bool  # whether it ever said a word
    facts: Facts | None  # None: it did not answer in time
    clock: float | None = None  # seconds since 1970, at one moment for all nodes
    sees_folder: bool | None = None  # what the first node writes to the output folder; None: not asked

    @property
    def name(self) -> str:
        """For people."""
        return f"rank {self.rank}" if self.host is None else f"{self.host} (rank {self.rank})"


@dataclass(frozen=True)
class Verdict:
    """What is wrong with one node; nothing, and it is fit."""

    node: Node
    problems: list[str]

    @property
    def line(self) -> str:
        """For people."""
        said = "good" if self.node.facts is None else f"good: {self.node.facts.summary}"
        return f"{self.node.name}: {'; '.join(self.problems) if self.problems else said}"


def judge(nodes: Sequence[Node], timeout_s: float) -> list[Verdict]:
    """What is wrong with each of the nodes."""
    problems: dict[int, list[str]] = {node.rank: list(node.facts.problems) if node.facts else [] for node in nodes}
    for node in nodes:
        if node.facts is None:
            was = "never came" if not node.came else "its own checks did not end (a GPU or a disk may hang)"
            problems[node.rank].append(f"DOES NOT ANSWER within {timeout_s:g} s: {was}")
        if node.sees_folder is False:
            problems[node.rank].append("does not see what the first node writes to the output folder")
    for node, what in (*_of_another_kind(nodes), *_off_clock(nodes)):
        problems[node.rank].append(what)
    return [Verdict(node, problems[node.rank]) for node in nodes]


def _of_another_kind(nodes: Sequence[Node]) -> Iterator[tuple[Node, str]]:
    """Nodes that have something else than most."""
    known = [(node, node.facts.equal) for node in nodes if node.facts is not None and node.facts.equal]
    for name in {name: None for _, equal in known for name in equal}:
        values = [equal.get(name, "absent") for _, equal in known]
        usual, _ = Counter(values).most_common(1)[0]  # of equally many the first one's
        for (node, _), value in zip(known, values, strict=True):
            if value != usual:
                yield node, f"{name} {value}, and on most nodes {usual}"


def _off_clock(nodes: Sequence[Node]) -> Iterator[tuple[Node, str]]:
    """Nodes whose clock is not near that of most."""
    clocks = [(node, node.clock) for node in nodes if node.clock is not None]
    near = [sum(abs(clock - other) <= MAX_CLOCK_S for _, other in clocks) for _, clock in clocks]
    if not near:
        return
    _, usual = clocks[near.index(max(near))]  # of equally many the first one's
    for node, clock in clocks:
        if abs(clock - usual) > MAX_CLOCK_S:
            yield node, f"its clock is {clock - usual:+.1f} s off that of most nodes: set it (NTP)"
