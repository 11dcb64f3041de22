"""Runs that are asked to stop, of one process and of ranks without a launcher, at places that no test could hit from
outside.

    python -m tests.support.stops MODEL SHARDS FOLDER

Prints one JSON line a run. Ranks are forked from a process that has all of it imported, and nothing run with it yet.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.support.ranks import REPOSITORY

NUM_STEPS = 6
ASKS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "file")
NUM_STEPS_OF_RANKS = 10
SETTINGS = ["per_device_train_batch_size=1", "global_batch_size=2"]
SETTINGS += ["lr_scheduler_type=constant_with_warmup", "warmup_steps=1"]  # the same for every number of steps
ENDS = ("kill -9", "kill -11", "a user error", "asked to stop")


def steps(out: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of each line of metrics.jsonl that is whole."""
    path = out / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [(row["step"], row["loss"], row["grad_norm"]) for row in map(json.loads, lines)]


def checkpoints(out: Path) -> list[int]:
    """The steps that are saved."""
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in out.glob("checkpoint-*"))


def codes(folder: Path) -> dict[str, str]:
    """What ranks left a word of."""
    return {path.name: path.read_text().strip() for path in folder.glob("*")}


def tell(name: str, **found: object) -> None:
    print(json.dumps({"name": name, **found}), flush=True)


# ---- ranks -----------------------------------------------------------------------------------------------------------


def fork(work: Callable[[], int], log: Path) -> list[int]:
    """Two processes that know each other, as tasks of srun do; each ends with what `work` returns."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    processes = []
    for rank in range(2):
        if process := os.fork():
            processes.append(process)
            continue
        code = 70
        try:
            handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            by_hand = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": 2,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            os.environ.update({key: str(value) for key, value in by_hand.items()})
            code = work()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return processes


def ends_of(processes: list[int]) -> list[int]:
    """Their exit codes, or minus the signals that killed them."""
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


@contextlib.contextmanager
def asked_in_step(step: int, ask: str) -> Iterator[None]:
    """Within, rank 0 gets a signal in a step, however busy the machine is."""
    from gemma_dist import world
    from gemma_dist.train.boundary import Boundary

    begin = Boundary.on_step_begin

    def asked(self: Boundary, args: object, state: Any, *more: Any, **kwargs: Any) -> None:
        begin(self, args, state, *more, **kwargs)
        if world.rank() == 0 and state.global_step == step - 1:
            os.kill(os.getpid(), signal.Signals[ask])
            while not self.requests.by():
                time.sleep(0.01)

    with patch.object(Boundary, "on_step_begin", asked):
        yield


def stop_ranks(model: str, shards: str, folder: Path) -> None:
    """A whole run, and one that rank 0 alone is asked to stop, and its second half."""
    from gemma_dist.__main__ import main

    for name, out, ask in (("whole", "whole", ""), ("stopped", "stopped", "SIGUSR2"), ("resumed", "stopped", "")):
        words = [f"model_name_or_path={model}", f"data.train={shards}", f"output_dir={folder / out}", *SETTINGS]
        words += [f"max_steps={NUM_STEPS_OF_RANKS}"]
        os.environ["GEMMA_DIST_EXIT_CODES"] = str(folder / f"{name}-codes")
        log = folder / f"{name}.log"

        def work(words: list[str] = words, ask: str = ask) -> int:
            with asked_in_step(3, ask) if ask else contextlib.nullcontext():
                return main(["train", "launch/cpu_lora.yaml", *words])

        processes = fork(work, log)
        tell(
            f"two ranks: {name}",
            ends=ends_of(processes),
            codes=codes(folder / f"{name}-codes"),
            losses=steps(folder / out),
            saved=checkpoints(folder / out),
            said=log.read_text(),
            logs={path.name: path.read_text() for path in (folder / out / "logs").iterdir()},
        )
    del os.environ["GEMMA_DIST_EXIT_CODES"]


def end_ranks(folder: Path) -> None:
    """Rank 1 ends in one way after the other, while rank 0 waits for it."""
    import click

    from gemma_dist import __main__, exits, world
    from gemma_dist.errors import DataError

    for number, name in enumerate(ENDS):

        @click.command()
        def meet(name: str = name, number: int = number) -> None:
            world.connect()
            world.note_processes()
            exits.use_folder(folder / f"ends-{number}")
            world.barrier()
            if world.rank() == 1:
                if name.startswith("kill"):
                    os.kill(os.getpid(), -int(name.split()[1]))
                if name == "a user error":
                    raise DataError("no rows")
                exits.leave(exits.STOPPED)
            world.barrier()

        log = folder / f"ends-{number}.log"
        with patch.object(__main__, "cli", meet):
            processes = fork(lambda: __main__.main([]), log)
        # Rank 1 stays to be asked how it ended, as it would be for a launcher that has not looked yet.
        (end,) = ends_of(processes[:1])
        os.waitpid(processes[1], 0)
        tell(name, end=end, said=log.read_text())


# ---- one process -----------------------------------------------------------------------------------------------------


def train(
    model: str,
    shards: str,
    folder: Path,
    name: str,
    ask: str = "",
    *,
    where: str = "step",
    at: int = 0,
    out: str = "",
    **more: object,
) -> None:
    """One run, asked to stop by `ask` in step `at`: `where` of it (`end`: and while its result is published)."""
    from gemma_dist.errors import Stopped
    from gemma_dist.recipe import load_config
    from gemma_dist.train import run as training
    from gemma_dist.train.stop import StopRequests
    from gemma_dist.train.trainer import ToolCallTrainer

    output_dir, requests, saves = folder / (out or name), StopRequests(), []

    def send() -> None:
        """Ask, and wait until the request has come: in a thread, as in any run."""
        if ask == "file":
            (output_dir / "stop").touch()
        elif ask:
            os.kill(os.getpid(), signal.Signals[ask])
        end = time.monotonic() + 60
        while ask and not requests.by() and time.monotonic() < end:
            time.sleep(0.01)

    class AskedTrainer(ToolCallTrainer):
        """Is asked within a step, or within its save."""

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if where in ("step", "end") and self.state.global_step == at - 1 and not requests.by():
                send()
            return super().training_step(*args, **kwargs)

        def save_model(self, *args: Any, **kwargs: Any) -> None:
            saves.append(self.state.global_step)
            if where == "save" and self.state.global_step == at:
                send()
            super().save_model(*args, **kwargs)

    @contextlib.contextmanager
    def asked_while_publishing() -> Iterator[None]:
        publish = training._publish

        def interrupted(*args: Any) -> None:
            send()
            time.sleep(0.2)
            publish(*args)

        with patch.object(training, "_publish", interrupted):
            yield

    settings = {"max_steps": NUM_STEPS, "save_steps": 1000, "global_batch_size": 2, **more}
    words = [f"model_name_or_path={model}", f"data.train={shards}", f"output_dir={output_dir}"]
    words += ["per_device_train_batch_size=2", *(f"{key}={value}" for key, value in settings.items())]
    config = load_config(REPOSITORY / "launch/cpu_lora.yaml", words)
    requests.listen()
    said = ""
    with asked_while_publishing() if where == "end" else contextlib.nullcontext():
        try:
            training.train(config, trainer_class=AskedTrainer, requests=requests)
        except Stopped as stopped:
            said = str(stopped)
    tell(
        name,
        said=said,
        saves=saves,
        losses=steps(output_dir),
        checkpoints=checkpoints(output_dir),
        published=(output_dir / "gemma_dist.json").exists(),
        left=sorted(path.name for path in output_dir.iterdir() if path.name in ("stop", "heartbeats")),
    )


def import_all() -> None:
    """What runs import, once for all ranks that are forked."""
    import deepspeed  # noqa: F401
    import transformers

    import gemma_dist.train.run
    import gemma_dist.train.trainer  # noqa: F401

    transformers.AutoModelForImageTextToText  # noqa: B018 (imported when first named)
    transformers.Gemma4ForConditionalGeneration  # noqa: B018


def main() -> None:
    from gemma_dist.logs import start_logging

    model, shards, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    (folder / "ranks").mkdir()
    import_all()
    stop_ranks(model, shards, folder / "ranks")
    end_ranks(folder / "ranks")
    start_logging()
    begin = (model, shards, folder)
    train(*begin, "whole", "SIGTERM", where="end", at=NUM_STEPS)
    for at, ask in enumerate(ASKS, start=1):
        train(*begin, ask, ask, at=at, out="interrupted")
    train(*begin, "interrupted")
    train(*begin, "grace too short", "SIGUSR1", at=3, stop_grace_s=0.001, save_steps=2)
    train(*begin, "grace still too short", "SIGUSR1", at=3, stop_grace_s=0.001, out="grace too short")
    train(*begin, "grace, but nothing is known", "SIGUSR1", at=1, stop_grace_s=0.001)
    train(*begin, "while it saves", "SIGTERM", where="save", at=2, save_steps=2)
    train(*begin, "in a step that is saved anyway", "SIGTERM", at=2, save_steps=2)


if __name__ == "__main__":
    main()
