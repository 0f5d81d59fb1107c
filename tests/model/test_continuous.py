"""Decoding in every family: against whole passes, transformers' generate, and other rows."""

from collections.abc import Collection, Sequence

import pytest
import torch
from torch import Tensor, nn

from configs.engram import EngramConfig
from configs.errors import ConfigError
from configs.model import ModelConfig, V3Config, V4Config, YarnConfig
from model.decode import Sample, Session, generate, sample
from model.drawing import Drawing
from model.moe import MoE
from model.passes import Whole
from model.transformer import Transformer
from tests.model.test_v4 import twin as v4_twin
from tests.model.transformers_twin import continued_greedily, transformers_twin
from tests.references import random_model, random_tokens, tiny, tiny_v4, tiny_v32

YARN = YarnConfig(factor=4.0, original_max_position_embeddings=24)
CONTEXT = 96
CONFIGS: dict[str, ModelConfig] = {
    "v3": tiny(max_position_embeddings=CONTEXT),
    "v3 without query bottleneck": tiny(max_position_embeddings=CONTEXT, q_lora_rank=None),
    "v3 with yarn": tiny(max_position_embeddings=CONTEXT, rope_scaling=YARN),
    "v3.2": tiny_v32(max_position_embeddings=CONTEXT, index_topk=6),
    "v3.2 with yarn": tiny_v32(max_position_embeddings=CONTEXT, index_topk=9, rope_scaling=YARN),
    "v3 with memory": tiny(
        max_position_embeddings=CONTEXT,
        engram=EngramConfig(layer_ids=(0, 1), table_sizes=(50, 61), n_embed_per_ngram=16),
    ),
    "v4": tiny_v4(),
    "v4 with yarn": tiny_v4(rope_scaling=YARN, sliding_window=5),
}
"""Sparse ones with so many index heads that no two scores tie at 0."""
LENGTHS = [1, 3, 4, 7, 8, 9, 22, 33]
"""Below, at and over V4's window of 8, its blocks of 4 and 8, V3.2's 6 picked tokens, and the 16
tokens from which V4 picks blocks; steps carry the short ones over them all."""
SEEDS = [11, 12, 13, 14, 15, 16, 17, 18]


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request: pytest.FixtureRequest) -> Transformer:
    """One of each family, as far as decoding tells them apart."""
    return random_model(CONFIGS[request.param])


def prompts() -> list[list[int]]:
    """One for each of LENGTHS."""
    return [random_tokens(length, seed=length).tolist() for length in LENGTHS]


def draw(
    model: Transformer,
    asked: Sequence[int],
    *,
    stop_tokens: Collection[int] = (),
    max_rows: int | None = None,
    keep_experts: bool = False,
) -> list[Sample]:
    """Answers of 30 tokens to those prompts that `asked` numbers."""
    given = prompts()
    return sample(
        model,
        [given[i] for i in asked],
        max_new_tokens=30,
        drawing=Drawing(1.0),
        stop_tokens=stop_tokens,
        seeds=[SEEDS[i] for i in asked],
        max_rows=max_rows,
        keep_experts=keep_experts,
    )


def whole_logits(model: Transformer, tokens: Sequence[int]) -> Tensor:
    """[tokens, V] from one pass over one row."""
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([tokens]))[0]
    return logits


def test_every_step_gives_the_logits_of_a_whole_pass(model: Transformer) -> None:
    """At 40 positions of rows of different lengths, to 1e-4 of the logits' standard deviation."""
    texts = [random_tokens(length + 40, seed=length).tolist() for length in LENGTHS]
    expected = [whole_logits(model, text) for text in texts]
    with torch.inference_mode():
        session = Session(model, rows=len(texts), tokens=max(LENGTHS) + 40)
        found = [session.join([t[:n] for t, n in zip(texts, LENGTHS, strict=True)])]
        for step in range(40):
            following = [text[n + step] for text, n in zip(texts, LENGTHS, strict=True)]
            found.append(session.step(torch.tensor(following)))
    for row, (length, logits_SV) in enumerate(zip(LENGTHS, expected, strict=True)):
        steps_NV = torch.stack([logits_BV[row] for logits_BV in found])
        difference = (steps_NV - logits_SV[length - 1 :]).abs().max()
        assert float(difference) <= 1e-4 * float(logits_SV.std())


def test_a_row_does_not_notice_who_joins_and_who_leaves(model: Transformer) -> None:
    """A long row leaves, and a short one takes its place in caches that it must not read."""
    texts = [random_tokens(60, seed=seed).tolist() for seed in range(5)]
    expected = [whole_logits(model, text) for text in texts]
    rows: list[int] = []
    read: dict[int, int] = {}
    checked = 0

    def check(logits_BV: Tensor, numbers: Sequence[int]) -> int:
        for logits_V, number in zip(logits_BV, numbers, strict=True):
            wanted_V = expected[number][read[number] - 1]
            assert float((logits_V - wanted_V).abs().max()) <= 1e-4 * float(wanted_V.std())
        return len(numbers)

    with torch.inference_mode():
        session = Session(model, rows=3, tokens=60)
        # (who joins with how many tokens, who leaves) before each seven steps.
        turns: list[tuple[dict[int, int], list[int]]] = [
            ({0: 30, 1: 5, 2: 11}, []),
            ({3: 2}, [0]),
            ({}, [2]),
            ({4: 17}, []),
            ({0: 1}, [3]),
        ]
        for joining, leaving in turns:
            for number in leaving:
                row = rows.index(number)
                session.leave(row)
                rows[row] = rows[-1]
                rows.pop()
            if joining:
                read |= joining
                joined_BV = session.join([texts[i][:length] for i, length in joining.items()])
                rows += list(joining)
                checked += check(joined_BV, list(joining))
            for _ in range(7):
                logits_BV = session.step(torch.tensor([texts[i][read[i]] for i in rows]))
                for number in rows:
                    read[number] += 1
                checked += check(logits_BV, rows)
    assert checked == 6 + 7 * (3 + 3 + 2 + 3 + 3)


def test_fewer_rows_at_a_time_change_no_answer(model: Transformer) -> None:
    asked = range(len(LENGTHS))
    free = draw(model, asked)
    # Tokens that end answers at different steps, so that rows leave and join one by one.
    stops = {free[0].token_ids[3], free[5].token_ids[9], free[6].token_ids[20]}
    together = draw(model, asked, stop_tokens=stops)
    assert len({len(answer.token_ids) for answer in together}) > 3
    few = draw(model, asked, stop_tokens=stops, max_rows=3)
    for a, b in zip(together, few, strict=True):
        assert (a.token_ids, a.stopped) == (b.token_ids, b.stopped)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_any_of_several_stop_tokens_ends_an_answer(model: Transformer) -> None:
    asked = range(len(LENGTHS))
    free = draw(model, asked)
    stops = [free[1].token_ids[4], free[2].token_ids[8]]
    for before, answer in zip(free, draw(model, asked, stop_tokens=stops), strict=True):
        ends = [i + 1 for i, token in enumerate(before.token_ids) if token in stops]
        assert answer.token_ids == before.token_ids[: min(ends, default=30)]
        assert answer.stopped == bool(ends)


def test_experts_on_request_are_those_of_a_whole_pass(model: Transformer) -> None:
    answers = draw(model, [2, 0, 6], keep_experts=True, max_rows=2)
    blocks = [m for m in model.model.layers[: model.config.depth].modules() if isinstance(m, MoE)]
    for number, answer in zip([2, 0, 6], answers, strict=True):
        read = prompts()[number] + answer.token_ids[:-1]
        assert answer.experts is not None
        with torch.inference_mode():
            _, reports = model.read_and_report(Whole(torch.tensor([read]), routing=True))
        routings = {one.layer: one.routing for one in reports if one.load_E is not None}
        assert list(routings) == [block.layer for block in blocks]
        for layer, routing_TK in enumerate(routings.values()):
            assert routing_TK is not None
            # The order of a token's experts means nothing.
            expected = routing_TK.sort(-1).values
            assert torch.equal(
                torch.from_numpy(answer.experts[:, layer]).long().sort(-1).values, expected
            )
        shape = len(read), len(blocks), model.config.num_experts_per_tok
        assert answer.experts.shape == shape


@pytest.mark.parametrize(
    "family", ["v3", "v3 without query bottleneck", "v3 with yarn", "v3.2", "v4"]
)
def test_greedy_tokens_are_those_of_transformers(family: str) -> None:
    """64 of them, of prompts below and over window and top-k."""
    config = CONFIGS[family]
    theirs: nn.Module
    if isinstance(config, V4Config):
        ours = random_model(config)
        theirs = v4_twin(ours)
    else:
        assert isinstance(config, V3Config)
        ours, theirs = transformers_twin(config.model_copy(update={"num_nextn_predict_layers": 0}))
    for length in (3, 21):
        tokens_BS = random_tokens(3, length, seed=length)
        expected = continued_greedily(theirs, tokens_BS, 64)
        assert expected.shape == (3, length + 64)
        assert torch.equal(generate(ours, tokens_BS, max_new_tokens=64), expected)


def test_generate_fills_what_stopped_and_repeats_itself_under_one_seed() -> None:
    model, tokens_BS = random_model(), random_tokens(4, 5)

    def drawn(seed: int, stops: Sequence[int] = ()) -> Tensor:
        return generate(
            model, tokens_BS, max_new_tokens=20, temperature=1.0, stop_tokens=stops, seed=seed
        )

    free = drawn(1)
    assert free.shape == (4, 25)
    assert torch.equal(free[:, :5], tokens_BS)
    assert torch.equal(free, drawn(1))
    assert not torch.equal(free, drawn(2))
    stops = [int(free[0, 9]), int(free[2, 16])]
    stopped = drawn(1, stops)
    ends = []
    for before, after in zip(free[:, 5:].tolist(), stopped[:, 5:].tolist(), strict=True):
        reached = [i for i, token in enumerate(before) if token in stops]
        ends.append(reached[0] + 1 if reached else 20)
        assert after[: ends[-1]] == before[: ends[-1]]
        assert set(after[ends[-1] :]) <= {before[ends[-1] - 1]}
    assert min(ends) < max(ends)
    assert stopped.shape == (4, 5 + max(ends))


def test_experts_of_a_model_without_any_are_refused() -> None:
    model = random_model(tiny(first_k_dense_replace=2))
    with pytest.raises(ConfigError, match="no layer of the model has experts"):
        sample(
            model,
            [[1]],
            max_new_tokens=1,
            drawing=Drawing(),
            stop_tokens=(),
            seeds=[0],
            keep_experts=True,
        )


def everything(model: Transformer) -> dict[str, Tensor]:
    """All tensors that lie in modules, whether a save has them or not."""
    return {
        f"{name}.{attribute}": value
        for name, module in model.named_modules()
        for attribute, value in (vars(module) | module._parameters | module._buffers).items()
        if isinstance(value, Tensor)
    }


def test_sampling_leaves_a_training_model_as_it_was() -> None:
    model = random_model().train()
    before = {name: tensor.clone() for name, tensor in everything(model).items()}
    sample(
        model,
        [[1, 2]],
        max_new_tokens=3,
        drawing=Drawing(),
        stop_tokens=(),
        seeds=[0],
        keep_experts=True,
    )
    assert all(module.training for module in model.modules())
    after = everything(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
