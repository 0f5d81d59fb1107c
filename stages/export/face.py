"""The face of the export stage: a checkpoint in, a bundle for one target out."""

from configs.delivery import ExportSpec
from stages.artifacts import Bundle, Checkpoint, Corpus
from stages.contract import Face

export = Face(
    name="export",
    revision=3,
    config=ExportSpec,
    takes={"corpus": Corpus, "checkpoint": Checkpoint},
    makes=Bundle,
    body="stages.export.bundle:export",
)
