"""Load a Gemma 4 for training or evaluation, and settle what of it trains.

transformers, bitsandbytes and PEFT do the loading. Added here: what is no whole Gemma 4 is refused before anything is
computed with it, what could get no gradient is frozen, and 4-bit layers compute the same on every CPU.
"""

import contextlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from safetensors import SafetensorError

from gemma_dist import world
from gemma_dist.config import LoraConfig, ModelConfig, QuantizationConfig
from gemma_dist.errors import CheckpointError, ConfigError, shortened
from gemma_dist.model import fsdp
from gemma_dist.model.adapter_config import require_adapter
from gemma_dist.model.folder import ADAPTER_CONFIG, refuse_adapter, refuse_custom_code, require_generation_config
from gemma_dist.model.images import use_known_places
from gemma_dist.model.per_layer import TABLE, PerLayerTable, open_table, table_left_out, take_rows_of_batch
from gemma_dist.model.record import ADAPTER_RECORD, four_bit_config, quantization_of, read_record, why_not_in_4_bits
from gemma_dist.model.rows import use_right_padding
from gemma_dist.model.towers import Tower, config_without, linear_layers, modules_of, whole_modules
from gemma_dist.model.vision import use_image_rule
from gemma_dist.model.zero3 import loading_partitions, partition_model, partitioning, settings_for_evaluation


def use_cpu() -> bool:
    """Whether the run computes on the CPU: where there is no GPU, or CUDA_VISIBLE_DEVICES= hides it."""
    return not torch.cuda.is_available()


def device() -> torch.device:
    """Where this rank computes."""
    return torch.device("cpu") if use_cpu() else torch.device("cuda", world.local_rank())


def load_model(
    settings: ModelConfig,
    quantization: QuantizationConfig | None,
    *,
    packing: bool,
    sequence_parallel_size: int = 1,
    table: PerLayerTable | None = None,
    without: Collection[Tower] = (),
) -> Any:
    """The model of a recipe, in its dtype, or in 4 bits with the rest in that dtype.

    Args:
        packing: whether its text layers are to attend within the documents of packs, and so take nothing else.
        sequence_parallel_size: ranks that share a pack, and so have to be connected.
        table: of its per-layer embeddings, if they stay on the host.
        without: towers that are not loaded.

    Raises:
        CheckpointError: there is no Gemma 4 at that place.
        ConfigError: its experts are to be in host memory, and it has none.
    """
    arguments: dict[str, Any] = {
        "dtype": getattr(torch, settings.dtype),
        "attn_implementation": attention_of_parts(settings),
        "experts": place_of_experts(read_config(settings.model_name_or_path), settings, quantization),
    }
    if quantization is not None:
        from transformers.integrations import is_deepspeed_zero3_enabled

        whole = whole_modules(read_config(settings.model_name_or_path))
        arguments["quantization_config"] = four_bit_config(quantization_of(quantization), skip_modules=whole)
        if not is_deepspeed_zero3_enabled():  # which places the weights itself
            arguments["device_map"] = {"": device()}
    model = _from_pretrained(settings.model_name_or_path, table, without, **arguments)
    keep_four_bit_exact(model)
    freeze_audio(model)
    prepare_for_micro_batches(
        model,
        packing=packing,
        attn_implementation=settings.attn_implementation,
        sequence_parallel_size=sequence_parallel_size,
    )
    return model


def prepare_for_micro_batches(
    model: Any, *, packing: bool, attn_implementation: str = "sdpa", sequence_parallel_size: int = 1
) -> None:
    """Let a Gemma 4 take what `train/feed.py` says of packs, shares of packs or rows, and of their images."""
    if sequence_parallel_size > 1:
        from gemma_dist.model.sequence import use_sequence_attention

        use_sequence_attention(model, world.sequence_group(sequence_parallel_size))
    elif packing:
        from gemma_dist.model.attention import use_packed_attention

        use_packed_attention(model, attn_implementation)
    else:
        use_right_padding(model)
        use_image_rule(model)
    use_known_places(model)


def load_for_evaluation(model: str, adapter: Path | None, *, ple_on_host: bool = True) -> Any:
    """A model ready to generate, with an adapter on the base as training saw it (in 4 bits after QLoRA).

    Its audio tower is left out. On ranks launched at ZeRO-3 or FSDP2 it is partitioned over them; at ZeRO-3 the adapter
    has the dtype of the base.

    Raises:
        CheckpointError: the model or the adapter is missing or does not fit.
    """
    arguments: dict[str, Any] = {"dtype": "auto"}
    config = read_config(model)
    dtype = config.dtype
    if adapter is not None:
        require_adapter(adapter)
        record = read_record(adapter)
        if record is not None and (quantization := record.get("quantization")):
            if why := why_not_in_4_bits(quantization):
                raise CheckpointError(
                    f"{adapter / ADAPTER_RECORD}: {why}, as training writes it, so how the base was held is not known; "
                    "take the file from the training's result once more"
                )
            whole = sorted(linear_layers(config) - set(quantization["modules"]))
            arguments["quantization_config"] = four_bit_config(quantization, skip_modules=whole)
            if "weights_dtype" in quantization:
                arguments["dtype"] = dtype = getattr(torch, quantization["weights_dtype"])
            arguments["experts"] = "gpu" if quantization.get("parameters") else None
    zero3 = settings_for_evaluation(dtype)
    if zero3 is None and not (fsdp.is_launched() and "quantization_config" not in arguments):
        arguments["device_map"] = {"": device()}  # else each rank maps the files, until it gets its part
    table = open_table(model, config, dtype) if ple_on_host else None
    with partitioning(zero3):
        loaded = _from_pretrained(model, table, ["audio"], **arguments)
    keep_four_bit_exact(loaded)
    use_image_rule(loaded)
    if adapter is not None:
        try:
            loaded = with_adapter(loaded, adapter, autocast_adapter_dtype=zero3 is None)
        except CheckpointError:  # of its settings
            raise
        except (SafetensorError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise CheckpointError(
                f"adapter {adapter} does not fit {model!r}: {shortened(str(error))}; give the model that it was "
                f"trained on, and its own {ADAPTER_CONFIG}"
            ) from error
    if zero3 is not None:
        if adapter is not None:
            _adapter_as_base(loaded)
        _gather_with_experts(loaded)
        partition_model(loaded, zero3)
    elif fsdp.is_launched():
        fsdp.shard_for_evaluation(loaded, device())
    return loaded.eval()


def with_adapter(model: Any, adapter: Path, **arguments: Any) -> Any:
    """`model` with an adapter from a folder, as PEFT loads it."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(adapter), config=_settings_of(adapter), **arguments)


def load_another(adapted: Any, adapter: Path, name: str) -> None:
    """Give a model with an adapter one more, under a name of its own."""
    adapted.add_adapter(name, _settings_of(adapter))
    adapted.load_adapter(str(adapter), adapter_name=name)


def _settings_of(adapter: Path) -> Any:
    """PEFT's settings of an adapter. Raises CheckpointError where PEFT takes them for none."""
    from peft import PeftConfig

    from gemma_dist.model.experts import adapt_four_bit_experts

    try:
        return adapt_four_bit_experts(PeftConfig.from_pretrained(str(adapter)))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{adapter / ADAPTER_CONFIG} holds no settings that PEFT takes ({shortened(str(error))}); take the "
            "file from the training's result once more"
        ) from error


def place_of_experts(
    config: Any, settings: ModelConfig, quantization: QuantizationConfig | None
) -> Literal["gpu", "host"] | None:
    """Where a model of `config` (`read_config`) has experts in 4 bits; None: it has none, or they stay whole.

    Raises:
        ConfigError: they are to be in host memory, and it has none.
    """
    has_experts = getattr(config.get_text_config(), "enable_moe_block", False)
    if settings.experts == "host" and not has_experts:
        raise ConfigError(
            f"model.experts: host, but {settings.model_name_or_path!r} has no experts, as 26B-A4B alone does: remove it"
        )
    in_4_bits = has_experts and quantization is not None and quantization.quantize_moe_experts
    return settings.experts if in_4_bits else None


def keep_four_bit_exact(model: torch.nn.Module) -> None:
    """Let 4-bit layers compute on every CPU what they compute on GPUs.

    Where a CPU multiplies bfloat16 by itself, bitsandbytes repacks their weights on the first pass outside of training:
    the scales lose 16 bits for good, and a layer whose inputs are no multiple of the block size fails.
    """
    from bitsandbytes.nn import Linear4bit

    from gemma_dist.model.four_bit_cpu import dequantize_as_gpus_do

    dequantize_as_gpus_do()
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

    from gemma_dist.model.experts import naming_stacks

    with naming_stacks(model):
        names = [name for name, _ in model.named_parameters()]
        for wanted in settings.target_parameters:
            if not any(name.endswith(f".{wanted}") for name in names):
                raise ConfigError(
                    f"lora.target_parameters: {wanted!r} is the end of no weight of this model; 26B-A4B has "
                    "experts.gate_up_proj and experts.down_proj, the other models have no experts: remove it"
                )
        try:
            # At ZeRO-3 DeepSpeed gathers parameters of one dtype at a time: the adapter keeps that of the base.
            adapted = get_peft_model(model, _peft_config(settings), autocast_adapter_dtype=not zero3)
        except ValueError as error:
            raise ConfigError(f"lora.target_modules = {settings.target_modules!r}: {error}") from error
    if zero3:
        _adapter_as_base(adapted)
        _gather_with_experts(adapted)
    return adapted


def _adapter_as_base(model: Any) -> None:
    """At ZeRO-3, give the adapter the dtype of the base's weights, which beside 4-bit layers PEFT cannot see: DeepSpeed
    gathers parameters of one dtype at a time, and trains a float32 copy."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    dtype = model.get_input_embeddings().weight.dtype  # never in 4 bits
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for name in module.adapter_layer_names:
                getattr(module, name).to(dtype)


def attention_of_parts(settings: ModelConfig) -> dict[str, str]:
    """Attention code of each part. transformers has eager attention alone for the audio tower of E2B and E4B."""
    chosen = settings.attn_implementation
    if chosen == "flex_attention":  # of packs alone: the text layers get it later
        chosen = "sdpa"
    return {"text_config": chosen, "vision_config": chosen, "audio_config": "eager"}


def freeze_audio(model: torch.nn.Module) -> None:
    """No trajectory has sound: the audio tower of E2B and E4B gets no gradient, for which DDP would wait."""
    for name, parameter in model.named_parameters():
        if "audio" in name:
            parameter.requires_grad_(False)


def _gather_with_experts(model: torch.nn.Module) -> None:
    """At ZeRO-3, gather the experts' adapter as they are: it is added to them without its own layers being called."""
    from deepspeed.utils import set_z3_leaf_modules
    from peft.tuners.lora.layer import ParamWrapper

    if any(isinstance(module, ParamWrapper) for module in model.modules()):
        set_z3_leaf_modules(model, [ParamWrapper])


def _from_pretrained(
    name: str,
    table: PerLayerTable | None,
    without: Collection[Tower],
    *,
    experts: Literal["gpu", "host"] | None = None,
    **arguments: Any,
) -> Any:
    """A Gemma 4 with all its weights but those of the `table` and of the towers `without`, by transformers' own
    classes; at ZeRO-3 each rank reads its part alone.

    Args:
        experts: where 4-bit experts are to be; None: they stay whole.

    Raises:
        CheckpointError: there is none, or weights of it are missing or of another shape, which transformers would
            leave random.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText

    from gemma_dist.model.experts import loading_experts

    config = config_without(read_config(name), without)
    require_generation_config(name)
    model_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    left_out = [*modules_of(without), *([TABLE] if table is not None else [])]
    try:
        with (
            loading_partitions(),
            loading_experts(experts),
            table_left_out(table) if table is not None else contextlib.nullcontext(),
            patch.object(model_class, "_keys_to_ignore_on_load_unexpected", left_out),
        ):
            model, report = AutoModelForImageTextToText.from_pretrained(
                name,
                config=config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # said below: transformers' own error names none of them
                trust_remote_code=False,
                use_safetensors=True,  # of the hub, too
                **arguments,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(_no_model(name, error)) from error
    if report["mismatched_keys"]:
        weight, stored, described = min(report["mismatched_keys"])
        raise CheckpointError(
            f"{name!r}: {len(report['mismatched_keys'])} weights have other shapes than config.json describes, such as "
            f"{weight} with {tuple(stored)} instead of {tuple(described)}; get a complete copy of the model"
        )
    if report["missing_keys"]:
        raise CheckpointError(
            f"{name!r} lacks {len(report['missing_keys'])} weights, such as {sorted(report['missing_keys'])[0]!r}, "
            "which would stay random; get a complete copy of the model"
        )
    if table is not None:
        take_rows_of_batch(model)
    return model


def read_config(name: str) -> Any:
    """The config of a Gemma 4. Raises CheckpointError where there is none, or one that would run code of its own."""
    from transformers import AutoConfig

    refuse_custom_code(name)
    refuse_adapter(Path(name))
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(_no_model(name, error)) from error
    _require_gemma4(name, config.model_type)
    return config


def _no_model(name: str, error: Exception) -> str:
    """Why nothing could be loaded. What has the form of a hub name, OWNER/MODEL, may be a mistyped folder, too."""
    if Path(name).exists() or name.count("/") != 1:
        return f"{name!r}: no Gemma 4 can be loaded from there: {error}"
    return f"{name!r}: neither a folder nor a model that the hub gives: {error}"


def _require_gemma4(name: str, model_type: str) -> None:
    """Raises CheckpointError for any other `model_type` of a config.json."""
    if not model_type.startswith("gemma4"):
        raise CheckpointError(f"{name!r} is a {model_type} model; gemma_dist knows Gemma 4 alone")


def _peft_config(settings: LoraConfig) -> Any:
    """PEFT's settings: a recipe's `lora` has its names, and says nothing of the rest."""
    from peft import LoraConfig as PeftLoraConfig

    from gemma_dist.model.experts import adapt_four_bit_experts

    return adapt_four_bit_experts(PeftLoraConfig(task_type="CAUSAL_LM", **settings.model_dump()))
