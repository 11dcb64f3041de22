"""One row as the model sees it: every token, and which of them are trained."""

import re
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from gemma_dist.config import DataConfig
from gemma_dist.data.encode import IGNORE_INDEX, load_encoder
from gemma_dist.data.pieces import encode_trained, fit, parse
from gemma_dist.data.rows import read_rows
from gemma_dist.data.shards import is_shard_folder, open_shards
from gemma_dist.data.strict import at
from gemma_dist.errors import DataError

TRAINED, TRAINED_END = "⟦", "⟧"
GREEN, PLAIN = "\x1b[32m", "\x1b[0m"
SOFT_TOKENS = re.compile(r"(?:<\|image\|>){2,}")


@dataclass(frozen=True)
class Inspection:
    """Ids, labels (-100: not trained) and texts of the tokens of one row."""

    id: str
    ids: list[int]
    labels: list[int]
    tokens: list[str]  # each id decoded alone; a character that is spread over several tokens reads U+FFFD in each
    runs: list[tuple[bool, str]]  # the text cut where training begins and ends: (trained, text)
    num_text_tokens: int
    num_image_tokens: int
    num_images: int
    num_target_tokens: int

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "runs"}

    def render(self, color: bool) -> str:
        """The row as text under a line of counts. Trained text stands in ⟦ ⟧, and is green with `color`; the soft
        tokens of an image are counted: `<|image|> x 256`."""
        num_tokens = len(self.ids)
        header = (
            f"{self.id}: {num_tokens:,} tokens = {self.num_text_tokens:,} text + {self.num_image_tokens:,} image "
            f"({self.num_images} images); {self.num_target_tokens:,} trained"
        )
        start, end = (GREEN + TRAINED, TRAINED_END + PLAIN) if color else (TRAINED, TRAINED_END)
        pieces = [f"{start}{text}{end}" if trained else text for trained, text in self.runs]
        text = SOFT_TOKENS.sub(lambda run: f"<|image|> x {len(run[0]) // len('<|image|>')}", "".join(pieces))
        return f"{header}\n\n{text}"


def inspect_row(data: Path, model: str, row: int, settings: DataConfig) -> Inspection:
    """Row `row` (from 0) of a shard folder, or of raw rows as `gemma-dist shard` would keep it.

    Raises:
        DataError: there is no such row; it breaks the data contract; it is longer than `settings.max_length`.
    """
    encoder = load_encoder(model, chat_template=settings.chat_template, enable_thinking=settings.enable_thinking)
    if is_shard_folder(data):
        shards = open_shards(data)
        _check_range(data, row, len(shards))
        trajectory = shards.read(row)
        encoded = encoder.encode(trajectory)
    else:
        where, raw = _raw_row(data, row)
        trajectory = parse(raw, where, settings)
        with at(where):
            encoded = encode_trained(trajectory, encoder)
            fitting = fit(trajectory, encoded, encoder, settings)
            if fitting is None:
                raise DataError(
                    f"{len(encoded.input_ids):,} tokens, but max_length is {settings.max_length:,}: `gemma-dist shard` "
                    "drops this row; raise --max-length to see it"
                )
        trajectory, encoded = fitting
    ids, labels = encoded.input_ids, encoded.labels
    decode = encoder.tokenizer.decode
    runs = [
        (trained, decode([token for token, _ in run]))
        for trained, run in groupby(zip(ids, labels, strict=True), lambda pair: pair[1] != IGNORE_INDEX)
    ]
    return Inspection(
        id=trajectory.id,
        ids=ids,
        labels=labels,
        tokens=[decode([token]) for token in ids],
        runs=runs,
        num_text_tokens=len(ids) - encoded.num_image_tokens,
        num_image_tokens=encoded.num_image_tokens,
        num_images=encoded.num_images,
        num_target_tokens=encoded.num_target_tokens,
    )


def _raw_row(data: Path, row: int) -> Any:
    """Place and content of raw row `row`. The rows before it need not be valid."""
    num_rows = 0
    for number, found in enumerate(read_rows([data])):
        if number == row:
            return found
        num_rows += 1
    _check_range(data, row, num_rows)


def _check_range(data: Path, row: int, num_rows: int) -> None:
    if not 0 <= row < num_rows:
        raise DataError(f"{data} has {num_rows:,} rows, so --row may be 0 to {num_rows - 1:,}, not {row:,}")
