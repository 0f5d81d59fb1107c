"""What a recipe or a face names by its import path: a plugin's stage, a stage's body.

Bodies bring torch, ray and the like with them, and are loaded when a node is to be built.
"""

import importlib
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

from configs.errors import PlanError
from stages.artifacts import Artifact
from stages.contract import Face, Stage, check_body

_importing = threading.Lock()
"""Large libraries import each other in circles, into which two threads must not come from two
sides: one would find a module half made."""


def load_body(face: Face[Any]) -> Callable[..., Artifact]:
    """The function that does a stage's work.

    PlanError if it cannot be imported, is not there, or takes and makes other than its face says.
    """
    if isinstance(face, Stage):
        return face.run
    module_name, _, name = face.body.partition(":")
    owner = f"stage {face.name}: its body {face.body}"
    function = getattr(_import(owner, module_name), name, None)
    if not callable(function):
        raise PlanError(f"{owner} is not there: {module_name} has no function {name!r}; correct it")
    check_body(face, function)
    found: Callable[..., Artifact] = function
    return found


def load_stage(node: str, use: str) -> Face[Any]:
    """The stage at `package.module:stage` that the recipe's `node` uses; PlanError if there is
    none."""
    module_name, _, name = use.partition(":")
    owner = f"nodes.{node}.use = {use!r}"
    module = _import(owner, module_name)
    found = getattr(module, name, None)
    if not isinstance(found, Face):
        stages = sorted(key for key, value in vars(module).items() if isinstance(value, Face))
        raise PlanError(
            f"{owner}: {module_name} has no stage {name!r}; its stages: "
            f"{', '.join(stages) or 'none (decorate a function with @stage)'}"
        )
    return found


def _import(owner: str, module_name: str) -> ModuleType:
    """A module by name; PlanError whatever happens while it is imported."""
    try:
        with _importing:
            return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise PlanError(
            f"{owner}: cannot import {module_name} ({error}); install the package that holds it, "
            "or put its folder on PYTHONPATH"
        ) from None
    except Exception as error:
        raise PlanError(
            f"{owner}: {module_name} raises {type(error).__name__} while it is imported: {error}; "
            "mend it"
        ) from error
