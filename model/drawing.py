"""Which token is drawn from logits: temperature, top-k, top-p, and inverse transform sampling.

All of it is deterministic: a row's token is a function of its logits and of one uniform number.

Axes: B rows, V vocabulary, K tokens that truncation leaves (or all), C runs of W tokens.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from configs.errors import ConfigError
from model.indexer import choose

_FIRST_RANKED = 256
"""How many of the likeliest tokens are sorted at first, in the hope that top-p wants no more."""
_RUN = 64
"""Tokens whose probabilities are summed before any are cumulated: a running sum over a whole
vocabulary costs more than everything else here."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """How a token is chosen from logits. ConfigError for a number that means nothing."""

    temperature: float = 0.0
    """0 takes the likeliest token, of equals the lowest id, whatever the other two say."""
    top_k: int | None = None
    """Keep only this many of the likeliest tokens; of equals, the lower ids."""
    top_p: float = 1.0
    """Then keep the fewest likeliest tokens whose probabilities reach this sum."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(
                f"temperature = {self.temperature}, but it must be a number of 0 or more; 0 takes "
                "the likeliest token, 1 samples as the model was trained"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(
                f"top_k = {self.top_k}, but 1 token or more must be left; none keeps all"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(
                f"top_p = {self.top_p}, but it must be above 0 and at most 1; 1 keeps all tokens"
            )


def draw(
    logits_BV: Float[Tensor, "B V"], drawing: Drawing, uniform_B: Float[Tensor, " B"]
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """Tokens, with their log-probabilities after temperature and truncation.

    At temperature 0 those are the likeliest token's at temperature 1. `uniform` lies in [0, 1).
    Of a row whose logits are not finite the log-probability is not either, and its token is
    arbitrary.
    """
    if drawing.temperature == 0:
        # torch promises the first of equals.
        best = logits_BV.max(-1)
        return best.indices, best.values - logits_BV.logsumexp(-1)
    scores_BV = logits_BV if drawing.temperature == 1 else logits_BV / drawing.temperature
    scores_BK, ids_BK = _kept(scores_BV, drawing)
    weights_BK = (scores_BK - scores_BK.amax(-1, keepdim=True)).exp_()
    padded_BX = F.pad(weights_BK, (0, -weights_BK.shape[1] % _RUN))
    weights_BCW = padded_BX.unflatten(1, (-1, _RUN))
    mass_BC = weights_BCW.sum(-1).double()
    run_B1, rest_B1 = _pick(mass_BC, uniform_B.to(mass_BC)[:, None])
    inside_BW = weights_BCW.take_along_dim(run_B1.unsqueeze(-1), dim=1).squeeze(1).double()
    place_B1 = run_B1 * _RUN + _pick(inside_BW, rest_B1)[0]
    # Only of a row that is not finite can it lie past the end.
    place_B1 = place_B1.clamp_max(scores_BK.shape[1] - 1)
    chosen_B1 = place_B1 if ids_BK is None else ids_BK.gather(1, place_B1)
    logprobs_B1 = (
        weights_BK.gather(1, place_B1).double().log() - mass_BC.sum(-1, keepdim=True).log()
    )
    return chosen_B1.squeeze(1), logprobs_B1.squeeze(1).to(logits_BV.dtype)


def _pick(mass_BC: Tensor, uniform_B1: Tensor) -> tuple[Tensor, Tensor]:
    """Draw by mass: places [B, 1], and how far into its own mass each uniform number reached."""
    cumulative_BC = mass_BC.cumsum(-1)
    total_B1 = cumulative_BC[:, -1:]
    # Strictly below the total, so that the place found has a mass.
    target_B1 = (uniform_B1 * total_B1).minimum(total_B1.nextafter(torch.zeros_like(total_B1)))
    place_B1 = torch.searchsorted(cumulative_BC, target_B1, right=True)
    place_B1 = place_B1.clamp_max(mass_BC.shape[1] - 1)
    own_B1 = mass_BC.gather(1, place_B1)
    before_B1 = cumulative_BC.gather(1, place_B1) - own_B1
    return place_B1, ((target_B1 - before_B1) / own_B1).clamp(0, 1)


def _kept(scores_BV: Tensor, drawing: Drawing) -> tuple[Tensor, Tensor | None]:
    """What truncation leaves, as (scores_BK, ids_BK) with -inf for what it does not; or all."""
    vocabulary = scores_BV.shape[1]
    if drawing.top_k is not None:
        scores_BK, ids_BK = _ranked(scores_BV, min(drawing.top_k, vocabulary))
        probabilities_BK = scores_BK.double().softmax(-1)
    elif drawing.top_p < 1:
        total_B1 = scores_BV.double().logsumexp(-1, keepdim=True)
        count = _FIRST_RANKED
        while True:
            scores_BK, ids_BK = _ranked(scores_BV, min(count, vocabulary))
            probabilities_BK = (scores_BK - total_B1).exp()
            reached_B = probabilities_BK.sum(-1) >= drawing.top_p
            if count >= vocabulary or bool(reached_B.all()):
                break
            count *= 8
    else:
        return scores_BV, None
    if drawing.top_p < 1:
        before_BK = probabilities_BK.cumsum(-1) - probabilities_BK
        scores_BK = scores_BK.masked_fill(before_BK >= drawing.top_p, float("-inf"))
    return scores_BK, ids_BK


def _ranked(scores_BV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest scores, falling, and their ids; of equals, the lower ids come first."""
    chosen_BK = choose(scores_BV, torch.ones_like(scores_BV, dtype=torch.bool), count)
    ids_BK = chosen_BK.sort(dim=-1).values
    ranked_BK = scores_BV.gather(1, ids_BK).sort(dim=-1, descending=True, stable=True)
    return ranked_BK.values, ids_BK.gather(1, ranked_BK.indices)
