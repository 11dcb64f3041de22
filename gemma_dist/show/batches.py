"""`gemma-dist batches`: which samples a step trains on, from arithmetic alone, to find the row behind a bad step.

Steps are counted from 1, as messages and `metrics.jsonl` count them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gemma_dist.stream.schedule import Schedule


@dataclass(frozen=True)
class StepListing:
    """The samples of one optimizer step."""

    step: int  # from 1
    epoch: float  # passes over the corpus at the end of the step, as in metrics.jsonl
    epochs: list[float]  # of each source
    ranks: list[list[list[list[str]]]]  # ids of ranks -> micro-batches -> packs
    lines: list[str]

    def to_json(self) -> dict[str, Any]:
        return {"step": self.step, "epoch": self.epoch, "ranks": self.ranks}

    def render(self) -> str:
        return "\n".join(self.lines)


def batches(schedule: Schedule, step: int, num_steps: int) -> Iterator[StepListing]:
    """The steps `step` … `step + num_steps - 1` (from 1) of a run, as its ranks would go through them."""
    for number in range(step, step + num_steps):
        yield _describe(schedule, number)


def _describe(schedule: Schedule, step: int) -> StepListing:
    """Step `step`, from 1."""
    shards, epochs = schedule.shards, schedule.epochs(step)
    epoch = round(schedule.epoch(step), 4)
    of_each_source = ""
    if len(epochs) > 1:
        of_each_source = f" (of each source: {epochs}), sequences of each source: {schedule.num_lanes(step - 1)}"
    lines = [f"step {step}, epoch {epoch}{of_each_source}"]
    ranks = []
    for rank in range(schedule.plan.world_size):
        micro_batches = []
        for number, packs in enumerate(schedule.micro_batches(step - 1, rank), start=1):
            micro_batches.append([[shards.id(sample) for sample in pack] for pack in packs])
            where = f"  rank {rank}  micro-batch {number}"
            if not any(packs):
                lines.append(f"{where}  filler")
            for pack, ids in zip(packs, micro_batches[-1], strict=True):
                if pack:
                    num_tokens = int(shards.num_text_tokens[pack].sum() + shards.num_image_tokens[pack].sum())
                    lines.append(f"{where}  {num_tokens:7,d} tokens  {'  '.join(ids)}")
        ranks.append(micro_batches)
    return StepListing(step, epoch, epochs, ranks, lines)
