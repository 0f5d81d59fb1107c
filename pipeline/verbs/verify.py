"""`ingot verify`: whether a bundle is whole, what it takes, and whether a client answers alike."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from configs.errors import ClientError, ConfigError
from configs.model import ModelConfig
from pipeline.figures import show_bytes
from pipeline.verbs.asked import find_store, locate
from pipeline.verbs.eval_ import read_problems_file
from stages.export import footprint
from stages.export.programs import PROGRAMS, find
from stages.export.servers import HOMES
from stages.export.stored import Stored, check_tensors, kind_of, read_config, read_stored
from stages.export.sums import SUMS, check_sums
from stages.export.trial import Sitting, trials
from stages.manifest import MANIFEST, generation_of, read_manifest
from stages.manifest import verify as verify_artifact
from stages.names import CONFIG
from stages.verifiers import Problem


def verify(args: argparse.Namespace) -> int:
    """Check each variant and print what it takes; with a client, 1 if any answer differs.

    ArtifactError names the file or tensor that is wrong; ClientError says how to get the client.
    """
    if args.python is not None and args.client is None:
        raise ConfigError(f"--python {args.python}: of which program? name it with --with")
    if args.python is not None and not Path(args.python).is_file():
        inside = Path(args.python, "bin", "python")
        remedy = f"name {inside}" if inside.is_file() else "name a Python that is there"
        raise ConfigError(f"--python {args.python}: no such file; {remedy}")
    if args.problems and args.client != "lm-eval":
        raise ConfigError(
            f"--problems {args.problems}: only lm-eval is asked them; add --with lm-eval"
        )
    problems = read_problems_file(Path(args.problems)) if args.problems else []
    folders = _variants(args)
    for folder in folders:
        for line in _checked(folder):
            print(line, flush=True)
    print("1 variant is whole" if len(folders) == 1 else f"{len(folders)} variants are whole")
    return 0 if args.client is None else _tried(folders, args, problems)


def _variants(args: argparse.Namespace) -> list[Path]:
    """The folders of the variants that the user means."""
    asked = Path(args.bundle)
    if (asked / CONFIG).is_file() or (asked / SUMS).is_file():
        return [asked]
    if found := _below(asked):
        return found
    if "/" in args.bundle and not asked.exists():
        raise ConfigError(f"{args.bundle}: no such folder; name a node, or the folder of a variant")
    store, recipe = find_store(args, print)
    generation = locate(store, recipe, args.bundle)
    manifest = read_manifest(str(generation))
    found = _below(generation / manifest.address)
    if not found:
        raise ConfigError(
            f"{generation} holds a {manifest.kind}, not a bundle; name one, such as export.cuda, "
            "or the folder of a variant"
        )
    return found


def _below(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))


def _checked(folder: Path) -> Iterator[str]:
    """Check one variant, and tell what it holds."""
    told = _check_files(folder)
    config, stored, kind = read_config(folder), read_stored(folder), kind_of(folder)
    check_tensors(folder, config, stored)
    yield f"{folder}: {kind} of {config.family}, {config.parameters():,} parameters"
    yield f"  {told}"
    yield f"  {len(stored)} tensors are those of config.json, none missing and none beside them"
    yield ""
    yield from _sizes(config, stored)
    yield from _memory(config, stored, kind)


def _check_files(folder: Path) -> str:
    """Against the record in the folder, or else that of the artifact it lies in."""
    generation = Path(generation_of(str(folder.resolve().parent)))
    if not (folder / SUMS).is_file() and (generation / MANIFEST).is_file():
        verify_artifact(str(generation))
        return "every file of the artifact has the size and hash of its manifest"
    return f"{check_sums(folder)} files have the hashes of {SUMS}"


def _sizes(config: ModelConfig, stored: dict[str, Stored]) -> Iterator[str]:
    """Bytes by part."""
    parts = footprint.parts(config, stored)
    total = sum(part.bytes for part in parts)
    yield f"  {'part':28}{'tensors':>8}{'bytes':>20}{'share':>8}"
    for part in parts:
        share = f"{part.bytes / total:.1%}"
        yield f"  {part.name:28}{part.tensors:>8,}{part.bytes:>20,}{share:>8}"
    yield f"  {'together':28}{len(stored):>8,}{total:>20,}"
    yield ""


def _memory(config: ModelConfig, stored: dict[str, Stored], kind: str) -> Iterator[str]:
    """Weights by number of devices, the cache, and how many devices of each target hold both."""
    context = config.max_position_embeddings
    spreads, full = footprint.spread(config, stored), footprint.cache_bytes(config, context)
    yield "  memory of a device, the routed experts shared out evenly and the rest on each"
    shown = (f"{one.devices}: {show_bytes(one.bytes)}" for one in spreads)
    yield f"  weights by number of devices  {', '.join(shown)}"
    yield (
        f"  cache of a sequence           {show_bytes(full)} for {context:,} tokens, "
        f"{full / context:,.0f} B a token (bfloat16)"
    )
    for target in [HOMES[kind]] if kind in HOMES else footprint.MEMORY_BYTES:
        found = {
            f"{device} ({show_bytes(int(memory))})": footprint.fewest(spreads, full, memory)
            for device, memory in footprint.MEMORY_BYTES[target].items()
        }
        told = (
            f"{name}: {f'{count} or more' if count else f'more than {spreads[-1].devices}'}"
            for name, count in found.items()
        )
        yield f"  {f'devices, for {target}':28}  {', '.join(told)}"
    yield ""


def _tried(folders: list[Path], args: argparse.Namespace, problems: list[Problem]) -> int:
    """Whether the client answers as Ingot does, for every variant that it loads."""
    found = find(PROGRAMS[args.client], args.python)
    print(f"{found.title} at {found.place}, held to what Ingot makes of the same files")
    tried, passed = 0, True
    for folder in folders:
        sitting = _sitting(folder, problems)
        try:
            planned = trials(sitting, args.client)
        except ClientError as error:
            if len(folders) == 1:
                raise
            print(f"  {folder.name}: not tried: {error}", file=sys.stderr)
            continue
        for name, trial in planned.items():
            for one in trial(sitting, found):
                tried, passed = tried + 1, passed and one.passed
                mark = "" if one.passed else "DIFFERENT: "
                print(f"  {folder.name}, {name}: {mark}{one}", flush=True)
    if not tried:
        raise ClientError(f"{found.title} loads none of these variants (docs/clients.md)")
    return 0 if passed else 1


def _sitting(folder: Path, problems: list[Problem]) -> Sitting:
    return Sitting(folder, read_config(folder), kind_of(folder), problems=problems)
