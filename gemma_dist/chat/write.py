"""One answer of the model, shown as it is written: transformers' `generate`, with the stops of Gemma's tool calls."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from gemma_dist.config_chat import ChatConfig
from gemma_dist.data.encode import Encoder, Prompt
from gemma_dist.evaluate.generate import Answer
from gemma_dist.gemma_format import STOP_TOKENS

Show = Callable[[str], None]  # takes all that is written so far


class Writer:
    """A model that answers prompts."""

    def __init__(self, model: Any, encoder: Encoder, settings: ChatConfig) -> None:
        self._model, self._encoder = model, encoder
        own = model.generation_config.eos_token_id
        own = [] if own is None else own if isinstance(own, list) else [own]
        self._stops = {*encoder.tokenizer.convert_tokens_to_ids(list(STOP_TOKENS)), *own}
        self._how: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "do_sample": settings.temperature > 0}
        if settings.temperature > 0:
            self._how |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
        else:
            self._how |= {"temperature": None, "top_p": None, "top_k": None}  # those of the model are for sampling
        torch.manual_seed(settings.seed)

    def answer(self, prompt: Prompt, show: Show) -> Answer | None:
        """What the model writes behind a prompt; None where Ctrl-C stopped it."""
        written = _Written(self._encoder, show)
        inputs = {"input_ids": [prompt.input_ids], "mm_token_type_ids": [prompt.mm_token_type_ids]}
        tensors = {name: torch.tensor(ids) for name, ids in inputs.items()}
        tensors["attention_mask"] = torch.ones_like(tensors["input_ids"])
        pixels = self._encoder.pixels(prompt.images) if prompt.images else {}
        try:
            self._model.generate(
                **{name: tensor.to(self._model.device) for name, tensor in {**tensors, **pixels}.items()},
                **self._how,
                eos_token_id=sorted(self._stops),
                streamer=written,
            )
        except KeyboardInterrupt:
            return None
        return Answer(written.text, written.ids, written.ids[-1] in self._stops)


class _Written(BaseStreamer):
    """The tokens of an answer, as `generate` hands them over: first those of the prompt, then one at a time."""

    def __init__(self, encoder: Encoder, show: Show) -> None:
        self._encoder, self._show = encoder, show
        self._seen_prompt = False
        self.ids: list[int] = []
        self.text = ""

    def put(self, value: torch.Tensor) -> None:
        """Take the next tokens."""
        if not self._seen_prompt:
            self._seen_prompt = True
            return
        self.ids += value.reshape(-1).tolist()
        self.text = self._encoder.tokenizer.decode(self.ids)
        self._show(self.text.rstrip("\ufffd"))  # a character whose other bytes are still to come

    def end(self) -> None:
        """All is written."""
