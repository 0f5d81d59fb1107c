"""The whole line for each family that is not `smoke`'s: every stage, from raw text to bundles."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from model import compressor, sparse
from model.indexer import choose
from model.weights.files import load_pretrained
from stages.shards import Rows
from tests.line.runs import artifact, bundles, ingot, metrics, step_log
from tests.model.transformers_twin import loaded
from tests.references import relative_gap

SHORT = Path(__file__).with_name("short.toml")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Built:
    """A folder in which the short line of a recipe has ended well."""

    folder: Path
    recipe: str

    def bundles(self) -> dict[str, tuple[Path, dict[str, Any]]]:
        """Folder and facts of each bundle, by target."""
        return bundles(self.folder)


@pytest.fixture(scope="module", params=["tiny-v3.2", "tiny-v4", "tiny-engram"])
def built(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Built:
    folder = tmp_path_factory.mktemp("family")
    done = ingot(folder, "run", request.param, f"@{SHORT}", timeout_seconds=800)
    assert done.returncode == 0, done.stdout + done.stderr
    return Built(folder, request.param)


def test_every_stage_ends_and_the_loss_falls(built: Built) -> None:
    for stage, last in (("pretrain", 24), ("posttrain", 3)):
        lines = step_log(built.folder, stage)
        assert [line["step"] for line in lines] == list(range(last + 1))
    lines = metrics(built.folder, "pretrain")
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert all(line["indexer_loss"] > 0 for line in lines)
    artifact(built.folder, "evaluate")


def test_every_variant_agrees_with_its_source_and_fp8_is_not_bfloat16(built: Built) -> None:
    parities = {
        (target, variant): measured
        for target, (_, facts) in built.bundles().items()
        for variant, measured in facts["parity"].items()
    }
    assert parities.keys() == {
        *(("cuda", "bf16"), ("cuda", "fp8"), ("ascend", "bf16"), ("ascend", "w8a8")),
    }
    for measured in parities.values():
        assert measured["top1_agreement"] >= 0.9
        assert measured["mean_kl_nats"] <= 0.05
    # So few steps leave logits so flat that one tie of the indexer outweighs all rounding: what was
    # rounded, and to what, shows in the weights.
    source = load_pretrained(artifact(built.folder, "posttrain")[0]).state_dict()
    folder = built.bundles()["cuda"][0]
    name = "model.layers.1.mlp.shared_experts.down_proj.weight"
    gaps = {
        variant: relative_gap(load_pretrained(folder / variant).state_dict()[name], source[name])
        for variant in ("bf16", "fp8")
    }
    assert 0 < gaps["bf16"] < 1e-5 < gaps["fp8"] < 1e-2
    assert parities["ascend", "w8a8"] != parities["ascend", "bf16"]


class Ties:
    """In place of `choose`: notes where several entries have a right to the last place."""

    def __init__(self) -> None:
        self.seen_BS: list[Tensor] = []

    def __call__(self, scores_QL: Tensor, visible_QL: Tensor, keep: int) -> Tensor:
        ranked_QL = scores_QL.masked_fill(~visible_QL, -torch.inf).sort(-1, descending=True).values
        if ranked_QL.shape[-1] > keep:
            last_Q, next_Q = ranked_QL[..., keep - 1], ranked_QL[..., keep]
            self.seen_BS.append((last_Q == next_Q) & next_Q.isfinite())
        return choose(scores_QL, visible_QL, keep)

    def first(self, rows: int, tokens: int) -> Tensor:
        """The position of each row's first tie in any layer; `tokens` where there is none."""
        tied_BS = torch.zeros(rows, tokens + 1, dtype=torch.bool)
        tied_BS[:, tokens] = True
        for seen_BS in self.seen_BS:
            tied_BS[:, :tokens] |= seen_BS
        return tied_BS.int().argmax(1)


@torch.no_grad()
def test_transformers_gives_the_logits_of_the_bundle(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until a row's first exact tie at an indexer's last place, which each may break in its way."""
    if built.recipe == "tiny-engram":
        pytest.skip("transformers has no memory of n-grams")
    folder = built.bundles()["cuda"][0] / "bf16"
    theirs, _ = loaded(AutoModelForCausalLM.from_pretrained, folder, dtype=torch.float32)
    rows = Rows(artifact(built.folder, "data")[0] / "held_out" / "stdlib")
    tokens_BS = torch.from_numpy(rows.take(torch.arange(8).numpy()))
    ties = Ties()
    for module in (compressor, sparse):
        monkeypatch.setattr(module, "choose", ties)
    ours = load_pretrained(folder)(tokens_BS)
    error_BS = (theirs(tokens_BS).logits - ours).abs().amax(-1)
    assert ties.seen_BS
    comparable_BS = torch.arange(tokens_BS.shape[1]) < ties.first(*tokens_BS.shape).unsqueeze(1)
    assert float(comparable_BS.float().mean()) > 0.5
    assert float(error_BS[comparable_BS].max()) <= 1e-4


def test_a_second_run_builds_nothing(built: Built) -> None:
    again = ingot(built.folder, "run", built.recipe, f"@{SHORT}")
    assert again.returncode == 0, again.stdout + again.stderr
    assert not re.search(r"│ built", again.stdout)


def test_a_bundle_is_a_base_from_which_the_rest_of_the_line_goes_on(
    built: Built, tmp_path: Path
) -> None:
    base = built.bundles()["cuda"][0] / "bf16"
    command = ("run", built.recipe, f"@{SHORT}", "--set", f"base={base}")
    done = ingot(tmp_path, *command, timeout_seconds=600)
    assert done.returncode == 0, done.stdout + done.stderr
    stages = {folder.name for folder in (tmp_path / ".ingot" / "artifacts").iterdir()}
    assert stages >= {"imported", "data", "posttrain", "evaluate", "export"}
    assert "pretrain" not in stages
    again = Built(tmp_path, built.recipe).bundles()
    assert again.keys() == {"cuda", "ascend"}
    for _, facts in again.values():
        for measured in facts["parity"].values():
            assert measured["top1_agreement"] >= 0.9
