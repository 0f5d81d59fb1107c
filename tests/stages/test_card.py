"""The data card: its figures are those of what lies beside it, and no text in it does harm."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest
from markdown_it import MarkdownIt

from configs.data import DataConfig, DataSpec
from stages.contract import Workspace
from stages.corpus import (
    CUTS,
    DUPLICATES,
    REMNANT,
    STATISTICS,
    asks_for_more,
    explained,
    funnels,
    read_samples,
    rules_with_counts,
    total,
    visible,
)
from stages.data import apart, clean, cutting, quality
from stages.data.card import CARD, write_card
from stages.data.loop import data
from stages.data.samples import SAMPLES
from stages.documents import count_documents, find_documents
from tests.browser import CHROMIUM, open_browser
from tests.listed import DROPS, HOSTILE, KEPT, facts, write_corpus


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """A folder with both pages."""
    write_card(write_corpus(tmp_path), facts())
    return tmp_path


class Reader(HTMLParser):
    """Text of a page by row of its tables, and every tag and attribute in it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.rows: list[list[str]] = []
        self.words = ""
        self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        self.words += data
        if self._in_cell:
            self.rows[-1][-1] += data

    def row(self, name: str, of: str) -> list[str]:
        """The row of this name in the table that has the column `of`."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            if of in row:
                found = {}
            found.setdefault(row[0], row)
            if row[0] == name and of in next(iter(found.values())):
                return row
        raise AssertionError(f"no row {name!r} below {of!r}")


def test_names_of_rules_are_those_of_the_steps_that_apply_them() -> None:
    assert tuple(clean.RULES.values()) == DUPLICATES
    assert (REMNANT, SAMPLES) == (cutting.REMNANT, "samples.jsonl")
    assert CUTS == (apart.PASSAGE, apart.PROBLEM, apart.EVALUATION, cutting.PARAGRAPH)
    assert {rule for rule in quality._MEASURES if asks_for_more(rule)} == quality._LEAST


def test_every_document_that_was_read_went_somewhere() -> None:
    for one in [*funnels(facts()), total(funnels(facts()))]:
        gone = sum(one.dropped.values()) + sum(one.duplicates.values()) + one.remnants
        assert one.read == gone + one.held_out + one.trained_on
        assert one.read == sum(one.reasons.values()) + one.held_out + one.trained_on


def test_the_funnel_on_the_page_is_that_of_the_files_beside_it(pages: Path) -> None:
    """Counted anew from Parquet: what stayed, and what went as a whole, by rule."""
    page = Reader((pages / CARD).read_text(encoding="utf-8"))
    kept = ds.dataset(pages / "documents", schema=None).to_table(["source", "side"]).to_pylist()
    drops = [one for some in DROPS.values() for one in some]
    for source in ("books", "web"):
        gone = [one.rule for one in drops if one.source == source and one.cut_chars is None]
        broken = [rule for rule in gone if rule.startswith("broken_")]
        duplicates = [rule for rule in gone if rule in DUPLICATES]
        remnants = gone.count(REMNANT)
        rules = len(gone) - len(broken) - len(duplicates) - remnants
        sides = [one["side"] for one in kept if one["source"] == source]
        held_out, trained_on = sides.count("held_out"), sides.count("train")
        read = len(gone) - len(broken) + len(sides)
        counts = [read, rules, len(duplicates), held_out, remnants, trained_on]
        assert page.row(source, "read")[1:7] == [str(count) for count in counts]
    assert page.row("all", "read")[1:7] == ["65", "2", "2", "16", "1", "44"]
    assert page.row("all", "read")[-2:] == ["≥ 1", "32,000"]
    assert sum(map(len, KEPT.values())) == len(kept)


def test_what_is_lost_is_drawn_where_what_is_left_ends(pages: Path) -> None:
    html = (pages / CARD).read_text(encoding="utf-8")
    drawn = re.findall(r"margin-left: ([\d.]+)%; width: ([\d.]+)%", html)
    read, *lost, left = [(float(start), float(width)) for start, width in drawn[:6]]
    assert read == pytest.approx((0, 100))
    end = 100.0
    for start, width in lost:
        assert start + width == pytest.approx(end)
        end = start
    assert left == pytest.approx((0, end))


def test_what_is_held_out_is_told_before_and_after(pages: Path) -> None:
    page = Reader((pages / CARD).read_text(encoding="utf-8"))
    told = {name: page.row(name, "kept out") for name in ("held-out problems", "gsm: 30 items")}
    assert told["held-out problems"][2:] == ["15", "3 (20.0%)", "1 (6.7%)", "1", "90"]
    assert told["gsm: 30 items"][2:] == ["900", "9 (1.0%)", "0 (0.0%)", "1", "60"]
    assert page.row("books", "licences, by documents")[-1] == "not stated (3), CC0 (1)"
    assert "could not be read: broken_row (1)" in page.words
    assert "3123,456" in page.words.replace("\n", "")


def test_every_sample_is_shown_with_what_was_measured(pages: Path) -> None:
    words = Reader((pages / CARD).read_text(encoding="utf-8")).words
    found = read_samples(pages)
    assert set(found) == {"kept", *(one.rule for some in DROPS.values() for one in some)}
    for rule, some in found.items():
        for one in some:
            assert visible(f"{one.source}/{one.document}") in words
            assert visible(one.text, keeps_lines=True) in words
            assert explained(rule, one.value, one.threshold, one.of) in words
    assert (
        "Jaccard similarity 0.9142 with books/a.txt, where 0.8 or more counts as a repeat" in words
    )
    assert "measured 12, asked for at least 64" in words
    assert "measured 0.25, asked for at most 0.2" in words
    assert "characters left of it 8, asked for at least 64" in words


def test_samples_of_kept_documents_come_first_then_rules_by_what_they_dropped(
    pages: Path,
) -> None:
    record = facts()
    record["sources"]["web"]["documents_dropped"]["gopher_max_top_2gram_chars"] = 9
    counted = rules_with_counts(total(funnels(record)), read_samples(pages))
    assert counted[:2] == [("kept", 44), ("gopher_max_top_2gram_chars", 9)]
    assert sorted(counted[1:], key=lambda pair: (-pair[1], pair[0])) == counted[1:]


def test_texts_of_others_are_nothing_but_text(pages: Path) -> None:
    html = (pages / CARD).read_text(encoding="utf-8")
    page = Reader(html)
    assert not {"script", "a", "img", "iframe", "form", "link"} & page.tags
    assert not [one for one in page.attributes if one.startswith("on") or one in ("src", "href")]
    assert "default-src 'none'" in html
    assert not {"\x1b", "\u202e", "\u2028"} & set(html)
    assert visible(HOSTILE) in page.words
    text = (pages / "report.md").read_text(encoding="utf-8")
    assert not {"\x1b", "\u202e"} & set(text)
    shown = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    found = Reader(shown)
    assert not {"script", "a", "img"} & found.tags
    # The bar in it ended no cell.
    assert len(found.row("web", "licences, by documents")) == 6
    assert HOSTILE.split("\x1b")[0] in found.row("web", "licences, by documents")[-1]


def test_the_short_page_has_the_same_figures(pages: Path) -> None:
    page = Reader((pages / CARD).read_text(encoding="utf-8"))
    text = (pages / "report.md").read_text(encoding="utf-8")
    short = Reader(MarkdownIt("commonmark").enable("table").render(text))
    for name, of in (("books", "read"), ("all", "read"), ("held-out text", "kept out")):
        assert short.row(name, of) == page.row(name, of)
    assert re.search(r"^\| `min_chars` \| 1 \| 1.5% \|$", text, re.M)


def test_of_very_many_licences_the_commonest_are_named(tmp_path: Path) -> None:
    record = facts()
    record["sources"]["books"]["licences"] = {f"L{n}": n for n in range(1, 1001)}
    write_card(write_corpus(tmp_path), record)
    page = Reader((tmp_path / CARD).read_text(encoding="utf-8"))
    others = f"995 others ({sum(range(1, 996)):,})"
    assert page.row("books", "licences, by documents")[-1] == (
        f"L1000 (1,000), L999 (999), L998 (998), L997 (997), L996 (996), {others}"
    )


def test_a_corpus_of_problems_alone_has_a_card(tmp_path: Path) -> None:
    record = facts()
    record["sources"] = {"sums": record["sources"]["sums"]}
    record["evaluations"] = {}
    record["duplicates"]["min_jaccard"] = None
    record["held_out_in_training"] |= {"cuts": {}, "cut_chars": {}, "text_windows": 0}
    record["held_out_in_training"] |= {"text_windows_in_training_before": 0}
    (tmp_path / SAMPLES).write_text("")
    write_card(tmp_path, record)
    page = Reader((tmp_path / CARD).read_text(encoding="utf-8"))
    assert page.row("sums", "read")[1:] == ["55", "0", "0", "15", "0", "40", "0", "8,000"]
    assert page.row("held-out text", "kept out")[2:] == ["0", "0 (0.0%)", "0 (0.0%)", "0", "0"]
    assert "No document was dropped." in page.words
    assert "Near-duplicates were not looked for." in page.words
    assert "about 5.0% of the answers wrong on purpose" in page.words


def test_what_the_data_stage_tells_adds_up_to_the_documents_it_lists(
    tmp_path: Path, workspace: Workspace
) -> None:
    rng = np.random.default_rng(0)
    words = [f"word{number}" for number in range(400)]
    texts = [" ".join(rng.choice(words, size=120)) for _ in range(40)]
    # Of these one is another but for capitals, one but for its end, and four are too short.
    texts += [texts[0].upper(), f"{texts[1]} and so on", *(f"short {n}" for n in range(4))]
    lines = [json.dumps({"text": text, "name": f"n{n}"}) for n, text in enumerate(texts)]
    (tmp_path / "text.jsonl").write_text("\n".join([*lines[:20], "{broken", *lines[20:]]) + "\n")
    (tmp_path / "asked.jsonl").write_text(json.dumps({"q": texts[5][100:300]}) + "\n")
    glob = str(tmp_path / "text.jsonl")
    source = {"type": "files", "glob": glob, "id_field": "name", "max_broken_share": 0.5}
    config = {
        "sources": {"mine": {**source, "share": 0.5}, "sums": {"type": "arithmetic", "share": 0.5}},
        "evaluations": {"set": {"glob": str(tmp_path / "asked.jsonl"), "text_fields": ["q"]}},
        "tokenizer": {"vocab_size": 300},
        "train_tokens": 6_400,
        "sequence_tokens": 64,
    }
    corpus = data(DataSpec(seed=0, data=DataConfig.model_validate(config)), workspace)
    folder = corpus.path()
    (one,) = (one for one in funnels(json.loads((folder / STATISTICS).read_text()))[:1])
    sides = [known.stayed for name in range(46) for known in find_documents(folder, f"n{name}")]
    assert len(sides) == one.read == 46
    assert sum(stayed is not None and stayed.is_held_out for stayed in sides) == one.held_out > 0
    assert sum(stayed is not None and not stayed.is_held_out for stayed in sides) == one.trained_on
    assert one.dropped == {"min_chars": 4}
    assert one.duplicates == {"exact_duplicate": 1, "near_duplicate": 1}
    assert one.broken == {"broken_row": 1}
    assert count_documents(folder) == 47
    page = Reader((folder / CARD).read_text(encoding="utf-8"))
    assert page.row("mine", "read")[1:4] == ["46", "4", "2"]
    assert page.row("set: 1 item", "kept out")[4] == "0 (0.0%)"
    (repeated,) = find_documents(folder, "n1")
    assert [repeat.rule for repeat in repeated.first_repeats] == ["near_duplicate"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: chromium)")
def test_a_browser_shows_it_all_on_wide_and_narrow_screens(pages: Path, tmp_path: Path) -> None:
    with open_browser(tmp_path / "profile") as browser:
        for width in (1280, 400):
            browser.resize(width, 900)
            browser.go((pages / CARD).as_uri())
            browser.until_text("Data card", "near_duplicate")
            assert browser.ask("document.documentElement.scrollWidth") <= width
            wide = "filter(e => e.scrollWidth > e.clientWidth).length"
            assert browser.ask(f"[...document.querySelectorAll('.scroll')].{wide}") == 0
            assert browser.ask("document.scripts.length") == 0
