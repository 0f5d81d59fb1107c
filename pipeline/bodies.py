"""A stage's body, loaded by the name that its face gives: with it come torch, ray and the like."""

import importlib
from collections.abc import Callable
from typing import Any

from configs.errors import PlanError
from stages.artifacts import Artifact
from stages.contract import Face, Stage, check_body


def load_body(face: Face[Any]) -> Callable[..., Artifact]:
    """The function that does a stage's work.

    PlanError if it cannot be imported, is not there, or takes and makes other than its face says.
    """
    if isinstance(face, Stage):
        return face.run
    module_name, _, name = face.body.partition(":")
    where = f"stage {face.name}: its body {face.body}"
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        # A plugin's, which may do anything while it is imported.
        raise PlanError(
            f"{where} cannot be imported ({type(error).__name__}: {error}); mend {module_name}, or "
            "the face that names it"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise PlanError(f"{where} is not there: {module_name} has no function {name!r}; correct it")
    check_body(face, function)
    return function  # type: ignore[no-any-return]
