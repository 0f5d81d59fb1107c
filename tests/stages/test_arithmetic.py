"""Promises of the generated problems."""

import functools
import re
from typing import Any

import pytest

from configs.data import ArithmeticSource
from configs.errors import DataError
from configs.reading import load_recipe, shipped_recipes
from configs.recipe import Recipe
from stages.data.arithmetic import Split, make_problems, training_documents, wrong_share


def problems(**settings: Any) -> Split:
    source = ArithmeticSource.model_validate({"share": 1.0, **settings})
    return make_problems({"sums": source}, seed=0)["sums"]


def mirrored(prompt: str) -> str:
    found = re.fullmatch(r"(\d+)([+*-])(\d+)=", prompt)
    assert found is not None
    left, sign, right = found.groups()
    return f"{right}{sign}{left}="


@pytest.mark.parametrize("operation", ["+", "-", "*"])
@pytest.mark.parametrize("zero_padded", [True, False])
@pytest.mark.parametrize("order", ["most-significant-first", "least-significant-first"])
def test_every_answer_is_right(operation: str, zero_padded: bool, order: str) -> None:
    made = problems(operations=(operation,), zero_padded=zero_padded, answer_order=order)
    for problem in made.train + made.held_out:
        left, right = map(int, problem.prompt[:-1].split(operation))
        result = {"+": left + right, "-": left - right, "*": left * right}[operation]
        digits = problem.answer[::-1] if order.startswith("least") else problem.answer
        assert int(digits) == result
        assert result >= 0
        assert len(digits) == len(str(result)) or zero_padded


def test_padding_and_order_are_as_configured() -> None:
    by_id = {p.id: p for p in problems().train}
    assert next(iter(by_id.values())).source == "arithmetic"
    everything = {p.prompt: p.answer for p in problems().train + problems().held_out}
    assert everything["37+45="] == "280"
    assert everything["07+05="] == "210"
    plain = problems(zero_padded=False, answer_order="most-significant-first")
    assert {p.prompt: p.answer for p in plain.train + plain.held_out}["7+5="] == "12"


def test_padded_problems_of_one_operation_have_one_width() -> None:
    for operation, width in {"+": 3, "-": 2, "*": 4}.items():
        made = problems(operations=(operation,))
        assert {len(p.answer) for p in made.train + made.held_out} == {width}
        assert {len(p.prompt) for p in made.train + made.held_out} == {6}


def test_all_distinct_problems_are_made() -> None:
    made = problems(operations=("+", "-"))
    prompts = [p.prompt for p in made.train + made.held_out]
    assert len(prompts) == len(set(prompts)) == 100 * 100 + 100 * 101 // 2


def test_no_held_out_problem_nor_its_mirror_image_is_trained_on() -> None:
    made = problems()
    train = {p.prompt for p in made.train}
    for problem in made.held_out:
        assert problem.prompt not in train
        assert mirrored(problem.prompt) not in train


def test_what_one_source_holds_out_no_other_trains_on() -> None:
    sources = {
        "careful": ArithmeticSource(share=0.5, held_out_share=0.5),
        "greedy": ArithmeticSource(share=0.5, held_out_share=0.01),
    }
    splits = make_problems(sources, seed=0)
    held = {p.prompt for split in splits.values() for p in split.held_out}
    assert not held & {p.prompt for split in splits.values() for p in split.train}


def test_the_share_held_out_is_the_share_asked() -> None:
    made = problems(held_out_share=0.2)
    assert abs(len(made.held_out) / 10_000 - 0.2) < 0.025  # four deviations of 5050 pairs


def test_too_many_problems_are_drawn_distinct_and_equally_from_each_operation() -> None:
    made = problems(operations=("+", "-"), digits=5, max_problems=2_000)
    prompts = [p.prompt for p in made.train + made.held_out]
    assert len(set(prompts)) == len(prompts) == 2_000
    assert sum("+" in prompt for prompt in prompts) == 1_000


def test_the_seed_decides_order_and_split() -> None:
    source = {"sums": ArithmeticSource(share=1)}
    assert make_problems(source, seed=0) == make_problems(source, seed=0)
    first, other = (make_problems(source, seed=seed)["sums"] for seed in (0, 1))
    assert {p.id for p in first.held_out} != {p.id for p in other.held_out}


@pytest.mark.parametrize("name", [n for n in shipped_recipes() if load_recipe(n).parity is None])
def test_a_shipped_recipe_holds_out_the_problems_that_it_evaluates(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.evaluate is not None
    assert held_out_problems(recipe) >= recipe.evaluate.problems


def held_out_problems(recipe: Recipe) -> int:
    sources = {
        name: source
        for name, source in recipe.data.sources.items()
        if isinstance(source, ArithmeticSource)
    }
    return _held_out_problems(tuple(sources.items()), recipe.seed)


@functools.cache  # Most of the large recipes have the same problems, a hundred thousand each.
def _held_out_problems(sources: tuple[tuple[str, ArithmeticSource], ...], seed: int) -> int:
    return sum(len(split.held_out) for split in make_problems(dict(sources), seed=seed).values())


def test_a_side_without_problems_is_an_error() -> None:
    with pytest.raises(DataError, match=r"data\.sources\.sums\.held_out_share = 1e-09: of 100"):
        problems(digits=1, held_out_share=1e-9)


def documents(split: Split, slip_share: float, *, seed: int = 0) -> list[str]:
    source = ArithmeticSource(share=1.0, slip_share=slip_share)
    return training_documents(split.train, source, seed=seed)


def test_without_slips_each_problem_is_one_document() -> None:
    made = problems()
    assert documents(made, 0.0) == [one.prompt + one.answer for one in made.train]


@pytest.mark.parametrize("slip_share", [0.35, 0.1, 0.55])
def test_the_share_asked_of_each_problems_documents_is_wrong(slip_share: float) -> None:
    made = problems(digits=1)
    written = documents(made, slip_share)
    assert wrong_share(ArithmeticSource(share=1, slip_share=slip_share)) == slip_share
    for problem in made.train:
        own = [one for one in written if one.startswith(problem.prompt)]
        right = own.count(problem.prompt + problem.answer)
        assert 1 - right / len(own) == pytest.approx(slip_share)


def test_a_slip_is_one_digit_off_by_one_modulo_ten_at_any_place_and_either_way() -> None:
    made = problems(digits=1)
    answers = {one.prompt: one.answer for one in made.train}
    seen = set()
    for document in documents(made, 0.5):
        prompt, _, written = document.partition("=")
        answer = answers[f"{prompt}="]
        assert len(written) == len(answer)
        pairs = zip(answer, written, strict=True)
        slips = [(n, (int(b) - int(a)) % 10) for n, (a, b) in enumerate(pairs) if a != b]
        assert len(slips) <= 1
        seen.update(slips)
    assert seen == {(place, change) for place in (0, 1) for change in (1, 9)}


def test_slips_touch_neither_problems_nor_what_is_held_out() -> None:
    assert problems(slip_share=0.5) == problems()


def test_the_seed_decides_the_slips() -> None:
    made = problems(digits=1)
    assert documents(made, 0.5, seed=1) == documents(made, 0.5, seed=1)
    assert documents(made, 0.5, seed=1) != documents(made, 0.5, seed=2)
