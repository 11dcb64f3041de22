"""FSDP's part of an accelerate config, or of what `accelerate launch` made of it in the environment.

Settings have accelerate's names without `fsdp_`, and values in lower case. Where one is absent accelerate has a
default: for most of them one that would fail, or keep the whole model on each GPU.
"""

from collections.abc import Iterator, Mapping
from typing import Any

# What `accelerate launch` takes where a config leaves a setting out.
DEFAULTS = {
    "version": "1",
    "auto_wrap_policy": "no_wrap",
    "transformer_layer_cls_to_wrap": "",
    "reshard_after_forward": "true",
    "cpu_ram_efficient_loading": "true",
    "offload_params": "false",
    "activation_checkpointing": "false",
    "ignored_modules": "",
}
ENVIRONMENT_NAMES = {"transformer_layer_cls_to_wrap": "TRANSFORMER_CLS_TO_WRAP"}  # where it is not the name itself
# Whose states belong to single elements, and which compute with torch's own operations. bitsandbytes' kernels take no
# part of a tensor for the whole, and Adafactor wants sums over rows, which lie on several ranks.
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
OURS = "accelerate_configs/fsdp2.yaml has it so"


def of_config(values: Mapping[str, Any]) -> dict[str, str]:
    """The settings in an accelerate config."""
    section = values.get("fsdp_config")
    section = section if isinstance(section, Mapping) else {}  # then all is as accelerate has it, and refused
    found = {str(name).removeprefix("fsdp_"): _word(value) for name, value in section.items()}
    found["parallelism_config"] = "set" if values.get("parallelism_config") else ""
    return DEFAULTS | found


def of_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The settings that this process was launched with."""
    found = {}
    for name, default in DEFAULTS.items():
        found[name] = _word(env.get(f"FSDP_{ENVIRONMENT_NAMES.get(name, name.upper())}", default))
    found["parallelism_config"] = "set" if env.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true" else ""
    return found


def _word(value: object) -> str:
    return "" if value is None else str(value).lower()


def wrong_fsdp(fsdp: Mapping[str, str], num_processes: int) -> Iterator[str]:
    """Settings that suit no recipe, each with a remedy."""
    if fsdp["version"] != "2":
        yield (
            f"fsdp_version: {fsdp['version']} (accelerate's default is 1) joins the weights of a layer into one, which "
            f"no checkpoint of ours is made of; write fsdp_version: 2, {OURS}"
        )
        return  # the rest has another meaning there
    if num_processes == 1:
        yield "num_processes: 1 has nothing to share; run it without a launcher, or on more processes"
    if fsdp["auto_wrap_policy"] != "transformer_based_wrap":
        yield (
            f"fsdp_auto_wrap_policy: {fsdp['auto_wrap_policy'].upper()} would gather the whole model on each GPU, or "
            f"what is no layer; write TRANSFORMER_BASED_WRAP, {OURS}"
        )
    if classes := fsdp["transformer_layer_cls_to_wrap"]:
        yield (
            f"fsdp_transformer_layer_cls_to_wrap: {classes}: leave it out; the layers of the model and of its towers "
            "are taken, whatever their classes"
        )
    if fsdp["reshard_after_forward"] not in ("true", "false"):
        yield f"fsdp_reshard_after_forward: {fsdp['reshard_after_forward']} is for FSDP1; write true, {OURS}"
    if fsdp["cpu_ram_efficient_loading"] != "false":
        yield (
            "fsdp_cpu_ram_efficient_loading: must be false (accelerate's default is true): it would send buffers as if "
            "they were parameters, and fail. All ranks map the same files, so a node holds them once as it is"
        )
    if fsdp["offload_params"] != "false":
        yield "fsdp_offload_params: true is not supported; use accelerate_configs/zero3_offload.yaml"
    if fsdp["activation_checkpointing"] != "false":
        yield "fsdp_activation_checkpointing: the recipe's train.gradient_checkpointing says it; write false"
    if modules := fsdp["ignored_modules"]:
        yield f"fsdp_ignored_modules: {modules}: nobody would sum the gradients of these; leave it out"
    if fsdp["parallelism_config"]:
        yield "parallelism_config: is not supported: each rank trains on samples of its own; leave it out"
