"""A micro-batch asks a GPU for a bounded number of launches, counted on fakes of the models' true shapes."""

import pytest
from transformers import AutoConfig

from tests.support.launches import PACKS, of_attention
from tests.support.ranks import REPOSITORY

MOST = 1500  # launches of attention in a micro-batch of 4,096 tokens, layers recomputed
# Has 60 layers, each of which keeps a GPU busy for several times as long as one of E4B's.
MOST_OF_31B = 1750


@pytest.mark.parametrize("model", ["e2b", "e4b", "12b", "26b", "31b"])
@pytest.mark.parametrize("name", PACKS)
def test_attention_takes_few_launches_whatever_is_packed(model: str, name: str) -> None:
    text = AutoConfig.from_pretrained(f"{REPOSITORY}/tests/shapes/{model}.json").get_text_config()
    found = of_attention(text, PACKS[name], checkpointing=True)
    assert found["layers"] + found["once"] < (MOST_OF_31B if model == "31b" else MOST)
    assert found["calls"] >= text.num_hidden_layers
