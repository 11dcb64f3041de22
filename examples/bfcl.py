"""BFCL's multi-turn tasks for `gemma-dist act`: its environments run the calls, its checker judges the runs.

    pip install --no-deps bfcl-eval            no dependency: its multi-turn part wants mpmath and filelock beside it
    python examples/bfcl.py multi_turn_base > tasks.jsonl
    cd examples && gemma-dist act --model MODEL --data ../tasks.jsonl --out ../runs/bfcl --tools bfcl:TOOLS \\
        --setup bfcl:setup --check bfcl:check --declare rows --unfit-calls run --max-steps 200

A task is an entry with its turns as messages of the user. Where the benchmark declares a function later, the message of
that turn brings it. A call goes to the executor of bfcl-eval as the Python that its handlers make of calls, and what
that returns is what the model reads, errors and all. The verdict is that of its `multi_turn_checker` on the calls of a
run, turn by turn; more than 20 answers with calls to one turn fail, as there.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import bfcl_eval
from bfcl_eval.constants.default_prompts import DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC, MAXIMUM_STEP_LIMIT
from bfcl_eval.constants.executable_backend_config import MULTI_TURN_FUNC_DOC_FILE_MAPPING
from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker import multi_turn_checker
from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils import execute_multi_turn_func_call

CATEGORIES = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")
CLASSES = ("GorillaFileSystem", "MathAPI", "MessageAPI", "TwitterAPI", "TicketAPI", "TradingBot", "TravelAPI",
           "VehicleControlAPI")  # fmt: skip
DATA = Path(bfcl_eval.__file__).parent / "data"
MODEL = "gemma_dist"  # what the executor calls the instances that it keeps
NO_FUNCTION = "no_such_function()"


def tasks(category: str) -> Iterator[dict[str, Any]]:
    """The tasks of a category, as `act` takes them."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("BFCL_PROJECT_ROOT", folder)  # it makes folders as it is imported
        from bfcl_eval.utils import load_dataset_entry, load_ground_truth_entry

        entries, gold = load_dataset_entry(category), load_ground_truth_entry(category)
    answers = {entry["id"]: entry["ground_truth"] for entry in gold}
    for entry in entries:
        later = entry.get("missed_function", {})
        kept = {name: entry[name] for name in ("id", "initial_config", "involved_classes")}
        messages = [_message(turn, later.get(str(number))) for number, turn in enumerate(entry["question"])]
        tools = list(map(_tool, entry["function"]))
        yield {**kept, "messages": messages, "tools": tools, "ground_truth": answers[entry["id"]]}


def _message(turn: Sequence[dict[str, Any]], brought: Sequence[dict[str, Any]] | None) -> dict[str, Any]:
    """The user's message of a turn, with the functions that are declared there."""
    if brought:
        tools = list(map(_tool, brought))
        return {"role": "user", "content": DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC, "tools": tools}
    (message,) = turn
    return message


def _tool(function: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": function}


# ---- in the process of a run -----------------------------------------------------------------------------------------

_task: dict[str, Any] = {}


def setup(row: Mapping[str, Any]) -> None:
    """Remember the task whose environments the calls of this run are for."""
    _task.update(row)


def as_python(row: Mapping[str, Any], name: str, arguments: Mapping[str, Any]) -> str:
    """A call as bfcl-eval's handlers write it. It is evaluated: what is not a call of the task's environments by names
    of arguments stands for one that fails."""
    if name not in _methods(row["involved_classes"]) or not all(map(str.isidentifier, arguments)):
        return NO_FUNCTION
    return f"{name}({','.join(f'{key}={value!r}' for key, value in arguments.items())})"


def check(row: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether bfcl-eval calls a run right."""
    turns: list[list[list[str]]] = []
    for message in messages:
        if message["role"] == "user":
            turns.append([])
        elif calls := message.get("tool_calls"):
            functions = (call["function"] for call in calls)
            turns[-1].append([as_python(row, one["name"], one["arguments"]) for one in functions])
    if any(len(steps) > MAXIMUM_STEP_LIMIT for steps in turns):
        return False
    return bool(multi_turn_checker(turns, row["ground_truth"], dict(row), "", MODEL)["valid"])


def _methods(classes: Sequence[str]) -> set[str]:
    return {name for one in classes for name in _NAMES[one]}


def _run(name: str, /, **arguments: Any) -> str:
    """Run a call of the task."""
    call, long = as_python(_task, name, arguments), "long_context" in _task["id"]
    classes = _task["involved_classes"]
    results, _ = execute_multi_turn_func_call([call], _task["initial_config"], classes, MODEL, _task["id"], long)
    return str(results[0])


def _names(of: str) -> list[str]:
    """The functions of a class, as they are declared."""
    lines = (DATA / "multi_turn_func_doc" / MULTI_TURN_FUNC_DOC_FILE_MAPPING[of]).read_text("utf-8").splitlines()
    return [json.loads(line)["name"] for line in lines]


_NAMES = {one: _names(one) for one in CLASSES}
TOOLS: dict[str, Callable[..., str]] = {name: partial(_run, name) for name in _methods(CLASSES)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("category", choices=CATEGORIES)
    for task in tasks(parser.parse_args().category):
        sys.stdout.write(json.dumps(task) + "\n")
