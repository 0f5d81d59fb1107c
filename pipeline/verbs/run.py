"""`ingot run`: bring the line up to date."""

import argparse
import importlib
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from configs.errors import ConfigError, IngotError, StoreError
from configs.parallel import StoreConfig
from configs.profile import PROFILED, parse_profile
from pipeline.channels import open_channels
from pipeline.decide import Build, Recheck, decide, in_use
from pipeline.feasible import unpipelined
from pipeline.graph import Graph
from pipeline.lease import this_process
from pipeline.loading import load_body
from pipeline.machine import require_machine
from pipeline.notify import Notifier
from pipeline.places import sqlite_path, tracking_uri
from pipeline.plain import SMALL_BYTES
from pipeline.progress import Display, make_console
from pipeline.provenance import machine_facts
from pipeline.records import Blocked, Built, Failed, Reused, Run, as_json, new_run_id
from pipeline.runner import Setting, realise
from pipeline.seeds import across_seeds
from pipeline.states import Examiner
from pipeline.store import Store
from pipeline.tracking.listener import Tracking
from pipeline.tracking.runs import Told
from pipeline.verbs.asked import Asked, changed_settings, command, load_asked, selection
from stages.artifacts import Checkpoint

INTERRUPTED = 130


def run(args: argparse.Namespace) -> int:
    """Build what is stale. Exit 1 if a node failed or fell short, 130 if stopped by the user."""
    asked = load_asked(args)
    recipe, chosen = asked.recipe, selection(args)
    profile = parse_profile(args.profile, trainers=recipe.cluster.trainers)
    channels = open_channels(recipe.notify, Path.cwd(), os.environ)
    display = Display(make_console(stderr=args.json))
    store = asked.store(display.note)
    graph = asked.graph(store.hashes)
    store.prepare()
    examiner = Examiner(store, recipe.name)
    judged = decide(graph, chosen, examiner)
    due = [node for node in graph if isinstance(judged[node.name].decision, Build | Recheck)]
    if refusal := unpipelined(recipe.cluster, (node.planned.stage.name for node in due)):
        raise ConfigError(refusal)
    if due:
        database = sqlite_path(tracking_uri(recipe.tracking, store.root))
        require_machine(recipe.cluster, database, display.note)
    # A body that cannot be loaded is told of before anything starts. And large libraries import
    # each other in circles: threads that came into one from two sides would find it half made.
    for node in due:
        load_body(node.planned.stage)
    if due and recipe.cluster.address is not None:
        # A cluster that refuses, or runs something else, is told of before hours of preparation.
        session = importlib.import_module("cluster.session")
        session.ensure_ray(recipe.cluster, str(store.root), cpus_needed=0)
    elif any(issubclass(node.planned.stage.makes, Checkpoint) for node in due):
        # Data may be prepared where no device is.
        importlib.import_module("cluster.backend").require_asked(recipe.cluster)
    record = Run(
        id=new_run_id(),
        recipe=recipe.name,
        invocation=asked.invocation,
        provenance=machine_facts(recipe.cluster),
        started=time.time(),
        store_root=str(store.root),
        process=this_process(),
        in_use=in_use(judged),
    )
    store.trim(record.in_use)
    # A scheduler's polite end is the same as the user's.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    told = Told(
        recipe,
        record,
        line=list(graph.nodes),
        command=command("run", asked.invocation, chosen),
        changed=changed_settings(asked),
    )
    tracking = Tracking(told, store_root=store.root, records=store.records, say=display.note)
    notifier = Notifier(recipe.notify, channels, record, command=told.command, say=display.note)
    setting = Setting(store, examiner, recipe.cluster, [tracking, display, notifier], profile)
    with notifier:
        record = realise(graph, chosen, setting, record)
        if profile is not None:
            for why in _unprofiled(graph, record):
                display.note(why)
        record = replace(record, across_seeds=across_seeds(graph, record, store.root))
        # All is built: what is left to do elsewhere must not lose that.
        store.records.update(replace(record, finished=True))
        record, page = _finish(record, told, tracking, store, display)
        store.records.update(replace(record, finished=True))
        notifier.finish(record)
        if args.json:
            print(json.dumps(as_json(record), indent=1))
        return _conclude(record, asked, tracking, display, page)


def _unprofiled(graph: Graph, record: Run) -> Iterator[str]:
    """Which trainings `--profile` did not see, since they had been done before."""
    trained = [node.name for node in graph if node.planned.stage.name in PROFILED]
    for name in trained:
        if isinstance(record.outcomes.get(name), Reused):
            yield f"{name} is reused: nothing was profiled; --force {name} trains it again"
    if not any(name in record.outcomes for name in trained):
        yield "--profile: this run trains nothing, and nothing was profiled"


def _finish(
    record: Run, told: Told, tracking: Tracking, store: Store, display: Display
) -> tuple[Run, Path | None]:
    """Have MLflow hold all of the run, and its page written, unless it made nothing new."""
    if not any(isinstance(one, Built | Failed) for one in record.outcomes.values()):
        return tracking.finish(record, None), None
    write = partial(_write_page, told, store, tracking.link)
    record = tracking.finish(record, write)
    if tracking.page is not None:
        return record, tracking.page
    try:
        return record, write(record)
    except IngotError as error:
        display.note(f"warning: {error}")
    except Exception as error:  # a full disk for what is drawn, a library's own fault
        display.note(f"warning: the page of this run is not written ({_short(error)})")
    return record, None


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _write_page(told: Told, store: Store, link: Callable[[str], str], record: Run) -> Path:
    """The page of the run. It comes with a plotting library, for which not every run has use."""
    page = importlib.import_module("pipeline.page")
    for one in record.outcomes.values():
        if isinstance(one, Reused):
            # The page tells of one that is not here.
            with suppress(StoreError):
                store.fetch(store.root / one.address, most_bytes=SMALL_BYTES)
    written: Path = page.write_page(
        record, told.line, store.root, again=told.command, changed=told.changed, link=link
    )
    store.mirror.push(written)
    return written


def _ui(asked: Asked) -> str:
    """The command that serves the embedded MLflow of the recipe's store."""
    url = asked.recipe.store.url
    if url == str(Path.cwd() / StoreConfig().url):
        return "ingot ui"
    return shlex.join(["ingot", "ui", "--set", f"store.url={url}"])


def _conclude(
    record: Run, asked: Asked, tracking: Tracking, display: Display, page: Path | None
) -> int:
    """The table, where to look further, and the exit code."""
    shown = {
        name: tracking.link(one.tracking_id)
        for name, one in record.outcomes.items()
        if not isinstance(one, Blocked) and one.tracking_id is not None
    }
    display.table(record, shown)
    display.across_seeds(record)
    if record.tracking_id is not None:
        hint = f" (`{_ui(asked)}` serves these pages)" if tracking.is_embedded else ""
        display.note(f"MLflow, this run: {tracking.link(record.tracking_id)}{hint}")
        display.note(f"MLflow, all runs: {tracking.landing()}")
    if tracking.registered:
        display.note(f"MLflow, models: {', '.join(tracking.registered)}")
    if page is not None:
        display.note(f"The run on one page: {page}")
    if record.interrupted:
        display.note(
            f"Stopped. What is committed stays; {command('run', asked.invocation)} goes on from it."
        )
        return INTERRUPTED
    for name, outcome in record.outcomes.items():
        match outcome:
            case Failed():
                print(f"ingot: error: {name}: {outcome.error}", file=sys.stderr)
                if outcome.output:
                    print(outcome.output, file=sys.stderr)
                    print(f"`ingot logs {name}` shows all of it", file=sys.stderr)
            case Blocked(by, reason) if reason:
                print(
                    f"ingot: error: {name}: made of {by}, which is {reason}; run it again without "
                    "--only and --force to build both",
                    file=sys.stderr,
                )
            case Built(shortfall=str(why)) | Reused(shortfall=str(why)):
                print(f"ingot: error: {name}: {why}", file=sys.stderr)
    return 0 if record.succeeded else IngotError.exit_code
