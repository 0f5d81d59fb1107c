"""Whatever the terminal can show and whatever names look like, what is said is said."""

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from configs.parallel import StoreConfig
from pipeline import cli
from pipeline.progress import Display
from pipeline.records import AcrossSeeds, Built, Failed, Invocation, Run
from pipeline.verbs.asked import command
from tests.pipeline.fakes import World

ROOT = Path(__file__).parents[2]


def run_of(name: str, error: str) -> Run:
    built = Built("a", "f", "c", 1.0, {name: 0.5})
    return Run(
        id="20260101",
        recipe=name,
        invocation=Invocation("smoke", seeds=(0, 1)),
        provenance={},
        started=time.time(),
        store_root="/",
        process={},
        outcomes={name: built, "broken": Failed(error, 1.0)},
        across_seeds=(AcrossSeeds(name, name, {0: 1.0, 1: 2.0}, 1.5, 0.7),),
    )


@pytest.mark.parametrize("text", ["[/x]", "[red]", "[bold", "a[link=http://x]b[/link]", "\\[b]"])
def test_what_looks_like_markup_is_shown_as_it_is(text: str) -> None:
    file = io.StringIO()
    display = Display(Console(file=file, width=160))
    run = run_of(text, f"failed at {text}")
    display.table(run, {text: "http://127.0.0.1/1"})
    display.across_seeds(run)
    display.note(text)
    told = file.getvalue()
    assert told.count(text) >= 6
    assert f"failed at {text}" in told


def ingot(*words: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}]
)
def test_a_terminal_of_ascii_is_told_everything(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    (tmp_path / "größe.toml").write_text('name = "größe"\n', encoding="utf-8")
    told = ingot("plan", "smoke", "@größe.toml", folder=tmp_path, **environment)
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith(b"gr\\xf6\\xdfe in ")
    told = ingot("plan", "größe", folder=tmp_path, **environment)
    assert (told.returncode, told.stderr.count(b"\n")) == (2, 1)


def test_a_table_in_ascii_has_a_frame_of_ascii() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii", errors="backslashreplace")
    Display(Console(file=file, width=120)).table(run_of("name", "no"), {})
    file.flush()
    assert b"\\u" not in raw.getvalue()
    assert raw.getvalue().count(b"+") > 4


def test_a_reader_that_has_seen_enough_ends_it_quietly(tmp_path: Path) -> None:
    World(StoreConfig(url=str(tmp_path / ".ingot"), min_free_bytes=0)).run()
    (made,) = (tmp_path / ".ingot" / "artifacts" / "train").glob("*/g1")
    code = (
        "import sys; from pipeline.cli import main\n"
        "import pipeline.verbs.show as show\n"
        "lines = show._lines\n"
        "show._lines = lambda *a: [*lines(*a)] * 2000\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, "show", str(made), "--recipe", "smoke"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 0


def test_printed_commands_can_be_pasted() -> None:
    sets = ("pretrain.fp8.head='fp8'", "name=a b")
    told = command("run", Invocation("smoke", ("/tmp/my overlay.toml",), sets, (0, 1)))
    split = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {told}"], capture_output=True, text=True, check=True
    )
    assert split.stdout.splitlines() == [
        *("ingot", "run", "smoke", "@/tmp/my overlay.toml"),
        *("--set", sets[0], "--set", sets[1], "--seeds", "0,1"),
    ]


def test_bare_and_with_its_version_it_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert capsys.readouterr().out.startswith("usage: ingot")
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("ingot 0.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pln", "smoke"], "ingot: error: 'pln' is no verb; did you mean 'plan'?\n"),
        (["qqq"], "ingot: error: 'qqq' is no verb; verbs: run, plan"),
    ],
)
def test_a_verb_that_there_is_not_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize("words", [["plan"], ["plan", "smoke", "--onyl", "data"]])
def test_words_that_do_not_fit_say_where_to_look(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("ingot: error: ")
    assert "--help` says what it takes" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("name", ["model.py", "configs/__init__.py", "stages/x.py"])
def test_a_users_file_in_the_place_of_ours_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("x = 1\n")
    told = ingot("plan", "smoke", folder=tmp_path)
    if name == "stages/x.py":
        # A folder without __init__.py gives way to a package.
        assert told.returncode == 0
        return
    assert told.returncode == 2
    assert str(tmp_path / name.partition("/")[0]).encode() in told.stderr
    assert b"take its folder off PYTHONPATH, or rename it" in told.stderr
    assert told.stderr.count(b"\n") == 1
