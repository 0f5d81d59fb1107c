"""A variant is asked through its own files, and what is wrong with those is found."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, GenerationConfig

from cluster.generation import Sampling
from configs.delivery import ExportConfig
from configs.errors import ArtifactError, ExportError
from model import decode
from model.transformer import Transformer
from model.weights.files import load_pretrained
from stages.artifacts import Asked, Bundle, Checkpoint, Corpus
from stages.conventions import PLAIN_TEMPLATE, Conventions, read_conventions
from stages.export import served
from stages.export.client import Client
from stages.export.conversations import SourceChat, prove_conversations
from stages.export.greedy import Continuations
from stages.tokens import load_tokenizer, vocabulary_size
from tests.stages.bundles import BRIEF, LOOSE, chat_ids, files_of, make_bundle, make_corpus

OPEN = LOOSE
CHATS: dict[str, list[dict[str, str]]] = {
    "question": [{"role": "user", "content": "12+34="}],
    "turns": [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "naïve 日本\n"},
    ],
}
TEMPLATES = {
    "plain": PLAIN_TEMPLATE,
    "roles": (
        "{{- bos_token }}\n{%- for m in messages %}\n"
        "    {%- if m.role == 'system' %}{% continue %}{% endif %}\n"
        "<{{ m['role'] }}>{{ m['content'] | trim }}\n{% endfor %}\n"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    ),
    "json": "{{ bos_token }}{{ messages | tojson }}{% set x = namespace(n=0) %}{{ x.n }}",
}
LOST = {
    "assistant": "{{ bos_token }}{% for m in messages %}{% if m.role != 'assistant' %}"
    "{{ m.content }}{% endif %}{% endfor %}",
    "first": "{{ bos_token }}{{ messages[-1].content }}",
    "system": "{{ bos_token }}{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}"
    "{% if m.role == 'assistant' and not loop.last %}{{ eos_token }}{{ bos_token }}{% endif %}"
    "{% endif %}{% endfor %}",
    "order": "{{ bos_token }}{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
    "middle": "{{ bos_token }}{% for m in messages %}{% if loop.index != 3 or loop.length == 3 %}"
    "{{ m.content }}{% if m.role == 'assistant' and not loop.last %}{{ eos_token }}{{ bos_token }}"
    "{% endif %}{% endif %}{% endfor %}",
}
"""Templates that leave out a turn, or the order."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle, Checkpoint]:
    root = tmp_path_factory.mktemp("served")
    bundle, checkpoint = make_bundle(root, "cuda", **OPEN)
    return root, bundle, checkpoint


@pytest.fixture
def folder(made: tuple[Path, Bundle, Checkpoint], tmp_path: Path) -> Path:
    """A copy of the BF16 variant that a test may change."""
    copy = tmp_path / "bf16"
    shutil.copytree(made[1].path("bf16"), copy)
    return copy


def change(folder: Path, file: str, **fields: Any) -> None:
    path = folder / file
    record = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in record.items() if v is not None}))


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("as_file", [False, True])
def test_conversations_become_the_ids_that_transformers_makes_of_them(
    folder: Path, chat: str, template: str, as_file: bool
) -> None:
    if as_file:
        (folder / "chat_template.jinja").write_text(TEMPLATES[template])
    else:
        change(folder, "tokenizer_config.json", chat_template=TEMPLATES[template])
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = chat_ids(theirs, CHATS[chat], add_generation_prompt=True)
    assert Client(folder).encode_chat(CHATS[chat]) == expected


@pytest.mark.parametrize("split", [False, True])
def test_text_becomes_the_ids_that_transformers_makes_of_it(folder: Path, split: bool) -> None:
    change(folder, "tokenizer_config.json", split_special_tokens=split)
    theirs = AutoTokenizer.from_pretrained(folder)
    client = Client(folder)
    for text in ("12+34=", "a <|end_of_text|> b", "Straße 🙂", ""):
        assert client.encode(text) == theirs(text)["input_ids"]


@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        ({}, Sampling(9, 1.0, (1,))),
        ({"temperature": 0.6, "top_p": 0.95}, Sampling(9, 0.6, (1,), None, 0.95)),
        ({"do_sample": False, "temperature": 0.6}, Sampling(9, 0.0, (1,))),
        ({"do_sample": None}, Sampling(9, 0.0, (1,))),
        ({"eos_token_id": [1, 5], "top_k": 20}, Sampling(9, 1.0, (1, 5), 20, 1.0)),
        ({"top_k": -1}, Sampling(9, 1.0, (1,))),
    ],
)
def test_sampling_is_what_the_generation_config_says(
    folder: Path, fields: dict[str, Any], sampling: Sampling
) -> None:
    change(folder, "generation_config.json", **fields)
    assert Client(folder).sampling(9) == sampling
    theirs = GenerationConfig.from_pretrained(folder)
    assert bool(theirs.do_sample) == (sampling.temperature > 0)


def test_a_template_that_refuses_a_question_is_an_error_with_its_own_words(folder: Path) -> None:
    refusing = "{{ raise_exception('a system prompt is needed') }}"
    change(folder, "tokenizer_config.json", chat_template=refusing)
    with pytest.raises(ExportError, match=r"refuses .*\(a system prompt is needed\); mend"):
        Client(folder).encode_chat(CHATS["question"])


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}"],
)
def test_a_strangers_template_reaches_nothing(folder: Path, template: str) -> None:
    change(folder, "tokenizer_config.json", chat_template=template)
    with pytest.raises(ExportError, match="the chat template refuses"):
        Client(folder).encode_chat(CHATS["question"])


def test_what_is_no_template_is_named_with_its_line(folder: Path) -> None:
    change(folder, "tokenizer_config.json", chat_template="{{ bos_token }}\n{% for %}")
    with pytest.raises(ArtifactError, match="no template, at line 2"):
        Client(folder)
    change(folder, "tokenizer_config.json", chat_template=None)
    with pytest.raises(
        ArtifactError, match="chat_template holds no default, and there is no chat_temp"
    ):
        Client(folder)


def test_of_several_named_templates_the_default_counts(folder: Path) -> None:
    named = [
        {"name": "tool_use", "template": "{{ raise_exception('no') }}"},
        {"name": "default", "template": PLAIN_TEMPLATE},
    ]
    change(folder, "tokenizer_config.json", chat_template=named)
    assert Client(folder).encode_chat(CHATS["question"])[0] == 0


def examination(
    made: tuple[Path, Bundle, Checkpoint], tmp_path: Path, source: Transformer, **settings: Any
) -> served.Examination:
    corpus: Corpus = make_corpus(tmp_path / "corpus")
    rows = np.array([[0, 40, 41, 42, 1, 0, 50, 51, 1, 0], [60, 1, 0, 70, 71, 72, 1, 0, 80, 81]])
    config = ExportConfig(**(BRIEF | settings))
    files = files_of(made[0] / "checkpoint")
    return served.Examination(corpus, files, source, (1,), rows, config, seed=1)


def test_the_texts_of_rows_are_their_documents_and_what_they_have_of_others(
    made: tuple[Path, Bundle, Checkpoint], tmp_path: Path
) -> None:
    source = load_pretrained(made[2].path())
    exam = examination(made, tmp_path, source)
    decode_ids = load_tokenizer(made[2].path("tokenizer.json")).decode
    pieces = ([40, 41, 42], [50, 51], [60], [70, 71, 72], [80, 81])
    assert exam.texts[3:] == [decode_ids(ids) for ids in pieces]
    assert exam.longest == [max(map(decode_ids, row), key=len) for row in (pieces[:2], pieces[2:])]
    assert [prompt.token_ids[0] for prompt in exam.prompts] == [0, 0, 0]


def test_a_tokenizer_that_does_not_begin_texts_fails_the_export(
    made: tuple[Path, Bundle, Checkpoint], folder: Path, tmp_path: Path
) -> None:
    exam = examination(made, tmp_path, load_pretrained(made[2].path()))
    served.prove_text(Client(folder), exam, "bf16")
    change(folder, "tokenizer.json", post_processor=None)
    with pytest.raises(ExportError, match=r"encodes '\d\+1=' as \[\d+.*but training as \[0, "):
        served.prove_text(Client(folder), exam, "bf16")


def test_a_tokenizer_with_other_merges_fails_the_export(
    made: tuple[Path, Bundle, Checkpoint], folder: Path, tmp_path: Path
) -> None:
    exam = examination(made, tmp_path, load_pretrained(made[2].path()))
    record = json.loads((folder / "tokenizer.json").read_text())
    record["model"]["merges"] = record["model"]["merges"][:-80]
    change(folder, "tokenizer.json", model=record["model"])
    exam.texts.extend(["def Straße(v12) # naïve 日本 x+y= return"])
    with pytest.raises(ExportError, match="from token"):
        served.prove_text(Client(folder), exam, "bf16")


def test_text_that_spells_a_special_token_is_proved_as_clients_are_told_to_ask_for_it(
    made: tuple[Path, Bundle, Checkpoint], folder: Path, tmp_path: Path
) -> None:
    exam = examination(made, tmp_path, load_pretrained(made[2].path()))
    text = "Docs begin with <|begin_of_text|> and end with <|end_of_text|>."
    exam.texts[:] = [text]
    served.prove_text(Client(folder), exam, "bf16")
    theirs = AutoTokenizer.from_pretrained(folder)
    asked = theirs(text, split_special_tokens=True)["input_ids"]
    assert Client(folder).encode(text, split_special_tokens=True) == asked == list(exam.ids(text))
    assert Client(folder).encode(text) == theirs(text, split_special_tokens=False)["input_ids"]
    change(folder, "tokenizer.json", post_processor=None)
    with pytest.raises(ExportError, match=r"encodes 'Docs begin with .* from token 0 on"):
        served.prove_text(Client(folder), exam, "bf16")


def test_a_control_token_that_is_not_called_special_proves_nothing_against_a_tokenizer(
    made: tuple[Path, Bundle, Checkpoint], folder: Path, tmp_path: Path
) -> None:
    record = json.loads((folder / "tokenizer.json").read_text())
    number = vocabulary_size(load_tokenizer(folder / "tokenizer.json"))
    user = record["added_tokens"][1] | {"id": number, "content": "<｜User｜>", "special": False}
    change(folder, "tokenizer.json", added_tokens=[*record["added_tokens"], user])
    exam = examination(made, tmp_path, load_pretrained(made[2].path()))
    exam.tokenizer = load_tokenizer(folder / "tokenizer.json")
    text = "a<｜User｜>b"
    theirs = AutoTokenizer.from_pretrained(folder)
    assert number in theirs(text, split_special_tokens=True)["input_ids"]
    assert number not in exam.ids(text)
    exam.texts.append(text)
    served.prove_text(Client(folder), exam, "bf16")


def knowing(monkeypatch: pytest.MonkeyPatch, tokenizer_json: Path, wrong: Sequence[str]) -> None:
    """Have every model add one, but for what is asked in `wrong`; sampled answers are all wrong."""
    tokenizer = load_tokenizer(tokenizer_json)

    def sample(model: Any, prompts: Any, *, drawing: Any, stop_tokens: Any, **_: Any) -> Any:
        answers = []
        for prompt in prompts:
            text = tokenizer.decode([token for token in prompt if token])
            number = int(text.partition("+")[0])
            right = drawing.temperature == 0 and text not in wrong and prompt[0] == 0
            reply = str(number + 1 if right else number + 2)
            ids = tokenizer.encode(reply, add_special_tokens=False).ids
            answers.append(decode.Sample([*ids, max(stop_tokens)]))
        return answers

    monkeypatch.setattr(decode, "sample", sample)


def test_answers_are_counted_through_the_variants_own_files(
    made: tuple[Path, Bundle, Checkpoint],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load_pretrained(made[2].path())
    exam = examination(made, tmp_path, model, problems=10)
    knowing(monkeypatch, made[2].path("tokenizer.json"), wrong=[])
    assert all(one.greedy_correct for one in exam.answered)
    found = served.ask_variant(Client(folder), model, exam)
    assert found == Asked(
        problems=10,
        source_greedy_accuracy=1.0,
        greedy_accuracy=1.0,
        greedy_verdicts_apart=0,
        chat_greedy_accuracy=1.0,
        pass_at_1=0.0,
        chat_pass_at_1=0.0,
    )
    served.require(found, "bf16", exam.config)
    # Without begin-of-text the fake model is wrong, as a real one mostly is.
    change(folder, "tokenizer.json", post_processor=None)
    found = served.ask_variant(Client(folder), model, exam)
    assert found is not None
    assert (found.greedy_accuracy, found.chat_greedy_accuracy) == (0.0, 1.0)
    assert found.greedy_verdicts_apart == 10
    with pytest.raises(ExportError, match=r"of 10 held-out problems 0\.0% are right greedily"):
        served.require(found, "bf16", exam.config)


@pytest.mark.parametrize(
    ("problems", "limit", "allowed"), [(8, 0.05, 1), (200, 0.05, 10), (140, 0.05, 7), (8, 0.0, 0)]
)
def test_a_share_of_few_problems_counts_as_a_whole_one(
    problems: int, limit: float, allowed: int
) -> None:
    config = ExportConfig(max_accuracy_loss=limit)

    def lost(answers: int) -> Asked:
        right = problems - answers
        return Asked(
            problems=problems,
            source_greedy_accuracy=1.0,
            greedy_accuracy=right / problems,
            greedy_verdicts_apart=answers,
            chat_greedy_accuracy=1.0,
            pass_at_1=1.0,
            chat_pass_at_1=1.0,
        )

    served.require(lost(allowed), "bf16", config)
    with pytest.raises(ExportError, match="raise that setting"):
        served.require(lost(allowed + 1), "bf16", config)


def test_a_chat_template_without_begin_of_text_shows_in_the_chats_figure(
    made: tuple[Path, Bundle, Checkpoint],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load_pretrained(made[2].path())
    exam = examination(made, tmp_path, model, problems=10)
    knowing(monkeypatch, made[2].path("tokenizer.json"), wrong=["3+1="])
    bare = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    change(folder, "tokenizer_config.json", chat_template=bare)
    found = served.ask_variant(Client(folder), model, exam)
    assert found is not None
    assert (found.greedy_accuracy, found.chat_greedy_accuracy) == (0.9, 0.0)


def test_every_end_token_of_the_generation_config_ends_an_answer(
    made: tuple[Path, Bundle, Checkpoint],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load_pretrained(made[2].path())
    exam = examination(made, tmp_path, model, problems=10)
    knowing(monkeypatch, made[2].path("tokenizer.json"), wrong=[])
    change(folder, "generation_config.json", eos_token_id=[1, 5])
    found = served.ask_variant(Client(folder), model, exam)
    assert found is not None
    assert found.greedy_accuracy == 1.0


def test_going_on_alike_is_counted_up_to_the_first_token_that_differs(
    made: tuple[Path, Bundle, Checkpoint], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, variant = (load_pretrained(made[2].path()) for _ in range(2))
    answers = {
        id(source): [[5, 6, 7, 8], [5, 6, 1], [5, 6, 7, 8]],
        id(variant): [[5, 6, 9, 8], [5, 6, 1], [9, 6, 7, 8]],
    }
    seen: dict[int, list[list[int]]] = {}

    def sample(model: Any, prompts: Any, **how: Any) -> Any:
        assert how["drawing"].temperature == 0
        assert (how["max_new_tokens"], how["stop_tokens"]) == (4, (1,))
        seen[id(model)] = prompts
        return [decode.Sample(ids) for ids in answers[id(model)]]

    monkeypatch.setattr(decode, "sample", sample)
    chat = SourceChat(made[2].path(), conventions_of(made[2]))
    texts = ["12+34=46", "x", "def f(v1):\n", "Straße 日本" * 3]
    continued = Continuations(texts, source, chat, Sampling(4, 0.0, (1,)))
    assert continued.agreement(Client(folder), variant) == (2 + 3 + 0) / (4 + 3 + 4)
    # Texts go through the variant's own files, the first half of each: one letter has none.
    ids = load_tokenizer(folder / "tokenizer.json").encode("12+3", add_special_tokens=False).ids
    assert seen[id(variant)][0] == seen[id(source)][0] == [0, *ids]
    assert len(seen[id(variant)]) == 3
    assert (
        Continuations(["x"], source, chat, Sampling(4, 0.0, (1,))).agreement(
            Client(folder), variant
        )
        is None
    )


def conventions_of(checkpoint: Checkpoint) -> Conventions:
    tokenizer = load_tokenizer(checkpoint.path("tokenizer.json"))
    return read_conventions(checkpoint.path(), tokenizer, max_tokens=64)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (LOST["assistant"], r"loses turn 2 of 3, 'It is 46\.' of the role 'assistant'"),
        (LOST["first"], r"loses turn 1 of 3, 'What is 12 \+ 34\?' of the role 'user'"),
        (LOST["system"], r"loses turn 1 of 4, 'Answer with sums only\.' of the role 'system'"),
        (LOST["order"], r"loses turn 2 of 3"),
        (LOST["middle"], r"loses turn 3 of 5, 'And 5 \+ 5\?' of the role 'user'"),
        (PLAIN_TEMPLATE + "!", r"makes '.*34\?!' of a conversation of 1 turns, where the source's"),
        ("{{ 1 / 0 }}", r"the chat template refuses a conversation \(ZeroDivisionError"),
    ],
)
@pytest.mark.parametrize("as_file", [False, True])
def test_a_template_that_loses_a_turn_is_named_with_the_turn(
    made: tuple[Path, Bundle, Checkpoint], folder: Path, template: str, said: str, as_file: bool
) -> None:
    chat = SourceChat(made[2].path(), conventions_of(made[2]))
    prove_conversations(Client(folder), chat, "bf16")
    if as_file:
        (folder / "chat_template.jinja").write_text(template)
        place = r"chat_template\.jinja"
    else:
        change(folder, "tokenizer_config.json", chat_template=template)
        place = r"tokenizer_config\.json: chat_template"
    with pytest.raises(ExportError, match=rf"{place}: .*{said}"):
        prove_conversations(Client(folder), chat, "bf16")


@pytest.mark.parametrize(
    ("template", "lost"),
    [
        (TEMPLATES["roles"], None),  # leaves out what a system says, as its maker meant it
        (LOST["assistant"], "turn 2 of 3"),
        ("{{ raise_exception('no') if messages[0].role == 'system' }}" + PLAIN_TEMPLATE, None),
        ("{{ raise_exception('never') }}", None),
    ],
)
def test_of_a_brought_template_only_what_users_and_the_model_say_must_be_there(
    made: tuple[Path, Bundle, Checkpoint],
    folder: Path,
    tmp_path: Path,
    template: str,
    lost: str | None,
) -> None:
    brought = tmp_path / "brought"
    shutil.copytree(made[2].path(), brought)
    (brought / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    chat = SourceChat(brought, conventions_of(made[2]))
    change(folder, "tokenizer_config.json", chat_template=template)
    if lost is None:
        prove_conversations(Client(folder), chat, "bf16")
        if "never" not in template:
            change(folder, "tokenizer_config.json", chat_template=PLAIN_TEMPLATE + " ")
            with pytest.raises(ExportError, match="from character"):
                prove_conversations(Client(folder), chat, "bf16")
    else:
        with pytest.raises(ExportError, match=lost):
            prove_conversations(Client(folder), chat, "bf16")


def test_a_bundle_records_what_it_answered(made: tuple[Path, Bundle, Checkpoint]) -> None:
    bundle = made[1]
    assert list(bundle.asked) == ["bf16", "fp8"]
    for variant, asked in bundle.asked.items():
        assert asked.problems == BRIEF["problems"]
        card = bundle.path(variant, "README.md").read_text()
        assert f"of {asked.problems} held-out problems" in card
        assert "split_special_tokens=True" in card


def test_conventions_of_a_model_made_here_are_the_lines(
    made: tuple[Path, Bundle, Checkpoint],
) -> None:
    tokenizer = load_tokenizer(made[2].path("tokenizer.json"))
    found = read_conventions(made[2].path(), tokenizer, max_tokens=64)
    assert found.said == ()
    assert found.end_tokens == (1,)
    assert found.brought is None
    assert found.generation["temperature"] == 1.0
    assert found.tokenizer["chat_template"] == PLAIN_TEMPLATE
