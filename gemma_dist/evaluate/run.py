"""Evaluate a model on held-out trajectories: generate at every decision point, read, score, add, report.

    OUT/samples.jsonl    one line a decision point: what was asked, written, read, expected, and the score; trajectories
                         and turns are counted from 1
    OUT/tools.json       the declarations that these lines name
    OUT/report.md        the report on one page
    OUT/report.json      every metric with numerator and denominator; written last

Whole trajectories are dealt to the ranks, and the report is made from their lines, after every decision point was found
in them exactly once.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from gemma_dist import world
from gemma_dist.config import EvaluateConfig
from gemma_dist.data.encode import Encoder, Prompt, load_encoder
from gemma_dist.data.read import open_block
from gemma_dist.data.strict import error_context
from gemma_dist.data.trajectory import Trajectory
from gemma_dist.data.unroll import unroll
from gemma_dist.errors import ConfigError, DataError
from gemma_dist.evaluate.decision import ScoredDecision
from gemma_dist.evaluate.generate import Answer, generate
from gemma_dist.evaluate.images import blank, swap_images
from gemma_dist.evaluate.line import asked, score_line
from gemma_dist.evaluate.report import Report, summary
from gemma_dist.evaluate.runs import REPORT, ToolSets, tools_key, write_results
from gemma_dist.logs import JsonlWriter, log, progress, read_jsonl
from gemma_dist.model import fsdp
from gemma_dist.model.load import load_for_evaluation
from gemma_dist.model.operators import compile_operators
from gemma_dist.model.zero3 import is_partitioned
from gemma_dist.shards.reader import load_trajectories
from gemma_dist.topology import current_topology


@dataclass(frozen=True)
class Decision:
    """A decision point to be answered."""

    trajectory: Trajectory
    trajectory_number: int  # from 1
    prompt: Prompt


def evaluate(
    model: str, adapter: Path | None, data: Path, out: Path, limit: int | None, settings: EvaluateConfig
) -> Report | None:
    """Evaluate `model` (with `adapter`) on the first `limit` trajectories of `data`; rank 0 returns the report.

    Raises:
        DataError, CheckpointError: the data or the model cannot be used.
        ConfigError: `out` holds a report already, or the launch is none that accelerate could carry out,
            or needs a compiler.
    """
    if (out / REPORT).exists():
        raise ConfigError(f"{out / REPORT} exists already; name another folder or remove it")
    topology = current_topology()
    if topology.zero_stage == 3:
        compile_operators(topology, train=False)
    world.connect()
    world.note_processes()
    encoder = load_encoder(model, settings, adapter=adapter)
    decisions, num_trajectories, tool_sets = _my_decisions(data, limit, encoder, settings)
    if num_trajectories == 0:
        raise DataError(f"{data} holds no trajectories, so there is nothing to evaluate")
    loaded = load_for_evaluation(model, adapter, ple_on_host=settings.ple != "gpu")
    if is_partitioned(loaded) and world.rank() == 0:
        how = "FSDP2" if fsdp.is_launched() else "ZeRO-3"
        log.info("model partitioned over %d ranks (%s)", world.world_size(), how)

    if world.rank() == 0:
        _clear(out)
    world.barrier()
    _write_my_part(out, _answered(loaded, encoder, decisions, settings))
    num_decisions = int(world.sum_counts({"decisions": len(decisions)})["decisions"])
    world.barrier()  # every rank has written its part

    report = None
    if world.rank() == 0:
        header = {
            "model": model,
            "adapter": str(adapter) if adapter else None,
            "data": str(data),
            "settings": settings.model_dump(mode="json"),
            "world_size": world.world_size(),
        }
        lines = _join_parts(out, num_decisions)
        report = write_results(out, header, lines, tool_sets)
        _remove_parts(out)
        for line in summary(report):
            log.info(line)
    world.barrier()
    world.disconnect()
    return report


def _my_decisions(
    data: Path, limit: int | None, encoder: Encoder, settings: EvaluateConfig
) -> tuple[list[Decision], int, ToolSets]:
    """The decision points of this rank's trajectories, how many trajectories all ranks have, and the tools of these."""
    decisions: list[Decision] = []
    tool_sets: ToolSets = {}
    num_trajectories = 0
    rows: Iterable[Trajectory] = islice(load_trajectories(data, settings), limit)
    if settings.images == "swapped":
        rows = swap_images(rows)
    for trajectory in chain.from_iterable(_samples(row, encoder, settings, data) for row in rows):
        num_trajectories += 1
        tool_sets[tools_key(trajectory.tools)] = list(trajectory.tools)
        if (num_trajectories - 1) % world.world_size() != world.rank():
            continue
        if settings.images == "blank":
            trajectory = replace(trajectory, images=[blank(image) for image in trajectory.images])
        with error_context(f"{data}: {trajectory.id}"):
            prompts = encoder.prompts(trajectory)
        decisions += [Decision(trajectory, num_trajectories, prompt) for prompt in prompts]
    return decisions, num_trajectories, tool_sets


def _samples(row: Trajectory, encoder: Encoder, settings: EvaluateConfig, data: Path) -> list[Trajectory]:
    with error_context(f"{data}: {row.id}"):
        return unroll(row, encoder, settings)


def _answered(
    model: Any, encoder: Encoder, decisions: list[Decision], settings: EvaluateConfig
) -> Iterator[ScoredDecision]:
    """Each decision point answered and scored. The longest come first: what does not fit in memory shows at once.

    A rank with fewer batches than another still takes part in the passes of a model that is partitioned over them.
    """
    longest_first = sorted(decisions, key=lambda decision: -len(decision.prompt.input_ids))
    size = settings.per_device_eval_batch_size
    batches = [longest_first[start : start + size] for start in range(0, len(longest_first), size)]
    if is_partitioned(model):
        most_batches = max(world.gather_objects(len(batches)))
        batches += [[]] * (most_batches - len(batches))
    for batch in progress(batches, total=len(batches), desc="evaluating", unit="batch"):
        prompts = [decision.prompt for decision in batch]
        answers = generate(model, encoder, prompts, max_new_tokens=settings.max_new_tokens)
        for decision, answer in zip(batch, answers, strict=True):
            yield _scored(decision, answer, settings.answer_tolerance)


def _scored(decision: Decision, answer: Answer, answer_tolerance: float) -> ScoredDecision:
    """A decision point as its line in samples.jsonl."""
    prompt = decision.prompt
    tools = decision.trajectory.tools
    line = {
        **asked(decision.trajectory, decision.trajectory_number, prompt.gold, prompt.turn),
        "num_images": len(prompt.images),
        "prompt_tokens": len(prompt.input_ids),
        "opening": open_block(prompt.text),
        "output": answer.text,
        "output_tokens": answer.num_tokens,
        "stopped": answer.stopped,
    }
    return score_line(line, tools, answer_tolerance)


def _parts(out: Path) -> list[Path]:
    """The files of decision points that ranks wrote to `out`, and no others."""
    return sorted(path for path in out.iterdir() if re.fullmatch(r"\.samples-\d+\.jsonl", path.name))


def _clear(out: Path) -> None:
    """Make `out`, without parts of a run that was killed."""
    out.mkdir(parents=True, exist_ok=True)
    _remove_parts(out)


def _write_my_part(out: Path, decisions: Iterator[ScoredDecision]) -> None:
    """Write this rank's decision points as they come."""
    writer = JsonlWriter(out / f".samples-{world.rank()}.jsonl", append=False)
    for decision in decisions:
        writer.write(decision)
    writer.close()


def _join_parts(out: Path, num_decisions: int) -> list[ScoredDecision]:
    """The lines of all ranks' parts, in the order of the data."""
    decisions: list[ScoredDecision] = [decision for part in _parts(out) for decision in read_jsonl(part)]
    places = {_place(decision) for decision in decisions}
    complete = len(places) == len(decisions) == num_decisions
    assert complete, f"{len(decisions)} lines of samples, {num_decisions} decision points"
    return sorted(decisions, key=_place)


def _remove_parts(out: Path) -> None:
    for part in _parts(out):
        part.unlink()


def _place(decision: ScoredDecision) -> tuple[int, int]:
    """Where a decision point is in the data: number of its trajectory, and of its turn in it."""
    return decision["trajectory"], decision["turn"]
