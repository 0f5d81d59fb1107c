"""The data card: what a corpus was made of and what became of it on the way, as a page for people.

`data_card.html` opens anywhere, without network or script; `report.md` is the short of it. Texts
and names of whoever wrote the data are escaped in both, and shown without what steers a reader's
eye; a policy in the page forbids a browser to load or run anything.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from stages.artifacts import PAGE
from stages.corpus import (
    DUPLICATES,
    REMNANT,
    Funnel,
    Sample,
    explained,
    funnels,
    read_samples,
    rules_with_counts,
    total,
    visible,
)
from stages.markdown import code, code_cell, plain, row

CARD = "data_card.html"
_LICENCES_SHOWN, _REASONS_SHOWN = 5, 60
_WORDS = {
    REMNANT: "too little was left when cut",
    "exact_duplicate": "as another says it",
    "near_duplicate": "much as another says it",
}
"""What is said of a step of a source's funnel besides its rule."""


@dataclass(frozen=True, slots=True)
class Table:
    """What both pages show as a table."""

    columns: Sequence[tuple[str, str]]
    """Heads, and what stands below: `num` for figures of ours, `name` or `words` for any text."""
    rows: Sequence[Sequence[str]]
    has_total: bool = False
    """Whether the last row tells of all others together."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A count of documents, drawn as well."""

    rule: str
    words: str
    count: str
    share: str
    """Of the documents read."""
    style: str
    """What became of them: `stay`, `gone`, `apart` or `cut`."""
    left: float
    width: float
    """In percent of the room for bars."""


def write_card(out: Path, facts: Mapping[str, Any]) -> None:
    """Write the pages of the corpus in `out`, whose samples are there; `facts` are those of
    `statistics.json`."""
    view = _view(facts, read_samples(out))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("card.html.jinja").render(view)
    (out / CARD).write_text(page, encoding="utf-8")
    (out / PAGE).write_text("\n".join(_markdown(view)) + "\n", encoding="utf-8")


def _view(facts: Mapping[str, Any], samples: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    """All that both pages show, in words and figures."""
    parts = funnels(facts)
    whole = total(parts)
    return {
        "tiles": list(_tiles(facts, whole)),
        "sources": _sources(facts["sources"]),
        "overview": _overview(parts, whole),
        "funnels": [_source(one, facts["sources"][one.source]) for one in parts],
        "reasons": list(_reasons(whole)),
        "duplicates": _duplicates(whole, facts["duplicates"]),
        "apart": _apart(facts),
        "compared": f"Compared by {facts['held_out_in_training']['compared']}.",
        "broken": _broken(parts, facts["sources"]),
        "samples": list(_samples(whole, samples)),
    }


def _tiles(facts: Mapping[str, Any], whole: Funnel) -> Iterator[tuple[str, str, str]]:
    """Name, figure, and what there is to say beside it."""
    asked, got = facts["train_tokens_asked"], facts["train_tokens"]
    yield "tokens to train on", f"{got:,}", f"of {asked:,} asked"
    yield "documents to train on", f"{whole.trained_on:,}", f"of {whole.read:,} read"
    yield "tokens held out", f"{facts['held_out_tokens']:,}", _some(whole.held_out, "document")
    length = facts["sequence_tokens"]
    yield "rows", f"{got // length:,}", f"of {length:,} tokens"
    yield "vocabulary", f"{facts['vocab_size']:,}", "distinct tokens"
    if padding := facts["padding_tokens"]:
        yield "padding", _share(padding, got), _some(padding, "token")


def _sources(sources: Mapping[str, Mapping[str, Any]]) -> Table:
    figures = ("share asked", "share got", "epochs")
    columns = [("source", "name"), ("type", "name"), *((one, "num") for one in figures)]
    rows = [
        [
            *(name, one["type"], f"{one['share_asked']:.1%}", f"{one['share']:.1%}"),
            # Problems are drawn as often as needed, and carry no licences of their own.
            *(_epochs(one), _licences(one.get("licences", {}))),
        ]
        for name, one in sources.items()
    ]
    return Table([*columns, ("licences, by documents", "words")], rows)


def _licences(counts: Mapping[str, int]) -> str:
    """The licences of most documents, and how many documents have others."""
    most = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    shown = [f"{visible(name)} ({n:,})" for name, n in most[:_LICENCES_SHOWN]]
    if left := most[_LICENCES_SHOWN:]:
        shown.append(f"{len(left):,} others ({sum(n for _, n in left):,})")
    return ", ".join(shown) or "not recorded"


def _epochs(facts: Mapping[str, Any]) -> str:
    return f"{facts['epochs']:.2f}" if "epochs" in facts else "as needed"


def _overview(parts: Sequence[Funnel], whole: Funnel) -> Table:
    names = ("read", "dropped by rules", "duplicates", "held out", "left too short")
    figures = (*names, "to train on", "cut in part", "tokens")
    rows = []
    for one in parts if len(parts) == 1 else [*parts, whole]:
        lost = [sum(some.values()) for some in (one.dropped, one.duplicates)]
        counts = [one.read, *lost, one.held_out, one.remnants, one.trained_on]
        # A document may be cut by several rules, so that it is at least what one of them cut.
        cut = f"{'≥ ' if len(one.cut) > 1 else ''}{max(one.cut.values(), default=0):,}"
        rows.append([one.source, *(f"{count:,}" for count in counts), cut, f"{one.tokens:,}"])
    columns = [("source", "name"), *((one, "num") for one in figures)]
    return Table(columns, rows, has_total=len(parts) > 1)


def _source(one: Funnel, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What there is to say of one source beside the tables."""
    begun = _some(facts["train_documents_packed"], "document")
    told = [f"{_some(one.tokens, 'token')} to train on", f"{begun} begun in the rows"]
    if "epochs" in facts:
        told.append(f"{_epochs(facts)} epochs")
    if slips := facts.get("slip_share"):
        told.append(f"about {slips:.1%} of the answers wrong on purpose")
    return {
        "name": one.source,
        "summary": f"{one.trained_on:,} of {_some(one.read, 'document')} to train on",
        "steps": list(_steps(one)),
        "packed": f"{', '.join(told)}.",
    }


def _steps(one: Funnel) -> Iterator[Bar]:
    """A source's funnel: bars of what is lost stand where what is left ends."""
    left = one.read

    def step(rule: str, words: str, count: int, style: str, start: int = 0) -> Bar:
        share, room = _share(count, one.read), max(1, one.read) / 100
        return Bar(rule, words, f"{count:,}", share, style, start / room, count / room)

    yield step("", "read", one.read, "stay")
    for rule, count in {**one.dropped, **one.duplicates}.items():
        left -= count
        yield step(rule, _WORDS.get(rule, ""), count, "gone", left)
    left -= one.held_out
    yield step("", "held out", one.held_out, "apart", left)
    if one.remnants:
        left -= one.remnants
        yield step(REMNANT, _WORDS[REMNANT], one.remnants, "gone", left)
    yield step("", "to train on", one.trained_on, "stay")
    for rule, count in one.cut.items():
        yield step(rule, "cut out of", count, "cut")


def _reasons(whole: Funnel) -> Iterator[Bar]:
    most = max(whole.reasons.values(), default=0)
    for rule, count in list(whole.reasons.items())[:_REASONS_SHOWN]:
        share = _share(count, whole.read)
        yield Bar(rule, "", f"{count:,}", share, "gone", 0.0, 100 * count / most)


def _duplicates(whole: Funnel, facts: Mapping[str, Any]) -> str:
    exact, near = (whole.duplicates.get(rule, 0) for rule in DUPLICATES)
    said = f"Dropped as equal to another, capitals and white space aside: {exact:,}. "
    if facts["min_jaccard"] is None:
        return f"{said}Near-duplicates were not looked for."
    clusters, pairs = facts["near_duplicate_clusters"], facts["pairs_compared"]
    return (
        f"{said}As near-duplicates, of a Jaccard similarity of at least {facts['min_jaccard']:g}: "
        f"{near:,}, in {_some(clusters, 'cluster')} with those that stayed, found among "
        f"{_some(pairs, 'pair')} compared."
    )


def _apart(facts: Mapping[str, Any]) -> Table:
    """What is kept out of training text: held-out text and problems, and each evaluation."""
    held = facts["held_out_in_training"]
    rows = []
    for what, unit, name, rule in (
        ("held-out text", "windows", "text_windows", "held_out_passage"),
        ("held-out problems", "problems", "problems", "held_out_problem"),
    ):
        before, after = (held[f"{name}_in_training_{when}"] for when in ("before", "after"))
        lost = [held[kind].get(rule, 0) for kind in ("cuts", "cut_chars")]
        rows.append([what, unit, *_compared(held[name], before, after, *lost)])
    for name, one in facts["evaluations"].items():
        before, after = (one[f"windows_in_training_{when}"] for when in ("before", "after"))
        counts = _compared(one["windows"], before, after, one["cuts"], one["cut_chars"])
        rows.append([f"{name}: {_some(one['items'], 'item')}", "windows", *counts])
    figures = ("in all", "in training text before", "and after", "cuts", "characters cut")
    columns = [("kept out", "words"), ("counted in", "name"), *((one, "num") for one in figures)]
    return Table(columns, rows)


def _compared(whole: int, before: int, after: int, cuts: int, chars: int) -> Iterator[str]:
    yield f"{whole:,}"
    yield from (f"{count:,} ({_share(count, whole)})" for count in (before, after))
    yield from (f"{count:,}" for count in (cuts, chars))


def _broken(parts: Sequence[Funnel], sources: Mapping[str, Mapping[str, Any]]) -> Table:
    """Rows and files that could not be read, and those that `max_bytes` kept out."""
    rows = []
    for one in parts:
        facts = sources[one.source]
        if count := sum(one.broken.values()):
            rules = ", ".join(f"{rule} ({n:,})" for rule, n in one.broken.items())
            said = f"could not be read: {rules}"
            rows.append([one.source, said, f"{count:,}", f"{facts['broken_bytes']:,}"])
        if facts["truncated"]:
            said = "files left out, or not read to their end, since max_bytes was reached"
            counts = (facts["unread_files"], facts["unread_bytes"])
            rows.append([one.source, said, *(f"{count:,}" for count in counts)])
    figures = [("how many", "num"), ("bytes", "num")]
    return Table([("source", "name"), ("what", "words"), *figures], rows)


def _samples(whole: Funnel, samples: Mapping[str, Sequence[Sample]]) -> Iterator[dict[str, Any]]:
    for rule, count in rules_with_counts(whole, samples):
        yield {
            "rule": rule,
            "count": f"{len(samples[rule]):,} of {count:,}",
            "samples": [
                {
                    "where": visible(f"{one.source}/{one.document}"),
                    "said": explained(rule, one.value, one.threshold, one.of),
                    "text": visible(one.text, keeps_lines=True),
                }
                for one in samples[rule]
            ],
        }


def _markdown(view: Mapping[str, Any]) -> Iterator[str]:
    """The short of it: tables without bars and samples."""
    yield "# Data card\n"
    yield from (f"- {name}: {value} ({more})" for name, value, more in view["tiles"])
    yield f"\nThe whole, with samples of documents by rule, is {code(CARD)}.\n"
    yield "## Sources\n"
    yield from _table(view["sources"])
    yield "## From what was read to what is trained on\n"
    yield from _table(view["overview"])
    if view["reasons"]:
        columns = [("rule", "code"), ("documents", "num"), ("of those read", "num")]
        yield "## Why documents were dropped\n"
        yield from _table(Table(columns, [(b.rule, b.count, b.share) for b in view["reasons"]]))
    yield f"## Duplicates\n\n{plain(view['duplicates'])}\n"
    yield "## What is held out, and evaluations\n"
    yield from _table(view["apart"])
    yield f"{plain(view['compared'])}\n"
    if view["broken"].rows:
        yield "## What broke, and what was left out\n"
        yield from _table(view["broken"])


def _table(table: Table) -> Iterator[str]:
    yield row(*(head for head, _ in table.columns))
    yield row(*("---:" if kind == "num" else "---" for _, kind in table.columns))
    for cells in table.rows:
        pairs = zip(cells, table.columns, strict=True)
        yield row(*(_CELLS[kind](cell) for cell, (_, kind) in pairs))
    yield ""


_CELLS: Mapping[str, Callable[[str], str]] = {
    "num": str,
    "code": code_cell,
    "name": plain,
    "words": plain,
}


def _some(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _share(part: int, whole: int) -> str:
    """In percent; a little is told from nothing."""
    share = part / whole if whole else 0.0
    return f"{share:.1%}" if share >= 0.0005 or not part else "< 0.1%"
