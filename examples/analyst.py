"""A small data-analyst domain: an agent that queries sales figures and draws charts, with runs to learn from.

    python examples/analyst.py OUT --num-trajectories 4000 --seed 1

writes OUT/trajectories.jsonl and OUT/charts/*.png, in the OpenAI style that `gemma-dist shard` takes. The runs hold
what real logs hold: several tools, parallel calls, a tool that fails and is called again, questions that need no tool,
and charts that come back as images: the color of the longest bar stands in the image and nowhere else.

With --held-out the runs ask for other combinations of metric, region and month than those without: a model that is
right on them has learned to call, not the calls.
"""

import argparse
import itertools
import json
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

REGIONS = ["north", "south", "east", "west", "coast", "hills"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August"]
METRICS = ["revenue", "orders", "returns", "visits"]
SYNONYMS = {"takings": "revenue", "purchases": "orders", "refunds": "returns", "calls": "visits"}
TEAMS = ["finance", "sales", "support", "board"]
FORMATS = ["pdf", "csv", "html"]
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (140, 50, 170),
    "orange": (245, 140, 30),
    "black": (20, 20, 20),
    "cyan": (60, 200, 220),
}

# As in many logs, the tools stand in the system text alone: no `tools` list, no schema.
SYSTEM = "Sales desk. Tools: run_sql(query), draw_chart(metric, month, kind), send_report(team, format)."


# A quarter of what can be asked for; always the same quarter.
QUESTIONS = list(itertools.product(METRICS, REGIONS, MONTHS))
HELD_OUT = set(random.Random(0).sample(QUESTIONS, len(QUESTIONS) // 4))


class Source:
    """Where the runs draw from: random numbers, the combinations that may be asked for, a place for images."""

    def __init__(self, out: Path, *, seed: int, held_out: bool) -> None:
        self.random = random.Random(seed)
        self.questions = [question for question in QUESTIONS if (question in HELD_OUT) == held_out]
        self.out, self.num_charts = out, 0
        (out / "charts").mkdir(parents=True, exist_ok=True)

    def pick(self, options: list) -> Any:
        return self.random.choice(options)

    def pair(self) -> tuple[str, str, str, str]:
        """A metric, two regions and a month."""
        while True:
            metric, first, month = self.pick(self.questions)
            seconds = [question for question in self.questions if question[::2] == (metric, month)]
            if (second := self.pick(seconds)[1]) != first:
                return metric, first, second, month

    def number(self) -> str:
        return str(self.random.randint(100, 999))

    def chart(self, kind: str) -> tuple[str, str]:
        """A chart; the image's path and the longest's color."""
        image, longest = draw(self.random, kind)
        path = f"charts/{self.num_charts:05d}.png"
        self.num_charts += 1
        image.save(self.out / path)
        return path, longest


def draw(numbers: random.Random, kind: str) -> tuple[Image.Image, str]:
    """Draw four bars (lying) or columns (standing) on 192 x 192 pixels; the image and the longest's color."""
    size, names = 192, numbers.sample(list(COLORS), 4)
    lengths = [*numbers.sample(range(30, 101, 10), 3), numbers.randint(150, 170)]
    numbers.shuffle(lengths)
    image = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)
    for place, (name, length) in enumerate(zip(names, lengths, strict=True)):
        low, high = 12 + 44 * place, 12 + 44 * place + 34
        box = (10, low, 10 + length, high) if kind == "bars" else (low, size - 10 - length, high, size - 10)
        pen.rectangle(box, fill=COLORS[name])
    return image, names[lengths.index(max(lengths))]


def write_trajectories(out: Path, *, num_trajectories: int, seed: int, held_out: bool) -> Path:
    """Write that many runs to `out`/trajectories.jsonl with their charts beside them; returns the file."""
    source = Source(out, seed=seed, held_out=held_out)
    kinds = [total, compare, wrong_name, chart, chart, chart, report, no_tool]
    path = out / "trajectories.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_trajectories):
            kind = kinds[number % len(kinds)]
            messages = [{"role": "system", "content": SYSTEM}, *kind(source)]
            file.write(json.dumps({"id": f"{kind.__name__}-{seed}-{number}", "messages": messages}) + "\n")
    return path


# --- One function for each kind of run: the messages after the system turn ---


def total(source: Source) -> list[dict]:
    """One query, one number."""
    metric, region, month = source.pick(source.questions)
    value = source.number()
    ask = source.pick(
        ['What was "{}" of "{}" in "{}"?', '"{}" of "{}" in "{}", please.', 'I need "{}" for "{}", "{}".']
    )
    return [
        _user(ask.format(metric, region, month)),
        _calls(_query(metric, region, month)),
        _answer("run_sql", value),
        _says(f"It was {value}."),
    ]


def in_other_words(source: Source, number: int) -> list[dict]:
    """One query, one number, asked for in words that no log has; another form for each number."""
    metric, region, month = source.pick(source.questions)
    value = source.number()
    forms = [
        *('Please find "{}" of "{}" in "{}".', 'Tell me "{}" of "{}" for "{}".', 'Give me "{}" of "{}", "{}".'),
        *('What was "{2}" "{0}" of "{1}"?', 'In "{2}", "{0}" of "{1}"?', 'What were "{}" of "{}" in "{}"?'),
    ]
    return [
        _user(forms[number % len(forms)].format(metric, region, month)),
        _calls(_query(metric, region, month)),
        _answer("run_sql", value),
        _says(f"It was {value}."),
    ]


def compare(source: Source) -> list[dict]:
    """Two regions: two calls side by side."""
    metric, first, second, month = source.pair()
    values = [source.number(), source.number()]
    ask = source.pick(['Compare "{}" of "{}" and "{}" in "{}".', 'More "{}", "{}" or "{}", in "{}"?'])
    return [
        _user(ask.format(metric, first, second, month)),
        _calls(_query(metric, first, month), _query(metric, second, month)),
        _answer("run_sql", values[0], call=0),
        _answer("run_sql", values[1], call=1),
        _says(f"{first} {values[0]}\n{second} {values[1]}"),
    ]


def wrong_name(source: Source) -> list[dict]:
    """The user's word is no column: the query fails, the error names the column, the second query is right."""
    metric, region, month = source.pick(source.questions)
    word = next(word for word, column in SYNONYMS.items() if column == metric)
    value = source.number()
    return [
        _user(f'What was "{word}" of "{region}" in "{month}"?'),
        _calls(_query(word, region, month)),
        _answer("run_sql", f'error: no column "{word}", use "{metric}"'),
        _calls(_query(metric, region, month)),
        _answer("run_sql", value),
        _says(f"It was {value}."),
    ]


def chart(source: Source) -> list[dict]:
    """A chart comes back; only the image tells which bar is the longest."""
    metric, _, month = source.pick(source.questions)
    kind = source.pick(["bars", "columns"])
    path, longest = source.chart(kind)
    ask = source.pick(['Draw "{}" in "{}" as "{}". Which is longest?', 'Chart "{}", "{}", with "{}": the longest one?'])
    return [
        _user(ask.format(metric, month, kind)),
        _calls(("draw_chart", {"metric": metric, "month": month, "kind": kind})),
        _answer("draw_chart", [{"type": "image", "image": path}, {"type": "text", "text": "1 chart"}]),
        _says(f"The longest is {longest}."),
    ]


def report(source: Source) -> list[dict]:
    """A tool that acts and has little to say."""
    team, form = source.pick(TEAMS), source.pick(FORMATS)
    ask = source.pick(['Send the "{1}" report to "{0}".', 'Team "{0}" wants it as "{1}".', 'Mail "{0}" a "{1}".'])
    return [
        _user(ask.format(team, form)),
        _calls(("send_report", {"team": team, "format": form})),
        _answer("send_report", "sent"),
        _says(f"Sent to {team}."),
    ]


def no_tool(source: Source) -> list[dict]:
    """Nothing to call: small talk, or a question outside the figures."""
    name = source.pick(["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gina", "Hal"])
    unknown = "I only know the sales figures."
    talk = {
        f"Hello, I am {name}.": f"Hello {name}.",
        f"Thanks from {name}!": f"You are welcome, {name}.",
        f"What is the weather in {source.pick(REGIONS)}?": unknown,
        f"Will {source.pick(MONTHS)} be sunny?": unknown,
        "What can you do?": "I query sales, draw charts and send reports.",
    }
    ask = source.pick(list(talk))
    return [_user(ask), _says(talk[ask])]


def _user(text: str) -> dict:
    return {"role": "user", "content": text}


def _says(text: str) -> dict:
    return {"role": "assistant", "content": text}


def _query(metric: str, region: str, month: str) -> tuple[str, dict]:
    return "run_sql", {"query": f'select "{metric}" from "{region}" where month="{month}"'}


def _calls(*calls: tuple[str, dict]) -> dict:
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
            for number, (name, arguments) in enumerate(calls)
        ],
    }


def _answer(name: str, content: str | list, call: int = 0) -> dict:
    return {"role": "tool", "tool_call_id": f"call_{call}", "name": name, "content": content}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write runs of a small data-analyst agent.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--num-trajectories", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--held-out", action="store_true")
    options = parser.parse_args()
    print(write_trajectories(**vars(options)))
