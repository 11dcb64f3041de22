"""A plan as text for a terminal, and as JSON."""

from collections.abc import Iterator
from typing import Any

from gemma_dist.plan.margin import GIB, USABLE
from gemma_dist.plan.run import Plan

BAR = 60  # characters
FILLINGS = "█▓▒░▚▞▘▝▖▗"  # of the bar, for the largest parts in turn


def render(plan: Plan) -> str:
    """The plan as lines: what was planned, where the bytes go, the verdict, what would save memory, host and disk."""
    return "\n".join([*_head(plan), "", *_table(plan), "", *_verdict(plan), *_levers(plan), "", *_around(plan)])


def _head(plan: Plan) -> Iterator[str]:
    """What was planned."""
    work, estimate, topology = plan.work, plan.estimate, plan.topology
    stage = f"ZeRO-{topology.zero_stage}" if topology.zero_stage else "DDP" if topology.fsdp is None else "FSDP2"
    ranks = "one GPU" if topology.num_processes == 1 else f"{topology.num_processes} GPUs, {stage}"
    yield (
        f"{plan.config.model.model_name_or_path}, tuning {plan.config.tuning}, on {ranks}: trains "
        f"{estimate.num_trained:,} of {estimate.num_parameters:,} parameters"
    )
    batch = work.batch
    images = f", {batch.num_images} images of {batch.tokens_per_image} among them" if batch.num_images else ""
    shared = f", shared by {batch.num_ranks} ranks: {batch.num_tokens:,} tokens on each" if batch.num_ranks > 1 else ""
    yield f"micro-batch of {batch.whole_tokens:,} tokens{shared}{images} ({work.origin})"
    if work.num_steps is not None:
        yield (
            f"{work.num_steps:,} optimizer steps, {work.steps_per_epoch:,} to an epoch of "
            f"{work.tokens_per_epoch:,} tokens"
        )


def _table(plan: Plan) -> Iterator[str]:
    """Where the bytes of a GPU go, largest first, and a bar of them."""
    peak = plan.estimate.peak_bytes
    margin = plan.margin.parts(peak, plan.topology.num_processes)
    parts = dict(sorted(plan.estimate.parts.items(), key=lambda part: -part[1]))
    marks = dict(zip(parts, FILLINGS, strict=False))
    yield f"on each GPU at the peak ({plan.estimate.moment}):"
    for part, size in parts.items():
        yield f"  {marks.get(part, '·')} {part:<22} {_gib(size)}"
    yield f"    {'peak of the allocator':<22} {_gib(peak)}"
    for part, size in margin.items():
        yield f"  - {part:<22} {_gib(size)}   {plan.margin.origin}"
    yield f"    {'needed':<22} {_gib(plan.needed)}"
    whole = plan.available or plan.needed
    bar = "".join(marks.get(part, "·") * round(BAR * size / whole) for part, size in parts.items())
    bar += "-" * round(BAR * sum(margin.values()) / whole)
    end = f"{plan.gpu_memory:g} GB" if plan.gpu_memory else f"{plan.needed / GIB:.1f} GiB"
    inside, over = bar[:BAR], bar[BAR:]
    yield f"  [{inside:<{BAR}}]{over} {end}"


def _verdict(plan: Plan) -> Iterator[str]:
    """Whether it fits."""
    yield plan.figure
    least, most = plan.needed_at(0) / GIB, plan.needed_at(2) / GIB
    ranges = f"{least:.1f} to {most:.1f} GiB with the least and the largest margin"
    if plan.available is None:
        yield f"  {ranges}; --gpu-memory 16GB says whether it fits"
        return
    kept = f"a card sold as {plan.gpu_memory:g} GB gives {plan.available / GIB:.1f} GiB ({USABLE:.0%})"
    room = (plan.available - plan.needed) / GIB
    if not plan.fits:
        yield f"does not fit: {-room:.1f} GiB too much; {ranges}; {kept}"
    elif plan.is_tight:
        yield f"fits just so: {room:.1f} GiB to spare, and the margin decides: {ranges}; {kept}"
    else:
        yield f"fits: {room:.1f} GiB to spare; {ranges}; {kept}"
    yield "  computed from shapes; nothing of it was measured on a GPU here"


def _levers(plan: Plan) -> Iterator[str]:
    """What would save memory."""
    if not plan.levers:
        return
    yield ""
    yield "saves on each GPU (each planned anew with that change):"
    for lever in plan.levers:
        fits = "   fits" if lever.fits and not plan.fits else ""
        note = f"   ({lever.note})" if lever.note else ""
        yield f"  {_gib(lever.num_bytes)}  {lever.words}{fits}{note}"


def _around(plan: Plan) -> Iterator[str]:
    """Host and disk."""
    yield "memory of a node:"
    for name, size in plan.estimate.host.items():
        yield f"  {_gib(size)}  {name}"
    yield "on disk:"
    for name, size in plan.estimate.disk.items():
        yield f"  {_gib(size)}  {name}"


def _gib(size: float) -> str:
    return f"{size / GIB:8.2f} GiB"


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain JSON values: sizes in bytes. Keys stay as they are; more may come."""
    peak, num_gpus = plan.estimate.peak_bytes, plan.topology.num_processes
    return {
        "model": plan.config.model.model_name_or_path,
        "tuning": plan.config.tuning,
        "num_gpus": num_gpus,
        "zero_stage": plan.topology.zero_stage,
        "fsdp": plan.topology.fsdp is not None,
        "num_parameters": plan.estimate.num_parameters,
        "num_trained": plan.estimate.num_trained,
        "batch": {
            "num_tokens": plan.work.batch.whole_tokens,
            "num_ranks": plan.work.batch.num_ranks,
            "num_images": plan.work.batch.num_images,
            "tokens_per_image": plan.work.batch.tokens_per_image,
            "origin": plan.work.origin,
        },
        "num_steps": plan.work.num_steps,
        "steps_per_epoch": plan.work.steps_per_epoch,
        "tokens_per_epoch": plan.work.tokens_per_epoch,
        "parts": plan.estimate.parts,
        "moment": plan.estimate.moment,
        "peak_bytes": peak,
        "margin": plan.margin.parts(peak, num_gpus),
        "margin_origin": plan.margin.origin,
        "needed_bytes": plan.needed,
        "needed_bytes_range": [plan.needed_at(0), plan.needed_at(2)],
        "available_bytes": plan.available,
        "fits": plan.fits,
        "levers": [
            {"change": lever.words, "saves_bytes": lever.num_bytes, "fits": lever.fits, "note": lever.note}
            for lever in plan.levers
        ],
        "host": plan.estimate.host,
        "disk": plan.estimate.disk,
    }
