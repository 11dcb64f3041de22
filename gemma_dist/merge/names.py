"""Adapters of other tools: their tensors under the names that PEFT gives them beside this base.

The same adapter comes with names that differ in three ways, of which PEFT itself would load nothing and say little:

    base_model.model.PATH.lora_A.default.weight    the adapter's own name, left in by who saved a raw state dict
    PATH.lora_A.weight                             without PEFT's prefix
    PATH under another root                        versions of transformers moved the language model about, and in the
                                                   class for text alone it stands elsewhere

A root is exchanged only where all tensors of the adapter then have their place, by one and the same exchange.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from gemma_dist.errors import CheckpointError
from gemma_dist.merge.plan import PREFIX, by_pattern
from gemma_dist.tensorfile import TensorFile

# Where the layers of the language model stand: in `Gemma4ForConditionalGeneration` of transformers 5, in that of 4, in
# `Gemma4ForCausalLM`, and in what is inside of them.
ROOTS = ("model.language_model.", "language_model.model.", "model.", "language_model.", "")
BEHIND_ROOT = re.compile(r"layers\.\d+\.|embed_tokens|norm\b")
FACTOR = re.compile(
    r"(?P<path>.+)\.lora_(?P<kind>[AB]|magnitude_vector)(\.(?!(?:weight|bias)$)(?P<adapter>[^.]+))?(\.weight)?"
)
PATTERNS = ("rank_pattern", "alpha_pattern")  # of adapter_config.json: modules, or regular expressions of them


def with_names_of_peft(
    weights: TensorFile, settings: dict[str, Any], base: Collection[str]
) -> tuple[TensorFile, dict[str, Any], str | None]:
    """An adapter's file with its tensors under PEFT's names, its settings for these, and what was changed, in words.

    Args:
        settings: the adapter's `adapter_config.json`.
        base: the names of the base's tensors, as the class of the model has them.

    Raises:
        CheckpointError: the file holds several adapters, or two tensors that mean the same; or a pattern of the
            settings would not find its modules any more.
    """
    adapters = sorted({match["adapter"] for name in weights.entries if (match := FACTOR.fullmatch(name))} - {None})
    if len(adapters) > 1:
        raise CheckpointError(
            f"{weights.path} holds {len(adapters)} adapters in one file ({', '.join(adapters)}); save each by itself, "
            "with PEFT's save_pretrained(..., selected_adapters=[...])"
        )
    plain = {name: _plain(name) for name in weights.entries}
    if (roots := _exchange(plain.values(), base)) is not None:
        settings = _with_moved_patterns(settings, {_module(short) for short in plain.values()}, roots)
        plain = {name: _moved(short, *roots) for name, short in plain.items()}
    entries = {PREFIX + plain[name]: entry for name, entry in weights.entries.items()}
    if len(entries) < len(weights.entries):
        (twice, _), *_ = Counter(plain.values()).most_common(1)
        raise CheckpointError(f"{weights.path} has several tensors that mean {PREFIX}{twice}; save it again")
    changed = [name for name in weights.entries if name != PREFIX + plain[name]]
    if not changed:
        return weights, settings, None
    example = f"{changed[0]} was read as {PREFIX}{plain[changed[0]]}"
    note = f"{len(changed)} tensors have names of another tool: {example}"
    return replace(weights, entries=entries), settings, note


def _plain(name: str) -> str:
    """Without PEFT's prefix and the adapter's own name."""
    name = name.removeprefix(PREFIX)
    match = FACTOR.fullmatch(name)
    if match is None:
        return name
    return f"{match['path']}.lora_{match['kind']}" + ("" if match["kind"] == "magnitude_vector" else ".weight")


def _exchange(names: Iterable[str], base: Collection[str]) -> tuple[str, str] | None:
    """(old, new): the roots with whose exchange each tensor of an adapter has its module in the base. None where they
    have it already, or no exchange helps, or several would."""
    paths = {_module(name) for name in names}
    modules = {name.removesuffix(".weight") for name in base} | {name.rpartition(".")[0] for name in base}
    if paths <= modules:
        return None
    pairs = [(old, new) for old in ROOTS for new in ROOTS if old != new]
    found = [pair for pair in pairs if {_moved(path, *pair) for path in paths} <= modules]
    return found[0] if len(found) == 1 else None


def _with_moved_patterns(settings: Mapping[str, Any], modules: Iterable[str], roots: tuple[str, str]) -> dict[str, Any]:
    """The settings, their patterns under another root: each of the adapter's `modules` keeps its rank and scale."""
    moved = {key: {_moved(one, *roots): value for one, value in (settings.get(key) or {}).items()} for key in PATTERNS}
    for module in modules:
        for key in PATTERNS:
            before = by_pattern(settings.get(key), module, None)
            if before != by_pattern(moved[key], _moved(module, *roots), None):
                raise CheckpointError(
                    f"adapter_config.json: a pattern of {key} gives {module} {before}, but would not as "
                    f"{_moved(module, *roots)}, where the base has it; write the pattern for that name"
                )
    return {**settings, **{key: patterns for key, patterns in moved.items() if patterns}}


def _module(name: str) -> str:
    """What a tensor of an adapter belongs to: a module of the base, or one of its tensors."""
    match = FACTOR.fullmatch(name)
    path = match["path"] if match else name.rpartition(".")[0]
    return path.replace(".base_layer", "").removesuffix(".token_adapter")


def _moved(name: str, old: str, new: str) -> str:
    """`name` under another root, if it stands under the old one."""
    rest = name.removeprefix(old)
    return new + rest if name.startswith(old) and BEHIND_ROOT.match(rest) else name
