"""Recipes and settings as users write them: read as meant, or refused with place and remedy."""

from pathlib import Path
from typing import Any

import pytest

from configs.errors import ConfigError
from configs.reading import load_recipe, validate
from tests.pipeline.fakes import FakeConfig

SMOKE = Path("configs/recipes/smoke.toml")
TEXT = (Path(__file__).parents[2] / SMOKE).read_text()


def message(name: str, *sets: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(name, sets=sets)
    said = str(caught.value)
    assert "\n" not in said
    return said


def test_a_recipe_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "marked.toml"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert load_recipe(str(path)) == load_recipe("smoke")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_a_recipe_in_utf16_is_named_as_that(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "wide.toml"
    mark = "" if encoding == "utf-16" else "\ufeff"
    path.write_bytes((mark + TEXT).encode(encoding))
    assert "wide.toml': is in UTF-16; save it as UTF-8" in message(str(path))


def test_a_recipe_in_another_encoding_is_refused_with_byte_and_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.toml"
    path.write_bytes('name = "x"\n# größe\n'.encode("latin-1"))
    assert "latin.toml': byte 0xf6 in line 2 is not UTF-8" in message(str(path))


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    assert "cannot be read (Is a directory)" in message(str(tmp_path / "folder.toml"))


@pytest.mark.parametrize(
    "setting", ["seed=1\nname='x'", "seed=1\n[data]\ntrain_tokens=1", "name=a\nb", "a=1\na.b=2"]
)
def test_a_setting_says_one_thing(setting: str) -> None:
    assert "a line break ends a value" in message("smoke", setting)


def test_a_value_of_toml_may_have_line_breaks_of_its_own() -> None:
    assert load_recipe("smoke", sets=['export.targets=["cuda",\n"ascend"]']).export is not None
    assert load_recipe("smoke", sets=['name="a\\nb"']).name == "a\nb"


@pytest.mark.parametrize("setting", ["a..b=1", ".a=1", "a b=1", "a.=1", "a\nb=1"])
def test_a_key_that_is_no_path_is_refused(setting: str) -> None:
    assert "is no field's path" in message("smoke", setting)


def test_a_key_may_be_quoted() -> None:
    assert load_recipe("smoke", sets=['"pretrain".steps=30']).pretraining["pretrain"].steps == 30


@pytest.mark.parametrize(
    ("setting", "wish"),
    [
        ("seed=true", "seed = true: should be a whole number"),
        ('pretrain.steps="25"', "pretrain.steps = '25': should be a whole number, without quotes"),
        ("pretrain.steps=25.0", "pretrain.steps = 25.0: should be a whole number"),
        ('pretrain.optim.beta1="0.9"', "'0.9': should be a number, without quotes"),
        ("pretrain.optim.beta1=true", "true: should be a number"),
        ('data.sources.arithmetic.zero_padded="yes"', "should be true or false, without quotes"),
        ("data.sources.arithmetic.zero_padded=1", "1: should be true or false"),
        ("name=7", "name = 7: should be text, in quotes"),
        ("name=[1]", "name = [1]: should be text"),
        ("evaluate.pass_at=1", "evaluate.pass_at = 1: should be a list, as [0, 1]"),
        ('evaluate.pass_at=["1"]', "should be a whole number, without quotes"),
        ("pretrain.optim.moments='FP8'", "'FP8': should be 'bfloat16' or 'float32'"),
    ],
)
def test_nothing_is_converted(setting: str, wish: str) -> None:
    assert wish in message("smoke", setting)


def test_whole_numbers_are_numbers_and_lists_are_lists() -> None:
    recipe = load_recipe("smoke", sets=["pretrain.optim.learning_rate=1", "evaluate.pass_at=[2]"])
    assert recipe.pretraining["pretrain"].optim.learning_rate == 1.0
    assert recipe.evaluate is not None
    assert recipe.evaluate.pass_at == (2,)


@pytest.mark.parametrize("odd", [{"steps": "3"}, {"steps": True}, {"fails": 1}])
def test_a_plugins_config_is_read_as_strictly(odd: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="1 validation error"):
        validate(FakeConfig, odd)
