"""Evaluation while a run trains: the loss of held-out shards (`data.eval`), by kind of token, every so many steps.

All ranks take part, in every launch: each runs the model on as many micro-batches, fillers among them, and their sums
are added once at the end. Nothing of training changes: no dropout, no gradients, and what is random in a step follows
from its number. A request to stop ends an evaluation, but for that of the last step; a run that goes on from there
makes up for it.
"""

import contextlib
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from gemma_dist import world
from gemma_dist.errors import DataError
from gemma_dist.logs import write_json
from gemma_dist.model import fsdp
from gemma_dist.model.attention import Shape
from gemma_dist.model.head import KINDS, inputs_of_model
from gemma_dist.resolve import Run
from gemma_dist.stream.held_out import HeldOut
from gemma_dist.stream.loader import TrajectoryLoader
from gemma_dist.train.best import EVALUATION, note_best
from gemma_dist.train.feed import Feed, transfer_to
from gemma_dist.train.guard import sample_ids
from gemma_dist.train.sums import StepSums, Totals, summarize


class Evaluation(TrainerCallback):
    """The evaluations of a run on one rank; without `held_out` there are none. `trainer` is the run's."""

    def __init__(self, trainer: Any, held_out: HeldOut | None) -> None:
        self._trainer, self._held_out = trainer, held_out
        self._round: int | None = None  # that is being evaluated
        self._tried_step: int | None = None  # of the last one
        self._last: dict[str, Any] = {"step": None}  # what the last one that came to its end has found

    @property
    def place(self) -> str:
        """What this rank is at, for the watchdog; empty where it evaluates nothing."""
        number = self._round  # once: the watchdog asks from threads of its own
        if number is None or self._held_out is None:
            return ""
        return f"an evaluation, batch {number + 1} of {self._held_out.num_rounds}"

    def samples(self, rank: int) -> str:
        """What a rank evaluates there; empty likewise."""
        number = self._round
        return "" if number is None or self._held_out is None else sample_ids(self._held_out, number, rank)

    def on_train_begin(self, args: object, state: Any, control: Any, **kwargs: object) -> None:
        """Before the first step of all; or, where the checkpoint that the run goes on from lacks its evaluation, that
        one. Steps that are asked to stop meanwhile stop after the first."""
        run, step, checkpoint = self._trainer.run, state.global_step, self._trainer.checkpoint
        if not run.evaluates_at(step):
            return
        if not world.gather_objects(is_due_at_start(run, step, checkpoint))[0]:  # rank 0 has written the files
            return
        is_ours = checkpoint is not None and checkpoint.parent.resolve() == run.config.train.output_dir.resolve()
        if self._evaluate(step) and is_ours and world.rank() == 0:
            write_json(checkpoint / EVALUATION, self._last)
            note_best(run)

    def at_end_of_step(self, step: int) -> bool:
        """Evaluate where it is due, and save where the best of all epochs is kept; once, though Trainer ends the last
        step of an epoch twice. Returns whether a request to stop, on any rank, ended it."""
        run = self._trainer.run
        if self._tried_step == step or not run.evaluates_at(step):
            return False
        if not self._evaluate(step):
            return True
        if run.config.train.saves_each_epoch:
            self._trainer.control.should_save = True
        return False

    def write_into(self, folder: Path, step: int) -> None:
        """Leave in the checkpoint of `step` what was found there. For rank 0 alone."""
        if self._last["step"] == step:
            write_json(folder / EVALUATION, self._last)

    def _evaluate(self, step: int) -> bool:
        """Measure, say and keep. False: asked to stop meanwhile, on any rank; not at the last step, where a run ends
        anyway, and nobody would make up for it."""
        held_out, trainer = self._held_out, self._trainer
        assert held_out is not None, "nothing is due"
        self._tried_step = step
        begun = time.perf_counter()
        totals = self._totals(held_out, ends_if_asked=step < trainer.state.max_steps)
        if totals is None:
            return False
        if totals.target_tokens != held_out.num_target_tokens:
            raise DataError(
                f"data.eval has {totals.target_tokens:,} target tokens, and its manifest counts "
                f"{held_out.num_target_tokens:,}; make the shards anew (`gemma-dist shard`)"
            )
        values = values_of(totals)
        counts = {"eval_samples": len(held_out.samples), "eval_target_tokens": totals.target_tokens}
        self._last = {"step": step, **values, **counts, "data": held_out.identity}
        seconds = time.perf_counter() - begun
        trainer.run_log.write_evaluation(step, {**values, **counts}, seconds)
        if world.rank() == 0:
            trainer.log({name: value for name, value in values.items() if value is not None})
        return True

    def _totals(self, held_out: HeldOut, *, ends_if_asked: bool) -> Totals | None:
        """The sums over all ranks; None: asked to stop meanwhile, on any of them, where that ends it."""
        trainer = self._trainer
        device, of_training = trainer.args.device, trainer.loader
        loader = TrajectoryLoader(
            held_out,
            of_training.encoder,
            of_training.rank,
            0,
            held_out.num_rounds,
            num_workers=of_training.num_workers,
            table=of_training.table,
            filler=of_training.filler,
        )
        batches: Any = iter(Feed(loader, transfer_to(device), Shape.of(trainer.model.config.get_text_config())))
        model = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
        sums = StepSums(device)
        was_training = model.training
        model.eval()
        try:
            with contextlib.closing(batches), torch.no_grad():
                for self._round, inputs in enumerate(batches):
                    if ends_if_asked and any(world.any_rank([bool(trainer.boundary.requests.by())])):
                        return None
                    with trainer.compute_loss_context_manager():
                        outputs = model(**inputs_of_model(inputs))
                    sums.add(-outputs.log_probs.sum(), outputs, inputs[KINDS])
                    trainer.moved()
        finally:
            self._round = None
            model.train(was_training)
            fsdp.reshard(model)
        return sums.exchange(0.0)


def values_of(totals: Totals) -> dict[str, float | None]:
    """What an evaluation gives, by its names in metrics.jsonl; None where it is not finite, which JSON cannot say."""
    mean = sum(totals.nll_of_kinds) / max(1, totals.target_tokens)
    found = summarize([replace(totals, loss=mean)])
    return {f"eval_{name}": value if math.isfinite(value) else None for name, value in found.items()}


def is_due_at_start(run: Run, step: int, checkpoint: Path | None) -> bool:
    """Whether a run evaluates before it goes on from `checkpoint`, which has `step` steps, as this rank sees it."""
    return run.evaluates_at(step) and (checkpoint is None or not (checkpoint / EVALUATION).is_file())
