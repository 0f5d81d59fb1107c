"""Models as a rank holds them: all of what is dense, and its share of the experts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cluster.backend import CPU, Backend
from cluster.expert_parallel import ExpertParallel
from cluster.groups import Groups
from cluster.placement import Placement
from configs.model import ModelConfig
from configs.train import Precision
from model.dispatch import Dispatcher, LocalDispatcher
from model.fp8.linear import Linear
from model.fp8.recorder import Recorder
from model.fp8.scheme import Numerics, schemes, settle
from model.moe import RoutedExperts, layer_name
from model.transformer import Transformer
from model.weight_cache import forget, keep
from model.weights import families


@dataclass(frozen=True, slots=True)
class Computing:
    """How a model's products are computed, and what was asked for."""

    numerics: Numerics
    products: str
    """In words, for records."""
    asked: Precision


def build_model(
    config: ModelConfig,
    *,
    precision: Precision | Numerics,
    backend: Backend = CPU,
    groups: Groups | None = None,
    placement: Placement | None = None,
) -> tuple[Transformer, Computing]:
    """A model with this rank's share of its experts, its values yet to be set, on the CPU.

    Without `groups` the experts are divided over all ranks, and without a `placement` in their
    order.
    """
    groups = groups or Groups.of_world()
    wanted = precision if isinstance(precision, Numerics) else Numerics(precision)
    # Two models of one job, as a policy and its reference, are watched apart.
    asked = replace(backend.numerics(wanted), recorder=Recorder())
    numerics, products = settle(asked, torch.device(backend.device))
    dispatcher: Dispatcher = LocalDispatcher(config.n_routed_experts)
    if groups.mesh.ep > 1:
        dispatcher = ExpertParallel(groups, placement or contiguous(config, groups))
    model = Transformer(config, precision=numerics, dispatcher=dispatcher)
    if numerics.precision == "fp8" and not schemes(model):
        numerics = replace(numerics, precision="high")
        products = "high precision: the table of parts leaves none of this model's to FP8"
    return model, Computing(numerics, products, wanted.precision)


def contiguous(config: ModelConfig, groups: Groups) -> Placement:
    """The model's experts in their order over the ranks of an `ep` axis.

    ConfigError if they do not divide.
    """
    layers = range(config.depth + config.num_nextn_predict_layers)
    names = [layer_name(index) for index in layers if config.has_experts(index)]
    return Placement.contiguous(
        names,
        config.n_routed_experts,
        nodes=groups.nodes,
        devices=groups.mesh.ep // groups.nodes,
    )


def frozen(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    precision: Precision | Numerics,
    backend: Backend = CPU,
    groups: Groups | None = None,
) -> Transformer:
    """This rank's part of a whole model under Hugging Face names, to be asked and never trained."""
    model, _ = build_model(config, precision=precision, backend=backend, groups=groups)
    take_part(model, tensors)
    model.requires_grad_(False).to(backend.device).eval()
    keep(model)
    return model


def take_part(model: Transformer, tensors: Mapping[str, Tensor]) -> None:
    """Copy a whole model under Hugging Face names into `model`, which may hold some experts only.

    Tensors are asked for one at a time, and those of other ranks' experts never.
    """
    own, experts = model.state_dict(), experts_here(model)
    with torch.no_grad():
        for name, tensor in families.assemble(model.config, own, tensors, experts):
            own[name].copy_(tensor)
    forget(model)


def experts_here(model: Transformer) -> dict[str, tuple[int, ...]]:
    """Module names of stacked experts -> the experts that `model` holds, by their numbers."""
    return {
        name: module.local
        for name, module in model.named_modules()
        if isinstance(module, RoutedExperts)
    }


def expert_parameter_names(model: Transformer) -> set[str]:
    """Names of the parameters that are sharded over the expert axis."""
    return {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if isinstance(module, RoutedExperts)
        for leaf, _ in module.named_parameters()
    }


def cast_only(model: Transformer) -> dict[str, torch.dtype]:
    """Parameters that are read only in a narrower type than their own, and that type: copies of
    them may be of it. What FP8 quantises, gates and norms read in full is not among them."""
    compute = model.numerics.compute
    if compute is None:
        return {}
    return {
        f"{name}.{leaf}": compute
        for name, module in model.named_modules()
        if isinstance(module, RoutedExperts | Linear) and module.scheme is None
        for leaf, _ in module.named_parameters(recurse=False)
    }
