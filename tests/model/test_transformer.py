"""The decoder against `transformers`, and what may depend on what."""

import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from configs.errors import DataError
from configs.model import V3Config
from configs.train import Precision
from model.decoder import MtpLayer
from model.dispatch import Flight, Routed
from model.transformer import Transformer
from model.weights.files import load_pretrained, save_pretrained
from tests.model.transformers_twin import loaded
from tests.references import random_model, random_tokens, tiny

CONFIGS = [
    tiny(num_nextn_predict_layers=0),
    tiny(q_lora_rank=None, num_nextn_predict_layers=0),
    tiny(n_group=1, topk_group=1, num_experts_per_tok=3, num_nextn_predict_layers=0),
    tiny(first_k_dense_replace=0, norm_topk_prob=False, n_shared_experts=2),
    tiny(first_k_dense_replace=2, rope_theta=50.0, routed_scaling_factor=1.0),
    tiny(num_hidden_layers=3, rms_norm_eps=0.05),
]


def theirs(folder: Path) -> DeepseekV3ForCausalLM:
    """The folder as `transformers` loads it; nothing may be missing, only MTP left over."""
    model, told = loaded(DeepseekV3ForCausalLM.from_pretrained, folder, dtype=torch.float32)
    assert isinstance(model, DeepseekV3ForCausalLM)
    layers = model.config.num_hidden_layers
    assert not told["missing_keys"]
    assert not told["mismatched_keys"]
    assert all(key.startswith(f"model.layers.{layers}.") for key in told["unexpected_keys"])
    model.eval()
    return model


def assert_same_logits(found: Tensor, expected: Tensor) -> None:
    assert float(expected.std()) > 0.3
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.std())


@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_transformers_computes_the_same_logits(config: V3Config, tmp_path: Path) -> None:
    ours = random_model(config)
    tokens = random_tokens(3, 20)
    save_pretrained(ours, tmp_path / "ours")
    other = theirs(tmp_path / "ours")
    assert_same_logits(ours(tokens), other(tokens).logits)
    # And back: what they save is what we load. They keep no MTP layer.
    other.config.num_nextn_predict_layers = 0
    other.save_pretrained(tmp_path / "theirs")
    back = load_pretrained(tmp_path / "theirs")
    assert back.config == config.model_copy(update={"num_nextn_predict_layers": 0})
    assert torch.equal(back(tokens), ours(tokens))


@torch.no_grad()
def test_the_mtp_layer_is_that_of_transformers(tmp_path: Path) -> None:
    ours, tokens = random_model(), random_tokens(2, 16)
    save_pretrained(ours, tmp_path)
    main = theirs(tmp_path)
    mtp = MtpModel(main, 1).eval()
    prefix = f"model.layers.{ours.config.num_hidden_layers}."
    mine = {k.removeprefix(prefix): v for k, v in ours.state_dict().items() if k.startswith(prefix)}
    renamed = {
        name.replace("mtp_block.", "").replace("post_norm", "shared_head.norm"): name
        for name in mtp.layers[0].state_dict()
    }
    mtp.layers[0].load_state_dict({renamed[name]: tensor for name, tensor in mine.items()})
    # The last state they return is the one after the final norm.
    hidden = main.model(tokens, output_hidden_states=True).hidden_states[-1]
    layer = mtp.layers[0]
    after = layer(
        main.model.embed_tokens(tokens[:, 1:]),
        hidden[:, :-1],
        position_embeddings=main.model.rotary_emb(hidden, torch.arange(15)[None]),
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
    )
    found = ours.predict(tokens).after_next_BSV
    assert found is not None
    assert_same_logits(found[:, :-1], main.lm_head(after))


@torch.no_grad()
def test_documents_in_a_row_are_read_as_if_alone() -> None:
    model, tokens = random_model(), random_tokens(2, 18)
    lengths = [[7, 11], [1, 12, 5]]
    segments = torch.stack(
        [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
    )
    packed = model.predict(tokens, segments)
    for row, parts in enumerate(lengths):
        start = 0
        for length in parts:
            inside = slice(start, start + length)
            alone = model.predict(tokens[row : row + 1, inside])
            assert_same_logits(packed.next_BSV[row, inside], alone.next_BSV[0])
            # A document's last position joins with the next document's first token: not scored.
            assert packed.after_next_BSV is not None
            assert alone.after_next_BSV is not None
            after = packed.after_next_BSV[row, inside][:-1]
            torch.testing.assert_close(after, alone.after_next_BSV[0, :-1], rtol=1e-4, atol=1e-4)
            start += length


@torch.no_grad()
def test_one_segment_is_the_same_as_none() -> None:
    model, tokens = random_model(), random_tokens(2, 10)
    torch.testing.assert_close(model(tokens, torch.zeros_like(tokens)), model(tokens))


def moved(before: Tensor, after: Tensor) -> list[int]:
    """Positions of a batch of one whose logits changed.

    By more than the last bits: these depend on how many rows an expert's product has.
    """
    return ((before - after).abs() > 1e-4).any(-1)[0].nonzero().flatten().tolist()


@torch.no_grad()
def test_no_position_sees_what_comes_after_it() -> None:
    model, tokens = random_model(), random_tokens(1, 12)
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 64
    assert moved(model(tokens), model(changed)) == list(range(6, 12))


@torch.no_grad()
def test_the_mtp_layer_sees_one_token_further_and_no_more() -> None:
    model, tokens = random_model(), random_tokens(1, 12)
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 64
    before, after = (model.predict(t).after_next_BSV for t in (tokens, changed))
    assert before is not None
    assert after is not None
    assert moved(before, after) == list(range(5, 12))


@torch.no_grad()
def test_predict_and_forward_agree_on_the_next_token() -> None:
    model, tokens = random_model(), random_tokens(2, 9)
    assert torch.equal(model.predict(tokens).next_BSV, model(tokens))
    without = random_model(tiny(num_nextn_predict_layers=0))
    assert without.predict(tokens).after_next_BSV is None


class Slice:
    """A dispatcher that only says which experts are here."""

    def __init__(self, local: tuple[int, ...]) -> None:
        self.local = local

    def experts(self, layer: str) -> tuple[int, ...]:
        """Those it was made with, of every layer."""
        return self.local

    def send(self, routed: Routed) -> Flight:
        """Never called."""
        raise NotImplementedError


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[3, 64]], "tokens are 3 to 64, but the model's are 0 to 63"),
        ([[-1, 3]], "tokens are -1 to 3"),
    ],
)
def test_tokens_of_another_vocabulary_are_refused(tokens: list[list[int]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        random_model()(torch.tensor(tokens))


def test_tokens_that_are_no_rows_are_refused() -> None:
    forward = inspect.unwrap(Transformer.forward)  # Tests check shapes of their own before it.
    with pytest.raises(DataError, match=r"tokens have shape \[3\], but texts are rows"):
        forward(random_model(), torch.tensor([1, 2, 3]))


def test_initial_values_are_the_same_however_experts_are_divided() -> None:
    whole = Transformer(tiny()).initialize(3).state_dict()
    for local in ((0, 1, 2, 3), (4, 5, 6, 7), (6, 7), (5, 0, 3)):
        part = Transformer(tiny(), dispatcher=Slice(local)).initialize(3).state_dict()
        for name, tensor in part.items():
            expected = whole[name][list(local)] if ".experts." in name else whole[name]
            assert torch.equal(tensor, expected), name


def test_initial_values_follow_the_table() -> None:
    model = Transformer(tiny(initializer_range=0.5)).initialize(0)
    again = Transformer(tiny(initializer_range=0.5)).initialize(0)
    other = Transformer(tiny(initializer_range=0.5)).initialize(1)
    drawn = []
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        if name.endswith("norm.weight"):
            assert bool((tensor == 1).all())
        elif name.endswith("bias"):
            assert not tensor.any()
        else:
            assert not torch.equal(tensor, other.state_dict()[name])
            drawn.append(tensor.flatten())
            assert float(tensor.std()) == pytest.approx(0.5, rel=0.2), name
    assert float(torch.cat(drawn).std()) == pytest.approx(0.5, rel=0.02)
    # No two tensors, and no two experts of one, begin alike.
    rows = [tensor for tensor in model.state_dict().values() if tensor.dim() == 2]
    rows += [row for stack in model.state_dict().values() if stack.dim() == 3 for row in stack]
    assert len({tuple(row.flatten()[:8].tolist()) for row in rows}) == len(rows)


def test_fp8_reaches_the_layers_and_spares_head_gate_and_joint() -> None:
    model = Transformer(tiny(), precision="fp8")
    schemes = {
        name: module.scheme for name, module in model.named_modules() if hasattr(module, "scheme")
    }
    high = {name for name, scheme in schemes.items() if scheme is None}
    gates = {name for name in schemes if name.endswith(".gate")}
    assert high == {"lm_head", "model.layers.2.eh_proj", *gates}
    assert len(gates) == 2
    assert len(schemes) > 20


def test_fp8_stays_close_to_high_precision_and_differs_from_it() -> None:
    exact, rough = random_model(), random_model(precision="fp8")
    rough.load_state_dict(exact.state_dict())
    tokens = random_tokens(4, 16)
    with torch.no_grad():
        a, b = exact(tokens).double(), rough(tokens).double()
    gap = float(1 - 2 * (a * b).sum() / (a.square().sum() + b.square().sum()))
    assert 1e-6 < gap < 2e-2


@pytest.mark.parametrize("precision", ["high", "fp8"])
def test_every_parameter_learns(precision: Precision) -> None:
    model = random_model(precision=precision).train()
    tokens = random_tokens(8, 24)
    predicted = model.predict(tokens)
    assert predicted.after_next_BSV is not None
    loss = F.cross_entropy(predicted.next_BSV[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss = loss + F.cross_entropy(
        predicted.after_next_BSV[:, :-2].flatten(0, 1), tokens[:, 2:].flatten()
    )
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name
        assert bool(torch.isfinite(parameter.grad).all()), name
    assert isinstance(model.model.layers[-1], MtpLayer)
