"""Back to LoRA: what was merged is found again, the error is the least one, and other pairs are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from gemma_dist.__main__ import main
from gemma_dist.config_merge import ExtractConfig
from gemma_dist.errors import CheckpointError
from gemma_dist.export.extract import LINEAR, extract, largest_factors
from gemma_dist.export.lora import export_adapter
from gemma_dist.merge.run import merge
from gemma_dist.model.towers import linear_layers
from tests.test_merge import write_adapter

ALL = r"model\.language_model\.(layers\..*\.(self_attn|mlp)\..*_proj|.*per_layer_(input_gate|(model_)?projection))"


def least_error(change: torch.Tensor, rank: int) -> float:
    """||D - BA|| / ||D|| of the best factors: the tail of the singular values."""
    squares = torch.linalg.svdvals(change.double()).square()
    return float((squares[rank:].sum() / squares.sum()).sqrt())


def logits(folder: Path) -> torch.Tensor:
    ids = torch.arange(50, 80)[None]
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=ids, mm_token_type_ids=torch.zeros_like(ids)).logits


def changed_copy(base: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A model folder beside `base` with other tensors."""
    shutil.copytree(base, to)
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def moved(*names: str, layer: str = "model.language_model.layers.0.self_attn.q_proj.weight") -> Any:
    """A change of one linear layer, and of some other tensors."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        torch.manual_seed(0)
        for name in (layer, *names):
            tensors[name] = tensors[name] + 0.1 * torch.randn_like(tensors[name])

    return change


@pytest.mark.parametrize("style", ["e4b", "26b", "12b"])
def test_what_was_merged_is_found_again(tiny_model: Callable[..., Path], tmp_path: Path, style: str) -> None:
    base, tuned = tiny_model(style), tmp_path / "tuned"
    write_adapter(base, tmp_path / "adapter", target_modules=ALL)
    merge(base, tmp_path / "adapter", tuned, verify=False, base_weights="as_trained")
    report = extract(base, tuned, tmp_path / "out", ExtractConfig(r=4))
    assert report.errors["total"] < 1e-4
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "adapter"))
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    again = merge(base, tmp_path / "out", tmp_path / "again", verify=False, base_weights="as_trained")
    assert not [note for note in again.notes if "other weights" in note or "absent" in note]
    before, after = (load_file(folder / "model.safetensors") for folder in (tuned, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=2e-6, rtol=0)
    torch.testing.assert_close(logits(tmp_path / "again"), logits(tuned), atol=1e-4, rtol=0)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (tuned / name).read_bytes()


def test_a_lower_rank_lacks_the_tail_of_the_singular_values(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = tiny_model("e4b"), tmp_path / "tuned"
    write_adapter(base, tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tuned, verify=False, base_weights="as_trained")
    assert main(["extract", str(base), str(tuned), "--r", "2", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "gemma_dist.json").read_text())["extracted"]
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    found: dict[str, list[float]] = {}
    for name in [name for name in before if not torch.equal(before[name], after[name])]:
        change, module = after[name] - before[name], "base_model.model." + name.removesuffix(".weight")
        left = change - factors.pop(f"{module}.lora_B.weight") @ factors.pop(f"{module}.lora_A.weight")
        assert float(left.norm() / change.norm()) == pytest.approx(least_error(change, 2), rel=1e-3)
        for kind in (module.split(".", 6)[-1], "total"):
            sums = found.setdefault(kind, [0.0, 0.0])
            sums[0] += float(left.double().square().sum())
            sums[1] += float(change.double().square().sum())
    assert not factors
    assert record["relative_error"] == pytest.approx(
        {kind: (left / whole) ** 0.5 for kind, (left, whole) in found.items()}, rel=1e-5
    )
    assert len(found) == 8
    assert f"lacks {record['relative_error']['total']:.3%}" in shown
    assert "of whose change it lacks" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("shape", "rank"), [((512, 768), 16), ((768, 300), 64), ((96, 7), 16)])
def test_factors_of_pure_noise_are_as_near_as_any(shape: tuple[int, int], rank: int) -> None:
    torch.manual_seed(0)
    change = torch.randn(shape)
    b, a = largest_factors(change, rank)
    assert (b.shape, a.shape) == ((shape[0], rank), (rank, shape[1]))
    assert float((change - b @ a).norm() / change.norm()) <= 1.001 * least_error(change, rank) + 1e-5
    state = torch.random.get_rng_state()
    assert torch.equal(largest_factors(change, rank)[0], b)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("style", ["e2b", "e4b", "12b", "26b", "31b"])
def test_matrices_that_are_taken_are_the_linear_layers(tiny_model: Callable[..., Path], style: str) -> None:
    base = tiny_model(style)
    matrices = {name for name, value in load_file(base / "model.safetensors").items() if value.dim() == 2}
    linear = {path for path in linear_layers(AutoConfig.from_pretrained(base)) if "language_model" in path}
    assert {name.removesuffix(".weight") for name in matrices if LINEAR.fullmatch(name)} == linear


def test_rounding_is_told_and_other_dtypes_are_compared_by_value(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_model("e4b", "bfloat16")
    write_adapter(base, tmp_path / "adapter")
    errors = {}
    for dtype in ("float32", "bfloat16"):
        merge(base, tmp_path / "adapter", tmp_path / dtype, verify=False, base_weights="as_trained", dtype=dtype)
        report = extract(base, tmp_path / dtype, tmp_path / f"out-{dtype}", ExtractConfig(r=4))
        errors[dtype] = report.errors["total"]
        assert ("in BF16: its rounding is part" in report.summary()) == (dtype == "bfloat16")
    assert errors["float32"] < 1e-5
    assert 1e-3 < errors["bfloat16"] < 0.1


def test_what_factors_do_not_hold_is_refused_by_name_or_left_out_by_name(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_model("26b")
    others = ["model.language_model.norm.weight", "model.language_model.layers.1.experts.down_proj"]
    tuned = changed_copy(base, tmp_path / "tuned", moved(*others))
    words = ["extract", str(base), str(tuned), "--out", str(tmp_path / "out")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in (*others, "--ignore-others"))
    assert not (tmp_path / "out").exists()
    assert main([*words, "--ignore-others"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in others)
    assert sorted(json.loads((tmp_path / "out" / "gemma_dist.json").read_text())["extracted"]["left_out"]) == sorted(
        others
    )
    most = min(load_file(base / "model.safetensors")["model.language_model.layers.0.self_attn.q_proj.weight"].shape)
    assert main([*words[:3], "--out", str(tmp_path / "wide"), "--ignore-others", "--r", str(most + 1)]) == 2
    assert f"use --r {most}" in capsys.readouterr().err
    only_others = changed_copy(base, tmp_path / "others", moved(layer=others[0]))
    with pytest.raises(CheckpointError, match="nothing differs between the linear layers"):
        extract(base, only_others, tmp_path / "none", ExtractConfig(ignore_others=True))


def test_layers_that_share_keys_may_lack_them_and_vllm_takes_the_result(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    tuned = changed_copy(tiny_model("e4b"), tmp_path / "tuned", moved())

    def as_google_has_it(tensors: dict[str, torch.Tensor]) -> None:
        path = "model.language_model.layers.{}.self_attn.k_proj.weight"
        tensors[path.format(4)] = tensors[path.format(2)].clone()

    base = changed_copy(tiny_model("e4b"), tmp_path / "base", as_google_has_it)
    assert extract(base, tuned, tmp_path / "out", ExtractConfig(r=8)).num_modules == 1
    assert export_adapter(tmp_path / "out", base, tmp_path / "vllm", "vllm").num_modules == 1


def lacks_a_norm(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.language_model.norm.weight"]


def is_wider(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.language_model.norm.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name]])


def is_not_finite(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.language_model.layers.0.mlp.up_proj.weight"][1, 2] = torch.nan


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: None, "nothing differs between the linear layers"),
        (lacks_a_norm, r"has model.language_model.norm.weight, and .*tuned has not; give the base"),
        (is_wider, r"norm.weight has shape \[\d+\] in .* and \[\d+\] in .*tuned"),
        (is_not_finite, "layers.0.mlp.up_proj.weight is not finite"),
    ],
)
def test_wrong_pairs_are_refused(
    tiny_model: Callable[..., Path], tmp_path: Path, change: Callable[[Any], None], reason: str
) -> None:
    tuned = changed_copy(tiny_model("e4b"), tmp_path / "tuned", change)
    with pytest.raises(CheckpointError, match=reason):
        extract(tiny_model("e4b"), tuned, tmp_path / "out", ExtractConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]


def test_places_that_are_no_models_are_named(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_model("e4b")
    write_adapter(base, tmp_path / "adapter")
    for (one, two, out), reason in {
        (base, tmp_path / "adapter", tmp_path / "out"): f"{tmp_path / 'adapter'} is an adapter, which is no model",
        ("nowhere/none", base, tmp_path / "out"): "BASE nowhere/none is neither a folder nor",
        (base, tiny_model("31b"), tmp_path / "out"): "give the base that it was tuned from",
        (base, base, base / "out"): "which is read; name a folder outside it",
        (base, base, tmp_path / "adapter"): "exists already",
    }.items():
        assert main(["extract", str(one), str(two), "--out", str(out)]) == 2
        assert reason in capsys.readouterr().err
    assert main(["extract", str(base), str(base), "--r", "0", "--out", str(tmp_path / "out")]) == 2
    assert "--r 0" in capsys.readouterr().err
