"""What encoding asks of a processor, without the processor: importing transformers' and torch takes 600 MB and seven
seconds of every process, and of both nothing is needed but a tokenizer, a template and a little arithmetic.

    encoder = load_plain_encoder(model, settings)       # torch comes and goes with a process of its own
    encoder.encode(trajectory)                          # as `load_encoder`'s, to the bit; it makes no pixels
"""

import json
import math
import multiprocessing
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from gemma_dist.config import EncodingConfig
from gemma_dist.data.encode import Encoder, load_encoder
from gemma_dist.data.types import BackendTokenizer, Processor, Tool
from gemma_dist.errors import CheckpointError


@dataclass(frozen=True)
class PlainTokenizer:
    """A fast tokenizer without transformers around it."""

    backend_tokenizer: BackendTokenizer
    special_tokens_map: dict[str, str]


@dataclass(frozen=True)
class PlainImageProcessor:
    """The settings of an image processor."""

    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As the image processor's own."""
        return self.settings


@dataclass(frozen=True)
class PlainSoftTokens:
    """As a processor's `MultiModalData`."""

    num_image_tokens: list[int]


@dataclass
class PlainProcessor:
    """What of a `Gemma4Processor` or `Gemma4UnifiedProcessor` decides token ids and labels."""

    tokenizer: PlainTokenizer
    image_processor: PlainImageProcessor
    chat_template: str
    image_token_id: int
    boi_token: str
    eoi_token: str

    def apply_chat_template(
        self, conversation: list[dict[str, object]], *, tools: list[Tool] | None, tokenize: bool, **settled: bool
    ) -> str:
        """The messages as one string, rendered in transformers' sandbox: a template that is not known."""
        from transformers.utils.chat_template_utils import render_jinja_template

        assert not tokenize
        given = {**self.tokenizer.special_tokens_map, **settled}
        rendered, _ = render_jinja_template([conversation], tools, chat_template=self.chat_template, **given)
        return str(rendered[0])

    def _get_num_multimodal_tokens(self, *, image_sizes: list[tuple[int, int]]) -> PlainSoftTokens:
        settings = self.image_processor.settings
        limits = settings["patch_size"], settings["pooling_kernel_size"], settings["max_soft_tokens"]
        return PlainSoftTokens([soft_tokens(*size, *limits) for size in image_sizes])


def soft_tokens(height: int, width: int, patch_size: int, pooling_kernel_size: int, max_soft_tokens: int) -> int:
    """Soft tokens of an image of `height` x `width` pixels, each a square of `pooling_kernel_size` patches of
    `patch_size` pixels a side: as many as fit the budget while the image keeps its shape.

    As transformers' `processing_gemma4.get_aspect_ratio_preserving_size` has it.
    """
    side = patch_size * pooling_kernel_size
    scale = math.sqrt(max_soft_tokens * pooling_kernel_size**2 * patch_size**2 / (height * width))
    rows, columns = math.floor(scale * height / side), math.floor(scale * width / side)
    if rows == 0:
        return min(width // height, max_soft_tokens)
    if columns == 0:
        return min(height // width, max_soft_tokens)
    return rows * columns


def plain_encoder(encoder: Encoder) -> Encoder:
    """The encoder around what its processor says, which can be sent to another process."""
    processor = encoder.processor
    settings = json.dumps(processor.image_processor.to_dict(), default=str)  # as the fingerprint takes them
    plain = PlainProcessor(
        PlainTokenizer(processor.tokenizer.backend_tokenizer, dict(processor.tokenizer.special_tokens_map)),
        PlainImageProcessor(json.loads(settings)),
        processor.chat_template,
        processor.image_token_id,
        processor.boi_token,
        processor.eoi_token,
    )
    return Encoder(
        cast(Processor, plain), enable_thinking=encoder.enable_thinking, model_template=encoder.model_template
    )


def load_plain_encoder(model: str, settings: EncodingConfig) -> Encoder:
    """As `load_encoder`, but for pixels. Where this process has not imported torch, it does not do so here either.

    Raises:
        CheckpointError, ConfigError: as `load_encoder`.
    """
    if "torch" in sys.modules:
        return _load(model, settings)
    context, end = multiprocessing.get_context("spawn"), (signal.SIGINT, signal.SIG_DFL)
    with without_script(), ProcessPoolExecutor(1, context, initializer=signal.signal, initargs=end) as pool:
        try:
            return pool.submit(_load, model, settings).result()
        except BrokenProcessPool:
            raise CheckpointError(
                f"the process that loaded the processor of {model!r} was killed, most often for want of memory: about "
                "1 GB has to be free"
            ) from None


@contextmanager
def without_script() -> Iterator[None]:
    """Within, spawned processes do not begin with the user's script, as `multiprocessing` has it: what they are to do
    is ours, and a script without `if __name__ == "__main__"` would do its work anew in each of them, or fail."""
    main = vars(sys.modules["__main__"])
    kept: dict[str, Any] = {name: main[name] for name in ("__file__", "__spec__") if name in main}
    main.pop("__file__", None)
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(kept)


def _load(model: str, settings: EncodingConfig) -> Encoder:
    return plain_encoder(load_encoder(model, settings))
