"""The page of a run says what became of it, and nothing in it is taken for markup."""

import base64
import io
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from configs.errors import StoreError
from configs.parallel import StoreConfig
from pipeline import page
from pipeline.described import outcome_word
from pipeline.messages import Teller
from pipeline.page import write_page
from pipeline.records import AcrossSeeds, Blocked, Built, Failed, Invocation, Run
from pipeline.steplog import collect
from stages.artifacts import PAGE
from stages.manifest import MANIFEST
from stages.samples import Sample, write_samples
from stages.steps import METRICS
from tests.pipeline.fakes import World, made

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;{{ 7*7 }}"
NODES = ("data", "train", "judge", "pack.cuda", "pack.ascend")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("page")
    return World(StoreConfig(url=str(folder), min_free_bytes=0))


@pytest.fixture(scope="module")
def first(world: World) -> Run:
    """A run that built all, whose report has a page and answers."""
    run = world.run()
    files = world.files(run, "judge")
    table = f"| a | b |\n|---|---|\n| `<b>` | 1 |\n\n{EVIL}\n\n"
    links = "![away](http://there/x.png) [go](javascript:alert(3)) [on](https://there/)\n"
    (files / PAGE).write_text(f"# Judged\n\n{table}{links}")
    one = Sample(prompt=EVIL, right_answer="20", answer="2\n", reward=0.0, reason=EVIL)
    write_samples(files, [one])
    return run


class Reader(HTMLParser):
    """Tags with their attributes, and the text outside of the head."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text.partition("</style>")[2])
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str, name: str) -> list[str]:
        return [str(attrs[name]) for found, attrs in self.tags if found == tag and name in attrs]


def read(
    world: World,
    run: Run,
    *,
    changed: dict[str, tuple[str, str]] | None = None,
    nodes: tuple[str, ...] = NODES,
) -> Reader:
    """The page of a run, as a reader of HTML sees it."""
    path = write_page(
        *(run, nodes, world.store.root),
        again="ingot run fake",
        changed=changed or {},
        link=lambda i: f"http://mlflow/{i}",
    )
    assert path == world.store.root / "runs" / f"{run.id}.html"
    assert path.stat().st_size < 3_000_000
    return Reader(path.read_text(encoding="utf-8"))


def test_every_node_stands_in_the_order_of_the_line(world: World, first: Run) -> None:
    mixed = replace(first, outcomes=dict(reversed(list(first.outcomes.items()))))
    text = read(world, mixed).text
    places = [text.index(f"{name}\nbuilt") for name in NODES]
    assert places == sorted(places)
    assert "succeeded" in text
    for part in ("before pass at 1", "0.25", "loss 0.3333", "train tokens 80"):
        assert part in text


def test_plots_of_logs_and_artifacts_are_in_the_page(world: World, first: Run) -> None:
    reader = read(world, first)
    assert reader.of("img", "alt") == [
        *(f"{name} of train" for name in ("loss", "expert_load", "other")),
        "before_after of judge",
    ]
    for source in reader.of("img", "src"):
        start, _, data = source.partition(",")
        assert start == "data:image/png;base64"
        assert imread(io.BytesIO(base64.b64decode(data))).ndim == 3


def test_nothing_is_loaded_and_no_text_is_markup(world: World, first: Run) -> None:
    evil = replace(
        first,
        recipe=EVIL,
        invocation=Invocation(EVIL, sets=(f"a={EVIL}",)),
        provenance={"host": EVIL, "command": [EVIL], "git": {"commit": EVIL}},
        outcomes={
            **first.outcomes,
            EVIL: Failed(error=EVIL, seconds=1.0),
            "pack.cuda": Blocked(by=EVIL, reason=EVIL),
            "train": replace(made(first, "train"), shortfall=EVIL, figures={EVIL: 1.0}),
        },
        across_seeds=(AcrossSeeds(EVIL, EVIL, {1: 1.0}, 1.0, None),),
    )
    reader = read(world, evil, changed={EVIL: (EVIL, EVIL)})
    assert reader.text.count(EVIL) >= 14
    assert not {"script", "iframe", "object", "link", "form", "base"} & {t for t, _ in reader.tags}
    for _, attributes in reader.tags:
        assert not any(name.startswith("on") for name in attributes)
    assert all(source.startswith("data:") for source in reader.of("img", "src"))
    allowed = ("#node-", "http://mlflow/", "https://there/", "http://there/")
    assert all(link.startswith(allowed) for link in reader.of("a", "href"))
    text = write_page(
        first, NODES, world.store.root, again="ingot run", changed={}, link=None
    ).read_text()
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in text


def test_a_report_is_shown_from_its_markdown(world: World, first: Run) -> None:
    reader = read(world, first)
    assert "<b>" in reader.text
    assert ("h3", {}) in reader.tags
    assert "https://there/" in reader.of("a", "href")
    assert not any("javascript" in link for link in reader.of("a", "href"))


def test_what_failed_is_shown_with_its_error_and_what_that_blocked(world: World) -> None:
    run = world.run(train={"fails": True, "steps": 7})
    reader = read(world, run)
    assert "train was told to fail" in reader.text
    assert reader.text.count("needs train") == 3
    assert "built by" in reader.text
    assert ("span", {"class": "state failed"}) in reader.tags


def test_what_was_reused_leads_to_the_page_of_the_run_that_built_it(
    world: World, first: Run
) -> None:
    again = world.run()
    read(world, first)
    assert f"{first.id}.html" in read(world, again).of("a", "href")
    (world.store.root / "runs" / f"{first.id}.html").unlink()
    reader = read(world, again)
    assert f"{first.id}.html" not in reader.of("a", "href")
    assert f"built by {first.id}" in reader.text


def test_command_code_machine_and_changed_settings_are_there(world: World, first: Run) -> None:
    facts = {"git": {"commit": "c0ffee", "dirty": True}, "host": "hal", "processor": "cpu 9"}
    run = replace(first, provenance=facts)
    reader = read(world, run, changed={"x.y": ("0", "1")})
    assert "ingot run fake" in reader.text
    for part in ("c0ffee, with changes", "hal", "cpu 9", "x.y"):
        assert part in reader.text


def test_mlflow_is_linked_only_where_it_has_a_page(world: World, first: Run) -> None:
    assert not [one for one in read(world, first).of("a", "href") if "mlflow" in one]
    run = first.with_tracking("parent", {"train": "child"})
    links = [one for one in read(world, run).of("a", "href") if "mlflow" in one]
    assert links == ["http://mlflow/parent", "http://mlflow/child"]


def test_several_seeds_are_a_table_in_place_of_each_ones_figures(world: World, first: Run) -> None:
    one = AcrossSeeds("judge", "after_pass_at_1", {3: 0.5, 4: 0.75}, 0.625, 0.25)
    text = read(world, replace(first, across_seeds=(one,))).text
    for part in ("after pass at 1", "0.625", "0.25", "3: 0.5, 4: 0.75"):
        assert part in text
    assert "judge: before pass at 1" not in text


def test_what_makes_the_page_too_large_is_left_out_and_said(
    world: World, first: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = page._Room(plots=60_000, texts=100)
    monkeypatch.setattr(page, "_Room", lambda: room)
    reader = read(world, first)
    assert 0 < sum(map(len, reader.of("img", "src"))) < 70_000
    assert "Left out, so that this page stays small: " in reader.text
    assert "cut here: the whole lies in report.md" in reader.text


def test_a_run_of_very_many_errors_and_long_reports_has_a_small_page(
    world: World, first: Run
) -> None:
    (world.files(first, "train") / PAGE).write_text("é`|\n" * 1_000_000)
    failures = {f"node-{number}": Failed("x" * 100_000, 1.0) for number in range(200)}
    run = replace(first, outcomes={**first.outcomes, **failures})
    assert "cut here" in read(world, run).text
    (world.files(first, "train") / PAGE).unlink()


def test_an_artifact_that_cannot_be_read_is_told_of(world: World) -> None:
    run = world.run(data={"steps": 9})
    (world.generation(run, "train") / MANIFEST).write_text("{")
    assert str(world.generation(run, "train")) in read(world, run).text


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"interrupted": True}, "stopped"),
        ({"outcomes": {"data": Failed("no", 1.0)}}, "failed"),
        (
            {"outcomes": {"data": Built("a", "b", "c", 1.0, {}, shortfall="too little")}},
            "fell short",
        ),
    ],
)
def test_how_a_run_ended_stands_first(
    world: World, first: Run, change: dict[str, Any], word: str
) -> None:
    text = read(world, replace(first, **change)).text.strip()
    assert text.splitlines()[1].startswith(word)


def test_a_page_that_cannot_be_written_is_one_clear_error(
    world: World, first: Run, tmp_path: Path
) -> None:
    (tmp_path / "runs").write_text("in the way")
    with pytest.raises(StoreError, match=r"the page of this run cannot be written .* free some"):
        write_page(
            replace(first, outcomes={}), (), tmp_path, again="ingot run", changed={}, link=None
        )


def test_a_log_that_cannot_be_drawn_is_told_of_and_costs_nothing_else(
    world: World, first: Run
) -> None:
    log = world.files(first, "train").parent / METRICS
    kept = log.read_text()
    try:
        log.write_text('{"step": 1, "expert_load": 0.5}\n')
        assert "expert_load" in read(world, first).text or "TypeError" in read(world, first).text
        log.write_text('{"loss": 1.0}\n')
        page = read(world, first)
        assert "KeyError" in page.text
        assert "Judged" in page.text
    finally:
        log.write_text(kept)


def test_a_number_called_samples_is_a_figure(world: World, first: Run) -> None:
    log = collect([{"step": 1, "samples": 512, "loss": 2.0}])
    assert log.samples == []
    assert set(log.curves) == {"samples", "loss"}


@pytest.mark.parametrize(
    ("outcomes", "ending"),
    [
        ({}, ("failed", "")),
        ({"a": Failed("no", 1.0), "b": Blocked("a")}, ("failed", "a")),
        ({"b": Blocked("a", "left")}, ("failed", "b")),
        (
            {"a": Built("a", "b", "c", 1.0, {}, shortfall="low"), "b": Failed("no", 1.0)},
            ("failed", "b"),
        ),
        ({"a": Built("a", "b", "c", 1.0, {}, shortfall="low")}, ("fell short", "a")),
        ({"a": Built("a", "b", "c", 1.0, {})}, ("succeeded", "")),
    ],
)
def test_a_run_ends_in_one_way_whoever_tells_it(
    first: Run, outcomes: dict[str, Any], ending: tuple[str, str]
) -> None:
    run = replace(first, outcomes=outcomes)
    assert run.ending == ending
    assert replace(run, interrupted=True).ending == ("stopped", "")
    assert run.succeeded == (ending[0] == "succeeded")
    assert outcome_word(run) == ": ".join(filter(None, ending))
    assert Teller("ingot run", "here").ended(run, 1.0).outcome == ending[0]
