"""Answers: what is read once and written many at a time is what plain passes give, one prompt after the other."""

import base64
from collections.abc import Callable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma_dist.config import EvaluateConfig
from gemma_dist.data.encode import Encoder, Prompt, load_encoder
from gemma_dist.evaluate import generate
from gemma_dist.evaluate.attention import Sight, States, tree_attention
from gemma_dist.evaluate.cache import Place, RowCache, TreeCache
from gemma_dist.evaluate.generate import Generator, Question
from gemma_dist.evaluate.room import CacheBytes, Room, measure_room
from gemma_dist.evaluate.sampling import Sampling
from gemma_dist.evaluate.tree import PromptTree, grow_tree
from gemma_dist.gemma_format import AUDIO, STOP_TOKENS, VIDEO
from gemma_dist.model.load import load_for_evaluation
from gemma_dist.model.tiny import STYLES
from gemma_dist.shards.reader import load_trajectories
from tests.support.corpus import answer, call, picture, row, write_rows

WINDOW = 24  # of sliding layers: prompts and answers are longer
NEW = 6  # tokens of an answer
GREEDY, LIVELY = Sampling(0, 1, 0, 0), Sampling(1.5, 0.95, 50, 0)


def _rows() -> list[dict[str, Any]]:
    """Several calls with images in their results, and thoughts that later turns no longer show."""
    rows = [row(number, num_calls=1 + number % 3) for number in (0, 3, 5)]
    thought = call(1) | {"reasoning_content": "A chart is wanted, so plot it."}
    again = [{"role": "user", "content": "And now?"}, call(2), answer(2, image=True)]
    said = {"role": "assistant", "content": "Here.", "reasoning_content": "It is drawn."}
    messages = [{"role": "user", "content": "Draw."}, thought, answer(1, image=True), said, *again, said]
    same = base64.b64encode(picture(1)).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{same}"}}
    asked = [{"role": "user", "content": [image, {"type": "text", "text": "Draw 0, please."}]}, call(0)]
    return [*rows, {"id": "thoughts", "messages": messages}, {"id": "asked", "messages": asked}]


def _trajectories(encoder: Encoder, folder: Path) -> list[list[Question]]:
    data = write_rows(folder / "rows.jsonl", _rows())
    loaded = load_trajectories(data, EvaluateConfig())
    return [[Question(one, f"{row.id} {one.turn}") for one in encoder.prompts(row)] for row in loaded]


def _load(folder: Path, window: int = WINDOW) -> tuple[Any, Encoder]:
    model = load_for_evaluation(str(folder), None)
    model.config.text_config.sliding_window = window
    return model, load_encoder(str(folder), EvaluateConfig())


def _inputs(encoder: Encoder, prompt: Prompt, written: Sequence[int] = ()) -> dict[str, torch.Tensor]:
    ids = [*prompt.input_ids, *written]
    types = [*prompt.mm_token_type_ids, *[0] * len(written)]
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    inputs["mm_token_type_ids"] = torch.tensor([types])
    return inputs | (encoder.pixels(prompt.images) if prompt.images else {})


def _generator(model: Any, encoder: Encoder, sampling: Sampling, rows: int = 32, new: int = 8) -> Generator:
    return Generator(model, encoder, sampling, measure_room(model, rows, 100_000), max_new_tokens=new)


@pytest.mark.parametrize(("style", "window"), [*((style, WINDOW) for style in STYLES), ("31b", 3)])
def test_answers_are_those_of_one_prompt_after_the_other(
    tiny_model: Callable[..., Path], style: str, window: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy: what `model.generate` writes. Sampled, so that the texts differ: each token is what the same random
    number draws from the logits of a pass over the whole prompt and all tokens before it, without a cache."""
    monkeypatch.setattr(generate, "CHUNK", 100)
    monkeypatch.setattr(generate, "TREE", 200)  # tokens: some stand alone
    model, encoder = _load(tiny_model(style), window)
    soft_tokens = [encoder.image_token_id, *encoder.tokenizer.convert_tokens_to_ids([AUDIO, VIDEO])]
    model.generation_config.suppress_tokens = soft_tokens  # a plain pass would look for what they stand for
    trajectories = _trajectories(encoder, tmp_path)
    questions = {question.key: question for question in chain.from_iterable(trajectories)}
    stops = encoder.tokenizer.convert_tokens_to_ids(list(STOP_TOKENS))
    greedy = {one.key: found.ids for one, _, found in _generator(model, encoder, GREEDY, 5, NEW).answer(trajectories)}
    lively = {one.key: found.ids for one, _, found in _generator(model, encoder, LIVELY, 5, NEW).answer(trajectories)}
    assert greedy.keys() == lively.keys() == questions.keys()
    assert len({tuple(ids) for ids in lively.values()}) > len(lively) / 2
    assert max(len(question.prompt.input_ids) for question in questions.values()) > 2 * WINDOW
    with torch.inference_mode():
        for key, question in questions.items():
            inputs, length = _inputs(encoder, question.prompt), len(question.prompt.input_ids)
            alone = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=stops)[0, length:]
            assert greedy[key] == alone.tolist(), key
            logits = model(**_inputs(encoder, question.prompt, lively[key])).logits[0, length - 1 : -1]
            logits[:, soft_tokens] = -torch.inf
            numbers = LIVELY.numbers(key, 0)
            drawn = [LIVELY.pick(one[None], [numbers])[0] for one in logits]
            assert lively[key] == drawn, key


def test_the_number_of_rows_and_the_order_change_no_answer(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model, encoder = _load(tiny_model("31b"))
    trajectories = _trajectories(encoder, tmp_path)
    found = []
    for num_rows, ordered in ((1, trajectories), (3, trajectories[::-1]), (64, trajectories)):
        generator = _generator(model, encoder, LIVELY, num_rows, new=12)
        found.append({question.key: written for question, _, written in generator.answer(ordered)})
    assert found[0] == found[1] == found[2]


def test_a_checkpoint_stops_where_its_own_generation_config_says(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model, encoder = _load(tiny_model())
    trajectories = _trajectories(encoder, tmp_path)[:2]
    before = {question.key: written for question, _, written in _generator(model, encoder, GREEDY).answer(trajectories)}
    assert not any(written.stopped for written in before.values())
    token = next(iter(before.values())).ids[3]
    model.generation_config.eos_token_id = [1, token]
    for question, _, written in _generator(model, encoder, GREEDY).answer(trajectories):
        ids = before[question.key].ids
        assert written.ids == ids[: ids.index(token) + 1 if token in ids else None]
        assert written.stopped == (token in ids)


def test_rows_that_run_out_of_memory_are_written_later(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, encoder = _load(tiny_model())
    trajectories = _trajectories(encoder, tmp_path)
    expected = {one.key: found for one, _, found in _generator(model, encoder, LIVELY).answer(trajectories)}
    forward, most = type(model).forward, 3

    def small(self: Any, *, input_ids: torch.Tensor, **inputs: Any) -> Any:
        if len(input_ids) > most:
            raise torch.OutOfMemoryError("not enough")
        return forward(self, input_ids=input_ids, **inputs)

    monkeypatch.setattr(type(model), "forward", small)
    generator = _generator(model, encoder, LIVELY)
    assert {one.key: found for one, _, found in generator.answer(trajectories)} == expected
    assert generator.failed == []
    most = 0
    generator = _generator(model, encoder, LIVELY)
    assert list(generator.answer(trajectories)) == []
    assert {question.key for question, _ in generator.failed} == expected.keys()


@pytest.fixture(scope="module")
def real_trees(shared: Path, model: str) -> list[tuple[list[Prompt], PromptTree]]:
    """The prompts of real trajectories, with and without images, and their trees."""
    encoder = load_encoder(model, EvaluateConfig())
    found = []
    for name, number in (("toolcalls/eval_multiturn.jsonl", 8), ("multimodal/eval.jsonl", 4)):
        for trajectory in islice(load_trajectories(shared / "data" / name, EvaluateConfig()), number):
            prompts = encoder.prompts(trajectory)
            found.append((prompts, grow_tree(prompts)))
    return found


def test_real_trajectories_are_read_hardly_more_than_once(real_trees: list[tuple[list[Prompt], PromptTree]]) -> None:
    read = asked = distinct = 0
    for prompts, tree in real_trees:
        beginnings: set[int] = set()
        for prompt in prompts:
            names = [prompt.input_ids[0]]
            for token in prompt.input_ids:
                names = [hash((names[0], token))]
                beginnings.add(names[0])
        distinct += len(beginnings)
        asked += sum(len(prompt.input_ids) for prompt in prompts)
        read += len(tree)
    assert asked > 4 * distinct
    assert distinct <= read <= 1.02 * distinct


def test_a_tree_holds_each_prompt_along_its_path(real_trees: list[tuple[list[Prompt], PromptTree]]) -> None:
    groups = [prompts for prompts, _ in real_trees]
    trees = [*real_trees, (groups[-1] + groups[0] + groups[-2] + groups[-1], None)]
    for prompts, grown in trees:
        tree = grown or grow_tree(prompts)
        assert sum(len(run.before) >= 0 and run.stop - run.start for run in tree.runs) == len(tree)
        for prompt, path in zip(prompts, tree.paths, strict=True):
            assert tree.input_ids[path].tolist() == prompt.input_ids
            assert tree.positions[path].tolist() == list(range(len(path)))
            assert (tree.image_of[path] > 0).tolist() == [bool(one) for one in prompt.mm_token_type_ids]
            shown = [int(one) for one in dict.fromkeys(tree.image_of[path].tolist()) if one]
            assert [tree.images[one - 1] for one in shown] == prompt.images
        assert (np.diff(tree.image_of[tree.image_of > 0]) >= 0).all(), "images stand in the order of their soft tokens"


@pytest.mark.parametrize("size", [7, 100, 100_000])
def test_chunks_cover_a_tree_and_cut_no_image(real_trees: list[tuple[list[Prompt], PromptTree]], size: int) -> None:
    for _, tree in real_trees[-2:]:
        chunks = tree.chunks(size)
        assert [place for chunk in chunks for place in range(*chunk)] == list(range(len(tree)))
        for start, stop in chunks:
            assert start < stop
            if 0 < start < len(tree) and tree.image_of[start]:
                assert tree.image_of[start] != tree.image_of[start - 1]


def test_a_token_sees_its_own_path_up_to_itself(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    encoder = load_encoder(str(tiny_model()), EvaluateConfig())
    prompts = [question.prompt for questions in _trajectories(encoder, tmp_path)[:3] for question in questions]
    tree = grow_tree(prompts)
    truth = np.zeros((len(tree), len(tree)), bool)
    for path in tree.paths:
        for place, token in enumerate(path):
            truth[token, path[: place + 1]] = True
    for start, stop in [*tree.chunks(50), *tree.chunks(10_000)]:
        assert (tree.sees(start, stop) == truth[start:stop, :stop]).all()
        for window in (1, 10, 10_000):
            behind = tree.positions[start:stop, None] - tree.positions[:stop]
            seen = truth[start:stop, :stop] & (behind < window)
            assert tree.first_seen(start, stop, window) == seen.any(0).argmax()


def test_equal_soft_tokens_of_different_images_are_not_shared(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    encoder = load_encoder(str(tiny_model()), EvaluateConfig())
    first = _trajectories(encoder, tmp_path)[-1][-1].prompt
    other = Prompt(first.input_ids, first.mm_token_type_ids, [picture(6)], first.text, first.turn, first.gold)
    begins = first.mm_token_type_ids.index(1)
    assert len(grow_tree([first, first])) == len(first.input_ids) + 1
    assert len(grow_tree([first, other])) == 2 * len(first.input_ids) - begins
    assert grow_tree([first, other]).images == [*first.images, picture(6)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_rows_see_trees_and_answers_as_if_each_had_all_of_it(dtype: torch.dtype, tolerance: float) -> None:
    """Two trees of different lengths, a row of none, several queries to a head; against a softmax of each row."""
    torch.manual_seed(0)
    num_rows, heads, num_own, width = 5, 2, 3, 16
    taken, lengths = [torch.tensor([4, 0]), torch.tensor([1, 2])], [7, 4]
    query = torch.randn(num_rows, 3 * heads, 1, width).to(dtype)
    key, value = (
        States(
            torch.randn(heads, num_rows, num_own, width).to(dtype),
            [torch.randn(heads, length, width).to(dtype) for length in lengths],
        )
        for _ in range(2)
    )
    hidden = torch.rand(num_rows, 1, num_own + max(lengths)) < 0.4
    hidden[..., 0], hidden[3, :, num_own:], hidden[taken[1], :, num_own + lengths[1] :] = False, True, True
    found, _ = tree_attention(torch.nn.Module(), query, key, value, Sight(taken, hidden), scaling=0.5)
    assert found.shape == (num_rows, 1, 3 * heads, width)
    for number in range(num_rows):
        trees = [tree for tree, rows in enumerate(taken) if number in rows]
        all_keys, all_values = (
            torch.cat([one.own[:, number], *(one.of_trees[tree] for tree in trees)], 1).double().repeat_interleave(3, 0)
            for one in (key, value)
        )
        scores = (0.5 * query[number].double() @ all_keys.mT)[:, 0]
        scores[:, hidden[number, 0, : scores.shape[1]]] = -torch.inf
        expected = (scores.softmax(-1)[:, None] @ all_values)[:, 0]
        torch.testing.assert_close(found[number, 0].double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("style", STYLES)
def test_caches_take_what_the_room_says(tiny_model: Callable[..., Path], style: str, tmp_path: Path) -> None:
    model, encoder = _load(tiny_model(style))
    generator = _generator(model, encoder, GREEDY)
    text, prompts = model.config.text_config, [one.prompt for one in _trajectories(encoder, tmp_path)[0]]
    cache, rows = TreeCache(grow_tree(prompts), text, model.device), RowCache(text, model.device)
    expected, num_tokens = CacheBytes.of(text, 4), len(cache.tree)

    def held(of: TreeCache | RowCache) -> int:
        return sum(one.numel() * one.element_size() for one in (*of.keys.values(), *of.values.values()))

    with torch.inference_mode():
        generator._read(cache, 0, num_tokens)
        assert held(cache) == expected.of_tree(num_tokens, num_tokens)
        cache.close()
        assert held(cache) == expected.of_tree(num_tokens, cache.num_sliding)
        assert max(map(len, cache.tree.paths)) > WINDOW > cache.num_sliding / len(prompts)
        rows.resize([], 3, 40)
        place = Place(cache, 0, 0)
        generator._pass([[5]] * 3, [[0], [place.position], [0]], rows, rows.begin([None, place, None]), 1, {})
    assert held(rows) == expected.of_rows(3, 40)


def test_no_more_is_held_than_the_room_says(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, encoder = _load(tiny_model())
    trajectories = _trajectories(encoder, tmp_path)
    monkeypatch.setattr(generate, "TREE", 1)  # one for each
    sizes = [len(grow_tree([one.prompt for one in questions])) for questions in trajectories]
    held = []
    for num_tokens in (1, 2 * max(sizes), 100_000):
        room = Room(32, num_tokens, 2**40, CacheBytes.of(model.config.text_config, 4))
        generator = Generator(model, encoder, LIVELY, room, max_new_tokens=8)
        most = num_answers = 0
        for _ in generator.answer(trajectories):
            num_answers += 1
            rows = [row for row in generator._rows if row]
            trees = {len(row.tree.tree) for row in [*rows, *generator._waiting]}  # all of another size
            most = max(most, sum(trees) + 8 * len(rows))
        assert num_answers == sum(map(len, trajectories))
        held.append(most)
    assert held[0] <= max(sizes) + 8, "one at a time where nothing fits"
    assert held[1] <= 2 * max(sizes)
    assert held[1] < held[2]


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.8, 0), (1.0, 3), (0.6, 2)])
def test_sampling_draws_as_often_as_the_probabilities_say(top_p: float, top_k: int) -> None:
    sampling = Sampling(0.7, top_p, top_k, seed=1)
    logits = torch.tensor([0.5, 2.0, -1.0, 1.0, 1.9])
    shares = (logits / 0.7).softmax(0)
    kept = sorted(range(5), key=lambda token: -shares[token])[: top_k or 5]
    total = sum(float(shares[token]) for token in kept)
    nucleus, sum_before = [], 0.0
    for token in kept:  # transformers: the fewest that reach top_p
        if sum_before < top_p:
            nucleus.append(token)
        sum_before += float(shares[token]) / total
    numbers = sampling.numbers("point", 0)
    drawn = sampling.pick(logits.expand(20_000, 5), [numbers] * 20_000)
    assert set(drawn) == set(nucleus)
    whole = sum(float(shares[token]) for token in nucleus)
    for token in nucleus:
        assert drawn.count(token) / 20_000 == pytest.approx(float(shares[token]) / whole, abs=0.015)
