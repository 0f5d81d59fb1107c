"""DeepSeekMoE: a gate, routed experts and shared experts.

V3 scores by sigmoid and limits a token to the best groups (DeepSeek-V3, section 2.1.2, eq. 12-16);
V4 scores by sqrt(softplus), has no groups, and its first layers take their experts from a frozen
table by token (arXiv 2606.19348, section 2.1).

Axes: T tokens, D width, E routed experts, G groups, K choices, N token copies, I inner width,
V vocabulary.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from configs.model import ModelConfig
from configs.seed import derive
from model.balance import sequence_balance_loss
from model.dispatch import Dispatched, Dispatcher, Routed, counts_of
from model.fp8.experts import fp8_grouped_swiglu
from model.fp8.linear import fp8_linears
from model.fp8.quantized import Quantized
from model.fp8.scheme import HIGH, Fp8, Numerics
from model.grouped import experts_swiglu
from model.layers import SwiGLU
from model.passes import LayerReport, Pass, Whole
from model.weight_cache import cast
from model.widening import widened


class Gate(nn.Module):
    """Chooses K experts a token, by scores in float32."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig, numerics: Numerics = HIGH) -> None:
        super().__init__()
        self.config = config
        self.scheme = numerics.of("gate")
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(
        self, x_TD: Float[Tensor, "T D"], tokens_T: Int[Tensor, " T"] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(experts_TK, gates_TK, scores_TE): choices, their weights, all scores.

        Only a table asks which tokens the rows of `x` stand for.
        """
        if self.scheme is None:
            logits_TE = F.linear(widened(x_TD), widened(self.weight))
        else:
            logits_TE = widened(fp8_linears(x_TD, self.scheme, self.weight)[0])
        match self.config.score_function:
            case "sigmoid":
                scores_TE = torch.sigmoid(logits_TE)
            case "sqrt_softplus":
                # Further down the softplus underflows to 0, where a root has no slope.
                scores_TE = F.softplus(logits_TE.clamp_min(-80)).sqrt()
        experts_TK = self.choose(scores_TE.detach(), tokens_T)
        gates_TK = scores_TE.gather(1, experts_TK)
        if self.config.norm_topk_prob:
            gates_TK = gates_TK / (gates_TK.sum(-1, keepdim=True) + 1e-20)
        return experts_TK, gates_TK * self.config.routed_scaling_factor, scores_TE

    def choose(
        self, scores_TE: Float[Tensor, "T E"], tokens_T: Int[Tensor, " T"] | None
    ) -> Int[Tensor, "T K"]:
        """Top-k of score + bias; with groups, within those whose two best experts sum highest."""
        choice_TE = scores_TE + self.e_score_correction_bias
        groups, reached = self.config.routing_groups
        if groups > 1:
            choice_TGM = choice_TE.unflatten(1, (groups, -1))
            group_TG = choice_TGM.topk(2, dim=-1).values.sum(-1)
            best_TG = group_TG.topk(reached, dim=-1, sorted=False).indices
            out_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter_(1, best_TG, False)
            choice_TE = choice_TGM.masked_fill(out_TG.unsqueeze(-1), float("-inf")).flatten(1)
        return choice_TE.topk(self.config.num_experts_per_tok, dim=-1, sorted=False).indices


class HashGate(Gate):
    """Takes a token's experts from a frozen table; only their weights are learnt."""

    tid2eid: Tensor

    def __init__(self, config: ModelConfig, numerics: Numerics = HIGH) -> None:
        super().__init__(config, numerics)
        del self.e_score_correction_bias
        shape = config.vocab_size, config.num_experts_per_tok
        self.register_buffer("tid2eid", torch.zeros(shape, dtype=torch.int64))

    def choose(
        self, scores_TE: Float[Tensor, "T E"], tokens_T: Int[Tensor, " T"] | None
    ) -> Int[Tensor, "T K"]:
        """The table's row of each token."""
        assert tokens_T is not None
        return self.tid2eid[tokens_T]

    def draw(self, seed: int, name: str) -> None:
        """Fill the table: for each token K distinct experts, all sets equally likely."""
        vocabulary, choices = self.tid2eid.shape
        generator = torch.Generator().manual_seed(derive(seed, "init", name, "tid2eid"))
        draws_VE = torch.rand(vocabulary, self.config.n_routed_experts, generator=generator)
        self.tid2eid.copy_(draws_VE.topk(choices, dim=1).indices)


class RoutedExperts(nn.Module):
    """The routed experts that live on this device, stacked."""

    def __init__(self, config: ModelConfig, local: tuple[int, ...], scheme: Fp8 | None) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(len(local), 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(len(local), width, inner))
        self.local = local
        """Their global numbers, in the order in which they are stacked."""
        self.scheme = scheme
        self.limit = config.activation_limit

    def quantized(self, x_TD: Float[Tensor, "T D"]) -> Quantized | None:
        """The tokens as these experts read them in FP8, if each row is quantised by itself."""
        if self.scheme is None or not self.scheme.by_row:
            return None
        with torch.no_grad():
            return self.scheme.activations(x_TD)

    def forward(self, sent: Dispatched) -> Float[Tensor, "R D"]:
        """Each row's sum of what its visits give: an expert's SwiGLU times the visit's gate."""
        gate_up_EJD, down_EDI = self.gate_up_proj, self.down_proj
        if self.scheme is None:
            dtype = sent.x_RD.dtype
            return experts_swiglu(sent, cast(gate_up_EJD, dtype), cast(down_EDI, dtype), self.limit)
        return fp8_grouped_swiglu(sent, gate_up_EJD, down_EDI, self.limit, self.scheme)


class MoE(nn.Module):
    """Shared experts for every token plus K routed ones."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        numerics: Numerics,
        dispatcher: Dispatcher,
    ) -> None:
        super().__init__()
        self.config = config
        self.dispatcher = dispatcher
        self.layer = layer_name(layer)
        self.gate = (HashGate if config.routes_by_hash(layer) else Gate)(config, numerics)
        self.experts = RoutedExperts(
            config, dispatcher.experts(self.layer), numerics.of("routed_experts")
        )
        self.shared_experts = SwiGLU(
            config.hidden_size,
            config.n_shared_experts * config.moe_intermediate_size,
            numerics.of("shared_experts"),
            limit=self.experts.limit,
        )

    @property
    def bias_E(self) -> Tensor | None:
        """The routing bias, which balancing moves; none where a table routes."""
        return None if isinstance(self.gate, HashGate) else self.gate.e_score_correction_bias

    def route(self, x_BSD: Float[Tensor, "B S D"], batch: Pass) -> tuple[Routed, LayerReport]:
        """Choose each token's experts. The report counts tokens of padding too."""
        x_TD = x_BSD.flatten(0, 1)
        experts_TK, gates_TK, scores_TE = self.gate(x_TD, batch.tokens_BS.flatten())
        counts_E = counts_of(experts_TK, self.config.n_routed_experts)
        balance = None
        if isinstance(batch, Whole) and batch.balance and self.bias_E is not None:
            scores_BSE = scores_TE.unflatten(0, x_BSD.shape[:2])
            balance = sequence_balance_loss(scores_BSE, experts_TK.shape[1]).sum()
        routed = Routed(
            self.layer, x_TD, experts_TK, gates_TK, counts_E, self.experts.quantized(x_TD)
        )
        routing = experts_TK if batch.routing else None
        return routed, LayerReport(self.layer, counts_E, routing, balance)

    def forward(
        self, x_BSD: Float[Tensor, "B S D"], batch: Pass
    ) -> tuple[Float[Tensor, "B S D"], LayerReport]:
        """Route, visit, add the shared experts: a layer without its stream."""
        routed, report = self.route(x_BSD, batch)
        return self.carry(routed, partial(self.shared_experts, x_BSD), self.experts), report

    def carry(
        self,
        routed: Routed,
        aside: Callable[[], Tensor],
        experts: Callable[[Dispatched], Tensor],
    ) -> Float[Tensor, "B S D"]:
        """Send tokens to `experts` and back, and add what is computed `aside` meanwhile."""
        flight = self.dispatcher.send(routed)
        aside_BSD = aside()
        returning = flight.back(experts(flight.rows()))
        return returning.home().view_as(aside_BSD) + aside_BSD


def layer_name(index: int) -> str:
    """The module name of a model's layer."""
    return f"model.layers.{index}"
