"""Bundles of the smallest shapes that real servers take, made by the project's own export.

The V3 model learns some sums by heart, so that what it answers differs from prompt to prompt, and
is right for some and wrong for others. The others are random, of weights wide enough that no two
logits are nearly equal.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F

from configs.delivery import ExportConfig, ExportSpec, Target, Variant
from configs.model import ModelConfig, V3Config, V4Config, V32Config
from configs.shape import YarnConfig
from model.weights.files import load_pretrained, save_pretrained
from stages.artifacts import Bundle
from stages.export.bundle import export
from stages.framing import BOS_ID, EOS_ID
from stages.tokens import load_tokenizer
from stages.verifiers import Problem
from tests.conftest import workspace_at
from tests.stages.bundles import BRIEF, Notebook, make_checkpoint, make_corpus
from tests.stages.bundles import MODEL as NARROW_V3
from tests.stages.bundles import MODEL_V4 as NARROW_V4
from tests.stages.bundles import MODEL_V32 as NARROW_V32

LATENT = {"num_attention_heads": 4, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
ROOM = {"max_position_embeddings": 128}
V3 = V3Config.model_validate({**dict(NARROW_V3), **LATENT, **ROOM})
V32 = V32Config.model_validate({**dict(NARROW_V32), **LATENT, **ROOM, "index_head_dim": 128})
V4 = V4Config.model_validate(
    {
        **dict(NARROW_V4),
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "o_lora_rank": 128,
        "compress_ratios": (0, 4, 128, 4),
        "hca_ratio": 128,
        "index_head_dim": 128,
        "max_position_embeddings": 256,
        # Which vllm-ascend cannot do without.
        "rope_scaling": YarnConfig(factor=4.0, original_max_position_embeddings=64),
    }
)
MODELS: Mapping[str, ModelConfig] = {
    "v3": V3,
    "v32": V32,
    "v4": V4,
    "narrow-v3": NARROW_V3,
    "narrow-v32": NARROW_V32,
}
"""The narrow ones have 80 rows of latent and rotated key: FP8 of 576 transformers cannot widen."""
LOOSE: dict[str, Any] = {
    "min_top1_agreement": 0.0,
    "max_kl_nats": 0.5,
    "max_bits_per_byte_rise": 0.5,
    "min_greedy_agreement": 0.0,
}
"""What a hardly trained model can keep of itself in 4 bits: that is not tried here."""
SUMS = [
    Problem(
        id=f"sums/{a:02}+{b:02}=",
        prompt=f"{a:02}+{b:02}=",
        answer=f"{a + b:03}"[::-1],
        source="arithmetic",
    )
    for a in range(8)
    for b in range(8)
]
TRAINING_STEPS = 60


def make_folders(root: Path, family: str) -> dict[str, Path]:
    """Both targets' variants of one of `MODELS`, as `cuda/fp8`; the checkpoint is the same."""
    checkpoint = make_checkpoint(root / "checkpoint", MODELS[family])
    if family == "v3":
        _teach(checkpoint.path())
    corpus = make_corpus(root / "corpus")
    targets: tuple[Target, ...] = ("cuda", "ascend")
    variants = [one for one in get_args(Variant) if one != "fp4" or family == "v4"]
    settings = BRIEF | LOOSE | {"calibration_rows": 8, "variants": variants}
    found: dict[str, Path] = {}
    for target in targets:
        spec = ExportSpec(seed=1, target=target, export=ExportConfig(**settings))
        work = workspace_at(root / target, Notebook())
        bundle: Bundle = export(spec, work, corpus=corpus, checkpoint=checkpoint)
        found |= {f"{target}/{variant}": bundle.path(variant) for variant in bundle.parity}
    return found


def _teach(folder: Path) -> None:
    """Train the model in `folder` on the sums until it knows a part of them."""
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    rows = [
        [BOS_ID, *tokenizer.encode(one.prompt + one.answer, add_special_tokens=False).ids, EOS_ID]
        for one in SUMS
    ]
    tokens_BS = torch.tensor(rows)
    model = load_pretrained(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(TRAINING_STEPS):
        logits_BSV = model(tokens_BS[:, :-1])
        loss = F.cross_entropy(logits_BSV.flatten(0, 1), tokens_BS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_pretrained(model.eval(), folder)
