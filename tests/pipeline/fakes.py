"""A line of small stages that need neither torch nor ray, for tests of the pipeline floor.

Each writes real files and returns a real artifact, equal for equal configs. Beyond that they do
what their config asks: append a line to `diary` for every build, sleep, fail, or come out
different each time. `diary` and `seconds` are provenance, as a path or a machine would be.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from configs.base import Frozen
from configs.delivery import Target
from configs.errors import TrainingError
from configs.model import V3Config
from configs.parallel import ClusterConfig, StoreConfig
from pipeline.decide import Judged, decide
from pipeline.graph import Graph, Selection, make_graph
from pipeline.lease import this_process
from pipeline.listeners import Listener
from pipeline.records import Built, Failed, Invocation, Reused, Run, new_run_id
from pipeline.runner import Setting, realise
from pipeline.slots import Slot
from pipeline.states import Examiner
from pipeline.store import Store
from stages.artifacts import Bundle, Checkpoint, Corpus, Parity, Report
from stages.contract import Planned, Workspace, stage
from stages.hashing import Hashes
from stages.manifest import read_manifest
from stages.plots import Bar, Bars, Plot, write_plots
from stages.telemetry import MetricsFile, following

RECIPE = "fake"


class OptimFake(Frozen):
    """A nested section with defaults of its own."""

    rate: float = 0.1
    momentum: float = 0.9


class FakeConfig(Frozen):
    """What the fakes understand."""

    provenance_fields: ClassVar[frozenset[str]] = frozenset({"diary", "seconds"})
    seed: int = 0
    """A report's figures depend on it."""
    steps: int = 3
    optim: OptimFake = OptimFake(rate=0.5)
    fails: bool = False
    differs: bool = False
    """Come out different in every build."""
    target: str = "cuda"
    diary: str = ""
    seconds: float = 0.0


def _begin(config: FakeConfig, work: Workspace, name: str) -> None:
    if config.diary:
        with Path(config.diary).open("a") as file:
            file.write(f"{name}\n")
    time.sleep(config.seconds)
    if config.fails:
        raise TrainingError(f"{name} was told to fail")
    text = f"{name} {config.steps} {time.time_ns() if config.differs else 0}"
    work.path("weights.bin").write_text(text)


def _reads(config: FakeConfig, hashes: Hashes) -> Mapping[str, Any]:
    return {"python": "3.11.0"}


@stage(revision=1, reads=_reads)
def gather(config: FakeConfig, work: Workspace) -> Corpus:
    """A corpus of one file."""
    _begin(config, work, "gather")
    return Corpus(
        uri=work.out,
        train_rows=10,
        held_out_rows={"text": 2},
        sequence_tokens=8,
        vocab_size=300,
        train_problems=4,
        held_out_problems=2,
    )


@stage(revision=1)
def train(config: FakeConfig, work: Workspace, *, corpus: Corpus) -> Checkpoint:
    """A checkpoint with a step log; the loss of step k is 1 / k."""
    with following(work.beside(), work.tracker):
        work.tracker.start(steps=config.steps, unit="step")
        metrics = MetricsFile(work.beside())
        for step in range(1, config.steps + 1):
            load = [[0.25] * 4, [0.1, 0.2, 0.3, 0.4]]
            tags = {"fp8.products": "cpu: fake", "device": "cpu", "compute": "float32"}
            told = {"tags": tags} if step == 1 else {}
            figures = {"loss": 1 / step, "pass@1": 0.5, "expert_load": load}
            metrics.append(figures | told, step=step)
        (resume, *_) = work.resumable("step.json")
        resume.parent.mkdir()
        resume.write_text(json.dumps(config.steps))
        _begin(config, work, "train")
    model = V3Config(num_hidden_layers=3)
    return Checkpoint(
        uri=work.out, step=config.steps, sequences_seen=8, model=model, final_loss=1 / config.steps
    )


@stage(revision=1)
def judge(config: FakeConfig, work: Workspace, *, corpus: Corpus, checkpoint: Checkpoint) -> Report:
    """A report of three figures, and a bound of one."""
    _begin(config, work, "judge")
    headline = {
        "before_pass_at_1": 0.25,
        "after_pass_at_1": 0.75 + config.seed / 64,
        "before_pass_at_1_low": 0.2,
        "after_greedy_accuracy": 1 - config.seed / 32,
    }
    work.path("report.json").write_text(json.dumps({"headline": headline}))
    work.path("card.html").write_text("<!doctype html><title>Card</title>")
    bars = {side: Bar(value=headline[f"{side}_pass_at_1"]) for side in ("before", "after")}
    write_plots(
        work.path(), Plot(name="before_after", panels=(Bars(title="pass at 1", bars=bars),))
    )
    key = ("before_pass_at_1", "after_pass_at_1")
    return Report(uri=work.out, headline=headline, key=key)


@stage(revision=1)
def pack(config: FakeConfig, work: Workspace, *, checkpoint: Checkpoint) -> Bundle:
    """A bundle for one target."""
    _begin(config, work, f"pack.{config.target}")
    parity = Parity(positions=10, max_abs_logit_error=0.0, top1_agreement=1.0, mean_kl_nats=0.0)
    target: Target = "cuda" if config.target == "cuda" else "ascend"
    return Bundle(uri=work.out, target=target, parity={"bf16": parity})


def make_line(**changes: Any) -> dict[str, Planned[Any]]:
    """data -> train -> judge, pack.cuda, pack.ascend; `node={...}` or `node__field` of a config.

    `make_line(train={"steps": 5}, every={"diary": path})`.
    """
    every = changes.pop("every", {})

    def config(node: str, **extra: Any) -> FakeConfig:
        return FakeConfig(**{**every, **extra, **changes.get(node, {})})

    corpus = gather(config("data"))
    checkpoint = train(config("train"), corpus=corpus)
    return {
        "data": corpus,
        "train": checkpoint,
        "judge": judge(config("judge"), corpus=corpus, checkpoint=checkpoint),
        "pack.cuda": pack(config("pack", target="cuda"), checkpoint=checkpoint),
        "pack.ascend": pack(config("pack", target="ascend"), checkpoint=checkpoint),
    }


class World:
    """A store, and runs of the fake line in it."""

    def __init__(self, store: StoreConfig) -> None:
        """Runs in the store of this config; what it says is kept in `said`."""
        self.said: list[str] = []
        self.store = Store(store, say=self.said.append)

    def graph(self, **changes: Any) -> Graph:
        """The line under these changes."""
        return make_graph(make_line(**changes), self.store.hashes)

    def judged(self, selection: Selection | None = None, **changes: Any) -> dict[str, Judged]:
        """What a run of the line under these changes would do."""
        examiner = Examiner(self.store, RECIPE)
        return decide(self.graph(**changes), selection or Selection(), examiner)

    def begin(self) -> Run:
        """The record of a run of this process that has done nothing yet."""
        return Run(
            id=new_run_id(),
            recipe=RECIPE,
            invocation=Invocation(RECIPE),
            provenance={},
            started=time.time(),
            store_root=str(self.store.root),
            process=this_process(),
        )

    def run(
        self,
        *,
        selection: Selection | None = None,
        listeners: tuple[Listener, ...] = (),
        graph: Graph | None = None,
        at_once: int | None = 1,
        **changes: Any,
    ) -> Run:
        """Realise the line under these changes, `at_once` nodes at a time."""
        run = self.begin()
        machines = ClusterConfig(parallel_nodes=at_once)
        setting = Setting(self.store, Examiner(self.store, RECIPE), machines, listeners)
        chosen = graph or self.graph(**changes)
        run = replace(realise(chosen, selection or Selection(), setting, run), finished=True)
        self.store.records.update(run)
        return run

    def generation(self, run: Run, node: str) -> Path:
        """The folder of the generation that a run built or reused."""
        return self.store.root / made(run, node).address

    def files(self, run: Run, node: str) -> Path:
        """The folder of the files of the artifact that a run built or reused."""
        generation = self.generation(run, node)
        return generation / read_manifest(str(generation)).address


def fill(slot: Slot, text: str = "text") -> Corpus:
    """A corpus of one file in a slot, which nobody has committed yet."""
    (slot.files / "text.txt").write_text(text)
    return Corpus(
        uri=str(slot.files),
        train_rows=1,
        held_out_rows={},
        sequence_tokens=8,
        vocab_size=300,
        train_problems=0,
        held_out_problems=0,
    )


def made(run: Run, node: str) -> Built | Reused:
    """What became of a node that the run built or reused."""
    outcome = run.outcomes[node]
    assert isinstance(outcome, Built | Reused)
    return outcome


def failed(run: Run, node: str) -> Failed:
    """What became of a node that failed."""
    outcome = run.outcomes[node]
    assert isinstance(outcome, Failed)
    return outcome


def outcomes(run: Run) -> dict[str, str]:
    """`built`, `reused`, `failed` or `blocked` by node."""
    return {name: one.outcome for name, one in run.outcomes.items()}
