"""One trajectory as the model sees it: token ids from the chat template, and labels on what the model itself emits.

The ids are exactly those of `processor.apply_chat_template`, but for what a generation prompt alone shows (served.py).
The labels need no marks in the template: the rendered text is walked message by message, and every piece of an
assistant message must be found where the template put it. A template that loses a piece, an image or a turn is
therefore refused, never used silently.

What the model emits in one assistant message, and so what is trained:

    reasoning   <|channel>thought\n … <channel|>
    text
    calls       <|tool_call>call:NAME{…}<tool_call|> …, then the stop token: the first <|tool_response>
    the end     <turn|>

Never trained: system and user turns, tool responses, images, the later <|tool_response> of parallel calls.
"""

import copy
import functools
import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from gemma_dist.config import EncodingConfig
from gemma_dist.data.against_known import Added, compare, count_added
from gemma_dist.data.content import count_images
from gemma_dist.data.emitted import NEWER_TEMPLATE, Emitted, find_emitted
from gemma_dist.data.encoded import Encoded
from gemma_dist.data.images import decode_image, image_size
from gemma_dist.data.kinds import kinds_of_characters
from gemma_dist.data.processor_files import require_image_settings, why_no_processor
from gemma_dist.data.served import NO_THOUGHT, as_served, decision_points, is_target, opening_of
from gemma_dist.data.strict import holds_null, reason
from gemma_dist.data.templates import LOST_OPENING, known_template, newest_known, read_template, render, say_if_unknown
from gemma_dist.data.tokenize import TextTokenizer, require_tokens
from gemma_dist.data.trajectory import Trajectory
from gemma_dist.data.types import Message, Processor, Tokenizer, Tool, ToolCall
from gemma_dist.errors import CheckpointError, DataError, setting
from gemma_dist.gemma_format import IMAGE
from gemma_dist.model.folder import embedding_rows, refuse_custom_code, require_embeddings

if TYPE_CHECKING:
    import torch

# Part of the fingerprint: raise it when ids, labels or pixels of the same row change by a change of this file
# or of images.py.
ENCODING_VERSION = 2


@dataclass(frozen=True)
class Prompt:
    """A decision point: everything before one assistant turn, ending where the model begins to write."""

    input_ids: list[int]  # (T,)
    mm_token_type_ids: list[int]  # (T,)
    images: list[bytes]  # those that the prompt shows, in order
    text: str  # the rendered prompt, one placeholder an image: its end tells which block is left open
    turn: int  # number of the first message that answers it, from 1 as in errors
    gold: list[Message]  # the assistant message that answers it, or several in a row


@dataclass(frozen=True)
class _Rendered:
    text: str  # with a placeholder for each soft token of an image
    image_lengths: list[int]  # (N,) soft tokens of each image
    emitted: Emitted
    thinking: bool
    added: list[Added]  # by a template that is not known


class Encoder:
    """A processor, its chat template and what was settled about rendering: trajectories in, tokens and pixels out."""

    def __init__(
        self,
        processor: Processor,
        *,
        enable_thinking: Literal["auto", True, False] = "auto",
        model_template: str | None = None,
    ) -> None:
        """`model_template` is the model's own, where the processor was given another one."""
        self.processor = processor
        self.model_template = model_template
        self.tokenizer: Tokenizer = processor.tokenizer
        self.enable_thinking = enable_thinking
        self.image_token_id = processor.image_token_id

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides ids, labels and pixels: shards and runs of another one do not mix."""
        tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for leftover in ("padding", "truncation"):  # of its last call
            tokenizer.pop(leftover, None)
        settled = {
            "version": ENCODING_VERSION,
            "chat_template": self.processor.chat_template,
            "enable_thinking": self.enable_thinking,
            "tokenizer": tokenizer,
            "image_processor": self.processor.image_processor.to_dict(),
        }
        return hashlib.sha256(json.dumps(settled, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def encode(self, trajectory: Trajectory) -> Encoded:
        """Token ids and labels of a whole trajectory.

        Raises:
            DataError: the chat template loses or tears a part of this row, or the tokenizer changes it; the message
                says which and what to do.
        """
        rendered = self._render_whole(trajectory)
        served = as_served(
            rendered.text,
            rendered.emitted,
            trajectory.messages,
            self.openings[rendered.thinking],
            thinking=rendered.thinking,
        )
        ids, starts, ends = self._tokens_of(served.text)
        of_characters = np.frombuffer(kinds_of_characters(served.text, served.spans), np.uint8)
        num_untrained = np.zeros(len(of_characters) + 1, np.int32)  # of the characters in front of each
        np.cumsum(of_characters == 0, out=num_untrained[1:])
        is_trained = num_untrained[np.maximum(ends, starts + 1)] == num_untrained[starts]
        return Encoded(
            token_ids=ids.tobytes(),
            kinds=(of_characters[starts] * is_trained).tobytes(),
            is_soft_token=(ids == self.image_token_id).tobytes(),
            num_images=len(trajectory.images),
            num_dropped_reasoning=rendered.emitted.num_dropped_reasoning,
            enable_thinking=rendered.thinking,
            answers=[(index, int(np.searchsorted(starts, start))) for index, start in served.starts],
            notes=served.notes + count_added(rendered.added),
            added=rendered.added,
        )

    def prompts(self, trajectory: Trajectory) -> list[Prompt]:
        """Every decision point of a trajectory: each trained assistant turn with the true history before it, rendered
        as a server would render it at that moment.

        Raises:
            DataError: as `encode`.
        """
        whole = self._render_whole(trajectory)  # a history that the template tears is no prompt
        prompts = []
        for index, gold in decision_points(trajectory.messages):
            text, input_ids = self.generation_prompt(trajectory, index, whole.image_lengths, thinking=whole.thinking)
            num_images = sum(map(count_images, trajectory.messages[:index]))
            prompts.append(
                Prompt(
                    input_ids=input_ids,
                    mm_token_type_ids=[int(token == self.image_token_id) for token in input_ids],
                    images=trajectory.images[:num_images],
                    text=text,
                    turn=index + 1,
                    gold=gold,
                )
            )
        return prompts

    def thinks(self, trajectory: Trajectory) -> bool:
        """Whether a trajectory is rendered with thinking on. Raises DataError as `encode`."""
        return self._render_whole(trajectory).thinking

    def generation_prompt(
        self, trajectory: Trajectory, index: int, image_lengths: list[int], *, thinking: bool
    ) -> tuple[str, list[int]]:
        """What a server puts in front of message `index`, as text with one placeholder an image, and as token ids.

        Raises:
            DataError: the chat template cannot render the history, or loses images of it.
        """
        history = trajectory.messages[:index]
        text = self._render(history, trajectory.tools, thinking=thinking, add_generation_prompt=True)
        num_images = sum(map(count_images, history))
        _require_images(text, num_images)
        widened = self._widen(text, image_lengths[:num_images])
        return text, self._tokens_of(widened)[0].tolist()

    @functools.cached_property
    def _tokens_of(self) -> TextTokenizer:
        return TextTokenizer(self.tokenizer.backend_tokenizer)

    @functools.cached_property
    def openings(self) -> Mapping[bool, Mapping[str, str]]:
        """What this template's generation prompts open behind a message of each role, with thinking off and on."""
        user: Message = {"role": "user", "content": "x"}
        call: ToolCall = {"id": "call_0", "type": "function", "function": {"name": "f", "arguments": {}}}
        calling: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
        result: Message = {"role": "tool", "content": "x", "tool_call_id": "call_0", "name": "f"}
        found: dict[bool, dict[str, str]] = {False: {}, True: {}}
        for thinking, openings in found.items():
            for history in ([user], [user, calling, result]):
                with suppress(DataError):  # rows that have such a history will say it
                    prompt = self._render(history, thinking=thinking, add_generation_prompt=True)
                    openings[history[-1]["role"]] = opening_of(prompt)
        return found

    def lost_opening(self) -> str | None:
        """What to say where the model's own template opens an empty thought in its prompts, and the one taken does
        not; None where there is nothing to say."""
        if self.model_template is None or NO_THOUGHT in self.openings[False].values():
            return None
        processor = copy.copy(self.processor)
        processor.chat_template = self.model_template
        return LOST_OPENING if NO_THOUGHT in Encoder(processor).openings[False].values() else None

    def count_soft_tokens(self, images: list[bytes]) -> list[int]:
        """Soft tokens of each image: the processor's own arithmetic, from the sizes alone."""
        if not images:
            return []
        sizes = [image_size(data) for data in images]
        try:
            return self.processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
        except ValueError as error:
            raise DataError(f"an image of (height, width) in {sizes} cannot be cut into patches: {error}") from error

    def pixels(self, images: list[bytes]) -> "dict[str, torch.Tensor]":
        """Images as the model takes them: `pixel_values` (N, P, values of a patch) and `image_position_ids` (N, P, 2),
        P the patches of the largest budget (position -1 where there is none). At least one image is needed."""
        import torch

        process = self.processor.image_processor  # one by one: decoded, a large image takes hundreds of megabytes
        one_by_one = [process(images=[decode_image(data)], return_tensors="pt") for data in images]
        return {name: torch.cat([one[name] for one in one_by_one]) for name in ("pixel_values", "image_position_ids")}

    def _render(
        self,
        messages: list[Message],
        tools: list[Tool] | None = None,
        *,
        thinking: bool = False,
        add_generation_prompt: bool = False,
        template: str | None = None,
    ) -> str:
        shown = [{key: value for key, value in message.items() if key != "train"} for message in messages]
        settled = {"add_generation_prompt": add_generation_prompt, "enable_thinking": thinking}
        given = {"messages": shown, "tools": tools or None, "documents": None, **settled}
        try:  # a tokenizer may have a token of any name, such as `tools`
            return render(template or self.processor.chat_template, self.tokenizer.special_tokens_map | given)
        except Exception as error:  # a template may raise anything: jinja's own errors, or its raise_exception
            raise DataError(f"the chat template cannot render this row: {reason(error)}. {NEWER_TEMPLATE}") from error

    def _render_whole(self, trajectory: Trajectory) -> "_Rendered":
        """All messages as one string, with each image as wide as the model sees it, and with thinking on or off as the
        row says, or the setting, or (auto) its thoughts: on where the template shows one that is trained.

        Raises:
            DataError: the template garbles a message or loses a part of one.
        """
        self._refuse_garbled(trajectory)
        lengths = self.count_soft_tokens(trajectory.images)
        settled = self.enable_thinking if trajectory.enable_thinking is None else trajectory.enable_thinking
        if settled != "auto":
            return self._render_with(trajectory, lengths, settled)
        thoughts = {index for index, message in enumerate(trajectory.messages) if _is_trained_thought(message)}
        if thoughts:
            rendered = self._render_with(trajectory, lengths, thinking=True)
            if thoughts & rendered.emitted.with_reasoning:
                return rendered
        return self._render_with(trajectory, lengths, thinking=False)

    def _render_with(self, trajectory: Trajectory, image_lengths: list[int], thinking: bool) -> "_Rendered":
        text = self._render(trajectory.messages, trajectory.tools, thinking=thinking)
        _require_images(text, len(trajectory.images))
        widened = self._widen(text, image_lengths)
        emitted, added = find_emitted(widened, trajectory.messages), []
        if known_template(self.processor.chat_template) is None:
            known = self._render(trajectory.messages, trajectory.tools, thinking=thinking, template=newest_known())
            added = compare(widened, emitted, self._widen(known, image_lengths), trajectory)
        return _Rendered(widened, image_lengths, emitted, thinking, added)

    def _widen(self, text: str, counts: list[int]) -> str:
        """Rendered text with each image placeholder widened to the soft tokens of its image, as the processor does
        it."""
        first, *pieces = text.split(IMAGE)
        boi, eoi = self.processor.boi_token, self.processor.eoi_token
        return first + "".join(boi + IMAGE * count + eoi + piece for count, piece in zip(counts, pieces, strict=True))

    def _refuse_garbled(self, trajectory: Trajectory) -> None:
        """Refuse what an old template would write as Python prints it."""
        for turn, message in enumerate(trajectory.messages, start=1):
            if message["role"] == "system" and isinstance(message["content"], list) and self._garbles_system_parts:
                raise DataError(
                    f"turn {turn}: this chat template writes a system message of several parts as a Python list. "
                    f"{NEWER_TEMPLATE}, or make it one string"
                )
            for call in message.get("tool_calls", []):
                if holds_null(call["function"]["arguments"]) and self._garbles_null:
                    raise DataError(
                        f"turn {turn} calls {call['function']['name']!r} with a null argument, which this chat "
                        f"template writes as Python's None. {NEWER_TEMPLATE}"
                    )

    @functools.cached_property
    def _garbles_system_parts(self) -> bool:
        system: Message = {"role": "system", "content": [{"type": "text", "text": ""}]}
        return "'type'" in self._render([system, {"role": "user", "content": ""}])

    @functools.cached_property
    def _garbles_null(self) -> bool:
        call: ToolCall = {"id": "call_0", "type": "function", "function": {"name": "f", "arguments": {"x": None}}}
        model: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
        return "{x:None}" in self._render([{"role": "user", "content": ""}, model])


def _is_trained_thought(message: Message) -> bool:
    return is_target(message) and "reasoning_content" in message


def _require_images(text: str, num_images: int) -> None:
    if text.count(IMAGE) != num_images:
        raise DataError(
            f"the chat template renders {text.count(IMAGE)} of the row's {num_images} images: it loses images that "
            f"tools return. {NEWER_TEMPLATE}"
        )


def load_encoder(model: str, settings: EncodingConfig, *, adapter: Path | None = None) -> Encoder:
    """The encoder of a model folder (or hub name) that renders as `settings` say.

    Args:
        adapter: a folder whose processor is taken instead, where it has one: training may have changed it.

    Raises:
        CheckpointError: there is no Gemma 4 processor; it wants to run code of its own; its tokenizer has more tokens
            than the model's embeddings have rows, or other words for Gemma's tokens.
        ConfigError: the template is neither a shipped name nor a file, or none that Jinja reads.
    """
    from transformers import AutoProcessor, Gemma4Processor, Gemma4UnifiedProcessor

    folder = str(adapter) if adapter and (adapter / "processor_config.json").is_file() else model
    refuse_custom_code(folder)
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        rows = embedding_rows(model)
    except Exception as error:  # of damaged files: what Rust cannot parse is a bare Exception, a list a TypeError
        if not Path(folder).exists():
            raise CheckpointError(f"{folder!r} is neither a folder nor a model that the hub gives: {error}") from error
        raise CheckpointError(why_no_processor(folder, model, error)) from error
    if not isinstance(processor, Gemma4Processor | Gemma4UnifiedProcessor):
        raise CheckpointError(f"{folder!r} holds a {type(processor).__name__}, not a Gemma 4 processor")
    require_embeddings(processor.tokenizer, rows, tokenizer_of=folder, model=model)
    require_tokens(processor, folder)
    require_image_settings(processor, folder)
    model_template = None
    if isinstance(processor.chat_template, dict):  # several, by name
        processor.chat_template = processor.chat_template.get("default")
    if settings.chat_template is not None:
        model_template = processor.chat_template
        processor.chat_template = read_template(settings.chat_template)
    if processor.chat_template is None:
        raise CheckpointError(
            f"{folder!r} has no chat template, as a base checkpoint that was never tuned to chat: use "
            f"{setting('chat_template', 'FILE')} with the chat_template.jinja of its -it sister, or "
            f"{setting('chat_template', 'gemma4_v5')}, which is that of E2B and E4B"
        )
    say_if_unknown(processor.chat_template)
    return Encoder(processor, enable_thinking=settings.enable_thinking, model_template=model_template)
