"""What an imported model brought goes with it through every stage into every bundle."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from configs.delivery import ExportConfig, ExportSpec
from configs.errors import ArtifactError
from configs.imports import ImportSpec
from model.weights.files import save_pretrained
from stages.artifacts import Bundle, Checkpoint
from stages.conventions import (
    PLAIN_TEMPLATE,
    Conventions,
    carry,
    read_conventions,
    read_end_tokens,
)
from stages.export.bundle import export
from stages.export.client import Client
from stages.imported.loop import imported
from stages.manifest import MANIFEST, Manifest
from stages.tokens import load_tokenizer, vocabulary_size
from tests.conftest import Recorder, workspace_at
from tests.references import random_model
from tests.stages.bundles import BRIEF, LOOSE, MODEL, chat_ids, lines, make_corpus, make_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<｜{{ m.role }}｜>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<｜assistant｜>{% endif %}"
)
TOKENIZER_CONFIG: dict[str, Any] = {
    "add_bos_token": False,
    "add_eos_token": True,
    "legacy": True,
    "tokenizer_class": "LlamaTokenizerFast",
    "auto_map": {"AutoTokenizer": ["tokenization_theirs.Theirs", None]},
    "bos_token": {"__type": "AddedToken", "content": "<|begin_of_text|>", "special": True},
    "eos_token": "<|end_of_text|>",
    "chat_template": TEMPLATE,
    "model_max_length": 48,
    "added_tokens_decoder": {
        "0": {"content": "<|begin_of_text|>", "special": True},
        "900": {"content": "<|beyond|>", "special": True},
    },
    "extra_special_tokens": ["<|end_of_text|>", "<|unknown|>"],
}
GENERATION: dict[str, Any] = {
    "bos_token_id": 0,
    "eos_token_id": [1, 5],
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.95,
}


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A chat model's folder, as people publish them."""
    folder = tmp_path / "theirs"
    save_pretrained(random_model(MODEL), folder)
    make_tokenizer(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    (folder / "modeling_theirs.py").write_text("raise SystemExit")
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "README.md").write_text("A model.")
    return folder


def change(folder: Path, file: str, **fields: Any) -> None:
    record = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(record | fields))


def conventions_of(folder: Path) -> Conventions:
    """Those that export would write for the checkpoint in `folder`."""
    return read_conventions(folder, load_tokenizer(folder / "tokenizer.json"), max_tokens=64)


def served_by(conventions: Conventions, checkpoint: Path, folder: Path) -> Path:
    """What a client reads of a variant, but for the weights."""
    folder.mkdir()
    for name, body in (
        ("tokenizer.json", json.loads((checkpoint / "tokenizer.json").read_text())),
        ("tokenizer_config.json", conventions.tokenizer),
        ("generation_config.json", conventions.generation),
    ):
        (folder / name).write_text(json.dumps(body))
    for name, template in conventions.templates.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(template)
    return folder


def take(folder: Path, out: Path, recorder: Recorder) -> Checkpoint:
    """Import the folder, as an artifact with a manifest."""
    work = workspace_at(out, recorder)
    checkpoint = imported(ImportSpec(folder=str(folder)), work)
    manifest = Manifest(
        address=Path(work.out).relative_to(out).as_posix(),
        kind=checkpoint.kind,
        stage="stages.imported:imported",
        revision=1,
        fingerprint="f" * 64,
        identity={},
        inputs={},
        facts=checkpoint.facts(),
        files={},
        content="c" * 64,
        provenance={},
    )
    (out / MANIFEST).write_text(manifest.model_dump_json())
    return checkpoint


def bundle_of(checkpoint: Checkpoint, root: Path, target: str = "cuda") -> Bundle:
    settings = ExportConfig.model_validate(BRIEF | LOOSE)
    spec = ExportSpec.model_validate({"seed": 1, "target": target, "export": settings})
    work = workspace_at(root / f"bundle-{target}", Recorder())
    return export(spec, work, corpus=make_corpus(root / "corpus"), checkpoint=checkpoint)


def test_template_sampling_and_end_tokens_reach_every_bundle(
    theirs: Path, tmp_path: Path, recorder: Recorder
) -> None:
    checkpoint = take(theirs, tmp_path / "import", recorder)
    trained = tmp_path / "trained"  # what post-training carries on
    trained.mkdir()
    carry(checkpoint.path(), trained)
    assert read_end_tokens(trained) == (1, 5)
    for target, variants in (("cuda", ("bf16", "fp8")), ("ascend", ("bf16", "w8a8"))):
        bundle = bundle_of(checkpoint, tmp_path, target)
        for variant in variants:
            folder = bundle.path(variant)
            config = json.loads((folder / "config.json").read_text())
            assert config["eos_token_id"] == [1, 5]
            generation = GenerationConfig.from_pretrained(folder)
            assert generation.eos_token_id == [1, 5]
            assert (generation.temperature, generation.top_p) == (0.6, 0.95)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            assert tokenizer.chat_template == TEMPLATE
            assert tokenizer.model_max_length == 48
            card = (folder / "README.md").read_text()
            assert "`tokenizer_config.json`, `generation_config.json`" in card
            assert "modeling_theirs.py" in card
            assert "Tokens that end an answer: 1, 5." in card
    said = "\n".join(recorder.notes)
    assert "not carried through: modeling_theirs.py, preprocessor_config.json" in said


def test_whatever_its_config_says_a_bundle_encodes_as_training_did(
    theirs: Path, tmp_path: Path, recorder: Recorder
) -> None:
    checkpoint = take(theirs, tmp_path / "import", recorder)
    folder = bundle_of(checkpoint, tmp_path).path("bf16")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(theirs / "tokenizer.json")
    text = [line for line in lines() if "<|" not in line]
    expected = [[0, *one.ids] for one in ours.encode_batch(text, add_special_tokens=False)]
    assert tokenizer(text)["input_ids"] == expected
    assert len(tokenizer) == vocabulary_size(ours)
    chat = [{"role": "user", "content": "1+1="}]
    found = chat_ids(tokenizer, chat, add_generation_prompt=True)
    assert found == Client(folder).encode_chat(chat)
    assert found[0] == 0


def test_a_template_in_a_file_of_its_own_stays_one(
    theirs: Path, tmp_path: Path, recorder: Recorder
) -> None:
    without = {k: v for k, v in TOKENIZER_CONFIG.items() if k != "chat_template"}
    (theirs / "tokenizer_config.json").write_text(json.dumps(without))
    (theirs / "chat_template.jinja").write_text(TEMPLATE)
    (theirs / "additional_chat_templates").mkdir()
    (theirs / "additional_chat_templates" / "tool_use.jinja").write_text("{{ bos_token }}tools")
    checkpoint = take(theirs, tmp_path / "import", recorder)
    folder = bundle_of(checkpoint, tmp_path).path("bf16")
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())
    assert AutoTokenizer.from_pretrained(folder).chat_template == {
        "default": TEMPLATE,
        "tool_use": "{{ bos_token }}tools",
    }


def test_a_model_that_brought_no_template_gets_the_plain_one(
    theirs: Path, tmp_path: Path, recorder: Recorder
) -> None:
    for name in ("tokenizer_config.json", "generation_config.json"):
        (theirs / name).unlink()
    checkpoint = take(theirs, tmp_path / "import", recorder)
    found = conventions_of(checkpoint.path())
    assert found.tokenizer["chat_template"] == PLAIN_TEMPLATE
    assert "temperature" not in found.generation
    assert found.end_tokens == (1,)


def test_servers_draw_from_a_model_made_here_as_it_was_trained(tmp_path: Path) -> None:
    """What was trained is the distribution itself, not its likeliest token, nor a sharper one."""
    checkpoint = tmp_path / "made"
    save_pretrained(random_model(MODEL), checkpoint)
    make_tokenizer(checkpoint / "tokenizer.json")
    folder = served_by(conventions_of(checkpoint), checkpoint, tmp_path / "served")
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.do_sample is True
    assert generation.temperature == 1.0


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ([1, 5], None, (1, 5)),
        (1, [1, 7], (1, 7)),
        ([5, 1], 1, (1, 5)),
        (None, None, (1,)),
        (1, 5, (1, 5)),
    ],
)
def test_answers_end_with_any_token_that_either_file_names(
    tmp_path: Path, config: Any, generation: Any, expected: tuple[int, ...]
) -> None:
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        if value is not None:
            (tmp_path / name).write_text(json.dumps({"eos_token_id": value}))
    assert read_end_tokens(tmp_path) == expected


@pytest.mark.parametrize("value", ["</s>", [1, "x"], [True], {"a": 1}])
def test_an_end_token_that_is_no_id_is_named(tmp_path: Path, value: Any) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ArtifactError, match=r"generation_config\.json: eos_token_id = .* no token"):
        read_end_tokens(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_a_damaged_file_beside_the_model_is_named(
    theirs: Path, tmp_path: Path, recorder: Recorder, name: str
) -> None:
    (theirs / name).write_text("{")
    with pytest.raises(ArtifactError, match=f"theirs/{name}: cannot be read as JSON"):
        take(theirs, tmp_path / "import", recorder)


def test_the_settings_of_its_last_user_are_switched_off_and_said(
    theirs: Path, tmp_path: Path, recorder: Recorder
) -> None:
    record = json.loads((theirs / "tokenizer.json").read_text())
    record["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "<|end_of_text|>",
    }
    record["added_tokens"].append(
        {
            **record["added_tokens"][0],
            "id": MODEL.vocab_size,
            "content": "<|extra|>",
        }
    )
    (theirs / "tokenizer.json").write_text(json.dumps(record))
    checkpoint = take(theirs, tmp_path / "import", recorder)
    encoded = load_tokenizer(checkpoint.path("tokenizer.json")).encode(
        "1", add_special_tokens=False
    )
    assert len(encoded.ids) == 1
    said = "\n".join(recorder.notes)
    assert "tokenizer.json: its padding is switched off" in said
    assert "its added tokens '<|extra|>' are dropped" in said
    card = bundle_of(checkpoint, tmp_path).path("bf16", "README.md").read_text()
    assert "its padding is switched off" in card


def test_tokens_that_the_model_has_not_do_not_come_back_through_another_file(
    theirs: Path, tmp_path: Path, recorder: Recorder
) -> None:
    record = json.loads((theirs / "tokenizer.json").read_text())
    like = record["added_tokens"][0]
    beyond = [like | {"id": MODEL.vocab_size, "content": "[PAD]"}]
    change(theirs, "tokenizer.json", added_tokens=[*record["added_tokens"], *beyond])
    fields = {
        "pad_token": "[PAD]",
        "unk_token": {"__type": "AddedToken", "content": "[UNK]", "special": True},
        "mask_token": "1",  # a word like others
        "sep_token": None,
        "image_token": "[IMG]",
        "additional_special_tokens": ["<|end_of_text|>", {"content": "[A]"}],
        "extra_special_tokens": {"ear": "[B]", "eye": {"content": "<|end_of_text|>"}},
    }
    change(theirs, "tokenizer_config.json", **fields)
    ids = {"pad_token_id": MODEL.vocab_size, "decoder_start_token_id": [0, -1], "bos_token_id": "0"}
    change(theirs, "generation_config.json", **ids)
    checkpoint = take(theirs, tmp_path / "import", recorder)
    folder = served_by(conventions_of(checkpoint.path()), checkpoint.path(), tmp_path / "served")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(checkpoint.path("tokenizer.json"))
    assert len(tokenizer) == vocabulary_size(ours)
    assert tokenizer.pad_token_id == 1
    ends = dict.fromkeys(("eos_token", "pad_token", "eye"), "<|end_of_text|>")
    assert tokenizer.special_tokens_map == {"bos_token": "<|begin_of_text|>"} | ends
    for text in ("x11y", "a [PAD] b", "[A][B][IMG][UNK]"):
        expected = [0, *ours.encode(text, add_special_tokens=False).ids]
        assert tokenizer(text)["input_ids"] == expected
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.pad_token_id, generation.bos_token_id) == (1, 0)
    assert generation.decoder_start_token_id is None
    said = "\n".join(recorder.notes)
    for one in (
        *("pad_token '[PAD]'", "unk_token '[UNK]'", "mask_token '1'", "image_token '[IMG]'"),
        *("additional_special_tokens[1] '[A]'", "extra_special_tokens['ear'] '[B]'"),
        "added_tokens_decoder['900'] '<|beyond|>'",
    ):
        assert one in said
    assert "pad_token_id = 384 is left out: it is no token id below vocab_size = 384" in said
    assert "decoder_start_token_id = [0, -1] is left out" in said


def test_what_servers_do_besides_is_named_at_import_and_in_the_card(
    theirs: Path, tmp_path: Path, recorder: Recorder
) -> None:
    change(theirs, "generation_config.json", repetition_penalty=1.1, min_p=0.05, typical_p=1.0)
    change(theirs, "tokenizer_config.json", pad_token="[PAD]")
    checkpoint = take(theirs, tmp_path / "import", recorder)
    line = "generation_config.json: min_p = 0.05, repetition_penalty = 1.1 changes what servers"
    assert any(line in note for note in recorder.notes)
    card = bundle_of(checkpoint, tmp_path).path("bf16", "README.md").read_text()
    assert line[1:] in card
    assert "pad_token '[PAD]'" in card


@pytest.mark.parametrize(
    ("where", "named"),
    [
        ("list", [{"name": "tool", "template": "tools"}]),
        ("folder", {"tool": "tools"}),
        ("nowhere", None),
        ("nowhere", []),
        ("nowhere", ""),
    ],
)
def test_where_no_template_is_the_default_the_plain_one_is(
    theirs: Path, tmp_path: Path, recorder: Recorder, where: str, named: Any
) -> None:
    change(theirs, "tokenizer_config.json", chat_template=None if where == "folder" else named)
    if where == "folder":
        (theirs / "additional_chat_templates").mkdir()
        (theirs / "additional_chat_templates" / "tool.jinja").write_text("tools")
    checkpoint = take(theirs, tmp_path / "import", recorder)
    folder = served_by(conventions_of(checkpoint.path()), checkpoint.path(), tmp_path / "served")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    several = {"default": PLAIN_TEMPLATE, "tool": "tools"}
    assert tokenizer.chat_template == (PLAIN_TEMPLATE if where == "nowhere" else several)
    chat = [{"role": "user", "content": "1+1="}]
    assert Client(folder).encode_chat(chat) == chat_ids(tokenizer, chat)
    assert ("the plain one is" in "\n".join(recorder.notes)) == (where != "nowhere")
