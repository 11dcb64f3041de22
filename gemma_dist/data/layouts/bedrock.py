"""Amazon Bedrock's Converse: content blocks told by their one key, also in the tuning files of Nova.

{"schemaVersion": "bedrock-conversation-2024", "system": [{"text": "Be kind."}],
 "messages": [
   {"role": "user", "content": [{"text": "Warm in Rome?"}, {"image": {"format": "png", "source": {"bytes": "..."}}}]},
   {"role": "assistant", "content": [{"toolUse": {"toolUseId": "t1", "name": "weather", "input": {"city": "Rome"}}}]},
   {"role": "user", "content": [{"toolResult": {"toolUseId": "t1", "content": [{"json": {"celsius": 30}}],
                                                "status": "success"}}]}],
 "toolConfig": {"tools": [{"toolSpec": {"name": "weather", "inputSchema": {"json": {...}}}}]}}
"""

import json
from collections import Counter

from gemma_dist.data.layouts.pieces import (
    ENCRYPTED_REASONING,
    Answer,
    Call,
    Piece,
    Reasoning,
    add_pieces,
    get_keys,
    text_part,
    tidy,
)
from gemma_dist.data.layouts.turns import OpenAIRow, turn_name
from gemma_dist.data.strict import error_context, get, short
from gemma_dist.errors import DataError

OWN_KEYS = ("text", "image", "toolUse", "toolResult", "reasoningContent")


def is_messages(messages: list[object]) -> bool:
    """Whether one of the messages has a block without a type, told by its key."""
    return any(_is_own_block(block) for message in messages for block in _blocks(message))


def to_openai(messages: list[object]) -> OpenAIRow:
    """The messages in OpenAI's shape. DataError where a block has no meaning in a chat with tools."""
    row = OpenAIRow([])
    for number, message in enumerate(messages, start=1):
        role = get(message, "role")
        with error_context(turn_name(number, role)):
            if not isinstance(message, dict) or not isinstance(message.get("content"), list):
                row.messages.append((number, message))
                continue
            pieces = [_piece(block, row.notes) for block in _blocks(message)]
            kept = {key: message[key] for key in message if key not in ("role", "content")}
            add_pieces(row.messages, number, role, pieces, row.notes, kept=kept)
    row.messages = tidy(row.messages)
    return row


def _blocks(message: object) -> list[object]:
    content = get(message, "content")
    return content if isinstance(content, list) else []


def _is_own_block(block: object) -> bool:
    return get(block, "type") is None and any(get(block, key) is not None for key in OWN_KEYS)


def _piece(block: object, notes: Counter[str]) -> Piece:
    use, result, reasoning = get(block, "toolUse"), get(block, "toolResult"), get(block, "reasoningContent")
    if isinstance(use, dict):
        return Call(use.get("toolUseId"), use.get("name"), use.get("input"))
    if isinstance(result, dict):
        content = [_content_part(part) for part in _blocks(result)]
        return Answer(result.get("toolUseId"), content, failed=result.get("status") == "error")
    if isinstance(reasoning, dict):
        text = get(reasoning.get("reasoningText"), "text")
        if text:
            return Reasoning(text)
        notes[ENCRYPTED_REASONING] += 1
        return None
    if get(block, "cachePoint") is not None:  # says where a prompt may be cached
        return None
    return _content_part(block)


def _content_part(block: object) -> object:
    image = get(block, "image")
    if get(block, "text") is not None:
        return text_part(get(block, "text"))
    if isinstance(block, dict) and block.get("json") is not None:
        return text_part(json.dumps(block["json"], ensure_ascii=False))
    if isinstance(image, str):  # DashScope, which tells its blocks in the same way
        return {"type": "image", "image": image}
    if isinstance(image, dict):
        source = image.get("source")
        data = get(source, "bytes")
        if data is None:
            raise DataError(f"the image source {short(source)} lies elsewhere; put its bytes in as base64")
        return {"type": "image", "bytes": data} if isinstance(data, bytes) else {"type": "image", "base64": data}
    raise DataError(
        f"the block {short(block)} has the keys {short(get_keys(block))}; blocks hold text, image, toolUse, toolResult "
        "or reasoningContent: write its content as text or remove it"
    )
