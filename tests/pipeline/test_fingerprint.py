"""What enters identity, what does not, and how a difference is told."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.base import Frozen
from configs.data import DataConfig, DataSpec, FilesSource, Source, StdlibSource
from configs.errors import PlanError
from configs.train import Fp8Config, OptimConfig, PretrainConfig
from pipeline.fingerprint import Identity, differences, identify
from stages.artifacts import Corpus
from stages.contract import Workspace, stage
from stages.hashing import Hashes
from tests.pipeline.fakes import FakeConfig, OptimFake, gather, make_line, train

HASHES = Hashes()


def identity(config: FakeConfig) -> Identity:
    return identify(gather(config), {}, HASHES)


def test_a_field_equal_to_its_default_changes_nothing() -> None:
    assert identity(FakeConfig()) == identity(FakeConfig(steps=3, optim=OptimFake(rate=0.5)))
    assert identity(FakeConfig()).fields["config"] == {}


def test_a_section_that_differs_from_its_field_default_is_told_from_the_default() -> None:
    plain = identity(FakeConfig(optim=OptimFake()))
    assert plain.fields["config"] == {"optim": {}}
    assert plain.fingerprint != identity(FakeConfig()).fingerprint


def test_provenance_fields_never_enter() -> None:
    assert identity(FakeConfig(diary="/somewhere", seconds=2)) == identity(FakeConfig())


def test_a_section_that_differs_in_provenance_alone_changes_nothing() -> None:
    @stage(revision=1)
    def only(config: PretrainConfig, work: Workspace) -> Corpus:
        raise AssertionError

    def of(**fp8: Any) -> Identity:
        return identify(
            only(PretrainConfig(steps=9, warmup_steps=1, fp8=Fp8Config(**fp8))), {}, HASHES
        )

    assert of() == of(telemetry_every_steps=5)
    assert "fp8" not in of().fields["config"]
    assert of(head="fp8") == of(head="fp8", telemetry_every_steps=5) != of()


def test_every_other_field_enters() -> None:
    changes: list[dict[str, Any]] = [
        {"steps": 4},
        {"optim": OptimFake(rate=0.5, momentum=0.8)},
        {"fails": True},
        {"target": "ascend"},
    ]
    seen = {identity(FakeConfig(**change)).fingerprint for change in changes}
    assert len(seen | {identity(FakeConfig()).fingerprint}) == len(changes) + 1


def test_inputs_revision_and_reads_enter() -> None:
    def other(config: FakeConfig, work: Workspace) -> Corpus:
        raise AssertionError

    def twin(revision: int, python: str) -> str:
        made = stage(revision=revision, reads=lambda config, hashes: {"python": python})(other)
        return identify(made(FakeConfig()), {}, HASHES).fingerprint

    assert len({twin(1, "3.11"), twin(2, "3.11"), twin(1, "3.12")}) == 3
    node = make_line()["train"]
    first, second = (identify(node, {"corpus": name}, HASHES) for name in "ab")
    assert first != second


def test_the_glob_of_a_files_source_is_provenance_and_its_type_is_not() -> None:
    def spec(path: str) -> DataSpec:
        sources: dict[str, Source] = {
            "mine": FilesSource(share=0.5, glob=path),
            "std": StdlibSource(share=0.5),
        }
        return DataSpec(seed=0, data=DataConfig(sources=sources, train_tokens=10))

    @stage(revision=1)
    def only(config: DataSpec, work: Workspace) -> Corpus:
        raise AssertionError

    here, there = (identify(only(spec(path)), {}, HASHES) for path in ("/a/*.txt", "/b/*.txt"))
    assert here == there
    assert here.fields["config"]["data"]["sources"]["mine"] == {"type": "files", "share": 0.5}


def test_of_a_file_that_is_read_its_content_enters_and_no_time_and_no_place(
    tmp_path: Path,
) -> None:
    def reads(config: FakeConfig, hashes: Hashes) -> dict[str, Any]:
        return {"mine": hashes.of(config.diary).model_dump()}

    @stage(revision=1, reads=reads)
    def reading(config: FakeConfig, work: Workspace) -> Corpus:
        raise AssertionError

    def fingerprint(file: Path) -> str:
        return identify(reading(FakeConfig(diary=str(file))), {}, Hashes()).fingerprint

    file, copy = tmp_path / "text", tmp_path / "elsewhere"
    for one in (file, copy):
        one.write_text("text")
    before = fingerprint(file)
    os.utime(file, (1, 1))
    os.utime(copy)
    assert fingerprint(file) == fingerprint(copy) == before
    file.write_text("Text")
    assert fingerprint(file) != before


def test_the_encoding_is_pinned() -> None:
    # Whoever changes this value has changed the identity of every artifact ever built.
    assert identity(FakeConfig(steps=5)).fingerprint == "cda1dea44110365a"


def test_every_process_computes_the_same_fingerprint() -> None:
    code = (
        "from pipeline.graph import make_graph; from stages.hashing import Hashes;"
        "from tests.pipeline.fakes import make_line;"
        "print(*[node.fingerprint for node in make_graph(make_line(), Hashes())])"
    )
    root = Path(__file__).parents[2]
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=root,
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


class Loose(Frozen):
    value: Any


@pytest.mark.parametrize("value", [{1, 2}, frozenset({1}), object(), len, b"x", {1: 2}, Path("a")])
def test_what_has_no_stable_form_is_refused_by_name(value: object) -> None:
    @stage(revision=1)
    def loose(config: Loose, work: Workspace) -> Corpus:
        raise AssertionError

    with pytest.raises(PlanError, match=r"loose\.config\.value"):
        identify(loose(Loose(value=[value])), {}, HASHES)


def told(old: FakeConfig, new: FakeConfig) -> tuple[str, ...]:
    return differences(identity(old).fields, identity(new).fields, new)


def test_a_changed_field_is_told_with_both_values() -> None:
    assert told(FakeConfig(steps=4), FakeConfig(steps=5)) == ("steps: 4 -> 5",)


def test_a_default_is_told_by_its_value() -> None:
    assert told(FakeConfig(), FakeConfig(steps=5)) == ("steps: 3 -> 5",)
    assert told(FakeConfig(steps=5), FakeConfig()) == ("steps: 5 -> 3",)


def test_a_nested_field_is_told_by_its_path() -> None:
    old, new = OptimFake(rate=0.2), OptimFake(rate=0.2, momentum=0.5)
    assert told(FakeConfig(optim=old), FakeConfig(optim=new)) == ("optim.momentum: 0.9 -> 0.5",)


def test_a_section_of_plain_defaults_is_told_by_the_fields_that_leave_them() -> None:
    assert told(FakeConfig(optim=OptimFake()), FakeConfig(optim=OptimFake(rate=0.2))) == (
        "optim.rate: 0.1 -> 0.2",
    )


def test_revision_inputs_and_reads_are_told() -> None:
    node = train(FakeConfig(), corpus=gather(FakeConfig()))
    old = identify(node, {"corpus": "a"}, HASHES).fields
    file = {"bytes": 1, "sha256": "f" * 64}
    new = {**old, "revision": 2, "inputs": {"corpus": "b"}}
    old = {**old, "reads": {"mine": {"a.txt": file, "b.txt": file}, "std": {"python": "3.11"}}}
    new["reads"] = {
        "mine": {"a.txt": {**file, "bytes": 2}, "c.txt": file},
        "std": {"python": "3.12"},
    }
    assert set(differences(old, new, FakeConfig())) == {
        "stage revision 1 -> 2",
        "input corpus changed",
        "file a.txt changed",
        "file b.txt gone",
        "file c.txt added",
        "std.python: 3.11 -> 3.12",
    }


def test_equal_identities_differ_in_nothing() -> None:
    assert told(FakeConfig(steps=9), FakeConfig(steps=9)) == ()
    assert OptimConfig() == OptimConfig()
