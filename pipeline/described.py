"""What MLflow's pages say of a run, a node and a version of a model, in Markdown."""

from collections.abc import Mapping

from pipeline.figures import show_bytes, show_figures, show_seconds
from pipeline.records import Blocked, Built, Failed, Reused, Run
from stages.markdown import code

_ERROR_CHARS = 300
_MOST_SETTINGS = 40
_MOST_CHARS = 7900
"""MLflow takes a hundred more."""
_ESCAPES = {ord(sign): f"\\{sign}" for sign in "\\`*_[]#"}
_ESCAPES |= {ord(sign): f"&#{ord(sign)};" for sign in "<>&|"}


def outcome_word(run: Run) -> str:
    """What became of a run, in a word or two: `succeeded`, `failed: posttrain`."""
    word, node = run.ending
    return f"{word}: {node}" if node else word


def beginning(run: Run, command: str, changed: Mapping[str, tuple[str, str]]) -> str:
    """What is said of a run while it goes on."""
    return "\n\n".join([f"**{_escape(run.recipe)}** is running.", *_how(command, changed)])


def conclusion(
    run: Run,
    command: str,
    changed: Mapping[str, tuple[str, str]],
    pages: Mapping[str, str],
    built_by: Mapping[str, str],
) -> str:
    """The final table, what was reused and from where, and how to do it again.

    `pages` has the page of each node's run by node, `built_by` that of the build that a reused node
    was taken from.
    """
    counts = ", ".join(
        f"{number} {word}"
        for word in ("built", "reused", "failed", "blocked")
        if (number := sum(one.outcome == word for one in run.outcomes.values()))
    )
    head = f"**{_escape(run.recipe)}**: {_escape(outcome_word(run))} in {show_seconds(run.seconds)}"
    rows = ["| node | outcome | seconds | figures |", "|---|---|---|---|"]
    for name, one in run.outcomes.items():
        node = f"[{_escape(name)}]({pages[name]})" if name in pages else _escape(name)
        seconds = "" if isinstance(one, Blocked) else f"{one.seconds:.1f}"
        rows.append(f"| {node} | {_outcome(name, one, built_by)} | {seconds} | {_figures(one)} |")
    parts = [f"{head} ({counts}).", "\n".join(rows), *_how(command, changed)]
    text = "\n\n".join(parts)
    return text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]}\n\n(cut here)"


def reused(artifact: str, built_by: str | None) -> str:
    """What is said of a node that was taken as it was; `built_by` is the page of its build."""
    where = f"; built in [this run]({built_by})" if built_by else ""
    return f"Taken as it was: `{artifact}`{where}."


def failed(error: str, was_stopped: bool, node: str) -> str:
    """What is said of a node that was not built."""
    if was_stopped:
        return "Stopped; the same command goes on from what is saved."
    return (
        f"**failed**: {_escape(error[: _MOST_CHARS // 2])}\n\n"
        f"`ingot logs {node}` shows what its workers printed."
    )


def built(
    node: str,
    artifact: str,
    size: int,
    figures: Mapping[str, float],
    parent: str,
    resumed: str | None,
) -> str:
    """What is said of a node that was built; `resumed` is the build that it went on from."""
    went_on = f"\n\nIt went on from the interrupted build in `{resumed}`." if resumed else ""
    shown = f" {_escape(show_figures(figures))}." if figures else ""
    return (
        f"**{_escape(node)}** of [this run]({parent}):{shown}\n\n"
        f"Artifact `{artifact}`, {show_bytes(size)}. `ingot show {node}` tells more."
        f"{went_on}"
    )


def version(
    uri: str,
    alias: str,
    *,
    tracking: str,
    folder: str,
    pages: Mapping[str, str],
    not_copied: str | None,
) -> str:
    """The words of a model's version: where it comes from, how it is loaded and served.

    `uri` is its address in the registry, `tracking` that of the server.

    `pages` has an address by what it leads to; `not_copied` says why MLflow cannot load it, and is
    none if it can.
    """
    links = ", ".join(f"[{_escape(what)}]({page})" for what, page in pages.items())
    parts = [f"The bundle for **{alias}**: {links}.", f"Its files lie in `{folder}`."]
    if not_copied is None:
        parts.append(
            "Load it (`pip install mlflow transformers torch accelerate`):\n\n"
            f'```python\nimport mlflow\n\nmlflow.set_tracking_uri("{tracking}")\n'
            f'model = mlflow.pyfunc.load_model("{uri}")\n'
            'print(model.predict(["37+45="], params={"do_sample": False}))\n```\n\n'
            f"or serve it: `MLFLOW_TRACKING_URI={tracking} mlflow models serve -m {uri} "
            "--env-manager local`."
        )
    else:
        parts.append(
            f"It stays where it is, as {not_copied}. Load one of its folders with "
            f'`AutoModelForCausalLM.from_pretrained("{folder}/VARIANT")` of transformers.'
        )
    parts.append("`README.md` in each of its folders says which servers take it, and how.")
    return "\n\n".join(parts)


def _how(command: str, changed: Mapping[str, tuple[str, str]]) -> list[str]:
    """How to do it again, and what differs from the recipe as it stands in its file."""
    parts = [f"Again: {code(command, chars=len(command))}"]
    if changed:
        rows = ["| setting | in the recipe | here |", "|---|---|---|"]
        shown = list(changed.items())[:_MOST_SETTINGS]
        rows += [
            f"| {_escape(key)} | {_escape(own[:_ERROR_CHARS])} | {_escape(now[:_ERROR_CHARS])} |"
            for key, (own, now) in shown
        ]
        more = len(changed) - len(shown)
        rows += [f"| and {more} more | | see the parameters |"] if more else []
        parts.append("Settings that differ from the recipe's own:\n\n" + "\n".join(rows))
    return parts


def _outcome(node: str, one: Built | Reused | Failed | Blocked, built_by: Mapping[str, str]) -> str:
    match one:
        case Reused():
            where = f" from [its build]({built_by[node]})" if node in built_by else ""
            return f"reused{where}"
        case Blocked():
            return f"blocked by {_escape(one.by)}"
    return one.outcome


def _figures(one: Built | Reused | Failed | Blocked) -> str:
    match one:
        case Built() | Reused():
            told = f"**{_escape(one.shortfall)}** " if one.shortfall else ""
            return told + _escape(show_figures(one.figures))
        case Failed():
            return _escape(one.error[:_ERROR_CHARS])
        case Blocked():
            return _escape(one.reason)


def _escape(text: str) -> str:
    """Text as a cell of a table: nothing in it is read as Markdown or HTML."""
    return " ".join(text.split()).translate(_ESCAPES)
