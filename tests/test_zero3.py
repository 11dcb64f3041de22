"""ZeRO-3 and FSDP2: what ranks load together is what one process loads, none of them holds it whole, and it answers
alike.

This file is also what each rank runs: accelerate launch … -m tests.test_zero3 FOLDER MODEL DTYPE [MODEL DTYPE]…, where
a DTYPE of 4-bit is QLoRA in float32.
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from gemma_dist.__main__ import main
from gemma_dist.gemma_format import STOP_TOKENS
from tests.support.corpus import row, write_rows
from tests.support.ranks import ENVIRONMENT, REPOSITORY, gemma_dist, long, needs_compiler

# Style, dtype of the files, dtype in memory.
STYLES = [
    ("e4b", "float32", "float32"),
    ("31b", "float32", "bfloat16"),
    ("26b", "bfloat16", "bfloat16"),
    ("12b", "float32", "float32"),
    ("e4b", "float32", "4-bit"),
    ("26b", "float32", "4-bit"),
]


@needs_compiler
def test_ranks_load_what_one_process_loads(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    models: list[object] = []
    for style, stored, dtype in STYLES:
        models += [_in_shards(tiny_model(style, stored), tmp_path / f"{style}-{stored}-{dtype}"), dtype]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    launch += ["--config_file", "accelerate_configs/cpu_zero3.yaml"]
    words = [*launch, "-m", "tests.test_zero3", *map(str, [tmp_path, *models])]
    run = subprocess.run(
        words, cwd=REPOSITORY, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-8000:]
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text() == f"{len(STYLES)} models are equal"


@pytest.fixture(scope="module")
def evaluation(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The words of an evaluation of a style, and what one process finds; once for each of them."""

    @functools.cache
    def make(style: str, adapted: bool) -> tuple[list[object], Path]:
        folder = tmp_path_factory.mktemp("evaluation")
        # Rank 0 takes every other row: all images, and more batches than rank 1.
        numbers = [0, 1, 3, 2, 6]
        rows = [row(number, num_calls=1 + place % 3) for place, number in enumerate(numbers)]
        model = _talkative(tiny_model(style), folder / "model")
        words: list[object] = ["evaluate", "--model", model, "--data", write_rows(folder / "rows.jsonl", rows)]
        words += ["--max-new-tokens", 8, "--per-device-eval-batch-size", 2]
        if adapted:
            words += ["--adapter", _adapter(model, folder / "adapter")]
        assert main([*map(str, words), "--out", str(folder / "alone")]) == 0
        return words, folder / "alone"

    return make


@needs_compiler
@pytest.mark.parametrize(
    ("launch", "name", "style", "adapted"),
    [
        ("cpu_zero3", "ZeRO-3", "e4b", True),
        ("cpu_fsdp2", "FSDP2", "e4b", True),
        pytest.param("cpu_zero3", "ZeRO-3", "31b", False, marks=long),
        pytest.param("cpu_zero3", "ZeRO-3", "12b", False, marks=long),
        pytest.param("cpu_zero3", "ZeRO-3", "26b", True, marks=long),
    ],
)
def test_ranks_answer_what_one_process_answers(
    evaluation: Any, tmp_path: Path, launch: str, name: str, style: str, adapted: bool
) -> None:
    (words, alone), together = evaluation(style, adapted), tmp_path / "together"
    output = gemma_dist(*words, "--out", together, launch=launch)
    assert f"partitioned over 2 ranks ({name})" in output

    one, two = (json.loads((out / "report.json").read_text()) for out in (alone, together))
    assert (one.pop("times")["world_size"], two.pop("times")["world_size"]) == (1, 2)
    losses, other_losses = (report.pop("loss")["metrics"] for report in (one, two))
    assert one == two
    assert losses.keys() == other_losses.keys() > {"loss", "loss_call", "loss_argument", "loss_text"}
    for metric, found in losses.items():
        assert other_losses[metric] == pytest.approx(found, rel=1e-5)
    samples, others = (
        [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()] for out in (alone, together)
    )
    for sample, other in zip(samples, others, strict=True):
        assert other["loss"].keys() == sample["loss"].keys()
        assert all(other["loss"][kind] == pytest.approx(found, rel=1e-5) for kind, found in sample["loss"].items())
        assert other | {"loss": None} == sample | {"loss": None}
    assert {bool(sample["num_images"]) for sample in samples if sample["trajectory"] % 2 == 0} == {False}
    assert any(sample["num_images"] for sample in samples)
    assert len({sample["output_tokens"] for sample in samples}) > 1


def _talkative(model: Path, folder: Path) -> Path:
    """The model, made to stop now and then: louder embeddings of the stop tokens, which are its output weights too."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(model)
    loaded = AutoModelForImageTextToText.from_pretrained(model, dtype="auto")
    for token, scale in zip(processor.tokenizer.convert_tokens_to_ids(list(STOP_TOKENS)), (4, -4, 4), strict=True):
        loaded.lm_head.weight.data[token] *= scale
    loaded.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _adapter(model: Path, folder: Path) -> Path:
    """A LoRA adapter that changes something."""
    from gemma_dist.config import LoraConfig, ModelConfig
    from gemma_dist.model.load import add_adapter, load_model

    torch.manual_seed(1)
    base = load_model(ModelConfig(model_name_or_path=str(model), dtype="float32"), None, packing=False)
    experts = ["experts.gate_up_proj", "experts.down_proj"] if base.config.text_config.enable_moe_block else []
    adapted = add_adapter(base, LoraConfig(r=4, lora_alpha=8, target_parameters=experts), zero3=False)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(str(folder))
    return folder


def _in_shards(model: Path, folder: Path) -> Path:
    """The model in several files, with a buffer that is not what it is made as."""
    from transformers import AutoModelForImageTextToText

    loaded = AutoModelForImageTextToText.from_pretrained(model, dtype="auto")
    for number, layer in enumerate(loaded.model.language_model.layers):
        layer.layer_scalar.fill_(0.5 + number)
    loaded.save_pretrained(folder, max_shard_size="1MB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def compare(folder: Path, models: list[tuple[str, str]]) -> None:
    """Load each model alone and partitioned, and compare every weight and buffer, bit by bit and tied alike."""
    from transformers import core_model_loading, modeling_utils

    from gemma_dist import world
    from gemma_dist.batch_plan import batch_plan
    from gemma_dist.config import ModelConfig, QuantizationConfig
    from gemma_dist.model.load import load_model
    from gemma_dist.recipe import load_config
    from gemma_dist.resolve import Run
    from gemma_dist.topology import current_topology
    from gemma_dist.train.trainer import training_arguments

    def load(name: str, dtype: str) -> Any:
        quantization = None
        if dtype == "4-bit":
            dtype, quantization = "float32", QuantizationConfig(bnb_4bit_compute_dtype="float32")
        return load_model(ModelConfig(model_name_or_path=name, dtype=dtype), quantization, packing=False)

    def whole_on_every_rank(*_: Any) -> None:
        raise AssertionError("rank 0 reads the file and sends it around")

    modeling_utils._load_state_dict_into_zero3_model = whole_on_every_rank
    alone = [load(name, dtype) for name, dtype in models]
    for (name, dtype), expected in zip(models, alone, strict=True):
        words = [f"model_name_or_path={name}", "data.train=none", f"output_dir={folder}"]
        words += [f"bf16={dtype == 'bfloat16'}", f"model.dtype={dtype if dtype != '4-bit' else 'float32'}"]
        config = load_config(REPOSITORY / "launch/cpu_lora.yaml", words)
        topology = current_topology()
        schedule: Any = None  # no data
        run = Run(config, topology, batch_plan(config, topology.num_processes), schedule, num_steps=1)
        arguments = training_arguments(run)  # turns ZeRO-3 on
        with patch.object(core_model_loading, "set_param_for_module", held := Held()):
            loaded = load(name, dtype)
        assert all(0 <= 2 * p.ds_tensor.numel() - p.ds_numel < 4 for p in loaded.parameters()), "more than a half"
        assert held.most <= sum(p.nbytes for p in expected.parameters()) / 2 + held.largest + 4096, vars(held)
        assert (held.most > 0) == (dtype == "4-bit"), "the others read no weight whole"
        assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
        compare_tensors(dict(loaded.named_parameters()), dict(expected.named_parameters()))
        compare_tensors(dict(loaded.named_buffers()), dict(expected.named_buffers()))
        assert saved_names(loaded) == saved_names(expected)
        del arguments
    (folder / str(world.rank())).write_text(f"{len(models)} models are equal")
    world.barrier()
    world.disconnect()


class Held:
    """In the place of what hands a model its weights one by one, if they are quantized as they come: how many bytes of
    its parameters this rank holds whenever it has one more, at most, and how many the largest of them has."""

    def __init__(self) -> None:
        from transformers import core_model_loading

        self.hand, self.most, self.largest = core_model_loading.set_param_for_module, 0, 0

    def __call__(self, model: Any, name: str, value: torch.Tensor, *arguments: Any) -> None:
        self.hand(model, name, value, *arguments)
        held = 0
        for parameter in model.parameters():
            held += 0 if parameter.is_meta else parameter.nbytes
            held += parameter.ds_tensor.nbytes if hasattr(parameter, "ds_tensor") else 0
        self.most, self.largest = max(self.most, held), max(self.largest, value.nbytes)


def saved_names(model: Any) -> set[str]:
    """The names that `save_pretrained` would give the weights."""
    from transformers.core_model_loading import revert_weight_conversion

    return set(revert_weight_conversion(model, {name: torch.empty(0) for name in model.state_dict()}))


def compare_tensors(loaded: dict[str, Any], expected: dict[str, Any]) -> None:
    from deepspeed.runtime.zero import GatheredParameters

    assert loaded.keys() == expected.keys()
    with GatheredParameters(list(loaded.values())):
        for name, tensor in loaded.items():
            assert tensor.dtype == expected[name].dtype, f"{name}: {tensor.dtype}, not {expected[name].dtype}"
            assert torch.equal(tensor, expected[name]), f"{name} differs: {tensor} {expected[name]}"
            if (scales := getattr(expected[name], "quant_state", None)) is not None:
                assert torch.equal(tensor.quant_state.absmax, scales.absmax), f"{name}: other scales"


if __name__ == "__main__":
    compare(Path(sys.argv[1]), list(zip(sys.argv[2::2], sys.argv[3::2], strict=True)))
