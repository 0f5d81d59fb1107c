"""Ingot's data stage over rows of jsonl, in a process of its own, on one core.

    python -m tests.bench.preparation_line JOB ANSWER

The rules' thresholds are moved so far that no text fails one: on code and documentation the
published ones would drop most, and what is measured would starve.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from configs.data import DataConfig, DataSpec, QualityConfig
from configs.parallel import ClusterConfig
from configs.quality_rules import HEURISTICS
from stages.artifacts import Corpus
from stages.data.dedup import digest
from stages.data.loop import data
from stages.data.minhash import band_keys, signatures
from stages.data.quality import judge_all
from stages.overlap import sketches
from tests.conftest import Recorder, workspace_at

SOURCE = "machine"
FAR = 1e9
"""A threshold that nothing exceeds."""
SEQUENCE_TOKENS = 1024
_PARTS_BYTES = 8_000_000
_BLOCK_BYTES = 2_000_000


def quality() -> dict[str, Any]:
    """All sets of rules, each of which every text passes."""
    thresholds = {
        rule: 0.0 if "_min_" in rule else FAR for rules in HEURISTICS.values() for rule in rules
    }
    return {
        "heuristics": list(HEURISTICS),
        "thresholds": thresholds,
        "min_chars": 0,
        "max_control_share": 1.0,
        "max_repeated_line_share": 1.0,
        "min_letter_share": 0.0,
        "max_line_chars": int(FAR),
    }


def config(job: Mapping[str, Any]) -> DataSpec:
    """The stage's config: all text is read, and all of it is packed."""
    source = {
        "type": "files",
        "share": 1.0,
        "glob": f"{job['corpus']}/text/*.jsonl",
        "id_field": "id",
        "max_bytes": 10**12,
        "split_documents": False,
    }
    fields = {
        "sources": {SOURCE: source},
        # More than there is, so that all of it is encoded; a text is repeated by no more than 1.
        "train_tokens": job["bytes"],
        "sequence_tokens": SEQUENCE_TOKENS,
        "quality": quality(),
        "dedup": {"min_jaccard": job["min_jaccard"]},
        "evaluations": {"planted": {"glob": f"{job['corpus']}/items.jsonl"}},
        "tokenizer": {"file": job["tokenizer"], "encoder": job["encoder"]},
    }
    return DataSpec(seed=0, data=DataConfig.model_validate(fields))


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """Prepare the corpus; seconds of each step, what was dropped and cut, and the memory."""
    recorder = Recorder()
    machines = ClusterConfig(data_workers=1)
    work = workspace_at(Path(job["folder"]), recorder, machines=machines)
    before_bytes = peak_bytes()
    wall, cpu = time.perf_counter(), time.process_time()
    corpus = data(config(job), work)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    steps = {
        name.removesuffix("_seconds"): took
        for name, took in recorder.logged[-1][1].items()
        if name.endswith("_seconds")
    }
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": peak_bytes(),
        "begin_bytes": before_bytes,
        "steps": steps,
        "tokens": corpus.train_rows * corpus.sequence_tokens,
        **_told(corpus),
        "encoded_by": next(
            (one for one in recorder.notes if "tokenizer.encoder" in one), "tokenizers"
        ),
    }


def peak_bytes() -> int:
    """The most memory that this process has had; `ru_maxrss` would count its parent's too."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def parts(texts: list[str]) -> dict[str, float]:
    """Megabytes a second of what the step `read` does to texts, each part by itself."""
    rules = QualityConfig.model_validate(quality())
    blocks = list(_blocks(texts))
    size = sum(len(text.encode()) for text in texts)
    asked: dict[str, Callable[[list[str]], object]] = {
        "judge by rules": lambda block: judge_all(block, rules),
        "MinHash": lambda block: band_keys(signatures(block)),
        "sample windows": sketches,
        "digest": lambda block: [digest(text) for text in block],
    }
    found = {}
    for name, of in asked.items():
        of(blocks[0][:2])
        begin = time.process_time()
        for block in blocks:
            of(block)
        found[name] = size / 1e6 / (time.process_time() - begin)
    return found


def _blocks(texts: list[str]) -> Iterator[list[str]]:
    block: list[str] = []
    size = 0
    for text in texts:
        block.append(text)
        size += len(text)
        if size > _BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def _told(corpus: Corpus) -> dict[str, Any]:
    """What the artifact says of documents, by the names that the rows give them."""
    facts = json.loads(Path(corpus.path("statistics.json")).read_text())
    near: dict[str, list[Any]] = {}
    exact, cut, other = list[str](), list[str](), dict[str, int]()
    names = _names(corpus)
    for row in _rows(Path(corpus.path("drops"))):
        match row["rule"]:
            case "near_duplicate":
                kept = row["of"].removeprefix(f"{SOURCE}/")
                near[row["key"]] = [names.get(kept, kept), row["value"]]
            case "exact_duplicate":
                exact.append(row["key"])
            case rule:
                other[rule] = other.get(rule, 0) + 1
                if row["of"] == "planted":
                    cut.append(row["key"])
    held_out = [
        row["key"] for row in _rows(Path(corpus.path("documents"))) if row["side"] != "train"
    ]
    source = facts["sources"][SOURCE]
    return {
        "near": near,
        "exact": exact,
        "contaminated": cut,
        "held_out": held_out,
        "other_drops": other,
        "documents": source["documents_read"],
        "kept": source["train_documents"],
        "evaluations": facts["evaluations"],
        "pairs_compared": facts["duplicates"]["pairs_compared"],
    }


def _names(corpus: Corpus) -> dict[str, str]:
    """What the rows call each document that stays, by what the stage calls it."""
    return {row["document"]: row["key"] for row in _rows(Path(corpus.path("documents")))}


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.parquet")):
        columns = [name for name in pq.read_schema(path).names if name != "measures"]
        yield from pq.read_table(path, columns=columns).to_pylist()


def do(job: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked: the whole line, or parts of one step."""
    if job["kind"] == "line":
        return run(job)
    texts: list[str] = []
    size = 0
    with Path(job["corpus"], "text", "00000.jsonl").open(encoding="utf-8") as file:
        while size < _PARTS_BYTES and (line := file.readline()):
            texts.append(json.loads(line)["text"])
            size += len(texts[-1])
    return {"parts": parts(texts)}


def main(asked: str, answer: str) -> None:
    """Do the job of the file `asked`, and write what came of it."""
    job = json.loads(Path(asked).read_text())
    os.sched_setaffinity(0, {job["core"]})
    Path(answer).write_text(json.dumps(do(job)))


if __name__ == "__main__":
    main(*sys.argv[1:])
