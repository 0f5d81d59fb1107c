"""One rank or two, at once or resumed: the same training."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cluster.checkpoint import consolidate
from cluster.models import expert_parameter_names
from cluster.trainer import Trainer, build_trainer
from configs.engram import EngramConfig
from configs.errors import ArtifactError, TrainingError
from configs.model import ModelConfig
from configs.train import BalanceConfig, Fp8Config, Precision
from model.fp8 import scheme
from model.fp8.backends import Choice
from model.fp8.scheme import Numerics
from model.passes import IndexerPhase, Whole
from model.transformer import Predictions
from model.weights.families import to_hf
from model.weights.files import load_pretrained, read_tensors
from tests.cluster.jobs import OPTIM, NextToken, RandomBatches
from tests.ranks import on_ranks
from tests.references import TINY, random_model, tiny, tiny_v4, tiny_v32

RATE = 0.01
BALANCE = BalanceConfig(bias_update_speed=0.01)


def trainer(precision: Precision | Numerics = "high", seed: int = 0) -> Trainer:
    return build_trainer(TINY, optim=OPTIM, balance=BALANCE, precision=precision, seed=seed)


def train(one: Trainer, steps: range) -> list[dict[str, Any]]:
    """Reports of some steps of the shared batches."""
    reports = []
    for step in steps:
        batch = RandomBatches().batch(step, rank=one.rank, world=one.world)
        metrics: dict[str, Any] = dict(one.forward_backward(batch, NextToken()))
        reports.append(metrics | one.optim_step(RATE))
    return reports


def train_on_rank(folder: str) -> dict[str, Any]:
    """Two steps, and four with and without a save in between."""
    one = trainer()
    reports = train(one, range(1, 3))
    one.save(Path(folder))
    dist.barrier()
    weights = {name: tensor.clone() for name, tensor in one.state().items()}
    rest = train(one, range(3, 5))
    again = trainer(seed=99)
    again.load(Path(folder), step=2)
    resumed = train(again, range(3, 5))
    same = all(
        torch.equal(a, again.model.state_dict()[n]) for n, a in one.model.state_dict().items()
    )
    ranges = [list(local) for local in one.experts_here().values()]
    narrow, fp8_save = trainer("fp8"), Path(folder, "fp8")
    train(narrow, range(1, 3))
    narrow.save(fp8_save)
    dist.barrier()
    narrow_again = trainer("fp8", seed=99)
    narrow_again.load(fp8_save, step=2)
    fp8_rest, fp8_resumed = train(narrow, range(3, 5)), train(narrow_again, range(3, 5))
    return {
        "reports": reports,
        "weights": weights,
        "rest": rest,
        "resumed": resumed,
        "same": same,
        "ranges": ranges,
        "fp8_rest": fp8_rest,
        "fp8_resumed": fp8_resumed,
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two ranks save after step 2."""
    return tmp_path_factory.mktemp("save")


@pytest.fixture(scope="module")
def pair(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks did."""
    return on_ranks(2, tmp_path_factory.mktemp("ranks"), train_on_rank, str(saved))


def test_two_ranks_train_as_one_does(pair: list[dict[str, Any]]) -> None:
    alone = trainer()
    expected = train(alone, range(1, 3))
    assert expected[0]["grad_norm"] > OPTIM.max_grad_norm  # clipping takes part
    for rank in pair:
        for found, report in zip(rank["reports"], expected, strict=True):
            assert set(found) == set(report)
            for name in ("loss", "next", "grad_norm"):
                assert found[name] == pytest.approx(report[name], rel=1e-5)
            # Routing is a choice: it is the same or it is not.
            assert found["expert_load"] == report["expert_load"]
    own = alone.model.state_dict()
    sharded = expert_parameter_names(alone.model)
    for name, tensor in own.items():
        parts = [rank["weights"][name] for rank in pair if name in rank["weights"]]
        assert len(parts) == (2 if name in sharded else 1), name
        found = torch.cat(parts) if name in sharded else parts[0]
        # Gradients agree to about 1e-6; two steps of Adam magnify that 2 x lr / epsilon times.
        torch.testing.assert_close(found, tensor, rtol=0, atol=2e-5, msg=name)


def test_ranks_report_the_whole_and_never_a_part(pair: list[dict[str, Any]]) -> None:
    first, second = (rank["reports"] + rank["rest"] for rank in pair)
    assert first == second
    assert [rank["ranges"] for rank in pair] == [[[0, 1, 2, 3]] * 2, [[4, 5, 6, 7]] * 2]


def test_a_resumed_pair_repeats_the_uninterrupted_one_bit_for_bit(
    pair: list[dict[str, Any]],
) -> None:
    for rank in pair:
        assert rank["resumed"] == rank["rest"]
        assert rank["same"]
        assert rank["fp8_resumed"] == rank["fp8_rest"] != rank["rest"]


def test_one_rank_continues_what_two_ranks_saved(pair: list[dict[str, Any]], saved: Path) -> None:
    assert pair
    one = trainer(seed=99)
    one.load(saved, step=2)
    assert one.step == 2
    for found, expected in zip(train(one, range(3, 5)), pair[0]["rest"], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("precision", ["fp8", "high"])
def test_a_resumed_trainer_repeats_the_uninterrupted_one_bit_for_bit(
    precision: Precision, tmp_path: Path
) -> None:
    whole = trainer(precision)
    reports = train(whole, range(1, 5))
    first = trainer(precision)
    train(first, range(1, 3))
    first.save(tmp_path)
    second = trainer(precision, seed=99)
    second.load(tmp_path, step=2)
    assert train(second, range(3, 5)) == reports[2:]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], tensor), name
    assert reports[3]["loss"] < reports[0]["loss"]


@pytest.mark.parametrize(
    ("saved", "here", "told"),
    [
        ({}, {"hidden_size": 40}, r"is of shape \[.*\] there and of shape \[.*\] here"),
        (
            {},
            {"num_nextn_predict_layers": 0},
            r"layers\.2\..* there and absent here",
        ),
        ({"num_nextn_predict_layers": 0}, {}, r"layers\.2\..* is absent there and of shape"),
    ],
)
def test_a_save_of_another_model_is_refused_and_changes_nothing(
    saved: dict[str, int], here: dict[str, int], told: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"optim": OPTIM, "balance": BALANCE, "precision": "high"}
    base = {"num_nextn_predict_layers": 1}
    build_trainer(tiny(**base | saved), seed=0, **settings).save(tmp_path)
    other = build_trainer(tiny(**base | here), seed=1, **settings)
    before = {name: tensor.clone() for name, tensor in other.model.state_dict().items()}
    with pytest.raises(ArtifactError, match=told):
        other.load(tmp_path, step=2)
    assert other.step == 0
    assert all(torch.equal(before[n], t) for n, t in other.model.state_dict().items())


def test_a_memory_is_saved_continued_and_delivered(tmp_path: Path) -> None:
    memory = EngramConfig(
        layer_ids=(1,), table_sizes=(40, 40), n_embed_per_ngram=8, n_head_per_ngram=2
    )
    config = tiny(engram=memory)
    settings: dict[str, Any] = {"optim": OPTIM, "balance": BALANCE, "precision": "high"}
    whole = build_trainer(
        config, seed=0, vocabulary=[token // 2 for token in range(64)], **settings
    )
    train(whole, range(1, 3))
    whole.save(tmp_path / "save")
    delivered = tmp_path / "model"
    consolidate(tmp_path / "save", config, delivered)
    tokens_BS = RandomBatches().batch(9, rank=0, world=1)["tokens"]
    with torch.no_grad():
        found = load_pretrained(delivered)(tokens_BS)
        assert torch.equal(found, whole.model.eval()(tokens_BS))
    whole.model.train()
    resumed = build_trainer(config, seed=99, **settings)
    resumed.load(tmp_path / "save", step=2)
    assert train(resumed, range(3, 5)) == train(whole, range(3, 5))
    started = build_trainer(config, seed=99, **settings)
    started.load_whole(read_tensors(delivered))
    name = "model.layers.1.engram.canonical_ids"
    for other in (resumed, started):
        assert other.model.state_dict()[name].tolist() == [token // 2 for token in range(64)]
    rates = {group["lr"] for group in whole.optimizer.param_groups}
    assert rates == {RATE, RATE * OPTIM.table_rate_factor}


def test_the_load_of_a_layer_adds_up_and_moves_its_bias() -> None:
    one = trainer()
    before = {name: block.gate.e_score_correction_bias.clone() for name, block in blocks(one)}
    (report,) = train(one, range(1, 2))
    assert len(report["expert_load"]) == len(before) == 2
    for (name, block), load in zip(blocks(one), report["expert_load"], strict=True):
        assert sum(load) == pytest.approx(1, abs=1e-4)
        mean = 1 / TINY.n_routed_experts
        signs = [(mean > share) - (mean < share) for share in load]
        moved = block.gate.e_score_correction_bias - before[name]
        drift = 0.01 * sum(signs) / len(signs)
        assert moved.tolist() == pytest.approx([0.01 * s - drift for s in signs], abs=1e-7)
    assert not one.load_LE.any()
    assert report["imbalance"] == pytest.approx(
        max(map(max, report["expert_load"])) * 8 - 1, abs=1e-3
    )


def test_a_layer_that_was_not_used_has_no_load() -> None:
    """Where only the next token is predicted, the MTP layer is left out."""
    one = build_trainer(
        tiny(num_nextn_predict_layers=1), optim=OPTIM, balance=BALANCE, precision="high", seed=0
    )
    one.forward_backward(RandomBatches().batch(1, rank=0, world=1), SquareOfLogits())
    *used, unused = one.optim_step(RATE)["expert_load"]
    assert unused == [0.0] * 8
    assert all(sum(load) == pytest.approx(1, abs=1e-4) for load in used)


@pytest.mark.parametrize("hashed", [1, 4])
def test_imbalance_is_that_of_layers_which_can_be_balanced(hashed: int) -> None:
    config = tiny_v4(num_hash_layers=hashed, num_nextn_predict_layers=0)
    one = build_trainer(config, optim=OPTIM, balance=BALANCE, precision="high", seed=0)
    with torch.no_grad():
        # Every token of the first layer goes to the same two experts of eight.
        one.model.state_dict()["model.layers.0.mlp.gate.tid2eid"].copy_(torch.tensor([0, 1]))
    batch = RandomBatches().batch(1, rank=0, world=1)
    one.forward_backward(batch, SquareOfLogits())
    report = one.optim_step(RATE)
    worst = [max(load) * 8 - 1 for load in report["expert_load"]]
    assert len(worst) == 4
    assert worst[0] == pytest.approx(3.0)
    assert report["imbalance"] == pytest.approx(max([0.0, *worst[hashed:]]), abs=1e-3)
    assert report["imbalance"] < 3.0


@dataclass(frozen=True)
class SquareOfLogits:
    """A loss that uses the main model alone; with `indexer`, indexers learn beside it."""

    indexer: IndexerPhase = "off"
    indexer_weight: float = 1.0

    def counts(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        return {}

    @property
    def ahead(self) -> bool:
        return False

    def reads(self, batch: Mapping[str, Tensor]) -> Whole:
        return Whole(batch["tokens"], indexer=self.indexer)

    def __call__(
        self, predicted: Predictions, batch: Mapping[str, Tensor], totals: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, float]]:
        loss = predicted.next_BSV.square().mean()
        if predicted.indexer_loss is not None:
            loss = loss + self.indexer_weight * predicted.indexer_loss
        return loss, {}


def decaying(config: ModelConfig) -> Trainer:
    optim = OPTIM.model_copy(update={"weight_decay": 0.5})
    return build_trainer(config, optim=optim, balance=BALANCE, precision="high", seed=0)


@pytest.mark.parametrize("config", [tiny(num_nextn_predict_layers=1), tiny_v32(), tiny_v4()])
def test_what_has_no_gradient_does_not_decay(config: ModelConfig) -> None:
    """The MTP layer where one token is predicted, and an indexer that is not taught."""
    one = decaying(config)
    before = {name: p.detach().clone() for name, p in one.model.named_parameters()}
    for step in range(1, 4):
        one.forward_backward(RandomBatches().batch(step, rank=0, world=1), SquareOfLogits())
        one.optim_step(RATE)
    last = f"model.layers.{config.num_hidden_layers}."
    idle = {n for n in before if n.startswith(last) or "indexer" in n.split(".")}
    assert idle
    for name, parameter in one.model.named_parameters():
        assert torch.equal(parameter.detach(), before[name]) == (name in idle), name


def test_what_never_had_a_gradient_is_saved_and_continued(tmp_path: Path) -> None:
    whole = decaying(tiny_v32())
    losses: dict[int, IndexerPhase] = {1: "off", 2: "off", 3: "dense", 4: "dense"}

    def walk(one: Trainer, steps: range) -> None:
        for step in steps:
            batch = RandomBatches().batch(step, rank=0, world=1)
            one.forward_backward(batch, SquareOfLogits(losses[step]))
            one.optim_step(RATE)

    for saved in (2, 3):
        whole = decaying(tiny_v32())
        walk(whole, range(1, saved + 1))
        whole.save(tmp_path / str(saved))
        resumed = decaying(tiny_v32())
        resumed.load(tmp_path / str(saved), step=saved)
        walk(whole, range(saved + 1, 5))
        walk(resumed, range(saved + 1, 5))
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("config", [tiny_v32(), tiny_v4()], ids=["v32", "v4"])
def test_an_indexer_is_clipped_and_paced_by_itself(config: ModelConfig) -> None:
    """However large its gradient, the model's step is the same; and the other way round."""
    reports, moved = [], []
    for weight in (1.0, 1e4):
        one = decaying(config)
        before = {name: p.detach().clone() for name, p in one.model.named_parameters()}
        loss = SquareOfLogits("dense", indexer_weight=weight)
        one.forward_backward(RandomBatches().batch(1, rank=0, world=1), loss)
        squares = [
            p.grad.double().square().sum()
            for name, p in one.model.named_parameters()
            if "indexer" in name.split(".") and p.grad is not None
        ]
        report = one.optim_step(RATE, indexer_learning_rate=RATE / 100)
        assert report["indexer_grad_norm"] == pytest.approx(float(sum(squares)) ** 0.5)
        reports.append(report)
        named = list(one.model.named_parameters())
        moved.append({name: (p.detach() - before[name]).abs().max() for name, p in named})
        # The MTP layer's indexer has no part in this loss.
        state = [one.optimizer.state[p] for n, p in named if "indexer" in n.split(".")]
        first = [known["exp_avg"] for known in state if known]
        clipped = float(sum(m.double().square().sum() for m in first)) ** 0.5 / (1 - OPTIM.beta1)
        if weight > 1:
            assert clipped == pytest.approx(OPTIM.max_grad_norm, rel=1e-2)
    assert reports[1]["grad_norm"] == pytest.approx(reports[0]["grad_norm"], rel=1e-5)
    assert reports[1]["indexer_grad_norm"] > 1000 * OPTIM.max_grad_norm
    for name in moved[0]:
        if "indexer" in name.split("."):
            # An Adam step is no longer than its rate, and one hundredth of a weight decays.
            assert float(moved[1][name]) <= 1.6 * RATE / 100
        else:
            assert torch.equal(moved[0][name], moved[1][name]), name


def test_a_learner_without_an_indexer_reports_one_norm() -> None:
    one = trainer()
    one.forward_backward(RandomBatches().batch(1, rank=0, world=1), NextToken())
    assert "indexer_grad_norm" not in one.optim_step(RATE)


def blocks(one: Trainer) -> list[tuple[str, Any]]:
    return list(one.model.moe_layers().items())


def test_gradients_of_several_batches_add_up() -> None:
    one, two = trainer(), trainer()
    rows = RandomBatches().batch(1, rank=0, world=1)["tokens"]
    one.forward_backward({"tokens": rows}, NextToken())
    for half in rows.chunk(2):
        two.forward_backward({"tokens": half}, NextToken(scale=0.5))
    found, expected = two.optim_step(RATE)["grad_norm"], one.optim_step(RATE)["grad_norm"]
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_clipped_gradient_has_the_norm_that_was_asked_for() -> None:
    one = trainer()
    one.forward_backward(RandomBatches().batch(1, rank=0, world=1), NextToken())
    for group in one.optimizer.param_groups:
        group["weight_decay"] = 0.0
    norm = one.optim_step(0.0)["grad_norm"]
    assert norm > OPTIM.max_grad_norm
    # After the first step the first moment is (1 - beta1) times the clipped gradient.
    squares = [state["exp_avg"].double().square().sum() for state in one.optimizer.state.values()]
    clipped = math.sqrt(float(sum(squares))) / (1 - OPTIM.beta1)
    assert clipped == pytest.approx(OPTIM.max_grad_norm, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_training() -> None:
    with pytest.raises(TrainingError, match=r"step 1: not finite: .*nan"):
        trainer().forward_backward(
            RandomBatches().batch(1, rank=0, world=1), NextToken(scale=math.nan)
        )


def test_what_fp8_first_finds_not_finite_is_named() -> None:
    one = trainer("fp8")
    with torch.no_grad():
        dict(one.model.named_parameters())["model.layers.1.self_attn.o_proj.weight"][0, 0] = (
            math.nan
        )
    with pytest.raises(TrainingError, match="in FP8 first in attention weights; lower"):
        one.forward_backward(RandomBatches().batch(1, rank=0, world=1), NextToken())


def blame() -> str:
    """What a rank says of a NaN that lies on rank 1, in an expert of the last layer."""
    one = trainer("fp8")
    if one.rank == 1:
        with torch.no_grad():
            one.model.get_parameter(max(one.sharded)).view(-1)[0] = math.nan
    batch = RandomBatches().batch(1, rank=one.rank, world=one.world)
    try:
        one.forward_backward(batch, NextToken())
    except TrainingError as error:
        return str(error)
    return "nothing was wrong"


def test_all_ranks_name_what_was_not_finite_first_on_any_of_them(tmp_path: Path) -> None:
    first, second = on_ranks(2, tmp_path, blame)
    assert first == second
    assert ", in FP8 first in routed experts weights; lower" in first


def test_a_step_that_raises_leaves_no_recorder_behind() -> None:
    one = trainer("fp8")
    batch = RandomBatches().batch(1, rank=0, world=1)
    with pytest.raises(TypeError):
        one.forward_backward(batch, NextToken(scale="much"))  # type: ignore[arg-type]
    assert not one.numerics.recorder.watching
    # Two models of one job do not hear of each other.
    shared = Numerics("fp8")
    assert trainer(shared).numerics.recorder is not trainer(shared).numerics.recorder


def test_counting_changes_no_gradient() -> None:
    batch = RandomBatches().batch(1, rank=0, world=1)
    gradients = []
    for counting in (False, True):
        one = trainer("fp8")
        one.forward_backward(batch, NextToken(), counting=counting)
        gradients.append([p.grad for p in one.model.parameters()])
        assert bool(one.fp8_tallies()) == counting
    assert all(a is not None and torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_model_that_has_no_part_in_fp8_is_said_to_have_none() -> None:
    # V3 has no indexer.
    parts = Fp8Config(
        attention="high",
        dense_ffn="high",
        shared_experts="high",
        routed_experts="high",
        indexer="fp8",
    )
    one = trainer(Numerics("fp8", parts))
    assert one.numerics.precision == "high"
    assert one.news()["notes"] == [f"warning: {one.computing.products}"]
    assert "none of this model's" in one.computing.products
    one.parallel = True
    assert one.fp8_tallies() == {}


def counted(one: Trainer) -> dict[str, list[float]]:
    batch = RandomBatches().batch(1, rank=one.rank, world=one.world)
    one.forward_backward(batch, NextToken(), counting=True)
    return {
        role: [seen.nonzero, seen.clipped, seen.flushed, seen.low, seen.high]
        for role, seen in one.fp8_tallies().items()
    }


def count_on_rank() -> dict[str, list[float]]:
    return counted(trainer("fp8"))


def test_tallies_of_fp8_are_those_of_all_ranks_together(tmp_path: Path) -> None:
    alone, pair = counted(trainer("fp8")), on_ranks(2, tmp_path, count_on_rank)
    assert pair[0] == pair[1]
    assert pair[0].keys() == alone.keys()
    parts = ["attention", "dense_ffn", "shared_experts", "routed_experts"]
    wanted = {f"{part}_{kind}" for part in parts for kind in ("activations", "weights")}
    assert wanted | {f"{part}_gradients_along_tokens" for part in parts} <= alone.keys()
    for role, (nonzero, clipped, _, low, high) in pair[0].items():
        assert clipped == 0
        assert low <= high < 0
        if role.startswith("routed_experts") and not role.endswith("weights"):
            # A token that visits experts of both ranks is there twice.
            assert alone[role][0] <= nonzero <= 2 * alone[role][0], role
            continue
        # Every rank has a copy of the weights that are not experts.
        copies = 2 if role.endswith("weights") and not role.startswith("routed") else 1
        assert nonzero == pytest.approx(copies * alone[role][0], rel=1e-3), role


@pytest.mark.parametrize("precision", ["fp8", "high"])
def test_a_run_says_who_multiplies(precision: Precision) -> None:
    told = trainer(precision).news()
    products = trainer(precision).computing.products
    assert told["tags"] == {"fp8.products": products, "device": "cpu", "compute": "float32"}
    assert ("cpu: " in told["tags"]["fp8.products"]) == (precision == "fp8")
    assert "notes" not in told


def test_nothing_is_counted_unless_asked() -> None:
    one = trainer("fp8")
    one.forward_backward(RandomBatches().batch(1, rank=0, world=1), NextToken())
    assert one.fp8_tallies() == {}


def test_a_device_without_fp8_computes_in_high_precision_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scheme, "choose", lambda *_: Choice(None, "it is too old"))
    one = trainer("fp8")
    assert one.numerics.precision == "high"
    assert one.computing.products == "high precision, not FP8: it is too old"
    # It was asked for one and got the other.
    assert one.news()["notes"] == ["warning: high precision, not FP8: it is too old"]


def test_a_gradient_that_is_not_finite_changes_no_weight() -> None:
    one = trainer()
    one.forward_backward(RandomBatches().batch(1, rank=0, world=1), NextToken())
    gradient = one.model.get_parameter(min(one.sharded)).grad
    assert gradient is not None
    gradient.view(-1)[0] = math.inf
    before = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    with pytest.raises(TrainingError, match="step 1: not finite: grad_norm inf"):
        one.optim_step(RATE)
    assert all(torch.equal(before[n], t) for n, t in one.model.state_dict().items())


def test_a_trainer_takes_its_part_of_a_whole_checkpoint() -> None:
    model = random_model(seed=1)
    one = trainer(seed=0)
    one.load_whole(to_hf(TINY, model.state_dict()))
    for name, tensor in model.state_dict().items():
        assert torch.equal(one.model.state_dict()[name], tensor), name
