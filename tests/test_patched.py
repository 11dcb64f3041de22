"""What this package replaces, overrides or calls of other packages beyond what they document, and as it was when read.

A new version of one of them may change it without a word, so each is listed with a hash: of its source where we stand
in for it or restate what it does, of its parameters where we only call it. Where a test here fails: read what changed
(`git diff` of the two versions), mend the module that it names, run that module's tests, then write the new hash.
"""

import ast
import hashlib
import importlib
import inspect
import mmap
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from gemma_dist import world

PACKAGE = Path(__file__).parents[1] / "gemma_dist"
UNIFIED = "transformers.models.gemma4_unified.modeling_gemma4_unified"
GEMMA4 = "transformers.models.gemma4.modeling_gemma4"
ZERO3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
BNB = "transformers.quantizers.quantizer_bnb_4bit:Bnb4BitHfQuantizer"
ZERO2 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"

# module:name -> (the module of ours, what it does with it, hash of the source)
SOURCES = {
    "transformers.modeling_utils:PreTrainedModel._load_pretrained_model": (
        "model/zero3.py",
        "replaces",
        "971d54fd9ded",
    ),
    "torch.distributed.rendezvous:_torchelastic_use_agent_store": ("meeting.py", "restates", "b052cdac9e16"),
    "deepspeed.runtime.zero:Init._zero_init_param": ("model/zero3.py", "replaces", "2930fbd6b94e"),
    "transformers.core_model_loading:set_param_for_module": ("model/zero3.py", "extends", "0c474ce3b9ae"),
    "transformers.modeling_utils:caching_allocator_warmup": ("model/zero3.py", "leaves out", "e7043d6ebcb7"),
    "deepspeed.ops.adam:DeepSpeedCPUAdam.step": ("train/optimizer.py", "restates a call of", "ffccd5749fc0"),
    "transformers:PreTrainedModel._adjust_missing_and_unexpected_keys": (
        "model/load.py",
        "gives other names",
        "82ffcc857800",
    ),
    "transformers.core_model_loading:WeightTransform.was_used": ("model/zero3.py", "asks", "bfc3930e5c9e"),
    "transformers.core_model_loading:revert_weight_conversion": ("model/zero3.py", "prepares", "fc94e3462e01"),
    f"{UNIFIED}:Gemma4UnifiedModel.forward": ("model/vision.py", "gives other masks", "8041ad68023d"),
    f"{UNIFIED}:create_masks_for_vision_model": ("model/vision.py", "calls", "9eaf2b7dbfe4"),
    f"{UNIFIED}:get_block_sequence_ids_for_mask": ("model/vision.py", "calls", "d1d890e748d4"),
    f"{GEMMA4}:create_masks_for_vision_model": ("model/attention.py and rows.py", "restates", "9eaf2b7dbfe4"),
    f"{GEMMA4}:Gemma4Model.forward": ("model/images.py and rows.py", "gives texts and masks", "b0f75616224e"),
    f"{GEMMA4}:Gemma4TextModel.forward": ("evaluate/cache.py", "gives a cache of its own", "b733f0706420"),
    f"{GEMMA4}:Gemma4TextModel._maybe_slice_kv_shared_inputs": (
        "evaluate/tree.py",
        "puts the ends of prompts last for",
        "8afb4a068e2e",
    ),
    f"{UNIFIED}:Gemma4UnifiedTextModel.forward": ("evaluate/cache.py", "gives a cache of its own", "2793aff759e8"),
    f"{GEMMA4}:Gemma4Model.get_image_features": ("model/images.py", "restates", "209b4c41ad0b"),
    f"{GEMMA4}:Gemma4VisionModel.forward": ("model/images.py", "gives a mask and soft tokens", "9f5cdc4ae1af"),
    f"{GEMMA4}:Gemma4VisionEncoder.forward": ("model/images.py", "gives a mask", "320096a3c1cd"),
    f"{UNIFIED}:Gemma4UnifiedModel.get_image_features": ("model/images.py", "restates", "112e438c6c1d"),
    f"{GEMMA4}:Gemma4TextAttention.forward": (
        "model/attention.py and evaluate/attention.py",
        "is called by",
        "4c979630136f",
    ),
    f"{UNIFIED}:Gemma4UnifiedTextAttention.forward": (
        "model/attention.py and evaluate/attention.py",
        "is called by",
        "4c979630136f",
    ),
    "bitsandbytes.nn:Linear4bit.forward": ("model/load.py", "keeps from repacking", "d52cf6345771"),
    "transformers:Trainer._init_training_state": ("train/trainer.py", "extends", "8fbd17ebb7d3"),
    "transformers:Trainer._prepare_for_training": ("train/trainer.py", "extends", "f55950593d7e"),
    "transformers:Trainer.get_batch_samples": ("train/trainer.py", "replaces", "0b3727386f73"),
    "transformers:Trainer._run_epoch": ("train/trainer.py", "gives micro-batches one by one", "31aff00f34c3"),
    "transformers:Trainer._get_grad_norm": ("train/trainer.py", "extends", "913ba6f52f07"),
    "transformers:Trainer._maybe_log_save_evaluate": ("train/trainer.py", "does a part of", "af101534f0f7"),
    "transformers:Trainer._save_checkpoint": ("train/trainer.py", "replaces", "a9111e30faa9"),
    "transformers:Trainer.save_model": ("train/trainer.py", "replaces", "705727ee10c8"),
    "transformers:TrainingArguments.n_gpu": ("train/trainer.py", "overrides", "5dd70896e4a3"),
    "trl:SFTTrainer.__init__": ("train/trainer.py", "undoes a part of", "90b61e42b690"),
    "trl:SFTTrainer.compute_loss": ("train/trainer.py", "replaces", "ca448211ff65"),
    "transformers.modeling_layers:GradientCheckpointingLayer.__call__": (
        "train/trainer.py",
        "looks into",
        "b11681464e3e",
    ),
    "deepspeed.runtime.engine:DeepSpeedEngine.step": ("train/trainer.py", "wraps", "02d6a4373435"),
    "deepspeed.runtime.engine:DeepSpeedEngine._zero3_consolidated_16bit_state_dict": (
        "train/weights.py",
        "calls",
        "4d7c0d9c1571",
    ),
    f"{ZERO3}._reassign_or_swap_out_partitioned_parameters": ("train/optimizer.py", "calls", "89aab0f80f1a"),
    f"{ZERO3}.checkpoint_event_prologue": ("train/weights.py", "calls", "01713a52e24b"),
    f"{ZERO3}.checkpoint_event_epilogue": ("train/weights.py", "calls", "9b05d627407c"),
    f"{ZERO2}.update_lp_params": ("train/optimizer.py", "calls", "3cdce069e3c6"),
    "deepspeed.utils.tensor_fragment:get_hp_fragment_mapping": (
        "train/optimizer.py",
        "reads what it makes",
        "46260f9494e6",
    ),
    "transformers.integrations.moe:_grouped_linear": ("model/experts.py", "calls", "027b89afcacd"),
    f"{BNB}._process_model_before_weight_loading": ("model/experts.py", "extends", "da5c4cea7a93"),
    f"{BNB}._process_model_after_weight_loading": ("model/experts.py", "extends", "2ec5ee88c2a1"),
    f"{BNB}.param_needs_quantization": ("model/experts.py", "extends", "c746638bcc31"),
    f"{BNB}.param_element_size": ("model/experts.py", "extends", "952ad805c54b"),
    "transformers.integrations.bitsandbytes:Bnb4bitQuantize.convert": ("model/experts.py", "extends", "f849fae99371"),
    "accelerate.state:AcceleratorState.__init__": ("model/fsdp.py", "is told of GPUs", "e5c18cb49fc9"),
    "accelerate.utils.fsdp_utils:fsdp2_prepare_model": ("model/fsdp.py", "relies on", "8a4cb9db8310"),
    "accelerate.utils.fsdp_utils:fsdp2_prepare_auto_wrap_policy": ("model/fsdp.py", "names classes to", "f5f5c49ceebd"),
    "accelerate:Accelerator._prepare_fsdp2": ("model/fsdp.py", "relies on", "123905d6d7c2"),
    "bitsandbytes.nn.modules:fix_4bit_weight_quant_state_from_module": ("model/fsdp.py", "relies on", "9a95968c6c18"),
    "bitsandbytes.nn:Params4bit.__torch_function__": ("model/fsdp.py", "relies on", "05a2cd178d51"),
    "peft:LoraConfig._register_custom_module": ("model/experts.py", "calls", "970c0dbe044e"),
    "trl.trainer.utils:add_fused_lm_head": ("model/head.py", "restates", "422d009f04b6"),
    "trl.kernels.chunked_logprob:_use_triton": ("plan/kernels.py", "replaces", "f0510984e05a"),
    "trl.kernels.chunked_logprob:_addmm_fp32": ("plan/kernels.py", "replaces", "136dc3d2a331"),
    "transformers.cli.serving.utils:get_response_template": (
        "serving/transformers_serve.py",
        "adds to what is read by",
        "8e54dd243033",
    ),
    "s3fs:S3FileSystem._cat_file": ("shards/ranged_s3.py", "restates", "6f7b053c0211"),
    "fsspec.implementations.http:HTTPFileSystem._cat_file": ("shards/ranged_http.py", "restates", "00dd13ebc58d"),
    "peft.utils.other:get_pattern_key": ("merge/plan.py", "restates", "be585ac2daa2"),
}
# The same, with a hash of the parameters: their names, their kinds, and which may be left out.
SIGNATURES = {
    "trl.kernels.chunked_logprob:ChunkedLogProbFunction.forward": ("model/head.py", "calls", "a6f0287ba652"),
    "trl.trainer.utils:maybe_gather_lm_head_ctx": ("model/head.py", "calls", "48377c61adad"),
    "deepspeed.runtime.zero:Init._convert_to_deepspeed_param": ("model/zero3.py", "calls", "78864d891a75"),
    "torch.utils.cpp_extension:_get_build_directory": ("model/operators.py", "calls", "682e4809ec65"),
    "transformers.core_model_loading:rename_source_key": ("model/zero3.py", "calls", "d5f4780cd8dc"),
    "transformers.modeling_utils:LoadStateDictInfo": ("model/zero3.py", "makes", "d2613f373c08"),
    "transformers.integrations.sdpa_attention:sdpa_attention_forward": (
        "model/attention.py and evaluate/attention.py",
        "calls",
        "a7c7d3b4dd64",
    ),
    "transformers:Gemma4Processor._get_num_multimodal_tokens": ("data/encode.py", "calls", "c4fd5f755797"),
    "transformers:Gemma4UnifiedProcessor._get_num_multimodal_tokens": ("data/encode.py", "calls", "c4fd5f755797"),
    "torch.distributed.tensor._utils:compute_local_shape_and_global_offset": (
        "train/optimizer.py",
        "calls",
        "203f1f8d555b",
    ),
    f"{ZERO3}.has_overflow": ("train/trainer.py", "calls", "42e8122937a2"),
    f"{ZERO2}.has_overflow": ("train/trainer.py", "calls", "2f133dcf6730"),
    f"{ZERO3}.get_param_id": ("train/optimizer.py", "calls", "78864d891a75"),
    "s3fs:S3FileSystem._call_s3": ("shards/ranged_s3.py", "calls", "ccc302da4a3f"),
    "fsspec.implementations.http:HTTPFileSystem._raise_not_found_for_status": (
        "shards/ranged_http.py",
        "calls",
        "8d338e37a1c0",
    ),
    "peft.tuners.lora.layer:ParamWrapper": ("model/load.py", "names to DeepSpeed", "5c6bc7e99056"),
}
KINDS = [("source", name) for name in SOURCES] + [("parameters", name) for name in SIGNATURES]
# Private names of Python and of torch, whose simulation of a step (plan/) lives among its internals: what it finds is
# compared with measured peaks.
OF_PYTHON_AND_TORCH = {
    *("_asdict", "_current_frames", "_exit", "_fields"),
    *("_parameters", "_buffers", "_cdata", "_known_values", "_disable_current_modes"),
    *("_local_scalar_dense", "_scaled_dot_product_attention_math", "_schema"),
}


def find(name: str) -> Any:
    module, _, path = name.partition(":")
    found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found.fget if isinstance(found, property) else found


def digest(kind: str, found: Any) -> str:
    if kind == "source":
        text = inspect.getsource(found)
    else:
        parameters = inspect.signature(found).parameters.values()
        text = " ".join(f"{one.name} {one.kind.name} {one.default is one.empty}" for one in parameters)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@pytest.mark.parametrize(("kind", "name"), KINDS, ids=[name for _, name in KINDS])
def test_what_we_patch_is_what_was_read(kind: str, name: str) -> None:
    module, what, expected = (SOURCES if kind == "source" else SIGNATURES)[name]
    package = name.partition(":")[0].partition(".")[0]
    where = f"{package} {version(package)}"
    try:
        found = digest(kind, find(name))
    except (ImportError, AttributeError):
        pytest.fail(f"{where} has no {name} any more, which gemma_dist/{module} {what}")
    assert found == expected, (
        f"{where} has another {kind} of {name}, which gemma_dist/{module} {what}: read the change, mend the module, "
        f"and write {found} here"
    )


@pytest.mark.parametrize("name", sorted(world.NCCL_DEFAULTS))
def test_torch_reads_the_variables_that_are_set_for_nccl(name: str) -> None:
    import torch

    library = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    if not library.exists():
        pytest.skip("this torch was built without CUDA")
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        assert content.find(name.encode()) >= 0


def test_each_private_name_that_is_used_of_others_is_listed() -> None:
    listed = {name.rpartition(":")[2].rpartition(".")[2] for name in (*SOURCES, *SIGNATURES)}
    # Attributes of objects: what makes or reads them is listed instead.
    listed |= {"_gradient_checkpointing_func", "_hp_mapping", "_weight_conversions", "_is_hf_initialized"}
    listed |= {"_keys_to_ignore_on_load_unexpected", "_attn_implementation", "_no_split_modules"}
    listed |= {"_ChunkedLogProbFunction", "_CHUNKED_LOGPROB_CHUNK_SIZE"}  # names of trl.trainer.utils
    listed |= {"_RESPONSE_TEMPLATE_FALLBACKS"}
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        for node in ast.walk(tree):
            for name in _names_used(node):
                if name.startswith("_") and not name.startswith("__"):
                    assert name in defined | OF_PYTHON_AND_TORCH | listed, f"{path.name}: {name}; list it here"


def _names_used(node: ast.AST) -> list[str]:
    """What a piece of code imports, looks up of another object than itself, or patches."""
    match node:
        case ast.ImportFrom(names=aliases):
            return [alias.name for alias in aliases]
        case ast.Attribute(value=ast.Name(id="self" | "cls")):
            return []
        case ast.Attribute(attr=name):
            return [name]
        case ast.Call(func=ast.Attribute(attr="object"), args=[_, ast.Constant(value=str(name)), *_]):
            return [name]
    return []
