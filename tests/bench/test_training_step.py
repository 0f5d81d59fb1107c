"""What FP8 costs on a CPU: training steps in either precision, side by side in one process."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from cluster.trainer import Trainer, build_trainer
from configs.model import V3Config
from configs.reading import load_recipe
from configs.train import Precision
from stages.pretrain.objective import PretrainLoss
from tests.bench import machine
from tests.references import reading

pytestmark = pytest.mark.slow

ROUNDS = 25
"""The first is not counted."""
FEW, MANY = 8, 24
"""Sequences, between which what waits for the backward pass is compared."""
PRECISIONS: tuple[Precision, ...] = ("fp8", "high")
TINY = load_recipe("tiny")
assert isinstance(TINY.model, V3Config)
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
MODELS: dict[str, V3Config] = {"tiny": TINY.model, "hidden 1024": WIDE}
LIMITS = {"tiny": 1.4, "hidden 1024": 1.25}


def trainer(model: V3Config, precision: Precision) -> Trainer:
    train = TINY.pretraining["pretrain"]
    return build_trainer(
        model, optim=train.optim, balance=train.balance, precision=precision, seed=0
    )


def batch_of(sequences: int) -> dict[str, Tensor]:
    shape = (sequences, TINY.data.sequence_tokens)
    generator = torch.Generator().manual_seed(0)
    return {"tokens": torch.randint(2, TINY.model.vocab_size, shape, generator=generator)}


def seconds(one: Trainer, batch: dict[str, Tensor]) -> float:
    train = TINY.pretraining["pretrain"]
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


def times_of_a_float32_step(name: str, sequences: int) -> float:
    """What an FP8 step takes, printed: the median over rounds of one beside the other."""
    model = MODELS[name]
    with one_thread():
        told = machine.describe()
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
    print(f"\n{told}")
    print(
        f"{name}: fp8 {rate['fp8']:,.0f} tokens/s, float32 {rate['high']:,.0f}; an fp8 step "
        f"takes {ratio:.2f} times a float32 step (median of {len(ratios)}, {min(ratios):.2f} to "
        f"{max(ratios):.2f}; limit {LIMITS[name]})"
    )
    return ratio


@pytest.mark.parametrize("name", LIMITS)
def test_an_fp8_step_against_a_float32_step(name: str) -> None:
    assert times_of_a_float32_step(name, 8) <= LIMITS[name]


def kept_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of distinct storages, parameters' own left out, that wait for the backward pass."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    # Until here the pass holds them, so that no storage is met again at another's address.
    assert result.requires_grad
    return sum(seen.values())


def kept_by(one: Trainer, part: str, sequences: int) -> int:
    """What waits after the whole model, or after one MoE block alone."""
    model = one.model
    if part == "model":
        return kept_bytes(model, lambda: model.predict(batch_of(sequences)["tokens"]).next_BSD)
    block = model.get_submodule("model.layers.1.mlp")
    tokens, width = TINY.data.sequence_tokens, model.config.hidden_size
    dtype = model.lm_head.weight.dtype
    x_BSD = torch.randn(sequences, tokens, width, dtype=dtype, requires_grad=True)
    return kept_bytes(block, lambda: block(x_BSD, reading(x_BSD))[0])


@pytest.mark.parametrize("part", ["model", "MoE block"])
@pytest.mark.parametrize("name", LIMITS)
def test_what_waits_for_the_backward_pass(name: str, part: str) -> None:
    """Bytes a token: what grows with the tokens. The rest are FP8's copies of the weights.

    BF16 is the same model cast to it. Attention keeps its own tensors in float32 in any case.
    """
    config = MODELS[name]
    trainers: dict[str, Trainer] = {p: trainer(config, p) for p in PRECISIONS}
    trainers["bf16"] = trainer(config, "high")
    trainers["bf16"].model.bfloat16()
    a_token, fixed = {}, {}
    for kind, one in trainers.items():
        few, many = kept_by(one, part, FEW), kept_by(one, part, MANY)
        a_token[kind] = (many - few) / batch_of(MANY - FEW)["tokens"].numel()
        fixed[kind] = few - a_token[kind] * batch_of(FEW)["tokens"].numel()
    told = ", ".join(f"{kind} {size:,.0f}" for kind, size in a_token.items())
    print(f"\n{name}, {part}: bytes a token {told}; FP8 copies of weights {fixed['fp8']:,.0f}")
    assert a_token["fp8"] < a_token["high"]
    if part == "MoE block":
        assert a_token["fp8"] < a_token["bf16"]
