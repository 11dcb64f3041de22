"""Our `bfcl` rule beside BFCL's own published AST checker: the same verdict on gold and on hundreds of faults of it?

    python -m venv /tmp/bfcl && /tmp/bfcl/bin/pip install --no-deps bfcl-eval
    python benchmarks/bfcl_rule.py /tmp/bfcl/lib/python3*/site-packages

Takes BFCL's single-turn Python categories as they are published. Of each row's gold calls it makes outputs: every
acceptable value, and one fault at a time. Both judge each; differences are printed, by what was done. Nothing of BFCL
is a dependency of ours: only its checker is imported, without the packages that bfcl-eval asks for.
"""

import copy
import importlib
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gemma_dist.config import EvaluateConfig
from gemma_dist.data.bfcl import read_with_answers
from gemma_dist.data.read import Call
from gemma_dist.data.trajectory import Trajectory, parse_row
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError
from gemma_dist.evaluate.bfcl_rule import bfcl_faults
from gemma_dist.evaluate.line import gold_of
from gemma_dist.evaluate.matching import Comparison, match_calls
from gemma_dist.evaluate.values import nfc

CATEGORIES = (
    *("simple_python", "multiple", "parallel", "parallel_multiple"),
    *("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple"),
)
SHOWN = 5  # differences printed of each kind
Calls = list[dict[str, Any]]  # [{name: arguments}], as the checker takes them
Checker = Callable[[RawRow, Calls, str], bool]


def load_checker(site_packages: Path) -> Checker:
    """BFCL's checker, with a stand-in for its table of models, which is all that needs other packages."""
    sys.path.append(str(site_packages))
    models = types.ModuleType("bfcl_eval.constants.model_config")
    models.MODEL_CONFIG_MAPPING = {"any": types.SimpleNamespace(underscore_to_dot=False)}  # type: ignore[attr-defined]
    sys.modules[models.__name__] = models
    checker = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")
    python = importlib.import_module("bfcl_eval.constants.enums").Language.PYTHON

    def check(row: RawRow, calls: Calls, category: str) -> bool:
        """Whether BFCL passes these calls."""
        found = checker.ast_checker(row["function"], copy.deepcopy(calls), row["ground_truth"], python, category, "any")
        return bool(found["valid"])

    return check


def judge(case: Trajectory, calls: Calls) -> bool:
    """Whether our rule passes these calls, as `score_decision` asks it."""
    gold = gold_of(case, case.messages[-1:])["calls"]
    read = [Call(name, arguments, (0, 0)) for call in calls for name, arguments in call.items()]
    schemas = {tool["function"]["name"]: nfc(tool["function"].get("parameters") or {}) for tool in case.tools}
    comparison = Comparison(gold, read, schemas, bfcl_faults)
    num_exact = sum(not comparison.faults(*pair) for pair in match_calls(comparison))
    return num_exact == len(gold) == len(read)


def pick(values: list[Any], place: int) -> Any:
    """An acceptable value as an output would have it; "" stands for none."""
    value = values[place % len(values)] if values else ""
    if isinstance(value, dict):
        inner = {key: pick(options, place) if isinstance(options, list) else options for key, options in value.items()}
        return {key: item for key, item in inner.items() if item != ""}
    if isinstance(value, list):
        return [pick([item], place) if isinstance(item, dict) else item for item in value]
    return value


def calls_of(truth: Any, place: int) -> Calls:
    """Calls with the acceptable values at this place of each list, without those that may be left out there."""
    calls = []
    for call in truth:
        ((name, arguments),) = call.items()
        picked = {key: pick(values, place) for key, values in arguments.items()}
        calls.append({name: {key: value for key, value in picked.items() if value != ""}})
    return calls


def outputs(truth: Any, functions: Any) -> Iterator[tuple[str, Calls]]:
    """What was done to gold, and the calls that it makes of it."""
    for place in range(3):
        yield f"acceptable values number {place + 1}", calls_of(truth, place)
    gold = calls_of(truth, 0)
    yield "calls reversed", gold[::-1]
    yield "a call twice", [*gold, gold[0]]
    yield "a call missing", gold[1:]
    yield "another function", [{next(iter(functions))["name"] + "_": next(iter(gold[0].values()))}, *gold[1:]]
    for number, call in enumerate(gold):
        ((name, arguments),) = call.items()
        for kind, changed in changed_arguments(arguments):
            yield kind, [*gold[:number], {name: changed}, *gold[number + 1 :]]


def changed_arguments(arguments: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The arguments with one fault, or one liberty, each time."""
    yield "an unknown argument", {**arguments, "no_such_argument": 1}
    for key, value in arguments.items():
        yield "an argument missing", {name: item for name, item in arguments.items() if name != key}
        for kind, changed in changed_values(value):
            yield kind, {**arguments, key: changed}
        for other, item in arguments.items():
            if other != key:
                yield "two values swapped", {**arguments, key: item, other: value}


def changed_values(value: Any) -> Iterator[tuple[str, Any]]:
    """Other values for one argument."""
    yield "as text", str(value)
    yield "null", None
    yield "in a list", [value]
    yield "true", True
    yield "empty text", ""
    yield "empty list", []
    yield "empty object", {}
    if isinstance(value, str):
        yield "text in capitals", value.upper()
        yield "text with punctuation", f" {value[:1]}-{value[1:]}. "
        yield "text with another quote", value.replace("'", '"') + "'"
        yield "text with more", value + "x"
        yield "a number for a text", 7
    if isinstance(value, (int, float)):
        yield "number as float", float(value)
        yield "number plus 1", value + 1
        yield "number plus 0.5", value + 0.5
    if isinstance(value, list):
        yield "list reversed", value[::-1]
        yield "list longer", [*value, *value[:1]]
        yield "list shorter", value[:-1]
        yield "list as text items", [str(item) for item in value]
        yield "list in capitals", [item.upper() if isinstance(item, str) else item for item in value]
        for place, item in enumerate(value[:2]):
            for kind, changed in changed_values(item) if not isinstance(item, list) else ():
                yield f"item: {kind}", [*value[:place], changed, *value[place + 1 :]]
    if isinstance(value, dict):
        yield "unknown key", {**value, "no_such_key": 1}
        for key, item in value.items():
            yield "key missing", {name: inner for name, inner in value.items() if name != key}
            for kind, changed in changed_values(item) if not isinstance(item, dict) else ():
                yield f"member: {kind}", {**value, key: changed}


def main(site_packages: Path) -> None:
    """Compare, and print a line a category, then the differences."""
    check = load_checker(site_packages)
    differences: dict[str, list[str]] = {}
    total: Counter[str] = Counter()
    print(f"{'category':<24}{'rows':>6}{'outputs':>9}{'passed':>8}{'same':>9}{'other':>7}{'checker raises':>16}")
    for category in CATEGORIES:
        counts: Counter[str] = Counter()
        for where, row in read_with_answers(site_packages / "bfcl_eval" / "data" / f"BFCL_v4_{category}.json"):
            if isinstance(row, DataError):
                raise row
            case = parse_row(row, where, EvaluateConfig())
            counts["rows"] += 1
            for kind, calls in outputs(row["ground_truth"], row["function"]):
                counts["outputs"] += 1
                ours = judge(case, calls)
                try:
                    theirs = check(row, calls, category)
                except (KeyError, TypeError, AttributeError) as error:
                    counts["raises"] += 1
                    differences.setdefault(f"checker raises {type(error).__name__}", []).append(f"{row['id']}: {kind}")
                    continue
                counts["passed"] += theirs
                counts["same" if ours == theirs else "other"] += 1
                if ours != theirs:
                    shown = f"{row['id']}: BFCL {theirs}, ours {ours}: {str(calls)[:300]}"
                    differences.setdefault(f"{kind}, BFCL {theirs}", []).append(shown)
        print_counts(category, counts)
        total += counts
    print_counts("all", total)
    for kind, found in differences.items():
        print(f"\n{kind}: {len(found)}", *found[:SHOWN], sep="\n    ")


def print_counts(name: str, counts: Counter[str]) -> None:
    """One line of the table."""
    columns = f"{counts['rows']:>6}{counts['outputs']:>9}{counts['passed']:>8}{counts['same']:>9}{counts['other']:>7}"
    print(f"{name:<24}{columns}{counts['raises']:>16}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
