"""What `gemma-dist shard` says of a whole run: how many rows and tokens, what was refused, what was changed."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from gemma_dist.config import ShardConfig, option
from gemma_dist.errors import setting, spell
from gemma_dist.shards.fetch import join

OPTIONS = {name: f"{option(name)} {{}}" for name in ShardConfig.model_fields}  # of `gemma-dist shard`, in its log
REJECTED = "rejected.jsonl"
TOO_LONG = "too_long.jsonl"
NUM_NOTES_SHOWN = 20


@dataclass
class ShardReport:
    """What became of the rows, each of which makes one sample, or with `unroll` several: read + unrolled = written +
    rejected + dropped; the cut ones are among the written."""

    out: str
    num_read: int = 0  # rows
    num_unrolled: int = 0  # samples beyond the first of each row
    num_written: int = 0  # samples
    num_rejected: int = 0  # rows: all of a row is refused or nothing
    num_dropped: int = 0
    num_cut: int = 0
    num_shards: int = 0
    num_text_tokens: int = 0
    num_image_tokens: int = 0
    num_images: int = 0
    num_target_tokens: int = 0
    num_dropped_reasoning: int = 0  # assistant messages whose reasoning the chat template leaves out
    notes: Counter[str] = field(default_factory=Counter)  # of the written rows: what parsing changed, how often

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"notes": dict(self.notes)}  # asdict counts the pairs of a Counter anew

    def summary(self) -> str:
        written = f"{self.num_written:,} of {self.num_read:,} rows"
        if self.num_unrolled:
            written = f"{self.num_written:,} samples of {self.num_read:,} rows"
        lines = [
            f"{written} in {self.num_shards:,} shard{'s' * (self.num_shards != 1)}: {self.out}",
            f"{self.num_text_tokens:,} text tokens, {self.num_image_tokens:,} image tokens in {self.num_images:,} "
            f"images; {self.num_target_tokens:,} tokens are trained",
        ]
        if self.num_rejected:
            lines.append(f"refused rows: {self.num_rejected:,}, in {join(self.out, REJECTED)}")
        if self.num_dropped or self.num_cut:
            lines.append(
                f"samples dropped for their length: {self.num_dropped:,}, cut: {self.num_cut:,}, both in "
                f"{join(self.out, TOO_LONG)}"
            )
        if self.num_dropped_reasoning:
            lines.append(
                f"{self.num_dropped_reasoning:,} messages lose their reasoning, since the chat template renders it "
                f"after the last user turn only, or never: to train on it, use {setting('unroll', 'reasoning')}, which "
                f"makes one sample for each user turn, and a newer template, such as gemma4_v5"
            )
        # There may be a note for each of a thousand tools: they come last.
        notes = sorted(self.notes.items(), key=lambda item: (item[0].startswith("tool "), -item[1], item[0]))
        lines += [f"{count:,} x {note}" for note, count in notes[:NUM_NOTES_SHOWN]]
        if len(notes) > NUM_NOTES_SHOWN:
            lines.append(
                f"and {len(notes) - NUM_NOTES_SHOWN:,} more such notes: `gemma-dist shard … --json` prints all"
            )
        lines = [spell(line, OPTIONS) for line in lines]
        return "\n".join(lines)
