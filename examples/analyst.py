"""A small data-analyst domain: an agent that queries sales figures and draws charts, with runs to learn from.

    python examples/analyst.py OUT --num-trajectories 4000 --seed 1

writes OUT/trajectories.jsonl and OUT/charts/*.png, in the OpenAI style that `gemma-dist shard` takes. The runs hold
what real logs hold: several tools, parallel calls, a tool that fails and is called again, questions that need no tool, and
charts that come back as pictures: the colour of the longest bar stands in the picture and nowhere else.
"""

import argparse
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

REGIONS = ["north", "south", "east", "west", "coast", "hills"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August"]
METRICS = ["revenue", "orders", "returns", "visits"]
SYNONYMS = {"turnover": "revenue", "purchases": "orders", "refunds": "returns", "traffic": "visits"}
TEAMS = ["finance", "sales", "support", "board"]
FORMATS = ["pdf", "csv", "html"]
COLOURS = {
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
SYSTEM = (
    "You look after the sales figures. "
    "Tools: run_sql(query), draw_chart(metric, month, kind), send_report(team, format)."
)


def write_trajectories(out: Path, *, num_trajectories: int, seed: int) -> Path:
    """Write that many runs to `out`/trajectories.jsonl with their charts beside them; returns the file."""
    (out / "charts").mkdir(parents=True, exist_ok=True)
    random_ = random.Random(seed)
    kinds = [total, compare, wrong_name, chart, chart, chart, report, no_tool]
    path = out / "trajectories.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_trajectories):
            kind = kinds[number % len(kinds)]
            row = {"id": f"{kind.__name__}-{seed}-{number}", "messages": [{"role": "system", "content": SYSTEM}]}
            row["messages"] += kind(random_, out, number)
            file.write(json.dumps(row) + "\n")
    return path


# --- One function for each kind of run: the messages after the system turn ---


def total(random_: random.Random, out: Path, number: int) -> list[dict]:
    """One query, one number."""
    metric, region, month = random_.choice(METRICS), random_.choice(REGIONS), random_.choice(MONTHS)
    value = str(random_.randint(100, 999))
    ask = random_.choice(
        ["What were the {} of the {} in {}?", "{} of {} in {}, please.", "I need the {} for {} in {}."]
    )
    return [
        {"role": "user", "content": ask.format(metric, region, month)},
        _calls(_query(metric, region, month)),
        _answer("run_sql", value),
        {"role": "assistant", "content": f"{value} {metric}."},
    ]


def compare(random_: random.Random, out: Path, number: int) -> list[dict]:
    """Two regions: two calls side by side."""
    metric, month = random_.choice(METRICS), random_.choice(MONTHS)
    first, second = random_.sample(REGIONS, 2)
    values = [str(random_.randint(100, 999)) for _ in range(2)]
    ask = random_.choice(["Compare the {m} of {a} and {b} in {t}.", "In {t}, who had more {m}: {a} or {b}?"])
    return [
        {"role": "user", "content": ask.format(m=metric, a=first, b=second, t=month)},
        _calls(_query(metric, first, month), _query(metric, second, month)),
        _answer("run_sql", values[0], call=0),
        _answer("run_sql", values[1], call=1),
        {"role": "assistant", "content": f"{first} {values[0]}, {second} {values[1]}."},
    ]


def wrong_name(random_: random.Random, out: Path, number: int) -> list[dict]:
    """The user's word is no column: the query fails, the error names the column, the second query is right."""
    word, region, month = random_.choice(list(SYNONYMS)), random_.choice(REGIONS), random_.choice(MONTHS)
    value = str(random_.randint(100, 999))
    return [
        {"role": "user", "content": f"What was the {word} of the {region} in {month}?"},
        _calls(_query(word, region, month)),
        _answer("run_sql", f"error: no column {word}, did you mean {SYNONYMS[word]}?"),
        _calls(_query(SYNONYMS[word], region, month)),
        _answer("run_sql", value),
        {"role": "assistant", "content": f"{value} {SYNONYMS[word]}."},
    ]


def chart(random_: random.Random, out: Path, number: int) -> list[dict]:
    """A chart comes back; only the picture tells which bar is the longest."""
    metric, month, kind = random_.choice(METRICS), random_.choice(MONTHS), random_.choice(["bars", "columns"])
    picture, longest = draw_chart(random_, kind)
    path = f"charts/{number:05d}.png"
    picture.save(out / path)
    ask = random_.choice(["Draw the {} of {} as {}. Which is the longest?", "Chart {} in {} with {}: the longest one?"])
    return [
        {"role": "user", "content": ask.format(metric, month, kind)},
        _calls(("draw_chart", {"metric": metric, "month": month, "kind": kind})),
        _answer("draw_chart", [{"type": "image", "image": path}, {"type": "text", "text": "1 chart"}]),
        {"role": "assistant", "content": f"The longest is {longest}."},
    ]


def report(random_: random.Random, out: Path, number: int) -> list[dict]:
    """A tool that acts and has little to say."""
    team, form = random_.choice(TEAMS), random_.choice(FORMATS)
    ask = random_.choice(["Send the {f} report to {t}.", "{t} wants the report as {f}.", "Mail {t} a {f}."])
    return [
        {"role": "user", "content": ask.format(t=team, f=form)},
        _calls(("send_report", {"team": team, "format": form})),
        _answer("send_report", "sent"),
        {"role": "assistant", "content": f"Sent to {team}."},
    ]


def no_tool(random_: random.Random, out: Path, number: int) -> list[dict]:
    """Nothing to call: small talk, or a question outside the figures."""
    name = random_.choice(["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gina", "Hal"])
    ask, answer = random_.choice(
        [
            (f"Hello, I am {name}.", f"Hello {name}."),
            (f"Thanks from {name}!", f"You are welcome, {name}."),
            (f"What is the weather in {random_.choice(REGIONS)}?", "I only know the sales figures."),
            (f"Will {random_.choice(MONTHS)} be sunny?", "I only know the sales figures."),
            ("What can you do?", "I query sales, draw charts and send reports."),
        ]
    )
    return [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]


def draw_chart(random_: random.Random, kind: str) -> tuple[Image.Image, str]:
    """A chart of four bars (lying) or columns (standing), 192 pixels square, and the colour of the longest."""
    size, names = 192, random_.sample(list(COLOURS), 4)
    lengths = [*random_.sample(range(30, 121, 10), 3), random_.randint(140, 170)]
    random_.shuffle(lengths)
    picture = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(picture)
    for place, (name, length) in enumerate(zip(names, lengths, strict=True)):
        low, high = 12 + 44 * place, 12 + 44 * place + 34
        box = (10, low, 10 + length, high) if kind == "bars" else (low, size - 10 - length, high, size - 10)
        pen.rectangle(box, fill=COLOURS[name])
    return picture, names[lengths.index(max(lengths))]


def _query(metric: str, region: str, month: str) -> tuple[str, dict]:
    return "run_sql", {"query": f"select {metric} from sales where region = '{region}' and month = '{month}'"}


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
    options = parser.parse_args()
    print(write_trajectories(options.out, num_trajectories=options.num_trajectories, seed=options.seed))
