"""What `gemma-dist stats` says of a small corpus, number by number; and what it finds of near duplicates."""

import copy
import json
import random
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_dist.config import EncodingConfig, RowConfig
from gemma_dist.data.encode import load_encoder
from gemma_dist.data.rows import read_rows
from gemma_dist.data.trajectory import Trajectory, parse_row
from gemma_dist.errors import ConfigError
from gemma_dist.show import duplicates
from gemma_dist.show.fingerprints import Fingerprints, make_signature
from gemma_dist.show.stats import collect_stats, reason_of
from gemma_dist.show.stats_report import CorpusStats, Spread
from tests.support.corpus import shard_rows, write_rows
from tests.support.ranks import gemma_dist
from tests.support.store import serve

# A text of 100 words, each different: what is read on the notice board of a harbor.
NOTICE = " ".join(f"berth{number} free{number}" for number in range(50))


def tool(name: str, kind: str = "string") -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"city": {"type": kind}}}
    return {"type": "function", "function": {"name": name, "description": "Look.", "parameters": parameters}}


def called(name: str, city: object, call_id: str) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps({"city": city})}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": call_id, "function": function}]}


def question(text: str, *answer: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, *answer], **fields}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


WEATHER = question("Weather in Rome?", called("weather", "Rome", "a"), tools=[tool("weather"), tool("tides")])
ROWS = [
    {"id": "first", **WEATHER},
    {"id": "again", **question("Weather in Rome?", called("weather", "Rome", "b"), tools=WEATHER["tools"])},
    {"id": "other", **question("Weather in Rome?", said("Warm."), tools=WEATHER["tools"])},
    {"id": "number", **question("Weather in 7?", called("weather", 7, "a"), tools=[tool("weather", "integer")])},
    {"id": "notice", **question("What is free?", said(NOTICE))},
    {"id": "nearly", **question("What is free?", said(NOTICE.replace("free25", "taken")))},
    {"id": "undeclared", **question("Ships in Rome?", called("ships", "Rome", "a"))},
]
HELD_OUT = [
    {"id": "leak", **WEATHER},
    {"id": "near leak", **question("What is free?", said(NOTICE.replace("free30", "rented")))},
    {"id": "same prompt", **question("Ships in Rome?", said("Two."))},
    {"id": "new", **question("Who are you?", said("A model."))},
]
REFUSED = [
    question("Weather?", called("weather", 5, "a"), tools=[tool("weather")]),
    question("Weather?", said("Warm."), said("Hot."), called("weather", [1], "a"), tools=[tool("weather")]),
    {"messages": [{"role": "judge", "content": "Guilty."}]},
]


def stats_of(path: Path | str, *against: Path, model: str | None = None) -> CorpusStats:
    return collect_stats([str(path)], [str(one) for one in against], model, RowConfig())


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "train.jsonl", ROWS)


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "held_out.jsonl", HELD_OUT)


def ids(examples: list[duplicates.Example]) -> list[list[str]]:
    return [[row["id"] for row in example.rows] for example in examples]


def test_lengths_are_counted_for_each_row(train: Path) -> None:
    stats = stats_of(train)
    assert (stats.num_rows, stats.num_refused, stats.num_encoded, stats.trained_share) == (7, 0, 0, None)
    assert stats.per_row["messages"] == Spread(total=14, mean=2.0, p50=2, p90=2, p99=2, max=2)
    assert stats.per_row["calls"] == Spread(total=4, mean=4 / 7, p50=1, p90=1, p99=1, max=1)
    assert stats.per_row["images"] == Spread(total=0, mean=0.0, p50=0, p90=0, p99=0, max=0)
    assert list(stats.per_row) == ["characters", "messages", "user_turns", "calls", "images"]
    # "Weather in Rome?", "weather" and '{"city": "Rome"}', for the first row
    lengths = sorted(
        [16 + 7 + 16, 16 + 7 + 16, 16 + 5, 13 + 7 + 11, 13 + len(NOTICE), 13 + len(NOTICE) - 1, 14 + 5 + 16]
    )
    characters = stats.per_row["characters"]
    assert (characters.total, characters.p50, characters.max) == (sum(lengths), lengths[3], lengths[-1])


def test_tools_are_counted_by_declarations_and_calls(train: Path) -> None:
    stats = stats_of(train)
    counts = [(tool.name, tool.num_rows, tool.num_calls, tool.num_declarations) for tool in stats.tools]
    assert counts == [("weather", 4, 3, 2), ("ships", 0, 1, 0), ("tides", 3, 0, 1)]
    assert stats.never_called == ["tides"]
    assert stats.num_rows_without_declarations == 1
    assert stats.tools[0].differing == ["parameters.properties.city.type"]
    assert stats.tools[0].places == [f"{train}:1", f"{train}:4"]


def test_duplicates_are_found_whatever_the_ids_of_calls(train: Path) -> None:
    stats = stats_of(train)
    assert (stats.exact.num_groups, stats.exact.num_rows) == (1, 2)
    assert stats.exact.examples[0].rows == [
        {"place": f"{train}:1", "id": "first"},
        {"place": f"{train}:2", "id": "again"},
    ]
    assert ids(stats.near.examples) == [["notice", "nearly"]]
    assert 0.8 <= (stats.near.examples[0].similarity or 0) < 1
    assert ids(stats.same_prompt.examples) == [["first", "other"], ["notice", "nearly"]]


def test_rows_of_held_out_data_are_leaks(train: Path, held_out: Path) -> None:
    overlap = stats_of(train, held_out).against
    assert overlap
    assert (overlap.num_rows, overlap.num_refused, overlap.data) == (4, 0, [str(held_out)])
    assert ids(overlap.exact.examples) == [["first", "leak"], ["again", "leak"]]
    assert ids(overlap.near.examples) == [["notice", "near leak"], ["nearly", "near leak"]]
    assert ids(overlap.same_prompt.examples) == [["other", "leak"], ["undeclared", "same prompt"]]
    assert overlap.exact.num_rows == overlap.near.num_rows == overlap.same_prompt.num_rows == 2
    assert stats_of(train).against is None


@pytest.mark.parametrize(
    ("change", "exact"),
    [
        (lambda row: row["messages"][0].update(content=[{"type": "text", "text": "Weather in Rome?"}]), True),
        (lambda row: row["tools"][0]["function"].update(description="See."), False),
        (lambda row: row["tools"].reverse(), False),
        (lambda row: row["messages"].insert(0, {"role": "system", "content": "Be brief."}), False),
        (lambda row: row["messages"][1].update(reasoning_content="Rome it is."), False),
    ],
)
def test_the_same_is_what_the_model_would_see_the_same(change: Any, exact: bool, tmp_path: Path) -> None:
    row = copy.deepcopy(WEATHER)
    change(row)
    stats = stats_of(write_rows(tmp_path / "rows.jsonl", [WEATHER, row]))
    assert (stats.exact.num_rows == 2) is exact


def test_another_image_is_another_row(tmp_path: Path) -> None:
    from tests.support.corpus import row

    pages = [row(3), row(3), row(3)]
    pages[1]["messages"][2]["content"][1] = row(6)["messages"][2]["content"][1]
    stats = stats_of(write_rows(tmp_path / "rows.jsonl", pages))
    assert (stats.exact.num_groups, stats.exact.num_rows) == (1, 2)
    assert [name["place"][-1] for name in stats.exact.examples[0].rows] == ["1", "3"]
    assert stats.per_row["images"].total == 3
    assert stats.near.num_rows == 0, "an image weighs as much as some words"


def test_answers_belong_to_their_calls_in_what_is_the_same(tmp_path: Path) -> None:
    """Two calls of one tool, answered in the order of the calls or in the other."""

    def asked(first: str, second: str) -> dict[str, Any]:
        calls = called("weather", "Rome", first)
        calls["tool_calls"] += called("weather", "Oslo", second)["tool_calls"]
        answers = [
            {"role": "tool", "tool_call_id": name, "content": text} for name, text in (("a", "hot"), ("b", "cold"))
        ]
        return question("Where is it warm?", calls, *answers, said("See above."))

    stats = stats_of(write_rows(tmp_path / "rows.jsonl", [asked("a", "b"), asked("b", "a")]))
    assert stats.exact.num_rows == 0


def test_a_shard_folder_says_the_same_as_the_rows_it_was_made_of(tmp_path: Path, model: str) -> None:
    shard_rows(tmp_path, model, ROWS)
    raw = stats_of(tmp_path / "rows.jsonl", model=model).to_json()
    shards = stats_of(tmp_path / "shards").to_json()
    of_text = json.dumps(shards).replace(f"{tmp_path}/shards", f"{tmp_path}/rows.jsonl")
    assert json.loads(of_text) == raw
    with serve({path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()}) as server:
        assert (
            json.loads(json.dumps(stats_of(server.url).to_json()).replace(server.url, f"{tmp_path}/shards")) == shards
        )


def test_tokens_are_those_of_the_encoder(train: Path, model: str) -> None:
    encoder = load_encoder(model, EncodingConfig())
    encoded = [encoder.encode(parse_row(row, where, RowConfig())) for where, row in read_rows([train])]
    stats = stats_of(train, model=model)
    lengths, trained = [len(one.input_ids) for one in encoded], sum(one.num_target_tokens for one in encoded)
    assert stats.num_encoded == len(ROWS)
    assert (stats.per_row["tokens"].total, stats.per_row["tokens"].max) == (sum(lengths), max(lengths))
    assert stats.per_row["trained_tokens"].total == trained
    assert stats.trained_share == pytest.approx(trained / sum(lengths))
    assert f"trained: {trained / sum(lengths):.1%} of the tokens" in stats.render()


def test_refused_rows_are_counted_by_their_reason(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [*REFUSED, *ROWS])
    with data.open("a") as file:
        file.write("{broken\n")
    stats = stats_of(data, data)
    assert (stats.num_rows, stats.num_refused) == (7, 4)
    schema = "the arguments do not fit the tool's schema"
    assert next(iter(stats.refused)) == schema, "the most frequent one"
    assert (stats.refused[schema].num_rows, stats.refused[schema].first) == (2, f"{data}:1")
    assert len(stats.refused) == 3
    assert stats.against
    assert (stats.against.num_refused, stats.against.exact.num_rows) == (4, 7)
    assert f"  2 x {schema}, first in {data}:1" in stats.render()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("turn 3 (tool): the content is ['a', 7]; write it", "the content is …"),
        ("not JSON at column 17, near '{bro': Expecting property name; fix the JSON", "not JSON at column …, near …"),
        ("tool f: is declared twice; tool names are unique", "is declared twice"),
        ("1,234 tokens, but max_length is 1,000; raise it", "… tokens, but max_length is …"),
    ],
)
def test_a_reason_leaves_out_what_differs_from_row_to_row(error: str, reason: str) -> None:
    assert reason_of(error) == reason


def test_a_corpus_without_a_row_has_nothing_to_count(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", REFUSED[2:])
    stats = stats_of(data, data)
    assert (stats.num_rows, stats.num_refused, stats.per_row, stats.tools) == (0, 1, {}, [])
    assert "0 rows, 1 refused" in stats.render()


def test_the_example_of_the_docs_is_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "train.jsonl", [*ROWS, REFUSED[0]])
    write_rows(tmp_path / "held_out.jsonl", HELD_OUT)
    monkeypatch.chdir(tmp_path)
    printed = textwrap.indent(stats_of("train.jsonl", Path("held_out.jsonl")).render(), "    ")
    docs = Path(__file__).parents[1] / "docs/data.md"
    assert printed in docs.read_text()


def test_the_command_prints_a_table_or_its_json(train: Path, held_out: Path) -> None:
    words = ["stats", train, train, "--against", held_out]
    table = gemma_dist(*words)
    found = json.loads(gemma_dist(*words, "--json").splitlines()[-1])
    assert found["num_rows"] == 14
    assert f"{train}, {train}: 14 rows" in table
    assert f"exact duplicates: {found['exact']['num_rows']} rows in {found['exact']['num_groups']} groups" in table
    assert f"near duplicates: {found['near']['num_rows']} rows" in table
    assert f"in both, exactly: {found['against']['exact']['num_rows']} rows" in table
    for name, spread in found["per_row"].items():
        line = next(line for line in table.splitlines() if line.startswith(name.replace("_", " ")))
        assert line.split()[-6:] == [
            f"{spread[key]:,.1f}" if key == "mean" else f"{spread[key]:,}"
            for key in ("total", "mean", "p50", "p90", "p99", "max")
        ]
    for one in found["tools"]:
        assert f"{one['num_rows']:>12,}{one['num_calls']:>13,}  {one['name']}" in table


# ---- near duplicates -------------------------------------------------------------------------------------------------


def found_near(*texts: str) -> int:
    """How many of rows with these texts are nearly the same as another."""
    rows = Fingerprints()
    for number, text in enumerate(texts):
        messages: Any = [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]
        rows.add(Trajectory(str(number), messages, [], []), "rows", number)
    return duplicates.find_near(rows).num_rows


words = st.text("abcdefghijklmnopqrstuvwxyzäöü", min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(words, min_size=100, max_size=200, unique=True), st.data())
def test_a_copy_with_one_word_changed_in_100_is_found(text: list[str], data: st.DataObject) -> None:
    changed = list(text)
    changed[data.draw(st.integers(0, len(text) - 1))] = "CHANGED1"
    assert found_near(" ".join(text), " ".join(changed)) == 2


@settings(max_examples=60, deadline=None)
@given(st.lists(words, min_size=20, max_size=200, unique=True), st.randoms(use_true_random=False))
def test_the_same_words_in_another_order_are_another_row(text: list[str], order: random.Random) -> None:
    """Two unrelated texts of one vocabulary."""
    shuffled = list(text)
    order.shuffle(shuffled)
    half = len(text) // 2
    assert found_near(" ".join(text[:half]), " ".join(text[half:])) == 0
    same_runs = len(_runs(text) & _runs(shuffled)) / len(_runs(text) | _runs(shuffled))
    if same_runs < 0.5:
        assert found_near(" ".join(text), " ".join(shuffled)) == 0


def _runs(text: list[str]) -> set[tuple[str, ...]]:
    return {tuple(text[start : start + 5]) for start in range(len(text) - 4)}


def test_texts_without_spaces_have_words_too() -> None:
    text = "".join(chr(0x4E00 + number) for number in range(100))
    assert found_near(text, text.replace(text[40], "新", 1)) == 2
    assert found_near(text[:50], text[50:]) == 0


def test_the_share_of_agreement_estimates_the_share_of_common_shingles() -> None:
    text = [f"word{number}" for number in range(400)]
    for num_common in (100, 200, 300):
        other = text[:num_common] + [f"other{number}" for number in range(400 - num_common)]
        common = len(_runs(text) & _runs(other)) / len(_runs(text) | _runs(other))
        estimate = (make_signature(text) == make_signature(other)).mean()
        assert estimate == pytest.approx(common, abs=0.13), "three standard deviations"


def test_a_group_of_many_copies_takes_no_time_of_pairs() -> None:
    signatures = np.repeat(make_signature(NOTICE.split())[None], 20_000, axis=0)
    group_of = np.arange(len(signatures))
    for candidates in duplicates._candidates(signatures):
        duplicates._join_similar(candidates, signatures, group_of)
    assert not group_of.any()


def test_what_is_held_of_a_row_does_not_grow_with_its_text() -> None:
    rows = Fingerprints()
    messages: Any = [{"role": "user", "content": NOTICE * 50}, {"role": "assistant", "content": "ok"}]
    for number in range(20):
        rows.add(Trajectory(str(number), messages, [], [bytes(1_000_000)]), "rows.jsonl", number)
    numbers = [value for value in vars(rows).values() if not isinstance(value, list)]
    assert sum(value.itemsize * len(value) for value in numbers) == 20 * (4 + 8 + 8 + 8 + 4 * 128)
    assert (rows._sources, rows._ids) == (["rows.jsonl"], [str(number) for number in range(20)])


# ---- rows that make several samples ----------------------------------------------------------------------------------

THINKING = question(
    "Rome?",
    {"role": "assistant", "content": "Warm.", "reasoning_content": "It is June."},
    {"role": "user", "content": "Oslo?"},
    {"role": "assistant", "content": "Cold.", "reasoning_content": "It is north."},
)


def test_samples_of_one_row_are_not_answers_to_one_prompt(tmp_path: Path, model: str) -> None:
    path = write_rows(tmp_path / "train.jsonl", [THINKING])
    unrolled = collect_stats([str(path)], [str(path)], model, RowConfig(unroll="reasoning")).to_json()
    assert unrolled["num_rows"] == 2
    assert unrolled["same_prompt"]["num_rows"] == 0
    assert unrolled["against"]["exact"]["num_rows"] == 2
    with pytest.raises(ConfigError, match="name the model, too"):
        collect_stats([str(path)], [], None, RowConfig(unroll="reasoning"))
