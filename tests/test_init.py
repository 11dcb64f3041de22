"""`gemma-dist init` writes files that check, plan and bash take; `gemma-dist recipes` finds those of the package."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gemma_dist import shipped
from gemma_dist.__main__ import main
from gemma_dist.errors import ConfigError
from gemma_dist.family import SIZES, hub_name
from gemma_dist.plan.run import Request, make_plan
from gemma_dist.recipe import load_config
from gemma_dist.shards.reader import open_shards
from gemma_dist.start.init import CALLED, Wish, init
from gemma_dist.topology import read_topology, require_fit
from tests.support.corpus import row, shard_rows, write_rows

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that is no checkout."""
    monkeypatch.chdir(tmp_path)
    write_rows(Path("my rows.jsonl"), [row(1)])


@pytest.mark.parametrize(
    ("model", "num_gpus", "memory", "num_nodes", "tuning", "expected"),
    [
        (hub_name("E2B"), 1, 16, 1, None, ("e2b_qlora_16gb", "NO")),
        (hub_name("E4B"), 1, 8, 1, None, ("e4b_qlora_8gb", "NO")),
        (hub_name("E4B"), 3, 24, 1, None, ("e4b_lora_zero2", "DEEPSPEED")),
        (hub_name("E4B"), 2, 16, 1, "qlora", ("e4b_qlora_16gb", "MULTI_GPU")),
        (hub_name("E4B"), 8, 24, 1, "full", ("e4b_full_zero3_offload", "DEEPSPEED")),
        (hub_name("E4B"), 8, 80, 1, "full", ("e4b_full_zero3_offload", "DEEPSPEED")),
        (hub_name("12B"), 1, 12, 1, None, ("12b_qlora_12gb", "NO")),
        (hub_name("26B-A4B"), 1, 24, 1, None, ("26b_qlora", "NO")),
        (hub_name("31B"), 8, 80, 2, None, ("31b_lora_zero3", "DEEPSPEED")),
    ],
)
def test_what_is_written_fits_and_goes_together(
    model: str, num_gpus: int, memory: float, num_nodes: int, tuning: str | None, expected: tuple[str, str]
) -> None:
    written = init(Path("run"), Wish(model, "my rows.jsonl", num_gpus, memory, num_nodes, tuning))
    config = load_config(Path("run/recipe.yaml"))
    topology = read_topology(Path("run/accelerate.yaml"))
    require_fit(config, topology)
    assert topology.num_processes == num_gpus * num_nodes
    assert topology.distributed_type == expected[1]
    plan = make_plan(config, topology, request=Request(memory))
    assert plan.fits
    assert (plan.needed, plan.config) == (written.plan.needed, written.plan.config)
    of_the_package = load_config(expected[0])
    assert config.tuning == of_the_package.tuning
    assert config.lora == of_the_package.lora
    assert config.train.learning_rate == of_the_package.train.learning_rate
    script = Path("run/train.sbatch").read_text()
    assert f"#SBATCH --nodes={num_nodes}\n" in script
    assert f"#SBATCH --gres=gpu:{num_gpus}\n" in script
    assert "$usage" not in script
    subprocess.run(["bash", "-n", "run/train.sbatch"], check=True)
    for name in re.findall(r"slurm/[\w.]+", script):
        assert Path(name).exists() or name == "slurm/site.env", name
    assert any("my rows.jsonl'" in command for command in written.commands)
    text = Path("run/recipe.yaml").read_text()
    assert not re.search(r"launch/\w+\.yaml$", text, re.M), "no half of a command"
    offloads = any("offload" in path.name for path in written.files)
    assert offloads == (tuning == "full" and memory < 40), "only what the GPUs do not hold is in host memory"
    assert ("# Here the GPUs hold all (zero3)" in text) == (tuning == "full" and not offloads)


def test_a_run_on_the_cpu_passes_check(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    shard_rows(Path(), model, [row(number) for number in range(4)])
    shards = "shards"
    assert main(["init", "run", "--model", model, "--data", str(shards), "--num-gpus", "0"]) == 0
    said = capfd.readouterr().out
    assert f"data:\n  train: {shards}" in Path("run/recipe.yaml").read_text()
    (check,) = re.findall(r"gemma-dist (check .*)", said)
    assert main(check.split()) == 0
    assert "4 trajectories" in capfd.readouterr().out
    assert main(["init", "run", "--model", model, "--data", str(shards), "--num-gpus", "0"]) == 2
    assert "run/recipe.yaml is there already" in capfd.readouterr().err


def test_scripts_of_the_users_own_are_left_alone_and_told() -> None:
    wish = Wish(hub_name("E4B"), "hf://datasets/org/rows", 1, 8)
    Path("slurm").mkdir()
    mine = Path("slurm/common.sh")
    mine.write_text("# mine\n")
    told = init(Path("run"), wish).render()
    assert "left as it was: slurm/, without leader.sh, outcome.sh and with another common.sh; on Slurm run/tr" in told
    assert [mine.read_text(), *Path("slurm").iterdir()] == ["# mine\n", mine]
    shutil.rmtree("slurm")
    assert not init(Path("first"), wish).left_alone
    assert not init(Path("second"), wish).left_alone, "they are those of this version"
    called = re.findall(r"\bslurm/(\w+\.sh)", "".join(path.read_text() for path in map(Path("slurm").joinpath, CALLED)))
    called += re.findall(r"\bslurm/(\w+\.sh)", Path("first/train.sbatch").read_text())
    assert sorted(set(called)) == list(CALLED)


def test_rows_of_the_hub_are_to_be_sharded() -> None:
    written = init(Path("run"), Wish(hub_name("E4B"), "hf://datasets/org/rows/train-*", 1, 8))
    assert load_config(Path("run/recipe.yaml")).data.paths == ["run/shards"]
    assert written.commands[0].startswith("gemma-dist shard 'hf://datasets/org/rows/train-*' --model")


def test_shards_that_are_longer_get_longer_packs(model: str) -> None:
    rows = [row(number, num_calls=60) for number in range(2)]
    shards = Path("shards")
    shard_rows(Path(), model, rows)
    init(Path("run"), Wish(model, str(shards), 1, 16))
    opened = open_shards(shards)
    longest = int((opened.num_text_tokens + opened.num_image_tokens).max())
    assert longest > 2048
    assert load_config(Path("run/recipe.yaml")).train.packing_length == max(longest, 4096)


def test_what_cannot_fit_or_is_not_said_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"does not fit on 1 x 16 GB, as planned:\n  31b_qlora_80gb with single: 30"):
        init(Path("run"), Wish(hub_name("31B"), "my rows.jsonl", 1, 16))
    with pytest.raises(ConfigError, match=r"give its size as sold, as in --gpu-memory 24GB"):
        init(Path("run"), Wish(hub_name("31B"), "my rows.jsonl", 1, None))
    assert main(["init", "run", "--model", hub_name("E4B"), "--data", "nothing.jsonl", "--num-gpus", "0"]) == 2
    assert "nothing.jsonl: no such file" in capfd.readouterr().err
    assert main(["init", "run", "--data", "my rows.jsonl", "--num-gpus", "0"]) == 2
    assert "Missing option '--model'" in capfd.readouterr().err
    assert not Path("run").exists()


def test_recipes_are_found_without_a_checkout(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)["recipes"]
    assert {one["name"] for one in told} == {path.stem for path in (ROOT / "launch").glob("*.yaml")}
    assert {size.partition("-")[0].lower() for size in SIZES} <= {one["name"].partition("_")[0] for one in told}
    for name in ("e4b_qlora_16gb", "launch/e4b_qlora_16gb.yaml"):
        assert load_config(name) == load_config(ROOT / "launch/e4b_qlora_16gb.yaml")
    assert main(["recipes", "--out", "my rows.jsonl"]) == 2
    assert "error: my rows.jsonl: File exists; name another, or remove it" in capfd.readouterr().err
    assert main(["recipes", "--out", "my rows.jsonl/mine"]) == 2
    assert "my rows.jsonl/mine: Not a directory; a part of that path is a file: name a folder" in capfd.readouterr().err
    with pytest.raises(ConfigError, match="`gemma-dist recipes` lists those to start from"):
        load_config("other/e4b_qlora_16gb.yaml")


def test_all_that_comes_with_the_package_is_copied_once(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--out", "."]) == 0
    for name in (shipped.RECIPES, shipped.PROCESSES, shipped.SCRIPTS):
        assert {path.name for path in Path(name).iterdir()} == {
            path.name for path in (ROOT / name).iterdir() if path.name != "site.env"
        }
    shutil.rmtree("launch")
    assert main(["recipes", "--out", "."]) == 2
    assert "accelerate_configs is there already" in capfd.readouterr().err
    assert not Path("launch").exists()
