"""Does the merged model compute what base + adapter did? Both are loaded with plain transformers and PEFT and asked.

Both run in float32 on the CPU, layer by layer (`layerwise.py`), on trajectories that are given, or else on a few short
prompts of fixed pseudo-random ids, and one with an image if the model sees. What remains is then the rounding of the
merged weights to the dtype that they are stored in:

- float32 weights: nothing but the order of summation. The logits must agree to 1e-3 (tiny models: 1e-5; the
  soft-capped logits lie in ±30).
- 16-bit weights: rounding moves the logits visibly, by how much depends on the model. The measure is what the trained
  model itself loses when it computes in bfloat16, as it did in training: the merged one may lie four times as far from
  it in KL divergence. Leaving out or doubling the adapter lies far beyond, unless the adapter is so weak that it drowns
  in that noise anyway.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from gemma_dist.config import RowConfig
from gemma_dist.data.encode import load_encoder
from gemma_dist.data.encoded import IGNORE_INDEX
from gemma_dist.data.fit import encode_trained
from gemma_dist.data.strict import error_context
from gemma_dist.errors import CheckpointError, DataError
from gemma_dist.merge.layerwise import Inputs, LayerwiseModel, Run
from gemma_dist.model.adapter_config import read_adapter_config
from gemma_dist.model.record import Quantization
from gemma_dist.model.vision import patches_of_config
from gemma_dist.shards.reader import load_trajectories

FLOAT32_MAX_LOGIT_DIFFERENCE = 1e-3
NOISE_FACTOR = 4.0
NOISE_KL_FLOOR = 1e-6  # nats per position: a model without noise may still differ in the last bit
PROMPT_LENGTHS = (8, 24, 48)
TOKENS_PER_PROMPT = 512  # of those that were trained
BLOCK_LOGITS = 1 << 22  # that are compared at once
BLOCK_TOKENS = 1 << 13  # most rows of the head that are held at once


@dataclass(frozen=True)
class Sample:
    """A row that both models read."""

    inputs: Inputs
    trained: torch.Tensor  # (T,) bool: whether the token behind each position is trained


@dataclass(frozen=True)
class Samples:
    """The rows that both models read, one or more."""

    rows: Sequence[Sample]
    data: str | None  # where they come from; None: made up


def read_samples(data: Path, limit: int, model: Path, adapter: Path) -> Samples:
    """The first `limit` trajectories of a JSONL file or a folder of shards, as training with the adapter saw them.

    Raises:
        DataError: there are none, or one of them cannot be read.
        CheckpointError: the model has no processor.
    """
    encoder = load_encoder(str(model), RowConfig(), adapter=adapter)
    samples = []
    for trajectory in islice(load_trajectories(data, RowConfig()), limit):
        with error_context(f"{data}: {trajectory.id}"):
            encoded = encode_trained(trajectory, encoder)
            inputs = {name: torch.tensor([getattr(encoded, name)]) for name in ("input_ids", "mm_token_type_ids")}
            pixels = encoder.pixels(trajectory.images) if trajectory.images else {}
        following = torch.tensor([*encoded.labels[1:], IGNORE_INDEX])
        samples.append(Sample({**inputs, **pixels}, following != IGNORE_INDEX))
    if not samples:
        raise DataError(f"{data} holds no trajectories, so there is nothing to compare logits on")
    return Samples(samples, str(data))


def made_up_samples(config: Mapping[str, Any], tokens: Sequence[int] = ()) -> Samples:
    """Pseudo-random ids, always the same; in the last row with a small image if the model sees.

    Args:
        config: of the model, with all defaults in it.
        tokens: whose embeddings were trained; they have rows of their own.
    """
    generator = torch.Generator().manual_seed(0)
    text_config = config.get("text_config") or config
    token_settings = [value for key, value in config.items() if key.endswith(("token_id", "token_index"))]
    special = {token for token in token_settings if type(token) is int}  # others are lists of them, or None
    ids = torch.tensor([token for token in range(text_config["vocab_size"]) if token not in special])

    def draw(length: int) -> torch.Tensor:
        """(1, length): ids of ordinary tokens."""
        return ids[torch.randint(len(ids), (1, length), generator=generator)]

    trained = torch.tensor([[token for token in tokens if token not in special]], dtype=torch.long)
    texts = [*map(draw, PROMPT_LENGTHS), *(row for row in trained.split(TOKENS_PER_PROMPT, dim=1) if row.numel())]
    prompts = [{"input_ids": row, "mm_token_type_ids": torch.zeros_like(row)} for row in texts]
    if config.get("vision_config"):
        patches = patches_of_config(config)
        colors = torch.rand(patches.num_patches(2), patches.num_values, generator=generator)
        image = torch.tensor([[config["boi_token_id"], *[config["image_token_id"]] * 2, config["eoi_token_id"]]])
        before, after = draw(6), draw(12)
        input_ids = torch.cat([before, image, after], dim=1)
        prompts.append(
            {
                "input_ids": input_ids,
                "mm_token_type_ids": (input_ids == config["image_token_id"]).long(),
                **patches.image(2, 1, colors),
            }
        )
    rows = [Sample(prompt, torch.zeros(prompt["input_ids"].shape[1], dtype=torch.bool)) for prompt in prompts]
    return Samples(rows, data=None)


def verify(
    base: Path,
    adapters: Sequence[tuple[Path, float]],
    merged: Path,
    *,
    quantization: Quantization | None,
    samples: Samples | None = None,
) -> dict[str, Any]:
    """Compare the logits of `merged` with those of `base` + the weighted sum of `adapters`.

    Args:
        quantization: how training held the base, if `merged` was made from that (`read_quantization`).
        samples: what both read; None: prompts that are made up.

    Returns:
        `max_logit_difference` and `mean_logit_difference` (absolute), `kl` (nats per position, trained from merged),
        `top1_agreement` (0 to 1), `num_positions`; the same of the positions whose next token is trained, as
        `trained`, where there are some; `data` and `num_samples`; `limit` (what was demanded) and `noise_kl` (of
        computing in bfloat16; 16-bit weights only).

    Raises:
        CheckpointError: the merged model lacks weights, or its logits are further off than rounding explains.
    """
    from transformers import AutoConfig

    if samples is None:
        config = AutoConfig.from_pretrained(merged, trust_remote_code=False).to_dict()
        samples = made_up_samples(
            config, sorted({token for folder, _ in adapters for token in _trained_tokens(folder)})
        )
    exact = _stored_in_float32(merged, quantization)
    trained = LayerwiseModel(base, adapters, quantization)
    runs = [Run(row.inputs) for row in samples.rows]
    noisy = [] if exact else [Run(row.inputs, in_bfloat16=True) for row in samples.rows]
    references = trained.run([*runs, *noisy])
    result = LayerwiseModel(merged)
    found, noise = _compare(trained, result, references, result.run(runs))

    report: dict[str, Any] = _measures(found, torch.ones(sum(len(one) for one in found), dtype=torch.bool))
    is_trained = torch.cat([row.trained for row in samples.rows])
    if is_trained.any():
        report["trained"] = _measures(found, is_trained)
    report |= {"data": samples.data, "num_samples": len(samples.rows)}
    if exact:
        value, limit, what = report["max_logit_difference"], FLOAT32_MAX_LOGIT_DIFFERENCE, "a logit differs"
        report["limit"] = {"max_logit_difference": limit}
    else:
        report["noise_kl"] = torch.cat([one.kl for one in noise]).mean().item()
        value, limit, what = report["kl"], max(NOISE_FACTOR * report["noise_kl"], NOISE_KL_FLOOR), "its KL differs"
        report["limit"] = {"kl": limit}
    if not value <= limit:  # so that NaN fails too
        raise CheckpointError(
            f"the merged model does not compute what base + adapter do: {what} by {value:.3g}, rounding explains "
            f"{limit:.3g}. Nothing was written. Check that {base} is the base that "
            f"{' and '.join(str(folder) for folder, _ in adapters)} was trained on"
        )
    return report


def _trained_tokens(adapter: Path) -> list[int]:
    """The tokens whose rows of an embedding an adapter has."""
    listed = read_adapter_config(adapter).get("trainable_token_indices") or []
    return [token for tokens in (listed.values() if isinstance(listed, dict) else [listed]) for token in tokens]


def describe(report: Mapping[str, Any]) -> list[str]:
    """What `verify` found, in lines for the terminal."""
    lines = ["  verified: " + _WORDS.format(**report)]
    if "trained" in report:
        lines.append("    trained tokens: " + _WORDS.format(**report["trained"]))
    return lines


_WORDS = (
    "largest logit difference {max_logit_difference:.2g}, mean {mean_logit_difference:.2g}, KL {kl:.2g}, same top "
    "token {top1_agreement:.1%} of {num_positions:,} positions"
)


class _Comparison:
    """Logits of two models at the T positions of a sample, compared as they come, block by block of the vocabulary."""

    def __init__(self, num_positions: int) -> None:
        zeros, lowest = torch.zeros(num_positions).double(), torch.full((num_positions,), -torch.inf).double()
        self.max_difference, self.sum_of_differences, self.num_tokens = zeros.clone(), zeros.clone(), 0
        self._most, self._sum, self._weighted = lowest.clone(), zeros.clone(), zeros.clone()  # of e^(p - most)
        self._log_sum_of_other = lowest.clone()
        self._top = [(lowest.clone(), torch.zeros(num_positions).long()) for _ in range(2)]

    def __len__(self) -> int:
        return len(self._sum)

    def add(self, reference: torch.Tensor, other: torch.Tensor) -> None:
        """Take the logits (T, V) of the next V tokens."""
        logits = reference.double(), other.double()
        difference = logits[0] - logits[1]
        self.max_difference = torch.maximum(self.max_difference, difference.abs().amax(-1))
        self.sum_of_differences += difference.abs().sum(-1)
        most = torch.maximum(self._most, logits[0].amax(-1))
        kept, weights = (self._most - most).exp(), (logits[0] - most[:, None]).exp()
        self._most, self._sum = most, self._sum * kept + weights.sum(-1)
        self._weighted = self._weighted * kept + (weights * difference).sum(-1)
        self._log_sum_of_other = torch.logaddexp(self._log_sum_of_other, logits[1].logsumexp(-1))
        for number, values in enumerate(logits):
            value, token = values.max(-1)
            before, best = self._top[number]
            self._top[number] = (
                torch.maximum(before, value),
                torch.where(value > before, token + self.num_tokens, best),
            )
        self.num_tokens += reference.shape[1]

    @property
    def kl(self) -> torch.Tensor:
        """(T,): the divergence of the other from the reference, in nats: the mean of log p - log q under p."""
        return self._weighted / self._sum - (self._most + self._sum.log()) + self._log_sum_of_other

    @property
    def same_top(self) -> torch.Tensor:
        """(T,) bool: whether both have the same likeliest token."""
        return self._top[0][1] == self._top[1][1]


def _compare(
    trained: LayerwiseModel, merged: LayerwiseModel, references: list[torch.Tensor], results: list[torch.Tensor]
) -> tuple[list[_Comparison], list[_Comparison]]:
    """What two models' heads make of what came out of their layers.

    Args:
        references: (T, width) of each sample, and behind these, if there are more, those computed in bfloat16.

    Returns:
        One of each sample: the merged model against the trained one, and the trained one in bfloat16 against itself.
    """
    noisy = references[len(results) :]
    found = [_Comparison(len(hidden)) for hidden in results]
    noise = [_Comparison(len(hidden)) for hidden in noisy]
    block = min(BLOCK_TOKENS, max(1, BLOCK_LOGITS // max(len(hidden) for hidden in results)))
    for start in range(0, trained.vocab_size, block):
        stop = min(start + block, trained.vocab_size)
        head_of_trained, head_of_merged = trained.head(start, stop), merged.head(start, stop)
        for number, hidden in enumerate(results):
            reference = head_of_trained(references[number])
            found[number].add(reference, head_of_merged(hidden))
            if noisy:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    noise[number].add(reference, head_of_trained(noisy[number]))
    return found, noise


def _measures(found: Sequence[_Comparison], chosen: torch.Tensor) -> dict[str, Any]:
    """The figures of the chosen positions of all samples, one behind the other."""
    num_tokens = found[0].num_tokens
    return {
        "max_logit_difference": torch.cat([one.max_difference for one in found])[chosen].max().item(),
        "mean_logit_difference": torch.cat([one.sum_of_differences for one in found])[chosen].mean().item()
        / num_tokens,
        "kl": torch.cat([one.kl for one in found])[chosen].mean().item(),
        "top1_agreement": torch.cat([one.same_top for one in found])[chosen].double().mean().item(),
        "num_positions": int(chosen.sum()),
    }


def _stored_in_float32(merged: Path, quantization: Quantization | None) -> bool:
    """Whether no weight of the merged model was rounded below float32 on its way."""
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    loaded = (quantization or {}).get("weights_dtype", "float32")
    return config.get("dtype", config.get("torch_dtype")) == "float32" and loaded == "float32"
