"""Rows with Gemma 4's own vocabulary of 262,144 tokens: skipped where it is not (`support/vocabulary.py`)."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from gemma_dist.config import EncodingConfig, ShardConfig
from gemma_dist.data.cuts import find_word_cuts
from gemma_dist.data.encode import Encoder, load_encoder
from gemma_dist.data.rows import read_rows
from gemma_dist.data.tokenize import TextTokenizer
from gemma_dist.data.trajectory import parse_row
from gemma_dist.model.tiny import tiny_processor
from tests.support.vocabulary import VARIABLE, find_vocabulary, with_vocabulary

VOCABULARY = find_vocabulary()
pytestmark = pytest.mark.skipif(VOCABULARY is None, reason=f"{VARIABLE} names no ggml-vocab-gemma-4.gguf of llama.cpp")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    assert VOCABULARY
    folder: Path = tmp_path_factory.mktemp("vocabulary")
    tiny_processor(["x"], style="e4b", vocab_size=1000, chat_template=None).save_pretrained(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(with_vocabulary(json.loads(path.read_text()), VOCABULARY)))
    return load_encoder(str(folder), EncodingConfig())


def test_texts_have_the_ids_that_llama_cpp_lists(encoder: Encoder) -> None:
    assert VOCABULARY
    texts = VOCABULARY.with_name(f"{VOCABULARY.name}.inp").read_text().split("\n__ggml_vocab_test__\n")
    lines = VOCABULARY.with_name(f"{VOCABULARY.name}.out").read_text().split("\n")
    tokenizer = TextTokenizer(encoder.tokenizer.backend_tokenizer)
    assert len(texts) > 40
    for text, line in zip(texts, lines, strict=False):
        assert tokenizer(text)[0].tolist() == [*map(int, line.split())]


def test_words_are_cut_at_blanks_lines_and_signs(encoder: Encoder) -> None:
    words, parts = find_word_cuts(encoder.tokenizer.backend_tokenizer)
    assert words.findall("It's 7 C\n\n  in> <Oslo") == ["It's", " 7", " C", "\n\n", "  in> <Oslo"]
    assert parts.findall("call:get_weather{city:") == ["call", ":", "get", "_", "weather", "{", "city", ":"]
    assert parts.findall("a<td>b") == ["a", "<td>", "b"], "tags of HTML are tokens"


def test_rows_have_the_tokens_of_the_processor(encoder: Encoder, shared: Path) -> None:
    backend: Any = encoder.tokenizer.backend_tokenizer
    whole = Tokenizer.from_str(backend.to_str())
    tokenizer = TextTokenizer(backend)
    names = ("toolcalls/train", "toolcalls/eval_multiturn", "multimodal/train")
    num_rows = 0
    for where, row in read_rows([shared / f"data/{name}.jsonl" for name in names]):
        text = encoder._render_whole(parse_row(row, where, ShardConfig())).text
        expected = whole.encode(text, add_special_tokens=False)
        ids, *places = tokenizer(text).tolist()
        assert ids == expected.ids
        assert list(zip(*places, strict=True)) == expected.offsets
        num_rows += 1
    assert num_rows > 1700
