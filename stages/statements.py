"""Finds where a text states problems together with their answers, whatever form it gives them.

Training text must not hold what evaluation asks. Each kind of problem has a finder here, which its
verifier names; it is given the held-out problems once and then every training text.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from stages.overlap import LEAST_CHARS, WINDOW_CHARS, Windows
from stages.rolling import Codes, Int64, Uint64, fold, runs


@dataclass(frozen=True, slots=True)
class Statement:
    """A problem and an answer to it, right or wrong, from `start` to `end` of a text."""

    start: int
    end: int
    problem_id: str


class Posed(Protocol):
    """What a finder needs to know of a problem."""

    @property
    def id(self) -> str:
        """Unique in its corpus."""

    @property
    def prompt(self) -> str:
        """What is asked."""


Finder = Callable[[str], Iterator[Statement]]

_NUMBER = re.compile(r"\d+(?:[,_'’]\d{3}(?!\d))*(?:\.\d+)?")
_PLAIN_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_THOUSANDS = re.compile(r"[,_'’]")
_MOST_DIGITS = 18
"""A longer number is no operand and no answer, and would take its time to be read."""
_MOST_BETWEEN = 120
"""Characters between two numbers of one statement."""
_SIGNS = {
    "+": frozenset({"+", "++", "＋", "plus", "addedto"}),
    "-": frozenset({"-", "−", "–", "—", "－", "minus", "takeaway"}),
    "*": frozenset({"*", "×", "·", "⋅", "∙", "✕", "✖", "x", "times", "multipliedby"}),
}
"""How texts write each operation, without white space and marks."""
_BACKWARDS = frozenset({"subtractedfrom", "takenfrom", "takenawayfrom"})
_PHRASES = {
    "+": re.compile(r"\b(?:sum|total|add|adding|addition)\b[^\d.!?]{0,24}$", re.IGNORECASE),
    "-": re.compile(r"\b(?:difference|subtract|subtracting)\b[^\d.!?]{0,24}$", re.IGNORECASE),
    "*": re.compile(r"\b(?:product|multiply|multiplying)\b[^\d.!?]{0,24}$", re.IGNORECASE),
}
"""What stands in front of two numbers that a word joins: `the sum of 37 and 45`."""
_JOINS = frozenset({"and", "to", "with", "by", "from", "of", "&", ","})
_COMMUTES = frozenset({"+", "*"})
_ENTITIES = {"&plus;": "+", "&times;": "×", "&minus;": "−", "&equals;": "="}
_TEX = {r"\times": "×", r"\cdot": "·", r"\approx": "≈", r"\to": "→"}
_MARKS = re.compile(r"<[^<>]{0,60}>|&#?\w{1,8};|\\[,;:! ]|[\s`$_\\(){}\[\]|\"'“”‘’~]")
"""White space and marks of Markdown, TeX, tables, HTML and JSON, wherever a form may have them."""
_EQUALS = re.compile(
    r"==?|＝|≡|≈|:|->|=>|[→⇒|?]|[-_―=─—]{2,}"
    r"|\b(?:is|are|equals?|makes?|gives?|yields?|results?|answer|sum|total)\b",
    re.IGNORECASE,
)
_IN_FRONT = frozenset({"=", "==", "＝", "≡", "≈", "is", "are", "equals", "isequalto", ":="})
_LABEL = re.compile(r"\b(?:sum|total|answer|result|difference|product|equals?|makes?)\b", re.I)
_CELL = re.compile(r"[ \"']*[|,;\t][ \"'|]*")
_ROW_BEGINS, _ROW_ENDS = re.compile(r"[\s|\"'\[({]*"), re.compile(r"[ \"'|\])},;\t\r]*")
_ANSWER_LINE = re.compile(r"\W{0,64}[^\n]{0,1000}")
"""What follows a question: marks and line breaks, and the rest of the line that begins there."""
_ABOVE_A_LINE = re.compile(r"\s*(\S)\s*[-_=─]{2,}")


@dataclass(frozen=True, slots=True)
class _Number:
    """A number of a text."""

    start: int
    end: int
    text: str

    @property
    def value(self) -> int | None:
        """None if it is no whole number of usual size."""
        whole, _, decimals = self.text.partition(".")
        if len(whole) > _MOST_DIGITS or decimals.strip("0"):
            return None
        return int(whole) if whole.isdecimal() else int(re.sub(r"\D", "", whole))

    def is_answer(self, result: int) -> bool:
        """Whether it is `result`, its digits in either order."""
        if self.value == result:
            return True
        is_plain = len(self.text) <= _MOST_DIGITS and self.text.isdecimal()
        return is_plain and int(self.text[::-1]) == result


@dataclass(frozen=True, slots=True)
class _Sum:
    """A held-out problem, as its operands stand in a text."""

    operation: str
    result: int
    problem_id: str
    is_backwards: bool
    """The operands stand the other way round, which makes another problem but for some words."""


def find_arithmetic(problems: Sequence[Posed]) -> Finder:
    """Statements of sums, differences and products, as `37+45=` of these problems.

    Wherever its two operands are two numbers in a row, with the operation between them in any of
    its signs and words, and an answer next: with and without spaces, operands exchanged where that
    is the same problem, leading zeros, separators of thousands, decimals that are zero, any digits
    of Unicode, marks of Markdown, TeX, HTML, tables, JSON and code in between. Behind a sign or a
    word of equality any number is an answer, for wrong ones give a problem away as well; elsewhere
    the right one is, in either order of its digits. Also the answer in front (`82 = 37 + 45`), one
    below the other, `the sum of 37 and 45 is 82`, fields with a label (`"sum": 82`), and rows of a
    table. Not read: numbers in words, answers more than 120 characters away, grids.
    """
    sums: dict[tuple[int | None, int | None], list[_Sum]] = {}
    for problem in problems:
        if parsed := re.fullmatch(r"(\d+)([-+*])(\d+)=", problem.prompt):
            left, operation, right = int(parsed[1]), parsed[2], int(parsed[3])
            result = _result(operation, left, right)
            one = _Sum(operation, result, problem.id, is_backwards=False)
            other = _Sum(operation, result, problem.id, operation not in _COMMUTES)
            sums.setdefault((left, right), []).append(one)
            if left != right:
                sums.setdefault((right, left), []).append(other)

    def find(text: str) -> Iterator[Statement]:
        found: set[Statement] = set()
        for numbers in _readings(text):
            values = [number.value for number in numbers]
            for at, operands in enumerate(pairwise(values)):
                for one in sums.get(operands, ()):
                    found |= set(_statements(text, numbers, at, one))
        return _longest(found)

    return find


def find_questions(problems: Sequence[Posed]) -> Finder:
    """Passages of these questions, each with what follows it to the end of the answer's first line.

    A question stands where `WINDOW_CHARS` characters of it in a row do, or all of a shorter one,
    white space and capitals aside; `stages/overlap.py` says what is compared. A question of fewer
    than `LEAST_CHARS` is not looked for: others ask it too.
    """
    codes = [fold([problem.prompt])[0] for problem in problems]
    windows = Windows.of(problem.prompt for problem in problems)
    lengths = sorted({min(len(one), WINDOW_CHARS) for one in codes if len(one) >= LEAST_CHARS})
    known = [_Asked.of(length, codes) for length in lengths]

    def find(text: str) -> Iterator[Statement]:
        found: list[Statement] = []
        for start, end in windows.look(text):
            codes_C, places_C, _, _ = fold([text[start:end]])
            for asked in known:
                for first, last, problem in asked.passages(codes_C):
                    begins, ends = start + int(places_C[first]), start + int(places_C[last - 1]) + 1
                    line = _ANSWER_LINE.match(text, ends)
                    ends = line.end() if line else ends
                    found.append(Statement(begins, ends, problems[problem].id))
        return _longest(found)

    return find


@dataclass(frozen=True, slots=True)
class _Asked:
    """The windows of one length of questions. Axes: C characters compared, K known windows."""

    length: int
    known_K: Uint64
    """Ascending; as often as there are questions that have it."""
    problems_K: Int64
    """Whose each is, by number."""

    @classmethod
    def of(cls, length: int, questions: Sequence[Codes]) -> "_Asked":
        """Those of the questions whose windows have this length."""
        whose = [at for at, one in enumerate(questions) if min(len(one), WINDOW_CHARS) == length]
        each = [np.unique(runs(questions[at], length)) for at in whose]
        owners = np.repeat(np.array(whose, np.int64), [len(one) for one in each])
        known = np.concatenate(each)
        order = np.argsort(known, kind="stable")
        return cls(length, known[order], owners[order])

    def passages(self, codes_C: Codes) -> Iterator[tuple[int, int, int]]:
        """(first, end, problem) of each question's longest passages, by characters compared."""
        windows_W = runs(codes_C, self.length)
        lows = np.searchsorted(self.known_K, windows_W, side="left")
        counts = np.searchsorted(self.known_K, windows_W, side="right") - lows
        begins = np.repeat(np.arange(len(windows_W)), counts)
        nth = np.arange(len(begins)) - np.repeat(np.cumsum(counts) - counts, counts)
        problems = self.problems_K[np.repeat(lows, counts) + nth]
        order = np.lexsort((begins, problems))
        begins, problems = begins[order], problems[order]
        # Windows of one question that touch are one passage.
        is_apart = (np.diff(problems) != 0) | (np.diff(begins) > self.length)
        firsts = np.flatnonzero(np.r_[True, is_apart][: len(begins)])
        lasts = np.r_[firsts[1:], len(begins)] - 1
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=False):
            yield int(begins[first]), int(begins[last]) + self.length, int(problems[first])


def _longest(found: Collection[Statement]) -> Iterator[Statement]:
    """Those that are no part of another of the same problem, as `= 1` is of `= 1,665`; in order."""
    end: dict[str, int] = {}
    for one in sorted(found, key=lambda one: (one.start, -one.end, one.problem_id)):
        if one.end > end.get(one.problem_id, 0):
            end[one.problem_id] = one.end
            yield one


def _readings(text: str) -> Iterator[list[_Number]]:
    """The numbers of a text; twice where commas may part numbers, or the thousands of one."""
    joined = [_Number(m.start(), m.end(), m[0]) for m in _NUMBER.finditer(text)]
    yield joined
    if any(_THOUSANDS.search(number.text) for number in joined):
        yield [_Number(m.start(), m.end(), m[0]) for m in _PLAIN_NUMBER.finditer(text)]


def _result(operation: str, left: int, right: int) -> int:
    match operation:
        case "+":
            return left + right
        case "-":
            return abs(left - right)
    return left * right


def _statements(text: str, numbers: list[_Number], at: int, asked: _Sum) -> Iterator[Statement]:
    """Those of `asked` whose operands are the numbers at `at` and behind it."""
    left, right = numbers[at], numbers[at + 1]
    between = text[left.end : right.start]
    if len(between) > _MOST_BETWEEN or _is_in_a_word(text, left.start):
        return
    before = text[max(0, left.start - 48, numbers[at - 1].end if at else 0) : left.start]
    behind = numbers[at + 2] if at + 2 < len(numbers) else None
    after = text[right.end : behind.start if behind else right.end + _MOST_BETWEEN]
    is_posed = _is_posed(asked, before, between, after)
    is_near = len(after) <= _MOST_BETWEEN
    goes_on = is_near and behind is not None and _sign(after) is not None
    if behind is not None and is_near:
        if behind.is_answer(asked.result):
            is_stated = is_posed or _is_told(text, left, between, after, behind)
        else:
            # `12 + 37 + 45 = 94` asks something else.
            is_part = bool(at) and "\n" not in before and _sign(before) is not None
            is_stated = is_posed and not is_part and not goes_on and _is_equality(after)
        if is_stated:
            yield Statement(left.start, behind.end, asked.problem_id)
            return
    if at and is_posed and not goes_on and _is_in_front(numbers[at - 1], before, asked):
        yield Statement(numbers[at - 1].start, right.end, asked.problem_id)


def _is_posed(asked: _Sum, before: str, between: str, after: str) -> bool:
    """Whether these two numbers are put together as the problem puts them."""
    joined = _clean(between)
    if asked.is_backwards:
        phrase = _PHRASES["-"].search(before)
        away = joined == "from" or "difference" in (phrase[0].lower() if phrase else "")
        return joined in _BACKWARDS or (phrase is not None and away and joined in _JOINS)
    if _sign(between) == asked.operation:
        return True
    if not joined and (line := _ABOVE_A_LINE.match(after)):
        return line[1] in _SIGNS[asked.operation]
    if asked.operation == "-" and joined == "from":
        return False
    return joined in _JOINS and _PHRASES[asked.operation].search(before) is not None


def _is_told(text: str, left: _Number, between: str, after: str, answer: _Number) -> bool:
    """Whether three numbers of which the third is right are told as a problem and its answer."""
    if _clean(between) == "and":
        return _is_equality(after)
    if len(between) <= 24 and _sign(between) is None and _LABEL.search(after):
        return True
    if _CELL.fullmatch(between) and _CELL.fullmatch(after):
        begin, end = text.rfind("\n", 0, left.start) + 1, text.find("\n", answer.end)
        around = text[begin : left.start], text[answer.end : end if end >= 0 else len(text)]
        return bool(_ROW_BEGINS.fullmatch(around[0]) and _ROW_ENDS.fullmatch(around[1]))
    return False


def _is_in_front(answer: _Number, before: str, asked: _Sum) -> bool:
    """Whether what stands in front of the operands makes the number there their answer."""
    if _clean(before) in _IN_FRONT:
        return True
    phrase = _PHRASES[asked.operation].search(before)
    return phrase is not None and answer.is_answer(asked.result)


def _is_equality(after: str) -> bool:
    """Whether what stands between operands and a number makes it their answer, right or wrong."""
    found = list(_EQUALS.finditer(after))
    if not found:
        return False
    rest = _clean(after[found[-1].end() :]).strip("*")
    return len(rest) <= 24 and "+" not in rest and "/" not in rest


def _is_in_a_word(text: str, start: int) -> bool:
    """Whether the number ends a name, as in `x37`; `\\n37` in the source of a text does not."""
    return start > 0 and text[start - 1].isalpha() and text[max(0, start - 2)] != "\\"


def _sign(between: str) -> str | None:
    """The operation that stands between two numbers, if nothing else does."""
    joined = _clean(between)
    for operation, signs in _SIGNS.items():
        # Stars may be those of bold type.
        if joined in signs or joined.strip("*") in signs:
            return operation
    return None


def _clean(between: str) -> str:
    """Without white space and marks, in lower case."""
    if len(between) > _MOST_BETWEEN:
        return between
    for table in (_ENTITIES, _TEX):
        for name, sign in table.items():
            between = between.replace(name, sign)
    return _MARKS.sub("", between).lower()
