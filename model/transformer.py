"""The decoder of every family, with its multi-token-prediction layer.

Modules bear the names that transformers gives them, so that saving is a renaming.

Initial values (all from one seed, by parameter name, so that no layout of machines changes them):

| parameter | value |
|---|---|
| every Linear, expert, gate, embedding and head weight | N(0, initializer_range^2) |
| norm weights | 1 |
| what a module lists in its `initial_values` | as listed |
| routing bias | 0 |
| table of hash-routed experts | drawn for each token, all choices distinct |

Axes: B sequences, S positions, D width, V vocabulary.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from configs.errors import DataError
from configs.model import Family, ModelConfig, V4Config
from configs.train import Precision
from model.decoder import DecoderLayer, MtpLayer
from model.dispatch import Dispatcher, LocalDispatcher
from model.fp8.linear import Linear
from model.fp8.scheme import Numerics
from model.hyper import HyperHead, HyperLayer, HyperMtpLayer
from model.layers import RMSNorm, seeded_normal
from model.moe import HashGate, MoE, RoutedExperts
from model.passes import Caches, IndexerPhase, LayerReport, Pass, Remembering, Whole
from model.widening import wide_linear, widened


@dataclass(frozen=True, slots=True)
class Predictions:
    """What one forward pass predicts, and what the indexers of sparse attention missed.

    Logits are made when they are asked for; `model.loss` does without them.
    """

    next_BSD: Tensor
    """The state from which position i predicts token i + 1."""
    after_next_BSD: Tensor | None
    """From the MTP layer: position i predicts token i + 2; the last position has no input."""
    head: Linear
    reports: tuple[LayerReport, ...]
    """What each layer told, in order, the MTP layer's last."""

    @property
    def indexer_loss(self) -> Float[Tensor, ""] | None:
        """Sum over sparse attentions of the mean KL of a query, in nats; none if not asked for."""
        return _sum(report.indexer for report in self.reports)

    @property
    def balance_loss(self) -> Float[Tensor, ""] | None:
        """Sum over layers and sequences of the balance loss; none if not asked for."""
        return _sum(report.balance for report in self.reports)

    @property
    def next_BSV(self) -> Float[Tensor, "B S V"]:
        """Logits of the next token, in float32 at least."""
        return _logits(self.next_BSD, self.head)

    @property
    def after_next_BSV(self) -> Float[Tensor, "B S V"] | None:
        """Logits of the token after next, if there is an MTP layer."""
        return None if self.after_next_BSD is None else _logits(self.after_next_BSD, self.head)


_LAYERS: Mapping[Family, tuple[type[nn.Module], type[nn.Module]]] = {
    "v3": (DecoderLayer, MtpLayer),
    "v32": (DecoderLayer, MtpLayer),
    "v4": (HyperLayer, HyperMtpLayer),
}
"""A decoder layer and the multi-token-prediction layer of each family."""


class Decoder(nn.Module):
    """Embedding, layers (the MTP layer last, if any) and final norm."""

    def __init__(self, config: ModelConfig, numerics: Numerics, dispatcher: Dispatcher) -> None:
        super().__init__()
        self.config, self.compute = config, numerics.compute
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layer, mtp_layer = _LAYERS[config.family]
        layers = [layer(config, i, numerics, dispatcher) for i in range(config.depth)]
        if config.num_nextn_predict_layers:
            layers.append(mtp_layer(config, numerics, dispatcher))
        self.layers = nn.ModuleList(layers)
        self.hc_head = HyperHead(config) if isinstance(config, V4Config) else None
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def embed(self, tokens_BS: Int[Tensor, "B S"]) -> Float[Tensor, "B S D"]:
        """The tokens' embeddings, in the type that the stream of states has."""
        rows_BSD: Tensor = self.embed_tokens(tokens_BS)
        return rows_BSD if self.compute is None else rows_BSD.to(self.compute)

    def forward(self, batch: Pass) -> tuple[Tensor, tuple[LayerReport, ...]]:
        """The state after the last layer of the main model, [B, S, D] or [B, S, streams, D]; and
        what its layers report."""
        hidden = self.embed(batch.tokens_BS)
        if self.hc_head is not None:
            hidden = hidden.unsqueeze(2).repeat(1, 1, self.config.streams, 1)
        reports = []
        for layer in self.layers[: self.config.depth]:
            hidden, report = layer(hidden, batch)
            reports.append(report)
        return hidden, tuple(reports)

    def collapse(self, hidden: Tensor) -> Float[Tensor, "B S D"]:
        """The normed state that the output head reads."""
        if self.hc_head is not None:
            hidden = self.hc_head(hidden)
        out: Tensor = self.norm(hidden)
        return out


class Transformer(nn.Module):
    """A causal language model of any family.

    `precision = "fp8"` means what `configs.train.Fp8Config` says by default; a `Numerics` says
    anything else.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        precision: Precision | Numerics = "high",
        dispatcher: Dispatcher | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.numerics = precision if isinstance(precision, Numerics) else Numerics(precision)
        dispatcher = dispatcher or LocalDispatcher(config.n_routed_experts)
        self.model = Decoder(config, self.numerics, dispatcher)
        scheme = self.numerics.of("head")
        self.lm_head = Linear(config.hidden_size, config.vocab_size, scheme)

    def initialize(self, seed: int) -> "Transformer":
        """Fill every parameter as the table in this file's docstring says; returns self."""
        std = self.config.initializer_range
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                prefix, _, leaf = name.rpartition(".")
                owner = self.get_submodule(prefix)
                constants: dict[str, float] = getattr(owner, "initial_values", {})
                if isinstance(owner, RoutedExperts):
                    for row, expert in zip(parameter, owner.local, strict=True):
                        row.copy_(seeded_normal(tuple(row.shape), std, seed, name, expert))
                elif leaf in constants:
                    parameter.fill_(constants[leaf])
                elif parameter.dim() == 1:
                    parameter.fill_(1.0)
                else:
                    parameter.copy_(seeded_normal(tuple(parameter.shape), std, seed, name))
            for name, module in self.named_modules():
                if isinstance(module, HashGate):
                    module.draw(seed, name)
        return self

    def forward(
        self, tokens_BS: Int[Tensor, "B S"], segments_BS: Int[Tensor, "B S"] | None = None
    ) -> Float[Tensor, "B S V"]:
        """Next-token logits, float32. Tokens attend only within equal `segments`, if given.

        DataError for tokens that are not in the vocabulary or not in rows.
        """
        _check_tokens(tokens_BS, self.config.vocab_size)
        return self.logits(self.read(Whole(tokens_BS, segments_BS)))

    def predict(
        self,
        tokens_BS: Int[Tensor, "B S"],
        segments_BS: Int[Tensor, "B S"] | None = None,
        *,
        indexer: IndexerPhase = "off",
    ) -> Predictions:
        """The next token and, with an MTP layer, the one after it."""
        return self.predictions(Whole(tokens_BS, segments_BS, indexer=indexer))

    def predictions(self, batch: Whole, *, ahead: bool = True) -> Predictions:
        """What `predict` gives, of a pass; not `ahead`, an MTP layer is left out."""
        hidden, reports = self.model(batch)
        normed_BSD = self.model.collapse(hidden)
        ahead_BSD = None
        if ahead and self.config.num_nextn_predict_layers:
            tokens_BS = batch.tokens_BS
            mtp = self.model.layers[-1]
            assert isinstance(mtp, MtpLayer | HyperMtpLayer)
            # The last position joins with its own token for want of a next one; it is not scored.
            following_BS = torch.cat([tokens_BS[:, 1:], tokens_BS[:, -1:]], dim=1)
            following_BSD = self.model.embed(following_BS)
            ahead_BSD, report = mtp.predict(
                normed_BSD if isinstance(mtp, MtpLayer) else hidden, following_BSD, batch
            )
            reports += (report,)
        return Predictions(normed_BSD, ahead_BSD, self.lm_head, reports)

    def read(self, batch: Pass) -> Float[Tensor, "B S D"]:
        """The normed state after the main model; with caches in `batch`, they are brought up."""
        return self.read_and_report(batch)[0]

    def read_and_report(
        self, batch: Pass
    ) -> tuple[Float[Tensor, "B S D"], tuple[LayerReport, ...]]:
        """What `read` gives, and what the layers report."""
        hidden, reports = self.model(batch)
        return self.model.collapse(hidden), reports

    def logits(self, normed_BSD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        """What the output head makes of states that `read` gave; in float32 at least."""
        return _logits(normed_BSD, self.lm_head)

    def new_caches(self, rows: int, tokens: int) -> Caches:
        """Empty caches for `rows` rows of at most `tokens` tokens, of the main model's layers."""
        layers = nn.ModuleList(self.model.layers[: self.config.depth])
        return {
            module: module.new_cache(rows, tokens)
            for module in layers.modules()
            if isinstance(module, Remembering)
        }

    def moe_layers(self) -> dict[str, MoE]:
        """The MoE blocks by module name, the MTP layer's included."""
        return {name: module for name, module in self.named_modules() if isinstance(module, MoE)}


def _check_tokens(tokens_BS: Tensor, vocabulary: int) -> None:
    if tokens_BS.dim() != 2:
        raise DataError(
            f"tokens have shape {list(tokens_BS.shape)}, but texts are rows: [texts, tokens]"
        )
    # Elsewhere the question would make the caller wait for the device, which tells of it itself.
    if tokens_BS.device.type == "cpu" and tokens_BS.numel():
        low, high = (int(bound) for bound in tokens_BS.aminmax())
        if not 0 <= low <= high < vocabulary:
            raise DataError(
                f"tokens are {low} to {high}, but the model's are 0 to {vocabulary - 1}; encode "
                "the text with the model's own tokenizer"
            )


def _sum(losses: Iterable[Tensor | None]) -> Tensor | None:
    """The sum of those that are there, if any are."""
    found = [loss for loss in losses if loss is not None]
    return torch.stack(found).sum() if found else None


def _logits(normed_BSD: Tensor, head: Linear) -> Tensor:
    if head.scheme is not None:
        return widened(head(normed_BSD))
    return wide_linear(normed_BSD, head.weight)
