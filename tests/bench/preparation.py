"""The data stage beside datatrove's line for the same steps: text found here, one core, in turn.

    python -m tests.bench.preparation [--megabytes 200] [--rounds 2] [--out FILE]
        [--without-datatrove] [--folder FOLDER]

Each line runs in a process of its own on the same core, ours with either encoder, in turn as often
as `--rounds` says; the medians are told. `preparation_corpus.py` says what is read, and what is
planted; `preparation_line.py` and `datatrove_line.py` say how each line is set, so that both do the
same work on all of the text. Then ours prepares a tenth as much, to tell how time and memory grow,
and that again with pairs wanted from 0.7 on. datatrove has no words but those of spaCy's rules.
The language filter is left out: it would ask the network.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.data import TokenizerConfig
from stages.data.tokenizer import encode, sample, train_tokenizer
from stages.framing import EOS_TOKEN
from tests.bench import machine
from tests.bench.preparation_corpus import Planted, texts_of, write_corpus
from tests.bench.preparation_exact import items_found, precision_of_near, recall_of_pairs
from tests.clients.environments import Unavailable, python_of

ROOT = Path(__file__).parents[2]
OURS, OURS_FAST, THEIRS = "ours", "ours, gigatoken", "datatrove"
VOCAB_SIZE = 32_768
TRAINING_BYTES = 10_000_000
_SAMPLE_BYTES = 3_000_000
LIMIT_SECONDS = 4 * 3600
STEPS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "read, judge, take down what is compared": (("read",), ("0: ",)),
    "decide what is a duplicate": (
        ("dedup", "decide"),
        ("1: ", "2: ", "3: 📖", "3: 🫂"),
    ),
    "take out evaluation items": (("clean",), ("3: 🦠",)),
    "encode and pack": (("tokenizer", "encode", "order", "rows"), ("3: 🔢",)),
}
"""By what is told: steps of ours, and beginnings of the names of datatrove's."""
PARTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "judge by rules": ("judge by rules", ("0: 🔻",)),
    "MinHash signatures": ("MinHash", ("0: 🫂",)),
}
"""By what is told: a part of the step `read`, and datatrove's blocks."""


@dataclass(frozen=True)
class Bench:
    """Where lines are run, and on what core."""

    folder: Path
    core: int
    tokenizer: Path
    theirs: Path | None
    """datatrove's Python; none if it is left out."""

    def run(self, line: str, planted: Planted, *, min_jaccard: float = 0.8) -> dict[str, Any]:
        """What a line says of a corpus, whose folder it leaves as it was."""
        job = {
            "kind": "line",
            "bytes": planted.bytes,
            "min_jaccard": min_jaccard,
            "encoder": "gigatoken" if line == OURS_FAST else "tokenizers",
        }
        return self._run(line, planted, job)

    def parts(self, planted: Planted) -> dict[str, float]:
        """Megabytes a second of parts of our step `read`."""
        found: dict[str, float] = self._run(OURS, planted, {"kind": "parts"})["parts"]
        return found

    def _run(self, line: str, planted: Planted, job: Mapping[str, Any]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            common = {
                "core": self.core,
                "corpus": planted.folder,
                "tokenizer": str(self.tokenizer),
                "eos": EOS_TOKEN,
                "folder": f"{folder}/run",
            }
            return ask(line, self.theirs, common | dict(job), Path(folder))


def ask(line: str, theirs: Path | None, job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The answer of a line, in a process of its own."""
    if line == THEIRS:
        command = [str(theirs), str(ROOT / "tests" / "bench" / "datatrove_line.py")]
    else:
        command = [sys.executable, "-m", "tests.bench.preparation_line"]
    asked, answer = folder / "job.json", folder / "answer.json"
    asked.write_text(json.dumps(dict(job)))
    done = subprocess.run(
        [*command, str(asked), str(answer)],
        cwd=ROOT,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    if done.returncode:
        raise RuntimeError(f"{line} failed: {done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def _environment() -> dict[str, str]:
    """One thread, no network, and malloc as it comes, for both lines."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    return (
        kept
        | dict.fromkeys(threads, "1")
        | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    )


def make_tokenizer(planted: Planted, path: Path) -> float:
    """Train a tokenizer on the first of the texts; how many tokens a byte of text is."""
    texts = (text for _, text in texts_of(planted))
    config = TokenizerConfig(vocab_size=VOCAB_SIZE, pre_tokenizer="deepseek")
    made = train_tokenizer(sample(texts, TRAINING_BYTES), config)
    made.save(str(path))
    some = list(sample((text for _, text in texts_of(planted)), _SAMPLE_BYTES))
    tokens = sum(len(one) for one in encode(made, some))
    return tokens / sum(len(text.encode()) for text in some)


def seconds_of(line: str, steps: Mapping[str, float], told: str) -> float:
    """How long a line took for one of `STEPS`."""
    ours, theirs = STEPS[told]
    names = theirs if line == THEIRS else ours
    return sum(took for name, took in steps.items() if name.startswith(names))


def table(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    parts: Mapping[str, float],
    planted: Planted,
    tokens: float,
) -> dict[str, dict[str, float]]:
    """Print and return the seconds of each step, the medians over the rounds, by line."""
    lines = list(runs)
    found: dict[str, dict[str, float]] = {}
    for told in STEPS:
        found[told] = {
            line: statistics.median(seconds_of(line, run["steps"], told) for run in runs[line])
            for line in lines
        }
    found["the rest"] = {
        line: statistics.median(
            run["seconds"] - sum(seconds_of(line, run["steps"], told) for told in STEPS)
            for run in runs[line]
        )
        for line in lines
    }
    for told, key in (("whole", "seconds"), ("whole, processor time", "cpu_seconds")):
        found[told] = {line: statistics.median(run[key] for run in runs[line]) for line in lines}
    print("| step | " + " | ".join(f"{line}: s; MB, docs, tokens /s" for line in lines) + " |")
    print("|---" * (len(lines) + 1) + "|")
    for told, took in found.items():
        cells = [
            f"{s:,.1f}; {planted.bytes / 1e6 / s:,.2f}, {planted.documents / s:,.0f}, "
            f"{tokens / s:,.0f}"
            for s in (max(1e-9, took[line]) for line in lines)
        ]
        print(f"| {told} | {' | '.join(cells)} |")
    print("\nParts of reading, by themselves (MB/s of processor time; datatrove's of the clock):")
    for told, (ours, theirs) in PARTS.items():
        said = f"  {told}: ours {parts[ours]:.2f}"
        if THEIRS in runs:
            took = statistics.median(
                sum(s for name, s in run["steps"].items() if name.startswith(theirs))
                for run in runs[THEIRS]
            )
            said += f", datatrove {planted.bytes / 1e6 / took:.2f}"
        print(said)
    print(f"  sample windows: ours {parts['sample windows']:.2f}; digest: {parts['digest']:.2f}")
    return found


def ratios(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """How many times as fast ours is, end to end."""
    said = {}
    for told in ("whole", "whole, processor time"):
        for line in (OURS, OURS_FAST):
            said[f"{line}, {told}"] = found[told][THEIRS] / found[told][line]
    return said


def judged(line: str, planted: Planted, answer: Mapping[str, Any]) -> dict[str, Any]:
    """Print and return what a line found of what was planted."""
    told = {
        "pairs": recall_of_pairs(planted, answer),
        "near": precision_of_near(planted, answer),
        "items": items_found(planted, answer),
    }
    print(f"{line}: {json.dumps(told)}")
    return told


def growth(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], small: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, float]]:
    """Print and return by what time and memory grow from a tenth of the text to all of it."""
    found = {}
    for line, one in small.items():
        found[line] = {
            name: statistics.median(run[name] for run in runs[line]) / one[name]
            for name in ("seconds", "cpu_seconds", "peak_bytes")
        }
        growths = ", ".join(f"{name} x {by:.2f}" for name, by in found[line].items())
        print(f"{line}, from a tenth of the text to all of it: {growths}")
    return found


def measure(
    folder: Path,
    megabytes: float,
    rounds: int,
    *,
    theirs: Path | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """All figures, printed as they come, and written to `out` whenever there are more."""
    planted = write_corpus(folder / "all", megabytes)
    small = write_corpus(folder / "tenth", megabytes / 10)
    mean = planted.bytes / planted.documents
    places = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in planted.found.items())
    print(f"{machine.describe()}, load {os.getloadavg()[0]:.1f}")
    print(
        f"{planted.documents:,} documents of {mean:,.0f} bytes: {places}; {len(planted.pairs)} "
        f"edited copies and {len(planted.items)} evaluation items are planted",
        flush=True,
    )
    per_byte = make_tokenizer(planted, folder / "tokenizer.json")
    bench = Bench(folder, max(os.sched_getaffinity(0)), folder / "tokenizer.json", theirs)
    facts: dict[str, Any] = {
        "machine": machine.describe(),
        "megabytes": planted.bytes / 1e6,
        "documents": planted.documents,
        "places": planted.found,
        "tokens": per_byte * planted.bytes,
    }

    lines = [OURS, *([THEIRS] if theirs else []), OURS_FAST]
    runs: dict[str, list[dict[str, Any]]] = {line: [] for line in lines}
    for number in range(rounds):
        for line in lines:
            answer = bench.run(line, planted)
            runs[line].append(answer)
            print(f"round {number + 1}, {line}: {_told(answer)}", flush=True)
            facts["rounds"] = {name: [_brief(run) for run in of] for name, of in runs.items()}
            _write(facts, out)
    print(f"encoded by: {runs[OURS_FAST][0]['encoded_by']}\n")
    parts = facts["parts_megabytes_per_second"] = bench.parts(planted)
    facts["seconds"] = table(runs, parts, planted, facts["tokens"])
    facts["peak_bytes"] = {name: max(run["peak_bytes"] for run in of) for name, of in runs.items()}
    facts["ratios"] = ratios(facts["seconds"]) if theirs else {}
    for told, ratio in facts["ratios"].items():
        print(f"{told}: {ratio:.2f} times datatrove's throughput")
    facts["found"] = {line: judged(line, planted, runs[line][0]) for line in lines}
    _write(facts, out)
    facts["growth"] = growth(runs, {line: bench.run(line, small) for line in (OURS, OURS_FAST)})
    looser = bench.run(OURS_FAST, small, min_jaccard=0.7)
    facts["pairs_from_0.7"] = recall_of_pairs(small, looser)
    print(f"ours, a tenth of the text, pairs wanted from 0.7 on: {facts['pairs_from_0.7']}")
    _write(facts, out)
    return facts


def _write(facts: Mapping[str, Any], out: Path | None) -> None:
    if out is not None:
        out.write_text(json.dumps(facts, indent=2) + "\n")


def _told(run: Mapping[str, Any]) -> str:
    peak, begin = run["peak_bytes"] / 1e6, run["begin_bytes"] / 1e6
    return (
        f"{run['seconds']:,.1f} s, processor {run['cpu_seconds']:,.1f} s, peak {peak:,.0f} MB "
        f"({begin:,.0f} of it with nothing done), {run['tokens']:,} tokens, load "
        f"{os.getloadavg()[0]:.1f}"
    )


def _brief(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run without the names of documents."""
    lists = ("near", "exact", "contaminated", "held_out")
    return {name: len(value) if name in lists else value for name, value in run.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megabytes", type=float, default=200.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--without-datatrove", action="store_true")
    parser.add_argument("--folder", type=Path, help="for all that is written meanwhile")
    parser.add_argument("--out", type=Path, help="for the figures, as JSON")
    asked = parser.parse_args(arguments)
    try:
        theirs = None if asked.without_datatrove else python_of("datatrove")
    except Unavailable as error:
        sys.exit(f"datatrove: {error}; leave it out with --without-datatrove")
    with tempfile.TemporaryDirectory(dir=asked.folder, prefix="ingot-bench-") as folder:
        measure(Path(folder), asked.megabytes, asked.rounds, theirs=theirs, out=asked.out)


if __name__ == "__main__":
    main()
