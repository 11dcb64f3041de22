"""Training steps of a small Gemma 4 on packs and on padded micro-batches, for `streaming.py`: of random content, but of
real lengths."""

import json
import math
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gemma_dist.config import ModelConfig
from gemma_dist.data.encoded import IGNORE_INDEX, Encoded
from gemma_dist.logs import read_jsonl
from gemma_dist.model.load import load_model
from gemma_dist.model.tiny import write_tiny_model
from gemma_dist.stream.collate import ControlIds, Sample, collate_packs, control_ids
from gemma_dist.stream.packing import pack

Document = tuple[int, int]  # tokens of text, and images
IMAGE_TOKENS, PATCHES = 280, (60, 42)  # of an image: nine patches are pooled into a token
NUM_ROUNDS = 2
Rows = list[tuple[Any, ...]]
MicroBatches = list[list[list[int]]]  # the documents of each row of each micro-batch


class Way(NamedTuple):
    """One way to make an epoch of micro-batches."""

    epoch: MicroBatches
    num_timed: int
    collate: Callable[[list[list[Sample]], ControlIds], dict[str, Any]]
    own_attention: bool = False  # inside each document; else what transformers makes of the batch


def compare(
    folder: Path, documents: list[Document], packing_length: int, sizes: dict[int, int], num_packs: int
) -> Rows:
    """Useful tokens a CPU second, packed, text also as TRL packs it, and in micro-batches of so many trajectories,
    padded to the longest or one behind the other.

    Args:
        sizes: of micro-batches, with how many of each are timed.
    """
    write_tiny_model(folder, hidden_size=512, num_hidden_layers=4)
    models = {packing: _load(folder, packing) for packing in (True, False)}
    lengths = np.array([_num_tokens(document) for document in documents])
    packs = [[documents_of_pack] for documents_of_pack in pack(lengths, packing_length)]
    ways = {"packed": Way(packs, num_packs, collate_packs, own_attention=True)}
    if not any(num_images for _, num_images in documents):  # with images TRL refuses packing=True
        ways["TRL, packing=True"] = Way(trl_packs(lengths, packing_length), num_packs, _flatten)
    for size, count in sizes.items():
        epoch = deal(len(documents), size)
        ways[f"micro-batch {size}, padding-free"] = Way(in_one_row(epoch), count, collate_packs, own_attention=True)
        ways[f"micro-batch {size}, padded"] = Way(epoch, count, _pad)
    chosen = {name: _typical(way.epoch, lengths, way.num_timed) for name, way in ways.items()}
    seconds = dict.fromkeys(chosen, 0.0)
    ids = _control_ids(folder)
    _step(models[True], collate_packs([[_sample((64, 0), ids)]], ids))
    for round_number in range(NUM_ROUNDS):  # in turns, so that what else the machine does hits all alike
        for name, micro_batches in chosen.items():
            for rows in micro_batches[round_number::NUM_ROUNDS]:
                samples = [[_sample(documents[i], ids) for i in row] for row in rows]
                seconds[name] += _step(models[ways[name].own_attention], ways[name].collate(samples, ids))
    useful = {name: lengths[list(chain.from_iterable(chain.from_iterable(lot)))].sum() for name, lot in chosen.items()}
    rates = {name: useful[name] / seconds[name] for name in chosen}
    table: Rows = []
    for name, rate in rates.items():
        share = padding(ways[name].epoch, lengths)
        gains = f"{rates['packed'] / rate:.2f}", f"{1 / (1 - share):.2f}"
        table.append((name, f"{share:.1%}", len(chosen[name]), rate, *gains))
    return table


def trl_packs(lengths: np.ndarray, packing_length: int) -> MicroBatches:
    """An epoch of micro-batches of one pack, as SFTTrainer with `packing=True` makes them of text."""
    from datasets import Dataset
    from trl import pack_dataset

    numbered = Dataset.from_dict({"input_ids": [[i] * length for i, length in enumerate(lengths.tolist())]})
    packs = pack_dataset(numbered, packing_length, "bfd")
    return [[list(dict.fromkeys(row))] for row in packs["input_ids"]]


def deal(num_documents: int, size: int) -> MicroBatches:
    """An epoch of micro-batches of single trajectories in random order."""
    order = np.random.default_rng(0).permutation(num_documents)[: num_documents // size * size]
    return [[[i] for i in lot] for lot in order.reshape(-1, size).tolist()]


def in_one_row(epoch: MicroBatches) -> MicroBatches:
    """Each micro-batch's rows one behind the other, as transformers' DataCollatorWithFlattening lays them."""
    return [[list(chain.from_iterable(micro_batch))] for micro_batch in epoch]


def screenshots(folder: Path) -> list[Document]:
    """The rows of the shared screenshots: a token of text for 3.3 characters."""
    rows = [json.dumps(row) for row in read_jsonl(folder / "train.jsonl")]
    return [(round(len(row) / 3.3), row.count('"type": "image"')) for row in rows]


def _num_tokens(document: Document) -> int:
    return document[0] + document[1] * (IMAGE_TOKENS + 2)


def _typical(epoch: MicroBatches, lengths: np.ndarray, count: int) -> MicroBatches:
    """So many micro-batches of an epoch, that together are nearest to all of it: of 5,000 random choices, the one whose
    useful tokens, padded tokens, and squares of row lengths differ least from the mean of the epoch."""
    rows = [[lengths[row].sum() for row in micro_batch] for micro_batch in epoch]
    traits = np.array([(sum(row), len(row) * max(row), len(row) * max(row) ** 2) for row in rows], float)
    traits /= traits.mean(0)
    rng = np.random.default_rng(1)
    choices = [rng.choice(len(epoch), min(count, len(epoch)), replace=False) for _ in range(5000)]
    best = min(choices, key=lambda choice: np.abs(traits[choice].mean(0) - 1).max())
    return [epoch[i] for i in best]


def padding(epoch: MicroBatches, lengths: np.ndarray) -> float:
    """Of the places of an epoch's micro-batches, as they come to the model."""
    rows = [[lengths[row].sum() for row in micro_batch] for micro_batch in epoch]
    return 1 - sum(map(sum, rows)) / sum(len(row) * max(row) for row in rows)


def _sample(document: Document, ids: ControlIds) -> Sample:
    """A trajectory of random tokens, its images evenly in between."""
    num_text, num_images = document
    pieces = np.array_split(np.random.default_rng(num_text).integers(64, 250, num_text), num_images + 1)
    image = [ids.begin_image, *[ids.image] * IMAGE_TOKENS, ids.end_image]
    input_ids = pieces[0].tolist()
    for piece in pieces[1:]:
        input_ids += [*image, *piece.tolist()]
    types = [int(token == ids.image) for token in input_ids]
    encoded = Encoded.of_words(input_ids, [IGNORE_INDEX, *input_ids[1:]], types, num_images)
    grid = torch.cartesian_prod(*map(torch.arange, PATCHES[::-1])).flip(-1)
    pixels = {
        "pixel_values": torch.rand(num_images, math.prod(PATCHES), 768),
        "image_position_ids": grid.expand(num_images, -1, -1),
    }
    return Sample("", encoded, pixels)


def _pad(rows: list[list[Sample]], ids: ControlIds) -> dict[str, torch.Tensor]:
    """As TRL's collators do: to the longest row, on the right; without a filler where there is no image."""
    encoded = [sample.encoded for row in rows for sample in row]

    def padded(values: list[list[int]], fill: int) -> torch.Tensor:
        longest = max(map(len, values))
        return torch.tensor([value + [fill] * (longest - len(value)) for value in values])

    batch = {
        "input_ids": padded([row.input_ids for row in encoded], ids.pad),
        "labels": padded([row.labels for row in encoded], IGNORE_INDEX),
        "attention_mask": padded([[1] * len(row.input_ids) for row in encoded], 0),
        "mm_token_type_ids": padded([row.mm_token_type_ids for row in encoded], 0),
    }
    if any(row.num_images for row in encoded):
        for name in ("pixel_values", "image_position_ids"):
            batch[name] = torch.cat([sample.pixels[name] for row in rows for sample in row])
    return batch


def _flatten(rows: list[list[Sample]], ids: ControlIds) -> dict[str, Any]:
    """One pack by TRL's collator, from whose positions transformers makes a mask over the whole pack on a CPU."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    encoded = [sample.encoded for row in rows for sample in row]
    pack_of_trl = {
        "input_ids": list(chain.from_iterable(row.input_ids for row in encoded)),
        "labels": list(chain.from_iterable(row.labels for row in encoded)),
        "seq_lengths": [len(row.input_ids) for row in encoded],
    }
    return DataCollatorForLanguageModeling(ids.pad, padding_free=True)([pack_of_trl])


def _load(folder: Path, packing: bool) -> Any:
    settings = ModelConfig(model_name_or_path=str(folder), dtype="float32")
    return load_model(settings, None, packing=packing).train()


def _control_ids(folder: Path) -> ControlIds:
    from transformers import AutoProcessor

    return control_ids(AutoProcessor.from_pretrained(folder, trust_remote_code=False))


def _step(model: Any, batch: dict[str, Any]) -> float:
    """CPU seconds of one forward and backward pass."""
    model.zero_grad(set_to_none=True)
    start = time.process_time()
    model(**batch, use_cache=False).loss.backward()
    return time.process_time() - start
