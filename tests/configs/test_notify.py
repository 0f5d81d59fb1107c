"""Who is told how a run goes: refused where nobody could be told, and its secret never shown."""

import json
from pathlib import Path

import pytest
from pydantic import SecretStr

from configs.errors import ConfigError
from configs.notify import NotifyConfig, check_webhook, hide_addresses
from configs.reading import load_recipe, without_webhooks
from pipeline.graph import make_graph
from pipeline.production import production
from stages.hashing import Hashes

SECRET = "T0SECRET"
ADDRESS = f"https://hooks.slack.com/services/{SECRET}"
COMMAND = 'notify.command=["mail", "me"]'


def refusal(*sets: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe("smoke", sets=sets)
    said = str(caught.value)
    assert "\n" not in said
    return said


def test_without_the_table_nobody_is_told() -> None:
    assert load_recipe("smoke").notify is None


def test_a_webhook_is_an_address_or_names_the_variable_that_holds_it() -> None:
    for value in (ADDRESS, "$SLACK_URL", "http://127.0.0.1:8000/x", "http://[::1]/x"):
        notify = load_recipe("smoke", sets=[f"notify.webhook={value}"]).notify
        assert notify is not None
        assert notify.webhook == SecretStr(value)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (['notify.on=["end"]'], "notify: neither command nor webhook says who is told; set one"),
        (["notify.command=[]"], "notify.command = []: should have at least 1 item"),
        (['notify.command=[""]'], "notify.command: [''] names no program; give a program"),
        (['notify.command=["a\\u0000"]'], "names no program"),
        (["notify.command=mail me"], "notify.command = 'mail me': should be a list"),
        ([COMMAND, "notify.stall_seconds=-1"], "notify.stall_seconds = -1: should be gr"),
        ([COMMAND, "notify.timeout_seconds=0"], "notify.timeout_seconds = 0: should be gr"),
        ([COMMAND, "notify.timeout_seconds=601"], "notify.timeout_seconds = 601: should"),
        ([COMMAND, 'notify.on=["ends"]'], "notify.on.0 = 'ends': should be 'end', 'failure'"),
    ],
)
def test_a_table_by_which_nobody_can_be_told_is_one_clear_error(
    sets: list[str], message: str
) -> None:
    assert message in refusal(*sets)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (f"notify.webhook=hooks.slack.com/{SECRET}", "notify.webhook: is no http or https address"),
        (f"notify.webhook=ftp://hooks.slack.com/{SECRET}", "is no http or https address"),
        (f"notify.webhook=https:///{SECRET}", "is no http or https address"),
        (f"notify.webhook=https://host:{SECRET}/x", "notify.webhook: is no address; write it as"),
        (f"notify.webhook=https://[host/{SECRET}", "notify.webhook: is no address; write it as"),
        (f"notify.webhook=https://host/a {SECRET}", "has spaces or signs"),
        (f"notify.webhook=https://host/ü{SECRET}", "has spaces or signs"),
        (f'notify.webhook="https://host/\\n{SECRET}"', "has spaces or signs"),
        (f"notify.webhook=http://hooks.slack.com/{SECRET}", "to hooks.slack.com in the clear"),
        (f"notify.webhook=https://me:{SECRET}@host/x", "a user's name before its host"),
        (f"notify.webhook=$1{SECRET}", "is no http or https address"),
        (f"notify.webhook=['{ADDRESS}']", "notify.webhook = '...': should be text"),
        (f"notify.webhook={{x='{SECRET}'}}", "notify.webhook = '...': should be text"),
        (f"notify.webhok=hooks/{SECRET}", "notify.webhok = '...': no such field; did you mean"),
        (f"notifi.webhook=hooks/{SECRET}", "no such field; did you mean 'notify'?"),
        (f"notify={ADDRESS}", "notify = 'https://hooks.slack.com/...': should be a table"),
        (f"notify.webhook=x\n{SECRET}", "--set 'notify.webhook=...': a line break ends a value"),
        (f"notify.webhook {ADDRESS}", "--set 'notify.webhook ...': expected key=value"),
        (f"{ADDRESS}?a=b", "'https://hooks.slack.com/...' is no field's path"),
    ],
)
def test_no_refusal_shows_a_webhook(assignment: str, message: str) -> None:
    said = refusal(assignment)
    assert message in said
    assert SECRET not in said


def test_a_recipe_shows_its_webhook_nowhere() -> None:
    recipe = load_recipe("smoke", sets=[f"notify.webhook={ADDRESS}"])
    shown = [
        repr(recipe),
        str(recipe),
        recipe.model_dump_json(),
        json.dumps(recipe.model_dump(mode="json")),
    ]
    assert all(SECRET not in one for one in shown)


def test_an_address_shows_its_host_alone() -> None:
    assert hide_addresses(f"to {ADDRESS}, or not") == "to https://hooks.slack.com/... or not"
    assert hide_addresses("HTTPS://me:pw@host?key=pw") == "HTTPS://host/..."
    assert hide_addresses("at http://127.0.0.1:9") == "at http://127.0.0.1:9"


def test_what_a_check_refuses_is_not_in_what_it_raises() -> None:
    with pytest.raises(ValueError, match="is no address") as caught:
        check_webhook(f"https://[host/{SECRET}")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("word", "recorded"),
    [
        (f"notify.webhook={ADDRESS}", "notify.webhook=$INGOT_NOTIFY_WEBHOOK"),
        (f"notify.webhook={ADDRESS}?a=b", "notify.webhook=$INGOT_NOTIFY_WEBHOOK"),
        (f' notify . "webhook" = "{ADDRESS}"', "notify.webhook=$INGOT_NOTIFY_WEBHOOK"),
        (f"--set=notify.webhook={ADDRESS}", "--set=notify.webhook=$INGOT_NOTIFY_WEBHOOK"),
        (
            f'notify={{on=["end"], webhook="{ADDRESS}", stall_seconds=5}}',
            'notify={on = ["end"], webhook = "$INGOT_NOTIFY_WEBHOOK", stall_seconds = 5}',
        ),
    ],
)
def test_a_command_is_recorded_without_the_webhook_and_means_the_same(
    word: str, recorded: str
) -> None:
    assert without_webhooks([word]) == (recorded,)
    told = load_recipe("smoke", sets=[recorded.removeprefix("--set=")]).notify
    meant = load_recipe("smoke", sets=[word.removeprefix("--set=")]).notify
    assert told is not None
    assert meant is not None
    assert meant.webhook == SecretStr(ADDRESS + "?a=b" * ("?" in word))
    assert told == meant.model_copy(update={"webhook": SecretStr("$INGOT_NOTIFY_WEBHOOK")})


def test_words_without_a_webhook_are_recorded_as_they_are() -> None:
    words = ("run", "@a.toml", "--set", "seed=1", "notify.webhook=$SLACK", COMMAND, "--seeds=0,1")
    assert without_webhooks(words) == words
    assert without_webhooks(["", "=", "37+45=", "notify=false"]) == (
        "",
        "=",
        "37+45=",
        "notify=false",
    )


def test_who_is_told_never_enters_identity(tmp_path: Path) -> None:
    sets = [f"notify.webhook={ADDRESS}", COMMAND, "notify.stall_seconds=5"]
    told, plain = (
        make_graph(production(load_recipe("smoke", sets=one)), Hashes()) for one in (sets, [])
    )
    assert [node.fingerprint for node in told] == [node.fingerprint for node in plain]


def test_a_recipe_that_was_written_out_is_read_again() -> None:
    notify = NotifyConfig(command=("true",))
    assert NotifyConfig.model_validate_json(notify.model_dump_json()) == notify
