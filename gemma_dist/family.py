"""The sizes of every Gemma 4, as data: what their config.json holds, so that a run can be planned before a download.

tests/test_plan.py holds them against tests/shapes/*.json.
"""

from typing import Any

VOCABULARY = 262_144  # tokens; the same for all of them

_TEXT: dict[str, dict[str, Any]] = {
    "E2B": {
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": 35,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "sliding_window": 512,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 256,
    },
    "E4B": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 42,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "sliding_window": 512,
        "num_kv_shared_layers": 18,
        "hidden_size_per_layer_input": 256,
    },
    "12B": {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 1,
        "sliding_window": 1024,
        "attention_k_eq_v": True,
    },
    "26B-A4B": {
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_hidden_layers": 30,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "sliding_window": 1024,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
    "31B": {
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 60,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
        "sliding_window": 1024,
        "attention_k_eq_v": True,
    },
}
_SMALL_VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16, "head_dim": 64}
_LARGE_VISION = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "head_dim": 72}
_MERGED_PATCHES = {"mm_embed_dim": 3840, "mm_posemb_size": 1120, "output_proj_dims": 3840}  # instead of a tower
_AUDIO = {
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "subsampling_conv_channels": [128, 32],
    "conv_kernel_size": 5,
    "output_proj_dims": 1536,
}
_OTHER_PARTS: dict[str, dict[str, Any]] = {
    "E2B": {"vision_config": _SMALL_VISION, "audio_config": _AUDIO},
    "E4B": {"vision_config": _SMALL_VISION, "audio_config": _AUDIO},
    "12B": {"vision_config": _MERGED_PATCHES, "audio_config": {"audio_embed_dim": 640}},
    "26B-A4B": {"vision_config": _LARGE_VISION, "audio_config": None},
    "31B": {"vision_config": _LARGE_VISION, "audio_config": None},
}
SIZES = tuple(_TEXT)


def hub_name(size: str) -> str:
    """The name on the hub of the instruction-tuned model of one of SIZES."""
    return f"google/gemma-4-{size}-it"


def known_config(model: str) -> dict[str, Any] | None:
    """What config.json of a model of the hub says of sizes; None where the name is none of Google's.

    Args:
        model: `google/gemma-4-E4B-it`, or without `-it`: the base and the instruction-tuned model have one shape.
    """
    size = model.removeprefix("google/gemma-4-").removesuffix("-it")
    if size not in _TEXT or model not in (hub_name(size), hub_name(size).removesuffix("-it")):
        return None
    text = {"vocab_size": VOCABULARY, "head_dim": 256, "global_head_dim": 512, **_TEXT[size]}
    text["layer_types"] = _layer_types(text["num_hidden_layers"], sliding_for_each_full=4 if size == "E2B" else 5)
    text["vocab_size_per_layer_input"] = VOCABULARY
    text["final_logit_softcapping"] = 30.0
    if "hidden_size_per_layer_input" not in text:  # the larger three
        text |= {"hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision"}
    return {
        "model_type": "gemma4_unified" if size == "12B" else "gemma4",
        "text_config": text,
        **_OTHER_PARTS[size],
    }


def _layer_types(num_layers: int, *, sliding_for_each_full: int) -> list[str]:
    """Which attention each layer has: some with a sliding window, then one that sees everything."""
    types = []
    for layer in range(1, num_layers + 1):
        is_full = layer % (sliding_for_each_full + 1) == 0
        types.append("full_attention" if is_full else "sliding_attention")
    return types
