"""Problems whose answers can be checked, the checks, and where texts give them away."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from configs.base import Frozen
from configs.errors import VerifierError
from stages.statements import Finder, Statement, find_arithmetic, find_questions


class Problem(Frozen):
    """A prompt with the one answer that is right."""

    id: str
    """Unique in its corpus: the source's name, a slash, and the prompt or a hash of it."""
    prompt: str
    answer: str
    source: str
    """Kind of source, which decides the verifier: `arithmetic` or `question`."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A reward, and in one line why."""

    reward: float
    reason: str


_BARE_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
_NUMBER = re.compile(
    # A hyphen behind a number or a word joins two, and makes the second no less than zero.
    r"(?:(?<![\w)\]])[-−])?\$?(?:[0-9](?:[0-9]|,(?=[0-9]))*(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
)
_MOST_DIGITS = 64
"""A longer number is no answer."""
_MARKS = "#*>=:-. \t"
"""What stands in front of an answer in a line of its own."""

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


def read_number(text: str) -> Decimal | None:
    """The number that a text is, commas, `$` and white space aside; none if it is something else.

    `1,200`, `$1200.00` and `1200` are equal ones.
    """
    bare = "".join(text.split()).replace(",", "").replace("$", "").replace("−", "-")
    is_number = len(bare) <= _MOST_DIGITS and _BARE_NUMBER.fullmatch(bare)
    return Decimal(bare) if is_number else None


def _right_answer(problem: Problem) -> str:
    if right := problem.answer.strip():
        return right
    raise VerifierError(f"problem {problem.id}: its answer is empty; rebuild the corpus")


def _exact(problem: Problem, answer: str) -> Verdict:
    """Right when equal to the answer, white space around it aside."""
    right, given = _right_answer(problem), answer.strip()
    if given == right:
        return Verdict(1.0, "exact")
    return Verdict(0.0, f"{_shown(given)} instead of {right!r}" if given else "empty answer")


def _final(problem: Problem, answer: str) -> Verdict:
    """Right when the last number is the answer or, of an answer that is no number, when it is all
    of the text or its last line, marks in front of that aside."""
    right = _right_answer(problem)
    if not answer.strip():
        return Verdict(0.0, "empty answer")
    number = read_number(right)
    if number is None:
        last = answer.strip().splitlines()[-1]
        if right in (answer.strip(), last.strip(), last.lstrip(_MARKS).strip()):
            return Verdict(1.0, "exact")
        return Verdict(0.0, f"ends in {_shown(last)} instead of {right!r}")
    found = _NUMBER.findall(answer)
    if not found:
        return Verdict(0.0, f"no number instead of {right!r}")
    if read_number(found[-1]) == number:
        return Verdict(1.0, f"the last number is {right}")
    return Verdict(0.0, f"the last number is {_shown(found[-1])} instead of {right!r}")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


_KINDS: dict[str, Kind] = {
    "arithmetic": Kind(verify=_exact, find=find_arithmetic),
    "question": Kind(verify=_final, find=find_questions),
}
