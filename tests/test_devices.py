"""What is refused before it costs anything: a batch that the ranks cannot share, and a GPU that cannot do it."""

import os
import subprocess
import sys

import pytest

from gemma_dist.errors import ConfigError
from gemma_dist.model.devices import Card, impossible, require_card, require_cpu, slow
from gemma_dist.recipe import load_config
from gemma_dist.show import check
from gemma_dist.topology import Topology, read_topology, require_fit
from tests.support.ranks import ENVIRONMENT, REPOSITORY

T4, A100, H100 = Card("Tesla T4", (7, 5)), Card("A100", (8, 0)), Card("H100", (9, 0))
PATHS = ["model_name_or_path=model", "data.train=shards", "output_dir=out"]


@pytest.mark.parametrize(
    ("recipe", "card", "settings"),
    [
        ("e4b_qlora_16gb", T4, ["model.dtype", "train.bf16", "quantization.bnb_4bit_compute_dtype"]),
        ("31b_lora_zero3", T4, ["model.dtype", "train.bf16"]),
        ("cpu_qlora", T4, []),  # float32
        ("e4b_qlora_16gb", A100, []),
        ("e4b_qlora_16gb", H100, []),
    ],
)
def test_settings_that_a_gpu_cannot_carry_out_are_named(recipe: str, card: Card, settings: list[str]) -> None:
    config = load_config(REPOSITORY / f"launch/{recipe}.yaml", PATHS)
    found = list(impossible(config, card))
    assert [problem.partition(": ")[0] for problem in found] == settings
    if not settings:
        require_card(config, card)
        return
    with pytest.raises(ConfigError) as caught:
        require_card(config, card)
    assert str(caught.value).splitlines() == found
    remedies = [problem.partition("set ")[2].partition(",")[0].replace(": ", "=") for problem in found]
    require_card(load_config(REPOSITORY / f"launch/{recipe}.yaml", [*PATHS, *remedies]), card)


def test_the_slow_attention_of_old_gpus_is_named() -> None:
    (note,) = slow(T4)
    assert "Tesla T4 (compute capability 7.5)" in note
    assert not [*slow(A100), *slow(H100)]


def test_check_names_the_gpu_of_this_machine_and_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(REPOSITORY / "launch/e4b_qlora_16gb.yaml", PATHS)
    for card, num_lines in ((None, 0), (H100, 1), (T4, 5)):
        monkeypatch.setattr(check, "card_at_hand", lambda card=card: card)
        assert len(check._card_lines(config)) == num_lines


def test_a_wrong_global_batch_is_refused_before_torch_is_imported() -> None:
    code = (
        "import sys; from gemma_dist.__main__ import main; code = main();"
        "print(*{'torch', 'transformers', 'pyarrow'} & sys.modules.keys()); sys.exit(code)"
    )
    words = ["train", "launch/cpu_lora.yaml", *PATHS, "per_device_train_batch_size=2", "global_batch_size=7"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=REPOSITORY,
        env=os.environ | ENVIRONMENT | {"WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "train.global_batch_size: global batch 7 is not a multiple of 2 ranks x 2 micro-batch = 4; use 4 or 8" in (
        done.stderr
    )
    assert done.stdout.split() == [], "imported, which takes seconds"


def test_flex_attention_is_refused_on_a_cpu_and_without_packing() -> None:
    recipe = REPOSITORY / "launch/cpu_lora.yaml"
    require_cpu(load_config(recipe, PATHS))
    flex = [*PATHS, "attn_implementation=flex_attention"]
    with pytest.raises(ConfigError, match="flex_attention has no backward pass on a CPU"):
        require_cpu(load_config(recipe, [*flex, "packing=true"]))
    with pytest.raises(ConfigError, match="flex_attention, which is for packs, but packing is off"):
        load_config(recipe, flex)


def test_compiled_layers_are_refused_where_they_were_never_tried() -> None:
    def require(recipe: str, topology: Topology, checkpointing: str = "false") -> None:
        settings = ["torch_compile=true", f"gradient_checkpointing={checkpointing}"]
        require_fit(load_config(REPOSITORY / f"launch/{recipe}.yaml", [*PATHS, *settings]), topology)

    require("cpu_lora", Topology(""))
    with pytest.raises(ConfigError, match="torch compiles nothing of a layer that is recomputed"):
        require("cpu_lora", Topology(""), "true")
    with pytest.raises(ConfigError, match="true was never tried with weights in 4 bits"):
        require("cpu_qlora", Topology(""))
    for launch in ("cpu_zero3", "cpu_fsdp2"):
        with pytest.raises(ConfigError, match="true was never tried where ranks share the model"):
            require("cpu_lora", read_topology(REPOSITORY / f"accelerate_configs/{launch}.yaml"))
