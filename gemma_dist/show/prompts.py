"""`gemma-dist check-prompts`: whether what stands in front of each trained answer is what a server will put there.

    3 of 40 trained answers stand behind another prompt than gemma4_v5 makes, in 2 of 12 samples

    rows.jsonl:7: a, turn 4
        trained  …<|turn>user\\nAnd now?<turn|>\\n<|turn>model\\n
        served   …<|turn>user\\nAnd now?<turn|>\\n<|turn>model\\n<|channel>thought\\n<channel|>

Token ids are compared, so that a piece of text that is cut into other tokens is found as well.
"""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from gemma_dist.config import RowConfig
from gemma_dist.data.encode import Encoder, load_encoder
from gemma_dist.data.fit import encode_trained, parse
from gemma_dist.data.rows import read_rows
from gemma_dist.data.strict import error_context
from gemma_dist.data.templates import read_template
from gemma_dist.data.trajectory import Trajectory
from gemma_dist.data.unroll import unroll
from gemma_dist.errors import DataError
from gemma_dist.shards.reader import is_shard_folder, open_shards, refuse_row_settings

NUM_SHOWN = 20
AROUND = 40  # characters that are shown before and behind the place of a difference

PlacedSamples: TypeAlias = tuple[str, list[Trajectory] | DataError]


@dataclass(frozen=True)
class Difference:
    """A trained answer behind other token ids than a server puts in front of it."""

    place: str  # of the row: FILE:LINE, or the folder of shards and the number of the sample
    id: str
    turn: int  # number of the first message that answers, from 1
    trained: str  # the prompts around the first token that differs
    served: str


@dataclass
class PromptsReport:
    """What was compared, and what differs."""

    template: str
    num_samples: int = 0
    num_answers: int = 0  # trained ones: a message, or several in a row
    num_differing_samples: int = 0
    differences: list[Difference] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # rows that cannot be trained: why

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"num_differing_answers": len(self.differences), "num_refused": len(self.refused)}

    def render(self) -> str:
        lines = [
            f"{len(self.differences):,} of {self.num_answers:,} trained answers stand behind another prompt than "
            f"{self.template} makes, in {self.num_differing_samples:,} of {self.num_samples:,} samples"
        ]
        for found in self.differences[:NUM_SHOWN]:
            lines += [
                "",
                f"{found.place}: {found.id}, turn {found.turn}",
                f"    trained  {found.trained}",
                f"    served   {found.served}",
            ]
        lines += _not_shown(len(self.differences))
        if self.refused:
            lines += ["", f"refused rows, which were not compared: {len(self.refused):,}"]
            lines += [f"    {error}" for error in self.refused[:NUM_SHOWN]]
            lines += _not_shown(len(self.refused))
        return "\n".join(lines)


def _not_shown(number: int) -> list[str]:
    return [f"    … and {number - NUM_SHOWN:,} more (all are in the JSON)"] if number > NUM_SHOWN else []


def check_prompts(
    data: str | Path, model: str, server_template: str | None, settings: RowConfig, limit: int | None
) -> PromptsReport:
    """Compare the ids in front of each trained answer of `data` with the generation prompt of a server's template.

    Args:
        data: raw rows, or a folder of shards.
        server_template: a Jinja file, or the name of a revision that TRL ships; None: the model's own.
        limit: how many rows (of shards: samples) are looked at, the first ones; None: all.

    Raises:
        DataError: the data cannot be read, or the shards were made with another encoding.
        ConfigError: the template is neither a file nor the name of a revision; or shards are to be unrolled.
    """
    encoder = load_encoder(model, settings)
    server = _server(model, server_template)
    report = PromptsReport(server_template or f"the template of {model}")
    for place, samples in islice(_rows(data, encoder, settings), limit):
        if isinstance(samples, DataError):
            report.refused.append(str(samples))
            continue
        for trajectory in samples:
            _compare(place, trajectory, encoder, server, report)
    return report


def _server(model: str, template: str | None) -> Encoder:
    encoder = load_encoder(model, RowConfig())
    if template is not None:
        processor = copy.copy(encoder.processor)
        processor.chat_template = read_template(template)
        encoder = Encoder(processor)
    return encoder


def _rows(data: str | Path, encoder: Encoder, settings: RowConfig) -> Iterator[PlacedSamples]:
    """Each row's place with its samples, or with why it is refused."""
    if is_shard_folder(data):
        refuse_row_settings(data, settings)
        shards = open_shards(data)
        shards.require_encoding(encoder)
        for index in range(len(shards)):
            yield shards.place(index), [shards.read(index)]
        return
    for where, row in read_rows([data], settings.max_row_bytes):
        try:
            trajectory = parse(row, where, settings)
            with error_context(where):
                samples = unroll(trajectory, encoder, settings)
            yield str(where), samples
        except DataError as error:
            yield str(where), error


def _compare(place: str, trajectory: Trajectory, encoder: Encoder, server: Encoder, report: PromptsReport) -> None:
    try:
        encoded = encode_trained(trajectory, encoder)
    except DataError as error:
        report.refused.append(f"{place}: {error}")
        return
    image_lengths = encoder.count_soft_tokens(trajectory.images)
    found = []
    for index, num_tokens in encoded.answers:
        trained = encoded.input_ids[:num_tokens]
        try:
            _, served = server.generation_prompt(trajectory, index, image_lengths, thinking=encoded.enable_thinking)
        except DataError as error:
            found.append(Difference(place, trajectory.id, index + 1, "", str(error)))
            continue
        if served != trained:
            token = _first_difference(trained, served)
            around = [_around(encoder, ids, token) for ids in (trained, served)]
            found.append(Difference(place, trajectory.id, index + 1, *around))
    report.num_samples += 1
    report.num_answers += len(encoded.answers)
    report.num_differing_samples += bool(found)
    report.differences += found


def _first_difference(one: list[int], other: list[int]) -> int:
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return min(len(one), len(other))


def _around(encoder: Encoder, ids: list[int], place: int) -> str:
    """The text on both sides of a token's place, in one line, with ▸ in front of it."""
    before = encoder.tokenizer.decode(ids[max(0, place - AROUND) : place])[-AROUND:]
    behind = encoder.tokenizer.decode(ids[place : place + AROUND])[:AROUND]
    return f"{before}▸{behind}".replace("\n", "\\n")
