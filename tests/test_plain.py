"""Encoding without transformers and torch: the same to the bit, and really without."""

import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_dist.config import EncodingConfig, RowConfig
from gemma_dist.data.encode import Encoder, load_encoder
from gemma_dist.data.plain import plain_encoder, soft_tokens
from gemma_dist.data.trajectory import Trajectory, parse_row
from gemma_dist.errors import DataError
from tests.support.corpus import row, write_rows

WITH_PICTURE, WITH_TOOLS = 3, 1  # numbers of rows


def sent(encoder: Encoder) -> Encoder:
    """The plain encoder as it arrives at another process."""
    arrived: Encoder = pickle.loads(pickle.dumps(plain_encoder(encoder)))
    return arrived


def trajectories() -> list[Trajectory]:
    rows = [row(number, num_calls=2) for number in (WITH_PICTURE, WITH_TOOLS)]
    return [parse_row(one, "rows.jsonl:1", RowConfig()) for one in rows]


@pytest.mark.parametrize("style", ["e4b", "12b"])
@pytest.mark.parametrize("template", [None, "gemma4_v2", "of a stranger"])
def test_ids_labels_and_fingerprint_are_those_of_the_processor(
    style: str, template: str | None, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    if template == "of a stranger":  # rendered in the sandbox
        given = (tiny_model(style) / "chat_template.jinja").read_text() + "{# mine #}"
        (tmp_path / "own.jinja").write_text(given)
        template = str(tmp_path / "own.jinja")
    encoder = load_encoder(str(tiny_model(style)), EncodingConfig(chat_template=template))
    plain = sent(encoder)
    assert plain.fingerprint == encoder.fingerprint
    assert plain.lost_opening() == encoder.lost_opening()
    for trajectory in trajectories():
        encoded = encoder.encode(trajectory)
        assert encoded.num_image_tokens or not trajectory.images
        assert plain.encode(trajectory) == encoded


@pytest.mark.parametrize("style", ["e4b", "12b"])
def test_soft_tokens_are_those_of_the_processor(style: str, tiny_model: Callable[..., Path]) -> None:
    processor: Any = load_encoder(str(tiny_model(style)), EncodingConfig()).processor
    rng = random.Random(0)
    sizes = [(rng.randint(1, 3000), rng.randint(1, 3000)) for _ in range(2000)]
    sizes += [(1, 1), (1, 5000), (5000, 1), (48, 48), (768, 768), (1, 300), (9, 4000), (1080, 1920)]
    images = processor.image_processor
    for max_soft_tokens in (70, 280, 1120):
        images.max_soft_tokens = max_soft_tokens
        expected = processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
        settings = (images.patch_size, images.pooling_kernel_size, max_soft_tokens)
        assert [soft_tokens(*size, *settings) for size in sizes] == expected


def test_what_a_template_refuses_is_refused_as_the_processor_does(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "own.jinja").write_text("{{ ''.__class__.__mro__ }}{{- raise_exception('no such luck') -}}")
    encoder = load_encoder(str(tiny_model()), EncodingConfig(chat_template=str(tmp_path / "own.jinja")))
    errors = []
    for each in (encoder, sent(encoder)):
        with pytest.raises(DataError, match="unsafe") as caught:
            each.encode(trajectories()[1])
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


# Every process of a run says on its way out what it has imported.
AT_EXIT = """
import atexit, os, sys
def say():
    found = [name for name in ("torch", "transformers", "gemma_dist.data.encode") if name in sys.modules]
    open(os.path.join(os.environ["SAID"], str(os.getpid())), "w").write(" ".join(found))
atexit.register(say)
"""
# A script as people write it: without `if __name__ == "__main__"`, no other process may begin with it.
MAIN = """
import sys
from pathlib import Path
from gemma_dist.config import ShardConfig
from gemma_dist.shards import sharding
sharding.PIECE_BYTES = 6000
rows, out, model = map(Path, sys.argv[1:])
report = sharding.run_shard([rows], out, str(model), ShardConfig(), False, num_workers=2)
print(report.num_written)
"""


def test_no_process_that_shards_imports_torch_but_the_one_that_loads_the_processor(model: str, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [row(number) for number in range(12)])  # pictures among them
    for name, text in (("sitecustomize", AT_EXIT), ("main", MAIN)):
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "said").mkdir()
    paths = [str(tmp_path), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "SAID": str(tmp_path / "said")}
    command = [sys.executable, str(tmp_path / "main.py"), str(source), str(tmp_path / "out"), model]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "12\n", done.stderr
    said = sorted(path.read_text() for path in (tmp_path / "said").iterdir())
    assert said == [
        "",  # multiprocessing's tracker of resources
        *["gemma_dist.data.encode"] * 3,  # the run and its two workers
        "torch transformers gemma_dist.data.encode",
    ]
