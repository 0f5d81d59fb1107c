"""Some of a model's answers, to be read by people: an artifact's `samples.json`, or its step log.

A file of an artifact holds what its stage made once; a training that samples at every step has them
in the entry `samples` of some steps of its log, beside the artifact. Either way they are few and
short, and whoever shows them need not know what kind of artifact it is.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from configs.base import Frozen
from configs.errors import ArtifactError
from configs.explain import first_fault

SAMPLES = "samples.json"
ENTRY = "samples"
"""The entry of a step's record."""
MAX_SAMPLES, MAX_CHARS = 200, 500
"""Of a file, and of each text of a sample."""


class Sample(Frozen):
    """One answer to one problem."""

    prompt: str
    right_answer: str
    answer: str
    reward: float
    reason: str
    """Of the verifier, in one line."""
    model: str | None = None
    """Whose answer it is, where there are several models."""
    drawn: str | None = None
    """How: `greedy` or `sampled`."""
    step: int | None = None
    """Of the training, where it was drawn during one."""


_SAMPLES = TypeAdapter(tuple[Sample, ...])


def write_samples(folder: Path, samples: Sequence[Sample]) -> None:
    """Write `samples.json` into the artifact to be: the first `MAX_SAMPLES`, cut to `MAX_CHARS`."""
    text = _SAMPLES.dump_json(tuple(map(cut, samples[:MAX_SAMPLES])), indent=1, exclude_none=True)
    (folder / SAMPLES).write_bytes(text + b"\n")


def as_entry(samples: Iterable[Sample]) -> list[dict[str, Any]]:
    """Samples as a step's record has them."""
    return [cut(one).model_dump(exclude_none=True) for one in samples]


def read_entry(step: int, entry: object) -> tuple[Sample, ...]:
    """The samples of one step's record; ArtifactError if they are no such."""
    found = _read(f"step {step} of the step log", lambda: _SAMPLES.validate_python(entry))
    return tuple(one.model_copy(update={"step": step}) for one in found)


def read_samples(folder: Path) -> tuple[Sample, ...]:
    """The samples of an artifact's folder; none without the file. ArtifactError as `read_entry`."""
    path = folder / SAMPLES
    if not path.is_file():
        return ()
    return _read(str(path), lambda: _SAMPLES.validate_json(path.read_bytes()))


def as_table(samples: Iterable[Sample]) -> dict[str, list[Any]] | None:
    """One row an answer, in the form of MLflow's tables; none without any.

    Columns that are empty for all are left out.
    """
    rows = [one.model_dump() for one in samples]
    columns = ["step", "model", "drawn", "prompt", "right_answer", "answer", "reward", "reason"]
    shown = [name for name in columns if any(row[name] is not None for row in rows)]
    if not rows:
        return None
    return {"columns": shown, "data": [[row[name] for name in shown] for row in rows]}


def cut(sample: Sample) -> Sample:
    """The sample with long texts cut, which then end in dots."""
    texts = {
        name: value if len(value) <= MAX_CHARS else f"{value[: MAX_CHARS - 1]}…"
        for name, value in sample
        if isinstance(value, str)
    }
    return sample.model_copy(update=texts)


def _read(where: str, read: Callable[[], tuple[Sample, ...]]) -> tuple[Sample, ...]:
    try:
        return read()
    except ValidationError as error:
        raise ArtifactError(
            f"{where}: not samples that can be shown ({first_fault(error)}); mend the stage that "
            "wrote them"
        ) from None
