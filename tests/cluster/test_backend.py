"""The table of devices: what each row promises, which one is taken, and what is said of a lack."""

import importlib.util
import pickle
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from cluster import backend
from cluster.backend import (
    BACKENDS,
    CPU,
    CUDA,
    NPU,
    Backend,
    Found,
    computing,
    decide,
    foresee,
    no_cuda,
    own,
    require,
    seen,
)
from cluster.rates import measure
from cluster.session import backend_of
from configs.errors import MachineError
from configs.parallel import ClusterConfig, Compute, Device
from model.fp8.scheme import Numerics


def test_each_row_says_how_its_device_computes() -> None:
    assert [one.numerics("high").compute for one in (CPU, CUDA, NPU)] == [
        None,
        torch.bfloat16,
        torch.bfloat16,
    ]
    assert {one.master for one in BACKENDS.values()} == {torch.float32}
    # What is said of the rest of a model's precision stays.
    wanted = Numerics("fp8", backend="reference", compute=torch.float32)
    assert CUDA.numerics(wanted) == wanted
    assert CUDA.numerics(replace(wanted, compute=None)).backend == "reference"
    assert CPU.facts() == {"device": "cpu", "compute": "float32"}


def test_collectives_of_the_host_go_over_gloo_on_every_device() -> None:
    for one in (CUDA, NPU):
        host, device = one.group.split(",")
        assert (host, device.split(":")[0]) == ("cpu:gloo", one.name)


def test_a_row_asks_ray_in_its_own_words() -> None:
    assert (CPU.asked(1), CPU.bundle(1)) == ({}, {})
    assert (CUDA.asked(0.4), CUDA.bundle(0.4)) == ({"num_gpus": 0.4}, {"GPU": 0.4})
    assert (NPU.asked(1), NPU.bundle(1)) == ({"resources": {"NPU": 1}}, {"NPU": 1})


def test_the_setting_knows_all_rows_and_no_other() -> None:
    assert set(get_args(Device)) == {"auto", *BACKENDS}


def test_a_row_travels_to_workers() -> None:
    assert [pickle.loads(pickle.dumps(one)) for one in BACKENDS.values()] == [CPU, CUDA, NPU]


def test_the_default_takes_what_is_there_and_a_name_what_it_names() -> None:
    assert ClusterConfig().device == "auto"
    assert decide("auto", {"CPU": 64.0}) is CPU
    assert decide("auto", {"CPU": 64.0, "GPU": 8.0}) is CUDA
    assert decide("auto", {"CPU": 64.0, "NPU": 8.0}) is NPU
    assert decide("cpu", {"CPU": 64.0, "GPU": 8.0}) is CPU
    assert decide("npu", {"GPU": 8.0, "NPU": 8.0}) is NPU


def test_two_kinds_are_not_chosen_between() -> None:
    with pytest.raises(MachineError, match=r"8 GPUs and 16 NPUs.*set it to 'cuda' or 'npu'$"):
        decide("auto", {"GPU": 8.0, "NPU": 16.0})


@pytest.mark.parametrize(("wanted", "resource"), [("cuda", "GPU"), ("npu", "NPU")])
def test_a_device_that_is_asked_for_and_absent_is_an_error(wanted: str, resource: str) -> None:
    device = ClusterConfig.model_validate({"device": wanted}).device
    with pytest.raises(MachineError, match=rf"cluster\.device = '{wanted}': no {resource} is"):
        decide(device, {"CPU": 64.0})


@pytest.mark.parametrize(
    ("row", "asked", "wanted"),
    [
        (CPU, "auto", "float32"),
        (CPU, "float32", "float32"),
        (CPU, "bfloat16", "bfloat16"),
        (CUDA, "auto", "bfloat16"),
        (CUDA, "float32", "float32"),
        (NPU, "bfloat16", "bfloat16"),
    ],
)
def test_what_is_computed_in_can_be_asked_for(row: Backend, asked: Compute, wanted: str) -> None:
    taken = computing(row, asked)
    assert taken.dtype_name == wanted
    assert (taken.numerics("high").compute or torch.float32) == taken.dtype
    assert (taken.name, taken.master) == (row.name, torch.float32)


@pytest.mark.parametrize("flags", [set(), {"avx512_bf16"}, {"amx_bf16", "avx2"}, {"avx2"}])
def test_a_cpu_computes_in_bfloat16_where_it_has_units_for_it(
    flags: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch)
    monkeypatch.setattr(backend, "cpu_flags", lambda: frozenset(flags))
    foresee(Numerics("high"), ClusterConfig())
    asked = ClusterConfig(compute="bfloat16")
    if flags & {"avx512_bf16", "amx_bf16"}:
        foresee(Numerics("high"), asked)
        computing(CPU, "bfloat16").begin(seed=0)
        return
    told = r"^cluster\.compute = 'bfloat16': this machine's CPU has neither .*; use 'auto'$"
    with pytest.raises(MachineError, match=told):
        foresee(Numerics("high"), asked)
    with pytest.raises(MachineError, match=told):  # a worker on another machine
        computing(CPU, "bfloat16").begin(seed=0)


def test_the_processors_of_a_named_cluster_are_its_workers_affair(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend, "cpu_flags", frozenset)
    there = ClusterConfig(address="10.0.0.1:6379", device="cpu", compute="bfloat16")
    foresee(Numerics("high"), there)


def test_workers_are_given_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch)
    assert backend_of(ClusterConfig(device="cpu")).dtype == torch.float32
    asked = ClusterConfig(device="cpu", compute="bfloat16")
    assert backend_of(asked).dtype == torch.bfloat16


def test_flags_are_those_of_this_processor() -> None:
    if (text := Path("/proc/cpuinfo")).exists() and "\nflags" in text.read_text():
        assert "fpu" in backend.cpu_flags()


def see(monkeypatch: pytest.MonkeyPatch, **found: Found) -> None:
    """Let this process see these devices."""
    absent = Found(fault="gone; mend it")
    rows = tuple(
        replace(one, look=partial(Found, **asdict(found.get(one.name, absent))))
        for one in (CUDA, NPU)
    )
    monkeypatch.setattr(backend, "ACCELERATORS", rows)


def test_a_process_computes_on_what_it_sees_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch)
    assert (seen(), own("auto"), own("cuda")) == ({}, CPU, CPU)
    see(monkeypatch, cuda=Found(4, "H100"))
    assert seen() == {"GPU": 4.0}
    assert [own(one).name for one in ("auto", "cuda", "npu", "cpu")] == [
        *("cuda", "cuda"),
        *("cpu", "cpu"),
    ]
    see(monkeypatch, cuda=Found(1, "V100", too_old="too old"))
    assert own("auto") is CPU


def test_a_device_that_cannot_be_used_is_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require(CPU)
    for found, told in (
        (Found(fault="no driver; install one"), "no driver; install one"),
        (Found(1, "V100", "V100 (sm_70) is too old"), r"V100 \(sm_70\) is too old"),
    ):
        row = replace(CUDA, look=partial(Found, **asdict(found)))
        with pytest.raises(MachineError, match=rf"^cluster\.device = 'cuda': {told}; or use 'cpu'"):
            row.begin(seed=0)


@pytest.mark.parametrize(
    ("why", "listed", "told"),
    [
        (
            "The NVIDIA driver on your system is too old (found version 11040). Please update",
            None,
            "driver is too old for a torch built for CUDA 13.0; update the driver, or",
        ),
        ("Found no NVIDIA driver on your system. Please check", "0", "install one"),
        (
            "CUDA unknown error - this may be due to an incorrectly set up environment",
            None,
            "CUDA does not begin (CUDA unknown error), for driver and libraries do not fit",
        ),
        ("No CUDA GPUs are available", "", "CUDA_VISIBLE_DEVICES = '' leaves no CUDA device"),
        ("", None, "see that nvidia-smi lists the card"),
    ],
)
def test_what_cuda_says_becomes_one_sentence(why: str, listed: str | None, told: str) -> None:
    sentence = no_cuda(why, "13.0", listed)
    assert told in sentence
    assert "\n" not in sentence and ". " not in sentence


def test_a_library_that_is_absent_not_loaded_and_without_devices_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "is not installed" in str(NPU.look().fault)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    assert "installed and not loaded, for TORCH_DEVICE_BACKEND_AUTOLOAD = '0'" in str(
        NPU.look().fault
    )
    npus = SimpleNamespace(
        device_count=lambda: 0,
        get_device_name=lambda index: "Ascend910A",
        is_bf16_supported=lambda: False,
    )
    monkeypatch.setattr(torch, "npu", npus, raising=False)
    assert "sees no NPU" in str(NPU.look().fault)
    npus.device_count = lambda: 8
    assert NPU.look() == Found(8, "Ascend910A", "Ascend910A has no bfloat16, which 910B has")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_a_torch_without_cuda_says_so() -> None:
    assert "is built without CUDA; install its build with CUDA" in str(CUDA.look().fault)


def test_memory_is_that_of_the_process() -> None:
    before = CPU.memory()
    held = torch.ones(64 * 2**20 // 4)
    now = CPU.memory()
    assert now.used - before.used > 32 * 2**20
    assert now.peak >= now.used - 2**20 and held.numel()


def test_where_the_system_does_not_tell_memory_is_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", absent)
    used, peak = CPU.memory()
    assert used == peak > 0


def test_rates_are_measured_once_and_are_those_of_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates = CPU.rates()
    # Between a clock a thousand times slower than any, and what no machine has.
    assert 1e8 < rates.flops_per_second < 1e15
    assert 1e8 < rates.bytes_per_second < 1e14
    monkeypatch.setattr(backend, "measure", lambda *_: pytest.fail("measured again"))
    assert CPU.rates() is rates


def test_narrower_arithmetic_is_measured_in_its_own_type() -> None:
    device = torch.device("cpu")
    double = measure(device, torch.float64).flops_per_second
    single = measure(device, torch.float32).flops_per_second
    # Twice as many fit a register; a busy machine blurs how much quicker that is.
    assert single > double


def test_what_workers_cannot_compute_is_told_before_any_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    see(monkeypatch)
    foresee(Numerics("fp8"), ClusterConfig())
    with pytest.raises(MachineError, match=r"fp8_backend = 'triton' cannot compute on cpu"):
        foresee(Numerics("fp8", backend="triton"), ClusterConfig())
    with pytest.raises(MachineError, match=r"^cluster.device = 'cuda': "):
        foresee(Numerics(), ClusterConfig(device="cuda"))
    # Those of a named cluster are none of this process's.
    elsewhere = ClusterConfig(address="ray.example:6379", device="cuda")
    foresee(Numerics("fp8", backend="triton"), elsewhere)


def test_a_card_too_old_is_none_to_auto_and_says_why_to_who_asks_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = replace(CUDA, look=lambda: Found(1, "GTX 1080", "GTX 1080 (sm_61) is too old"))
    monkeypatch.setattr(backend, "ACCELERATORS", (old,))
    monkeypatch.setattr(backend, "BACKENDS", {**backend.BACKENDS, "cuda": old})
    high = Numerics("high")
    backend.foresee(high, ClusterConfig())
    with pytest.raises(MachineError, match=r"GTX 1080 \(sm_61\) is too old; or use 'cpu'"):
        backend.foresee(high, ClusterConfig(device="cuda"))


def test_the_default_of_trainers_fits_the_devices_and_a_number_that_was_asked_for_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = replace(CUDA, look=lambda: Found(1, "a card"))
    monkeypatch.setattr(backend, "ACCELERATORS", (one,))
    monkeypatch.setattr(backend, "BACKENDS", {**backend.BACKENDS, "cuda": one})
    default = ClusterConfig().trainers
    assert default > 1
    assert backend.fitted(ClusterConfig()).trainers == 1
    assert backend.fitted(ClusterConfig(ep=2)).ep == 1
    assert backend.fitted(ClusterConfig(pp=2)).pp == 1
    assert backend.fitted(ClusterConfig()).ep is None
    assert backend.fitted(ClusterConfig(device="cpu")).trainers == default
    assert backend.fitted(ClusterConfig(trainers=2)).trainers == 2
    assert backend.fitted(ClusterConfig(address="10.0.0.1:6379")).trainers == default
