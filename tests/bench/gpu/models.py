"""The models that the benchmark trains and samples, on the device, with batches for them."""

from typing import Literal

import torch
from torch import nn

from cluster.backend import BACKENDS
from cluster.models import Computing
from cluster.trainer import Batch, Trainer
from configs.model import V3Config
from configs.reading import load_recipe
from configs.train import BalanceConfig, OptimConfig
from model.fp8.recorder import Recorder
from model.fp8.scheme import Numerics, settle
from model.transformer import Transformer
from stages.pretrain.objective import PretrainLoss
from tests.bench.gpu.setting import Setting

Precision = Literal["float32", "bf16", "fp8"]

_tiny = load_recipe("tiny").model
assert isinstance(_tiny, V3Config)
TINY: V3Config = _tiny
ONE_BILLION = V3Config(
    vocab_size=32768,
    hidden_size=1024,
    num_hidden_layers=12,
    first_k_dense_replace=1,
    num_attention_heads=16,
    q_lora_rank=512,
    kv_lora_rank=256,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    intermediate_size=4096,
    moe_intermediate_size=512,
    n_routed_experts=48,
    n_shared_experts=1,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    num_nextn_predict_layers=0,
    max_position_embeddings=4096,
)
"""About a billion parameters, of which a token meets a quarter."""
SLICE = V3Config(
    vocab_size=32768,
    hidden_size=7168,
    num_hidden_layers=2,
    first_k_dense_replace=0,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    n_routed_experts=32,
    n_shared_experts=1,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    num_nextn_predict_layers=0,
    max_position_embeddings=4096,
)
"""DeepSeek-V3's widths in two layers of as many experts as one device of its training held."""


def numerics_of(precision: Precision, device: torch.device) -> tuple[Numerics, str]:
    """What a device computes in where that is asked of it, and in words by what."""
    wanted = Numerics(
        "fp8" if precision == "fp8" else "high",
        recorder=Recorder(),
        compute=torch.float32 if precision == "float32" else torch.bfloat16,
    )
    return settle(wanted, device)


def trainer_of(
    config: V3Config, precision: Precision, device: torch.device, *, drawn: bool = False
) -> Trainer:
    """A trainer on `device`; `drawn` as a run draws its weights, which takes minutes for many."""
    numerics, products = numerics_of(precision, device)
    if drawn:
        model = Transformer(config, precision=numerics).initialize(0).to(device)
    else:
        with device:
            model = Transformer(config, precision=numerics)
        fill(model)
    computing = Computing(numerics, products, "fp8" if precision == "fp8" else "high")
    return Trainer(
        model.train(),
        computing,
        optim=OptimConfig(),
        balance=BalanceConfig(),
        backend=BACKENDS[device.type],
    )


def fill(model: nn.Module) -> None:
    """Random weights where they lie."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(1.0)


def batch_of(
    config: V3Config, shape: tuple[int, int], *, documents: int, seed: int = 0
) -> tuple[Batch, PretrainLoss]:
    """Rows of so many documents each, on the host, and their loss; 1 stands for whole texts."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BS = torch.randint(2, config.vocab_size, shape, generator=generator)
    if documents > 1:
        tokens_BS[:, :: -(-shape[1] // documents)] = 0
    return {"tokens": tokens_BS}, PretrainLoss(0.3, 1e-4, attend_across_documents=documents == 1)


def small(config: V3Config, setting: Setting) -> V3Config:
    """`config`, in a short round with little in it."""
    if not setting.short:
        return config
    return config.model_copy(
        update={
            "vocab_size": 64,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "q_lora_rank": 64,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "intermediate_size": 128,
            "moe_intermediate_size": 128,
            "n_routed_experts": 16,
        }
    )


def active_parameters(model: nn.Module, config: V3Config) -> float:
    """Parameters a token meets: routed experts count by the share chosen, the embedding not."""
    share = config.num_experts_per_tok / config.n_routed_experts
    total = 0.0
    for name, parameter in model.named_parameters():
        routed = ".experts." in name and "shared" not in name
        if "embed_tokens" not in name:
            total += parameter.numel() * (share if routed else 1)
    return total


def token_flops(config: V3Config, length: int) -> float:
    """Of a token's training, in a whole text of `length` tokens.

    Six for each parameter that it meets, two forward and four backward; and twelve for each pair of
    widths of queries and of values times the half of the keys that it sees, in every head.
    """
    with torch.device("meta"):
        active = active_parameters(Transformer(config), config)
    widths = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return 6 * active + 6 * config.num_hidden_layers * widths * length / 2
