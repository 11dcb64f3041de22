"""The trainer core: TRL's `SFTTrainer` with our order of data, our loss normalization and our checkpoints.

TRL gives the fused LM head (the logits of 262,144 tokens never exist), mixed precision, DDP and DeepSpeed. Changed are
the places where it would train something else on Gemma 4:

- the batches come ready from `TrajectoryLoader` and do not pass through `accelerate.prepare`, which would cut image
  tensors by the number of rows;
- the loss is a sum over the target tokens of the global batch, divided by their number, whatever the ranks and the
  accumulation: loss = sum(nll) / num_target_tokens, or sum(weight * nll) / sum(weight) where rows have weights.
  `Gemma4ForConditionalGeneration` says that it does not take that number, so Trainer would average averages. Their
  number is known without asking: no micro-batch waits for the device or for another rank, and a step has one exchange
  (`sums.py`);
- checkpointing is non-reentrant: reentrant recomputation loses the gradients of keys and values that layers share.
"""

import contextlib
import math
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import SFTConfig, SFTTrainer

from gemma_dist import world
from gemma_dist.logs import RunLog
from gemma_dist.model import fsdp
from gemma_dist.model.attention import Shape
from gemma_dist.model.flat_sizes import add_flat_sizes
from gemma_dist.model.head import KINDS, WEIGHTS, inputs_of_model, use_target_head
from gemma_dist.model.load import use_cpu
from gemma_dist.model.record import write_record
from gemma_dist.model.zero3 import is_partitioned
from gemma_dist.resolve import Run
from gemma_dist.settings import EvalInTraining
from gemma_dist.stream.loader import TrajectoryLoader, count_targets
from gemma_dist.topology import write_recipe_into
from gemma_dist.train import checkpoint
from gemma_dist.train.boundary import Boundary
from gemma_dist.train.evaluation import Evaluation
from gemma_dist.train.feed import Feed, MicroBatches, transfer_to
from gemma_dist.train.guard import sample_ids, stop_unless_finite
from gemma_dist.train.offload import activations_on_host
from gemma_dist.train.optimizer import load_optimizer, optimizer_bytes, save_optimizer
from gemma_dist.train.stop import StopRequests
from gemma_dist.train.sums import SHOWN, StepSums, Totals, require_counted, summarize
from gemma_dist.train.watchdog import Watchdog
from gemma_dist.train.weights import bytes_to_save, require_gathered, weights_to_save

# Settings of a recipe that are ours to carry out.
OURS = (
    "global_batch_size",
    "num_train_epochs",
    "resume_from_checkpoint",
    "packing",
    "packing_length",
    "sequence_parallel_size",
    "dataloader_num_workers",
    "activation_offloading",
    "torch_compile",
    "step_timeout_s",
    "stop_grace_s",
    *EvalInTraining.model_fields,
)


def training_arguments(run: Run) -> SFTConfig:
    """The recipe as TRL takes it. To be made before the model: at ZeRO-3 it partitions the weights on loading."""
    config = run.config
    settings = config.train.model_dump()
    for ours in OURS:
        del settings[ours]
    checkpointing = settings.pop("gradient_checkpointing")
    report_to = settings.pop("report_to")
    arguments = OneGpuConfig(
        **settings
        | {
            "output_dir": str(config.train.output_dir),
            "max_steps": run.num_steps,
            "gradient_accumulation_steps": run.plan.gradient_accumulation_steps,
            "fp16": False,
            "activation_checkpointing": checkpointing,
            "activation_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
            "report_to": [] if report_to == "none" else [report_to],
        },
        use_cpu=use_cpu(),
        average_tokens_across_devices=True,
        logging_nan_inf_filter=False,  # a loss that is not finite is shown as it is
        save_strategy="steps",
        max_length=None,  # lengths were settled when the rows were sharded
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        ignore_data_skip=True,  # the loader starts at the right step by itself
        ddp_broadcast_buffers=False,  # no buffer changes, and DDP would send them at every step
        ddp_find_unused_parameters=False,  # every rank runs every part in every micro-batch
        disable_tqdm=True,
        ddp_timeout=int(world.COLLECTIVE_TIMEOUT.total_seconds()),
    )
    if run.topology.fsdp is not None:
        fsdp.prepare_arguments(arguments, reduce_each_micro_batch=config.tuning == "full")
    if arguments.deepspeed_plugin is not None:
        write_recipe_into(arguments.deepspeed_plugin.deepspeed_config, config, run.plan)
    return arguments


class OneGpuConfig(SFTConfig):
    """TRL's settings for a process that takes one GPU, as every rank does: without a launcher, Trainer would take all
    that it sees (`nn.DataParallel`), which TRL refuses."""

    @property
    def n_gpu(self) -> int:
        return min(super().n_gpu, 1)


class ToolCallTrainer(SFTTrainer):
    """One training run of a model (bare or PEFT-wrapped) over the micro-batches of `loader`."""

    def __init__(
        self,
        run: Run,
        arguments: SFTConfig,
        model: Any,
        loader: TrajectoryLoader,
        run_log: RunLog,
        requests: StopRequests | None = None,
    ) -> None:
        """`arguments` are those of `training_arguments(run)`. What TRL then changes against our will is undone."""
        adapter_dtypes = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict({"text": [""]}),  # TRL insists on one; the batches come from the loader
            data_collator=list,
            processing_class=loader.encoder.processor,
        )
        use_target_head(model.get_base_model() if isinstance(model, PeftModel) else model)
        self.remove_callback(PrinterCallback)  # our own line says it
        self.add_callback(SeedSteps())
        self.run, self.loader, self.run_log = run, loader, run_log
        self.boundary = Boundary(run.config.train, requests)
        self.add_callback(self.boundary)
        self.evaluation = Evaluation(self, run.held_out)
        self.add_callback(self.evaluation)
        self.model_accepts_loss_kwargs = True
        if self.is_fsdp_enabled:
            fsdp.gather_layer_by_layer(self.accelerator.state.fsdp_plugin, model)
            fsdp.let_4_bits_be_sharded(model, sent_in=torch.bfloat16 if self.args.bf16 else None)
        self._sums = StepSums(self.args.device)
        self._unlogged: list[Totals] = []  # steps since the last line of the log
        self._at_end = False  # of a step, where it is logged and saved
        # TRL flips this to reentrant for PEFT at ZeRO-3, from the days when DeepSpeed could not do otherwise.
        if self.args.activation_checkpointing:
            self.args.activation_checkpointing_kwargs = {"use_reentrant": False}
        # TRL casts the adapters of 4-bit models to bfloat16, where small updates are rounded away.
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.dtype != adapter_dtypes[name]:
                parameter.data = parameter.data.to(adapter_dtypes[name])

    def train(self, resume_from_checkpoint: Path | None = None) -> object:
        """Train from the loader's first step on; its state is in `resume_from_checkpoint`, if it is not the first.

        Trainer itself knows nothing of a checkpoint: its own state would bring back the `save_steps` and
        `logging_steps` of then.
        """
        self.checkpoint = resume_from_checkpoint
        self.boundary.begin(resume_from_checkpoint, self.loader.start_step, self.run.num_steps)
        settings = self.run.config.train
        self._watchdog = Watchdog(settings.output_dir, settings.step_timeout_s, self._position, self._samples)
        try:
            return super().train()
        finally:
            self._watchdog.close()

    def get_train_dataloader(self) -> DataLoader:
        """Our batches as they are, on the device: Trainer's own would pass them through `accelerate.prepare`."""
        shape = Shape.of(self.model.config.get_text_config())
        return DataLoader(Feed(self.loader, transfer_to(self.args.device), shape), batch_size=None)

    def _init_training_state(self, *args: object, **kwargs: object) -> Any:
        """Count steps from the one that the loader starts at."""
        initial = super()._init_training_state(*args, **kwargs)
        self.state.global_step = self._logged_step = self.loader.start_step
        return initial

    def _prepare_for_training(self, *args: object, **kwargs: object) -> Any:
        """What waits until Trainer has made the optimizer and wrapped the model (DDP, DeepSpeed): the state of the
        checkpoint, the check of its checkpointing, and the look at each step's gradients before the optimizer."""
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.run.topology.fsdp is not None:
            fsdp.require_sharded(self.model)
            if self.args.bf16:
                fsdp.compute_in_bfloat16(self.model, self.args.device)
        if self.checkpoint is not None:
            load_optimizer(self.checkpoint, self.model, self.optimizer.optimizer)
            _set_step(self.lr_scheduler, self.loader.start_step)
        if self.args.activation_checkpointing:
            assert_non_reentrant(self.model)
        if isinstance(self.model_wrapped, DistributedDataParallel):
            warm_up_ddp_buckets(self.model_wrapped)
        if self.is_deepspeed_enabled:
            # Its engine steps within the backward pass, before Trainer could look at the gradients.
            engine, step = self.model_wrapped, self.model_wrapped.step

            def step_if_finite() -> None:
                """The engine's own step, unless all ranks have to stop."""
                self._end_backward(math.inf if engine.optimizer.has_overflow() else 0.0)
                step()

            engine.step = step_if_finite
        return prepared

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: object) -> Any:
        """A step's micro-batches, each taken when its turn comes, and the target tokens of all ranks' micro-batches, as
        much as their rows weigh. Trainer would first fetch the whole step, and count on every rank, in an exchange."""
        self._targets, weight = self._count_targets(self.state.global_step)
        return MicroBatches(epoch_iterator, num_batches), weight

    def _count_targets(self, step: int) -> tuple[int, float]:
        """Target tokens of the global batch of `step`, and what they weigh: arithmetic, the same on every rank."""
        return count_targets(self.loader.schedule, step)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: float | None = None
    ) -> torch.Tensor:
        """sum(weight * nll) / num_items_in_batch, as TRL's, times the number of ranks, over which gradients are
        averaged. Unlike TRL's it waits for neither the device nor another rank."""
        assert num_items_in_batch is not None, "the loss of a training step"
        assert not return_outputs, "the fused head makes no logits"
        with activations_on_host() if self.run.config.train.activation_offloading else contextlib.nullcontext():
            outputs = model(**inputs_of_model(inputs))
            log_probs = outputs.log_probs * inputs[WEIGHTS] if WEIGHTS in inputs else outputs.log_probs
            loss: torch.Tensor = -log_probs.sum() / num_items_in_batch * world.world_size()
        self._sums.add(loss, outputs, inputs[KINDS])
        return loss

    def _get_grad_norm(self, *args: object, **kwargs: object) -> Any:
        """Trainer asks for it between the backward pass and the optimizer: the moment to look at the gradients."""
        norm = super()._get_grad_norm(*args, **kwargs)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return norm if self.is_deepspeed_enabled else self._end_backward(norm)

    def _end_backward(self, grad_norm: torch.Tensor | float) -> float:
        """Between the last backward pass of a step and the optimizer, on every rank: the one exchange of the step.
        Returns the norm of the gradients, which are those of all ranks (or inf for some that are not finite)."""
        step = self.state.global_step
        totals = self._sums.exchange(grad_norm, is_asked_to_stop=bool(self.boundary.requests.by()))
        self.boundary.asked_anywhere = totals.is_asked_to_stop
        stop_unless_finite(self.loader.schedule, step, everywhere=totals.is_finite, loss=self._sums.loss_is_finite)
        require_counted(step, totals, self._targets)
        self._unlogged.append(totals)
        return totals.grad_norm

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """At the end of each step."""
        self._watchdog.step_ended()
        self._at_end = True
        if self.control.should_log and self._unlogged:
            self._log_steps(tr_loss, grad_norm, kwargs["learning_rate"])
        if not self.boundary.stopped and self.evaluation.at_end_of_step(self.state.global_step):
            self.boundary.stop(self.state, self.control)
            if self._unlogged:
                self._log_steps(tr_loss, grad_norm, kwargs["learning_rate"])
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        self._at_end = False
        self.moved()  # to save takes its own time

    def moved(self) -> None:
        """Tell the watchdog that something has ended."""
        self._watchdog.moved()

    def _log_steps(self, tr_loss: torch.Tensor, grad_norm: Any, learning_rate: float) -> None:
        """What Trainer does at a logged step, with what the exchanges of the steps have told already: it would gather
        the losses of the ranks once more."""
        values = summarize(self._unlogged)
        self._total_loss_scalar += values["loss"] * len(self._unlogged)
        self._unlogged.clear()
        tr_loss.zero_()  # Trainer's own sum
        self._globalstep_last_logged = self.state.global_step
        self.log({**values, "grad_norm": float(grad_norm), "learning_rate": learning_rate})

    def _position(self) -> str:
        """What this rank is at, for the watchdog."""
        step = self.state.global_step
        return self.evaluation.place or (f"the end of step {step}" if self._at_end else f"step {step + 1}")

    def _samples(self, rank: int) -> str:
        """What a rank works on there."""
        evaluated = self.evaluation.samples(rank)
        step = self.state.global_step - self._at_end
        return f"samples {evaluated or sample_ids(self.loader.schedule, step, rank)}"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One line a step, on the terminal and in metrics.jsonl, from what Trainer and TRL have measured."""
        if "loss" in logs and self.is_world_process_zero():
            step = self.state.global_step
            done = range(self._logged_step, step)
            self._logged_step = step
            target_tokens = num_tokens = 0
            for finished in done:
                of_targets, of_all = self.loader.counts_at(finished)
                target_tokens += of_targets
                num_tokens += of_all
            logs |= self.run_log.write(
                step,
                {
                    **{name: logs[name] for name in SHOWN if name in logs},
                    "grad_norm": logs["grad_norm"],
                    "learning_rate": logs["learning_rate"],
                    "epoch": round(self.loader.schedule.epoch(step), 4),
                    "target_tokens": target_tokens,
                },
                num_tokens=num_tokens,
            )
        super().log(logs, start_time)

    def _save_checkpoint(self, model: object, trial: object) -> None:
        """All that a run needs to resume, complete or absent. What is random follows from the step: see `SeedSteps`."""
        begun, dtype = time.monotonic(), getattr(torch, self.run.config.model.dtype)
        num_bytes = bytes_to_save(self.model, dtype) + optimizer_bytes(self.model, self.optimizer.optimizer)
        with checkpoint.saving(self.run, self.state.global_step, num_bytes) as folder:
            self.save_model(str(folder))
            if self.args.should_save:
                self.evaluation.write_into(folder, self.state.global_step)
            save_optimizer(folder, self.model, self.optimizer.optimizer)
        self.boundary.saved(self.state.global_step, time.monotonic() - begun)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what trained, an adapter or the whole model, with all that is needed to use it. Every rank calls it."""
        engine = self.model_wrapped if self.is_deepspeed_enabled else None
        dtype = getattr(torch, self.run.config.model.dtype)
        saves = self.args.should_save or is_partitioned(self.model)
        weights = weights_to_save(self.model, engine, dtype) if saves else {}
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        self.model.save_pretrained(folder, state_dict=weights)
        if self.is_fsdp_enabled and self.run.config.tuning == "full":
            self.model.config.dtype = dtype  # it was given that of the copy that trains
            self.model.config.save_pretrained(folder)
        add_flat_sizes(folder)
        self.processing_class.save_pretrained(folder)
        write_record(folder, self.run.config, self.model, **self.run.identity.to_json())
        require_gathered(folder)


class SeedSteps(TrainerCallback):
    """Lets what is random in a step (dropout) follow from the seed, the step and the rank, so that a resumed run
    draws what the uninterrupted one did. Trainer would restore a pickled state instead, and the data loader would then
    draw from it once more."""

    def on_step_begin(self, args: Any, state: Any, control: object, **kwargs: object) -> None:
        """Seed Python, NumPy and torch before the first micro-batch of a step."""
        words = np.random.SeedSequence((args.seed, state.global_step, world.rank())).generate_state(1)
        set_seed(int(words[0]))


def _set_step(scheduler: Any, step: int) -> None:
    """Set the learning rate to that of `step`, of which alone it is a function."""
    scheduler.last_epoch = step - 1
    with warnings.catch_warnings():  # torch takes it for the first step of all, which should follow the optimizer's
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)`")
        scheduler.step()


def warm_up_ddp_buckets(model: DistributedDataParallel) -> None:
    """Run a backward pass of zeros through `model`, in which the gradients come about as in a real one: those of the
    layers of the language model from the last to the first, then what comes before them.

    DDP sorts its buckets anew after the first pass, by the order in which the gradients came. With more than two ranks
    that is another order of summation, so the first step of a resumed run would differ in the last bit from the same
    step of an uninterrupted one.
    """
    trained = [(name, parameter) for name, parameter in model.module.named_parameters() if parameter.requires_grad]
    trained.sort(key=lambda named: ".language_model.layers." in named[0])  # the sum is taken apart from its end
    with patch.object(model.module, "forward", lambda _: sum(parameter.sum() * 0 for _, parameter in trained)):
        model(None).backward()  # on GPUs DDP insists on an argument
    model.zero_grad()


def assert_non_reentrant(model: torch.nn.Module) -> None:
    """Every checkpointed layer recomputes without re-entering autograd, whatever was configured on the way here."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        function = layer._gradient_checkpointing_func
        assert isinstance(function, partial), function
        assert function.keywords.get("use_reentrant") is False, "reentrant checkpointing: wrong gradients"
    assert layers, "checkpointing is on, but no layer is checkpointed"
