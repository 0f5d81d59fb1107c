"""Problems whose answers can be checked, and the checks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from configs.base import Frozen
from configs.errors import VerifierError


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


def verify(problem: Problem, answer: str) -> Verdict:
    """Judge a model's answer.

    The answer is untrusted text: a malformed one earns 0 with the reason. A problem that cannot
    be judged at all is a VerifierError, never a 0.
    """
    verifier = _VERIFIERS.get(problem.source)
    if verifier is None:
        raise VerifierError(
            f"problem {problem.id}: no verifier for source {problem.source!r}; known: "
            f"{', '.join(sorted(_VERIFIERS))}"
        )
    return verifier(problem, answer)


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


_VERIFIERS: dict[str, Verifier] = {"arithmetic": _exact}
