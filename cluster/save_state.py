"""What the mark of a save tells beside that the save is whole."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Phase = Literal["pretrain", "posttrain"]


@dataclass(frozen=True)
class SaveState:
    """How a training stood when it saved, for whoever continues it or plans by it.

    Tensors are saved by their names in the whole model and experts by their numbers, so that none
    of this is needed to read a save into another layout.
    """

    step: int
    compute: str = "float32"
    """The type that the training computes in."""
    tokens: int = 0
    """Read so far, by all ranks; 0 in post-training, which counts answers."""
    phase: Phase = "pretrain"
    mesh: Mapping[str, int] = field(default_factory=dict)
    """Degrees by axis."""
    placement: Mapping[str, Any] = field(default_factory=dict)
    """`nodes`, `devices`, `version`, `digest`, and by layer the expert of each slot."""
    load_average: Mapping[str, list[float]] = field(default_factory=dict)
    """By layer, a running mean of each expert's share of the tokens' choices."""
    owners: Mapping[str, int] = field(default_factory=dict)
    """The rank that saved each parameter; of experts the first of the ranks that did."""
    backend: Mapping[str, str] = field(default_factory=dict)
    """What computed it."""

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)
