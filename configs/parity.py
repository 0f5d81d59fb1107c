"""Which trainings in FP8 and in high precision are compared, and how near their losses must be."""

from typing import Annotated

from pydantic import Field, field_validator

from configs.base import Frozen

Seed = Annotated[int, Field(ge=0)]


class ParityConfig(Frozen):
    """Trainings to compare, and how far apart their losses may end."""

    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    """Each trains once in each precision, from the same initial values and on the same rows. A
    seed also orders the rows from the second pass over the corpus on; the first is as packed."""
    tail_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Last part of the steps, over which each training's loss is averaged."""
    limit: float = Field(default=0.0025, gt=0)
    """Relative gaps must be smaller: DeepSeek-V3 saw less than 0.25 % (arXiv 2412.19437, section
    3.3)."""

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        """In rising order, as the order in which they are named means nothing."""
        if len(set(seeds)) < len(seeds):
            raise ValueError(
                f"{list(seeds)} names {len(seeds)} seeds, of which {len(set(seeds))} differ; a "
                "training done twice says nothing new, so name each once"
            )
        return tuple(sorted(seeds))


class ParitySpec(Frozen):
    """The loss-parity stage's whole config."""

    parity: ParityConfig
