"""The page of an evaluation on real trajectories, without a model: what it shows, how large it is, how fast it opens.

    python benchmarks/report_page.py OUT [--samples 5000] [--data FILE …]

Makes OUT/before and OUT/after as `gemma-dist evaluate` leaves them and OUT/comparison as `gemma-dist compare` does; the
answers are gold's with faults put in, by chance but the same each time, and some that would harm who looks at them.
Then prints sizes and seconds and, where Chromium is installed, how long it takes until each page stands; screenshots of
a telephone and a desk, light and dark, lie in OUT/screenshots.
"""

import argparse
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from gemma_dist.config import EvaluateConfig  # noqa: E402 (found by the line above)
from gemma_dist.data.served import decision_points  # noqa: E402
from gemma_dist.data.trajectory import Trajectory  # noqa: E402
from gemma_dist.evaluate.compare_page import compare_runs  # noqa: E402
from gemma_dist.evaluate.decision import AnsweredDecision  # noqa: E402
from gemma_dist.evaluate.line import asked, score_lines  # noqa: E402
from gemma_dist.evaluate.log import hash_data  # noqa: E402
from gemma_dist.evaluate.runs import ToolSets, tools_key, write_results  # noqa: E402
from gemma_dist.evaluate.shown import join_shown, keep_shown  # noqa: E402
from gemma_dist.gemma_format import CALL, CALL_END, QUOTE, RESPONSE, THOUGHT, TURN_END  # noqa: E402
from gemma_dist.health.facts import versions  # noqa: E402
from gemma_dist.shards.reader import load_trajectories  # noqa: E402
from tests.support.chromium import CHROMIUM, chromium  # noqa: E402
from tests.support.hostile import HOSTILE  # noqa: E402

DATA = ROOT.parent / "shared" / "data"
SOURCES = [DATA / "multimodal/eval.jsonl", DATA / "toolcalls/eval_multiturn.jsonl", DATA / "toolcalls/train.jsonl"]
FAULTS = (
    "value",
    "value",
    "missing",
    "unknown",
    "type",
    "tool",
    "words",
    "broken",
    "cut",
    "invented",
    "silent",
    "twice",
)
SIZES = {"phone": (390, 844), "desk": (1440, 900)}


def value_of(value: Any) -> str:
    """A value as Gemma writes it."""
    if isinstance(value, str):
        return f"{QUOTE}{value}{QUOTE}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{value_of(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(value_of, value)) + "]"
    return (
        {True: "true", False: "false", None: "null"}.get(value, str(value))
        if value in (True, False, None)
        else str(value)
    )


def written(name: str, arguments: dict[str, Any]) -> str:
    """A call as Gemma writes it."""
    return f"{CALL}call:{name}{value_of(arguments)}{CALL_END}"


def answer(gold: dict[str, Any], tools: Sequence[str], chance: random.Random, share_right: float) -> str:
    """What a model that is right so often could write where this is expected."""
    if chance.random() < 0.02:
        return chance.choice(HOSTILE) + TURN_END
    is_right, calls = chance.random() < share_right, gold["calls"]
    if not calls:
        said = gold["content"] + TURN_END
        return said if is_right or not tools else written(chance.choice(tools), {}) + RESPONSE
    thought = f"{THOUGHT}The user wants {calls[0]['name']}.\n<channel|>" if chance.random() < 0.3 else ""
    fault = "" if is_right else chance.choice(FAULTS)
    made = [(call["name"], dict(call["arguments"])) for call in calls]
    name, arguments = made[0]
    key = chance.choice(list(arguments) or ["query"])
    if fault == "words":
        return thought + "I can do that. Which one do you mean?" + TURN_END
    if fault == "silent":
        return TURN_END
    if fault in ("value", "type"):
        arguments[key] = changed(arguments.get(key), chance) if fault == "value" else [str(arguments.get(key))]
    if fault == "missing":
        arguments.pop(key, None)
    if fault == "unknown":
        arguments["verbose"] = True
    if fault in ("tool", "invented"):
        made[0] = (chance.choice(tools) if fault == "tool" and tools else f"{name}_v2", arguments)
    if fault == "twice":
        made.append((name, arguments))
    text = thought + "".join(written(*call) for call in made) + RESPONSE
    if fault == "broken":
        return text.replace("}", ")", 1)
    return text[: len(text) * 2 // 3] if fault == "cut" else text


def changed(value: Any, chance: random.Random) -> Any:
    """Another value of the same type; of an object or a list, deep within."""
    if isinstance(value, dict) and value:
        key = chance.choice(list(value))
        return {**value, key: changed(value[key], chance)}
    if isinstance(value, list) and value:
        return [*value[:-1], changed(value[-1], chance)]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, (int, float)) else f"{value or ''} (draft)"


def rows(sources: Sequence[Path], num_samples: int) -> Iterator[tuple[int, Trajectory]]:
    """Trajectories of the sources, from the front again where they end, until they have so many decision points."""
    found, numbers = 0, count(1)
    while found < num_samples:
        for source in sources:
            for trajectory in load_trajectories(source, EvaluateConfig()):
                if found < num_samples:
                    yield next(numbers), trajectory
                    found += sum(1 for _ in decision_points(trajectory.messages))


def make_run(out: Path, model: str, trajectories: dict[int, Trajectory], num_samples: int, share_right: float) -> float:
    """A finished run; seconds that its report took."""
    lines: list[AnsweredDecision] = []
    tool_sets: ToolSets = {}
    for number, trajectory in trajectories.items():
        tool_sets[tools_key(trajectory.tools)] = list(trajectory.tools)
        names = [tool["function"]["name"] for tool in trajectory.tools]
        category = trajectory.id.split("-")[0]
        for index, messages in decision_points(trajectory.messages):
            point = asked(trajectory, number, messages, index + 1) | {"category": category}
            text = answer(point["gold"], names, random.Random(f"{model} {number} {index}"), share_right)
            num_images = str(trajectory.messages[:index]).count("'type': 'image'")
            written_by = {
                "sample": 0,
                "key": f"{number}-{index}",
                "num_images": num_images,
                "opening": "",
                "output": text,
            }
            told = {"prompt_tokens": len(str(trajectory.messages[:index])) // 4, "output_ids": [], "stopped": True}
            lines.append(cast(AnsweredDecision, point | written_by | told | {"output_tokens": len(text) // 4}))
    del lines[num_samples:]
    keep_shown(out, trajectories)
    join_shown(out)
    ranks = [{"seconds": 81.4, "answers": len(lines), "tokens_read": 181_000, "tokens_written": 94_000, "passes": 2100}]
    header: dict[str, Any] = {"model": model, "model_hash": "made-by-hand", "adapter": None, "adapter_hash": None}
    header |= {
        "data": str(SOURCES[0]),
        "data_hash": hash_data(SOURCES[0]) if SOURCES[0].exists() else "",
        "limit": None,
    }
    header |= {"encoding": "none", "template_hash": "none", "versions": versions()}
    header |= {"settings": EvaluateConfig().model_dump(mode="json")}
    header |= {"times": {"command": "python benchmarks/report_page.py", "world_size": 1, "ranks": ranks}}
    scored = score_lines(lines, tool_sets, 0.01)
    start = time.perf_counter()
    write_results(out, header, scored, tool_sets)
    return time.perf_counter() - start


def look(page: Path, screenshots: Path) -> None:
    """Seconds until the page stands, and what it looks like."""
    said = re.search(r'data-ready="(\d+)" data-seconds="([\d.]+)"', chromium(page, "--dump-dom"))
    stands = f"all {int(said[1]):,} samples {said[2]} s after it was asked for" if said else "does not stand"
    print(f"{page.name}: {page.stat().st_size / 2**20:.1f} MiB; in Chromium, {stands}")
    screenshots.mkdir(exist_ok=True)
    for device, (width, height) in SIZES.items():
        for number, scheme in enumerate(("dark", "light")):
            shot = f"--screenshot={screenshots / f'{page.stem}-{device}-{scheme}.png'}"
            chromium(page, shot, f"--window-size={width},{height}", f"--blink-settings=preferredColorScheme={number}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--data", type=Path, nargs="+", default=SOURCES, help="Trajectories as `evaluate` takes them.")
    arguments = parser.parse_args()
    trajectories = dict(rows(arguments.data, arguments.samples))
    for name, share in (("before", 0.5), ("after", 0.72)):
        seconds = make_run(arguments.out / name, f"gemma-4-E4B-{name}", trajectories, arguments.samples, share)
        print(f"{name}: {arguments.samples:,} samples scored before, report and page written in {seconds:.1f} s")
    start = time.perf_counter()
    compare_runs(
        arguments.out / "before", arguments.out / "after", arguments.out / "comparison", [], False, as_json=False
    )
    print(f"comparison: read, compared and written in {time.perf_counter() - start:.1f} s")
    pages = [arguments.out / "after" / "report.html", arguments.out / "comparison" / "comparison.html"]
    if CHROMIUM is None:
        print(f"no `chromium` here to look with; open {' and '.join(map(str, pages))}")
    else:
        for page in pages:
            look(page, arguments.out / "screenshots")


if __name__ == "__main__":
    main()
