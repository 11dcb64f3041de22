"""How far a cell is from its reference, and whether that is near enough."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from gemma_dist.tensorfile import TensorFile, open_tensors
from tests.parity.bench import NUM_STEPS, Bench, four_bits
from tests.parity.cells import LIMITS, Cell

if TYPE_CHECKING:
    import torch

Header = dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape of each tensor in a folder's files


class Figures(TypedDict, total=False):
    """What was found of a cell. A resumed one has `resume` alone, one of TRL no logits, names and copies."""

    loss: float
    gradient: float
    logits: float
    names: bool
    copies: bool
    resume: float
    ok: bool
    error: str  # alone, where the cell or its reference did not run


def judge(bench: Bench, cell: Cell) -> Figures:
    """The figures of a cell that `bench` has run."""
    folder, reference = bench.of(cell), bench.of(cell.reference)
    if (folder / "error.txt").exists():
        return {"error": (folder / "error.txt").read_text()}
    if (reference / "error.txt").exists():
        return {"error": "its reference: " + (reference / "error.txt").read_text()}
    if cell.resumed_from:
        return _judge_resumed(bench, cell)
    losses = [
        abs(found - expected) / expected
        for (found, _), (expected, _) in zip(curve(folder), curve(reference), strict=True)
    ]
    limit = LIMITS[cell.dtype]
    figures: Figures = {"loss": max(losses), "gradient": _gradient_distance(folder, reference)}
    good = losses[0] <= limit and max(losses) <= cell.later_limit and figures["gradient"] <= limit
    if not cell.peer:
        figures["logits"] = _reloaded(bench, cell)
        figures["names"] = _named_as_the_base(bench, cell)
        figures["copies"] = _held_once(folder)
        # In bfloat16 the logits were rounded twice: under autocast where trained, without it where loaded.
        logits_limit = 2 * limit if cell.dtype == "bfloat16" else limit
        good = good and figures["logits"] <= logits_limit and figures["names"] and figures["copies"]
    return {**figures, "ok": good}


def _judge_resumed(bench: Bench, cell: Cell) -> Figures:
    """Losses and gradient norms of steps 3 to 5 against those of the run that was not interrupted."""
    resumed, whole = curve(bench.of(cell)), curve(bench.of(cell.whole))[2:]
    differences = []
    for found, expected in zip(resumed, whole, strict=True):
        differences += [abs(x - y) / abs(y) for x, y in zip(found, expected, strict=True)]
    worst = max(differences)
    limit = 0 if cell.stays else cell.later_limit
    return {"resume": worst, "ok": worst <= limit}


def curve(folder: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of a run."""
    rows = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows]


def _gradient_distance(folder: Path, reference: Path) -> float:
    """The worst of all tensors; infinite where they are not the same tensors. TRL's text-only steps leave the vision
    tower without gradients, which DeepSpeed then gives as zeros: those may be missing."""
    from safetensors.torch import load_file

    expected = load_file(reference / "gradients.safetensors")
    found = load_file(folder / "gradients.safetensors")
    found = {name: value for name, value in found.items() if name in expected or value.any()}
    if found.keys() != expected.keys():
        return math.inf
    least = max(value.norm() for value in expected.values()) / 1000

    def distance(name: str) -> float:
        difference = found[name] - expected[name]
        return float(difference.norm() / max(expected[name].norm(), least))

    return max(map(distance, expected))


def _reloaded(bench: Bench, cell: Cell) -> float:
    """How far the logits of the saved result are from those of the model that was trained."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText

    from gemma_dist.model.load import keep_four_bit_exact
    from gemma_dist.model.vision import use_image_rule

    out, dtype = bench.of(cell) / "out", getattr(torch, cell.dtype)
    base = out if cell.tuning == "full" else bench.model(cell.style, cell.dtype)
    if cell.in_4_bits:
        base = bench.model_of_full_experts(cell.style, cell.dtype)
    model, report = AutoModelForImageTextToText.from_pretrained(
        base,
        dtype=dtype,
        quantization_config=four_bits(dtype, cell.style) if cell.in_4_bits else None,
        output_loading_info=True,
        trust_remote_code=False,
    )
    if report["missing_keys"] or report["unexpected_keys"]:
        return math.inf
    keep_four_bit_exact(model)
    use_image_rule(model)
    if cell.tuning != "full":
        model = PeftModel.from_pretrained(model, str(out))
    with torch.no_grad():
        logits = model.eval()(**load_file(bench.probe_of(cell))).logits.float()
    return _relative(logits, load_file(bench.of(cell) / "logits.safetensors")["logits"])


def _relative(found: "torch.Tensor", expected: "torch.Tensor") -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _named_as_the_base(bench: Bench, cell: Cell) -> bool:
    """Whether a server finds each tensor of the result under the name that it knows."""
    out = bench.of(cell) / "out"
    headers = [_header(out), _header(out / f"checkpoint-{NUM_STEPS}")]
    if cell.tuning == "full":
        base = _header(bench.model(cell.style, cell.dtype))
        return headers == [base, base]
    reference = _shapes(_header(bench.of(cell.reference) / "out"))
    return [_shapes(header) for header in headers] == [reference, reference]  # at ZeRO-3 it has the base's dtype


def _held_once(folder: Path) -> bool:
    """Whether rank 0 alone held the model's tensors for each checkpoint, and just those that it wrote."""
    written = [entry for file in _files(folder / "out") for entry in file.entries.values()]
    result = {"bytes": sum(entry.num_bytes for entry in written), "tensors": len(written)}
    nothing = {"bytes": 0, "tensors": 0}
    for path in sorted(folder.glob("saved-*.jsonl")):
        expected = result if path.name == "saved-0.jsonl" else nothing
        held = [json.loads(line) for line in path.read_text().splitlines()]
        if any(one != expected for one in held):
            return False
    return (folder / "saved-0.jsonl").exists()


def _files(folder: Path) -> list[TensorFile]:
    """The files of a model or an adapter, their headers read."""
    paths = [path for path in folder.glob("*.safetensors") if not path.name.startswith("optimizer")]
    return [open_tensors(path) for path in sorted(paths)]


def _header(folder: Path) -> Header:
    return {name: (entry.dtype, entry.shape) for file in _files(folder) for name, entry in file.entries.items()}


def _shapes(header: Header) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, (_, shape) in header.items()}
