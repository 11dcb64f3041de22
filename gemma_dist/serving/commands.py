"""The commands that serve a model folder with tool calls; docs/serving.md says of which versions they were read."""

import shlex
from pathlib import Path

LLAMA_CPP = "llama.cpp"


def server_commands(folder: Path | str) -> dict[str, str]:
    """One line for each server, by its name. Template and stop ids come from the folder; the parser has to be named."""
    place = shlex.quote(str(folder))
    return {
        "transformers": f"gemma-dist serve {place}",
        "vLLM": f"vllm serve {place} --enable-auto-tool-choice --tool-call-parser gemma4 --reasoning-parser gemma4",
        "SGLang": f"sglang serve --model-path {place} --tool-call-parser gemma4 --reasoning-parser gemma4",
        LLAMA_CPP: (
            f"python convert_hf_to_gguf.py {place} --outfile model.gguf --outtype bf16 && "
            "llama-server --model model.gguf --jinja"
        ),
    }
