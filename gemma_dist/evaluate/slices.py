"""Parts of the decision points that a report looks at beside the whole: by turn, tool, number of calls, images …"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from gemma_dist.evaluate.decision import ScoredDecision
from gemma_dist.evaluate.score import NO_CALL

MAX_TOOLS = 50  # tools that get a slice, those that gold calls most often
_OFFERED = (0, 1, 2, 5, 10, 20, 50)  # where each range of tools offered begins
_TOKENS = (0, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)  # the same of prompt tokens
_STEPS = (1, 2, 3, 4, 5, 6, 11, 21)  # the same of decision points in a trajectory
_CALLS = (0, 1, 2, 3, 4)  # the same of gold's calls

Slices = dict[str, dict[str, list[ScoredDecision]]]


def slice_up(decisions: Sequence[ScoredDecision], steps: Sequence[int]) -> Slices:
    """The decisions of each value of each slice, values in order; slices of one value alone are left out.

    Args:
        steps: the number of each decision point in its trajectory, from 1.
    """
    ranges: dict[str, tuple[Sequence[int], list[int]]] = {
        "turn": (_STEPS, list(steps)),
        "tools_offered": (_OFFERED, [decision["num_tools"] for decision in decisions]),
        "gold_calls": (_CALLS, [len(decision["gold"]["calls"]) for decision in decisions]),
        "prompt_tokens": (_TOKENS, [decision["prompt_tokens"] for decision in decisions]),
    }
    slices: Slices = {"images": _group(decisions, [_images(decision["num_images"]) for decision in decisions])}
    for name, (starts, numbers) in ranges.items():
        found = [bisect_right(starts, number) - 1 for number in numbers]
        groups = _group(decisions, found)
        slices[name] = {_range_name(starts, place): groups[place] for place in sorted(groups)}
    categories = [decision["category"] for decision in decisions]
    slices["category"] = _group(decisions, [category or "(none)" for category in categories]) if any(categories) else {}
    slices["tool"] = _by_tool(decisions)
    return {name: dict(groups) for name, groups in slices.items() if len(groups) > 1}


def _images(number: int) -> str:
    return "with" if number else "without"


def _group(decisions: Iterable[ScoredDecision], keys: Iterable[int | str]) -> dict[Any, list[ScoredDecision]]:
    """The decisions of each key, keys in order."""
    groups: dict[int | str, list[ScoredDecision]] = {}
    for decision, key in zip(decisions, keys, strict=True):
        groups.setdefault(key, []).append(decision)
    return {key: groups[key] for key in sorted(groups, key=lambda key: (isinstance(key, str), key))}


def _by_tool(decisions: Iterable[ScoredDecision]) -> dict[str, list[ScoredDecision]]:
    """The decisions where gold calls a tool, of the tools that it calls most often, and those where it calls none."""
    groups: dict[str, list[ScoredDecision]] = {}
    for decision in decisions:
        for name in {call["name"] for call in decision["gold"]["calls"]} or {NO_CALL}:
            groups.setdefault(name, []).append(decision)
    counts = Counter({name: len(found) for name, found in groups.items()})
    kept = sorted(counts, key=lambda name: (-counts[name], name))[:MAX_TOOLS]
    return {name: groups[name] for name in sorted(kept)}


def _range_name(starts: Sequence[int], place: int) -> str:
    """A range as a report names it: "2-4", "20-49", "1", "50+"."""
    first = starts[place]
    if place == len(starts) - 1:
        return f"{first}+"
    last = starts[place + 1] - 1
    return str(first) if last == first else f"{first}-{last}"
