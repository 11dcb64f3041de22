"""Which base a run stands on: hashes that tell one model from another, without reading all of its bytes."""

import hashlib
import json
from pathlib import Path

from gemma_dist.errors import CheckpointError
from gemma_dist.tensorfile import TensorFile, open_tensors

NUM_SAMPLED_TENSORS, SAMPLE_BYTES = 64, 1024
NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version")  # of config.json: written anew by each save


def fingerprint_base(name: str) -> dict[str, str]:
    """`base_config_hash` and `base_weights_hash` of a model folder, or of a model of the hub, which is fetched.

    The weights are told apart by names, shapes and number formats of all tensors, and by the middle of some of them: a
    fine-tuned sister has the same shapes. How they are cut into files makes no difference.

    Raises:
        CheckpointError: there is no model at that place, or a file of it is damaged.
    """
    folder = Path(name) if Path(name).is_dir() else _fetch(name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in NOT_OF_THE_MODEL}
    tensors: dict[str, TensorFile] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = open_tensors(path)
        tensors |= dict.fromkeys(file.entries, file)
    weights = hashlib.sha256()
    for tensor in sorted(tensors):
        entry = tensors[tensor].entries[tensor]
        weights.update(f"{tensor} {entry.dtype} {entry.shape}\n".encode())
    for tensor in sorted(tensors)[:: max(1, len(tensors) // NUM_SAMPLED_TENSORS)]:
        weights.update(_middle(tensors[tensor], tensor))
    return {
        "base_config_hash": hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16],
        "base_weights_hash": weights.hexdigest()[:16],
    }


def _middle(file: TensorFile, tensor: str) -> bytes:
    entry = file.entries[tensor]
    length = min(SAMPLE_BYTES, entry.num_bytes)
    with file.path.open("rb") as opened:
        opened.seek(entry.begin + (entry.num_bytes - length) // 2)
        return opened.read(length)


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", "*.safetensors"]))
    except Exception as error:  # the client's own family of errors has a dozen roots
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"model.model_name_or_path = {name!r}: neither a folder nor a model that the hub gives: {reason}"
        ) from None
