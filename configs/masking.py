"""Passwords in addresses, which are shown to nobody and recorded nowhere."""

import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
_LOGIN = re.compile(r"(://)(?:([^/?#\s:@]*:)\S*|[^/?#\s@]+)(@)")
_SETTING = re.compile(r"([?&;][\w-]*(?:passw|pwd|token|secret|api_?key)[\w-]*=)[^&#;\s\"']+", re.I)


def masked(text: str) -> str:
    """Text that may hold addresses, without the passwords and tokens in them."""
    text = _LOGIN.sub(lambda found: f"{found[1]}{found[2] or ''}{MASK}{found[3]}", text)
    return _SETTING.sub(rf"\1{MASK}", text)


def masked_tree(value: Any) -> Any:
    """The same for every text of a JSON value."""
    match value:
        case str():
            return masked(value)
        case Mapping():
            return {key: masked_tree(one) for key, one in value.items()}
        case list() | tuple():
            return [masked_tree(one) for one in value]
    return value


def without_login(address: str) -> str:
    """An address for people to follow: their browser asks for what it needs."""
    return _LOGIN.sub(r"\1", masked(address))
