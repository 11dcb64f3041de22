"""Gemma 4's own vocabulary, where somebody has it: no hub is asked for it.

llama.cpp keeps it for its tests, with texts and the ids that they have (`models/ggml-vocab-gemma-4.gguf`, `.inp` and
`.out`), and the source distribution of llama-cpp-python has all of llama.cpp:

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36
    tar xzf llama_cpp_python-*.tar.gz --wildcards --strip-components=4 '*/models/ggml-vocab-gemma-4.gguf*'
    GEMMA4_VOCABULARY=$PWD/ggml-vocab-gemma-4.gguf python -m pytest tests/test_vocabulary.py
"""

import os
from pathlib import Path
from typing import Any

from gemma_dist.data.gguf import read_metadata

VARIABLE = "GEMMA4_VOCABULARY"
CONTROL, USER_DEFINED = 3, 4  # types of tokens, as llama.cpp numbers them


def find_vocabulary() -> Path | None:
    """The file that the environment names."""
    return Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None


def with_vocabulary(given: dict[str, Any], gguf: Path) -> dict[str, Any]:
    """A `tokenizer.json` with the words, merges and added tokens of a GGUF file, and the parts that Gemma's has."""
    said = {key.removeprefix("tokenizer.ggml."): value for key, value in read_metadata(gguf).items()}
    model = {
        "type": "BPE",
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": {token: number for number, token in enumerate(said["tokens"])},
        "merges": [merge.split(" ") for merge in said["merges"]],
    }
    kinds = enumerate(zip(said["tokens"], said["token_type"], strict=True))
    numbers = {token: number for number, (token, kind) in kinds if kind in (CONTROL, USER_DEFINED)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    added = [{"id": number, "content": token} | flags for token, number in numbers.items()]
    return given | of_gemma(model) | {"added_tokens": added}


def of_gemma(model: dict[str, Any]) -> dict[str, Any]:
    """The parts of a `tokenizer.json` as in that of google/gemma-4-*, around a model: blanks are ▁, there is no other
    cut before the merges, and what is no token becomes bytes."""
    blank = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    decoders = [blank | {"pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    decoder = {"type": "Sequence", "decoders": decoders}
    return {"model": model, "normalizer": blank, "pre_tokenizer": split, "decoder": decoder, "post_processor": None}
