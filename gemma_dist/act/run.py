"""Let a model act: runs of tasks, the calls in them executed, what comes of it judged, and what succeeds kept as rows.

    OUT/runs.jsonl    one line a run, in the order of the tasks: outcome, reward, each step as it was sampled, the row
    OUT/report.json   outcomes, successes, pass@k and pass^k with their intervals; written last
    OUT/run.json      what was run (`log.py`)
    KEEP              the rows of runs that succeeded, as `shard` takes them

Tasks are dealt to the ranks, all runs of one to the same. The answers of many runs are written side by side
(`evaluate/generate.py`), round by round: while some runs' answers are still written, the calls of others are executed.
What a run is hangs on its task, its number and the seed alone: lines, report and kept rows are the same for any number
of ranks, as long as the tools answer the same.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from gemma_dist import meeting, world
from gemma_dist.act.episode import Episode, LiveDesk, Written, line_of
from gemma_dist.act.finish import Work, finish
from gemma_dist.act.log import opened_runs
from gemma_dist.act.replay import ReplayDesk
from gemma_dist.act.tasks import Task, read_tasks
from gemma_dist.act.tools import Box, ToolServer
from gemma_dist.data.encode import Encoder, load_encoder
from gemma_dist.errors import DataError, EvaluationError, PeerError
from gemma_dist.evaluate.generate import Answer, Generator, Question
from gemma_dist.evaluate.log import NUM_NAMED, RUNS_PART, describe_run, key_of, on_rank_0, part_of_rank
from gemma_dist.evaluate.room import measure_room
from gemma_dist.evaluate.runs import command, made_by
from gemma_dist.evaluate.sampling import Sampling
from gemma_dist.logs import JsonlWriter, progress
from gemma_dist.model.load import load_for_evaluation
from gemma_dist.model.operators import compile_operators
from gemma_dist.model.zero3 import is_partitioned
from gemma_dist.topology import current_topology

RUNS_PER_ROW = 2  # runs that are at work for each answer that is written at a time: others wait for their tools


@dataclass(frozen=True)
class Job:
    """A run that is to be done."""

    task: Task
    number: int  # from 1
    key: str


def act(model: str, adapter: Path | None, work: Work) -> dict[str, Any]:
    """Let `model` (with `adapter`) act; returns the report. A command that was killed goes on where it was.

    Raises:
        DataError, CheckpointError: the tasks or the model cannot be used.
        ConfigError: `work.out` holds a report already, or runs of something else, or the functions cannot be used.
        EvaluationError: some runs could not be done, or judged; the others are kept.
    """
    work.require_new()
    topology = current_topology()
    if topology.zero_stage == 3:
        compile_operators(topology, train=False)
    with meeting.waiting():
        world.connect()
        world.note_processes()
    settings = work.settings
    encoder = load_encoder(model, settings, adapter=adapter)
    with ExitStack() as stack:
        tools = work.start_tools(stack)

        def describe() -> dict[str, Any]:
            return work.described(describe_run(model, adapter, work.data, work.limit, encoder, settings))

        run, done = stack.enter_context(opened_runs(work.out, describe))
        work.begin_keeping(stack)
        jobs, keys = my_jobs(work, run)
        loaded = load_for_evaluation(model, adapter, ple_on_host=settings.ple != "gpu")
        players = _Players(loaded, encoder, work, tools)
        start = time.perf_counter()
        todo = [job for job in jobs if (job.key, job.number) not in done]
        for _ in progress(players.play(todo), total=len(todo), desc="acting", unit="run"):
            pass
        took = {"seconds": round(time.perf_counter() - start, 3), "runs": len(todo), **asdict(players.generator.counts)}
        require_runs(list(chain.from_iterable(world.gather_objects(players.failed))), work.out)
        times = {"command": command(), "world_size": world.world_size(), "ranks": world.gather_objects(took)}
        wanted = sorted(chain.from_iterable(world.gather_objects(keys)))
        header = {**run, **made_by(encoder), "settings": settings.model_dump(mode="json"), "times": times}
        report = on_rank_0(lambda: finish(work, header, [(key, number) for _, number, key in wanted]))
    world.disconnect()
    return report


def my_jobs(work: Work, run: dict[str, Any]) -> tuple[list[Job], list[tuple[int, int, str]]]:
    """This rank's runs, and (task number, run, key) of each. Raises DataError: there are no tasks, or two of one id."""
    jobs = []
    places: dict[str, int] = {}
    for task in read_tasks(work.data, work.limit, work.settings):
        if places.setdefault(task.id, task.number) != task.number:
            raise DataError(
                f"{work.data}: tasks {places[task.id]} and {task.number} are both called {task.id}; rename one"
            )
        if work.is_replay and not task.has_gold:
            raise DataError(f"{work.data}: {task.id} has no answers to replay; leave it out, or act with --tools")
        if (task.number - 1) % world.world_size() == world.rank():
            asked = [task.trajectory.messages, task.trajectory.tools, task.brought]
            key = key_of(run, task.place, asked, task.trajectory.images)
            jobs += [Job(task, number, key) for number in range(1, work.settings.num_runs + 1)]
    if not places:
        raise DataError(f"{work.data} holds no rows, so there is nothing to act on")
    return jobs, [(job.task.number, job.number, job.key) for job in jobs]


def begin(job: Job, work: Work, tools: ToolServer | None) -> Episode:
    """Begin a run."""
    settings, task, name = work.settings, job.task, f"{job.task.id} run {job.number}"
    if tools is None:
        conversation = task.begin(settings, None, task.called, name)
        num_steps = len(task.points)  # the log ends there
        return Episode(task, job.number, conversation, ReplayDesk(task), num_steps)
    runs_unfit = settings.unfit_calls == "run"
    desk = LiveDesk(Box(tools, task.row), work.check is not None, task.script(), runs_unfit)
    conversation = task.begin(settings, tools.declared, tools.names, name)
    return Episode(task, job.number, conversation, desk, settings.max_steps)


class _Players:
    """The runs of this rank: `failed` says which could not be done."""

    def __init__(self, model: Any, encoder: Encoder, work: Work, tools: ToolServer | None) -> None:
        settings = work.settings
        sampling = Sampling(settings.temperature, settings.top_p, settings.top_k, settings.seed)
        self._room = settings.per_device_eval_batch_size
        room = measure_room(model, self._room, settings.max_batch_tokens)
        self.generator = Generator(model, encoder, sampling, room, max_new_tokens=settings.max_new_tokens)
        self._in_step = is_partitioned(model)
        self._encoder, self._work, self._tools = encoder, work, tools
        self.failed: list[str] = []

    def play(self, jobs: Sequence[Job]) -> Iterator[Job]:
        """Play all runs, and write each as it ends: those that have. Ranks of a partitioned model play their rounds
        together."""
        writer = JsonlWriter(part_of_rank(self._work.out, RUNS_PART), append=True)
        waiting, active = deque(jobs), dict[int, tuple[Job, Episode]]()
        with ThreadPoolExecutor(self._room) as pool:
            try:
                while self._goes_on(bool(waiting or active)):
                    while waiting and len(active) < RUNS_PER_ROW * self._room:
                        job = waiting.popleft()
                        active[id(job)] = job, begin(job, self._work, self._tools)
                    lost = self._round([episode for _, episode in active.values()], pool)
                    for name, (job, episode) in list(active.items()):
                        if episode.verdict is not None:
                            writer.write(line_of(episode, job.key, self._work.settings.seed))
                            yield job
                        elif id(episode) in lost:
                            self.failed.append(f"{job.task.id} run {job.number}: {lost[id(episode)]}")
                        else:
                            continue
                        episode.desk.close()
                        del active[name]
            finally:
                for _, episode in active.values():
                    episode.desk.close()
                writer.close()

    def _goes_on(self, is_at_work: bool) -> bool:
        return world.any_rank([is_at_work])[0] if self._in_step else is_at_work

    def _round(self, episodes: Sequence[Episode], pool: ThreadPoolExecutor) -> dict[int, str]:
        """One answer of each run, and what its calls come to; the runs that could not go on, with the reason."""
        asked: dict[tuple[str, int], Episode] = {}
        opened: dict[tuple[str, int], str] = {}
        groups: dict[int, list[Question]] = {}
        for episode in episodes:
            if prompt := episode.prompt(self._encoder):
                question = Question(prompt, episode.place, [episode.number - 1])
                asked[question.key, episode.number - 1] = episode
                opened[question.key, episode.number - 1] = prompt.text
                groups.setdefault(episode.task.number, []).append(question)
        answering: list[tuple[Episode, Future[None]]] = []
        for question, sample, answer in self._answers(list(groups.values())):
            episode, text = asked[question.key, sample], opened[question.key, sample]
            reading = episode.take(Written(answer.text, answer.stopped, question.prompt.input_ids, answer.ids, text))
            if reading is not None:
                answering.append((episode, pool.submit(episode.respond, reading)))
        lost = {id(asked[one.key, one.samples[0]]): reason for one, reason in self.generator.failed}
        self.generator.failed.clear()
        for episode, future in answering:
            try:
                future.result()
            except EvaluationError as error:
                lost[id(episode)] = str(error)
        return lost

    def _answers(self, groups: list[list[Question]]) -> Iterator[tuple[Question, int, Answer]]:
        longest_first = sorted(groups, key=lambda group: -max(len(one.prompt.input_ids) for one in group))
        return self.generator.answer(longest_first)


def require_runs(failed: Sequence[str], out: Path) -> None:
    """Raises EvaluationError on rank 0, PeerError on the others, where runs `failed`."""
    if failed and world.rank() > 0:
        raise PeerError("rank 0 says which runs failed")
    if failed:
        raise EvaluationError(
            f"{len(failed)} runs could not be done, such as {'; '.join(failed[:NUM_NAMED])}. The others are kept in "
            f"{out}: run the same command again to try these alone"
        )
