"""`ingot logs`: what the workers of a node printed, and with `-f` what they print."""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cluster import place
from cluster.mirror import Mirror
from cluster.output import log_files
from configs.errors import IngotError, PlanError, StoreError
from pipeline.lease import Watch, newest, pace
from pipeline.slots import builders
from pipeline.verbs.asked import find_store, load_asked, locate
from stages.manifest import LOGS, MANIFEST, read_manifest

_LOOK_SECONDS = 0.25


def logs(args: argparse.Namespace) -> int:
    """Print the output of a node's workers, each line after its worker's name if there are several.

    PlanError if there is no such node or rank; StoreError if no worker has printed anything.
    """
    mirror, generation = _find(args)
    shown = _Shown(args.rank)
    if args.follow:
        _follow(mirror, generation, shown)
    shown.print_new(_folder(mirror, generation), final=True)
    if not shown.readers:
        _complain(args, _folder(mirror, generation))
    return 0


def _find(args: argparse.Namespace) -> tuple[Mirror, Path]:
    """The store, and the generation that is meant: the newest of the node as the recipe is now,
    built or not; otherwise the artifact that the node made last."""
    try:
        asked = load_asked(args)
        store, recipe = asked.store(_tell), asked.recipe.name
        graph = {node.name: node for node in asked.graph(store.hashes)}
    except IngotError:
        # Its recipe or what it reads may be gone since.
        store, recipe = find_store(args, _tell)
        graph = {}
    if (node := graph.get(args.node)) is not None:
        done = store.newest(node)
        for number in (done + 1, done):
            if builders(store.mirror, folder := store.folder(node) / f"g{number}"):
                return store.mirror, folder
    return store.mirror, locate(store, recipe, args.node, most_bytes=0)


def _tell(message: str) -> None:
    print(message, file=sys.stderr)


def _folder(mirror: Mirror, generation: Path) -> Path:
    """Where the output of a generation's workers lies: that of the builder who made it, or of the
    last one who tried."""
    if place.exists(mirror.address(generation / MANIFEST)):
        made = read_manifest(mirror.address(generation)).address
        folder = (generation / made).parent / LOGS
    else:
        folder = next(iter(builders(mirror, generation)), generation) / LOGS
    mirror.pull_folder(folder, place.names(mirror.address(folder)))
    return folder


def _follow(mirror: Mirror, generation: Path, shown: "_Shown") -> None:
    """Print what comes until the node is built, or its builder has stopped."""
    address = mirror.address(generation)
    watch = Watch(address)
    while not place.exists(place.join(address, MANIFEST)) and not watch.is_dead(newest(address)[1]):
        shown.print_new(_folder(mirror, generation), final=False)
        time.sleep(_LOOK_SECONDS * pace(address))


class _Shown:
    """What of each file has been printed."""

    def __init__(self, rank: int | None) -> None:
        self.rank = rank
        self.readers: dict[Path, _Reader] = {}

    def print_new(self, folder: Path, *, final: bool) -> None:
        """Print what the files of the chosen ranks have gained."""
        for (_, rank), path in log_files(folder).items():
            if self.rank in (None, rank):
                self.readers.setdefault(path, _Reader(path))
        for path, reader in self.readers.items():
            prefix = f"{path.stem} | " if len(self.readers) > 1 else ""
            for line in reader.new_lines(final=final):
                print(prefix + line, flush=True)


@dataclass
class _Reader:
    """One file, and how far it has been read."""

    path: Path
    offset: int = 0

    def new_lines(self, *, final: bool) -> list[str]:
        """The lines since the last call; an unfinished one only if it is `final`."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                text = file.read()
        except FileNotFoundError:
            return []  # Another builder has committed, and this one's folder is gone.
        if not final:
            text = text[: text.rfind(b"\n") + 1]
        self.offset += len(text)
        return text.decode(errors="replace").splitlines()


def _complain(args: argparse.Namespace, folder: Path) -> None:
    ranks = sorted({rank for _, rank in log_files(folder)})
    if ranks:
        raise PlanError(
            f"--rank {args.rank}: {args.node} has workers of ranks {', '.join(map(str, ranks))}; "
            "choose one of them"
        )
    raise StoreError(
        f"{args.node}: no worker has printed anything into {folder}; nodes that compute in the "
        "driver, as data and export do, have no workers, and others say something once theirs "
        "have started"
    )
