"""Whether probes catch a model that was trained until it calls by habit.

    python benchmarks/probes.py [--out FOLDER]

A tiny Gemma 4 learns a made-up house of six tools: it calls the tool that is asked for if that is offered, says so if
none is, and greets who greets. Then it is trained further on rows that call and nothing else, as a log of successes
alone has them. Both models are evaluated on held-out rows of such a log, with the same probes, and greetings as the
general set. A minute of CPU time.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

for name, value in {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}.items():
    os.environ.setdefault(name, value)
sys.path.insert(0, str(Path(__file__).parents[1]))

NAMES = ("lamp", "door", "fan", "radio", "pump", "clock")
ASK = ("Use the {}.", "The {}, please.", "I want the {}.")
GREETINGS = ("Hello there.", "Good morning.", "Thank you.", "How are you?")
NUM_TRAIN, NUM_HELD_OUT = 1600, 40
COMMON = ("dtype=float32", "packing=false", "save_steps=10000", "gradient_checkpointing=false")


def tool(name: str) -> dict[str, Any]:
    """A declaration without parameters, as short as they come."""
    return {"type": "function", "function": {"name": name, "description": f"Switch {name}."}}


def row(source: random.Random, kind: str, number: int) -> dict[str, Any]:
    """One exchange: of a tool that is offered ("call"), of one while none is ("none"), or a greeting ("greet")."""
    asked = source.choice(NAMES)
    offered = [] if kind == "none" else [asked]
    question = source.choice(GREETINGS) if kind == "greet" else source.choice(ASK).format(asked)
    answer: dict[str, Any] = {"role": "assistant", "content": "Hello." if kind == "greet" else f"No {asked} here."}
    if kind == "call":
        function = {"name": asked, "arguments": {}}
        answer |= {"content": "", "tool_calls": [{"id": "c", "type": "function", "function": function}]}
    messages = [{"role": "user", "content": question}, answer]
    return {"id": f"{kind}-{number}", "messages": messages, "tools": list(map(tool, offered))}


def write(path: Path, kinds: str, number: int, seed: int) -> Path:
    """Rows of these kinds in turn."""
    source = random.Random(seed)
    cycle = kinds.split()
    rows = [row(source, cycle[place % len(cycle)], place) for place in range(number)]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


def gemma_dist(*words: object) -> None:
    """Run a command in this process."""
    from gemma_dist.__main__ import main

    if code := main([str(word) for word in words]):
        sys.exit(code)


def train(model: Path, rows: Path, out: Path, *overrides: str) -> Path:
    """Train all weights; the folder of the result."""
    shards = out.with_name(f"{out.name}-shards")
    gemma_dist("shard", rows, "--model", model, "--out", shards)
    named = (f"model_name_or_path={model}", f"data.train={shards}", f"output_dir={out}")
    gemma_dist("train", "launch/cpu_full.yaml", *named, *COMMON, *overrides)
    return out


def evaluate(model: Path, data: Path, general: Path, out: Path) -> dict[str, Any]:
    """The report of a model on the held-out rows, with probes and a general set."""
    words = ("--probes", NUM_HELD_OUT, "--general", general, "--max-new-tokens", 24, "--no-loss")
    gemma_dist("evaluate", "--model", model, "--data", data, "--out", out, *words)
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder to keep; default: a temporary one")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as temporary:
        run(out or Path(temporary))


def run(folder: Path) -> None:
    """Train both models, evaluate both, print the table."""
    from gemma_dist.evaluate.compare import compare, failed_rules
    from gemma_dist.model.tiny import write_tiny_model

    folder.mkdir(parents=True, exist_ok=True)
    mixed = write(folder / "mixed.jsonl", "call none greet", NUM_TRAIN, seed=1)
    calls = write(folder / "calls.jsonl", "call", NUM_TRAIN // 4, seed=2)
    held_out = write(folder / "held_out.jsonl", "call", NUM_HELD_OUT, seed=3)
    greetings = write(folder / "greetings.jsonl", "greet", NUM_HELD_OUT, seed=4)
    write_tiny_model(
        folder / "model", corpus=mixed.read_text().splitlines()[:500], hidden_size=128, num_hidden_layers=4
    )
    learned = train(folder / "model", mixed, folder / "learned", "num_train_epochs=1")
    overdone = train(learned, calls, folder / "overdone", "num_train_epochs=1")
    reports = [evaluate(model, held_out, greetings, folder / f"eval-{model.name}") for model in (learned, overdone)]
    compared = compare(folder / "eval-learned", folder / "eval-overdone")
    print_table(reports)
    print(*failed_rules(compared, [], fail_if_worse=True), sep="\n")


def print_table(reports: list[dict[str, Any]]) -> None:
    """Each number before and after."""
    rows = [("held-out rows: overall", "", "overall"), ("similar: the right tool", "similar", "tool_set_exact")]
    rows += [("withheld: says so", "withheld", "abstain_acc"), ("withheld: over-calling", "withheld", "over_calling")]
    rows += [("general set: over-calling", "general", "over_calling")]
    print(f"\n{'':32} {'trained':>20} {'over-trained':>20}")
    for title, part, metric in rows:
        found = [(report["beside"]["parts"][part] if part else report["metrics"])[metric] for report in reports]
        print(f"{title:32}", *(f"{_share(each):>20}" for each in found))
    print(f"{'over-calling in all':32}", *(f"{_share(report['beside']['over_calling']):>20}" for report in reports))


def _share(metric: dict[str, Any]) -> str:
    return f"{metric['value']:.1%} ({metric['numerator']} of {metric['denominator']})"


if __name__ == "__main__":
    main()
