"""One rank of training: forward_backward, optim_step, save, load.

Dense parameters are replicated and their gradients summed over the ranks. Experts are divided over
an axis of ranks, whose tokens all reach them through the dispatcher; where there are several such
axes, each holds the experts once, and their gradients are summed over these copies.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from cluster.backend import CPU, Backend
from cluster.checkpoint import load_shards, save_shard
from cluster.device_errors import first_line
from cluster.figures import Figures, fetch, summed
from cluster.groups import Groups
from cluster.memory import Room, telling_of_model, telling_when_full
from cluster.models import Computing, build_model, expert_ranges, take_part
from configs.errors import ConfigError, TrainingError
from configs.model import ModelConfig
from configs.train import BalanceConfig, OptimConfig, Precision
from model.balance import imbalance, updated_bias
from model.engram import set_vocabulary
from model.finite import in_backward_order, is_finite, watched
from model.fp8.recorder import Tally
from model.fp8.scheme import Numerics
from model.moe import RoutedExperts
from model.optim import adamw, moments, rate_group, restore_moments, set_rates
from model.transformer import Transformer
from model.weight_cache import forget, keep

_SQUARE, _LOAD = "square of the norm of ", "load"
"""Names of what is read at the end of a step beside the loss's own figures."""
Batch = Mapping[str, Tensor]
"""This rank's part of a batch, by field name."""


@runtime_checkable
class LossSpec(Protocol):
    """What is minimised. Both methods see one rank's part; sums over ranks are the whole."""

    def counts(self, batch: Batch) -> dict[str, float]:
        """This rank's contribution to each normaliser."""

    def __call__(
        self, model: Transformer, batch: Batch, totals: Mapping[str, float]
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """(loss, metrics): both add up over ranks to those of the whole batch.

        `totals` holds the sums of `counts` over all ranks.
        """


Measure = Callable[[Transformer, Batch], Mapping[str, float]]
"""Figures of one rank's part of a batch that add up over batches and ranks, the same each time."""


@telling_of_model
def build_trainer(
    config: ModelConfig,
    *,
    optim: OptimConfig,
    balance: BalanceConfig,
    precision: Precision | Numerics,
    seed: int,
    vocabulary: Sequence[int] | None = None,
    backend: Backend = CPU,
    groups: Groups | None = None,
) -> "Trainer":
    """A trainer of a new model, drawn by `seed`, with this rank's share of its experts.

    The experts are divided as `groups` says, else over the current process group; without one they
    are all here.
    `vocabulary` is what a new model's memories are told of its tokens (`model.engram`).
    """
    groups = groups or Groups.of_world()
    model, computing = build_model(config, precision=precision, backend=backend, groups=groups)
    # Values are drawn on the CPU, so that a model begins alike on every device.
    model.initialize(seed).train()
    if vocabulary is not None:
        set_vocabulary(model, vocabulary)
    model.to(backend.device)
    return Trainer(model, computing, optim=optim, balance=balance, backend=backend, groups=groups)


class Trainer:
    """A model with its optimiser on one rank."""

    def __init__(
        self,
        model: Transformer,
        computing: Computing,
        *,
        optim: OptimConfig,
        balance: BalanceConfig,
        backend: Backend = CPU,
        groups: Groups | None = None,
    ) -> None:
        """`model` lies on the backend's device already."""
        self.model, self.computing, self.numerics = model, computing, computing.numerics
        self.optim, self.balance, self.backend = optim, balance, backend
        self.groups = groups or Groups.of_world()
        self.mesh = self.groups.mesh
        self.rank, self.world = self.mesh.rank, self.mesh.world
        self.parallel = self.world > 1
        self.optimizer = adamw(model, optim)
        self.step = 0
        self.sharded = expert_parameter_names(model)
        self.blocks = list(model.moe_layers().values())
        self.load_LE = torch.zeros(
            len(self.blocks),
            model.config.n_routed_experts,
            dtype=torch.int64,
            device=model.lm_head.weight.device,
        )
        self.room = Room()
        self.given: tuple[Sequence[Batch], LossSpec, Mapping[str, float]] | None = None
        """What the gradients were last made of, while there are any."""
        keep(model)

    @telling_when_full
    def forward_backward(
        self, batch: Batch, loss: LossSpec, *, counting: bool = False
    ) -> dict[str, float]:
        """Add the gradients of `loss` on this rank's part; metrics of the whole batch.

        `counting` tallies what FP8 does to every tensor, for `fp8_tallies`.
        """
        found = self._over_ranks(self._backward([batch], loss, counting))
        return self._finite({name: float(one) for name, one in found.items()})

    @telling_when_full
    def train_step(
        self,
        batch: Batch,
        loss: LossSpec,
        learning_rate: float,
        *,
        indexer_learning_rate: float | None = None,
        counting: bool = False,
        micro_batches: int = 1,
    ) -> dict[str, Any]:
        """`forward_backward` and `optim_step` on it; the device is waited for once for both.

        Rows are taken in so many equal parts, the same number on all ranks.
        """
        metrics = self._backward(parted(batch, micro_batches), loss, counting)
        found = self._over_ranks(metrics | self._gradients())
        told = self._finite({name: float(found.pop(name)) for name in sorted(metrics)})
        rates = learning_rate, indexer_learning_rate
        return told | self._update(found, *rates)

    def _backward(
        self, parts: Sequence[Batch], loss: LossSpec, counting: bool
    ) -> dict[str, float | Tensor]:
        """The loss and its metrics, of this rank's rows, where they were computed."""
        # Of the host's rows: counts of the device's would be waited for.
        counts = [loss.counts(part) for part in parts]
        own = {name: math.fsum(one[name] for one in counts) for name in counts[0]}
        totals = read_sums(own, self.parallel)
        self.given = parts, loss, totals
        found: dict[str, float | Tensor] = {}
        recorder = self.numerics.recorder
        recorder.start(counting=counting)
        try:
            for part in parts:
                value, metrics = loss(self.model, self.backend.place(part), totals)
                value.backward()
                for name, one in {"loss": value.detach(), **metrics}.items():
                    found[name] = found[name] + one if name in found else one
                self._take_load()
        finally:
            recorder.stop()
        return found

    def _take_load(self) -> None:
        """Add what the last pass sent to each expert."""
        for block, load_E in zip(self.blocks, self.load_LE, strict=True):
            # The MTP layer is at rest where only the next token is predicted.
            load_E += block.load_E
            block.load_E.zero_()
            block.routing = None

    @telling_when_full
    @torch.no_grad()
    def measure(self, batches: Iterable[Batch], sums: Measure) -> dict[str, float]:
        """Totals over batches and ranks of what `sums` finds, with the model in evaluation mode.

        Changes nothing of the training: no load, tally, gradient or random state. Experts are asked
        by all ranks together, so each rank must give equally many batches, and at least one.
        """
        self.model.eval()
        try:
            found = [sums(self.model, self.backend.place(batch)) for batch in batches]
        finally:
            self.model.train()
        totals = {name: math.fsum(part[name] for part in found) for name in found[0]}
        return read_sums(totals, self.parallel)

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
        products = self.computing.products
        tags = {"fp8.products": products, **self.backend.facts()}
        told: dict[str, Any] = {"tags": tags}
        if self.computing.asked != self.numerics.precision:
            told["notes"] = [f"warning: {products}"]
        return told

    @telling_when_full
    def optim_step(
        self, learning_rate: float, *, indexer_learning_rate: float | None = None
    ) -> dict[str, Any]:
        """Sum and clip gradients, step AdamW, move the routing bias.

        A parameter without a gradient stays as it is; which those are, the graph says, and that is
        the same on all ranks. Indexers are clipped by a norm of their own.

        TrainingError, before anything is changed, if a gradient is not finite. Returns `grad_norm`
        and, where indexers learnt, `indexer_grad_norm`, both before clipping; `imbalance` (the
        worst of the layers whose routing can be balanced, 0 where none can) and `expert_load`,
        every layer's share of token copies by expert.
        """
        found = self._over_ranks(self._gradients())
        return self._update(found, learning_rate, indexer_learning_rate)

    def _gradients(self) -> dict[str, float | Tensor]:
        """What clipping and balancing need, of this rank, where it was computed.

        The norm of each parameter's gradient, and the load of the experts. Dense gradients are
        summed over the ranks first, and equal on all of them from then on.
        """
        grads = self._grads()
        if self.parallel:
            self._all_reduce([grad for name, grad in grads.items() if name not in self.sharded])
        if self.mesh.axis("dp").size > 1:
            # One by one where they lie: together they would be there twice.
            for name in sorted(self.sharded & grads.keys()):
                dist.all_reduce(grads[name], group=self.groups["dp"])
        mine = {name: grad for name, grad in grads.items() if self._speaks_for(name)}
        norms: dict[str, float | Tensor] = dict.fromkeys((_SQUARE + name for name in grads), 0.0)
        for name, norm in zip(mine, _norms(list(mine.values())), strict=True):
            norms[_SQUARE + name] = norm
        return norms | {_LOAD: self.load_LE}

    def _update(
        self, found: Figures, learning_rate: float, indexer_learning_rate: float | None
    ) -> dict[str, Any]:
        """Clip by what was found over all ranks, step AdamW, move the routing bias."""
        squares = {"grad_norm": 0.0}
        for name, square in found.items():
            if name.startswith(_SQUARE):
                group = _norm_of(name.removeprefix(_SQUARE))
                squares[group] = squares.get(group, 0.0) + float(square)
        norms = {name: square**0.5 for name, square in squares.items()}
        norms = self._finite(norms, [n.removeprefix(_SQUARE) for n in found if _is_bad(n, found)])
        grads = self._grads()
        for group, norm in norms.items():
            factor = min(1.0, self.optim.max_grad_norm / (norm + 1e-6))
            clipped = [grad for name, grad in grads.items() if _norm_of(name) == group]
            if factor < 1 and clipped:
                torch._foreach_mul_(clipped, factor)
        set_rates(
            self.optimizer,
            learning_rate,
            indexer_learning_rate=indexer_learning_rate,
            table_rate_factor=self.optim.table_rate_factor,
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.given = None
        forget(self.model)
        self.numerics.recorder.forget()
        self.step += 1
        return norms | self._rebalance(found[_LOAD])

    def _grads(self) -> dict[str, Tensor]:
        return {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}

    def _finite(self, found: dict[str, float], gradients: Sequence[str] = ()) -> dict[str, float]:
        """`found` as it is; TrainingError if a number of it is none.

        `gradients` are those that are not finite on any rank, by their parameters' names.
        """
        if not all(map(math.isfinite, found.values())):
            where = self._found(gradients) + self._culprit()
            raise TrainingError(
                f"step {self.step + 1}: not finite: {_named(found)}{where}; lower the learning "
                "rate, or look at the batch"
            )
        return found

    def _found(self, gradients: Sequence[str]) -> str:
        """What `_where` finds; what fails while it looks must not hide what it was looking for."""
        try:
            return self._where(gradients)
        except (RuntimeError, MemoryError) as error:
            return f", where is not known, for the search failed ({first_line(error)})"

    @torch.no_grad()
    def _where(self, gradients: Sequence[str]) -> str:
        """Which module's output was the first that is not finite on any rank, or else which of
        `gradients`; by the batch, run forward again on all ranks together."""
        if self.given is None:
            return ""
        parts, loss, totals = self.given
        with watched(self.model) as seen:
            for part in parts:
                loss(self.model, self.backend.place(part), totals)
        for block in self.blocks:
            block.load_E.zero_()
            block.routing = None
        weights = {n: float(not is_finite(one)) for n, one in self.model.named_parameters()}
        broken = [name for name, count in read_sums(weights, self.parallel).items() if count]
        if (place := self._first_of_ranks(seen.first)) is not None:
            module = seen.ended[place]
            own = any(name.startswith(f"{module}.") for name in broken)
            return f", first out of {module}" + (", whose weights are not finite" if own else "")
        if broken:
            return f", first in the weights {in_backward_order(broken, seen.begun)[-1]}"
        if gradients:
            return f", first in the gradient of {in_backward_order(gradients, seen.begun)[0]}"
        return ", first in the loss itself: what modules return is finite"

    def _speaks_for(self, name: str) -> bool:
        """Whether this rank is the one that tells of a tensor, so that it counts once: of its
        experts the first that holds them, of all else rank 0."""
        return self.mesh.axis("dp").index == 0 if name in self.sharded else self.rank == 0

    def state(self) -> dict[str, Tensor]:
        """What this rank tells of the weights: its experts, unless they are copies, and on rank 0
        everything else."""
        state = self.model.state_dict()
        return {name: tensor for name, tensor in state.items() if self._speaks_for(name)}

    def save(self, folder: Path) -> Path:
        """Write this rank's shard of the weights and moments; its file."""
        named = self.model.named_parameters()
        mine = [(name, parameter) for name, parameter in named if self._speaks_for(name)]
        tensors = self.state() | moments(self.optimizer, mine)
        return save_shard(folder, tensors, self.expert_ranges(), rank=self.rank, world=self.world)

    def load(self, folder: Path, *, step: int) -> None:
        """Read a sharded save, whatever number of ranks wrote it."""
        tensors = load_shards(folder, self.expert_ranges())
        self.load_weights(tensors)
        restore_moments(self.optimizer, self.model.named_parameters(), tensors)
        self.step = step

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy weights by Ingot name; experts must be this rank's slice already."""
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                tensor.copy_(tensors[name])
        forget(self.model)

    def load_whole(self, tensors: Mapping[str, Tensor]) -> None:
        """Take this rank's part of a whole model under Hugging Face names."""
        take_part(self.model, tensors)

    def expert_ranges(self) -> dict[str, range]:
        """Module names of stacked experts -> the global experts this rank holds."""
        return expert_ranges(self.model)

    def _culprit(self) -> str:
        """Which tensors were the first that FP8 found not finite on any rank, if any."""
        recorder = self.numerics.recorder
        place = self._first_of_ranks(recorder.first_not_finite())
        return (
            "" if place is None else f", in FP8 first in {recorder.role(place).replace('_', ' ')}"
        )

    def _first_of_ranks(self, place: int | None) -> int | None:
        """The lowest place that any rank has, if any has one.

        All ranks call the same modules and products in the same order, and mean the same by it.
        """
        if not self.parallel:
            return place
        first = torch.tensor(math.inf if place is None else place, dtype=torch.float64)
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
        return int(first) if first.isfinite() else None

    def _rebalance(self, load_LE: NDArray[np.float64]) -> dict[str, Any]:
        """Move the routing bias by the load of all ranks; what to say of it."""
        if not self.blocks:
            return {}
        if self.parallel:
            self.load_LE.copy_(torch.from_numpy(load_LE), non_blocking=True)
        for block, load_E in zip(self.blocks, self.load_LE.float(), strict=True):
            if (bias := block.bias_E) is not None:
                bias.copy_(updated_bias(bias, load_E, self.balance.bias_update_speed))
        balanced = [layer for layer, block in enumerate(self.blocks) if block.bias_E is not None]
        by_layer = imbalance(torch.from_numpy(load_LE[balanced])).numpy()
        self.load_LE.zero_()
        share_LE = load_LE / load_LE.sum(1, keepdims=True).clip(min=1)
        return {
            "imbalance": float(by_layer.max(initial=0.0)),
            "expert_load": share_LE.round(5).tolist(),
        }

    def _all_reduce(self, tensors: list[Tensor]) -> None:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        offset = 0
        for tensor in tensors:
            tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
            offset += tensor.numel()

    def _over_ranks(self, values: Mapping[str, float | Tensor]) -> Figures:
        """The sums over ranks, read at once; of norms their squares'."""
        found = fetch(values)
        squares = {name: one**2 for name, one in found.items() if name.startswith(_SQUARE)}
        return summed(found | squares, over_ranks=self.parallel)


def parted(batch: Batch, parts: int) -> list[Batch]:
    """The rows of a batch in equal parts, in their order; ConfigError if they do not divide."""
    rows = len(next(iter(batch.values())))
    if rows % parts:
        raise ConfigError(
            f"cluster.micro_batches = {parts} does not divide {rows} rows of a trainer; choose a "
            "divisor"
        )
    each = rows // parts
    return [
        {name: one[each * part : each * (part + 1)] for name, one in batch.items()}
        for part in range(parts)
    ]


def read_sums(values: Mapping[str, float], parallel: bool) -> dict[str, float]:
    """Sums over ranks, in float64, by key."""
    sums = summed(fetch(values), over_ranks=parallel)
    return {name: float(one) for name, one in sums.items()}


def _named(values: Mapping[str, float]) -> str:
    """`loss nan, mtp_loss inf`: those that are not finite."""
    return ", ".join(f"{name} {one}" for name, one in values.items() if not math.isfinite(one))


def _is_bad(name: str, found: Figures) -> bool:
    """Whether it is the square of a norm, and not finite."""
    return name.startswith(_SQUARE) and not math.isfinite(found[name])


def _norms(grads: list[Tensor]) -> Sequence[Tensor]:
    """The Euclidean norm of each; in float64 on CPUs, where kernels add in the type they are in."""
    if not grads:
        return ()
    wide = torch.float64 if grads[0].device.type == "cpu" else None
    return torch._foreach_norm(grads, dtype=wide)


def _norm_of(parameter: str) -> str:
    """The name of the norm that the parameter's gradient is clipped by."""
    return "indexer_grad_norm" if rate_group(parameter) == "indexer" else "grad_norm"


def expert_parameter_names(model: Transformer) -> set[str]:
    """Names of the parameters that are sharded over the expert axis."""
    return {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if isinstance(module, RoutedExperts)
        for leaf, _ in module.named_parameters()
    }
