"""Faces and bodies say the same, and a body is loaded only when it is asked for."""

import importlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.errors import PlanError
from pipeline.loading import load_body
from stages.artifacts import Checkpoint, Corpus, Report
from stages.contract import Face, Workspace, fills, stage
from tests.pipeline.fakes import FakeConfig

ROOT = Path(__file__).parents[2]
FACES = sorted(path.parent.name for path in (ROOT / "stages").glob("*/face.py"))


@pytest.mark.parametrize("name", FACES)
def test_every_stage_has_a_face_and_the_body_that_it_names(name: str) -> None:
    face: Face[Any] = getattr(importlib.import_module(f"stages.{name}.face"), name)
    assert face.name == name
    assert face.body.startswith(f"stages.{name}.")
    assert load_body(face).__name__ == name


def test_no_face_loads_a_library_that_computes() -> None:
    code = (
        f"import sys, importlib\n"
        f"for name in {FACES!r}: importlib.import_module(f'stages.{{name}}.face')\n"
        "heavy = {'torch', 'ray', 'mlflow', 'numpy', 'pyarrow', 'tokenizers', 'matplotlib'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True, text=True
    )
    assert told.stdout == "[]\n"


def body(
    config: FakeConfig,
    work: Workspace,
    *,
    corpus: Corpus,
    base: Checkpoint | None = None,
    **others: Report,
) -> Checkpoint:
    """What the face below describes."""
    raise AssertionError


FACE = Face(
    name="body",
    revision=1,
    config=FakeConfig,
    takes={"corpus": Corpus},
    may_take={"base": Checkpoint},
    takes_more=Report,
    makes=Checkpoint,
    body=f"{__name__}:body",
)


def test_a_body_that_does_what_its_face_says_is_left_as_it_is() -> None:
    assert fills(FACE)(body) is body


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"takes": {}}, "its face says takes = {}, its body"),
        ({"takes": {"corpus": Checkpoint}}, "takes = {corpus: Checkpoint}"),
        ({"may_take": {}}, "may_take = {}"),
        ({"takes_more": None}, "takes_more = None"),
        ({"makes": Corpus}, "makes = Corpus"),
        ({"reserved": ("config", "workspace")}, "reserved = ("),
        ({"body": "elsewhere:body"}, "its body is elsewhere:body"),
    ],
)
def test_a_body_that_differs_from_its_face_is_refused_where_it_is_defined(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=r"^stage body: ") as caught:
        fills(replace(FACE, **change))(body)
    assert message in str(caught.value)
    assert "correct one of the two" in str(caught.value)


PLUGIN = """
from configs.base import Frozen
from stages.artifacts import Corpus, Report
from stages.contract import Workspace

class Config(Frozen):
    pass

def made(config: Config, work: Workspace) -> Report:
    raise AssertionError
"""


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (None, "made", "put its folder on PYTHONPATH"),
        ("1 / 0", "made", "raises ZeroDivisionError while it is imported: division by zero"),
        (PLUGIN, "maid", "has no function 'maid'"),
        (PLUGIN, "made", "its face says"),
        ("made = 3", "made", "has no function 'made'"),
    ],
)
def test_a_body_that_cannot_be_had_is_one_clear_error(
    text: str | None,
    name: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    module = f"plugin_{abs(hash((text, name)))}"
    if text is not None:
        (tmp_path / f"{module}.py").write_text(text)
    face = Face(name="mine", revision=1, config=FakeConfig, makes=Corpus, body=f"{module}:{name}")
    with pytest.raises(PlanError, match=r"^stage mine: its ") as caught:
        load_body(face)
    assert message in str(caught.value)


def test_a_stage_may_have_an_input_that_can_be_left_out() -> None:
    @stage(revision=1)
    def continued(
        config: FakeConfig, work: Workspace, *, base: Checkpoint | None = None
    ) -> Checkpoint:
        raise AssertionError

    assert (dict(continued.takes), dict(continued.may_take)) == ({}, {"base": Checkpoint})
    first = continued(FakeConfig())
    assert continued(FakeConfig(), base=first).inputs == {"base": first}
    with pytest.raises(PlanError, match=r"takes inputs \[\], may take \['base'\], not \['bass'\]"):
        continued(FakeConfig(), bass=first)


def test_identity_does_not_change_when_a_body_moves() -> None:
    moved = replace(FACE, body="elsewhere:body", known_as=FACE.body)
    assert moved.function == FACE.function
