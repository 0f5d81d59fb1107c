"""The page of MLflow on which a user should land: the runs as a table, with the columns that tell.

MLflow keeps shared views as tags of the experiment, and a link names the one to show.
"""

import hashlib
import json
import re
from collections.abc import Sequence

ORDER, OUTCOME, RECIPE = "ingot.order", "ingot.outcome", "ingot.recipe"
"""Tags of every run: its place in the table, what became of it, and the recipe it is of."""
REUSED = "reused"
VIEW_TAG = "mlflow.sharedViewState."
"""The experiment tag of a shared view is this and the view's key."""
MOST_COLUMNS = 8
EXPERIMENT_NOTE = (
    "One row for each `ingot run`, followed by those of its nodes that it built, in the order of "
    "the line. Nodes that were taken as they were are left out: clear the filter to see them too."
)
_LAST_MS = 9_999_999_999_999
_DURATION = "duration"
"""MLflow's own name of the column that it always shows."""
_LETTER_PIXELS, _MARGIN_PIXELS = 6, 30
_TRAINING = "workflowType=machine_learning"
"""Without it MLflow shows its pages for chats and agents."""


def order(started: float, place: int = 0) -> str:
    """Sorts runs of MLflow: the latest run first, then its nodes by their place in the line.

    `started` is when the run began, in seconds since the epoch; `place` is 0 for the run itself.
    """
    return f"{_LAST_MS - round(started * 1000):013d}.{place:03d}"


def view_key(recipe: str) -> str:
    """The key of a recipe's view, which stands in links."""
    return plain_name(recipe).replace(".", "-")


def plain_name(name: str) -> str:
    """A name of letters, digits, `_`, `.` and `-`; one that had others is told apart by a hash."""
    plain = re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def view(metrics: Sequence[str]) -> str:
    """A shared view of MLflow 3.17, as JSON: recipe, outcome, duration and these metrics."""
    tags = {f"tags.`{name}`": name for name in (OUTCOME, RECIPE)}
    named = tags | {f"metrics.`{name}`": name for name in metrics}
    columns = list(named)
    return json.dumps(
        {
            "searchFilter": f"tags.`{OUTCOME}` != '{REUSED}'",
            "orderByKey": f"tags.`{ORDER}`",
            "orderByAsc": True,
            "startTime": "ALL",
            "lifecycleFilter": "Active",
            "datasetsFilter": [],
            "modelVersionFilter": "All Runs",
            "selectedColumns": columns,
            "columnOrder": [_DURATION, *columns],
            "columnWidths": {
                column: _MARGIN_PIXELS + _LETTER_PIXELS * len(name)
                for column, name in named.items()
            },
        }
    )


def shown_metrics(view_text: str) -> list[str]:
    """The metrics that a view has columns for; none if it is no view of ours."""
    try:
        columns = json.loads(view_text)["selectedColumns"]
    except (ValueError, KeyError, TypeError):
        return []
    return [one[9:-1] for one in columns if isinstance(one, str) and one.startswith("metrics.`")]


def landing_page(base: str, experiment_id: str, recipe: str) -> str:
    """The link that ends on the table, in a browser that has never seen MLflow too."""
    return (
        f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs"
        f"?{_TRAINING}&viewStateShareKey={view_key(recipe)}"
    )


def run_page(experiment_id: str, run_id: str, base: str = "") -> str:
    """The page of one run; without `base` for texts that MLflow itself shows, whatever its port."""
    path = f"#/experiments/{experiment_id}/runs/{run_id}?{_TRAINING}"
    return f"{base.rstrip('/')}/{path}" if base else path
