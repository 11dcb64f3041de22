"""Amazon Bedrock's Converse: content blocks told by their one key, also in the tuning files of Nova.

{"schemaVersion": "bedrock-conversation-2024", "system": [{"text": "Be kind."}],
 "messages": [
   {"role": "user", "content": [{"text": "Warm in Rome?"}, {"image": {"format": "png", "source": {"bytes": "..."}}}]},
   {"role": "assistant", "content": [{"toolUse": {"toolUseId": "t1", "name": "weather", "input": {"city": "Rome"}}}]},
   {"role": "user", "content": [{"toolResult": {"toolUseId": "t1", "content": [{"json": {"celsius": 30}}],
                                                "status": "success"}}]}],
 "toolConfig": {"tools": [{"toolSpec": {"name": "weather", "inputSchema": {"json": {...}}}}]}}
"""

from collections import Counter

from gemma_dist.data.calls import first_of
from gemma_dist.data.layouts.pieces import (
    ENCRYPTED_REASONING,
    PAUSE,
    Answer,
    Call,
    Piece,
    Reasoning,
    add_pieces,
    convert_turns,
    get_keys,
    has_part,
    text_part,
    value_text,
    without_keys,
)
from gemma_dist.data.layouts.turns import OpenAIRow
from gemma_dist.data.strict import get, get_list, short
from gemma_dist.errors import DataError

OWN_KEYS = ("text", "image", "toolUse", "toolResult", "reasoningContent")


def is_messages(messages: list[object]) -> bool:
    """Whether one of the messages has a block without a type, told by its key."""
    return has_part(messages, "content", _is_own_block)


def to_openai(messages: list[object]) -> OpenAIRow:
    """The messages in OpenAI's shape. DataError where a block has no meaning in a chat with tools."""
    return convert_turns(messages, _add_message)


def _is_own_block(block: object) -> bool:
    """Whether a block is told by its key, {"text": "Hi"}, and not by a `type`."""
    return get(block, "type") is None and first_of(block, OWN_KEYS) is not None


def _add_message(row: OpenAIRow, number: int, message: object) -> None:
    """{"role": "user", "content": [{"text": "Hi"}]} -> {"role": "user", "content": "Hi"}; without blocks it passes."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        row.messages.append((number, message))
        return
    pieces = [_piece(block, row.notes) for block in get_list(message, "content")]
    kept = without_keys(message, ("role", "content"))
    add_pieces(row.messages, number, message.get("role"), pieces, row.notes, kept=kept)


def _piece(block: object, notes: Counter[str]) -> Piece:
    """What a block says; None where it only says where a prompt may be cached.

    {"toolUse": {"toolUseId": "t1", "name": "f", "input": {...}}} -> Call("t1", "f", {...})
    {"toolResult": {"toolUseId": "t1", "content": [{"text": "30"}]}} -> Answer("t1", [text part "30"])
    {"reasoningContent": {"reasoningText": {"text": "Look it up.", "signature": "..."}}} -> Reasoning("Look it up.")
    """
    use, result, reasoning = get(block, "toolUse"), get(block, "toolResult"), get(block, "reasoningContent")
    if isinstance(use, dict):
        return Call(use.get("toolUseId"), use.get("name"), use.get("input"))
    if isinstance(result, dict):
        content = [_content_part(part, notes) for part in get_list(result, "content")]
        return Answer(result.get("toolUseId"), content, failed=result.get("status") == "error")
    if isinstance(reasoning, dict):
        text = get(reasoning.get("reasoningText"), "text")
        if text:
            return Reasoning(text)
        notes[ENCRYPTED_REASONING] += 1
        return PAUSE
    if get(block, "cachePoint") is not None:
        return None
    return _content_part(block, notes)


def _content_part(block: object, notes: Counter[str]) -> object:
    """A text or image block, or a tool's JSON, as a part.

    {"text": "Hi"} -> {"type": "text", "text": "Hi"}
    {"json": {"celsius": 30}} -> {"type": "text", "text": '{"celsius": 30}'}
    {"image": {"format": "png", "source": {"bytes": "iVBO"}}} -> {"type": "image", "base64": "iVBO"}
    """
    text, value, image = get(block, "text"), get(block, "json"), get(block, "image")
    if text is not None:
        return text_part(text)
    if value is not None:
        return text_part(value_text(value, notes))
    if isinstance(image, str):  # DashScope, which tells its blocks in the same way
        return {"type": "image", "image": image}
    if isinstance(image, dict):
        source = image.get("source")
        data = get(source, "bytes")
        if data is None:
            raise DataError(f"the image source {short(source)} lies elsewhere; put its bytes in as base64")
        return {"type": "image", "bytes" if isinstance(data, bytes) else "base64": data}
    raise DataError(
        f"the block {short(block)} has the keys {short(get_keys(block))}; blocks hold text, image, toolUse, toolResult "
        "or reasoningContent: write its content as text or remove it"
    )
