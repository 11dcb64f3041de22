"""The resolved run: what a recipe comes to on a topology, made once, before a model is touched.

    run = resolve(load_config("launch/cpu_lora.yaml"), read_topology(Path("accelerate_configs/cpu_ddp.yaml")))

`train` carries it out, `check` prints it, `batches` lists its steps.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from gemma_dist.batch_plan import BatchPlan, batch_plan
from gemma_dist.config import RunConfig
from gemma_dist.config_data import WeightsByStep
from gemma_dist.errors import ConfigError, brief
from gemma_dist.model.towers import Tower, unneeded_towers
from gemma_dist.stream.held_out import HeldOut, open_held_out
from gemma_dist.stream.schedule import Edition, Schedule, open_schedule
from gemma_dist.topology import Topology

# What a run leaves in train.output_dir, and which files may lie there before: a recipe, a launcher's logs, a wish.
OF_A_RUN = re.compile(r"checkpoint-.*|metrics\.jsonl|gemma_dist\.json|heartbeats")
BESIDE_A_RUN = re.compile(r"\..*|.*\.(ya?ml|log|out|err)|stop")

# Optimizers whose states belong to single elements, so that any launch on any number of ranks can take them over. The
# scales of the others belong to elements that lay together on a rank.
FOLLOWING_ELEMENTS = ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "sgd")


@dataclass(frozen=True)
class RunIdentity:
    """All that decides what the weights of a run mean. A checkpoint resumes in a run of the same identity only.

    Each field's `meaning` names it in messages, where its own name does not.
    """

    base_config_hash: str = field(metadata={"meaning": "the base model (hash of its config.json)"})
    base_weights_hash: str = field(metadata={"meaning": "the base model (hash of its weights)"})
    dtype: str = field(metadata={"meaning": "model.dtype"})
    four_bit: dict[str, Any] | None = field(metadata={"meaning": "quantization"})
    manifest: str = field(metadata={"meaning": "the corpus (manifest)"})
    num_samples: int = field(metadata={"meaning": "its number of samples"})
    encoding: str = field(metadata={"meaning": "its tokenizer, chat template or image processor (fingerprint)"})
    weights: list[Any] | None = field(metadata={"meaning": "the weights of data.train"})  # of each source, or by step
    packing_length: int
    seed: int
    global_batch_size: int
    tuning: str
    lora: dict[str, Any]  # the options that are set: those that come later are off
    optim: str = field(metadata={"meaning": "train.optim"})
    optimizer: str | None = field(
        metadata={"meaning": "the state of this train.optim, which only the same ranks can read back,"}
    )

    def differences(self, saved: Mapping[str, object], step: int) -> list[str]:
        """What a checkpoint of `step`, whose identity was `saved` as JSON, was made with instead, in words. Weights may
        differ from that step on."""
        different = []
        for one in fields(self):
            meaning = self.meaning(one.name)
            was, now = saved.get(one.name), getattr(self, one.name)
            if one.name == "weights":
                was, now = _weights_before(step, was), _weights_before(step, now)
            if one.name not in saved:
                different.append(f"{meaning} was not recorded, by an earlier version of gemma_dist")
            elif was != now:
                different.append(f"{meaning} was {brief(was)} and is now {brief(now)}")
        return different

    @classmethod
    def meaning(cls, name: str) -> str:
        """What messages call a field."""
        return next((one.metadata.get("meaning", name) for one in fields(cls) if one.name == name), name)

    def to_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Run:
    """One training run: its settings, how its processes share memory, and what each of them trains on at each step."""

    config: RunConfig
    topology: Topology
    plan: BatchPlan
    schedule: Schedule
    num_steps: int  # optimizer steps of the whole run
    held_out: HeldOut | None = None  # what is evaluated meanwhile

    def evaluates_at(self, step: int) -> bool:
        """Whether the run evaluates once `step` steps are done; 0: before the first."""
        settings = self.config.train
        if self.held_out is None:
            return False
        if step == 0:
            return settings.eval_on_start
        if settings.eval_strategy == "no":
            return False
        if settings.eval_strategy == "epoch":
            return self.schedule.ends_epoch(step) or step == self.num_steps
        return step % (settings.eval_steps or settings.save_steps) == 0 or step == self.num_steps

    def num_evaluations(self, start_step: int = 0) -> int:
        """How often the run evaluates behind `start_step`, and before it if that is 0."""
        first = start_step + 1 if start_step else 0
        return sum(map(self.evaluates_at, range(first, self.num_steps + 1)))

    @cached_property
    def unneeded_towers(self) -> tuple[Tower, ...]:
        """What of the model is not loaded."""
        read = [self.schedule, *([self.held_out] if self.held_out else [])]
        has_images = any(bool(schedule.shards.num_images.any()) for schedule in read)
        return unneeded_towers(frozen=self.config.tuning != "full", has_images=has_images)

    @cached_property
    def identity(self) -> RunIdentity:
        """Raises CheckpointError where there is no base model, of which files are read."""
        from gemma_dist.model.fingerprint import fingerprint_base

        config, shards = self.config, self.schedule.shards
        return RunIdentity(
            **fingerprint_base(config.model.model_name_or_path),
            dtype=config.model.dtype,
            four_bit=_four_bit(config),
            manifest=shards.manifest_hash,
            num_samples=len(shards),
            encoding=shards.fingerprint,
            weights=_weights(shards.weights),
            packing_length=self.schedule.packing_length,
            seed=config.train.seed,
            global_batch_size=self.plan.global_batch_size,
            tuning=config.tuning,
            lora={name: value for name, value in (config.lora or {}) if value},
            optim=config.train.optim.removesuffix("_fused"),
            optimizer=state_layout(config.train.optim, self.topology),
        )


def _weights(by_step: WeightsByStep | None) -> list[Any] | None:
    """Those of a run: of each source, or, where they change, [step, those from there on] for each change."""
    if by_step is None or len(by_step) > 1:
        return by_step and [list(one) for one in by_step]
    return by_step[0][1]


def _weights_before(step: int, weights: Any) -> Any:
    """What of them, as `_weights` gives them, has been of use before `step`."""
    if not weights or not isinstance(weights[0], list):
        return weights
    return _weights([(first, of_sources) for first, of_sources in weights if first < max(1, step)])


def _four_bit(config: RunConfig) -> dict[str, Any] | None:
    """`quantization` of a run. Its experts are named only where there are some in 4 bits: earlier versions left them
    whole, and did not know the setting."""
    if config.quantization is None:
        return None
    from gemma_dist.model.folder import has_experts

    settings = config.quantization.model_dump()
    in_4_bits = settings.pop("quantize_moe_experts")
    if in_4_bits and has_experts(config.model.model_name_or_path):
        settings["quantize_moe_experts"] = True
    return settings


def resolve(config: RunConfig, topology: Topology, editions: Sequence[Edition] = ()) -> Run:
    """The run that `config` describes on `topology`. No model is touched; see also `topology.require_fit`.

    Args:
        editions: how its corpus has grown, where it goes on from a checkpoint (`stream/growth.py`).

    Raises:
        ConfigError: the batch does not divide among the ranks, or packing does not fit the corpus.
        DataError: the corpus or the quarantine is unreadable.
    """
    plan = batch_plan(config, topology.num_processes)
    schedule = open_schedule(config, plan, editions)
    held_out = open_held_out(config, plan, schedule)
    return Run(config, topology, plan, schedule, schedule.num_steps(config.train), held_out)


def require_output_dir(config: RunConfig) -> None:
    """Raises ConfigError where train.output_dir is a file, cannot become a folder, or holds the base, the shards, or
    files of which none is a run's."""
    output_dir = config.train.output_dir
    problem = f"train.output_dir = {str(output_dir)!r}"
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"{problem}: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{problem}: nothing may be written to {existing}; name another folder")
    for place in (config.model.model_name_or_path, *config.data.paths, *config.data.eval):
        if Path(place).is_dir() and Path(place).resolve() == output_dir.resolve():
            raise ConfigError(f"{problem}: the run reads from that folder ({place}); name one of its own")
    if strange := _only_strange(output_dir):
        raise ConfigError(
            f"{problem}: the folder holds {strange[0]!r} and nothing that a run left there; name a new folder, such as "
            f"{str(output_dir / 'run')!r}"
        )


def _only_strange(output_dir: Path) -> list[str]:
    """The names of the user's files in a folder, sorted; none where a run has left something there, too."""
    found = list(output_dir.iterdir()) if output_dir.is_dir() else []
    if any(OF_A_RUN.fullmatch(path.name) for path in found):
        return []
    return sorted(path.name for path in found if not path.is_dir() and not BESIDE_A_RUN.fullmatch(path.name))


def state_layout(optim: str, topology: Topology) -> str | None:
    """The one partitioning in which the states of `optim` can be read back; None: in any."""
    if optim in FOLLOWING_ELEMENTS:
        return None
    if topology.zero_stage is None:
        return "unpartitioned"
    return f"partitioned for {topology.num_processes} ranks (ZeRO-{topology.zero_stage})"
