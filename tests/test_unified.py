"""12B on its whole road: QLoRA in bfloat16 with images, answers, a merge with any adapter, names that servers know."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gemma_dist.__main__ import main
from gemma_dist.merge.run import merge
from gemma_dist.tensorfile import open_tensors
from tests.support.corpus import row, shard_rows, write_rows
from tests.support.ranks import gemma_dist

STYLE = "12b"
# All linear layers: with those that make soft tokens of images and sound.
ALL_LINEAR = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|patch_dense|embedding_projection)"


def test_qlora_in_bfloat16_with_images_trains_answers_and_merges(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [row(number) for number in range(0, 18, 3)]  # an image in each
    base = tiny_model(STYLE, "bfloat16")
    shard_rows(tmp_path, str(base), rows)
    out = tmp_path / "out"
    settings = ["model.dtype=bfloat16", "bf16=true", "bnb_4bit_compute_dtype=bfloat16", "packing=true"]
    settings += ["packing_length=400", "max_steps=2", "global_batch_size=4", f"output_dir={out}"]
    words = [f"model_name_or_path={base}", f"data.train={tmp_path / 'shards'}", *settings]
    gemma_dist("train", "launch/cpu_qlora.yaml", *words)
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert losses
    assert torch.tensor(losses).isfinite().all()
    modules = json.loads((out / "gemma_dist.json").read_text())["quantization"]["modules"]
    assert modules
    assert all(".language_model.layers." in name for name in modules), "what makes soft tokens stays whole"

    data, answers = write_rows(tmp_path / "held_out.jsonl", rows[:2]), tmp_path / "answers"
    words = ["--model", str(base), "--adapter", str(out), "--data", str(data), "--out", str(answers)]
    assert main(["evaluate", *words, "--max-new-tokens", "4"]) == 0
    samples = [json.loads(line) for line in (answers / "samples.jsonl").read_text().splitlines()]
    assert any(sample["num_images"] for sample in samples)

    merge(base, out, tmp_path / "merged", verify=True, base_weights="as_trained")
    before, after = (open_tensors(folder / "model.safetensors").entries for folder in (base, tmp_path / "merged"))
    assert {name: (entry.dtype, entry.shape) for name, entry in before.items()} == {
        name: (entry.dtype, entry.shape) for name, entry in after.items()
    }


def test_an_adapter_on_all_linear_layers_is_merged_under_the_names_of_the_files(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    base = tiny_model(STYLE)
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=ALL_LINEAR, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    report = merge(base, tmp_path / "adapter", tmp_path / "out", verify=True, base_weights="as_trained")
    assert report.verification is not None
    assert report.verification["top1_agreement"] == 1.0
    adapted.merge_and_unload().save_pretrained(tmp_path / "expected")  # transformers gives the names of the files
    expected, result, before = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "expected", tmp_path / "out", base)
    )
    assert result.keys() == before.keys()
    assert all(torch.equal(result[name], expected[name]) for name in expected)
    changed = {name for name in before if not torch.equal(before[name], result[name])}
    soft = {"embed_audio.embedding_projection", "embed_vision.embedding_projection", "vision_embedder.patch_dense"}
    assert {f"model.{name}.weight" for name in soft} == {name for name in changed if ".layers." not in name}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_full_model_is_saved_under_the_names_of_its_files(
    tiny_model: Callable[..., Path], tmp_path: Path, dtype: str
) -> None:
    from gemma_dist.config import ModelConfig
    from gemma_dist.model.load import load_model

    base = tiny_model(STYLE, dtype)
    model = load_model(ModelConfig(model_name_or_path=str(base), dtype=dtype), None, packing=True)
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
