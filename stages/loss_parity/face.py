"""The face of the loss-parity stage: trainings in both precisions in, a report out."""

from configs.parity import ParitySpec
from configs.train import Precision
from stages.artifacts import Checkpoint, Report
from stages.contract import Face

PRECISIONS: tuple[Precision, ...] = ("fp8", "high")

loss_parity = Face(
    name="loss_parity",
    revision=3,
    config=ParitySpec,
    takes_more=Checkpoint,
    makes=Report,
    body="stages.loss_parity.loop:loss_parity",
)


def run_name(precision: Precision, seed: int) -> str:
    """The name of the input that is the training of `seed` in `precision`."""
    return f"{precision}_{seed}"
