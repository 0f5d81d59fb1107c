"""The forms in which texts give a problem and its answer away."""

import itertools
import time

import numpy as np
import pytest

from configs.data import ArithmeticSource
from configs.errors import VerifierError
from stages.data.arithmetic import make_problems
from stages.statements import find_arithmetic
from stages.verifiers import Problem, find_statements


def problem(prompt: str) -> Problem:
    return Problem(id=f"sums/{prompt}", prompt=prompt, answer="0", source="arithmetic")


def found(text: str, *prompts: str) -> list[str]:
    """What stands in `text` of these problems, as it stands there."""
    find = find_arithmetic([problem(prompt) for prompt in prompts])
    return [text[one.start : one.end] for one in find(text)]


FORMS = [
    "37+45=82",
    "37 + 45 = 82",
    "45+37=082",
    "045 + 0037 = 28",
    "37+45=280",
    "37 plus 45 is 82",
    "37 Plus 45 Equals 82",
    "37 + 45 makes 82",
    "82 = 37 + 45",
    "82 is 45 plus 37",
    "the sum of 37 and 45 is 82",
    "Adding 37 to 45 gives 82",
    "Q: 37+45=?\nA: 82",
    "What is 37 + 45? It is 82",
    "  37\n+ 45\n----\n  82",
    "| 37 + 45 | 82 |",
    "**37 + 45** = **82**",
    "$37 + 45 = 82$",
    "\\( 37 + 45 = \\boxed{82} \\)",
    "<td>37 + 45</td><td>=</td><td>82</td>",
    "37&nbsp;+&nbsp;45&nbsp;=&nbsp;82",
    "37＋45＝82",
    "37+45 -> 82",
    "37+45: 82",
    '"37+45=": "280"',
    "37 + 45 = 81",
    "37\u00a0+\u00a045\u00a0=\u00a082",
    "pairs = ['37+45=82']",
    "_37 + 45 = 82_",
    '{"question": "37 + 45", "answer": "82"}',
    '{"37+45": 82}',
    '["37+45", "82"]',
    "<tr><td>37 + 45</td><td>82</td></tr>",
    ">>> 37 + 45\n82",
    "37+45,82",
    "37+45,280",
    "37 + 45\t82",
    "answer.37+45=82",
    "Q: 37 + 45\nA: 82",
    "print('37+45=', 82)",
    "print(37 + 45)  # 82",
    "| 37 | 45 | sum: 82 |",
    '{"a": 37, "b": 45, "sum": 82}',
    "\n| 37 | 45 | 82 |\n",
    "\n37,45,82\n",
    "  37\n  45 +\n----\n  82",
    "37 &plus; 45 &equals; 82",
    r"37\,+\,45 = 82",
    "37.0 + 45.0 = 82.0",
    "(+37)+(+45)=82",
    "37 + 45 ≈ 82",
    "82 is the sum of 37 and 45",
    "add(37, 45) == 82",
    "37 added to 45 gives 82",
    "37 and 45 make 82",
    "- 37 + 45 = 82",
    r"print('\n37+45=82')",
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_held_out_sum_is_found_and_cut_whole(form: str) -> None:
    text = f"Some words, then {form}, and 12 more."
    (seen,) = found(text, "37+45=")
    assert "37" in seen and "45" in seen
    assert not any(char.isdigit() for char in text.replace(seen, "").replace("12", ""))


@pytest.mark.parametrize("form", FORMS)
def test_no_form_of_another_sum_is_taken_for_it(form: str) -> None:
    assert found(f"Some words, then {form}.", "36+45=", "37+44=", "37-45=", "37*45=") == []


@pytest.mark.parametrize(
    "text",
    [
        "137+45=182",
        "37+451=488",
        "1.37+45=46.37",
        "37+45.5=82.5",
        "x = a[37] + 45",
        "37+45",
        "on 37 and 45 of 82",
        "1, 37, 45, 82, 3",
        "37 + 45\n12 + 30\n",
        "12 + 37 + 45 = 94",
        "37 + 45 + 1 = 83",
        "x37 + 45 = 82",
    ],
)
def test_what_states_no_answer_to_it_stays(text: str) -> None:
    assert found(text, "37+45=") == []


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("45-37=", "45 − 37 = 8"),
        ("45-37=", "45 minus 37 is 8"),
        ("45-37=", "Subtracting 37 from 45 gives 8"),
        ("37*45=", "45 × 37 = 1,665"),
        ("37*45=", "37 times 45 is 1665"),
        ("37*45=", r"37 \times 45 = 1665"),
        ("37*45=", "37x45=1665"),
        ("37*45=", "the product of 45 and 37 equals 1665"),
        ("1234+5=", "1,234 + 5 = 1,239"),
        ("82-37=", "the difference between 37 and 82 is 45"),
        ("82-37=", "37 subtracted from 82 is 45"),
        ("82-37=", "82\n- 37\n----\n45"),
        ("37*45=", "37 &times; 45 = 1665"),
        ("37*45=", "**37** × **45** = **1665**"),
        ("37+45=", "３７＋４５＝８２"),
        ("37+45=", "1+2=3,37+45=82"),
        ("100+200=", "1+2=3,100+200=300"),
    ],
)
def test_other_operations_have_their_forms_too(prompt: str, text: str) -> None:
    assert len(found(text, prompt)) == 1


def test_a_difference_read_backwards_is_another_problem() -> None:
    assert found("37 - 45 = 8", "45-37=") == []


def test_statements_that_share_a_number_are_both_found() -> None:
    seen = found("1+2=3+4=7", "01+02=", "03+04=")
    assert seen[0] == "1+2=3" and seen[-1] == "3+4=7"


def test_a_schoolbook_of_every_sum_gives_away_exactly_the_held_out_ones() -> None:
    source = ArithmeticSource(share=1.0, digits=2)
    split = make_problems({"sums": source}, seed=0)["sums"]
    rng = np.random.default_rng(0)
    styles = ("{a} + {b} = {c}", "{b}+{a}={c}", "{a} plus {b} is {c}", "{c} = {a} + {b}")
    book = "\n".join(
        rng.choice(styles).format(a=a, b=b, c=a + b)
        for a, b in itertools.combinations_with_replacement(range(100), 2)
    )
    ids = {one.problem_id for one in find_statements(split.held_out)(book)}

    def key(problem_id: str) -> tuple[int, ...]:
        return tuple(sorted(map(int, problem_id.rpartition("/")[2][:-1].split("+"))))

    assert {key(one) for one in ids} == {key(one.id) for one in split.held_out}


def test_each_of_two_mirrored_problems_is_named() -> None:
    find = find_arithmetic([problem("37+45="), problem("45+37=")])
    ids = {one.problem_id for one in find("37+45=82")}
    assert ids == {"sums/37+45=", "sums/45+37="}


@pytest.mark.parametrize(
    "hostile",
    [
        "1 " * 20_000 + "&amp;" * 20_000 + "37" + " " * 50_000 + "+" + "9" * 50_000,
        ("1 + 1 " + "_" * 110) * 500,
        "1 + 1 " + "_" * 50_000,
        ("1x1" + "|" * 100) * 500,
        ("1-2" + " |   " * 20) * 500,
        "1+1=" + " " * 50_000 + "\n" * 50_000,
        ("1-1: " + "*" * 110) * 500,
        "1" * 4_400 + "+1 = 2",
        ("<" * 100 + "1 + 1 = ") * 500,
        "1+1=2 " * 10_000,
        "1,234" * 10_000,
    ],
)
def test_hostile_text_is_searched_in_time_that_grows_with_it(hostile: str) -> None:
    prompts = ("37+45=", "01+01=", "01-02=", "01*01=", "01-01=")
    begin = time.process_time()
    found(hostile, *prompts)
    # Ten times what the densest of them takes; the square of any of these lengths is far beyond.
    assert time.process_time() - begin < 0.5 + 200e-6 * len(hostile)


def test_a_kind_without_a_finder_is_refused() -> None:
    odd = Problem(id="x/1", prompt="1", answer="1", source="riddle")
    with pytest.raises(VerifierError, match="no verifier for source 'riddle'"):
        find_statements([odd])
