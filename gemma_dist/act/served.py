"""Runs of a model that a server holds: many at a time, each in a thread of its own; all else as of a model here."""

import time
from contextlib import ExitStack, closing
from typing import Any

from gemma_dist.act.episode import REFUSED, Episode, Written, line_of
from gemma_dist.act.finish import Work, finish
from gemma_dist.act.log import opened_runs
from gemma_dist.act.run import Job, begin, my_jobs, require_runs
from gemma_dist.act.tools import ToolServer
from gemma_dist.config_server import ServerConfig
from gemma_dist.data.encode import Prompt
from gemma_dist.errors import EvaluationError
from gemma_dist.evaluate.client import Refusal
from gemma_dist.evaluate.faults import Faults, ends_all
from gemma_dist.evaluate.log import RUNS_PART, part_of_rank
from gemma_dist.evaluate.parallel import in_parallel
from gemma_dist.evaluate.points import Point
from gemma_dist.evaluate.runs import command, made_by
from gemma_dist.evaluate.server import Asking, begin_asking, describe_served
from gemma_dist.logs import JsonlWriter, progress

TOO_LONG = (400, 413)  # what servers say of a prompt that has grown beyond their context


def act_served(model: str | None, work: Work, server: ServerConfig) -> dict[str, Any]:
    """Let the model act that a server calls `model` (None: its only one), as `run.act` does with one here.

    Raises:
        ConfigError, DataError, EvaluationError: as `run.act`, and as `evaluate_server`.
    """
    work.require_new()
    settings = work.settings
    asking = begin_asking(model, settings, server)
    with ExitStack() as stack:
        tools = work.start_tools(stack)
        described = work.described(describe_served(asking, work.data, work.limit))
        run, done = stack.enter_context(opened_runs(work.out, lambda: described))
        work.begin_keeping(stack)
        jobs, keys = my_jobs(work, run)
        todo = [job for job in jobs if (job.key, job.number) not in done]
        took = _play(asking, work, tools, todo, answered=bool(done))
        header = {
            **run,
            **made_by(asking.encoder),
            "settings": settings.model_dump(mode="json"),
            "server": asking.about,
        }
        header["times"] = {"command": command(), "world_size": 1, "ranks": [took]}
        return finish(work, header, [(key, number) for _, number, key in keys])


def _play(asking: Asking, work: Work, tools: ToolServer | None, todo: list[Job], *, answered: bool) -> dict[str, Any]:
    """Play runs, and write each as it ends; what it took.

    Raises:
        EvaluationError: runs could not be done, or the server went away.
    """
    start = time.perf_counter()
    faults = Faults(asking.client, work.out, asking.server.concurrency, answered=answered)
    writer = JsonlWriter(part_of_rank(work.out, RUNS_PART), append=True)
    failed: list[str] = []
    points: dict[int, Point] = {}

    def play(job: Job) -> dict[str, Any] | EvaluationError:
        episode = begin(job, work, tools)
        try:
            while episode.verdict is None:
                prompt = None if asking.encoder is None else episode.prompt(asking.encoder)
                if episode.verdict is None:
                    points[id(job)] = _point(episode, prompt)
                    _step(asking, episode, points[id(job)])
            return line_of(episode, job.key, work.settings.seed)
        except EvaluationError as error:
            return error
        finally:
            episode.desk.close()

    results = in_parallel(todo, play, asking.server.concurrency, ends_all, faults.stopped)
    try:
        with closing(progress(results, total=len(todo), desc="acting", unit="run")) as shown:
            for job, result in shown:
                if isinstance(result, dict):
                    writer.write(result)
                    faults.note_answer()
                elif isinstance(result, EvaluationError):
                    failed.append(f"{job.task.id} run {job.number}: {result}")
                else:
                    faults.note(points[id(job)], result)
    finally:
        asking.client.close()
        writer.close()
    faults.require_none()
    require_runs(failed, work.out)
    return {"seconds": round(time.perf_counter() - start, 3), "runs": len(todo)}


def _point(episode: Episode, prompt: Prompt | None) -> Point:
    """What the server is asked next."""
    trajectory, thinking = episode.conversation.so_far(), episode.conversation.thinking
    return Point(trajectory, episode.task.number, len(trajectory.messages), [], thinking, prompt, episode.place)


def _step(asking: Asking, episode: Episode, point: Point) -> None:
    """One answer of the server, and what its calls come to.

    Raises:
        Refusal, Unanswered, Misanswer: there was none.
        EvaluationError: the user's functions cannot be asked.
    """
    is_text = asking.server.endpoint == "completions"
    if is_text and point.images:
        episode.end(REFUSED, "--endpoint completions takes text alone, and a tool returned an image")
        return
    try:
        served = asking.ask((point, "", episode.number - 1))
    except Refusal as error:
        if not episode.steps or error.status not in TOO_LONG:
            raise
        episode.end(REFUSED, str(error))
        return
    prompt_ids = point.prompt.input_ids if is_text and point.prompt else None
    opening = point.prompt.text if is_text and point.prompt else ""
    reading = episode.take(Written(served.output, served.stopped, prompt_ids, None, opening, not is_text))
    if reading is not None:
        episode.respond(reading)
