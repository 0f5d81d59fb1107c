"""A whole run on one page, `runs/ID.html`, which opens from disk without network or script.

Texts of users, models and errors are escaped by the template, and a policy in the page forbids the
browser to load or run anything. What would make the page too large is left out, and said to be.
"""

import base64
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from cluster import files
from configs.errors import IngotError, StoreError
from pipeline.figures import show_bytes, show_figure, show_figures, show_seconds, spoken
from pipeline.plain import samples_table
from pipeline.records import Blocked, Built, Failed, Reused, Run
from pipeline.report import plot_artifact, plot_log
from pipeline.steplog import LOG_BYTES, StepLog, read_log
from stages.artifacts import PAGE, load_artifact
from stages.manifest import read_manifest
from stages.steps import METRICS

PLOTS_BYTES = 2_200_000
"""Of all plots of a page together, as they stand in it."""
_REPORT_BYTES, _TEXTS_BYTES, _ERROR_CHARS = 60_000, 400_000, 4_000
"""Of one report, of all reports, answers and errors, and of one error."""
_SAMPLES = 24
_FIRST = ("models", "loss_parity", "loss", "reward", "expert_load", "optim", "other", "fp8")
"""Plots in the order in which they get room: those of artifacts, unless named, before all."""
_BROAD_PIXELS = 1000
"""A plot wider than this is shown over the whole width, others side by side."""

Link = Callable[[str], str]
"""The address of the page of an MLflow run, by its id."""


@dataclass(frozen=True, slots=True)
class _Picture:
    """A plot as the page has it."""

    name: str
    data: str
    is_broad: bool


@dataclass(slots=True)
class _Room:
    """Bytes that are left for all further plots and texts."""

    plots: int = PLOTS_BYTES
    texts: int = _TEXTS_BYTES


@dataclass(slots=True)
class _Section:
    """What is shown of one artifact."""

    anchor: str
    name: str
    files: Path
    trouble: str = ""
    plots: Sequence[_Picture] = ()
    left_out: str = ""
    report: Markup | None = None
    samples: Mapping[str, Any] | None = None
    log: str = ""


def write_page(
    run: Run,
    nodes: Sequence[str],
    root: Path,
    *,
    again: str,
    changed: Mapping[str, tuple[str, str]],
    link: Link | None,
) -> Path:
    """Write the page of `run` beside its record in the store at `root`; returns its path.

    `nodes` are the names of the line in its order, `again` is the command that repeats the run.
    `changed` has the settings that differ from the recipe's own by dotted name: the recipe's value
    and the run's. `link` leads to MLflow's page of a run, none if there is no server. StoreError if
    the page cannot be written. An artifact that cannot be read is told of on the page.
    """
    room = _Room()
    ordered = [name for name in nodes if name in run.outcomes]
    ordered += [name for name in run.outcomes if name not in ordered]
    with tempfile.TemporaryDirectory() as drawn:
        sections = {
            name: _section(Path(drawn, f"node-{number}"), name, root / one.address, room)
            for number, name in enumerate(ordered)
            if isinstance(one := run.outcomes[name], Built | Reused)
        }
        _choose_plots(list(sections.values()), Path(drawn), room)
    rows = [_row(run, name, sections.get(name), root, link) for name in ordered]
    text = _template().render(
        run=run,
        state=_state(run),
        started=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.started)),
        seconds=show_seconds(run.seconds),
        mlflow=link(run.tracking_id) if link and run.tracking_id else None,
        tiles=_tiles(run, ordered, root),
        rows=rows,
        seeds=_seeds(run),
        command=again,
        facts=_facts(run),
        changed={name: tuple(map(_cut, both)) for name, both in changed.items()},
        sections=[one for one in sections.values() if _has_content(one)],
    )
    path = root / "runs" / f"{run.id}.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, text)
    except OSError as error:
        raise StoreError(
            f"{path}: the page of this run cannot be written ({error.strerror}); free some disk, "
            "or make the folder writable"
        ) from None
    return path


def _template() -> Any:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return environment.get_template("page.html.jinja")


_STYLES = {"succeeded": "succeeded", "failed": "failed"}


def _state(run: Run) -> dict[str, str]:
    word, _ = run.ending
    return {"word": word, "style": _STYLES.get(word, "short")}


def _row(
    run: Run, name: str, section: _Section | None, root: Path, link: Link | None
) -> dict[str, Any]:
    """One line of the table of outcomes."""
    one = run.outcomes[name]
    row: dict[str, Any] = dict.fromkeys(
        ("seconds", "figures", "shortfall", "error", "blocked", "built_by", "page", "mlflow"), ""
    )
    row |= {"name": name, "word": one.outcome, "anchor": ""}
    if section is not None and _has_content(section):
        row["anchor"] = section.anchor
    if not isinstance(one, Blocked):
        row["seconds"] = f"{one.seconds:,.1f}"
        row["mlflow"] = link(one.tracking_id) if link and one.tracking_id else ""
    match one:
        case Built() | Reused():
            row |= {"figures": show_figures(one.figures), "shortfall": _cut(one.shortfall or "")}
        case Failed():
            row["error"] = _cut(one.error)
        case Blocked():
            row["blocked"] = f"needs {one.by}" + (f", which is {one.reason}" if one.reason else "")
    if isinstance(one, Reused) and one.built_by:
        row["built_by"] = one.built_by
        page = f"{one.built_by}.html"
        row["page"] = page if (root / "runs" / page).is_file() else ""
    return row


def _tiles(run: Run, nodes: Sequence[str], root: Path) -> list[dict[str, str]]:
    """The key figures of what measures models, with their intervals: before and after.

    None for a run of several seeds, of which the table over seeds tells.
    """
    tiles: list[dict[str, str]] = []
    for node in () if run.across_seeds else nodes:
        one = run.outcomes[node]
        if not isinstance(one, Built | Reused):
            continue
        measured = _measured(root / one.address)
        for name, value in one.figures.items():
            if name in measured:
                bounds = [measured.get(f"{name}{end}") for end in ("_low", "_high")]
                shown = [show_figure(name, bound) for bound in bounds if bound is not None]
                interval = f"95 % interval {' to '.join(shown)}" if len(shown) == 2 else ""
                told = {"name": spoken(name), "value": show_figure(name, value)}
                tiles.append({"node": node, "interval": interval, **told})
    return tiles


def _measured(generation: Path) -> Mapping[str, float]:
    try:
        return load_artifact(str(generation)).measured()
    except IngotError:
        # Of a plugin that is not loaded, or damaged, which its section then says.
        return {}


def _seeds(run: Run) -> list[dict[str, str]]:
    return [
        {
            "node": one.node,
            "figure": spoken(one.figure),
            "mean": show_figure(one.figure, one.mean),
            "spread": "" if one.spread is None else show_figure(one.figure, one.spread),
            "by_seed": ", ".join(
                f"{seed}: {show_figure(one.figure, value)}" for seed, value in one.values.items()
            ),
        }
        for one in run.across_seeds
    ]


def _facts(run: Run) -> dict[str, str]:
    """The code, the machine and the libraries, as far as the record knows them."""
    made = run.provenance
    git = made.get("git") or {}
    versions = made.get("versions") or {}
    memory = made.get("memory_bytes")
    commit = git.get("commit", "not from a checkout")
    facts = {
        "command given": " ".join(["ingot", *map(str, made.get("command", ()))]),
        "git commit": f"{commit}{', with changes' if git.get('dirty') else ''}",
        "ingot": made.get("ingot"),
        "machine": f"{made.get('host')}: {made.get('cores')} cores, {made.get('processor')}"
        + (f", {show_bytes(memory)} of memory" if memory else ""),
        "system": f"{made.get('platform')}, Python {made.get('python')}",
        "libraries": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "store": run.store_root,
    }
    return {name: _cut(str(value)) for name, value in facts.items() if value}


def _section(drawn: Path, name: str, generation: Path, room: _Room) -> _Section:
    """One artifact. Its plots are drawn into the folder `drawn`, which names its place."""
    anchor = drawn.name
    try:
        folder = generation / read_manifest(str(generation)).address
        log = read_log(folder.parent / METRICS)
        section = _Section(anchor, name, folder)
        section.report = _report(folder / PAGE, room)
        section.samples = _samples(folder, log, room)
        section.log = _log_line(folder.parent / METRICS, log)
        plot_artifact(folder, drawn)
        plot_log(log, drawn)
    except Exception as error:  # whatever a plugin's log or report does to those who draw it
        shutil.rmtree(drawn, ignore_errors=True)
        known = isinstance(error, IngotError | OSError)
        why = str(error) if known else f"{type(error).__name__}: {error}"
        return _Section(anchor, name, generation, trouble=_cut(why))
    return section


def _report(path: Path, room: _Room) -> Markup | None:
    """An artifact's page, from its Markdown; one that is too long is cut, and that is said."""
    if not path.is_file():
        return None
    limit = min(_REPORT_BYTES, room.texts)
    text = path.read_bytes()
    shown = text[:limit].decode(errors="replace")
    if len(text) > limit:
        shown += f"\n\n(cut here: the whole lies in `{path.name}`)\n"
    room.texts -= min(len(text), limit)
    reader = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    tokens = reader.parse(shown)
    for token in tokens:
        if token.type.startswith("heading"):
            token.tag = f"h{min(6, int(token.tag[1]) + 2)}"
    # Built by a renderer that escapes all text, from a parser that knows no HTML.
    return Markup(reader.renderer.render(tokens, reader.options, {}))


def _samples(folder: Path, log: StepLog, room: _Room) -> Mapping[str, Any] | None:
    table = samples_table(folder, log)
    if table is None or room.texts <= 0:
        return None
    # The last of a training, since they show what became of it.
    rows = table["data"][-_SAMPLES:] if "step" in table["columns"] else table["data"][:_SAMPLES]
    room.texts -= sum(len(str(value)) for row in rows for value in row)
    columns = [spoken(name) for name in table["columns"]]
    return {"columns": columns, "rows": [["" if v is None else v for v in row] for row in rows]}


def _log_line(path: Path, log: StepLog) -> str:
    if not log.steps:
        return ""
    size = path.stat().st_size
    thinned = "; what is drawn and sent of it is thinned" if size > LOG_BYTES else ""
    return f"Step log: {log.steps:,} lines, {show_bytes(size)}, in {path}{thinned}."


def _choose_plots(sections: Sequence[_Section], drawn: Path, room: _Room) -> None:
    """The most telling plots of all sections, while there is room."""
    kept: dict[str, list[_Picture]] = {one.anchor: [] for one in sections}
    missing: dict[str, list[str]] = {one.anchor: [] for one in sections}
    paths = [path for one in sections for path in sorted((drawn / one.anchor).glob("*.png"))]
    for path in sorted(paths, key=lambda path: _rank(path.stem)):
        content = path.read_bytes()
        data = base64.b64encode(content).decode()
        if len(data) > room.plots:
            missing[path.parent.name].append(path.stem)
            continue
        room.plots -= len(data)
        # Where a PNG file has its width.
        (width,) = struct.unpack(">I", content[16:20])
        kept[path.parent.name].append(_Picture(path.stem, data, width > _BROAD_PIXELS))
    for section in sections:
        section.plots = kept[section.anchor]
        section.left_out = ", ".join(missing[section.anchor])


def _rank(name: str) -> int:
    return _FIRST.index(name) if name in _FIRST else -1


def _has_content(one: _Section) -> bool:
    shown = (one.trouble, one.plots, one.left_out, one.report, one.samples, one.log)
    return any(shown)


def _cut(text: str) -> str:
    return text if len(text) <= _ERROR_CHARS else f"{text[:_ERROR_CHARS]}…"
