"""All that is claimed of a GPU, measured on one in less than ten minutes.

    python -m tests.bench.on_gpu [--out FILE] [--part NAME ...] [--short]

Prints one table, line by line as it is measured, and writes it to `--out` as JSON after each part.
It needs torch, triton, numpy, safetensors, jaxtyping and pydantic, and nothing else. `--short` runs
all parts on the CPU with little in them, to show that they run; its figures mean nothing.

| part | |
|---|---|
| card | the card, its clocks, versions, and which products torch has |
| kernels | every Triton kernel against the slow twin; the hardware's conversion to E4M3 |
| agreement | `tiny` beside the CPU, where the host waits, experts by offsets |
| products | products of DeepSeek-V3's shapes in BF16 and FP8 |
| attention | attention of its widths, by every kernel that takes them |
| steps | training steps: tokens a second, utilisation, memory, launches |
| decoding | tokens a second of generation |
| repeats | a training that repeats, and one that resumes, to the last bit |

Each part runs in a process of its own, which is ended when its time is over: what breaks a device's
context, or never comes back, costs that part alone. A figure is followed by what it may be at most
where it is above that, and by a reason where there is none. Exit code 1 says that something which
is there could not be done, or was done wrongly.
"""

import argparse
import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from tests.bench.gpu import (
    agreement,
    attention,
    card,
    decoding,
    kernels,
    products,
    repeats,
    steps,
)
from tests.bench.gpu.rows import (
    FAILED,
    HEAD,
    RULE,
    SKIPPED,
    Row,
    as_json,
    cells,
    from_json,
    line,
    why,
)
from tests.bench.gpu.setting import Setting, no_device

COMMAND = (sys.executable, "-m", "tests.bench.on_gpu")
LIMIT_SECONDS = 580.0
"""Of all parts together."""
ENDING_SECONDS = 2.0
LAST_SECONDS = 4.0
"""Before a part's end it begins nothing new."""
MARK, DONE = "row ", "done"
"""Begin lines that a part's process prints for the one that started it."""
ENV = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""With which products repeat bit for bit."""


@dataclass(frozen=True, slots=True)
class Part:
    """One process's work."""

    name: str
    rows: Callable[[Setting], Iterator[Row]]
    seconds: float


PARTS = (
    Part("card", card.rows, 20),
    Part("kernels", kernels.rows, 75),
    Part("agreement", agreement.rows, 80),
    Part("products", products.rows, 90),
    Part("attention", attention.rows, 80),
    Part("steps", steps.rows, 140),
    Part("decoding", decoding.rows, 50),
    Part("repeats", repeats.rows, 45),
)


@dataclass
class Report:
    """What was found until now, on the screen and in a file."""

    out: Path | None
    facts: dict[str, Any]
    parts: list[dict[str, Any]] = field(default_factory=list)
    faults: int = 0

    def begin(self) -> None:
        """The head of the table."""
        print(cells(*HEAD), RULE, sep="\n", flush=True)

    def add(self, part: Part, rows: Iterator[Row]) -> None:
        """The rows of a part as they come, and a line that it ended."""
        begin, found = time.monotonic(), []
        for row in rows:
            print(line(part.name, row), flush=True)
            found.append(as_json(row))
            self.faults += row.is_fault
        seconds = time.monotonic() - begin
        ended = Row("part ended", "", round(seconds, 1), "s", more={"of": part.seconds})
        print(line(part.name, ended), flush=True)
        self.parts.append({"name": part.name, "seconds": seconds, "rows": found})
        self.write()

    def write(self) -> None:
        """At once, so that what was measured outlives whatever comes after it."""
        if self.out is not None:
            told = self.facts | {"faults": self.faults, "parts": self.parts}
            self.out.write_text(json.dumps(_finite(told), indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if there is a fault."""
    asked = _parser().parse_args(arguments)
    torch.set_float32_matmul_precision("highest")
    chosen = [part for part in PARTS if not asked.part or part.name in asked.part]
    if asked.until is not None:
        _child(chosen[0], asked.until)
        return 0
    missing = "" if asked.short else no_device()
    facts = {
        "card": "cpu, a short round" if asked.short else missing or torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "short": asked.short,
    }
    report = Report(asked.out, facts)
    print(f"{facts['card']}, torch {torch.__version__}, CUDA {torch.version.cuda}\n")
    report.begin()
    until = time.monotonic() + LIMIT_SECONDS
    for part in chosen:
        if missing:
            rows = iter([Row("all", "", f"{SKIPPED}{missing}")])
        elif asked.short:
            rows = _guarded(part, Setting(torch.device("cpu"), short=True))
        else:
            rows = apart(part, min(until, time.monotonic() + part.seconds))
        report.add(part, rows)
    return int(report.faults > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    names = [part.name for part in PARTS]
    parser.add_argument("--out", type=Path, help="file to write all figures to, as JSON")
    parser.add_argument("--part", action="append", choices=names, help="this part alone")
    parser.add_argument("--short", action="store_true", help="on the CPU, to show that it runs")
    # How this program starts itself: for one part, until then by the machine's clock.
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    return parser


def _guarded(part: Part, setting: Setting) -> Iterator[Row]:
    try:
        yield from part.rows(setting)
    except Exception as error:
        yield Row("the whole part", "", why(error))


def _child(part: Part, until: float) -> None:
    """Measure one part, and print its rows for the process that started this one."""
    device = torch.device("cuda", torch.cuda.current_device())
    for row in _guarded(part, Setting(device, until=until - LAST_SECONDS)):
        print(f"\n{MARK}{json.dumps(as_json(row))}", flush=True)
    print(f"\n{DONE}", flush=True)


def apart(part: Part, until: float) -> Iterator[Row]:
    """The rows of a part that runs in a process of its own, which does not outlive `until`."""
    if until - time.monotonic() <= LAST_SECONDS:
        yield Row("the whole part", "", f"{SKIPPED}no time left")
        return
    with (
        tempfile.TemporaryFile("w+") as words,
        subprocess.Popen(
            [*COMMAND, "--part", part.name, "--until", repr(until)],
            stdout=subprocess.PIPE,
            stderr=words,
            env=os.environ | ENV,
            # What it starts itself, as compilers, ends with it.
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for text in _lines(process.stdout, until):
                if text.startswith(MARK):
                    yield from_json(json.loads(text.removeprefix(MARK)))
                elif text.startswith(DONE):
                    return
            code = process.wait(max(0.0, until - time.monotonic()))
        except (TimeoutError, subprocess.TimeoutExpired):
            yield Row("the whole part", "", f"{FAILED}its time was over before it was done")
            return
        finally:
            _end(process)
        words.seek(0)
        last = (words.read().strip().splitlines() or ["it said nothing"])[-1]
        yield Row("the whole part", "", f"{FAILED}ended with exit code {code}: {last[:160]}")


def _lines(stream: IO[bytes], until: float) -> Iterator[str]:
    """Each line as it comes; TimeoutError when time is over."""
    begun = b""
    with selectors.DefaultSelector() as ready:
        ready.register(stream, selectors.EVENT_READ)
        while ready.select(max(0.0, until - time.monotonic())):
            part = os.read(stream.fileno(), 2**16)
            if not part:
                return
            *whole, begun = (begun + part).split(b"\n")
            yield from (text.decode() for text in whole)
    raise TimeoutError


def _end(process: subprocess.Popen[bytes]) -> None:
    """Give it a moment to end by itself, then end it and what it started."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(ENDING_SECONDS)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _finite(told: Any) -> Any:
    """`told` in what every reader of JSON knows: it has no name for what is no number."""
    match told:
        case float() if not math.isfinite(told):
            return str(told)
        case dict():
            return {name: _finite(one) for name, one in told.items()}
        case list():
            return [_finite(one) for one in told]
        case _:
            return told


if __name__ == "__main__":
    sys.exit(main())
