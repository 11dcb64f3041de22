"""Models at ZeRO-3: load them without any rank ever holding one whole, and let them generate.

transformers lets rank 0 read the checkpoint, gathers every weight whole on every rank, and broadcasts it: slow, and for
E4B, whose per-layer embeddings are a third of the model in one weight, more memory than the model takes. But DeepSpeed
partitions a weight into as many equal runs of its elements as there are ranks, and safetensors files are mapped: so
each rank copies its partition from the file, and nothing is sent. What is quantized as it is read has to be whole for
that moment: each rank then reads and quantizes one weight after the other, and keeps its part of each.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.tensor import DTensor

from gemma_dist import world
from gemma_dist.errors import CheckpointError


@contextlib.contextmanager
def loading_partitions() -> Iterator[None]:
    """Within, `from_pretrained` at ZeRO-3 lets each rank read its own partition of each weight, where it can
    (`_can_read_partitions`); otherwise leaves `from_pretrained` unchanged.

    Replaces two private functions, as read in transformers 5.23 and DeepSpeed 0.19.8, to which pyproject.toml holds
    both: `PreTrainedModel._load_pretrained_model`, which has rank 0 read and broadcast, and `Init._zero_init_param`,
    which broadcasts each weight before it is filled; for a quantized model also those that `_partition_as_set` names.
    To be compared with theirs at each new version of the two, and to go once transformers itself fills `ds_tensor` from
    mapped files; `tests/test_zero3.py` says whether it holds.
    """
    from transformers import PreTrainedModel
    from transformers.integrations import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        yield
        return
    from deepspeed.runtime.zero import Init

    load_whole = PreTrainedModel._load_pretrained_model
    broadcast_and_partition = Init._zero_init_param

    def load_partitions(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *rest: Any) -> Any:
        """In the place of `_load_pretrained_model`: what was found, and no tensors left for later."""
        if load_config.is_quantized:
            with _partition_as_set():
                return load_whole(model, state_dict, checkpoint_files, load_config, *rest)
        if not _can_read_partitions(model, checkpoint_files, load_config):
            return load_whole(model, state_dict, checkpoint_files, load_config, *rest)
        return _read_partitions(model, checkpoint_files, load_config), None

    PreTrainedModel._load_pretrained_model = staticmethod(load_partitions)
    Init._zero_init_param = _partition_empty
    try:
        yield
    finally:
        PreTrainedModel._load_pretrained_model = staticmethod(load_whole)
        Init._zero_init_param = broadcast_and_partition


def _partition_empty(self: Any, parameter: Any) -> None:
    """As DeepSpeed does while a model is built, without broadcasting: what is not filled yet, or all ranks have."""
    self._convert_to_deepspeed_param(parameter)
    parameter.partition()


@contextlib.contextmanager
def _partition_as_set() -> Iterator[None]:
    """Within, transformers hands each weight, quantized where it is to be, to `set_param_for_module`, and of it this
    rank's part remains. So no rank holds more than its parts and the one weight at work.

    Left to themselves they would hold the whole 4-bit model on each GPU until DeepSpeed partitions it, and before that
    once more as room that `caching_allocator_warmup` takes beforehand.
    """
    from deepspeed.runtime.zero import Init
    from transformers import core_model_loading, modeling_utils
    from transformers.integrations import deepspeed_config

    partitioner = Init(config_dict_or_path=deepspeed_config())
    set_whole = core_model_loading.set_param_for_module

    def set_part(model: Any, name: str, *arguments: Any) -> None:
        """In the place of `set_param_for_module`."""
        set_whole(model, name, *arguments)
        parameter = model.get_parameter_or_buffer(name)
        if not isinstance(parameter, torch.nn.Parameter) or not parameter.numel() or parameter.is_meta:
            return
        if partitioner.dtype == torch.bfloat16 and parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(torch.bfloat16)  # as its engine would
        partitioner._zero_init_param(parameter)  # `_partition_empty`: nothing is sent

    with (
        patch.object(core_model_loading, "set_param_for_module", set_part),
        patch.object(modeling_utils, "caching_allocator_warmup", lambda *_: None),
    ):
        yield


def _can_read_partitions(model: Any, files: list[str] | None, load_config: Any) -> bool:
    """Whether all parameters are partitioned in the plain way, and the files hold all weights as the model has them.

    Not so: NVMe offload; copies within a node (hpZ) or quantized communication (ZeRO++); a checkpoint of another
    layout, whose weights transformers joins or splits.
    """
    from transformers.core_model_loading import WeightRenaming

    if files is None or not all(str(path).endswith(".safetensors") for path in files):
        return False
    if not all(isinstance(entry, WeightRenaming) for entry in load_config.weight_mapping or []):
        return False
    return all(_is_plain_partition(parameter) for parameter in model.parameters())


def _is_plain_partition(parameter: Any) -> bool:
    """Whether this rank holds its part of a parameter in memory, as it is, and no other rank holds a copy."""
    partition = getattr(parameter, "ds_tensor", None)
    if partition is None or partition.final_location is not None:
        return False
    return not hasattr(partition, "ds_quant_scale") and parameter.ds_secondary_tensor is None


def _read_partitions(model: Any, files: list[str], load_config: Any) -> Any:
    """Fill this rank's partitions, and all buffers, from `files`.

    Returns:
        transformers' `LoadStateDictInfo`: which names were missing, unexpected or of another shape.
    """
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
                tensor = tensors[name]
                stored = file.get_tensor(key)  # mapped: read where it is copied from
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
    """Copy `stored` into a buffer, or this rank's run of its elements into a partitioned parameter."""
    if not hasattr(tensor, "ds_tensor"):
        tensor.copy_(stored)
        return
    partition = tensor.ds_tensor
    start = tensor.ds_zero_partition_rank * partition.ds_numel
    run = stored.flatten()[start : start + partition.ds_numel]
    partition[: run.numel()].copy_(run)  # the last partition may be longer than what is left for it


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
def partitioning(settings: dict[str, Any] | None) -> Iterator[None]:
    """Within, `from_pretrained` partitions the model over the ranks as `settings` say; None changes nothing."""
    if settings is None:
        yield
        return
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    zero3_switch = HfDeepSpeedConfig(settings)  # transformers loads at ZeRO-3 as long as this object lives
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del zero3_switch


def partition_model(model: Any, settings: dict[str, Any]) -> None:
    """Make a loaded model gather each layer's weights while it runs, and partition what is still whole: an adapter."""
    import deepspeed

    # The module that `generate` calls: DeepSpeed counts the passes by it.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    # Looked up outside of its own layer, where per-layer embeddings stand in for images.
    deepspeed.zero.register_external_parameter(inner.model, inner.model.language_model.embed_tokens.weight)
    deepspeed.initialize(model=inner, config=settings)


@contextlib.contextmanager
def gathered(weight: Any) -> Iterator[None]:
    """Within, a weight that is read outside of its own module is whole, where it is partitioned at ZeRO-3. Every rank
    calls it. TRL's way (`maybe_gather_lm_head_ctx`) asks transformers, which knows of ZeRO-3 while it trains alone."""
    status = getattr(weight, "ds_status", None)
    if status is None or status.name == "AVAILABLE":
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight]):
        yield


def is_partitioned(model: torch.nn.Module) -> bool:
    """Whether `model` is partitioned over the ranks (ZeRO-3, FSDP2): each of its passes is then one of all ranks."""
    return any(hasattr(parameter, "ds_id") or isinstance(parameter, DTensor) for parameter in model.parameters())
