"""The loss-parity stage: loss histories of trainings in both precisions in, a report out."""

import json
import math
from collections.abc import Mapping
from itertools import zip_longest

from configs.errors import DataError
from configs.parity import ParitySpec
from stages.artifacts import PAGE, Checkpoint, Report
from stages.contract import Workspace, fills
from stages.loss_parity import face
from stages.loss_parity.face import PRECISIONS, run_name
from stages.loss_parity.gaps import Findings, Pair, compare
from stages.loss_parity.render import (
    KEY,
    headline,
    plot,
    render_json,
    render_markdown,
    shortfall,
    verdict,
)
from stages.plots import write_plots
from stages.telemetry import HISTORY

LOSS = "next_token_loss"
"""What the main model is trained for; balance and MTP losses are not compared."""


@fills(face.loss_parity)
def loss_parity(config: ParitySpec, work: Workspace, **runs: Checkpoint) -> Report:
    """Compare the losses of one training in each precision for each seed.

    Takes `fp8_S` and `high_S` for each seed S of the config. DataError if one is lacking, or if a
    history lacks steps, has others than the rest, or holds a loss that is not finite.
    """
    found = compare(_read_pairs(config, runs), config.parity)
    work.tracker.note(verdict(found))
    work.lease.check()
    _write(work, found)
    work.tracker.note(f"the report is {work.path('report.md')}")
    figures = headline(found)
    key = tuple(name for name in KEY if name in figures)
    return Report(uri=work.out, headline=figures, key=key, shortfall=shortfall(found))


def _write(work: Workspace, found: Findings) -> None:
    work.path("report.json").write_text(render_json(found), encoding="utf-8")
    work.path(PAGE).write_text(render_markdown(found), encoding="utf-8")
    write_plots(work.path(), plot(found))


def _read_pairs(config: ParitySpec, runs: Mapping[str, Checkpoint]) -> dict[int, Pair]:
    """The losses of each seed; every training must have gone through the same steps."""
    seeds = config.parity.seeds
    wanted = {run_name(precision, seed) for seed in seeds for precision in PRECISIONS}
    if runs.keys() != wanted:
        raise DataError(
            f"parity.seeds = {list(seeds)} asks for the trainings {sorted(wanted)}, not "
            f"{sorted(runs)}; wire one of each precision for each seed"
        )
    first, *others = sorted(runs)
    for name in others:
        if runs[name].step != runs[first].step:
            raise DataError(
                f"{name} was trained for {runs[name].step} steps and {first} for "
                f"{runs[first].step}; compare trainings of equal length"
            )
    losses = {name: _read_losses(name, run) for name, run in runs.items()}
    for seed in seeds:
        fp8, high = (run_name(precision, seed) for precision in PRECISIONS)
        if losses[fp8] == losses[high]:
            raise DataError(
                f"{fp8} and {high} have the same loss at every step, so that nothing was computed "
                'in FP8; set a part of pretrain.fp8 that this model has to "fp8"'
            )
    return {
        seed: Pair(fp8=losses[run_name("fp8", seed)], high=losses[run_name("high", seed)])
        for seed in seeds
    }


def _read_losses(name: str, run: Checkpoint) -> list[float]:
    """The loss of each step from the first to the checkpoint's, as its manifest covers them."""
    path = run.path(HISTORY)
    remedy = "rebuild this training with --force"
    try:
        history = json.loads(path.read_text())
        steps, losses = (list(history.get(name, [])) for name in ("step", LOSS))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(
            f"{name}: {path} cannot be read ({type(error).__name__}: {error}); {remedy}"
        ) from None
    wanted = list(range(1, run.step + 1))
    if steps != wanted:
        odd = sorted(set(steps) ^ set(wanted))
        where = f", the first that is missing or too many is {odd[0]}" if odd else ""
        raise DataError(
            f"{name}: {path} holds {len(steps)} steps of the {run.step} of this training{where}; "
            f"{remedy}"
        )
    for step, loss in zip_longest(steps, losses):
        if not isinstance(loss, int | float) or not math.isfinite(loss):
            raise DataError(
                f"{name}: {path} says {LOSS} = {loss} at step {step}, where a finite number should "
                f"stand; {remedy}"
            )
    return losses
