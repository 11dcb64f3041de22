"""Models at ZeRO-3: load them without any rank ever holding one whole, and let them generate.

transformers lets rank 0 read the checkpoint, gathers every weight whole on every rank, and sends it around: slow, and
for E4B, whose per-layer embeddings are a third of the model in one weight, more memory than the model takes. But
DeepSpeed cuts a weight into as many equal runs of its elements as there are ranks, and safetensors files are mapped:
so each rank copies its run from the file, and nothing is sent.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from gemma_dist import world
from gemma_dist.errors import CheckpointError


@contextlib.contextmanager
def reading_parts() -> Iterator[None]:
    """Within, `from_pretrained` at ZeRO-3 loads in parts; without ZeRO-3, in 4 bits, or where it must, as ever."""
    from transformers import PreTrainedModel
    from transformers.integrations import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        yield
        return
    from deepspeed.runtime.zero import Init

    load, spread = PreTrainedModel._load_pretrained_model, Init._zero_init_param

    def load_parts(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *rest: Any) -> Any:
        if not _can_read_parts(model, checkpoint_files, load_config):
            return load(model, state_dict, checkpoint_files, load_config, *rest)
        return _read_parts(model, checkpoint_files, load_config), None

    PreTrainedModel._load_pretrained_model, Init._zero_init_param = staticmethod(load_parts), _spread_empty
    try:
        yield
    finally:
        PreTrainedModel._load_pretrained_model, Init._zero_init_param = staticmethod(load), spread


def _spread_empty(self: Any, parameter: Any) -> None:
    """As DeepSpeed does while a model is built, without sending to all ranks what is not yet filled."""
    self._convert_to_deepspeed_param(parameter)
    parameter.partition()


def _can_read_parts(model: Any, files: list[str] | None, load_config: Any) -> bool:
    """Whether all parameters are spread in the plain way, and all weights stand in safetensors files as they are.

    Not so: 4-bit weights, which DeepSpeed spreads later; NVMe offload; copies within a node (hpZ) or quantized
    communication (ZeRO++); a checkpoint of another layout, whose weights transformers joins or cuts.
    """
    from transformers.core_model_loading import WeightRenaming

    return (
        files is not None
        and all(str(path).endswith(".safetensors") for path in files)
        and all(isinstance(entry, WeightRenaming) for entry in load_config.weight_mapping or [])
        and all(
            getattr(parameter, "ds_tensor", None) is not None
            and parameter.ds_tensor.final_location is None
            and not hasattr(parameter.ds_tensor, "ds_quant_scale")
            and parameter.ds_secondary_tensor is None
            for parameter in model.parameters()
        )
    )


def _read_parts(model: Any, files: list[str], load_config: Any) -> Any:
    """Fill the parts of this rank, and all buffers, from `files`; what transformers wants to know about it."""
    from safetensors import safe_open
    from transformers.core_model_loading import rename_source_key
    from transformers.modeling_utils import LoadStateDictInfo

    tensors = model.state_dict(keep_vars=True)
    renamings = load_config.weight_mapping or []
    missing, unexpected, mismatched = set(tensors), set(), set()
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                name, _ = rename_source_key(key, renamings, [], model.base_model_prefix, tensors)
                if name not in tensors:
                    unexpected.add(name)
                    continue
                tensor, stored = tensors[name], file.get_tensor(key)  # mapped: read where it is copied from
                shape = getattr(tensor, "ds_shape", tensor.shape)
                if stored.shape != shape:
                    mismatched.add((name, stored.shape, shape))
                    continue
                _fill(tensor, stored)
                tensor._is_hf_initialized = True
                missing.discard(name)
    # Saving reverses these renamings. Most are for older files and matched nothing here: reversed, they would give the
    # weights names that no server knows.
    model._weight_conversions = [renaming for renaming in renamings if renaming.was_used()]
    return LoadStateDictInfo(
        missing_keys=missing,
        unexpected_keys=unexpected,
        mismatched_keys=mismatched,
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )


@torch.no_grad()
def _fill(tensor: Any, stored: torch.Tensor) -> None:
    """Copy `stored` into a buffer, or this rank's run of its elements into a spread parameter."""
    if not hasattr(tensor, "ds_tensor"):
        tensor.copy_(stored)
        return
    part = tensor.ds_tensor
    start = tensor.ds_zero_partition_rank * part.ds_numel
    run = stored.flatten()[start : start + part.ds_numel]
    part[: run.numel()].copy_(run)  # the last part may be longer than what is left for it


def settings_for_evaluation(dtype: torch.dtype) -> dict[str, Any] | None:
    """DeepSpeed's settings to evaluate a model of `dtype` with, if several ranks were launched at ZeRO-3.

    Raises:
        CheckpointError: DeepSpeed cannot hold that dtype.
    """
    if world.world_size() == 1 or os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return None
    from accelerate import DeepSpeedPlugin

    launched = DeepSpeedPlugin().deepspeed_config["zero_optimization"]
    if launched["stage"] != 3:
        return None
    if dtype not in (torch.float32, torch.bfloat16):
        raise CheckpointError(
            f"the model's config.json says dtype {dtype}; at ZeRO-3 it must say float32 or bfloat16: evaluate with "
            "accelerate_configs/ddp.yaml, or save the model in one of these"
        )
    return {
        "zero_optimization": {name: value for name, value in launched.items() if name != "offload_optimizer"},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "train_micro_batch_size_per_gpu": 1,  # it insists on one
    }


@contextlib.contextmanager
def spreading(settings: dict[str, Any] | None) -> Iterator[None]:
    """Within, `from_pretrained` spreads the model over the ranks as `settings` say; without settings, as ever."""
    if settings is None:
        yield
        return
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    kept_while_loading = HfDeepSpeedConfig(settings)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del kept_while_loading


def spread(model: Any, settings: dict[str, Any]) -> None:
    """Make a loaded model gather each layer's weights while it runs; what is not spread yet, an adapter, is now."""
    import deepspeed

    # The module that `generate` calls: DeepSpeed counts the passes by it.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    # Looked up outside of its own layer, where per-layer embeddings stand in for images.
    deepspeed.zero.register_external_parameter(inner.model, inner.model.language_model.embed_tokens.weight)
    deepspeed.initialize(model=inner, config=settings)


def is_spread(model: Any) -> bool:
    """Whether `model` lies spread over the ranks: each of its passes is then one of all ranks."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
