"""The CPU's kernels: compiled and checked, or eager with a reason; on one thread or several."""

import inspect
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import compiled
from model.fp8 import cpu as module
from model.fp8.cpu import Cpu, cpu_backend
from model.fp8.groups import Groups
from model.fp8.quantized import ACTIVATION, ALONG_TOKENS, BLOCK, Quantized
from model.fp8.reference import Reference

SOURCE = Path(inspect.getfile(module)).with_name("cpu.c")

needs_compiler = pytest.mark.skipif(
    not cpu_backend()[1].startswith("compiled"), reason=cpu_backend()[1]
)


def made_anew() -> tuple[Cpu, str]:
    """What `cpu_backend` makes; a process asks it once, tests here each for themselves."""
    made: tuple[Cpu, str] = inspect.unwrap(cpu_backend)()
    return made


def is_eager(backend: Cpu) -> bool:
    return backend._kernels is None


def program(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_a_compiled_backend_names_its_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    backend, form = made_anew()
    assert not is_eager(backend)
    assert form in {"compiled by cc", "compiled by gcc", "compiled by clang"}
    assert cpu_backend()[0] is cpu_backend()[0]


@needs_compiler
def test_a_compiler_may_be_named_with_arguments(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As `ccache gcc`, whose first word compiles nothing by itself."""
    real = next(path for name in ("cc", "gcc", "clang") if (path := shutil.which(name)))
    wrap = program(tmp_path / "wrap", 'exec "$@"')
    monkeypatch.setenv("CC", f"{wrap} {real}")
    assert made_anew()[1] == "compiled by wrap"


def test_without_a_compiler_it_is_eager_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", 'gcc "')
    assert made_anew()[1].startswith("eager: CC = 'gcc \"' is no command")
    monkeypatch.setenv("CC", "/nowhere/cc -O3")
    backend, form = made_anew()
    assert is_eager(backend)
    assert form == "eager: no C compiler (/nowhere/cc); install one, as gcc"
    monkeypatch.delenv("CC")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("PATH", "/nowhere")
    assert made_anew()[1] == "eager: no C compiler (cc, gcc, clang); install one, as gcc"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("echo no room on disk >&2; exit 3", "no room on disk"),
        ("exit 0", "cpu.so"),  # It said that all went well, but made nothing.
        ('for last; do :; done; echo nonsense > "$last"', "cpu.so"),
    ],
    ids=["fails", "makes-nothing", "makes-nonsense"],
)
def test_a_compiler_that_fails_leaves_it_eager_and_is_quoted(
    text: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = program(tmp_path / "broken-cc", text)
    monkeypatch.setenv("CC", path)
    backend, form = made_anew()
    assert is_eager(backend)
    assert form.startswith(f"eager: {path} failed: ")
    assert reason in form


def test_a_compiler_that_never_ends_is_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", program(tmp_path / "slow-cc", "exec sleep 60"))
    monkeypatch.setattr(compiled, "_COMPILE_SECONDS", 0.1)
    backend, form = made_anew()
    assert is_eager(backend)
    assert "timed out" in form


@needs_compiler
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("448.0f, t->power_of_two", "447.0f, t->power_of_two"),
        ("0x7FFFFFu) & 0x7F800000u", "0x800000u) & 0x7F800000u"),
        ("float scale = t->code_scales[(first + r) * panels", "float scale = t->code_scales[0 *"),
        ("k[7] = c >> 20;", "k[7] = c >> 21;"),
    ],
    ids=lambda text: text[:24],
)
def test_a_library_that_gives_other_bits_is_not_used(
    right: str, wrong: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = SOURCE.read_text()
    assert right in source
    (tmp_path / "cpu.c").write_text(source.replace(right, wrong))
    monkeypatch.setattr(module, "_SOURCE", tmp_path / "cpu.c")
    backend, form = made_anew()
    assert is_eager(backend)
    assert form.startswith("eager: what ")
    assert form.endswith(" made does not give the reference's bits")


@pytest.fixture
def threads() -> Iterator[None]:
    """Several, where tests else have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def results(backend: Cpu, x: Tensor) -> list[Tensor]:
    """Bytes, scales and float32 of all that the kernels do."""
    made = []
    x8 = backend.quantize(x, ACTIVATION)
    for source in (x, replace(x8, float32=None)):
        for tile in (ACTIVATION, ALONG_TOKENS, BLOCK):
            q = backend.quantize(source, tile, groups=Groups.of([100, 0, len(x) - 100]))
            assert q.float32 is not None
            stored = Quantized(q.values, q.scales, q.tile, q.groups)
            made += [q.values.view(torch.uint8), q.scales, q.float32, backend.dequantize(stored)]
    e5m6 = backend.quantize_e5m6(x)
    return [*made, e5m6.words, e5m6.scales, backend.dequantize_e5m6(e5m6)]


def test_several_threads_give_the_bits_of_one(threads: None) -> None:
    # Neither bands of rows nor single rows divide by three.
    x = torch.randn(1300, 460, generator=torch.Generator().manual_seed(0))
    assert module._threads(x.shape) == 3
    backend = cpu_backend()[0]
    several = results(backend, x)
    torch.set_num_threads(1)
    for found, alone in zip(several, results(backend, x), strict=True):
        assert torch.equal(found, alone)
    assert torch.equal(several[2], Reference().dequantize(Reference().quantize(x, ACTIVATION)))


def test_small_tensors_start_no_thread(threads: None) -> None:
    assert module._threads((100, 100)) == 1


def test_what_is_not_asked_for_is_not_made() -> None:
    x = torch.randn(130, 140, generator=torch.Generator().manual_seed(0))
    for tile in (ACTIVATION, ALONG_TOKENS, BLOCK):
        for backend in (cpu_backend()[0], Cpu(None)):
            whole = backend.quantize(x, tile)
            multiplied = backend.quantize(x, tile, saved=False)
            saved = backend.quantize(x, tile, multiplied=False)
            assert whole.float32 is not None
            assert multiplied.float32 is not None
            assert torch.equal(multiplied.float32, whole.float32)
            assert multiplied.values.shape == (0, 140)
            assert torch.equal(saved.values.float(), whole.values.float())
            assert saved.float32 is None or backend._kernels is None
            for q in (multiplied, saved):
                assert torch.equal(q.scales, whole.scales)
