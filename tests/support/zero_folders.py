"""Folders that DeepSpeed's engine wrote, as TRL, axolotl and LLaMA-Factory have it do, and what the engine then held.

    python -m tests.support.zero_folders MODEL OUT NUM_RANKS:CASE…

Makes OUT/NUM_RANKS-CASE/global_step1 and, beside it, held.safetensors. The ranks are forks of one process, which has
imported all that they need.
"""

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import torch

from tests.support.ranks import ENVIRONMENT, REPOSITORY


class Case(NamedTuple):
    """How a model is trained."""

    stage: int
    dtype: str = "bfloat16"  # of the module; the optimizer's weights are float32
    lora: bool = False
    excludes_frozen: bool = False  # as Trainer has it for an adapter
    zero: Mapping[str, Any] = MappingProxyType({})  # settings of ZeRO
    deepspeed: Mapping[str, Any] = MappingProxyType({})  # and others


CASES = {
    "zero0": Case(0, "float32"),
    "zero0-lora": Case(0, "float32", lora=True),
    "zero1": Case(1),
    "zero1-float32": Case(1, "float32"),
    "zero1-bf16-optimizer": Case(1, deepspeed={"data_types": {"grad_accum_dtype": "fp32"}}),
    "zero2": Case(2),
    "zero2-round-robin": Case(2, zero={"round_robin_gradients": True}),
    "zero3": Case(3),
    "zero3-float32": Case(3, "float32"),
    "zero1-lora": Case(1, lora=True),
    "zero2-lora": Case(2, lora=True, excludes_frozen=True),
    "zero2-alone": Case(2, excludes_frozen=True),
    "zero3-lora": Case(3, lora=True),
    "zero3-lora-alone": Case(3, lora=True, excludes_frozen=True),
}


def write_zero_folders(model: Path, out: Path, *cases: str) -> Path:
    """Run this file as a process, and give `out`."""
    words = [sys.executable, "-m", "tests.support.zero_folders", str(model), str(out), *cases]
    run = subprocess.run(
        words, cwd=REPOSITORY, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-8000:]
    return out


def _model(folder: Path, case: Case) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, case.dtype))
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.75)  # a reloaded default would have 1
    if case.lora:
        targets = r"model\.language_model\..*\.(q_proj|o_proj|down_proj)"
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        return model
    for name, parameter in model.named_parameters():  # odd sizes in both halves, and tensors that no rank trains
        parameter.requires_grad = "vision_tower" not in name and "layers.1." not in name
    return model


def _train(rank: int, folder: Path, out: Path, case: Case) -> None:
    """One step of a case on one rank, and what it leaves."""
    import deepspeed

    torch.manual_seed(0)
    model = _model(folder, case)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [{"params": [one for one in trained if one.ndim > 1]}]
    rest = [one for one in trained if one.ndim <= 1]
    groups = decayed + ([{"params": rest, "weight_decay": 0.0}] if rest else [])
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(groups, lr=1e-3),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": case.stage, "stage3_param_persistence_threshold": 200, **case.zero},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": case.dtype == "bfloat16"},
            **case.deepspeed,
        },
    )
    ids = torch.arange(50, 66)[None] + rank
    loss = engine(input_ids=ids, mm_token_type_ids=torch.zeros_like(ids), labels=ids).loss
    engine.backward(loss)
    engine.step()
    engine.save_checkpoint(str(out), exclude_frozen_parameters=case.excludes_frozen)
    held = _held(engine, case)
    if rank == 0:
        from safetensors.torch import save_file

        save_file(held, out / "held.safetensors")
        if case.lora:
            engine.module.peft_config["default"].save_pretrained(str(out))
        else:
            model.config.dtype = getattr(torch, case.dtype)
            model.config.save_pretrained(out)


def _held(engine: Any, case: Case) -> dict[str, torch.Tensor]:
    """Each parameter once, gathered, in float32 where the optimizer has it so, and each buffer that is saved."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    found: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        # Of round-robin gradients it gives the values of other parameters (DeepSpeed 0.19.8): take the module's.
        knows = parameter.requires_grad and case.stage and not case.zero
        whole = safe_get_full_fp32_param(parameter) if knows else None
        if whole is None:
            with GatheredParameters([parameter], enabled=case.stage == 3):
                whole = parameter.detach().clone()
        found[name] = whole.detach().cpu().clone().contiguous()
    saved = engine.module.state_dict().keys()
    buffers = {name: buffer.clone() for name, buffer in engine.module.named_buffers() if name in saved}
    return found | buffers


def main(folder: Path, out: Path, cases: list[str]) -> int:
    """Fork the ranks of each case and wait for them; how they ended."""
    import deepspeed  # noqa: F401 (before the forks, so that it is imported once)
    import peft  # noqa: F401
    import transformers
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    transformers.AutoModelForImageTextToText  # noqa: B018 (imported when first named)
    transformers.Gemma4ForConditionalGeneration  # noqa: B018
    ShareMemCommBuilder().load()  # else each rank asks the compiler whether it is up to date
    return max(_run(folder, out, *case.split(":")) for case in cases)


def _run(folder: Path, out: Path, num_ranks: str, name: str) -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    children = []
    for rank in range(int(num_ranks)):
        if child := os.fork():
            children.append(child)
            continue
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": num_ranks, **address}
        _rank(rank, folder, out / f"{num_ranks}-{name}", CASES[name])
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def _rank(rank: int, folder: Path, out: Path, case: Case) -> NoReturn:
    """One of the forks: it never returns into the code of its parent."""
    code = 1
    try:
        import deepspeed

        deepspeed.init_distributed("gloo")
        _train(rank, folder, out, case)
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
