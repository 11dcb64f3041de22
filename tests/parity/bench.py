"""The folder of a matrix: models, shards and runs, and the processes that train the cells."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from tests.parity.cells import GLOBAL_BATCH, LAUNCHES, TUNINGS, WEIGHTED, Cell, file_name
from tests.support.ranks import ENVIRONMENT, REPOSITORY

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig

NUM_STEPS, NUM_ROWS, PACKING_LENGTH = 5, 120, 400
LAUNCH_TIMEOUT_S = 300  # for a cell
RESULT = "result.json"  # of a cell that ran to its end


class Task(TypedDict):
    """What a worker needs to train a cell."""

    recipe: str
    overrides: list[str]
    packs_as_rows: list[str]  # overrides with which a reference's trajectories are packed, and then unpacked; or none
    peer: str
    whole: bool  # load all of the model, also towers that the run does not need
    probe: str  # file of the batch to write logits of


class Bench:
    """A folder with the models, shards and runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model, self.shards, self.probe = cache(self._model), cache(self._shards), cache(self._probe)
        self.model_of_full_experts = cache(self._model_of_full_experts)

    def of(self, cell: Cell) -> Path:
        """The folder of a cell's run."""
        return self.folder / cell.name

    def _model(self, style: str, dtype: str) -> Path:
        from gemma_dist.model.tiny import write_tiny_model

        out = self.folder / f"model-{style}-{dtype}"
        if not out.exists():
            write_tiny_model(out, style=style, dtype=dtype, hidden_size=64, num_hidden_layers=4)
        return out

    def _model_of_full_experts(self, style: str, dtype: str) -> Path:
        """The model with its experts taken to 4 bits and back, for transformers to compute with as they are. The linear
        layers stay, since they are in 4 bits for reference and cell."""
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
        from safetensors.torch import load_file, save_file

        from gemma_dist.model.four_bit_cpu import dequantize_as_gpus_do

        model, out = self.model(style, dtype), self.folder / f"model-{style}-{dtype}-full-experts"
        if style != "26b":
            return model
        if not out.exists():
            shutil.copytree(model, out)
            dequantize_as_gpus_do()
            tensors = load_file(model / "model.safetensors")
            for name in [name for name in tensors if ".experts." in name]:
                codes = quantize_4bit(tensors[name], blocksize=64, compress_statistics=True, quant_type="nf4")
                tensors[name] = dequantize_4bit(*codes)
            save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        return out

    def _shards(self, style: str, data: str) -> Path:
        """Rows of one call; `row` puts an image into every third."""
        from tests.support.corpus import row, shard_rows

        folder = self.folder / f"data-{style}-{data}"
        if (folder / "shards").exists():
            return folder / "shards"
        remainders = {"text": (1, 2), "images": (0,)}.get(data, (0, 1, 2))
        numbers = [number for number in range(3 * NUM_ROWS) if number % 3 in remainders]
        folder.mkdir()
        weights: list[dict[str, Any]] = [
            {"weight": 0.25 + number % 4} if data == WEIGHTED else {} for number in numbers
        ]
        rows = [row(number, **weight) for number, weight in zip(numbers[:NUM_ROWS], weights, strict=False)]
        shard_rows(folder, str(self.model(style, "float32")), rows)
        return folder / "shards"

    def probe_of(self, cell: Cell) -> Path:
        """What to compare the logits of a cell on: beside an adapter on text there is no vision tower."""
        return self.probe(cell.style, "text" if cell.data == "text" and cell.tuning != "full" else "images")

    def _probe(self, style: str, data: str) -> Path:
        """A row as tensors, with an image if those of `data` have some."""
        from safetensors.torch import save_file

        from gemma_dist.config import EncodingConfig
        from gemma_dist.data.encode import load_encoder
        from gemma_dist.shards.reader import open_shards
        from gemma_dist.stream.collate import Sample, collate_packs, control_ids

        encoder = load_encoder(str(self.model(style, "float32")), EncodingConfig())
        trajectory = open_shards(self.shards(style, data)).read(0)
        pixels = encoder.pixels(trajectory.images) if trajectory.images else {}
        sample = Sample("", encoder.encode(trajectory), pixels)
        batch = collate_packs([[sample]], control_ids(encoder.processor), filler=False)
        del batch["labels"]
        path = self.folder / f"probe-{style}-{data}"
        save_file({name: value.contiguous() for name, value in batch.items()}, path)
        return path

    def task(self, cell: Cell) -> Task:
        """What a worker needs to train `cell`."""
        recipe, tuning_overrides = TUNINGS[cell.tuning]
        # A cell resumed on more processes has fewer sequences of a step on each than it was accumulating.
        num_ranks = cell.data_world_size
        micro_batch = max(1, GLOBAL_BATCH // num_ranks // cell.accumulation)
        assert num_ranks * micro_batch * cell.accumulation == GLOBAL_BATCH or cell.resumed_from
        dtype = "float32" if cell.is_reference else cell.dtype
        settings = {
            "model_name_or_path": self.model(cell.style, cell.dtype),
            "model.dtype": dtype,
            "model.ple": "gpu" if cell.is_reference else cell.ple,
            "data.train": self.shards(cell.style, cell.data),
            "max_steps": NUM_STEPS,
            "save_steps": 2,
            "save_total_limit": "null",
            "learning_rate": 1e-3,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0,
            "optim": cell.optim,
            "global_batch_size": GLOBAL_BATCH,
            "per_device_train_batch_size": micro_batch,
            "sequence_parallel_size": cell.sequence,
            "gradient_checkpointing": str(cell.checkpointing).lower(),
            "dataloader_num_workers": 0,
        }
        if cell.in_4_bits:
            settings["bnb_4bit_compute_dtype"] = dtype
        if cell.in_4_bits and cell.is_reference:
            settings["model_name_or_path"] = self.model_of_full_experts(cell.style, cell.dtype)
            settings["quantize_moe_experts"] = "false"
        if cell.data == "empty":
            settings["data.quarantine"] = self._quarantine(cell)
        if cell.resumed_from:
            settings["resume_from_checkpoint"] = self.of(cell.whole) / "out" / "checkpoint-2"
        overrides = [*(f"{key}={value}" for key, value in settings.items()), *tuning_overrides]
        packing = ["packing=true", f"packing_length={PACKING_LENGTH}"] if cell.packing else []
        return {
            "recipe": str(REPOSITORY / "launch" / f"{recipe}.yaml"),
            "overrides": overrides if cell.is_reference else overrides + packing,
            "packs_as_rows": packing if cell.is_reference else [],
            "peer": cell.peer,
            "whole": cell.is_reference,
            "probe": str(self.probe_of(cell)),
        }

    def _quarantine(self, cell: Cell) -> Path:
        """The samples of the first quarter of the lanes at the first two steps: with one, two or four ranks, one of
        them has micro-batches without a single target there."""
        from gemma_dist.batch_plan import BatchPlan
        from gemma_dist.shards.reader import open_shards
        from gemma_dist.stream.schedule import Schedule

        path = self.folder / f"quarantine-{cell.style}-{cell.packing}"
        if path.exists():
            return path
        shards, plan = open_shards(self.shards(cell.style, cell.data)), BatchPlan(1, 1, GLOBAL_BATCH, GLOBAL_BATCH)
        length = PACKING_LENGTH if cell.packing else None
        schedule = Schedule(shards, plan, 42, packing=cell.packing, packing_length=length)
        ids = []
        for step in (0, 1):
            for sequence in schedule.sequences(step, range(GLOBAL_BATCH // 4)):
                ids += [shards.id(sample) for sample in sequence.samples]
        path.write_text("".join(f"{sample_id}\n" for sample_id in ids))
        return path

    def run(self, cells: Iterable[Cell]) -> None:
        """Train `cells`, their references and the runs that they resume, launch by launch; last those that resume
        from a launch that comes later."""
        cells = list(cells)
        wholes = [cell.whole for cell in cells if cell.resumed_from]
        references = [cell.reference for cell in [*cells, *wholes]]
        runs = dict.fromkeys([*references, *cells, *wholes])  # in order, each once
        order = list(LAUNCHES)

        def waits(cell: Cell) -> bool:
            return bool(cell.resumed_from) and order.index(cell.resumed_from) > order.index(cell.launch)

        for waiting in (False, True):
            for launch in LAUNCHES:
                due = [cell for cell in runs if cell.launch == launch and waits(cell) == waiting]
                if due:
                    self.train(launch, sorted(due, key=lambda cell: bool(cell.resumed_from)))

    def train(self, launch: str, cells: list[Cell]) -> None:
        """Train all `cells` of a launch in one set of processes; after a failure, the rest in a new one. Those that an
        earlier command finished in the same folder stay."""
        tasks = {cell.name: self.task(cell) for cell in cells if not (self.of(cell) / RESULT).exists()}
        while tasks:
            for name in tasks:
                shutil.rmtree(self.folder / name, ignore_errors=True)  # of a command that was stopped
                (self.folder / name).mkdir()
            (self.folder / f"{file_name(launch)}.cells.json").write_text(json.dumps(tasks))
            start = time.perf_counter()
            output = self._start(launch, timeout_s=LAUNCH_TIMEOUT_S * len(tasks))
            unfinished = [name for name in tasks if not (self.folder / name / RESULT).exists()]
            num_finished, seconds = len(tasks) - len(unfinished), time.perf_counter() - start
            print(f"{launch}: {num_finished} of {len(tasks)} cells in {seconds:.0f} s", flush=True)
            if unfinished:
                failed = self.folder / unfinished[0]
                errors = [path.read_text() for path in sorted(failed.glob("error-*.txt"))]
                (failed / "error.txt").write_text(errors[0] if errors else output[-4000:])
            tasks = {name: tasks[name] for name in unfinished[1:]}

    def _start(self, launch: str, timeout_s: float) -> str:
        """Run the workers of a launch to their end; what they said."""
        command = [sys.executable]
        if launch != "single":
            config = f"accelerate_configs/{launch.partition(' ')[0]}.yaml"
            command += ["-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]
            command += ["--num_processes", str(LAUNCHES[launch])]
        command += ["-m", "tests.parity.worker", str(self.folder), file_name(launch)]
        try:
            done = subprocess.run(
                command,
                cwd=REPOSITORY,
                env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY)},
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "it hung"
        return done.stdout + done.stderr


def four_bits(compute_dtype: "torch.dtype", style: str = "e4b") -> "BitsAndBytesConfig":
    """NF4 as the recipe of QLoRA has it, written out as a user of plain transformers would."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        # What it would not leave whole by itself: the projection of 12B's pixels.
        llm_int8_skip_modules=["lm_head", "model.embed_vision", "model.embed_audio"] if style == "12b" else None,
    )
