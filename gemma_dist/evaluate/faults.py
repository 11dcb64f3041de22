"""What went wrong when a server was asked: one point's matter or the whole run's, and what to do about it.

A run that ends by an error first writes what the server has answered: each answer was paid for.
"""

import threading
from pathlib import Path

from gemma_dist.data.content import count_images
from gemma_dist.errors import EvaluationError
from gemma_dist.evaluate import chat
from gemma_dist.evaluate.client import KEY, Client, Refusal, Unanswered
from gemma_dist.evaluate.log import NUM_NAMED
from gemma_dist.evaluate.points import Point
from gemma_dist.logs import log

MANY = 3  # requests that fail in the same way, one after the other: the rest would, too

# What to do about points that fail.
ON_ERRORS = "where a server fails on calls that it cannot read (transformers serve), use --server-errors malformed"
ON_IMAGES = "some servers take no images in the results of tools; ask a model here about such rows, without --server"
ON_FIELDS = "a field that it does not know is left out by --extra-body '{\"FIELD\": null}'"


class Faults:
    """The faults of a run so far, and the first of them that ends it."""

    def __init__(self, client: Client, out: Path, concurrency: int, *, answered: bool) -> None:
        """`answered`: whether the server answered a point of this run in an earlier start."""
        self._client, self._out, self._many = client, out, max(MANY, concurrency)
        self._answered = answered
        self._lost = self._refused = 0  # in a row without an answer; with 400, as long as there was nothing else
        self._failed: list[str] = []  # points that could not be answered, each with the reason
        self._remedies: set[str] = set()  # for these
        self._ending: Exception | None = None
        self.stopped = threading.Event()  # no more is asked

    def note_answer(self) -> None:
        """The server answered."""
        self._answered, self._lost = True, 0

    def note(self, point: Point, fault: Exception) -> None:
        """The server did not answer a point."""
        if self._ending is not None:
            return
        self._lost += isinstance(fault, Unanswered)
        self._refused += isinstance(fault, Refusal) and fault.status == 400
        self._ending = self._end_by(fault)
        if self._ending is not None:
            self.stopped.set()
            if isinstance(fault, Unanswered):
                self._client.close()  # what is under way would be waited for in vain
            else:
                self._client.rest()
            return
        if not self._failed:
            log.warning("%s: %s", point.place, fault)
        self._failed.append(f"{point.place}: {fault}")
        self._remedies |= _remedies(point, fault)

    def _end_by(self, fault: Exception) -> Exception | None:
        """What to end the run with, bugs as they are; None where other points may be answered."""
        kept = f"The answers so far are kept in {self._out}: run the same command again to go on"
        address = self._client.address
        if isinstance(fault, Unanswered) and not (self._lost < self._many and self._client.is_there()):
            return EvaluationError(f"{address} does not answer any more: {fault}. {kept} when it does")
        if ends_all(fault):
            if not isinstance(fault, Refusal):
                return fault
            return EvaluationError(f"{address} refuses: {fault}{remedy_of(fault.status)}. {kept}")
        if self._refused == self._many == len(self._failed) + 1 and not self._answered:
            return EvaluationError(
                f"{address} refuses all of the first {self._many} requests, the last so: {fault}{remedy_of(400)}"
            )
        return None

    def require_none(self) -> None:
        """Raises what ends the run, or EvaluationError where points stayed without an answer."""
        if self._ending is not None:
            raise self._ending
        if self._failed:
            raise EvaluationError(
                f"{len(self._failed)} decision points could not be answered, such as "
                f"{'; '.join(self._failed[:NUM_NAMED])}. The other answers are kept in {self._out}: run the same "
                f"command again to try these alone{''.join(f'; {remedy}' for remedy in sorted(self._remedies))}"
            )


def ends_all(problem: Exception) -> bool:
    """Whether it is no matter of one point: only 400 and 413 (too long, mostly), no answer and no proper one are."""
    if isinstance(problem, Refusal):
        return problem.status not in (400, 413)
    return not isinstance(problem, (Unanswered, chat.Misanswer))


def remedy_of(status: int) -> str:
    """What to do about a status, behind a semicolon; "" where nothing is known."""
    if status in (401, 403):
        return f"; put the server's key into the environment as {KEY}"
    if status in (404, 405):
        return "; the address mostly ends in /v1, and --endpoint names what the server has"
    if 300 <= status < 400:
        return "; name the address where it is, if you trust it"
    return f"; {ON_FIELDS}" if status in (400, 422) else ""


def _remedies(point: Point, fault: Exception) -> set[str]:
    """What to do about a point that failed."""
    if isinstance(fault, Unanswered) and fault.status == 500:
        return {ON_ERRORS}
    if not isinstance(fault, Refusal):
        return set()
    shows_images = any(message["role"] == "tool" and count_images(message) for message in point.history)
    return ({ON_IMAGES} if shows_images else set()) | ({ON_FIELDS} if fault.status == 400 else set())
