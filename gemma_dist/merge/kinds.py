"""Which adapters are a sum with the base, by their settings alone: LoRA, rsLoRA and DoRA, and weights put in place."""

from collections.abc import Mapping
from typing import Any

from gemma_dist.errors import CheckpointError, brief

# Settings of PEFT's LoraConfig that change what the adapter computes in a way that is not a sum of ours.
REFUSED_SETTINGS = {
    "alora_invocation_tokens": "it acts only after certain tokens, and a merged weight acts on all",
    "arrow_config": "it routes between several adapters",
    "fan_in_fan_out": "its weights are stored transposed, and Gemma's are not",
    "kasa_config": "it truncates the base weight",
    "layer_replication": "it repeats layers of the base",
    "lora_bias": "it trains a bias, and Gemma's linear layers have none to add it to",
    "monteclora_config": "it samples its weights",
    "use_bdlora": "its factors are block-diagonal",
    "use_qalora": "its input is pooled in groups",
    "velora_config": "its kind is not known here",
}
# Settings that say how the adapter was made, not what it computes; the tensors and the scale say the rest.
# fmt: off
HARMLESS_SETTINGS = frozenset((
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "target_parameters", "task_type", "trainable_token_indices", "use_dora", "use_rslora",
))
# fmt: on
# Initializations that leave the base weight alone; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take their start out of it.
PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")


def require_mergeable(settings: Mapping[str, Any]) -> None:
    """Refuse every adapter that is not W + s * B @ A (or DoRA's rescaling of it), by its `adapter_config.json`.

    Raises:
        CheckpointError: it is such an adapter, or has a setting that is not known here.
    """
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"adapter_config.json: peft_type {brief(kind)} is not merged; only LORA (with rsLoRA, DoRA and patterns) "
            "is. Merge it with PEFT's merge_and_unload"
        )
    for key, value in settings.items():
        if not value:
            continue
        if key in REFUSED_SETTINGS:
            raise CheckpointError(
                f"adapter_config.json: {key} = {brief(value)} cannot be merged: {REFUSED_SETTINGS[key]}. "
                "Keep adapter and base apart, or train without it"
            )
        if key not in HARMLESS_SETTINGS:
            raise CheckpointError(
                f"adapter_config.json: {key} = {brief(value)} is not known here and may change what the adapter "
                f"computes; merge it with the PEFT that wrote it (version {brief(settings.get('peft_version'))})"
            )
    if (bias := settings.get("bias", "none")) != "none":
        raise CheckpointError(
            f"adapter_config.json: bias = {brief(bias)} cannot be merged: only weights are. Train with bias = 'none'"
        )
    if (start := settings.get("init_lora_weights", True)) not in PLAIN_INITIALISATIONS:
        raise CheckpointError(
            f"adapter_config.json: init_lora_weights = {brief(start)} moves part of the base weight into the adapter, "
            "so the sum with the original base is wrong; save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion, which turns it into plain LoRA"
        )


def token_indices(settings: Mapping[str, Any], module: str, tensor: str) -> tuple[int, ...]:
    """The tokens whose rows of an embedding were trained, as `trainable_token_indices` lists them.

    Args:
        module: the embedding's path.
        tensor: the adapter's tensor of these rows, for messages.

    Raises:
        CheckpointError: the settings list none for it, or something else.
    """
    listed = settings.get("trainable_token_indices") or {}
    by_module = listed if isinstance(listed, dict) else {"embed_tokens": listed}  # PEFT's default
    found = [rows for name, rows in by_module.items() if module.endswith(name)]
    tokens = found[0] if len(found) == 1 and isinstance(found[0], list) else []
    if not tokens or not all(type(token) is int and token >= 0 for token in tokens) or len({*tokens}) < len(tokens):
        raise CheckpointError(
            f"adapter_config.json: trainable_token_indices = {brief(listed)} does not list once each token whose row "
            f"{tensor} has; give the adapter's own adapter_config.json"
        )
    return tuple(tokens)
