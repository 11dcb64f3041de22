"""Settings of a run that contradict each other, each allowed by itself.

The sections are those of `config.py`, which asks this module about every run: it cannot name their types.
"""

from collections.abc import Iterator
from typing import Any


def contradictions(config: Any) -> Iterator[str]:
    """What of a run no single section can see, one message each: value, rule and remedy."""
    yield from _of_data(config.data)
    yield from _of_tuning(config)
    yield from _of_training(config.train, config.model)
    yield from _of_evaluation(config.train, config.data)


def _of_data(data: Any) -> Iterator[str]:
    if not data.train:
        yield "data.train: nothing to train on; name a folder that `gemma-dist shard` wrote"
    num_weighted = sum(not isinstance(source, str) and source.weight is not None for source in data.train)
    if data.weights and num_weighted:
        yield "data.weights: the sources of data.train have weights of their own; keep one of the two"
    elif num_weighted not in (0, len(data.train)):
        yield "data.train: some sources have a weight and some have none; give each one {path: …, weight: …}, or none"
    if data.weights and len(set(data.names)) < len(data.names):
        yield f"data.train: two sources have one name, {data.names}; give each {{path: …, name: …}} of its own"
    if data.weights and "from_step" in data.names:
        yield "data.train: no source can have the name from_step where data.weights has steps; give it another one"
    for one in data.weights:
        if set(one) != {"from_step", *data.names}:
            yield (
                f"data.weights: from_step {one['from_step']:g} names {sorted(set(one) - {'from_step'})}, but the "
                f"sources of data.train are {data.names}; give each a weight, 0 to let it rest"
            )


def _of_tuning(config: Any) -> Iterator[str]:
    tuning, lora, quantization = config.tuning, config.lora, config.quantization
    if tuning == "full" and lora is not None:
        yield "lora: an adapter needs tuning: lora or qlora, but tuning is full; remove the section or change tuning"
    if tuning == "full" and config.model.ple == "host":
        yield (
            "model.ple: host, but tuning is full, which trains the per-layer embeddings, and what trains is on the "
            "GPU; remove it, or set tuning: lora"
        )
    if lora is not None and lora.target_parameters:
        # PEFT adds the adapter to the weight itself, so it never sees the inputs that dropout acts on.
        for name, value in (("lora_dropout", lora.lora_dropout), ("use_dora", lora.use_dora)):
            if value:
                yield (
                    f"lora.{name}: {str(value).lower()}, which PEFT has for linear layers alone, but "
                    "lora.target_parameters names experts; remove one of the two"
                )
    if tuning != "qlora" and quantization is not None:
        yield f"quantization: a 4-bit base needs tuning: qlora, but tuning is {tuning}; remove it or change tuning"
    if tuning == "qlora" and quantization is not None and not quantization.load_in_4bit:
        yield "quantization.load_in_4bit: false contradicts tuning: qlora; remove it, or set tuning: lora"
    if tuning == "qlora" and config.train.torch_compile:
        yield "train.torch_compile: true was never tried with weights in 4 bits; remove it, or set tuning: lora"
    if config.model.experts == "host" and not (quantization and quantization.quantize_moe_experts):
        yield "model.experts: host, which is for experts in 4 bits (quantize_moe_experts of tuning: qlora); remove it"


def _of_training(train: Any, model: Any) -> Iterator[str]:
    if train.packing_length is not None and not train.packing:
        yield f"train.packing_length: {train.packing_length}, but packing is off; set train.packing: true, or remove it"
    if model.attn_implementation == "flex_attention" and not train.packing:
        yield (
            "model.attn_implementation: flex_attention, which is for packs, but packing is off; set train.packing: "
            "true, or model.attn_implementation: sdpa"
        )
    if train.torch_compile and train.gradient_checkpointing:
        yield (
            "train.torch_compile: true, but gradient_checkpointing is true: torch compiles nothing of a layer that is "
            "recomputed and breaks its graph, as attention does; set one of the two to false"
        )
    if train.torch_compile and train.sequence_parallel_size > 1:
        yield "train.torch_compile: true was never tried with sequence_parallel_size; remove one of the two"
    if train.activation_offloading and not train.gradient_checkpointing:
        yield "train.activation_offloading: true, but gradient_checkpointing is false; set it to true, or remove this"
    if model.dtype == "bfloat16" and not train.bf16:
        yield "train.bf16: false contradicts model.dtype: bfloat16; set train.bf16: true or model.dtype: float32"
    if train.lr_scheduler_type == "constant" and train.warmup_steps:
        yield (
            f"train.warmup_steps: {train.warmup_steps:g}, but lr_scheduler_type constant has no warm-up; "
            "set lr_scheduler_type: constant_with_warmup"
        )
    if train.max_steps == 0:
        yield "train.max_steps: 0 would train nothing; give a number of steps, or -1 to let num_train_epochs decide"


def _of_evaluation(train: Any, data: Any) -> Iterator[str]:
    evaluates = train.eval_strategy != "no"
    if (evaluates or train.eval_on_start) and not data.eval:
        key, value = ("eval_strategy", train.eval_strategy) if evaluates else ("eval_on_start", "true")
        yield f"train.{key}: {value}, but data.eval names nothing to evaluate; name held-out shards there, or remove it"
    if train.eval_steps is not None and train.eval_strategy != "steps":
        yield (
            f"train.eval_steps: {train.eval_steps}, but eval_strategy is {train.eval_strategy}; set it to steps, or "
            "remove this"
        )
    if train.best_metric is None and train.greater_is_better is not None:
        yield (
            f"train.greater_is_better: {str(train.greater_is_better).lower()} of nothing; name metric_for_best_model, "
            "or remove it"
        )
    if train.best_metric is not None:
        key = "load_best_model_at_end: true" if train.load_best_model_at_end else "metric_for_best_model"
        eval_steps = train.eval_steps or train.save_steps
        if not evaluates:
            yield f"train.{key}: nothing is evaluated, so none is the best; set eval_strategy: steps, or remove it"
        elif train.eval_strategy == "steps" and train.save_steps % eval_steps:
            yield (
                f"train.{key}: of the checkpoints that are evaluated one is the best, but save_steps "
                f"{train.save_steps} is not a multiple of eval_steps {eval_steps}; make it one"
            )
