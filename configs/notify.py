"""Who is told how a run goes, and the webhook among it, which is a secret and shown to nobody."""

import ipaddress
import re
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_serializer, field_validator, model_validator

from configs.base import Frozen

Event = Literal["end", "failure", "stall"]
Program = Annotated[tuple[str, ...], Field(min_length=1)]

STAND_IN = "$INGOT_NOTIFY_WEBHOOK"
"""What stands in records in place of a webhook's address: the variable that then is to hold it."""
_VARIABLE = re.compile(r"\$([A-Za-z_][A-Za-z0-9_]*)")
_ADDRESS = re.compile(
    r"(https?://)(?:[^\s'\"/?#]*@)?([^\s'\"/?#]*)([/?#][^\s'\"]*)?", re.IGNORECASE
)
_AFTER_KEY = re.compile(r"(webhook\W).*", re.DOTALL)
_SHAPE = 'as "https://HOST/PATH", or as "$NAME" for the environment variable that holds it'


class NotifyConfig(Frozen):
    """Who is told how a run goes. Failing to tell somebody is a warning, and fails nothing."""

    command: Program | None = None
    """A program and its arguments, run without a shell in the folder that the run was started in.
    It reads the message as JSON on its standard input; INGOT_EVENT, INGOT_OUTCOME, INGOT_RECIPE
    and INGOT_RUN say the most of it. What it prints is kept nowhere."""
    webhook: SecretStr | None = None
    """An https address that the message is posted to as JSON, as Slack's incoming webhooks take it
    (http to this machine alone). It is a secret, so better name the environment variable that holds
    it: "$SLACK_URL"."""
    on: tuple[Event, ...] = ("end", "failure", "stall")
    """What is told of: `end`, the run succeeded or the user stopped it; `failure`, a node failed or
    a model fell short of a gate, told when the run ends; `stall`, nothing gets on."""
    stall_seconds: float = Field(default=1800.0, gt=0)
    """With no step and no node begun or finished for so long a run has stalled: told once, and once
    more when it goes on."""
    timeout_seconds: float = Field(default=10.0, gt=0, le=600)
    """Longest wait for the command to end, and for the webhook to answer. A run that ends waits for
    both."""

    @field_validator("command")
    @classmethod
    def _names_a_program(cls, command: Program | None) -> Program | None:
        if command is not None and (not command[0] or any("\0" in word for word in command)):
            raise ValueError(
                f"{list(command)} names no program; give a program and its arguments, as "
                '["notify-send", "ingot"]'
            )
        return command

    @field_validator("webhook")
    @classmethod
    def _is_an_address(cls, webhook: SecretStr | None) -> SecretStr | None:
        if webhook is not None and variable_of(webhook) is None:
            check_webhook(webhook.get_secret_value())
        return webhook

    @field_serializer("webhook", when_used="json-unless-none")
    def _stand_in(self, webhook: SecretStr) -> str:
        return STAND_IN if variable_of(webhook) is None else webhook.get_secret_value()

    @model_validator(mode="after")
    def _tells_somebody(self) -> Self:
        if self.command is None and self.webhook is None:
            raise ValueError("neither command nor webhook says who is told; set one of them")
        return self


def variable_of(webhook: SecretStr) -> str | None:
    """The environment variable that holds the address; none if this is the address itself."""
    found = _VARIABLE.fullmatch(webhook.get_secret_value())
    return found and found[1]


def check_webhook(address: str) -> None:
    """ValueError, which does not show the address, if nothing should be posted there."""
    if not (address.isascii() and address.isprintable()) or " " in address:
        raise ValueError(f"is no address: it has spaces or signs that none has; write it {_SHAPE}")
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError(f"is no address; write it {_SHAPE}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError(f"is no http or https address; write it {_SHAPE}")
    if parts.username is not None:
        raise ValueError("has a user's name before its host, which is not sent; leave that out")
    if parts.scheme == "http" and not _is_loopback(host):
        raise ValueError(f"sends a secret to {host} in the clear; use https")


def hide_addresses(text: str) -> str:
    """`text` with no more than the host of each http address in it: the rest may be a secret.

    What follows a webhook's key is left out, whatever it is.
    """
    shown = _ADDRESS.sub(lambda found: f"{found[1]}{found[2]}{'/...' if found[3] else ''}", text)
    return _AFTER_KEY.sub(r"\1...", shown)


def is_secret(words: tuple[str, ...]) -> bool:
    """Whether what stands at these keys of a recipe may be a webhook, whose key may be misspelt."""
    known = NotifyConfig.model_fields.keys() - {"webhook"}
    return words[:1] == ("notify",) and len(words) > 1 and words[1] not in known


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
