"""A model is asked problems without a recipe."""

import json
import re
from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.parallel import StoreConfig
from pipeline import cli
from pipeline.verbs import eval_
from stages.verifiers import Problem, write_problems
from tests.pipeline.fakes import World
from tests.pipeline.test_sample import model_folder

__all__ = ["model_folder"]


def ask(*words: str) -> int:
    return cli.main(["eval", *words])


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    """Sums, of which no random model knows the answer, as lines of JSON."""
    path = tmp_path / "sums.jsonl"
    lines = [{"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(10, 18)]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return path


def test_a_model_is_asked_the_problems_of_a_file(
    model_folder: Path, problems: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(model_folder), "--problems", str(problems), "--max-new-tokens", "2"]
    assert ask(*words) == 0
    told = capsys.readouterr()
    assert re.search(r"^right greedily  0\.0% \[0\.0%, \d+\.\d%\]$", told.out, re.M)
    assert re.search(r"^pass@1 +0\.0% \[", told.out, re.M)
    assert told.out.count("wrong: ") == 5
    assert "8 problems of" in told.err
    assert ask(*words) == 0
    assert capsys.readouterr().out == told.out
    assert ask(*words, "--limit", "3") == 0
    assert "3 problems of" in capsys.readouterr().err


def test_the_problems_are_by_default_those_that_its_own_corpus_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    world = World(StoreConfig(url=".ingot", min_free_bytes=0))
    made = world.run()
    checkpoint = world.files(made, "train")
    with pytest.raises(ConfigError, match="no corpus with held-out problems is known"):
        eval_._held_out(checkpoint)
    held_out = world.files(made, "data") / "problems" / "held_out.parquet"
    write_problems(held_out, [Problem(id="a", prompt="1+1=", answer="2", source="arithmetic")])
    assert eval_._held_out(checkpoint).samefile(held_out)
    assert eval_._held_out(world.files(made, "pack.cuda") / "bf16").samefile(held_out)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no problem"),
        ("{", "line 1: not a JSON object"),
        ('{"prompt": "1+1="}', "line 1: not a JSON object"),
        ('{"prompt": 1, "answer": "2"}', "line 1: not a JSON object"),
        ("[1]", "line 1: not a JSON object"),
    ],
)
def test_a_file_that_holds_no_problems_is_one_clear_error(
    model_folder: Path,
    tmp_path: Path,
    text: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    assert ask(str(model_folder), "--problems", str(path)) == 1
    assert message in capsys.readouterr().err


def test_files_that_cannot_be_read_are_one_clear_error(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latin, broken, empty = (tmp_path / name for name in ("a.jsonl", "b.parquet", "c.parquet"))
    latin.write_bytes('{"prompt": "größe", "answer": "2"}'.encode("latin-1"))
    broken.write_bytes(b"no parquet")
    write_problems(empty, [])
    for path, message in (
        (latin, "cannot be read (UnicodeDecodeError"),
        (broken, "cannot be read (ArrowInvalid"),
        (empty, "holds no problem"),
    ):
        assert ask(str(model_folder), "--problems", str(path)) == 1
        assert message in capsys.readouterr().err


def test_a_line_may_hold_any_sign_that_json_has(model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b", "answer": "2"}, ensure_ascii=False))
    assert ask(str(model_folder), "--problems", str(path)) == 0


def test_odd_numbers_and_missing_files_are_one_clear_error(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(str(model_folder), "--limit", "0") == 2
    assert ask(str(model_folder), "--problems", str(tmp_path / "none.jsonl")) == 1
    assert "no such file" in capsys.readouterr().err
    assert ask(str(model_folder)) == 2
    assert "name a file of them: --problems FILE" in capsys.readouterr().err
