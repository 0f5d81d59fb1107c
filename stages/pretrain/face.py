"""The face of the pretrain stage: packed rows in, a checkpoint out."""

from configs.train import PretrainSpec
from stages.artifacts import Checkpoint, Corpus
from stages.contract import Face

pretrain = Face(
    name="pretrain",
    revision=5,
    config=PretrainSpec,
    takes={"corpus": Corpus},
    may_take={"base": Checkpoint},
    makes=Checkpoint,
    body="stages.pretrain.loop:pretrain",
)
