"""What train.report_to names: refused before a weight is read where it is not installed, else written offline."""

import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from gemma_dist.errors import ConfigError
from gemma_dist.train.loggers import OF_THE_EXTRA, explain_setup, require_logger
from tests.support.corpus import row, shard_rows
from tests.support.ranks import gemma_dist, long

# What keeps each package on this machine, with {} for a folder, and what it leaves there. (TensorBoard: test_train.py.)
OFFLINE = {
    "wandb": ({"WANDB_MODE": "offline", "WANDB_DIR": "{}"}, "wandb/offline-run-*/*.wandb"),
    "trackio": ({"TRACKIO_DIR": "{}/trackio"}, "trackio/**/*.db"),
    "mlflow": ({"MLFLOW_TRACKING_URI": "file://{}/mlruns", "MLFLOW_ALLOW_FILE_STORE": "true"}, "mlruns/*/*/metrics/*"),
    "swanlab": ({"SWANLAB_MODE": "offline", "SWANLAB_LOG_DIR": "{}/swanlog"}, "swanlog/run-*"),
}


def is_installed(name: str) -> bool:
    found = find_spec(name)
    return found is not None and found.origin is not None


def test_a_package_that_is_not_there_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_logger("none")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_logger_of_nobody").mkdir()  # a folder that it left behind is no package
    with pytest.raises(ConfigError, match=r"`pip install a_logger_of_nobody`; none: metrics\.jsonl alone"):
        require_logger("a_logger_of_nobody")
    monkeypatch.setattr("gemma_dist.train.loggers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"`pip install 'gemma-dist\[logging\]'`; none"):
        require_logger("wandb")


def test_the_extra_has_what_is_said_to_be_in_it() -> None:
    settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    extra = [Requirement(line).name for line in settings["project"]["optional-dependencies"]["logging"]]
    assert [name.removesuffix("-skinny") for name in extra] == list(OF_THE_EXTRA)


def test_a_package_that_cannot_begin_ends_the_run_in_plain_words() -> None:
    class WandbCallback:
        def setup(self, number: int) -> int:
            return 1 // number

    callback = WandbCallback()
    explain_setup([object(), callback], "wandb")
    assert callback.setup(1) == 1
    with pytest.raises(ConfigError, match=r"train\.report_to: wandb cannot begin: integer division .*\nlog in, or"):
        callback.setup(0)


@long
@pytest.mark.parametrize("name", OFFLINE)
def test_a_run_is_logged_by_the_real_package_without_a_network(
    name: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_installed(name):
        pytest.skip(f"{name} is not installed: `pip install {name}`, in an environment of its own where it is no extra")
    shard_rows(tmp_path, model, [row(1), row(2)])
    environment, left = OFFLINE[name]
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value.format(tmp_path))
    paths = [f"model_name_or_path={model}", f"data.train={tmp_path / 'shards'}", f"output_dir={tmp_path / 'out'}"]
    gemma_dist(
        "train",
        "launch/cpu_lora.yaml",
        *paths,
        "max_steps=2",
        "per_device_train_batch_size=1",
        "global_batch_size=1",
        f"report_to={name}",
    )
    assert list(tmp_path.glob(left)), sorted(map(str, tmp_path.rglob("*")))[:50]
