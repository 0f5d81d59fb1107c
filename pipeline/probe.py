"""What torch finds on this machine, as JSON: run as a process of its own by `ingot doctor`.

A torch that cannot be imported, or a driver that takes its process along, is then a finding.
"""

import json
from typing import Any

import torch

from cluster.backend import BACKENDS, Backend, decide, has_units, seen
from configs.errors import MachineError
from model.fp8.backends import choose


def probe() -> dict[str, Any]:
    """Versions, each kind of device, and which is taken, as JSON values."""
    try:
        taken = {"device": decide("auto", seen()).name}
    except MachineError as error:
        taken = {"fault": str(error)}
    return {
        "torch": torch.__version__,
        "devices": [_look(one) for one in BACKENDS.values()],
        "auto": taken,
    }


def _on_request(backend: Backend) -> str:
    return ", or bfloat16 where cluster.compute asks" if backend.is_host and has_units() else ""


def _look(backend: Backend) -> dict[str, Any]:
    found = backend.look()
    report: dict[str, Any] = {
        "name": backend.name,
        "count": found.count,
        "card": found.name,
        "compute": backend.dtype_name + _on_request(backend),
        "fault": found.fault or found.too_old,
        "is_there": backend.has_signs,
    }
    if found.count:
        choice = choose(torch.device(backend.device))
        fp8 = None if choice.backend is None else choice.backend.name
        report |= {"fp8": fp8, "fp8_reason": choice.reason}
    return report


if __name__ == "__main__":
    print("\n" + json.dumps(probe()), flush=True)
