"""Does a model improve on its own successful runs? And how many runs a second, on one process and two?

    python benchmarks/own_runs.py [--out runs/own_runs]

The domain is the demo's without its charts (`examples/analyst.py`, tools and checker in `analyst_tools.py`). A tiny
model with random weights is trained on a few logs, of half of what can be asked for. Then, twice: it acts on tasks of
the other half, without gold, and is trained on what succeeded, beside the logs. The control is trained on the logs
alone, for as many steps. All are judged on tasks that none has seen.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = REPOSITORY / "examples"
sys.path.insert(0, str(EXAMPLES))  # for the imports below
os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(EXAMPLES), os.environ.get("PYTHONPATH", "")])

from analyst import METRICS, SYSTEM, Source, compare, no_tool, report, total, wrong_name  # noqa: E402
from analyst_tools import as_task  # noqa: E402
from demo import FUNCTIONS, act, print_successes, texts, train_on  # noqa: E402

KINDS = [total, total, compare, wrong_name, report, no_tool]
NUM_LOGS, NUM_TASKS, NUM_HELD_OUT = 160, 120, 150
NUM_RUNS, TEMPERATURE = 4, 1.0
STEPS_FIRST, STEPS_ROUND, ROUNDS = 160, 60, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/own_runs"))
    folder = parser.parse_args().out
    shutil.rmtree(folder, ignore_errors=True)
    logs = write(folder / "logs.jsonl", rows(folder, NUM_LOGS, 1, half=0))
    held_out = write(folder / "held_out.jsonl", map(as_task, rows(folder, NUM_HELD_OUT, 2, held_out=True)))
    make_model(folder / "model", logs)
    first = train(folder, "first", folder / "model", [logs], STEPS_FIRST, 3e-3)
    table = {"trained on the logs": judge(folder, "first", first, held_out)}
    own, control, kept = first, first, [logs]
    for number in range(1, ROUNDS + 1):
        tasks = folder / f"tasks{number}.jsonl"
        write(tasks, map(as_task, rows(folder, NUM_TASKS, 10 + number, half=1)))
        kept.append(folder / f"kept{number}.jsonl")
        options = ["--num-runs", NUM_RUNS, "--temperature", TEMPERATURE, "--seed", number, "--keep", kept[-1]]
        acted = act(folder / f"act{number}", own, tasks, *options)
        own = train(folder, f"own{number}", own, kept, STEPS_ROUND, 1e-3)
        control = train(folder, f"control{number}", control, [logs], STEPS_ROUND, 1e-3)
        name = f"round {number}: {acted['kept']} rows kept of {NUM_TASKS * NUM_RUNS} runs"
        table[name] = judge(folder, f"own{number}", own, held_out)
        table[f"    control {number}: the logs alone"] = judge(folder, f"control{number}", control, held_out)
    print_successes(table)
    print_speed(folder, own, held_out)


def rows(folder: Path, number: int, seed: int, *, half: int = 0, held_out: bool = False) -> list[dict[str, Any]]:
    """Runs of the domain: of one half of what can be asked for, or of what is held out."""
    source = Source(folder, seed=seed, held_out=held_out)
    if not held_out:
        source.questions = random.Random(0).sample(source.questions, len(source.questions))[half::2]
    kinds = [KINDS[place % len(KINDS)] for place in range(number)]
    return [
        {
            "id": f"{kind.__name__}-{seed}-{place}",
            "messages": [{"role": "system", "content": SYSTEM}, *kind(source)],
        }
        for place, kind in enumerate(kinds)
    ]


def write(path: Path, written: Any) -> Path:
    """Rows as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
    return path


def make_model(folder: Path, logs: Path) -> None:
    """A tiny model with random weights, whose tokenizer has seen the words of the domain."""
    from gemma_dist.model.tiny import write_tiny_model

    seen = [
        text for line in logs.read_text(encoding="utf-8").splitlines() for text in texts(json.loads(line)["messages"])
    ]
    words = ["system", "model", "call:", "response:", "{value:", *METRICS] * 50
    write_tiny_model(folder, corpus=words + seen, hidden_size=128, num_hidden_layers=4)


def train(folder: Path, name: str, model: Path, data: list[Path], steps: int, rate: float) -> Path:
    """Train a model on rows; the folder of the result."""
    train_on(data, model, folder / "models" / name, steps, rate, "per_device_train_batch_size=8")
    return folder / "models" / name


def judge(folder: Path, name: str, model: Path, held_out: Path) -> dict[str, Any]:
    """How many runs on held-out tasks succeed."""
    found: dict[str, Any] = act(folder / f"judged/{name}", model, held_out)["metrics"]["success"]
    return found


def print_speed(folder: Path, model: Path, tasks: Path) -> None:
    """Runs a second on one process and two, from the times of their reports."""
    print()
    for num_processes in (1, 2):
        out = folder / f"speed{num_processes}"
        words = ["act", "--model", model, "--data", tasks, "--out", out, *FUNCTIONS, "--max-new-tokens", 80]
        launcher = ["-m", "accelerate.commands.launch", "--config_file", REPOSITORY / "accelerate_configs/cpu_ddp.yaml"]
        launcher += ["--num_processes", num_processes, "--main_process_port", 0] if num_processes > 1 else []
        launch = [*launcher, "-m", "gemma_dist"] if num_processes > 1 else ["-m", "gemma_dist"]
        subprocess.run([sys.executable, *map(str, [*launch, *words])], check=True)
        ranks = json.loads((out / "report.json").read_text(encoding="utf-8"))["times"]["ranks"]
        runs, seconds = sum(rank["runs"] for rank in ranks), max(rank["seconds"] for rank in ranks)
        same = (out / "runs.jsonl").read_bytes() == (folder / "speed1/runs.jsonl").read_bytes()
        print(f"{num_processes} process(es): {runs / seconds:.2f} runs/s; the same lines: {'yes' if same else 'no'}")


if __name__ == "__main__":
    main()
