"""The gate stage: a report in, whether its figures come to what was asked of them out."""

import json

from configs.delivery import GateSpec
from configs.errors import DataError
from stages.artifacts import PAGE, Report
from stages.contract import Workspace, stage


@stage(revision=1)
def gate(config: GateSpec, work: Workspace, *, report: Report) -> Report:
    """Hold figures of `report` against their bounds; the shortfall names those that are beyond.

    DataError for a figure that the report does not have.
    """
    found = report.headline
    if unknown := [name for name in config.gates if name not in found]:
        raise DataError(
            f"evaluate.gates.{unknown[0]}: the report has no such figure; it has {', '.join(found)}"
        )
    beyond = [
        f"{name} = {found[name]:.4g}, where evaluate.gates asks for {asked}"
        for name, asked in config.gates.items()
        if not asked.admits(found[name])
    ]
    shortfall = "; ".join(beyond) or None
    figures = {name: found[name] for name in config.gates}
    record = {"headline": figures, "shortfall": shortfall}
    work.path("report.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    lines = [
        f"| {name} | {found[name]:.4g} | {asked} | {'yes' if asked.admits(found[name]) else 'no'} |"
        for name, asked in config.gates.items()
    ]
    table = ["| figure | value | asked for | met |", "|---|---:|---|---|", *lines]
    page = "\n".join(["# Gates", "", *table, ""])
    work.path(PAGE).write_text(page, encoding="utf-8")
    return Report(uri=work.out, headline=figures, shortfall=shortfall)
