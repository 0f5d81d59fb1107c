"""FP8 against BF16 on one GPU: products of DeepSeek-V3's shapes, a training step, and its memory.

    python -m tests.bench.fp8_on_gpu [--out FILE]

Every variant of a product is timed in turn, round after round in one process, by CUDA events after
a warm-up and with a cold cache; figures are medians. A backend's result is compared with the exact
one of its own operands before it is timed, and what is wrong is not timed. What fails or is not
there says so in its own cell and leaves the others alone, whatever it raised; without a GPU every
cell says so.

*product*: operands quantised beforehand. *with casts*: what training does, which quantises inputs
and weights for the output, the output's gradient for the input's, and both again along tokens for
the weight's. *torch alone*: `scaled_mm` on operands that lie as it wants them. The floor is the
longer of a device copy of the bytes that a product must move, and its arithmetic at twice the best
BF16 rate seen (Hopper's FP8 units are twice as wide).
"""

import argparse
import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cluster.trainer import build_trainer
from configs.model import V3Config
from configs.train import BalanceConfig, OptimConfig, Precision
from model.fp8.backends import Backend, backend_for
from model.fp8.cublas import expert_rows, lacking, multiply, operand, padded_counts, whole_tiles
from model.fp8.format import TILE
from model.fp8.groups import Groups
from model.fp8.quantized import ACTIVATION, ALONG_TOKENS, BLOCK, Quantized
from model.fp8.reference import Reference
from model.transformer import Transformer
from stages.pretrain.objective import PretrainLoss
from tests.bench.fp8_table import (
    BACKENDS,
    FAILED,
    PASSES,
    SHAPES,
    SQUARE,
    VARIANTS,
    Figure,
    Pass,
    Product,
    Shape,
    Step,
    bytes_moved,
    cell,
    table,
)

WARM_UP, ROUNDS = 3, 9
STEP_ROUNDS = 5
CHECKED_ROWS = 64
CACHE_BYTES = 2**28
"""More than any cache holds."""
STEP_SHAPE = (8, 2048)
"""Sequences and tokens of each in the training step."""
MODEL = V3Config.model_validate(
    {
        "vocab_size": 32768,
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "first_k_dense_replace": 1,
        "num_attention_heads": 16,
        "q_lora_rank": 512,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "intermediate_size": 4096,
        "moe_intermediate_size": 512,
        "n_routed_experts": 48,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": STEP_SHAPE[1],
    }
)
"""About a billion parameters."""


def interleaved(
    variants: Mapping[str, Callable[[], object] | str],
    clock: Callable[[Callable[[], object]], float],
    rounds: int = ROUNDS,
) -> dict[str, Figure]:
    """Median seconds of each, all in turn every round; what fails once is out, and says why."""
    found: dict[str, Figure] = {}
    alive: dict[str, Callable[[], object]] = {}
    for name, run in variants.items():
        if isinstance(run, str):
            found[name] = run
            continue
        try:
            for _ in range(WARM_UP):
                run()
            alive[name] = run
        except Exception as error:
            found[name] = why(error)
    times: dict[str, list[float]] = {name: [] for name in alive}
    for _ in range(rounds):
        for name in list(alive):
            try:
                times[name].append(clock(alive[name]))
            except Exception as error:
                found[name] = why(error)
                del alive[name]
    return found | {name: statistics.median(times[name]) for name in alive}


def why(error: Exception) -> str:
    """An exception's first line, short enough for a cell."""
    text = str(error).strip() or type(error).__name__
    return f"{FAILED}{text.splitlines()[0][:120]}"


def allowed_error(dtype: torch.dtype, exact: Tensor, size: Tensor) -> Tensor:
    """What a product may be off by: |A| |B| is `size`.

    Tensor cores keep about 14 bits of a sum (DeepSeek-V3, section 3.3.2) over 128 columns; a
    result in bfloat16 is rounded to 8.
    """
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-22
    return 2**-10 * size + rounding * exact.abs()


def active_parameters(model: nn.Module, experts: int, chosen: int) -> float:
    """Parameters a token meets: routed experts count by the share chosen, the embedding not."""
    total = 0.0
    for name, parameter in model.named_parameters():
        routed = ".experts." in name and "shared" not in name
        if "embed_tokens" not in name:
            total += parameter.numel() * (chosen / experts if routed else 1)
    return total


def no_device() -> str:
    """Why there is no GPU to measure on, or nothing."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "" if torch.cuda.is_available() else "torch finds no CUDA device"


def on_device(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """A clock by CUDA events, which empties the caches before each call."""
    scrap = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device)

    def clock(run: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        scrap.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    return clock


def measure_product(
    shape: Shape, which: Pass, device: torch.device, clock: Callable[[Callable[[], object]], float]
) -> Product:
    """All variants of one pass of one shape."""
    torch.manual_seed(0)
    stacked = (shape.experts,) if shape.experts > 1 else ()
    make: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    x = torch.randn(shape.tokens, shape.inputs, **make)
    dy = torch.randn(shape.tokens, shape.outputs, **make)
    w = torch.randn(*stacked, shape.outputs, shape.inputs, **make)
    half = torch.empty(bytes_moved(shape, which) // 2, dtype=torch.uint8, device=device)
    other = torch.empty_like(half)
    variants: dict[str, Callable[[], object] | str] = {
        "copy": lambda: other.copy_(half),
        "bf16": in_bf16(shape, which, x, w, dy),
    }
    errors: dict[str, Figure] = {}
    counts = shape.counts if stacked else None
    # As in training, the host does not know how many rows an expert has.
    groups = Groups.of(counts, device) if counts else None
    groups = replace(groups, known=None) if groups else None
    variants["torch alone"] = lacking(device) or prepared(which, x, w, dy, counts)
    for name in BACKENDS:
        keys = f"{name}, product", f"{name}, with casts"
        try:
            backend = backend_for(device, name)
            casts, run = in_fp8(backend, which, x, w, dy, groups)
            operands = casts()
            errors[name] = worst_error(run(*operands), *operands, counts, which)
            torch.cuda.synchronize(device)
        except Exception as error:
            variants |= dict.fromkeys(keys, why(error))
            errors[name] = ""
            continue
        if isinstance(errors[name], str) or not float(errors[name]) <= 1:
            variants |= dict.fromkeys(keys, f"{FAILED}wrong, {cell(errors[name])} times its bound")
            continue
        variants[keys[0]] = partial(run, *operands)
        variants[keys[1]] = partial(_cast_and_run, casts, run)
    seconds = interleaved(variants, clock)
    return Product(shape, which, seconds, errors, seconds["copy"])


def _cast_and_run(
    casts: Callable[[], tuple[Quantized, Quantized]],
    run: Callable[[Quantized, Quantized], Tensor],
) -> Tensor:
    return run(*casts())


def in_bf16(shape: Shape, which: Pass, x: Tensor, w: Tensor, dy: Tensor) -> Callable[[], Tensor]:
    """torch's own product, or grouped product, in bfloat16."""
    a, b = {"forward": (x, w.mT), "input gradient": (dy, w), "weight gradient": (dy.mT, x)}[which]
    if shape.experts == 1:
        return lambda: torch.mm(a, b)
    ends = torch.tensor(shape.counts, device=x.device).cumsum(0).to(torch.int32)
    return lambda: F.grouped_mm(a, b, offs=ends)


def in_fp8(
    backend: Backend,
    which: Pass,
    x: Tensor,
    w: Tensor,
    dy: Tensor,
    groups: Groups | None,
) -> tuple[Callable[[], tuple[Quantized, Quantized]], Callable[[Quantized, Quantized], Tensor]]:
    """The casts that training makes for a pass, and its product of what they give."""
    if which == "weight gradient":
        # What was saved for the backward pass is quantised already.
        x8 = backend.quantize(x, ACTIVATION)

        def along() -> tuple[Quantized, Quantized]:
            both = (backend.quantize(t, ALONG_TOKENS, groups=groups, saved=False) for t in (dy, x8))
            left, right = both
            return left, right

        if groups is None:
            return along, lambda a, b: backend.matmul(a.T, b)
        return along, lambda a, b: backend.grouped_outer(a, b, groups)
    if which == "forward":

        def casts() -> tuple[Quantized, Quantized]:
            return backend.quantize(x, ACTIVATION), backend.quantize(w, BLOCK, by_column=True).T

    else:
        w8 = backend.quantize(w, BLOCK, by_column=True)

        def casts() -> tuple[Quantized, Quantized]:
            return backend.quantize(dy, ACTIVATION, saved=False), w8

    if groups is None:
        return casts, backend.matmul
    return casts, lambda a, b: backend.grouped_matmul(a, b, groups)


def prepared(
    which: Pass, x: Tensor, w: Tensor, dy: Tensor, counts: tuple[int, ...] | None
) -> Callable[[], object] | str:
    """`scaled_mm` alone, once for each expert, on what is quantised and laid out already."""
    try:
        groups = None if counts is None else Groups.of(counts, x.device)
        casts, _ = in_fp8(Reference(), which, x, w, dy, groups)
        a, b = casts()
        if which == "weight gradient":
            rows = groups or Groups.even(1, len(x), x.device)
            whole = [whole_tiles(q, rows).T for q in (a, b)]
            left, right = (operand(q, blocks=False) for q in whole)
            pairs, first = [], 0
            for count in padded_counts(rows.on_host, TILE):
                last = first + count
                pairs.append((left.part(first, last), right.part(first, last)))
                first = last
            dtype = torch.float32
        elif groups is None:
            pairs, dtype = [(operand(a), operand(b.T))], torch.bfloat16
        else:
            lefts, _ = expert_rows(a, groups)
            rights = [
                operand(Quantized(v, s, b.tile).T) for v, s in zip(b.values, b.scales, strict=True)
            ]
            pairs, dtype = list(zip(lefts, rights, strict=True)), torch.bfloat16
    except Exception as error:
        return why(error)
    return lambda: [multiply(one, other, dtype) for one, other in pairs]


def worst_error(
    found: Tensor, a: Quantized, b: Quantized, counts: tuple[int, ...] | None, which: Pass
) -> float:
    """The worst error as a share of `allowed_error`: some rows of the first and last expert."""
    reference = Reference()
    float32_a, float32_b = reference.dequantize(a), reference.dequantize(b)
    along = which == "weight gradient"
    if counts is None:
        return worst_share(found, float32_a.mT if along else float32_a, float32_b)
    parts, others = float32_a.split(counts), float32_b.split(counts) if along else float32_b
    results = found if along else found.split(counts)
    return max(
        worst_share(results[e], parts[e].mT if along else parts[e], others[e])
        for e in (0, len(counts) - 1)
    )


def worst_share(found: Tensor, a: Tensor, b: Tensor) -> float:
    """The worst error of a @ b in rows from all over it, as a share of `allowed_error`."""
    picked = torch.arange(0, len(a), max(1, len(a) // CHECKED_ROWS), device=found.device)
    left, right = a[picked].double(), b.double()
    exact, size = left @ right, left.abs() @ right.abs()
    error = (found[picked].double() - exact).abs()
    return float((error / allowed_error(found.dtype, exact, size).clamp_min(1e-300)).max())


def best_rate(device: torch.device, clock: Callable[[Callable[[], object]], float]) -> Figure:
    """FLOP/s of the quickest square product in bfloat16."""
    try:
        a, b = (torch.randn(SQUARE, SQUARE, device=device).bfloat16() for _ in range(2))
        for _ in range(WARM_UP):
            torch.mm(a, b)
        return 2 * SQUARE**3 / min(clock(lambda: torch.mm(a, b)) for _ in range(ROUNDS))
    except Exception as error:
        return why(error)


def training_step(precision: Precision, device: torch.device) -> Step:
    """A whole step of `MODEL` in bfloat16, its Linears in FP8 or not: pass, backward, AdamW.

    By the project's `build_trainer` where that can be told a device, else in a loop of its own.
    """
    name = "bf16" if precision == "high" else "fp8"
    try:
        optim, loss = OptimConfig(), PretrainLoss(0.3, 1e-4, True)
        if "device" in inspect.signature(build_trainer).parameters:
            options: dict[str, Any] = {"device": device}
            trainer = build_trainer(
                MODEL,
                optim=optim,
                balance=BalanceConfig(),
                precision=precision,
                seed=0,
                **options,
            )
            model = trainer.model
            optimizer: torch.optim.Optimizer = trainer.optimizer
        else:
            with torch.device(device):
                model = Transformer(MODEL, precision=precision).bfloat16().train()
            fill(model)
            # The project's own wants float32 weights, which these products would not read.
            optimizer = torch.optim.AdamW(model.parameters(), lr=optim.learning_rate)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(2, MODEL.vocab_size, STEP_SHAPE, generator=generator)
        batch = {"tokens": tokens.to(device)}
        totals = loss.counts(batch)
        times: list[float] = []
        for _ in range(1 + STEP_ROUNDS):
            torch.cuda.synchronize(device)
            begin = time.perf_counter()
            loss(model, batch, totals)[0].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize(device)
            times.append(time.perf_counter() - begin)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        value = loss(model, batch, totals)[0]
        saved = torch.cuda.memory_allocated(device) - before
        peak = torch.cuda.max_memory_allocated(device) - before
        del value
    except Exception as error:
        return Step(name, why(error), why(error), why(error))
    return Step(name, statistics.median(times[1:]), float(peak), float(saved))


def fill(model: nn.Module) -> None:
    """Random weights where they lie: `initialize` draws a billion numbers on the CPU."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(1.0)


def report() -> Iterator[str]:
    """Where it was measured, and the table of everything that could be, line by line."""
    with torch.device("meta"):
        shadow = Transformer(MODEL)
    active = active_parameters(shadow, MODEL.n_routed_experts, MODEL.num_experts_per_tok)
    # Six for each parameter that a token meets: two forward, four backward.
    step_flops = 6 * active * STEP_SHAPE[0] * STEP_SHAPE[1]
    missing = no_device()
    if missing:
        nothing = dict.fromkeys(VARIANTS, "")
        blank = [Product(s, which, nothing, {}, "") for s in SHAPES for which in PASSES]
        steps = [Step(name, "", "", "") for name in ("bf16", "fp8")]
        yield from (f"Nothing was measured: {missing}.", "")
        yield from table(blank, steps, step_flops, "")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    clock = on_device(device)
    yield (
        f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, CUDA "
        f"{torch.version.cuda}; medians of {ROUNDS} rounds, the step's of {STEP_ROUNDS}."
    )
    yield ""
    products = (survived(s, which, device, clock) for s in SHAPES for which in PASSES)
    measured = (training_step(precision, device) for precision in ("high", "fp8"))
    yield from table(products, measured, step_flops, best_rate(device, clock))


def survived(
    shape: Shape, which: Pass, device: torch.device, clock: Callable[[Callable[[], object]], float]
) -> Product:
    """`measure_product`, or its reason in every cell."""
    try:
        return measure_product(shape, which, device, clock)
    except Exception as error:
        return Product(shape, which, dict.fromkeys(VARIANTS, why(error)), {}, why(error))
    finally:
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and write it to `--out`; 1 if something that is there could not be done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="file to write the table to")
    out: Path | None = parser.parse_args(arguments).out
    lines = []
    for line in report():
        print(line, flush=True)
        lines.append(line)
        if out is not None:
            # At once, so that what was measured outlives whatever comes after it.
            out.write_text("\n".join(lines) + "\n")
    return int(any(FAILED in line for line in lines))
