"""What is told of a run to those who do not watch it: one message, as fields and as a text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from configs.errors import IngotError
from configs.masking import masked
from configs.notify import Event
from pipeline.figures import show_figures, show_seconds
from pipeline.records import INTERRUPTED, Blocked, Built, Failed, Reused, Run

_ERROR_CHARS, _LINE_CHARS = 4000, 500


@dataclass(frozen=True, slots=True)
class Message:
    """One thing that happened to a run. Every field is a JSON value."""

    text: str
    """All of it in a few lines, for people."""
    event: Event
    outcome: str
    """`succeeded`, `failed`, `fell short`, `stopped`; of a stall `stalled`, then `goes on`."""
    recipe: str
    run: str
    host: str
    store: str
    command: str
    """What brings the run up to date when it is given again."""
    seconds: float
    """Since the run began."""
    outcomes: Mapping[str, str]
    """By node, as far as the run has come: `built`, `reused`, `failed` or `blocked`."""
    errors: Mapping[str, str]
    """By node: why it failed, or of what it falls short. The run's own error is that of `run`."""
    figures: Mapping[str, Mapping[str, float]]
    """Key figures by node, those that are finite: JSON knows no others."""

    def as_json(self) -> dict[str, Any]:
        """Its fields by name."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Teller:
    """Puts into words what happened to runs of one command on one machine."""

    command: str
    host: str

    def ended(self, run: Run, seconds: float) -> Message:
        """A run came to its end, or was stopped by the user."""
        outcome, _ = run.ending
        event: Event = "end" if outcome in ("succeeded", "stopped") else "failure"
        return self._message(run, seconds, event, outcome, [], again=outcome != "succeeded")

    def broke(self, run: Run, seconds: float, error: BaseException) -> Message:
        """A run ended by an error that is no node's, or by Ctrl-C outside of all nodes."""
        if isinstance(error, KeyboardInterrupt):
            return self.ended(replace(run, interrupted=True), seconds)
        known = isinstance(error, IngotError)
        why = masked(str(error) if known else f"internal error: {type(error).__name__}: {error}")
        message = self._message(run, seconds, "failure", "failed", [one_line(why)], again=True)
        return replace(message, errors={**message.errors, "run": why[:_ERROR_CHARS]})

    def stalled(
        self, run: Run, seconds: float, quiet_seconds: float, steps: Mapping[str, int | None]
    ) -> Message:
        """Nothing has got on for so long; `steps` are the last ones of the nodes being built."""
        at = [name if step is None else f"{name} after step {step}" for name, step in steps.items()]
        line = f"no step and no node done for {show_seconds(quiet_seconds)}"
        building = f", building {', '.join(at)}" if at else ", building no node"
        return self._message(run, seconds, "stall", "stalled", [line + building])

    def goes_on(self, run: Run, seconds: float, node: str) -> Message:
        """A run that had stalled has got on at this node."""
        return self._message(run, seconds, "stall", "goes on", [f"at {node}"])

    def _message(
        self,
        run: Run,
        seconds: float,
        event: Event,
        outcome: str,
        lines: Sequence[str],
        *,
        again: bool = False,
    ) -> Message:
        head = f"{run.recipe} {outcome} after {show_seconds(seconds)} on {self.host}, run {run.id}"
        body = [head, *lines, *_node_lines(run)]
        if again:
            body.append(f"go on with: {self.command}")
        there = {n: o for n, o in run.outcomes.items() if isinstance(o, Built | Reused)}
        return Message(
            text="\n".join(map(one_line, body)),
            event=event,
            outcome=outcome,
            recipe=run.recipe,
            run=run.id,
            host=self.host,
            store=run.store_root,
            command=self.command,
            seconds=round(seconds, 1),
            outcomes={name: one.outcome for name, one in run.outcomes.items()},
            errors={name: why[:_ERROR_CHARS] for name, why in _errors(run).items()},
            figures={name: _finite(one.figures) for name, one in there.items()},
        )


def one_line(text: str) -> str:
    """`text` as one line of a bounded length, without what controls a terminal."""
    words = "".join(sign if sign.isprintable() else " " for sign in text).split()
    line = " ".join(words)
    return line if len(line) <= _LINE_CHARS else line[: _LINE_CHARS - 3] + "..."


def _node_lines(run: Run) -> list[str]:
    """A line a node: what went wrong, or its key figures."""
    errors = _errors(run)
    lines = []
    for name, one in run.outcomes.items():
        match one:
            case Failed() if name in errors:
                lines.append(f"{name} failed: {errors[name]}")
            case Failed():
                lines.append(f"{name} was stopped")
            case Blocked(by):
                lines.append(f"{name} blocked by {by}")
            case Built() | Reused():
                figures = _finite(one.figures)
                said = [show_figures(figures)] if figures else []
                short = [f"falls short: {errors[name]}"] if name in errors else []
                lines.append(f"{name} {one.outcome}: {'; '.join(said + short) or 'no figures'}")
    return lines


def _errors(run: Run) -> dict[str, str]:
    """By node why it failed or of what it falls short; being stopped is neither."""
    found: dict[str, str] = {}
    for name, one in run.outcomes.items():
        match one:
            case Failed(error) if error != INTERRUPTED:
                found[name] = error
            case Built(shortfall=str(why)) | Reused(shortfall=str(why)):
                found[name] = why
    return found


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if math.isfinite(value)}
