"""Every benchmark still runs: one short round of each, on small shapes, whose figures mean nothing.

They are run in full by `make bench`. One stopped working after a rename, and nobody saw.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs
import torch

from configs.parallel import StoreConfig
from configs.v3 import V3Config
from pipeline.provenance import processor
from tests.bench import (
    attention_cost,
    layouts,
    machine,
    on_gpu,
    preparation,
    preparation_line,
    store_calls,
    test_preparation,
    test_sampling,
    test_training_step,
)
from tests.bench import test_against_transformers as training
from tests.bench.preparation_corpus import write_corpus
from tests.clients.environments import is_made, python_of
from tests.objects import patched, serving
from tests.pipeline.fakes import World

HERE = Path(__file__).parent
ABSENT = (
    *("ray", "mlflow", "pyarrow", "fsspec", "psutil", "s3fs", "gcsfs", "botocore", "moto"),
    *("jinja2", "markdown_it", "markupsafe", "matplotlib", "rich", "tokenizers", "transformers"),
    *("accelerate", "beartype", "hypothesis", "pytest", "yaml", "pandas", "requests"),
)
ALONE = f"""
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        there = name.split(".")[0] not in {ABSENT}
        return super().find_spec(name, path, target) if there else None
sys.meta_path = [Without if one is PathFinder else one for one in sys.meta_path]
from tests.bench import on_gpu
sys.exit(on_gpu.main(["--short", "--out", sys.argv[1]]))
"""
NO_BENCHMARKS = {
    *("machine", "preparation_corpus", "preparation_exact"),
    *("test_gpu_parts", "test_gpu_products", "test_on_gpu", "test_short_rounds"),
}
"""Parts of benchmarks, and tests of those, which `make test` runs whole."""


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Benchmarks set the number for their whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def small() -> V3Config:
    """The shape of the benchmarks beside transformers, with little in it."""
    return training.shape(4, 16, 2).model_copy(
        update={"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    )


def train_beside_transformers(patch: pytest.MonkeyPatch, folder: Path) -> None:
    for name, value in (("ROWS", 2), ("LENGTH", 16), ("ROUNDS", 1)):
        patch.setattr(training, name, value)
    patch.setattr(training, "SHAPES", {"small": small()})
    assert training.main() > 0


def sample_beside_transformers(patch: pytest.MonkeyPatch, folder: Path) -> None:
    for name, value in (("ROWS", 2), ("PROMPT", 4), ("NEW", 6), ("ROUNDS", 1)):
        patch.setattr(test_sampling, name, value)
    patch.setattr(test_sampling, "SHAPES", {"small": small()})
    patch.setattr(test_sampling, "CHOICES", test_sampling.CHOICES[:2])
    assert test_sampling.main() > 0


def train_in_each_precision(patch: pytest.MonkeyPatch, folder: Path) -> None:
    for name, value in (("ROUNDS", 2), ("FEW", 1), ("MANY", 3)):
        patch.setattr(test_training_step, name, value)
    assert test_training_step.times_of_a_float32_step("tiny", 1) > 0
    for part in ("model", "MoE block"):
        test_training_step.test_what_waits_for_the_backward_pass("tiny", part)


def draw_the_attention_curves(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Each kind's points in this process, and one as all are taken in full: in its own."""
    patch.setattr(attention_cost, "RUNS", 1)
    (kind, *_) = attention_cost.KINDS
    assert attention_cost.apart(kind, 256).keys() == attention_cost.measure(kind, 256).keys()
    patch.setattr(attention_cost, "LENGTHS", [256, 1024])
    patch.setattr(attention_cost, "apart", attention_cost.measure)
    attention_cost.main(folder)
    table = (folder / "attention-cost.md").read_text()
    assert all(table.count(f"| {kind} |") == 4 for kind in attention_cost.KINDS)
    assert (folder / "attention-cost.svg").stat().st_size > 0


def measure_what_a_gpu_would(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """All parts, on the CPU: where only CUDA can tell, cells say so. In a process without what a
    machine for measuring need not have, and without the tests' checks of every call."""
    out, root = folder / "found.json", HERE.parents[1]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    parts = json.loads(out.read_text())["parts"]
    assert [part["name"] for part in parts] == [part.name for part in on_gpu.PARTS]
    for part in parts:
        figures = [row["figure"] for row in part["rows"]]
        assert any(isinstance(figure, float | int) for figure in figures), part["name"]


def count_the_calls_of_a_store(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Of the fake line, which takes no minute."""
    with serving() as objects, store_calls.counting(objects.endpoint) as (endpoint, calls):
        variables = {"AWS_ENDPOINT_URL": endpoint, "XDG_CACHE_HOME": str(folder)}
        s3fs.S3FileSystem.clear_instance_cache()
        with patched(variables):
            World(StoreConfig(url=f"{objects.url}/store", min_free_bytes=0)).run()
    # A lease and a manifest of each node.
    assert calls.number["train"]["create"] == 2
    assert calls.sent["train"] > 0
    assert store_calls.table(calls).count("\n") > 5


def train_in_layouts(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """One rank and two, a step each."""
    layouts.main(short=True)


def prepare_text(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Ours alone, with all that is told of it."""
    ours_here(patch)
    facts = preparation.measure(folder, 1.0, 1)
    assert facts["growth"][preparation.OURS]["seconds"] > 0
    found = facts["found"][preparation.OURS]
    assert found["pairs"]["0.9"] == found["items"]["recall"] == 1


def ours_here(patch: pytest.MonkeyPatch) -> None:
    """Our line in this process, as half of a short round is over when another has begun."""
    apart = preparation.ask

    def ask(line: str, *job: Any) -> dict[str, Any]:
        return apart(line, *job) if line == preparation.THEIRS else preparation_line.do(job[1])

    patch.setattr(preparation, "ask", ask)


def prepare_text_once(line: str, python: Path | None, folder: Path) -> None:
    """One line, and nothing else."""
    planted = write_corpus(folder / "all", 0.5)
    tokenizer = folder / "tokenizer.json"
    preparation.make_tokenizer(planted, tokenizer)
    core = max(os.sched_getaffinity(0))
    answer = preparation.Bench(folder, core, tokenizer, python).run(line, planted)
    assert answer["documents"] == planted.documents
    assert all(preparation.seconds_of(line, answer["steps"], told) for told in preparation.STEPS)


def prepare_text_by_ours(patch: pytest.MonkeyPatch, folder: Path) -> None:
    prepare_text_once(preparation.OURS, None, folder)


def prepare_text_by_datatrove(patch: pytest.MonkeyPatch, folder: Path) -> None:
    prepare_text_once(preparation.THEIRS, datatrove(), folder)


def prepare_text_beside_datatrove(patch: pytest.MonkeyPatch, folder: Path) -> None:
    datatrove()
    ours_here(patch)
    for name, value in (("MEGABYTES", 1.0), ("ROUNDS", 1)):
        patch.setattr(test_preparation, name, value)
    test_preparation.test_text_is_prepared_at_twice_datatroves_throughput_or_more(folder)


def datatrove() -> Path:
    """Its Python, where the environment is: to make it takes minutes."""
    if not is_made("datatrove"):
        pytest.skip("the environment of datatrove is not made; `make bench` makes it")
    return python_of("datatrove")


ROUNDS = {
    "attention_cost": draw_the_attention_curves,
    "datatrove_line": prepare_text_by_datatrove,
    "layouts": train_in_layouts,
    "on_gpu": measure_what_a_gpu_would,
    "preparation": prepare_text,
    "preparation_line": prepare_text_by_ours,
    "store_calls": count_the_calls_of_a_store,
    "test_preparation": prepare_text_beside_datatrove,
    "test_against_transformers": train_beside_transformers,
    "test_sampling": sample_beside_transformers,
    "test_training_step": train_in_each_precision,
}
"""By file: what runs all of it, briefly."""


# A short round may need no memory beyond what its process has, and a plot of that has no logarithm.
@pytest.mark.filterwarnings("ignore:Data has no positive values")
@pytest.mark.parametrize("name", sorted({path.stem for path in HERE.glob("*.py")} - NO_BENCHMARKS))
def test_every_benchmark_runs_for_a_short_round(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert name in ROUNDS, f"tests/bench/{name}.py has no short round; write one, and enter it"
    ROUNDS[name](monkeypatch, tmp_path)


def test_what_is_called_no_benchmark_is_neither_slow_nor_run_by_itself() -> None:
    for name in NO_BENCHMARKS - {Path(__file__).stem}:
        text = (HERE / f"{name}.py").read_text()
        assert "__main__" not in text and "mark.slow" not in text, name


def test_every_ratio_comes_with_processor_threads_and_allocator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MALLOC_TOP_PAD_", "67108864")
    told = machine.describe()
    assert processor() in told
    assert "MALLOC_TOP_PAD_=67108864" in told
    assert "threads" in told
