"""Log-probabilities of target tokens, from the hidden states, by the kernels of TRL's fused LM head.

TRL's own head finds the targets on the device: on CUDA it chooses hidden states by a mask, forward and backward, and
waits each time (on the CPU it scores all positions instead, so nobody sees it there). Here the host says where they
are, before the micro-batch is sent, so that nothing waits, and all devices run the same code but for the kernels that
fold a tile of logits: Triton's on CUDA, torch's on a CPU (`trl/kernels/chunked_logprob.py`).
"""

import types
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from gemma_dist.model.zero3 import gathered

# Of a micro-batch: where its K targets are predicted, which tokens they are, and of which kind (`data/kinds.py`).
POSITIONS, IDS, KINDS = "target_positions", "target_ids", "target_kinds"
WEIGHTS = "target_weights"  # of those that have some: float32 (K,), by which their losses are multiplied
OUTPUTS = ("log_probs", "entropy", "is_top1")


def inputs_of_model(batch: dict[str, Any]) -> dict[str, Any]:
    """What of a micro-batch the model is given: not what its loss alone is reckoned by."""
    return {name: value for name, value in batch.items() if name not in (KINDS, WEIGHTS)}


def use_target_head(model: Any) -> None:
    """Let `model(…, target_positions=…, target_ids=…)` of a `Gemma4ForConditionalGeneration` return TRL's
    `FusedCausalLMOutput` with `log_probs`, `entropy` and `is_top1`, each (K,), in the place of logits.

    To be called before a model is wrapped, and where an adapter is on it, for its base.
    """
    others = model.forward

    def forward(
        self: Any, *args: Any, target_positions: torch.Tensor | None = None, target_ids: Any = None, **kwargs: Any
    ) -> Any:
        if target_positions is None:
            return others(*args, **kwargs)
        kwargs.setdefault("use_cache", False)
        kwargs.pop("labels", None)  # PEFT's None
        hidden = self.model(*args, **kwargs).last_hidden_state
        return score(self, hidden.flatten(0, 1).index_select(0, target_positions), target_ids)

    model.forward = types.MethodType(forward, model)


def score(model: Any, hidden: torch.Tensor, ids: torch.Tensor) -> Any:
    """How likely each of the K tokens `ids` is behind its hidden state, of `hidden` (K, width). K may be 0: the result
    is connected to the model all the same, so that every rank has gradients."""
    from trl.trainer import utils

    text, weight = model.config.get_text_config(), model.get_output_embeddings().weight
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
    with utils.maybe_gather_lm_head_ctx(weight), gathered(weight):
        found = utils._ChunkedLogProbFunction.apply(
            hidden,
            weight,
            None,  # no bias
            ids,
            1.0,  # temperature
            utils._CHUNKED_LOGPROB_CHUNK_SIZE,
            text.final_logit_softcapping,
            1.0,  # scale of the logits
            OUTPUTS,
        )
    log_probs, entropy, _, _, is_top1 = found
    return utils.FusedCausalLMOutput(log_probs=log_probs, entropy=entropy, is_top1=is_top1)
