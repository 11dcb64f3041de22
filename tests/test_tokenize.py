"""Text to tokens, piece by piece: the same as of the whole text, or the text is not cut."""

import json
import random
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from gemma_dist.data import tokenize
from gemma_dist.data.cuts import find_cuts, find_word_cuts
from gemma_dist.data.tokenize import TextTokenizer, find_words
from gemma_dist.errors import DataError
from gemma_dist.gemma_format import CONTROL_TOKENS
from tests.support.vocabulary import of_gemma as in_gemmas_parts

WORDS = (
    "model\n",
    " the",
    "x",
    " ",
    "  ",
    "\n\n",
    "▁",
    "é",
    "🙂",
    "e\u0301",
    "12",
    "<",
    "<|",
    "<|turn",
    "turn|>",
    "|>",
    "<|tool>d",
)


@pytest.fixture(scope="module")
def given(tiny_model: Callable[..., Path]) -> dict[str, Any]:
    """The tiny model's tokenizer.json."""
    read: dict[str, Any] = json.loads((tiny_model() / "tokenizer.json").read_text())
    return read


def backend(given: dict[str, Any], **parts: object) -> Any:
    return Tokenizer.from_str(json.dumps(given | parts))


def of_gemma(given: dict[str, Any], *merges: str, **changes: object) -> Any:
    """One like Gemma's: blanks as ▁, no other split, bytes for what is no token.

    Args:
        merges: pairs with a blank in between, whose words are in the vocabulary.
    """
    pairs = [merge.split(" ") for merge in ("▁ t", "▁t h", "t h", "m o", *merges)]
    pieces = [token["content"] for token in given["added_tokens"]] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["▁", "\n", *"themodlx12<|>", *chain.from_iterable((*pair, "".join(pair)) for pair in pairs)]
    model = {
        "type": "BPE",
        "byte_fallback": True,
        "fuse_unk": True,
        "unk_token": "<unk>",
        "vocab": {piece: number for number, piece in enumerate(dict.fromkeys(pieces))},
        "merges": pairs,
    }
    return backend(given, **in_gemmas_parts(model | changes))


def texts(num: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(CONTROL_TOKENS + WORDS, k=rng.randint(0, 30))) for _ in range(num)]


def require_same(backend: Any, num: int = 300) -> None:
    """Each text has the tokens that it has as a whole, when its pieces come for the first time and again."""
    tokenizer = TextTokenizer(backend)
    for text in texts(num) * 2:
        whole = backend.encode(text, add_special_tokens=False)
        tokens = tokenizer(text)
        assert tokens[0].tolist() == whole.ids
        assert tokens[1:].T.tolist() == [list(place) for place in whole.offsets]


def test_tokens_of_pieces_are_those_of_the_text(given: dict[str, Any]) -> None:
    for plain in (backend(given), of_gemma(given)):
        assert find_cuts(plain)
        require_same(plain)


def test_tokens_of_decoders_that_are_not_known_are_placed_by_the_tokenizer(given: dict[str, Any]) -> None:
    assert find_words(backend(given)) is not None
    assert find_words(of_gemma(given)) is not None
    fused = backend(given, decoder={"type": "Sequence", "decoders": [given["decoder"], {"type": "Fuse"}]})
    by_bytes = given["pre_tokenizer"]["pretokenizers"][-1]
    trimmed = backend(given, pre_tokenizer=by_bytes, post_processor=by_bytes | {"trim_offsets": True})
    for unknown in (fused, trimmed):
        assert find_words(unknown) is None
        require_same(unknown)


def test_what_was_forgotten_is_tokenized_again(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "_ROOM", 1000)
    require_same(backend(given))


def added(given: dict[str, Any], content: str, **changes: object) -> dict[str, Any]:
    """The tokens with another one, or with changes to the one that is there."""
    tokens = {token["content"]: token for token in given["added_tokens"]}
    plain = {"id": 300, "content": content, "special": False} | dict.fromkeys(
        ("single_word", "lstrip", "rstrip", "normalized"), False
    )
    return {"added_tokens": [*(tokens | {content: tokens.get(content, plain) | changes}).values()]}


@pytest.mark.parametrize("content", ["<|turn>model", "x<|turn>", "x<", "|><|tu", "<turn|"])
def test_a_token_that_may_take_the_place_of_one_of_gemmas_forbids_cuts(given: dict[str, Any], content: str) -> None:
    poisoned = backend(given, **added(given, content))
    is_harmless = content == "<turn|"  # what begins at the same place is taken where it is longest
    assert (find_cuts(poisoned) is not None) == is_harmless
    require_same(poisoned)


@pytest.mark.parametrize("token", ["<|turn>", '<|"|>', "model"])
@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_a_token_that_looks_around_forbids_cuts(given: dict[str, Any], token: str, flag: str) -> None:
    poisoned = backend(given, **added(given, token, **{flag: True}))
    assert find_cuts(poisoned) is None


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}]}},
        {"post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"added_tokens": []},
    ],
)
def test_parts_that_may_look_beyond_a_piece_forbid_cuts(given: dict[str, Any], parts: dict[str, object]) -> None:
    assert find_cuts(backend(given, **parts)) is None


def test_gemmas_tokens_that_are_not_always_taken_forbid_cuts(given: dict[str, Any]) -> None:
    normalized = backend(given, **added(given, "<|turn>", normalized=True))
    as_text = backend(given)
    as_text.encode_special_tokens = True
    by_chance = backend(given, model=given["model"] | {"dropout": 0.5})
    assert [find_cuts(one) for one in (normalized, as_text, by_chance)] == [None] * 3


# ---- within the pieces -----------------------------------------------------------------------------------------------


def test_words_are_tokenized_by_themselves_where_no_token_holds_the_beginning_of_one(given: dict[str, Any]) -> None:
    plain = of_gemma(given)
    words, parts = find_word_cuts(plain)
    assert words.findall("the  mode\n\n x<1 ") == ["the", "  mode", "\n\n", " x<1", " "]
    assert parts.findall(" mode.x-1:the") == [" mode", ".", "x", "-1:", "the"]
    require_same(plain, 2000)


@pytest.mark.parametrize(
    ("merge", "num_cuts"),
    [
        ("> ▁", 2),  # a blank behind another sign
        ("> ▁|> ▁<", 2),
        ("x ▁|x▁ th", 2),
        ("▁ ▁|▁▁ x", 2),
        ("< x", 2),  # a letter and another sign
        ("x >|< x>", 2),
        ("1 x|x 2", 2),
        ("é x", 2),
        ("\n \n", 2),
        ("\n x", 0),  # a line's end and anything else
        ("x \n", 0),
        ("\n ▁", 0),
    ],
)
def test_words_that_a_token_holds_together_are_not_parted(given: dict[str, Any], merge: str, num_cuts: int) -> None:
    joining = of_gemma(given, *merge.split("|"))
    assert len(find_word_cuts(joining)) == num_cuts
    require_same(joining, 1000)
    tokenizer = TextTokenizer(joining)
    text = f" the {merge.replace(' ', '').replace('|', ' ')} x".replace("▁", " ")
    assert tokenizer(text)[0].tolist() == joining.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("content", ["x y", "> <", "a\nb", " x", "x>", "é", "1x", "▁▁", "x▁y"])
@pytest.mark.parametrize("normalized", [False, True])
def test_added_tokens_are_not_parted(given: dict[str, Any], content: str, normalized: bool) -> None:
    tokens = json.loads(of_gemma(given).to_str())
    last = max(token["id"] for token in tokens["added_tokens"])
    new = tokens["added_tokens"][0] | {"id": 1000 + last, "content": content, "normalized": normalized}
    tokens["added_tokens"].append(new)
    poisoned: Any = Tokenizer.from_str(json.dumps(tokens))
    require_same(poisoned, 500)
    text = f"the {content} mode{content}x {content}".replace("▁", " ")
    assert TextTokenizer(poisoned)(text)[0].tolist() == poisoned.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "changes", [{"continuing_subword_prefix": "##"}, {"end_of_word_suffix": "</w>"}, {"ignore_merges": True}]
)
def test_models_that_look_at_where_a_word_stands_are_not_cut_within(given: dict[str, Any], changes: Any) -> None:
    marked = of_gemma(given)
    for name, value in changes.items():
        setattr(marked.model, name, value)
    assert find_word_cuts(marked) == []


@pytest.mark.parametrize("merge", ["a <0x3F>", "<0x51> <0x3F>", "<0xA9> ▁"])
def test_bytes_that_are_joined_forbid_cuts_of_words(given: dict[str, Any], merge: str) -> None:
    """Such a token says what it looks like, and no byte."""
    assert find_word_cuts(of_gemma(given, merge)) == []
    with pytest.raises(DataError, match="makes ids of this row that say"):
        TextTokenizer(of_gemma(given, "a <0x3F>"))("a?")


def test_words_of_a_model_without_bytes_are_those_of_the_text_or_refused(given: dict[str, Any]) -> None:
    without_bytes = of_gemma(given, byte_fallback=False)
    tokenizer = TextTokenizer(without_bytes)
    assert find_word_cuts(without_bytes)
    num_refused = 0
    for text in texts(300):
        whole = without_bytes.encode(text, add_special_tokens=False).ids
        try:
            assert tokenizer(text)[0].tolist() == whole
        except DataError:  # of a token that says nothing
            assert without_bytes.decode(whole, skip_special_tokens=False) != text
            num_refused += 1
    assert 0 < num_refused < 300
