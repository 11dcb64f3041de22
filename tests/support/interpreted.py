"""The Triton kernels of TRL's fused head, run by Triton's interpreter on CPU tensors, beside the CPU's own path.

    TRITON_INTERPRET=1 python -m tests.support.interpreted MODEL OUT

Triton asks for the variable when it is imported, so this is a process of its own. It writes to OUT (JSON) how far the
two are apart: of the kernels alone, and of a micro-batch of the tiny Gemma 4 in MODEL.
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

# Neither the hidden size nor the vocabulary is a multiple of a block (1,024) or a tile; two tiles of the vocabulary.
HIDDEN, VOCABULARY, TILE = 75, 2500, 1536
SOFTCAP = 30.0  # Gemma 4's final_logit_softcapping
NAMES = ("log_probs", "entropy", "is_top1", "gradient of hidden states", "gradient of the head")
CASES: list[tuple[str, int, float | None]] = [
    (dtype, targets, SOFTCAP) for dtype in ("float32", "bfloat16") for targets in (0, 1, 20)
]
CASES.append(("float32", 20, None))


def of_kernels(dtype: str, num_targets: int, softcap: float | None) -> dict[str, float]:
    """The largest difference of each result, relative to its largest value."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_targets, HIDDEN, generator=generator).to(getattr(torch, dtype))
    weight = (0.5 * torch.randn(VOCABULARY, HIDDEN, generator=generator)).to(getattr(torch, dtype))
    targets = torch.randint(VOCABULARY, (num_targets,), generator=generator)
    some = num_targets // 2
    targets[:some] = (hidden @ weight.t()).float().argmax(1)[:some]  # the most likely ones
    found = [_run(triton, hidden, weight, targets, softcap) for triton in (False, True)]
    return {name: _apart(*pair) for name, pair in zip(NAMES, zip(*found, strict=True), strict=True)}


def _run(triton: bool, hidden: Any, weight: Any, targets: Any, softcap: float | None) -> list[torch.Tensor]:
    from trl.kernels import chunked_logprob

    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with patch.object(chunked_logprob, "_use_triton", lambda device: triton):
        log_probs, entropy, _, _, is_top1 = chunked_logprob.ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, TILE, softcap, 1.0, ("log_probs", "entropy", "is_top1")
        )
        (-log_probs.sum() / 7).backward()
    return [log_probs.detach(), entropy.detach(), is_top1, hidden.grad, weight.grad]


def _apart(here: torch.Tensor, there: torch.Tensor) -> float:
    assert here.shape == there.shape, (here.shape, there.shape)
    if not here.numel():
        return 0.0
    return float((here.double() - there.double()).abs().max() / here.double().abs().max().clamp(min=1e-30))


def of_model(path: str, num_targets: int) -> dict[str, Any]:
    """One micro-batch through a whole model with our head by both kernels, and with TRL's by Triton's: the differences
    of loss and gradients, and what each waits for."""
    from transformers import AutoModelForImageTextToText
    from trl.trainer.utils import add_fused_lm_head

    from gemma_dist.model.head import IDS, POSITIONS, use_target_head
    from gemma_dist.model.load import prepare_for_micro_batches
    from gemma_dist.model.rows import PADDED_RIGHT
    from gemma_dist.train.feed import targets_of

    model: Any = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=False)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    use_target_head(model)
    prepare_for_micro_batches(model, packing=False)
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(64, 250, (2, 12), generator=generator)
    labels = torch.full_like(input_ids, -100)
    labels[:, 12 - num_targets :] = input_ids[:, 12 - num_targets :]
    targets = targets_of(labels, (labels != -100).to(torch.uint8))
    inputs = {"input_ids": input_ids, "mm_token_type_ids": torch.zeros_like(input_ids), PADDED_RIGHT: True}
    ours = inputs | {name: targets[name] for name in (POSITIONS, IDS)}
    trls = inputs | {"labels": labels, "fused_lm_head": True}
    (loss, gradients, _), (by_triton, of_triton, waits), (of_trl, trls_gradients, trls_waits) = (
        _step(model, batch, triton) for batch, triton in ((ours, False), (ours, True), (trls, True))
    )
    return {
        "targets": len(targets[IDS]),
        "loss": abs(by_triton - loss),
        "loss of TRL's": abs(of_trl - loss),
        "gradients": max(map(_apart, gradients, of_triton)),
        "gradients of TRL's": max(map(_apart, gradients, trls_gradients)),
        "waits": waits,
        "waits of TRL's": trls_waits,
    }


def _step(model: Any, batch: dict[str, Any], triton: bool) -> tuple[float, list[torch.Tensor], int]:
    """Loss, gradients, and the waits for the device."""
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    from tests.support.counting import Counted

    model.zero_grad()
    with (
        patch.object(chunked_logprob, "_use_triton", lambda device: triton),
        patch.object(utils, "_use_triton", lambda device: triton),
        patch.object(chunked_logprob, "_forward_kernel", _Uncounted(chunked_logprob._forward_kernel)),
        patch.object(chunked_logprob, "_backward_kernel", _Uncounted(chunked_logprob._backward_kernel)),
        Counted() as counts,
    ):
        loss = -model(**batch).log_probs.sum()
        loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return float(loss), [gradient.clone() for gradient in gradients], counts.waits.total()


class _Uncounted:
    """A kernel whose interpreter's own doings are no waits."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            with torch.utils._python_dispatch._disable_current_modes():
                self._kernel[grid](*args, **kwargs)

        return launch


def main() -> None:
    model, out = sys.argv[1:]
    found: dict[str, Any] = {str(case): of_kernels(*case) for case in CASES}
    found |= {f"model, {targets} targets a row": of_model(model, targets) for targets in (0, 1, 5)}
    Path(out).write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
