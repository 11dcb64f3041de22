"""report.html and comparison.html: one file to look at, with everything in it and nothing loaded from elsewhere.

    page.css, report_page/ (markup and script, the same for every page)  +  data as JSON, in blocks that do not run

Models and rows write what they like, so none of it is ever markup. `<`, `>` and `&` are escaped in the JSON, so no text
ends its block; the script puts texts in as texts; and the content security policy names style and script by their
hashes, so the browser would neither run nor load anything else even if both failed. `docs/evaluation.md` says what the
page shows. A page follows from the folders of its runs alone; what differs from run to run is in the block `times`.
"""

import base64
import html
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import Any

from gemma_dist.evaluate.beside import PARTS
from gemma_dist.evaluate.decision import ScoredDecision
from gemma_dist.evaluate.markdown import HEADLINE
from gemma_dist.evaluate.page_samples import shown_answer, shown_gold
from gemma_dist.evaluate.pass_at_k import metrics_of, pass_metrics
from gemma_dist.files import writing
from gemma_dist.logs import read_jsonl, to_json
from gemma_dist.static_page import policy, style

TRAJECTORIES, IMAGES = "trajectories.jsonl", "images"  # what the model was shown (`shown.py`)
MAX_PAGE_BYTES = 48 << 20  # of a page, about: a browser opens it at once
SCRIPTS = ("elements.js", "overview.js", "charts.js", "samples.js", "sample.js", "page.js")  # in that order one
# JSON that HTML cannot take for markup, nor JavaScript for a line's end.
_ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}
HASHED_NAME = re.compile(r"[0-9a-f]{16}")  # as `shown.py` names images, and `runs.tools_key` sets of tools


@dataclass(frozen=True)
class PageRun:
    """A finished run as a page takes it."""

    name: str  # what the page calls it
    report: Mapping[str, Any]
    lines: Sequence[ScoredDecision]
    tool_sets: Mapping[str, Any]


@dataclass
class _Blocks:
    """The data of a page, as far as there is room: samples first, then their tools, what they were asked, images."""

    room: int  # bytes left
    texts: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("samples", "tool sets", "prompts", "images"), 0)
    )

    def add(self, kind: str, name: str, text: str) -> bool:
        """Add a block of JSON text if there is room; whether there was."""
        fits = self.take(kind, text)
        if fits:
            self.texts.append(_block(name, text))
        return fits

    def take(self, kind: str, text: str) -> bool:
        """Take the room of a text, if there is so much; else note that it is left out."""
        num_bytes = len(text.encode())
        fits = num_bytes <= self.room
        self.room -= num_bytes if fits else 0
        self.left_out[kind] += not fits
        return fits


def write_page(
    path: Path, runs: Sequence[PageRun], shown: Path, comparison: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """Write the page of one run, or of two that are compared.

    Args:
        shown: a folder with trajectories.jsonl and images/ (`shown.py`); without them the page has no prompts.
        comparison: what `compare` says of two runs.

    Returns:
        How many samples, sets of tools, prompts and images were left out for want of room.
    """
    blocks = _Blocks(MAX_PAGE_BYTES)
    samples = _fitting_samples(runs, blocks)
    _add_tools(runs, dict.fromkeys(runs[0].lines[place]["tools"] for place in samples), blocks)
    trajectories = shown / TRAJECTORIES
    if trajectories.is_file():
        _add_prompts(trajectories, shown / IMAGES, {runs[0].lines[place]["trajectory"] for place in samples}, blocks)
    overview = {
        "runs": [
            {"name": run.name, "report": {key: run.report[key] for key in run.report if key != "times"}} for run in runs
        ],
        "comparison": comparison,
        "headline": [*HEADLINE, *(metric.name for metric in pass_metrics(_num_samples(runs)))],
        "sentences": {metric.name: metric.sentence for metric in metrics_of(_num_samples(runs))},
        "parts": PARTS,
        "has_prompts": trajectories.is_file(),
        "left_out": blocks.left_out,
        "max_mb": MAX_PAGE_BYTES >> 20,
    }
    times = [run.report.get("times", {}) for run in runs]
    title = " against ".join(run.name for run in runs)
    with writing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        before, after = _template(html.escape(_one_line(title)))
        file.write(before)
        file.write(_block("overview", embedded(overview)))
        file.write(_block("times", embedded(times)))
        file.write(_block("samples", f"[{', '.join(samples[place] for place in sorted(samples))}]"))
        file.writelines(blocks.texts)
        file.write(after)
    return blocks.left_out


def _num_samples(runs: Sequence[PageRun]) -> int:
    return int(runs[0].report.get("num_samples", 1))


def embedded(value: object) -> str:
    """`value` as JSON that may stand in a block of an HTML page, whatever its strings hold.

    Numbers that are not finite become null.
    """
    text = to_json(value)
    if "NaN" in text or "Infinity" in text:  # as words of some text, or as what is no JSON
        text = to_json(_finite(value))
    return text.translate(_ESCAPES)


def _finite(value: object) -> object:
    """A JSON value with null in the place of NaN and the infinities, which no browser reads."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _block(name: str, text: str) -> str:
    """JSON text (`embedded`) as a block of the page, which its script finds by name."""
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def _one_line(text: str) -> str:
    """A text without what a tab's title could be deceived by."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


@cache
def _part(name: str) -> str:
    """A file of report_page/."""
    return resources.files("gemma_dist.evaluate").joinpath("report_page", name).read_text(encoding="utf-8")


def _script() -> str:
    """The one script of a page: in a block, so that its names hide none of the browser's."""
    return '"use strict";\n{\n' + "".join(map(_part, SCRIPTS)) + "}\n"


def _template(title: str) -> tuple[str, str]:
    """The page before and after its data."""
    script = _script()
    before, after = _part("page.html").split("{{data}}")
    for name, text in {"policy": policy(script), "style": style(), "title": title}.items():
        before = before.replace(f"{{{{{name}}}}}", text)
    return before, after.replace("{{script}}", script)


def _fitting_samples(runs: Sequence[PageRun], blocks: _Blocks) -> dict[int, str]:
    """The samples that have room, as JSON, by their places in the data: those that are wrong come first."""
    second = {_point(line): line for line in runs[-1].lines} if len(runs) > 1 else {}
    order = sorted(range(len(runs[0].lines)), key=lambda place: runs[0].lines[place]["score"]["right"])
    samples: dict[int, str] = {}
    for place in order:
        line = runs[0].lines[place]
        answers = [line, second[_point(line)]] if second else [line]
        text = embedded(_shown_sample(answers))
        if blocks.take("samples", text):
            samples[place] = text
    return samples


def _point(line: ScoredDecision) -> tuple[int, int, int]:
    return line["trajectory"], line["turn"], line["sample"]


def _shown_sample(lines: Sequence[ScoredDecision]) -> dict[str, Any]:
    """A decision point with the answer of each run to it."""
    line = lines[0]
    told = ("id", "trajectory", "turn", "sample", "category", "pair", "num_images", "tools", "prompt_tokens")
    shown = {name: line[name] for name in told}  # type: ignore[literal-required]
    if part := line.get("part"):
        shown["category"] = f"({PARTS[part]})"
    return shown | {"gold": shown_gold(line), "answers": list(map(shown_answer, lines))}


def _add_tools(runs: Sequence[PageRun], wanted: Iterable[str], blocks: _Blocks) -> None:
    """Add the declarations that lines call so, each set once."""
    tool_sets = {key: tools for run in reversed(runs) for key, tools in run.tool_sets.items()}
    for key in wanted:
        if HASHED_NAME.fullmatch(key) and key in tool_sets:
            blocks.add("tool sets", f"tools-{key}", embedded(_spelled_tools(tool_sets[key])))


def _add_prompts(trajectories: Path, images: Path, wanted: set[int], blocks: _Blocks) -> None:
    """Add the messages of the trajectories of these numbers, then their images, each once."""
    names: list[list[str]] = []  # of each trajectory that is there
    for line in read_jsonl(trajectories):
        if line["trajectory"] in wanted:
            text = embedded([_spelled_message(message) for message in line["messages"]])
            if blocks.add("prompts", f"trajectory-{int(line['trajectory'])}", text):
                names.append(list(_image_names(line["messages"])))
    # Where not all have room, the first of each trajectory before the second of any.
    in_turns = dict.fromkeys(name for round_ in zip_longest(*names) for name in round_ if name is not None)
    for name in in_turns:
        path = images / f"{name}.jpg"
        if HASHED_NAME.fullmatch(name) and path.is_file():
            encoded = base64.b64encode(path.read_bytes()).decode()
            blocks.add("images", f"image-{name}", embedded(f"data:image/jpeg;base64,{encoded}"))


def _spelled_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as the page shows it: arguments of calls as text."""
    spelled = {name: message[name] for name in ("role", "name", "content", "reasoning_content") if name in message}
    functions = [call["function"] for call in message.get("tool_calls", ())]
    calls = [f"{function['name']}({to_json(function['arguments'], indent=1)})" for function in functions]
    return spelled | ({"calls": calls} if calls else {})


def _spelled_tools(tools: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Name and declaration of each tool, as text."""
    return [[tool["function"]["name"], to_json(tool["function"], indent=2)] for tool in tools]


def _image_names(messages: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for message in messages:
        if isinstance(message["content"], list):
            yield from (str(part["image"]) for part in message["content"] if part["type"] == "image")
