"""datatrove's line over rows of jsonl, on one core, under its own Python; nothing of Ingot is here.

    python datatrove_line.py JOB ANSWER

The blocks, with the settings that they come with unless said:

| task | blocks |
|---|---|
| 1 | JsonlReader, Gopher repetition, Gopher quality, C4, FineWeb, JsonlWriter, MinHash signatures |
| 2 | MinHash buckets, fourteen of them |
| 3 | MinHash clusters |
| 4 | JsonlReader, MinHash filter, n-gram decontamination, DocumentTokenizer |

Filters' thresholds are moved so far that no text fails one, and C4 gives back the text as it was,
so that both lines have the same text to work on. What could be left out to its advantage is left
out: rows between tasks are not packed, and are written once; equal documents are left to MinHash;
the tokens are not shuffled. The index of decontamination is made here of the items' hashes, as
datatrove's own block for that wants another package and the network. Words come from spaCy's rules
for English, which are datatrove's own choice and need no network.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.hashing import create_hash_func
from datatrove.utils.text import ngrams, simplify_text
from datatrove.utils.typeshelper import Languages
from datatrove.utils.word_tokenizers import load_word_tokenizer
from loguru import logger

FAR = 1e9
"""A threshold that nothing exceeds; 0 and None would leave the measuring out."""


class C4Measured(C4QualityFilter):
    """C4's rules, of which no line of the text goes."""

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether the document stays, with its text as it was."""
        text = doc.text
        found: bool | tuple[bool, str] = super().filter(doc)
        doc.text = text
        return found


def filters() -> list[PipelineStep]:
    """All four sets of rules, each of which every text passes."""
    return [
        GopherRepetitionFilter(
            dup_line_frac=FAR,
            dup_para_frac=FAR,
            dup_line_char_frac=FAR,
            dup_para_char_frac=FAR,
            top_n_grams=tuple((n, FAR) for n in (2, 3, 4)),
            dup_n_grams=tuple((n, FAR) for n in (5, 6, 7, 8, 9, 10)),
        ),
        GopherQualityFilter(
            min_doc_words=-1,
            max_doc_words=int(FAR),
            min_avg_word_length=-1,
            max_avg_word_length=int(FAR),
            max_symbol_word_ratio=FAR,
            max_bullet_lines_ratio=FAR,
            max_ellipsis_lines_ratio=FAR,
            max_non_alpha_words_ratio=-1.0,
            min_stop_words=-1,
        ),
        C4Measured(
            min_num_sentences=0,
            max_word_length=int(FAR),
            filter_lorem_ipsum=False,
            filter_curly_bracket=False,
        ),
        FineWebQualityFilter(
            line_punct_thr=-1.0,
            short_line_thr=FAR,
            char_duplicates_ratio=FAR,
            new_line_ratio=FAR,
        ),
    ]


def executors(job: dict[str, Any], folder: Path) -> Iterator[list[PipelineStep]]:
    """The blocks of each task, in order."""
    config = MinhashConfig()
    yield [
        JsonlReader(f"{job['corpus']}/text", compression=None),
        *filters(),
        JsonlWriter(str(folder / "filtered"), compression=None),
        MinhashDedupSignature(str(folder / "signatures"), config),
    ]
    yield [MinhashDedupBuckets(str(folder / "signatures"), str(folder / "buckets"), config=config)]
    yield [
        MinhashDedupCluster(
            str(folder / "buckets"), str(folder / "removed"), config, save_cluster_id=True
        )
    ]
    yield [
        JsonlReader(str(folder / "filtered"), compression=None),
        MinhashDedupFilter(str(folder / "removed")),
        NGramsDecontFilter(
            str(folder / "index"),
            exclusion_writer=JsonlWriter(str(folder / "contaminated"), compression=None),
        ),
        DocumentTokenizer(
            str(folder / "tokens"), job["tokenizer"], eos_token=job["eos"], shuffle_documents=False
        ),
    ]


def write_index(job: dict[str, Any], folder: Path) -> None:
    """The hashes of the items' n-grams, as the filter reads them."""
    config = NGramsDecontConfig()
    words = load_word_tokenizer(Languages.english)
    hashed = create_hash_func(config.hash_config)
    found: set[int] = set()
    for line in Path(job["corpus"], "items.jsonl").read_text().splitlines():
        said = words.word_tokenize(simplify_text(json.loads(line)["text"], config.norm_config))
        found.update(hashed(" ".join(run)) for run in ngrams(said, config.n_grams))
    (folder / "index").mkdir(parents=True)
    np.array(sorted(found), config.hash_config.np_descr).tofile(
        folder / "index" / "planted.index.hashes"
    )


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Prepare the corpus; seconds of each block, what was dropped, and the memory."""
    folder = Path(job["folder"])
    begin_bytes = peak_bytes()
    wall, cpu = time.perf_counter(), time.process_time()
    write_index(job, folder)
    steps: dict[str, float] = {}
    found: dict[str, int] = {}
    for number, blocks in enumerate(executors(job, folder)):
        tasks = MinhashConfig().num_buckets if number == 1 else 1
        logs = str(folder / "logs" / str(number))
        done = LocalPipelineExecutor(blocks, tasks=tasks, workers=1, logging_dir=logs).run()
        took = {stats.name: stats.time_stats.total for stats in done.stats}
        if number == 0:
            # Signatures are asked for what all blocks before them do; their clock runs meanwhile.
            signatures = done.stats[-1].name
            took[signatures] -= sum(one for name, one in took.items() if name != signatures)
        steps |= {f"{number}: {name}": one for name, one in took.items()}
        for stats in done.stats:
            found |= {f"{number}: {name}": int(one.total) for name, one in stats.stats.items()}
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": peak_bytes(),
        "begin_bytes": begin_bytes,
        "steps": steps,
        "tokens": found["3: tokens"],
        "documents": found["0: documents"],
        **_told(folder),
    }


def peak_bytes() -> int:
    """The most memory that this process has had; `ru_maxrss` would count its parent's too."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _told(folder: Path) -> dict[str, Any]:
    """Which documents went, and of a repeated one who stayed of its cluster."""
    names = [row["id"] for row in _rows(folder / "filtered")]
    removed = set(_numbers(folder / "removed" / "000000.remove").tolist())
    clusters = _numbers(folder / "removed" / "000000.clusters").reshape(-1, 2).tolist()
    stays = {cluster: names[at] for at, cluster in clusters if at not in removed}
    return {
        "near": {names[at]: [stays[cluster], None] for at, cluster in clusters if at in removed},
        "contaminated": [row["id"] for row in _rows(folder / "contaminated")],
    }


def _numbers(path: Path) -> Any:
    return np.fromfile(path, "<u4") if path.is_file() else np.empty(0, np.uint32)


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.jsonl")):
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def main(asked: str, answer: str) -> None:
    """Do the job of the file `asked`, and write what came of it."""
    job = json.loads(Path(asked).read_text())
    os.sched_setaffinity(0, {job["core"]})
    logger.remove()
    Path(answer).write_text(json.dumps(run(job)))


if __name__ == "__main__":
    main(*sys.argv[1:])
