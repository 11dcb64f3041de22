"""What the trainer core costs beside bare TRL, and what a second process brings.

    python benchmarks/training.py [--only overhead|scaling]

overhead: the same text rows, the same model, full fine-tuning in float32, one process: steps of `ToolCallTrainer`,
which also encodes its rows, and of `SFTTrainer` on rows that were tokenized before, in turns. CPU time stands in for
the clock, which other jobs would disturb.
scaling: tokens a second of `gemma-dist train` on one process bound to one core, and on two under cpu_ddp.yaml.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.support.ranks import ENVIRONMENT  # noqa: E402 (found by the line above)

NUM_STEPS, NUM_ROUNDS, MICRO_BATCH, WARM_UP = 12, 4, 4, 2
NUM_ROWS = NUM_STEPS * MICRO_BATCH


def prepare(folder: Path) -> tuple[Path, Path]:
    """A model whose layers cost something, and text rows."""
    from gemma_dist.model.tiny import write_tiny_model
    from tests.support.corpus import row, shard_rows

    model = folder / "model"
    write_tiny_model(model, hidden_size=256, num_hidden_layers=6)
    shard_rows(folder, str(model), [row(3 * i + 1, 6) for i in range(NUM_ROWS)])
    return model, folder / "shards"


def settings(model: Path, shards: Path, out: Path, *more: str) -> list[str]:
    """Overrides of launch/cpu_full.yaml."""
    return [
        f"model_name_or_path={model}",
        f"data.train={shards}",
        f"output_dir={out}",
        f"max_steps={NUM_STEPS}",
        "save_steps=1000",
        *more,
    ]


def overhead(folder: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import SFTConfig, SFTTrainer

    from gemma_dist.config import EncodingConfig
    from gemma_dist.data.encode import load_encoder
    from gemma_dist.logs import RunLog
    from gemma_dist.recipe import load_config
    from gemma_dist.resolve import resolve
    from gemma_dist.stream.loader import TrajectoryLoader
    from gemma_dist.topology import Topology
    from gemma_dist.train.trainer import ToolCallTrainer, training_arguments

    model_dir, shards = prepare(folder)
    sizes = [f"per_device_train_batch_size={MICRO_BATCH}", f"global_batch_size={MICRO_BATCH}"]
    config = load_config(ROOT / "launch/cpu_full.yaml", settings(model_dir, shards, folder / "ours", *sizes))
    run = resolve(config, Topology(""))
    schedule = run.schedule
    encoder = load_encoder(str(model_dir), EncodingConfig())
    order = [sample for step in range(NUM_STEPS) for sample in schedule.global_batch(step)]
    encoded = [encoder.encode(schedule.shards.read(sample)) for sample in order]
    rows = [{"input_ids": one.input_ids, "labels": one.labels} for one in encoded]

    def model() -> Any:
        return AutoModelForImageTextToText.from_pretrained(model_dir, trust_remote_code=False)

    def ours() -> Any:
        loader = TrajectoryLoader(schedule, encoder, 0, 0, NUM_STEPS, num_workers=config.train.dataloader_num_workers)
        run_log = RunLog(folder / "ours" / "metrics.jsonl", start_step=0, num_steps=NUM_STEPS)
        return timed(ToolCallTrainer)(run, training_arguments(run), model(), loader, run_log)

    def bare() -> Any:
        arguments = SFTConfig(
            output_dir=str(folder / "bare"),
            per_device_train_batch_size=MICRO_BATCH,
            max_steps=NUM_STEPS,
            learning_rate=config.train.learning_rate,
            train_sampling_strategy="sequential",
            activation_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            max_length=None,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        processor = AutoProcessor.from_pretrained(model_dir, trust_remote_code=False)
        return timed(SFTTrainer)(
            model=model(), args=arguments, train_dataset=Dataset.from_list(rows), processing_class=processor.tokenizer
        )

    seconds: dict[str, list[float]] = {"gemma_dist": [], "SFTTrainer": []}
    losses: dict[str, float] = {}
    for _ in range(NUM_ROUNDS):
        for name, make in (("gemma_dist", ours), ("SFTTrainer", bare)):
            trainer = make()
            trainer.save = trainer._save_checkpoint = lambda *args, **kwargs: None
            trainer.train()
            seconds[name] += trainer.seconds[WARM_UP:]
            losses[name] = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    tokens = sum(len(row["input_ids"]) for row in rows) / NUM_STEPS
    print(f"\noverhead: full fine-tuning, micro-batches of {MICRO_BATCH} text rows, {tokens:.0f} tokens a step")
    print(f"  {'':12} {'CPU ms a step (median)':>24} {'ratio':>8} {'first loss':>12}")
    for name, times in seconds.items():
        ratio = median(times) / median(seconds["SFTTrainer"])
        print(f"  {name:12} {1000 * median(times):24.1f} {ratio:8.3f} {losses[name]:12.4f}")


def timed(kind: Any) -> Any:
    """A trainer that notes the CPU seconds of each step, from one step's end to the next one's: with its data."""

    class TimedTrainer(kind):
        def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
            super()._maybe_log_save_evaluate(*args, **kwargs)
            now = time.process_time()
            self.seconds = [*getattr(self, "seconds", []), now - getattr(self, "before", now)]
            self.before = now

    return TimedTrainer


def scaling(folder: Path) -> None:
    model, shards = prepare(folder)
    sizes = [f"per_device_train_batch_size={MICRO_BATCH}", f"global_batch_size={2 * MICRO_BATCH}"]
    rates = {}
    config = ["--config_file", "accelerate_configs/cpu_ddp.yaml", "--main_process_port", "0"]
    launchers = {
        "1 process, 1 core": ["taskset", "--cpu-list", "0", sys.executable],
        "2 processes, 2 cores": [sys.executable, "-m", "accelerate.commands.launch", *config],
    }
    for name, launcher in launchers.items():
        out = folder / name.replace(" ", "-")
        command = [*launcher, "-m", "gemma_dist", "train", "launch/cpu_full.yaml"]
        subprocess.run(
            [*command, *settings(model, shards, out, *sizes)],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        rates[name] = median(line["tokens_per_s"] for line in lines[WARM_UP:])
    print(f"\nscaling: full fine-tuning, global batch of {2 * MICRO_BATCH} text rows; tokens a second (median step)")
    first = next(iter(rates.values()))
    for name, rate in rates.items():
        print(f"  {name:22} {rate:8.0f} {rate / first:6.2f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=["overhead", "scaling"])
    options = parser.parse_args()
    os.environ |= ENVIRONMENT
    for section in (overhead, scaling):
        if options.only in (None, section.__name__):
            folder = Path(tempfile.mkdtemp(prefix="training-"))
            try:
                section(folder)
            finally:
                shutil.rmtree(folder)


if __name__ == "__main__":
    main()
