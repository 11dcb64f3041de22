"""Which tokens see which where there are images: one rule for 12B, 26B and 31B, in rows, in packs and in answers.

The mask is written here once more, and handed to transformers' own code, which takes a ready one as it is.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from gemma_dist.config import ModelConfig
from gemma_dist.model.load import load_for_evaluation, load_model
from gemma_dist.stream.collate import Sample, collate, collate_packs, control_ids
from tests.support.documents import document

WINDOW = 16
DOCUMENTS = [(6, "<", (2, 2), ">", 9), (3, "<", (3, 3), ">", "<", (5, 4), ">", 4), (40, "<", (5, 4), ">", 30)]
BOTH_STYLES = pytest.mark.parametrize("style", ["12b", "31b"])  # experts have no float64; 26b attends as 31b


@pytest.fixture
def samples(tiny_model: Callable[..., Path], style: str) -> list[Sample]:
    ids = control_ids(AutoProcessor.from_pretrained(tiny_model(style)))
    return [document(ids, *parts) for parts in DOCUMENTS]


def in_float64(model: Any) -> Any:
    """The model with a window that the documents exceed."""
    model.config.text_config.sliding_window = model.model.language_model.config.sliding_window = WINDOW
    for layer in model.model.language_model.layers:
        layer.self_attn.sliding_window = WINDOW
    return model.double().eval()


def plain(folder: Path) -> Any:
    """As transformers has it."""
    return in_float64(AutoModelForImageTextToText.from_pretrained(folder))


def masks(types: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of one document (1, T), True where a query sees a key: full layers causal, sliding ones (causal | same image) &
    window."""
    (kinds,) = types.tolist()
    length = len(kinds)
    image, number = [0] * length, 0
    for place, kind in enumerate(kinds):
        number += bool(kind and (place == 0 or not kinds[place - 1]))
        image[place] = number if kind else 0
    full, sliding = (torch.zeros(1, 1, length, length, dtype=torch.bool) for _ in range(2))
    for query in range(length):
        for key in range(length):
            same_image = image[query] == image[key] != 0
            full[0, 0, query, key] = key <= query
            sliding[0, 0, query, key] = (key <= query or same_image) and query - key < WINDOW
    return {"full_attention": full, "sliding_attention": sliding}


def logits(model: Any, batch: dict[str, torch.Tensor], **changed: Any) -> torch.Tensor:
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "kinds")} | changed
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def expected(folder: Path, ids: Any, samples: list[Sample]) -> list[torch.Tensor]:
    """The logits of each document under the mask of this file."""
    model = plain(folder)
    batches = [collate([sample], ids) for sample in samples]
    return [logits(model, batch, attention_mask=masks(batch["mm_token_type_ids"]))[0] for batch in batches]


@BOTH_STYLES
def test_rows_packs_and_answers_follow_one_rule(
    tiny_model: Callable[..., Path], style: str, samples: list[Sample]
) -> None:
    folder = tiny_model(style)
    ids = control_ids(AutoProcessor.from_pretrained(folder))
    wanted = expected(folder, ids, samples)
    settings = ModelConfig(model_name_or_path=str(folder), dtype="float32")

    rows = in_float64(load_model(settings, None, packing=False))
    padded = logits(rows, collate(samples, ids))
    for row, alone in zip(padded, wanted, strict=True):
        torch.testing.assert_close(row[: len(alone)], alone, atol=1e-9, rtol=0)

    packs = in_float64(load_model(settings, None, packing=True))
    (pack,) = logits(packs, collate_packs([samples], ids))
    torch.testing.assert_close(pack[: sum(map(len, wanted))], torch.cat(wanted), atol=1e-9, rtol=0)

    answering = in_float64(load_for_evaluation(str(folder), None))
    for sample, alone in zip(samples, wanted, strict=True):
        inputs = {name: one for name, one in collate([sample], ids).items() if name not in ("labels", "kinds")}
        written = answering.generate(
            **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        torch.testing.assert_close(written.logits[0][0].double(), alone[-1], atol=1e-5, rtol=0)  # made float32 there
        # The later ones see the same past, through the cache.
        longer = torch.cat([inputs["input_ids"], written.sequences[:, -3:-1]], dim=1)
        types = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 2))
        pixels = {name: inputs[name] for name in ("pixel_values", "image_position_ids")}
        batch = {"input_ids": longer, "mm_token_type_ids": types, **pixels}
        again = logits(plain(folder), batch, attention_mask=masks(types))[0]
        torch.testing.assert_close(written.logits[2][0].double(), again[-1], atol=1e-5, rtol=0)


@BOTH_STYLES
def test_plain_transformers_differs_for_12b_alone(
    tiny_model: Callable[..., Path], style: str, samples: list[Sample]
) -> None:
    """Where it no longer does, `use_image_rule` of model/vision.py, and what the docs say of it, can go."""
    folder = tiny_model(style)
    ids = control_ids(AutoProcessor.from_pretrained(folder))
    model = plain(folder)
    wanted = expected(folder, ids, samples)
    found = [logits(model, collate([sample], ids))[0] for sample in samples]
    worst = max(float((one - other).abs().max()) for one, other in zip(found, wanted, strict=True))
    assert worst > 0.1 if style == "12b" else worst < 1e-9


@pytest.mark.parametrize("style", ["12b"])
def test_without_images_12b_is_what_transformers_makes_of_it(
    tiny_model: Callable[..., Path], style: str, samples: list[Sample]
) -> None:
    folder = tiny_model(style)
    ids = control_ids(AutoProcessor.from_pretrained(folder))
    rows = in_float64(load_model(ModelConfig(model_name_or_path=str(folder), dtype="float32"), None, packing=False))
    batch = collate([document(ids, 23), document(ids, 70)], ids)
    torch.testing.assert_close(logits(rows, batch)[:, :23], logits(plain(folder), batch)[:, :23], atol=1e-12, rtol=0)
