"""The whole walk with real parts, on two CPU cores in minutes: `make demo`.

A tiny Gemma 4 with random weights learns to work as a data analyst: which tool to call, with which arguments, and what
the chart that comes back shows. Every step is a command that works the same on real models; each is printed.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

from analyst import SYSTEM, Source, in_other_words, write_trajectories
from analyst_tools import as_task

QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "DEEPSPEED_LOG_LEVEL": "error", "TOKENIZERS_PARALLELISM": "false"}
for name, value in {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **QUIET}.items():
    os.environ.setdefault(name, value)
# Two CPU processes even where there is a GPU: the point is the walk, not the speed.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
)  # for --tools

NUM_TRAIN, NUM_HELD_OUT = 4200, 160
RUN = Path("runs/demo")
MODEL, TRAIN, HELD_OUT = RUN / "model", RUN / "shards/train", RUN / "shards/held_out"
FULL, ADAPTER, MERGED = RUN / "full", RUN / "qlora", RUN / "merged"
OWN = RUN / "own_runs"
FUNCTIONS = ["--tools", "analyst_tools:TOOLS", "--check", "analyst_tools:check", "--declare", "rows"]
NUM_TASKS, NUM_RUNS, NUM_JUDGED, NUM_LOGS, OWN_STEPS = 120, 4, 150, 100, 60

# What must come out, as shares: calls exact on held-out runs, answers that stand in the image alone; blanked images
# leave a guess among eight colors.
MIN_CALLS, MIN_IMAGES, MAX_BLANK, MAX_BEFORE = 0.95, 0.85, 0.30, 0.05


# What each step is, and its seconds on two quiet cores: from their ratios, and how long this machine has taken so far,
# follows the time left. `make` makes the environment before, as the first of all.
STEPS = {
    "rows, a tiny model, shards": 20,
    "full fine-tuning on two processes": 190,
    "evaluation, before and after, with images and without": 60,
    "a QLoRA adapter on the result, in real NF4": 60,
    "merging, verifying, evaluating again": 40,
    "own runs: acting, training on what succeeds": 100,
}


def main() -> None:
    started = time.perf_counter()
    steps = Steps(started)
    shutil.rmtree(RUN, ignore_errors=True)
    steps.begin()
    make_data_and_model()
    gemma_dist("shard", RUN / "train/trajectories.jsonl", "--model", MODEL, "--out", TRAIN)
    gemma_dist("shard", RUN / "held_out/trajectories.jsonl", "--model", MODEL, "--out", HELD_OUT)

    steps.begin()
    train("launch/cpu_full.yaml", MODEL, TRAIN, FULL)
    steps.begin()
    before = evaluate("before", "--model", MODEL)
    after = evaluate("full", "--model", FULL)
    blank = evaluate("blank", "--model", FULL, "--images", "blank")

    steps.begin()
    train("launch/cpu_qlora.yaml", FULL, TRAIN, ADAPTER, "max_steps=60")
    adapted = evaluate("qlora", "--model", FULL, "--adapter", ADAPTER)
    steps.begin()
    gemma_dist("merge", "--base", FULL, "--adapter", ADAPTER, "--out", MERGED, "--verify")
    merged = evaluate("merged", "--model", MERGED)
    gemma_dist("plot", FULL)
    gemma_dist("inspect", TRAIN, "--model", MODEL, "--html", RUN / "row.html")
    steps.begin()
    successes = own_runs()

    print_table(
        {
            "random weights": before,
            "full fine-tuning": after,
            "    images blanked": blank,
            "+ QLoRA (NF4)": adapted,
            "merged": merged,
        }
    )
    print_successes(successes)
    print(
        f"\n{time.perf_counter() - started:.0f} s in all. To look at next, in a browser or a terminal:\n{next_steps()}"
    )
    check(before, after, blank, adapted, merged, successes)


class Steps:
    """Says which step begins, and about how long all that is left will take."""

    def __init__(self, started: float) -> None:
        self._started, self._number = started, 0

    def begin(self) -> None:
        """The next step."""
        seconds = list(STEPS.values())
        done, left = sum(seconds[: self._number]), sum(seconds[self._number :])
        slower = (time.perf_counter() - self._started) / done if done else 1.0
        minutes = max(1, round(left * slower / 60))
        name = list(STEPS)[self._number]
        self._number += 1
        say(f"{self._number + 1} of {len(STEPS) + 1}: {name} (about {minutes} minute{'s' * (minutes > 1)} left in all)")


def next_steps() -> str:
    """What there is to look at, a line each."""
    words = {
        RUN / "eval/full/report.html": "every answer beside what was right; eval/blank has those without images",
        FULL / "plot.html": "the losses of the run",
        RUN / "row.html": "one row as the model sees it, what is trained in color",
        f"gemma-dist compare {RUN}/eval/before {RUN}/eval/full --out {RUN}/compared": "what was fixed",
        f"gemma-dist chat {MERGED}": "talk to it",
        "README.md": "the same with your own rows, and a real Gemma 4",
    }
    width = max(len(str(what)) for what in words)
    return "\n".join(f"  {what!s:<{width}}   {why}" for what, why in words.items())


def make_data_and_model() -> None:
    """Runs to learn from, other runs to be judged on, and a model whose tokenizer has seen the former's words."""
    from gemma_dist.logs import read_jsonl
    from gemma_dist.model.tiny import write_tiny_model

    say(f"writing {NUM_TRAIN} + {NUM_HELD_OUT} trajectories and a tiny Gemma 4 with random weights")
    path = write_trajectories(RUN / "train", num_trajectories=NUM_TRAIN, seed=1, held_out=False)
    write_trajectories(RUN / "held_out", num_trajectories=NUM_HELD_OUT, seed=2, held_out=True)
    corpus = ["system", "model", "call:", "response:", "{value:"] * 50
    corpus += [text for row in islice(read_jsonl(path), 800) for text in texts(row["messages"])]
    write_tiny_model(MODEL, corpus=corpus, hidden_size=128, num_hidden_layers=4)


def texts(value: Any) -> list[str]:
    """Every string inside messages, arguments unpacked."""
    if isinstance(value, dict):
        return [text for item in value.values() for text in texts(item)]
    if isinstance(value, list):
        return [text for item in value for text in texts(item)]
    if isinstance(value, str) and value.startswith("{"):
        return texts(json.loads(value))
    return [value] if isinstance(value, str) else []


def gemma_dist(*arguments: Any) -> None:
    """Run a command in this process: the same as the printed command, without loading torch again."""
    from gemma_dist.__main__ import main as command_line

    words = [str(argument) for argument in arguments]
    say(("PYTHONPATH=examples " if words[0] == "act" else "") + shlex.join(["gemma-dist", *words]))
    if code := command_line(words):
        sys.exit(code)


def evaluate(name: str, *arguments: Any) -> dict[str, Any]:
    """Evaluate on the held-out runs; the report."""
    out = RUN / "eval" / name
    gemma_dist("evaluate", *arguments, "--data", HELD_OUT, "--out", out, "--max-new-tokens", 64,
               "--per-device-eval-batch-size", 32)  # fmt: skip
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def train(recipe: str, model: Path, shards: Path, out: Path, *overrides: str) -> None:
    """Train on two processes."""
    words = ["accelerate", "launch", "--config_file", "accelerate_configs/cpu_ddp.yaml", "-m", "gemma_dist", "train",
             recipe, f"model_name_or_path={model}", f"data.train={shards}", f"output_dir={out}",
             *overrides]  # fmt: skip
    say(shlex.join(words))
    command = [sys.executable, "-m", "accelerate.commands.launch", *words[2:4], "--main_process_port", "0", *words[4:]]
    if code := subprocess.run(command).returncode:
        sys.exit(code)


def own_runs() -> dict[str, dict[str, Any]]:
    """The model acts on tasks in words that no log has, without gold, and is trained on those of its runs that succeed,
    beside some logs; the control, for as many steps, on these logs alone. All are judged on tasks that none has seen:
    shares of runs that succeed."""
    tasks = write_tasks(OWN / "tasks.jsonl", NUM_TASKS, seed=3, held_out=False)
    held_out = write_tasks(OWN / "held_out.jsonl", NUM_JUDGED, seed=4, held_out=True)
    logs, kept = RUN / "train/some.jsonl", OWN / "kept.jsonl"
    with (RUN / "train/trajectories.jsonl").open(encoding="utf-8") as rows:
        logs.write_text("".join(islice(rows, NUM_LOGS)), encoding="utf-8")
    before = act(OWN / "before", FULL, held_out)
    acted = act(OWN / "acted", FULL, tasks, "--num-runs", NUM_RUNS, "--temperature", 1, "--keep", kept)
    found = {"full fine-tuning": before}
    trainings = {"logs alone": [logs], f"logs and {acted['kept']} own runs": [logs, kept]}
    for number, (name, data) in enumerate(trainings.items()):
        train_on(data, FULL, OWN / f"model{number}", OWN_STEPS, 1e-3)
        found[f"+ {OWN_STEPS} steps on {name}"] = act(OWN / f"judged{number}", OWN / f"model{number}", held_out)
    return {name: report["metrics"]["success"] for name, report in found.items()}


def write_tasks(path: Path, number: int, *, seed: int, held_out: bool) -> Path:
    """Tasks in words that no log has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = Source(path.parent, seed=seed, held_out=held_out)
    with path.open("w", encoding="utf-8") as file:
        for place in range(number):
            messages = [{"role": "system", "content": SYSTEM}, *in_other_words(source, place)]
            file.write(json.dumps(as_task({"id": f"task-{seed}-{place}", "messages": messages})) + "\n")
    return path


def act(out: Path, model: Path, tasks: Path, *options: Any) -> dict[str, Any]:
    """Let a model act; the report."""
    gemma_dist("act", "--model", model, "--data", tasks, "--out", out, *FUNCTIONS, "--max-new-tokens", 80,
               "--max-steps", 6, *options)  # fmt: skip
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return report


def train_on(data: list[Path], model: Path, out: Path, steps: int, rate: float, *overrides: str) -> None:
    """Train a model on rows, in this process."""
    shards = out.with_name(f"{out.name}_shards")
    gemma_dist("shard", *data, "--model", model, "--out", shards, "--num-workers", 1)
    gemma_dist("train", Path(__file__).parents[1] / "launch/cpu_full.yaml", f"model_name_or_path={model}",
               f"data.train={shards}", f"output_dir={out}", f"max_steps={steps}", f"learning_rate={rate}",
               "logging_steps=20", "save_steps=100000", *overrides)  # fmt: skip


def print_successes(table: dict[str, dict[str, Any]]) -> None:
    print(f"\n{'':<44}{'runs that succeed':>24}{'95 % interval':>20}")
    for name, metric in table.items():
        share = f"{metric['value']:.1%} ({metric['numerator']} of {metric['denominator']})"
        print(f"{name:<44}{share:>24}{metric['low']:>11.1%} to {metric['high']:.1%}")


def print_table(reports: dict[str, dict[str, Any]]) -> None:
    columns = {
        "calls exact": lambda report: report["metrics"]["call_exact"],
        "runs' calls exact": lambda report: report["metrics"]["trajectory_exact"],
        "answers": lambda report: report["metrics"]["answer_exact"],
        "answers from images": from_images,
    }
    rows = [["", *columns]]
    for name, report in reports.items():
        cells = [column(report) for column in columns.values()]
        rows.append([name, *(f"{one['value']:.1%} ({one['numerator']} of {one['denominator']})" for one in cells)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for name, *shares in rows:
        print("   ".join([f"{name:<{widths[0]}}", *map(str.rjust, shares, widths[1:])]))


def from_images(report: dict[str, Any]) -> dict[str, Any]:
    """The answers after a chart came back: only its image tells them."""
    metric: dict[str, Any] = report["slices"]["images"]["with"]["answer_exact"]
    return metric


def check(before: Any, after: Any, blank: Any, adapted: Any, merged: Any, successes: dict[str, Any]) -> None:
    """Say what did not come out as promised, and fail."""
    rules = [("before: calls", before["metrics"]["call_exact"]["value"], "<", MAX_BEFORE)]
    rules.append(("blanked images: answers", from_images(blank)["value"], "<", MAX_BLANK))
    for name, report in (("full", after), ("qlora", adapted), ("merged", merged)):
        rules.append((f"{name}: calls", report["metrics"]["call_exact"]["value"], ">", MIN_CALLS))
        rules.append((f"{name}: answers from images", from_images(report)["value"], ">", MIN_IMAGES))
    *others, own = (metric["value"] for metric in successes.values())
    rules.append(("own runs: success", own, ">", max(others)))
    failed = [
        f"{what}: {value:.1%}, expected {sign} {limit:.0%}"
        for what, value, sign, limit in rules
        if not (value < limit if sign == "<" else value > limit)
    ]
    if failed:
        sys.exit("the demo did not reach what it promises:\n  " + "\n  ".join(failed))


def say(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
