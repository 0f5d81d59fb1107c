"""The DeepSeek-V3 decoder, with its multi-token-prediction layer.

Modules bear the names of the released weights, so that saving is a renaming only where experts
are stacked and the MTP layer repeats the embedding and head.

Initial values (all from one seed, by parameter name, so that no layout of machines changes them):

| parameter | value |
|---|---|
| every Linear, expert, gate, embedding and head weight | N(0, initializer_range^2) |
| RMS norm weights | 1 |
| routing bias | 0 |

Axes: B sequences, S positions, D width, V vocabulary.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from configs.model import ModelConfig
from configs.train import Precision
from model.attention import LatentAttention
from model.dispatch import LocalDispatcher, TokenDispatcher
from model.fp8.linear import Linear
from model.layers import RMSNorm, SwiGLU, seeded_normal
from model.moe import MoE, RoutedExperts


@dataclass(frozen=True, slots=True)
class Predictions:
    """Logits of one forward pass, float32."""

    next_BSV: Tensor
    """Position i predicts token i + 1."""
    after_next_BSV: Tensor | None
    """From the MTP layer: position i predicts token i + 2; the last position has no input."""


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, dense or of experts."""

    def __init__(
        self, config: ModelConfig, index: int, precision: Precision, dispatcher: TokenDispatcher
    ) -> None:
        super().__init__()
        self.self_attn = LatentAttention(config, precision)
        self.mlp: nn.Module
        if index < config.first_k_dense_replace:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, precision)
        else:
            self.mlp = MoE(config, precision, dispatcher)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x_BSD: Float[Tensor, "B S D"], mask_B1SS: Bool[Tensor, "B 1 S S"] | None
    ) -> Float[Tensor, "B S D"]:
        """h = x + attention(norm(x)); h + feed-forward(norm(h))."""
        h_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), mask_B1SS)
        out: Tensor = h_BSD + self.mlp(self.post_attention_layernorm(h_BSD))
        return out


class MtpLayer(DecoderLayer):
    """A decoder layer over h_i and the embedding of token i + 1 (section 2.2, eq. 21-23).

    The paper writes [hidden; embedding]; the released code and weights put the embedding first,
    and so does this. Embedding and output head are the main model's.
    """

    def __init__(
        self, config: ModelConfig, precision: Precision, dispatcher: TokenDispatcher
    ) -> None:
        super().__init__(config, config.num_hidden_layers, precision, dispatcher)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def join(
        self, hidden_BSD: Float[Tensor, "B S D"], next_embedding_BSD: Float[Tensor, "B S D"]
    ) -> Float[Tensor, "B S D"]:
        """The layer's input at each position i."""
        joined = torch.cat([self.enorm(next_embedding_BSD), self.hnorm(hidden_BSD)], dim=-1)
        out: Tensor = self.eh_proj(joined)
        return out


class Decoder(nn.Module):
    """Embedding, layers (the MTP layer last, if any) and final norm."""

    def __init__(
        self, config: ModelConfig, precision: Precision, dispatcher: TokenDispatcher
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers: list[nn.Module] = [
            DecoderLayer(config, index, precision, dispatcher)
            for index in range(config.num_hidden_layers)
        ]
        layers += [
            MtpLayer(config, precision, dispatcher) for _ in range(config.num_nextn_predict_layers)
        ]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """A causal language model of the V3 family.

    `precision` reaches every Linear and expert of the layers; embedding, head, gate, norms,
    `eh_proj`, the attention operator and the loss stay in high precision (section 3.3.1).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        precision: Precision = "high",
        dispatcher: TokenDispatcher | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, precision, dispatcher or LocalDispatcher())
        self.lm_head = Linear(config.hidden_size, config.vocab_size)

    def initialize(self, seed: int) -> "Transformer":
        """Fill every parameter as the table in this file's docstring says; returns self."""
        std = self.config.initializer_range
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith(("gate_up_proj", "down_proj")) and parameter.dim() == 3:
                    experts = self.get_submodule(name.rpartition(".")[0])
                    assert isinstance(experts, RoutedExperts)
                    for row, expert in zip(parameter, experts.local, strict=True):
                        row.copy_(seeded_normal(tuple(row.shape), std, seed, name, expert))
                elif parameter.dim() == 2:
                    parameter.copy_(seeded_normal(tuple(parameter.shape), std, seed, name))
                else:
                    parameter.fill_(1.0)
        return self

    def forward(
        self, tokens_BS: Int[Tensor, "B S"], segments_BS: Int[Tensor, "B S"] | None = None
    ) -> Float[Tensor, "B S V"]:
        """Next-token logits, float32. Tokens attend only within equal `segments`, if given."""
        hidden_BSD, _ = self._trunk(tokens_BS, segments_BS)
        return self._logits(self.model.norm(hidden_BSD))

    def predict(
        self, tokens_BS: Int[Tensor, "B S"], segments_BS: Int[Tensor, "B S"] | None = None
    ) -> Predictions:
        """Logits for the next token and, with an MTP layer, for the one after it."""
        hidden_BSD, mask_B1SS = self._trunk(tokens_BS, segments_BS)
        # The MTP layer continues from the normed state, as the servers that read it feed it.
        hidden_BSD = self.model.norm(hidden_BSD)
        logits_BSV = self._logits(hidden_BSD)
        if not self.config.num_nextn_predict_layers:
            return Predictions(logits_BSV, None)
        mtp = self.model.layers[-1]
        assert isinstance(mtp, MtpLayer)
        # The last position joins with its own token for want of a next one; it is never scored.
        following_BS = torch.cat([tokens_BS[:, 1:], tokens_BS[:, -1:]], dim=1)
        joined_BSD = mtp.join(hidden_BSD, self.model.embed_tokens(following_BS))
        after_BSD = mtp(joined_BSD, mask_B1SS)
        return Predictions(logits_BSV, self._logits(mtp.shared_head["norm"](after_BSD)))

    def moe_layers(self) -> dict[str, MoE]:
        """The MoE blocks by module name, the MTP layer's included."""
        return {name: module for name, module in self.named_modules() if isinstance(module, MoE)}

    def _trunk(self, tokens_BS: Tensor, segments_BS: Tensor | None) -> tuple[Tensor, Tensor | None]:
        mask_B1SS = None if segments_BS is None else _document_mask(segments_BS)
        hidden_BSD: Tensor = self.model.embed_tokens(tokens_BS)
        for layer in self.model.layers[: self.config.num_hidden_layers]:
            hidden_BSD = layer(hidden_BSD, mask_B1SS)
        return hidden_BSD, mask_B1SS

    def _logits(self, hidden_BSD: Tensor) -> Tensor:
        return F.linear(hidden_BSD, self.lm_head.weight).float()


def _document_mask(segments_BS: Int[Tensor, "B S"]) -> Bool[Tensor, "B 1 S S"]:
    """True where the key is not later than the query and of the same document."""
    length = segments_BS.shape[1]
    causal_SS = torch.ones(length, length, dtype=torch.bool, device=segments_BS.device).tril()
    same_BSS = segments_BS[:, :, None] == segments_BS[:, None, :]
    return (same_BSS & causal_SS).unsqueeze(1)
