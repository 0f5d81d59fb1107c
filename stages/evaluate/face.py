"""The face of the evaluate stage: checkpoints in, a report of what they can do out."""

from configs.delivery import EvaluateSpec
from stages.artifacts import Checkpoint, Corpus, Report
from stages.contract import Face

evaluate = Face(
    name="evaluate",
    revision=2,
    config=EvaluateSpec,
    takes={"corpus": Corpus, "before": Checkpoint, "after": Checkpoint},
    makes=Report,
    body="stages.evaluate.loop:evaluate",
)
