"""Replay: the log answers a run's calls as long as they are the log's, and its user goes on as there.

Right is what `evaluate` calls right at a decision point, and the history is the run's own. The first answer that is not
right leaves the log: nothing there says what would have come of it.
"""

from dataclasses import dataclass
from typing import Any, cast

from gemma_dist.act.episode import LEFT, SUCCESS, Episode, Verdict
from gemma_dist.act.tasks import Task
from gemma_dist.data.read import Reading
from gemma_dist.data.types import ToolCall
from gemma_dist.evaluate.line import gold_of
from gemma_dist.evaluate.score import score_decision


@dataclass
class ReplayDesk:
    """The log of a task answers."""

    task: Task
    num_passed: int = 0  # decision points of the log

    def answer(self, run: Episode, reading: Reading) -> Verdict | None:
        index, gold = self.task.points[self.num_passed]
        trajectory = self.task.trajectory
        score = score_decision(reading, gold_of(trajectory, gold), trajectory.tools)
        if not score["right"]:
            run.conversation.messages.pop()  # nothing answers it
            run.steps[-1]["turn"] = None
            return self._left(run, LEFT, score["failure"], score["errors"])
        self._respond(run, index + len(gold), {predicted: number for number, predicted in score["match"]})
        self.num_passed += 1
        if self.num_passed == len(self.task.points):
            return Verdict(SUCCESS, 1.0)
        run.conversation.messages += self.task.given(*self.task.turns[self.num_passed - 1])
        return None

    def judge(self, run: Episode, outcome: str, problem: str) -> Verdict:
        return self._left(run, outcome, outcome, [], problem)

    def close(self) -> None:
        """There is nothing to close."""

    def _left(self, run: Episode, outcome: str, how: str, errors: Any, problem: str = "") -> Verdict:
        turn = self.task.points[self.num_passed][0] + 1
        return Verdict(outcome, 0.0, problem, {"step": len(run.steps), "turn": turn, "how": how, "errors": errors})

    def _respond(self, run: Episode, index: int, gold_of_call: dict[int, int]) -> None:
        """Give the run the results that the log has from message `index` on.

        Args:
            gold_of_call: the number of the log's call that each of the run's is.
        """
        messages = self.task.trajectory.messages
        answers: dict[str, int] = {}  # of each call's id: the message
        while index + len(answers) < len(messages) and messages[index + len(answers)]["role"] == "tool":
            answers[messages[index + len(answers)]["tool_call_id"]] = index + len(answers)
        asked = messages[index - 1].get("tool_calls", [])
        own = cast(list[ToolCall], run.conversation.messages[-1].get("tool_calls", []))
        if answers:
            for number, call in enumerate(own):
                at = answers[asked[gold_of_call[number]]["id"]]
                (result,) = self.task.given(at, at + 1)
                run.conversation.messages.append({**result, "tool_call_id": call["id"]})
