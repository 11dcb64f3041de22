"""One rank of the parity matrix: trains the cells of one launch, one after the other, through the same function as
`gemma-dist train`, and writes down what came out.

    accelerate launch --config_file accelerate_configs/cpu_zero3.yaml -m tests.parity.worker FOLDER LAUNCH

FOLDER/<LAUNCH>.cells.json lists the cells. Each leaves FOLDER/<name>/: `out` as training writes it, `gradients` of
step 1 (averaged over the ranks, before clipping) and `logits` of the trained model on the probe, as safetensors, and
`saved-<rank>.jsonl`, how many tensors and bytes of the model this rank held ready for each checkpoint.
"""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from datasets import Dataset, Features, Image, Json, List
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed
from trl import SFTConfig, SFTTrainer

from gemma_dist import world
from gemma_dist.data.images import decode_image
from gemma_dist.data.trajectory import Trajectory
from gemma_dist.recipe import load_config
from gemma_dist.resolve import Run, resolve
from gemma_dist.stream.collate import Sample, collate, control_ids
from gemma_dist.stream.loader import TrajectoryLoader, count_targets
from gemma_dist.stream.schedule import Schedule
from gemma_dist.topology import current_topology
from gemma_dist.train import trainer as trainer_module
from gemma_dist.train.feed import known_to_host
from gemma_dist.train.run import train
from gemma_dist.train.trainer import ToolCallTrainer, training_arguments
from tests.parity.bench import NUM_STEPS, RESULT, Task, four_bits

Tensors = Mapping[str, torch.Tensor]


class Observer:
    """Of a trainer: writes down the gradients between the last backward pass of step 1 and the optimizer."""

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)  # type: ignore[misc]
        if self.is_deepspeed_enabled:
            engine, step = self.model_wrapped, self.model_wrapped.step

            def observed_step() -> None:
                self._observe()
                step()

            engine.step = observed_step
        return prepared

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        if not self.is_deepspeed_enabled:
            self._observe()
        return super()._clip_grad_norm(model)  # type: ignore[misc]

    def _observe(self) -> None:
        if self.state.global_step:
            return
        from deepspeed.utils import safe_get_full_grad

        gradients = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                gradient = safe_get_full_grad(parameter) if self.is_deepspeed_enabled else parameter.grad
                gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                if gradient is not None:  # of TRL's text-only steps the vision tower has none
                    gradients[name] = gradient.detach().float().clone().contiguous()
        if world.rank() == 0:
            save_file(gradients, self.folder / "gradients.safetensors")

    @property
    def folder(self) -> Path:
        """Of the cell."""
        return Path(self.args.output_dir).parent

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # the trainer's


class ObservedPeer(Observer, SFTTrainer):
    """TRL's trainer, observed."""


class ObservedTrainer(Observer, ToolCallTrainer):
    """Ours, observed: also what each rank holds ready to save, and the logits of the trained model."""

    def __init__(self, *args: Any, task: Task, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.task = task
        copy = self.accelerator.get_state_dict  # with which Trainer would copy the whole model; that counts, too
        self.accelerator.get_state_dict = lambda *args, **kwargs: self._note_held(copy(*args, **kwargs))

    def get_train_dataloader(self) -> DataLoader:
        if not self.task["packs_as_rows"]:
            return super().get_train_dataloader()
        config = load_config(self.task["recipe"], [*self.task["overrides"], *self.task["packs_as_rows"]])
        self.packed = resolve(config, current_topology()).schedule
        batches: Any = list(
            packs_as_rows(self.packed, self.loader)
        )  # a list is a dataset, says DataLoader, not its types
        return DataLoader(batches, batch_size=None)

    def _count_targets(self, step: int) -> tuple[int, float]:
        return count_targets(self.packed, step) if self.task["packs_as_rows"] else super()._count_targets(step)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        result = super().train(*args, **kwargs)
        model = self.model_wrapped
        if self.run.topology.fsdp is not None:
            assert all(isinstance(parameter, DTensor) for parameter in model.parameters()), "not sharded"
        model.eval()  # of DeepSpeed it returns nothing
        with torch.no_grad():
            logits = model(**load_file(self.task["probe"])).logits
        if world.rank() == 0:
            save_file({"logits": logits.float().contiguous()}, self.folder / "logits.safetensors")
        return result

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        gather = trainer_module.weights_to_save
        with patch.object(trainer_module, "weights_to_save", lambda *args: self._note_held(gather(*args))):
            super().save_model(*args, **kwargs)

    def _note_held(self, tensors: Tensors) -> Tensors:
        num_bytes = {(tensor.data_ptr(), tensor.shape): tensor.nbytes for tensor in tensors.values()}  # tied ones once
        with (self.folder / f"saved-{world.rank()}.jsonl").open("a") as file:
            file.write(json.dumps({"tensors": len(num_bytes), "bytes": sum(num_bytes.values())}) + "\n")
        return tensors


def packs_as_rows(schedule: Schedule, loader: TrajectoryLoader) -> Iterator[dict[str, Any]]:
    """The micro-batches of one process under a packed `schedule`, each trajectory in a row of its own."""
    ids = control_ids(loader.encoder.processor)
    for step in range(NUM_STEPS):
        for packs in schedule.micro_batches(step, 0):
            samples = []
            for index in (index for pack in packs for index in pack):
                trajectory = schedule.shards.read(index)
                pixels = loader.encoder.pixels(trajectory.images) if trajectory.images else {}
                samples.append(
                    Sample(schedule.shards.id(index), loader.encoder.encode(trajectory), pixels, trajectory.weight)
                )
            yield known_to_host(collate(samples, ids, filler=loader.filler))


def train_with_trl(folder: Path, task: Task) -> None:
    """Train as TRL's documentation would have it: `SFTTrainer` over a dataset with the columns messages, tools and
    images. It gets our order of trajectories, and all settings of the recipe that it knows."""
    config = load_config(task["recipe"], [*task["overrides"], f"output_dir={folder / 'out'}"])
    run = resolve(config, current_topology())
    arguments = trl_arguments(run)  # at ZeRO-3 they partition the weights on loading
    quantization = None
    if config.quantization:
        quantization = four_bits(getattr(torch, config.quantization.bnb_4bit_compute_dtype))
    set_seed(config.train.seed)
    model = AutoModelForImageTextToText.from_pretrained(
        config.model.model_name_or_path,
        dtype=getattr(torch, config.model.dtype),
        quantization_config=quantization,
        trust_remote_code=False,
    )
    if task["peer"] == "trl-token-weighted":
        model.accepts_loss_kwargs = True
    trainer = ObservedPeer(
        model=model,
        args=arguments,
        train_dataset=trl_dataset(run.schedule),
        processing_class=AutoProcessor.from_pretrained(config.model.model_name_or_path, trust_remote_code=False),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **config.lora.model_dump()) if config.lora else None,
    )
    trainer.train()
    if world.rank() == 0:
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        lines = [json.dumps({"loss": step["loss"], "grad_norm": step["grad_norm"]}) for step in steps]
        (folder / "out").mkdir(exist_ok=True)
        (folder / "out" / "metrics.jsonl").write_text("\n".join(lines))


def trl_dataset(schedule: Schedule) -> Dataset:
    """The trajectories of all steps, in order."""
    samples = [sample for step in range(NUM_STEPS) for sample in schedule.global_batch(step)]
    trajectories = [schedule.shards.read(sample) for sample in samples]
    rows: list[dict[str, Any]] = [{"messages": one.messages, "tools": one.tools} for one in trajectories]
    columns: dict[str, Any] = {"messages": Json(), "tools": Json()}  # as Arrow structs, calls would gain null arguments
    if any(one.images for one in trajectories):
        columns["images"] = List(Image())
        for row, trajectory in zip(rows, trajectories, strict=True):
            row["images"] = decoded_images(trajectory)
    return Dataset.from_list(rows, features=Features(columns))


def decoded_images(trajectory: Trajectory) -> list[Any]:
    return [decode_image(image) for image in trajectory.images]


def trl_arguments(run: Run) -> SFTConfig:
    """The settings of a recipe as a user of TRL would write them."""
    ours = training_arguments(run)
    names = ("learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "bf16", "optim", "adam_beta2", "seed")
    return SFTConfig(
        output_dir=ours.output_dir,
        per_device_train_batch_size=run.plan.per_device_train_batch_size,
        gradient_accumulation_steps=run.plan.gradient_accumulation_steps,
        activation_checkpointing=run.config.train.gradient_checkpointing,
        max_length=None,
        train_sampling_strategy="sequential",
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **{name: getattr(ours, name) for name in names},
    )


def train_cell(folder: Path, task: Task) -> None:
    """Train with the trainer of `task`, and write what it is judged by."""
    if task["peer"]:
        train_with_trl(folder, task)
        return
    config = load_config(task["recipe"], [*task["overrides"], f"output_dir={folder / 'out'}"])
    make_trainer: Callable[..., ToolCallTrainer] = partial(ObservedTrainer, task=task)
    with contextlib.ExitStack() as patches:
        patches.enter_context(patch.object(world, "disconnect"))  # the next cell needs the process group
        if task["whole"]:
            patches.enter_context(patch.object(Run, "unneeded_towers", ()))
        train(config, trainer_class=make_trainer)


def main() -> None:
    root, launch = Path(sys.argv[1]), sys.argv[2]
    for name, task in json.loads((root / f"{launch}.cells.json").read_text()).items():
        folder = root / name
        AcceleratorState._reset_state()  # the process group stays; what a launch decides is read from its config again
        try:
            train_cell(folder, task)
            world.barrier()
        except BaseException as error:
            (folder / f"error-{world.rank()}.txt").write_text(f"{error}\n\n{traceback.format_exc()}")
            traceback.print_exc()
            os._exit(1)  # what the other ranks wait for will not come: the parent continues with the next cell
        if world.rank() == 0:
            (folder / RESULT).write_text("{}")


if __name__ == "__main__":
    main()
