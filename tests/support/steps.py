"""One training run whose steps are counted: collectives, their bytes, and waits for the device.

    accelerate launch … -m tests.support.steps FOLDER OUT [--tuning full] [--packing] [--bare] [--sequence N]

A micro-batch is a call of `training_step` (forward, loss and backward); the last one of a step, in which DDP or
DeepSpeed sum the gradients, is left out. The end of a step is the norm of the gradients, the optimizer, and the log, at
every step; with DeepSpeed, which steps within the last backward pass, that micro-batch counts as part of it. Given is
the most of any; the first step is left out.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from tests.support.counting import Counted
from tests.support.ranks import ENVIRONMENT, REPOSITORY

NUM_STEPS, ACCUMULATION = 3, 2


def prepare(folder: Path, style: str) -> None:
    """A model, and rows with and without images."""
    from gemma_dist.model.tiny import write_tiny_model
    from tests.support.corpus import row, shard_rows

    write_tiny_model(folder / "model", style=style)
    shard_rows(folder, str(folder / "model"), [row(number, 1 + number % 3) for number in range(48)])


def counted(kind: Any) -> Any:
    """A trainer that keeps what each micro-batch, but a step's last one, and each end of a step took."""

    class CountedTrainer(kind):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            self.micro_batches: list[dict[str, Any]] = []
            self.ends: list[dict[str, Any]] = []
            with Counted() as self.counts:
                return super().train(*args, **kwargs)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            self.counts.reset()
            loss = super().training_step(*args, **kwargs)
            if not self.accelerator.gradient_state.sync_gradients:
                self.micro_batches.append(_said(self.counts))
            if not self.is_deepspeed_enabled:
                self.counts.reset()
            return loss

        def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
            super()._maybe_log_save_evaluate(*args, **kwargs)
            self.ends.append(_said(self.counts))

    return CountedTrainer


def _said(counts: Any) -> dict[str, Any]:
    names = ("waits", "collectives", "bytes")
    return {name: dict(getattr(counts, name)) for name in names} | {"operators": counts.operators}


@dataclass(frozen=True)
class Counting:
    """What is trained, and how."""

    launch: str
    tuning: str = "full"
    packing: bool = False
    bare: bool = False  # by TRL's own trainer
    sequence: int = 1  # ranks that share a pack

    @property
    def trainer(self) -> str:
        return "bare" if self.bare else "ours"


def worker(folder: Path, out: Path, counting: Counting) -> None:
    """One rank: train with one of the two trainers, and write its counts to `out`."""
    from gemma_dist import world

    trainer = _bare(folder, counting) if counting.bare else _ours(folder, counting)
    trainer.save = trainer._save_checkpoint = lambda *args, **kwargs: None
    trainer.train()
    if world.rank() == 0:
        out.write_text(json.dumps({"micro_batch": trainer.micro_batches[1:], "end": trainer.ends[1:-1]}))


def _run(folder: Path, counting: Counting) -> Any:
    from gemma_dist import world
    from gemma_dist.recipe import load_config
    from gemma_dist.resolve import resolve
    from gemma_dist.topology import current_topology

    settings = [
        f"model_name_or_path={folder / 'model'}",
        f"data.train={folder / 'shards'}",
        f"output_dir={folder / 'out'}",
        f"max_steps={NUM_STEPS}",
        "save_steps=1000",
        "logging_steps=1",
        "optim=adamw_torch_fused",
        "per_device_train_batch_size=1",
        f"global_batch_size={ACCUMULATION * world.world_size() // counting.sequence}",
        f"sequence_parallel_size={counting.sequence}",
        *(["train.packing=true", "packing_length=2048"] if counting.packing else []),
    ]
    config = load_config(REPOSITORY / f"launch/cpu_{counting.tuning}.yaml", settings)
    return resolve(config, current_topology())


def _ours(folder: Path, counting: Counting) -> Any:
    from gemma_dist import world
    from gemma_dist.data.encode import load_encoder
    from gemma_dist.logs import RunLog
    from gemma_dist.stream.loader import TrajectoryLoader
    from gemma_dist.train.run import load_run_model, table_of
    from gemma_dist.train.trainer import ToolCallTrainer, training_arguments

    run = _run(folder, counting)
    arguments = training_arguments(run)
    encoder = load_encoder(run.config.model.model_name_or_path, run.config.data)
    table = table_of(run.config)
    model = load_run_model(run, table)
    loader = TrajectoryLoader(run.schedule, encoder, world.rank(), 0, NUM_STEPS, num_workers=1, table=table)
    run_log = RunLog(folder / "out" / "metrics.jsonl", start_step=0, num_steps=NUM_STEPS)
    return counted(ToolCallTrainer)(run, arguments, model, loader, run_log)


def _bare(folder: Path, counting: Counting) -> Any:
    """TRL's own way, on the text rows: with images it takes no `packing`."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import SFTConfig, SFTTrainer

    from gemma_dist.data.encode import load_encoder
    from gemma_dist.train.trainer import training_arguments

    assert counting.tuning in ("full", "lora")
    run = _run(folder, counting)
    ours = training_arguments(run)
    encoder = load_encoder(run.config.model.model_name_or_path, run.config.data)
    shards = run.schedule.shards
    encoded = [encoder.encode(shards.read(i)) for i in range(len(shards)) if not shards.num_images[i]]
    rows = [{"input_ids": one.input_ids, "labels": one.labels} for one in encoded]
    arguments = SFTConfig(
        output_dir=ours.output_dir,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=NUM_STEPS,
        learning_rate=ours.learning_rate,
        packing=counting.packing,
        max_length=2048 if counting.packing else None,
        activation_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        ddp_find_unused_parameters=True,
    )
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", trust_remote_code=False)
    processor = AutoProcessor.from_pretrained(folder / "model", trust_remote_code=False)
    lora = run.config.lora
    return counted(SFTTrainer)(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=processor.tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **lora.model_dump()) if lora else None,
    )


def measure(folder: Path, counting: Counting) -> dict[str, Any]:
    """The counts of one launch: the most of any micro-batch, and of any end of a step, per package."""
    out, launch = folder / f"{'-'.join(map(str, astuple(counting)))}.json", counting.launch
    command = [sys.executable]
    if launch != "single":
        config = REPOSITORY / "accelerate_configs" / f"{launch}.yaml"
        command += ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    words = ["-m", "tests.support.steps", str(folder), str(out), "--tuning", counting.tuning]
    words += ["--packing"] * counting.packing + ["--bare"] * counting.bare + ["--sequence", str(counting.sequence)]
    done = subprocess.run(
        [*command, *words],
        cwd=REPOSITORY,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if not out.exists():
        raise RuntimeError(done.stdout[-8000:])
    found = json.loads(out.read_text())
    said = {**asdict(counting), "trainer": counting.trainer}
    return said | {part: _most(found[part]) for part in ("micro_batch", "end")}


def _most(counts: list[dict[str, Any]]) -> dict[str, Any]:
    most: dict[str, Any] = {name: {} for name in ("waits", "collectives", "bytes")}
    for one in counts:
        for name, values in most.items():
            for package, value in one[name].items():
                values[package] = max(value, values.get(package, 0))
    return most | {"operators": max(one["operators"] for one in counts)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tuning", default="full")
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--bare", action="store_true")
    parser.add_argument("--sequence", type=int, default=1)
    options = parser.parse_args()
    counting = Counting("", options.tuning, options.packing, options.bare, options.sequence)
    worker(options.folder, options.out, counting)


if __name__ == "__main__":
    main()
