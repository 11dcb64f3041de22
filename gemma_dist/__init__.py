"""gemma_dist: fine-tune Gemma 4 on tool calling, from raw trajectories to a merged checkpoint.

A trajectory moves in one direction, and each arrow is one package:

    JSONL -> data (parse, shard, encode) -> train -> evaluate -> merge -> safetensors

This file stays empty of imports: `gemma-dist --help` must answer before torch is loaded.
"""

__version__ = "0.1.0"
