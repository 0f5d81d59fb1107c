"""Rows sorted by group, an expert or a matrix of a stack, and how many of them each group has.

How many rows an expert has is known when the gate has chosen, on the device. Asked for by the host,
the number makes it wait for all that the device has yet to do. So tables of where groups begin are
made on the device, and the host, which must say how many programs are to run and how large their
results are, takes the most there can be: N rows in G groups make at most N / 128 + G tiles of 128.
What lies beyond those that there are is never read.

Axes: G groups, N rows of all groups, sorted by group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from configs.errors import DataError


@dataclass(frozen=True, eq=False)
class Groups:
    """How many of N rows each of G groups has. Two are the same only if they are one object."""

    counts_G: Tensor
    """int64, on the device of the rows; they sum to `rows`."""
    rows: int
    """N."""
    known: tuple[int, ...] | None = None
    """The counts, where the host has them without waiting."""

    @classmethod
    def of(cls, counts: Sequence[int], device: torch.device | None = None) -> "Groups":
        """Counts that the host knows; DataError if one is negative. Copied to `device`."""
        if min(counts, default=0) < 0:
            raise DataError(f"counts of rows {list(counts)}: none may be negative; count again")
        counts_G = torch.tensor(counts, dtype=torch.int64, device=device)
        return cls(counts_G, sum(counts), tuple(counts))

    @classmethod
    def even(cls, number: int, rows_each: int, device: torch.device) -> "Groups":
        """`number` groups of `rows_each` rows, without a copy to the device."""
        counts_G = torch.full((number,), rows_each, dtype=torch.int64, device=device)
        return cls(counts_G, number * rows_each, (rows_each,) * number)

    @classmethod
    def counted(cls, counts_G: Tensor, rows: int) -> "Groups":
        """Counts as a device has them: the host knows them where the device is the host."""
        if counts_G.device.type != "cpu":
            return cls(counts_G, rows)
        known = tuple(counts_G.tolist())
        if sum(known) != rows:
            raise DataError(f"counts of rows {list(known)} sum to {sum(known)} of {rows} rows")
        return cls(counts_G, rows, known)

    def __len__(self) -> int:
        return len(self.counts_G)

    @cached_property
    def on_host(self) -> tuple[int, ...]:
        """The counts as numbers; where they are not known, the host waits for the device."""
        return tuple(self.counts_G.tolist()) if self.known is None else self.known

    def num_bands(self, height: int) -> int:
        """Tiles of `height` rows from each group's first row on; the most there can be, if unknown.

        Ragged ones at a group's end count as whole ones.
        """
        if self.known is not None:
            return sum(-(-count // height) for count in self.known)
        return min(self.rows, (self.rows + len(self) * (height - 1)) // height)

    def table(self, height: int) -> Tensor:
        """int32 [2, G + 1]: first rows and first bands of groups, then the totals; on the device.

        Made once for each height, however many products of a layer ask for it.
        """
        if height not in self._tables:
            self._tables[height] = _table(self.counts_G, height)
        return self._tables[height]

    def places(self, height: int) -> Tensor:
        """int64 [N]: the row that each row moves to where groups are filled up to whole bands.

        So row n lies in band places[n] // height.
        """
        if height not in self._places:
            first, band = self.table(height).long()
            moved_G = band * height - first
            row_N = torch.arange(self.rows, device=first.device)
            self._places[height] = row_N + moved_G.index_select(0, self.of_rows)
        return self._places[height]

    @cached_property
    def of_rows(self) -> Tensor:
        """int64 [N]: the group of each row."""
        row_N = torch.arange(self.rows, device=self.counts_G.device)
        return torch.searchsorted(self.counts_G.cumsum(0), row_N, right=True)

    @cached_property
    def _tables(self) -> dict[int, Tensor]:
        return {}

    @cached_property
    def _places(self) -> dict[int, Tensor]:
        return {}


def _table(counts_G: Tensor, height: int) -> Tensor:
    both = torch.stack([counts_G, (counts_G + (height - 1)).div(height, rounding_mode="floor")])
    return torch.nn.functional.pad(both.cumsum(1), (1, 0)).to(torch.int32)


@lru_cache(256)
def even_table(number: int, rows_each: int, height: int, device: torch.device) -> Tensor:
    """`Groups.table` of `number` matrices of `rows_each` rows; the same for every such stack."""
    at = torch.arange(number + 1, dtype=torch.int32, device=device)
    return torch.stack([at * rows_each, at * -(-rows_each // height)])
