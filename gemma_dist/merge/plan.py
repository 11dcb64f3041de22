"""What becomes of every tensor of the base when an adapter is added to it, decided before a byte is written.

Only names, shapes and settings are looked at here: no torch, no files. The plan proves that each tensor of the adapter
is used exactly once, that the shapes agree and that the kind of adapter is one whose sum we know; anything else is
refused by name, since a wrong merge loads and generates without any error.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gemma_dist.config import EXPERT_WEIGHTS
from gemma_dist.errors import CheckpointError
from gemma_dist.merge.kinds import require_mergeable, token_indices

# Tensor name -> (dtype as safetensors writes it, shape).
Headers = Mapping[str, tuple[str, tuple[int, ...]]]

MERGEABLE_DTYPES = ("F32", "BF16", "F16")
PREFIX = "base_model.model."  # PEFT's two wrappers; what follows is the module's path, and so the checkpoint's
TOKEN_ROWS = re.compile(re.escape(PREFIX) + r"(.+)\.token_adapter\.trainable_tokens_delta")
LORA_TENSOR = re.compile(re.escape(PREFIX) + r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")

TIED_MODULES = ("embed_tokens", "lm_head")  # the last part of their paths
ADAPTER_CUT_SHORT = "the file is incomplete or does not belong to its adapter_config.json: save the adapter again"


@dataclass(frozen=True)
class Lora:
    """One adapted weight W of shape (out, in): W + scale * B @ A, and with DoRA each row then set to its magnitude.

    Or a stack of them, (experts, out, in). The columns of B then run over ranks first and experts last, the rows of A
    over experts first.
    """

    a: str  # names of adapter tensors: (r, in), or (experts * r, in)
    b: str  # (out, r), or (out, r * experts)
    scale: float
    magnitude: str | None  # (out,)
    num_experts: int | None = None
    adapter: int = 0  # which of several adapters has them, in the order in which they are given


@dataclass(frozen=True)
class Replacement:
    """A tensor of an adapter that training put in the place of one of the base, or of some rows of it."""

    tensor: str
    rows: tuple[int, ...] | None = None  # of which tokens its rows are; None: it is the whole tensor
    adapter: int = 0


@dataclass(frozen=True)
class TensorOp:
    """What becomes of one tensor of the base. The result keeps its name and shape."""

    name: str
    quantized: bool = False  # to 4 bit and back first, as the trained model held it
    loras: tuple[Lora, ...] = ()
    replaced_by: Replacement | None = None

    @property
    def untouched(self) -> bool:
        """The result has the bytes of the base, so they can be copied."""
        return not self.quantized and not self.loras and self.replaced_by is None


def plan_merge(
    base: Headers,
    adapter: Headers,
    settings: Mapping[str, Any],
    *,
    tied_embeddings: bool,
    quantized_modules: Collection[str],
    quantized_parameters: Collection[str] = (),
) -> list[TensorOp]:
    """One `TensorOp` for each tensor of the base, in the order of `base`.

    Args:
        settings: the adapter's `adapter_config.json`.
        tied_embeddings: whether the LM head is the token embedding.
        quantized_modules: paths of the modules whose weight goes to 4 bit and back; empty for none.
        quantized_parameters: the experts' stacks that do.

    Raises:
        CheckpointError: an adapter of a kind that has no sum here, a tensor without its place or of the wrong shape.
    """
    require_mergeable(settings)
    _check_not_empty(adapter)

    factors: dict[str, dict[str, str]] = {}  # module -> kind of tensor -> its name in the adapter
    others = []
    for tensor in adapter:
        if match := LORA_TENSOR.fullmatch(tensor):
            factors.setdefault(match[1], {})[match[2]] = tensor
        else:
            others.append(tensor)
    replaced_by = _replacements(others, base, adapter, settings, tied_embeddings)
    experts = _expert_weights(base, settings.get("target_parameters") or ())
    loras: dict[str, Lora] = {}
    for module, found in factors.items():
        name = experts.get(module, f"{module}.weight")
        loras[name] = _lora(module, name, found, base, adapter, settings, tied_embeddings)
    for module, name in experts.items():
        if module not in factors:
            raise CheckpointError(
                f"adapter_config.json: target_parameters names {name}, but the adapter has no {PREFIX}{module}.lora_A; "
                f"{ADAPTER_CUT_SHORT}"
            )
    for name in loras.keys() & replaced_by.keys():
        raise CheckpointError(
            f"{name} is both adapted and replaced (by {replaced_by[name].tensor}); train it one way only"
        )
    quantized = {f"{module}.weight" for module in quantized_modules} | set(quantized_parameters)
    _check_quantized(quantized, base)

    ops = []
    used: list[str] = []
    for name in base:
        held_in_4_bits = name in quantized and name not in replaced_by
        op = TensorOp(name, held_in_4_bits, (loras[name],) if name in loras else (), replaced_by.get(name))
        ops.append(op)
        used += _adapter_tensors(op)
    assert sorted(used) == sorted(adapter), "an adapter tensor is not used exactly once"
    return _with_head_as_embedding(ops) if tied_embeddings else ops


def _with_head_as_embedding(ops: list[TensorOp]) -> list[TensorOp]:
    """An LM head that a base's files have beside the embedding it is tied to stays equal to it: where the two differ,
    transformers (5.23) unties them."""
    rows = next((op.replaced_by for op in ops if op.name.endswith("embed_tokens.weight")), None)
    return [replace(op, replaced_by=rows) if op.name == "lm_head.weight" else op for op in ops]


def _adapter_tensors(op: TensorOp) -> Iterable[str]:
    """The tensors of the adapter that go into one tensor of the result."""
    names = [name for lora in op.loras for name in (lora.a, lora.b, lora.magnitude) if name is not None]
    return [*names, op.replaced_by.tensor] if op.replaced_by else names


def _check_not_empty(adapter: Headers) -> None:
    """Refuse an adapter without tensors, or with tensors of no elements."""
    if not adapter:
        raise CheckpointError("the adapter has no tensors; save it again from the training run")
    for tensor, (_, shape) in adapter.items():
        if 0 in shape:
            raise CheckpointError(
                f"{tensor} in the adapter is empty (shape {list(shape)}): it was saved at ZeRO-3 without gathering the "
                "partitions. Nothing of it is left in this file; save again from the training checkpoint"
            )


def _check_quantized(names: Collection[str], base: Headers) -> None:
    """Refuse a base without the tensors that training held in 4 bits."""
    for name in sorted(names):
        if name not in base:
            raise CheckpointError(
                f"the base has no tensor {name}{_similar(name, base)}, but the adapter's gemma_dist.json lists it, or "
                "its module, as quantized; give the base that the adapter was trained on"
            )
        _check_dtype(name, base)


def _expert_weights(base: Headers, target_parameters: Iterable[str]) -> dict[str, str]:
    """Where PEFT keeps the factors of each adapted stack: module as the adapter names it -> tensor of the base.

    PEFT wraps a module once for each adapted parameter, in the order of EXPERT_WEIGHTS: the last stands at the module's
    own path, each one further in has another `.base_layer` in its name.
    """
    endings = tuple(f".{target}" for target in target_parameters)
    adapted: dict[str, list[str]] = {}  # module of experts -> its adapted weights
    for name in base:
        if not f".{name}".endswith(endings):
            continue
        module, _, weight = name.rpartition(".")
        if weight not in EXPERT_WEIGHTS:
            raise CheckpointError(
                f"adapter_config.json: target_parameters names {name}, and only {' and '.join(EXPERT_WEIGHTS)} of "
                "experts are merged. Merge it with PEFT's merge_and_unload"
            )
        adapted.setdefault(module, []).append(weight)
    tensor_of = {}
    for module, weights in adapted.items():
        outermost_first = sorted(weights, key=EXPERT_WEIGHTS.index, reverse=True)
        for depth, weight in enumerate(outermost_first):
            tensor_of[module + ".base_layer" * depth] = f"{module}.{weight}"
    return tensor_of


def _lora(
    module: str,
    name: str,
    found: Mapping[str, str],
    base: Headers,
    adapter: Headers,
    settings: Mapping[str, Any],
    tied_embeddings: bool,
) -> Lora:
    """The adapter tensors of one module, checked against its weight, the tensor `name` of the base.

    Args:
        module: the module's path in the adapter, without PEFT's prefix.
        found: kind of tensor (`lora_A.weight`) -> its name in the adapter.
    """
    any_tensor = next(iter(found.values()))
    if tied_embeddings and module.rpartition(".")[2] in TIED_MODULES:
        raise CheckpointError(
            f"{any_tensor} adapts one of the token embedding and the LM head, which this base ties: the merged weight "
            "would change both. Train without embed_tokens and lm_head among target_modules"
        )
    if name not in base:
        raise CheckpointError(
            f"{any_tensor} in the adapter belongs to {name}, which the base does not have{_similar(name, base)}; "
            "give the base (and the model class) that the adapter was trained on"
        )
    _check_dtype(name, base)
    method, wanted = "LoRA", ["lora_A.weight", "lora_B.weight"]
    if settings.get("use_dora"):
        method, wanted = "DoRA", [*wanted, "lora_magnitude_vector"]
    if sorted(found) != wanted:
        raise CheckpointError(
            f"{PREFIX}{module} in the adapter has {', '.join(sorted(found))}, but {method} needs exactly "
            f"{', '.join(wanted)}; {ADAPTER_CUT_SHORT}"
        )

    target = name.removesuffix(".weight")  # what PEFT matches its patterns with
    rank = by_pattern(settings.get("rank_pattern"), target, settings.get("r", 8))  # PEFT's default
    alpha = by_pattern(settings.get("alpha_pattern"), target, settings.get("lora_alpha", 8))
    weight_shape = base[name][1]
    stacked = target == name  # experts' stacks have no ".weight" in their names
    if len(weight_shape) != 2 + stacked:
        raise CheckpointError(
            f"{name} in the base has shape {list(weight_shape)}; LoRA is merged into matrices and experts' stacks only"
        )
    for kind, shape in _factor_shapes(weight_shape, rank).items():
        if kind in wanted and (actual := adapter[found[kind]][1]) != shape:
            raise CheckpointError(
                f"{found[kind]} in the adapter has shape {list(actual)}; with r = {rank} and {name} of shape "
                f"{list(weight_shape)} in the base it must be {list(shape)}. Give the base that the adapter was "
                "trained on, and its own adapter_config.json"
            )
    return Lora(
        a=found["lora_A.weight"],
        b=found["lora_B.weight"],
        scale=alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank,
        magnitude=found.get("lora_magnitude_vector"),
        num_experts=weight_shape[0] if stacked else None,
    )


def _factor_shapes(weight_shape: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
    """The shape of each kind of adapter tensor beside a weight (out, in), or a stack of them (experts, out, in)."""
    *stack, out_features, in_features = weight_shape
    rows = rank * math.prod(stack)
    return {
        "lora_A.weight": (rows, in_features),
        "lora_B.weight": (out_features, rows),
        "lora_magnitude_vector": (out_features,),
    }


def by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the module's path (`get_pattern_key` of PEFT 0.21)."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _replacements(
    tensors: Iterable[str], base: Headers, adapter: Headers, settings: Mapping[str, Any], tied_embeddings: bool
) -> dict[str, Replacement]:
    """What some tensors of the adapter replace: tensor of the base -> by what."""
    found: dict[str, Replacement] = {}
    for tensor in tensors:
        name, rows = _replaced_tensor(tensor, base, adapter, settings, tied_embeddings)
        if name in found:
            raise CheckpointError(f"{tensor} and {found[name].tensor} both replace {name}; train it one way only")
        found[name] = Replacement(tensor, rows)
    if settings.get("trainable_token_indices") and all(new.rows is None for new in found.values()):
        raise CheckpointError(
            "adapter_config.json: trainable_token_indices lists tokens, but the adapter has no trainable_tokens_delta; "
            f"{ADAPTER_CUT_SHORT}"
        )
    return found


def _replaced_tensor(
    tensor: str, base: Headers, adapter: Headers, settings: Mapping[str, Any], tied_embeddings: bool
) -> tuple[str, tuple[int, ...] | None]:
    """The tensor of the base that one of the adapter replaces, and which rows of it (None: all).

    PEFT saves every module whose path ends with one of `modules_to_save`, with all that is in it, and of an embedding
    the rows of `trainable_token_indices`. Those of a tied one are the LM head's, too, in training as after merging.
    """
    if match := TOKEN_ROWS.fullmatch(tensor):
        name, module = f"{match[1]}.weight", match[1]
        rows = token_indices(settings, module, tensor)
    else:
        name, module, rows = tensor.removeprefix(PREFIX), tensor.removeprefix(PREFIX).rpartition(".")[0], None
        _require_saved_module(tensor, settings)
    tied = module.rpartition(".")[2] in (TIED_MODULES if rows is None else TIED_MODULES[1:])
    if tied_embeddings and tied:
        raise CheckpointError(
            f"{tensor} in the adapter replaces one of the token embedding and the LM head, which this base ties: "
            "the merged weight would change both. Train without embed_tokens and lm_head among modules_to_save, and "
            "single tokens by those of embed_tokens"
        )
    if name not in base:
        raise CheckpointError(
            f"{tensor} in the adapter replaces {name}, which the base does not have{_similar(name, base)}; "
            "give the base that the adapter was trained on"
        )
    shape = base[name][1]
    needed = shape if rows is None else (len(rows), *shape[1:])
    if adapter[tensor][1] != needed or max(rows or [0]) >= shape[0]:
        of_rows = "" if rows is None else f" and is to replace {len(rows)} of its rows, up to {max(rows)}"
        raise CheckpointError(
            f"{tensor} in the adapter has shape {list(adapter[tensor][1])}, {name} in the base {list(shape)}{of_rows}; "
            "give the base that the adapter was trained on, and its own adapter_config.json"
        )
    _check_dtype(name, base)
    return name, rows


def _require_saved_module(tensor: str, settings: Mapping[str, Any]) -> None:
    """Refuse a whole weight that is in none of `modules_to_save`."""
    parts = tensor.removeprefix(PREFIX).split(".")
    paths = [".".join(parts[:end]) for end in range(1, len(parts))]  # of the modules that the tensor is in
    saved = settings.get("modules_to_save") or []
    if not tensor.startswith(PREFIX) or not any(path.endswith(tuple(saved)) for path in paths):
        raise CheckpointError(
            f"{tensor} in the adapter is neither lora_A, lora_B nor lora_magnitude_vector of a linear layer, nor part "
            f"of modules_to_save ({', '.join(saved) or 'none'} in adapter_config.json), so its place in the sum is not "
            "known; train without adapting or resizing embeddings, and save with PEFT's save_pretrained"
        )


def _check_dtype(name: str, base: Headers) -> None:
    """Refuse a tensor of the base whose numbers are not floats of 16 or 32 bits."""
    if base[name][0] not in MERGEABLE_DTYPES:
        raise CheckpointError(
            f"{name} in the base is stored as {base[name][0]}; only {', '.join(MERGEABLE_DTYPES)} can be added to. "
            "Give the base in its original precision, not a quantized copy"
        )


def _similar(name: str, base: Headers) -> str:
    """A hint at a tensor of the base that ends alike, for adapters trained on another wrapper of the same model."""
    tail = "." + ".".join(name.split(".")[-4:])
    match = next((other for other in base if other.endswith(tail)), None)
    return f" (it has {match})" if match else ""
