"""Evaluate a model on held-out trajectories: generate at every decision point, read, score, add, report.

    OUT/samples.jsonl    one line a decision point: what was asked, written, read, expected, and the score; trajectories
                         and turns are counted from 1
    OUT/report.json      every metric with numerator and denominator; written last

Whole trajectories are dealt to the ranks, counts are added exactly, and the report is written only after every decision
point was found in the samples exactly once.
"""

import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from PIL import Image

from gemma_dist import meeting, world
from gemma_dist.config import EvaluateConfig
from gemma_dist.data.content import content_text
from gemma_dist.data.encode import Encoder, Prompt, load_encoder
from gemma_dist.data.images import decode_image
from gemma_dist.data.read import read_output, reading_to_json
from gemma_dist.data.strict import error_context
from gemma_dist.data.trajectory import Trajectory
from gemma_dist.data.unroll import unroll
from gemma_dist.errors import ConfigError, DataError
from gemma_dist.evaluate.generate import Answer, generate
from gemma_dist.evaluate.report import Report, ScoredDecision, add_up, make_report, summary
from gemma_dist.evaluate.score import score_decision
from gemma_dist.files import writing
from gemma_dist.logs import JsonlWriter, log, progress, read_jsonl, write_json
from gemma_dist.model import fsdp
from gemma_dist.model.load import load_for_evaluation
from gemma_dist.model.operators import compile_operators
from gemma_dist.model.zero3 import is_partitioned
from gemma_dist.shards.reader import load_trajectories
from gemma_dist.topology import current_topology

SAMPLES = "samples.jsonl"
REPORT = "report.json"
PROMPT_END = 200  # characters of the prompt that tell the reader which block it left open


@dataclass(frozen=True)
class Decision:
    """A decision point to be answered."""

    trajectory: Trajectory
    trajectory_number: int  # from 1
    prompt: Prompt


def evaluate(
    model: str, adapter: Path | None, data: Path, out: Path, limit: int | None, settings: EvaluateConfig
) -> Report:
    """Evaluate `model` (with `adapter`) on the first `limit` trajectories of `data`; returns the report.

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
    with meeting.waiting():
        world.connect()
        world.note_processes()
    encoder = load_encoder(model, settings, adapter=adapter)
    decisions, num_trajectories = _my_decisions(data, limit, encoder, settings)
    if num_trajectories == 0:
        raise DataError(f"{data} holds no trajectories, so there is nothing to evaluate")
    loaded = load_for_evaluation(model, adapter, ple_on_host=settings.ple != "gpu")
    if is_partitioned(loaded) and world.rank() == 0:
        how = "FSDP2" if fsdp.is_launched() else "ZeRO-3"
        log.info("model partitioned over %d ranks (%s)", world.world_size(), how)

    if world.rank() == 0:
        _clear(out)
    world.barrier()
    scored = _write_my_part(out, _answered(loaded, encoder, decisions, settings))
    totals = {name: _sum_over_ranks(counts) for name, counts in add_up(scored).items()}
    num_decisions = _sum_over_ranks({"decisions": len(decisions)})["decisions"]
    world.barrier()  # every rank has written its part

    report = make_report(
        totals,
        model=model,
        adapter=adapter,
        data=data,
        settings=settings,
        num_trajectories=num_trajectories,
        num_decisions=num_decisions,
        world_size=world.world_size(),
    )
    if world.rank() == 0:
        _join_parts(out, num_decisions)
        write_json(out / REPORT, report)
        for line in summary(report):
            log.info(line)
    world.barrier()
    world.disconnect()
    return report


def _my_decisions(
    data: Path, limit: int | None, encoder: Encoder, settings: EvaluateConfig
) -> tuple[list[Decision], int]:
    """The decision points of this rank's trajectories, and how many trajectories all ranks have."""
    decisions: list[Decision] = []
    num_trajectories = 0
    rows = islice(load_trajectories(data, settings), limit)
    for trajectory in chain.from_iterable(_samples(row, encoder, settings, data) for row in rows):
        num_trajectories += 1
        if (num_trajectories - 1) % world.world_size() != world.rank():
            continue
        if settings.images == "blank":
            trajectory = replace(trajectory, images=[_blank(image) for image in trajectory.images])
        with error_context(f"{data}: {trajectory.id}"):
            prompts = encoder.prompts(trajectory)
        decisions += [Decision(trajectory, num_trajectories, prompt) for prompt in prompts]
    return decisions, num_trajectories


def _samples(row: Trajectory, encoder: Encoder, settings: EvaluateConfig, data: Path) -> list[Trajectory]:
    with error_context(f"{data}: {row.id}"):
        return unroll(row, encoder, settings)


def _blank(image: bytes) -> bytes:
    """An empty white page of the same size: what is left to a model that does not look."""
    size = decode_image(image).size
    buffer = io.BytesIO()
    Image.new("RGB", size, "white").save(buffer, format="PNG")
    return buffer.getvalue()


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
            yield _scored(decision, answer)


def _scored(decision: Decision, answer: Answer) -> ScoredDecision:
    """A decision point as its line in samples.jsonl: what the model wrote, what was read in it, gold and the score.

    Where gold is several assistant messages in a row, its text is theirs joined, and its calls are those of the last.
    """
    prompt = decision.prompt
    tool_names = [tool["function"]["name"] for tool in decision.trajectory.tools]
    end_of_prompt = prompt.text[-PROMPT_END:]
    reading = read_output(answer.text, end_of_prompt, budget_spent=not answer.stopped, tool_names=tool_names)
    gold_calls = [call["function"] for call in prompt.gold[-1].get("tool_calls", [])]
    gold_text = "".join(content_text(message["content"]) for message in prompt.gold)
    is_outline = decision.trajectory.is_outline
    return {
        "id": decision.trajectory.id,
        "trajectory": decision.trajectory_number,
        "turn": prompt.turn,
        "num_images": len(prompt.images),
        "prompt_tokens": len(prompt.input_ids),
        "output": answer.text,
        "output_tokens": answer.num_tokens,
        "stopped": answer.stopped,
        "parsed": reading_to_json(reading),
        "gold": {"calls": gold_calls, "content": gold_text, "is_outline": is_outline},
        "score": score_decision(reading, gold_calls, gold_text, decision.trajectory.tools, is_outline=is_outline),
    }


def _sum_over_ranks(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts of this rank -> counts of all of them, on every rank. All call it."""
    return {name: int(count) for name, count in world.sum_counts(counts).items()}


def _parts(out: Path) -> list[Path]:
    """The files of decision points that ranks wrote to `out`, and no others."""
    return sorted(path for path in out.iterdir() if re.fullmatch(r"\.samples-\d+\.jsonl", path.name))


def _clear(out: Path) -> None:
    """Make `out`, without parts of a run that was killed."""
    out.mkdir(parents=True, exist_ok=True)
    for left_over in _parts(out):
        left_over.unlink()


def _write_my_part(out: Path, decisions: Iterator[ScoredDecision]) -> list[ScoredDecision]:
    """Write this rank's decision points as they come; returns them."""
    written = []
    writer = JsonlWriter(out / f".samples-{world.rank()}.jsonl", append=False)
    for decision in decisions:
        writer.write(decision)
        written.append(decision)
    writer.close()
    return written


def _join_parts(out: Path, num_decisions: int) -> None:
    """One samples.jsonl of all ranks' parts, in the order of the data."""
    parts = _parts(out)
    decisions: list[ScoredDecision] = [decision for part in parts for decision in read_jsonl(part)]
    places = {_place(decision) for decision in decisions}
    complete = len(places) == len(decisions) == num_decisions
    assert complete, f"{len(decisions)} lines of samples, {num_decisions} decision points"
    with writing(out / SAMPLES) as temporary:
        writer = JsonlWriter(temporary, append=False)
        for decision in sorted(decisions, key=_place):
            writer.write(decision)
        writer.close()
    for part in parts:
        part.unlink()


def _place(decision: ScoredDecision) -> tuple[int, int]:
    """Where a decision point is in the data: number of its trajectory, and of its turn in it."""
    return decision["trajectory"], decision["turn"]
