"""What `--profile` asks for: a trace of some steps on one rank. It is no part of any identity."""

import re
from dataclasses import dataclass

from configs.errors import ConfigError

PROFILED = frozenset({"pretrain", "posttrain"})
"""Stages that train."""
_WORDS = re.compile(r"(?P<first>\d+)(-(?P<last>\d+))?:(?P<rank>\d+)")


@dataclass(frozen=True, slots=True)
class Profile:
    """Steps `first` to `last`, both among them, on one rank."""

    first: int
    last: int
    rank: int

    @property
    def steps(self) -> str:
        """`10-12`, or `10` alone."""
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"

    def within(self, steps: int) -> "Profile | None":
        """As much of it as a training of so many steps has; none if it has none of it."""
        return (
            Profile(self.first, min(self.last, steps), self.rank) if self.first <= steps else None
        )


def parse_profile(said: str | None, *, trainers: int) -> Profile | None:
    """What `--profile` says, as `10-12:0`; none if it is not there.

    ConfigError for other words, and for a rank that `trainers` ranks do not have.
    """
    if said is None:
        return None
    found = _WORDS.fullmatch(said)
    if found is None:
        raise ConfigError(
            f"--profile {said}: is not STEPS:RANK; write steps 10 to 12 of trainer 0 as 10-12:0"
        )
    first, rank = int(found["first"]), int(found["rank"])
    last = int(found["last"] or first)
    if not 1 <= first <= last:
        raise ConfigError(
            f"--profile {said}: steps are counted from 1, and the last is not before the first; "
            "write steps 10 to 12 of trainer 0 as 10-12:0"
        )
    if rank >= trainers:
        raise ConfigError(
            f"--profile {said}: there is no trainer {rank}, for cluster.trainers = {trainers} are "
            f"numbered from 0; name one up to {trainers - 1}"
        )
    return Profile(first, last, rank)
