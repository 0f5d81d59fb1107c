"""The memory against loops over plain integers, finite differences, and its own decoding.

Axes: B rows, S positions, N streams, D width, M tokens of an n-gram, H tables.
"""

import itertools
from collections.abc import Mapping
from unicodedata import ucd_3_2_0

import pytest
import torch
from tokenizers import Regex, normalizers
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from configs.engram import EngramConfig
from configs.errors import ConfigError
from configs.model import ModelConfig
from model.decode import Session
from model.engram import (
    Engram,
    MemoryTable,
    canonical_ids,
    engram_before,
    multipliers,
    set_vocabulary,
)
from model.fp8.scheme import HIGH
from model.passes import Caches, Remembering, Step, Whole
from model.transformer import Transformer
from tests.references import random_model, random_tokens, tiny, tiny_v4

MEMORY = EngramConfig(
    layer_ids=(0, 1),
    table_sizes=(50, 61, 70),
    n_embed_per_ngram=12,
    n_head_per_ngram=3,
    kernel_size=3,
    seed=7,
    pad_id=5,
)
"""N-grams of 2 to 4 tokens; the convolution looks back over 8."""
FOLDED = [token // 2 for token in range(64)]
"""A vocabulary in which tokens 2k and 2k + 1 spell the same."""
SEGMENTS = torch.tensor([[0] * 5 + [1] * 1 + [2] * 8, [3] * 14])


def memory(config: ModelConfig | None = None, *, layer: int = 1, seed: int = 0) -> Engram:
    """A memory in float64 whose parameters are all random and whose vocabulary is folded."""
    engram = engram_before(config or tiny(engram=MEMORY), layer, HIGH)
    assert engram is not None
    engram.double().set_vocabulary(FOLDED)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in engram.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return engram


def states(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# --- Hashing ---------------------------------------------------------------------------------


def as_int64(number: int) -> int:
    """What is left of an integer in 64 bits with a sign."""
    return (number + 2**63) % 2**64 - 2**63


def rows_of_ngrams(engram: Engram, tokens: list[int], segments: list[int]) -> list[list[int]]:
    """Rows [S][H] in the stacked tables, with Python's integers."""
    config, factors = engram.config, engram.multipliers.tolist()
    canonical = engram.canonical_ids.tolist()
    found = []
    for position, segment in enumerate(segments):
        rows, start = [], 0
        for length, sizes in enumerate(config.table_rows(engram.layer), start=2):
            mixed = 0
            for back in range(length):
                there = position - back
                known = there >= 0 and segments[there] == segment
                token = tokens[there] if known else config.pad_id
                mixed ^= as_int64(canonical[token] * factors[back])
            for size in sizes:
                rows.append(start + mixed % size)
                start += size
        found.append(rows)
    return found


@pytest.mark.parametrize("huge", [False, True], ids=["drawn", "overflowing"])
@pytest.mark.parametrize("layer", [0, 1])
def test_rows_are_those_of_plain_integers(layer: int, huge: bool) -> None:
    engram = memory(layer=layer)
    if huge:  # Products wrap around, and hashes are negative; rows are not.
        engram.multipliers.copy_(torch.tensor([2**63 - 1, 2**62 + 1, -(2**61) + 1, 2**60 - 1]))
    tokens_BS = random_tokens(2, 14)
    index_BSH = engram.table_index(engram._ngrams(Whole(tokens_BS, SEGMENTS)))
    for row in range(2):
        expected = rows_of_ngrams(engram, tokens_BS[row].tolist(), SEGMENTS[row].tolist())
        assert index_BSH[row].tolist() == expected
    assert int(index_BSH.min()) >= 0
    assert int(index_BSH.max()) < engram.table.weight.shape[0]


def test_without_segments_a_row_is_one_document() -> None:
    engram = memory()
    tokens_BS = random_tokens(1, 9)
    index_BSH = engram.table_index(engram._ngrams(Whole(tokens_BS)))
    assert index_BSH[0].tolist() == rows_of_ngrams(engram, tokens_BS[0].tolist(), [0] * 9)


def test_every_table_is_reached_and_none_is_shared() -> None:
    engram = memory()
    tokens_BS = random_tokens(32, 64)
    index_BSH = engram.table_index(engram._ngrams(Whole(tokens_BS)))
    sizes = [rows for heads in MEMORY.table_rows(1) for rows in heads]
    for table, (first, last) in enumerate(itertools.pairwise([0, *itertools.accumulate(sizes)])):
        rows = index_BSH[..., table].unique()
        assert first <= int(rows.min())
        assert int(rows.max()) < last
        # 2048 n-grams leave a row of 60 empty with probability e^-34 if hashes are spread evenly;
        # the 1024 bigrams at hand are fewer and not independent.
        assert len(rows) > 0.9 * (last - first)


def test_one_ngram_has_one_place_whatever_comes_before_or_how_it_is_spelt() -> None:
    engram = memory()
    tokens_BS = torch.tensor([[9, 1, 20, 30, 40, 50], [8, 7, 21, 31, 41, 51]])
    first_H, second_H = engram.table_index(engram._ngrams(Whole(tokens_BS)))[:, -1]
    assert first_H.tolist() == second_H.tolist()
    other_H = engram.table_index(engram._ngrams(Whole(tokens_BS + 2)))[0, -1]
    assert not (first_H == other_H).all()


def test_multipliers_are_odd_fit_and_follow_from_seed_and_layer() -> None:
    config = EngramConfig(table_sizes=(10,) * 9, n_embed_per_ngram=8)
    largest = []
    for vocabulary in (2, 64, 99_092, 129_280):
        drawn = multipliers(config, 3, vocabulary).tolist()
        assert all(factor % 2 == 1 and factor > 0 for factor in drawn)
        assert max(drawn) * (vocabulary - 1) < 2**63
        largest.append(max(drawn) * vocabulary / 2**63)
    # Ten draws from the whole range: the largest is in its upper half but once in a thousand.
    assert min(largest) > 0.5
    assert len(set(drawn)) == 10
    assert multipliers(config, 3, 129_280).tolist() == drawn
    assert multipliers(config, 4, 129_280).tolist() != drawn
    reseeded = config.model_copy(update={"seed": 10007})
    assert multipliers(reseeded, 2, 129_280).tolist() == drawn


def test_layers_read_different_rows() -> None:
    tokens_BS = random_tokens(2, 14)
    model = random_model(tiny(engram=MEMORY))
    first, second = (m for m in model.modules() if isinstance(m, Engram))
    assert not torch.equal(first.multipliers, second.multipliers)
    rows = [engram.table_index(engram._ngrams(Whole(tokens_BS))) for engram in (first, second)]
    assert float((rows[0] == rows[1]).double().mean()) < 0.1


# --- The vocabulary --------------------------------------------------------------------------


def test_tokens_that_spell_the_same_share_a_number() -> None:
    fruit = ["Apple", " apple", "ÀPPLE", "ａｐｐｌｅ", "pear", "apples"]
    assert canonical_ids(fruit) == [0, 0, 0, 0, 1, 2]
    assert canonical_ids(["Ⅳ", "iv", "\n", "  ", "a  b", "A\tB", "ab"]) == [0, 0, 1, 1, 2, 2, 3]


def test_what_folding_would_leave_nothing_of_stands_for_itself() -> None:
    accent, other = "\u0301", "\u0300"
    assert canonical_ids([accent, "", other, accent, ""]) == [0, 1, 2, 0, 1]


def test_pieces_of_characters_are_never_the_same() -> None:
    assert canonical_ids(["\ufffd", "x", "\ufffd", "X"]) == [0, 1, 2, 1]


def test_ids_of_no_token_are_never_the_same() -> None:
    assert canonical_ids([None, "", None, "x", ""]) == [0, 1, 2, 3, 1]


def test_folding_is_that_of_the_published_normaliser() -> None:
    published = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), "\ue000"),
            normalizers.Strip(),
            normalizers.Replace("\ue000", " "),
        ]
    )
    # Python and the library know Unicode in different versions: characters as old as 3.2 only.
    old = [chr(c) for c in range(0x20, 0xFFFD) if ucd_3_2_0.category(chr(c)) not in ("Cn", "Cs")]
    letters = [letter for letter in old if letter != "\ue000"]
    texts = [*letters, *(f"A{letter} \t{letter}\n" for letter in letters)]
    numbers: dict[str, int] = {}
    expected = [
        numbers.setdefault(published.normalize_str(text) or text, len(numbers)) for text in texts
    ]
    assert canonical_ids(texts) == expected


def test_ids_past_the_tokenizers_keep_numbers_of_their_own() -> None:
    engram = memory()
    engram.set_vocabulary([0, 1, 0, 1, 2])
    assert engram.canonical_ids.tolist() == [0, 1, 0, 1, 2, *range(3, 62)]
    assert torch.equal(engram.multipliers, multipliers(MEMORY, 1, 62))


def test_more_tokens_than_the_model_has_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"vocab_size = 64 is below the 65 tokens"):
        set_vocabulary(random_model(tiny(engram=MEMORY)), [0] * 65)


def test_the_vocabulary_travels_with_the_weights() -> None:
    config = tiny(engram=MEMORY)
    told, fresh = random_model(config), random_model(config, seed=1)
    set_vocabulary(told, FOLDED)
    tokens_BS = random_tokens(2, 14)
    even_BS = tokens_BS // 2 * 2
    index = [
        engram.table_index(engram._ngrams(Whole(tokens)))
        for tokens in (tokens_BS, even_BS)
        for engram in told.modules()
        if isinstance(engram, Engram)
    ]
    assert torch.equal(index[0], index[2])
    assert torch.equal(index[1], index[3])
    fresh.load_state_dict(told.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(tokens_BS), told(tokens_BS))
        set_vocabulary(fresh, range(64))
        assert not torch.allclose(fresh(tokens_BS), told(tokens_BS), atol=1e-3)


# --- The whole memory ------------------------------------------------------------------------


def by_position(engram: Engram, h_SND: Tensor, tokens: list[int], segments: list[int]) -> Tensor:
    """The memory as its paper defines it: one position, stream and channel after another."""
    length, streams, width = h_SND.shape
    weights = {name: p.detach() for name, p in engram.named_parameters()}
    epsilon, config = engram.query_norm.epsilon, engram.config

    def norm(x_D: Tensor, name: str, stream: int) -> Tensor:
        weight_D = weights[f"{name}.weight"][stream * width : (stream + 1) * width]
        return x_D / (x_D.square().mean() + epsilon).sqrt() * weight_D

    rows = rows_of_ngrams(engram, tokens, segments)
    keys = weights["key_proj.weight"].split(width)
    out = h_SND.clone()
    for stream in range(streams):
        gated, normed = [], []
        for position in range(length):
            memory_E = torch.cat([weights["table.weight"][row] for row in rows[position]])
            key_D = norm(keys[stream] @ memory_E, "key_norm", stream)
            query_D = norm(h_SND[position, stream], "query_norm", stream)
            dot = float(query_D @ key_D) / width**0.5
            root = max(abs(dot), 1e-6) ** 0.5 * (1 if dot > 0 else -1)
            gate = 1 / (1 + torch.exp(torch.tensor(-root, dtype=torch.float64)))
            gated.append(gate * (weights["value_proj.weight"] @ memory_E))
            normed.append(norm(gated[-1], "short_conv.norm", stream))
        for position, channel in itertools.product(range(length), range(width)):
            total = 0.0
            for back in range(config.kernel_size):
                there = position - back * config.max_ngram_size
                if there >= 0 and segments[there] == segments[position]:
                    taps_K = weights["short_conv.weight"][stream * width + channel]
                    total += float(taps_K[config.kernel_size - 1 - back] * normed[there][channel])
            silu = float(F.silu(torch.tensor(total, dtype=torch.float64)))
            out[position, stream, channel] += gated[position][channel] + silu
    return out


@pytest.mark.parametrize("config", [tiny(engram=MEMORY), tiny_v4(engram=MEMORY)], ids=["v3", "v4"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_memory_is_its_definition(config: ModelConfig, packed: bool) -> None:
    engram = memory(config)
    tokens_BS, h_BSND = random_tokens(2, 14), states(2, 14, config.streams, 32)
    segments_BS = SEGMENTS if packed else torch.zeros(2, 14, dtype=torch.int64)
    out_BSND = engram(h_BSND, Whole(tokens_BS, SEGMENTS if packed else None))
    for row in range(2):
        expected_SND = by_position(
            engram, h_BSND[row], tokens_BS[row].tolist(), segments_BS[row].tolist()
        )
        # Sums of 36 float64 products in another order.
        torch.testing.assert_close(out_BSND[row], expected_SND, rtol=1e-10, atol=1e-11)


def test_at_the_start_the_convolution_adds_nothing() -> None:
    engram = Transformer(tiny(engram=MEMORY)).initialize(0).model.layers[1].engram
    assert isinstance(engram, Engram)
    batch, h_BSND = Whole(random_tokens(2, 9)), states(2, 9, 1, 32).float()
    memory_BSE = engram.table(engram.table_index(engram._ngrams(batch))).flatten(2)
    value_BSND = engram.gated_values(h_BSND, memory_BSE)
    assert value_BSND.abs().mean() > 0.01
    assert torch.equal(engram(h_BSND, batch), h_BSND + value_BSND)


@pytest.mark.parametrize("streams", [1, 3])
def test_gradients_are_slopes(streams: int) -> None:
    config = tiny_v4(
        engram=MEMORY.model_copy(
            update={"table_sizes": (5, 5), "n_embed_per_ngram": 4, "n_head_per_ngram": 2}
        ),
        hc_mult=streams,
        hidden_size=4,
    )
    engram = memory(config)
    batch, h_BSND = Whole(random_tokens(2, 8), SEGMENTS[:, :8]), states(2, 8, streams, 4)
    parameters = {name: p.detach().requires_grad_() for name, p in engram.named_parameters()}
    assert set(parameters) == {
        f"{name}.weight"
        for name in (
            "table",
            "key_proj",
            "value_proj",
            "query_norm",
            "key_norm",
            "short_conv",
            "short_conv.norm",
        )
    }

    def read(h: Tensor, *tensors: Tensor) -> Tensor:
        state = dict(zip(parameters, tensors, strict=True))
        out: Tensor = functional_call(engram, state, (h, batch))
        return out

    assert torch.autograd.gradcheck(
        read, (h_BSND.requires_grad_(), *parameters.values()), eps=1e-7, atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize(
    "config",
    [
        tiny(engram=MEMORY),
        tiny_v4(engram=MEMORY),
        tiny(engram=EngramConfig(layer_ids=(1,), table_sizes=(30,), kernel_size=1)),
    ],
    ids=["v3", "v4", "bigrams"],
)
def test_the_config_counts_every_weight(config: ModelConfig) -> None:
    with torch.device("meta"):
        engram = engram_before(config, 1, HIGH)
    assert engram is not None
    assert config.engram is not None
    counted = config.engram.parameters(1, 32, config.streams, active=False)
    assert sum(p.numel() for p in engram.parameters()) == counted
    with_memory = config.layer_parameters(1)
    without = config.model_copy(update={"engram": None}).layer_parameters(1)
    assert with_memory - without == counted


def test_only_the_layers_named_have_a_memory() -> None:
    config = tiny(engram=MEMORY.model_copy(update={"layer_ids": (1,)}))
    assert engram_before(config, 0, HIGH) is None
    assert engram_before(tiny(), 1, HIGH) is None
    model = random_model(config)
    owners = [name for name, module in model.named_modules() if isinstance(module, Engram)]
    assert owners == ["model.layers.1.engram"]


# --- Documents and decoding ------------------------------------------------------------------


def test_packed_documents_are_read_as_if_alone() -> None:
    model = random_model(tiny(engram=MEMORY)).double()
    set_vocabulary(model, FOLDED)
    tokens_BS = random_tokens(1, 14)
    with torch.no_grad():
        packed_SV = model(tokens_BS, SEGMENTS[:1])[0]
        together_SV = model(tokens_BS)[0]
        start = 0
        for length in (5, 1, 8):
            document = slice(start, start + length)
            alone_SV = model(tokens_BS[:, document])[0]
            # Rotary tables are float32, and a packed document stands further along in them.
            torch.testing.assert_close(packed_SV[document], alone_SV, rtol=0, atol=1e-5)
            start += length
    assert not torch.allclose(packed_SV[5:], together_SV[5:], atol=1e-2)


@pytest.mark.parametrize("config", [tiny(engram=MEMORY), tiny_v4(engram=MEMORY)], ids=["v3", "v4"])
def test_rows_at_different_positions_read_on_as_if_from_the_start(config: ModelConfig) -> None:
    engram = memory(config)
    tokens_BS, h_BSND = random_tokens(3, 24), states(3, 24, config.streams, 32)
    whole_BSND = engram(h_BSND, Whole(tokens_BS))
    caches: Caches = {
        module: module.new_cache(3, 24)
        for module in engram.modules()
        if isinstance(module, Remembering)
    }
    # Shorter than an n-gram, between that and the convolution's reach, and beyond both.
    lengths_B = torch.tensor([1, 6, 11])
    prefill = Whole(tokens_BS[:, :11], caches=caches, lengths_B=lengths_B)
    engram(h_BSND[:, :11], prefill)
    rows_B = torch.arange(3)
    for _ in range(13):
        here = rows_B, lengths_B
        step = Step(tokens_BS[here][:, None], lengths_B, caches)
        out_B1ND = engram(h_BSND[here][:, None], step)
        torch.testing.assert_close(out_B1ND[:, 0], whole_BSND[here], rtol=1e-10, atol=1e-11)
        lengths_B = lengths_B + 1


def read_on(session: Session, tokens_BS: Tensor, ends: Mapping[int, int]) -> dict[int, Tensor]:
    """Logits after one more token of each text, whose rows stand in the order of `ends`."""
    following = torch.stack([tokens_BS[text, end] for text, end in ends.items()])
    return dict(zip(ends, session.step(following), strict=True))


@pytest.mark.parametrize("config", [tiny(engram=MEMORY), tiny_v4(engram=MEMORY)], ids=["v3", "v4"])
def test_cached_decoding_gives_the_logits_of_a_full_pass(config: ModelConfig) -> None:
    # Rows join, leave and join in the place of others, and agree with full passes throughout.
    model = random_model(config)
    set_vocabulary(model, FOLDED)
    tokens_BS = random_tokens(4, 26)
    with torch.inference_mode():
        full_BSV = model(tokens_BS)
        session = Session(model, rows=3, tokens=26)
        ends = {0: 5, 1: 1, 2: 12}
        joined_BV = session.join([tokens_BS[text, :end].tolist() for text, end in ends.items()])
        pairs = [(joined_BV[i], full_BSV[t, ends[t] - 1]) for i, t in enumerate(ends)]
        for _ in range(6):
            logits = read_on(session, tokens_BS, ends)
            pairs += [(logits[text], full_BSV[text, ends[text]]) for text in ends]
            ends = {text: end + 1 for text, end in ends.items()}
        session.leave(0)  # The last row takes its number.
        session.join([tokens_BS[3, :2].tolist()])
        ends = {2: ends[2], 1: ends[1], 3: 2}
        for _ in range(7):
            logits = read_on(session, tokens_BS, ends)
            pairs += [(logits[text], full_BSV[text, ends[text]]) for text in ends]
            ends = {text: end + 1 for text, end in ends.items()}
        spread = float(full_BSV.std())
        assert max(float((a - b).abs().max()) for a, b in pairs) < 1e-4 * spread


# --- Where the table is ----------------------------------------------------------------------


def on_host(**changes: object) -> Engram:
    fields = MEMORY.model_dump() | {"table_device": "host"} | changes
    return memory(tiny(engram=EngramConfig.model_validate(fields)))


def test_a_table_on_the_host_stays_there() -> None:
    engram, here = on_host(), memory()
    kept = engram.table.weight.detach().clone()
    for moved in (engram.to("meta"), engram.to_empty(device="meta")):
        places = {name: p.device.type for name, p in moved.named_parameters()}
        assert places.pop("table.weight") == "cpu"
        assert set(places.values()) == {"meta"}
        assert torch.equal(moved.table.weight, kept)
        assert moved.table.weight.requires_grad
    assert here.to("meta").table.weight.is_meta


def test_a_table_on_the_host_takes_part_in_casts_and_saves() -> None:
    engram = on_host()
    expected = engram.table.weight.detach().float()
    assert engram.float().table.weight.dtype == torch.float32
    assert torch.equal(engram.table.weight, expected)
    assert torch.equal(engram.state_dict()["table.weight"], expected)
    # A move with a cast is a cast.
    engram.to("meta", torch.bfloat16)
    assert engram.key_proj.weight.dtype == engram.table.weight.dtype == torch.bfloat16
    assert torch.equal(engram.table.weight, expected.bfloat16())


def test_a_table_on_the_host_is_made_there_unless_it_is_only_counted() -> None:
    with torch.device("meta"):
        table = MemoryTable(7, 3, on_host=True)
    assert table.weight.is_meta
    assert table.to_empty(device="cpu").weight.device.type == "cpu"
    assert not MemoryTable(7, 3, on_host=True).weight.is_meta


@pytest.mark.parametrize("where", ["model", "host"])
def test_rows_that_were_read_get_gradients_and_no_others(where: str) -> None:
    engram = on_host(table_device=where)
    tokens_BS = random_tokens(2, 6)
    engram(states(2, 6, 1, 32), Whole(tokens_BS)).square().sum().backward()
    read = engram.table_index(engram._ngrams(Whole(tokens_BS))).unique()
    gradient = engram.table.weight.grad
    assert gradient is not None
    moved = gradient.abs().sum(1).nonzero().squeeze(1)
    assert moved.tolist() == read.tolist()
    assert len(read) < len(gradient)


@pytest.mark.gpu
def test_a_table_on_the_host_serves_a_model_on_a_gpu() -> None:
    here, there = memory(), on_host().to("cuda")
    tokens_BS, h_BSND = random_tokens(2, 14), states(2, 14, 1, 32)
    outs = []
    for engram, device in ((here, "cpu"), (there, "cuda")):
        out = engram(h_BSND.to(device), Whole(tokens_BS.to(device), SEGMENTS.to(device)))
        out.square().sum().backward()
        outs.append(out)
    assert there.table.weight.device.type == "cpu"
    assert there.key_proj.weight.device.type == outs[1].device.type == "cuda"
    torch.testing.assert_close(outs[0], outs[1].cpu(), rtol=1e-9, atol=1e-10)
    for (name, a), b in zip(here.named_parameters(), there.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert b.grad.device == b.device
        torch.testing.assert_close(a.grad, b.grad.cpu(), rtol=1e-8, atol=1e-9, msg=name)
