"""The listener that mirrors a run to MLflow.

Every call is made by one background thread in the order in which things happened. A server that
does not answer is reported once; its calls are then left out for a while and tried again, and what
a child has not yet sent goes with the next attempt. Nothing here can fail or hold up a run.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from configs.masking import masked, without_login
from pipeline.background import Background
from pipeline.building import RESUMED
from pipeline.embedded import LOCK_SECONDS, UI_PORT, set_environment
from pipeline.graph import Node
from pipeline.landing import (
    MOST_COLUMNS,
    VIEW_TAG,
    landing_page,
    run_page,
    shown_metrics,
    view,
    view_key,
)
from pipeline.places import URI_VARIABLE, tracking_uri
from pipeline.plain import seed_metrics, seed_table
from pipeline.records import INTERRUPTED, Blocked, Built, Failed, Records, Reused, Run
from pipeline.store import Committed
from pipeline.tracking.child import Child
from pipeline.tracking.models import Models
from pipeline.tracking.runs import Runs, Told, log_figures
from pipeline.tracking.server import REGISTRY_VARIABLE, Server, is_ours
from pipeline.tracking.shown import describe, log_table, show, show_in_parent
from stages.steps import METRICS

SEED_TABLE = "seeds.json"
_SHOW_SECONDS = 60.0
"""How long drawing and sending one artifact's files may take beyond one answer of the server."""


class Tracking:
    """A listener that mirrors a run to MLflow."""

    def __init__(
        self, told: Told, *, store_root: Path, records: Records, say: Callable[[str], None]
    ) -> None:
        """Record a run; returns at once, whether or not the server is there."""
        config = told.recipe.tracking
        self._timeout = config.timeout_seconds
        self._told, self._say = told, say
        uri = tracking_uri(config, store_root)
        self._server = Server(config, uri, store_root, say)
        self._runs = Runs(self._server, told, records)
        self._models = Models(self._server, config.registered_model, told.recipe.name)
        self._worker = Background(self._warning, say, is_ours=is_ours)
        self._children: dict[str, Child] = {}
        self._reports: dict[str, str] = {}
        """By node that reports on models: the id of its run."""
        self.page: Path | None = None
        """That of the whole run, once it is written."""
        self._columns: dict[str, tuple[int, list[str]]] = {}
        """By node: how telling its key figures are of a run, and their metrics."""
        _say_variables(config.uri, uri, say)
        set_environment(config)
        self._worker.submit(self._open)
        self._worker.submit(self._runs.describe_parent, owed=True)
        self._worker.submit(self._runs.end_orphans)

    @property
    def is_embedded(self) -> bool:
        """Whether `ingot ui` shows the runs, as no server does."""
        return self._server.is_embedded

    def begin(self, node: Node, inputs: Mapping[str, Committed]) -> Child:
        """Open the child run of a node that is being built."""
        child = Child(node.name, self._worker, partial(self._runs.create_child, node, {}))
        self._children[node.name] = child
        child.open()
        self._describe(node, child, inputs)
        return child

    def _describe(self, node: Node, child: Child, inputs: Mapping[str, Committed]) -> None:
        describe = self._runs.describe_child
        self._worker.submit(lambda: describe(child.id(), node, inputs), owed=True)

    def end(
        self, node: Node, outcome: Built | Reused | Failed | Blocked, made: Committed | None
    ) -> None:
        """Close a node's child run and show what was made; a reused node links to its builder."""
        match outcome:
            case Built():
                assert made is not None
                child = self._children[node.name]
                child.close("built", "FINISHED")
                for step in (self._show, self._show_model, self._show_in_parent, self._register):
                    self._worker.submit(partial(step, node, child, made), owed=True)
            case Reused():
                assert made is not None
                if node.name in self._children:
                    # Begun here, and then taken from a builder that was quicker.
                    self._children[node.name].fail("another builder was quicker", "KILLED")
                opened = partial(self._runs.create_reused, node, outcome)
                child = Child(node.name, self._worker, opened)
                self._children[node.name] = child
                child.open()
                self._describe(node, child, {})
                child.close("reused", "FINISHED")
                for step in (self._show_in_parent, self._register):
                    self._worker.submit(partial(step, node, child, made), owed=True)
            case Failed() if node.name in self._children:
                status = "KILLED" if outcome.error == INTERRUPTED else "FAILED"
                self._children[node.name].fail(outcome.error, status)
            case Failed() | Blocked():
                pass

    def note(self, message: str) -> None:
        """Notes are for the user; MLflow keeps figures."""

    def finish(self, run: Run, write_page: Callable[[Run], Path] | None) -> Run:
        """Send what is left, as long as that gets on; returns `run` with its MLflow ids.

        `write_page` makes the page of a run that has such ids; with none there is no page.
        """
        status = "FINISHED" if run.succeeded else "KILLED" if run.interrupted else "FAILED"
        if run.across_seeds:
            self._worker.submit(lambda: self._show_seeds(run), owed=True)
        self._worker.submit(lambda: self._show_columns(run), owed=True)
        self._worker.submit(lambda: self._finish(run, status), owed=True)
        if write_page is not None:
            self._worker.submit(lambda: self._show_page(run, write_page), owed=True)
        self._worker.stop(patience_seconds=2 * self._timeout, limit_seconds=12 * self._timeout)
        return run.with_tracking(self._runs.parent, self._node_ids())

    @property
    def registered(self) -> tuple[str, ...]:
        """Addresses of the models that this run delivers."""
        return tuple(dict.fromkeys(self._models.aliases))

    def link(self, run_id: str) -> str:
        """The page that shows a run; the embedded store has one once `ingot ui` serves it."""
        return run_page(self._server.experiment_id, run_id, self._base)

    def landing(self) -> str:
        """The page with the table of all runs."""
        return landing_page(self._base, self._server.experiment_id, self._told.recipe.name)

    @property
    def _base(self) -> str:
        return (
            f"http://127.0.0.1:{UI_PORT}" if self.is_embedded else without_login(self._server.uri)
        )

    def _node_ids(self) -> dict[str, str]:
        return {n: one.run_id for n, one in self._children.items() if one.run_id is not None}

    def _warning(self, why: str) -> str:
        return (
            f"warning: tracking.uri = {masked(self._server.uri)} does not record this run "
            f"({masked(why)}); the run goes on, and the steps of training stay in {METRICS} beside "
            "each checkpoint"
        )

    # What follows runs on the background thread.

    def _open(self) -> None:
        if self.is_embedded:
            # The first run in a store makes the tables, which takes minutes on a busy machine.
            self._worker.allow(LOCK_SECONDS)
        self._runs.parent_id()

    def _show(self, node: Node, child: Child, made: Committed) -> None:
        """The artifact's own page: its words, figures, files, plots and tables."""
        self._worker.allow(_SHOW_SECONDS)
        client, run_id = self._server.client(), child.id()
        parent = self._runs.page(self._runs.parent_id())
        describe(client, run_id, node.name, made, parent, child.tags.get(RESUMED))
        try:
            show(client, run_id, made)
        except Exception as error:
            if not is_ours(error):
                raise
            # It is no fault of the server, which is to hear of all that follows.
            self._say(f"warning: {node.name}: MLflow does not show all of it: {error}")

    def _show_model(self, node: Node, child: Child, made: Committed) -> None:
        self._worker.allow(_SHOW_SECONDS)
        self._models.show(node, child.id(), made)

    def _show_in_parent(self, node: Node, child: Child, made: Committed) -> None:
        if made.artifact.measured():
            self._reports[node.name] = child.id()
        if node.seed is not None:
            # Figures of several seeds stand there as mean and spread.
            return
        parent = self._runs.parent_id()
        names = show_in_parent(self._server.client(), parent, node.name, made)
        rank = 0 if made.artifact.measured() else 1 if made.artifact.is_model else 2
        self._columns[node.name] = (rank, names)

    def _register(self, node: Node, child: Child, made: Committed) -> None:
        self._worker.allow(_SHOW_SECONDS)
        pages = {"run": self._runs.parent_id(), node.name: child.id(), **self._reports}
        links = {what: self._runs.page(one) for what, one in pages.items()}
        self._models.register(node, child.id(), made, links)

    def _show_columns(self, run: Run) -> None:
        """The table of runs has columns for the figures of this recipe.

        A run that made but a part of the line adds its own to those of runs before it.
        """
        client, experiment = self._server.client(), self._server.experiment_id
        tag = VIEW_TAG + view_key(self._told.recipe.name)
        before = client.get_experiment(experiment).tags.get(tag, "")
        ranked = sorted(self._columns.values(), key=lambda one: one[0])
        names = [name for _, names in ranked for name in names]
        both = [names, shown_metrics(before)]
        is_whole = run.succeeded and set(self._told.line) <= run.outcomes.keys()
        both = both if is_whole else both[::-1]
        columns = list(dict.fromkeys(one for names in both for one in names))[:MOST_COLUMNS]
        client.set_experiment_tag(experiment, tag, view(columns))

    def _show_seeds(self, run: Run) -> None:
        """Mean and spread of each figure as metrics of the parent, and a table of all values."""
        client, parent = self._server.client(), self._runs.parent_id()
        log_figures(client, parent, seed_metrics(run.across_seeds))
        log_table(client, parent, SEED_TABLE, seed_table(run.across_seeds, run.invocation.seeds))

    def _finish(self, run: Run, status: str) -> None:
        self._runs.finish(run, self._node_ids(), status)

    def _show_page(self, run: Run, write_page: Callable[[Run], Path]) -> None:
        self._worker.allow(_SHOW_SECONDS)
        if self.page is None:
            shown = run.with_tracking(self._runs.parent_id(), self._node_ids())
            try:
                self.page = write_page(shown)
            except Exception:
                # No fault of the server's; whoever asked for the page tries again, and tells.
                return
        self._runs.show_page(self.page)


def _say_variables(asked: str | None, uri: str, say: Callable[[str], None]) -> None:
    """Tell which of MLflow's own variables counts, and which does not."""
    named = os.environ.get(URI_VARIABLE)
    if named and asked is None:
        say(f"MLflow: runs are recorded at {masked(uri)}, as {URI_VARIABLE} says")
    elif named and named != asked:
        say(f"MLflow: {URI_VARIABLE} is left aside, as tracking.uri = {masked(uri)} is set")
    if os.environ.get(REGISTRY_VARIABLE):
        say(f"MLflow: {REGISTRY_VARIABLE} is left aside; models are registered where runs are")
