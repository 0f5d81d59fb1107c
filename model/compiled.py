"""C for CPUs, compiled once a process by whatever C compiler there is.

What is compiled fits the processor it runs on, and takes a second or less. Without a compiler
callers go on with torch, several times as slowly.
"""

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

_COMPILE_SECONDS = 60


def compiled(source: Path, *flags: str) -> tuple[ctypes.CDLL | None, str]:
    """The library made of a C file and the compiler's name, or None and why there is none.

    Made once for each compiler that is named (`CC`), also for processes that are forked from this.
    """
    return library(source, flags, os.environ.get("CC", ""), os.environ.get("PATH", ""))


@lru_cache
def library(
    source: Path, flags: tuple[str, ...], named: str, path: str
) -> tuple[ctypes.CDLL | None, str]:
    """What `compiled` gives where `CC` and `PATH` are as said."""
    try:
        said = shlex.split(named)
    except ValueError as error:
        return None, f"CC = {named!r} is no command: {error}"
    wanted = [said] if said else [["cc"], ["gcc"], ["clang"]]
    command = next((words for words in wanted if shutil.which(words[0])), None)
    if command is None:
        names = ", ".join(words[0] for words in wanted)
        return None, f"no C compiler ({names}); install one, as gcc"
    options = ["-O3", "-march=native", "-shared", "-fPIC", "-pthread", *flags]
    # The folder is this process's own and is gone at once: what is loaded needs no file.
    try:
        with tempfile.TemporaryDirectory(prefix="ingot-c-") as folder:
            library = Path(folder) / f"{source.stem}.so"
            subprocess.run(
                [*command, *options, str(source), "-o", str(library)],
                check=True,
                capture_output=True,
                timeout=_COMPILE_SECONDS,
            )
            return ctypes.CDLL(str(library)), Path(command[0]).name
    except (OSError, subprocess.SubprocessError) as error:
        heard = getattr(error, "stderr", None) or str(error).encode()
        why = heard.decode(errors="replace").strip()[-200:]
        return None, f"{shlex.join(command)} failed: {why}"
