"""The parity matrix: every launch, way of training, kind of model and of data learns what one plain process learns.

    make parity                                   all cells: about two hours on 2 cores
    python -m tests.parity --pruned          every launch, tuning, style, kind of data and option at least once
    python -m tests.parity --only zero3      cells whose name has these words

Each launch is real: processes under `accelerate launch` with a file of accelerate_configs/ (gloo, DeepSpeed,
bitsandbytes' NF4, all on the CPU), tiny Gemma 4 models of transformers' own classes, shards, and the function that
`gemma-dist train` calls. A cell is compared with its reference: one process in float32 that takes the same
trajectories, each in a row of its own, without checkpointing, packing or accumulation. Compared are

- loss: of each of five steps, relative;
- gradient: of each trained tensor at step 1, as |difference| / |reference|, where tensors with less than a thousandth
  of the largest gradient count as that long (what is left of them is rounding);
- logits: of the result, loaded in this process by plain transformers and PEFT, against those of the trained model
  where it trained, relative to the largest;
- names: the tensors in the header of the result and of its last checkpoint have the names, shapes and number formats of
  the base's, and an adapter the names and shapes of its reference's;
- copies: what the ranks held ready for a checkpoint are the tensors in its files, on rank 0, and nothing elsewhere;
- resume: losses and gradient norms of steps 3 to 5, gone on with from the checkpoint of step 2: equal to the last bit
  in the same launch, within the limit in another.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from gemma_dist.resolve import FOLLOWING_ELEMENTS
from tests.support.ranks import ENVIRONMENT, REPOSITORY

ROOT = REPOSITORY

LAUNCHES = {  # number of processes; the rest is in accelerate_configs/
    "single": 1,
    "cpu_ddp": 2,
    "cpu_zero1": 2,
    "cpu_zero2": 2,
    "cpu_zero3": 2,
    "cpu_zero3_offload": 2,
    "cpu_ddp x4": 4,
    "cpu_zero3 x4": 4,
}
TUNINGS = {
    "full": ("cpu_full", []),
    "lora": ("cpu_lora", []),
    "dora": ("cpu_lora", ["lora.use_rslora=true", "lora.use_dora=true"]),
    "qlora": ("cpu_qlora", []),
    "experts": ("cpu_lora", ["lora.target_parameters=[experts.gate_up_proj, experts.down_proj]"]),  # 26b alone has some
}
FOR_ALL_STYLES = ("full", "lora", "dora", "qlora")
STYLES = ("e4b", "31b", "26b")
DATA = ("text", "images", "some", "empty")  # images in none, all, some rows; "empty": a rank's batch is all quarantined
OPTIMISERS = ("adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit", "adafactor", "sgd")
ELSEWHERE = {  # the launch, of another world size, that goes on from a checkpoint of this one
    "single": "cpu_zero3",
    "cpu_ddp": "single",
    "cpu_zero1": "cpu_zero3 x4",
    "cpu_zero2": "single",
    "cpu_zero3": "cpu_ddp x4",
    "cpu_zero3_offload": "single",
    "cpu_ddp x4": "cpu_zero2",
    "cpu_zero3 x4": "cpu_zero1",
}
OPTIONS = tuple(product((False, True), (False, True), (1, 4)))  # packing, checkpointing, accumulation
NUM_STEPS, GLOBAL_BATCH, NUM_ROWS, PACKING_LENGTH = 5, 8, 120, 400
LIMITS = {"float32": 1e-5, "bfloat16": 5e-2}
# Of steps 2 to 5 with experts, or with 8-bit states of the optimiser: which expert a token goes to and which of 256
# levels a state gets are step functions, and where two are nearly equal, a difference in the eighth digit decides.
ROUNDED_LIMIT = 1e-3
LAUNCH_TIMEOUT_S = 300  # for a cell
RESULT = "result.json"  # of a cell that ran to its end


@dataclass(frozen=True)
class Cell:
    """One run of the matrix."""

    launch: str
    tuning: str
    style: str
    data: str
    packing: bool = False
    checkpointing: bool = False
    accumulation: int = 1
    dtype: str = "float32"
    optim: str = "adamw_torch"
    resumed: str = ""  # the launch whose checkpoint of step 2 it goes on from
    is_reference: bool = False
    by_trl: bool = False  # trained by plain TRL instead

    @property
    def name(self) -> str:
        words = [self.launch.replace(" ", "-"), self.tuning, self.style, self.data]
        words += ["packed"] * self.packing + ["checkpointed"] * self.checkpointing
        words += [f"accumulated{self.accumulation}"] * (self.accumulation > 1)
        words += ["bfloat16"] * (self.dtype == "bfloat16") + [self.optim] * (self.optim != "adamw_torch")
        words += [f"resumed-{self.resumed}"] * bool(self.resumed)
        words += ["trl"] * self.by_trl
        return "-".join([*words, *["reference"] * self.is_reference])

    @property
    def reference(self) -> "Cell":
        """One process, float32, all trajectories of a step as rows of one batch; packs only say which these are."""
        words = (self.tuning, self.style, self.data, self.packing)
        return Cell("single", *words, dtype=self.dtype, optim=self.optim, is_reference=True, by_trl=self.by_trl)

    @property
    def whole(self) -> "Cell":
        """The uninterrupted run of a resumed one."""
        return replace(self, launch=self.resumed.replace("-x", " x"), resumed="")

    @property
    def later_limit(self) -> float:
        """For the steps after the first."""
        rounded = self.style == "26b" or self.optim == "adamw_8bit"
        return max(LIMITS[self.dtype], ROUNDED_LIMIT) if rounded else LIMITS[self.dtype]


def all_cells() -> list[Cell]:
    """Every launch x tuning x style x data (with four processes: only data with pictures in some rows), the options
    dealt so that each meets each of the others; bfloat16; the other optimisers; and every launch gone on with in itself
    and in another."""
    cells = []
    kinds = [*product(LAUNCHES, FOR_ALL_STYLES, STYLES, DATA), *product(LAUNCHES, ["experts"], ["26b"], DATA)]
    for i, (launch, tuning, style, data) in enumerate(kinds):
        if data == "some" or LAUNCHES[launch] <= 2:
            cells.append(_cell(launch, tuning, style, data, *OPTIONS[(i + i // len(OPTIONS)) % len(OPTIONS)]))
    few = list(LAUNCHES)[:6]
    cells += [
        _cell(launch, tuning, "e4b", "some", dtype="bfloat16")
        for launch, tuning in product(few, FOR_ALL_STYLES)
        if tuning != "full" or "zero" in launch  # the others are refused
    ]
    cells += [
        _cell(launch, "full", "31b", "some", optim=optim)
        for launch, optim in product(few, OPTIMISERS)
        if optim in FOLLOWING_ELEMENTS or "zero" not in launch  # others see flat slices there
    ]
    whole = [cell for cell in cells if cell.style == "e4b" and cell.data == "some" and cell.dtype == "float32"]
    whole += [cell for cell in cells if cell.optim != "adamw_torch" and cell.launch in ("cpu_ddp", "cpu_zero2")]
    whole += [cell for cell in cells if cell.tuning == "experts" and cell.data == "some"]
    return [*cells, *_resumed(whole, ELSEWHERE)]


def pruned_cells() -> list[Cell]:
    """Every launch with two of the tunings; style and data (four pairs, so that cells share references) and options
    rotate. Four processes once for each launch of them."""
    kinds = (("e4b", "some", True), ("31b", "images", False), ("26b", "empty", False), ("e4b", "text", False))
    cells = []
    for i, (launch, tuning) in enumerate(product(list(LAUNCHES)[:6], FOR_ALL_STYLES)):
        if (i + i // 4) % 2:
            continue
        style, data, packing = kinds[(i // 2 + i // 4) % len(kinds)]
        checkpointing, accumulation = ((False, 4), (True, 1), (True, 4), (False, 1))[(i + i // 8) % 4]
        checkpointing |= (launch, tuning) == ("cpu_zero3", "dora")  # recomputed at ZeRO-3, DoRA looks into other layers
        cells.append(_cell(launch, tuning, style, data, packing, checkpointing, accumulation))
    whole = [cell for cell in cells if cell.tuning in ("full", "lora") or cell.launch == "cpu_zero3"]
    # It goes on, too: of two numbers, the order of a sum does not matter.
    four = _cell("cpu_ddp x4", "full", "e4b", "some", True)
    whole.append(four)
    cells += [four, _cell("cpu_zero3 x4", "lora", "31b", "images")]
    cells.append(_cell("cpu_zero3", "experts", "26b", "empty", False, True))
    cells += [
        _cell(launch, "lora", "e4b", "some", dtype="bfloat16") for launch in ("cpu_ddp", "cpu_zero2", "cpu_zero3")
    ]
    staying = ("cpu_zero1", "cpu_zero3", "cpu_zero3_offload", "cpu_ddp x4")
    return [*cells, *_resumed(whole, ELSEWHERE | dict.fromkeys(staying))]


def _cell(launch: str, *words: Any, **more: Any) -> Cell:
    cell = Cell(launch, *words, **more)
    most = GLOBAL_BATCH // LAUNCHES[launch]
    return replace(cell, accumulation=min(cell.accumulation, most))


def _resumed(cells: Iterable[Cell], elsewhere: Mapping[str, str | None]) -> Iterator[Cell]:
    """Each of `cells` gone on with in its own launch, and in the one that `elsewhere` names for it."""
    for cell in cells:
        launches = [cell.launch, elsewhere[cell.launch]]
        yield from (replace(cell, launch=other, resumed=cell.launch.replace(" ", "-")) for other in launches if other)


# ---- models, data and recipes ----------------------------------------------------------------------------------------


class Bench:
    """A folder with the models, shards and runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model, self.shards, self.probe = cache(self._model), cache(self._shards), cache(self._probe)

    def _model(self, style: str, dtype: str) -> Path:
        from gemma_dist.model.tiny import write_tiny_model

        out = self.folder / f"model-{style}-{dtype}"
        if out.exists():
            return out
        write_tiny_model(out, style=style, dtype=dtype, hidden_size=64, num_hidden_layers=4)
        return out

    def _shards(self, style: str, data: str) -> Path:
        """Rows of one call; `row` puts a picture into every third."""
        from tests.support.corpus import row, shard_rows

        numbers = {"text": (1, 2), "images": (0,), "some": (0, 1, 2), "empty": (0, 1, 2)}[data]
        rows = [row(3 * (i // len(numbers)) + numbers[i % len(numbers)]) for i in range(NUM_ROWS)]
        folder = self.folder / f"data-{style}-{data}"
        if (folder / "shards").exists():
            return folder / "shards"
        folder.mkdir()
        shard_rows(folder, str(self.model(style, "float32")), rows)
        return folder / "shards"

    def _probe(self, style: str) -> Path:
        """A row with a picture as tensors, to compare logits on."""
        from safetensors.torch import save_file

        from gemma_dist.data.encode import load_encoder
        from gemma_dist.shards.reader import open_shards
        from gemma_dist.stream.collate import Sample, collate_packs, control_ids

        encoder = load_encoder(str(self.model(style, "float32")), chat_template=None, enable_thinking=False)
        trajectory = open_shards(self.shards(style, "images")).read(0)
        sample = Sample("", encoder.encode(trajectory), encoder.pixels(trajectory.images))
        batch = collate_packs([[sample]], control_ids(encoder.processor))
        del batch["labels"]
        save_file({name: value.contiguous() for name, value in batch.items()}, self.folder / f"probe-{style}")
        return self.folder / f"probe-{style}"

    def run_of(self, cell: Cell) -> dict[str, Any]:
        """What a worker needs to train `cell`."""
        recipe, more = TUNINGS[cell.tuning]
        # One that was moved to more processes has fewer sequences of a step on each than it was accumulating.
        num_ranks = LAUNCHES[cell.launch]
        micro = max(1, GLOBAL_BATCH // num_ranks // cell.accumulation)
        overrides = {
            "model_name_or_path": self.model(cell.style, cell.dtype),
            "model.dtype": "float32" if cell.is_reference else cell.dtype,
            "data.train": self.shards(cell.style, cell.data),
            "max_steps": NUM_STEPS,
            "save_steps": 2,
            "save_total_limit": "null",
            "learning_rate": 1e-3,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0,
            "optim": cell.optim,
            "global_batch_size": GLOBAL_BATCH,
            "per_device_train_batch_size": micro,
            "packing": str(cell.packing).lower(),
            "gradient_checkpointing": str(cell.checkpointing).lower(),
            "dataloader_num_workers": 0,
        }
        if cell.packing:
            overrides["packing_length"] = PACKING_LENGTH
        if cell.tuning == "qlora":
            overrides["bnb_4bit_compute_dtype"] = overrides["model.dtype"]
        if cell.data == "empty":
            overrides["data.quarantine"] = self._quarantine(cell)
        if cell.resumed:
            overrides["resume_from_checkpoint"] = self.folder / cell.whole.name / "out" / "checkpoint-2"
        assert num_ranks * micro * cell.accumulation == GLOBAL_BATCH or cell.resumed
        return {
            "recipe": str(ROOT / "launch" / f"{recipe}.yaml"),
            "overrides": [*(f"{key}={value}" for key, value in overrides.items()), *more],
            "unpacked": cell.is_reference and cell.packing,
            "by_trl": cell.by_trl,
            "probe": str(self.probe(cell.style)),
        }

    def _quarantine(self, cell: Cell) -> Path:
        """The samples of the first quarter of the lanes at the first two steps: with one, two or four ranks, one of
        them has micro-batches without a single target there."""
        from gemma_dist.config import BatchPlan
        from gemma_dist.shards.reader import open_shards
        from gemma_dist.stream.schedule import Schedule

        path = self.folder / f"quarantine-{cell.style}-{cell.packing}"
        if not path.exists():
            shards, plan = open_shards(self.shards(cell.style, cell.data)), BatchPlan(1, 1, GLOBAL_BATCH, GLOBAL_BATCH)
            length = PACKING_LENGTH if cell.packing else None
            schedule = Schedule(shards, plan, 42, packing=cell.packing, packing_length=length)
            samples = [
                sample
                for step in (0, 1)
                for sequence in schedule.sequences(step, range(GLOBAL_BATCH // 4))
                for sample in sequence.samples
            ]
            path.write_text("".join(f"{shards.id(sample)}\n" for sample in samples))
        return path


# ---- running ---------------------------------------------------------------------------------------------------------


def run_launch(bench: Bench, launch: str, cells: list[Cell]) -> None:
    """Train all `cells` of a launch in one set of processes; after a failure, the rest in a new one. Those that an
    earlier command finished in the same folder stand."""
    runs = {cell.name: bench.run_of(cell) for cell in cells if not (bench.folder / cell.name / RESULT).exists()}
    while runs:
        for name in runs:
            shutil.rmtree(bench.folder / name, ignore_errors=True)  # of a command that was stopped
            (bench.folder / name).mkdir()
        listed = bench.folder / f"{launch.replace(' ', '-')}.cells.json"
        listed.write_text(json.dumps(runs))
        command, words = [sys.executable], ["-m", "tests.parity.worker", str(bench.folder), launch.replace(" ", "-")]
        if launch != "single":
            config = f"accelerate_configs/{launch.partition(' ')[0]}.yaml"
            command += ["-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]
            command += ["--num_processes", str(LAUNCHES[launch])]
        start = time.perf_counter()
        try:
            done = subprocess.run(
                [*command, *words],
                cwd=ROOT,
                env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                timeout=LAUNCH_TIMEOUT_S * len(runs),
                check=False,
            )
            output = done.stdout + done.stderr
        except subprocess.TimeoutExpired:
            output = "it hung"
        finished = [name for name in runs if (bench.folder / name / RESULT).exists()]
        print(f"{launch}: {len(finished)} of {len(runs)} cells in {time.perf_counter() - start:.0f} s", flush=True)
        rest = [name for name in runs if name not in finished]
        if rest:
            failed = bench.folder / rest[0]
            told = sorted(failed.glob("error-*.txt"))
            (failed / "error.txt").write_text(told[0].read_text() if told else output[-4000:])
        runs = {name: runs[name] for name in rest[1:]}


def peer_cells() -> list[Cell]:
    """What TRL can be asked for: it has no quarantine, its packs would make other steps, and it saves what it likes."""
    cells = []
    for i, (launch, tuning) in enumerate(product(list(LAUNCHES)[:6], FOR_ALL_STYLES)):
        checkpointing, accumulation = ((False, 1), (True, 1), (False, 4), (True, 4))[(i + i // 4) % 4]
        cells.append(_cell(launch, tuning, "e4b", "text", False, checkpointing, accumulation, by_trl=True))
    return [*cells, *(_cell(launch, "lora", "e4b", "some", by_trl=True) for launch in list(LAUNCHES)[:6])]


def judge(bench: Bench, cell: Cell) -> dict[str, Any]:
    """The figures of a cell; `error` where it did not run."""
    from safetensors.torch import load_file

    folder, reference = bench.folder / cell.name, bench.folder / cell.reference.name
    if (folder / "error.txt").exists():
        return {"error": (folder / "error.txt").read_text()}
    if (reference / "error.txt").exists():
        return {"error": "its reference: " + (reference / "error.txt").read_text()}
    found, expected = _curve(folder), _curve(reference)
    if cell.resumed:
        whole = _curve(bench.folder / cell.whole.name)[2:]
        same_launch = cell.launch.replace(" ", "-") == cell.resumed
        worst = max(abs(x - y) / abs(y) for a, b in zip(found, whole, strict=True) for x, y in zip(a, b, strict=True))
        return {"resume": worst, "ok": worst == 0 if same_launch else worst <= cell.later_limit}
    losses = [abs(a[0] - b[0]) / b[0] for a, b in zip(found, expected, strict=True)]
    limit = LIMITS[cell.dtype]
    figures: dict[str, Any] = {
        "loss": max(losses),
        "gradient": _distance(
            load_file(folder / "gradients.safetensors"), load_file(reference / "gradients.safetensors")
        ),
    }
    if not cell.by_trl:
        figures["logits"] = _reloaded(bench, cell)
        figures["names"] = _named_as_the_base(bench, cell)
        figures["copies"] = _held_once(folder)
    # In bfloat16 the logits were rounded twice: under autocast where trained, without it where loaded.
    twice = 2 * limit if cell.dtype == "bfloat16" else limit
    good = max(losses[0], figures["gradient"]) <= limit and figures.get("logits", 0) <= twice
    good &= figures.get("names", True) and figures.get("copies", True)
    return figures | {"ok": good and max(losses) <= cell.later_limit}


def _curve(folder: Path) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows]


def _distance(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The worst of all tensors; infinite where they are not the same tensors. TRL's text-only steps leave the vision
    tower without gradients, which DeepSpeed then gives as zeros: those may be missing."""
    found = {name: value for name, value in found.items() if name in expected or value.any()}
    if found.keys() != expected.keys():
        return float("inf")
    least = max(value.norm() for value in expected.values()) / 1000
    return max(float((found[name] - value).norm() / max(value.norm(), least)) for name, value in expected.items())


def _reloaded(bench: Bench, cell: Cell) -> float:
    """How far the logits of the saved result are from those of the model that was trained."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    from gemma_dist.model.load import keep_four_bit_exact

    out, dtype = bench.folder / cell.name / "out", getattr(torch, cell.dtype)
    settings: dict[str, Any] = {"dtype": dtype}
    if cell.tuning == "qlora":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    base = out if cell.tuning == "full" else bench.model(cell.style, cell.dtype)
    model, report = AutoModelForImageTextToText.from_pretrained(
        base, output_loading_info=True, trust_remote_code=False, **settings
    )
    if report["missing_keys"] or report["unexpected_keys"]:
        return float("inf")
    keep_four_bit_exact(model)
    if cell.tuning != "full":
        model = PeftModel.from_pretrained(model, str(out))
    with torch.no_grad():
        logits = model.eval()(**load_file(bench.probe(cell.style))).logits.float()
    trained = load_file(bench.folder / cell.name / "logits.safetensors")["logits"]
    return float((logits - trained).abs().max() / trained.abs().max())


def _named_as_the_base(bench: Bench, cell: Cell) -> bool:
    """Whether a server finds each tensor of the result under the name that it knows."""
    out = bench.folder / cell.name / "out"
    found = [_header(out), _header(out / f"checkpoint-{NUM_STEPS}")]
    if cell.tuning == "full":
        expected = _header(bench.model(cell.style, cell.dtype))
        return found == [expected, expected]
    reference = _shapes(_header(bench.folder / cell.reference.name / "out"))
    return [_shapes(header) for header in found] == [reference, reference]  # at ZeRO-3 it has the base's number format


def _held_once(folder: Path) -> bool:
    """Whether rank 0 alone held the model's tensors for each checkpoint, and just those that it wrote."""
    written = [entry for file in _files(folder / "out") for entry in file.entries.values()]
    expected = {"bytes": sum(entry.num_bytes for entry in written), "tensors": len(written)}
    for path in sorted(folder.glob("saved-*.jsonl")):
        for line in path.read_text().splitlines():
            held = json.loads(line)
            if held != (expected if path.name == "saved-0.jsonl" else {"bytes": 0, "tensors": 0}):
                return False
    return (folder / "saved-0.jsonl").exists()


def _files(folder: Path) -> list[Any]:
    """The open files of a model or an adapter."""
    from gemma_dist.tensorfile import open_tensors

    paths = [path for path in folder.glob("*.safetensors") if not path.name.startswith("optimizer")]
    return [open_tensors(path) for path in sorted(paths)]


def _header(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Number format and shape of each tensor in a folder's files."""
    return {name: (entry.dtype, entry.shape) for file in _files(folder) for name, entry in file.entries.items()}


def _shapes(header: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, (_, shape) in header.items()}


# ---- the table -------------------------------------------------------------------------------------------------------


def show(results: dict[Cell, dict[str, Any]]) -> None:
    """A row for each tuning and style (and for bfloat16, other optimisers, and going on in the same launch or from
    another one), a column for each launch: the worst loss, gradient and logits of its cells, or the worst figure of
    resuming, with the number of cells."""
    columns = [launch for launch in LAUNCHES if any(cell.launch == launch for cell in results)]
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for cell, result in results.items():
        kind = "bfloat16" if cell.dtype == "bfloat16" else cell.style
        kind = "other optim" if cell.optim != "adamw_torch" else kind
        if cell.resumed:
            kind = "resumed" if cell.whole.launch == cell.launch else "moved here"
        rows.setdefault(f"{cell.tuning} {kind}", {}).setdefault(cell.launch, []).append(result)
    width = 20
    print("\n" + " " * 20 + "".join(f"{launch:>{width}}" for launch in columns))
    for name, by_launch in sorted(rows.items()):
        print(f"{name:20}" + "".join(f"{_words(by_launch.get(launch, [])):>{width}}" for launch in columns))
    good = sum(result.get("ok", False) for result in results.values())
    print(f"\n{good} of {len(results)} cells agree with their reference", flush=True)
    for cell, result in results.items():
        if not result.get("ok"):
            print(f"  {cell.name}: {str(result.get('error', result)).strip().partition(chr(10))[0][:300]}")


def show_peer(bench: Bench, results: dict[Cell, dict[str, Any]]) -> None:
    """The same table for TRL, each cell against TRL's own reference; and what the first loss is of."""
    print("\nTRL's SFTTrainer on the same rows, against TRL in one process: loss / gradient")
    show(results)
    for style, data in product(STYLES, DATA):
        cell = Cell("single", "full", style, data, is_reference=True)
        both = [bench.folder / one.name / "out" / "metrics.jsonl" for one in (cell, replace(cell, by_trl=True))]
        if all(path.exists() for path in both):
            ours, trl = (_curve(path.parents[1])[0][0] for path in both)
            print(f"  first loss of {cell.style}, {cell.data}: gemma_dist {ours:.4f}, TRL {trl:.4f}")


def _words(results: list[dict[str, Any]]) -> str:
    if not results:
        return "."
    if failed := sum("error" in result for result in results):
        return f"{failed} of {len(results)} failed"
    names = [name for name in ("loss", "gradient", "logits", "resume") if name in results[0]]
    worst = (f"{max(result[name] for result in results):.0e}".replace("e-0", "e-") for name in names)
    numbers = " ".join("0" if number == "0e+00" else number for number in worst)
    return f"{numbers} ({len(results)}){'' if all(result['ok'] for result in results) else ' !'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pruned", action="store_true", help="the set that the tests run")
    parser.add_argument("--only", nargs="+", default=[], help="cells whose name has all these words")
    parser.add_argument("--against", choices=["trl"], help="train what plain TRL takes of the cells with it, too")
    parser.add_argument("--json", type=Path, help="also write every cell's figures to this file")
    parser.add_argument("--keep", type=Path, help="folder for the runs, which is kept, and gone on with")
    options = parser.parse_args()
    cells = pruned_cells() if options.pruned else all_cells()
    cells = [cell for cell in cells if all(word in cell.name for word in options.only)]
    folder = options.keep or Path(tempfile.mkdtemp(prefix="parity-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        bench = Bench(folder)
        results = run_cells(bench, cells)
        show(results)
        if options.against:
            peers = [cell for cell in peer_cells() if all(word in cell.name for word in options.only)]
            show_peer(bench, run_cells(bench, peers))
    finally:
        if not options.keep:
            shutil.rmtree(folder)
    if options.json:
        options.json.write_text(json.dumps({cell.name: result for cell, result in results.items()}, indent=1))
    return 0 if all(result.get("ok") for result in results.values()) else 1


def run_cells(bench: Bench, cells: list[Cell]) -> dict[Cell, dict[str, Any]]:
    """The references and the cells, launch by launch; then those that go on from a launch that comes later."""
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    wholes = [cell.whole for cell in cells if cell.resumed]
    references = dict.fromkeys(cell.reference for cell in [*cells, *wholes])
    runs = dict.fromkeys([*references, *cells, *wholes])  # in order, each once
    order = list(LAUNCHES)
    later = [
        cell for cell in runs if order.index(cell.whole.launch if cell.resumed else "single") > order.index(cell.launch)
    ]
    for group in (
        [cell for cell in runs if cell not in later],
        later,
    ):  # of those, the first run comes from a later launch
        for launch in LAUNCHES:
            if mine := [cell for cell in group if cell.launch == launch]:
                run_launch(bench, launch, sorted(mine, key=lambda cell: bool(cell.resumed)))
    return {cell: judge(bench, cell) for cell in cells}


if __name__ == "__main__":
    sys.exit(main())
