"""Recipes, process configs and batch scripts: each is accepted by what reads it, and they fit one another."""

import functools
import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from gemma_dist.batch_plan import batch_plan
from gemma_dist.cli import cli
from gemma_dist.config import LANGUAGE_MODEL_LINEARS, ModelConfig, RunConfig
from gemma_dist.errors import ConfigError
from gemma_dist.model.load import load_model
from gemma_dist.plan.run import Request, make_plan
from gemma_dist.recipe import load_config
from gemma_dist.resolve import Run, resolve
from gemma_dist.show.check import describe_run
from gemma_dist.topology import Topology
from tests.support.corpus import row, shard_rows

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "launch").glob("*.yaml"))
ACCELERATE_CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
WORLD_SIZES = {  # the numbers of ranks that each recipe's comments promise
    "cpu_full": [1, 2],
    "cpu_lora": [1, 2, 4],
    "cpu_qlora": [1, 2],
    "e2b_qlora_16gb": [1, 4],
    "e4b_qlora_8gb": [1],
    "e4b_qlora_16gb": [1, 4],
    "e4b_lora_zero2": [4, 8],
    "e4b_full_zero3_offload": [1, 4, 8],
    "12b_qlora_12gb": [1],
    "12b_qlora_16gb": [1, 4],
    "12b_lora_zero2": [4, 8],
    "26b_lora_zero3": [4, 8, 16],
    "26b_qlora": [1, 8],
    "31b_lora_zero3": [8, 16],
    "31b_qlora_48gb": [1],
    "31b_qlora_80gb": [1, 8],
}
GPU_RECIPES = [path for path in RECIPES if not path.stem.startswith("cpu_")]


def test_every_recipe_has_its_world_sizes():
    assert {path.stem for path in RECIPES} == set(WORLD_SIZES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_load_and_their_batches_fit_their_ranks(path):
    config = load_config(path)
    plans = [batch_plan(config, world_size) for world_size in WORLD_SIZES[path.stem]]
    assert len({plan.global_batch_size for plan in plans}) == 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_name_only_files_that_exist(path):
    for word in path.read_text().replace("`", " ").split():
        if word.startswith(("accelerate_configs/", "launch/", "slurm/")):
            assert (ROOT / word.rstrip(".,;:)")).exists(), word


def test_cpu_twins_compute_in_float32_and_differ_in_what_trains():
    twins: list[RunConfig] = [load_config(ROOT / f"launch/cpu_{tuning}.yaml") for tuning in ("full", "lora", "qlora")]
    assert [twin.tuning for twin in twins] == ["full", "lora", "qlora"]
    assert {twin.model.dtype for twin in twins} == {"float32"}
    assert len({twin.train.output_dir for twin in twins}) == 3


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.stem)
def test_accelerate_accepts_every_process_config(path):
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(path))
    expected = 1 if path.stem == "single" else 2 if path.stem.startswith("cpu_") else 8
    assert loaded.num_processes == expected
    assert loaded.use_cpu == path.stem.startswith("cpu_")
    kinds = {"zero": "DEEPSPEED", "fsdp": "FSDP", "sing": "NO", "ddp": "MULTI_GPU"}
    assert loaded.distributed_type.value == kinds[path.stem.removeprefix("cpu_")[:4]]


def test_every_gpu_config_that_ranks_share_has_a_cpu_twin():
    names = {path.stem for path in ACCELERATE_CONFIGS}
    assert {f"cpu_{name}" for name in names if not name.startswith("cpu_")} - names == {"cpu_single"}


@pytest.mark.parametrize("path", [p for p in ACCELERATE_CONFIGS if "zero" in p.stem], ids=lambda path: path.stem)
def test_deepspeed_files_leave_to_the_recipe_what_is_its_own(path):
    process = yaml.safe_load(path.read_text())["deepspeed_config"]
    deepspeed = json.loads((ROOT / process["deepspeed_config_file"]).read_text())
    stage = int(path.stem.partition("zero")[2][0])
    assert deepspeed["zero_optimization"]["stage"] == stage
    assert process["zero3_init_flag"] == (stage == 3)
    assert ("offload_optimizer" in deepspeed["zero_optimization"]) == path.stem.endswith("_offload")
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        assert deepspeed[key] == "auto"
    sizes = {key: value for key, value in deepspeed["zero_optimization"].items() if key.endswith(("size", "threshold"))}
    assert sizes
    assert all(isinstance(size, int) for size in sizes.values())


# ---- the true models -------------------------------------------------------------------------------------------------

# tests/shapes/*.json have the form of the config.json in Google's repositories, which were out of reach. Sizes are from
# the table of variants in transformers' convert_gemma4_weights.py (huggingface/transformers at 0f3f0632), the rest from
# the defaults of its Gemma4Config; several public ports repeat them. What they make is counted below against the sizes
# that the model cards give, vision and audio towers included; of 12B against what the hub counts in its files.
SHAPES = ROOT / "tests" / "shapes"
PUBLISHED = {"e2b": 5.1e9, "e4b": 8.0e9, "12b": 11_959_730_176, "26b": 25.2e9 + 0.55e9, "31b": 30.7e9 + 0.55e9}
# Lengths whose peaks a recipe's comment may tell, in tokens, and changes that it tells them for.
LENGTHS, CHANGES = (2048, 4096, 8192, 16_384), {"26b_qlora": ["model.experts=host"]}


@pytest.fixture(scope="module")
def true_config(tmp_path_factory: pytest.TempPathFactory, model: str) -> Callable[..., RunConfig]:
    """A GPU recipe that names a folder with the true config.json of its model, and a few shards."""
    folder = tmp_path_factory.mktemp("true")
    shard_rows(folder, model, [row(number) for number in range(4)])
    for path in SHAPES.glob("*.json"):
        (folder / path.stem).mkdir()
        shutil.copy(path, folder / path.stem / "config.json")

    def load(path: Path, *overrides: str) -> RunConfig:
        size = path.stem.partition("_")[0]
        return load_config(path, [f"model_name_or_path={folder / size}", f"data.train={folder}/shards", *overrides])

    return load


def on_ranks(config: RunConfig, world_size: int) -> Run:
    return resolve(config, Topology("", world_size))


@functools.cache
def true_model(size: str) -> Any:
    """A Gemma 4 of true size without weights."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(**json.loads((SHAPES / f"{size}.json").read_text()))
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize("size", PUBLISHED)
def test_true_shapes_make_the_published_number_of_parameters(size):
    published = PUBLISHED[size]
    expected = published if isinstance(published, int) else pytest.approx(published, rel=0.01)
    assert count(true_model(size).parameters()) == expected


@pytest.mark.parametrize("path", GPU_RECIPES, ids=lambda path: path.stem)
def test_check_validates_every_gpu_recipe_on_the_true_model(true_config, path):
    config = true_config(path)
    process = psutil.Process()
    before = process.memory_info().rss
    first, *others = WORLD_SIZES[path.stem]
    described = describe_run(on_ranks(config, first))
    assert process.memory_info().rss - before < 2**30, "some weights were allocated"
    assert f"= {first} ranks x" in described
    for world_size in others:  # nothing else depends on it, and the largest models take seconds
        assert f"= {world_size} ranks x" in str(batch_plan(config, world_size))
    found = re.search(r"^trains ([\d,]+) of ([\d,]+) parameters .* take ([\d.]+) GiB$", described, re.MULTILINE)
    assert found
    trained, total = (int(number.replace(",", "")) for number in found.groups()[:2])
    size = path.stem.partition("_")[0]
    everything = count(true_model(size).parameters())
    if config.lora is None:
        assert total == everything
        assert trained == everything - count(audio(true_model(size)))
    else:
        assert trained == adapter_parameters(true_model(size), config.lora.r)
        assert total == everything + trained
        trained_parts = re.findall(r"^    (\D+?) +([\d,]*[1-9][\d,]*) of ", described, re.MULTILINE)
        assert [part for part, _ in trained_parts] == ["language model"]
    assert float(found[3]) == pytest.approx(memory(path, config)["base"] / 2**30, abs=0.01)


@pytest.mark.parametrize("path", GPU_RECIPES, ids=lambda path: path.stem)
def test_every_memory_number_of_a_recipe_follows_from_the_true_shapes(true_config, path):
    text = re.sub(r"^# plan: .*\n", "", path.read_text(), flags=re.MULTILINE)  # tests/test_plan.py has that line
    assert_known_sizes(text.replace("\n#", ""), path, true_config(path))


@pytest.mark.parametrize("path", GPU_RECIPES, ids=lambda path: path.stem)
def test_docs_table_agrees_with_the_true_shapes(true_config, path):
    [line] = [line for line in (ROOT / "docs/launch.md").read_text().splitlines() if f"| [{path.stem}](" in line]
    assert_known_sizes(line, path, true_config(path))


def assert_known_sizes(text: str, path: Path, config: RunConfig) -> None:
    """Every `N GiB` in `text` is a size of the recipe's model or a peak that `plan` computes, to as many digits."""
    known = [number / 2**30 for number in (*memory(path, config).values(), *planned_peaks(path))]
    stated = re.findall(r"([\d.]+) GiB", text)
    assert stated
    for number in stated:
        digits = len(number.partition(".")[2])
        assert number in {f"{value:.{digits}f}" for value in known}, f"{number} GiB is none of {known}"


def planned_peaks(path: Path) -> list[int]:
    """What `gemma-dist plan RECIPE --num-tokens N` says of torch's allocator on one GPU, in bytes."""
    peaks = []
    for change in ([], CHANGES.get(path.stem, [])):
        config = load_config(path, ["data.train=no/shards", *change])
        plans = [make_plan(config, Topology(""), request=Request(num_tokens=length)) for length in LENGTHS]
        peaks += [plan.estimate.peak_bytes for plan in plans]
    return peaks


def audio(model: Any) -> list[Any]:
    return [parameter for name, parameter in model.named_parameters() if "audio" in name]


def per_layer(model: Any) -> list[Any]:
    return [parameter for name, parameter in model.named_parameters() if "embed_tokens_per_layer" in name]


def memory(path: Path, config: RunConfig) -> dict[str, float]:
    """Bytes that the comments of a recipe may speak of."""
    model = true_model(path.stem.partition("_")[0])
    everything = count(model.parameters())
    left_out = {*audio(model), *per_layer(model)} if config.lora else set()  # of the GPU
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    linears = count(set(four_bit_weights(model)) - left_out) if config.quantization else 0
    stacks = count(experts) if config.quantization else 0
    # NF4 with double quantization: half a byte, and for 64 weights a scale of a byte, for 256 of these another of four.
    each = 0.5 + (1 + 4 / 256) / 64
    base = each * (linears + stacks) + 2 * (everything - count(left_out) - linears - stacks)
    largest = max(p.numel() for p in model.parameters())
    trained = adapter_parameters(model, config.lora.r) if config.lora else everything - count(audio(model))
    # PEFT adapts stacked parameters of shape (experts, out, in) with r rows and columns for each expert.
    of_experts = sum(p.shape[0] * (p.shape[1] + p.shape[2]) for p in experts) * (config.lora.r if config.lora else 0)
    return {
        "base": base,
        "in 16 bits": 2 * everything,
        "linear layers in 4 bits": each * linears,
        "experts in 4 bits": each * stacks,
        "two layers of them": 2 * each * stacks / model.config.text_config.num_hidden_layers,
        "largest stack of experts": 2 * max((p.numel() for p in experts), default=0),
        "token embedding": 2 * count(p for name, p in model.named_parameters() if ".embed_tokens." in name),
        "per-layer embeddings": 2 * count(per_layer(model)),
        "in 16 bits, as loaded": 2 * (everything - count(left_out)),
        "experts": 2 * count(experts),
        "experts of a layer": 2 * count(experts) / model.config.text_config.num_hidden_layers,
        "largest": 2 * largest,
        "largest with its gradient": 4 * largest,
        "weight, gradient and AdamW in 32 bits": 16 * trained,
        "the same for experts": 16 * of_experts,
        "DeepSpeed's estimate": 18 * trained,
        "checkpoint at ZeRO": 14 * trained,
        **{f"base on one of {ranks}": base / ranks for ranks in WORLD_SIZES[path.stem]},
        **{f"estimate on one of {ranks}": 18 * trained / ranks for ranks in WORLD_SIZES[path.stem]},
    }


def adapter_parameters(model: Any, r: int) -> int:
    """r x in + out x r for each linear layer of the language model, and those alone."""
    adapted = {name: layer for name, layer in model.named_modules() if re.fullmatch(LANGUAGE_MODEL_LINEARS, name)}
    assert all(
        isinstance(layer, torch.nn.Linear) and ".language_model.layers." in name for name, layer in adapted.items()
    )
    return sum(r * (layer.in_features + layer.out_features) for layer in adapted.values())


def four_bit_weights(model: Any) -> list[Any]:
    """All linear layers but the LM head; of 12B but all that makes soft tokens."""
    if model.config.model_type == "gemma4_unified":
        return [layer.weight for layer in model.model.language_model.modules() if type(layer) is torch.nn.Linear]
    linears: list[Any] = [layer.weight for layer in model.modules() if type(layer) is torch.nn.Linear]
    return [weight for weight in linears if weight is not model.lm_head.weight]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["global_batch_size=12"], "global batch 12 is not a multiple of 8 ranks x 1 micro-batch"),
        (["gradient_accumulation_steps=4"], "leave gradient_accumulation_steps out"),
        (["lora.target_modules=.*experts.*"], "lora.target_modules"),
        (["lora.target_modules=all-linear"], "adapts the vision tower"),
        (["tuning=full"], "an adapter needs tuning: lora or qlora"),
        (["bf16=false"], "contradicts model.dtype"),
        (["packing=false"], "packing_length"),
    ],
)
def test_check_refuses_what_cannot_work(true_config, overrides, message):
    with pytest.raises(ConfigError, match=message):
        describe_run(on_ranks(true_config(ROOT / "launch/26b_lora_zero3.yaml", *overrides), 8))


def test_experts_are_adapted_where_there_are_some(true_config):
    config = true_config(ROOT / "launch/31b_lora_zero3.yaml", "lora.target_parameters=[experts.down_proj]")
    with pytest.raises(ConfigError, match=r"'experts.down_proj' is the end of no weight .* have no experts: remove it"):
        describe_run(on_ranks(config, 8))


def test_an_audio_tower_is_loaded_and_left_alone(model):
    """E2B and E4B have one, without SDPA; no trajectory feeds it."""
    loaded = load_model(ModelConfig(model_name_or_path=model, dtype="float32"), None, packing=False)
    assert loaded.config.text_config._attn_implementation == loaded.config.vision_config._attn_implementation == "sdpa"
    heard = [parameter for name, parameter in loaded.named_parameters() if "audio" in name]
    assert heard
    assert not any(parameter.requires_grad for parameter in heard)


# ---- Slurm -----------------------------------------------------------------------------------------------------------

SBATCH = ROOT / "slurm" / "train.sbatch"
SCRIPTS = sorted(path for path in (ROOT / "slurm").iterdir() if path.suffix in (".sh", ".sbatch"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_for_slurm_are_short_sound_bash(path):
    assert len(path.read_text().splitlines()) < 60
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--external-sources", path], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.suffix == ".sbatch"], ids=lambda path: path.stem)
def test_a_batch_script_shows_a_command_that_exists(path):
    shown = re.search(r"^tasks (\w+)", path.read_text(), re.MULTILINE)
    assert shown
    assert shown[1] in cli.commands


def test_the_batch_script_starts_each_node_as_itself(tmp_path):
    """Slurm's commands and accelerate are stand-ins; the quoting and the arithmetic are the script's own."""
    stand_ins = {
        "scontrol": "echo n7; echo n8",
        "srun": """
            while [ "$1" != bash ]; do shift; done
            for node in 0 1; do SLURM_NODEID=$node "$@" & done; wait""",
        "accelerate": r"""
            printf '%s\n' "$@" > "$OUT/$SLURM_NODEID"; echo "$OMP_NUM_THREADS" > "$OUT/threads"
            for ((i = 0; i < 16; i++)); do echo 0 > "$GEMMA_DIST_EXIT_CODES/rank-$i"; done""",
    }
    for folder in ("slurm", "accelerate_configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "OUT": str(tmp_path),
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NODELIST": "n[7-8]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "96",
        "HEALTH": "0",
    }
    words = ["accelerate_configs/zero3.yaml", "launch/31b_lora_zero3.yaml", "data.train=[a b, c]", "output_dir=$HOME"]
    subprocess.run(["bash", SBATCH, *words], env=env, cwd=tmp_path, check=True, timeout=60)

    for node in ("0", "1"):
        given = (tmp_path / node).read_text().splitlines()
        assert given[0] == "launch"
        options = dict(zip(given[1:-7:2], given[2:-7:2], strict=True))
        assert options == {
            "--config_file": words[0],
            "--num_machines": "2",
            "--num_processes": "16",
            "--machine_rank": node,
            "--main_process_ip": "n7",
            "--main_process_port": "19567",
        }
        assert given[-7:] == ["-m", "gemma_dist", "train", words[1], "train.stop_grace_s=300", *words[2:]]
    assert (tmp_path / "threads").read_text().strip() == "12"


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.suffix == ".sbatch"], ids=lambda path: path.stem)
def test_a_batch_script_says_how_it_is_used(path):
    result = subprocess.run(["bash", path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "usage: sbatch" in result.stderr
