"""DeepSeek-V4 whole: against transformers' model, its own caches, and the released sizes."""

import time
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from configs.model import V4Config
from model.decode import Session, sample
from model.drawing import Drawing
from model.passes import IndexerPhase, Whole
from model.transformer import Transformer
from tests.model.transformers_twin import continued_greedily
from tests.references import TINY_V4, random_model, random_tokens, tiny_v4

YARN = {"factor": 16.0, "original_max_position_embeddings": 32}
KINDS = {
    "window": "sliding_attention",
    "csa": "compressed_sparse_attention",
    "hca": "heavily_compressed_attention",
}
"""transformers' names."""


def twin(model: Transformer) -> DeepseekV4ForCausalLM:
    """transformers' model of the same shape with the same weights."""
    config = model.config
    assert isinstance(config, V4Config)
    kinds = [config.attention_kind(layer) for layer in range(config.depth)]
    hashed = [config.routes_by_hash(layer) for layer in range(config.depth)]
    same = (
        "vocab_size hidden_size moe_intermediate_size num_hidden_layers num_attention_heads "
        "head_dim qk_rope_head_dim q_lora_rank num_experts_per_tok n_routed_experts "
        "n_shared_experts routed_scaling_factor max_position_embeddings rope_theta "
        "compress_rope_theta hc_mult hc_sinkhorn_iters hc_eps swiglu_limit sliding_window "
        "o_groups o_lora_rank index_n_heads index_head_dim index_topk rms_norm_eps"
    )
    rope = None
    if config.rope_scaling is not None:
        # This family knows no magnitudes.
        rope = config.rope_scaling.model_dump(exclude={"mscale", "mscale_all_dim"})
        rope["rope_type"] = "yarn"
    theirs = DeepseekV4Config(
        **{name: getattr(config, name) for name in same.split()},
        layer_types=[KINDS[kind] for kind in kinds],
        compress_rates={KINDS["csa"]: config.csa_ratio, KINDS["hca"]: config.hca_ratio},
        mlp_layer_types=["hash_moe" if by_hash else "moe" for by_hash in hashed],
        rope_parameters=rope,
    )
    other = DeepseekV4ForCausalLM(theirs)
    other.eval()
    mtp = f"model.layers.{config.depth}."
    weights = {n: v for n, v in model.state_dict().items() if not n.startswith(mtp)}
    other.load_state_dict(weights, strict=True)
    return other


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in standard deviations of what is expected."""
    return float((found - expected).abs().max() / expected.std())


SHAPES: list[dict[str, object]] = [
    {},
    {"rope_scaling": YARN},
    {"num_hash_layers": 0, "num_nextn_predict_layers": 0},
    {"num_hash_layers": 2, "swiglu_limit": 0.3, "routed_scaling_factor": 2.5},
    {"num_hidden_layers": 1, "compress_ratios": (0,)},
    {"num_hidden_layers": 2, "compress_ratios": (4, 4), "sliding_window": 3, "index_topk": 2},
    {"num_hidden_layers": 2, "compress_ratios": (8, 8), "head_dim": 16, "rope_scaling": YARN},
    {"num_hidden_layers": 3, "compress_ratios": (3, 0, 5), "csa_ratio": 3, "hca_ratio": 5},
    {"hc_mult": 2, "o_groups": 4, "num_attention_heads": 8, "qk_rope_head_dim": 2},
    {"hc_mult": 3, "hc_sinkhorn_iters": 4, "n_shared_experts": 1, "num_experts_per_tok": 5},
    {"index_n_heads": 40, "index_head_dim": 8, "index_topk": 7, "sliding_window": 20},
]


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_logits_are_those_of_transformers(changes: dict[str, object]) -> None:
    model = random_model(tiny_v4(**changes), seed=1)
    other = twin(model)
    with torch.inference_mode():
        # Around the window, both ratios and the top-k, up to the whole context.
        for length in (3, 8, 9, 17, 23, 96):
            tokens_BS = random_tokens(2, length, seed=length)
            assert apart(model(tokens_BS), other(tokens_BS, use_cache=False).logits) < 1e-4


def run(session: Session, rows: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
    """For each row, the logits after its prompt and after each of its later tokens."""
    prompts = [row[:n].tolist() for row, n in zip(rows, lengths, strict=True)]
    found = [[logits_V] for logits_V in session.join(prompts)]
    for step in range(len(rows[0]) - max(lengths)):
        after = session.step(torch.stack([r[n + step] for r, n in zip(rows, lengths, strict=True)]))
        for so_far, logits_V in zip(found, after, strict=True):
            so_far.append(logits_V)
    return [torch.stack(row) for row in found]


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": YARN}, *SHAPES[4:8]], ids=str)
def test_cached_steps_give_the_logits_of_the_whole_text(changes: dict[str, object]) -> None:
    """Rows of different lengths, whose next tokens cross window, ratios and top-k together."""
    model, lengths = random_model(tiny_v4(**changes)), [1, 3, 4, 8, 20, 33]
    tokens_BS = random_tokens(6, 64)
    with torch.inference_mode():
        expected = model(tokens_BS)
        found = run(Session(model, rows=6, tokens=64), list(tokens_BS), lengths)
    for row, length in enumerate(lengths):
        steps = len(found[row])
        assert apart(found[row], expected[row, length - 1 : length - 1 + steps]) < 1e-4


def test_rows_that_join_and_leave_change_no_other_row() -> None:
    model = random_model(TINY_V4)
    tokens_BS = random_tokens(3, 70)
    with torch.inference_mode():
        expected = model(tokens_BS)
        session = Session(model, rows=2, tokens=70)
        session.join([tokens_BS[0, :9].tolist(), tokens_BS[1, :22].tolist()])
        for step in range(5):
            session.step(tokens_BS[[0, 1], [9 + step, 22 + step]])
        # Row 1 takes number 0, and row 2 joins behind it.
        session.leave(0)
        first = session.join([tokens_BS[2, :30].tolist()])
        assert apart(first[0], expected[2, 29]) < 1e-4
        for step in range(30):
            found = session.step(tokens_BS[[1, 2], [27 + step, 30 + step]])
            assert apart(found[0], expected[1, 27 + step]) < 1e-4
            assert apart(found[1], expected[2, 30 + step]) < 1e-4


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": YARN}], ids=str)
def test_greedy_answers_are_those_of_transformers(changes: dict[str, object]) -> None:
    model = random_model(tiny_v4(**changes))
    prompts_BS = random_tokens(3, 21, seed=2)
    other = twin(model)
    expected = continued_greedily(other, prompts_BS, 64)
    found = sample(
        model,
        prompts_BS.tolist(),
        max_new_tokens=64,
        drawing=Drawing(),
        stop_tokens=(),
        seeds=[0, 1, 2],
    )
    assert [answer.token_ids for answer in found] == expected[:, 21:].tolist()


def test_packed_documents_read_as_they_do_alone() -> None:
    """The second begins where blocks of both ratios do, so that its own fall alike."""
    model = random_model(TINY_V4)
    tokens_BS = random_tokens(1, 60)
    segments_BS = (torch.arange(60) >= 24).long()[None]
    with torch.inference_mode():
        packed = model(tokens_BS, segments_BS)
        assert apart(packed[:, :24], model(tokens_BS[:, :24])) < 1e-4
        assert apart(packed[:, 24:], model(tokens_BS[:, 24:])) < 1e-4


def loss_of(model: Transformer, tokens_BS: Tensor, phase: IndexerPhase) -> Tensor:
    predictions = model.predict(tokens_BS, indexer=phase)
    after = predictions.after_next_BSV
    assert after is not None
    loss = F.cross_entropy(predictions.next_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten())
    loss = loss + F.cross_entropy(after[:, :-2].flatten(0, 1), tokens_BS[:, 2:].flatten())
    if predictions.indexer_loss is not None:
        loss = loss + predictions.indexer_loss
    return loss


@pytest.mark.parametrize("phase", ["off", "dense", "sparse"])
def test_gradients_of_the_whole_model_are_those_of_finite_differences(phase: IndexerPhase) -> None:
    model, tokens_BS = random_model(TINY_V4).double(), random_tokens(1, 30)
    loss_of(model, tokens_BS, phase).backward()
    # The indexer's loss reaches the indexers alone, but would change if the rest moved.
    moved = [p for n, p in model.named_parameters() if ("indexer" in n) == (phase != "off")]
    slopes = [p.grad for p in moved if p.grad is not None]
    assert len(slopes) == len(moved)
    generator = torch.Generator().manual_seed(7)
    directions = [torch.randn(p.shape, generator=generator).to(p) for p in moved]
    slope = torch.stack([(s * d).sum() for s, d in zip(slopes, directions, strict=True)]).sum()
    values = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for p, d in zip(moved, directions, strict=True):
                p.add_(d, alpha=step)
            values.append(loss_of(model, tokens_BS, phase))
    # A step too small to change a choice; its square and round-off leave about 1e-8.
    expected = (values[0] - values[1]) / 2e-6
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-7)


def pro() -> V4Config:
    return V4Config(
        family="v4",
        hidden_size=7168,
        num_hidden_layers=61,
        num_attention_heads=128,
        q_lora_rank=1536,
        o_groups=16,
        compress_ratios=(128, 128, *(4, 128) * 29, 4),
        index_topk=1024,
        moe_intermediate_size=3072,
        n_routed_experts=384,
        routed_scaling_factor=2.5,
        max_position_embeddings=1_048_576,
        num_nextn_predict_layers=0,
    )


FLASH = V4Config(family="v4", max_position_embeddings=1_048_576, num_nextn_predict_layers=0)


@pytest.mark.parametrize(
    ("config", "numbers"),
    [(FLASH, 284_334_567_511), (pro(), 1_572_999_528_803)],
    ids=["flash", "pro"],
)
def test_released_sizes_are_met_to_the_last_number(config: V4Config, numbers: int) -> None:
    """Biases of routing and tables of hash layers included; built without memory, and fast."""
    start = time.monotonic()
    with torch.device("meta"):
        model = Transformer(config)
    assert time.monotonic() - start < 10
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == numbers
    assert config.parameters() == numbers
    # Nothing lies outside of what is saved.
    assert {name for name, _ in model.named_buffers()} <= model.state_dict().keys()


def test_the_same_seed_starts_the_same_model_and_tables_name_distinct_experts() -> None:
    first, second = (Transformer(TINY_V4).initialize(3).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    table_VK = first["model.layers.0.mlp.gate.tid2eid"]
    assert all(len(set(row)) == TINY_V4.num_experts_per_tok for row in table_VK.tolist())
    assert {int(expert) for expert in table_VK.unique()} == set(range(TINY_V4.n_routed_experts))


def test_the_mtp_layer_is_none_of_the_layers_that_logits_come_from() -> None:
    model = random_model(TINY_V4)
    tokens_BS = random_tokens(2, 20)
    with torch.inference_mode():
        before = model(tokens_BS)
        for parameter in model.model.layers[-1].parameters():
            parameter.add_(1.0)
        assert torch.equal(model(tokens_BS), before)
        assert set(model.new_caches(1, 8)) <= set(model.model.layers[:-1].modules())


def test_prefill_without_caches_is_the_same_as_with_them() -> None:
    model, tokens_BS = random_model(TINY_V4), random_tokens(2, 50)
    with torch.inference_mode():
        batch = Whole(tokens_BS, caches=model.new_caches(2, 50), lengths_B=torch.tensor([50, 31]))
        torch.testing.assert_close(model.logits(model.read(batch)), model(tokens_BS))
