"""One rank of training: forward_backward, optim_step, save, load.

Experts are divided over an axis of ranks, whose tokens all reach them through the dispatcher. What
several ranks hold, all dense parameters and experts where there are several such axes, has one
owner each: it gets the sum of the gradients during the backward pass, keeps the moments, makes the
update, and sends the others the weight.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
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
from cluster.expert_parallel import KINDS, ExpertParallel, Traffic
from cluster.figures import Figures, fetch, summed
from cluster.groups import Groups
from cluster.memory import Room, telling_of_model, telling_when_full
from cluster.models import (
    Computing,
    build_model,
    cast_only,
    expert_parameter_names,
    experts_here,
    take_part,
)
from cluster.norms import SQUARE, clip_group, grad_norms, not_finite, own_norms
from cluster.owners import Owners
from cluster.placement import Placement
from cluster.reduction import Reduction
from cluster.save_state import SaveState
from configs.errors import ArtifactError, ConfigError, TrainingError
from configs.model import ModelConfig
from configs.parallel import Recompute
from configs.train import BalanceConfig, OptimConfig, Precision
from model.balance import imbalance, updated_bias
from model.engram import set_vocabulary
from model.finite import in_backward_order, is_finite, watched
from model.fp8.recorder import Tally
from model.fp8.scheme import Numerics
from model.optim import adamw, moments, restore_moments, set_rates
from model.passes import Whole
from model.transformer import Predictions, Transformer
from model.weight_cache import forget, keep

_AVERAGE = "average/load"
"""The name of the loads' running mean in a save."""
_AVERAGED = 0.95
"""How much of that mean is left after a step."""
_LOAD, _TOLD = "load", "telemetry of "
"""Names of what is read at the end of a step beside the loss's own figures."""
Batch = Mapping[str, Tensor]
"""This rank's part of a batch, by field name."""


@runtime_checkable
class LossSpec(Protocol):
    """What is minimised. All methods see one rank's part; sums over ranks are the whole."""

    def counts(self, batch: Batch) -> dict[str, float]:
        """This rank's contribution to each normaliser."""

    def reads(self, batch: Batch) -> Whole:
        """What the model is to read, and what it is to report of it."""

    @property
    def ahead(self) -> bool:
        """Whether the token after next is to be predicted too, where the model can."""

    def __call__(
        self, predicted: Predictions, batch: Batch, totals: Mapping[str, float]
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """(loss, metrics) of what was predicted: both add up over ranks to those of the whole.

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
    placement: Placement | None = None,
    recompute: Recompute = "none",
) -> "Trainer":
    """A trainer of a new model, drawn by `seed`, with this rank's share of its experts.

    The experts are divided as `groups` says, else over the current process group; without one they
    are all here. `placement` says which rank has which, else they keep their order.
    `vocabulary` is what a new model's memories are told of its tokens (`model.engram`).
    """
    groups = groups or Groups.of_world()
    model, computing = build_model(
        config, precision=precision, backend=backend, groups=groups, placement=placement
    )
    # Values are drawn on the CPU, so that a model begins alike on every device.
    model.initialize(seed).train()
    if vocabulary is not None:
        set_vocabulary(model, vocabulary)
    model.to(backend.device)
    return Trainer(
        model,
        computing,
        optim=optim,
        balance=balance,
        backend=backend,
        groups=groups,
        recompute=recompute,
    )


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
        recompute: Recompute = "none",
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
        self.recompute = recompute
        self.named = dict(model.named_parameters())
        shapes = {name: tuple(parameter.shape) for name, parameter in self.named.items()}
        self.owners = Owners.of(shapes, self.sharded, self.mesh)
        self.reduction = Reduction(self.named, self.owners, self.groups)
        self.narrow = cast_only(model)
        self.blocks = list(model.moe_layers().values())
        self.dispatcher = self.blocks[0].dispatcher if self.blocks else None
        self.rows = {block.layer: row for row, block in enumerate(self.blocks)}
        """By layer, its place in loads."""
        self.load_LE = torch.zeros(
            len(self.blocks),
            model.config.n_routed_experts,
            dtype=torch.int64,
            device=model.lm_head.weight.device,
        )
        self.numbers = {
            name: torch.tensor(local, device=self.load_LE.device)
            for name, local in self.experts_here().items()
        }
        """By stack: int64, the number of each expert. Made once, for a copy is waited for."""
        self.load_average_LE = np.zeros(tuple(self.load_LE.shape))
        """A running mean of each expert's share of its layer's choices; 0 before the first step."""
        self.telemetry: dict[str, float] = {}
        """Of the last step, what may differ when it is repeated: `exchange/` and `reduction/` are
        bytes that all ranks together sent, and seconds of a mean rank; `imbalance/` is the largest
        over the mean load of each layer that can be balanced, less one."""
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
            for number, part in enumerate(parts, 1):
                last = number == len(parts)
                value, metrics = self._forward(part, loss, totals)
                with self.reduction.within_backward() if last else nullcontext():
                    value.backward()
                for name, one in {"loss": value.detach(), **metrics}.items():
                    found[name] = found[name] + one if name in found else one
        finally:
            recorder.stop()
        return found

    def _forward(
        self, part: Batch, loss: LossSpec, totals: Mapping[str, float]
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """The loss of some rows; what they sent to each expert is added to the load."""
        placed = self.backend.place(part)
        batch = replace(loss.reads(placed), recompute=self.recompute)
        predicted = self.model.predictions(batch, ahead=loss.ahead)
        for report in predicted.reports:
            if report.load_E is not None:
                self.load_LE[self.rows[report.layer]] += report.load_E
        return loss(predicted, placed, totals)

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
        """What clipping and balancing need, of this rank, where it was computed: the norms of the
        gradients that it owns, of experts one by one, and the load of the experts."""
        self.reduction.require_reduced()
        stacks = {name: self.numbers[name.rpartition(".")[0]] for name in self.sharded}
        norms = own_norms(self.named, stacks, self.model.config.n_routed_experts)
        return norms | {_LOAD: self.load_LE} | self._traffic()

    def _traffic(self) -> dict[str, float | Tensor]:
        """What this rank sent since the last step, and how long it waited for others."""
        if not self.parallel:
            return {}
        layers: list[Traffic] = []
        if isinstance(self.dispatcher, ExpertParallel):
            layers = list(self.dispatcher.traffic.values())
            self.dispatcher.traffic = {}
        sent = self.reduction.bytes
        self.reduction.bytes = dict.fromkeys(sent, 0)
        told: dict[str, float] = {
            "exchange/rows": sum(one.rows for one in layers),
            "exchange/exposed_seconds": sum(one.exposed_seconds for one in layers) / self.world,
            "exchange/hidden_seconds": sum(one.hidden_seconds for one in layers) / self.world,
            "reduction/gradient_bytes": sent["gradients"],
            "reduction/weight_bytes": self.reduction.due(self.narrow),
        }
        for kind in KINDS:
            for across, where in ((False, "within"), (True, "across")):
                name = f"exchange/{kind}_bytes_{where}"
                told[name] = sum(one.sent.get((kind, across), 0) for one in layers)
        return {_TOLD + name: one for name, one in told.items()}

    def _update(
        self, found: Figures, learning_rate: float, indexer_learning_rate: float | None
    ) -> dict[str, Any]:
        """Clip by what was found over all ranks, step AdamW, move the routing bias."""
        self.telemetry = {
            name.removeprefix(_TOLD): float(one)
            for name, one in found.items()
            if name.startswith(_TOLD)
        }
        norms = grad_norms(found, self._learnt())
        norms = self._finite(norms, not_finite(found))
        grads = self._grads()
        for group, norm in norms.items():
            factor = min(1.0, self.optim.max_grad_norm / (norm + 1e-6))
            clipped = [grad for name, grad in grads.items() if clip_group(name) == group]
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
        self.reduction.share(self.narrow)
        self.given = None
        forget(self.model)
        self.numerics.recorder.forget()
        self.step += 1
        return norms | self._rebalance(found[_LOAD])

    def _grads(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.named.items() if p.grad is not None}

    def _learnt(self) -> set[str]:
        """Parameters that have a gradient on their owner."""
        return self.reduction.learnt | self._grads().keys()

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
                placed = self.backend.place(part)
                loss(self.model.predictions(loss.reads(placed), ahead=loss.ahead), placed, totals)
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
        """Whether this rank is the one that tells of a tensor, so that it counts once: of
        parameters the owner, of all else rank 0."""
        return self.owners.mine(name) if name in self.named else self.rank == 0

    def state(self) -> dict[str, Tensor]:
        """What this rank tells of the weights: what it owns, and on rank 0 what nobody does."""
        state = self.model.state_dict()
        return {name: tensor for name, tensor in state.items() if self._speaks_for(name)}

    def save(self, folder: Path) -> Path:
        """Write this rank's shard of the weights and moments; its file."""
        named = self.model.named_parameters()
        mine = [(name, parameter) for name, parameter in named if self._speaks_for(name)]
        tensors = self.state() | moments(self.optimizer, mine)
        if self.rank == 0:
            tensors[_AVERAGE] = torch.from_numpy(self.load_average_LE)
        return save_shard(folder, tensors, self.experts_here(), rank=self.rank, world=self.world)

    def load(self, folder: Path, *, step: int) -> None:
        """Read a sharded save, whatever number of ranks wrote it.

        ArtifactError, before anything is changed, if another model was saved.
        """
        tensors = load_shards(folder, self.experts_here(), wanted=self._reads)
        self._require_own(folder, tensors)
        self.load_weights(tensors)
        mine = [(name, one) for name, one in self.named.items() if self.owners.mine(name)]
        restore_moments(self.optimizer, mine, tensors)
        # Older saves have none.
        if _AVERAGE in tensors:
            self.load_average_LE = tensors[_AVERAGE].numpy()
        self.step = step

    def save_state(self) -> SaveState:
        """What the mark of a save of this moment tells."""
        placement: dict[str, Any] = {}
        if isinstance(found := self.dispatcher, ExpertParallel):
            of = found.placement
            placement = {
                "nodes": of.nodes,
                "devices": of.devices,
                "version": of.version,
                "digest": of.digest,
                "experts": {name: of.experts_of(name) for name in of.layers},
            }
        average = zip(self.rows, self.load_average_LE.round(6).tolist(), strict=True)
        return SaveState(
            step=self.step,
            compute=self.backend.dtype_name,
            mesh={"pp": self.mesh.pp, "dp": self.mesh.dp, "ep": self.mesh.ep},
            placement=placement,
            load_average=dict(average),
            owners={name: self.owners.rank(name) for name in self.named},
            backend=self.backend.facts(),
        )

    def _reads(self, name: str) -> bool:
        """Whether this rank has a place for a saved tensor: all weights, and moments it owns."""
        kind, _, parameter = name.rpartition("/")
        return not kind or parameter not in self.named or self.owners.mine(parameter)

    def _require_own(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        state = self.model.state_dict()
        saved = {name: tuple(one.shape) for name, one in tensors.items() if "/" not in name}
        for name in sorted(state.keys() | saved.keys()):
            own = tuple(state[name].shape) if name in state else None
            if saved.get(name) != own:
                raise ArtifactError(
                    f"{folder} is the save of another model: {name} is {_shape(saved.get(name))} "
                    f"there and {_shape(own)} here; delete the folder {folder.parent} to begin "
                    "anew, or train the model that was saved"
                )

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy weights by Ingot name; experts must be this rank's slice already."""
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                tensor.copy_(tensors[name])
        forget(self.model)

    def load_whole(self, tensors: Mapping[str, Tensor]) -> None:
        """Take this rank's part of a whole model under Hugging Face names."""
        take_part(self.model, tensors)

    def experts_here(self) -> dict[str, tuple[int, ...]]:
        """Module names of stacked experts -> the experts that this rank holds, by their numbers."""
        return experts_here(self.model)

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
        for layer, one in zip(balanced, by_layer.tolist(), strict=True):
            number = self.blocks[layer].layer.rpartition(".")[2]
            self.telemetry[f"imbalance/layer_{number}"] = one
        self.load_LE.zero_()
        share_LE = load_LE / load_LE.sum(1, keepdims=True).clip(min=1)
        # A layer at rest, as the MTP layer where one token is predicted, says nothing.
        used_L1 = load_LE.any(1, keepdims=True)
        begun_L1 = self.load_average_LE.any(1, keepdims=True)
        weight_L1 = np.where(begun_L1, _AVERAGED, 0.0)
        moved_LE = weight_L1 * self.load_average_LE + (1 - weight_L1) * share_LE
        self.load_average_LE = np.where(used_L1, moved_LE, self.load_average_LE)
        return {
            "imbalance": float(by_layer.max(initial=0.0)),
            "expert_load": share_LE.round(5).tolist(),
        }

    def _over_ranks(self, values: Mapping[str, float | Tensor]) -> Figures:
        """The sums over ranks, read at once; of norms their squares'."""
        found = fetch(values)
        squares = {name: one**2 for name, one in found.items() if name.startswith(SQUARE)}
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


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"of shape {list(shape)}"


def _named(values: Mapping[str, float]) -> str:
    """`loss nan, mtp_loss inf`: those that are not finite."""
    return ", ".join(f"{name} {one}" for name, one in values.items() if not math.isfinite(one))
