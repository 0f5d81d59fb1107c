"""The saves of one build, on the driver's machine: marked, pruned, and which is continued from.

Shards are written where ranks are, and those of other machines lie in the store alone; marks are
written here, once all shards are. So what is whole is judged here, and by nobody else: a rank that
looked for itself could see the mark of an older save and go back behind a newer one.
"""

from dataclasses import dataclass
from pathlib import Path

from cluster import checkpoint
from cluster.files import COMPLETE
from cluster.save_state import SaveState
from cluster.supply import Supply


@dataclass(frozen=True)
class Saves:
    """Where a build saves, and what it may begin with. Travels to where it is needed by value."""

    root: Path
    """The folder of this build's own."""
    earlier: tuple[Path, ...]
    """Those of earlier builds, which are of no use once there is a save in the first."""
    start: tuple[Path, int] | None
    """The save of an earlier build that this one begins with, and its step."""
    supply: Supply

    def newest(self) -> tuple[Path, int] | None:
        """The newest whole save, all of it on this machine, and its step."""
        for mark in sorted(self.root.glob(f"step-*/{COMPLETE}"), reverse=True):
            self.supply.fetch(mark.parent)
            if (step := checkpoint.complete_step(mark.parent)) is not None:
                return mark.parent, step
        return self.start

    def choose(self) -> tuple[Path, int] | None:
        """The save that a group of ranks continues from: whole here, and in the store for others.

        What a group left half saved is deleted, lest its shards be taken for those of the next.
        """
        for name in self.supply.names(self.root):
            if name.startswith("step-") and not (self.root / name / COMPLETE).is_file():
                self.supply.drop(self.root / name)
        found = self.newest()
        if found is not None:
            self.supply.publish(found[0], last=COMPLETE)
        return found

    def complete(self, state: SaveState) -> None:
        """Mark a save, all shards of which are written; older ones are deleted."""
        folder = checkpoint.step_folder(self.root, state.step)
        # All its ranks may be elsewhere.
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.mark_complete(folder, state.facts())
        checkpoint.prune(self.root, keep=2, earlier=self.earlier)
