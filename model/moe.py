"""DeepSeekMoE: sigmoid gate with node-limited groups, routed experts, shared experts.

DeepSeek-V3, section 2.1.2, eq. 12-16.

Axes: T tokens, D width, E routed experts, G groups, K choices, N token copies, I inner width.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from configs.model import ModelConfig
from configs.train import Precision
from model.dispatch import TokenDispatcher
from model.fp8.grouped import grouped_linear
from model.layers import SwiGLU


class Gate(nn.Module):
    """Chooses K experts a token; scores in float32 whatever the model's precision."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x_TD: Float[Tensor, "T D"]) -> tuple[Tensor, Tensor, Tensor]:
        """(experts_TK, gates_TK, scores_TE): choices, their weights, all sigmoid scores."""
        scores_TE = torch.sigmoid(F.linear(x_TD.float(), self.weight.float()))
        experts_TK = self._choose(scores_TE.detach())
        gates_TK = scores_TE.gather(1, experts_TK)
        if self.config.norm_topk_prob:
            gates_TK = gates_TK / (gates_TK.sum(-1, keepdim=True) + 1e-20)
        return experts_TK, gates_TK * self.config.routed_scaling_factor, scores_TE

    def _choose(self, scores_TE: Float[Tensor, "T E"]) -> Int[Tensor, "T K"]:
        """Top-k of score + bias within the groups whose two best experts sum highest."""
        config = self.config
        choice_TE = scores_TE + self.e_score_correction_bias
        if config.n_group > 1:
            choice_TGM = choice_TE.unflatten(1, (config.n_group, -1))
            group_TG = choice_TGM.topk(2, dim=-1).values.sum(-1)
            kept_TG = torch.zeros_like(group_TG, dtype=torch.bool)
            kept_TG.scatter_(
                1, group_TG.topk(config.topk_group, dim=-1, sorted=False).indices, True
            )
            choice_TE = choice_TGM.masked_fill(~kept_TG.unsqueeze(-1), float("-inf")).flatten(1)
        return choice_TE.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices


class RoutedExperts(nn.Module):
    """The routed experts that live on this device, stacked."""

    def __init__(self, config: ModelConfig, local: range, precision: Precision) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(len(local), 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(len(local), width, inner))
        self.local = local
        self.precision = precision

    def forward(
        self, x_ND: Float[Tensor, "N D"], counts_E: Int[Tensor, " E"]
    ) -> Float[Tensor, "N D"]:
        """SwiGLU of each row by its expert; rows are sorted by expert, `counts_E` of each."""
        inner_NJ = grouped_linear(
            x_ND, self.gate_up_proj, counts_E, precision=self.precision, halves=2
        )
        gate_NI, up_NI = inner_NJ.chunk(2, dim=-1)
        return grouped_linear(
            F.silu(gate_NI) * up_NI, self.down_proj, counts_E, precision=self.precision
        )


class MoE(nn.Module):
    """Shared experts for every token plus K routed ones.

    After a forward in training mode `load_E` counts the copies sent to each expert and
    `routing` holds (experts_TK, scores_TE) for the balance loss.
    """

    def __init__(
        self, config: ModelConfig, precision: Precision, dispatcher: TokenDispatcher
    ) -> None:
        super().__init__()
        self.config = config
        self.dispatcher = dispatcher
        local = dispatcher.local_experts(config.n_routed_experts)
        self.gate = Gate(config)
        self.experts = RoutedExperts(config, local, precision)
        self.shared_experts = SwiGLU(
            config.hidden_size, config.n_shared_experts * config.moe_intermediate_size, precision
        )
        self.load_E = torch.zeros(config.n_routed_experts)
        self.routing: tuple[Tensor, Tensor] | None = None

    def forward(self, x_BSD: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        """Route, visit, combine, add the shared experts."""
        x_TD = x_BSD.flatten(0, 1)
        experts_TK, gates_TK, scores_TE = self.gate(x_TD)
        if self.training:
            num_experts = self.config.n_routed_experts
            self.load_E += torch.bincount(experts_TK.flatten(), minlength=num_experts)
            self.routing = (experts_TK, scores_TE)
        sent = self.dispatcher.dispatch(x_TD, experts_TK, self.config.n_routed_experts)
        routed_ND = self.experts(sent.x_ND, sent.counts_E)
        routed_TD = self.dispatcher.combine(routed_ND, gates_TK, sent)
        shared_BSD: Tensor = self.shared_experts(x_BSD)
        return routed_TD.view_as(x_BSD) + shared_BSD
