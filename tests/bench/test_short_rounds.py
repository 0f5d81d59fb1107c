"""Every benchmark still runs: one short round of each, on small shapes, whose figures mean nothing.

They are run in full by `make bench`. One stopped working after a rename, and nobody saw.
"""

import pytest

from configs.v3 import V3Config
from pipeline.provenance import processor
from tests.bench import attention_cost, machine, test_sampling, test_training_step
from tests.bench import test_against_transformers as training


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> V3Config:
    """The shape of the benchmarks beside transformers, with little in it."""
    for name, value in (("ROWS", 2), ("LENGTH", 16), ("ROUNDS", 1)):
        monkeypatch.setattr(training, name, value)
    for name, value in (("ROWS", 2), ("PROMPT", 4), ("NEW", 6), ("ROUNDS", 1)):
        monkeypatch.setattr(test_sampling, name, value)
    monkeypatch.setattr(training, "VARIANTS", training.VARIANTS[-1:])
    return training.shape(4, 16, 2).model_copy(
        update={"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    )


def test_training_beside_transformers(small: V3Config) -> None:
    result = training.compare(small)
    assert result.ours > 0 and result.theirs > 0 and result.ratio > 0


def test_sampling_beside_transformers(small: V3Config) -> None:
    ours, theirs, ratio = test_sampling.compare(small)
    assert ours > 0 and theirs > 0 and ratio > 0


def test_a_step_in_each_precision() -> None:
    model = test_training_step.TINY.model
    assert isinstance(model, V3Config)
    for precision in test_training_step.PRECISIONS:
        one = test_training_step.trainer(model, precision)
        assert test_training_step.seconds(one, test_training_step.batch_of(1)) > 0
        assert test_training_step.kept_by(one, "MoE block", 1) > 0


@pytest.mark.parametrize("kind", attention_cost.KINDS)
def test_a_point_of_the_attention_curves(kind: str) -> None:
    assert attention_cost.measure(kind, 256)


def test_every_ratio_comes_with_processor_threads_and_allocator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MALLOC_TOP_PAD_", "67108864")
    told = machine.describe()
    assert processor() in told
    assert "MALLOC_TOP_PAD_=67108864" in told
    assert "threads" in told
