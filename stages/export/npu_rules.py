"""What the servers for Ascend NPUs ask of a bundle. Loads no torch.

The kernels' own pages lie in vllm-ascend's repository, at the version that `servers.SERVERS` names.
Which sizes CANN's attention for V3 takes is not among them.
"""

from stages.export.gpu_rules import WITHOUT
from stages.export.rules import (
    INT8,
    Rule,
    always,
    is_not,
    latent_parts,
    memory,
    no_yarn,
    odd_ratio,
    unless,
)

_OPS = "csrc/attention"
_V4 = "vllm_ascend/models/deepseek_v4.py"
VLLM_ASCEND = (
    Rule("vllm-ascend", WITHOUT, memory, "vllm/model_executor/models/registry.py", by_size=False),
    Rule(
        "vllm-ascend",
        "no FP8: of its own it reads V4 with experts in FP4 alone",
        always("FP8"),
        "vllm_ascend/quantization/fp8_config.py, methods/fp8.py",
        variants=("fp8",),
        by_size=False,
    ),
    Rule(
        "vllm-ascend",
        "FP4 and FP8 need an Ascend 950: A2 and A3 have neither",
        always("FP8"),
        "vllm_ascend/quantization/fp8_config.py, methods/fp8.py",
        effect="needs",
        variants=("fp4",),
        by_size=False,
    ),
    Rule(
        "vllm-ascend",
        "512, 64",
        latent_parts,
        f"{_OPS}/sparse_flash_attention/README.md",
        families=("v32",),
    ),
    Rule(
        "vllm-ascend",
        "a power of two on a device, 128 at most",
        unless(lambda heads: heads <= 128 and not heads & (heads - 1), "num_attention_heads"),
        f"{_OPS}/sparse_flash_attention/README.md",
        families=("v32",),
    ),
    Rule(
        "vllm-ascend",
        "8, 16, 24, 32 or 64",
        unless(lambda heads: heads in (8, 16, 24, 32, 64), "index_n_heads"),
        f"{_OPS}/lightning_indexer/README.md",
        families=("v32",),
    ),
    Rule(
        "vllm-ascend",
        "128",
        is_not(128, "index_head_dim"),
        f"{_OPS}/lightning_indexer/README.md, vllm_quant_lightning_indexer/README.md",
        families=("v32", "v4"),
    ),
    Rule(
        "vllm-ascend",
        "2,048 at most",
        unless(lambda topk: topk <= 2048, "index_topk"),
        f"{_OPS}/lightning_indexer_vllm/op_host/lightning_indexer_vllm_tiling.h",
        families=("v32", "v4"),
    ),
    Rule("vllm-ascend", "YaRN", no_yarn, _V4, families=("v4",)),
    Rule(
        "vllm-ascend",
        "0, 4 and 128",
        odd_ratio,
        f"{_V4}, Compressor",
        families=("v4",),
    ),
    Rule(
        "vllm-ascend",
        "512",
        is_not(512, "head_dim"),
        f"{_OPS}/compressor/README.md",
        families=("v4",),
    ),
    Rule(
        "vllm-ascend",
        "64",
        is_not(64, "qk_rope_head_dim"),
        f"{_OPS}/compressor/README.md",
        families=("v4",),
    ),
    Rule(
        "vllm-ascend",
        "1,024 to 10,240 in steps of 512",
        unless(lambda width: 1024 <= width <= 10240 and width % 512 == 0, "hidden_size"),
        f"{_OPS}/compressor/README.md",
        families=("v4",),
    ),
    Rule(
        "vllm-ascend",
        "64 on a device",
        unless(lambda heads: heads % 64 == 0, "num_attention_heads"),
        f"{_OPS}/sparse_attn_sharedkv/README.md",
        families=("v4",),
    ),
    Rule(
        "vllm-ascend",
        "64",
        is_not(64, "index_n_heads"),
        f"{_OPS}/vllm_quant_lightning_indexer/README.md",
        families=("v4",),
    ),
)
MINDIE = (
    Rule("mindie", WITHOUT, memory, "its documents, which name no such memory", by_size=False),
    Rule(
        "mindie",
        "config.json needs `quantize` and `mla_quantize` (`export.mindie = true` writes them) and "
        "`deepseekv2` as `model_type`, for which no other program would load it",
        always("the layout of vllm-ascend"),
        "msmodelslim example/DeepSeek/quant_deepseek_w8a8.py",
        effect="needs",
        families=("v3",),
        variants=INT8,
        by_size=False,
    ),
)
