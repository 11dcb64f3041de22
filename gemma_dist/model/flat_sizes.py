"""Sizes of full layers in config.json under the names that older readers know, beside the ones of today.

From 5.15 on, transformers writes what sets full layers apart (their head size, their number of K/V heads) as
`per_layer_config`, and no longer as `global_head_dim` and `num_global_key_value_heads`, as Google's own files have it.
It reads both. transformers before 5.15, vLLM before its pull request 49797 and llama.cpp before its 26882 read the
latter alone, and would take 31B's full layers for layers like the others.
"""

import json
from pathlib import Path
from typing import Any

from gemma_dist.logs import write_json

CONFIG = "config.json"


def flat_sizes(config: dict[str, Any]) -> dict[str, int]:
    """The sizes that a config.json tells by `per_layer_config` alone, by the names of Google's files."""
    text = config.get("text_config") or {}
    layers, types = text.get("per_layer_config") or {}, text.get("layer_types") or []
    full = [
        layers[str(number)] for number, kind in enumerate(types) if kind == "full_attention" and str(number) in layers
    ]
    if not full or any(one != full[0] for one in full):
        return {}
    names = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    return {flat: full[0][name] for name, flat in names.items() if name in full[0] and text.get(flat) is None}


def add_flat_sizes(folder: Path) -> None:
    """Add them to the config.json of a model that was just saved; nothing is done where there is none."""
    if not (folder / CONFIG).is_file():
        return
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if sizes := flat_sizes(config):
        config["text_config"] |= sizes
        write_json(folder / CONFIG, config)
