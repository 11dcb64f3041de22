"""What stands in for `accelerate launch` and `python -m gemma_dist` where Slurm and the batch scripts are on trial, not
training: starts in a tenth of a second, and keeps to what they promise each other.

The launcher dies of USR1, hands TERM down, and ends the other ranks once one has failed. Rank 0 does a step in `step_s`
seconds, writes a checkpoint every `save_steps`, and one more when any rank was asked to stop. Each rank leaves its exit
code. A rank fails as soon as another one has died, as an exchange with it would.

Settings beside those: the last step is not done before the file `waits_for` is there. `fail_at=N` ends rank 1 with
`fail_code` at step N, behind which rank 0 does no other, in the first `fail_starts` starts. In the environment, UNFIT
names the node (by its number) that fails the health check of the first start, and FAILS_FIRST a command that fails in
its first start.
"""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

MEET_S = 120.0  # until another rank that has not come is taken for dead
CODES = Path(os.environ["GEMMA_DIST_EXIT_CODES"])
START = os.environ.get("SLURM_RESTART_COUNT", "0")


def launch(words: list[str]) -> int:
    """`accelerate launch OPTIONS -m gemma_dist WORDS…`: start this machine's ranks, and end all once one fails."""
    options = dict(zip(words[0::2], words[1::2], strict=False))
    rest = words[words.index("gemma_dist") + 1 :]
    machines, world_size = int(options["--num_machines"]), int(options["--num_processes"])
    here = world_size // machines
    ranks = []
    for local_rank in range(here):
        rank = int(options["--machine_rank"]) * here + local_rank
        env = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": str(world_size)}
        ranks.append(subprocess.Popen([sys.executable, __file__, "python", "-m", "gemma_dist", *rest], env=env))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(end(ranks)))
    while any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks):
            return end(ranks)
        time.sleep(0.05)
    return 1 if any(rank.poll() for rank in ranks) else 0


def end(ranks: list[subprocess.Popen[bytes]]) -> int:
    """TERM to all, and the launcher's own exit code, which says nothing of theirs."""
    for rank in ranks:
        rank.terminate()
    for rank in ranks:
        rank.wait(30)
    return 1


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def is_locked(path: Path) -> bool:
    """By another process."""
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


class Run:
    """A rank of a training run."""

    def __init__(self, rank: int, settings: dict[str, str]) -> None:
        self.rank, self.world_size = rank, int(os.environ["WORLD_SIZE"])
        self.out = Path(settings.get("output_dir", "out"))
        self.num_steps, self.save_steps = int(settings.get("max_steps", 0)), int(settings.get("save_steps", 0))
        self.step_s = float(settings.get("step_s", 0.1))
        self.waits_for = settings.get("waits_for", "")
        self.fail_at, self.fail_code = int(settings.get("fail_at", -1)), int(settings.get("fail_code", 1))
        if int(START) >= int(settings.get("fail_starts", 1)):
            self.fail_at = -1
        self.signs = self.out / f"start-{os.environ['SLURM_JOB_ID']}-{START}"
        self.signs.mkdir(parents=True, exist_ok=True)
        self.live()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda *_: write(self.signs / "asked", ""))

    def live(self) -> None:
        """A file that is locked as long as this process lives, which the kernel sees to; named once it is."""
        path = self.signs / f".alive-{self.rank}"
        fcntl.flock(os.open(path, os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX)
        path.rename(self.signs / f"alive-{self.rank}")

    def run(self) -> int:
        """Its exit code."""
        step = start = max((int(path.name[11:]) for path in self.out.glob("checkpoint-*")), default=0)
        if self.rank == 0:
            write(CODES / "step", f"{step}\n")
            print(f"{step} of {self.num_steps} steps done", flush=True)
        while True:
            time.sleep(self.step_s)
            if self.rank == 1 and 0 <= self.fail_at <= self.read_step():
                return self.fail_code
            if self.rank != 0 and (ended := self.signs / "ended").exists():
                return int(ended.read_text())
            switch = self.out / "stop"
            asked = switch.exists() or (self.signs / "asked").exists()  # looked at before the others
            if (dead := self.dead()) is not None:
                print(f"rank {dead} is gone", flush=True)
                return 143
            if self.rank != 0:
                continue
            if step != self.fail_at and (step < self.num_steps - 1 or (step < self.num_steps and self.may_end())):
                step += 1
                print(f"step {step}/{self.num_steps}", flush=True)
                write(self.signs / "step", str(step))
            if step > start and (asked or step == self.num_steps or step % self.save_steps == 0):
                self.save(step)
            if asked or step == self.num_steps:
                switch.unlink(missing_ok=True)
                code = 0 if step == self.num_steps else 75
                write(self.signs / "ended", str(code))
                return code

    def dead(self) -> int | None:
        """The first other rank that is no more, though it was not done; waits for those that have not come yet."""
        for rank in set(range(self.world_size)) - {self.rank}:
            path, end = self.signs / f"alive-{rank}", time.time() + MEET_S
            while not path.exists() and time.time() < end:
                time.sleep(0.02)
            if not (path.exists() and is_locked(path)) and not (self.signs / "ended").exists():
                return rank
        return None

    def may_end(self) -> bool:
        """Whether the last step may be done: once what is to happen has."""
        return not self.waits_for or Path(self.waits_for).exists()

    def read_step(self) -> int:
        path = self.signs / "step"
        return int(path.read_text()) if path.exists() else 0

    def save(self, step: int) -> None:
        """A checkpoint as the package's own, and where it says which is the newest."""
        folder = self.out / f"checkpoint-{step}"
        folder.mkdir(exist_ok=True)
        write(folder / "complete.json", "{}")
        write(CODES / "step", f"{step}\n")


def main(words: list[str]) -> int:
    """`python -m gemma_dist COMMAND …`."""
    command, rank, code = words[0], int(os.environ["RANK"]), 0
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    if command == "health" and START == "0" and os.environ.get("UNFIT") == str(rank):
        write(CODES / "bad-nodes", f"{socket.gethostname()}.cluster\n")
    if command == "health":
        time.sleep(0.5)
        code = 5 if (CODES / "bad-nodes").exists() else 0
    elif command == "train" and not Path(words[1]).exists():
        print(f"error: {words[1]}: No such file or directory", flush=True)
        code = 2
    elif os.environ.get("FAILS_FIRST") == command and START == "0":
        code = 1
    elif command == "train":
        code = Run(rank, settings).run()
    else:
        print(*words, flush=True)
    write(CODES / f"rank-{rank}", f"{code}\n")
    return code


if __name__ == "__main__":
    name, *words = sys.argv[1:]
    sys.exit(launch(words[1:]) if name == "accelerate" else main(words[2:]))
