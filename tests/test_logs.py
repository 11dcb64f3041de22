"""Logs of models and agents, a row of each layout: what it says is the trajectory that its OpenAI row would be."""

import base64
import copy
import io
import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from gemma_dist.config import EvaluateConfig, RowConfig
from gemma_dist.data.layouts import (
    ai_sdk,
    claude_code,
    exchanges,
    langchain,
    lone_events,
    openhands,
    pieces,
    prompt_completion,
    ratings,
    requests,
    responses,
    swe_agent,
)
from gemma_dist.data.rows import read_rows
from gemma_dist.data.trajectory import Trajectory, parse_row
from gemma_dist.errors import DataError


def parse(row: Any) -> Trajectory:
    return parse_row(row, "logs.jsonl:2", RowConfig())


def refusal(row: Any) -> str:
    with pytest.raises(DataError) as caught:
        parse(row)
    return str(caught.value)


def base64_png(color: str) -> str:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), color).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


RED = base64_png("red")
ARGUMENTS = {"city": "Rome"}
ARGUMENTS_TEXT = '{"city": "Rome"}'
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "Tells.", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": FUNCTION}]

ASKED: dict[str, Any] = {"role": "user", "content": "Warm in Rome?"}
CALL: dict[str, Any] = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
CALLED: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [CALL]}
THOUGHT: dict[str, Any] = {**CALLED, "reasoning_content": "Look it up."}
TOLD: dict[str, Any] = {"role": "tool", "content": "30", "tool_call_id": "c1", "name": "weather"}
SAID: dict[str, Any] = {"role": "assistant", "content": "Yes."}
CHAT = [ASKED, CALLED, TOLD, SAID]
THOUGHTFUL = [ASKED, THOUGHT, TOLD, SAID]
SECOND = {**CALL, "id": "c2"}
KIND: dict[str, Any] = {"role": "system", "content": "Be kind."}
SHOWN: dict[str, Any] = {**TOLD, "content": [{"type": "text", "text": "map:"}, {"type": "image"}]}

OPENAI_CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS_TEXT}}
OPENAI: list[Any] = [ASKED, {**CALLED, "content": None, "tool_calls": [OPENAI_CALL]}, {**TOLD, "name": None}, SAID]


def parts(message: dict[str, Any]) -> list[Any]:
    """The parts of a message; none where its content is a string."""
    return message["content"] if isinstance(message["content"], list) else []


def redacted() -> dict[str, Any]:
    """A message of Claude Code whose thinking cannot be read."""
    return {"id": "m1", "role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}


# ---- OpenAI: Responses, requests and responses -----------------------------------------------------------------------

ITEMS: list[Any] = [
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Warm in Rome?"}]},
    {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Look it up."}]},
    {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "weather", "arguments": ARGUMENTS_TEXT},
    {"type": "function_call_output", "call_id": "c1", "output": "30"},
    {
        "type": "message",
        "id": "msg_1",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "Yes.", "annotations": []}],
    },
]
SHOWN_ITEM = {
    "type": "function_call_output",
    "call_id": "c1",
    "output": [
        {"type": "input_text", "text": "map:"},
        {"type": "input_image", "image_url": f"data:image/png;base64,{RED}", "detail": "auto"},
    ],
}
RESPONSES_TOOLS = [{"type": "function", **FUNCTION}]
FORMER = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
STREAMED: dict[str, Any] = {"index": 0, "message": SAID, "finish_reason": "stop"}
BATCH_REQUEST: dict[str, Any] = {
    "custom_id": "7",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"messages": OPENAI[:3]},
}
BATCH_RESULT: dict[str, Any] = {
    "id": "batch_req_1",
    "custom_id": "7",
    "response": {"status_code": 200, "request_id": "r", "body": {"choices": [STREAMED]}},
    "error": None,
}

RESPONSES_ROWS: dict[str, Any] = {
    "input list of the Agents SDK": ({"input": ITEMS}, THOUGHTFUL),
    "items under messages": ({"messages": ITEMS}, THOUGHTFUL),
    "items under items": ({"session_id": "s", "items": ITEMS}, THOUGHTFUL),
    "input and output": ({"input": ITEMS[:1], "output": ITEMS[1:]}, THOUGHTFUL),
    "input text": ({"object": "response", "input": "Warm in Rome?", "output": ITEMS[1:]}, THOUGHTFUL),
    "instructions": ({"instructions": "Be kind.", "input": ITEMS[:1], "output": ITEMS[1:]}, [KIND, *THOUGHTFUL]),
    "easy messages": ({"input": [ASKED, *ITEMS[1:4], SAID]}, THOUGHTFUL),
    "a request and its response": (
        {"request": {"model": "m", "input": "Warm in Rome?"}, "response": {"id": "resp_1", "output": ITEMS[1:]}},
        THOUGHTFUL,
    ),
    "an image in an output": ({"input": [*ITEMS[:3], SHOWN_ITEM, *ITEMS[4:]]}, [ASKED, THOUGHT, SHOWN, SAID]),
    "a call of the server's MCP": (
        {
            "input": [
                ITEMS[0],
                {"type": "mcp_list_tools", "server_label": "w", "tools": [{**FUNCTION, "parameters": SCHEMA}]},
                {"type": "mcp_call", "id": "c1", "name": "weather", "arguments": ARGUMENTS_TEXT, "output": "30"},
                ITEMS[4],
            ],
            "tools": [{"type": "mcp", "server_label": "w"}],
        },
        CHAT,
    ),
}
PAIR_ROWS: dict[str, Any] = {
    "messages and choices": ({"messages": OPENAI[:3], "choices": [STREAMED]}, CHAT),
    "messages and a response": ({"messages": OPENAI[:3], "response": {"choices": [STREAMED]}}, CHAT),
    "messages and a message": ({"messages": OPENAI[:3], "response": SAID}, CHAT),
    "a request and its response": ({"request": {"messages": OPENAI[:3]}, "response": {"choices": [STREAMED]}}, CHAT),
    "as JSON text": (
        {"request": json.dumps({"messages": OPENAI[:3]}), "response": json.dumps({"choices": [STREAMED]})},
        CHAT,
    ),
    "bodies": ({"request_body": {"messages": OPENAI[:3]}, "response_body": {"choices": [STREAMED]}}, CHAT),
    "a batch": ({"request": BATCH_REQUEST, "response": BATCH_RESULT}, CHAT),
    "an answer that the messages hold": ({"messages": OPENAI, "choices": [STREAMED]}, CHAT),
    "a log of completions of OpenHands": (
        {"messages": OPENAI[:3], "response": {"choices": [STREAMED]}, "kwargs": {"tools": TOOLS}, "timestamp": 1.0},
        CHAT,
    ),
    "Weave": ({"inputs": {"messages": OPENAI[:3], "model": "m"}, "output": {"choices": [STREAMED]}}, CHAT),
    "Braintrust": ({"input": OPENAI[:3], "output": [STREAMED], "metadata": {"tools": TOOLS}}, CHAT),
    "choices of a question": ({"messages": OPENAI, "choices": ["Yes.", "No."], "response": {"score": 1}}, CHAT),
    "a request beside its messages": ({"messages": OPENAI, "request": {"messages": FORMER}, "response": SAID}, CHAT),
    "a conversation": ({"conversation_id": "7", "conversation": FORMER}, FORMER),
    "Anthropic": (
        {
            "request": {
                "system": [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}],
                "messages": [ASKED],
                "tools": [{"name": "weather", "description": "Tells.", "input_schema": SCHEMA}],
            },
            "response": {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "c1", "name": "weather", "input": ARGUMENTS}],
                "stop_reason": "tool_use",
            },
        },
        [KIND, ASKED, CALLED],
    ),
}

# ---- LangChain and LangSmith -----------------------------------------------------------------------------------------

LC_CALL: dict[str, Any] = {"name": "weather", "args": ARGUMENTS, "id": "c1", "type": "tool_call"}
LC: list[Any] = [
    {"type": "human", "content": "Warm in Rome?", "additional_kwargs": {}, "response_metadata": {}, "id": None},
    {
        "type": "ai",
        "content": "",
        "additional_kwargs": {"tool_calls": [OPENAI_CALL], "refusal": None},
        "tool_calls": [LC_CALL],
        "invalid_tool_calls": [],
        "usage_metadata": None,
    },
    {"type": "tool", "content": "30", "name": "weather", "tool_call_id": "c1", "artifact": None, "status": "success"},
    {"type": "ai", "content": "Yes.", "tool_calls": [], "invalid_tool_calls": []},
]
NAMES = {"human": "HumanMessage", "ai": "AIMessage", "tool": "ToolMessage", "system": "SystemMessage"}


def wrapped(message: dict[str, Any]) -> dict[str, Any]:
    return {"type": message["type"], "data": message}


def dumped(message: dict[str, Any]) -> dict[str, Any]:
    name = ["langchain", "schema", "messages", NAMES[message["type"]]]
    return {"lc": 1, "type": "constructor", "id": name, "kwargs": message}


def replaced(messages: list[Any], index: int, **changes: Any) -> list[Any]:
    return [*messages[:index], {**messages[index], **changes}, *messages[index + 1 :]]


ANTHROPIC_BLOCKS = [
    {"type": "thinking", "thinking": "Look it up.", "signature": "x"},
    {"type": "tool_use", "id": "c1", "name": "weather", "input": ARGUMENTS},
    {"type": "input_json_delta", "index": 1, "partial_json": "{"},
]
GENERATION = {"text": "Yes.", "type": "ChatGeneration", "message": dumped(LC[3])}
LANGSMITH: dict[str, Any] = {
    "id": "run",
    "run_type": "llm",
    "inputs": {"messages": [[dumped(message) for message in LC[:3]]]},
    "outputs": {"generations": [[GENERATION]], "llm_output": None, "type": "LLMResult"},
    "extra": {"invocation_params": {"model": "m", "tools": TOOLS}},
    "error": None,
}

LANGCHAIN_ROWS: dict[str, Any] = {
    "model_dump": ({"messages": LC}, CHAT),
    "messages_to_dict": ({"messages": [wrapped(message) for message in LC]}, CHAT),
    "dumpd": ({"messages": [dumped(message) for message in LC]}, CHAT),
    "a version without `kwargs`": ({"messages": [{"lc": 1, **message} for message in LC]}, CHAT),
    "calls of the provider": ({"messages": replaced(LC, 1, tool_calls=[])}, CHAT),
    "blocks of Anthropic": ({"messages": replaced(LC, 1, content=ANTHROPIC_BLOCKS)}, THOUGHTFUL),
    "calls under roles": ({"messages": replaced(OPENAI, 1, tool_calls=[LC_CALL])}, CHAT),
    "the state of a graph": ({"values": {"messages": LC}, "next": []}, CHAT),
    "blocks alone": ({"messages": replaced(LC, 1, content=ANTHROPIC_BLOCKS[:2], tool_calls=[])}, THOUGHTFUL),
    "standard blocks": (
        {"messages": replaced(LC, 1, content=[{"type": "reasoning", "reasoning": "Look it up."}, LC_CALL])},
        THOUGHTFUL,
    ),
    "reasoning of DeepSeek": (
        {"messages": replaced(LC, 1, additional_kwargs={"reasoning_content": "Look it up."})},
        THOUGHTFUL,
    ),
    "a failed tool": ({"messages": replaced(LC, 2, status="error")}, replaced(CHAT, 2, content="Error: 30")),
    "an image in a result": (
        {
            "messages": replaced(
                LC,
                2,
                content=["map:", {"type": "image", "source_type": "base64", "data": RED, "mime_type": "image/png"}],
            )
        },
        replaced(CHAT, 2, content=SHOWN["content"]),
    ),
    "LangSmith": (LANGSMITH, CHAT),
    "LangSmith of OpenAI's client": (
        {"run_type": "llm", "inputs": {"messages": OPENAI[:3], "tools": TOOLS}, "outputs": {"choices": [STREAMED]}},
        CHAT,
    ),
    "LangSmith with a message": ({"run_type": "llm", "inputs": {"messages": OPENAI[:3]}, "outputs": SAID}, CHAT),
    "LangSmith of a graph": ({"run_type": "chain", "inputs": {"messages": LC[:1]}, "outputs": {"messages": LC}}, CHAT),
    "a LangSmith dataset": ({"inputs": {"messages": OPENAI[:3]}, "outputs": {"message": SAID}}, CHAT),
    "LangSmith as JSON text": (
        {"run_type": "llm", "inputs": json.dumps(LANGSMITH["inputs"]), "outputs": json.dumps(LANGSMITH["outputs"])},
        CHAT,
    ),
}

# ---- Gemini, Bedrock, AI SDK -----------------------------------------------------------------------------------------

GEMINI_CALL = {"functionCall": {"id": "c1", "name": "weather", "args": ARGUMENTS}, "thoughtSignature": "x"}
GEMINI_THOUGHT = {"text": "Look it up.", "thought": True}
GEMINI_ANSWER = {"functionResponse": {"id": "c1", "name": "weather", "response": {"output": "30"}}}
CONTENTS: list[Any] = [
    {"role": "user", "parts": [{"text": "Warm in Rome?"}]},
    {"role": "model", "parts": [GEMINI_THOUGHT, GEMINI_CALL]},
    {"role": "user", "parts": [GEMINI_ANSWER]},
    {"role": "model", "parts": [{"text": "Yes."}]},
]
PYTHON_CONTENTS = [
    {"parts": [{"text": "Warm in Rome?", "function_call": None}]},
    {
        "role": "model",
        "parts": [GEMINI_THOUGHT, {"function_call": {"id": "c1", "name": "weather", "args": ARGUMENTS}, "text": None}],
    },
    {"role": "tool", "parts": [{"function_response": {"name": "weather", "response": {"output": "30"}}}]},
    CONTENTS[3],
]
GEMINI_IMAGE = {"inlineData": {"mimeType": "image/png", "data": RED}}
GEMINI_TOOLS = [
    {"functionDeclarations": [{"name": "weather", "description": "Tells.", "parametersJsonSchema": SCHEMA}]}
]

GEMINI_ROWS: dict[str, Any] = {
    "a row of Vertex AI's tuning": (
        {
            "systemInstruction": {"role": "system", "parts": [{"text": "Be kind."}]},
            "contents": CONTENTS,
            "tools": GEMINI_TOOLS,
        },
        [KIND, *THOUGHTFUL],
    ),
    "Python's spelling": (
        {
            "system_instruction": "Be kind.",
            "contents": PYTHON_CONTENTS,
            "tools": [{"function_declarations": [FUNCTION]}],
        },
        [KIND, *THOUGHTFUL],
    ),
    "a request and its response": (
        {"request": {"contents": CONTENTS[:3]}, "response": {"candidates": [{"content": CONTENTS[3]}]}},
        THOUGHTFUL,
    ),
    "contents and candidates": (
        {"contents": CONTENTS[:3], "candidates": [{"content": {"parts": [{"text": "Yes."}]}, "finishReason": "STOP"}]},
        THOUGHTFUL,
    ),
    "contents under conversations": ({"conversations": CONTENTS}, THOUGHTFUL),
    "a whole response": (
        {
            "contents": [
                *CONTENTS[:2],
                {"role": "function", "parts": [{"functionResponse": {"name": "weather", "response": {"celsius": 30}}}]},
                CONTENTS[3],
            ]
        },
        replaced(THOUGHTFUL, 2, content='{"celsius": 30}'),
    ),
    "an error of Arrow": (
        {
            "contents": [
                *CONTENTS[:2],
                {
                    "parts": [
                        {"functionResponse": {"name": "weather", "response": {"output": None, "error": "no city"}}}
                    ]
                },
                CONTENTS[3],
            ]
        },
        replaced(THOUGHTFUL, 2, content="Error: no city"),
    ),
    "an error": (
        {
            "contents": [
                *CONTENTS[:2],
                {"parts": [{"functionResponse": {"name": "weather", "response": {"error": "no city"}}}]},
                CONTENTS[3],
            ]
        },
        replaced(THOUGHTFUL, 2, content="Error: no city"),
    ),
    "an image in an answer": (
        {
            "contents": [
                *CONTENTS[:2],
                {
                    "parts": [
                        {
                            "functionResponse": {
                                "name": "weather",
                                "response": {"output": "map:"},
                                "parts": [GEMINI_IMAGE],
                            }
                        }
                    ]
                },
                CONTENTS[3],
            ]
        },
        replaced(THOUGHTFUL, 2, content=SHOWN["content"]),
    ),
    "an image of the user": (
        {"contents": [{"role": "user", "parts": [GEMINI_IMAGE, {"text": "Warm?"}]}, CONTENTS[3]]},
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Warm?"}]}, SAID],
    ),
}

TOOL_USE = {"toolUse": {"toolUseId": "c1", "name": "weather", "input": ARGUMENTS}}
CONVERSE = [
    {"role": "user", "content": [{"text": "Warm in Rome?"}]},
    {
        "role": "assistant",
        "content": [{"reasoningContent": {"reasoningText": {"text": "Look it up.", "signature": "x"}}}, TOOL_USE],
    },
    {
        "role": "user",
        "content": [{"toolResult": {"toolUseId": "c1", "content": [{"text": "30"}], "status": "success"}}],
    },
    {"role": "assistant", "content": [{"text": "Yes."}]},
]
CONVERSE_IMAGE = {"image": {"format": "png", "source": {"bytes": RED}}}
CACHE_POINT = {"cachePoint": {"type": "default"}}
TOOL_SPEC = {"toolSpec": {"name": "weather", "description": "Tells.", "inputSchema": {"json": SCHEMA}}}

BEDROCK_ROWS: dict[str, Any] = {
    "a row of Nova's tuning": (
        {"schemaVersion": "bedrock-conversation-2024", "system": [{"text": "Be kind."}], "messages": CONVERSE},
        [KIND, *THOUGHTFUL],
    ),
    "keys of OpenAI that Arrow filled": ({"messages": replaced(CONVERSE, 1, tool_calls=None)}, THOUGHTFUL),
    "a request and its response": (
        {
            "request": {
                "messages": CONVERSE[:3],
                "toolConfig": {"tools": [TOOL_SPEC, {"cachePoint": {"type": "default"}}]},
            },
            "response": {"output": {"message": CONVERSE[3]}, "stopReason": "end_turn"},
        },
        THOUGHTFUL,
    ),
    "a log of invocations": (
        {
            "schemaType": "ModelInvocationLog",
            "input": {"inputBodyJson": {"messages": CONVERSE[:3], "toolConfig": {"tools": [TOOL_SPEC]}}},
            "output": {"outputBodyJson": {"output": {"message": CONVERSE[3]}}},
        },
        THOUGHTFUL,
    ),
    "an image in a failed result": (
        {
            "messages": [
                *CONVERSE[:2],
                {
                    "role": "user",
                    "content": [
                        {
                            "toolResult": {
                                "toolUseId": "c1",
                                "content": [{"json": {"celsius": 30}}, CONVERSE_IMAGE],
                                "status": "error",
                            }
                        }
                    ],
                },
                CONVERSE[3],
            ]
        },
        replaced(
            THOUGHTFUL,
            2,
            content=[
                {"type": "text", "text": 'Error: {"celsius": 30}'},
                {"type": "image"},
            ],
        ),
    ),
}

AI_REASONING = {"type": "reasoning", "text": "Look it up."}
AI_CALL = {"type": "tool-call", "toolCallId": "c1", "toolName": "weather", "input": ARGUMENTS}
AI_RESULT = {"type": "tool-result", "toolCallId": "c1", "toolName": "weather"}
AI: list[Any] = [
    {"role": "user", "content": [{"type": "text", "text": "Warm in Rome?"}]},
    {"role": "assistant", "content": [AI_REASONING, AI_CALL]},
    {"role": "tool", "content": [{**AI_RESULT, "output": {"type": "text", "value": "30"}}]},
    SAID,
]
UI_CALL = {"toolCallId": "c1", "state": "output-available", "input": ARGUMENTS, "output": "30"}
UI_ASKED = {"id": "1", "role": "user", "parts": [{"type": "text", "text": "Warm in Rome?"}]}
INVOCATION = {"state": "result", "toolCallId": "c1", "toolName": "weather", "args": ARGUMENTS, "result": "30"}


def ui(*parts: Any) -> dict[str, Any]:
    return {"messages": [UI_ASKED, {"id": "2", "role": "assistant", "parts": list(parts)}]}


AI_SDK_ROWS: dict[str, Any] = {
    "version 5": ({"messages": AI}, THOUGHTFUL),
    "version 4": (
        {
            "messages": [
                ASKED,
                {"role": "assistant", "content": [{**AI_CALL, "input": None, "args": ARGUMENTS}]},
                {"role": "tool", "content": [{**AI_RESULT, "result": {"celsius": 30}}]},
                SAID,
            ]
        },
        replaced(CHAT, 2, content='{"celsius": 30}'),
    ),
    "content of a result": (
        {
            "messages": [
                *AI[:2],
                {
                    "role": "tool",
                    "content": [
                        {
                            **AI_RESULT,
                            "output": {
                                "type": "content",
                                "value": [
                                    {"type": "text", "text": "map:"},
                                    {"type": "media", "data": RED, "mediaType": "image/png"},
                                ],
                            },
                        }
                    ],
                },
                SAID,
            ]
        },
        replaced(THOUGHTFUL, 2, content=SHOWN["content"]),
    ),
    "messages of the UI": (
        ui(
            {"type": "step-start"},
            {**AI_REASONING, "state": "done"},
            {"type": "tool-weather", **UI_CALL},
            {"type": "step-start"},
            {"type": "text", "text": "Yes.", "state": "done"},
        ),
        THOUGHTFUL,
    ),
    "messages of the UI without steps": (
        ui({"type": "tool-weather", **UI_CALL}, {"type": "text", "text": "Yes."}),
        CHAT,
    ),
    "messages of the UI of version 4": (
        ui({"type": "tool-invocation", "toolInvocation": INVOCATION}, {"type": "text", "text": "Yes."}),
        CHAT,
    ),
    "steps of version 4": (
        ui(
            {"type": "tool-invocation", "toolInvocation": {**INVOCATION, "step": 0}},
            {"type": "tool-invocation", "toolInvocation": {**INVOCATION, "toolCallId": "c2", "step": 1}},
            {"type": "text", "text": "Yes."},
        ),
        [ASKED, CALLED, TOLD, {**CALLED, "tool_calls": [SECOND]}, {**TOLD, "tool_call_id": "c2"}, SAID],
    ),
    "parallel calls": (
        ui(
            {"type": "tool-weather", **UI_CALL},
            {"type": "tool-weather", **UI_CALL, "toolCallId": "c2"},
            {"type": "text", "text": "Yes."},
        ),
        [ASKED, {**CALLED, "tool_calls": [CALL, SECOND]}, TOLD, {**TOLD, "tool_call_id": "c2"}, SAID],
    ),
    "attachments": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": "Warm?",
                    "experimental_attachments": [
                        {"name": "a.png", "contentType": "image/png", "url": f"data:image/png;base64,{RED}"}
                    ],
                },
                SAID,
            ]
        },
        [{"role": "user", "content": [{"type": "text", "text": "Warm?"}, {"type": "image"}]}, SAID],
    ),
    "invocations beside the content": (
        {"messages": [ASKED, {"role": "assistant", "content": "Yes.", "toolInvocations": [INVOCATION]}]},
        CHAT,
    ),
    "a failed tool": (
        ui(
            {"type": "dynamic-tool", "toolName": "weather", **UI_CALL, "state": "output-error", "errorText": "no city"},
            {"type": "text", "text": "Yes."},
        ),
        replaced(CHAT, 2, content="Error: no city"),
    ),
}

# ---- traces ----------------------------------------------------------------------------------------------------------

OTEL = [
    {"role": "user", "parts": [{"type": "text", "content": "Warm in Rome?"}]},
    {
        "role": "assistant",
        "parts": [
            {"type": "reasoning", "content": "Look it up."},
            {"type": "tool_call", "id": "c1", "name": "weather", "arguments": ARGUMENTS},
        ],
    },
    {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c1", "response": "30"}]},
    {"role": "assistant", "parts": [{"type": "text", "content": "Yes."}], "finish_reason": "stop"},
]
SPAN: dict[str, Any] = {"name": "chat m", "trace_id": "t", "span_id": "s", "parent_id": None}
GENAI = {
    "gen_ai.operation.name": "chat",
    "gen_ai.system_instructions": json.dumps([{"type": "text", "content": "Be kind."}]),
    "gen_ai.input.messages": json.dumps(OTEL[:3]),
    "gen_ai.output.messages": json.dumps(OTEL[3:]),
    "gen_ai.tool.definitions": json.dumps(RESPONSES_TOOLS),
}
OPENLLMETRY = {
    "gen_ai.system": "OpenAI",
    "gen_ai.prompt.0.role": "user",
    "gen_ai.prompt.0.content": "Warm in Rome?",
    "gen_ai.prompt.1.role": "assistant",
    "gen_ai.prompt.1.tool_calls.0.id": "c1",
    "gen_ai.prompt.1.tool_calls.0.name": "weather",
    "gen_ai.prompt.1.tool_calls.0.arguments": ARGUMENTS_TEXT,
    "gen_ai.prompt.2.role": "tool",
    "gen_ai.prompt.2.content": "30",
    "gen_ai.prompt.2.tool_call_id": "c1",
    "gen_ai.completion.0.role": "assistant",
    "gen_ai.completion.0.content": "Yes.",
    "gen_ai.completion.0.finish_reason": "stop",
    "llm.request.functions.0.name": "weather",
    "llm.request.functions.0.description": "Tells.",
    "llm.request.functions.0.parameters": SCHEMA,
}
OPENINFERENCE = {
    "openinference.span.kind": "LLM",
    "llm.input_messages.0.message.role": "user",
    "llm.input_messages.0.message.contents.0.message_content.type": "text",
    "llm.input_messages.0.message.contents.0.message_content.text": "Warm in Rome?",
    "llm.input_messages.1.message.role": "assistant",
    "llm.input_messages.1.message.tool_calls.0.tool_call.id": "c1",
    "llm.input_messages.1.message.tool_calls.0.tool_call.function.name": "weather",
    "llm.input_messages.1.message.tool_calls.0.tool_call.function.arguments": ARGUMENTS_TEXT,
    "llm.input_messages.2.message.role": "tool",
    "llm.input_messages.2.message.tool_call_id": "c1",
    "llm.input_messages.2.message.contents.0.message_content.type": "text",
    "llm.input_messages.2.message.contents.0.message_content.text": "map:",
    "llm.input_messages.2.message.contents.1.message_content.type": "image",
    "llm.input_messages.2.message.contents.1.message_content.image.image.url": f"data:image/png;base64,{RED}",
    "llm.output_messages.0.message.role": "assistant",
    "llm.output_messages.0.message.content": "Yes.",
    "llm.tools.0.tool.json_schema": json.dumps(TOOLS[0]),
}
PHOENIX = {
    "llm": {
        "input_messages": [
            {"message": {"role": "user", "content": "Warm in Rome?"}},
            {
                "message": {
                    "role": "assistant",
                    "tool_calls": [
                        {"tool_call": {"id": "c1", "function": {"name": "weather", "arguments": ARGUMENTS_TEXT}}}
                    ],
                }
            },
            {"message": {"role": "tool", "content": "30", "tool_call_id": "c1"}},
        ],
        "output_messages": [{"message": {"role": "assistant", "content": "Yes."}}],
        "tools": [{"tool": {"json_schema": json.dumps(TOOLS[0])}}],
    }
}
PHOENIX_FRAME = {
    "context.trace_id": "t",
    "attributes.llm.input_messages": [
        {"message.role": "user", "message.content": "Warm in Rome?"},
        {
            "message.role": "assistant",
            "message.tool_calls": [
                {
                    "tool_call.id": "c1",
                    "tool_call.function.name": "weather",
                    "tool_call.function.arguments": ARGUMENTS_TEXT,
                }
            ],
        },
        {"message.role": "tool", "message.content": "30", "message.tool_call_id": "c1"},
    ],
    "attributes.llm.output_messages": [{"message.role": "assistant", "message.content": "Yes."}],
}


def otlp(attributes: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": {"stringValue": value}} for key, value in attributes.items()]


LANGFUSE: dict[str, Any] = {
    "id": "o",
    "traceId": "t",
    "type": "GENERATION",
    "name": "OpenAI-generation",
    "input": {"tools": TOOLS, "messages": OPENAI[:3]},
    "output": SAID,
    "model": "m",
    "parentObservationId": None,
}

TRACE_ROWS: dict[str, Any] = {
    "OpenTelemetry": ({**SPAN, "attributes": GENAI}, [KIND, *THOUGHTFUL]),
    "OpenTelemetry, structured": (
        {**SPAN, "attributes": {"gen_ai.input.messages": OTEL[:3], "gen_ai.output.messages": OTEL[3:]}},
        THOUGHTFUL,
    ),
    "OpenTelemetry, of an event": (
        {
            **SPAN,
            "attributes": {"gen_ai.operation.name": "chat"},
            "events": [{"name": "gen_ai.client.inference.operation.details", "attributes": GENAI}],
        },
        [KIND, *THOUGHTFUL],
    ),
    "OTLP": ({**SPAN, "attributes": otlp(GENAI)}, [KIND, *THOUGHTFUL]),
    "messages with parts": ({"messages": OTEL}, THOUGHTFUL),
    "OpenLLMetry": ({**SPAN, "attributes": OPENLLMETRY}, CHAT),
    "attributes alone": (OPENLLMETRY, CHAT),
    "OpenInference": ({**SPAN, "attributes": OPENINFERENCE}, [ASKED, CALLED, SHOWN, SAID]),
    "Phoenix": ({**SPAN, "attributes": PHOENIX}, CHAT),
    "a table of Phoenix": (PHOENIX_FRAME, CHAT),
    "Langfuse": (LANGFUSE, CHAT),
    "Langfuse without tools": ({**LANGFUSE, "input": OPENAI[:3], "output": json.dumps(SAID)}, CHAT),
    "Langfuse of LangChain": (
        {**LANGFUSE, "input": [*OPENAI[:3], {"role": "tool", "content": TOOLS[0]}], "output": SAID},
        CHAT,
    ),
    "Agents SDK": (
        {
            "object": "trace.span",
            "trace_id": "t",
            "span_data": {"type": "generation", "input": OPENAI[:3], "output": [SAID], "model": "m"},
        },
        CHAT,
    ),
}

# ---- agents ----------------------------------------------------------------------------------------------------------


def event(number: int, kind: str, content: Any, answer: str = "", **keys: Any) -> dict[str, Any]:
    """An event of Claude Code, which follows the one before it."""
    message: dict[str, Any] = {"role": kind, "content": content}
    if answer:
        message |= {"id": answer, "type": "message", "model": "m", "stop_reason": None}
    return {
        "parentUuid": f"u{number - 1}" if number > 1 else None,
        "isSidechain": False,
        "sessionId": "s",
        "type": kind,
        "message": message,
        "uuid": f"u{number}",
        **keys,
    }


def use(id: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": id, "name": "weather", "input": ARGUMENTS}


def result(id: str, content: Any = "30") -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": id, "content": content}


SUMMARY: dict[str, Any] = {"type": "summary", "summary": "Weather", "leafUuid": "u9"}
META = event(1, "user", "Caveat: ...", isMeta=True)
SESSION = [
    SUMMARY,
    META,
    event(2, "user", "Warm in Rome?"),
    event(3, "assistant", [{"type": "thinking", "thinking": "Look it up.", "signature": "x"}], "m1"),
    event(4, "assistant", [use("c1")], "m1"),
    event(5, "user", [result("c1")], toolUseResult={"stdout": "30"}),
    event(6, "assistant", [{"type": "text", "text": "Yes."}], "m2"),
]
SUBAGENT = [{**step, "isSidechain": True} for step in SESSION[2:]]
# Two calls of one answer, whose results fork from their calls.
PARALLEL = [
    event(1, "user", "Warm in Rome?"),
    event(2, "assistant", [use("c1")], "m1"),
    event(3, "user", [result("c1")]),
    {**event(4, "assistant", [use("c2")], "m1"), "parentUuid": "u2"},
    {**event(5, "user", [result("c2", "31")])},
    event(6, "assistant", "Yes.", "m2"),
]
BRANCHED = [
    event(1, "user", "Warm in Oslo?"),
    event(2, "assistant", "No.", "m0"),
    {**SESSION[2], "parentUuid": None, "uuid": "v"},
    {**event(3, "assistant", "Yes.", "m1"), "parentUuid": "v"},
]

RESPONSE: dict[str, Any] = {
    "id": "r1",
    "choices": [{"message": {"role": "assistant", "content": "", "tool_calls": [OPENAI_CALL]}}],
}
METADATA: dict[str, Any] = {
    "function_name": "weather",
    "tool_call_id": "c1",
    "model_response": RESPONSE,
    "total_calls_in_response": 1,
}
OPENHANDS: list[Any] = [
    {"id": 0, "source": "agent", "action": "system", "args": {"content": "Be kind.", "tools": TOOLS}},
    {"id": 1, "source": "user", "action": "message", "args": {"content": "Warm in Rome?", "image_urls": None}},
    {"id": 2, "source": "environment", "observation": "agent_state_changed", "content": "", "extras": {}},
    {"id": 3, "source": "agent", "action": "run", "args": {"command": "w"}, "tool_call_metadata": METADATA},
    {"id": 4, "source": "agent", "observation": "run", "content": "30", "cause": 3, "tool_call_metadata": METADATA},
    {"id": 5, "source": "agent", "action": "message", "args": {"content": "Yes."}},
]
OPENHANDS_SDK: list[Any] = [
    {
        "kind": "SystemPromptEvent",
        "source": "agent",
        "system_prompt": {"type": "text", "text": "Be kind."},
        "tools": TOOLS,
    },
    {"kind": "MessageEvent", "source": "user", "llm_message": ASKED},
    {
        "kind": "ActionEvent",
        "source": "agent",
        "thought": [],
        "reasoning_content": "Look it up.",
        "llm_response_id": "r1",
        "tool_name": "weather",
        "tool_call_id": "c1",
        "tool_call": {"id": "c1", "name": "weather", "arguments": ARGUMENTS_TEXT, "origin": "completion"},
    },
    {
        "kind": "ObservationEvent",
        "source": "environment",
        "tool_name": "weather",
        "tool_call_id": "c1",
        "observation": {"content": [{"type": "text", "text": "30"}], "is_error": False},
    },
    {"kind": "MessageEvent", "source": "agent", "llm_message": {"role": "assistant", "content": "Yes."}},
]
MARK: dict[str, Any] = {"agent": "main", "message_type": "observation"}
SWE_AGENT: list[Any] = [
    {"role": "system", "content": "Be kind.", "agent": "main", "message_type": "system_prompt"},
    {**ASKED, **MARK},
    {"role": "assistant", "content": "", "thought": "", "action": "w", "tool_calls": [OPENAI_CALL], **MARK},
    {"role": "tool", "content": [{"type": "text", "text": "30"}], "tool_call_ids": ["c1"], **MARK},
    {**SAID, **MARK},
]
STEPS = [{"action": "w", "observation": "30", "thought": "", "response": ""}]
NEBIUS: list[Any] = [
    {"role": "system", "system_prompt": "Be kind.", "text": None, "mask": False, "cutoff_date": "01.01.2023"},
    {"role": "user", "system_prompt": None, "text": "Warm in Rome?", "mask": False, "cutoff_date": None},
    {"role": "ai", "system_prompt": None, "text": "Yes.", "mask": False, "cutoff_date": None},
]

AGENT_ROWS: dict[str, Any] = {
    "Claude Code": ({"id": "s", "events": SESSION}, THOUGHTFUL),
    "Claude Code under messages": ({"messages": SESSION}, THOUGHTFUL),
    "Claude Code with a subagent": ({"events": [*SESSION[:6], *SUBAGENT[1:3], SESSION[6]]}, THOUGHTFUL),
    "a subagent of Claude Code": ({"events": SUBAGENT}, THOUGHTFUL),
    "parallel calls of Claude Code": (
        {"events": PARALLEL},
        [ASKED, {**CALLED, "tool_calls": [CALL, SECOND]}, TOLD, {**TOLD, "content": "31", "tool_call_id": "c2"}, SAID],
    ),
    "an abandoned branch of Claude Code": ({"events": BRANCHED}, [ASKED, SAID]),
    "an image in Claude Code": (
        {
            "events": [
                *SESSION[:5],
                event(
                    5,
                    "user",
                    [
                        result(
                            "c1",
                            [
                                {"type": "text", "text": "map:"},
                                {"type": "image", "source": {"type": "base64", "data": RED}},
                            ],
                        )
                    ],
                ),
                SESSION[6],
            ]
        },
        [ASKED, THOUGHT, SHOWN, SAID],
    ),
    "OpenHands": ({"instance_id": "i", "history": OPENHANDS}, [KIND, *CHAT]),
    "the SDK of OpenHands": ({"events": OPENHANDS_SDK}, [KIND, *THOUGHTFUL]),
    "SWE-agent": ({"environment": "e", "trajectory": STEPS, "history": SWE_AGENT, "info": {}}, [KIND, *CHAT]),
    "Nebius' SWE-agent": ({"instance_id": "i", "trajectory": NEBIUS, "target": True}, [KIND, ASKED, SAID]),
    "Nebius' OpenHands": ({"trajectory_id": "i", "trajectory": OPENAI, "tools": TOOLS, "resolved": 1}, CHAT),
}

# ---- prompt and completion -------------------------------------------------------------------------------------------

PROMPT_ROWS: dict[str, Any] = {
    "messages": ({"prompt": [ASKED], "completion": OPENAI[1:], "tools": TOOLS}, CHAT),
    "a text at the end": ({"prompt": [ASKED], "completion": "Yes."}, [ASKED, SAID]),
    "an assistant in the prompt": (
        {"prompt": OPENAI[:3], "completion": [SAID]},
        [ASKED, {**CALLED, "train": False}, TOLD, SAID],
    ),
}

ROWS: dict[str, Any] = {
    f"{family}: {name}": row
    for family, rows in [
        ("Responses", RESPONSES_ROWS),
        ("pairs", PAIR_ROWS),
        ("LangChain", LANGCHAIN_ROWS),
        ("Gemini", GEMINI_ROWS),
        ("Bedrock", BEDROCK_ROWS),
        ("AI SDK", AI_SDK_ROWS),
        ("traces", TRACE_ROWS),
        ("agents", AGENT_ROWS),
        ("TRL", PROMPT_ROWS),
    ]
    for name, row in rows.items()
}


@pytest.mark.parametrize("name", ROWS)
def test_a_log_is_the_trajectory_that_it_tells(name: str) -> None:
    row, messages = ROWS[name]
    before = copy.deepcopy(row)
    assert parse(row).messages == messages
    assert row == before  # the row itself is left as it was


DECLARED = [
    "Responses: a call of the server's MCP",
    "pairs: Anthropic",
    "pairs: a log of completions of OpenHands",
    "pairs: Braintrust",
    "Bedrock: a log of invocations",
    "LangChain: LangSmith",
    "LangChain: LangSmith of OpenAI's client",
    "Gemini: a row of Vertex AI's tuning",
    "Gemini: Python's spelling",
    "Bedrock: a request and its response",
    "traces: OpenTelemetry",
    "traces: OTLP",
    "traces: OpenLLMetry",
    "traces: OpenInference",
    "traces: Phoenix",
    "traces: Langfuse",
    "traces: Langfuse of LangChain",
    "agents: OpenHands",
    "agents: the SDK of OpenHands",
    "agents: Nebius' OpenHands",
    "TRL: messages",
]


@pytest.mark.parametrize("name", DECLARED)
def test_the_tools_of_a_log_are_declared(name: str) -> None:
    assert parse(ROWS[name][0]).tools == TOOLS


SHOWING = [name for name, (_, messages) in ROWS.items() if any({"type": "image"} in parts(said) for said in messages)]


@pytest.mark.parametrize("name", SHOWING)
def test_images_of_a_log_stand_where_they_were_shown(name: str) -> None:
    assert parse(ROWS[name][0]).images == [base64.b64decode(RED)]


NOTES: list[Any] = [
    (ROWS["agents: Claude Code"][0], {claude_code.OTHER_EVENTS: 1, claude_code.META: 1}),
    (
        ROWS["agents: Claude Code with a subagent"][0],
        {claude_code.OTHER_EVENTS: 1, claude_code.META: 1, claude_code.SIDECHAINS: 2},
    ),
    (ROWS["agents: an abandoned branch of Claude Code"][0], {claude_code.BRANCHES: 2}),
    (ROWS["agents: OpenHands"][0], {openhands.INTERNAL: 1, openhands.EXTRAS: 1}),
    (ROWS["pairs: an answer that the messages hold"][0], {exchanges.REPEATED: 1}),
    (ROWS["TRL: an assistant in the prompt"][0], {prompt_completion.SHOWN: 1}),
    (
        {"input": [ITEMS[0], {"type": "reasoning", "summary": [], "encrypted_content": "x"}, *ITEMS[2:]]},
        {pieces.ENCRYPTED_REASONING: 1},
    ),
    (
        {"input": [*ITEMS[:3], ITEMS[1], {**ITEMS[2], "call_id": "c2"}, ITEMS[3], {**ITEMS[3], "call_id": "c2"}]},
        {pieces.REASONING_MOVED: 1},
    ),
    (
        {"input": replaced(ITEMS, 1, content=[{"type": "reasoning_text", "text": "All of it."}])},
        {responses.FULL_REASONING: 1},
    ),
    ({"events": replaced(SESSION, 3, message=redacted())}, {pieces.ENCRYPTED_REASONING: 1}),
    ({"messages": replaced(LC, 2, artifact={"raw": 1})}, {langchain.ARTIFACT: 1}),
    ({"messages": OPENAI[:3], "choices": [{**STREAMED, "finish_reason": "length"}]}, {requests.CUT_OFF: 1}),
    (ui({"type": "text", "text": "Yes."}, {"type": "source-url", "url": "u"}), {ai_sdk.SOURCES: 1}),
    ({"history": [{**ASKED, **MARK}, {**SAID, **MARK, "is_demo": True}, ASKED, SAID]}, {swe_agent.DEMONSTRATIONS: 1}),
]


@pytest.mark.parametrize(("row", "notes"), NOTES)
def test_what_is_left_out_is_counted(row: dict[str, Any], notes: dict[str, int]) -> None:
    counted = {note: count for note, count in parse(row).notes.items() if note in notes}
    assert counted == notes


def test_reasoning_between_parallel_calls_stands_in_front_of_them() -> None:
    second = [{**ITEMS[1], "summary": [{"type": "summary_text", "text": "And again."}]}, {**ITEMS[2], "call_id": "c2"}]
    answers = [ITEMS[3], {**ITEMS[3], "call_id": "c2"}]
    calling = parse({"input": [*ITEMS[:3], *second, *answers, ITEMS[4]]}).messages[1]
    assert calling["reasoning_content"] == "Look it up.\nAnd again."
    assert [call["id"] for call in calling["tool_calls"]] == ["c1", "c2"]


def test_text_before_a_call_stays_in_front_of_it() -> None:
    looking = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]}
    messages = parse({"input": [*ITEMS[:2], looking, *ITEMS[2:]]}).messages
    assert messages == [
        ASKED,
        {"role": "assistant", "content": "I look.", "reasoning_content": "Look it up."},
        CALLED,
        TOLD,
        SAID,
    ]


# ---- refusals --------------------------------------------------------------------------------------------------------

COMPACTED = {"type": "system", "subtype": "compact_boundary", "uuid": "u5", "sessionId": "s", "content": "..."}
AGENTNET: dict[str, Any] = {
    "task_id": "1",
    "instruction": "Open it.",
    "traj": [{"index": 0, "image": "a.png", "value": {"action": "Click", "code": "pyautogui.click(x=0.1, y=0.2)"}}],
}
ALPACA = {
    "system": "Be kind.",
    "instruction": "Warm in",
    "input": "Rome?",
    "output": "Yes.",
    "history": [["Hi", "Hello."]],
}
REFUSED: list[Any] = [
    # one event, message or span a line
    (SESSION[2], "an event of Claude Code ('user'), and a row holds a whole trajectory; make one of the file: "),
    (SUMMARY, claude_code.SESSION_COMMAND),
    ({"timestamp": "t", "type": "response_item", "payload": ITEMS[0]}, lone_events.CODEX_COMMAND),
    (OPENHANDS[3], lone_events.EVENTS_COMMAND),
    (OPENHANDS_SDK[2], lone_events.EVENTS_COMMAND),
    (ITEMS[2], lone_events.ITEMS_COMMAND),
    (LC[0], lone_events.MESSAGES_COMMAND),
    (OPENAI[1], lone_events.MESSAGES_COMMAND),
    (CONTENTS[0], lone_events.CONTENTS_COMMAND),
    ({"resourceSpans": [{"scopeSpans": [{"spans": [SPAN]}]}]}, lone_events.OTLP_COMMAND),
    (
        {**SPAN, "name": "execute_tool weather", "attributes": {"gen_ai.tool.name": "weather"}},
        lone_events.SPANS_COMMAND,
    ),
    ({"object": "trace", "id": "t", "workflow_name": "w"}, lone_events.AGENTS_COMMAND),
    ({"object": "trace.span", "span_data": {"type": "function", "name": "weather"}}, lone_events.AGENTS_COMMAND),
    (
        {"object": "trace.span", "span_data": {"type": "response", "response_id": "resp_1"}},
        "the id of a response of OpenAI and none of its items; write what the run gives instead: "
        '{"input": result.to_input_list(), "tools": [...]}',
    ),
    (
        {"run_type": "tool", "name": "w", "inputs": {"input": "Rome"}, "outputs": {}},
        lone_events.LANGSMITH_COMMAND,
    ),
    ({"id": "t", "input": "Hi", "output": None, "observations": [LANGFUSE]}, lone_events.LANGFUSE_COMMAND),
    ({**LANGFUSE, "type": "SPAN", "input": {"city": "Rome"}}, "(type 'SPAN') holds no messages in its `input`"),
    # half of an exchange
    (BATCH_REQUEST, "the row holds `body` of the batch's request '7' alone; join both files: jq -cs 'group_by("),
    (BATCH_RESULT, lone_events.BATCH_COMMAND),
    ({**LANGSMITH, "outputs": None}, "`outputs`: the answer is None; write the response"),
    ({**LANGFUSE, "output": {"error": "overloaded"}}, "`output`: the answer is {'error': 'overloaded'}"),
    (
        {"messages": OPENAI[:3], "choices": [STREAMED, STREAMED]},
        "`choices`: `choices` holds 2 answers to one request; keep the one that is to be trained",
    ),
    ({"messages": OPENAI[:3], "choices": [{"delta": {"content": "Y"}}]}, "without a message (a part of a stream?)"),
    (
        {"previous_response_id": "resp_0", "input": ITEMS[:1], "output": ITEMS[1:]},
        "`previous_response_id` is 'resp_0': the messages before are kept by the provider",
    ),
    (
        {"inputs": {"messages": LC[:1]}, "outputs": {"messages": [{"type": "human", "content": "No"}, LC[3]]}},
        "`outputs` neither goes on from the messages that were given nor repeats them",
    ),
    ({**SPAN, "attributes": {"gen_ai.prompt.0.role": "user", "gen_ai.prompt.0.content": "Hi"}}, "holds no answer"),
    # parts that no function call says
    (
        {"input": [ITEMS[0], {"type": "web_search_call", "id": "ws_1", "status": "completed"}, ITEMS[4]]},
        "turn 2 (web_search_call): an item of type 'web_search_call' is no call of a function that `tools` can "
        'declare; remove it, or write it as call and answer: {"type": "function_call", "call_id": "1"',
    ),
    ({"input": [ITEMS[0], {"type": "item_reference", "id": "msg_1"}, ITEMS[4]]}, "names an item that OpenAI keeps"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "file-1"}]}, ITEMS[4]]},
        "turn 1 (user): the image 'file-1' is kept by the provider",
    ),
    (
        {"messages": replaced(CONVERSE, 1, tool_calls="weather")},
        "turn 2 (assistant): `tool_calls` is 'weather'; write a list of calls",
    ),
    (
        {"messages": replaced(LC, 1, invalid_tool_calls=[{"name": "weather", "args": "{", "id": "c1"}])},
        "turn 2 (assistant): `invalid_tool_calls` holds",
    ),
    (
        {"contents": [CONTENTS[0], {"role": "model", "parts": [{"executableCode": {"code": "1"}}]}]},
        "turn 2 (model): the part {'executableCode': {'code': '1'}} is none of text, functionCall",
    ),
    (
        {"contents": [{"role": "system", "parts": [{"text": "Be kind."}]}, *CONTENTS]},
        "turn 1 (system): a system text stands in `systemInstruction`",
    ),
    (
        {"contents": [{"parts": [{"fileData": {"mimeType": "image/png", "fileUri": "gs://a/b.png"}}]}, CONTENTS[3]]},
        "the image 'gs://a/b.png' lies elsewhere; nothing is downloaded",
    ),
    (
        {"messages": [{"role": "user", "content": [{"document": {"name": "a"}}, {"text": "Hi"}]}, CONVERSE[3]]},
        "turn 1 (user): the block {'document': {'name': 'a'}} has the keys ['document']",
    ),
    (
        ui({"type": "tool-weather", "toolCallId": "c1", "state": "input-streaming", "input": None}),
        "turn 2 (assistant): the tool part is in the state 'input-streaming'",
    ),
    # sessions of which a part is hidden
    ({"events": [*SESSION, COMPACTED, SESSION[6]]}, "event 8 compacts the session"),
    ({"history": [OPENHANDS[1], {**OPENHANDS[3], "tool_call_metadata": None}]}, "has no `tool_call_metadata`"),
    ({"trajectory": replaced(NEBIUS, 1, mask=True)}, "turn 2 (user): `mask` is true"),
    ({"trajectory": STEPS}, "`trajectory` holds steps with ['action', 'observation', 'thought', 'response'], not"),
    ({"step_num": 1, "action": "click", "screenshot_file": "a.png"}, "one step, with `action` and `screenshot_file`"),
    ({"goal": "Open it.", "actions": ["click"], "screenshots": ["a.png"]}, "`actions` holds steps with 'click', not"),
    (
        {"input": [ITEMS[0], {"type": "computer_call", "call_id": "c1", "action": {"type": "click"}}]},
        "turn 2 (computer_call): an item of type 'computer_call' is no call of a function that `tools` can declare; "
        'write action and screenshot so: {"type": "function_call", "call_id": "1", "name": "computer"',
    ),
    (AGENTNET, "`traj` holds steps with ['index', 'image', 'value'], not messages"),
    ({"history": [{"source": "agent", "action": "condensation", "args": {}}]}, "the session was condensed here"),
    # one of two answers, and plain texts
    (
        {"input": {"messages": [ASKED]}, "preferred_output": [SAID], "non_preferred_output": [SAID]},
        prompt_completion.PREFERRED_COMMAND,
    ),
    ({"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}, prompt_completion.CHOSEN_TEXT_COMMAND),
    ({**LANGFUSE, "input": "Hi", "output": "Hello."}, "`input` is the plain text 'Hi', which does not say who speaks"),
    ({"inputs": {"question": "Hi"}, "outputs": {"answer": "Hello."}}, "hold no messages but {'question': 'Hi'}"),
    ({"prompt": [ASKED], "chosen": [SAID], "rejected": [SAID]}, prompt_completion.PREFERENCE_COMMAND),
    ({"prompt": [ASKED], "completion": [SAID], "label": False}, "`label` is False: the row rates an answer (KTO)"),
    ({"prompt": [ASKED], "answer": "30"}, "`completion` is None; write a list of messages"),
    (
        {"prompt": "Warm in Rome?", "completion": "Yes."},
        "`prompt` is the plain text 'Warm in Rome?', which does not say who speaks; if it is what a user says and "
        '`completion` what the model answers, write so: jq -c \'{messages: [{role: "user", content: .prompt}, '
        '{role: "assistant", content: .completion}]}\' FILE',
    ),
    (ALPACA, "`instruction` is the plain text 'Warm in'"),
]


@pytest.mark.parametrize(("row", "words"), REFUSED)
def test_what_has_no_single_meaning_is_refused_with_the_way_out(row: dict[str, Any], words: str) -> None:
    message = refusal(row)
    assert message.startswith("logs.jsonl:2: ")
    assert words in message


# ---- the commands that messages give ---------------------------------------------------------------------------------

TWO_SPANS: list[Any] = [
    {**SPAN, "end_time": 1, "attributes": {**OPENLLMETRY, "gen_ai.completion.0.content": "No."}},
    {**SPAN, "end_time": 2, "attributes": OPENLLMETRY},
    {**SPAN, "end_time": 3, "attributes": {"gen_ai.tool.name": "weather"}},
]
TWO_RUNS: list[Any] = [
    {**LANGSMITH, "trace_id": "t", "dotted_order": "1.1", "outputs": {"message": {**SAID, "content": "No."}}},
    {**LANGSMITH, "trace_id": "t", "dotted_order": "1.2"},
    {"run_type": "tool", "trace_id": "t", "dotted_order": "1.3", "inputs": {}, "outputs": {}},
]
GENERATED = ROWS["traces: Agents SDK"][0]
COMMANDS: list[Any] = [
    (claude_code.SESSION_COMMAND, SESSION, THOUGHTFUL),
    (
        lone_events.CODEX_COMMAND,
        [
            {"type": "session_meta", "payload": {"id": "s"}},
            *[{"type": "response_item", "payload": item} for item in ITEMS],
            {"type": "event_msg", "payload": {"type": "token_count"}},
        ],
        THOUGHTFUL,
    ),
    (lone_events.EVENTS_COMMAND, OPENHANDS, [KIND, *CHAT]),
    (lone_events.ITEMS_COMMAND, ITEMS, THOUGHTFUL),
    (lone_events.MESSAGES_COMMAND, LC, CHAT),
    (lone_events.MESSAGES_COMMAND, OPENAI, CHAT),
    (lone_events.CONTENTS_COMMAND, CONTENTS, THOUGHTFUL),
    (lone_events.BATCH_COMMAND, [BATCH_REQUEST, BATCH_RESULT], CHAT),
    (
        lone_events.BATCH_COMMAND,
        [
            {"key": "1", "request": {"contents": CONTENTS[:3]}},
            {"key": "1", "response": {"candidates": [{"content": CONTENTS[3]}]}},
        ],
        THOUGHTFUL,
    ),
    (
        lone_events.BATCH_COMMAND,
        [
            {"custom_id": "1", "params": {"messages": OPENAI[:3]}},
            {"custom_id": "1", "result": {"type": "succeeded", "message": SAID}},
        ],
        CHAT,
    ),
    (lone_events.OTLP_COMMAND, [{"resourceSpans": [{"scopeSpans": [{"spans": [TWO_SPANS[1]]}]}]}], CHAT),
    (lone_events.SPANS_COMMAND, TWO_SPANS, CHAT),
    (lone_events.LANGSMITH_COMMAND, TWO_RUNS, CHAT),
    (
        lone_events.LANGFUSE_COMMAND,
        [{"id": "t", "observations": [{**LANGFUSE, "startTime": "1"}, {"type": "SPAN", "startTime": "2"}]}],
        CHAT,
    ),
    (
        lone_events.AGENTS_COMMAND,
        [{"object": "trace", "id": "t"}, {**GENERATED, "ended_at": "1"}],
        CHAT,
    ),
    (prompt_completion.PREFERENCE_COMMAND, [{"prompt": [ASKED], "chosen": [SAID], "rejected": [SAID]}], [ASKED, SAID]),
]


@pytest.mark.parametrize(("command", "lines", "messages"), COMMANDS)
def test_the_row_that_a_given_command_makes_is_taken(
    command: str, lines: list[Any], messages: list[Any], tmp_path: Path
) -> None:
    rows = run_jq(command, lines, tmp_path)
    assert len(rows) == 1
    assert parse(rows[0]).messages == messages


def run_jq(command: str, lines: list[Any], folder: Path) -> list[Any]:
    """The rows that a command makes of a file of these lines."""
    if not shutil.which("jq"):
        pytest.skip("jq is not installed")
    file = folder / "given.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    program = command[command.index("'") + 1 : command.rindex("'")]
    options = command.split()[1]
    made = subprocess.run(["jq", options, program, file], capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in made.splitlines()]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        (ALPACA, [KIND, *FORMER, {"role": "user", "content": "Warm in\nRome?"}, SAID]),
        ({"instruction": "Warm in Rome?", "input": "", "output": "Yes."}, [ASKED, SAID]),
        ({"prompt": "Warm in Rome?", "completion": "Yes."}, [ASKED, SAID]),
        ({"prompt": "Warm in Rome?", "chosen": "Yes.", "rejected": "No."}, [ASKED, SAID]),
        ({"prompt": "Warm in Rome?", "chosen": [ASKED, SAID], "rejected": [ASKED, FORMER[1]]}, [ASKED, SAID]),
        ({"prompt": [ASKED], "chosen": [SAID], "rejected": [FORMER[1]]}, [ASKED, SAID]),
        (
            {"input": {"messages": [ASKED]}, "preferred_output": [SAID], "non_preferred_output": [FORMER[1]]},
            [ASKED, SAID],
        ),
        ({"prompt": [ASKED], "completion": [SAID], "label": True}, [ASKED, SAID]),
    ],
)
def test_plain_texts_and_pairs_are_taken_as_their_message_says(
    row: dict[str, Any], messages: list[Any], tmp_path: Path
) -> None:
    command = refusal(row)
    made = run_jq(command[command.index("jq ") :], [row], tmp_path)
    assert parse(made[0]).messages == messages


def test_a_compacted_session_is_cut_where_it_was_compacted(tmp_path: Path) -> None:
    summary = {**event(8, "user", "So far: warm."), "parentUuid": "u7", "isCompactSummary": True}
    session = {"id": "s", "events": [*SESSION, {**COMPACTED, "uuid": "u7"}, summary, event(9, "assistant", "Yes.")]}
    first, second = [parse(row) for row in run_jq(claude_code.COMPACTED_COMMAND, [session], tmp_path)]
    assert (first.id, first.messages) == ("s-0", THOUGHTFUL)
    assert (second.id, second.messages) == ("s-1", [{"role": "user", "content": "So far: warm."}, SAID])


def test_a_log_that_arrow_stored_is_the_same_trajectory() -> None:
    """Arrow fills absent keys with null; values of two types under one key it does not take."""
    for row, messages in ROWS.values():
        try:
            table = pa.Table.from_pylist([row])
        except pa.ArrowInvalid:
            continue
        assert parse(table.to_pylist()[0]).messages == messages


# ---- rows of before --------------------------------------------------------------------------------------------------


def test_no_row_of_before_is_taken_for_a_log(shared: Path) -> None:
    """OpenAI, Anthropic and sharegpt rows go the way that they went."""
    files = sorted((shared / "data").rglob("*.jsonl"))
    assert files
    for _, row in read_rows(files):
        assert isinstance(row, dict)
        assert not exchanges.is_layout(row)
        assert not lone_events.is_layout(row)
        assert not prompt_completion.is_layout(row)


# ---- broken logs -----------------------------------------------------------------------------------------------------

JUNK: list[Any] = [None, 3, "x", [], {}, [1], ["a"], {"a": 1}, True, [[]], [None]]


def broken(value: Any, chance: random.Random) -> Any:
    """The value with something in it removed or replaced by what does not belong there."""
    if not isinstance(value, (dict, list)) or not value or chance.random() < 0.1:
        return chance.choice(JUNK)
    copied: Any = value.copy()
    place = chance.choice(list(value)) if isinstance(value, dict) else chance.randrange(len(value))
    if chance.random() < 0.2:
        del copied[place]
    else:
        copied[place] = broken(copied[place], chance)
    return copied


def test_a_broken_log_is_refused_and_never_a_traceback() -> None:
    chance = random.Random(0)
    rows = [row for row, _ in [*ROWS.values(), *REFUSED]]
    num_refused = 0
    for _ in range(3000):
        row = broken(broken(chance.choice(rows), chance), chance)
        try:
            parse(row)
        except DataError:
            num_refused += 1
    assert 0 < num_refused < 3000, "some breaks matter, and some do not"


# ---- answers that are rated ------------------------------------------------------------------------------------------

HUMAN: dict[str, Any] = {"from": "human", "value": "Warm in Rome?"}
GPT: dict[str, Any] = {"from": "gpt", "value": "Yes."}
BAD: dict[str, Any] = {"role": "assistant", "content": "No."}
RATED: list[Any] = [
    ({"messages": [ASKED, SAID], "label": True}, "`label` is True", [ASKED, SAID]),
    ({"conversations": [HUMAN, GPT], "kto_tag": True}, "`kto_tag` is True", [ASKED, SAID]),
    (
        {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "No."}},
        "`chosen` and `rejected` beside `conversations`",
        [ASKED, SAID],
    ),
    ({"conversations": [HUMAN], "chosen": "Yes.", "rejected": "No."}, "beside `conversations`", [ASKED, SAID]),
    (
        {"messages": [*FORMER, ASKED], "chosen_response": SAID, "rejected_response": BAD},
        "`chosen_response` and `rejected_response` beside `messages`",
        [*FORMER, ASKED, SAID],
    ),
    ({"messages": [ASKED], "chosen": [SAID], "rejected": [BAD]}, "(a preference)", [ASKED, SAID]),
    ({"messages": [ASKED], "chosen": [ASKED, SAID], "rejected": [ASKED, BAD]}, "(a preference)", [ASKED, SAID]),
    ({"messages": [ASKED, SAID], "chosen": "Yes.", "rejected": "No."}, "(a preference)", [ASKED, SAID]),
    ({"messages": [ASKED, SAID], "rejected_response": "No."}, "`rejected_response` beside `messages`", [ASKED, SAID]),
    ({"prompt": "Warm in Rome?", "chosen_response": "Yes.", "rejected_response": "No."}, "the texts", [ASKED, SAID]),
    ({"instruction": "Warm in Rome?", "input": "", "chosen": "Yes.", "rejected": "No."}, "the texts", [ASKED, SAID]),
]


@pytest.mark.parametrize(("row", "words", "messages"), RATED)
def test_a_rated_answer_is_refused_with_the_command_that_keeps_the_good_one(
    row: dict[str, Any], words: str, messages: list[Any], tmp_path: Path
) -> None:
    message = refusal(row)
    assert words in message
    made = run_jq(message[message.index("jq ") :], [row], tmp_path)
    assert parse(made[0]).messages == messages


@pytest.mark.parametrize("row", [{"label": False}, {"kto_tag": False}])
def test_a_bad_answer_is_not_kept(row: dict[str, Any], tmp_path: Path) -> None:
    message = refusal({"messages": [ASKED, SAID], **row})
    assert run_jq(message[message.index("jq ") :], [{"messages": [ASKED, SAID], **row}], tmp_path) == []


@pytest.mark.parametrize("row", [{"label": 3}, {"label": "Rome"}, {"kto_tag": None}, {"rejected": None, "chosen": ""}])
def test_a_column_that_rates_nothing_is_none(row: dict[str, Any]) -> None:
    assert parse({"messages": [ASKED, SAID], **row}).messages == [ASKED, SAID]


def test_messages_that_are_the_better_answer_are_taken() -> None:
    trajectory = parse({"messages": [ASKED, SAID], "chosen": [ASKED, SAID], "rejected": [ASKED, BAD]})
    assert trajectory.messages == [ASKED, SAID]
    assert trajectory.notes == {ratings.LEFT_OUT: 1}


# ---- columns beside the messages -------------------------------------------------------------------------------------

SHORT: list[Any] = [*FORMER, ASKED]
KIND_PART = {"type": "text", "text": "Be kind."}
IMAGE_PART = {"type": "image", "url": "a.png"}
IN_PARTS = {"role": "system", "content": [{"type": "text", "text": "Be kind.\nSay yes."}]}
SWITCHES = [
    *(("reasoning", "on"), ("reasoning", "detailed thinking on"), ("thinking", "detailed thinking off")),
    *(("thinking", "not enabled"), ("thinking", "Thinking: enabled"), ("reasoning", "thinking disabled")),
    *(("reasoning", "reasoning mode: high"), ("thinking", "Thinking mode is off.")),
]
BESIDE: list[Any] = [
    ({"messages": SHORT, "completion": [SAID]}, [*SHORT, SAID]),
    ({"messages": SHORT, "completion": "Yes."}, [*SHORT, SAID]),
    ({"messages": SHORT, "response": "Yes."}, [*SHORT, SAID]),
    ({"messages": SHORT, "response": '{"a": 1}'}, [*SHORT, {"role": "assistant", "content": '{"a": 1}'}]),
    ({"messages": SHORT, "output": SAID}, [*SHORT, SAID]),
    ({"messages": SHORT, "output": json.dumps(SAID)}, [*SHORT, SAID]),
    ({"messages": json.dumps([ASKED]), "completion": [SAID]}, [ASKED, SAID]),
    ({"messages": CHAT[:3], "tools": TOOLS, "response": "Yes."}, [*CHAT[:3], SAID]),
    ({"messages": [ASKED], "response": "Yes.", "system": "Be kind."}, [KIND, ASKED, SAID]),
    # the whole conversation, and its last words once more
    ({"messages": [ASKED, SAID], "response": "Yes.", "completion": "Yes."}, [ASKED, SAID]),
    ({"messages": [ASKED, SAID], "completion": [SAID]}, [ASKED, SAID]),
    ({"messages": [ASKED, SAID], "history": [ASKED]}, [ASKED, SAID]),
    *(({"messages": [ASKED, SAID], column: words}, [ASKED, SAID]) for column, words in SWITCHES),
    (
        {
            "messages": [ASKED, SAID | {"reasoning_content": "I look.\n\nThen I say."}],
            "reasoning": "I look. Then I say.\n",
        },
        [ASKED, SAID | {"reasoning_content": "I look.\n\nThen I say."}],
    ),
    ({"messages": [ASKED, SAID], "output": "9 tokens", "answer": "42"}, [ASKED, SAID]),
    # the system text by other names
    ({"messages": [ASKED, SAID], "system_prompt": "Be kind."}, [KIND, ASKED, SAID]),
    ({"messages": [ASKED, SAID], "instructions": "Be kind."}, [KIND, ASKED, SAID]),
    ({"messages": [KIND, ASKED, SAID], "system_prompt": "Be kind.\n"}, [KIND, ASKED, SAID]),
    # … and the same text as parts, on either side
    ({"messages": [KIND, ASKED, SAID], "system": [KIND_PART]}, [KIND, ASKED, SAID]),
    ({"messages": [KIND, ASKED, SAID], "system": [KIND_PART | {"cache_control": None}]}, [KIND, ASKED, SAID]),
    ({"messages": [IN_PARTS, ASKED, SAID], "system": "Be kind.\nSay yes.\n"}, [IN_PARTS, ASKED, SAID]),
    ({"conversations": [HUMAN, GPT], "system_prompt": "Be kind."}, [KIND, ASKED, SAID]),
    ({"messages": [ASKED], "response": "Yes.", "system_prompt": "Be kind."}, [KIND, ASKED, SAID]),
    ({"prompt": [ASKED], "completion": [SAID], "system_prompt": "Be kind."}, [KIND, ASKED, SAID]),
]


@pytest.mark.parametrize(("row", "messages"), BESIDE)
def test_what_stands_beside_the_messages_is_taken(row: dict[str, Any], messages: list[Any]) -> None:
    assert parse(row).messages == messages


LOST: list[Any] = [
    ({"answer": "Yes."}, "`messages` end without an answer, and `answer` is 'Yes.'"),
    ({"chosen": SAID}, "`chosen` is {"),
    ({"tool_calls": [CALL]}, "`tool_calls` is [{"),
    ({"function_call": {"name": "f", "arguments": "{}"}}, "`function_call` is {"),
    ({"targets": "Yes."}, "`targets` is 'Yes.'"),
    ({"system_prompt": "Be kind.", "system": "Be rude."}, "`system_prompt` of the row: says something else than"),
    ({"history": [["Hi", "Hello."]]}, "`history` stands beside `messages`, which does not begin with it; write its 1"),
    (
        {"system_prompt": "default_v2", "messages": [KIND, *SHORT]},
        "`system_prompt` of the row: says something else than",
    ),
    ({"system": [KIND_PART, IMAGE_PART], "messages": [KIND, *SHORT]}, "`system` of the row: says something else than"),
    ({"reasoning": "The answer is right because it is on."}, "`reasoning` stands beside `messages`"),
    ({"thinking": "thinking on it"}, "`thinking` stands beside `messages`"),
    ({"reasoning": "I look it up."}, "`reasoning` stands beside `messages`, and does not say which message"),
]


@pytest.mark.parametrize(("beside", "words"), LOST)
def test_what_stands_beside_the_messages_is_not_lost(beside: dict[str, Any], words: str) -> None:
    assert words in refusal({"messages": SHORT, **beside})


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": SHORT, "answer": "Yes."}, [*SHORT, SAID]),
        ({"messages": SHORT, "chosen": SAID}, [*SHORT, SAID]),
        ({"messages": SHORT, "tools": TOOLS, "tool_calls": [CALL]}, None),
        ({"messages": SHORT, "tools": TOOLS, "tool_calls": json.dumps([CALL])}, None),
        ({"messages": SHORT, "tools": TOOLS, "function_call": {**CALL["function"], "id": "c1"}}, None),
        ({"messages": SHORT, "answers": ["Yes."]}, [*SHORT, SAID]),
        ({"conversations": [HUMAN], "response": "Yes."}, [ASKED, SAID]),
        ({"conversations": [HUMAN], "completion": [GPT]}, [ASKED, SAID]),
    ],
)
def test_the_command_puts_the_answer_behind_the_messages(row: dict[str, Any], messages: Any, tmp_path: Path) -> None:
    message = refusal(row)
    parsed = parse(run_jq(message[message.index("jq ") :], [row], tmp_path)[0]).messages
    assert parsed == messages or parsed[-1]["tool_calls"] == [CALL]


# ---- agents and benchmarks -------------------------------------------------------------------------------------------

SWE_SMITH: list[Any] = [
    {"role": "system", "content": "Be kind.", "agent": "main", "message_type": "system_prompt"},
    {"role": "user", "content": [{"type": "text", "text": "Warm in Rome?"}], "agent": "main"},
    {**CHAT[1], "content": "do", "thought": "do", "action": "weather", "agent": "main", "message_type": "action"},
    {"role": "tool", "content": "20", "tool_call_ids": ["c1"], "agent": "main", "message_type": "observation"},
    {"role": "assistant", "content": "Yes.", "thought": "Yes.", "action": "", "agent": "main"},
]
WORKED = [KIND, ASKED, {"role": "assistant", "content": "do"}, {**CHAT[1], "content": ""}, CHAT[2], SAID]


@pytest.mark.parametrize("key", ["messages", "conversations", "history"])
@pytest.mark.parametrize("given", [SWE_SMITH, json.dumps(SWE_SMITH)])
def test_a_history_of_swe_agent_may_stand_under_messages(key: str, given: Any) -> None:
    trajectory = parse({key: given, "tools": TOOLS, "resolved": True})
    assert [message["role"] for message in trajectory.messages] == [message["role"] for message in WORKED]
    assert trajectory.messages[-1] == SAID
    assert trajectory.messages[3]["tool_calls"] == [CALL]


def test_a_thought_that_the_content_does_not_say_is_not_lost() -> None:
    history = [*SWE_SMITH[:4], {**SWE_SMITH[4], "thought": "I know."}]
    assert "turn 5 (assistant): `thought` is 'I know.', which `content` does not say" in refusal({"messages": history})


def test_messages_that_name_their_agent_alone_keep_all_that_they_say() -> None:
    call = {"role": "assistant", "agent": "main", "function_call": {"name": "weather", "arguments": ARGUMENTS_TEXT}}
    answer = {"role": "function", "name": "weather", "content": "20"}
    messages = parse({"messages": [ASKED, call, answer, SAID], "tools": TOOLS}).messages
    assert messages[1]["tool_calls"][0]["function"] == CALL["function"]


@pytest.mark.parametrize("key", ["traj", "dialogue", "dialog", "turns", "chat"])
def test_messages_under_another_name_are_taken(key: str) -> None:
    row = {"task_id": 1, "reward": 1.0, "info": {"task": {"actions": []}}, key: OPENAI, "trial": 0, "tools": TOOLS}
    assert parse(row).messages == CHAT


@pytest.mark.parametrize("question", [[[ASKED]], [ASKED], ASKED["content"]])
@pytest.mark.parametrize("function", [[FUNCTION], FUNCTION])
def test_a_question_of_bfcl_is_a_test_case(question: Any, function: Any) -> None:
    row = {"id": "simple_0", "question": question, "function": function}
    assert "a question of BFCL, a test case for `evaluate`, without `ground_truth`" in refusal(row)
    row["ground_truth"] = [{"weather": {"city": ["Rome", "Roma"]}}]
    trajectory = parse_row(row, "cases.jsonl:1", EvaluateConfig())
    assert trajectory.messages[-1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}


@pytest.mark.parametrize("answers", ["[]", [], ""])
def test_a_query_without_a_call_has_no_answer(answers: Any) -> None:
    assert "logs.jsonl:2: `answers` is empty: no call answers the query" in refusal(
        {"query": "Hi", "answers": answers, "tools": TOOLS}
    )
