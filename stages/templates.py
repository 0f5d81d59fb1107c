"""Chat templates, most of them of strangers: which one counts, and what it makes of a conversation.

They are rendered as transformers renders them, but in a sandbox that reaches nothing, without a
clock.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from configs.errors import ArtifactError, ExportError

DEFAULT = "default"
"""Of several templates the name of the one that counts where none is asked for."""
SPECIAL_TOKENS = (
    *("bos_token", "eos_token", "pad_token"),
    *("unk_token", "sep_token", "cls_token", "mask_token"),
)
"""Fields of a tokenizer's config that must hold a token, if they are there."""
TOKEN_GROUPS = (
    "additional_special_tokens",
    "extra_special_tokens",
    "model_specific_special_tokens",
)
"""Fields that hold further tokens: a list, or a table that names them."""


class _Generation(Extension):
    """`{% generation %}` encloses the model's own words, to be found in what was rendered."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: Parser) -> Scope:
        """What is enclosed, as it is; names that are set there end there, as in transformers."""
        scope = Scope(lineno=next(parser.stream).lineno)
        scope.body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return scope


def named_templates(found: Any, where: str) -> dict[str, str]:
    """The templates in a field `chat_template` by name, a single one as the default.

    Empty ones are none. ArtifactError names the field `where` that holds something else.
    """
    match found:
        case None:
            return {}
        case str():
            named: dict[Any, Any] = {DEFAULT: found}
        case dict():
            named = found
        case list() if all(isinstance(one, dict) for one in found):
            named = {one.get("name"): one.get("template") for one in found}
        case _:
            named = {None: None}
    if not all(isinstance(part, str) for pair in named.items() for part in pair):
        raise ArtifactError(
            f"{where} = {str(found)[:60]!r} is neither a template nor a list of tables with "
            "`name` and `template`; mend it, or take it away"
        )
    return {name: template for name, template in named.items() if template}


def compile_template(template: str, where: str) -> jinja2.Template:
    """A template with what transformers offers templates; ArtifactError names `where` it is."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _no_clock
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    try:
        return environment.from_string(template)
    except Exception as error:
        # Besides its own errors Jinja lets those through that Python finds in the code it makes.
        said: object = error
        if isinstance(error, jinja2.TemplateSyntaxError):
            said = f"at line {error.lineno}: {error.message}"
        raise ArtifactError(f"{where} is no template, {said}; mend it") from None


def render(
    template: jinja2.Template,
    messages: Sequence[Mapping[str, str]],
    config: Mapping[str, Any],
    where: str,
) -> str:
    """A conversation, up to where the model is to go on, as clients with this config have it.

    ExportError if the template refuses it, in whatever way.
    """
    try:
        return template.render(
            messages=messages,
            add_generation_prompt=True,
            tools=None,
            documents=None,
            **named_tokens(config),
        )
    except Exception as error:
        kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        raise ExportError(
            f"{where}: the chat template refuses a conversation ({kind}{error}); mend it, or set "
            "export.problems = 0"
        ) from None


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """How the tokens are spelt that a `tokenizer_config.json` names, by these names."""
    named = {name: token for name, token in config.items() if name.endswith("_token")}
    for group in TOKEN_GROUPS:
        if isinstance(tokens := config.get(group), Mapping):
            named |= tokens
    found = {name: spelling(token) for name, token in named.items()}
    return {name: spelt for name, spelt in found.items() if spelt is not None}


def spelling(token: Any) -> str | None:
    """How a token is spelt, which may stand in a table; none of what is no token."""
    spelt = token.get("content") if isinstance(token, Mapping) else token
    return spelt if isinstance(spelt, str) else None


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _no_clock(layout: str) -> str:
    """A template's date: none, so that two exports of one model ask the same."""
    return layout
