"""Which base a run stands on: hashes that tell one model from another, without reading all of its bytes."""

import hashlib
import json
from collections.abc import Iterator

from gemma_dist.errors import CheckpointError
from gemma_dist.model.folder import local_folder, read_model_config
from gemma_dist.tensorfile import Entry, TensorFile, open_tensors

SAMPLES_OF_A_TENSOR, SAMPLE_BYTES = 4, 1024
NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version")  # of config.json: written anew by each save


def fingerprint_base(name: str) -> dict[str, str]:
    """`base_config_hash` and `base_weights_hash` of a model folder, or of a model of the hub, which is fetched.

    The weights are told apart by names, shapes and dtypes of all tensors, and by some bytes of each, spread
    over it: a fine-tuned sister has the same shapes. How they are split over files makes no difference.

    Raises:
        CheckpointError: there is no model in safetensors at that place, or a file of it is damaged.
    """
    named = f"model.model_name_or_path = {name!r}"
    folder = local_folder(name, named)
    config = read_model_config(folder, named)
    kept = {key: value for key, value in config.items() if key not in NOT_OF_THE_MODEL}
    tensors: dict[str, TensorFile] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = open_tensors(path)
        tensors |= dict.fromkeys(file.entries, file)
    if not tensors:
        raise CheckpointError(
            f"{named}: it holds no weights in safetensors, and files that can run code "
            "(.bin, .pt) are not loaded; save it again with transformers' save_pretrained"
        )
    weights = hashlib.sha256()
    for tensor in sorted(tensors):
        entry = tensors[tensor].entries[tensor]
        weights.update(f"{tensor} {entry.dtype} {entry.shape}\n".encode())
        for sample in _samples(tensors[tensor], entry):
            weights.update(sample)
    return {
        "base_config_hash": hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16],
        "base_weights_hash": weights.hexdigest()[:16],
    }


def _samples(file: TensorFile, entry: Entry) -> Iterator[bytes]:
    """The middles of equal parts of a tensor's bytes: all of a small one."""
    part = max(entry.num_bytes // SAMPLES_OF_A_TENSOR, SAMPLE_BYTES)
    with file.path.open("rb") as opened:
        for start in range(0, entry.num_bytes, part):
            length = min(SAMPLE_BYTES, entry.num_bytes - start)
            opened.seek(entry.begin + start + (min(part, entry.num_bytes - start) - length) // 2)
            yield opened.read(length)
