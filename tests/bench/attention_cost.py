"""Time and peak memory of one attention layer by length: dense, sparse, and compressed.

    python -m tests.bench.attention_cost docs

writes `attention-cost.md` and `attention-cost.svg` into that folder. Every point is a process of
its own, so that one layer's memory is not another's; all are taken in one run. Peaks are of the
resident set, above what the process held once the layer and its input were there.

Widths are small, so that the longest text takes minutes on two cores: what counts is
how cost grows.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

from configs.model import ModelConfig, V3Config, V4Config, V32Config
from model.attention import LatentAttention
from model.compressed import CompressedAttention
from model.fp8.scheme import Numerics
from model.passes import Whole
from model.sparse import SparseLatentAttention
from tests.bench import machine

LENGTHS = [4096, 8192, 16384, 32768, 65536]
THREADS = 1
RUNS, ENOUGH_SECONDS = 3, 10
"""Of a point: so many, unless fewer have taken so long already."""
HIDDEN = 256
SHARED = {
    "hidden_size": HIDDEN,
    "num_attention_heads": 16,
    "qk_rope_head_dim": 16,
    "max_position_embeddings": max(LENGTHS),
    "vocab_size": 64,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_nextn_predict_layers": 0,
}
LATENT = SHARED | {
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 48,
    "v_head_dim": 64,
    "intermediate_size": 64,
    "n_group": 1,
    "topk_group": 1,
}
INDEX = {"index_n_heads": 4, "index_head_dim": 32}
KINDS = {
    "dense (MLA)": "every earlier token",
    "sparse (DSA)": "512 tokens that an indexer picks",
    "compressed sparse (CSA)": "128 tokens, and 128 blocks of 4 that an indexer picks",
    "heavily compressed (HCA)": "128 tokens, and every block of 128",
}
MEBIBYTE = 2**20
HIGH = Numerics("high")


def build(kind: str) -> nn.Module:
    """The layer, with random weights."""
    layer: nn.Module
    config: ModelConfig
    if kind.startswith("dense"):
        config = V3Config.model_validate(LATENT)
        layer = LatentAttention(config, HIGH)
    elif kind.startswith("sparse"):
        config = V32Config.model_validate(LATENT | INDEX | {"family": "v32", "index_topk": 512})
        layer = SparseLatentAttention(config, HIGH)
    else:
        ratio = 4 if "sparse" in kind else 128
        config = V4Config.model_validate(
            SHARED
            | INDEX
            | {
                "family": "v4",
                "num_hidden_layers": 1,
                "compress_ratios": (ratio,),
                "num_hash_layers": 0,
                "head_dim": 64,
                "q_lora_rank": 128,
                "o_groups": 4,
                "o_lora_rank": 64,
                "index_topk": 128,
            }
        )
        layer = CompressedAttention(config, 0, HIGH)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.05, generator=generator)
    return layer


def resident(field: str) -> int:
    """A line of this process's memory status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def measure(kind: str, length: int) -> dict[str, float]:
    """Seconds and peak bytes of reading `length` tokens, and of a training step on them."""
    torch.set_num_threads(THREADS)
    layer = build(kind)
    x_BSD = torch.randn(1, length, HIDDEN, generator=torch.Generator().manual_seed(1))
    tokens_BS = torch.zeros(1, length, dtype=torch.int64)
    layer(x_BSD[:, :256], Whole(tokens_BS[:, :256]))[0].sum().backward()
    found: dict[str, float] = {}
    for name in ("reading", "training"):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        begin = time.perf_counter()
        with torch.set_grad_enabled(name == "training"):
            out, _ = layer(x_BSD, Whole(tokens_BS))
        if name == "training":
            out.sum().backward()
        found[f"{name} seconds"] = time.perf_counter() - begin
        found[f"{name} bytes"] = resident("VmHWM") - before
        del out
    return found


def apart(kind: str, length: int) -> dict[str, float]:
    """`measure` in a process of its own; medians of `RUNS`, or one where it is slow."""
    runs: list[dict[str, float]] = []
    while len(runs) < RUNS and sum(run["training seconds"] for run in runs) < ENOUGH_SECONDS:
        command = [sys.executable, "-m", "tests.bench.attention_cost", "--point", kind, str(length)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1800)
        runs.append(json.loads(done.stdout))
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def table(points: dict[str, dict[int, dict[str, float]]], what: str) -> list[str]:
    """Markdown rows of one figure for all kinds."""
    unit, scale, digits = ("seconds", 1.0, 2) if what.endswith("seconds") else ("MiB", MEBIBYTE, 0)
    head = " | ".join(f"{length // 1024}K" for length in LENGTHS)
    rows = [f"| {what.split()[0]}, {unit} | {head} |", "|---" * (len(LENGTHS) + 1) + "|"]
    for kind, by_length in points.items():
        cells = " | ".join(f"{by_length[n][what] / scale:,.{digits}f}" for n in LENGTHS)
        rows.append(f"| {kind} | {cells} |")
    return [*rows, ""]


def draw(points: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """Both figures of reading and training, on logarithmic axes."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for column, name in enumerate(("reading", "training")):
        for row, (unit, scale) in enumerate((("seconds", 1.0), ("bytes", MEBIBYTE))):
            panel = axes[row][column]
            for kind, by_length in points.items():
                heights = [by_length[n][f"{name} {unit}"] / scale for n in LENGTHS]
                panel.plot(LENGTHS, heights, marker="o", label=kind)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(LENGTHS, [f"{length // 1024}K" for length in LENGTHS])
            panel.grid(alpha=0.3)
            panel.set_title(f"{name}: {'time, s' if unit == 'seconds' else 'peak memory, MiB'}")
    axes[0][0].legend()
    for panel in axes[1]:
        panel.set_xlabel("tokens in one text")
    figure.savefig(path, metadata={"Date": None})


def main(folder: Path) -> None:
    """Measure everything and write table and plot."""
    points = {kind: {length: apart(kind, length) for length in LENGTHS} for kind in KINDS}
    lines = ["# What one attention layer costs", ""]
    lines += [f"- **{kind}** attends to {what}." for kind, what in KINDS.items()]
    lines += [
        "",
        f"Machine: {machine.describe()}.",
        f"Hidden width {HIDDEN}, 16 heads, 4 index heads, float32 on {THREADS} CPU thread.",
        "*Reading* is a forward pass without gradients, *training* forward and backward. Peaks are",
        "above what the process held before. Made by `python -m tests.bench.attention_cost docs`,",
        "one run, medians of up to three; other work ran beside it, so single cells may be off.",
        "",
    ]
    for what in ("reading seconds", "training seconds", "reading bytes", "training bytes"):
        lines += table(points, what)
    lines += ["![time and memory by length](attention-cost.svg)", ""]
    print("\n".join(lines))
    (folder / "attention-cost.md").write_text("\n".join(lines))
    draw(points, folder / "attention-cost.svg")


if __name__ == "__main__":
    if sys.argv[1] == "--point":
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
    else:
        main(Path(sys.argv[1]))
