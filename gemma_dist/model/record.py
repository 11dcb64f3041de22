"""`gemma_dist.json`, the record beside every adapter and model that this package writes: the base, and how it was held.

After QLoRA it names the layers of the base that were held in 4 bits, and how. Evaluation loads the base again just so,
and merging adds the adapter to just that. It is written and read here alone.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict, cast

import torch

from gemma_dist import __version__
from gemma_dist.config import EXPERT_WEIGHTS, QuantizationConfig, RunConfig
from gemma_dist.logs import write_json
from gemma_dist.model.adapter_config import Kind, is_text, list_of, odd_value, read_adapter_config
from gemma_dist.model.card import write_card
from gemma_dist.model.fingerprint import fingerprint_base
from gemma_dist.model.folder import read_json_object

ADAPTER_RECORD = "gemma_dist.json"

# The settings of train that a model card names, in its order.
RECIPE = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim"),
    *("num_train_epochs", "max_steps", "global_batch_size", "packing", "seed"),
)

_DTYPE: Kind = (lambda value: value in ("float32", "bfloat16"), "float32 or bfloat16")
_NAMES: Kind = (list_of(is_text), "a list of names")
NEEDED = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "modules")  # of `Quantization`
QUANTIZATION: dict[str, Kind] = {
    "load_in_4bit": (lambda value: value is True, "true"),
    "bnb_4bit_quant_type": (lambda value: value in ("nf4", "fp4"), "nf4 or fp4"),
    "bnb_4bit_use_double_quant": (lambda value: isinstance(value, bool), "true or false"),
    **dict.fromkeys(("bnb_4bit_compute_dtype", "weights_dtype"), _DTYPE),
    **dict.fromkeys(("modules", "parameters"), _NAMES),
}
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")


class Quantization(TypedDict, total=False):
    """How bitsandbytes held the frozen layers of a base."""

    load_in_4bit: bool
    bnb_4bit_quant_type: str  # nf4 or fp4
    bnb_4bit_use_double_quant: bool
    bnb_4bit_compute_dtype: str
    weights_dtype: str  # what the weights were loaded in, which decides their codes; absent: the dtype of their file
    modules: list[str]  # paths in the checkpoint of exactly the layers in 4 bits
    parameters: list[str]  # and of the experts' stacks; absent: they stayed whole


class AdapterRecord(TypedDict, total=False):
    """What is read again of the record that training writes; it holds all else that a checkpoint is bound to, too."""

    base_model: str
    quantization: Quantization | None  # None: the base as it is
    base_weights_hash: str


def write_record(folder: Path, config: RunConfig, model: Any, **more: Any) -> None:
    """Write the record of a trained adapter or model.

    Args:
        model: as it was trained; says which layers are in 4 bits.
        more: what else the checkpoint is bound to.
    """
    quantization = None
    if config.quantization is not None:
        quantization = quantization_of(config.quantization)
        quantization["weights_dtype"] = config.model.dtype
        quantization["modules"] = four_bit_modules(model)
        quantization["parameters"] = four_bit_stacks(model)
    record = {"base_model": config.model.model_name_or_path, "quantization": quantization, **more}
    record["recipe"] = config.train.model_dump(mode="json", include=set(RECIPE)) | {"dtype": config.model.dtype}
    record["versions"] = _versions()
    write_card(folder, record)
    write_json(folder / ADAPTER_RECORD, record)


def write_merge_record(
    folder: Path,
    *,
    base: Path | str,
    adapters: Mapping[str, float],
    base_weights: str,
    quantization: Quantization | None,
    saved_in_4bit: bool,
    verification: dict[str, Any] | None,
) -> None:
    """Write the record of a merged model.

    Args:
        adapters: their folders, with the weights of their sums.
        quantization: what the base went through before the sum; None: nothing.
        saved_in_4bit: whether the base is stored so, with the adapter beside it, and nothing was summed.
        verification: what comparing the logits found; None: they were not compared.
    """
    record = {
        "base_model": str(base),
        "adapters": dict(adapters),
        "base_weights": base_weights,
        "quantization": quantization,
        "saved_in_4bit": saved_in_4bit,
        "verification": verification,
        "training": _training_of(Path(next(iter(adapters)))) if len(adapters) == 1 else {},
        "versions": _versions(),
    }
    write_card(folder, record)
    write_json(folder / ADAPTER_RECORD, record)


def write_extract_record(
    folder: Path,
    *,
    base: Path | str,
    base_folder: Path,
    tuned: Path | str,
    errors: Mapping[str, float],
    left_out: Sequence[str],
) -> None:
    """Write the record of an adapter that was made of a base and a tuned model.

    Args:
        errors: what it lacks of their difference, as a part of it, by kind of module and in total.
        left_out: tensors that differ and are not in it.
    """
    record = {
        "base_model": str(base),
        "quantization": None,
        "base_weights_hash": fingerprint_base(str(base_folder))["base_weights_hash"],
        "extracted": {"tuned": str(tuned), "relative_error": dict(errors), "left_out": list(left_out)},
        "versions": _versions(),
    }
    write_card(folder, record)
    write_json(folder / ADAPTER_RECORD, record)


def _training_of(adapter: Path) -> dict[str, Any]:
    """What is known of how an adapter was trained: what its record says, or its own settings."""
    known = {key: value for key, value in (read_record(adapter) or {}).items() if key != "quantization"}
    if "lora" not in known:
        settings = read_adapter_config(adapter)
        known["lora"] = {key: settings.get(key) for key in ("r", "lora_alpha", "use_rslora", "use_dora")}
    return known


def _versions() -> dict[str, str]:
    """Of the packages that made the weights."""
    return {"gemma_dist": __version__, **{package: version(package) for package in PACKAGES}}


def read_record(adapter: Path) -> AdapterRecord | None:
    """The record beside an adapter; None for an adapter from elsewhere, which has none.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = adapter / ADAPTER_RECORD
    if not path.exists():
        return None
    return cast(AdapterRecord, read_json_object(path, "the record of the training is broken"))


def why_not_in_4_bits(quantization: Any) -> str:
    """What keeps a record that was read from saying how a base was held in 4 bits, in words; empty where it does."""
    if not isinstance(quantization, dict):
        return "quantization is no object"
    if absent := [key for key in NEEDED if not quantization.get(key)]:
        return f"quantization has no {' and no '.join(absent)}"
    found = odd_value(quantization, QUANTIZATION)
    return f"quantization.{found}" if found else ""


def four_bit_modules(model: Any) -> list[str]:
    """Paths (as in the checkpoint) of the linear layers that bitsandbytes holds in 4 bits."""
    from bitsandbytes.nn import Linear4bit

    paths = [path for path, module in model.named_modules() if isinstance(module, Linear4bit)]
    return sorted(path.removeprefix("base_model.model.").removesuffix(".base_layer") for path in paths)


def four_bit_stacks(model: Any) -> list[str]:
    """Paths (as in the checkpoint) of the experts' stacks that are held in 4 bits."""
    from gemma_dist.model.experts import FourBitExperts

    paths = [path for path, module in model.named_modules() if isinstance(module, FourBitExperts)]
    modules = [path.removeprefix("base_model.model.").replace(".base_layer", "") for path in paths]
    return sorted(f"{module}.{name}" for module in modules for name in EXPERT_WEIGHTS)


def quantization_of(settings: QuantizationConfig) -> Quantization:
    """The settings of a recipe as the record has them."""
    return cast(Quantization, settings.model_dump())


def four_bit_config(quantization: Quantization, *, skip_modules: list[str] | None = None) -> Any:
    """The `BitsAndBytesConfig` that loads a base so.

    Args:
        skip_modules: paths of the linear layers that stay whole; None: those that transformers leaves whole.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=quantization["load_in_4bit"],
        bnb_4bit_quant_type=quantization["bnb_4bit_quant_type"],
        bnb_4bit_use_double_quant=quantization.get("bnb_4bit_use_double_quant", False),
        bnb_4bit_compute_dtype=getattr(torch, quantization["bnb_4bit_compute_dtype"]),
        llm_int8_skip_modules=skip_modules,
    )
