"""The pretraining loss: next token, token after next, sequence-wise balance, and the indexer's.

Axes: B sequences on this rank, S positions, P scored positions, D width, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from model.fp8.linear import Linear
from model.loss import UNSCORED, cross_entropy
from model.passes import IndexerPhase, Whole
from model.transformer import Predictions, Transformer
from stages.framing import BOS_ID
from stages.segments import segments_of


@dataclass(frozen=True, slots=True)
class PretrainLoss:
    """L = CE(next) + mtp_weight * CE(after next) + balance_weight * sum over layers.

    DeepSeek-V3, eq. 17-25. A target that begins a document is never scored: nothing before it
    says what comes. A batch is {"tokens": int64 [B, S]}.

    Sparse attention adds indexer_weight * sum over layers of its indexers' divergence, as the
    phase says. Indexers read detached inputs, so this term trains them and nothing else, and the
    others train everything else: one backward pass of the sum is both of DeepSeek-V3.2-Exp's
    optimisations, whether or not the rest of the model is held still meanwhile.

    Layers that route by hash have no part in the balance: no loss can change which experts their
    tokens visit, and its gradient would only bend the weights that outputs are mixed with.
    """

    mtp_weight: float
    balance_weight: float
    attend_across_documents: bool
    indexer: IndexerPhase = "off"
    indexer_weight: float = 1.0

    def counts(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """Scored targets of either head, and sequences."""
        next_BS, after_BS = scored_targets(batch["tokens"])
        return {
            "next": float(next_BS.sum()),
            "after_next": float(after_BS.sum()),
            "sequences": float(batch["tokens"].shape[0]),
        }

    @property
    def ahead(self) -> bool:
        """Two tokens are predicted."""
        return True

    def reads(self, batch: Mapping[str, Tensor]) -> Whole:
        """Rows of documents, whose balance is reported."""
        tokens_BS = batch["tokens"]
        segments_BS = None if self.attend_across_documents else segments_of(tokens_BS)
        return Whole(tokens_BS, segments_BS, indexer=self.indexer, balance=True)

    def __call__(
        self, predicted: Predictions, batch: Mapping[str, Tensor], totals: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's part of the loss; `next_token_loss` and the others are parts too."""
        tokens_BS = batch["tokens"]
        next_BS, after_BS = scored_targets(tokens_BS)
        main = (
            _cross_entropy(predicted.next_BSD, predicted.head, tokens_BS, next_BS) / totals["next"]
        )
        metrics = {"next_token_loss": main.detach()}
        loss = main
        if predicted.after_next_BSD is not None:
            mtp = _cross_entropy(predicted.after_next_BSD, predicted.head, tokens_BS, after_BS)
            mtp = mtp / totals["after_next"]
            loss = loss + self.mtp_weight * mtp
            metrics["mtp_loss"] = mtp.detach()
        if predicted.indexer_loss is not None:
            # A mean over all of this rank's queries, of which every sequence has as many.
            share = tokens_BS.shape[0] / totals["sequences"]
            indexer = predicted.indexer_loss * share
            loss = loss + self.indexer_weight * indexer
            metrics["indexer_loss"] = indexer.detach()
        found = predicted.balance_loss
        balance = main.new_zeros(()) if found is None else found / totals["sequences"]
        metrics["balance_loss"] = balance.detach()
        return loss + self.balance_weight * balance, metrics

    def next_token_nats(
        self, model: Transformer, tokens_BS: Int[Tensor, "B S"]
    ) -> Float[Tensor, " B"]:
        """Sum over each row's scored next tokens of -log p, in nats; a row does not see others.

        `next_token_loss` is the mean of the same terms. Attention is that of the phase, but no
        indexer's divergence is computed, nor the MTP layer.
        """
        segments_BS = None if self.attend_across_documents else segments_of(tokens_BS)
        attention: IndexerPhase = "dense" if self.indexer == "dense" else "off"
        normed_BSD = model.read(Whole(tokens_BS, segments_BS, indexer=attention))
        next_BS, _ = scored_targets(tokens_BS)
        rows = zip(normed_BSD.split(1), tokens_BS.split(1), next_BS.split(1), strict=True)
        return torch.stack([_cross_entropy(n, model.lm_head, t, s) for n, t, s in rows])


def scored_targets(
    tokens_BS: Int[Tensor, "B S"],
) -> tuple[Bool[Tensor, "B S-1"], Bool[Tensor, "B S-2"]]:
    """Which targets count, for the next token and for the one after it."""
    inside_BS = tokens_BS != BOS_ID
    return inside_BS[:, 1:], inside_BS[:, 1:-1] & inside_BS[:, 2:]


def _cross_entropy(
    normed_BSD: Tensor, head: Linear, tokens_BS: Tensor, scored_BP: Tensor
) -> Tensor:
    """Sum over scored targets of -log p(target); the last P tokens of a row are its targets."""
    positions = scored_BP.shape[1]
    targets_BS = torch.full_like(tokens_BS, UNSCORED)
    targets_BS[:, :positions] = tokens_BS[:, -positions:].where(scored_BP, UNSCORED)
    return cross_entropy(normed_BSD.flatten(0, 1), head, targets_BS.flatten())
