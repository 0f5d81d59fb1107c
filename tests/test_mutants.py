"""What `tests/mutants.py` draws and what it says of it."""

import os
import subprocess
import textwrap
import time
from pathlib import Path

import pytest

from tests.mutants import ROOT, Scratch, files_of_tests, judge_all, lot, main, sources, table
from tests.mutants_known import EQUIVALENTS, NAMED, Named
from tests.mutations import Mutant, draw, mutants


def lines_of(source: str) -> set[tuple[str, str, str]]:
    """(kind, lines before, lines after) of all mutants of a source."""
    found = mutants("some.py", textwrap.dedent(source))
    return {(one.kind, " ".join(one.removed), " ".join(one.added)) for one in found}


@pytest.mark.parametrize(
    ("source", "kind", "added"),
    [
        ("a = b <= c", "comparison", "a = b < c"),
        ("a = b not in c", "comparison", "a = b in c"),
        ("a = é < (b)", "comparison", "a = é <= (b)"),
        ("a = b - c", "arithmetic", "a = b + c"),
        ("a = -(b)", "arithmetic", "a = (b)"),
        ("a += b", "arithmetic", "a -= b"),
        ("a += b", "arithmetic", "a = b"),
        ("a = 3", "constant", "a = (3 + 1)"),
        ("a = 3", "constant", "a = 0"),
        ("a = 3", "constant", "a = (-3)"),
        ("a = True", "constant", "a = False"),
        ("a = not b", "not", "a = b"),
        ("a = b and c", "and/or", "a = b or c"),
        ("f(1)", "call removed", "if False: f(1)"),
        ("raise A from b", "raise removed", "if False: raise A from b"),
        ("if a:\n    b", "branches swapped", "if not (a):"),
        ("a = b if c else d", "branches swapped", "a = b if not (c) else d"),
        ("a = [b for b in c if b]", "filter removed", "a = [b for b in c if True or (b)]"),
        ("a = b[c:]", "slice", "a = b[(c) + 1:]"),
        ("a = b[:c]", "slice", "a = b[:(c) - 1]"),
        ("a = b[c:]", "slice", "a = b[c:-1]"),
        ("a = f(b, c=d)", "keyword dropped", "a = f(b)"),
        ("a = f(c=d, e=g)", "keyword dropped", "a = f(e=g)"),
        ("a = max(b)", "other function", "a = min(b)"),
        ("def f():\n    a()\n    b()", "returned early", "return"),
        ("def f():\n    return a()", "returned early", "return None"),
        ("with suppress(A):\n    b", "context removed", "if True:"),
    ],
)
def test_each_kind_of_fault_is_made_exactly_where_it_stands(
    source: str, kind: str, added: str
) -> None:
    assert (kind, added) in {(kind, after) for kind, _, after in lines_of(source)}


def test_a_decorator_is_lost_whole() -> None:
    source = """\
        @contextmanager
        def f():
            yield
        """
    assert lines_of(source) == {("decorator removed", "@contextmanager", "")}


def test_what_only_speaks_or_guards_is_left_alone() -> None:
    source = '''\
        """A text of 3 words."""
        import a.b
        @dataclass(frozen=True)
        class A(B[1]):
            """Another."""
            c: Literal[1]
            """Of a field."""
        State = Fresh | Stale
        def f(a: Literal[1]) -> Literal[2]:
            assert a > 0
            say(f"{a + 1}", end=1)
            raise AssertionError(a)
        '''
    assert {kind for kind, _, _ in lines_of(source)} == {"returned early"}
    assert lines_of("raise A(f'{a + 1} or {b - 1}')") == {
        (
            "raise removed",
            "raise A(f'{a + 1} or {b - 1}')",
            "if False: raise A(f'{a + 1} or {b - 1}')",
        )
    }
    assert lines_of("a = zip(b, strict=True)") == set()
    assert lines_of("a = b / 'c' / FILES") == set()


def test_a_lot_is_repeated_by_its_seed_and_grows_with_its_number() -> None:
    pool = mutants("model/balance.py", (ROOT / "model/balance.py").read_text())
    few, many = draw(pool, 4, 1), draw(pool, 8, 1)
    assert many[:4] == few == draw(reversed(pool), 4, 1)
    assert len({one.line for one in many}) == 8
    assert len({one.kind for one in few}) == 4
    assert draw(pool, 4, 2) != few
    assert all(one.is_python() for one in pool[:20])
    everything = draw(pool, 10_000, 1)
    assert len(everything) == len({one.source for one in everything}) == len(pool)


def test_every_file_has_a_share_and_the_larger_the_more() -> None:
    files = ["model/balance.py", "model/moe.py"]
    shares = [one.file for one in lot(ROOT, files, 10, 0)]
    assert len(shares) == 10
    assert shares.count(files[1]) > shares.count(files[0]) >= 1
    assert {one.file for one in lot(ROOT, files, 2, 0)} == set(files)


def test_every_source_has_tests() -> None:
    found = sources(ROOT, "*")
    assert {"stages/posttrain/loop.py", "pipeline/store.py", "model/moe.py"} <= set(found)
    for file in [*found, *(one.file for one in NAMED)]:
        assert files_of_tests(ROOT, file)


@pytest.mark.parametrize("named", NAMED, ids=lambda one: one.name)
def test_a_named_fault_finds_its_place(named: Named) -> None:
    mutant = named.mutant(ROOT)
    assert mutant.is_python()
    assert mutant.source != (ROOT / named.file).read_text()
    assert len(mutant.added) == 1


def test_a_named_fault_that_finds_no_place_says_what_to_do() -> None:
    with pytest.raises(LookupError, match=r"gone: `nowhere` is nowhere in model/moe\.py; adapt"):
        Named("gone", "model/moe.py", "nowhere", "None").mutant(ROOT)


def test_a_change_that_is_called_none_is_still_one_that_may_be_drawn() -> None:
    for file in {one.file for one in EQUIVALENTS}:
        pool = mutants(file, (ROOT / file).read_text())
        for known in EQUIVALENTS:
            if known.file == file:
                assert any(map(known.is_of, pool)), known


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small project under git, with a test of one of its two functions."""
    folder = tmp_path / "tree"
    (folder / "tests").mkdir(parents=True)
    (folder / "thing.py").write_text(
        "def twice(n):\n    return n * 2\n\n\ndef thrice(n):\n    return n * 3\n"
    )
    (folder / "tests" / "test_thing.py").write_text(
        "from thing import twice\n\n\ndef test_twice():\n    assert twice(2) == 4\n"
    )
    (folder / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["."]\n')
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    return folder


def changed(tree: Path, line: str) -> Mutant:
    """The mutant that adds this line."""
    pool = mutants("thing.py", (tree / "thing.py").read_text())
    (one,) = (one for one in pool if one.added == (line,))
    return one


def test_what_a_test_finds_is_killed_and_what_none_finds_survives(tree: Path) -> None:
    before = (tree / "thing.py").read_text()
    chosen = [changed(tree, f"return n * ({factor} + 1)") for factor in (3, 2)]
    found = list(judge_all(tree, [(one, ("tests/test_thing.py",)) for one in chosen]))
    assert [one.outcome for one in found] == ["survived", "killed"]
    assert found[1].killer == "tests/test_thing.py::test_twice: assert 6 == 4"
    assert (tree / "thing.py").read_text() == before
    told = table(found)
    assert "thing.py      2       1           0          1" in told
    assert "-return n * 3\n+return n * (3 + 1)" in told


def test_tests_that_fail_unchanged_judge_nothing(tree: Path) -> None:
    """A kill by a test that cannot pass is none."""
    (tree / "tests" / "test_thing.py").write_text("def test_it():\n    assert False\n")
    chosen = [(changed(tree, "return n * (2 + 1)"), ("tests/test_thing.py",))]
    with pytest.raises(RuntimeError, match="test_it: assert False fails without a mutant"):
        list(judge_all(tree, chosen))


def test_a_test_that_hangs_is_ended_with_all_it_has_started(tree: Path, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    (tree / "tests" / "test_thing.py").write_text(
        "import subprocess, pathlib\n\n\ndef test_it():\n"
        "    child = subprocess.Popen(['sleep', '300'])\n"
        f"    pathlib.Path({str(pid)!r}).write_text(str(child.pid))\n    child.wait()\n"
    )
    scratch = Scratch(tree, tmp_path / "scratch")
    started = time.monotonic()
    assert scratch.test(["tests/test_thing.py"], seconds=15) == "deadline"
    assert time.monotonic() - started < 60
    deadline = time.monotonic() + 10
    while _runs(int(pid.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # Dead, and not yet reaped by whoever inherited it.
    return ") Z " not in Path(f"/proc/{pid}/stat").read_text()


def test_the_command_lists_what_it_would_try(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--named", "--file", "pipeline/plain.py", "--list"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("upload limit off\n@@ pipeline/plain.py:")
    assert main(["--file", "model/balance.py", "--number", "3", "--list"]) == 0
    assert capsys.readouterr().out.count("@@ model/balance.py:") == 3
