"""What FP8 costs on a CPU: training steps in either precision, side by side in one process."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from cluster.trainer import Trainer
from configs.model import V3Config
from configs.recipe import load_recipe
from configs.train import Precision
from stages.pretrain.objective import PretrainLoss

pytestmark = pytest.mark.slow

ROUNDS = 9
PRECISIONS: tuple[Precision, ...] = ("fp8", "high")
TINY = load_recipe("tiny")
WIDE = TINY.model.model_copy(
    update={
        "hidden_size": 1024,
        "num_hidden_layers": 2,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": 384,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "intermediate_size": 2048,
        "moe_intermediate_size": 512,
        "num_attention_heads": 16,
    }
)
"""A step that fits a small machine, at a width where products outweigh all else."""
LIMITS = {"tiny": 1.4, "hidden 1024": 1.25}


def trainer(model: V3Config, precision: Precision) -> Trainer:
    train = TINY.pretrain
    return Trainer(model, optim=train.optim, balance=train.balance, precision=precision, seed=0)


def batch_of(sequences: int) -> dict[str, Tensor]:
    shape = (sequences, TINY.data.sequence_tokens)
    generator = torch.Generator().manual_seed(0)
    return {"tokens": torch.randint(2, TINY.model.vocab_size, shape, generator=generator)}


def seconds(one: Trainer, batch: dict[str, Tensor]) -> float:
    train = TINY.pretrain
    loss = PretrainLoss(train.mtp_loss_weight, train.balance.sequence_loss_weight, False)
    begin = time.perf_counter()
    one.forward_backward(batch, loss)
    one.optim_step(1e-4)
    return time.perf_counter() - begin


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("name", "sequences"), [("tiny", 8), ("hidden 1024", 8)])
def test_an_fp8_step_against_a_float32_step(name: str, sequences: int) -> None:
    model = TINY.model if name == "tiny" else WIDE
    assert isinstance(model, V3Config)
    with one_thread():
        trainers = {precision: trainer(model, precision) for precision in PRECISIONS}
        batch = batch_of(sequences)
        times: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
        for _ in range(ROUNDS):
            for precision, one in trainers.items():
                times[precision].append(seconds(one, batch))
    ratios = [fp8 / high for fp8, high in zip(times["fp8"], times["high"], strict=True)][1:]
    tokens = batch["tokens"].numel()
    rate = {precision: tokens / statistics.median(taken[1:]) for precision, taken in times.items()}
    ratio = statistics.median(ratios)
    print(
        f"\n{name}: fp8 {rate['fp8']:,.0f} tokens/s, float32 {rate['high']:,.0f}; an fp8 step "
        f"takes {ratio:.2f} times a float32 step (median of {len(ratios)}, {min(ratios):.2f} to "
        f"{max(ratios):.2f}; limit {LIMITS[name]})"
    )
    assert 1 < ratio < 1.5 * LIMITS[name]


def kept_bytes(one: Trainer, batch: dict[str, Tensor], parameters_too: bool = False) -> int:
    """Bytes of distinct storages that wait for the backward pass."""
    own = {p.untyped_storage().data_ptr() for p in one.model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if parameters_too or storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        predicted = one.model.predict(batch["tokens"])
        loss = predicted.next_BSD.sum()
    total = sum(seen.values())
    del loss
    return total


def test_what_waits_for_the_backward_pass() -> None:
    """BF16 is measured as the same model cast to it: what high precision keeps on a GPU."""
    batch = batch_of(8)
    figures = {}
    for name, model in (("tiny", TINY.model), ("hidden 1024", WIDE)):
        assert isinstance(model, V3Config)
        for precision in PRECISIONS:
            figures[name, precision] = kept_bytes(trainer(model, precision), batch)
        narrow = trainer(model, "high")
        narrow.model.bfloat16()
        figures[name, "bf16"] = kept_bytes(narrow, batch)
    tokens = batch["tokens"].numel()
    for (name, kind), size in figures.items():
        print(
            f"\n{name}, {kind}: {size / 2**20:.1f} MiB, {size / tokens:,.0f} bytes a token", end=""
        )
    assert figures["hidden 1024", "fp8"] < figures["hidden 1024", "high"]
