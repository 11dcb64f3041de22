"""The content of a message: its text and image parts, and strings that are safe to render.

    "Rome?"                                                                     a string is one text
    {"type": "text", "text": "Rome?"}
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}}      OpenAI
    {"type": "image", "path": "a.png"}, {"type": "image", "base64": "…"}        Transformers' chat templates
    {"type": "image", "data": "…", "mimeType": "image/png"}                     MCP
    {"type": "image"}, {"type": "image", "index": 0}                            the image is in the row's `images`
    {"type": "thinking", "thinking": "…"}, {"type": "redacted_thinking", …}     of an assistant (reasoning.py)

What a tool's content may be besides is in results.py.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

from gemma_dist.data.marks import refuse_finer
from gemma_dist.data.reasoning import ENCRYPTED, ENCRYPTED_TYPES, PART_TYPES, read_part
from gemma_dist.data.strict import as_object, get, require_encodable, short, without, without_nulls
from gemma_dist.data.types import Clean, Content, Message, Part, RawRow
from gemma_dist.errors import DataError, setting
from gemma_dist.gemma_format import CONTROL_TOKENS

_CONTROL = re.compile("|".join(map(re.escape, CONTROL_TOKENS)))
IMAGE_KEYS = ("image", "image_url", "url", "path", "base64", "data", "bytes")
# Keys of an image part that say nothing of where the image is.
BESIDE_IMAGE = """
    type text index detail mimeType mime_type media_type format name id alt annotations _meta cache_control
    min_pixels max_pixels resized_height resized_width
""".split()  # noqa: SIM905
# Keys of a text part that say nothing beside its text.
BESIDE_TEXT = (
    *("type", "text", "index", "id", "annotations", "_meta", "meta", "metadata", "cache_control", "citations"),
    *("extras", "logprobs", "state", "providerOptions", "providerMetadata", "provider_options"),
)


@dataclass(frozen=True)
class ColumnIndex:
    """What an image part says that names its image by number, from 0: {"type": "image", "index": 0}."""

    number: object


@dataclass
class ParsedContent:
    """Content in normal form, and what came with it."""

    content: Content = ""
    image_sources: list[object] = field(default_factory=list)  # what each image part says of its image; None: nothing
    reasoning: list[str] = field(default_factory=list)  # of an assistant: the parts that it thought


def content_parts(content: Content) -> list[Part]:
    """The parts of a message's content; a string is one part."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def content_text(content: Content) -> str:
    """The text of all parts, as the template joins it, but not trimmed."""
    return "".join(part["text"] for part in content_parts(content) if part["type"] == "text")


def count_images(message: Message) -> int:
    """How many images a message shows."""
    return sum(part["type"] == "image" for part in content_parts(message["content"]))


def says_something(content: Content) -> bool:
    """Whether anything of the content is left once the template has trimmed it."""
    return any(part["type"] == "image" or part["text"].strip() for part in content_parts(content))


def clean_text(text: str, escape: bool) -> str:
    """The string, if it can be encoded and holds no control token; with `escape`, a zero-width space breaks them.

    Raises:
        DataError: it cannot be encoded, or holds a control token.
    """
    require_encodable(text)
    found = _CONTROL.search(text) if "<" in text else None
    if not found:
        return text
    if escape:
        return _CONTROL.sub(lambda token: f"{token[0][0]}\u200b{token[0][1:]}", text)
    around = text[max(0, found.start() - 20) : found.end() + 20]
    raise DataError(
        f"the control token {found[0]} stands in {short(around)}; the model would read it as structure: "
        f"remove it or use {setting('control_tokens', 'escape')}"
    )


def parse_content(given: object, clean: Clean, notes: Counter[str]) -> ParsedContent:
    """Content in normal form: a string, or parts of which no two texts are neighbors.

    The chat template trims each text, so that of "Hello " and "world" it would make "Helloworld": they are joined here.

    [{"type": "text", "text": "See "}, {"type": "text", "text": "this:"}, {"type": "image_url", "image_url": "a.png"}]
        ->  [{"type": "text", "text": "See this:"}, {"type": "image"}], and the image's source "a.png"

    Raises:
        DataError: it is no string or list of parts, or a part is of an unknown kind.
    """
    if given is None or given == []:
        return ParsedContent()
    if isinstance(given, str):
        return ParsedContent(clean(given))
    if not isinstance(given, list):
        raise DataError(
            f"the content is {short(given)} ({type(given).__name__}); write it as a string, such as its JSON"
        )
    parsed = ParsedContent()
    parts: list[Part] = []
    for part in given:
        kind = get(part, "type")
        refuse_finer(as_object(part), "a part")
        if kind == "text":
            _add_text(parts, _part_text(part))
        elif kind in ("image", "image_url"):
            parts.append({"type": "image"})
            parsed.image_sources.append(image_source(part))
        elif kind in ENCRYPTED_TYPES:
            notes[ENCRYPTED] += 1
        elif kind in PART_TYPES:
            parsed.reasoning.append(read_part(part, notes))
        else:
            raise DataError(
                f"the part {short(part)} is of type {short(kind)}; parts are text, image and image_url objects: "
                f"{_remedy(kind)}"
            )
    for joined in parts:
        if joined["type"] == "text":
            joined["text"] = clean(joined["text"])
    parsed.content = parts
    return parsed


def image_source(part: RawRow) -> object:
    """What an image part says of its image; None where it takes the next one of the row's `images`.

    {"type": "image_url", "image_url": {"url": "a.png"}}    {"url": "a.png"}                OpenAI
    {"type": "image", "data": "iVBORw0…", "mimeType": …}    {"base64": "iVBORw0…"}          MCP
    {"type": "image", "index": 0}                           ColumnIndex(0)
    {"type": "image"}                                       None
    """
    for key in IMAGE_KEYS:
        source = part.get(key)
        is_base64 = key in ("base64", "data") and isinstance(source, str)
        if source is not None:
            return {"base64": source} if is_base64 else source
    unknown = list(without_nulls(without(part, *BESIDE_IMAGE)))
    if unknown:
        raise DataError(
            f"the image part has {short(unknown)}, which is not known; its image stands under one of "
            f"{', '.join(IMAGE_KEYS)}, or, if it has no key but type, in the row's `images`"
        )
    return None if part.get("index") is None else ColumnIndex(part["index"])


def _add_text(parts: list[Part], text: str) -> None:
    """Add a text to the parts, to the last one if that is a text."""
    last = parts[-1] if parts else None
    if last is not None and last["type"] == "text":
        last["text"] += text
    else:
        parts.append({"type": "text", "text": text})


def _part_text(part: RawRow) -> str:
    """The text of a text part; "" where it is null."""
    text = part.get("text")
    if text is not None and not isinstance(text, str):
        raise DataError(f"the text of a part is {short(text)}; write it as a string")
    beside = list(without_nulls(without(part, *BESIDE_TEXT)))
    if text is None and beside:
        raise DataError(f"the text part {short(part)} has no text, but {', '.join(beside)}; write `text`")
    return text or ""


def _remedy(kind: object) -> str:
    """What to do with a part that is no text or image."""
    name = str(kind)
    if name.endswith(("tool_use", "tool_result", "tool_call", "tool_response", "tool_output")):
        return (
            "a tool that a provider runs by itself is none that a model calls; declare it in `tools` and write its "
            "call under tool_calls and its result as a tool message, or remove the row"
        )
    if name == "refusal":
        return 'write its words as {"type": "text", "text": …}'
    return 'write what it says as {"type": "text", "text": …}, or remove it'
