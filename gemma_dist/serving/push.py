"""`gemma-dist push`: a result to the hub, and of its folder what belongs there alone.

Weights, settings, tokenizer, templates, card and licence go; checkpoints, optimizer states, logs and all else stay.
Places on this machine are taken out of the settings on the way, and what looks like a key stops it.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_dist.errors import CheckpointError, ConfigError
from gemma_dist.files import size
from gemma_dist.model.adapter_config import read_adapter_config
from gemma_dist.model.card import CARD, HUB_NAME, PEFTS, public_name
from gemma_dist.model.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, weight_files
from gemma_dist.serving.check import check_model
from gemma_dist.serving.report import ModelReport
from gemma_dist.tensorfile import open_tensors

WANTED = re.compile(
    "|".join(
        (
            r"(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?",
            r"(adapter_|generation_|processor_|preprocessor_|video_preprocessor_|tokenizer_)?config\.json",
            r"tokenizer\.(json|model)|special_tokens_map\.json|added_tokens\.json|chat_template\.(json|jinja)",
            r"gemma_dist\.json|README\.md|(LICENSE|NOTICE)[\w.-]*",
        )
    )
)
SECRETS = {
    "a token of the hub": re.compile(r"\bhf_[A-Za-z0-9]{30,}"),
    "a key of OpenAI's or Anthropic's form": re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),
    "a key of AWS": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}
MAX_TEXT_BYTES = 100_000_000  # of a file that is looked through: a tokenizer has 30 MB


@dataclass
class Upload:
    """What would go to the hub."""

    folder: Path
    name: str
    private: bool
    files: dict[str, int]  # bytes of each, by its name
    left_out: list[str]
    rewritten: dict[str, str] = field(default_factory=dict)  # the text of files that hold places on this machine
    report: ModelReport | None = None  # of a model; None: an adapter

    def render(self) -> str:
        """The plan as lines for the terminal."""
        kind = "private" if self.private else "public"
        lines = [f"{self.folder} -> {self.name}, a {kind} model of the hub, made if need be"]
        for name, num_bytes in self.files.items():
            more = "   without the places on this machine" if name in self.rewritten else ""
            if (self.folder / name).is_symlink():
                more += f"   a link to {(self.folder / name).resolve()}"
            lines.append(f"  {size(num_bytes):>10}  {name}{more}")
        lines.append(f"  {size(sum(self.files.values())):>10}  together")
        if self.left_out:
            lines.append(f"  stays here: {', '.join(self.left_out)}")
        if self.report is not None:
            lines += [f"  {finding.level}: {finding.where}: {finding.what}" for finding in self.report.findings]
            lines.append("  check-model: " + ("fit to be served" if not self.report.faults else "see the faults above"))
        return "\n".join(lines)


def plan_upload(folder: Path, name: str, *, private: bool) -> Upload:
    """What of a result would go to the hub as `name`. Nothing is sent, and no network is asked.

    Raises:
        ConfigError: the name is no OWNER/MODEL; a file holds what looks like a secret.
        CheckpointError: the folder holds neither a Gemma 4 nor an adapter; its card is an empty template.
    """
    if not HUB_NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no name of the hub; give OWNER/MODEL")
    report = None
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        read_adapter_config(folder)
        weights = [folder / ADAPTER_WEIGHTS]
        open_tensors(weights[0])
    else:
        report = check_model(folder)
        weights = weight_files(folder)
    held = sorted(folder.iterdir())
    sent = [path for path in held if path.is_file() and (WANTED.fullmatch(path.name) or path in weights)]
    left_out = [path.name + "/" * path.is_dir() for path in held if path not in sent]
    if report is not None:  # what stays here is in no server's way
        report.findings = [finding for finding in report.findings if finding.where not in left_out]
    upload = Upload(folder, name, private, {path.name: path.stat().st_size for path in sent}, left_out, report=report)
    _require_card(folder)
    _require_no_secrets(sent)
    for path in sent:
        if path.suffix == ".json" and path.name != "tokenizer.json" and (text := _without_places(path)) is not None:
            upload.rewritten[path.name] = text
    return upload


def push(upload: Upload) -> str:
    """Send what was planned; the address of the model.

    Raises:
        CheckpointError: the model has faults.
        ConfigError: the hub is not asked (HF_HUB_OFFLINE), or refused.
    """
    from huggingface_hub import HfApi, constants

    if upload.report is not None and upload.report.faults:
        raise CheckpointError(f"{upload.folder} is not fit to be served, so nothing was sent; mend the faults above")
    if constants.HF_HUB_OFFLINE:
        raise ConfigError("HF_HUB_OFFLINE is set, so nothing was sent; unset it")
    api = HfApi()
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary)
        for name in upload.files:
            if name in upload.rewritten:
                (staged / name).write_text(upload.rewritten[name], encoding="utf-8")
            else:
                (staged / name).symlink_to((upload.folder / name).resolve())
        message = "Upload a model of gemma_dist"
        try:
            url = api.create_repo(upload.name, private=upload.private, exist_ok=True)
            if upload.private and not api.model_info(upload.name).private:
                raise ConfigError(f"{upload.name} is there already and public, so nothing was sent; name another one")
            api.upload_folder(folder_path=staged, repo_id=upload.name, commit_message=message)
        except ConfigError:
            raise
        except Exception as error:  # the client's own family of errors has a dozen roots
            reason = str(error).partition("\n")[0]
            raise ConfigError(
                f"the hub did not take {upload.name} ({reason}); check the name and `hf auth login`, and run the same "
                "command again: what it has already is not sent twice"
            ) from error
    return str(url)


def _require_card(folder: Path) -> None:
    """Raises CheckpointError where the card is missing, or PEFT's empty template."""
    card = folder / CARD
    if not card.is_file() or PEFTS in card.read_text(encoding="utf-8", errors="replace"):
        what = "an empty template" if card.is_file() else "absent"
        raise CheckpointError(f"{card} is {what}; `gemma-dist card` writes it, or write one by hand")


def _require_no_secrets(paths: Iterable[Path]) -> None:
    """Raises ConfigError where a text that would be sent holds what looks like a key."""
    for path in paths:
        if path.suffix == ".safetensors" or path.stat().st_size > MAX_TEXT_BYTES:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for what, pattern in SECRETS.items():
            if pattern.search(text):
                raise ConfigError(f"{path} holds what looks like {what}, so nothing is sent; take it out")


def _without_places(path: Path) -> str | None:
    """The text of a JSON file without places on this machine; None where it has none, or is no JSON."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    public = _public(value)
    return None if public == value else json.dumps(public, ensure_ascii=False, indent=2) + "\n"


def _public(value: Any) -> Any:
    """A value of JSON with the last part of each absolute path in its place."""
    if isinstance(value, dict):
        return {_public(key): _public(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_public(inner) for inner in value]
    if isinstance(value, str) and (os.path.isabs(value) or value.startswith(("~", "./", "../"))):
        return public_name(value)
    return value
