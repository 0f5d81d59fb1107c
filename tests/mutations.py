"""Every small fault that can be written into a source: what `tests/mutants.py` draws from.

A mutant is one change of a line or two at an exact place of the syntax tree. Left out are
docstrings, annotations, `assert`, texts (of errors, logs, notes), and what only guards against a
programmer's mistake: it would survive for good reason.
"""

import ast
import difflib
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

COMPARISONS = {
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Is: ("is", "is not"),
    ast.IsNot: (r"is\s+not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: (r"not\s+in", "in"),
}
ARITHMETIC = {
    ast.Add: (r"\+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: (r"\*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"),
    ast.Pow: (r"\*\*", "*"),
    ast.BitOr: (r"\|", "&"),
    ast.BitAnd: ("&", "|"),
    ast.LShift: ("<<", ">>"),
}
OTHER_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
TELLING = {"note", "say", "_say", "print", "warn"}
"""Functions whose arguments are texts for the user."""
UNCHECKED_KEYWORDS = {"strict", "encoding"}
"""Keyword arguments that guard against a programmer's mistake, or repeat a machine's default."""
MOST_LINES = 4
"""Removed and added, of one change."""
MARKS = {"contextmanager", "once_differentiable", "no_grad", "inference_mode", "runtime_checkable"}
"""Decorators whose loss changes what happens, rather than how it is written."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One changed file."""

    file: str
    """Path from the root."""
    kind: str
    function: str
    """Where the change is, dotted; empty at module level."""
    line: int
    source: str
    """The whole file, changed."""
    removed: tuple[str, ...]
    added: tuple[str, ...]
    """Lines that differ, stripped."""

    @property
    def diff(self) -> str:
        """The change as a patch of a few lines."""
        lines = [*(f"-{one}" for one in self.removed), *(f"+{one}" for one in self.added)]
        return "\n".join([f"@@ {self.file}:{self.line} {self.function}", *lines])

    def is_python(self) -> bool:
        """Whether the changed file can be compiled."""
        try:
            compile(self.source, self.file, "exec")
        except SyntaxError:
            return False
        return True

    def rank(self, seed: int) -> str:
        """Its place in the lot of `seed`, which changes elsewhere in the file leave alone."""
        parts = (str(seed), self.file, self.kind, self.function, *self.removed, *self.added)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Edit:
    """Bytes `start` to `end` of a source become `text`."""

    start: int
    end: int
    text: str


def mutants(file: str, source: str) -> list[Mutant]:
    """All mutants of a source, in its order; a few are no Python."""
    text = Text(source)
    places = _Places(text).of(ast.parse(source), ())
    made = [make(file, text, kind, function, edits) for kind, function, edits in places]
    small = {one.source: one for one in made if len(one.removed + one.added) <= MOST_LINES}
    return sorted(small.values(), key=lambda one: one.line)


def draw(pool: Iterable[Mutant], number: int, seed: int) -> list[Mutant]:
    """`number` mutants of a file by lot: kind after kind, no line twice while others are left.

    A larger number adds to what a smaller one draws.
    """
    queues: dict[str, list[Mutant]] = {}
    for one in sorted(pool, key=lambda one: (one.rank(seed), one.line)):
        queues.setdefault(one.kind, []).append(one)
    drawn: list[Mutant] = []
    lines: set[int] = set()
    while len(drawn) < number and any(queues.values()):
        before = len(drawn)
        for queue in queues.values():
            fresh = (one for one in queue if one.line not in lines)
            found = next(filter(Mutant.is_python, fresh), None)
            if found is not None and len(drawn) < number:
                queue.remove(found)
                drawn.append(found)
                lines.add(found.line)
        if len(drawn) == before and not lines:
            break
        if len(drawn) == before:
            lines.clear()
    return drawn


def _place(node: ast.AST, *names: str) -> tuple[int, int]:
    line, column = (int(getattr(node, name)) for name in names)
    return line, column


class Text:
    """A source with the places of its syntax tree: the tree counts bytes, not characters."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.bytes = source.encode()
        starts = [0]
        for line in self.bytes.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        self._starts = starts

    def start(self, node: ast.AST) -> int:
        line, column = _place(node, "lineno", "col_offset")
        return self._starts[line - 1] + column

    def end(self, node: ast.AST) -> int:
        line, column = _place(node, "end_lineno", "end_col_offset")
        return self._starts[line - 1] + column

    def of(self, node: ast.AST) -> str:
        return self.bytes[self.start(node) : self.end(node)].decode()

    def line_start(self, place: int) -> int:
        return self.bytes.rfind(b"\n", 0, place) + 1

    def apply(self, edits: Iterable[Edit]) -> str:
        changed = self.bytes
        for edit in sorted(edits, key=lambda one: one.start, reverse=True):
            changed = changed[: edit.start] + edit.text.encode() + changed[edit.end :]
        return changed.decode()


def make(file: str, text: Text, kind: str, function: str, edits: Sequence[Edit]) -> Mutant:
    """The mutant of these edits."""
    source = text.apply(edits)
    old, new = text.source.splitlines(), source.splitlines()
    first = _shared(old, new)
    last = _shared(old[first:][::-1], new[first:][::-1])
    lines = list(difflib.ndiff(old[first : len(old) - last], new[first : len(new) - last]))
    return Mutant(
        file=file,
        kind=kind,
        function=function,
        line=first + 1,
        source=source,
        removed=tuple(one[2:].strip() for one in lines if one[0] == "-"),
        added=tuple(one[2:].strip() for one in lines if one[0] == "+"),
    )


def _shared(old: Sequence[str], new: Sequence[str]) -> int:
    """How many lines two texts have in common from their beginning."""
    pairs = zip(old, new, strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


Place = tuple[str, str, list[Edit]]
"""Kind, function, edits."""


class _Places:
    """Walks a tree and says where which change may be made."""

    def __init__(self, text: Text) -> None:
        self.text = text

    def of(self, node: ast.AST, scope: tuple[str, ...]) -> Iterator[Place]:
        """The places at `node` and below it."""
        if isinstance(node, ast.Assert | ast.JoinedStr) or _tells(node):
            return
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            scope = (*scope, node.name)
        where = ".".join(scope)
        finder = self._finders().get(type(node))
        if finder is not None:
            yield from ((kind, where, edits) for kind, edits in finder(node))
        if not isinstance(node, ast.Raise):
            for child in _children(node):
                yield from self.of(child, scope)

    def _finders(self) -> dict[type, Callable[..., Iterator[tuple[str, list[Edit]]]]]:
        return {
            ast.Compare: self._compare,
            ast.BinOp: self._arithmetic,
            ast.AugAssign: self._assign_in_place,
            ast.Constant: self._constant,
            ast.UnaryOp: self._unary,
            ast.BoolOp: self._junction,
            ast.Expr: self._statement,
            ast.Raise: self._raise,
            ast.If: self._branches,
            ast.IfExp: self._branches,
            ast.comprehension: self._filter,
            ast.Slice: self._slice,
            ast.Call: self._call,
            ast.FunctionDef: self._function,
            ast.Return: self._return,
            ast.With: self._context,
        }

    def _between(self, left: ast.AST, right: ast.AST, pattern: str, new: str) -> list[Edit]:
        """Replace the operator between two operands."""
        begin = self.text.end(left)
        gap = self.text.bytes[begin : self.text.start(right)].decode()
        word = rf"\b{pattern}\b" if pattern[0].isalpha() else pattern
        found = re.search(word, gap)
        assert found is not None, gap
        return [Edit(begin + found.start(), begin + found.end(), new)]

    def _wrap(self, node: ast.AST, before: str, after: str) -> list[Edit]:
        start, end = self.text.start(node), self.text.end(node)
        return [Edit(start, start, before), Edit(end, end, after)]

    def _replace(self, node: ast.AST, new: str) -> list[Edit]:
        return [Edit(self.text.start(node), self.text.end(node), new)]

    def _compare(self, node: ast.Compare) -> Iterator[tuple[str, list[Edit]]]:
        sides = [node.left, *node.comparators]
        for op, left, right in zip(node.ops, sides, sides[1:], strict=False):
            yield "comparison", self._between(left, right, *COMPARISONS[type(op)])

    def _arithmetic(self, node: ast.BinOp) -> Iterator[tuple[str, list[Edit]]]:
        paths = isinstance(node.op, ast.Div) and (_is_name(node.left) or _is_name(node.right))
        if type(node.op) in ARITHMETIC and not paths and not _is_type(node):
            yield "arithmetic", self._between(node.left, node.right, *ARITHMETIC[type(node.op)])

    def _assign_in_place(self, node: ast.AugAssign) -> Iterator[tuple[str, list[Edit]]]:
        pattern, new = ARITHMETIC.get(type(node.op), ("", ""))
        if pattern:
            yield "arithmetic", self._between(node.target, node.value, f"{pattern}=", f"{new}=")
            yield "arithmetic", self._between(node.target, node.value, f"{pattern}=", "=")

    def _constant(self, node: ast.Constant) -> Iterator[tuple[str, list[Edit]]]:
        match node.value:
            case bool():
                yield "constant", self._replace(node, str(not node.value))
            case int() | float() as number:
                changed = [f"({self.text.of(node)} + 1)"]
                if number:
                    changed += ["0", f"(-{self.text.of(node)})"]
                yield from (("constant", self._replace(node, one)) for one in changed)

    def _unary(self, node: ast.UnaryOp) -> Iterator[tuple[str, list[Edit]]]:
        kind = "not" if isinstance(node.op, ast.Not) else "arithmetic"
        if not isinstance(node.op, ast.UAdd):
            start = self.text.start(node)
            yield kind, [Edit(start, start + (len("not ") if kind == "not" else 1), "")]

    def _junction(self, node: ast.BoolOp) -> Iterator[tuple[str, list[Edit]]]:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            yield "and/or", self._between(left, right, old, new)

    def _statement(self, node: ast.Expr) -> Iterator[tuple[str, list[Edit]]]:
        if not isinstance(node.value, ast.Call) or _tells(node.value):
            return
        yield "call removed", self._leave_out(node)

    def _raise(self, node: ast.Raise) -> Iterator[tuple[str, list[Edit]]]:
        if "AssertionError" not in self.text.of(node):
            yield "raise removed", self._leave_out(node)

    def _leave_out(self, node: ast.AST) -> list[Edit]:
        """Never come to a statement, however many lines it has: a patch of one."""
        start = self.text.start(node)
        return [Edit(start, start, "if False: ")]

    def _branches(self, node: ast.If | ast.IfExp) -> Iterator[tuple[str, list[Edit]]]:
        yield "branches swapped", self._wrap(node.test, "not (", ")")

    def _filter(self, node: ast.comprehension) -> Iterator[tuple[str, list[Edit]]]:
        for test in node.ifs:
            yield "filter removed", self._wrap(test, "True or (", ")")

    def _slice(self, node: ast.Slice) -> Iterator[tuple[str, list[Edit]]]:
        if node.lower is not None:
            yield "slice", self._wrap(node.lower, "(", ") + 1")
        if node.upper is not None:
            yield "slice", self._wrap(node.upper, "(", ") - 1")
        if node.upper is None and node.step is None:
            end = self.text.end(node)
            yield "slice", [Edit(end, end, "-1")]

    def _call(self, node: ast.Call) -> Iterator[tuple[str, list[Edit]]]:
        if isinstance(node.func, ast.Name) and node.func.id in OTHER_NAMES:
            yield "other function", self._replace(node.func, OTHER_NAMES[node.func.id])
        parts = sorted([*node.args, *node.keywords], key=self.text.start)
        for index, part in enumerate(parts):
            if not isinstance(part, ast.keyword) or part.arg in UNCHECKED_KEYWORDS | {None}:
                continue
            start, end = self.text.start(part), self.text.end(part)
            if index + 1 < len(parts):
                end = self.text.start(parts[index + 1])
            elif index:
                start = self.text.end(parts[index - 1])
            else:
                rest = re.match(rb"\s*,", self.text.bytes[end:])
                end += rest.end() if rest else 0
            yield "keyword dropped", [Edit(start, end, "")]

    def _function(self, node: ast.FunctionDef) -> Iterator[tuple[str, list[Edit]]]:
        for mark in node.decorator_list:
            name = mark.func if isinstance(mark, ast.Call) else mark
            if _last_name(name) in MARKS:
                start = self.text.line_start(self.text.start(mark))
                end = self.text.bytes.index(b"\n", self.text.end(mark)) + 1
                yield "decorator removed", [Edit(start, end, "")]
        if any(isinstance(one, ast.Return) and one.value for one in ast.walk(node)):
            return
        body = node.body[1:] if ast.get_docstring(node) else node.body
        for statement in body[1:]:
            if not _is_text(statement):
                yield "returned early", self._insert(statement, "return")

    def _return(self, node: ast.Return) -> Iterator[tuple[str, list[Edit]]]:
        if not (node.value is None or isinstance(node.value, ast.Constant)):
            yield "returned early", self._insert(node, "return None")

    def _insert(self, before: ast.AST, statement: str) -> list[Edit]:
        """A line of its own before a statement."""
        start = self.text.start(before)
        line = self.text.line_start(start)
        return [Edit(line, line, f"{self.text.bytes[line:start].decode()}{statement}\n")]

    def _context(self, node: ast.With) -> Iterator[tuple[str, list[Edit]]]:
        first, *more = node.items
        if first.optional_vars is None and not more:
            end = self.text.end(first.context_expr)
            yield "context removed", [Edit(self.text.start(node), end, "if True")]


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """What lies below a node, but for annotations, decorators, bases, patterns."""
    skipped = {"annotation", "returns", "decorator_list", "bases", "pattern", "type_params"}
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            unchecked = isinstance(child, ast.keyword) and child.arg in UNCHECKED_KEYWORDS
            if name in skipped or unchecked or not isinstance(child, ast.AST):
                continue
            if not _is_text(child):
                yield child


def _is_text(node: ast.AST) -> bool:
    """Whether a statement is a docstring, or a string beside a field."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_name(node: ast.AST) -> bool:
    """Whether an expression is the name of a file: a text, or a constant that stands for one."""
    return isinstance(node, ast.JoinedStr) or (
        _last_name(node).isupper() or isinstance(getattr(node, "value", None), str)
    )


def _is_type(node: ast.AST) -> bool:
    """Whether an expression is a union of types, or begins with one."""
    if isinstance(node, ast.BinOp):
        return _is_type(node.left)
    return _last_name(node).removeprefix("_")[:1].isupper() and not _last_name(node).isupper()


def _last_name(node: ast.AST) -> str:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def _tells(node: ast.AST) -> bool:
    """Whether a call only tells somebody something."""
    return isinstance(node, ast.Call) and _last_name(node.func) in TELLING
