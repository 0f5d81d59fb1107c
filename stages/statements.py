"""Finds where a text states problems together with their answers, whatever form it gives them.

Training text must not hold what evaluation asks. Each kind of problem has a finder here, which its
verifier names; it is given the held-out problems once and then every training text.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


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

_OPERATIONS = {
    "+": r"\+|＋|\bplus\b",
    "-": r"[-−–—－]|\bminus\b",
    "*": r"[*×·⋅∙✕✖]|\bx\b|(?<=\d)x(?=\d)|\btimes\b|\bmultiplied\s+by\b|\\times\b|\\cdot\b",
}
"""How texts write each operation; a prompt has its first character."""
_SENTENCES = {
    "+": (r"\bsum\s+of\s+{left}\s+and\s+{right}", r"\badd(?:ing)?\s+{left}\s+(?:to|and)\s+{right}"),
    "-": (
        r"\bdifference\s+(?:of|between)\s+{left}\s+and\s+{right}",
        r"\bsubtract(?:ing)?\s+{right}\s+from\s+{left}",
    ),
    "*": (
        r"\bproduct\s+of\s+{left}\s+and\s+{right}",
        r"\bmultiply(?:ing)?\s+{left}\s+(?:by|and|with)\s+{right}",
    ),
}
"""How sentences pose each."""
_COMMUTES = frozenset({"+", "*"})
_MARKS = r"[\s`$_\\(){}\[\]|&]|<[^<>\n]{0,40}>|&#?\w{1,8};"
_GAP = rf"(?:{_MARKS})*"
"""White space and marks of Markdown, TeX, tables and HTML, wherever a form may have them."""
_STARS = rf"(?:{_MARKS}|\*)*"
"""The same with the stars of bold type, where they cannot mean a multiplication."""
_NUMBER = r"\d+(?:[,_']\d{3})*"
_EQUALS = (
    r"(?:==?|＝|≡|:|->|=>|→|\||[-_=―─]{2,}|\bis(?:\s+equal\s+to)?\b|\bequals?(?:\s+to)?\b|"
    r"\bmakes?\b|\bgives?\b|\bare\b|\bresults?\s+in\b|\?)"
)
_BEFORE_ANSWER = rf"{_STARS}[^\d+/]{{0,24}}?{_STARS}"
"""Between the sign of equality and the answer: `?\\nA: `, `the number `, marks."""
_ALONE = r"(?<![\d.,_'])"
"""A number does not begin inside another, nor behind its decimal point."""
_ENDS = r"(?![\d]|[.,]\d)"


def find_arithmetic(problems: Sequence[Posed]) -> Finder:
    """Statements of sums, differences and products, as `37+45=` of these problems.

    Forms: with and without spaces, operands exchanged where that is the same problem, leading
    zeros and separators of thousands in any number, the answer in either order of digits (whatever
    number follows counts as the answer), the answer in front (`82 = 37 + 45`), one below the other
    with a line, signs and words for operation and equality (`37 plus 45 is 82`, `37 × 45 = 1665`),
    `the sum of 37 and 45 is 82`, as question and answer, in Markdown, TeX, HTML and tables. Numbers
    in words (`thirty-seven`) are not read.
    """
    ids: dict[tuple[str, int, int], str] = {}
    for problem in problems:
        if parsed := re.fullmatch(r"(\d+)([-+*])(\d+)=", problem.prompt):
            left, operation, right = parsed.groups()
            ids.setdefault(_key(operation, left, right), problem.id)
    operations = sorted({key[0] for key in ids})
    patterns = [(one, _pattern(one)) for one in operations]

    def find(text: str) -> Iterator[Statement]:
        for operation, pattern in patterns:
            for match in pattern.finditer(text):
                found = {name: value for name, value in match.groupdict().items() if value}
                (left,) = (value for name, value in found.items() if name.startswith("left"))
                (right,) = (value for name, value in found.items() if name.startswith("right"))
                problem_id = ids.get(_key(operation, left, right))
                if problem_id is not None:
                    # The pattern looks ahead, so that statements may share a number.
                    yield Statement(match.start(), match.start() + len(match["whole"]), problem_id)

    return find


def _key(operation: str, left: str, right: str) -> tuple[str, int, int]:
    """The same for every form of a problem."""
    operands = [int(re.sub(r"\D", "", number)) for number in (left, right)]
    if operation in _COMMUTES:
        operands.sort()
    return operation, operands[0], operands[1]


def _pattern(operation: str) -> re.Pattern[str]:
    """What states a problem of this operation; matches are empty, their text is group `whole`."""
    sign = _OPERATIONS[operation]
    forms = (
        # 37+45=280, **37 plus 45** is 82, Q: 37 + 45 = ?  A: 82
        rf"(?P<left1>{_NUMBER}){_GAP}(?:{sign}){_GAP}(?P<right1>{_NUMBER}){_ENDS}{_STARS}"
        rf"{_EQUALS}{_BEFORE_ANSWER}{_NUMBER}",
        # 82 = 37 + 45
        rf"{_NUMBER}{_STARS}(?:==?|＝|\bis\b|\bequals\b){_STARS}"
        rf"(?P<left2>{_NUMBER}){_GAP}(?:{sign}){_GAP}(?P<right2>{_NUMBER}){_ENDS}",
    )
    sentences = "|".join(
        sentence.format(
            left=rf"(?P<left{number}>{_NUMBER})", right=rf"(?P<right{number}>{_NUMBER}){_ENDS}"
        )
        + rf"{_STARS}{_EQUALS}{_BEFORE_ANSWER}{_NUMBER}"
        for number, sentence in enumerate(_SENTENCES[operation], start=3)
    )
    whole = rf"{_ALONE}(?:{'|'.join(forms)})|{sentences}"
    return re.compile(rf"(?=(?P<whole>{whole}))", re.IGNORECASE)
