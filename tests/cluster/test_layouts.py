"""However ranks hold a model, it trains as in one process; and any layout reads any save."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.layouts import (
    MODELS,
    Layout,
    gradients,
    joined,
    logical,
    saved,
    train,
    trainer,
)
from tests.ranks import apart, on_ranks

ONE = Layout()
LAYOUTS = [
    Layout(2),
    Layout(2, ep=1),
    Layout(4),
    Layout(4, ep=2),
    Layout(4, nodes=2),
    Layout(4, idle=True),
    Layout(4, permuted=5),
]
QUICK = Layout(2, ep=1)
COPIES = [
    Layout(4, copies=True),
    Layout(4, copies=True, permuted=1),
    Layout(4, copies=True, permuted=2),
]
STEPS = 20


def see(layout: Layout, folder: str) -> dict[str, Any]:
    """All that a rank finds in a layout, of each family."""
    found: dict[str, Any] = {}
    for name in MODELS:
        exact = trainer(name, layout, exact=True)
        grads = gradients(exact, name, layout)
        reports = train(exact, name, layout, range(1, STEPS + 1))
        weights = logical(exact, {n: t for n, t in exact.state().items() if t.is_floating_point()})
        plain = trainer(name, layout)
        first = train(plain, name, layout, [1])
        train(plain, name, layout, [2])
        plain.save(Path(folder, name))
        _meet(layout)
        rest = train(plain, name, layout, [3, 4])
        again = trainer(name, layout, seed=99)
        again.load(Path(folder, name), step=2)
        resumed = train(again, name, layout, [3, 4])
        state = again.model.state_dict()
        found[name] = {
            "grads": grads,
            "exact": reports,
            "weights": weights,
            "first": first[0],
            "told": sorted(plain.state()),
            "sharded": sorted(plain.sharded),
            "resumed": resumed == rest
            and all(torch.equal(t, state[n]) for n, t in plain.model.state_dict().items())
            and (again.load_average_LE == plain.load_average_LE).all().item(),
        }
    return found


def read_all(layout: Layout, saves: str, into: str) -> bool:
    """Read every layout's save and write it again."""
    for name in MODELS:
        for save in sorted(Path(saves).iterdir()):
            one = trainer(name, layout, seed=99)
            one.load(save / name, step=2)
            one.save(Path(into, save.name, name))
    _meet(layout)
    return True


def _meet(layout: Layout) -> None:
    if layout.world > 1:
        dist.barrier()


def run(layout: Layout, folder: Path, function: Any, *arguments: Any) -> list[Any]:
    if layout.world == 1:
        return [apart(folder, function, *arguments, seconds=300)]
    return on_ranks(layout.world, folder, function, *arguments, seconds=300)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, Any]:
    """What one process finds."""
    found: dict[str, Any] = run(ONE, root / "one", see, ONE, str(root / "saves" / str(ONE)))[0]
    return found


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(one, id=str(one), marks=[] if one == QUICK else pytest.mark.slow)
        for one in LAYOUTS
    ],
)
def ranks(request: pytest.FixtureRequest, root: Path) -> list[dict[str, Any]]:
    """What each rank of a layout finds."""
    layout: Layout = request.param
    saves = root / "saves" / str(layout)
    return run(layout, root / str(layout), see, layout, str(saves))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_in_float64_are_those_of_one_process(
    ranks: list[dict[str, Any]], alone: dict[str, Any], name: str
) -> None:
    found = joined([rank[name]["grads"] for rank in ranks])
    wanted = alone[name]["grads"]
    assert found.keys() == wanted.keys()
    for parameter, grad in wanted.items():
        bound = 1e-9 * float(grad.abs().max()) + 1e-15
        torch.testing.assert_close(found[parameter], grad, rtol=0, atol=bound, msg=parameter)


@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps_in_float64_are_those_of_one_process(
    ranks: list[dict[str, Any]], alone: dict[str, Any], name: str
) -> None:
    wanted = alone[name]["exact"]
    assert wanted[-1]["loss"] < wanted[0]["loss"]
    for rank in ranks:
        for found, report in zip(rank[name]["exact"], wanted, strict=True):
            assert found.keys() == report.keys()
            for key, value in report.items():
                if key == "expert_load":
                    assert found[key] == value
                else:
                    assert found[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key
    state = joined([rank[name]["weights"] for rank in ranks])
    assert state.keys() == alone[name]["weights"].keys()
    for parameter, tensor in alone[name]["weights"].items():
        torch.testing.assert_close(state[parameter], tensor, rtol=1e-9, atol=1e-9, msg=parameter)


@pytest.mark.parametrize("name", MODELS)
def test_the_first_step_in_float32_is_that_of_one_process(
    ranks: list[dict[str, Any]], alone: dict[str, Any], name: str
) -> None:
    wanted = alone[name]["first"]
    for rank in ranks:
        for key in ("loss", "next_token_loss", "grad_norm"):
            assert rank[name]["first"][key] == pytest.approx(wanted[key], rel=1e-5)
        assert rank[name]["first"]["expert_load"] == wanted["expert_load"]


@pytest.mark.parametrize("name", MODELS)
def test_what_is_resumed_repeats_to_the_last_bit(ranks: list[dict[str, Any]], name: str) -> None:
    assert all(rank[name]["resumed"] for rank in ranks)


@pytest.mark.parametrize("name", MODELS)
def test_each_tensor_is_told_and_saved_once(
    request: pytest.FixtureRequest, ranks: list[dict[str, Any]], root: Path, name: str
) -> None:
    layout: Layout = request.node.callspec.params["ranks"]
    tellers = Counter(tensor for rank in ranks for tensor in rank[name]["told"])
    sharded = set(ranks[0][name]["sharded"])
    ep = layout.ep or layout.world
    assert tellers == {one: ep if one in sharded else 1 for one in tellers}
    for place, rank in enumerate(ranks):
        file = root / "saves" / str(layout) / name / f"rank-{place}-of-{layout.world}.safetensors"
        held = {key.partition("#")[0] for key in load_file(file)}
        weights = {tensor for tensor in held if "/" not in tensor}
        assert weights == set(rank[name]["told"])
        # Moments lie with the owners, and no other's.
        moments = {one.partition("/")[2] for one in held if one.startswith("exp_avg/")}
        assert moments <= weights


@pytest.mark.slow
def test_every_layout_reads_every_save(
    request: pytest.FixtureRequest, root: Path, alone: dict[str, Any]
) -> None:
    """Of the layouts that were run before."""
    saves = root / "saves"
    assert alone
    written = {save.name: save for save in saves.iterdir()}
    assert len(written) > 1
    layouts = {str(one): one for one in [ONE, *LAYOUTS]}
    for label in written:
        layout = layouts[label]
        again = root / "again" / label
        assert all(run(layout, root / f"read-{label}", read_all, layout, str(saves), str(again)))
        for other in written:
            for name in MODELS:
                before, after = saved(saves / other / name), saved(again / other / name)
                assert before.keys() == after.keys()
                for tensor, values in before.items():
                    assert torch.equal(after[tensor], values), (label, other, name, tensor)


def train_in_copies(layout: Layout) -> dict[str, Any]:
    """Three steps, and what this rank owns then."""
    found = {}
    for name in MODELS:
        one = trainer(name, layout)
        reports = train(one, name, layout, [1, 2, 3])
        found[name] = {"reports": reports, "state": logical(one, one.state())}
    return found


@pytest.mark.slow
def test_where_experts_live_changes_no_bit(root: Path) -> None:
    """With a row for each copy: a rank's sum of several experts would be added up elsewhere."""
    first, *others = [run(layout, root / str(layout), train_in_copies, layout) for layout in COPIES]
    for name in MODELS:
        expected = joined([rank[name]["state"] for rank in first])
        for ranks in others:
            assert ranks[0][name]["reports"] == first[0][name]["reports"]
            found = joined([rank[name]["state"] for rank in ranks])
            for parameter, tensor in expected.items():
                assert torch.equal(found[parameter], tensor), parameter
