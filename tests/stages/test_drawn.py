"""A generation config says how tokens are drawn, and what it asks beyond that is named."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import TopPLogitsWarper

from configs.errors import ArtifactError
from model.drawing import Drawing, draw
from stages.drawn import not_imitated, read_drawing

WHERE = Path("generation_config.json")
SAMPLED: dict[str, Any] = {"do_sample": True}


@pytest.mark.parametrize(
    ("fields", "drawing"),
    [
        ({}, Drawing(1.0)),
        ({"temperature": None, "top_k": None, "top_p": None}, Drawing(1.0)),
        ({"temperature": 0.6, "top_k": 20, "top_p": 0.95}, Drawing(0.6, 20, 0.95)),
        ({"top_k": -1}, Drawing(1.0)),
        ({"top_k": 0}, Drawing(1.0)),
        ({"top_k": 20.0}, Drawing(1.0, 20)),
        ({"temperature": 1, "top_p": 1}, Drawing(1.0)),
        ({"do_sample": False, "temperature": 0.6, "top_k": 7}, Drawing(0.0, 7)),
        ({"do_sample": None}, Drawing(0.0)),
    ],
)
def test_fields_mean_what_servers_take_them_for(fields: dict[str, Any], drawing: Drawing) -> None:
    found = read_drawing(SAMPLED | fields, WHERE)
    assert found == drawing
    assert found.top_k is None or type(found.top_k) is int


def test_a_share_of_nothing_leaves_the_likeliest_token_as_in_transformers() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    left = TopPLogitsWarper(0.0)(torch.empty(1, 0), logits.clone()).isfinite()
    assert left.tolist() == [[False, True, False]]
    drawing = read_drawing(SAMPLED | {"top_p": 0}, WHERE)
    for uniform in (0.0, 0.5, 0.999):
        assert draw(logits, drawing, torch.tensor([uniform]))[0].tolist() == [1]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"temperature": "hot"}, "temperature = 'hot' is no number"),
        ({"temperature": True}, "temperature = 'True' is no number"),
        ({"temperature": -1}, r"temperature = -1\.0, but it must be"),
        ({"temperature": math.nan}, "temperature = 'nan' is no number"),
        ({"temperature": 10**400}, "temperature = '1000"),
        ({"top_p": 1.5}, r"top_p = 1\.5, but it must be"),
        ({"top_p": [0.9]}, r"top_p = '\[0\.9\]' is no number"),
        ({"top_k": 20.5}, r"top_k = 20\.5 is no whole number"),
        ({"top_k": "all"}, "top_k = 'all' is no number"),
        ({"do_sample": "yes"}, "do_sample = 'yes' is neither true nor false"),
        ({"do_sample": False, "temperature": "hot"}, "temperature = 'hot' is no number"),
    ],
)
def test_a_field_that_means_nothing_is_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ArtifactError, match=rf"generation_config\.json: {said}"):
        read_drawing(SAMPLED | fields, WHERE)


def test_what_changes_answers_elsewhere_is_named_with_its_value() -> None:
    asked = {
        "repetition_penalty": 1.1,
        "min_p": 0.05,
        "typical_p": 0.9,
        "no_repeat_ngram_size": 3,
        "suppress_tokens": [7],
        "presence_penalty": 0.5,
    }
    named = not_imitated(SAMPLED | asked | {"temperature": 0.6, "top_k": 5, "eos_token_id": 1})
    assert named == [f"{name} = {asked[name]!r}" for name in sorted(asked)]


def test_what_transformers_does_by_itself_changes_nothing() -> None:
    assert not_imitated(GenerationConfig._get_default_generation_params()) == []
    neutral = {"min_p": 0.0, "repetition_penalty": 1, "bad_words_ids": [], "token_healing": False}
    assert not_imitated(neutral | {"sequence_bias": {}, "min_p": None}) == []
