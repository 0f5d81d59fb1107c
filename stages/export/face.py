"""The face of the export stage: a checkpoint in, a bundle for one target out."""

from configs.delivery import ExportSpec
from stages.artifacts import Bundle, Checkpoint, Corpus, Report
from stages.contract import Face

export = Face(
    name="export",
    revision=4,
    config=ExportSpec,
    takes={"corpus": Corpus, "checkpoint": Checkpoint},
    may_take={"report": Report},
    makes=Bundle,
    body="stages.export.bundle:export",
)
