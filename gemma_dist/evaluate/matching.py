"""Which predicted call answers which gold call: pairs one to one, the best as a whole, without order.

BFCL takes gold call by gold call the first predicted one that fits. Where a call fits two gold calls, that makes the
score depend on the order of the calls; the best pairing of all does not.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gemma_dist.data.read import Call
from gemma_dist.evaluate.values import Fault, GoldCall, Wanted, nfc, wanted_of

# A rule: what is wrong with a call of a tool with this schema. No faults: the call is exact.
FindFaults = Callable[[Wanted, Mapping[str, Any], Mapping[str, Any]], list[Fault]]
Pair = tuple[int, int]


class Comparison:
    """All gold calls of one decision point beside all predicted ones, by one rule; each pair is looked at once."""

    def __init__(
        self,
        gold: Sequence[GoldCall],
        predicted: Sequence[Call],
        schemas: Mapping[str, Mapping[str, Any]],
        find_faults: FindFaults,
    ) -> None:
        """`schemas`: of the parameters of each tool that is declared."""
        self.gold, self.predicted = gold, predicted
        self.wanted = [wanted_of(call) for call in gold]
        self.arguments = [nfc(call.arguments) for call in predicted]
        self._schemas, self._find_faults = schemas, find_faults
        self._faults: dict[Pair, list[Fault]] = {}

    def is_same_tool(self, gold: int, predicted: int) -> bool:
        """Whether both calls have the same name."""
        return self.gold[gold]["name"] == self.predicted[predicted].name

    def faults(self, gold: int, predicted: int) -> list[Fault]:
        """What is wrong with a predicted call, taken for this gold call."""
        pair = gold, predicted
        if pair not in self._faults:
            schema = self._schemas.get(self.gold[gold]["name"], {})
            self._faults[pair] = self._find_faults(self.wanted[gold], self.arguments[predicted], schema)
        return self._faults[pair]

    def num_wanted(self, gold: int, predicted: int) -> int:
        """Arguments that gold judges, without those that it leaves open and the call leaves out."""
        wanted, arguments = self.wanted[gold], self.arguments[predicted]
        missing = {fault.parameter for fault in self.faults(gold, predicted) if not fault.got}
        return sum(name in arguments or name in missing for name in wanted.values)

    def num_given(self, gold: int, predicted: int) -> int:
        """Arguments of the call, without those that gold ignores."""
        return sum(name not in self.wanted[gold].ignored for name in self.arguments[predicted])

    def num_right(self, gold: int, predicted: int) -> int:
        """Arguments of the call that gold wants, with a value that it takes."""
        wrong = {fault.parameter for fault in self.faults(gold, predicted)}
        return sum(name in self.wanted[gold].values and name not in wrong for name in self.arguments[predicted])


def match_calls(comparison: Comparison) -> list[Pair]:
    """Pair calls of the same name, one to one and without order, as (gold, predicted) indices.

    Of all pairings one with the most exact pairs, then the most pairs, then the most right arguments, then the fewest
    other arguments, so that the order of calls changes no metric.
    """
    # `assign` adds plain integers, so what counts first stands in a higher digit: of a base that no sum over all pairs
    # of a lower digit reaches.
    golds, calls = range(len(comparison.gold)), range(len(comparison.predicted))
    num_arguments = sum(len(wanted.values) for wanted in comparison.wanted) + sum(map(len, comparison.arguments))
    base = 2 + len(golds) + num_arguments

    def worth(gold: int, predicted: int) -> int:
        """What a pair adds: 0 for calls of different names, and always less than a pair of the same name."""
        if not comparison.is_same_tool(gold, predicted):
            return 0
        exact = not comparison.faults(gold, predicted)
        others = comparison.num_wanted(gold, predicted) + comparison.num_given(gold, predicted)
        return exact * base**3 + base**2 + comparison.num_right(gold, predicted) * base - others

    pairs = assign([[worth(gold, predicted) for predicted in calls] for gold in golds])
    return [pair for pair in pairs if comparison.is_same_tool(*pair)]


def match_other_tools(comparison: Comparison, pairs: Sequence[Pair]) -> list[Pair]:
    """Pair the calls that `match_calls` left over, whose names differ: by the arguments that they share, then by name.
    So a call of the wrong tool is told from one that is missing and another that is too many."""
    golds = [gold for gold in range(len(comparison.gold)) if gold not in {pair[0] for pair in pairs}]
    calls = [call for call in range(len(comparison.predicted)) if call not in {pair[1] for pair in pairs}]
    golds.sort(key=lambda gold: _spelled(comparison.gold[gold]["name"], comparison.wanted[gold].values))
    calls.sort(key=lambda call: _spelled(comparison.predicted[call].name, comparison.arguments[call]))
    shared = [[comparison.num_right(gold, call) for call in calls] for gold in golds]
    return [(golds[row], calls[column]) for row, column in assign(shared)]


def _spelled(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as text, to sort by."""
    return name + json.dumps(arguments, sort_keys=True)


def assign(worth: list[list[int]]) -> list[tuple[int, int]]:
    """The (row, column) pairs, as many as there are rows or columns, whose worth adds up to the most.

    The Hungarian method with potentials. Rows enter one after the other. A new row takes the column where it costs
    least (cost = -worth, less the potentials of row and column), whose former row takes another, and so on to a column
    that was free: the cheapest such path, searched as Dijkstra does. The potentials keep all costs of rows that have
    entered at 0 or above, and at 0 in the pairs made so far: each search goes on from what the earlier ones found out.
    Time rows^2 x columns for the shorter side as rows.
    """
    if not worth or not worth[0]:
        return []
    num_columns = len(worth[0])
    if len(worth) > num_columns:
        transposed = [list(column) for column in zip(*worth, strict=True)]
        return sorted((row, column) for column, row in assign(transposed))
    row_potential = [0] * len(worth)
    column_potential = [0] * (num_columns + 1)
    row_of: list[int | None] = [None] * (num_columns + 1)  # the last column is where a path starts
    for new_row in range(len(worth)):
        column, row_of[-1] = num_columns, new_row
        slack: dict[int, float] = dict.fromkeys(range(num_columns), math.inf)  # cost of each column not yet reached
        before = [num_columns] * num_columns  # from which column each one is reached
        reached = [num_columns]
        while (row := row_of[column]) is not None:  # until a free column is reached
            for free in slack:
                cost = -worth[row][free] - row_potential[row] - column_potential[free]
                if cost < slack[free]:
                    slack[free], before[free] = cost, column
            column = min(slack, key=slack.__getitem__)
            step = int(slack.pop(column))
            for done in reached:
                column_potential[done] -= step
                row_potential[row_of[done] or 0] += step
            slack = {free: cost - step for free, cost in slack.items()}
            reached.append(column)
        while column != num_columns:  # back along the path: each column takes the row of the one before
            row_of[column], column = row_of[before[column]], before[column]
    return sorted((row, column) for column, row in enumerate(row_of[:-1]) if row is not None)
