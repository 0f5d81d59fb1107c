"""What a user sees of a run in MLflow, in a real browser with a fresh profile.

`python -m tests.line.test_browsing FOLDER docs/pictures` makes README's pictures from a folder in
which a recipe was run.
"""

import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from tests.browser import CHROMIUM, Browser, open_browser
from tests.line.runs import ingot
from tests.line.ui import base, our_answer, served, strangers_answer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: chromium)")
SIZES = ((1500, 950), (1280, 800))
_MOST_PICTURE_BYTES = 200_000


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `ingot run smoke` has ended well."""
    folder = tmp_path_factory.mktemp("browsing")
    done = ingot(folder, "run", "smoke", timeout_seconds=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def link(built: Path) -> Iterator[str]:
    with served(built) as link:
        yield link


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with open_browser(tmp_path / "profile") as browser:
        browser.resize(*SIZES[0])
        yield browser


def node_run(link: str, node: str) -> str:
    """The id of the run that shows a node."""
    client = MlflowClient(base(link), registry_uri=base(link))
    asked = f"tags.`ingot.node` = '{node}' AND tags.`ingot.outcome` = 'built'"
    (latest, *_) = client.search_runs(["1"], asked)
    return str(latest.info.run_id)


@needs_browser
def test_the_link_of_ui_ends_on_a_table_of_runs_that_tells(link: str, browser: Browser) -> None:
    for size in SIZES:
        browser.resize(*size)
        browser.go(link)
        text = browser.until_text("ingot.outcome", "ingot.recipe", "succeeded")
        assert "/#/experiments/1/runs?" in browser.url()
        assert "workflowType=machine_learning" in browser.url()
        # No page of traces: the run, and its nodes in the order of the line.
        nodes = ("data", "pretrain", "posttrain", "evaluate", "export.cuda", "export.ascend")
        rows = re.findall(r"^(smoke \d\S*|" + "|".join(map(re.escape, nodes)) + ")$", text, re.M)
        assert [row.split()[0] for row in rows] == ["smoke", *nodes]
        assert "evaluate/before_pass_at_1" in text


@needs_browser
def test_the_first_screen_of_pretrainings_charts_is_what_matters(
    link: str, browser: Browser
) -> None:
    page = f"{base(link)}/#/experiments/1/runs/{node_run(link, 'pretrain')}"
    browser.go(f"{page}/model-metrics?workflowType=machine_learning")
    for title in ("loss", "held_out_loss", "tokens_per_second"):
        top = browser.until(
            "(() => { const found = [...document.querySelectorAll('*')].filter(e => "
            f"!e.children.length && e.textContent === '{title}').map(e => "
            "e.getBoundingClientRect().top).filter(t => t > 0);"
            "return found.length ? Math.min(...found) : 0 })()"
        )
        assert 0 < top < SIZES[0][1], title


@needs_browser
def test_reports_and_tables_are_rendered(link: str, browser: Browser) -> None:
    page = f"{base(link)}/#/experiments/1/runs/{node_run(link, 'evaluate')}/artifacts"
    browser.go(f"{page}/report.md?workflowType=machine_learning")
    text = browser.until_text("Evaluation", "bits per byte, all held-out text")
    assert "<code>" not in text
    browser.until("document.querySelectorAll('table, [role=table]').length > 1")
    browser.go(f"{page}/tables/answers.json?workflowType=machine_learning")
    text = browser.until_text("prompt", "right_answer", "reward", "greedy")
    assert '"columns"' not in text


@needs_browser
def test_the_page_of_the_run_opens_from_disk(built: Path, browser: Browser) -> None:
    (page,) = (built / ".ingot" / "runs").glob("*.html")
    browser.go(page.as_uri())
    browser.until_text("smoke", "export.ascend")
    assert browser.ask("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert browser.ask("document.images.length") > 3


def test_a_stranger_loads_the_model_by_its_name_and_gets_our_answer(
    built: Path, link: str, tmp_path: Path
) -> None:
    prompt = "37+45="
    answer = strangers_answer(link, "ingot-smoke@cuda", prompt, apart=tmp_path)
    assert answer == our_answer(built, prompt)


def take_pictures(folder: Path, into: Path) -> None:
    """README's pictures of the pages of a folder's runs, each below 200 KB."""
    into.mkdir(parents=True, exist_ok=True)
    with (
        served(folder) as link,
        tempfile.TemporaryDirectory() as profile,
        open_browser(Path(profile)) as browser,
    ):
        browser.resize(*SIZES[1])
        pretrain = f"{base(link)}/#/experiments/1/runs/{node_run(link, 'pretrain')}"
        charts = f"{pretrain}/model-metrics?workflowType=machine_learning"
        pages = {"runs": (link, "succeeded"), "curves": (charts, "tokens_per_second")}
        for name, (url, text) in pages.items():
            browser.go(url)
            browser.until_text(text)
            # What MLflow itself lays over its pages.
            browser.ask(
                "document.querySelectorAll('[aria-label=\"Close\"]').forEach(b => b.click())"
            )
            time.sleep(6)
            browser.picture(into / f"{name}.png")
        (page, *_) = sorted((folder / ".ingot" / "runs").glob("*.html"), reverse=True)
        browser.go(page.as_uri())
        browser.until("document.readyState === 'complete'")
        browser.picture(into / "page.png")
    for picture in into.glob("*.png"):
        size = picture.stat().st_size
        if size > _MOST_PICTURE_BYTES:
            raise ValueError(f"{picture} has {size:,} bytes, more than {_MOST_PICTURE_BYTES:,}")
        print(f"{picture}: {size:,} bytes")


if __name__ == "__main__":
    take_pictures(Path(sys.argv[1]), Path(sys.argv[2]))
