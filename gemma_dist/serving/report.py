"""What `gemma-dist check-model` says of a model folder, and what is none."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from gemma_dist.errors import CheckpointError
from gemma_dist.files import size
from gemma_dist.model.folder import read_json_object, refuse_adapter

NUM_NAMED = 3  # tensors that a finding names


@dataclass(frozen=True)
class Finding:
    """Something in a folder that a server stumbles over (`fault`), or does otherwise than one may expect (`note`)."""

    where: str  # a file of the folder, or a tensor
    what: str
    why: str
    remedy: str
    level: Literal["fault", "note"] = "fault"


@dataclass
class ModelReport:
    """What was found in a folder."""

    folder: Path
    model_class: str = ""
    num_tensors: int = 0
    num_bytes: int = 0
    dtypes: list[str] = field(default_factory=list)  # of the weights, as safetensors names them
    extras: dict[str, int] = field(default_factory=dict)  # tensors that no model loads, by what they are
    quantization: str | None = None
    chat_template: str | None = None  # the revision, where it is a known one
    commands: dict[str, str] = field(default_factory=dict)  # that serve the folder, by the server
    findings: list[Finding] = field(default_factory=list)

    @property
    def faults(self) -> list[Finding]:
        """What has to be mended before the folder is served."""
        return [finding for finding in self.findings if finding.level == "fault"]

    def to_json(self) -> dict[str, Any]:
        """The report, for `--json`."""
        return asdict(self) | {"folder": str(self.folder), "num_faults": len(self.faults)}

    def render(self) -> str:
        """The report as lines for the terminal."""
        lines = [f"{self.folder}: {self._verdict()}"]
        if self.model_class:
            held = [self.model_class, size(self.num_bytes)]
            if self.dtypes:
                held.append(f"{self.num_tensors:,} tensors in {'/'.join(self.dtypes)}")
            if self.quantization:
                held.append(f"quantized: {self.quantization}")
            lines.append(f"  {', '.join(held)}")
        lines += [f"  {number:,} more that no model loads: {what}" for what, number in self.extras.items()]
        if self.chat_template:
            lines.append(f"  chat template: {self.chat_template}")
        for finding in sorted(self.findings, key=lambda finding: finding.level):
            lines += [
                "",
                f"  {finding.level}: {finding.where}: {finding.what}",
                f"      why     {finding.why}",
                f"      remedy  {finding.remedy}",
            ]
        if not self.faults:
            lines += ["", "  served by", *(f"      {command}" for command in self.commands.values())]
        return "\n".join(lines)

    def _verdict(self) -> str:
        if not self.faults:
            return "fit to be served"
        return f"{len(self.faults)} fault{'s' * (len(self.faults) > 1)} that a server would stumble over"


def named(names: list[str]) -> str:
    """A few of many names: the first ones, and how many more there are."""
    more = f" and {len(names) - NUM_NAMED:,} more" if len(names) > NUM_NAMED else ""
    return ", ".join(names[:NUM_NAMED]) + more


def require_model(folder: Path) -> None:
    """Raises CheckpointError for what is no folder of a whole Gemma 4: an adapter, another model, or nothing."""
    refuse_adapter(folder)
    named = f"{folder} is not the folder of a whole Gemma 4"
    if not folder.is_dir():
        raise CheckpointError(f"{named}, but a file; give the folder that `gemma-dist merge` or `train` wrote")
    model_type = read_json_object(folder / "config.json", named).get("model_type")
    if model_type not in ("gemma4", "gemma4_unified"):
        raise CheckpointError(f"{named}: its config.json says model_type {model_type!r}; give one of Gemma 4")
