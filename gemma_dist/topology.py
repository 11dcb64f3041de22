"""How the processes of a run share memory, read from an accelerate config or from what `accelerate launch` left in the
environment, and whether a recipe is compatible with it.

A recipe that would learn something else, or fail after the model is loaded, is refused here, with the nearest launch
that works.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from gemma_dist import fsdp_config
from gemma_dist.batch_plan import BatchPlan, batch_plan
from gemma_dist.config import RunConfig
from gemma_dist.errors import ConfigError, brief, shortened

TESTED_OPTIMIZERS = {"adamw_torch", "adamw_torch_fused"}  # what DeepSpeed takes without zero_allow_untested_optimizer
# What a DeepSpeed config may say: nothing of it changes what is learned, or it is looked at here. Other settings may,
# and no recipe can name them.
# fmt: off
KNOWN = frozenset((
    "activation_checkpointing", "aio", "bf16", "checkpoint", "comms_logger", "csv_monitor", "dump_state",
    "flops_profiler", "fp16", "gradient_accumulation_steps", "gradient_clipping", "memory_breakdown", "optimizer",
    "scheduler", "steps_per_print", "tensorboard", "train_batch_size", "train_micro_batch_size_per_gpu", "wandb",
    "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
))
# fmt: on
# Of zero_optimization: numbers are sent between ranks with fewer bits.
ROUNDING = ("zero_quantized_gradients", "zero_quantized_nontrainable_weights", "zero_quantized_weights")
# What `accelerate launch` sets to "true" in the environment, and accelerate's name for such a launch.
LAUNCHES = {
    "ACCELERATE_USE_DEEPSPEED": "DEEPSPEED",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "MEGATRON_LM",
}


@dataclass(frozen=True)
class Topology:
    """An accelerate config, as far as a recipe has to be compatible with it."""

    name: str  # where it stands, for messages
    num_processes: int = 1
    distributed_type: str = "NO"  # accelerate's names
    mixed_precision: str = "no"
    deepspeed: Mapping[str, Any] | None = None  # DeepSpeed's own settings
    fsdp: Mapping[str, str] | None = None  # accelerate's settings of FSDP: see fsdp_config.py

    @property
    def zero_stage(self) -> int | None:
        """None: every rank holds all of the model, its gradients and its optimizer."""
        return None if self.deepspeed is None else int(self._zero.get("stage", 0))

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the states of the optimizer lie outside of the GPU."""
        return self._zero.get("offload_optimizer", {}).get("device", "none") != "none"

    @property
    def steps_with_cpu_adam(self) -> bool:
        """Whether DeepSpeed puts its CPU Adam in the place of the recipe's AdamW."""
        return self.offloads_optimizer and bool((self.deepspeed or {}).get("zero_force_ds_cpu_optimizer", True))

    @property
    def _zero(self) -> Mapping[str, Any]:
        """DeepSpeed's settings of ZeRO; empty without DeepSpeed."""
        return (self.deepspeed or {}).get("zero_optimization", {})


def read_topology(path: Path) -> Topology:
    """What an accelerate config describes. Raises ConfigError if it cannot be read."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path}: no accelerate config can be read there: {shortened(str(error))}; see accelerate_configs/"
        ) from None
    if not isinstance(values, dict) or "distributed_type" not in values:
        raise ConfigError(f"{path}: not an accelerate config (it names no distributed_type); see accelerate_configs/")
    kind = str(values["distributed_type"])
    deepspeed = None
    if kind == "DEEPSPEED":
        section = values.get("deepspeed_config") or {}
        if not isinstance(section, dict):
            raise ConfigError(f"{path}: deepspeed_config is {brief(section)}; write a section: see accelerate_configs/")
        file = section.get("deepspeed_config_file")
        deepspeed = _read_json(Path(str(file))) if file else _own_deepspeed(path, section)
    precision = str(values.get("mixed_precision", "no")).lower()
    precision = "no" if precision == "false" else precision  # YAML 1.1 reads a bare `no` as false
    fsdp = fsdp_config.of_config(values) if kind == "FSDP" else None
    num_processes = values.get("num_processes", 1)
    if not isinstance(num_processes, int) or isinstance(num_processes, bool) or num_processes < 1:
        raise ConfigError(
            f"{path}: num_processes is {brief(num_processes)}; write how many GPUs there are, all machines"
        )
    return Topology(str(path), num_processes, kind, precision, deepspeed, fsdp)


def _own_deepspeed(path: Path, section: Mapping[str, Any]) -> dict[str, Any]:
    """`_deepspeed` of an accelerate config. Raises ConfigError where one of its numbers is none."""
    try:
        return _deepspeed(section)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"{path}: deepspeed_config: {error}; write a number for zero_stage, and a number or auto for "
            "gradient_clipping and gradient_accumulation_steps"
        ) from None


def planned_topology(path: Path | None, num_processes: int | None) -> Topology:
    """The launch that a plan is made for: of an accelerate config, or of DDP, on a number of GPUs if one is given.

    Raises:
        ConfigError: the accelerate config cannot be read.
    """
    if path is None:
        num = num_processes or 1
        return Topology("this plan", num, "MULTI_GPU" if num > 1 else "NO")
    found = read_topology(path)
    return replace(found, num_processes=num_processes or found.num_processes)


def current_topology() -> Topology:
    """What this process was launched with. Raises ConfigError if accelerate would ignore part of it."""
    env = os.environ
    num_processes = int(env.get("WORLD_SIZE", "1"))
    by_ranks = "MULTI_GPU" if num_processes > 1 else "NO"
    kind = next((kind for variable, kind in LAUNCHES.items() if env.get(variable) == "true"), by_ranks)
    deepspeed = _deepspeed_of_environment(env) if kind == "DEEPSPEED" else None
    fsdp = fsdp_config.of_environment(env) if kind == "FSDP" else None
    precision = env.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    return Topology("this launch", num_processes, kind, precision, deepspeed, fsdp)


def _deepspeed_of_environment(env: Mapping[str, str]) -> dict[str, Any]:
    """DeepSpeed's settings as accelerate makes them out of what `accelerate launch` left in the environment."""
    if "ACCELERATE_USE_CPU" in env:
        raise ConfigError(
            "ACCELERATE_USE_CPU is set, with which accelerate ignores its DeepSpeed config and the ranks would "
            "each train alone; unset it (to compute on the CPU where there are GPUs, set DS_ACCELERATOR=cpu and "
            "CUDA_VISIBLE_DEVICES= instead)"
        )
    file = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file.lower() != "none":
        return _read_json(Path(file))
    section = {
        "zero_stage": env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"),
        "offload_optimizer_device": env.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none"),
        "offload_param_device": env.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none"),
        "zero3_save_16bit_model": env.get("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "false") == "true",
        "gradient_clipping": env.get("ACCELERATE_GRADIENT_CLIPPING", "auto"),
        "gradient_accumulation_steps": env.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto"),
    }
    return _deepspeed(section)


def require_fit(config: RunConfig, topology: Topology) -> None:
    """Raises ConfigError, with every reason and a remedy for each, where `config` must not run under `topology`."""
    problems = [
        *_wrong_type(topology),
        *_wrong_precision(config, topology),
        *_wrong_deepspeed(topology),
        *([] if topology.fsdp is None else fsdp_config.wrong_fsdp(topology.fsdp, topology.num_processes)),
        *_wrong_together(config, topology),
        *_contradictions(config, topology),
    ]
    if problems:
        title = f"{topology.name}: {len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ConfigError("\n".join([title, *problems]))


def _wrong_type(topology: Topology) -> Iterator[str]:
    """Ways to share memory that are not supported."""
    if topology.distributed_type in ("MEGATRON_LM", "TP", "XLA"):
        yield (
            f"distributed_type: {topology.distributed_type} is not supported; accelerate_configs/zero3.yaml and "
            "fsdp2.yaml partition weights, gradients and optimizer states as well"
        )


def _wrong_precision(config: RunConfig, topology: Topology) -> Iterator[str]:
    """Number formats that are not supported, or other than the recipe's."""
    precisions = {topology.mixed_precision}
    if (topology.deepspeed or {}).get("fp16", {}).get("enabled") is True:
        precisions.add("fp16")
    if unsupported := sorted(precisions & {"fp16", "fp8"}):
        yield (
            f"{' '.join(unsupported)}: float16 overflows on Gemma, and float8 is not supported; set mixed_precision: "
            "'no' and let the recipe's train.bf16 decide"
        )
    if "bf16" in precisions and not config.train.bf16:
        yield "bf16: the recipe computes in float32; set mixed_precision: 'no', or train.bf16: true in the recipe"


def _wrong_deepspeed(topology: Topology) -> Iterator[str]:
    """Settings of a DeepSpeed config that suit no recipe."""
    if topology.deepspeed is None:
        return
    if topology.zero_stage == 0:
        yield "zero_optimization.stage: 0 partitions nothing; use accelerate_configs/ddp.yaml, or a stage from 1 to 3"
    zero = topology.deepspeed.get("zero_optimization", {})
    if topology.zero_stage == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        yield (
            "zero_optimization.stage3_gather_16bit_weights_on_model_save: must be true, or the result would hold empty "
            "tensors"
        )
    for name in ("offload_optimizer", "offload_param"):
        if zero.get(name, {}).get("device") == "nvme":
            yield f"zero_optimization.{name}.device: nvme is not supported: checkpoints come from memory; use cpu"
    for name, ours in (("optimizer", "train.optim"), ("scheduler", "train.lr_scheduler_type")):
        if name in topology.deepspeed:
            yield f"{name}: would silently override the recipe's {ours}; remove it from the DeepSpeed config"


def _wrong_together(config: RunConfig, topology: Topology) -> Iterator[str]:
    """Settings that this recipe is not compatible with."""
    optim = config.train.optim
    shares_optimizer = topology.deepspeed is not None or topology.fsdp is not None
    if config.tuning == "full" and config.model.dtype == "bfloat16" and not shares_optimizer:
        yield (
            "tuning: full with model.dtype: bfloat16 needs DeepSpeed or FSDP2, which train a float32 copy of the "
            "weights; without it, updates below the rounding of bfloat16 are lost. Use accelerate_configs/zero1.yaml "
            "(or 2, 3) also for a single process, or set model.dtype: float32 with train.bf16: true"
        )
    if config.train.torch_compile and shares_optimizer:
        yield (
            "train.torch_compile: true was never tried where ranks share the model (DeepSpeed, FSDP2); remove it, or "
            "use accelerate_configs/ddp.yaml"
        )
    if topology.fsdp is not None and optim not in fsdp_config.OPTIMIZERS:
        yield (
            f"train.optim: {optim} cannot step on slices of weights as FSDP2 makes them; use one of "
            f"{', '.join(fsdp_config.OPTIMIZERS)}, or accelerate_configs/zero3.yaml"
        )
    if topology.deepspeed is None:
        return
    if optim == "adafactor":
        yield (
            "train.optim: adafactor would not be Adafactor: it needs the shape of each weight, and ZeRO gives it flat "
            "slices; use adamw_8bit, or accelerate_configs/ddp.yaml"
        )
    elif optim not in TESTED_OPTIMIZERS and not topology.deepspeed.get("zero_allow_untested_optimizer"):
        yield f"train.optim: {optim} needs zero_allow_untested_optimizer: true in the DeepSpeed config"
    if topology.steps_with_cpu_adam and optim not in TESTED_OPTIMIZERS:
        yield (
            f"train.optim: {optim} would be replaced by DeepSpeed's CPU Adam where the optimizer is offloaded; "
            "set train.optim: adamw_torch, or use accelerate_configs/zero3.yaml"
        )


def _contradictions(config: RunConfig, topology: Topology) -> Iterator[str]:
    """Settings of the recipe that a DeepSpeed config sets otherwise."""
    try:
        plan = batch_plan(config, topology.num_processes)
    except ConfigError as error:
        yield str(error)
        return
    deepspeed = topology.deepspeed or {}
    for path, (name, value) in settings_of_both(config, plan).items():
        section = deepspeed if len(path) == 1 else deepspeed.get(path[0], {})
        found = section.get(path[-1], "auto")
        if found not in ("auto", value):
            yield (
                f"{'.'.join(path)}: {json.dumps(found)}, but {name} of the recipe is {json.dumps(value)}; write "
                f'"auto" there, which leaves it to the recipe, or change the recipe'
            )
    zero = deepspeed.get("zero_optimization", {})
    unknown = [name for name in deepspeed if name not in KNOWN and not _is_off(deepspeed[name])]
    for name in [*unknown, *(f"zero_optimization.{name}" for name in ROUNDING if zero.get(name))]:
        yield f"{name}: may change what is learned, and no recipe says so; remove it from the DeepSpeed config"


def _is_off(value: object) -> bool:
    """Whether a setting says that something is not to be done."""
    if isinstance(value, dict):
        return not value or value.get("enabled") is False
    if type(value) is int:  # and no bool
        return value == 1  # sequence_parallel_size and the like
    return value is False or value in (None, "", "none")


def settings_of_both(config: RunConfig, plan: BatchPlan) -> dict[tuple[str, ...], tuple[str, float | bool]]:
    """What a recipe and a DeepSpeed config can both say: keys of the latter -> dotted key and value of the recipe.

    The keys of a setting are its path, ("bf16", "enabled") for `{"bf16": {"enabled": …}}`.
    """
    sequence = plan.sequence_parallel_size  # DeepSpeed counts each of the ranks that share a sequence
    batch = "train.global_batch_size" + (f" x {sequence} ranks to a sequence" if sequence > 1 else "")
    return {
        ("gradient_clipping",): ("train.max_grad_norm", config.train.max_grad_norm),
        ("train_batch_size",): (batch, plan.global_batch_size * sequence),
        ("train_micro_batch_size_per_gpu",): ("train.per_device_train_batch_size", plan.per_device_train_batch_size),
        ("gradient_accumulation_steps",): ("train.gradient_accumulation_steps", plan.gradient_accumulation_steps),
        ("bf16", "enabled"): ("train.bf16", config.train.bf16),
    }


def write_recipe_into(deepspeed: dict[str, Any], config: RunConfig, plan: BatchPlan) -> None:
    """Let the recipe decide what it and a DeepSpeed config can both say. Trainer fills in `"auto"` alone: where the
    config left out `gradient_clipping`, DeepSpeed would not clip."""
    for path, (_, value) in settings_of_both(config, plan).items():
        section = deepspeed if len(path) == 1 else deepspeed.setdefault(path[0], {})
        section[path[-1]] = value


def _deepspeed(section: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's settings as accelerate makes them out of its own keys: `deepspeed_config` of its YAML file."""
    zero = {
        "stage": int(section.get("zero_stage", 2)),
        "offload_optimizer": {"device": section.get("offload_optimizer_device", "none")},
        "offload_param": {"device": section.get("offload_param_device", "none")},
        "stage3_gather_16bit_weights_on_model_save": bool(section.get("zero3_save_16bit_model")),
    }
    clipping = str(section.get("gradient_clipping", "auto")).lower()
    # `accelerate launch` and `accelerate config` write 1 where the user said nothing.
    accumulation = str(section.get("gradient_accumulation_steps", "auto"))
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": "auto" if clipping in ("auto", "none") else float(clipping),
        "gradient_accumulation_steps": "auto" if accumulation in ("auto", "1") else int(accumulation),
    }


def _read_json(path: Path) -> dict[str, Any]:
    """A DeepSpeed config of its own (`deepspeed_config_file`), with all sections that are read here being sections.

    Raises:
        ConfigError: it cannot be read, or one of them is something else.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"deepspeed_config_file: {path}: no DeepSpeed config can be read there ({error}); the path is relative to "
            "the current directory, so start from the repository's root or write it in full"
        ) from None
    zero = settings.get("zero_optimization") if isinstance(settings, dict) else None
    if not isinstance(zero, dict):
        raise ConfigError(
            f"{path}: not a DeepSpeed config: it has no section zero_optimization; see accelerate_configs/"
        )
    if not isinstance(zero.get("stage", 0), int):
        raise ConfigError(f"{path}: zero_optimization.stage is {shortened(json.dumps(zero['stage']))}; write 1, 2 or 3")
    sections = {
        "fp16": settings.get("fp16", {}),
        "bf16": settings.get("bf16", {}),
        "zero_optimization.offload_optimizer": zero.get("offload_optimizer", {}),
        "zero_optimization.offload_param": zero.get("offload_param", {}),
    }
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ConfigError(
                f"{path}: {name} is {shortened(json.dumps(section))}; write a section, such as {{}}, or leave it out"
            )
    return settings
