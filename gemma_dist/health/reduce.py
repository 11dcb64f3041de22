"""A small all-reduce of all nodes: whether they reach one another as training will, and how long it takes."""

import datetime
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

NUM_ELEMENTS = 1 << 18  # float32: 1 MiB
NUM_TIMED = 5  # exchanges, after one that connects


def all_reduce(connect: Callable[[], Any], rank: int, world_size: int, timeout_s: float, *, nccl: bool) -> str:
    """Exchange, by gloo and, with `nccl`, by NCCL from the first GPU of each node. What came of it, as JSON:
    milliseconds of each, or an `error`. Comes back after `timeout_s` seconds also where an exchange hangs.

    Args:
        connect: makes a connection to the store of the nodes. It stays that of the exchange, which may hang in it.
    """
    found: dict[str, object] = {"error": f"does not end within {timeout_s:g} s"}

    def exchange() -> None:
        """By each backend; it may never end."""
        try:
            times = {}
            for backend, device in (("gloo", "cpu"), *([("nccl", "cuda:0")] if nccl else [])):
                times[backend] = _exchange(backend, device, connect(), rank, world_size, timeout_s)
            found.clear()
            found.update(times)
        except Exception as error:  # torch and NCCL have many
            found["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"

    thread = threading.Thread(target=exchange, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return json.dumps(found)


def _exchange(backend: str, device: str, store: Any, rank: int, world_size: int, timeout_s: float) -> float:
    """Milliseconds of an all-reduce. Raises RuntimeError where its sum is wrong."""
    torch.distributed.init_process_group(
        backend,
        store=torch.distributed.PrefixStore(backend, store),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    try:
        for number in range(1 + NUM_TIMED):
            if number == 1:
                begun = time.perf_counter()
            summands = torch.full((NUM_ELEMENTS,), float(rank + 1), device=device)
            torch.distributed.all_reduce(summands)
            expected = world_size * (world_size + 1) / 2
            if not bool((summands == expected).all()):
                raise RuntimeError(f"a sum by {backend} is wrong: {summands.unique().tolist()[:5]}, not {expected:g}")
        return (time.perf_counter() - begun) / NUM_TIMED * 1000
    finally:
        torch.distributed.destroy_process_group()
