"""Sources of problems, generated or read: as documents to train on, and as problems to solve."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from configs.data import ArithmeticSource, DataConfig, ProblemsSource
from configs.errors import DataError
from configs.seed import derive
from stages.data.apart import HeldOut
from stages.data.arithmetic import make_problems, training_documents
from stages.data.drops import SHOWN_CHARS, Drop
from stages.data.problems import keep_sources_apart, read_problem_files
from stages.data.shop import Shop
from stages.data.tables import DROPS, load, save, write_drops
from stages.hashing import Hashes
from stages.overlap import LEAST_CHARS
from stages.verifiers import Problem

REVISION = 1
_DOCUMENTS_A_TIME = 512


@dataclass(frozen=True, slots=True)
class Posed:
    """The problems of one source. Training draws from its documents as often as it needs."""

    train_problems: Sequence[Problem]
    held_out: Sequence[Problem]
    train: Sequence[str]
    """Documents."""
    held_out_documents: Sequence[str]
    is_read: bool = False
    """Whether the problems were read from files. Then each has a document, in the same order."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Documents that stand in what is held out, by the reason."""

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
            asked.train,
            asked.held_out,
            asked.train_documents,
            asked.held_out_documents,
            is_read=True,
        )
    return dict(sorted(found.items()))


def keep_apart(
    posed: Mapping[str, Posed], decided: Path, shop: Shop
) -> tuple[dict[str, Posed], dict[str, Path]]:
    """The same without documents of which a part is held out, and for each source the folder that
    says which those are. DataError if nothing is left of a source.

    A problem is of no use in part: it goes as a whole, and with it what RL would ask.
    """
    found, folders = {}, {}
    for name, one in posed.items():
        key = {"revision": REVISION, "posed": one.digest, "name": name}
        done = shop.one("clean", key, partial(_look, name, one, decided), decided)
        kept = load(done.folder, "kept").tolist()
        if not any(kept):
            raise DataError(
                f"data.sources.{name}: all of its {len(kept)} training problems stand in what is "
                "held out; give others, or hold out less"
            )
        problems = [*compress(one.train_problems, kept)] if one.is_read else one.train_problems
        found[name] = replace(
            one,
            train=[*compress(one.train, kept)],
            train_problems=problems,
            dropped=Counter(done.facts["dropped"]),
        )
        folders[name] = done.folder
    return found, folders


def _look(name: str, posed: Posed, decided: Path, out: Path) -> Mapping[str, Any]:
    """The task of one source: which of its documents are `kept`, and why the others are not."""
    apart = HeldOut.open(decided)
    kept = np.ones(len(posed.train), np.bool_)
    # Generated problems are parted from those that are held out, and shorter than any passage.
    asked = [n for n, text in enumerate(posed.train) if posed.is_read or len(text) >= LEAST_CHARS]
    drops = []
    for first in range(0, len(asked), _DOCUMENTS_A_TIME):
        numbers = asked[first : first + _DOCUMENTS_A_TIME]
        texts = [posed.train[number] for number in numbers]
        for number, text, reasons in zip(numbers, texts, apart.look(texts), strict=True):
            # Each goes by one reason, so that what goes adds up.
            for (rule, of), spans in [*reasons.items()][:1]:
                label = posed.train_problems[number].id if posed.is_read else f"{name}/{number}"
                start = text[spans[0][0] : spans[0][1]][:SHOWN_CHARS]
                shown = label.removeprefix(f"{name}/")
                drops.append(Drop(name, shown, rule, float(len(spans)), start=start, of=of))
            kept[number] = not reasons
    save(out, kept=kept)
    write_drops(out / DROPS, drops)
    apart.save(out)
    return {"dropped": dict(sorted(Counter(drop.rule for drop in drops).items()))}
