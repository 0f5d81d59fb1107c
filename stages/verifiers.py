"""Problems whose answers can be checked, the checks, and where texts give them away."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from configs.base import Frozen
from configs.errors import VerifierError
from stages.statements import Finder, Statement, find_arithmetic


class Problem(Frozen):
    """A prompt with the one answer that is right."""

    id: str
    """Unique in its corpus: the source's name, a slash, the prompt."""
    prompt: str
    answer: str
    source: str
    """Kind of source, which decides the verifier: `arithmetic`."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A reward, and in one line why."""

    reward: float
    reason: str


Verifier = Callable[[Problem, str], Verdict]


@dataclass(frozen=True, slots=True)
class Kind:
    """All that the line must know of a kind of problem."""

    verify: Verifier
    find: Callable[[Sequence[Problem]], Finder]
    """What finds, in training text, any form of these problems with an answer."""


def verify(problem: Problem, answer: str) -> Verdict:
    """Judge a model's answer.

    The answer is untrusted text: a malformed one earns 0 with the reason. A problem that cannot
    be judged at all is a VerifierError, never a 0.
    """
    return _kind(problem).verify(problem, answer)


def find_statements(problems: Sequence[Problem]) -> Finder:
    """What finds, in a text, any form of any of these problems together with an answer."""
    by_kind: dict[str, list[Problem]] = {}
    for problem in problems:
        by_kind.setdefault(problem.source, []).append(problem)
    finders = [_kind(some[0]).find(some) for _, some in sorted(by_kind.items())]

    def find(text: str) -> Iterator[Statement]:
        for finder in finders:
            yield from finder(text)

    return find


def read_problems(path: str | Path) -> list[Problem]:
    """The problems of a parquet file that `write_problems` wrote, in order."""
    rows = pq.read_table(path).to_pylist()
    return [Problem(**row) for row in rows]


def write_problems(path: str | Path, problems: Sequence[Problem]) -> None:
    """Write problems as a parquet file, one string column a field."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([(name, pa.string()) for name in Problem.model_fields])
    rows = [problem.model_dump() for problem in problems]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def _kind(problem: Problem) -> Kind:
    found = _KINDS.get(problem.source)
    if found is None:
        raise VerifierError(
            f"problem {problem.id}: no verifier for source {problem.source!r}; known: "
            f"{', '.join(sorted(_KINDS))}"
        )
    return found


def _exact(problem: Problem, answer: str) -> Verdict:
    """Right when equal to the answer, white space around it aside."""
    right = problem.answer.strip()
    if not right:
        raise VerifierError(f"problem {problem.id}: its answer is empty; rebuild the corpus")
    given = answer.strip()
    if given == right:
        return Verdict(1.0, "exact")
    shown = given if len(given) <= 40 else f"{given[:40]}..."
    return Verdict(0.0, f"{shown!r} instead of {right!r}" if given else "empty answer")


_KINDS: dict[str, Kind] = {"arithmetic": Kind(verify=_exact, find=find_arithmetic)}
