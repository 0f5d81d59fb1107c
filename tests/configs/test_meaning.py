"""What has no bearing on a result makes no difference to identity, and what has one does."""

from typing import Any

import pytest

from configs.errors import ConfigError
from configs.reading import load_recipe
from configs.recipe import Recipe
from pipeline.graph import make_graph
from pipeline.production import production
from stages.hashing import Hashes

HIGH = 'pretrain.precision="high"'


def fingerprints(recipe: str, *sets: str) -> dict[str, str]:
    """The identity of every node of a recipe under these settings."""
    loaded: Recipe = load_recipe(recipe, (), sets)
    return {node.name: node.fingerprint for node in make_graph(production(loaded), Hashes())}


@pytest.mark.parametrize(
    ("recipe", "base", "setting"),
    [
        ("tiny", (), "pretrain.indexer.dense_steps=3"),
        ("tiny", (), "pretrain.indexer.loss_weight=2.0"),
        (
            "tiny-v3.2",
            ("pretrain.indexer.dense_steps=0",),
            "pretrain.indexer.dense_learning_rate=1e-5",
        ),
        ("tiny", (), "posttrain.fp8.head='fp8'"),
        ("tiny", (), "posttrain.fp8.scaling='tensor'"),
        ("tiny", (HIGH,), "pretrain.fp8.attention='high'"),
        ("tiny", (), "pretrain.fp8.indexer='high'"),
        ("tiny", (), "pretrain.fp8.telemetry_every_steps=7"),
        ("tiny", (), "pretrain.optim.table_rate_factor=2.0"),
        ("tiny", (), "posttrain.optim.table_rate_factor=2.0"),
        ("tiny", ("model.num_nextn_predict_layers=0",), "pretrain.mtp_loss_weight=0.1"),
        ("tiny", ("pretrain.decay_share=0.0",), "pretrain.final_learning_rate_share=0.5"),
        ("tiny", (), "pretrain.checkpoint_every_steps=7"),
        ("tiny", ("pretrain.evaluate_every_steps=0",), "pretrain.evaluate_rows=7"),
        ("tiny", ("evaluate.pass_at=[1, 4]",), "evaluate.pass_at=[4, 1, 4]"),
        ("tiny", (), "data.sources.arithmetic.max_problems=50_000"),
        ("tiny", (), "data.sources.arithmetic.slip_share=0.36"),
        (
            "tiny",
            ("data.sources.arithmetic.operations=['+', '-']",),
            "data.sources.arithmetic.operations=['-', '+', '-']",
        ),
        ("tiny", (), "export.variants=['w8a8', 'bf16', 'fp8']"),
        ("tiny", ("export.problems=0",), "export.samples_per_problem=9"),
        ("tiny", (), "export.targets=['ascend', 'cuda']"),
        ("tiny", ("pretrain.evaluate_every_steps=5000",), "pretrain.evaluate_every_steps=6000"),
        ("tiny", ("posttrain.evaluate_problems=0",), "posttrain.evaluate_every_steps=7"),
        ("tiny", ("posttrain.evaluate_problems=0",), "posttrain.evaluate_samples_per_problem=7"),
        (
            "tiny",
            ("posttrain.evaluate_every_steps=90",),  # of 90 steps: before and after
            "posttrain.evaluate_every_steps=1000",
        ),
        ("parity", (), "parity.seeds=[2, 0, 1]"),
    ],
)
def test_a_setting_without_meaning_rebuilds_nothing(
    recipe: str, base: tuple[str, ...], setting: str
) -> None:
    assert fingerprints(recipe, *base, setting) == fingerprints(recipe, *base)


@pytest.mark.parametrize(
    ("recipe", "base", "setting", "first"),
    [
        ("tiny-v3.2", (), "pretrain.indexer.dense_steps=3", "pretrain"),
        ("tiny-v3.2", (), "pretrain.indexer.dense_learning_rate=1e-5", "pretrain"),
        ("tiny-v3.2", (), "pretrain.indexer.sparse_learning_rate=1e-5", "pretrain"),
        ("tiny-engram", (), "pretrain.optim.table_rate_factor=2.0", "pretrain"),
        ("tiny", ("posttrain.precision='fp8'",), "posttrain.fp8.head='fp8'", "posttrain"),
        ("tiny", (), "pretrain.fp8.head='fp8'", "pretrain"),
        ("tiny", (), "pretrain.mtp_loss_weight=0.1", "pretrain"),
        ("tiny", (), "pretrain.final_learning_rate_share=0.5", "pretrain"),
        ("tiny", (), "pretrain.evaluate_every_steps=50", "pretrain"),
        ("tiny", (), "pretrain.evaluate_rows=7", "pretrain"),
        ("tiny", (), "evaluate.pass_at=[1, 4]", "evaluate"),
        ("tiny", (), "data.sources.arithmetic.max_problems=5_000", "data"),
        ("tiny", (), "data.sources.arithmetic.slip_share=0.4", "data"),
        ("tiny", (), "data.held_out_share=0.1", "data"),
        ("tiny", (), "export.variants=['bf16', 'w8a8']", "export.cuda"),
        ("tiny", (), "export.samples_per_problem=9", "export.cuda"),
        ("tiny", (), "export.fp8_scales='ue8m0'", "export.cuda"),
        ("tiny", (), "export.calibration_rows=0", "export.ascend"),
        ("tiny", (), "export.smooth=true", "export.ascend"),
        ("tiny", (), "export.rotate=true", "export.ascend"),
        ("tiny", (), "export.mindie=true", "export.ascend"),
        # Not the weights, but the artifact's history.
        ("tiny", (), "posttrain.evaluate_every_steps=7", "posttrain"),
        ("tiny", (), "posttrain.evaluate_every_steps=90", "posttrain"),
        ("tiny", (), "posttrain.evaluate_problems=7", "posttrain"),
    ],
)
def test_a_setting_with_meaning_rebuilds_its_node(
    recipe: str, base: tuple[str, ...], setting: str, first: str
) -> None:
    before, after = fingerprints(recipe, *base), fingerprints(recipe, *base, setting)
    changed = [name for name in before if before[name] != after[name]]
    assert changed and changed[0] == first


def test_leaving_fp8_out_does_not_touch_the_ascend_bundle() -> None:
    before = fingerprints("tiny")
    after = fingerprints("tiny", "export.variants=['bf16', 'w8a8']")
    assert before["export.ascend"] == after["export.ascend"]


def test_how_integers_are_made_does_not_touch_the_cuda_bundle() -> None:
    before, after = fingerprints("tiny"), fingerprints("tiny", "export.smooth=true")
    assert before["export.cuda"] == after["export.cuda"]
    after = fingerprints("tiny", "export.fp8_scales='ue8m0'")
    assert before["export.ascend"] == after["export.ascend"]


def test_smoothing_without_calibration_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"smooth = true, but calibration_rows = 0: .* raise"):
        fingerprints("tiny", "export.smooth=true", "export.calibration_rows=0")


def test_rules_for_text_mean_nothing_where_there_is_none() -> None:
    sums: tuple[Any, ...] = ("data.sources.stdlib.share=0", "data.sources.arithmetic.share=1.0")
    assert fingerprints("tiny", *sums, "data.quality.min_chars=1") == fingerprints("tiny", *sums)
    assert fingerprints("tiny", "data.quality.min_chars=1") != fingerprints("tiny")
