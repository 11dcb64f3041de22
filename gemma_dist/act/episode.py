"""One run of a task: the model answers, its calls are answered, and so on until it says something without a call, and
the user of the task has no more to say.

Who answers the calls is a `Desk`: the user's functions (`Functions`), or the log (`replay.py`). What the model is shown
next, `Conversation` knows: the same prompts as in `chat`, and so as in training.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gemma_dist.act.first_wrong import GOLD, calls_text, first_wrong_step
from gemma_dist.act.tasks import Task
from gemma_dist.act.tools import Box
from gemma_dist.chat.conversation import Conversation
from gemma_dist.chat.tools import Result
from gemma_dist.data.content import clean_text
from gemma_dist.data.encode import Encoder, Prompt
from gemma_dist.data.read import Call, Reading, open_block, read_output
from gemma_dist.data.strict import reason
from gemma_dist.data.types import CalledFunction, RawRow
from gemma_dist.errors import DataError, EvaluationError
from gemma_dist.evaluate.message import MESSAGE, read_message
from gemma_dist.evaluate.runs import without_repeats
from gemma_dist.logs import log

SUCCESS, FAILURE, ENDED, LEFT = "success", "failure", "ended", "left"
STEP_LIMIT, MALFORMED, TRUNCATED, SILENT, REFUSED = "step_limit", "malformed", "truncated", "silent", "refused"
MIN_REWARD = 1.0  # of a success


@dataclass(frozen=True)
class Written:
    """An answer as it came."""

    output: str
    stopped: bool
    prompt_ids: list[int] | None = None  # None: rendered by a server
    completion_ids: list[int] | None = None
    opening: str = ""  # the block that the prompt left open
    is_message: bool = False  # of a server of chat


@dataclass(frozen=True)
class Verdict:
    """How a run ended."""

    outcome: str
    reward: float | None = None
    problem: str = ""
    left: dict[str, Any] | None = None


class Desk(Protocol):
    """Where a run's calls are answered."""

    def answer(self, run: "Episode", reading: Reading) -> Verdict | None:
        """Answer the calls that `run` took last, or what follows its text; the verdict where that ends it."""

    def judge(self, run: "Episode", outcome: str, problem: str) -> Verdict:
        """The verdict on a run that ended before it had said its last word."""

    def close(self) -> None:
        """The run has ended."""


@dataclass
class Episode:
    """A run at work."""

    task: Task
    number: int  # of the task's runs, from 1
    conversation: Conversation
    desk: Desk
    max_steps: int
    steps: list[dict[str, Any]] = field(default_factory=list)
    verdict: Verdict | None = None
    before: int = 0  # messages before the last answer

    @property
    def place(self) -> str:
        """Of the next step, whatever model acts: what its random numbers hang on, beside the run's."""
        return f"{self.task.place} step {len(self.steps) + 1}"

    def prompt(self, encoder: Encoder) -> Prompt | None:
        """What the model is asked with next; None where there is no such prompt, which ends the run: with all that was
        said, it is more than a row may hold, or nothing that the template renders."""
        try:
            return self.conversation.prompt(encoder)
        except DataError as error:
            if self.steps:
                del self.conversation.messages[self.before :]
                self.steps[-1]["turn"] = None
            self.end(REFUSED, reason(error))
            return None

    def take(self, written: Written) -> Reading | None:
        """Keep an answer; what is to be answered of it, None where it ends the run."""
        names = {tool["function"]["name"] for tool in self.conversation.tools} or self.conversation.known
        spent = not written.stopped
        if written.is_message:
            reading = read_message(written.output, budget_spent=spent, tool_names=names)
        else:
            reading = read_output(written.output, written.opening, budget_spent=spent, tool_names=names)
        trajectory = self.conversation.so_far()
        self.before = len(self.conversation.messages)
        self.steps.append(_step(written, reading, len(trajectory.messages) + 1, len(trajectory.images)))
        outcome, problem = _unusable(reading, written), ""
        if not outcome:
            try:
                self.conversation.answer(reading, is_whole=True)
                return reading
            except DataError as error:
                outcome, problem = MALFORMED, reason(error)
        self.steps[-1]["turn"] = None
        self.end(outcome, problem)
        return None

    def respond(self, reading: Reading) -> None:
        """Have what was taken answered. Raises EvaluationError where the user's functions cannot be asked."""
        self.verdict = self.desk.answer(self, reading)
        if self.verdict is None and len(self.steps) == self.max_steps:
            self.end(STEP_LIMIT)

    def end(self, outcome: str, problem: str = "") -> None:
        """End before the last word."""
        self.verdict = self.desk.judge(self, outcome, problem)


@dataclass
class LiveDesk:
    """The user's functions answer, and the user's checker judges, if there is one."""

    box: Box
    checks: bool
    script: Iterator[tuple[list[RawRow], Sequence[Any]]]  # `Task.script`
    runs_unfit: bool = False  # also calls that do not fit their declarations

    def answer(self, run: Episode, reading: Reading) -> Verdict | None:
        for number, call in enumerate(reading.calls):
            if refused := give(run.conversation, number, self._result(run.conversation, call)):
                log.warning("%s: what %s returned is no result: %s", run.conversation.name, call.name, refused)
        if reading.calls:
            return None
        said, tools = next(self.script, ([], ()))
        if not said:
            return self._checked(run)
        run.conversation.messages += said
        run.conversation.declare(tools)
        return None

    def judge(self, run: Episode, outcome: str, problem: str) -> Verdict:
        return Verdict(outcome, 0.0 if self.checks else None, problem)

    def close(self) -> None:
        self.box.close()

    def _result(self, conversation: Conversation, call: Call) -> Result:
        misfit = conversation.misfit(call)
        if misfit and not (self.runs_unfit and call.name in self.box.names):
            return Result(f"Error: {misfit}")
        return self.box.call(call.name, call.arguments)

    def _checked(self, run: Episode) -> Verdict:
        if not self.checks:
            return Verdict(ENDED)
        messages = run.conversation.so_far().messages
        reward, problem = self.box.check(messages)
        if problem:
            raise EvaluationError(f"the checker cannot judge it: {problem}")
        return Verdict(SUCCESS if reward >= MIN_REWARD else FAILURE, reward)


def give(conversation: Conversation, number: int, result: Result) -> str:
    """Give the model the result of call `number`, from 0; where no row could hold that, the reason, which is returned,
    in which the control tokens that a row may not hold (`--control-tokens reject`) are escaped."""
    try:
        conversation.respond(number, result.text, result.images)
        return ""
    except DataError as error:
        found = str(error).removeprefix(f"{conversation.name}: ")
        refused = reason(DataError(re.sub(r"^turn \d+ \(tool.*?\): ", "", found)))
        conversation.respond(number, clean_text(f"Error: {refused}", escape=True))
        return refused


def line_of(run: Episode, key: str, seed: int) -> dict[str, Any]:
    """A run that has ended, as its line in runs.jsonl."""
    assert run.verdict is not None
    name = f"{run.task.id}/run-{run.number}"
    wrong, compared_with = _first_wrong(run)
    row = run.conversation.as_row(name, run.conversation.so_far())
    # Rounds of own runs may begin from the same tasks: their rows are told apart by what acted, and what it said.
    told = hashlib.sha256(json.dumps([key, row["messages"]], sort_keys=True).encode()).hexdigest()
    return {
        "id": name,
        "task": run.task.id,
        "task_number": run.task.number,
        "run": run.number,
        "seed": seed,
        "key": key,
        **vars(run.verdict),
        "first_wrong_step": wrong,
        "compared_with": compared_with,
        "steps": without_repeats(run.steps),
        "row": {**row, "id": f"{name}-{told[:8]}"},
    }


def _first_wrong(run: Episode) -> tuple[int | None, str | None]:
    """The first wrong step, where gold shows it; `report.py` asks runs that succeeded where there is no gold."""
    if run.verdict is None or run.verdict.outcome == SUCCESS or not run.task.has_gold or not run.steps:
        return None, None
    right = [
        calls_text([_plain(call["function"]) for message in gold for call in message.get("tool_calls", [])])
        for gold in run.task.answered
    ]
    return first_wrong_step([calls_text(step["calls"]) for step in run.steps], right), GOLD


def _plain(function: CalledFunction) -> dict[str, Any]:
    return {"name": function["name"], "arguments": function["arguments"]}


def _unusable(reading: Reading, written: Written) -> str:
    """Why an answer ends the run, as an outcome; "" where it is whole calls, or text."""
    if not written.stopped:
        return TRUNCATED
    if reading.attempted:
        return "" if reading.status == "ok" else MALFORMED
    return "" if reading.content else SILENT


def _step(written: Written, reading: Reading, turn: int, num_images: int) -> dict[str, Any]:
    calls: Sequence[Call] = reading.calls
    return {
        "turn": turn,
        "prompt_ids": written.prompt_ids,
        "completion_ids": written.completion_ids,
        "logprobs": None,
        "num_images": num_images,
        "opening": open_block(written.opening),
        "output": written.output,
        "form": MESSAGE if written.is_message else "text",
        "finish_reason": "stop" if written.stopped else "length",
        "calls": [{"name": call.name, "arguments": call.arguments} for call in calls],
        "content": reading.content,
    }
