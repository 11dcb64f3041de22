"""One training run, from a recipe to an adapter or a model in `train.output_dir`.

OUT/checkpoint-<step>/       what a run needs to resume; complete or absent
OUT/metrics.jsonl            one line a step, and one an evaluation
OUT/best.json                which checkpoint is the best, where the recipe asks for it
OUT/adapter_model.safetensors or model.safetensors …, with config, processor and template: the result
OUT/gemma_dist.json          base, quantization, data: written last, so it marks a finished run
"""

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from trl import SFTConfig

from gemma_dist import exits, meeting, ranklog, world
from gemma_dist.config import RunConfig
from gemma_dist.data.encode import Encoder, load_encoder
from gemma_dist.errors import CheckpointError, Stopped
from gemma_dist.files import link_or_copy, writing
from gemma_dist.logs import RunLog, log
from gemma_dist.model.card import CARD, publish_card
from gemma_dist.model.compiled import compile_layers
from gemma_dist.model.devices import card_at_hand, require_card, require_cpu, slow
from gemma_dist.model.load import add_adapter, load_model, read_config, use_cpu
from gemma_dist.model.operators import compile_operators
from gemma_dist.model.per_layer import PerLayerTable, open_table
from gemma_dist.model.record import ADAPTER_RECORD
from gemma_dist.resolve import Run, require_output_dir, resolve
from gemma_dist.stream.growth import editions_from
from gemma_dist.stream.held_out import describe_held_out, find_shared_ids
from gemma_dist.stream.loader import TrajectoryLoader
from gemma_dist.stream.schedule import Edition
from gemma_dist.topology import current_topology, require_fit
from gemma_dist.train.agree import require_same_run
from gemma_dist.train.best import note_best, require_metric
from gemma_dist.train.checkpoint import (
    changed_settings,
    damage_of,
    damaged_and_named,
    find_checkpoint,
    put_aside,
    read_marker,
    require_shared,
    whole_checkpoint,
)
from gemma_dist.train.evaluation import is_due_at_start
from gemma_dist.train.loggers import explain_setup, require_logger
from gemma_dist.train.memory import MemoryReport, MemoryWatch, figures_of, gpu_at_hand
from gemma_dist.train.owner import HEARTBEATS, lock_output_dir, own
from gemma_dist.train.stop import StopRequests
from gemma_dist.train.trainer import ToolCallTrainer, training_arguments
from gemma_dist.train.watchdog import clear

# What a checkpoint holds to resume from, and a result does not need.
STATE_FILES = (
    "complete.json",
    "evaluation.json",
    "optimizer*",
    CARD,  # a user may have written another one meanwhile
)

# Files of weights that a result may consist of.
WEIGHTS = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def train(
    config: RunConfig,
    *,
    trainer_class: Callable[..., ToolCallTrainer] = ToolCallTrainer,
    watch: MemoryWatch | None = None,
    requests: StopRequests | None = None,
) -> None:
    """Train as `config` says, alone or as one rank of many, from the newest complete checkpoint if there is one.

    Args:
        watch: is told of the run before it begins, and of what it took of the GPU.
        requests: what may ask the run to stop, besides the file OUT/stop.

    Raises:
        Stopped: as it was asked to, resumable; there is no result yet.
        ConfigError, DataError, CheckpointError: before any weight is read, where the run could not work, or not on this
            GPU.
        CheckpointError: the ranks did not find the same checkpoint.
        TrainingError: a loss or a gradient is not finite.
    """
    output_dir = config.train.output_dir
    requests = requests or StopRequests()
    ranklog.keep()
    run, encoder, checkpoint, start_step = prepare(config, watch)
    stopped = ""
    with lock_output_dir(output_dir, wait_s=config.train.step_timeout_s), requests.looking_in(output_dir):
        if start_step < run.num_steps:
            stopped = _train_from(run, encoder, checkpoint, trainer_class, watch, requests)
            checkpoint = output_dir / f"checkpoint-{run.num_steps}"
        elif world.rank() == 0:
            _require_whole(checkpoint, config.train.resume_from_checkpoint)
            log.info(
                "%s is the end of this run: nothing is left to train. For another run set train.output_dir", checkpoint
            )
        requests.ends("" if stopped else "the run is done, and publishes its result first")
        if world.rank() == 0 and not stopped:
            _publish(_best(run, checkpoint) or checkpoint, output_dir)
    world.disconnect()
    ranklog.close()
    if stopped:
        raise Stopped(stopped)


class Prepared(NamedTuple):
    """A run before a weight is read."""

    run: Run
    encoder: Encoder
    checkpoint: Path | None  # that this rank has found, to go on from
    start_step: int


def prepare(config: RunConfig, watch: MemoryWatch | None) -> Prepared:
    """All that is done before a weight is read and before the ranks are connected. Nothing is changed on the disk.

    Raises:
        ConfigError, DataError, CheckpointError: as `train`.
    """
    topology = current_topology()
    require_fit(config, topology)
    require_output_dir(config)
    require_logger(config.train.report_to)
    _require_card(config)
    compile_operators(topology, train=True)
    run = resolve(config, topology)
    encoder = load_encoder(config.model.model_name_or_path, config.data)
    if world.rank() == 0 and (note := encoder.lost_opening()):
        log.warning(note)
    settings = config.train
    checkpoint, start_step = find_checkpoint(settings.output_dir, settings.resume_from_checkpoint, run.identity, run)
    if (
        checkpoint
        and (editions := editions_from(read_marker(checkpoint), run.schedule.shards)) != run.schedule.editions
    ):
        if editions and editions[-1].from_step == start_step:
            log.info("data.train was added to: each source takes up what is new at its next epoch")
        run = resolve(config, topology, editions)
    if checkpoint and (changed := changed_settings(checkpoint, config)):
        log.info("resuming from %s with other settings: %s", checkpoint, "; ".join(changed))
    if watch is not None:
        watch.begin(run, gpu_at_hand())
    return Prepared(run, encoder, checkpoint, start_step)


def _require_card(config: RunConfig) -> None:
    """Raises ConfigError where this rank's GPU or CPU cannot carry out the recipe, and says what it does slowly."""
    card = card_at_hand()
    if card is None:
        require_cpu(config)
        return
    require_card(config, card)
    for cost in slow(card):
        log.warning("%s", cost)


def connect(run: Run) -> SFTConfig:
    """Let all ranks meet. Returns the recipe as TRL takes it, by which they are connected; at ZeRO-3 it has to be there
    before the model, whose weights it partitions."""
    world.set_nccl_defaults()
    with meeting.waiting():
        arguments = training_arguments(run)
        world.note_processes()
    return arguments


def _train_from(
    run: Run,
    encoder: Encoder,
    checkpoint: Path | None,
    trainer_class: Callable[..., ToolCallTrainer],
    watch: MemoryWatch | None,
    requests: StopRequests,
) -> str:
    """The remaining steps of a run, from the `checkpoint` that this rank found, or from the newest before it that is
    whole. Returns what there is to say where it stopped before its last step, on all ranks at once."""
    settings = run.config.train
    if world.rank() == 0:
        clear(settings.output_dir)
    arguments = connect(run)
    exits.use_folder(settings.output_dir / HEARTBEATS)
    own(settings.output_dir)
    require_same_run(run)
    require_shared(settings.output_dir)
    checkpoint, start_step = whole_checkpoint(
        checkpoint, settings.output_dir, settings.resume_from_checkpoint, run.identity, run
    )
    _require_same_corpus(run, checkpoint)
    ranklog.write_to(settings.output_dir, _attempt(run, start_step))
    _say_held_out(run)
    require_metric(run, encoder)
    log.info("%d trajectories, %s, %d of %d steps done", len(run.schedule.shards), run.plan, start_step, run.num_steps)
    loader = run_loader(run, encoder, start_step)
    model = load_run_model(run, loader.table)
    metrics = settings.output_dir / "metrics.jsonl"
    is_due = is_due_at_start(run, start_step, checkpoint)
    run_log = RunLog(
        metrics, start_step=start_step, num_steps=run.num_steps, evaluates_anew=is_due, figures=figures_of(watch)
    )
    trainer = trainer_class(run, arguments, model, loader, run_log, requests)
    explain_setup(trainer.callback_handler.callbacks, run.config.train.report_to)
    if watch is not None and not use_cpu():
        trainer.add_callback(MemoryReport(watch))
    if world.rank() == 0:
        (settings.output_dir / ADAPTER_RECORD).unlink(missing_ok=True)  # from now on the run is not finished
    trainer.train(resume_from_checkpoint=checkpoint)
    run_log.close()
    if not trainer.boundary.stopped:
        return ""
    words = trainer.boundary.words(trainer.state.global_step)
    log.info("%s", words)
    requests.ends()
    world.barrier()  # a launcher ends all ranks once the first one has ended
    return words


def _require_same_corpus(run: Run, checkpoint: Path | None) -> None:
    """Raises CheckpointError, on every rank, where the one that is whole is older than the rows that the damaged one
    had taken up: the order of what comes is another one then."""
    shards = run.schedule.shards
    editions = editions_from(read_marker(checkpoint), shards) if checkpoint else [Edition(0, shards.num_row_groups)]
    if editions and editions != run.schedule.editions:
        raise CheckpointError(
            f"the newest checkpoint was damaged and was put aside, and {checkpoint or 'none'} is older than what "
            "data.train was given since; the same command goes on from there"
        )


def _say_held_out(run: Run) -> None:
    """What is evaluated meanwhile, and what of it is trained on as well."""
    if run.held_out is None or world.rank() != 0:
        return
    log.info("%s", describe_held_out(run.held_out))
    shared = find_shared_ids(run.held_out, run.schedule)
    log.log(logging.WARNING if shared.num_samples else logging.INFO, "%s", shared.words)


def _attempt(run: Run, start_step: int) -> dict[str, object]:
    """What the head of a rank's log says of the run."""
    zero = run.topology.zero_stage
    return {
        "world size": f"{world.world_size()}; {run.plan}",
        "launch": run.topology.distributed_type + (f", ZeRO-{zero}" if zero is not None else ""),
        "steps": f"from {start_step + 1} to {run.num_steps}",
    }


def run_loader(run: Run, encoder: Encoder, start_step: int) -> TrajectoryLoader:
    """This rank's micro-batches of the steps from `start_step` on."""
    return TrajectoryLoader(
        run.schedule,
        encoder,
        world.rank(),
        start_step,
        run.num_steps - start_step,
        num_workers=run.config.train.dataloader_num_workers,
        table=table_of(run.config),
        filler="vision" not in run.unneeded_towers,
    )


def _require_whole(checkpoint: Path | None, resume_from_checkpoint: str) -> None:
    """Raises CheckpointError where the last checkpoint of a run, whose result is to be published, is damaged."""
    assert checkpoint is not None, "a run of no steps"
    problems = damage_of(checkpoint)
    if problems and resume_from_checkpoint != "auto":
        raise CheckpointError(damaged_and_named(checkpoint, problems))
    if problems:
        put_aside(checkpoint, problems)
        raise CheckpointError(
            f"{checkpoint}, the end of this run, is damaged and was put aside: the same command goes on from the "
            "newest that is whole"
        )


def _best(run: Run, last: Path | None) -> Path | None:
    """The best checkpoint, if that is what is to be published and there is one; damaged ones are put aside. Raises
    CheckpointError where that is the `last` one, without which the run has not ended."""
    if not run.config.train.load_best_model_at_end:
        return None
    while best := note_best(run):
        if last is not None and best.resolve() == last.resolve():
            _require_whole(last, run.config.train.resume_from_checkpoint)
        elif problems := damage_of(best):
            put_aside(best, problems)
            continue
        log.info("published is %s, the best by %s", best.name, run.config.train.best_metric)
        return best
    log.warning("train.load_best_model_at_end: no checkpoint that is there was evaluated; the last one is published")
    return None


def table_of(config: RunConfig) -> PerLayerTable | None:
    """The per-layer embeddings of the base, where they stay in its file. Nothing is read of them yet."""
    if not config.ple_on_host:
        return None
    name = config.model.model_name_or_path
    return open_table(name, read_config(name), getattr(torch, config.model.dtype))


def load_run_model(run: Run, table: PerLayerTable | None) -> Any:
    """The model with everything frozen that does not train."""
    from transformers import set_seed

    config = run.config
    set_seed(config.train.seed)
    model = load_model(
        config.model,
        config.quantization,
        packing=config.train.packing,
        sequence_parallel_size=config.train.sequence_parallel_size,
        table=table,
        without=run.unneeded_towers,
    )
    if config.lora is not None:
        model = add_adapter(model, config.lora, zero3=run.topology.zero_stage == 3)
    if config.train.torch_compile:
        compile_layers(model)
    return model


def _publish(checkpoint: Path | None, output_dir: Path) -> None:
    """Give `output_dir` the result of the last checkpoint, each file whole or absent, the record last. Its weights take
    no room twice, where the file system can have one file in two folders."""
    assert checkpoint is not None, "a run of no steps"
    result = []
    for path in checkpoint.iterdir():
        is_state = any(path.match(pattern) for pattern in STATE_FILES)
        if path.is_file() and not is_state:
            result.append(path)
    (output_dir / ADAPTER_RECORD).unlink(missing_ok=True)  # of an earlier end: what lies there is not whole meanwhile
    names = {path.name for path in result}
    for old in output_dir.iterdir():
        if WEIGHTS.fullmatch(old.name) and old.name not in names:
            old.unlink()  # of an earlier end, in other pieces
    publish_card(checkpoint, output_dir)
    for path in sorted(result, key=lambda path: path.name == ADAPTER_RECORD):
        with writing(output_dir / path.name) as temporary:
            (link_or_copy if WEIGHTS.fullmatch(path.name) else shutil.copyfile)(path, temporary)
    log.info("the result is in %s", output_dir)
