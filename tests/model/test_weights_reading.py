"""What stands in a folder in place of a model's files, and configs that are odd but legal: each is
read, or is one error that names the file or the field, and what to do."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import ArtifactError
from configs.model import ModelConfig, YarnConfig
from model.weights.config import from_hf_config, read_config, to_hf_config
from model.weights.files import consolidate, load_pretrained, save_pretrained
from model.weights.quantization import read_tile
from model.weights.reading import INDEX, WEIGHTS, require_not_pointer
from tests.model.weights_folders import edit_config
from tests.references import TINY, TINY_V4, TINY_V32, random_model, tiny

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    "size 12345\n"
)
CONFIG = tiny(num_nextn_predict_layers=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole model in several files with an index."""
    path = tmp_path / "theirs"
    save_pretrained(random_model(CONFIG), path, max_shard_bytes=30_000)
    return path


def shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


@pytest.mark.parametrize(
    "find",
    [lambda folder: folder / "config.json", lambda folder: folder / INDEX, shard],
    ids=["config", "index", "shard"],
)
def test_a_pointer_of_git_lfs_is_named(folder: Path, find: Callable[[Path], Path]) -> None:
    path = find(folder)
    path.write_text(POINTER)
    message = rf"^{path}: a git-lfs pointer, not the file itself; run `git lfs pull` in {folder}$"
    with pytest.raises(ArtifactError, match=message):
        load_pretrained(folder)
    with pytest.raises(ArtifactError, match=message):
        consolidate(folder, folder.parent / "out")
    with pytest.raises(ArtifactError, match=message):
        require_not_pointer(path)


def test_a_pointer_in_place_of_the_one_file_is_named(tmp_path: Path) -> None:
    save_pretrained(random_model(CONFIG), tmp_path)
    (tmp_path / WEIGHTS).write_text(POINTER)
    with pytest.raises(ArtifactError, match=rf"{WEIGHTS}: a git-lfs pointer, not the file"):
        load_pretrained(tmp_path)


def test_of_a_file_that_is_no_pointer_the_first_bytes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for body in (
        "",
        "version",
        POINTER[:20],
        POINTER.replace("git-lfs", "git-lfz"),
        "\n" + POINTER,
    ):
        path.write_text(body)
        require_not_pointer(path)
    os.truncate(path, 1 << 40)  # Sparse, and far more than memory holds.
    require_not_pointer(path)


def only(folder: Path, *names: str) -> None:
    """Leave `config.json`, and files of these names with bytes of a pickle."""
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    for name in names:
        (folder / name).write_bytes(b"\x80\x02}q\x00.")


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["pytorch_model.bin"], "pytorch_model.bin"),
        (["pytorch_model-00001-of-00002.bin"], "pytorch_model-00001-of-00002.bin"),
        (["model.pt"], "model.pt"),
        (["consolidated.00.pth"], "consolidated.00.pth"),
        (["model.ckpt"], "model.ckpt"),
        (["a.bin", "pytorch_model.bin", "optimizer.pt", "training_args.bin"], "pytorch_model.bin"),
    ],
)
def test_pickled_weights_are_never_loaded_and_the_way_out_is_named(
    folder: Path, names: list[str], found: str
) -> None:
    only(folder, *names)
    message = (
        rf"^{folder / found}: the folder holds no safetensors; pickled weights are never loaded, "
        r".*: AutoModelForCausalLM.from_pretrained\(old\).save_pretrained\(new\)$"
    )
    with pytest.raises(ArtifactError, match=message):
        load_pretrained(folder)


@pytest.mark.parametrize("names", [[], ["optimizer.pt", "training_args.bin", "rng_state_0.pth"]])
def test_what_a_trainer_leaves_is_no_model(folder: Path, names: list[str]) -> None:
    only(folder, *names)
    with pytest.raises(
        ArtifactError, match=rf"{WEIGHTS}: no such file, nor any other .*; complete"
    ):
        load_pretrained(folder)


def test_safetensors_are_read_beside_a_pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    assert load_pretrained(folder).config == CONFIG


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "pytorch_model.bin",
            r"pytorch_model.bin: pickled weights are never loaded, .*: AutoModel",
        ),
        ("weights.gguf", r"weights.gguf: no safetensors file by its name; take one that is"),
    ],
)
def test_an_index_of_other_files_than_safetensors_is_refused(
    folder: Path, name: str, message: str
) -> None:
    (folder / name).write_bytes(b"\x80\x02}q\x00.")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ArtifactError, match=message):
        load_pretrained(folder)


def rewrite(name: str, change: Callable[[str], str | bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        body = change((folder / name).read_text())
        (folder / name).write_bytes(body.encode() if isinstance(body, str) else body)

    return apply


def with_fields(**fields: object) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **fields)


def without(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text())
        kept = {name: value for name, value in raw.items() if name not in names}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def linked(folder: Path) -> None:
    """As a cache of the hub has its files."""
    for path in list(folder.iterdir()):
        target = folder.parent / path.name
        path.rename(target)
        path.symlink_to(target)


LEGAL: dict[str, Callable[[Path], None]] = {
    "torch_dtype": with_fields(torch_dtype="bfloat16"),
    "another dtype": with_fields(dtype="bfloat16"),
    "no dtype": without("dtype"),
    "a whole base": with_fields(rope_theta=10000),
    "no base": without("rope_theta", "rope_parameters"),
    "mtp null": with_fields(num_nextn_predict_layers=None),
    "no mtp": without("num_nextn_predict_layers"),
    "ends in a list": with_fields(eos_token_id=[1, 2, 3], pad_token_id=None, bos_token_id=None),
    "auto_map": with_fields(auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"}),
    "unknown fields": with_fields(ep_size=1, pretraining_tp=1, aux_loss_alpha=0.001, seq_aux=True),
    "no architectures": without("architectures"),
    "no quantisation": with_fields(quantization_config=None),
    "an empty scheme": with_fields(quantization_config={}),
    "rope_scaling null": with_fields(rope_scaling=None),
    "key-value heads null": with_fields(num_key_value_heads=None),
    "engram null": with_fields(engram=None),
    "whole floats": with_fields(hidden_size=32.0, rms_norm_eps=1e-6),
    "a mark of UTF-8": rewrite("config.json", lambda body: "\ufeff" + body),
    "Windows lines": rewrite("config.json", lambda body: body.replace("\n", "\r\n")),
    "letters of all kinds": with_fields(_name_or_path="模型/modèle"),
    "an index with a mark": rewrite(INDEX, lambda body: "\ufeff" + body),
    "an index without metadata": rewrite(
        INDEX, lambda body: json.dumps({"weight_map": json.loads(body)["weight_map"]})
    ),
    "links": linked,
}


@pytest.mark.parametrize("change", LEGAL.values(), ids=list(LEGAL))
def test_what_is_odd_but_legal_is_read(folder: Path, change: Callable[[Path], None]) -> None:
    expected = random_model(CONFIG).state_dict()
    change(folder)
    model = load_pretrained(folder)
    assert model.config == CONFIG
    assert all(torch.equal(model.state_dict()[name], x) for name, x in expected.items())


def in_place_of(name: str, body: str | bytes) -> Callable[[Path], None]:
    return rewrite(name, lambda _: body)


def as_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


def of_text(folder: Path) -> None:
    shard(folder).write_text("<html>404</html>")


ILLEGAL: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (in_place_of("config.json", ""), "config.json: not valid JSON: .*; take a whole copy"),
    "cut short": (
        rewrite("config.json", lambda body: body[: len(body) // 2]),
        "config.json: not valid JSON: .*; take a whole copy",
    ),
    "other bytes": (
        rewrite("config.json", lambda body: body.encode("utf-16")),
        "config.json: not valid JSON: .*; take a whole copy",
    ),
    "endless depth": (
        in_place_of("config.json", "[" * 200_000),
        "config.json: not valid JSON: .*; take a whole copy",
    ),
    "null": (in_place_of("config.json", "null"), "config.json: holds a NoneType, .*; take the"),
    "a folder": (as_folder, "config.json: no such file, so .* is not a model folder; name one"),
    "nothing in it": (
        in_place_of("config.json", "{}"),
        "config.json: model_type = None is unknown; known: .*; take a model of one of these",
    ),
    "an empty index": (in_place_of(INDEX, ""), f"{INDEX}: not valid JSON: .*; take a whole copy"),
    "an index of no files": (
        in_place_of(INDEX, '{"weight_map": {}}'),
        "is missing from the checkpoint, but config.json .*; complete the files",
    ),
    "an index that leaves the folder": (
        in_place_of(INDEX, '{"weight_map": {"a": "../b.safetensors"}}'),
        "names '../b.safetensors', which is no file of its folder; take the index of the save",
    ),
    "an index of this very folder": (
        in_place_of(INDEX, '{"weight_map": {"a": ".."}}'),
        "no such file; the checkpoint is incomplete, so fetch the file",
    ),
    "a shard of text": (
        of_text,
        "not a whole safetensors file: .*; fetch the file again",
    ),
}


@pytest.mark.parametrize(("change", "message"), ILLEGAL.values(), ids=list(ILLEGAL))
def test_what_is_no_model_is_one_error_with_a_remedy(
    folder: Path, change: Callable[[Path], None], message: str
) -> None:
    change(folder)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_pretrained(folder)
    assert str(folder) in str(caught.value)


def test_integers_for_a_float_tensor_are_named_with_a_remedy(tmp_path: Path) -> None:
    save_pretrained(random_model(CONFIG), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(
        ArtifactError, match=r"model.norm.weight is stored as torch.int32, .*; take"
    ):
        load_pretrained(tmp_path)


VALUES: list[object] = [
    *(None, "x", "", -1, 0, 1.5, True, False, math.nan, math.inf),
    *([], [1], [[1]], [None] * 4, {}, {"a": 1}, {"rope_type": [1]}, {"main": {}, "compress": 3}),
]
STRETCHED = [
    config.model_copy(update={"rope_scaling": YarnConfig()}) for config in (TINY, TINY_V32, TINY_V4)
]


def mutants(config: ModelConfig) -> list[dict[str, Any]]:
    """`config.json` with one field, or one of a table within it, of another kind."""
    raw = to_hf_config(config)
    found = [raw | {name: value} for name in (*raw, "quantization_config") for value in VALUES]
    for outer in ("rope_scaling", "rope_parameters"):
        for inner in (*raw[outer], "type", "partial_rotary_factor", "attention_factor"):
            found += [raw | {outer: raw[outer] | {inner: value}} for value in VALUES]
            table = raw[outer].get(inner)
            if isinstance(table, dict):
                found += [
                    raw | {outer: raw[outer] | {inner: table | {name: value}}}
                    for name in table
                    for value in VALUES
                ]
    return found


@pytest.mark.parametrize("config", STRETCHED, ids=lambda config: config.family)
def test_whatever_stands_in_a_config_it_is_read_or_refused_with_a_remedy(
    config: ModelConfig,
) -> None:
    refused = 0
    for raw in mutants(config):
        try:
            from_hf_config(raw)
            read_tile(raw)
        except ArtifactError as error:
            refused += 1
            assert str(error).startswith("config.json: ")
            assert "; " in str(error), error
    assert refused > 500


def test_a_config_is_read_without_its_weights(folder: Path) -> None:
    only(folder)
    assert read_config(folder) == CONFIG
