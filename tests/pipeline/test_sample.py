"""`ingot sample` finds the model that is meant, and repeats itself under one seed."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from configs.model import V3Config
from configs.parallel import StoreConfig
from model import decode
from model.transformer import Transformer
from model.weights.files import save_pretrained
from pipeline import cli
from pipeline.verbs import sample as verb
from stages.framing import BOS_ID, BOS_TOKEN, EOS_ID, EOS_TOKEN
from tests.pipeline.fakes import World

SMALL = V3Config(
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    num_attention_heads=2,
    q_lora_rank=None,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=16,
    intermediate_size=32,
    moe_intermediate_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    num_nextn_predict_layers=0,
    max_position_embeddings=64,
    initializer_range=0.05,
)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A random model and a tokenizer of single bytes."""
    folder = tmp_path / "model"
    save_pretrained(Transformer(SMALL).initialize(seed=0), folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: k for k, token in enumerate([BOS_TOKEN, EOS_TOKEN, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS_TOKEN, EOS_TOKEN])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_prompt_is_continued_the_same_way_under_one_seed(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(seed: int) -> str:
        words = ["sample", str(model_folder), "--prompt", "1+1=", "--prompt", "@x"]
        options = ["--temperature", "1", "--max-new-tokens", "12", "--seed", str(seed)]
        assert cli.main([*words, *options]) == 0
        return capsys.readouterr().out

    assert told(1) == told(1) != told(2)
    assert told(1).startswith("1+1=")
    assert "\n@x" in told(1)


def test_truncation_is_what_was_asked_for_and_the_model_is_named_apart_from_the_answers(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*options: str) -> str:
        words = ["sample", str(model_folder), "--prompt", "1+1=", "--max-new-tokens", "20"]
        assert cli.main([*words, *options]) == 0
        out, err = capsys.readouterr()
        assert err == f"sampling from {model_folder}\n"
        return out

    greedy, free = told(), told("--temperature", "1")
    assert greedy != free
    # One token is left, or so little mass that the likeliest token has more.
    assert told("--temperature", "1", "--top-k", "1") == greedy
    assert told("--temperature", "1", "--top-p", "0.000001") == greedy
    assert told("--temperature", "1", "--top-k", "300", "--top-p", "1") == free


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "-1"], "--temperature -1.0: must be a number of 0 or more"),
        (["--temperature", "nan"], "--temperature nan: must be"),
        (["--temperature", "inf"], "--temperature inf: must be"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: must be 1 or more"),
        (["--top-k", "0"], "--top-k 0: must be 1 or more"),
        (["--top-p", "0"], "--top-p 0.0: must be above 0"),
        (["--top-p", "1.5"], "--top-p 1.5: must be above 0 and at most 1"),
        (["--top-p", "nan"], "--top-p nan: must be"),
    ],
)
def test_a_setting_that_means_nothing_is_refused_with_a_remedy(
    model_folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert cli.main(["sample", str(model_folder), "--prompt", "x", *words]) == 2
    assert message in capsys.readouterr().err


def test_text_that_spells_a_control_token_stays_text(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def spy(model: object, prompts: list[list[int]], **settings: object) -> list[object]:
        seen.extend(prompts)
        return []

    monkeypatch.setattr(decode, "sample", spy)
    with pytest.raises(ValueError, match="shorter"):
        verb.sample(cli.parse(["sample", str(model_folder), "--prompt", EOS_TOKEN]))
    ((first, *rest),) = seen
    assert first == BOS_ID
    assert len(rest) == len(EOS_TOKEN)
    assert EOS_ID not in rest


def test_a_node_of_the_line_is_sampled_from_its_artifacts_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    world = World(StoreConfig(url=".ingot", min_free_bytes=0))
    made = world.run()

    def meant(model: str) -> Path:
        words = ["sample", model, "--recipe", "smoke", "--prompt", "x"]
        return verb.model_folder(cli.parse(words))

    checkpoint, bundle = (world.generation(made, node) for node in ("train", "pack.cuda"))
    assert meant(str(checkpoint)) == world.files(made, "train")
    assert meant(str(bundle)) == world.files(made, "pack.cuda") / "bf16"


def test_what_holds_no_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    world = World(StoreConfig(url=".ingot", min_free_bytes=0))
    folder = str(world.generation(world.run(), "data"))
    assert cli.main(["sample", folder, "--recipe", "smoke", "--prompt", "x"]) == 1
    assert (
        "holds a corpus without plain weights; sample from a checkpoint" in capsys.readouterr().err
    )
