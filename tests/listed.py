"""A corpus that lists its documents, written without the data stage: every fate is in it once."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.data.drops import Drop
from stages.data.tables import Writer, write_drops
from stages.manifest import MANIFEST, FileEntry, Manifest, content_hash, hash_file

HOSTILE = '<script>alert("x")</script>&amp;| `a` [l](javascript:x)\x1b[31m\u202e'
"""Text that must harm neither a browser, nor Markdown, nor a terminal."""
MEASURES = {
    "books": {"min_chars": 400.0, "min_letter_share": 0.75},
    "web": {"min_chars": 300.0, "gopher_max_top_2gram_chars": 0.0625},
}
KEPT: dict[str, list[dict[str, Any]]] = {
    "books-00000": [
        {"document": "a.txt", "key": "B-1", "licence": "CC0", "timestamp": "2020-02-29T00:00:00"},
        {"document": "b.txt", "key": "B-2", "side": "held_out"},
        {"document": "e.txt", "key": "B-5"},
    ],
    "web-00000": [{"document": "a.txt", "key": "K", "licence": HOSTILE}],
    "web-00001": [{"document": "dir/y.jsonl#4", "key": "K"}],
}
"""By file, what is not as it is elsewhere."""
DROPS: dict[str, list[Drop]] = {
    "books-00000": [
        Drop("books", "c.txt", "near_duplicate", 0.9142, 0.8, "Once", of="books/a.txt", key="B-3"),
        Drop("books", "d.txt", "min_chars", 12.0, 64.0, HOSTILE, key="B-4"),
        Drop("books", "e.txt", "held_out_passage", 2.0, start="It was", cut_chars=310, key="B-5"),
        Drop(
            "books", "e.txt", "evaluation_item", 1.0, start="Q", of="gsm", cut_chars=60, key="B-5"
        ),
        Drop("books", "f.txt", "held_out_problem", 1.0, start="1 + 1", cut_chars=90, key="B-6"),
        Drop("books", "f.txt", "held_out_remnant", 8.0, 64.0, "Too little", key="B-6"),
    ],
    "web-00000": [
        Drop("web", "dir/x.jsonl line 7", "broken_row", reason="no JSON; mend the row"),
        Drop("web", "dir/x.jsonl#3", "exact_duplicate", 1.0, start="Once", of="books/a.txt"),
    ],
    "web-00001": [Drop("web", HOSTILE, "gopher_max_top_2gram_chars", 0.25, 0.2, "spam spam")],
}


def facts() -> dict[str, Any]:
    """`statistics.json` of it, with one source more, of problems."""
    return {
        "sequence_tokens": 64,
        "train_tokens_asked": 40_000,
        "train_tokens": 32_000,
        "train_tokens_missing": 8_000,
        "padding_tokens": 320,
        "documents_too_short_to_pack": 0,
        "held_out_tokens": 1_024,
        "duplicates": {
            "near_duplicate_clusters": 1,
            "pairs_compared": 17,
            "min_jaccard": 0.8,
        },
        "held_out_in_training": {
            "compared": "windows of 50 characters, white space and capitals aside",
            "text_windows": 4_000,
            "text_windows_in_training_before": 200,
            "text_windows_in_training_after": 0,
            "problems": 15,
            "problems_in_training_before": 3,
            "problems_in_training_after": 1,
            "cuts": {"held_out_passage": 2, "held_out_problem": 1},
            "cut_chars": {"held_out_passage": 310, "held_out_problem": 90},
        },
        "evaluations": {
            "gsm": {
                "items": 30,
                "windows": 900,
                "windows_in_training_before": 9,
                "windows_in_training_after": 0,
                "cuts": 1,
                "cut_chars": 60,
            }
        },
        "sources": {
            "books": _source(
                share=0.5,
                documents_read=6,
                documents_dropped={"held_out_remnant": 1, "min_chars": 1, "near_duplicate": 1},
                documents_cut={"evaluation_item": 1, "held_out_passage": 1, "held_out_problem": 1},
                train_documents=2,
                held_out_documents=1,
                licences={"CC0": 1, "not stated": 3},
            ),
            "sums": {
                "type": "arithmetic",
                "share_asked": 0.25,
                "share": 0.25,
                "slip_share": 0.05,
                "documents_read": 55,
                "bytes_read": 700,
                "truncated": False,
                "documents_dropped": {},
                "documents_cut": {},
                "train_documents": 40,
                "train_bytes": 500,
                "held_out_documents": 15,
                "train_tokens": 8_000,
                "train_documents_packed": 900,
                "held_out_tokens": 128,
            },
            "web": _source(
                share=0.25,
                documents_read=4,
                documents_dropped={
                    "broken_row": 1,
                    "exact_duplicate": 1,
                    "gopher_max_top_2gram_chars": 1,
                },
                documents_cut={},
                train_documents=2,
                held_out_documents=0,
                licences={HOSTILE: 1, "not stated": 1},
                broken_bytes=77,
                truncated=True,
                unread_files=3,
                unread_bytes=123_456,
            ),
        },
        "vocab_size": 512,
    }


def _source(*, share: float, **said: Any) -> dict[str, Any]:
    usual = {"truncated": False, "unread_files": 0, "unread_bytes": 0, "broken_bytes": 0}
    return {
        "type": "files",
        "share_asked": share,
        "share": share,
        "bytes_read": 5_000,
        "shards": 2,
        "documents_normalised": 0,
        "train_bytes": 2_000,
        "epochs": 1.5,
        "train_tokens": round(32_000 * share),
        "train_documents_packed": 3,
        "held_out_tokens": 448,
        **usual,
        **said,
    }


def write_corpus(folder: Path) -> Path:
    """Write what the corpus records of its documents into `folder`, which is returned."""
    for kind in ("documents", "drops"):
        (folder / kind).mkdir(parents=True)
    for name, rows in KEPT.items():
        source = name.rpartition("-")[0]
        write_documents(folder / "documents" / f"{name}.parquet", source, rows, MEASURES[source])
    for name, drops in DROPS.items():
        write_drops(folder / "drops" / f"{name}.parquet", drops)
    repeats = [one for drops in DROPS.values() for one in drops if "duplicate" in one.rule]
    table = {
        "kept": [one.of for one in repeats],
        "document": [f"{one.source}/{one.document}" for one in repeats],
        "rule": [one.rule for one in repeats],
        "jaccard": [one.value for one in repeats],
    }
    pq.write_table(pa.table(table), folder / "duplicates.parquet")
    (folder / "statistics.json").write_text(json.dumps(facts()), encoding="utf-8")
    lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in _samples()]
    (folder / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def write_documents(
    path: Path, source: str, rows: Sequence[Mapping[str, Any]], measures: Mapping[str, float]
) -> None:
    """One file of documents that stayed."""
    struct = pa.struct([(rule, pa.float64()) for rule in measures])
    names = ("source", "document", "key", "licence", "timestamp", "side")
    plain = [(name, pa.string()) for name in names]
    schema = pa.schema([*plain, ("chars", pa.int64()), ("measures", struct)])
    usual = {"source": source, "key": "", "licence": "", "timestamp": "", "side": "train"}
    full = [{**usual, "chars": 1_400, "measures": measures, **row} for row in rows]
    with Writer(path, schema) as writer:
        writer.write({name: [row[name] for row in full] for name in schema.names})


def _samples() -> list[dict[str, Any]]:
    """As `stages/data/samples.py` writes them."""
    told = [
        {
            "rule": drop.rule,
            "source": drop.source,
            "document": drop.document,
            "value": drop.value,
            "threshold": drop.threshold,
            "of": drop.of,
            "text": drop.start or drop.reason,
        }
        for drops in DROPS.values()
        for drop in drops
    ]
    kept = {"rule": "kept", "source": "web", "document": "a.txt", "side": "train", "chars": 1_400}
    # A line that ends as Unicode has it, not as files do, is no end of a sample.
    return [*told, {**kept, "text": f"Once\u2028upon\n{HOSTILE}"}]


def write_artifact(generation: Path, write: Any = write_corpus) -> Path:
    """Write the corpus as the artifact committed at `generation`, which is returned."""
    files = write(generation / "builder" / "files")
    names = sorted(
        path.relative_to(files).as_posix() for path in files.rglob("*") if path.is_file()
    )
    entries = {
        name: FileEntry(bytes=(files / name).stat().st_size, sha256=hash_file(str(files), name))
        for name in names
    }
    known = {
        "train_rows": 500,
        "held_out_rows": {"books": 7},
        "sequence_tokens": 64,
        "vocab_size": 512,
        "train_problems": 40,
        "held_out_problems": 15,
    }
    manifest = Manifest(
        address="builder/files",
        kind="corpus",
        stage="stages.data.face:data",
        revision=4,
        fingerprint="0" * 32,
        identity={},
        inputs={},
        facts=known,
        files=entries,
        content=content_hash("corpus", known, entries),
        provenance={"run": "1", "time": "2026-01-01T00:00:00Z", "seconds": 1.0},
    )
    (generation / MANIFEST).write_text(manifest.model_dump_json())
    return generation
