"""The face of the evaluate stage: checkpoints in, a report of what they can do out."""

from configs.delivery import EvaluateSpec
from stages.artifacts import Checkpoint, Corpus, Report
from stages.contract import Face

evaluate = Face(
    name="evaluate",
    revision=4,
    config=EvaluateSpec,
    takes={"corpus": Corpus},
    takes_more=Checkpoint,
    makes=Report,
    body="stages.evaluate.loop:evaluate",
)


def reported(config: EvaluateSpec, *, has_problems: bool) -> tuple[str, ...]:
    """Names of the figures that a report of this config may have, in its order."""
    asked, (first, *others) = config.evaluate, config.order
    names = ["ngram_bits_per_byte"] if config.has_baseline else []
    names += [f"{model}_bits_per_byte" for model in config.order]
    if not has_problems:
        return tuple(names)
    measures = ["greedy_accuracy", *(f"pass_at_{k}" for k in asked.pass_at)]
    for measure in (*measures, f"all_of_{asked.samples_per_problem}"):
        figures = [f"{model}_{measure}" for model in (first, *others)]
        figures += [f"{model}_{measure}_gain" for model in others]
        names += [f"{figure}{bound}" for figure in figures for bound in ("", "_low", "_high")]
    return tuple(names)
