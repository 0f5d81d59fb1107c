"""Writes small faults into a copy of the tree and reports which of them no test finds.

    python -m tests.mutants --seed 0 --number 60 [--file 'pipeline/*.py'] [--named] [--jobs 2]

`--number` mutants are drawn by seed over `SOURCES`, the larger files getting more (see
`tests/mutations.py`); `--named` tries those of `tests/mutants_known.py` instead. Each runs the
tests of its file until the first that fails. A mutant whose tests take too long counts as killed.
What survives needs a better test, or a reason in `EQUIVALENTS`.
"""

import argparse
import fnmatch
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from tests.mutants_known import EQUIVALENTS, NAMED, TESTS
from tests.mutations import Mutant, draw, mutants

ROOT = Path(__file__).parents[1]
SOURCES = (
    "stages/*/loop.py",
    "stages/posttrain/*.py",
    "pipeline/runner.py",
    "pipeline/building.py",
    "pipeline/listeners.py",
    "pipeline/crew.py",
    "pipeline/store.py",
    "pipeline/lease.py",
    "pipeline/states.py",
    "pipeline/decide.py",
    "cluster/session.py",
    "cluster/fit.py",
    "cluster/trainer.py",
    "cluster/pool.py",
    "cluster/generation.py",
    "cluster/checkpoint.py",
    "cluster/expert_parallel.py",
    "model/moe.py",
    "model/balance.py",
    "model/optim.py",
    "model/loss.py",
)
_TEST_SECONDS, _FILES_SECONDS = 300, 1800.0
"""No test, and no file's tests together, take as long unchanged, however busy the machine."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one mutant."""

    mutant: Mutant
    outcome: str
    """`killed`, `survived` or `equivalent`."""
    killer: str
    """The test that failed and why, `deadline`, or the reason why there is nothing to find."""
    seconds: float


class Scratch:
    """A copy of the tree in which one mutant at a time is tested."""

    def __init__(self, root: Path, folder: Path) -> None:
        """Copy what git knows of `root`, uncommitted changes included, to `folder`."""
        self.folder = folder
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=root, check=True, capture_output=True, text=True).stdout
        for name in filter(None, names.split("\0")):
            if (root / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / name, folder / name)
        self._written = 0

    @contextmanager
    def changed(self, mutant: Mutant) -> Iterator[None]:
        """The tree with this mutant in it."""
        before = (self.folder / mutant.file).read_text()
        self._write(mutant.file, mutant.source)
        try:
            yield
        finally:
            self._write(mutant.file, before)

    def _write(self, file: str, source: str) -> None:
        """Never twice with one time: compiled files are told by the seconds and the length."""
        path = self.folder / file
        path.write_text(source)
        self._written += 1
        moment = time.time() - 1_000_000 + 10 * self._written
        os.utime(path, (moment, moment))

    def test(self, tests: Sequence[str], *, seconds: float = _FILES_SECONDS) -> str:
        """Run these files until a test fails; that test and why it failed, or nothing.

        Past the deadline everything that the tests have started is ended.
        """
        report = self.folder / ".report.xml"
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", *tests, "-x", "-q"]
        # What the tests need none of, and is slow to import.
        command += [f"-pno:{plugin}" for plugin in ("cacheprovider", "hypothesispytest", "anyio")]
        command += [f"--junitxml={report}", f"--timeout={_TEST_SECONDS}", "--tb=line"]
        environment = {**os.environ, "PYTHONPATH": str(self.folder)}
        with (self.folder / ".output.txt").open("w") as output:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                return "deadline"
            finally:
                _end(process)
        if code == pytest.ExitCode.USAGE_ERROR and "ERROR: not found" in self.output:
            raise LookupError(self.output)
        failed = next(_failures(report), "") if report.is_file() else ""
        return failed or (f"exit code {code}" if code else "")

    @property
    def output(self) -> str:
        """The end of what the last run of tests printed."""
        return (self.folder / ".output.txt").read_text()[-3000:]


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the tests and what they have started."""
    for ending in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, ending)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)


def _failures(report: Path) -> Iterator[str]:
    """The tests that failed, each after its file, and why."""
    for case in ElementTree.parse(report).iter("testcase"):
        failures = [*case.iter("failure"), *case.iter("error")]
        if failures:
            why = failures[0].get("message", "").partition("\n")[0]
            # A file that could not be read stands there as a test of no class.
            name = case.get("name", "")
            module = case.get("classname") or name
            yield f"{module.replace('.', '/')}.py::{name}: {why[:200]}"


def sources(root: Path, pattern: str) -> list[str]:
    """The files that mutants are drawn from, of those that fit `pattern`."""
    found = {path.relative_to(root).as_posix() for one in SOURCES for path in root.glob(one)}
    found = {one for one in found if not one.endswith("/__init__.py")}
    return sorted(one for one in found if fnmatch.fnmatch(one, pattern))


def files_of_tests(root: Path, file: str) -> tuple[str, ...]:
    """The test files that concern a source, in the order in which they are tried."""
    patterns = next((tests for one, tests in TESTS.items() if fnmatch.fnmatch(file, one)), ())
    found = [path for one in patterns for path in sorted(root.glob(one))]
    if not found:
        raise LookupError(f"{file}: no tests are known; name them in TESTS, tests/mutants_known.py")
    return tuple(path.relative_to(root).as_posix() for path in found)


def lot(root: Path, files: Sequence[str], number: int, seed: int) -> list[Mutant]:
    """`number` mutants over the files: shares by size, at least one each while that suffices."""
    pools = {file: mutants(file, (root / file).read_text()) for file in files}
    sizes = {file: len({one.line for one in pool}) for file, pool in pools.items() if pool}
    order = sorted(sizes, key=lambda file: -sizes[file])
    shares = dict.fromkeys(order[:number], 1)
    for _ in range(number - len(shares)):
        # Whoever is furthest behind its share of the whole (Sainte-Laguë).
        behind = max(shares, key=lambda file: sizes[file] / (2 * shares[file] + 1))
        shares[behind] += 1
    return [one for file in sorted(shares) for one in draw(pools[file], shares[file], seed)]


class Judges:
    """Scratch trees, and what is known of the tests in them."""

    def __init__(self, root: Path, folder: Path, number: int, *, trusting: bool) -> None:
        """As many trees as mutants are to be tested at a time."""
        self._trusting = trusting
        self._free: queue.Queue[Scratch] = queue.Queue()
        for one in range(number):
            self._free.put(Scratch(root, folder / str(one)))
        self._sound: set[str] = set()

    def judge(self, mutant: Mutant, tests: Sequence[str]) -> Verdict:
        """Test one mutant; RuntimeError if what kills it also fails without it."""
        for known in EQUIVALENTS:
            if known.is_of(mutant):
                return Verdict(mutant, "equivalent", known.reason, 0.0)
        started, failed = time.monotonic(), ""
        scratch = self._free.get()
        try:
            with scratch.changed(mutant):
                # Alone, the first file spares the imports of the others, and it finds most.
                for part in filter(None, (tests[:1], tests[1:])):
                    failed = failed or scratch.test(part)
            seconds = time.monotonic() - started
            self._require_sound(scratch, failed)
        finally:
            self._free.put(scratch)
        return Verdict(mutant, "killed" if failed else "survived", failed, seconds)

    def _require_sound(self, scratch: Scratch, failed: str) -> None:
        """A test that fails unchanged finds nothing: each file is tried once without a mutant."""
        file, found, _ = failed.partition("::")
        if found and file not in self._sound and not self._trusting:
            if unchanged := scratch.test([file]):
                raise RuntimeError(f"{unchanged} fails without a mutant\n{scratch.output}")
            self._sound.add(file)


def judge_all(
    root: Path,
    chosen: Sequence[tuple[Mutant, tuple[str, ...]]],
    jobs: int = 1,
    *,
    trusting: bool = False,
) -> Iterator[Verdict]:
    """Test every mutant with its tests, `jobs` at a time.

    Who is `trusting` knows that the tests pass without a mutant.
    """
    with (
        tempfile.TemporaryDirectory(prefix="mutants-") as folder,
        ThreadPoolExecutor(jobs) as pool,
    ):
        judges = Judges(root, Path(folder), jobs, trusting=trusting)
        yield from pool.map(lambda choice: judges.judge(*choice), chosen)


def table(verdicts: Iterable[Verdict]) -> str:
    """File, drawn, killed, equivalent, survivors; then each survivor's patch."""
    verdicts = list(verdicts)
    rows: list[tuple[str, ...]] = [("file", "drawn", "killed", "equivalent", "survivors")]
    for file in sorted({one.mutant.file for one in verdicts}):
        of = [one.outcome for one in verdicts if one.mutant.file == file]
        counts = (of.count(outcome) for outcome in ("killed", "equivalent", "survived"))
        rows.append((file, str(len(of)), *map(str, counts)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    survivors = [one.mutant for one in verdicts if one.outcome == "survived"]
    return "\n".join([*lines, *(f"\n{one.kind}\n{one.diff}" for one in survivors)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, test, print the table; 1 if a mutant survives."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=60, help="mutants to draw over all files")
    parser.add_argument("--file", default="*", help="only files that fit this pattern")
    parser.add_argument("--named", action="store_true", help="try the named mutants, draw none")
    parser.add_argument("--only", default="*", help="of the named mutants, those that fit this")
    parser.add_argument("--list", action="store_true", help="show the mutants and test nothing")
    parser.add_argument("--trust", action="store_true", help="the tests pass unchanged")
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=1)
    parser.add_argument("--json", type=Path, default=Path("build/mutants.json"))
    asked = parser.parse_args(arguments)
    if asked.named:
        named = [one for one in NAMED if fnmatch.fnmatch(one.file, asked.file)]
        named = [one for one in named if fnmatch.fnmatch(one.name, asked.only)]
        chosen = [(one.mutant(ROOT), one.tests or files_of_tests(ROOT, one.file)) for one in named]
    else:
        drawn = lot(ROOT, sources(ROOT, asked.file), asked.number, asked.seed)
        chosen = [(one, files_of_tests(ROOT, one.file)) for one in drawn]
    if asked.list:
        print("\n\n".join(f"{one.kind}\n{one.diff}" for one, _ in chosen))
        return 0
    verdicts: list[Verdict] = []
    for verdict in judge_all(ROOT, chosen, asked.jobs, trusting=asked.trust):
        verdicts.append(verdict)
        _save(asked.json, verdicts)
        mutant = verdict.mutant
        print(
            f"{len(verdicts)}/{len(chosen)} {mutant.file}:{mutant.line} {mutant.kind}: "
            f"{verdict.outcome} {verdict.killer} ({verdict.seconds:.0f} s)",
            file=sys.stderr,
            flush=True,
        )
    print(table(verdicts))
    return int(any(one.outcome == "survived" for one in verdicts))


def _save(path: Path, verdicts: Sequence[Verdict]) -> None:
    records = []
    for one in verdicts:
        record = asdict(one.mutant) | {"diff": one.mutant.diff, "outcome": one.outcome}
        del record["source"]
        records.append(record | {"killer": one.killer, "seconds": round(one.seconds, 1)})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    sys.exit(main())
