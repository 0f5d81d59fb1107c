"""MFU: the share of the machines' arithmetic that a training uses for its model.

Model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B) is the model's operations a second
over the most that the devices do. That most is measured here, once, when a group of workers
begins: so it is what these devices do beside whatever else runs on them, and no data sheet's word.
On a machine that others use as well both figures are noisy, and so is their quotient.
"""

from dataclasses import dataclass

import torch.distributed as dist

from cluster.figures import fetch, summed
from cluster.trainer import Trainer

MFU = "mfu"


@dataclass(frozen=True, slots=True)
class Utilisation:
    """What the speed of a training is held against."""

    flops_per_token: float
    """The model's own, of a training step."""
    peak: float
    """FLOP/s of all ranks together."""
    told: str
    """The peak in words, for records."""

    def of(self, tokens_per_second: float) -> float:
        """The share of the peak that so many tokens of all ranks a second need."""
        return tokens_per_second * self.flops_per_token / self.peak


def hold_against_peak(trainer: Trainer, flops_per_token: float) -> Utilisation:
    """Measure the peak on all ranks at a time, which they then train at a time as well."""
    if trainer.parallel:
        dist.barrier()
    own = trainer.backend.rates().flops_per_second
    peak = float(summed(fetch({"peak": own}), over_ranks=trainer.parallel)["peak"])
    what = f"{trainer.backend.name} of {trainer.world} workers, {trainer.backend.dtype_name}"
    told = f"{peak / 1e9:,.1f} GFLOP/s ({what} products, measured when training began)"
    return Utilisation(flops_per_token, peak, told)
