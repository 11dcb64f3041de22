"""Gemma 4's control tokens, spelled once: what its tokenizer reads as structure wherever it occurs in a string.

They are those of `tokenizer_config.json` of google/gemma-4-*. A block opens with `<|name>` and ends with `<name|>`:

    <|turn>model\\n
    <|channel>thought\\n … <channel|>                 reasoning
    …                                                 text
    <|tool_call>call:NAME{key:<|"|>text<|"|>,n:1}<tool_call|>
    <|tool_response>response:NAME{…}<tool_response|>  written by the runtime; its opener is the model's own stop
    <turn|>
"""

PAD, EOS, BOS, UNK, MASK = "<pad>", "<eos>", "<bos>", "<unk>", "<mask>"
TURN, TURN_END = "<|turn>", "<turn|>"
THINK = "<|think|>"
CHANNEL, CHANNEL_END = "<|channel>", "<channel|>"
TOOL, TOOL_END = "<|tool>", "<tool|>"
CALL, CALL_END = "<|tool_call>", "<tool_call|>"
RESPONSE, RESPONSE_END = "<|tool_response>", "<tool_response|>"
# IMAGE stands between the two: once as the template writes it, then once for each soft token of the image.
IMAGE_BEGIN, IMAGE, IMAGE_END = "<|image>", "<|image|>", "<image|>"
AUDIO_BEGIN, AUDIO, AUDIO_END = "<|audio>", "<|audio|>", "<audio|>"
VIDEO = "<|video|>"
QUOTE = '<|"|>'  # around strings in calls, responses and declarations

# fmt: off
CONTROL_TOKENS = (
    BOS, EOS, PAD, UNK, MASK, TURN, TURN_END, THINK, CHANNEL, CHANNEL_END,
    TOOL, TOOL_END, CALL, CALL_END, RESPONSE, RESPONSE_END,
    IMAGE_BEGIN, IMAGE, IMAGE_END, AUDIO_BEGIN, AUDIO, AUDIO_END, VIDEO,
    QUOTE,
)
# fmt: on

# How a turn of the model begins, and the reasoning in it.
MODEL_TURN = f"{TURN}model\n"
THOUGHT = f"{CHANNEL}thought\n"

# What ends the model's turn to write: the end of the turn, the wait for a tool's result, the end of everything.
STOP_TOKENS = (TURN_END, RESPONSE, EOS)

MAX_DEPTH = 64  # levels of nesting in arguments and tools: the template, the reader and the scorer recurse over them
