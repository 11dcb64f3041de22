"""`gemma-dist card`: write the card of a result anew, with what an evaluation found."""

from pathlib import Path
from typing import Any

from gemma_dist.errors import CheckpointError, ConfigError
from gemma_dist.evaluate.log import hash_adapter
from gemma_dist.evaluate.runs import REPORT
from gemma_dist.model.card import CARD, write_card
from gemma_dist.model.fingerprint import fingerprint_base
from gemma_dist.model.folder import ADAPTER_CONFIG, read_json_object
from gemma_dist.model.record import ADAPTER_RECORD, read_record


def write_card_of(folder: Path, evaluation: Path | None) -> Path:
    """Write the card of an adapter or model that `train` or `merge` wrote. Returns its path.

    Args:
        evaluation: the folder that `evaluate` wrote of this very adapter or model.

    Raises:
        CheckpointError: the folder has no record of ours, or the evaluation is of other weights.
        ConfigError: somebody wrote the card by hand.
    """
    record = read_record(folder)
    if record is None:
        raise CheckpointError(
            f"{folder} has no {ADAPTER_RECORD}, so nothing is known of how it came about; give what `train` or `merge` "
            "wrote"
        )
    report = None
    if evaluation is not None:
        report = read_json_object(evaluation / REPORT, f"{evaluation} is not what `evaluate` wrote")
        _require_same_weights(folder, report, evaluation)
    if not write_card(folder, record, report):
        raise ConfigError(f"{folder / CARD} was written by hand and stays as it is; move it away to have one written")
    return folder / CARD


def _require_same_weights(folder: Path, report: dict[str, Any], evaluation: Path) -> None:
    """Raises CheckpointError where an evaluation is not of the weights in `folder`."""
    if (folder / ADAPTER_CONFIG).exists() and not (folder / "config.json").exists():
        evaluated, here = report.get("adapter_hash") or "no adapter", hash_adapter(folder)
    else:
        evaluated, here = report.get("model_hash"), "-".join(fingerprint_base(str(folder)).values())
        if report.get("adapter_hash") is not None:
            evaluated = f"{evaluated} with an adapter"
    if evaluated != here:
        raise CheckpointError(
            f"{evaluation} evaluated other weights ({evaluated}) than those in {folder} ({here}); evaluate this folder"
        )
