"""Towers that a run does not need, and so does not load.

No trajectory has sound, so beside a frozen base the audio tower of E2B and E4B is never asked, and in a run without
images neither is the vision tower. What is left out stays in the base, and so in the merged model. A full fine-tuning
publishes the whole model and so holds all of it.
"""

from collections.abc import Collection
from typing import Any, Literal

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
    return [rf"{tower}_tower\.|embed_{tower}\." for tower in towers]


def whole_modules(config: Any) -> list[str]:
    """Paths of the modules that transformers would leave in 16 bits if it quantized the whole model of `config`.

    It spares the last module of a model, whichever that is: without a tower it would be another one, and the base under
    an adapter would depend on what a run left out.
    """
    from transformers.quantizers.base import get_keys_to_not_convert

    return sorted(get_keys_to_not_convert(_without_weights(config)))


def linear_layers(config: Any) -> set[str]:
    """Paths of all linear layers of the whole model of `config`, which are what can be in 4 bits."""
    from torch.nn import Linear

    modules = _without_weights(config).named_modules()
    return {name for name, module in modules if type(module) is Linear}


def _without_weights(config: Any) -> Any:
    """The whole model of `config`."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
