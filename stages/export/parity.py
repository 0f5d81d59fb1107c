"""Proof that a variant on disk is its source: weight by weight, and logit by logit.

1. `prove_weights` reads every stored tensor back and holds every element to the bound that the
   format states, half a rounding step; and every source tensor must be there exactly once.
   `prove_fused` reads FP8 again as servers do that put several matrices into one.
   Of each layer the tensor that comes nearest to its bound is reported.
2. `compare` runs source and reloaded variant on the same held-out rows. `proofs.py` and `served.py`
   prove that these rows are what the variant's own tokenizer makes of their text.

Of FP8 and FP4 only weights are compared: activations stay float32 on both sides, and what a server
adds that quantises them (per 1 x 128) is not in these figures. Integers are multiplied as an NPU
does (`emulator.py`), activations rounded too. The MTP layer takes no part in next-token logits; its
weights are proved by 1 alone.

Rounding can tip a token between two nearly tied experts, and its logits then move by far more than
rounding alone moves them. So agreement and KL, which are means, are held to thresholds; the largest
logit error is reported without one. What a server is sent is text, which `served.py` tries.

Axes: N rows, S tokens of a row, B rows of a batch, V vocabulary, P positions.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor

from configs.delivery import ExportConfig
from configs.errors import ExportError
from configs.seed import derive
from model.fp8.format import TILE
from model.transformer import Transformer
from model.weights.config import read_config
from model.weights.families import fused
from model.weights.files import load_state
from stages.artifacts import Corpus, Parity
from stages.export.cuda import Fp8Blocks
from stages.export.formats import Format
from stages.export.tensors import Reading, TensorFolder
from stages.framing import BOS_ID
from stages.segments import segments_of
from stages.shards import Int64, Rows

BATCH_ROWS = 8


def held_out_rows(corpus: Corpus, count: int, *, seed: int) -> Int64:
    """At most `count` held-out rows [N, S], drawn by the seed, as evenly by source as can be.

    ExportError if the corpus has no held-out row at all.
    """
    sources = {name: total for name, total in sorted(corpus.held_out_rows.items()) if total}
    if not sources:
        raise ExportError(
            f"{corpus.uri}: no held-out rows, so no bundle can be compared with its source; "
            "raise data.held_out_share"
        )
    taken = dict.fromkeys(sources, 0)
    for _ in range(min(count, sum(sources.values()))):
        emptiest = min((n for n in sources if taken[n] < sources[n]), key=lambda n: taken[n])
        taken[emptiest] += 1
    parts = []
    for name, wanted in taken.items():
        generator = np.random.default_rng(derive(seed, "export", "parity", name))
        chosen = np.sort(generator.permutation(sources[name])[:wanted])
        parts.append(Rows(corpus.path("held_out", name)).take(chosen))
    return np.concatenate(parts)


@dataclass(frozen=True, slots=True)
class LayerErrors:
    """Of one layer, the tensors that are worst off."""

    nearest: str
    """Has the element that comes nearest to the bound of its format."""
    share: float
    """The error of that element as a share of its bound (<= 1)."""
    coarsest: str
    """Is changed most, for its size."""
    relative_error: float
    """|stored - source| / |source|, lengths of that whole tensor."""

    def worse(self, other: "LayerErrors") -> "LayerErrors":
        """The worst of both."""
        near = max(self, other, key=lambda one: one.share)
        coarse = max(self, other, key=lambda one: one.relative_error)
        return LayerErrors(near.nearest, near.share, coarse.coarsest, coarse.relative_error)


def prove_weights(
    source: TensorFolder, stored: TensorFolder, form: Format
) -> dict[str, LayerErrors]:
    """Hold every element to the bound that `form` states; by layer, its worst tensors.

    ExportError names the first tensor that is missing, unknown, misshapen or beyond its bound.
    """
    stored.check_index()
    expected = {part for name in source.names for part in form.parts(name)}
    if strange := sorted(expected ^ set(stored.names)):
        state = "is missing" if strange[0] in expected else "stands for no tensor of the source"
        raise ExportError(f"{form.variant}: tensor {strange[0]} {state}; export again")
    layers: dict[str, LayerErrors] = {}
    for name in source.names:
        layer, found = layer_of(name), _prove_tensor(name, source, stored, form)
        layers[layer] = layers[layer].worse(found) if layer in layers else found
    return layers


def layer_of(name: str) -> str:
    """The layer whose tensor `name` is, as the front of its name; what is in none is by itself."""
    path = name.split(".")
    numbers = (place for place, part in enumerate(path) if part.isdigit())
    return ".".join(path[: next(numbers, len(path) - 1) + 1])


def _prove_tensor(
    name: str, source: TensorFolder, stored: TensorFolder, form: Format
) -> LayerErrors:
    """How near one tensor comes to its bound; ExportError if it is beyond, or of another shape."""
    x = source.read(name)
    x = x.float() if x.is_floating_point() else x
    try:
        decoded = form.decode(name, stored.read)
    except (RuntimeError, IndexError, ValueError) as cause:
        raise ExportError(
            f"{form.variant}: tensor {_parts_of(name, form)} cannot be read as the format has it "
            f"({cause}); export again"
        ) from None
    if decoded.shape != x.shape:
        raise ExportError(
            f"{form.variant}: tensor {_parts_of(name, form)} is {tuple(decoded.shape)} on disk but "
            f"{tuple(x.shape)} in the source; export again"
        )
    error, bound = _error(decoded, x), form.error_bound(name, x)
    if not (error <= bound).all():
        at = int((error / bound).nan_to_num(math.inf).argmax())
        raise ExportError(
            f"{form.variant}: tensor {_parts_of(name, form)}, element {at}: source "
            f"{x.flatten()[at]:.6g}, on disk {decoded.flatten()[at]:.6g}, apart by more than the "
            f"format's {bound.flatten()[at]:.3g}; export again"
        )
    share = float(torch.where(error == 0, 0.0, error / bound).max())
    length = float(x.double().norm())
    return LayerErrors(name, share, name, float(error.norm()) / length if length else 0.0)


def _parts_of(name: str, form: Format) -> str:
    """The tensor with what else of it is stored, any of which may be at fault."""
    others = [part for part in form.parts(name) if part != name]
    return f"{name} (with {' and '.join(others)})" if others else name


def prove_fused(stored: TensorFolder, form: Fp8Blocks) -> int:
    """The number of fused matrices that servers would make of the stored ones, all read right.

    vLLM and SGLang load some matrices below one another into one, and multiply it block by block:
    the scales of a matrix whose rows begin at r are put into rows ceil(r / 128) of the joint grid,
    and row i is scaled by row floor(i / 128) of it. ExportError if that is not what each matrix
    says by itself.
    """
    names = [name for name in stored.names if form.in_blocks(name)]
    groups = fused(form.model, names)
    for group in groups:
        rows = [len(stored.read(name)) for name in group]
        joint = [stored.read(form.parts(name)[1]).float() for name in group]
        grid = torch.zeros(-(-sum(rows) // TILE), joint[0].shape[1])
        begin = 0
        for count, scales in zip(rows, joint, strict=True):
            at = -(-begin // TILE)
            grid[at : at + len(scales)] = scales[: len(grid) - at]
            begin += count
        values = torch.cat([stored.read(name).float() for name in group])
        spread = grid[torch.arange(len(values)) // TILE].repeat_interleave(TILE, 1)
        alone = torch.cat([form.decode(name, stored.read) for name in group])
        wrong = (values * spread[:, : values.shape[1]] != alone).any(1)
        if int(wrong.sum()):
            raise ExportError(
                f"{form.variant}: servers load {' and '.join(group)} as one matrix, and would read "
                f"{int(wrong.sum())} of its {len(wrong)} rows by another block's scale; leave fp8 "
                "out of export.variants"
            )
    return len(groups)


def _error(decoded: Tensor, x: Tensor) -> Float[Tensor, "..."]:
    """float64: how far each element lies off; 1 for a wrong integer, which float64 may not hold."""
    if not x.is_floating_point():
        return (decoded != x).double()
    return (decoded.double() - x.double()).abs()


def reload(stored: TensorFolder, form: Format, names: Iterable[str]) -> Transformer:
    """The stored variant as a float32 model, from its own config and its tensors `names`.

    ArtifactError if they do not make up the model that the config describes.
    """
    model = Transformer(read_config(stored.folder))
    load_state(model, Reading(names, lambda name: form.decode(name, stored.read)))
    return model.eval()


def bytes_of(tokenizer: Tokenizer, rows_NS: Int64) -> int:
    """Bytes of text that the scored tokens of the rows spell; special tokens spell none.

    A character of which the end of a row cuts off a part counts three, as its replacement has.
    """
    targets = (row_S[1:][row_S[1:] != BOS_ID].tolist() for row_S in rows_NS)
    return sum(len(tokenizer.decode(row, skip_special_tokens=True).encode()) for row in targets)


@dataclass(slots=True)
class _Sums:
    positions: int = 0
    agreeing: int = 0
    kl_nats: float = 0.0
    max_error: float = 0.0
    source_nats: float = 0.0
    """What the tokens that came next cost the source."""
    variant_nats: float = 0.0


@torch.no_grad()
def compare(
    source: Transformer, variant: Transformer, rows_NS: Int64, *, num_bytes: int = 0
) -> Parity:
    """Logits of both on the rows, at every position whose target counts (is not BOS).

    Documents of a row do not see each other. `num_bytes` is how long the text of these targets is;
    without it there are no bits per byte. ExportError if there is no such position, or a logit is
    not finite.
    """
    sums = _Sums()
    for start in range(0, len(rows_NS), BATCH_ROWS):
        tokens_BS = torch.from_numpy(rows_NS[start : start + BATCH_ROWS])
        scored_BS = tokens_BS[:, 1:] != BOS_ID
        inputs_BS, targets_P = tokens_BS[:, :-1], tokens_BS[:, 1:][scored_BS]
        source_PV, variant_PV = (_ask(one, inputs_BS)[scored_BS] for one in (source, variant))
        _add(sums, source_PV, variant_PV, targets_P)
    if sums.positions == 0:
        raise ExportError("the held-out rows hold nothing but padding; rebuild the corpus")
    if not math.isfinite(sums.max_error + sums.kl_nats):
        raise ExportError("source or variant gives logits that are not finite; train again")
    bits = math.log(2) * num_bytes
    return Parity(
        positions=sums.positions,
        max_abs_logit_error=sums.max_error,
        top1_agreement=sums.agreeing / sums.positions,
        mean_kl_nats=sums.kl_nats / sums.positions,
        source_bits_per_byte=sums.source_nats / bits if bits else None,
        bits_per_byte=sums.variant_nats / bits if bits else None,
    )


def device_of(model: Transformer) -> torch.device:
    """Where a model computes."""
    return next(model.parameters()).device


def _ask(model: Transformer, tokens_BS: Tensor) -> Tensor:
    """Logits on the host, where they are compared in float64, which not every device has."""
    logits_BSV: Tensor = model(
        tokens_BS.to(device_of(model)), segments_of(tokens_BS).to(device_of(model))
    )
    return logits_BSV.cpu()


def require(
    parity: Parity, variant: str, config: ExportConfig, blame: Callable[[], str] = str
) -> None:
    """ExportError if the variant agrees with its source less than the config asks.

    Weights are within their bounds by then, so `blame` is asked which tensor's rounding it is.
    """
    rise, greedy = parity.bits_per_byte_rise, parity.greedy_agreement
    told = None
    if parity.top1_agreement < config.min_top1_agreement:
        told = (
            f"top-1 agreement with the source is {parity.top1_agreement:.4f}, below "
            f"export.min_top1_agreement = {config.min_top1_agreement}"
        )
    elif parity.mean_kl_nats > config.max_kl_nats:
        told = (
            f"mean KL from the source is {parity.mean_kl_nats:.4g} nats, above "
            f"export.max_kl_nats = {config.max_kl_nats}"
        )
    elif rise is not None and rise > config.max_bits_per_byte_rise:
        told = (
            f"held-out text takes {parity.bits_per_byte:.4f} bits per byte, in the source "
            f"{parity.source_bits_per_byte:.4f}: more by {rise:.2%}, above "
            f"export.max_bits_per_byte_rise = {config.max_bits_per_byte_rise}"
        )
    elif greedy is not None and greedy < config.min_greedy_agreement:
        told = (
            f"of the tokens that it takes greedily {greedy:.4f} are the source's, below "
            f"export.min_greedy_agreement = {config.min_greedy_agreement}"
        )
    if told is not None:
        raise ExportError(
            f"{variant}: {told}{blame()}; train the model further, or change that setting"
        )


def _add(
    sums: _Sums,
    source_PV: Float[Tensor, "P V"],
    variant_PV: Float[Tensor, "P V"],
    targets_P: Int[Tensor, " P"],
) -> None:
    """Count one batch. KL(source || variant) in float64: it is the difference of near equals."""
    sums.positions += len(source_PV)
    if not len(source_PV):
        return
    source_PV, variant_PV = source_PV.double(), variant_PV.double()
    error = float((source_PV - variant_PV).abs().max())
    sums.max_error = error if math.isnan(error) else max(sums.max_error, error)
    sums.agreeing += int((source_PV.argmax(-1) == variant_PV.argmax(-1)).sum())
    log_p, log_q = source_PV.log_softmax(-1), variant_PV.log_softmax(-1)
    sums.kl_nats += float((log_p.exp() * (log_p - log_q)).sum())
    sums.source_nats -= float(log_p.gather(-1, targets_P[:, None]).sum())
    sums.variant_nats -= float(log_q.gather(-1, targets_P[:, None]).sum())
