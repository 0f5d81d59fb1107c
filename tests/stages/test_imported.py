"""A Hugging Face folder becomes a checkpoint, and everything that is wrong with it is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from configs.errors import ArtifactError, ConfigError, DataError, IngotError
from configs.imports import ImportSpec
from model.weights.files import load_pretrained, save_pretrained
from stages.artifacts import Checkpoint
from stages.conventions import read_conventions, read_end_tokens
from stages.hashing import Hashes
from stages.imported.face import reads
from stages.imported.loop import imported
from stages.tokens import load_tokenizer
from tests.conftest import workspace_at
from tests.references import random_model, random_tokens, tiny
from tests.stages.bundles import MODEL, Notebook, make_tokenizer

SPEC = tiny(vocab_size=MODEL.vocab_size)
"""Its vocabulary is that of the tokenizer."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model and its tokenizer, in FP8."""
    made = tmp_path / "theirs"
    save_pretrained(random_model(SPEC), made, dtype="float8")
    make_tokenizer(made / "tokenizer.json")
    return made


def take(folder: Path, out: Path) -> Checkpoint:
    """Run the stage in a slot of its own."""
    return imported(ImportSpec(folder=str(folder)), workspace_at(out, Notebook()))


def test_an_fp8_folder_becomes_a_float32_checkpoint_of_its_own_tokenizer(
    folder: Path, tmp_path: Path
) -> None:
    checkpoint = take(folder, tmp_path / "out")
    assert checkpoint.model == SPEC
    assert (checkpoint.step, checkpoint.sequences_seen, checkpoint.final_loss) == (0, 0, None)
    stored = load_file(checkpoint.path("model.safetensors"))
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert "quantization_config" not in json.loads(checkpoint.path("config.json").read_text())
    source = load_pretrained(folder)
    copy = load_pretrained(checkpoint.path())
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        assert torch.equal(copy(tokens), source(tokens))
    ours, theirs = (
        json.loads((where / "tokenizer.json").read_text()) for where in (checkpoint.path(), folder)
    )
    assert theirs["post_processor"] is None
    assert ours["post_processor"]["type"] == "TemplateProcessing"
    assert ours | {"post_processor": None} == theirs


def test_what_transformers_saved_in_bfloat16_is_taken_without_an_mtp_layer(tmp_path: Path) -> None:
    config = DeepseekV3Config(
        **SPEC.model_dump(exclude={"family", "engram", "rope_theta", "rope_scaling"}),
        num_key_value_heads=SPEC.num_attention_heads,
    )
    theirs = DeepseekV3ForCausalLM(config).bfloat16()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    make_tokenizer(tmp_path / "theirs" / "tokenizer.json")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    checkpoint = take(tmp_path / "theirs", tmp_path / "out")
    assert checkpoint.model.num_nextn_predict_layers == 0
    written = json.loads(checkpoint.path("config.json").read_text())
    assert written["num_nextn_predict_layers"] == 0
    head = load_pretrained(checkpoint.path()).lm_head.weight
    assert torch.equal(head, theirs.lm_head.weight.float())


def test_identity_is_what_the_files_hold_wherever_they_lie(folder: Path, tmp_path: Path) -> None:
    seen = reads(ImportSpec(folder=str(folder)), Hashes())
    assert list(seen) == ["config.json", "tokenizer.json", "model.safetensors"]
    assert seen["config.json"]["bytes"] == (folder / "config.json").stat().st_size
    shutil.copytree(folder, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "README.md").write_text("other words")
    assert reads(ImportSpec(folder=str(tmp_path / "elsewhere")), Hashes()) == seen
    weights = folder / "model.safetensors"
    body = bytearray(weights.read_bytes())
    body[-1] ^= 1
    weights.write_bytes(body)
    assert reads(ImportSpec(folder=str(folder)), Hashes()) != seen


def test_a_list_of_end_tokens_is_taken_if_end_of_text_is_among_them(
    folder: Path, tmp_path: Path
) -> None:
    with_field("eos_token_id", [1, 5])(folder)
    checkpoint = take(folder, tmp_path / "out")
    assert read_end_tokens(checkpoint.path()) == (1, 5)
    with_field("eos_token_id", [5, 7])(folder)
    with pytest.raises(ConfigError, match=r"eos_token_id = \[5, 7\], but documents are framed"):
        take(folder, tmp_path / "again")


def test_what_was_brought_enters_identity_too(folder: Path) -> None:
    before = reads(ImportSpec(folder=str(folder)), Hashes())
    (folder / "generation_config.json").write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ bos_token }}")
    after = reads(ImportSpec(folder=str(folder)), Hashes())
    assert set(after) - set(before) == {
        "generation_config.json",
        "additional_chat_templates/tools.jinja",
    }


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def with_field(name: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))

    return change


def with_tokenizer(tokenizer: Tokenizer) -> Callable[[Path], None]:
    return lambda folder: tokenizer.save(str(folder / "tokenizer.json"))


def with_value(name: str, value: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name].view(-1)[3] = value
        save_file(tensors, folder / "model.safetensors")

    return change


def plain_tokenizer() -> Tokenizer:
    return Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))


def large_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={f"t{i}": i for i in range(500)}, merges=[]))
    tokenizer.add_special_tokens(["t0", "t1"])
    return tokenizer


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (shutil.rmtree, ConfigError, "no such folder; name one that holds config.json"),
        (without("tokenizer.json"), ConfigError, "holds no tokenizer.json; put the one"),
        (without("config.json"), ConfigError, "holds no config.json"),
        (without("model.safetensors"), ArtifactError, "model.safetensors: no such file"),
        (
            with_field("model_type", "llama"),
            ArtifactError,
            "/theirs: config.json: model_type = 'llama' is unknown",
        ),
        (
            with_field("num_hidden_layers", 3),
            ArtifactError,
            "is in the checkpoint but not in the model that config.json describes; take the config",
        ),
        (
            with_value("model.norm.weight", float("nan")),
            ArtifactError,
            "/theirs: model.norm.weight holds values that are not finite",
        ),
        (
            with_value("lm_head.weight", float("-inf")),
            ArtifactError,
            "/theirs: lm_head.weight holds values that are not finite",
        ),
        (
            with_field("eos_token_id", [1, 384]),
            ArtifactError,
            "config.json: eos_token_id = [1, 384] holds 384, which is no token id below vocab_size",
        ),
        (with_field("eos_token_id", 7), ConfigError, "eos_token_id = 7, but documents are framed"),
        (with_tokenizer(plain_tokenizer()), DataError, "token 0 is 'a', which is not special"),
        (
            with_tokenizer(large_tokenizer()),
            ArtifactError,
            "has 500 tokens, but vocab_size = 384 in its config.json",
        ),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{"),
            DataError,
            "tokenizer.json: not a tokenizer",
        ),
    ],
)
def test_a_folder_that_cannot_be_started_from_is_refused(
    folder: Path,
    tmp_path: Path,
    change: Callable[[Path], None],
    error: type[IngotError],
    message: str,
) -> None:
    change(folder)
    with pytest.raises(error) as caught:
        reads(ImportSpec(folder=str(folder)), Hashes())
        take(folder, tmp_path / "out")
    assert message in str(caught.value)
    assert str(folder) in str(caught.value) or "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("file", "body", "said"),
    [
        ("tokenizer_config.json", "{", "cannot be read as JSON"),
        ("tokenizer_config.json", "[" * 100_000, "cannot be read as JSON"),
        ("tokenizer_config.json", '{"a": "\\ud800"}', "cannot be read as JSON"),
        ("tokenizer_config.json", "[]", "holds a list, not a table"),
        ("tokenizer_config.json", '{"chat_template": ["x"]}', "chat_template = .* is neither a"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template = '5' is neither a"),
        ("tokenizer_config.json", '{"chat_template": "{%"}', "chat_template is no template, at l"),
        ("tokenizer_config.json", '{"pad_token": 5}', "pad_token = 5 is no token"),
        ("tokenizer_config.json", '{"extra_special_tokens": [5]}', r"tokens\[0\] = 5 is no token"),
        ("tokenizer_config.json", '{"extra_special_tokens": 5}', "tokens = 5 is no token"),
        ("tokenizer_config.json", '{"split_special_tokens": "yes"}', "'yes' is neither true nor"),
        ("chat_template.jinja", b"\xff", "cannot be read as text in UTF-8"),
        ("chat_template.jinja", "{% for %}", "is no template, at line 1"),
        ("additional_chat_templates/tool.jinja", b"\xff", "cannot be read as text in UTF-8"),
        ("generation_config.json", "{", "cannot be read as JSON"),
        ("generation_config.json", '{"temperature": "hot"}', "temperature = 'hot' is no number"),
        ("generation_config.json", '{"eos_token_id": [1, -1]}', "holds -1, which is no token id"),
        ("generation_config.json", '{"eos_token_id": 384}', "no token id below vocab_size = 384"),
        ("generation_config.json", '{"top_p": 3}', "top_p = 3.0, but it must be above 0"),
    ],
)
def test_what_is_wrong_with_how_it_is_spoken_to_is_said_before_its_weights_are_read(
    folder: Path, tmp_path: Path, file: str, body: str | bytes, said: str
) -> None:
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(body if isinstance(body, bytes) else body.encode())
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match=f"/theirs/{file}.*{said}"):
        take(folder, tmp_path / "out")


@pytest.mark.parametrize("added", [None, [], {"x": 1}, {"0": "a"}, {"0": {"content": 5}}, 5, "x"])
def test_odd_lists_of_what_the_tokenizer_has_are_of_no_consequence(
    folder: Path, tmp_path: Path, added: object
) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    checkpoint = take(folder, tmp_path / "out")
    tokenizer = load_tokenizer(checkpoint.path("tokenizer.json"))
    found = read_conventions(checkpoint.path(), tokenizer, max_tokens=64)
    assert "added_tokens_decoder" not in found.tokenizer


def test_a_template_that_refuses_a_question_is_said_at_import(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('tools are needed') }}")
    work = workspace_at(tmp_path / "out", notebook := Notebook())
    imported(ImportSpec(folder=str(folder)), work)
    assert any("refuses a conversation (tools are needed)" in note for note in notebook.notes)
