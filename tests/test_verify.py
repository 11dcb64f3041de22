"""Verifying a merge: layer by layer as a whole model computes, on trajectories, and no wrong merge gets through."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from gemma_dist.__main__ import main
from gemma_dist.config import EXPERT_WEIGHTS, LANGUAGE_MODEL_LINEARS, QuantizationConfig
from gemma_dist.errors import CheckpointError
from gemma_dist.merge.layerwise import LayerwiseModel, Run
from gemma_dist.merge.run import merge
from gemma_dist.merge.verify import Sample, made_up_samples, read_samples, verify
from gemma_dist.model import load
from gemma_dist.model.experts import adapt_four_bit_experts, loading_experts
from gemma_dist.model.record import four_bit_config, four_bit_modules, four_bit_stacks
from gemma_dist.shards.reader import open_shards
from tests.support.corpus import row, shard_rows, write_rows
from tests.support.ranks import long

FOUR_BIT: Any = {**QuantizationConfig(bnb_4bit_compute_dtype="float32").model_dump(), "weights_dtype": "float32"}


def write_adapter(base: Path, out: Path, *, four_bit: bool = False, seed: int = 1, **settings: Any) -> Any:
    """An adapter with random weights on the text layers, on the base as it is or in 4 bits; returns PEFT's model."""
    arguments = {"quantization_config": four_bit_config(FOUR_BIT)} if four_bit else {}
    with loading_experts("gpu" if four_bit else None):
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32, **arguments)
    load.keep_four_bit_exact(model)
    torch.manual_seed(seed)
    lora = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LANGUAGE_MODEL_LINEARS} | settings)
    adapted = get_peft_model(model, adapt_four_bit_experts(lora))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        elif "magnitude" in name or "modules_to_save" in name:
            parameter.data *= 1 + 0.1 * torch.rand_like(parameter)
    adapted.save_pretrained(out)
    lists = {"modules": four_bit_modules(adapted), "parameters": four_bit_stacks(adapted)}
    record = {"quantization": FOUR_BIT | lists if four_bit else None, "base_model": str(base)}
    (out / "gemma_dist.json").write_text(json.dumps(record))
    return adapted.eval()


def quantization_of(adapter: Path) -> Any:
    return json.loads((adapter / "gemma_dist.json").read_text())["quantization"]


def made_up(base: Path) -> Sequence[Sample]:
    return made_up_samples(AutoConfig.from_pretrained(base).to_dict()).rows


@torch.no_grad()
def whole_logits(model: Any, samples: Sequence[Sample]) -> list[torch.Tensor]:
    return [model(**sample.inputs).logits[0] for sample in samples]


def layerwise_logits(model: LayerwiseModel, samples: Sequence[Sample]) -> list[torch.Tensor]:
    hidden = model.run([Run(sample.inputs) for sample in samples])
    third = model.vocab_size // 3
    heads = [model.head(0, third), model.head(third, model.vocab_size)]
    return [torch.cat([head(one) for head in heads], dim=1) for one in hidden]


def assert_close(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5)


# ---- layer by layer --------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "saved": {
        "modules_to_save": ["embedding_projection"],
        "target_modules": r".*language_model.*\.(q_proj|per_layer_model_projection)",
    },
}


@pytest.mark.parametrize(
    ("style", "kind"), [("e2b", "saved"), ("e4b", "dora"), ("12b", "lora"), ("26b", "lora"), ("31b", "dora")]
)
def test_a_model_computes_layer_by_layer_what_it_computes_whole(
    tiny_model: Callable[..., Path], style: str, kind: str, tmp_path: Path
) -> None:
    base = tiny_model(style)
    experts: dict[str, Any] = (
        {"target_parameters": [f"experts.{name}" for name in EXPERT_WEIGHTS]} if style == "26b" else {}
    )
    whole = write_adapter(base, tmp_path / "adapter", **KINDS[kind], **experts)
    samples = made_up(base)
    model = LayerwiseModel(base, [(tmp_path / "adapter", 1.0)])
    assert_close(layerwise_logits(model, samples), whole_logits(whole, samples))
    assert_close(layerwise_logits(model, samples), whole_logits(whole, samples))  # as often as one likes
    with whole.disable_adapter():
        assert_close(layerwise_logits(LayerwiseModel(base), samples), whole_logits(whole, samples))


@pytest.mark.parametrize(("style", "targets"), [("e4b", []), ("26b", list(EXPERT_WEIGHTS))])
def test_a_base_in_4_bits_is_that_of_bitsandbytes_layers(
    tiny_model: Callable[..., Path], style: str, targets: list[str], tmp_path: Path
) -> None:
    base = tiny_model(style)
    names = [f"experts.{name}" for name in targets]
    whole = write_adapter(base, tmp_path / "adapter", four_bit=True, target_parameters=names)
    quantization, samples = quantization_of(tmp_path / "adapter"), made_up(base)
    model = LayerwiseModel(base, [(tmp_path / "adapter", 1.0)], quantization)
    assert_close(layerwise_logits(model, samples), whole_logits(whole, samples))


def test_adapters_are_summed_with_their_weights(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_model("31b")
    loras: dict[str, dict[str, Any]] = {"one": {}, "two": {"r": 3, "use_rslora": True}}
    for seed, (name, settings) in enumerate(loras.items()):
        write_adapter(base, tmp_path / name, seed=seed, **settings)
    model = LayerwiseModel(base, [(tmp_path / "one", 0.7), (tmp_path / "two", -0.5)])

    whole = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    stored = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    for name, weight in (("one", 0.7), ("two", -0.5)):
        merged = PeftModel.from_pretrained(
            AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), tmp_path / name
        ).merge_and_unload()
        before = load_file(base / "model.safetensors")
        for key, tensor in merged.state_dict().items():
            if key in before:
                stored[key] += weight * (tensor - before[key])
    whole.load_state_dict(stored)
    samples = made_up(base)
    assert_close(layerwise_logits(model, samples), whole_logits(whole.eval(), samples))


def test_no_more_than_a_layer_is_held(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    from gemma_dist.model.tiny import write_tiny_model

    write_tiny_model(tmp_path / "deep", style="e2b", num_hidden_layers=12)
    models = [LayerwiseModel(folder) for folder in (tiny_model("e2b"), tmp_path / "deep")]
    for model in models:
        model.run([Run(sample.inputs) for sample in made_up(tmp_path / "deep")])
    shallow, deep = (model.largest_bytes for model in models)
    assert shallow == deep
    assert deep < (tmp_path / "deep" / "model.safetensors").stat().st_size / 12


MEASURE = """
import re, sys, threading
from pathlib import Path
from gemma_dist.merge.verify import verify

def private():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

warm, base = map(Path, sys.argv[1:])
verify(warm, [(warm / "adapter", 1.0)], warm, quantization=None)  # all is imported, and the allocator is at work
done, most, start = threading.Event(), 0, private()
def watch():
    global most
    while not done.wait(0.002):
        most = max(most, private())
thread = threading.Thread(target=watch)
thread.start()
verify(base, [(base / "adapter", 1.0)], base, quantization=None)
done.set()
thread.join()
print(most - start)
"""


@long
def test_a_model_is_verified_in_a_fraction_of_its_size(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """The adapter computes nothing, so that the base itself is the merged model."""
    from gemma_dist.model.tiny import write_tiny_model

    shutil.copytree(tiny_model("31b", "bfloat16"), tmp_path / "warm")
    write_tiny_model(tmp_path / "base", style="31b", hidden_size=768, num_hidden_layers=12, dtype="bfloat16")
    for folder in (tmp_path / "warm", tmp_path / "base"):
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
        get_peft_model(
            model, LoraConfig(r=2, target_modules=r".*language_model.layers.0.self_attn.q_proj")
        ).save_pretrained(folder / "adapter")
    words = [sys.executable, "-c", MEASURE, str(tmp_path / "warm"), str(tmp_path / "base")]
    taken = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    in_float32 = 2 * (tmp_path / "base" / "model.safetensors").stat().st_size
    assert 0 < taken < in_float32 / 3, (taken, in_float32)


# ---- on trajectories -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["31b"])
def test_the_figures_are_those_of_the_logits(
    tiny_model: Callable[..., Path], style: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On rows and on shards of them; with pictures; of all tokens and of the trained ones."""
    monkeypatch.setattr("gemma_dist.merge.verify.BLOCK_TOKENS", 300)  # of 1,024: the last block is shorter
    base, adapter = tiny_model(style, "bfloat16"), tmp_path / "adapter"
    write_adapter(base, adapter)
    rows = [row(number) for number in range(4)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    words = ["--base", str(base), "--adapter", str(adapter), "--out", str(tmp_path / "out")]
    assert main(["merge", *words, "--verify-data", str(data), "--verify-samples", "3"]) == 0
    report = json.loads((tmp_path / "out" / "gemma_dist.json").read_text())["verification"]

    whole = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), adapter)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    samples = read_samples(tmp_path / "rows.jsonl", 3, base, adapter).rows
    assert ["pixel_values" in sample.inputs for sample in samples] == [True, False, False]
    p, q = (torch.cat(whole_logits(model.eval(), samples)).double() for model in (whole, merged))
    kl = (p.log_softmax(-1).exp() * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    trained = torch.cat([sample.trained for sample in samples])
    assert 0 < trained.sum() < len(trained) / 2
    for chosen, figures in ((torch.ones_like(trained), report), (trained, report["trained"])):
        assert figures["num_positions"] == chosen.sum()
        expected = {
            "max_logit_difference": (p - q)[chosen].abs().max(),
            "mean_logit_difference": (p - q)[chosen].abs().mean(),
            "kl": kl[chosen].mean(),
            "top1_agreement": (p.argmax(-1) == q.argmax(-1))[chosen].double().mean(),
        }
        for name, value in expected.items():
            assert figures[name] == pytest.approx(value.item(), rel=1e-3), name
    assert (report["num_samples"], report["data"]) == (3, str(tmp_path / "rows.jsonl"))

    shard_rows(tmp_path, str(base), rows)
    again = read_samples(tmp_path / "shards", 4, base, adapter).rows
    assert [sample.inputs["input_ids"].shape for sample in again[:3]] == [s.inputs["input_ids"].shape for s in samples]
    num_trained = sum(sample.trained.sum() for sample in again)
    assert num_trained == open_shards(tmp_path / "shards").num_target_tokens.sum()


def test_the_summary_says_what_was_compared(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_model("31b")
    write_adapter(base, tmp_path / "adapter")
    data = write_rows(tmp_path / "rows.jsonl", [row(1)])
    words = ["merge", "--base", str(base), "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]
    assert main([*words, "--verify-data", str(data)]) == 0
    said = capsys.readouterr().out
    assert "KL" in said
    assert "100.0% of" in said
    assert "trained tokens: largest logit difference" in said


def test_trajectories_that_cannot_be_read_end_a_merge_before_it_begins(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_model("31b")
    write_adapter(base, tmp_path / "adapter")
    words = ["merge", "--base", str(base), "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]
    (tmp_path / "empty.jsonl").touch()
    write_rows(tmp_path / "bad.jsonl", [{"messages": [{"role": "user"}]}])
    for name, told in (("empty.jsonl", "holds no trajectories"), ("bad.jsonl", "bad.jsonl:1")):
        assert main([*words, "--verify-data", str(tmp_path / name)]) == 2
        assert told in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


# ---- wrong merges ----------------------------------------------------------------------------------------------------


def change(folder: Path, name: str, new: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name: new}, path, {"format": "pt"})


@pytest.mark.parametrize(("dtype", "on_data"), [("float32", False), ("bfloat16", True)])
def test_one_layer_without_the_adapter_is_noticed(
    tiny_model: Callable[..., Path], dtype: str, on_data: bool, tmp_path: Path
) -> None:
    base, adapter, out = tiny_model("e4b", dtype), tmp_path / "adapter", tmp_path / "out"
    write_adapter(base, adapter)
    merge(base, adapter, out, verify=False, base_weights="as_trained")
    data = write_rows(tmp_path / "rows.jsonl", [row(number) for number in range(3)])
    samples = read_samples(data, 3, base, adapter) if on_data else None
    verify(base, [(adapter, 1.0)], out, quantization=None, samples=samples)
    before = load_file(base / "model.safetensors")
    for name in filter(lambda name: ".layers.3." in name, before):
        change(out, name, before[name])
    with pytest.raises(CheckpointError, match="does not compute what base"):
        verify(base, [(adapter, 1.0)], out, quantization=None, samples=samples)


@pytest.mark.parametrize("table", ["embed_tokens", "embed_tokens_per_layer"])
def test_one_wrong_row_of_a_trained_token_is_noticed(
    tiny_model: Callable[..., Path], table: str, tmp_path: Path
) -> None:
    base, adapter, out = tiny_model("e4b"), tmp_path / "adapter", tmp_path / "out"
    write_adapter(base, adapter, trainable_token_indices={table: [3, 70, 401]})
    name = f"model.language_model.{table}.weight"
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    (rows,) = (tensor for tensor in tensors if "trainable_tokens" in tensor)
    tensors[rows] += 0.1
    save_file(tensors, path, {"format": "pt"})
    merge(base, adapter, out, verify=True, base_weights="as_trained")
    merged = load_file(out / "model.safetensors")[name]
    merged[401] = load_file(base / "model.safetensors")[name][401]
    change(out, name, merged)
    with pytest.raises(CheckpointError, match="does not compute what base"):
        verify(base, [(adapter, 1.0)], out, quantization=None)


@pytest.mark.parametrize("wrong", ["scales of the scales", "one scale"])
def test_wrong_4_bit_weights_are_noticed(tiny_model: Callable[..., Path], wrong: str, tmp_path: Path) -> None:
    base, adapter, out = tiny_model("31b"), tmp_path / "adapter", tmp_path / "out"
    write_adapter(base, adapter, four_bit=True)
    quantization = quantization_of(adapter)
    merged_as = dict(quantization)
    if wrong == "scales of the scales":
        merged_as["bnb_4bit_use_double_quant"] = False
    (adapter / "gemma_dist.json").write_text(json.dumps({"quantization": merged_as}))
    merge(base, adapter, out, verify=False, base_weights="as_trained")
    if wrong == "one scale":
        name = "model.language_model.layers.2.mlp.up_proj.weight"
        weight = load_file(out / "model.safetensors")[name]
        change(out, name, torch.cat([weight[:1] * 1.2, weight[1:]]))
    with pytest.raises(CheckpointError, match="does not compute what base"):
        verify(base, [(adapter, 1.0)], out, quantization=quantization)


def test_a_merged_model_without_a_weight_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    base, adapter, out = tiny_model("31b"), tmp_path / "adapter", tmp_path / "out"
    write_adapter(base, adapter)
    merge(base, adapter, out, verify=False, base_weights="as_trained")
    tensors = load_file(out / "model.safetensors")
    del tensors["model.language_model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks weights of the model, such as .*layers\.1\.mlp\.up_proj"):
        verify(base, [(adapter, 1.0)], out, quantization=None)
