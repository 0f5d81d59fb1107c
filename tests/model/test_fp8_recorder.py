"""Tallies against a loop over single values."""

import math

import pytest
import torch
from torch import Tensor

from configs.train import Fp8Config
from model.fp8.backends import backend_for
from model.fp8.drift import BASELINE_SAMPLES, Drift
from model.fp8.fp4 import through_fp4
from model.fp8.groups import Groups
from model.fp8.linear import Linear
from model.fp8.quantized import ACTIVATION, ALONG_TOKENS, BLOCK, Quantized, Tile
from model.fp8.recorder import Recorder, Tally, tally
from model.fp8.reference import Reference
from model.fp8.scheme import Fp8
from tests.references import exact_by_tiles

CPU = backend_for(torch.device("cpu"))


def random_matrix(*shape: int, seed: int = 0, spread: float = 6.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x = torch.ldexp(x, (spread * torch.randn(shape, generator=generator)).round().int())
    x[::7, ::5] = 0
    return x


def by_value(x: Tensor, q: Quantized) -> Tally:
    """The tally of a matrix, one value after another."""
    after = exact_by_tiles(q)
    nonzero = clipped = flushed = 0.0
    exponents = []
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            value = float(x[i, j])
            if value == 0:
                continue
            scale = float(q.scales[i // q.tile[0], j // q.tile[1]])
            nonzero += 1
            # Half way between 448 and 480, which would follow it; until there it rounds to 448.
            clipped += abs(value) / scale > 464
            flushed += float(after[i, j]) == 0
            exponents.append(math.log2(scale))
    if not exponents:
        return Tally()
    return Tally(nonzero, clipped, flushed, 0.0, min(exponents), max(exponents))


def assert_same(found: Tally, expected: Tally) -> None:
    counts = [(t.nonzero, t.clipped, t.flushed) for t in (found, expected)]
    assert counts[0] == counts[1]
    assert found.low == pytest.approx(expected.low, abs=1e-5)
    assert found.high == pytest.approx(expected.high, abs=1e-5)


@pytest.mark.parametrize("tile", [ACTIVATION, ALONG_TOKENS, BLOCK], ids=str)
def test_flushed_values_and_scales_are_those_of_a_loop(tile: Tile) -> None:
    x = random_matrix(140, 150)
    x[128:] = 0
    for backend in (CPU, Reference()):
        q = backend.quantize(x, tile)
        expected = by_value(x, q)
        assert expected.flushed > 50
        assert expected.clipped == 0
        assert_same(tally(x, q), expected)


def test_values_beyond_their_scale_are_counted_as_clipped() -> None:
    x = random_matrix(20, 128, spread=0)
    q = Reference().quantize(x, ACTIVATION)
    half = Quantized(q.values, q.scales / 2, q.tile)
    x[0, 0] = 470 * half.scales[0, 0]
    assert by_value(x, half).clipped > 20
    assert_same(tally(x, half), by_value(x, half))
    # The largest of a tile rounds to itself, whatever float32 makes of its scale.
    assert tally(x, q).clipped == 0
    assert tally(x, CPU.quantize(x, ACTIVATION, power_of_two=True)).clipped == 0


def test_what_is_quantised_again_is_judged_by_what_it_was() -> None:
    x8 = CPU.quantize(random_matrix(140, 150), ACTIVATION)
    again = CPU.quantize(x8, ALONG_TOKENS)
    expected = by_value(exact_by_tiles(x8).float(), again)
    assert expected.flushed > 0
    assert_same(tally(x8, again), expected)


def test_a_tensor_of_zeros_or_without_entries_says_nothing_of_scales() -> None:
    for x in (torch.zeros(3, 130), torch.zeros(0, 130)):
        assert tally(x, CPU.quantize(x, ACTIVATION)) == Tally()


def test_counts_of_experts_and_gradients_that_were_not_kept_are_tallied() -> None:
    x = random_matrix(140, 150)
    for backend in (CPU, Reference()):
        whole = backend.quantize(x, ALONG_TOKENS, groups=Groups.of((70, 0, 70)), saved=False)
        parts = [tally(part, backend.quantize(part, ALONG_TOKENS)) for part in x.split(70)]
        assert_same(tally(x, whole), parts[0] + parts[1])


def test_fp4_flushes_more_and_is_tallied_by_its_blocks() -> None:
    w = random_matrix(130, 140, spread=2.0)
    q = through_fp4(w)
    assert_same(tally(w, q), by_value(w, q))
    assert tally(w, q).flushed > 2 * tally(w, CPU.quantize(w, BLOCK)).flushed


def test_tiles_that_count_as_zero_are_told_and_have_no_scale() -> None:
    x = random_matrix(4, 128, spread=0)
    x[1] *= 2.0**-140
    q = CPU.quantize(x, ACTIVATION)
    found, healthy = tally(x, q), tally(x[[0, 2, 3]], CPU.quantize(x[[0, 2, 3]], ACTIVATION))
    lost = int((x[1] != 0).sum())
    assert lost > 50
    assert (found.lost, found.flushed - healthy.flushed) == (lost, lost)
    assert (found.low, found.high) == (healthy.low, healthy.high)
    # And an alarm tells of it, at once.
    (alarm,) = Drift().alarms({"head_gradients": found})
    assert "of its values lie in tiles too small for FP8" in alarm
    assert Drift().alarms({"head_gradients": healthy}) == []
    # Where there are no others there is no scale to speak of.
    nothing = tally(x[1:2], CPU.quantize(x[1:2], ACTIVATION))
    assert nothing.low > nothing.high
    assert len(Drift().alarms({"head_gradients": nothing})) == 1
    drift = Drift()
    for _ in range(BASELINE_SAMPLES):
        assert "fp8_scale_low/head_gradients" not in drift.figures({"head_gradients": nothing})
    assert drift.alarms({"head_gradients": healthy}) == []


def test_fp4_keeps_what_e4m3_would_lose() -> None:
    w = torch.full((128, 128), 2.0**-119)
    found = tally(w, through_fp4(w))
    assert (found.flushed, found.lost) == (0, 0)
    assert found.low <= found.high < -100


def test_a_value_that_is_not_a_number_takes_nothing_from_the_flushed() -> None:
    x = torch.zeros(4, 256)
    x[0, 0], x[1] = torch.nan, torch.linspace(-1, 1, 256)
    assert (
        tally(x, CPU.quantize(x, ACTIVATION)).flushed
        == tally(x[1:], CPU.quantize(x[1:], ACTIVATION)).flushed
    )


def test_a_role_sums_up_over_all_of_its_tensors() -> None:
    recorder, x = Recorder(), random_matrix(9, 130)
    first, second = x, random_matrix(9, 130, seed=1) * 2.0**20
    recorder.start(counting=True)
    for part in (first, second):
        recorder.note("head_activations", part, CPU.quantize(part, ACTIVATION))
    expected = [by_value(part, CPU.quantize(part, ACTIVATION)) for part in (first, second)]
    assert set(recorder.tallies) == {"head_activations"}
    assert_same(recorder.tallies["head_activations"], expected[0] + expected[1])
    recorder.start(counting=False)
    assert recorder.tallies == {}


def train(layer: Linear, x: Tensor, dy: Tensor) -> None:
    layer(x.requires_grad_()).backward(dy)


def test_only_a_watching_recorder_is_told() -> None:
    recorder = Recorder()
    layer = Linear(40, 30, Fp8("dense_ffn", Fp8Config(), "auto", recorder))
    torch.nn.init.ones_(layer.weight)
    broken = torch.full((5, 40), torch.nan)
    train(layer, broken, torch.ones(5, 30))
    assert recorder.tallies == {}
    assert recorder.first_not_finite() is None
    recorder.start(counting=False)
    train(layer, torch.ones(5, 40), torch.ones(5, 30))
    assert recorder.tallies == {}
    recorder.start(counting=True)
    train(layer, torch.ones(5, 40), torch.ones(5, 30))
    kinds = ("activations", "weights", "gradients", "gradients_along_tokens")
    roles = {f"dense_ffn_{kind}" for kind in (*kinds, "activations_along_tokens")}
    assert set(recorder.tallies) == roles
    assert recorder.tallies["dense_ffn_weights"].nonzero == 40 * 30
    before = dict(recorder.tallies)
    recorder.stop()
    train(layer, broken, torch.ones(5, 30))
    assert recorder.tallies == before
    assert recorder.first_not_finite() is None


def first_role(recorder: Recorder) -> str | None:
    place = recorder.first_not_finite()
    return None if place is None else recorder.role(place)


def test_the_first_role_that_was_not_finite_is_named() -> None:
    recorder = Recorder()
    layers = [
        Linear(40, 40, Fp8(part, Fp8Config(), "auto", recorder))
        for part in ("attention", "dense_ffn", "head")
    ]
    for layer in layers:
        torch.nn.init.eye_(layer.weight)
    x = torch.ones(5, 40)

    def run() -> str | None:
        recorder.start(counting=False)
        layers[2](layers[1](layers[0](x))).backward(torch.ones(5, 40))
        return first_role(recorder)

    assert run() is None
    with torch.no_grad():
        layers[1].weight[3, 4] = torch.inf
    assert run() == "dense_ffn_weights"
    x[2, 2] = torch.nan
    assert run() == "attention_activations"
    # And nothing of the last run is left.
    x[2, 2] = 1
    with torch.no_grad():
        layers[1].weight[3, 4] = 0
    assert run() is None
    recorder.start(counting=False)
    layers[0](x).backward(torch.full((5, 40), torch.inf))
    assert first_role(recorder) == "attention_gradients_along_tokens"
    recorder.forget()
    assert first_role(recorder) is None
