"""A few small depths of a model that tell what its own depth takes.

With checkpointing a layer leaves its input behind, whatever its kind, and each moment of a step takes on top of the
weights what is linear in the number of layers. Where the last layers share keys and values there are two numbers: of
those layers, and of the others. Two models of few layers give the line, or three the plane. In them sliding and full
layers alternate, so that a few layers have each kind; how many inputs lie below a layer in the whole model is known.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gemma_dist.config import RunConfig
from gemma_dist.model.load import read_config
from gemma_dist.plan.allocator import ACTIVATIONS, Peak
from gemma_dist.plan.step import backward_moments

KINDS = ["sliding_attention", "full_attention"]
DEEP = 16  # layers, from which on it is worth it


@dataclass(frozen=True)
class Depth:
    """Numbers of layers: with keys and values of their own, and behind them those that share these."""

    own: int
    shared: int

    @property
    def total(self) -> int:
        return self.own + self.shared

    def text_config(self) -> Any:
        """What `backward_moments` asks of a model of this depth."""
        return SimpleNamespace(
            num_hidden_layers=self.total,
            num_kv_shared_layers=self.shared,
            layer_types=KINDS * (self.total // len(KINDS)),
        )

    def config_of(self, config: RunConfig, folder: Path) -> RunConfig:
        """The recipe with a model of this depth, both numbers even, whose config.json is written to `folder`."""
        whole = read_config(config.model.model_name_or_path).to_dict()
        path, number = folder / f"{self.own}-{self.shared}", self.total
        path.mkdir()
        text = whole["text_config"]
        layers = {
            "num_hidden_layers": number,
            "layer_types": self.text_config().layer_types,
            "num_kv_shared_layers": self.shared,
            "per_layer_config": _of_full_layers(text, number),
        }
        settings = whole | {"text_config": text | layers}
        (path / "config.json").write_text(json.dumps(settings, default=str), encoding="utf-8")
        model = config.model.model_copy(update={"model_name_or_path": str(path)})
        return config.model_copy(update={"model": model})


def depths_of(config: RunConfig, text: Any) -> list[Depth] | None:
    """The depths to simulate in the place of a model of the config `text`. None where every layer has to run: the model
    is not deep, or what a layer leaves behind depends on its kind."""
    shared = getattr(text, "num_kv_shared_layers", 0) or 0
    own = text.num_hidden_layers - shared
    ends_alike = all(text.layer_types[:end][-2:] == KINDS for end in {own, own + shared})
    if config.tuning == "full" or not config.train.gradient_checkpointing or own + shared < DEEP or not ends_alike:
        return None
    if not shared:
        return [Depth(4, 0), Depth(6, 0)]
    return [Depth(2, 4), Depth(4, 4), Depth(2, 6)]


def continued(
    whole: Any, depths: Sequence[Depth], found: Sequence[Mapping[str, Peak]], resting: str, input_bytes: int
) -> Iterator[tuple[str, Counter[str]]]:
    """What each moment of a step takes on top of the `resting` one in the whole model, by parts.

    Args:
        whole: text config of the model.
        depths: the first, and for each number of layers one that has more.
        found: the peaks by moment of models of `depths`.
        input_bytes: what a checkpointed layer leaves behind.
    """
    shared = getattr(whole, "num_kv_shared_layers", 0) or 0
    own, fewest = Depth(whole.num_hidden_layers - shared, shared), depths[0]
    places = {moment: place for place, moment in enumerate(backward_moments(whole))}
    fewest_places = {moment: place for place, moment in enumerate(backward_moments(fewest.text_config()))}
    for moment in found[0].keys() - {resting}:
        if fewest_places.get(moment) == 0:
            continue  # nothing lies below the first layer, and its backward pass goes on to the embeddings
        on_top = [Counter(peaks[moment].parts) for peaks in found]
        for counted, peaks in zip(on_top, found, strict=True):
            counted.subtract(peaks[resting].parts)
        first, total = on_top[0], Counter(on_top[0])
        for depth, counted in zip(depths[1:], on_top[1:], strict=True):
            more_own, more_shared = depth.own - fewest.own, depth.shared - fewest.shared
            missing = own.own - fewest.own if more_own else own.shared - fewest.shared
            for part in counted.keys() | first.keys():
                total[part] += (counted[part] - first[part]) * missing // (more_own + more_shared)
        if moment in fewest_places:
            # The line keeps the layer's distance from the end, which is another one in the whole model.
            end_of_few, end = (fewest.own, own.own) if "shares" not in moment else (fewest.total, own.total)
            total[ACTIVATIONS] += input_bytes * (places[moment] - end - (fewest_places[moment] - end_of_few))
        yield moment, total


def _of_full_layers(text: dict[str, Any], number: int) -> dict[str, Any]:
    """What the full layers of a model of so many layers have otherwise than its sliding ones, as the whole model's."""
    of_layers = text.get("per_layer_config") or {}
    if not of_layers:
        return {}
    (settings, *others) = of_layers.values()
    assert all(other == settings for other in others), "full layers differ"
    return {str(layer): settings for layer in range(number) if KINDS[layer % 2] == "full_attention"}
