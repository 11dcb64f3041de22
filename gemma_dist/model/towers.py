"""Towers that a run does not need, and so does not load.

No trajectory has sound, so beside a frozen base the audio tower of E2B and E4B is never asked, and in a run without
images neither is the vision tower. What is left out stays in the base, and so in the merged model. A full fine-tuning
publishes the whole model and so holds all of it.
"""

from collections.abc import Collection
from typing import Any, Literal

UNIFIED = "gemma4_unified"  # `model_type` of 12B
Tower = Literal["audio", "vision"]


def unneeded_towers(*, frozen: bool, has_images: bool) -> tuple[Tower, ...]:
    """What a run leaves out whose base is `frozen` or not, and whose data has images or not."""
    if not frozen:
        return ()
    return ("audio",) if has_images else ("audio", "vision")


def config_without(config: Any, towers: Collection[Tower]) -> Any:
    """A Gemma 4's `config` as that of a model without `towers`; it is changed in place."""
    for tower in towers:
        setattr(config, f"{tower}_config", None)
    return config


def modules_of(towers: Collection[Tower]) -> list[str]:
    """Regular expressions for the names of the weights of `towers`, with the projectors behind them."""
    return [rf"{tower}_(tower|embedder)\.|embed_{tower}\." for tower in towers]


def whole_modules(config: Any) -> list[str]:
    """Paths of the modules that stay in 16 bits where a base is held in 4: those that transformers leaves whole as it
    loads the whole model of `config`.

    It spares the head, the embedding tied to it, and the last parameter of a model, which while it loads is the head
    too: the projectors are in 4 bits. Of 12B the projection of pixels stays whole (0.07 GiB): in 4 bits it would
    compute in float32 beside a model in bfloat16, where any image ends in an error.
    """
    if config.model_type == UNIFIED:
        return ["lm_head", "model.embed_vision", "model.embed_audio"]
    return ["lm_head", "model.language_model.embed_tokens"]


def linear_layers(config: Any) -> set[str]:
    """Paths of all linear layers of the whole model of `config`, which are what can be in 4 bits."""
    import torch
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    with torch.device("meta"):
        model = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](config)
    return {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
