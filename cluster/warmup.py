"""What makes the first step of a group of workers longer than the others, and its deadline.

Compilers compile in it what later steps find ready, allocators and caches grow, and libraries look
for their quickest kernels. So it may take as long as a start on top of a step.
"""

import os
import platform
from pathlib import Path

from configs.parallel import ClusterConfig

_CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}


def first_step_seconds(machines: ClusterConfig) -> float:
    """The deadline of the first step."""
    return machines.step_timeout_seconds + machines.startup_timeout_seconds


def keep_compiled() -> None:
    """Have compilers of this process find what earlier runs on this machine have compiled.

    In the user's cache, which outlives Ray's session and a restart, as a temporary folder may not;
    by machine, since homes are often shared, and a disk shared by many machines is slow at many
    small files and locks them badly. What the user has set stays; where no folder can be made,
    compilers keep their own.
    """
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "ingot" / "compiled" / platform.node()
        for name in _CACHES.values():
            (folder / name).mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return
    for variable, name in _CACHES.items():
        os.environ.setdefault(variable, str(folder / name))
