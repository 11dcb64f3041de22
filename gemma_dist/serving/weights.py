"""The weights of a model folder beside the model that they are for: files, names, shapes and dtypes.

Headers alone are read. The model is built on the meta device, so a 31B takes seconds and no memory.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from gemma_dist.data.strict import reason
from gemma_dist.errors import CheckpointError
from gemma_dist.model.folder import WEIGHTS, WEIGHTS_INDEX, read_json_object, refuse_pickle
from gemma_dist.model.vision import name_in_model
from gemma_dist.serving.report import Finding, ModelReport, named
from gemma_dist.tensorfile import TORCH_DTYPES, Entry, TensorFile, open_tensors

AGAIN = "download or save the model again"
SHARED_KEYS_AND_VALUES = re.compile(r"\blayers\.(\d+)\.self_attn\.[kv]_(proj|norm)\.weight$")
# What bitsandbytes keeps beside a weight in 4 or 8 bits.
BESIDE_QUANTIZED = re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format)$|\.quant_state\.")


def check_weights(folder: Path, config: Any, report: ModelReport) -> None:
    """Add to `report` what the weights are, and what is wrong with them.

    Args:
        config: of the model, as transformers reads it.

    Raises:
        CheckpointError: the folder has no weights in safetensors.
    """
    entries, findings = _read_entries(folder)
    report.findings += findings
    report.num_tensors = len(entries)
    report.num_bytes = sum(entry.num_bytes for entry in entries.values())
    report.dtypes = sorted({entry.dtype for entry in entries.values()})
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        report.quantization = str(quantization.get("quant_method", "by a method that is not named"))
    has_faults = any(finding.level == "fault" for finding in findings)
    if entries and not has_faults:  # else tensors are missing because files are
        report.findings += _compare(entries, config, report)
    report.findings += _check_dtypes(entries, config, is_quantized=bool(quantization))


def _read_entries(folder: Path) -> tuple[dict[str, Entry], list[Finding]]:
    """The header of every tensor that a loader takes, and what is wrong with the files."""
    whole, index = (folder / WEIGHTS).exists(), (folder / WEIGHTS_INDEX).exists()
    beside = sorted(path.name for path in folder.glob("*.safetensors"))
    if not whole and not index:
        refuse_pickle(folder)
        raise CheckpointError(
            f"{folder} has neither {WEIGHTS} nor {WEIGHTS_INDEX}; save it with transformers' save_pretrained"
        )
    findings: list[Finding] = []
    weight_map: dict[str, str] | None = None
    wanted = [WEIGHTS]
    if not whole:
        try:
            weight_map = read_json_object(folder / WEIGHTS_INDEX, "the index is broken").get("weight_map")
        except CheckpointError as error:
            return {}, [Finding(WEIGHTS_INDEX, str(error), "no loader finds a tensor", AGAIN)]
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            return {}, [Finding(WEIGHTS_INDEX, "has no weight_map", "no loader finds a tensor", AGAIN)]
        wanted = sorted(set(weight_map.values()))
    findings += [_other_file(name, wanted, has_whole=whole) for name in beside if name not in wanted]
    files = []
    for name in wanted:
        if Path(name).name != name:
            findings.append(Finding(WEIGHTS_INDEX, f"names {name!r}", "it is no file of this folder", AGAIN))
            continue
        if not (folder / name).is_file():
            findings.append(Finding(name, "is named by the index and absent", "its tensors are missing", AGAIN))
            continue
        try:
            files.append(open_tensors(folder / name))
        except CheckpointError as error:
            findings.append(Finding(name, str(error), "a download or a copy was cut short", AGAIN))
    entries = {name: entry for file in files for name, entry in file.entries.items()}
    if weight_map is not None and len(files) == len(wanted):
        findings += _check_index(weight_map, files)
    return entries, findings


def _other_file(name: str, wanted: list[str], *, has_whole: bool) -> Finding:
    """For a file beside those that transformers takes: the whole one, or else what the index names."""
    why = "a download fetches it as well"
    if has_whole:
        why = "loaders differ: vLLM and SGLang take what an index names, or without one every *.safetensors"
    what = f"lies beside {named(wanted)}, which alone transformers loads"
    remedy = "remove what an earlier save left, and serve a run's result in the place of its checkpoint"
    return Finding(name, what, why, remedy, "fault" if has_whole else "note")


def _check_index(weight_map: Mapping[str, str], files: Iterable[TensorFile]) -> list[Finding]:
    """Whether each tensor lies in the file that the index says, and in no other."""
    places: dict[str, list[str]] = defaultdict(list)
    for file in files:
        for name in file.entries:
            places[name].append(file.path.name)
    odd = sorted(name for name in {*places, *weight_map} if places.get(name) != [weight_map.get(name)])
    if not odd:
        return []
    found = " and ".join(places.get(odd[0], [])) or "no file"
    what = f"says otherwise than the files where {len(odd):,} tensors lie: {odd[0]} in {weight_map.get(odd[0])}"
    return [Finding(WEIGHTS_INDEX, f"{what}, which {found} holds", "a loader looks in the wrong file", AGAIN)]


def _compare(entries: Mapping[str, Entry], config: Any, report: ModelReport) -> list[Finding]:
    """What of the files has no place in the model, and the other way round; counts the extras that are known."""
    try:
        expected = _expected_shapes(config)
    except Exception as error:  # sizes that make no model may raise anything
        why = "no server can build the model"
        return [Finding("config.json", f"makes no model: {reason(error)}", why, "take the config.json of the base")]
    in_model = {name_in_model(name, config.model_type): name for name in entries}
    text = config.get_text_config()
    is_tied = getattr(config, "tie_word_embeddings", True)
    first_shared = text.num_hidden_layers - getattr(text, "num_kv_shared_layers", 0)
    unexpected = []
    extras: Counter[str] = Counter()
    for name in sorted(in_model.keys() - expected.keys()):
        shared = SHARED_KEYS_AND_VALUES.search(name)
        if shared and first_shared <= int(shared[1]) < text.num_hidden_layers:
            extras["keys and values of layers that share those of others"] += 1
        elif not (report.quantization and BESIDE_QUANTIZED.search(name)):
            unexpected.append(in_model[name])
    if is_tied and "lm_head.weight" in in_model:
        extras["the LM head, which is the token embedding"] += 1
    report.extras = dict(extras)
    missing = sorted(name for name in expected.keys() - in_model.keys() if not (is_tied and name == "lm_head.weight"))
    findings = []
    if missing:
        findings.append(
            Finding(
                named(missing),
                "missing",
                f"{report.model_class} has {len(expected):,} tensors; transformers fills these with random numbers, "
                "others refuse the model",
                "merge or save the model again, from a whole base",
            )
        )
    if unexpected:
        findings.append(
            Finding(
                named(unexpected),
                f"no tensor{'s' * (len(unexpected) > 1)} of {report.model_class}",
                "vLLM and llama.cpp end with an error at a name that they do not know; transformers drops the tensor",
                "remove it, or give it the name that the base's files have",
            )
        )
    others = {}  # shapes other than those of the model
    for name in sorted(expected.keys() & in_model.keys()):
        entry = entries[in_model[name]]
        packed = report.quantization is not None and entry.dtype not in TORCH_DTYPES
        if entry.shape != expected[name] and not packed:
            others[in_model[name]] = (
                f"has the shape {list(entry.shape)}, and config.json makes it {list(expected[name])}"
            )
    if others:
        what = f"{'the first ' * (len(others) > 1)}{next(iter(others.values()))}"
        remedy = "take config.json and weights from the same model"
        findings.append(Finding(named([*others]), what, "no loader takes it", remedy))
    return findings


def _expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of the model of a config: parameters, and the buffers that are saved."""
    from transformers import AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _check_dtypes(entries: Mapping[str, Entry], config: Any, *, is_quantized: bool) -> list[Finding]:
    """One float dtype, the one that config.json names: another one is a left-over, and takes the room of two."""
    num_bytes: Counter[str] = Counter()
    for entry in entries.values():
        num_bytes[entry.dtype] += entry.num_bytes
    if is_quantized or not num_bytes:
        return []
    (main, _), *others = num_bytes.most_common()
    findings = []
    for dtype, _ in others:
        odd = sorted(name for name, entry in entries.items() if entry.dtype == dtype)
        findings.append(
            Finding(
                named(odd),
                f"stored as {dtype}, the others as {main}",
                "a left-over of training or of an edit: it takes more room, and servers round it on loading",
                f"store it as {main}",
            )
        )
    wanted = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(wanted, str):
        wanted = getattr(torch, wanted, None)
    if main not in TORCH_DTYPES:
        findings.append(
            Finding(
                "config.json",
                f"has no quantization_config, and the weights are stored as {main}",
                "no loader knows how to make numbers of them",
                f"store them as one of {', '.join(TORCH_DTYPES)}, or keep the quantization_config they were saved with",
            )
        )
    elif wanted is not None and wanted != TORCH_DTYPES[main]:
        findings.append(
            Finding(
                "config.json",
                f"says dtype {str(wanted).removeprefix('torch.')}, and the weights are stored as {main}",
                "servers compute in the dtype of config.json and take twice the disk, or lose digits, for nothing",
                f"store the weights in that dtype, or write {str(TORCH_DTYPES[main]).removeprefix('torch.')} there",
            )
        )
    return findings
