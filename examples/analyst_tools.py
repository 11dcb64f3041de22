"""The tools of the small data-analyst domain (`analyst.py`), and who judges what an agent makes of them.

    gemma-dist act --model MODEL --data tasks.jsonl --tools analyst_tools:TOOLS --check analyst_tools:check …

What a tool answers follows from what it is asked, so the checker knows the right end without a log. A query that is not
written as the others are, or of a column that there is not, is an error that the model reads.
"""

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from analyst import FORMATS, METRICS, MONTHS, REGIONS, SYNONYMS, TEAMS, draw
from PIL import Image

QUERY = re.compile(r'select "([^"]*)" from "([^"]*)" where month="([^"]*)"')


def run_sql(query: str) -> str:
    """Query the sales figures.

    Args:
        query: Such as select "orders" from "north" where month="May".
    """
    parsed = QUERY.fullmatch(query)
    if not parsed:
        raise ValueError(f"cannot read {query}")
    metric, region, month = parsed.groups()
    if metric not in METRICS:
        return f'error: no column "{metric}", use "{SYNONYMS.get(metric, METRICS[0])}"'
    if region not in REGIONS or month not in MONTHS:
        raise ValueError(f'no "{region}" in "{month}"')
    return figure(metric, region, month)


def draw_chart(metric: str, month: str, kind: str) -> list[Any]:
    """Draw a chart of a metric.

    Args:
        metric: Which one.
        month: Of which month.
        kind: bars or columns.
    """
    if metric not in METRICS or month not in MONTHS or kind not in ("bars", "columns"):
        raise ValueError(f'no "{kind}" of "{metric}" in "{month}"')
    return [chart(metric, month, kind)[0], "1 chart"]


def send_report(team: str, format: str) -> str:
    """Send the report.

    Args:
        team: To whom.
        format: pdf, csv or html.
    """
    if team not in TEAMS or format not in FORMATS:
        raise ValueError(f'no "{format}" for "{team}"')
    return "sent"


TOOLS = [run_sql, draw_chart, send_report]


def figure(metric: str, region: str, month: str) -> str:
    """What a metric came to."""
    return str(_numbers(metric, region, month).randint(100, 999))


def chart(metric: str, month: str, kind: str) -> tuple[Image.Image, str]:
    """A chart, and the color of the longest bar in it."""
    return draw(_numbers(metric, month, kind), kind)


def check(row: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last words of a run are right."""
    return bool(messages[-1]["content"] == row["expected"])


def as_task(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a run asks, and the last words that are right where the tools answer."""
    values: dict[str, str] = {}
    answers = (message["content"] for message in row["messages"] if message["role"] == "tool")
    for call in (call for message in row["messages"] for call in message.get("tool_calls", [])):
        if call["function"]["name"] == "run_sql":
            values[next(answers)] = run_sql(**json.loads(call["function"]["arguments"]))
        else:
            next(answers)
    expected = re.sub(r"\d{3}", lambda found: values[found[0]], row["messages"][-1]["content"])
    return {"id": row["id"], "messages": row["messages"][:2], "expected": expected}


def _numbers(*words: str) -> random.Random:
    """Random numbers that hang on these words alone."""
    return random.Random(hashlib.sha256(" ".join(words).encode()).hexdigest())
