"""What every lightning indexer does with its scores: pick entries, and learn from attention.

An indexer scores each entry s for each query t as I(t, s) = sum over heads of
w(t, j) * ReLU(q(t, j) . k(s)) (DeepSeek-V3.2-Exp, eq. 1). Entries are tokens in V3.2 and compressed
blocks in V4.

Axes: Q queries (any leading axes), L entries, K kept, J indexer heads, W indexer head width.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from model.widening import widened

NONE = -1
"""The index that stands for no entry, where fewer than K are visible."""


def index_scores(
    q_BSJW: Float[Tensor, "B S J W"],
    k_BLW: Float[Tensor, "B L W"],
    weights_BSJ: Float[Tensor, "B S J"],
) -> Float[Tensor, "B S L"]:
    """I(t, s), float32 at least, with the scales of the released models: W^-0.5 and J^-0.5."""
    heads, width = q_BSJW.shape[-2:]
    dots_BSJL = torch.einsum("bsjw,blw->bsjl", widened(q_BSJW), widened(k_BLW))
    weights_BS1J = (widened(weights_BSJ) * (width**-0.5 * heads**-0.5)).unsqueeze(-2)
    # In place: these are the largest tensors of an indexer, and their signs are all that is kept.
    scores_BS1L: Tensor = weights_BS1J @ F.relu(dots_BSJL, inplace=True)
    return scores_BS1L.squeeze(-2)


def choose(
    scores_QL: Float[Tensor, "*Q L"], visible_QL: Bool[Tensor, "*Q L"], keep: int
) -> Int[Tensor, "*Q K"]:
    """The `keep` visible entries of highest score, in no order; K = min(keep, L).

    NONE fills up where fewer are visible. Of entries that tie for the last place, those of lowest
    index are taken: ReLU makes exact ties at zero when heads are few, and torch's own choice among
    them is not specified.
    """
    entries = scores_QL.shape[-1]
    kept = min(keep, entries)
    masked_QL = scores_QL.masked_fill(~visible_QL, float("-inf"))
    if kept == 0:
        return torch.empty(*scores_QL.shape[:-1], 0, dtype=torch.int64, device=scores_QL.device)
    values_QK, chosen_QK = masked_QL.topk(kept, dim=-1, sorted=False)
    last_Q1 = values_QK.amin(-1, keepdim=True)
    if masked_QL.device.type != "cpu":
        return _lowest_of_equals(masked_QL, last_Q1, kept)
    tied_Q = (masked_QL >= last_Q1).sum(-1) > kept
    tied_Q &= last_Q1.squeeze(-1) > float("-inf")
    if bool(tied_Q.any()):
        rows_RL, last_R1 = masked_QL[tied_Q], last_Q1[tied_Q]
        above_RL = rows_RL > last_R1
        room_R1 = kept - above_RL.sum(-1, keepdim=True)
        equal_RL = rows_RL == last_R1
        taken_RL = above_RL | (equal_RL & (equal_RL.cumsum(-1) <= room_R1))
        chosen_QK[tied_Q] = taken_RL.nonzero()[:, 1].view(-1, kept)
    return chosen_QK.masked_fill(values_QK.eq(float("-inf")), NONE)


def _lowest_of_equals(masked_QL: Tensor, last_Q1: Tensor, kept: int) -> Tensor:
    """What `choose` gives, in the order of entries, whether or not there are ties.

    Which rows have some, the host would have to wait for the device to know.
    """
    above_QL = masked_QL > last_Q1
    equal_QL = (masked_QL == last_Q1) & (last_Q1 > float("-inf"))
    room_Q1 = kept - above_QL.sum(-1, keepdim=True)
    taken_QL = above_QL | (equal_QL & (equal_QL.cumsum(-1) <= room_Q1))
    # One more place takes what is not taken.
    place_QL = torch.where(taken_QL, taken_QL.cumsum(-1) - 1, kept)
    every_QL = torch.arange(masked_QL.shape[-1], device=masked_QL.device).expand(masked_QL.shape)
    chosen_QK = torch.full_like(last_Q1, NONE, dtype=torch.int64).repeat_interleave(
        kept + 1, dim=-1, output_size=kept + 1
    )
    return chosen_QK.scatter_(-1, place_QL, every_QL)[..., :kept]


def divergence(
    scores_QK: Float[Tensor, "*Q K"],
    attention_QK: Float[Tensor, "*Q K"],
    visible_QK: Bool[Tensor, "*Q K"],
) -> Float[Tensor, "*Q"]:
    """KL(p || softmax(I)) of each query, in nats, over the entries that are visible.

    `attention` are the main attention's probabilities summed over its heads; they are normalised
    here to sum to 1 and never receive a gradient (section 2.1: the indexer learns from this alone,
    the model from the language loss alone). 0 for queries that see no entry.
    """
    p_QK = widened(attention_QK.detach()).masked_fill(~visible_QK, 0.0)
    least = torch.finfo(p_QK.dtype)
    p_QK = p_QK / p_QK.sum(-1, keepdim=True).clamp_min(least.tiny)
    log_q_QK = widened(scores_QK).masked_fill(~visible_QK, least.min).log_softmax(-1)
    terms_QK = p_QK * (p_QK.clamp_min(least.tiny).log() - log_q_QK)
    return torch.where(p_QK > 0, terms_QK, torch.zeros_like(terms_QK)).sum(-1)
