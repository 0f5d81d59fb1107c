"""Slow twins that several tests compare with: the shortest obvious code, and no cleverness.

The small model that they run on stands here too.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from configs.model import ModelConfig, V3Config, V4Config, V32Config
from configs.train import Precision
from model.attention import LATENT_NORM_EPSILON, LatentAttention
from model.fp8.groups import Groups
from model.fp8.quantized import Quantized
from model.fp8.scheme import Numerics
from model.moe import Gate, MoE
from model.multiquery import Sight
from model.passes import Whole
from model.transformer import Transformer

TINY = V3Config(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    num_attention_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=12,
    intermediate_size=48,
    moe_intermediate_size=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    max_position_embeddings=32,
    initializer_range=0.2,
)
"""Every part of the family in a few thousand weights; no two widths agree by accident."""


def tiny(**changes: object) -> V3Config:
    """`TINY` with some fields changed, checked again."""
    return V3Config.model_validate(TINY.model_dump() | changes)


TINY_V32 = V32Config.model_validate(
    TINY.model_dump() | {"family": "v32", "index_n_heads": 32, "index_head_dim": 6, "index_topk": 5}
)
"""`TINY` with an indexer, of so many heads that no two scores are ever 0 at once."""


def tiny_v32(**changes: object) -> V32Config:
    """`TINY_V32` with some fields changed, checked again."""
    return V32Config.model_validate(TINY_V32.model_dump() | changes)


TINY_V4 = V4Config(
    family="v4",
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    head_dim=24,
    qk_rope_head_dim=8,
    q_lora_rank=20,
    o_groups=2,
    o_lora_rank=12,
    sliding_window=8,
    compress_ratios=(0, 4, 8, 4),
    csa_ratio=4,
    hca_ratio=8,
    index_n_heads=32,
    index_head_dim=16,
    index_topk=4,
    moe_intermediate_size=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    num_hash_layers=1,
    max_position_embeddings=96,
    initializer_range=0.2,
)
"""Layers of all kinds, in which 20 tokens cross the window, both ratios and the top-k."""


def tiny_v4(**changes: object) -> V4Config:
    """`TINY_V4` with some fields changed, checked again."""
    return V4Config.model_validate(TINY_V4.model_dump() | changes)


def random_model(
    config: ModelConfig = TINY, *, seed: int = 0, precision: Precision | Numerics = "high"
) -> Transformer:
    """A model in evaluation mode whose norms and routing biases are random as well.

    Freshly initialised ones are all ones or zeros, which would hide where they are applied.
    """
    model = Transformer(config, precision=precision).initialize(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            prefix, _, leaf = name.rpartition(".")
            constants = getattr(model.get_submodule(prefix), "initial_values", {})
            if tensor.is_floating_point() and (tensor.dim() == 1 or leaf in constants):
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def random_tokens(*shape: int, seed: int = 0, config: ModelConfig = TINY) -> Tensor:
    """Uniform token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, shape, generator=generator)


def reading(x_BSD: Tensor, *, balance: bool = False, routing: bool = False) -> Whole:
    """A pass for modules that read these rows and not their tokens, which are all 0."""
    tokens_BS = torch.zeros(x_BSD.shape[:2], dtype=torch.int64, device=x_BSD.device)
    return Whole(tokens_BS, balance=balance, routing=routing)


def quantize_by_tiles(
    x: Tensor,
    tile: tuple[int, int],
    power_of_two: bool = False,
    counts: Sequence[int] | None = None,
) -> Quantized:
    """`quantize` of a matrix, tile after tile, with torch's own float8 cast."""
    if counts is not None:
        parts = [quantize_by_tiles(part, tile, power_of_two) for part in x.split(list(counts))]
        joined_values = torch.cat([q.values for q in parts])
        joined_scales = torch.cat([q.scales for q in parts])
        return Quantized(joined_values, joined_scales, tile, Groups.of(counts))
    x = x.float()
    rows, columns = x.shape
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(math.ceil(rows / tile[0]), math.ceil(columns / tile[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            inside = (
                slice(i * tile[0], (i + 1) * tile[0]),
                slice(j * tile[1], (j + 1) * tile[1]),
            )
            if not bool(x[inside].isfinite().all()):
                scales[i, j] = torch.nan
                values[inside] = torch.nan
                continue
            scale = x[inside].abs().max() / 448.0
            if scale < 2.0**-126:
                scale = torch.tensor(1.0)
            elif power_of_two:
                scale = torch.tensor(next_power_of_two(float(scale)))
            scales[i, j] = scale
            values[inside] = (x[inside] / scale).to(torch.float8_e4m3fn)
    return Quantized(values, scales, tile)


def exact_by_tiles(q: Quantized) -> Tensor:
    """The matrix that `q` stands for, tile after tile: float64 holds each product exactly."""
    out = q.unpadded().values.double()
    first = row = 0
    for count in (len(out),) if q.groups is None else q.groups.on_host:
        for begin in range(first, first + count, q.tile[0]):
            rows = slice(begin, min(begin + q.tile[0], first + count))
            for j in range(q.scales.shape[1]):
                out[rows, j * q.tile[1] : (j + 1) * q.tile[1]] *= q.scales[row, j].double()
            row += 1
        first += count
    return out


def relative_gap(x: Tensor, y: Tensor) -> float:
    """1 - 2 <x, y> / (|x|^2 + |y|^2): 0 for equal tensors, 1 for unrelated ones."""
    x, y = x.detach().double().flatten(), y.detach().double().flatten()
    return float((x - y).square().sum() / (x.square().sum() + y.square().sum()))


def flushed_share(before: Tensor, after: Tensor) -> float:
    """What part of the values that were there became zero."""
    there = before != 0
    return float((after[there] == 0).double().mean())


def next_power_of_two(value: float) -> float:
    """The least power of two that is not below `value`, by counting up."""
    power = 2.0**-149
    while power < value:
        power *= 2
    return power


def through_fp8(x: Tensor, tile: tuple[int, int]) -> Tensor:
    """What is left of `x` after a trip through float8."""
    return exact_by_tiles(quantize_by_tiles(x, tile)).float()


def through_e5m6(x: Tensor) -> Tensor:
    """What 12 bits a value leave of finite rows, scaled by powers of two for each 128 columns."""
    parts = []
    for part in x.double().split(128, 1):
        scales = [next_power_of_two(float(row.abs().max().float() / 65024)) for row in part]
        scale = torch.tensor(scales, dtype=torch.float64)[:, None]
        # A leading bit and six more, in steps of 2^-20 at least.
        exponent = (part / scale).frexp().exponent.clamp_min(-13)
        step = torch.ldexp(torch.ones_like(part), exponent - 7)
        parts.append((part / scale / step).round() * step * scale)
    return torch.cat(parts, 1).float()


def fp8_products(
    x_TI: Tensor, w_OI: Tensor, dy_TO: Tensor, *, saves_e5m6: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, dx, dw) of an FP8 Linear: the three GEMMs of DeepSeek-V3, section 3.3, written out."""
    x8, w8 = through_fp8(x_TI, (1, 128)), through_fp8(w_OI, (128, 128))
    saved = through_e5m6(x_TI) if saves_e5m6 else x8
    dx = through_fp8(dy_TO, (1, 128)) @ w8
    dw = through_fp8(dy_TO, (128, 1)).T @ through_fp8(saved, (128, 1))
    return x8 @ w8.T, dx, dw


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate x) * up x) from three weights [out, in]."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def route(gate: Gate, x_D: Tensor) -> dict[int, Tensor]:
    """One token's experts and their weights, by DeepSeek-V3 eq. 12-16 with Python's own sort."""
    config = gate.config
    assert isinstance(config, V3Config)
    scores = [torch.sigmoid(x_D @ row) for row in gate.weight]
    biases = gate.e_score_correction_bias.tolist()
    choice = [float(s.detach()) + b for s, b in zip(scores, biases, strict=True)]
    size = config.n_routed_experts // config.n_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(config.n_group)]
    groups.sort(key=lambda group: -sum(sorted(choice[e] for e in group)[-2:]))
    reachable = [expert for group in groups[: config.topk_group] for expert in group]
    chosen = sorted(reachable, key=lambda e: -choice[e])[: config.num_experts_per_tok]
    total = sum(scores[e] for e in chosen) if config.norm_topk_prob else 1.0
    return {e: scores[e] / total * config.routed_scaling_factor for e in chosen}


def moe_by_token(moe: MoE, x_TD: Tensor) -> Tensor:
    """The MoE block, one token and one expert at a time."""
    shared, experts = moe.shared_experts, moe.experts
    rows = []
    for x_D in x_TD:
        y_D = swiglu(x_D, *(p.weight for p in (shared.gate_proj, shared.up_proj, shared.down_proj)))
        for expert, weight in route(moe.gate, x_D).items():
            gate, up = experts.gate_up_proj[expert].chunk(2)
            y_D = y_D + weight * swiglu(x_D, gate, up, experts.down_proj[expert])
        rows.append(y_D)
    return torch.stack(rows)


def rotate_as_complex(x_SR: Tensor, theta: float) -> Tensor:
    """Row p turned by p * theta^(-2i / R) in each pair (2i, 2i + 1), as complex numbers."""
    length, width = x_SR.shape
    rate = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * rate
    pairs = torch.view_as_complex(x_SR.double().reshape(length, -1, 2).contiguous())
    return torch.view_as_real(pairs * torch.exp(1j * angle)).flatten(1)


def latent_attention(
    block: LatentAttention, x_SD: Tensor, allowed_SS: Tensor
) -> tuple[Tensor, Tensor]:
    """Eq. 1-11 of DeepSeek-V3 for one sequence, head by head in float64.

    The output, and the probabilities [S, S] summed over heads.
    """
    config, x_SD = block.config, x_SD.double()
    nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
    w = {name: parameter.detach().double() for name, parameter in block.named_parameters()}
    compressed = x_SD @ w["kv_a_proj_with_mqa.weight"].T
    latent_SC = _latent_norm(compressed[:, : config.kv_lora_rank], w["kv_a_layernorm.weight"])
    shared_key = rotate_as_complex(compressed[:, config.kv_lora_rank :], config.rope_theta)
    expanded = latent_SC @ w["kv_b_proj.weight"].T
    outputs, mass_SS = [], torch.zeros(len(x_SD), len(x_SD), dtype=torch.float64)
    if config.q_lora_rank is None:
        queries = x_SD @ w["q_proj.weight"].T
    else:
        bottleneck = _latent_norm(x_SD @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"])
        queries = bottleneck @ w["q_b_proj.weight"].T
    for head in range(config.num_attention_heads):
        q = queries[:, head * (nope + rope) : (head + 1) * (nope + rope)]
        kv = expanded[
            :, head * (nope + config.v_head_dim) : (head + 1) * (nope + config.v_head_dim)
        ]
        q_rope = rotate_as_complex(q[:, nope:], config.rope_theta)
        score = q[:, :nope] @ kv[:, :nope].T + q_rope @ shared_key.T
        score = (score / (nope + rope) ** 0.5).masked_fill(~allowed_SS, float("-inf"))
        outputs.append(score.softmax(-1) @ kv[:, nope:])
        mass_SS += score.softmax(-1)
    return torch.cat(outputs, 1) @ w["o_proj.weight"].T, mass_SS


def _latent_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMS norm with the latent norms' own epsilon, which is not the model's."""
    return x / (x.square().mean(-1, keepdim=True) + LATENT_NORM_EPSILON).sqrt() * weight


def attend_by_query(
    q_BSHW: Tensor, kv_BSW: Tensor, blocks_BLW: Tensor, sinks_H: Tensor, sight: Sight
) -> tuple[Tensor, Tensor]:
    """V4's attention, one query and head at a time; also each query's weight of each block."""
    rows, length, heads, width = q_BSHW.shape
    out, mass = torch.zeros_like(q_BSHW), torch.zeros(rows, length, blocks_BLW.shape[1]).double()
    for b in range(rows):
        segment = [0] * length if sight.segments_BS is None else sight.segments_BS[b].tolist()
        for t in range(length):
            tokens = [
                s for s in range(length) if t - sight.window < s <= t and segment[s] == segment[t]
            ]
            blocks = [
                i
                for i in range(blocks_BLW.shape[1])
                if (i + 1) * sight.ratio - 1 <= t
                and segment[(i + 1) * sight.ratio - 1] == segment[t]
                and (sight.chosen_BSK is None or i in sight.chosen_BSK[b, t].tolist())
            ]
            entries = torch.stack(
                [kv_BSW[b, s] for s in tokens] + [blocks_BLW[b, i] for i in blocks]
            )
            for h in range(heads):
                scores = entries @ q_BSHW[b, t, h] * width**-0.5
                weights = torch.cat([scores, sinks_H[h : h + 1]]).softmax(0)[:-1]
                out[b, t, h] = weights @ entries
                for i, weight in zip(blocks, weights[len(tokens) :], strict=True):
                    mass[b, t, i] += weight
    return out, mass
