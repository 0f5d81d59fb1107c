"""What a node's workers print, one file a worker: `<role>-<rank>.log`.

A worker points its own stdout and stderr there, so that the files hold what Python and what C and
C++ print, down to the last words of a process that aborts. A worker that takes the place of a dead
one appends. Nothing here loads Ray.
"""

import os
import re
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

TAIL_LINES = 20
RESTART = "restart"
"""In the record of a step: why the workers began anew before it, and from where."""
TRACE = ".trace.json.gz"
"""Ends the names of traces of training steps, which lie beside these files."""
TRAINER = "trainer"
"""What workers that train are called."""
_TAIL_BYTES = 64 * 1024
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_FILE = re.compile(r"(?P<role>.+)-(?P<rank>\d+)\.log")


@dataclass(frozen=True, slots=True)
class Output:
    """Where the workers of one role write. Travels to them by value."""

    folder: str
    """On a disk that all of them share, as the store is."""
    role: str

    def path(self, rank: int) -> Path:
        """The file of one worker."""
        return Path(self.folder, f"{self.role}-{rank}.log")

    def capture(self, rank: int) -> None:
        """Have this process's stdout and stderr go to the file of `rank`, from now on.

        They stay where they are if there can be no such file: nothing depends on it.
        """
        path = self.path(rank)
        try:
            # Not its parents: a builder's folder that was deleted must not come back.
            path.parent.mkdir(exist_ok=True)
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError:
            return
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        # Below Python's own streams, which keep their numbers: so libraries' words come too.
        for number in (1, 2):
            os.dup2(file, number)
        os.close(file)
        self.add(rank, f"process {os.getpid()} on {socket.gethostname()} begins")

    def add(self, rank: int, text: str) -> None:
        """Append what is known of a worker, marked with the time, so that it differs from its own
        words. A disk that takes no more is passed over: nothing depends on these files."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            with self.path(rank).open("a", encoding="utf-8") as file:
                file.write(f"--- {stamp} {self.role} {rank}: {_COLOUR.sub('', text.rstrip())}\n")
        except OSError:
            return

    def tail(self, rank: int) -> str:
        """The last lines of one worker under the path of their file; empty if there is no file."""
        path = self.path(rank)
        try:
            with path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        lines = text.splitlines()[-TAIL_LINES:]
        return "\n".join([f"the last lines of {path}:", *(f"  {line}" for line in lines)])


def log_files(folder: Path) -> dict[tuple[str, int], Path]:
    """The workers' files in a folder, by role and rank, in that order."""
    found = {
        (match["role"], int(match["rank"])): path
        for path in folder.glob("*.log")
        if (match := _FILE.fullmatch(path.name))
    }
    return dict(sorted(found.items()))
