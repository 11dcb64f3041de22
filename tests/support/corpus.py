"""Small corpora of real rows, with images made on the spot, for the tests of shards, loader and inspect."""

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from gemma_dist.config import ShardConfig
from gemma_dist.shards.report import ShardReport
from gemma_dist.shards.sharding import run_shard
from gemma_dist.stream.schedule import Schedule

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "plot",
            "description": "Draw a chart.",
            "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
        },
    }
]


def picture(number: int) -> bytes:
    """A PNG whose size and color depend on `number`."""
    file = io.BytesIO()
    Image.new("RGB", (48 + 16 * (number % 5), 64), (number % 256, 40, 200)).save(file, "PNG")
    return file.getvalue()


def call(number: int) -> dict[str, Any]:
    function = {"name": "plot", "arguments": {"n": number}}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": f"c{number}", "type": "function", "function": function}],
    }


def answer(number: int, image: bool) -> dict[str, Any]:
    text: dict[str, Any] = {"type": "text", "text": f"chart {number}"}
    url = "data:image/png;base64," + base64.b64encode(picture(number)).decode()
    parts = [text, {"type": "image_url", "image_url": {"url": url}}] if image else [text]
    return {"role": "tool", "tool_call_id": f"c{number}", "name": "plot", "content": parts}


def row(number: int, num_calls: int = 1, **fields: Any) -> dict[str, Any]:
    """A question, some calls one after the other (an image comes back in every third row), and a final word."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": f"Draw {number}, please." + " Now." * (number % 4)}]
    for i in range(num_calls):
        messages += [call(100 * number + i), answer(100 * number + i, image=number % 3 == 0)]
    messages.append({"role": "assistant", "content": f"Here is chart {number}: étude ✓."})
    return {"id": f"row-{number}", "messages": messages, "tools": TOOLS if number % 2 else [], **fields}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def shard_rows(
    folder: Path, model: str, rows: list[dict[str, Any]], skip_invalid: bool = False, **settings: Any
) -> ShardReport:
    """`run_shard` of `rows` into `folder`/shards."""
    source = write_rows(folder / "rows.jsonl", rows)
    return run_shard([source], folder / "shards", model, ShardConfig(**settings), skip_invalid)


def ids_at(schedule: Schedule, step: int, rank: int) -> list[list[list[str]]]:
    """The sample ids of a rank's micro-batches at `step` (from 0), pack by pack."""
    micro_batches = schedule.micro_batches(step, rank)
    return [[[schedule.shards.id(sample) for sample in pack] for pack in packs] for packs in micro_batches]
