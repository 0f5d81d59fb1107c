"""Seconds a training step of `tiny`, by how many ranks train it and how they hold its experts.

    python -m tests.bench.layouts [--short]

Every layout takes the same steps of the same batches with one thread a rank; layouts take turns, so
that what else the machine does meets all alike. Two ranks on two cores can be quicker than one,
four cannot: their figures say what the exchange costs.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cluster.expert_parallel import ExpertParallel
from cluster.groups import Groups
from cluster.trainer import build_trainer
from configs.reading import load_recipe
from stages.pretrain.objective import PretrainLoss
from tests.bench import machine
from tests.ranks import on_ranks

LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
"""Ranks, and over how many of them experts are divided."""


def steps(ep: int, count: int, copies: bool = False, narrow: bool = True) -> dict[str, Any]:
    """Seconds of each step but the first, and what the last exchanged."""
    recipe = load_recipe("tiny")
    assert recipe.model is not None
    phase = recipe.pretraining["pretrain"]
    one = build_trainer(
        recipe.model,
        optim=phase.optim,
        balance=phase.balance,
        precision=phase.precision,
        seed=0,
        groups=Groups.of_world(ep, 300),
    )
    if isinstance(one.dispatcher, ExpertParallel):
        one.dispatcher.copies, one.dispatcher.narrow = copies, narrow
    loss = PretrainLoss(phase.mtp_loss_weight, 1e-4, attend_across_documents=False)
    generator = torch.Generator().manual_seed(0)
    shape = phase.batch_sequences, recipe.data.sequence_tokens
    tokens = torch.randint(1, recipe.model.vocab_size, shape, generator=generator)
    batch = {"tokens": tokens.chunk(one.world)[one.rank].clone()}
    seconds = []
    for _ in range(count + 1):
        begin = time.perf_counter()
        one.train_step(batch, loss, 1e-4)
        seconds.append(time.perf_counter() - begin)
    told = {name: value for name, value in one.telemetry.items() if "/layer_" not in name}
    return {"seconds": seconds[1:], "told": told}


def main(short: bool) -> None:
    """Print a line for each layout."""
    rounds, count = (1, 1) if short else (3, 4)
    layouts = [(1, 1), (2, 2)] if short else LAYOUTS
    found: dict[tuple[int, int], list[float]] = {layout: [] for layout in layouts}
    told: dict[tuple[int, int], dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for world, ep in layouts:
                where = Path(folder, f"{number}-{world}-{ep}")
                ranks = on_ranks(
                    world, where, steps, ep, count, seconds=600, collective_seconds=300
                )
                found[world, ep] += ranks[0]["seconds"]
                told[world, ep] = ranks[0]["told"]
        plain, saved = told[2, 2], {}
        for what, settings in (("copies", (True, True)), ("wide", (False, False))):
            ranks = on_ranks(2, Path(folder, what), steps, 2, 1, *settings, seconds=600)
            saved[what] = ranks[0]["told"]
    alone = statistics.median(found[1, 1])
    for (world, ep), seconds in found.items():
        middle = statistics.median(seconds)
        exposed = told[world, ep].get("exchange/exposed_seconds", 0.0)
        sent = sum(value for name, value in told[world, ep].items() if "_bytes" in name)
        print(
            f"{world} ranks, ep {ep}: {middle:.3f} s a step, {alone / middle:.2f} times as fast as "
            f"one; waits for the exchange {exposed:.3f} s, {sent / 1e6:.1f} MB sent"
        )
    rows, dispatch = (
        {what: seen[name] for what, seen in {"plain": plain, **saved}.items()}
        for name in ("exchange/rows", "exchange/dispatch_bytes_within")
    )
    fewer = rows["copies"] / rows["plain"]
    print(
        f"on 2 ranks a row for each rank in place of each expert: {rows['copies']:,.0f} rows -> "
        f"{rows['plain']:,.0f} ({fewer:.2f} times fewer); dispatch with gradients "
        f"{dispatch['copies']:,.0f} bytes -> {dispatch['plain']:,.0f}; with wide rows in place of "
        f"FP8's {dispatch['wide']:,.0f}"
    )
    print(machine.describe())


if __name__ == "__main__":
    main("--short" in sys.argv[1:])
