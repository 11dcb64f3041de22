"""How other models mark a call in their text, for whoever has to tell such a call from words about it.

A marker counts with what belongs behind it: `<tool_call>` in a sentence is a word, `<tool_call>{"name"` is a call.
"""

import json
import re

WRAPPERS = ("tool_calls", "tool_call", "function_calls", "function_call")  # keys of an object around calls
DECODER = json.JSONDecoder(strict=False, parse_int=float)  # int() refuses thousands of digits
FLAGS = re.VERBOSE | re.MULTILINE | re.DOTALL
TAG = r"<\|?(?i:tool_?calls?|function_?calls?|tool_?use|tool_?code)\|?>"
MARKED = rf"""
    (?<!`)(?:                                                                      # Hermes, Qwen, XML
      {TAG}\s*+(?:[{{\[]|<(?:function|invoke|name|tool_name|tool_call)\b|[\w.:-]++(?:[({{]|\s*+<arg_key>))
    | <function=[^<>\s]++>\s*+(?:\{{|<parameter=|</function>)                      # Llama, Qwen Coder
    | <invoke\s+name\s*=
    | <start_function_call>\s*+call:                                               # FunctionGemma
    | <\|python_(?:tag|start)\|>\s*+(?:[\[{{]|import\b|[\w.]++\()                  # Llama
    | \[TOOL_CALLS\]\s*+(?:[\[{{]|[\w.:-]++\s*+(?:\{{|\[ARGS\]|\[CALL_ID\]))       # Mistral
    | <[|｜]tool[_▁]calls?[_▁](?:section[_▁])?begin[|｜]>                          # DeepSeek, Kimi
    | <\|channel\|>commentary\s+to=                                                # gpt-oss
    | <\|tool_call_start\|>\s*+[\[{{]                                              # LFM2
    | <\|action_start\|>\s*+<\|                                                   # InternLM
    | <\|START_ACTION\|>\s*+[\[{{]                                                # Command R
    | functools\[\s*+\{{                                                          # Phi, Functionary
    | ✿FUNCTION✿:\s*+\S                                                          # Qwen-Agent
    | <<function>>\s*+[\w.]++\(                                                   # Gorilla
    )
    | ^[ \t]*+`{{3,}}[ \t]*+(?:tool_code|tool_calls?|function_calls?)\s++[^\s`]      # Gemma before 4
    | ^tool_code[ \t]*+\n\s*+\S
"""
