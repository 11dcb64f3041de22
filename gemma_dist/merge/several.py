"""Several adapters added to one base: W + w1 * s1 * B1 @ A1 + w2 * s2 * B2 @ A2 + …, in float32, rounded once.

That is what PEFT computes where it merges adapters into a float32 base one after the other, each with its `set_scale`.
What has no such sum is refused: a weight that was replaced cannot be replaced twice, nor by half.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

from gemma_dist.errors import CheckpointError, setting
from gemma_dist.merge.folders import SIDE_FILES, Adapter, BaseWeights
from gemma_dist.merge.plan import TensorOp


def require_alike(adapters: Sequence[Adapter], base_weights: BaseWeights) -> None:
    """Refuse adapters that were not trained on one and the same base, or that bring along different files.

    Raises:
        CheckpointError: two of them differ in it.
    """
    for first, other in combinations(adapters, 2):
        both = f"{first.folder} and {other.folder}"
        hashes = {str(one.record.get("base_weights_hash") or "") for one in (first, other) if one.record} - {""}
        if len(hashes) > 1:
            raise CheckpointError(
                f"{both} were trained on different bases (base_weights_hash {' and '.join(sorted(hashes))}); "
                "give adapters of one base"
            )
        held = [one.record.get("quantization") if one.record else None for one in (first, other)]
        if base_weights == "as_trained" and held[0] != held[1]:
            raise CheckpointError(
                f"{both} were trained on a base that was held differently (quantization in their gemma_dist.json), so "
                f"there is no base that both correct; use {setting('base_weights', 'original')}"
            )
        for name in SIDE_FILES:
            paths = [one.folder / name for one in (first, other)]
            if all(path.is_file() for path in paths) and paths[0].read_bytes() != paths[1].read_bytes():
                raise CheckpointError(
                    f"{both} have a {name} each, and these differ; take the one that the result is not to have out of "
                    "its adapter's folder"
                )


def require_comparable(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters that PEFT (0.21), whose logits are compared with, does not hold at the same time.

    Raises:
        CheckpointError: they are such adapters.
    """
    experts = {tuple(sorted(one.settings.get("target_parameters") or ())) for one in adapters} - {()}
    with_tokens = [one.folder for one in adapters if one.settings.get("trainable_token_indices")]
    if len(experts) > 1 or len(with_tokens) > 1:
        kind = "different target_parameters" if len(experts) > 1 else "several with trainable_token_indices"
        raise CheckpointError(
            f"{' and '.join(str(one.folder) for one in adapters)}: PEFT does not hold adapters with {kind} at once, so "
            "their sum cannot be verified; verify each adapter alone, and merge them together without verifying"
        )


def combine(plans: Sequence[list[TensorOp]], weights: Sequence[float], names: Sequence[str]) -> list[TensorOp]:
    """One `TensorOp` for each tensor of the base, from those of each adapter alone.

    Args:
        weights: of the adapters; each multiplies its adapter's scale.
        names: of the adapters, for messages.

    Raises:
        CheckpointError: an adapter has no such share in the sum.
    """
    for name, weight, ops in zip(names, weights, plans, strict=True):
        _require_sum(name, weight, ops, alone=len(plans) == 1)
    return [_combined(ops, weights, names) for ops in zip(*plans, strict=True)]


def _require_sum(name: str, weight: float, ops: Sequence[TensorOp], *, alone: bool) -> None:
    """Refuse a weight, or company, for an adapter that does not only add."""
    if any(lora.magnitude is not None for op in ops for lora in op.loras) and not (alone and weight == 1):
        raise CheckpointError(
            f"{name} is a DoRA adapter, which sets the length of each row anew: it has no weight (here {weight:g}) "
            "and no place beside other adapters; merge it alone, with weight 1"
        )
    replaced = next((op for op in ops if op.replaced_by is not None), None)
    if replaced is not None and weight != 1:
        raise CheckpointError(
            f"{name} replaces {replaced.name}, which has no weight (here {weight:g}); give it weight 1"
        )


def _combined(ops: Sequence[TensorOp], weights: Sequence[float], names: Sequence[str]) -> TensorOp:
    """What becomes of one tensor when each adapter has done its part."""
    loras, replacements = [], []
    for number, (op, weight) in enumerate(zip(ops, weights, strict=True)):
        loras += [replace(lora, scale=weight * lora.scale, adapter=number) for lora in op.loras]
        if op.replaced_by is not None:
            replacements.append(replace(op.replaced_by, adapter=number))
    changing = [name for name, op in zip(names, ops, strict=True) if op.loras or op.replaced_by]
    if replacements and len(changing) > 1:
        raise CheckpointError(
            f"{ops[0].name} is replaced by {names[replacements[0].adapter]} and changed by "
            f"{' and '.join(name for name in changing if name != names[replacements[0].adapter])} too; "
            "merge adapters that change different tensors, or add to the same ones"
        )
    replaced_by = replacements[0] if replacements else None
    return replace(ops[0], quantized=all(op.quantized for op in ops), loras=tuple(loras), replaced_by=replaced_by)
