"""Evaluate a model on held-out trajectories: generate at every decision point, read, score, add, report.

    OUT/samples.jsonl    one line a decision point: what was asked, written, read, expected, and the score; trajectories
                         and turns are counted from 1
    OUT/report.json      every metric with numerator and denominator; written last

Whole trajectories are dealt to the ranks, counts are added exactly, and the report says so only after every decision
point was found in the samples just once.
"""

import io
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from gemma_dist import world
from gemma_dist.config import EvaluateConfig
from gemma_dist.data.encode import Encoder, Prompt, load_encoder
from gemma_dist.data.trajectory import Trajectory, decode_image
from gemma_dist.errors import ConfigError, DataError
from gemma_dist.evaluate.generate import Answer, generate
from gemma_dist.evaluate.read import read_output, reading_to_json
from gemma_dist.evaluate.score import METRICS, call_decision, counts, metrics, score_sample, trajectory_counts
from gemma_dist.logs import JsonlWriter, log, progress, read_jsonl, write_json
from gemma_dist.model.load import load_for_evaluation
from gemma_dist.model.zero3 import is_partitioned
from gemma_dist.shards.reader import load_trajectories

SAMPLES = "samples.jsonl"
REPORT = "report.json"
PROMPT_END = 200  # characters of the prompt that tell the reader which block it left open


def evaluate(
    model: str, adapter: Path | None, data: Path, out: Path, limit: int | None, settings: EvaluateConfig
) -> dict[str, Any]:
    """Evaluate `model` (with `adapter`) on the first `limit` trajectories of `data`; returns the report.

    Raises:
        DataError, CheckpointError: the data or the model cannot be used.
        ConfigError: `out` holds a report already.
    """
    if (out / REPORT).exists():
        raise ConfigError(f"{out / REPORT} exists already; name another folder or remove it")
    world.connect()
    world.note_processes()
    encoder = load_encoder(
        model, adapter=adapter, chat_template=settings.chat_template, enable_thinking=settings.enable_thinking
    )
    mine, num_trajectories = _my_points(data, limit, encoder, settings)
    if num_trajectories == 0:
        raise DataError(f"{data} holds no trajectories, so there is nothing to evaluate")
    loaded = load_for_evaluation(model, adapter)
    if is_partitioned(loaded) and world.rank() == 0:
        log.info("model partitioned over %d ranks (ZeRO-3)", world.world_size())

    if world.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        for left_over in _parts(out):
            left_over.unlink()
    world.barrier()
    samples = []
    writer = JsonlWriter(out / f".samples-{world.rank()}.jsonl", append=False)
    for sample in _answered(loaded, encoder, mine, settings):
        writer.write(sample)
        samples.append(sample)
    writer.close()

    totals = {name: world.sum_counts(count) for name, count in _counts(samples).items()}
    num_points = int(world.sum_counts({"points": len(mine)})["points"])
    world.barrier()  # every rank has written its samples
    report = {
        "model": model,
        "adapter": str(adapter) if adapter else None,
        "data": str(data),
        "settings": settings.model_dump(mode="json"),
        "num_trajectories": num_trajectories,
        "num_decision_points": num_points,
        "world_size": world.world_size(),
        "statuses": {k.removeprefix("status."): int(v) for k, v in totals["all"].items() if k.startswith("status.")},
        "call_decision": call_decision(_integers(totals["all"])),
        "metrics": metrics(_integers(totals["all"])),
        "slices": {name: metrics(_integers(totals[name])) for name in ("with_images", "without_images")},
    }
    if world.rank() == 0:
        _join_samples(out, num_points)
        write_json(out / REPORT, report)
        for line in _summary(report):
            log.info(line)
    world.barrier()
    world.disconnect()
    return report


def _my_points(
    data: Path, limit: int | None, encoder: Encoder, settings: EvaluateConfig
) -> tuple[list[tuple[int, Trajectory, Prompt]], int]:
    """This rank's decision points, each with the number of its trajectory; and how many trajectories there are."""
    points, number = [], -1
    for number, trajectory in enumerate(islice(load_trajectories(data, settings), limit)):
        if number % world.world_size() != world.rank():
            continue
        if settings.images == "blank":
            trajectory = replace(trajectory, images=[_blank(image) for image in trajectory.images])
        try:
            points += [(number, trajectory, prompt) for prompt in encoder.prompts(trajectory)]
        except DataError as error:
            raise DataError(f"{data}: {trajectory.id}: {error}") from error
    return points, number + 1


def _answered(
    model: Any, encoder: Encoder, points: list[tuple[int, Trajectory, Prompt]], settings: EvaluateConfig
) -> Iterator[dict[str, Any]]:
    """A scored sample for each point. The longest come first: what does not fit in memory shows at once.

    A rank with fewer batches than another still takes part in the passes of a model that is partitioned over them.
    """
    points = sorted(points, key=lambda point: -len(point[2].input_ids))
    size = settings.per_device_eval_batch_size
    batches = [points[start : start + size] for start in range(0, len(points), size)]
    if is_partitioned(model):
        batches += [[]] * (max(world.gather_objects(len(batches))) - len(batches))
    for batch in progress(batches, total=len(batches), desc="evaluating", unit="batch"):
        prompts = [prompt for _, _, prompt in batch]
        answers = generate(model, encoder, prompts, max_new_tokens=settings.max_new_tokens)
        for (number, trajectory, prompt), written in zip(batch, answers, strict=True):
            yield _sample(number, trajectory, prompt, written)


def _sample(number: int, trajectory: Trajectory, prompt: Prompt, written: Answer) -> dict[str, Any]:
    names = [tool["function"]["name"] for tool in trajectory.tools]
    reading = read_output(written.text, prompt.text[-PROMPT_END:], not written.stopped, names)
    gold_calls = [call["function"] for call in prompt.gold[-1].get("tool_calls", [])]
    gold_text = "".join(map(_text, prompt.gold))
    return {
        "id": trajectory.id,
        "trajectory": number + 1,
        "turn": prompt.turn,
        "num_images": len(prompt.images),
        "prompt_tokens": len(prompt.input_ids),
        "output": written.text,
        "output_tokens": written.num_tokens,
        "stopped": written.stopped,
        "parsed": reading_to_json(reading),
        "gold": {"calls": gold_calls, "content": gold_text},
        "score": score_sample(reading, gold_calls, gold_text, trajectory.tools),
    }


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _counts(samples: list[dict[str, Any]]) -> dict[str, Counter[str]]:
    """Addable counts of all samples and of each slice."""
    totals: dict[str, Counter[str]] = {"all": Counter(), "with_images": Counter(), "without_images": Counter()}
    by_trajectory: dict[int, list[dict[str, Any]]] = {}
    for sample in samples:
        for name in ("all", "with_images" if sample["num_images"] else "without_images"):
            totals[name].update(counts(sample["score"]))
        totals["all"][f"status.{sample['score']['status']}"] += 1
        by_trajectory.setdefault(sample["trajectory"], []).append(sample["score"])
    for scores in by_trajectory.values():
        totals["all"].update(trajectory_counts(scores))
    return totals


def _integers(totals: dict[str, float]) -> dict[str, int]:
    return {name: int(value) for name, value in totals.items()}


def _parts(out: Path) -> list[Path]:
    """The files of samples that ranks wrote to `out`, and no others."""
    return sorted(path for path in out.iterdir() if re.fullmatch(r"\.samples-\d+\.jsonl", path.name))


def _join_samples(out: Path, num_points: int) -> None:
    """One samples.jsonl of all ranks' parts, in the order of the data."""
    parts = _parts(out)
    samples = [sample for part in parts for sample in read_jsonl(part)]
    places = {(sample["trajectory"], sample["turn"]) for sample in samples}
    assert len(places) == len(samples) == num_points, f"{len(samples)} samples, {num_points} decision points"
    temporary = out / f".{SAMPLES}.tmp"
    writer = JsonlWriter(temporary, append=False)
    for sample in sorted(samples, key=lambda sample: (sample["trajectory"], sample["turn"])):
        writer.write(sample)
    writer.close()
    temporary.replace(out / SAMPLES)
    for part in parts:
        part.unlink()


def _blank(image: bytes) -> bytes:
    """An empty white page of the same size: what is left to a model that does not look."""
    picture = decode_image(image)
    buffer = io.BytesIO()
    Image.new("RGB", picture.size, "white").save(buffer, format="PNG")
    return buffer.getvalue()


def _summary(report: dict[str, Any]) -> Iterator[str]:
    yield f"{report['num_decision_points']} decision points of {report['num_trajectories']} trajectories"
    for name, metric in report["metrics"].items():
        if metric["denominator"]:
            share = f"{metric['value']:7.1%}  {metric['numerator']:>6} of {metric['denominator']:<6}"
            yield f"  {name:<18} {share}  {METRICS[name]}"
