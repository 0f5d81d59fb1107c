"""Which token is drawn from logits: temperature, top-k, top-p, and inverse transform sampling.

All of it is deterministic: a row's token is a function of its logits and of one uniform number.

Axes: B rows, V vocabulary, K likeliest tokens, C runs of W tokens, X = C * W.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from configs.errors import ConfigError

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
    # Below the likeliest first: a logit over a tiny temperature need not be a number.
    scores_BV = logits_BV - logits_BV.amax(-1, keepdim=True)
    if drawing.temperature != 1:
        scores_BV /= max(drawing.temperature, torch.finfo(scores_BV.dtype).tiny)
    weights_BV = _truncated(scores_BV, drawing).exp_()
    missing = -weights_BV.shape[1] % _RUN
    padded_BX = F.pad(weights_BV, (0, missing)) if missing else weights_BV
    weights_BCW = padded_BX.unflatten(1, (-1, _RUN))
    wide = widest(weights_BCW.device)
    mass_BC = weights_BCW.sum(-1).to(wide)
    run_B1, rest_B1 = _pick(mass_BC, uniform_B.to(mass_BC)[:, None])
    inside_BW = weights_BCW.take_along_dim(run_B1.unsqueeze(-1), dim=1).squeeze(1).to(wide)
    chosen_B1 = run_B1 * _RUN + _pick(inside_BW, rest_B1)[0]
    # Only of a row that is not finite can it lie past the end.
    chosen_B1 = chosen_B1.clamp_max(weights_BV.shape[1] - 1)
    chance_B1 = weights_BV.gather(1, chosen_B1) / mass_BC.sum(-1, keepdim=True)
    return chosen_B1.squeeze(1), chance_B1.log().squeeze(1).to(logits_BV.dtype)


def _pick(mass_BC: Tensor, uniform_B1: Tensor) -> tuple[Tensor, Tensor]:
    """Draw by mass: places [B, 1], and how far into its own mass each uniform number reached."""
    cumulative_BC = mass_BC.cumsum(-1)
    total_B1 = cumulative_BC[:, -1:]
    # Strictly below the total, so that the place found has a mass: half of epsilon takes a number
    # to the next one below, and NPUs have no `nextafter`.
    below = 1 - torch.finfo(total_B1.dtype).eps / 2
    target_B1 = (uniform_B1 * total_B1).minimum(total_B1 * below)
    place_B1 = torch.searchsorted(cumulative_BC, target_B1, right=True)
    place_B1 = place_B1.clamp_max(mass_BC.shape[1] - 1)
    own_B1 = mass_BC.gather(1, place_B1)
    before_B1 = cumulative_BC.gather(1, place_B1) - own_B1
    return place_B1, ((target_B1 - before_B1) / own_B1).clamp(0, 1)


def _truncated(scores_BV: Tensor, drawing: Drawing) -> Tensor:
    """Scores with -inf where top-k or top-p leave a token out."""
    if drawing.top_k is None and drawing.top_p == 1:
        return scores_BV
    falling_BK = _falling(scores_BV)[:, : drawing.top_k]
    last_B1 = torch.full_like(falling_BK[:, :1], falling_BK.shape[1] - 1, dtype=torch.int64)
    if drawing.top_p < 1:
        probabilities_BK = falling_BK.to(widest(falling_BK.device)).softmax(-1)
        before_BK = probabilities_BK.cumsum(-1) - probabilities_BK
        last_B1 = ((before_BK < drawing.top_p).sum(-1, keepdim=True) - 1).clamp_min(0)
    lowest_B1 = falling_BK.gather(1, last_B1)
    kept_BV = scores_BV >= lowest_B1
    excess_B1 = kept_BV.sum(-1, keepdim=True) - 1 - last_B1
    # Elsewhere the question would make the host wait for the device.
    if scores_BV.device.type != "cpu" or bool(excess_B1.any()):
        # Of those that tie for the last place, the highest ids go.
        equal_BV = scores_BV == lowest_B1
        from_end_BV = equal_BV.flip(1).cumsum(-1).flip(1)
        kept_BV &= ~(equal_BV & (from_end_BV <= excess_B1))
    return torch.where(kept_BV, scores_BV, float("-inf"))


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on NPUs, which have nothing wider."""
    return torch.float32 if device.type == "npu" else torch.float64


def _falling(scores_BV: Tensor) -> Tensor:
    """Each row sorted, highest first."""
    if scores_BV.device.type == "cpu":
        # torch carries indices along, and takes some 25 times as long.
        return torch.from_numpy(np.sort(scores_BV.numpy(), axis=-1)).flip(1)
    return scores_BV.sort(dim=-1, descending=True).values
