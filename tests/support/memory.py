"""The peak of a training step's memory, measured in a real run on the CPU and simulated for the same micro-batches."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from gemma_dist.config import RunConfig
from gemma_dist.plan.simulate import Simulated, simulate_step
from gemma_dist.recipe import load_config
from gemma_dist.train.run import train
from gemma_dist.train.trainer import ToolCallTrainer
from tests.support.corpus import row, shard_rows

MEASURED_STEP = 1  # from 0: the first one makes the optimizer's states
TILE = (
    128  # columns of the vocabulary that TRL's head takes at once; its own 32,768 would hide all else of a tiny model
)
Batch = dict[str, Any]  # tensors, and the layout of packs


class Cell(NamedTuple):
    """One tiny run."""

    style: str
    recipe: str
    settings: tuple[str, ...] = ()
    dtype: str = "float32"
    images: bool = False


PACKED = ("packing=true", "packing_length=2048", "per_device_train_batch_size=1", "global_batch_size=2")
IN_BF16 = ("bnb_4bit_compute_dtype=bfloat16",)
CHECKPOINTING = ("gradient_checkpointing=true",)
# One of each kind that takes memory in another way.
CELLS = {
    "full": Cell("e4b", "cpu_full"),
    "full, packed, images": Cell("e4b", "cpu_full", PACKED, images=True),
    "full, fused AdamW": Cell("e4b", "cpu_full", ("optim=adamw_torch_fused", *CHECKPOINTING)),
    "full, AdamW in 8 bits": Cell("e4b", "cpu_full", ("optim=adamw_8bit", *CHECKPOINTING)),
    "LoRA": Cell("e4b", "cpu_lora"),
    "LoRA, no checkpointing, images": Cell("e4b", "cpu_lora", ("gradient_checkpointing=false",), images=True),
    "LoRA, packed": Cell("e4b", "cpu_lora", PACKED),
    "LoRA, packed, images, table on the GPU": Cell("e4b", "cpu_lora", (*PACKED, "model.ple=gpu"), images=True),
    "LoRA, bfloat16": Cell("e4b", "cpu_lora", dtype="bfloat16"),
    "DoRA": Cell("e4b", "cpu_lora", ("use_dora=true",)),
    "QLoRA": Cell("e4b", "cpu_qlora"),
    "QLoRA, packed, bfloat16, images": Cell(
        "e2b", "cpu_qlora", (*PACKED, *IN_BF16, *CHECKPOINTING), dtype="bfloat16", images=True
    ),
    "31b: full, images": Cell("31b", "cpu_full", CHECKPOINTING, images=True),
    "31b: QLoRA, packed, bfloat16": Cell("31b", "cpu_qlora", (*PACKED, *IN_BF16, *CHECKPOINTING), dtype="bfloat16"),
    "26b: LoRA": Cell("26b", "cpu_lora"),
    "26b: full, packed": Cell("26b", "cpu_full", PACKED),
    "26b: QLoRA, experts in 4 bits": Cell("26b", "cpu_qlora", (*PACKED, *CHECKPOINTING)),
    "26b: QLoRA, experts in 4 bits adapted": Cell(
        "26b", "cpu_qlora", ("target_parameters=[experts.gate_up_proj,experts.down_proj]", *CHECKPOINTING)
    ),
    "12b: LoRA, packed, images": Cell("12b", "cpu_lora", PACKED, images=True),
    "12b: QLoRA, bfloat16, images": Cell("12b", "cpu_qlora", (*IN_BF16, *CHECKPOINTING), dtype="bfloat16", images=True),
}


class Compared(NamedTuple):
    """What a cell took, and what was foreseen."""

    measured: int  # bytes
    simulated: Simulated

    @property
    def error(self) -> float:
        return self.simulated.peak_bytes / self.measured - 1


def compare(cell: Cell, model: Path, shards: Path, out: Path) -> Compared:
    """Run a cell, and simulate the measured step of it."""
    paths = [f"model_name_or_path={model}", f"data.train={shards}", f"output_dir={out}"]
    settings = ["max_steps=2", "dataloader_num_workers=0", f"model.dtype={cell.dtype}", *cell.settings]
    config = load_config(Path(f"launch/{cell.recipe}.yaml"), [*paths, *settings])
    with patch("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", TILE):
        measured, batches = measure(config)
        return Compared(measured, simulate_step(config, batches, device="cpu"))


def measure(config: RunConfig) -> tuple[int, list[Batch]]:
    """The peak of a run's second step in bytes, by the events of torch's allocator, and the micro-batches of it."""
    trainers: list[Any] = []

    class MeasuredTrainer(ToolCallTrainer):
        measured = 0
        batches: list[Batch]

        def get_batch_samples(self, *args: Any) -> Any:
            batches, num_items = super().get_batch_samples(*args)
            if self.state.global_step == MEASURED_STEP:
                # All of the step are there before it begins, so that none comes at a moment of its own choice.
                batches = list(batches)
                self.batches = [dict(batch) for batch in batches]
                self.resting = sum(_storages(resting_tensors(self.model, self.optimizer, self.batches)).values())
                self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
                self.profile.start()
            return batches, num_items

        def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
            if self.state.global_step == MEASURED_STEP + 1 and not self.measured:
                self.profile.stop()
                self.measured = self.resting + peak_of(self.profile)
            super()._maybe_log_save_evaluate(*args, **kwargs)

        def train(self, *args: Any, **kwargs: Any) -> object:
            trainers.append(self)
            return super().train(*args, **kwargs)

    train(config, trainer_class=MeasuredTrainer)
    return trainers[0].measured, trainers[0].batches


def resting_tensors(model: Any, optimizer: Any, batches: list[Batch]) -> Iterator[torch.Tensor]:
    """All tensors that a trainer holds between two steps."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        while state is not None:
            yield from (tensor for tensor in vars(state).values() if isinstance(tensor, torch.Tensor))
            state = state.state2
    for states in optimizer.state.values():
        yield from (tensor for tensor in states.values() if isinstance(tensor, torch.Tensor))
    for batch in batches:
        yield from (value for value in batch.values() if torch.is_tensor(value))


def _storages(tensors: Iterator[torch.Tensor]) -> dict[int, int]:
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def peak_of(profiled: Any) -> int:
    """The most bytes that were allocated on top of those at the start."""
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def write_shards(folder: Path, model: Path, *, images: bool) -> Path:
    """Rows of several hundred tokens, a third of them with images or none."""
    numbers = [number for number in range(36) if images or number % 3]
    folder.mkdir()
    shard_rows(folder, str(model), [row(number, num_calls=2 if images else 6 + number % 3) for number in numbers])
    return folder / "shards"
