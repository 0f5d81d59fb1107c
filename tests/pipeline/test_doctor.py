"""What `ingot doctor` says of devices: of made-up reports, and of a torch that is broken."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.autoload import why_torch_fails
from pipeline import devices as devices_of
from pipeline.devices import devices, tell
from pipeline.machine import Finding
from pipeline.probe import probe

ROOT = Path(__file__).parents[2]
CPU = {
    "name": "cpu",
    "count": 1,
    "card": "cpu",
    "compute": "float32",
    "fault": None,
    "is_there": False,
    "fp8": "cpu",
    "fp8_reason": "compiled by cc",
}
ABSENT = {"count": 0, "card": "", "compute": "bfloat16", "is_there": False}


def said(*others: Mapping[str, Any], auto: str = "cpu") -> dict[str, Finding]:
    report = {"torch": "2.13.0", "devices": [CPU, *others], "auto": {"device": auto}}
    return {one.what: one for one in tell(report)}


def test_a_machine_without_accelerators_computes_on_cpus_and_lacks_nothing() -> None:
    cuda = ABSENT | {"name": "cuda", "fault": "torch is built without CUDA; install its build"}
    npu = ABSENT | {"name": "npu", "fault": "torch_npu is not installed; install it"}
    found = said(cuda, npu)
    assert all(one.fix is None for one in found.values())
    assert found["cluster.device"].seen == "'auto' computes on cpu here"
    assert found["device cpu"].seen == "cpu, computes in float32"
    assert found["FP8 on cpu"].seen == "backend cpu, compiled by cc"
    assert found["device cuda"].seen == "none; torch is built without CUDA"
    assert found["device npu"].seen == "none; torch_npu is not installed"


def test_a_device_is_named_with_what_it_computes_in() -> None:
    reason = "torch has its products here"
    card = {"name": "cuda", "count": 8, "card": "NVIDIA H100", "fault": None, "is_there": True}
    h100 = ABSENT | card | {"fp8": "cublas", "fp8_reason": reason}
    found = said(h100, auto="cuda")
    assert found["cluster.device"].seen == "'auto' computes on cuda here"
    assert found["device cuda"].seen == "8 x NVIDIA H100, computes in bfloat16"
    assert found["FP8 on cuda"].seen == f"backend cublas, {reason}"
    old = h100 | {"fp8": None, "fp8_reason": "A100 (sm_80) has no FP8 products; sm_90 has"}
    seen = said(old)["FP8 on cuda"].seen
    assert seen == "backend none, A100 (sm_80) has no FP8 products; sm_90 has"


@pytest.mark.parametrize(
    ("fault", "seen", "fix"),
    [
        (
            "the NVIDIA driver is too old for a torch built for CUDA 13.0; update the driver",
            "the NVIDIA driver is too old for a torch built for CUDA 13.0",
            "update the driver",
        ),
        ("torch is built without CUDA; install its build", "torch is built without CUDA", None),
    ],
)
def test_a_device_that_is_there_and_unusable_comes_with_the_remedy(
    fault: str, seen: str, fix: str | None
) -> None:
    found = said(ABSENT | {"name": "cuda", "fault": fault, "is_there": True})["device cuda"]
    assert (found.seen, found.fix) == (seen, fix or "install its build")
    assert not found.needed


def test_two_kinds_of_devices_are_told_of_with_the_choice() -> None:
    fault = "cluster.device = 'auto': there are GPUs and NPUs; set it to 'cuda' or 'npu'"
    report = {"torch": "2.13.0", "devices": [], "auto": {"fault": fault}}
    found = {one.what: one for one in tell(report)}["cluster.device"]
    assert found.fix == "set it to 'cuda' or 'npu'"


def test_the_probe_of_this_machine_can_be_told() -> None:
    found = {one.what: one for one in tell(probe())}
    assert {"torch", "cluster.device", "device cpu", "device cuda", "device npu"} <= found.keys()


def broken_library(folder: Path) -> Path:
    """A library of NPUs that is installed, and lacks what it is built on."""
    package, record = folder / "torch_npu", folder / "torch_npu-2.13.0.dist-info"
    package.mkdir()
    record.mkdir()
    words = "libhccl.so: cannot open shared object file: No such file or directory"
    (package / "__init__.py").write_text(f'raise ImportError("{words}")\n')
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    (record / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:load\n")
    return folder


BROKEN = "torch_npu is installed and cannot be loaded (libhccl.so: cannot open shared object file"


def test_a_library_without_what_it_is_built_on_breaks_torch_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(broken_library(tmp_path)))
    found = list(devices())
    torch, *others = found
    assert torch.needed
    assert torch.seen.startswith(BROKEN)
    assert torch.fix is not None
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in torch.fix
    # The rest is looked at without it.
    by_name = {one.what: one.seen for one in others}
    assert by_name["cluster.device"] == "'auto' computes on cpu here"
    assert by_name["device npu"].startswith("none; torch_npu is installed and not loaded")


def test_every_verb_says_so_in_one_sentence(tmp_path: Path) -> None:
    path = os.pathsep.join([str(broken_library(tmp_path)), str(ROOT)])
    script = (
        "from pipeline.cli import main; raise SystemExit(main(['sample', 'x', '--prompt', 'y']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"ingot: error: {BROKEN}")
    assert done.stderr.count("\n") == 1


def test_a_torch_that_does_not_load_for_another_reason_is_told_with_its_own_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = "Traceback\nImportError: libc10.so: undefined symbol\n"
    monkeypatch.setattr(devices_of, "_probe", lambda environ: (None, said))
    (found,) = devices()
    assert (found.what, found.seen) == ("torch", "ImportError: libc10.so: undefined symbol")
    assert found.needed
    assert why_torch_fails(said) is None
    assert why_torch_fails(ImportError("no such thing")) is None
