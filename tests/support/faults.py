"""Every system call of a save, failing in its turn: what is left of the checkpoints, and what the user is told.

    python -m tests.support.faults MODEL SHARDS OUT

Trains one step and saves it; after the second step it saves again and again, and each time the next call that makes,
writes, syncs, renames or removes something in OUT fails, once for want of room and once of the disk (`faults.c`, a
library before the C library, so that what safetensors and tokenizers write from Rust fails, too). Prints one JSON line
a fault.
"""

import ctypes
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.ranks import ENVIRONMENT, REPOSITORY

SOURCE = Path(__file__).with_suffix(".c")
ERRORS = (errno.ENOSPC, errno.EIO)
MAX_FAULTS = 2000  # of one kind: far more than a save has calls


def inject(model: str, shards: Path, folder: Path) -> list[dict[str, Any]]:
    """Run this module on a model and shards, in `folder`; what it said of each fault."""
    library = folder / "faults.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.faults", model, str(shards), str(folder / "out")],
        cwd=REPOSITORY,
        env=os.environ | ENVIRONMENT | {"LD_PRELOAD": str(library), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    from gemma_dist.recipe import load_config
    from gemma_dist.train.run import train
    from gemma_dist.train.trainer import ToolCallTrainer

    model, shards, out = sys.argv[1:]
    library = ctypes.CDLL(None)
    library.fault_failed.restype = ctypes.c_char_p

    class FaultyTrainer(ToolCallTrainer):
        """Saves its second step with faults."""

        def _save_checkpoint(self, *args: Any) -> None:
            super()._save_checkpoint(*args)
            if self.state.global_step == 2:
                shutil.rmtree(Path(out) / "checkpoint-2")
                for number in ERRORS:
                    for at in range(MAX_FAULTS):
                        if not _try(lambda: super(FaultyTrainer, self)._save_checkpoint(*args), number, at):
                            break
                shutil.rmtree(Path(out) / "checkpoint-2")
                super()._save_checkpoint(*args)

    def _try(save: Any, number: int, at: int) -> bool:
        """Save with one fault, and say what came of it; False where a save has no such call any more."""
        shutil.rmtree(Path(out) / "checkpoint-2", ignore_errors=True)
        if not (Path(out) / "checkpoint-1").exists():
            shutil.copytree(kept, Path(out) / "checkpoint-1")
        library.fault_arm(out.encode(), at, number)
        error = None
        try:
            save()
        except Exception as found:
            error = found
        call = library.fault_failed().decode()
        if call:
            print(json.dumps({"call": call, "errno": errno.errorcode[number], "at": at, **_found(error)}), flush=True)
        return bool(call)

    def _found(error: Exception | None) -> dict[str, Any]:
        """The checkpoints that a restart would see, whether each is whole, and what the user is told."""
        from gemma_dist.train.checkpoint import _complete, read_marker
        from gemma_dist.train.digests import damage

        folders = _complete(Path(out))
        whole = [not damage(folder, read_marker(folder)["files"]) for folder in folders]
        return {
            "checkpoints": [folder.name for folder in folders],
            "whole": all(whole),
            "error": type(error).__name__ if error else None,
            "message": str(error) if error else "",
        }

    settings = [
        "max_steps=2",
        "save_steps=1",
        "save_total_limit=1",
        "global_batch_size=2",
        "per_device_train_batch_size=2",
    ]
    kept = Path(out).with_name("kept")
    words = [f"model_name_or_path={model}", f"data.train={shards}", f"output_dir={out}", *settings]
    config = load_config(REPOSITORY / "launch/cpu_lora.yaml", words)

    class KeptTrainer(FaultyTrainer):
        """Keeps a copy of the first checkpoint, which the second one's end removes."""

        def _save_checkpoint(self, *args: Any) -> None:
            if self.state.global_step == 2:
                shutil.copytree(Path(out) / "checkpoint-1", kept)
            super()._save_checkpoint(*args)

    train(config, trainer_class=KeptTrainer)


if __name__ == "__main__":
    main()
