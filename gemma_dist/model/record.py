"""`gemma_dist.json`, which stands beside every adapter: the base that it was trained on and how training held it.

After QLoRA it names the layers of the base that were held in 4 bits, and how. Evaluation loads the base again just so,
and merging adds the adapter to just that.
"""

import json
from pathlib import Path
from typing import Any

import torch

from gemma_dist.config import RunConfig
from gemma_dist.logs import write_json

ADAPTER_RECORD = "gemma_dist.json"


def write_record(folder: Path, config: RunConfig, model: Any, **more: Any) -> None:
    """Write `gemma_dist.json` to `folder`: the base, how training held it, and what else is worth keeping."""
    quantization = None
    if config.quantization is not None:
        # 4-bit codes depend on the number format that the weights were loaded in.
        quantization = config.quantization.model_dump() | {"weights_dtype": config.model.dtype}
        quantization["modules"] = four_bit_modules(model)
    record = {"base_model": config.model.model_name_or_path, "quantization": quantization}
    write_json(folder / ADAPTER_RECORD, record | more)


def read_record(adapter: Path) -> dict[str, Any]:
    """What `write_record` wrote beside an adapter; nothing for an adapter from elsewhere."""
    path = adapter / ADAPTER_RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def four_bit_modules(model: Any) -> list[str]:
    """Names (as in the checkpoint) of the linear layers that bitsandbytes holds in 4 bits."""
    from bitsandbytes.nn import Linear4bit

    names = (name for name, module in model.named_modules() if isinstance(module, Linear4bit))
    return sorted(name.removeprefix("base_model.model.").removesuffix(".base_layer") for name in names)


def four_bit_config(settings: dict[str, Any]) -> Any:
    from transformers import BitsAndBytesConfig

    settings = {key: value for key, value in settings.items() if key not in ("modules", "weights_dtype")}
    settings["bnb_4bit_compute_dtype"] = getattr(torch, settings["bnb_4bit_compute_dtype"])
    return BitsAndBytesConfig(**settings)
