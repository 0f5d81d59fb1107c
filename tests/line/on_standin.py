"""`ingot` on the stand-in device: the command, and every worker that Ray starts for it, has one.

    python -m tests.line.on_standin run smoke ...

The row of NPUs is as it is, but for three words: they are there, Ray counts them under another name
(under their own it looks for torch_npu), and ranks meet over gloo, which the
stand-in's tensors travel by. All threads of a process see the device, since torch's modes are each
thread's own.
"""

import sys
import threading
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import ray
import torch
from torch import Tensor, nn

from cluster import backend
from pipeline import cli
from tests import standin

DEVICES = 3
"""For two trainers and a sampler."""
_open = ExitStack()


def found() -> backend.Found:
    """What the row of NPUs sees."""
    return backend.Found(DEVICES, "stand-in")


def enter() -> None:
    """Let this process have the device until it ends; Ray calls it in each worker."""
    _open.enter_context(standin.device())
    run, to = threading.Thread.run, nn.Module.to

    def run_with_device(self: threading.Thread) -> None:
        with standin.mode():
            run(self)

    def to_device(self: nn.Module, *args: Any, **settings: Any) -> nn.Module:
        asked = settings.get("device", args[0] if args else None)
        if isinstance(asked, str | torch.device) and torch.device(asked).type == "npu":
            return standin.move(self)
        return to(self, *args, **settings)

    for target, name, made in (
        (threading.Thread, "run", run_with_device),
        (nn.Module, "to", to_device),
        # What the stand-in reads lies on the host anyway.
        (backend.Backend, "pinned", lambda self, tensor: tensor),
        (Tensor, "is_pinned", lambda self, *_: False),
    ):
        _open.enter_context(patch.object(target, name, made))


def main() -> int:
    """Run the command with the words given to it."""
    enter()
    row = replace(backend.NPU, look=found, group="gloo", resource="STANDIN")
    start = ray.init

    def init(**settings: Any) -> Any:
        hook = {"worker_process_setup_hook": "tests.line.on_standin.enter"}
        return start(**settings, runtime_env=hook)

    rows = {**backend.BACKENDS, "npu": row}
    with (
        patch.object(backend, "BACKENDS", rows),
        patch.object(backend, "ACCELERATORS", (backend.CUDA, row)),
        patch.object(ray, "init", init),
    ):
        return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
