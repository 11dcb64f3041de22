"""Two small depths of a model that tell what its own depth takes.

With checkpointing a layer leaves its input behind and nothing else, whatever its kind, so what a step takes on top of
the weights is a line in the number of layers. Two models of few layers give it: they end as the whole one does, and
have layers of each kind, those that share keys and values too.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_dist.config import RunConfig
from gemma_dist.model.load import read_config

KINDS = ["sliding_attention", "full_attention"]
DEEP = 16  # layers, from which on it is worth it


@dataclass(frozen=True)
class Depths:
    """Numbers of layers: the model's own, and those of two models that are simulated in its place."""

    own: int
    few: int
    more: int

    def shallower(self, config: RunConfig, folder: Path) -> Iterator[RunConfig]:
        """The recipe with a model of few layers, and with one of more; their config.json are written to `folder`."""
        whole = read_config(config.model.model_name_or_path).to_dict()
        for number in (self.few, self.more):
            path = folder / str(number)
            path.mkdir()
            text = whole["text_config"]
            shares = number // 2 if text.get("num_kv_shared_layers") else 0
            layers = {
                "num_hidden_layers": number,
                "layer_types": KINDS * (number // 2),
                "num_kv_shared_layers": shares,
                "per_layer_config": _of_full_layers(text, number),
            }
            settings = whole | {"text_config": text | layers}
            (path / "config.json").write_text(json.dumps(settings, default=str), encoding="utf-8")
            model = config.model.model_copy(update={"model_name_or_path": str(path)})
            yield config.model_copy(update={"model": model})


def _of_full_layers(text: dict[str, Any], number: int) -> dict[str, Any]:
    """What the full layers of a model of so many layers have otherwise than its sliding ones, as the whole model's."""
    of_layers = text.get("per_layer_config") or {}
    if not of_layers:
        return {}
    (settings, *others) = of_layers.values()
    assert all(other == settings for other in others), "full layers differ"
    return {str(layer): settings for layer in range(number) if KINDS[layer % 2] == "full_attention"}


def depths_of(config: RunConfig) -> Depths | None:
    """None where every layer has to run: the model is not deep, or what a layer leaves behind depends on its kind.

    Raises:
        CheckpointError: there is no Gemma 4 at model.model_name_or_path.
    """
    text: Any = read_config(config.model.model_name_or_path).get_text_config()
    shared = getattr(text, "num_kv_shared_layers", 0) or 0
    own = text.num_hidden_layers
    ends_alike = all(text.layer_types[:end][-2:] == KINDS for end in {own, own - shared})
    if config.tuning == "full" or not config.train.gradient_checkpointing or own < DEEP or not ends_alike:
        return None
    few = 2 * len(KINDS) if shared else len(KINDS)
    return Depths(own, few, 2 * few)
