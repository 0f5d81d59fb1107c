"""One program tried on one folder, as `ingot verify --with` tries it."""

from collections.abc import Sequence
from pathlib import Path

from stages.export.stored import kind_of, read_config
from stages.export.trial import Comparison, Sitting, trials
from stages.verifiers import Problem
from tests.clients.environments import ready


def tried(
    program: str, folder: Path, only: str | None = None, problems: Sequence[Problem] = ()
) -> dict[str, Comparison]:
    """What came of each comparison, by what was compared; those of `only` one trial, if named."""
    found = ready(program)
    sitting = Sitting(folder, read_config(folder), kind_of(folder), problems=problems)
    planned = trials(sitting, program)
    chosen = planned if only is None else {only: planned[only]}
    made = [one for trial in chosen.values() for one in trial(sitting, found)]
    return {one.what: one for one in made}


def require_equal(made: dict[str, Comparison], *, answers: int = 64) -> None:
    """All comparisons came out equal, and among them so many greedy answers."""
    assert not [str(one) for one in made.values() if not one.passed]
    assert made["greedy answers alike"].of == answers
