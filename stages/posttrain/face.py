"""The face of the posttrain stage: a checkpoint and checkable problems in, a better one out."""

from configs.rl import PosttrainSpec
from stages.artifacts import Checkpoint, Corpus
from stages.contract import Face

posttrain = Face(
    name="posttrain",
    revision=5,
    config=PosttrainSpec,
    takes={"corpus": Corpus, "base": Checkpoint},
    makes=Checkpoint,
    body="stages.posttrain.loop:posttrain",
)
