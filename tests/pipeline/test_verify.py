"""`ingot verify`: a bundle's files, tensors and sizes, and the client that is asked for."""

import shutil
import sys
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.verbs import verify as verb
from stages.export.programs import CLIENTS, PROGRAMS, Found
from stages.export.trial import Comparison, Sitting
from tests.stages.bundles import MODEL, make_bundle
from tests.stages.test_stored import LOOSE


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two variants, each with its record, as one that was copied out of a store."""
    made, _ = make_bundle(tmp_path_factory.mktemp("verify"), "cuda", MODEL, **LOOSE)
    copy = tmp_path_factory.mktemp("copied") / "mine"
    shutil.copytree(made.path(), copy)
    return copy


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(CLIENTS, str(tmp_path / "none"))


def test_each_variant_is_checked_and_weighed(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", str(bundle)]) == 0
    told = capsys.readouterr().out
    assert f"{bundle / 'bf16'}: bf16 of v3, {MODEL.parameters():,} parameters" in told
    assert f"{bundle / 'fp8'}: fp8 of v3" in told
    assert told.count("files have the hashes of SHA256SUMS") == 2
    # 8 experts in two layers, three matrices each, of 128 x 128 in two bytes.
    assert f"  {'routed experts':28}{48:>8}{'1,572,864':>20}" in told
    assert "30.7 kB for 64 tokens, 480 B a token (bfloat16)" in told
    assert told.count("devices, for cuda") == 2
    assert told.count("devices, for ascend") == 1
    assert told.endswith("2 variants are whole\n")


def test_a_variant_alone_is_checked_wherever_it_lies(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle / "fp8", tmp_path / "model")
    assert cli.main(["verify", "model"]) == 0


def test_a_changed_file_is_one_clear_error(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(bundle / "bf16", tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text("{}")
    assert cli.main(["verify", "model"]) == 1
    told = capsys.readouterr()
    assert "generation_config.json has sha256 44136fa355b3, SHA256SUMS says" in told.err
    assert "parameters" not in told.out


def test_a_variant_without_its_config_is_still_a_variant(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(bundle / "bf16", tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    assert cli.main(["verify", "model"]) == 1
    assert "config.json is missing, but SHA256SUMS lists it" in capsys.readouterr().err
    assert cli.main(["verify", "./gone"]) == 2
    assert "./gone: no such folder; name a node" in capsys.readouterr().err


@pytest.mark.parametrize("client", [name for name in PROGRAMS if name != "transformers"])
def test_a_client_that_is_not_there_is_told_how_to_get(
    bundle: Path, client: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", str(bundle / "bf16"), "--with", client]) == 1
    told = capsys.readouterr().err
    assert f"{client} is not there" in told
    assert PROGRAMS[client].get in told


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["--python", "python3"], "--python python3: of which program? name it with --with", 2),
        (["--with", "tgi"], "invalid choice: 'tgi'", 2),
        (["--with", "vllm", "--python", "/no/such"], "--python /no/such: no such file; name a", 2),
        (["--with", "vllm", "--python", sys.prefix], f"name {sys.prefix}/bin/python", 2),
        (["--problems", "x.jsonl"], "--problems x.jsonl: only lm-eval is asked them; add", 2),
        (["--with", "lm-eval", "--problems", "x.jsonl"], "x.jsonl: no such file", 1),
    ],
)
def test_what_cannot_be_asked_is_one_clear_error(
    bundle: Path, words: list[str], message: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = cli.main(["verify", str(bundle / "bf16"), *words])
    except SystemExit as ended:
        found = int(str(ended.code))
    assert found == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("equal", "code"), [(64, 0), (63, 1)])
def test_one_answer_that_differs_is_a_failure(
    bundle: Path,
    equal: int,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def trial(sitting: Sitting, found: Found) -> list[Comparison]:
        assert len(sitting.prompts) == 64
        return [Comparison("greedy answers alike", equal, 64, "number 3 at 2" * (equal < 64))]

    monkeypatch.setattr(verb, "trials", lambda sitting, program: {"greedy": trial})
    assert cli.main(["verify", str(bundle / "bf16"), "--with", "transformers"]) == code
    told = capsys.readouterr().out
    assert f"at {sys.executable}, held to what Ingot makes" in told
    assert f"greedy answers alike: {equal} of 64" in told
    assert ("DIFFERENT" in told) == bool(code)


def test_a_variant_that_the_client_cannot_load_says_which_it_can(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        verb, "find", lambda program, python: Found(program, Path("python"), "0.23.0")
    )
    assert cli.main(["verify", str(bundle / "fp8"), "--with", "vllm-ascend"]) == 1
    assert (
        "vllm-ascend 0.23.0 is tried with w4a8 and w8a8 alone of v3 on a CPU, and this is fp8"
        in capsys.readouterr().err
    )


def test_the_command_line_offers_every_program() -> None:
    assert set(cli._CLIENTS) == set(PROGRAMS)
