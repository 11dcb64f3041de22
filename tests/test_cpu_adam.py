"""DeepSpeed's CPU Adam, which steps where the optimizer is offloaded: it is as near to the exact step as torch's AdamW,
and a resumed run cannot tell that it was interrupted."""

import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from gemma_dist import logs
from gemma_dist.errors import ConfigError
from gemma_dist.model.operators import compile_operators
from gemma_dist.topology import read_topology
from gemma_dist.train.optimizer import recount_steps
from tests.support.ranks import needs_compiler

NUM_STEPS, NUM_WEIGHTS = 60, 1003  # no multiple of what a vector instruction takes
Run = tuple[torch.optim.Optimizer, torch.nn.Parameter]


def torchs(dtype: torch.dtype = torch.float32, betas: tuple[float, float] = (0.9, 0.999)) -> Run:
    """AdamW with a weight of the size that initial weights have."""
    start = 0.02 * torch.randn(NUM_WEIGHTS, generator=torch.Generator().manual_seed(0))
    weight = torch.nn.Parameter(start.to(dtype))
    return torch.optim.AdamW([weight], lr=1e-3, betas=betas, eps=1e-8, weight_decay=0.1), weight


def deepspeeds(betas: tuple[float, float] = (0.9, 0.999)) -> Run:
    """As accelerate makes it out of torch's."""
    from accelerate.utils.deepspeed import map_pytorch_optim_to_deepspeed

    optimizer, weight = torchs(betas=betas)
    return map_pytorch_optim_to_deepspeed(optimizer), weight


def walk(run: Run, steps: range) -> torch.Tensor:
    """The weight after `steps`, with gradients of sizes from 1e-6 to 1."""
    optimizer, weight = run
    for step in steps:
        random = torch.Generator().manual_seed(step)
        sizes = 10 ** (-6 * torch.rand(NUM_WEIGHTS, generator=random))
        weight.grad = (torch.randn(NUM_WEIGHTS, generator=random) * sizes).to(weight.dtype)
        optimizer.step()
    return weight.detach().clone()


@needs_compiler
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95)])
def test_it_is_as_near_to_the_exact_steps_as_torch(betas: tuple[float, float]) -> None:
    start = torchs()[1].detach().double()
    exact = walk(torchs(torch.float64, betas), range(NUM_STEPS))

    def distance(weight: torch.Tensor) -> float:
        return float((weight.double() - exact).norm() / (exact - start).norm())

    run = deepspeeds(betas)
    assert type(run[0]).__name__ == "DeepSpeedCPUAdam"
    found, expected = distance(walk(run, range(NUM_STEPS))), distance(walk(torchs(betas=betas), range(NUM_STEPS)))
    print(f"of the way that {NUM_STEPS} exact steps went: DeepSpeed {found:.0e}, torch {expected:.0e}")
    assert expected < 1e-5, "the measure: torch rounds"
    assert found < 1e-5


@needs_compiler
def test_resumed_it_steps_as_if_it_had_never_stopped() -> None:
    before, after = range(NUM_STEPS // 2), range(NUM_STEPS // 2, NUM_STEPS)
    optimizer, weight = run = deepspeeds()
    half, saved = walk(run, before), {}
    for name, value in optimizer.state[weight].items():
        saved[name] = value.clone() if torch.is_tensor(value) else value
    whole = walk(run, after)

    def resumed(finish: Callable[[torch.optim.Optimizer], None]) -> torch.Tensor:
        optimizer, weight = run = deepspeeds()
        weight.data.copy_(half)
        for name, value in saved.items():
            optimizer.state[weight][name] = value.clone() if torch.is_tensor(value) else value
        finish(optimizer)
        return walk(run, after)

    assert torch.equal(resumed(recount_steps), whole)
    assert not torch.equal(resumed(lambda _: None), whole), "recount_steps is not needed any more: remove it"


@needs_compiler
def test_what_is_compiled_is_said_once_and_before_anything_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from deepspeed.ops.op_builder.cpu.builder import CPUOpBuilder

    topology = read_topology(Path("accelerate_configs/cpu_zero3_offload.yaml"))

    def said(*, train: bool) -> list[str]:
        caplog.clear()
        with (
            caplog.at_level("INFO", "gemma_dist"),
            patch.multiple(logs.log, propagate=True, handlers=[]),  # another test may have left its own
        ):
            compile_operators(topology, train=train)
        ours = [record for record in caplog.records if record.name == "gemma_dist"]
        return [record.getMessage().partition(", once")[0] for record in ours]

    def compiled(builder: CPUOpBuilder) -> None:
        (tmp_path / builder.name / f"{builder.name}.so").touch()

    exchanges, adam = "DeepSpeed compiles exchanges between CPU processes", "DeepSpeed compiles its CPU Adam"
    with (
        patch.dict("os.environ", TORCH_EXTENSIONS_DIR=str(tmp_path), DS_ACCELERATOR="cpu"),
        patch.object(CPUOpBuilder, "load", compiled),
    ):
        assert said(train=False) == [exchanges]
        assert said(train=True) == [adam]
        assert said(train=True) == []


def test_without_a_compiler_a_launch_that_needs_one_is_refused(tmp_path: Path) -> None:
    topology = read_topology(Path("accelerate_configs/cpu_zero3_offload.yaml"))
    with (
        patch.dict("os.environ", TORCH_EXTENSIONS_DIR=str(tmp_path), DS_ACCELERATOR="cpu"),
        patch.object(shutil, "which", lambda _: None),
        pytest.raises(ConfigError, match=r"exchanges between CPU processes with g\+\+, which is not there: install it"),
    ):
        compile_operators(topology, train=True)
    compile_operators(read_topology(Path("accelerate_configs/cpu_ddp.yaml")), train=True)  # needs none
