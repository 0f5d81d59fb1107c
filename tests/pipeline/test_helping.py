"""What there is to run and to set is told by the command line itself."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from configs.parallel import StoreConfig
from configs.reading import load_recipe, shipped_recipes
from configs.recipe import Recipe
from pipeline import cli
from pipeline.verbs.fields import settings
from tests.pipeline.fakes import RECIPE, World


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_recipes_are_listed_with_size_and_what_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("over.toml").write_text("[pretrain]\nsteps = 3\n")
    assert cli.main(["new", "mine"]) == 0
    capsys.readouterr()
    assert cli.main(["recipes"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [one.split()[0] for one in told[1:]] == [*shipped_recipes(), "mine.toml"]
    (tiny,) = (one for one in told if one.startswith("tiny "))
    assert re.search(
        r" 2\.39M \(1\.01M\) +never +The whole line on two CPU cores, in minutes$", tiny
    )
    (article,) = (one for one in told if one.startswith("article-v4 "))
    assert " 1T (31.6B) " in article


def test_a_recipe_that_ran_here_says_how_long_it_took(
    capsys: pytest.CaptureFixture[str],
) -> None:
    World(StoreConfig(url=".ingot", min_free_bytes=0)).run()
    assert cli.main(["new", "mine", "--from", "smoke"]) == 0
    path = Path("mine.toml")
    path.write_text(path.read_text().replace('name = "mine"', f'name = "{RECIPE}"'))
    capsys.readouterr()
    assert cli.main(["recipes"]) == 0
    assert re.search(r"^mine\.toml .* \d+\.\d s  ", capsys.readouterr().out, re.M)


def test_every_setting_of_a_recipe_is_told() -> None:
    paths = {one.path for one in settings(Recipe, "")}
    assert {"seed", "pretrain.optim.beta1", "data.sources.NAME.share", "nodes.NAME.use"} <= paths
    assert {"pretrain.phases.NAME.after", "evaluate.gates.NAME.at_least", "model.kv_lora_rank"} <= (
        paths
    )
    assert all(one.kind and one.default for one in settings(Recipe, ""))
    # What is passed on from a base class has its meaning there.
    meanings = {one.path: one.meaning for one in settings(Recipe, "")}
    assert meanings["posttrain.optim.moments"].startswith("Type in which AdamW keeps")


def test_settings_are_told_with_type_default_and_meaning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["fields", "pretrain.optim"]) == 0
    told = capsys.readouterr().out
    assert "pretrain.optim.beta1  (number; 0.9)\n" in told
    assert 'pretrain.optim.moments  ("bfloat16" | "float32"; "bfloat16")\n    Type in' in told
    assert "posttrain" not in told
    assert cli.main(["fields", "seed"]) == 0
    assert capsys.readouterr().out == "seed  (whole number; 0)\n"


def test_settings_that_begin_otherwise_are_one_clear_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["fields", "pretrian.optim"]) == 2
    assert "did you mean 'pretrain.optim'?" in capsys.readouterr().err


@pytest.mark.parametrize("source", shipped_recipes())
def test_a_new_recipe_is_the_shipped_one_with_its_comments(source: str) -> None:
    assert cli.main(["new", "mine", "--from", source]) == 0
    text = Path("mine.toml").read_text()
    shipped = load_recipe(source)
    assert load_recipe("mine.toml") == shipped.model_copy(update={"name": "mine"})
    assert "ingot plan mine.toml" in text
    assert len(re.findall("^#", text, re.M)) > 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["new", "mine"], "mine.toml: is there already"),
        (["new", "a/b"], "a node's name is words of A-Z"),
        (["new", "x", "--from", "tinny"], "--from 'tinny': no shipped recipe; shipped: article-v4"),
    ],
)
def test_a_recipe_that_cannot_be_written_is_one_clear_error(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.toml").write_text("kept")
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err
    assert Path("mine.toml").read_text() == "kept"


def complete(script: str, *words: str) -> list[str]:
    """What bash offers for the last of these words."""
    quoted = " ".join(f"'{word}'" for word in words)
    lines = [
        script,
        f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _ingot",
        'printf "%s\\n" "${COMPREPLY[@]}"',
    ]
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not there")
def test_bash_completes_verbs_recipes_overlays_and_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    Path("mine.toml").touch()
    assert complete(script, "ingot", "pl") == ["plan"]
    assert complete(script, "ingot", "run", "tiny-v") == ["tiny-v3.2", "tiny-v4"]
    assert complete(script, "ingot", "run", "mi") == ["mine.toml"]
    assert complete(script, "ingot", "run", "tiny", "@") == ["@mine.toml"]
    assert complete(script, "ingot", "run", "tiny", "--on") == ["--only"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script_with_every_verb(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["completion", shell]) == 0
    told = capsys.readouterr().out
    assert all(verb in told for verb in cli._VERBS)


def test_a_folder_that_cannot_be_written_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir("/sys")
    assert cli.main(["new", "mine"]) == 2
    assert "mine.toml: cannot be written (" in capsys.readouterr().err
