"""Recipes, process configs and the batch script: each is accepted by what reads it, and they fit one another."""

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from gemma_dist.config import RunConfig, batch_plan, load_config

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "launch").glob("*.yaml"))
ACCELERATE_CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
WORLD_SIZES = {  # the numbers of ranks that each recipe's comments promise
    "cpu_full": [1, 2],
    "cpu_lora": [1, 2, 4],
    "cpu_qlora": [1, 2],
    "e4b_qlora_16gb": [1, 4],
    "e4b_lora_zero2": [4, 8],
    "31b_lora_zero3": [8, 16],
}


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
    assert loaded.distributed_type.value == (
        "DEEPSPEED" if "zero" in path.stem else "NO" if path.stem == "single" else "MULTI_GPU"
    )


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
    # "auto" would look for hidden_size, which Gemma 4's composite config has in its parts only.
    assert sizes
    assert all(isinstance(size, int) for size in sizes.values())


# ---- Slurm -----------------------------------------------------------------------------------------------------------

SBATCH = ROOT / "slurm" / "train.sbatch"


def test_the_batch_script_is_sound_bash():
    subprocess.run(["bash", "-n", SBATCH], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", SBATCH], check=True)


def test_the_batch_script_starts_each_node_as_itself(tmp_path):
    """Slurm's commands and accelerate are stand-ins; the quoting and the arithmetic are the script's own."""
    stand_ins = {
        "scontrol": "echo n7; echo n8",
        "srun": """
            while [ "$1" != bash ]; do shift; done
            for node in 0 1; do SLURM_NODEID=$node "$@" & done; wait""",
        "accelerate": r"""printf '%s\n' "$@" > "$OUT/$SLURM_NODEID"; echo "$OMP_NUM_THREADS" > "$OUT/threads" """,
    }
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
    }
    words = ["accelerate_configs/zero3.yaml", "launch/31b_lora_zero3.yaml", "data.train=[a b, c]", "output_dir=$HOME"]
    subprocess.run(["bash", SBATCH, *words], env=env, cwd=tmp_path, check=True, timeout=60)

    for node in ("0", "1"):
        given = (tmp_path / node).read_text().splitlines()
        assert given[0] == "launch"
        options = dict(zip(given[1:-6:2], given[2:-6:2], strict=True))
        assert options == {
            "--config_file": words[0],
            "--num_machines": "2",
            "--num_processes": "16",
            "--machine_rank": node,
            "--main_process_ip": "n7",
            "--main_process_port": "19567",
        }
        assert given[-6:] == ["-m", "gemma_dist", "train", *words[1:]]
    assert (tmp_path / "threads").read_text().strip() == "12"


def test_the_batch_script_says_how_it_is_used():
    result = subprocess.run(["bash", SBATCH], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "usage: sbatch" in result.stderr
