"""`gemma-dist health`: an unfit node is named, and no node holds up the others."""

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_dist.config import HealthConfig
from gemma_dist.exits import NODE_UNFIT
from gemma_dist.health.facts import Facts, look, versions
from gemma_dist.health.gpus import GpuMemory, busy, look_at_gpus
from gemma_dist.health.judge import Node, judge
from gemma_dist.health.run import check_health
from tests.support.machines import free_port
from tests.support.ranks import ENVIRONMENT, REPOSITORY

HOST = socket.gethostname()


@pytest.fixture(scope="module")
def processes() -> Any:
    """Starts processes that have torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "gemma_dist.health.run"])
    return context


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Outside of Slurm and of any launch, but for a folder of exit codes."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_GPUS_ON_NODE", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GEMMA_DIST_EXIT_CODES", str(tmp_path / "codes"))


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _bad_nodes(tmp_path: Path) -> list[str]:
    path = tmp_path / "codes" / "bad-nodes"
    return path.read_text().splitlines() if path.exists() else []


def _stub(folder: Path, package: str) -> Path:
    """A folder that, on PYTHONPATH, holds another version of `package`."""
    (folder / f"{package}-0.0.1.dist-info").mkdir(parents=True)
    (folder / f"{package}-0.0.1.dist-info" / "METADATA").write_text(f"Name: {package}\nVersion: 0.0.1\n")
    return folder


@pytest.mark.parametrize("other", [False, True])
def test_two_nodes_are_fit_unless_one_has_another_version(tmp_path: Path, other: bool) -> None:
    port, started = free_port(), []
    out = tmp_path / "new" / "out"
    for rank in range(2):
        environment = os.environ | ENVIRONMENT | _environment(rank, 2, port)
        if rank == 1 and other:
            path = [str(_stub(tmp_path / "stub", "peft")), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        command = [sys.executable, "-m", "gemma_dist", "health", "--num-gpus", "0", "--output-dir", str(out)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=pipe, stderr=pipe, text=True)
        started.append(process)
    outputs = [process.communicate(timeout=200) for process in started]
    expected = NODE_UNFIT if other else 0
    assert [process.returncode for process in started] == [expected] * 2, outputs
    (first, _), (second, _) = outputs
    assert second == ""
    one, two, exchange = first.splitlines()
    assert one.startswith(f"{HOST} (rank 0): good: no GPU, ")
    assert exchange.startswith("all-reduce of 1 MiB over 2 nodes: gloo ")
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))
    if other:
        assert two == f"{HOST} (rank 1): peft 0.0.1, and on most nodes {versions()['peft']}"
        assert _bad_nodes(tmp_path) == [HOST]
    else:
        assert two.startswith(f"{HOST} (rank 1): good: ")
        assert _bad_nodes(tmp_path) == []


def _hang(settings: HealthConfig) -> Facts:
    time.sleep(600)
    raise AssertionError("unreachable")


def _fail(settings: HealthConfig) -> Facts:
    raise OSError("a disk that is gone")


def _node(environment: dict[str, str], settings: HealthConfig, off_s: float, look_at: Any, output: Path) -> None:
    """One node, in a process of its own."""
    os.environ |= environment
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        code = check_health(settings, clock=lambda: time.time() + off_s, look=look_at)
        sys.stdout.flush()
    os._exit(code)


def _run(
    processes: Any,
    tmp_path: Path,
    ranks: dict[int, tuple[float, Callable[..., Facts]]],
    world_size: int,
    timeout_s: float,
) -> tuple[list[int], list[list[str]]]:
    """Exit codes and lines of nodes: rank -> how much its clock is off, and how it looks at itself."""
    settings, port, started = HealthConfig(timeout_s=timeout_s), free_port(), []
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text("#!/bin/sh\nprintf 'n1\\nn2\\nn3\\n'\n")
    scontrol.chmod(0o755)
    of_slurm = {
        "SLURM_JOB_NODELIST": "n[1-3]",
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "GEMMA_DIST_EXIT_CODES": str(tmp_path / "codes"),
    }
    for rank, (off_s, look_at) in ranks.items():
        environment = _environment(rank, world_size, port) | of_slurm
        words = (environment, settings, off_s, look_at, tmp_path / str(rank))
        process = processes.Process(target=_node, args=words)
        process.start()
        started.append(process)
    for process in started:
        process.join(300)
    lines = [(tmp_path / str(rank)).read_text().splitlines() for rank in ranks]
    return [process.exitcode for process in started], lines


def test_a_clock_that_is_off_is_named(processes: Any, tmp_path: Path) -> None:
    codes, lines = _run(processes, tmp_path, {0: (0, look), 1: (-60, look)}, 2, 60)
    assert codes == [NODE_UNFIT] * 2
    assert lines[0][0].startswith(f"{HOST} (rank 0): good")
    assert lines[0][1].startswith(f"{HOST} (rank 1): its clock is -60.")
    assert lines[0][2].startswith("all-reduce of 1 MiB over 2 nodes")
    assert _bad_nodes(tmp_path) == [HOST]


def test_nodes_that_never_come_hang_or_fail_are_named_and_hold_up_no_other(processes: Any, tmp_path: Path) -> None:
    begun = time.monotonic()
    codes, lines = _run(processes, tmp_path, {0: (0, look), 2: (0, _hang), 3: (0, _fail)}, 4, 15)
    assert codes == [NODE_UNFIT] * 3
    assert time.monotonic() - begun < 300, "one hangs for twice as long"
    assert lines[1:] == [[], []]
    assert lines[0][0].startswith(f"{HOST} (rank 0): good")
    assert lines[0][1] == "rank 1: DOES NOT ANSWER within 15 s: never came"
    hangs = "DOES NOT ANSWER within 15 s: its own checks did not end (a GPU or a disk may hang)"
    assert lines[0][2] == f"{HOST} (rank 2): {hangs}"
    assert lines[0][3] == f"{HOST} (rank 3): OSError: a disk that is gone"


def test_a_node_that_never_came_is_called_as_slurm_calls_it(processes: Any, tmp_path: Path) -> None:
    codes, lines = _run(processes, tmp_path, {0: (0, look), 2: (0, look)}, 3, 15)
    assert codes == [NODE_UNFIT] * 2
    assert lines[0][1] == "n2 (rank 1): DOES NOT ANSWER within 15 s: never came"
    assert _bad_nodes(tmp_path) == ["n2"]


def test_without_the_first_node_the_others_name_it(processes: Any, tmp_path: Path) -> None:
    codes, lines = _run(processes, tmp_path, {1: (0, look)}, 3, 3)
    assert codes == [NODE_UNFIT]
    (line,) = lines[0]
    assert line.startswith("n1 (rank 0): DOES NOT ANSWER within 3 s at 127.0.0.1:")
    assert _bad_nodes(tmp_path) == ["n1"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_too_few_gpus_make_a_node_unfit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_health(HealthConfig(num_gpus=1)) == NODE_UNFIT
    assert capsys.readouterr().out == f"{HOST} (rank 0): 0 GPUs are seen, and 1 are needed\n"
    assert _bad_nodes(tmp_path) == [HOST]
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    assert check_health(HealthConfig()) == NODE_UNFIT
    assert "0 GPUs are seen, and 8 are needed" in capsys.readouterr().out
    assert check_health(HealthConfig(num_gpus=0)) == 0


def test_a_disk_with_too_little_room_or_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_health(HealthConfig(num_gpus=0, output_dir=tmp_path, min_free_gb=1e6)) == NODE_UNFIT
    assert "and 1e+06 GB are needed" in capsys.readouterr().out
    assert check_health(HealthConfig(num_gpus=0, output_dir=Path("/proc/self/new"), min_free_gb=0)) == NODE_UNFIT
    assert "nothing can be written there" in capsys.readouterr().out


def _facts(**equal: str) -> Facts:
    return Facts("host", 0, {"torch": "2", "GPUs": "8 x H100"} | equal, "", [])


@pytest.mark.parametrize(
    ("nodes", "unfit"),
    [
        ([{}, {}, {}], {}),
        ([{"torch": "1"}, {}, {}], {0: "torch 1, and on most nodes 2"}),
        ([{}, {"GPUs": "7 x H100"}, {}], {1: "GPUs 7 x H100, and on most nodes 8 x H100"}),
        ([{}, {"torch": "1"}], {1: "torch 1, and on most nodes 2"}),  # of two the first is right
        ([{"clock": 100.0}, {"clock": 104.0}, {"clock": 101.0}], {}),
        ([{"clock": 0.0}, {"clock": 104.0}, {"clock": 101.0}], {0: "its clock is -104.0 s off"}),
        ([{"sees_folder": True}, {"sees_folder": False}], {1: "does not see what the first node writes"}),
        ([{}, None, {}], {1: "DOES NOT ANSWER within 9 s"}),
    ],
)
def test_the_majority_is_right(nodes: list[Any], unfit: dict[int, str]) -> None:
    given = []
    for rank, what in enumerate(nodes):
        equal = {name: value for name, value in (what or {}).items() if name in ("torch", "GPUs")}
        more = {name: value for name, value in (what or {}).items() if name not in equal}
        given.append(Node(rank, "host", True, None if what is None else _facts(**equal), **more))
    verdicts = judge(given, 9)
    assert {verdict.node.rank for verdict in verdicts if verdict.problems} == unfit.keys()
    for rank, words in unfit.items():
        (problem,) = verdicts[rank].problems
        assert problem.startswith(words)


SMI = """#!/bin/sh
case "$1" in
  *driver*) echo 570.86.15 ;;
  *compute*) echo "GPU-1, 4711, /usr/bin/python3, 40000" ;;
  *) printf 'GPU-1, 81559, 40010\\nGPU-2, 81559, 3\\n' ;;
esac
"""


class _Properties:
    def __init__(self, number: int) -> None:
        self.name, self.uuid = "Some GPU", str(number + 1)


def test_a_gpu_that_another_process_uses_is_named_with_that_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nvidia-smi says, by the id of each GPU; the GPUs themselves are not there, so that nothing is computed."""
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", _Properties)

    def no_gpu(*args: object, **kwargs: object) -> None:
        raise RuntimeError("CUDA error: no such device\nmore")

    monkeypatch.setattr(torch, "full", no_gpu)
    names, problems = look_at_gpus()
    assert names == ["Some GPU"] * 2
    assert problems == [
        "GPU 0 has 40.6 GiB of 79.6 GiB free: /usr/bin/python3 (process 4711, 40000 MiB)",
        "GPU 0 does not compute: CUDA error: no such device",
        "GPU 1 does not compute: CUDA error: no such device",
    ]


@pytest.mark.parametrize(("used", "is_free"), [(0, True), (5, True), (6, False)])
def test_a_gpu_is_free_where_95_of_100_bytes_are(used: int, is_free: bool) -> None:
    assert (busy(0, GpuMemory(100, used)) == []) == is_free
