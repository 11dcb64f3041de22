"""`gemma-dist check-model`: is this folder what transformers, vLLM, SGLang and llama.cpp need?

Nothing of the weights but their headers is read, no code of the folder is run, and nothing is written.
"""

import json
from pathlib import Path

from gemma_dist.data.strict import reason
from gemma_dist.errors import CheckpointError
from gemma_dist.model.flat_sizes import flat_sizes
from gemma_dist.model.folder import ADAPTER_CONFIG, read_json_object, refuse_custom_code, refuse_pickle
from gemma_dist.model.load import read_config
from gemma_dist.serving.commands import LLAMA_CPP, server_commands
from gemma_dist.serving.prompts import check_prompts
from gemma_dist.serving.report import Finding, ModelReport, require_model
from gemma_dist.serving.weights import check_weights


def check_model(folder: Path) -> ModelReport:
    """What a model folder is, and what servers would stumble over in it.

    Raises:
        CheckpointError: there is no Gemma 4 with weights in safetensors: an adapter, a run that did not end, another
            model, or nothing.
    """
    report = ModelReport(folder, commands=server_commands(folder))
    require_model(folder)
    refuse_pickle(folder)
    try:
        refuse_custom_code(folder)
    except CheckpointError as error:
        why = "servers stop at it, or run the code if they are told to trust it"
        report.findings.append(Finding("auto_map", str(error), why, "take auto_map out of that file"))
        return report
    if (folder / ADAPTER_CONFIG).exists():
        why = "transformers adds the adapter to the model on loading, other servers do not"
        report.findings.append(Finding(ADAPTER_CONFIG, "lies in a whole model's folder", why, "move the adapter away"))
    try:
        config = read_config(str(folder))
    except Exception as error:  # transformers checks each value, with errors of its own
        report.findings.append(
            Finding("config.json", reason(error), "no server can build the model", "take the base's")
        )
        return report
    report.model_class = (config.architectures or [""])[0]
    if not report.model_class.endswith("ForConditionalGeneration"):
        why = "servers pick the model's class by it"
        what = f"architectures is {config.architectures!r}"
        remedy = "let it be the base's: Gemma4ForConditionalGeneration, or of 12B Gemma4UnifiedForConditionalGeneration"
        report.findings.append(Finding("config.json", what, why, remedy))
    if sizes := flat_sizes(read_json_object(folder / "config.json", "the config is broken")):
        what = "tells the sizes of full layers by per_layer_config alone, as transformers does from 5.15 on"
        why = "transformers before 5.15, vLLM up to 0.27 and llama.cpp before its pull request 26882 do not know it"
        remedy = f"add to text_config: {json.dumps(sizes)[1:-1]}"
        report.findings.append(Finding("config.json", what, why, remedy, "note"))
    check_weights(folder, config, report)
    if report.quantization == "bitsandbytes":
        why, remedy = "it makes no numbers of bitsandbytes' codes", "convert a merge of whole weights"
        what = "llama.cpp's converter does not take these weights"
        report.findings.append(Finding("config.json", what, why, remedy, "note"))
        report.commands.pop(LLAMA_CPP, None)
    check_prompts(folder, config, report)
    return report
