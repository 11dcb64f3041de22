"""Load a Gemma 4 for training or evaluation, and settle what of it trains.

Beside every adapter stands `gemma_dist.json`: which base it was trained on and, after QLoRA, which layers of that base
were held in 4 bits and how. Evaluation loads the base again just so, and merging adds the adapter to just that.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from gemma_dist import world
from gemma_dist.config import LoraConfig, ModelConfig, QuantizationConfig, RunConfig
from gemma_dist.errors import CheckpointError, ConfigError
from gemma_dist.model.folder import refuse_custom_code
from gemma_dist.model.zero3 import reading_parts, settings_for_evaluation, spread, spreading

ADAPTER_RECORD = "gemma_dist.json"
ADAPTER_CONFIG = "adapter_config.json"

# What of the model a parameter belongs to, by the first piece of its name that fits.
PARTS = {
    ".experts.": "experts",
    "model.vision_tower.": "vision tower",
    "model.audio_tower.": "audio tower",
    "model.embed_vision.": "projectors",
    "model.embed_audio.": "projectors",
    "model.language_model.embed_tokens": "embeddings",
    "lm_head.": "embeddings",
    "model.language_model.": "language model",
}


def use_cpu() -> bool:
    """Whether the run computes on the CPU: where there is no GPU, or CUDA_VISIBLE_DEVICES= hides it."""
    return not torch.cuda.is_available()


def device() -> torch.device:
    """Where this rank computes."""
    return torch.device("cpu") if use_cpu() else torch.device("cuda", world.local_rank())


def load_model(settings: ModelConfig, quantization: QuantizationConfig | None, *, packing: bool) -> Any:
    """The model of a recipe, in its number format, or in 4 bits with the rest in that format.

    Args:
        packing: whether its text layers are to attend within the documents of packs, and so take nothing else.

    Raises:
        CheckpointError: there is no Gemma 4 at that place.
    """
    arguments: dict[str, Any] = {
        "dtype": getattr(torch, settings.dtype),
        "attn_implementation": _attention(settings),
    }
    if quantization is not None:
        from transformers.integrations import is_deepspeed_zero3_enabled

        arguments["quantization_config"] = _bnb_config(quantization.model_dump())
        if not is_deepspeed_zero3_enabled():  # which places the weights itself
            arguments["device_map"] = {"": device()}
    model = _from_pretrained(settings.model_name_or_path, **arguments)
    keep_four_bit_exact(model)
    _freeze_audio(model)
    if packing:
        from gemma_dist.model.attention import attend_within_documents

        attend_within_documents(model)
    return model


def load_for_evaluation(model: str, adapter: Path | None) -> Any:
    """A model ready to generate, with an adapter on the base as training saw it (in 4 bits after QLoRA).

    On ranks launched at ZeRO-3 it lies spread over them, and the adapter has the number format of the base.

    Raises:
        CheckpointError: the model or the adapter is missing or does not fit.
    """
    arguments: dict[str, Any] = {"dtype": "auto"}
    dtype = _config(model).dtype
    if adapter is not None:
        _adapter_config(adapter)
        if quantization := read_record(adapter).get("quantization"):
            arguments["quantization_config"] = _bnb_config(quantization)
            arguments["dtype"] = dtype = getattr(torch, quantization["weights_dtype"])
    zero3 = settings_for_evaluation(dtype)
    if zero3 is None:
        arguments["device_map"] = {"": device()}
    with spreading(zero3):
        loaded = _from_pretrained(model, **arguments)
    keep_four_bit_exact(loaded)
    if adapter is not None:
        from peft import PeftModel

        try:
            loaded = PeftModel.from_pretrained(loaded, str(adapter), autocast_adapter_dtype=zero3 is None)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"adapter {adapter} does not fit {model!r}: {error}") from error
    if zero3 is not None:
        _gather_with_experts(loaded)
        spread(loaded, zero3)
    return loaded.eval()


def keep_four_bit_exact(model: Any) -> None:
    """Let 4-bit layers compute on every CPU what they compute on others.

    Where a CPU multiplies bfloat16 by itself, bitsandbytes repacks their weights on the first pass outside of training:
    the scales lose 16 bits for good, and a layer whose inputs are no multiple of the block size fails.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def add_adapter(model: Any, settings: LoraConfig, *, zero3: bool) -> Any:
    """`model` with a fresh LoRA adapter, all else frozen.

    Raises:
        ConfigError: lora.target_modules matches no layer, or one that cannot be adapted; a name of
            lora.target_parameters matches no weight.
    """
    from peft import get_peft_model

    names = [name for name, _ in model.named_parameters()]
    for wanted in settings.target_parameters:
        if not any(name.endswith(f".{wanted}") for name in names):
            raise ConfigError(
                f"lora.target_parameters: {wanted!r} is the end of no weight of this model; 26B-A4B has "
                "experts.gate_up_proj and experts.down_proj, the other models have no experts: remove it"
            )
    try:
        # At ZeRO-3 DeepSpeed gathers parameters of one number format at a time: the adapter keeps that of the base.
        adapted = get_peft_model(model, _peft_config(settings), autocast_adapter_dtype=not zero3)
    except ValueError as error:
        raise ConfigError(f"lora.target_modules = {settings.target_modules!r}: {error}") from error
    if zero3:
        _gather_with_experts(adapted)
    return adapted


def write_record(folder: Path, config: RunConfig, model: Any, **more: Any) -> None:
    """Write `gemma_dist.json` to `folder`: the base, how training held it, and what else is worth keeping."""
    from gemma_dist.logs import write_json

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


def describe_training(config: RunConfig) -> list[str]:
    """What trains and what the weights take, part by part, from shapes alone: no weight is read, a 31B takes seconds.

    GiB are those of the base as it is loaded, on each rank, or at ZeRO-3 on all ranks together. The adapter,
    gradients, optimiser and activations come on top.

    Raises:
        CheckpointError: there is no Gemma 4 at model.model_name_or_path.
        ConfigError: lora.target_modules fits nothing that can be adapted.
    """
    model = _without_weights(config)
    num_bytes = _loaded_bytes(model, config)
    if config.lora is not None:
        with torch.device("meta"):
            model = add_adapter(model, config.lora, zero3=False)
    total, trained = Counter[str](), Counter[str]()
    weights: dict[str, float] = dict.fromkeys([*PARTS.values(), "other"], 0.0)
    for name, parameter in model.named_parameters():
        part = _part(name.removeprefix("base_model.model."))
        total[part] += parameter.numel()
        trained[part] += parameter.numel() if parameter.requires_grad else 0
        weights[part] += num_bytes.get(parameter, 0)
    lines = [
        f"trains {sum(trained.values()):,} of {sum(total.values()):,} parameters "
        f"({sum(trained.values()) / sum(total.values()):.2%}): tuning {config.tuning}; "
        f"the loaded weights take {sum(weights.values()) / 2**30:.2f} GiB"
    ]
    return lines + [
        f"    {part:<15} {trained[part]:>15,} of {total[part]:>15,} {weights[part] / 2**30:>8.2f} GiB" for part in total
    ]


def _without_weights(config: RunConfig) -> Any:
    """The base of a recipe on the meta device, with the layers that loading would hold in 4 bits as such."""
    from transformers import AutoModelForImageTextToText
    from transformers.quantizers import AutoHfQuantizer

    settings = _config(config.model.model_name_or_path)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            settings, attn_implementation=_attention(config.model), trust_remote_code=False
        )
        if config.quantization is not None:
            wanted = _bnb_config(config.quantization.model_dump())
            AutoHfQuantizer.from_config(wanted, pre_quantized=False).preprocess_model(model, device_map=None)
    _freeze_audio(model)
    return model


def _loaded_bytes(model: Any, config: RunConfig) -> dict[torch.nn.Parameter, float]:
    """Bytes of each parameter of a base once it is loaded: in model.dtype, or in 4 bits with their scales."""
    in_4_bits: set[torch.nn.Parameter] = set()
    scale = 0.0
    if config.quantization is not None:
        from bitsandbytes.nn import Linear4bit

        in_4_bits = {module.weight for module in model.modules() if isinstance(module, Linear4bit)}
        # 64 weights share a scale of 4 bytes; quantised too, it takes 1 byte and a share of 4 bytes for 256 of them.
        scale = (1 + 4 / 256) / 64 if config.quantization.bnb_4bit_use_double_quant else 4 / 64
    item = getattr(torch, config.model.dtype).itemsize
    return {p: p.numel() * (0.5 + scale if p in in_4_bits else item) for p in model.parameters()}


def _attention(settings: ModelConfig) -> dict[str, str]:
    """Attention code of each part. transformers has eager attention alone for the audio tower of E2B and E4B."""
    chosen = settings.attn_implementation
    return {"text_config": chosen, "vision_config": chosen, "audio_config": "eager"}


def _freeze_audio(model: Any) -> None:
    """No trajectory has sound: the audio tower of E2B and E4B gets no gradient, for which DDP would wait."""
    for name, parameter in model.named_parameters():
        if "audio" in name:
            parameter.requires_grad_(False)


def _gather_with_experts(model: Any) -> None:
    """At ZeRO-3, gather the experts' adapter as they are: it is added to them without its own layers being called."""
    from deepspeed.utils import set_z3_leaf_modules
    from peft.tuners.lora.layer import ParamWrapper

    if any(isinstance(module, ParamWrapper) for module in model.modules()):
        set_z3_leaf_modules(model, [ParamWrapper])


def _part(name: str) -> str:
    return next((part for mark, part in PARTS.items() if mark in name), "other")


def _from_pretrained(name: str, **arguments: Any) -> Any:
    from transformers import AutoModelForImageTextToText

    _config(name)
    try:
        with reading_parts():
            model, report = AutoModelForImageTextToText.from_pretrained(
                name, output_loading_info=True, trust_remote_code=False, **arguments
            )
    except (OSError, ValueError) as error:
        raise CheckpointError(_no_model(name, error)) from error
    if report["missing_keys"]:
        raise CheckpointError(
            f"{name!r} lacks {len(report['missing_keys'])} weights, such as {sorted(report['missing_keys'])[0]!r}, "
            "which would stay random; get a complete copy of the model"
        )
    return model


def _config(name: str) -> Any:
    from transformers import AutoConfig

    refuse_custom_code(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(_no_model(name, error)) from error
    _require_gemma4(name, config.model_type)
    return config


def _no_model(name: str, error: Exception) -> str:
    if Path(name).exists() or name.count("/") != 1:
        return f"{name!r}: no Gemma 4 can be loaded from there: {error}"
    return f"{name!r}: neither a folder nor a model that the hub gives: {error}"


def _require_gemma4(name: str, model_type: str) -> None:
    if not model_type.startswith("gemma4"):
        raise CheckpointError(f"{name!r} is a {model_type} model; gemma_dist knows Gemma 4 alone")


def _adapter_config(adapter: Path) -> dict[str, Any]:
    path = adapter / ADAPTER_CONFIG
    if not path.is_file():
        raise CheckpointError(f"{adapter} is no adapter: it holds no {ADAPTER_CONFIG}")
    return json.loads(path.read_text(encoding="utf-8"))


def _peft_config(settings: LoraConfig) -> Any:
    from peft import LoraConfig as PeftLoraConfig

    return PeftLoraConfig(task_type="CAUSAL_LM", **settings.model_dump())


def _bnb_config(settings: dict[str, Any]) -> Any:
    from transformers import BitsAndBytesConfig

    settings = {key: value for key, value in settings.items() if key not in ("modules", "weights_dtype")}
    settings["bnb_4bit_compute_dtype"] = getattr(torch, settings["bnb_4bit_compute_dtype"])
    return BitsAndBytesConfig(**settings)
