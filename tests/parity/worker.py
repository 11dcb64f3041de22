"""One rank of the parity matrix (`__main__.py`): trains the cells of one launch, one after the other, through the same
function as `gemma-dist train`, and writes down what came out.

    accelerate launch --config_file accelerate_configs/cpu_zero3.yaml -m tests.parity.worker FOLDER LAUNCH

FOLDER/<LAUNCH>.cells.json lists the cells. Each leaves FOLDER/<name>/: `out` as training writes it, `gradients` of
step 1 (averaged over the ranks, before clipping) and `logits` of the trained model on the probe, as safetensors, and
`saved-<rank>.jsonl`, how many tensors and bytes of the model this rank held ready for each checkpoint.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from gemma_dist import world
from gemma_dist.data.images import decode_image
from gemma_dist.data.trajectory import Trajectory
from gemma_dist.model.load import _peft_config
from gemma_dist.recipe import load_config
from gemma_dist.resolve import resolve
from gemma_dist.stream import loader as loader_module
from gemma_dist.stream.collate import ControlIds, Sample, collate
from gemma_dist.topology import current_topology
from gemma_dist.train import run as training
from gemma_dist.train import trainer as trainer_module
from gemma_dist.train.trainer import training_arguments

CELLS, RESULT = "cells.json", "result.json"


class Observer:
    """Of a trainer: a look at the gradients between the last backward pass of step 1 and the optimiser."""

    folder: Path
    last: Any = None  # the trainer of the cell

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)  # type: ignore[misc]
        Observer.last = self
        if self.is_deepspeed_enabled:
            engine, step = self.model_wrapped, self.model_wrapped.step

            def observed_step() -> None:
                self._observe()
                step()

            engine.step = observed_step
        return prepared

    def _clip_grad_norm(self, model: Any) -> Any:
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
                if gradient is not None:  # of TRL's text-only steps the vision tower has none
                    gradients[name] = gradient.detach().float().clone().contiguous()
        if world.rank() == 0:
            save_file(gradients, self.folder / "gradients.safetensors")

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # the trainer's


class Observed(Observer, trainer_module.ToolCallTrainer):
    pass


def observe_saving() -> None:
    """Let each rank write down what it holds ready to save; a copy of the whole model that Trainer makes counts too."""
    gather, copy = trainer_module.weights_to_save, Accelerator.get_state_dict

    def observed(tensors: Any) -> Any:
        apart = {(tensor.data_ptr(), tensor.shape): tensor.nbytes for tensor in tensors.values()}  # tied ones once
        with (Observer.folder / f"saved-{world.rank()}.jsonl").open("a") as file:
            file.write(json.dumps({"tensors": len(apart), "bytes": sum(apart.values())}) + "\n")
        return tensors

    trainer_module.weights_to_save = lambda *args: observed(gather(*args))
    Accelerator.get_state_dict = lambda *args, **kwargs: observed(copy(*args, **kwargs))


class ObservedPeer(Observer, SFTTrainer):
    pass


def train_with_trl(folder: Path, cell: dict[str, Any]) -> None:
    """Train `cell` as TRL's documentation would have it: `SFTTrainer` over a dataset with the columns messages, tools
    and images. It gets our order of trajectories, and all settings of the recipe that it knows."""
    from datasets import Dataset, Features, Image, Json, List
    from transformers import BitsAndBytesConfig, set_seed

    def decoded(trajectory: Trajectory) -> list[Any]:
        return [decode_image(image) for image in trajectory.images]

    config = load_config(cell["recipe"], [*cell["overrides"], f"output_dir={folder / 'out'}"])
    run = resolve(config, current_topology())
    plan, schedule = run.plan, run.schedule
    steps = config.train.max_steps
    samples = [sample for step in range(steps) for sample in schedule.global_batch(step)]
    trajectories = [schedule.shards.read(sample) for sample in samples]
    columns: dict[str, Any] = {"messages": Json(), "tools": Json()}  # as Arrow structs, calls would gain null arguments
    rows: list[dict[str, Any]] = [{"messages": one.messages, "tools": one.tools} for one in trajectories]
    if any(one.images for one in trajectories):
        columns["images"] = List(Image())
        rows = [row | {"images": decoded(one)} for row, one in zip(rows, trajectories, strict=True)]
    dataset = Dataset.from_list(rows, features=Features(columns))
    ours = training_arguments(run)
    names = ("learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "bf16", "optim", "adam_beta2", "seed")
    settings = {name: getattr(ours, name) for name in names}
    arguments = SFTConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=plan.per_device_train_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        activation_checkpointing=config.train.gradient_checkpointing,
        packing=config.train.packing and not cell["unpacked"],
        max_length=config.train.packing_length,
        train_sampling_strategy="sequential",
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
    quantization = None
    if config.quantization:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, config.quantization.bnb_4bit_compute_dtype),
        )
    set_seed(config.train.seed)
    model = AutoModelForImageTextToText.from_pretrained(
        config.model.model_name_or_path,
        dtype=getattr(torch, config.model.dtype),
        quantization_config=quantization,
        trust_remote_code=False,
    )
    trainer = ObservedPeer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        processing_class=AutoProcessor.from_pretrained(config.model.model_name_or_path, trust_remote_code=False),
        peft_config=_peft_config(config.lora) if config.lora else None,
    )
    trainer.train()
    if world.rank() == 0:
        told = [row for row in trainer.state.log_history if "loss" in row]
        lines = [json.dumps({"loss": row["loss"], "grad_norm": row["grad_norm"]}) for row in told]
        (folder / "out").mkdir(exist_ok=True)
        (folder / "out" / "metrics.jsonl").write_text("\n".join(lines))


def collate_as_rows(packs: list[list[Sample]], ids: ControlIds) -> dict[str, torch.Tensor]:
    """What `collate_packs` is given, each trajectory in a row of its own."""
    return collate([sample for pack in packs for sample in pack], ids)


def train_cell(folder: Path, cell: dict[str, Any], probe: dict[str, torch.Tensor]) -> None:
    """Train `cell` and write its gradients and logits."""
    config = load_config(cell["recipe"], [*cell["overrides"], f"output_dir={folder / 'out'}"])
    if cell["unpacked"]:  # the reference of a packed cell: the same trajectories at each step, each in a row of its own
        loader_module.collate_packs = collate_as_rows
        load_model = training.load_model
        training.load_model = lambda *args, packing, **kwargs: load_model(*args, packing=False, **kwargs)
    try:
        training.train(config)
    finally:
        if cell["unpacked"]:
            loader_module.collate_packs, training.load_model = collate_packs, load_model
    model = Observer.last.model_wrapped
    model.eval()
    with torch.no_grad():
        logits = model(**probe).logits
    if world.rank() == 0:
        save_file({"logits": logits.float().contiguous()}, folder / "logits.safetensors")
    Observer.last = None


def main() -> None:
    root, launch = Path(sys.argv[1]), sys.argv[2]
    training.ToolCallTrainer = Observed  # type: ignore[misc]
    observe_saving()
    world.disconnect = lambda: None  # the next cell needs it
    for name, cell in json.loads((root / f"{launch}.{CELLS}").read_text()).items():
        folder = root / name
        AcceleratorState._reset_state()  # the process group stays; what a launch decides is read from its config again
        Observer.folder = folder
        try:
            if cell["by_trl"]:
                train_with_trl(folder, cell)
            else:
                train_cell(folder, cell, load_file(cell["probe"]))
            world.barrier()
        except BaseException as error:
            (folder / f"error-{world.rank()}.txt").write_text(f"{error}\n\n{traceback.format_exc()}")
            traceback.print_exc()
            os._exit(1)  # what the other ranks wait for will not come: the parent goes on with the next cell
        if world.rank() == 0:
            (folder / RESULT).write_text("{}")


collate_packs = loader_module.collate_packs

if __name__ == "__main__":
    main()
