"""How a generation config says to draw tokens, and what of it only servers do."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.errors import ArtifactError, ConfigError
from model.drawing import Drawing

_WITHOUT_EFFECT: Mapping[str, float] = {
    "diversity_penalty": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "frequency_penalty": 0,
    "guidance_scale": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_p": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "penalty_alpha": 0,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "typical_p": 1,
}
"""Numbers that change what is drawn, unless they are these; of servers, and of transformers."""
_CHANGING = (
    *("bad_words_ids", "begin_suppress_tokens", "constraints", "dola_layers"),
    *("exponential_decay_length_penalty", "force_words_ids", "forced_bos_token_id"),
    *("forced_eos_token_id", "sequence_bias", "stop_strings", "suppress_tokens"),
    *("token_healing", "top_h", "watermarking_config"),
)
"""Fields that change what is drawn if they hold anything."""


def read_drawing(generation: Mapping[str, Any], path: Path) -> Drawing:
    """How servers draw by default, by the generation config in `path`.

    ArtifactError names the field that means nothing.
    """
    sampled = generation.get("do_sample")
    if not isinstance(sampled, bool | None):
        raise ArtifactError(
            f"{path}: do_sample = {sampled!r} is neither true nor false; give one, or take it away"
        )
    top_k = _number(generation, "top_k", 0, path)
    if top_k % 1:
        raise ArtifactError(f"{path}: top_k = {top_k} is no whole number; give one")
    try:
        drawing = Drawing(
            _number(generation, "temperature", 1, path),
            # Servers write 0 or -1 for all tokens.
            int(top_k) if top_k > 0 else None,
            # A share of nothing leaves the likeliest token, as the smallest share does.
            _number(generation, "top_p", 1, path) or sys.float_info.min,
        )
    except ConfigError as error:
        raise ArtifactError(f"{path}: {error}") from None
    return drawing if sampled else replace(drawing, temperature=0.0)


def not_imitated(generation: Mapping[str, Any]) -> list[str]:
    """Fields, with their values, that change what servers draw and nothing here."""
    asked = {name: value for name, value in generation.items() if value not in (None, False)}
    return [
        f"{name} = {value!r}"
        for name, value in sorted(asked.items())
        if (name in _WITHOUT_EFFECT and value != _WITHOUT_EFFECT[name])
        or (name in _CHANGING and value not in ([], {}, ""))
    ]


def _number(generation: Mapping[str, Any], name: str, default: float, path: Path) -> float:
    """A field that holds a number; null is as good as no such field."""
    value = generation.get(name)
    if value is None:
        return float(default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and abs(value) <= sys.float_info.max):
        raise ArtifactError(
            f"{path}: {name} = {str(value)[:60]!r} is no number; give one, or take it away"
        )
    return float(value)
