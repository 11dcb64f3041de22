"""What `import gemma_dist` offers to notebooks and scripts: the commands as functions, and what they are made of.

    import gemma_dist

    config = gemma_dist.load_config("launch/cpu_lora.yaml", ["data.train=shards"])
    print(gemma_dist.resolve(config).plan)
    adapter = gemma_dist.train(config)
    report = gemma_dist.evaluate("model", "held_out.jsonl", "runs/eval", adapter=adapter, max_new_tokens=64)
    gemma_dist.merge("model", adapter, "merged", verify=True)

Settings go by the names of config.py and config_*.py, and user errors are `errors.GemmaDistError`, in the words of the
command line. docs/python.md has more.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_dist.config import EvaluateConfig, RowConfig, RunConfig
from gemma_dist.config_data import EncodingConfig
from gemma_dist.config_merge import MergeConfig
from gemma_dist.data.encode import Encoder
from gemma_dist.data.encode import load_encoder as load_encoder_of
from gemma_dist.data.encoded import Encoded
from gemma_dist.data.read import Reading, read_output
from gemma_dist.data.trajectory import Trajectory
from gemma_dist.data.trajectory import parse_row as parse
from gemma_dist.errors import GemmaDistError
from gemma_dist.evaluate.report import Report
from gemma_dist.merge.run import MergeReport
from gemma_dist.recipe import load_config, load_section
from gemma_dist.resolve import Run
from gemma_dist.resolve import resolve as resolve_on
from gemma_dist.topology import Topology, current_topology, read_topology, require_fit

__all__ = [
    "Encoded",
    "Encoder",
    "GemmaDistError",
    "MergeReport",
    "Reading",
    "Report",
    "Run",
    "RunConfig",
    "Topology",
    "Trajectory",
    "evaluate",
    "load_config",
    "load_encoder",
    "merge",
    "parse_row",
    "read_output",
    "read_topology",
    "resolve",
    "train",
]


def resolve(config: RunConfig, topology: Topology | None = None) -> Run:
    """What a recipe comes to: batch plan, steps, schedule of samples. Reads the shards' manifest, and no model.

    Args:
        topology: how processes share memory, from `read_topology`; None: as this process was launched, or alone.

    Raises:
        ConfigError: recipe and topology do not go together, or the batch does not divide among the ranks.
        DataError: the shards are unreadable.
    """
    topology = topology or current_topology()
    require_fit(config, topology)
    return resolve_on(config, topology)


def train(config: RunConfig) -> Path:
    """Train as `gemma-dist train` does, in this process, from the newest checkpoint if there is one.

    Returns:
        The folder with the adapter or model: train.output_dir.

    Raises:
        Stopped: as OUT/stop asked; the same call goes on.
        ConfigError, DataError, CheckpointError, TrainingError: as `gemma-dist train` words them.
    """
    from gemma_dist.train import run

    run.train(config)
    return config.train.output_dir


def evaluate(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    adapter: str | Path | None = None,
    limit: int | None = None,
    **settings: Any,
) -> Report:
    """Let a model answer held-out trajectories, and score its calls, as `gemma-dist evaluate` does.

    Args:
        data: rows, or a folder of shards.
        out: a folder for report.json, report.html and samples.jsonl.
        limit: only so many trajectories, the first ones.
        settings: of config.EvaluateConfig, such as max_new_tokens=64.

    Raises:
        ConfigError, DataError, CheckpointError, EvaluationError: as `gemma-dist evaluate` words them.
    """
    from gemma_dist.evaluate import run

    chosen = load_section(EvaluateConfig, settings)
    return run.evaluate(str(model), Path(adapter) if adapter else None, Path(data), Path(out), limit, chosen)


def merge(
    base: str | Path,
    adapter: str | Path | Mapping[Path, float],
    out: str | Path,
    *,
    verify: bool = False,
    **settings: Any,
) -> MergeReport:
    """Add an adapter to its base and write a whole model, as `gemma-dist merge` does.

    Args:
        adapter: its folder; or several, each with its weight.
        verify: also compare the logits of the result with those of base and adapter, on `verify_data` if that is given.
        settings: of config_merge.MergeConfig, such as dtype="bfloat16".

    Raises:
        ConfigError, DataError, CheckpointError: as `gemma-dist merge` words them.
    """
    from gemma_dist.merge import run

    chosen = load_section(MergeConfig, settings)
    options = chosen.model_dump(exclude={"verify_data", "verify_samples"})
    on = (chosen.verify_data, chosen.verify_samples) if chosen.verify_data else verify
    adapters = adapter if isinstance(adapter, Mapping) else Path(adapter)
    return run.merge(str(base), adapters, Path(out), verify=on, **options)


def parse_row(row: Mapping[str, Any], where: str = "row:1", **settings: Any) -> Trajectory:
    """The checked trajectory in a raw row of any layout that `gemma-dist shard` takes.

    Args:
        where: FILE:LINE; it opens each message, and image paths are relative to the file's folder.
        settings: of config.RowConfig, such as media_root=Path("pictures").

    Raises:
        DataError: the row breaks the data contract; the message says turn, rule and remedy.
    """
    return parse(dict(row), where, load_section(RowConfig, settings))


def load_encoder(model: str | Path, **settings: Any) -> Encoder:
    """What turns trajectories into the token ids, labels and pixels of a model, by its `encode`.

    Args:
        settings: of config_data.EncodingConfig, such as enable_thinking=True.

    Raises:
        CheckpointError, ConfigError: there is no processor of Gemma 4, or no such template.
    """
    return load_encoder_of(str(model), load_section(EncodingConfig, settings))
