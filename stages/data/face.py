"""The face of the data stage: raw sources in, a packed and tokenised corpus with problems out."""

from configs.data import DataSpec
from stages.artifacts import Corpus
from stages.contract import Face
from stages.data.reads import reads

data = Face(
    name="data",
    revision=4,
    config=DataSpec,
    may_take={"tokenizer": Corpus},
    makes=Corpus,
    reads=reads,
    body="stages.data.loop:data",
)
