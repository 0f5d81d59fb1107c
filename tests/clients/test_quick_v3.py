"""V3's bundles in transformers, llama.cpp and lm-eval: the same tokens and verdicts as Ingot."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from configs.errors import ClientError
from stages.export.programs import PROGRAMS, find
from stages.export.stored import read_config
from stages.export.trial import Sitting, trials
from tests.clients.bundles import SUMS
from tests.clients.conftest import Folders
from tests.clients.trying import require_equal, tried

pytestmark = pytest.mark.clients


@pytest.mark.parametrize(("family", "variant"), [("v3", "bf16"), ("narrow-v3", "fp8")])
def test_transformers_encodes_renders_and_continues_as_ingot(
    folders: Folders, family: str, variant: str
) -> None:
    made = tried("transformers", folders(family)[f"cuda/{variant}"])
    require_equal(made)
    assert made["texts encoded alike"].of == made["conversations encoded alike"].of == 64


def test_what_transformers_cannot_widen_is_refused_before_it_is_started(
    folders: Folders,
) -> None:
    with pytest.raises(ClientError, match=r"cannot widen FP8 .* = 576, which"):
        tried("transformers", folders("v3")["cuda/fp8"])


@pytest.mark.parametrize("variant", ["bf16", "fp8"])
def test_llama_cpp_continues_what_its_converter_made_as_ingot(
    folders: Folders, variant: str
) -> None:
    made = tried("llama.cpp", folders("v3")[f"cuda/{variant}"])
    require_equal(made)
    assert made["texts encoded alike"].of == 64


def test_lm_eval_passes_the_same_verdict_on_every_sum(folders: Folders) -> None:
    made = tried("lm-eval", folders("v3")["cuda/bf16"], problems=SUMS)
    (verdicts,) = (one for what, one in made.items() if what.startswith("verdicts"))
    assert not [str(one) for one in made.values() if not one.passed]
    assert verdicts.of == len(SUMS) == 64
    right = int(verdicts.what.partition("(")[2].split()[0])
    assert 0 < right < 64, "verdicts that are all alike would prove nothing"


def test_both_targets_hold_the_same_plain_weights(folders: Folders) -> None:
    """So that what is tried of one is true of the other."""
    cuda, ascend = (folders("v3")[f"{target}/bf16"] for target in ("cuda", "ascend"))
    names = {path.name for path in cuda.glob("*.safetensors")}
    assert names
    assert all((cuda / name).read_bytes() == (ascend / name).read_bytes() for name in names)


def test_a_client_that_reads_other_weights_is_found_out(folders: Folders, tmp_path: Path) -> None:
    """The comparison can fail: one matrix is scaled after Ingot has read the folder."""
    folder = tmp_path / "bf16"
    shutil.copytree(folders("v3")["cuda/bf16"], folder)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    name = "model.layers.1.mlp.shared_experts.down_proj.weight"
    tensors[name] = tensors[name] * -3
    sitting = Sitting(folder, read_config(folder), "bf16")
    assert len({tuple(answer) for answer in sitting.answers}) > 16
    save_file(tensors, path, metadata={"format": "pt"})
    (trial,) = trials(sitting, "transformers").values()
    made = {one.what: one for one in trial(sitting, find(PROGRAMS["transformers"]))}
    assert made["texts encoded alike"].passed
    assert not made["greedy answers alike"].passed
    assert "of theirs" in made["greedy answers alike"].first_apart
