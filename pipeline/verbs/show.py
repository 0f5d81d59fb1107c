"""`ingot show`: what an artifact holds, and how the build of it went."""

import argparse
import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from configs.errors import ArtifactError
from pipeline.chart import draw_curve
from pipeline.figures import show_figure, spoken
from pipeline.plain import flatten
from pipeline.verbs.asked import find_store, locate
from pipeline.verbs.corpus import samples, sources
from stages.artifacts import PAGE, Corpus, load_artifact
from stages.corpus import STATISTICS
from stages.manifest import FileEntry, Manifest, read_manifest, verify
from stages.steps import METRICS, read_metrics, scalars

_CURVES = ("reward", "loss", "held_out_loss")
"""Figures of a step log of which the first that is there is drawn."""
_FACTS_SHOWN = 40
_FILES_SHOWN = 8
"""As many of a folder's files of one kind are listed; more become one line."""


def show(args: argparse.Namespace) -> int:
    """Print an artifact's figures, facts, inputs and files, and of a corpus what became of each
    source's documents; with `--verify` hash every file. With `--samples`, some documents instead.

    PlanError if samples are asked of what is no corpus, or of a rule that has none.
    """
    store, recipe = find_store(args, print)
    folder = locate(store, recipe, args.artifact)
    manifest = read_manifest(str(folder))
    lines = _lines(folder, manifest) if args.samples is None else samples(folder, args.samples)
    for line in lines:
        print(line)
    if args.verify:
        verify(str(folder))
        print(f"verified: {len(manifest.files)} files have the sizes and hashes of the manifest")
    return 0


def _lines(folder: Path, manifest: Manifest) -> Iterator[str]:
    made, files = manifest.provenance, folder / manifest.address
    yield f"{manifest.kind} {manifest.fingerprint}, content {manifest.content[:16]}"
    yield (
        f"built by {manifest.stage_name} revision {manifest.revision}, run {made.get('run')}, "
        f"{made.get('time')}, {made.get('seconds', 0):.1f} s, ingot {made.get('ingot')}"
    )
    if computed := made.get("computed"):
        yield "computed with " + ", ".join(f"{name} {what}" for name, what in computed.items())
    yield f"files   {files}"
    if PAGE in manifest.files:
        yield f"report  {files / PAGE}"
    yield ""
    yield from _figures(folder)
    if manifest.kind == Corpus.kind and STATISTICS in manifest.files:
        yield from sources(files)
    yield from _table("facts", _facts(manifest))
    inputs = {name: f"{one.address}  {one.content[:16]}" for name, one in manifest.inputs.items()}
    yield from _table("made of", inputs)
    yield from _table("files", _sizes(manifest.files))
    yield from _curve(files.parent / METRICS)


def _figures(folder: Path) -> Iterator[str]:
    """Key figures, with intervals where there are some; and why it fell short, if it did."""
    try:
        artifact = load_artifact(str(folder))
    except ArtifactError as error:
        # Of a plugin that is not loaded: what its manifest says is shown all the same.
        yield f"figures: {error}"
        yield ""
        return
    measured = artifact.measured()
    found = {}
    for name, value in artifact.key_figures().items():
        shown = show_figure(name, value)
        if f"{name}_low" in measured and f"{name}_high" in measured:
            low, high = (show_figure(name, measured[f"{name}_{side}"]) for side in ("low", "high"))
            shown += f"  [{low}, {high}]"
        found[spoken(name)] = shown
    yield from _table("figures", found)
    if (shortfall := artifact.told()) is not None:
        yield f"fell short: {shortfall}"
        yield ""


def _facts(manifest: Manifest) -> Mapping[str, str]:
    """Facts by dotted name; very many are cut, for the manifest has them all."""
    facts = flatten(manifest.facts)
    shown = dict(list(facts.items())[:_FACTS_SHOWN])
    if left := len(facts) - len(shown):
        shown["..."] = f"{left} more in the manifest"
    return shown


def _sizes(files: Mapping[str, FileEntry]) -> dict[str, str]:
    """The size of each file, and of the many shards of a folder together."""
    kinds: dict[str, list[str]] = {}
    for name in files:
        path = PurePosixPath(name)
        kinds.setdefault(str(path.parent / f"*{path.suffix}"), []).append(name)
    shown: dict[str, str] = {}
    for kind, names in kinds.items():
        if len(names) > _FILES_SHOWN:
            size = sum(files[name].bytes for name in names)
            shown[kind] = f"{size:>15,} bytes in {len(names):,} files"
        else:
            shown |= {name: f"{files[name].bytes:>15,} bytes" for name in names}
    return shown


def _table(title: str, rows: Mapping[str, str]) -> Iterator[str]:
    """A title and aligned rows, then an empty line; nothing for no rows."""
    if not rows:
        return
    yield title
    width = max(map(len, rows))
    for name, value in rows.items():
        yield f"  {name:{width}}  {value}"
    yield ""


def _curve(log: Path) -> Iterator[str]:
    """The first curve that the step log has, drawn."""
    records = [scalars(record) for record in read_metrics(log)]
    for name in _CURVES:
        points = [
            (record["step"], record[name])
            for record in records
            if name in record and math.isfinite(record[name])
        ]
        if lines := draw_curve(points):
            yield f"{spoken(name)} by step"
            yield from lines
            return
