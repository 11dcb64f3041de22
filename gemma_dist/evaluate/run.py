"""Evaluate a model on held-out trajectories: generate at every decision point, read, score, add, report.

    OUT/samples.jsonl    one line an answer: what was asked, written, read, expected, and the score; trajectories and
                         turns are counted from 1
    OUT/tools.json       the declarations that these lines name
    OUT/report.md        the report on one page
    OUT/report.html      the same to look at, with every sample
    OUT/trajectories.jsonl, OUT/images/    what the model was shown, for that page
    OUT/report.json      every metric with numerator and denominator; written last
    OUT/run.json         what was evaluated (`log.py`)

Whole trajectories are dealt to the ranks, which answer and keep lines. When every decision point is found in these,
rank 0 scores them and makes the report, as `gemma-dist score` does: it follows from the lines alone, so it hangs
neither on the number of ranks nor on how often the run was killed and started again.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

from gemma_dist import meeting, world
from gemma_dist.config import EvaluateConfig
from gemma_dist.data.encode import Encoder, Prompt, load_encoder
from gemma_dist.data.read import open_block
from gemma_dist.data.strict import error_context
from gemma_dist.data.trajectory import Trajectory
from gemma_dist.data.unroll import unroll
from gemma_dist.errors import ConfigError, DataError, EvaluationError, PeerError
from gemma_dist.evaluate.asked import asked_rows, require_used
from gemma_dist.evaluate.decision import AnsweredDecision
from gemma_dist.evaluate.generate import Answer, Generator, Question
from gemma_dist.evaluate.gold_tokens import GoldTokens, gold_tokens
from gemma_dist.evaluate.images import blank
from gemma_dist.evaluate.line import asked, score_lines
from gemma_dist.evaluate.log import (
    NUM_NAMED,
    Lines,
    complete,
    describe_run,
    key_of,
    on_rank_0,
    opened,
    part_of_rank,
    read_losses,
    remove_parts,
)
from gemma_dist.evaluate.loss import GoldReader
from gemma_dist.evaluate.report import Report, summary
from gemma_dist.evaluate.room import measure_room
from gemma_dist.evaluate.runs import REPORT, ToolSets, command, made_by, tools_key, where_to_look, write_results
from gemma_dist.evaluate.sampling import Sampling
from gemma_dist.evaluate.shown import join_shown, keep_shown
from gemma_dist.logs import JsonlWriter, log, progress
from gemma_dist.model import fsdp
from gemma_dist.model.load import load_for_evaluation
from gemma_dist.model.operators import compile_operators
from gemma_dist.model.zero3 import is_partitioned
from gemma_dist.topology import current_topology


@dataclass(frozen=True)
class Decision:
    """A decision point to be answered."""

    trajectory: Trajectory
    trajectory_number: int  # from 1
    prompt: Prompt
    place: str  # in the data, whatever model answers it
    key: str  # `key_of`
    gold: GoldTokens | None  # what is read for its loss


def evaluate(
    model: str, adapter: Path | None, data: Path, out: Path, limit: int | None, settings: EvaluateConfig
) -> Report:
    """Evaluate `model` (with `adapter`) on the first `limit` trajectories of `data`; returns the report. A run that
    was killed goes on where it was.

    Raises:
        DataError, CheckpointError: the data or the model cannot be used.
        ConfigError: `out` holds a report already, or a run of something else, or the launch is none that accelerate
            could carry out, or needs a compiler.
        EvaluationError: some decision points could not be answered; the others are kept.
    """
    if (out / REPORT).exists():
        raise ConfigError(f"{out / REPORT} exists already; name another folder or remove it")
    topology = current_topology()
    if topology.zero_stage == 3:
        compile_operators(topology, train=False)
    with meeting.waiting():
        world.connect()
        world.note_processes()
    encoder = load_encoder(model, settings, adapter=adapter)
    with opened(out, lambda: describe_run(model, adapter, data, limit, encoder, settings)) as (run, lines):
        decisions, num_trajectories, tool_sets = _my_decisions(data, limit, encoder, settings, run)
        if num_trajectories == 0:
            raise DataError(f"{data} holds no trajectories, so there is nothing to evaluate")
        keep_shown(out, {decision.trajectory_number: decision.trajectory for decision in decisions})
        loaded = load_for_evaluation(model, adapter, ple_on_host=settings.ple != "gpu")
        if is_partitioned(loaded) and world.rank() == 0:
            how = "FSDP2" if fsdp.is_launched() else "ZeRO-3"
            log.info("model partitioned over %d ranks (%s)", world.world_size(), how)
        loss_times, unread = _write_my_losses(out, loaded, encoder, decisions) if settings.loss else ({}, [])
        times = _write_my_part(out, loaded, encoder, decisions, lines, settings)
        _require_losses(unread, out)
        wanted = [(decision.trajectory_number, decision.prompt.turn, decision.key) for decision in decisions]
        all_wanted = sorted(chain.from_iterable(world.gather_objects(wanted)))
        keys = [(key, sample) for _, _, key in all_wanted for sample in range(settings.num_samples)]
        settings_now = settings.model_dump(mode="json")
        header = {**run, **made_by(encoder), "settings": settings_now, "times": times | loss_times}

        def report_all() -> Report:
            scored = score_lines(complete(out, keys, with_loss=settings.loss), tool_sets, settings.answer_tolerance)
            join_shown(out)
            report = write_results(out, header, scored, tool_sets)
            remove_parts(out)
            for sentence in chain(summary(report), where_to_look(report, out)):
                log.info(sentence)
            return report

        report = on_rank_0(report_all)
    world.disconnect()
    return report


def _my_decisions(
    data: Path, limit: int | None, encoder: Encoder, settings: EvaluateConfig, run: Mapping[str, Any]
) -> tuple[list[Decision], int, ToolSets]:
    """The decision points of this rank's trajectories, how many trajectories all ranks have, and the tools of these."""
    decisions: list[Decision] = []
    tool_sets: ToolSets = {}
    num_trajectories = 0
    require_used(data, settings)
    rows = asked_rows(data, limit, settings, limit_general=limit)
    for trajectory in chain.from_iterable(_samples(row, encoder, settings, data) for row in rows):
        num_trajectories += 1
        tool_sets[tools_key(trajectory.tools)] = list(trajectory.tools)
        if (num_trajectories - 1) % world.world_size() != world.rank():
            continue
        if settings.images == "blank":
            trajectory = replace(trajectory, images=[blank(image) for image in trajectory.images])
        with error_context(f"{data}: {trajectory.id}"):
            prompts = encoder.prompts(trajectory)
            is_read = settings.loss and not trajectory.part
            written = gold_tokens(encoder, trajectory, prompts) if is_read else [None] * len(prompts)
        for prompt, gold in zip(prompts, written, strict=True):
            place = f"{num_trajectories} {trajectory.id} {prompt.turn}"
            key = key_of(run, place, prompt.input_ids, prompt.images)
            decisions.append(Decision(trajectory, num_trajectories, prompt, place, key, gold))
    return decisions, num_trajectories, tool_sets


def _samples(row: Trajectory, encoder: Encoder, settings: EvaluateConfig, data: Path) -> list[Trajectory]:
    with error_context(f"{data}: {row.id}"):
        return unroll(row, encoder, settings)


def _write_my_losses(
    out: Path, model: Any, encoder: Encoder, decisions: list[Decision]
) -> tuple[dict[str, Any], list[str]]:
    """Measure what gold costs at this rank's decision points, but for those that are known already, and write it as it
    comes.

    Returns:
        What it took, and the decision points where it could not be read, on all ranks.
    """
    start = time.perf_counter()
    known = read_losses(out)
    writer = JsonlWriter(part_of_rank(out, "loss"), append=True)
    groups: dict[int, list[GoldTokens]] = {}  # of each trajectory
    decision_of: dict[int, Decision] = {}
    for decision in decisions:
        if decision.key not in known and decision.gold is None:
            writer.write({"key": decision.key, "loss": None})
        elif decision.key not in known and decision.gold is not None:
            groups.setdefault(decision.trajectory_number, []).append(decision.gold)
            decision_of[id(decision.gold)] = decision
    reader = GoldReader(model, encoder)
    losses = reader.losses(list(groups.values()))
    for gold, loss in progress(losses, total=len(decision_of), desc="reading gold", unit="answer"):
        writer.write({"key": decision_of[id(gold)].key, "loss": loss})
    writer.close()
    failed = [f"{decision_of[id(gold)].place}: {reason}" for gold, reason in reader.failed]
    unread = list(chain.from_iterable(world.gather_objects(failed)))
    return {"loss_seconds": world.gather_objects(round(time.perf_counter() - start, 3))}, unread


def _write_my_part(
    out: Path, model: Any, encoder: Encoder, decisions: list[Decision], lines: Lines, settings: EvaluateConfig
) -> dict[str, Any]:
    """Answer this rank's decision points, but for those of `lines`, and write each answer as it comes. The longest come
    first: what does not fit in memory shows at once.

    Returns:
        What it took, on all ranks.
    """
    questions: dict[int, list[Question]] = {}  # of each trajectory
    by_place = {decision.place: decision for decision in decisions}
    for decision in decisions:
        missing = [sample for sample in range(settings.num_samples) if (decision.key, sample) not in lines]
        if missing:
            question = Question(decision.prompt, decision.place, missing)
            questions.setdefault(decision.trajectory_number, []).append(question)
    longest_first = sorted(questions.values(), key=lambda group: -max(len(one.prompt.input_ids) for one in group))
    num_answers = sum(len(question.samples) for group in longest_first for question in group)
    sampling = Sampling(settings.temperature, settings.top_p, settings.top_k, settings.seed)
    room = measure_room(model, settings.per_device_eval_batch_size, settings.max_batch_tokens)
    generator = Generator(model, encoder, sampling, room, max_new_tokens=settings.max_new_tokens)
    start = time.perf_counter()
    writer = JsonlWriter(part_of_rank(out), append=True)
    answers = generator.answer(longest_first)
    for question, sample, answer in progress(answers, total=num_answers, desc="evaluating", unit="answer"):
        writer.write(_answered(by_place[question.key], sample, answer))
    writer.close()
    seconds = time.perf_counter() - start
    failed = [f"{question.key}: {reason}" for question, reason in generator.failed]
    _require_answers(list(chain.from_iterable(world.gather_objects(failed))), out)
    took = {"seconds": round(seconds, 3), "answers": num_answers, **asdict(generator.counts)}
    return {"command": command(), "world_size": world.world_size(), "ranks": world.gather_objects(took)}


def _require_answers(failed: list[str], out: Path) -> None:
    """Raises EvaluationError on rank 0, PeerError on the others, where decision points `failed`."""
    if failed and world.rank() > 0:
        raise PeerError("rank 0 says which decision points failed")
    if failed:
        raise EvaluationError(
            f"{len(failed)} decision points could not be answered, such as {'; '.join(failed[:NUM_NAMED])}. The other "
            f"answers are kept in {out}: run the same command again to try these alone"
        )


def _require_losses(unread: list[str], out: Path) -> None:
    """Raises EvaluationError on rank 0, PeerError on the others, where gold's answers are `unread`. To be called once
    there are all answers of the model's own."""
    if unread and world.rank() > 0:
        raise PeerError("rank 0 says where gold could not be read")
    if unread:
        raise EvaluationError(
            f"all decision points are answered, but the loss of gold's answers could not be measured at {len(unread)} "
            f"of them, such as {'; '.join(unread[:NUM_NAMED])}. The answers are kept in {out}: run the same command "
            "again to try these alone, or with --no-loss for a report without it"
        )


def _answered(decision: Decision, sample: int, answer: Answer) -> AnsweredDecision:
    """A decision point as its line."""
    prompt = decision.prompt
    line = {
        **asked(decision.trajectory, decision.trajectory_number, prompt.gold, prompt.turn),
        "sample": sample,
        "key": decision.key,
        "num_images": len(prompt.images),
        "prompt_tokens": len(prompt.input_ids),
        "opening": open_block(prompt.text),
        "output": answer.text,
        "output_ids": answer.ids,
        "output_tokens": len(answer.ids),
        "stopped": answer.stopped,
    }
    return cast(AnsweredDecision, line)
