"""Does the merged model compute what base + adapter did? Both are loaded with plain transformers and PEFT and asked.

Both run in float32 on the CPU, on a few short prompts of fixed pseudo-random ids, and one with an image if the model
sees. What remains is then the rounding of the merged weights to the dtype that they are stored in:

- float32 weights: nothing but the order of summation. The logits must agree to 1e-3 (tiny models: 1e-5; the
  soft-capped logits lie in ±30).
- 16-bit weights: rounding moves the logits visibly, by how much depends on the model. The measure is what the trained
  model itself loses when it computes in bfloat16, as it did in training: the merged one may lie four times as far from
  it in KL divergence. Leaving out or doubling the adapter lies far beyond, unless the adapter is so weak that it drowns
  in that noise anyway.
"""

import gc
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gemma_dist.errors import CheckpointError
from gemma_dist.merge.folders import model_class
from gemma_dist.merge.four_bit import linears_left_whole
from gemma_dist.merge.plan import Headers
from gemma_dist.model.load import keep_four_bit_exact, load_another, with_adapter
from gemma_dist.model.record import Quantization, four_bit_config, four_bit_stacks
from gemma_dist.model.vision import patches_of_config

FLOAT32_MAX_LOGIT_DIFFERENCE = 1e-3
NOISE_FACTOR = 4.0
NOISE_KL_FLOOR = 1e-6  # nats per position: a model without noise may still differ in the last bit
PROMPT_LENGTHS = (8, 24, 48)


def check_memory(headers: Headers) -> None:
    """Refuse before a long merge what could not be verified after it: one model in float32 must fit in memory."""
    needed = 4 * sum(math.prod(shape) for _, shape in headers.values())
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > present:
        raise CheckpointError(
            f"--verify holds the model in float32, {needed / 2**30:.0f} GiB, and this machine has "
            f"{present / 2**30:.0f} GiB of memory; merge without --verify, or on a larger machine"
        )


def verify(
    base: Path, adapter: Path | Mapping[Path, float], merged: Path, *, quantization: Quantization | None
) -> dict[str, Any]:
    """Compare the logits of `merged` with those of `base` + `adapter`.

    Args:
        adapter: a folder, or several with the weight of each.
        quantization: how training held the base, if `merged` was made from that (`read_quantization`).

    Returns:
        `max_logit_difference`, `kl` (nats per position, trained from merged), `top1_agreement` (0 to 1),
        `num_positions`, `limit` (what was demanded) and `noise_kl` (of computing in bfloat16; 16-bit weights only).

    Raises:
        CheckpointError: the merged model lacks weights, or its logits are further off than rounding explains.
    """
    from transformers import AutoConfig

    prompts = make_prompts(AutoConfig.from_pretrained(merged, trust_remote_code=False).to_dict())

    adapters = adapter if isinstance(adapter, Mapping) else {adapter: 1.0}
    trained = _load_trained(base, adapters, quantization)
    reference = _logits(trained, prompts)
    exact = _stored_in_float32(merged, quantization)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not exact):
        noisy = reference if exact else _logits(trained, prompts)
    del trained
    gc.collect()

    model, loading = model_class(merged).from_pretrained(
        merged, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    if loading["missing_keys"] or loading["mismatched_keys"]:
        raise CheckpointError(
            f"the merged model lacks weights, such as {sorted(loading['missing_keys'])[:3]}; so does its base: "
            f"check {base} with transformers' from_pretrained"
        )
    result = _logits(model.eval(), prompts)

    report: dict[str, Any] = {
        "max_logit_difference": (result - reference).abs().max().item(),
        "kl": _kl(reference, result),
        "top1_agreement": (result.argmax(-1) == reference.argmax(-1)).double().mean().item(),
        "num_positions": len(reference),
    }
    if exact:
        found, limit, what = report["max_logit_difference"], FLOAT32_MAX_LOGIT_DIFFERENCE, "a logit differs"
        report["limit"] = {"max_logit_difference": limit}
    else:
        report["noise_kl"] = _kl(reference, noisy)
        found, limit, what = report["kl"], max(NOISE_FACTOR * report["noise_kl"], NOISE_KL_FLOOR), "its KL differs"
        report["limit"] = {"kl": limit}
    if not found <= limit:  # so that NaN fails too
        raise CheckpointError(
            f"the merged model does not compute what base + adapter do: {what} by {found:.3g}, rounding explains "
            f"{limit:.3g}. Nothing was written. Check that {base} is the base that "
            f"{' and '.join(map(str, adapters))} was trained on"
        )
    return report


def make_prompts(config: Mapping[str, Any]) -> list[dict[str, torch.Tensor]]:
    """Model inputs of one row each: pseudo-random ids, always the same; one with a small image if the model sees.

    Args:
        config: of the model, with all defaults in it.
    """
    generator = torch.Generator().manual_seed(0)
    text_config = config.get("text_config") or config
    token_settings = [value for key, value in config.items() if key.endswith(("token_id", "token_index"))]
    special = {token for token in token_settings if type(token) is int}  # others are lists of them, or None
    ids = torch.tensor([token for token in range(text_config["vocab_size"]) if token not in special])

    def draw(length: int) -> torch.Tensor:
        """(1, length): ids of ordinary tokens."""
        return ids[torch.randint(len(ids), (1, length), generator=generator)]

    prompts = [{"input_ids": row, "mm_token_type_ids": torch.zeros_like(row)} for row in map(draw, PROMPT_LENGTHS)]
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
    return prompts


def _load_trained(base: Path, adapters: Mapping[Path, float], quantization: Quantization | None) -> Any:
    """Base + adapters as training held them, computing in float32."""
    if quantization is None:
        model = model_class(base).from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    else:
        model = _load_quantized(base, quantization)
    return _with_adapters(model, adapters).eval()


def _with_adapters(model: Any, adapters: Mapping[Path, float]) -> Any:
    """`model` with all of some adapters at work, each with its weight."""
    from peft.tuners.lora import LoraLayer

    (first, _), *more = adapters.items()
    names = {f"adapter_{number}": weight for number, weight in enumerate(adapters.values())}
    adapted = with_adapter(model, first, adapter_name="adapter_0")
    for (folder, _), name in zip(more, list(names)[1:], strict=True):
        load_another(adapted, folder, name)
    if more:
        adapted.base_model.set_adapter(list(names))
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            for name, weight in names.items():
                module.set_scale(name, weight)
    return adapted


def _load_quantized(base: Path, quantization: Quantization) -> Any:
    """The base with exactly the recorded modules in 4 bit, from the dtype that training loaded; the rest float32."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    from gemma_dist.model.experts import loading_experts

    modules = set(quantization["modules"])
    stacks = set(quantization.get("parameters", ()))
    with loading_experts("gpu" if stacks else None):
        model = model_class(base).from_pretrained(
            base,
            dtype=quantization.get("weights_dtype", "auto"),
            device_map="cpu",
            trust_remote_code=False,
            quantization_config=four_bit_config(
                {**quantization, "bnb_4bit_compute_dtype": "float32"},
                skip_modules=linears_left_whole(base, quantization),
            ),
        )
    odd = modules ^ {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    if odd := odd | stacks ^ set(four_bit_stacks(model)):
        raise CheckpointError(
            f"{len(odd)} modules or stacks of experts, such as {min(odd)}, are 4-bit in only one of gemma_dist.json "
            "and the model as it loads now; merge with the versions of transformers and bitsandbytes that trained it, "
            "or without --verify"
        )
    keep_four_bit_exact(model)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and not isinstance(tensor, Params4bit):
            tensor.data = tensor.data.float()
    return model


@torch.no_grad()
def _logits(model: torch.nn.Module, prompts: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Logits of all positions of all prompts, (positions, vocabulary), float32."""
    return torch.cat([model(**prompt).logits[0].float() for prompt in prompts])


def _kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    """KL divergence of `other` from `reference`, in nats, mean over positions."""
    log_p, log_q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def _stored_in_float32(merged: Path, quantization: Quantization | None) -> bool:
    """Whether no weight of the merged model was rounded below float32 on its way."""
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    loaded = (quantization or {}).get("weights_dtype", "float32")
    return config.get("dtype", config.get("torch_dtype")) == "float32" and loaded == "float32"
