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
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = REPOSITORY / "examples"
sys.path.insert(0, str(EXAMPLES))
os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(EXAMPLES), os.environ.get("PYTHONPATH", "")])

import analyst_tools  # noqa: E402 (found by the lines above)
from analyst import METRICS, SYSTEM, Source, compare, no_tool, report, total, wrong_name  # noqa: E402
from demo import gemma_dist, texts  # noqa: E402

KINDS = [total, total, compare, wrong_name, report, no_tool]
NUM_LOGS, NUM_TASKS, NUM_HELD_OUT = 160, 120, 150
NUM_RUNS, TEMPERATURE = 4, 1.0
STEPS_FIRST, STEPS_ROUND, ROUNDS = 160, 60, 2
FUNCTIONS = ["--tools", "analyst_tools:TOOLS", "--check", "analyst_tools:check", "--declare", "rows"]


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
    print_table(table)
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


def as_task(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a run asks, and the last words that are right where the tools answer."""
    values: dict[str, str] = {}
    answers = (message["content"] for message in row["messages"] if message["role"] == "tool")
    for call in (call for message in row["messages"] for call in message.get("tool_calls", [])):
        if call["function"]["name"] == "run_sql":
            values[next(answers)] = analyst_tools.run_sql(**json.loads(call["function"]["arguments"]))
        else:
            next(answers)
    expected = re.sub(r"\d{3}", lambda found: values[found[0]], row["messages"][-1]["content"])
    return {"id": row["id"], "messages": row["messages"][:2], "expected": expected}


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
    shards, out = folder / f"shards/{name}", folder / f"models/{name}"
    gemma_dist("shard", *data, "--model", model, "--out", shards, "--num-workers", 1)
    gemma_dist("train", REPOSITORY / "launch/cpu_full.yaml", f"model_name_or_path={model}", f"data.train={shards}",
               f"output_dir={out}", f"max_steps={steps}", f"learning_rate={rate}", "per_device_train_batch_size=8",
               "logging_steps=20", "save_steps=100000")  # fmt: skip
    return out


def act(out: Path, model: Path, tasks: Path, *options: Any) -> dict[str, Any]:
    """Let a model act; the report."""
    gemma_dist("act", "--model", model, "--data", tasks, "--out", out, *FUNCTIONS, "--max-new-tokens", 80,
               "--max-steps", 6, *options)  # fmt: skip
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return report


def judge(folder: Path, name: str, model: Path, held_out: Path) -> dict[str, Any]:
    """How many runs on held-out tasks succeed."""
    found: dict[str, Any] = act(folder / f"judged/{name}", model, held_out)["metrics"]["success"]
    return found


def print_table(table: Mapping[str, Mapping[str, Any]]) -> None:
    print(f"\n{'':<44}{'runs that succeed':>24}{'95 % interval':>20}")
    for name, metric in table.items():
        share = f"{metric['value']:.1%} ({metric['numerator']} of {metric['denominator']})"
        print(f"{name:<44}{share:>24}{metric['low']:>11.1%} to {metric['high']:.1%}")


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
