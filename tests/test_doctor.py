"""`gemma-dist doctor` finds what a machine lacks, with a remedy, and one broken thing does not hide the others."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gemma_dist.__main__ import main
from gemma_dist.start import doctor, launches
from gemma_dist.start.doctor import Finding
from tests.support.ranks import long, needs_compiler


@pytest.mark.parametrize(
    ("package", "tested", "bounds", "state", "remedy"),
    [
        ("pytest", None, "", "good", ""),
        ("pytest", None, ">=1", "good", ""),
        ("pytest", "1.2.3", ">=1", "note", "pip install 'pytest==1.2.3'"),
        ("pytest", None, "<2,>=1", "fault", "pip install 'pytest<2,>=1'"),
        ("no-such-package", "1", ">=1", "fault", "pip install 'no-such-package>=1'"),
    ],
)
def test_a_version_is_held_against_bounds_and_tests(
    package: str, tested: str | None, bounds: str, state: str, remedy: str
) -> None:
    found = doctor._version(package, tested, bounds)
    assert (found.state, found.remedy) == (state, remedy)


def test_what_was_tested_is_what_the_package_asks_for() -> None:
    tested = doctor._tested()
    for package in doctor.PACKAGES:
        assert doctor._version(package, tested[package], doctor._bounds(package)).state == "good"


def test_what_breaks_is_a_finding_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def _driver() -> Iterator[Finding]:
        yield Finding("first", "good", "there")
        raise RuntimeError("no\n  device")

    def _other() -> Iterator[Finding]:
        yield Finding("other", "note", "slow", "buy a faster one")

    monkeypatch.setattr(doctor, "CHECKS", (_driver, _other))
    found = doctor.examine()
    assert [(one.what, one.state) for one in found] == [("first", "good"), ("driver", "fault"), ("other", "note")]
    assert "RuntimeError: no device" in doctor.render(found)
    assert not doctor.is_fit(found)


def test_an_interface_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib7")
    (fault,) = (one for one in doctor._network() if one.state == "fault")
    assert "NCCL_SOCKET_IFNAME=ib7" in fault.found
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=lo")
    assert not [one for one in doctor._network() if one.state == "fault"]


def test_without_a_compiler_zero_is_said_to_lack_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    found = {one.what: one for one in doctor._deepspeed()}
    assert found["DeepSpeed: cpu_adam"].state == "note"
    assert found["DeepSpeed: cpu_adam"].remedy.startswith("install g++ and ninja for ZeRO, or set zero_force_ds_cpu")


def step(loss: float, grad_norm: float) -> dict[str, float]:
    return {"loss": loss, "grad_norm": grad_norm}


@pytest.mark.parametrize(
    ("steps", "state"),
    [
        ([step(2.0, 5.0), step(1.0, 3.0)], "good"),
        ([step(2.0001, 5.01), step(1.0, 3.0)], "good"),
        ([step(2.0, 5.0), step(1.01, 3.0)], "fault"),
        ([step(2.0, 5.0), step(1.0, 3.3)], "fault"),
        ("error: no compiler", "fault"),
    ],
)
def test_a_launch_is_held_against_the_cpu(steps: Any, state: str) -> None:
    found = launches._compare("ddp", steps, [step(2.0, 5.0), step(1.0, 3.0)])
    assert (found.state, bool(found.remedy)) == (state, state == "fault")


@long
@needs_compiler
def test_launches_on_cpu_processes_compute_what_one_does() -> None:
    found = list(launches.try_launches(["cpu_ddp", "cpu_zero3"]))
    assert [(one.what, one.state) for one in found] == [
        ("train on the CPU", "good"),
        ("train: cpu_ddp", "good"),
        ("train: cpu_zero3", "good"),
    ]


@long
def test_a_launch_that_fails_is_told_in_a_line() -> None:
    *_, found = launches.try_launches(["cpu_nowhere"])
    assert found.state == "fault"
    assert "cpu_nowhere" in found.found


def test_this_machine_is_looked_at_as_a_whole(capfd: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    told = json.loads(capfd.readouterr().out)
    assert code == (0 if told["fit"] else 5)
    whats = {one["what"] for one in told["findings"]}
    assert {"python", "torch", "GPUs", "bitsandbytes", "NCCL", "sdpa", "memory", "Slurm"} <= whats
    assert all(one["remedy"] for one in told["findings"] if one["state"] == "fault")
