"""One rank of training: forward_backward, optim_step, save, load.

Dense parameters are replicated and their gradients summed over the ranks; experts are sharded and
see every rank's tokens through the dispatcher, so their gradients are whole already.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.checkpoint import load_shards, save_shard
from cluster.expert_parallel import AllToAllDispatcher
from configs.errors import TrainingError
from configs.model import ModelConfig
from configs.train import BalanceConfig, OptimConfig, Precision
from model.balance import imbalance, updated_bias
from model.dispatch import LocalDispatcher
from model.engram import set_vocabulary
from model.fp8.recorder import Recorder, Tally
from model.fp8.scheme import Numerics, schemes, settle
from model.moe import RoutedExperts
from model.optim import adamw, moments, restore_moments
from model.transformer import Transformer
from model.weights import families

Batch = Mapping[str, Tensor]
"""This rank's part of a batch, by field name."""


@runtime_checkable
class LossSpec(Protocol):
    """What is minimised. Both methods see one rank's part; sums over ranks are the whole."""

    def counts(self, batch: Batch) -> dict[str, float]:
        """This rank's contribution to each normaliser."""

    def __call__(
        self, model: Transformer, batch: Batch, totals: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, float]]:
        """(loss, metrics): both add up over ranks to those of the whole batch.

        `totals` holds the sums of `counts` over all ranks.
        """


class Trainer:
    """A model with its optimiser on one rank."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        optim: OptimConfig,
        balance: BalanceConfig,
        precision: Precision | Numerics,
        seed: int,
        vocabulary: Sequence[int] | None = None,
    ) -> None:
        """Join the current process group's experts, or hold all of them where there is none.

        `vocabulary` is what a new model's memories are told of its tokens (`model.engram`).
        """
        self.parallel = dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self.parallel else 0
        self.world = dist.get_world_size() if self.parallel else 1
        self.optim, self.balance = optim, balance
        dispatcher = AllToAllDispatcher() if self.parallel else LocalDispatcher()
        wanted = precision if isinstance(precision, Numerics) else Numerics(precision)
        # Two models of one job, as a policy and its reference, are watched apart.
        self.asked = wanted.precision
        wanted = replace(wanted, recorder=Recorder())
        self.numerics, self.products = settle(wanted, torch.device("cpu"))
        self.model = Transformer(config, precision=self.numerics, dispatcher=dispatcher)
        if self.numerics.precision == "fp8" and not schemes(self.model):
            self.numerics = replace(self.numerics, precision="high")
            self.products = "high precision: the table of parts leaves none of this model's to FP8"
        self.model.initialize(seed).train()
        if vocabulary is not None:
            set_vocabulary(self.model, vocabulary)
        self.optimizer = adamw(self.model, optim)
        self.step = 0
        sharded = expert_parameter_names(self.model)
        named = dict(self.model.named_parameters())
        self.experts = [named[name] for name in sorted(sharded)]
        self.dense = [parameter for name, parameter in named.items() if name not in sharded]

    def forward_backward(
        self, batch: Batch, loss: LossSpec, *, counting: bool = False
    ) -> dict[str, float]:
        """Add the gradients of `loss` on this rank's part; metrics of the whole batch.

        `counting` tallies what FP8 does to every tensor, for `fp8_tallies`.
        """
        totals = self._sum(loss.counts(batch))
        recorder = self.numerics.recorder
        recorder.start(counting=counting)
        try:
            value, metrics = loss(self.model, batch, totals)
            value.backward()
        finally:
            recorder.stop()
        for block in self.model.moe_layers().values():
            block.routing = None
        metrics = self._sum({"loss": float(value.detach()), **metrics})
        if not all(torch.isfinite(torch.tensor(list(metrics.values())))):
            raise TrainingError(
                f"step {self.step + 1}: not finite: {metrics}{self._culprit()}; lower the learning "
                "rate, or look at the batch"
            )
        return metrics

    def fp8_tallies(self) -> dict[str, Tally]:
        """What FP8 did to each role's tensors in the last forward_backward, over all ranks."""
        mine = self.numerics.recorder.tallies
        if not self.parallel or not mine:
            return mine
        # A rank whose experts nobody visited has the same roles, with nothing in them.
        roles = sorted(mine)
        sums = torch.tensor(
            [[mine[r].nonzero, mine[r].clipped, mine[r].flushed, mine[r].lost] for r in roles],
            dtype=torch.float64,
        )
        ends = torch.tensor([[-mine[r].low, mine[r].high] for r in roles], dtype=torch.float64)
        dist.all_reduce(sums)
        dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        ends[:, 0].neg_()
        rows = zip(roles, sums.tolist(), ends.tolist(), strict=True)
        return {role: Tally(*count, *end) for role, count, end in rows}

    def news(self) -> dict[str, Any]:
        """What a first record says of how this process computes; a note if not as was asked."""
        told: dict[str, Any] = {"tags": {"fp8.products": self.products}}
        if self.asked != self.numerics.precision:
            told["notes"] = [f"warning: {self.products}"]
        return told

    def optim_step(self, learning_rate: float) -> dict[str, Any]:
        """Sum and clip gradients, step AdamW, move the routing bias.

        TrainingError, before anything is changed, if the gradient is not finite. Returns
        `grad_norm` before clipping, `imbalance` (the worst of the layers whose routing can be
        balanced, 0 where none can) and `expert_load`, every layer's share of token copies by
        expert.
        """
        for parameter in [*self.dense, *self.experts]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.parallel:
            self._all_reduce([grad_of(parameter) for parameter in self.dense])
        norm = self._grad_norm()
        if not math.isfinite(norm):
            raise TrainingError(
                f"step {self.step + 1}: the gradient's norm is {norm}{self._culprit()}; lower the "
                "learning rate, or look at the batch"
            )
        factor = min(1.0, self.optim.max_grad_norm / (norm + 1e-6))
        for parameter in [*self.dense, *self.experts]:
            grad_of(parameter).mul_(factor)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_factor"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.numerics.recorder.forget()
        self.step += 1
        return {"grad_norm": norm} | self._rebalance()

    def state(self) -> dict[str, Tensor]:
        """This rank's part of the weights: its experts and, on rank 0, everything else."""
        mine = expert_parameter_names(self.model)
        state = self.model.state_dict()
        return {n: t for n, t in state.items() if n in mine or self.rank == 0}

    def save(self, folder: Path) -> None:
        """Write this rank's shard of the weights and moments."""
        mine = expert_parameter_names(self.model)
        kept = {n: t for n, t in self.model.named_parameters() if n in mine or self.rank == 0}
        tensors = self.state() | moments(self.optimizer, kept.items())
        save_shard(folder, tensors, self.expert_ranges(), rank=self.rank, world=self.world)

    def load(self, folder: Path, *, step: int) -> None:
        """Read a sharded save, whatever number of ranks wrote it."""
        tensors = load_shards(folder, self.expert_ranges())
        self.load_weights(tensors)
        restore_moments(self.optimizer, self.model.named_parameters(), tensors, step)
        self.step = step

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy weights by Ingot name; experts must be this rank's slice already."""
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                tensor.copy_(tensors[name])

    def load_whole(self, tensors: Mapping[str, Tensor]) -> None:
        """Take this rank's part of a whole model under Hugging Face names."""
        state = families.from_hf(self.model.config, tensors)
        for prefix, local in self.expert_ranges().items():
            for name in [name for name in state if name.startswith(f"{prefix}.")]:
                state[name] = state[name][local.start : local.stop]
        self.load_weights(state)

    def expert_ranges(self) -> dict[str, range]:
        """Module names of stacked experts -> the global experts this rank holds."""
        return {
            name: module.local
            for name, module in self.model.named_modules()
            if isinstance(module, RoutedExperts)
        }

    def _culprit(self) -> str:
        """Which tensors were the first that FP8 found not finite on any rank, if any."""
        recorder = self.numerics.recorder
        place = recorder.first_not_finite()
        if self.parallel:
            # All ranks compute the same products in the same order, and say the same of them.
            first = torch.tensor(math.inf if place is None else place, dtype=torch.float64)
            dist.all_reduce(first, op=dist.ReduceOp.MIN)
            place = int(first) if first.isfinite() else None
        return "" if place is None else f", first in {recorder.role(place).replace('_', ' ')}"

    def _rebalance(self) -> dict[str, Any]:
        blocks = list(self.model.moe_layers().values())
        if not blocks:
            return {}
        load_LE = torch.stack([block.load_E for block in blocks])
        if self.parallel:
            dist.all_reduce(load_LE)
        load_LE = load_LE.float()
        worst = 0.0
        for block, load_E in zip(blocks, load_LE, strict=True):
            if (bias := block.bias_E) is not None:
                bias.copy_(updated_bias(bias, load_E, self.balance.bias_update_speed))
                worst = max(worst, imbalance(load_E))
            block.load_E.zero_()
        # The MTP layer's experts have no load where only the next token is predicted.
        share_LE = load_LE / load_LE.sum(1, keepdim=True).clamp_min(1)
        load = [[round(share, 5) for share in row] for row in share_LE.tolist()]
        return {"imbalance": worst, "expert_load": load}

    def _grad_norm(self) -> float:
        dense = sum(float(grad_of(p).double().square().sum()) for p in self.dense)
        experts = torch.tensor(
            sum(float(grad_of(p).double().square().sum()) for p in self.experts),
            dtype=torch.float64,
        )
        if self.parallel:
            dist.all_reduce(experts)
        return float((dense + experts) ** 0.5)

    def _all_reduce(self, tensors: list[Tensor]) -> None:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        offset = 0
        for tensor in tensors:
            tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
            offset += tensor.numel()

    def _sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over ranks, in float64, by key."""
        keys = sorted(values)
        total = torch.tensor([values[key] for key in keys], dtype=torch.float64)
        if self.parallel:
            dist.all_reduce(total)
        return dict(zip(keys, total.tolist(), strict=True))


def grad_of(parameter: nn.Parameter) -> Tensor:
    """The gradient, which must be there."""
    assert parameter.grad is not None
    return parameter.grad


def expert_parameter_names(model: Transformer) -> set[str]:
    """Names of the parameters that are sharded over the expert axis."""
    return {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if isinstance(module, RoutedExperts)
        for leaf, _ in module.named_parameters()
    }
