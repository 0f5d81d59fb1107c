"""Sources of problems, generated or read: as documents to train on, and as problems to solve."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from configs.data import ArithmeticSource, DataConfig, ProblemsSource
from configs.seed import derive
from stages.data.arithmetic import make_problems, training_documents
from stages.data.problems import keep_sources_apart, read_problem_files
from stages.hashing import Hashes
from stages.verifiers import Problem


@dataclass(frozen=True, slots=True)
class Posed:
    """The problems of one source. Training draws from its documents as often as it needs."""

    train_problems: Sequence[Problem]
    held_out: Sequence[Problem]
    train: Sequence[str]
    """Documents."""
    held_out_documents: Sequence[str]

    @property
    def digest(self) -> str:
        """Equal for equal documents."""
        digest = hashlib.sha256()
        for text in (*self.train, "", *self.held_out_documents):
            digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
        return digest.hexdigest()

    @property
    def bytes(self) -> int:
        """Of all documents."""
        return sum(len(text.encode()) for text in (*self.train, *self.held_out_documents))


def pose(spec: DataConfig, hashes: Hashes, *, seed: int) -> dict[str, Posed]:
    """The problems of every source of them, by name. DataError if a side of one is empty."""
    generated = {n: one for n, one in spec.sources.items() if isinstance(one, ArithmeticSource)}
    found: dict[str, Posed] = {}
    for name, split in make_problems(generated, seed=seed).items():
        drawn = derive(seed, "data", name)
        found[name] = Posed(
            split.train,
            split.held_out,
            training_documents(split.train, generated[name], seed=drawn),
            [one.prompt + one.answer for one in split.held_out],
        )
    read = {n: one for n, one in spec.sources.items() if isinstance(one, ProblemsSource)}
    splits = {n: read_problem_files(n, one, hashes, seed=seed) for n, one in read.items()}
    for name, asked in keep_sources_apart(splits, read).items():
        found[name] = Posed(
            asked.train, asked.held_out, asked.train_documents, asked.held_out_documents
        )
    return dict(sorted(found.items()))
