"""A tiny checkpoint, corpus and workspace, from which the tests of `stages/export` make bundles."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BatchEncoding, PreTrainedTokenizerBase

from configs.delivery import ExportConfig, ExportSpec, Target
from configs.engram import EngramConfig
from configs.model import ModelConfig, V3Config, V4Config, V32Config
from model.transformer import Transformer
from model.weights.files import save_pretrained
from stages.artifacts import Bundle, Checkpoint, Corpus
from stages.export.bundle import export
from stages.framing import BOS_TOKEN, EOS_TOKEN
from stages.manifest import FILES, MANIFEST, Manifest
from stages.shards import write_rows
from stages.verifiers import Problem, write_problems
from tests.conftest import workspace_at

MODEL = V3Config(
    vocab_size=384,
    hidden_size=128,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=2,
    q_lora_rank=128,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    intermediate_size=256,
    moe_intermediate_size=128,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    max_position_embeddings=64,
    initializer_range=0.05,
)
"""Every quantised dimension is at most 128 or a multiple of it: transformers mis-sizes others."""
MODEL_V32 = V32Config(
    **MODEL.model_dump(exclude={"family"}),
    family="v32",
    index_n_heads=32,
    index_head_dim=32,
    index_topk=8,
)
"""Heads enough that ReLU makes no ties, of which transformers would take others than Ingot."""
MODEL_V4 = V4Config(
    family="v4",
    vocab_size=384,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    head_dim=32,
    qk_rope_head_dim=16,
    q_lora_rank=128,
    o_groups=2,
    o_lora_rank=32,
    sliding_window=8,
    compress_ratios=(0, 4, 8, 4),
    hca_ratio=8,
    index_n_heads=32,
    index_head_dim=32,
    index_topk=3,
    moe_intermediate_size=128,
    n_routed_experts=8,
    num_experts_per_tok=2,
    num_hash_layers=1,
    max_position_embeddings=64,
    initializer_range=0.05,
)
MODEL_ENGRAM = MODEL_V4.model_copy(
    update={
        "engram": EngramConfig(
            layer_ids=(1,), table_sizes=(50, 90), n_embed_per_ngram=16, n_head_per_ngram=2
        )
    }
)
"""With a memory, which only Ingot reads."""
MODELS: dict[str, ModelConfig] = {"v3": MODEL, "v32": MODEL_V32, "v4": MODEL_V4}
"""One for each family, of equal vocabulary."""
SEQUENCE_TOKENS = 32
ROWS = 24
TRAIN_ROWS = 100
PROBLEMS = 10


BRIEF: dict[str, Any] = {"problems": 3, "samples_per_problem": 1, "max_new_tokens": 2}
"""How much a random model is asked: it is wrong however long it answers."""


LOOSE: dict[str, Any] = {
    "min_top1_agreement": 0.2,
    "max_kl_nats": 0.2,
    "max_bits_per_byte_rise": 0.05,
    "min_greedy_agreement": 0.0,
}
"""How closely a variant of a random model must follow it, whose likeliest tokens are near ties."""


class Notebook:
    """A tracker that writes everything down."""

    def __init__(self) -> None:
        self.steps = 0
        self.logged: dict[int, dict[str, Any]] = {}
        self.notes: list[str] = []

    def start(self, *, steps: int, unit: str) -> None:
        self.steps = steps

    def log(self, metrics: Mapping[str, Any], *, step: int) -> None:
        assert step not in self.logged
        self.logged[step] = dict(metrics)

    def note(self, message: str) -> None:
        self.notes.append(message)

    def tag(self, name: str, value: str) -> None:
        pass


def lines() -> list[str]:
    """A thousand lines of code-like text with digits, white space, accents and other scripts."""
    words = ["def", "  return", "Straße", "naïve", "日本", "x+y=", "\tif", "🙂", "<|end_of_text|>"]
    return [
        f"{words[n % 9]} {n * 7919} {words[n * n % 9]}(v{n % 13}) # {n:03d}" for n in range(1000)
    ]


def make_tokenizer(path: Path) -> None:
    """A byte-level BPE whose special tokens come first, digits split singly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL.vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in (BOS_TOKEN, EOS_TOKEN)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines(), trainer)
    tokenizer.save(str(path))


def chat_ids(theirs: PreTrainedTokenizerBase, chat: list[dict[str, str]], **how: Any) -> list[int]:
    """The tokens that transformers makes of a conversation, by the template of the tokenizer."""
    encoded = theirs.apply_chat_template(chat, **how)
    assert isinstance(encoded, BatchEncoding)
    ids: list[int] = encoded["input_ids"]
    return ids


def files_of(generation: Path) -> Path:
    """The files of an artifact that a test made at `generation`."""
    (found,) = generation.glob(f"*/{FILES}")
    return found


def make_checkpoint(generation: Path, model: ModelConfig = MODEL) -> Checkpoint:
    """A random model of which nothing is constant, with a manifest."""
    assert isinstance(model, V3Config | V4Config)
    folder = generation / "000001-test" / FILES
    built = Transformer(model).initialize(seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, tensor in built.state_dict().items():
            if (tensor.dim() == 1 and tensor.is_floating_point()) or "position_bias" in name:
                spread = 0.05 if name.endswith("bias") else 0.2
                tensor.add_(spread * torch.randn(tensor.shape, generator=generator))
    save_pretrained(built, folder)
    make_tokenizer(folder / "tokenizer.json")
    checkpoint = Checkpoint(
        uri=str(folder), step=7, sequences_seen=112, model=model, final_loss=3.25
    )
    manifest = Manifest(
        address=folder.relative_to(generation).as_posix(),
        kind=checkpoint.kind,
        stage="stages.posttrain.loop:posttrain",
        revision=1,
        fingerprint="f" * 64,
        identity={},
        inputs={},
        facts=checkpoint.facts(),
        files={},
        content="c" * 64,
        provenance={},
    )
    (generation / MANIFEST).write_text(manifest.model_dump_json())
    return checkpoint


def make_corpus(folder: Path, rows: int = ROWS) -> Corpus:
    """Training rows and two held-out sources of random tokens, whose last rows end in padding."""
    generator = np.random.default_rng(3)
    for source in ("sums", "text"):
        tokens = generator.integers(2, MODEL.vocab_size, (rows, SEQUENCE_TOKENS))
        tokens[-1, SEQUENCE_TOKENS // 2 :] = 0
        write_rows(folder / "held_out" / source, tokens)
    tokens = generator.integers(2, MODEL.vocab_size, (TRAIN_ROWS, SEQUENCE_TOKENS))
    write_rows(folder / "train", tokens)
    problems = [
        Problem(id=f"sums/{n}+1=", prompt=f"{n}+1=", answer=str(n + 1), source="arithmetic")
        for n in range(PROBLEMS)
    ]
    write_problems(folder / "problems" / "held_out.parquet", problems)
    sources = {
        "sums": {"type": "arithmetic", "share": 0.6, "slip_share": 0.25},
        "text": {"type": "files", "share": 0.4},
    }
    (folder / "statistics.json").write_text(json.dumps({"sources": sources}))
    return Corpus(
        uri=str(folder),
        train_rows=TRAIN_ROWS,
        held_out_rows={"sums": rows, "text": rows},
        sequence_tokens=SEQUENCE_TOKENS,
        vocab_size=MODEL.vocab_size,
        train_problems=90,
        held_out_problems=PROBLEMS,
    )


def unquantised_dtype(name: str) -> torch.dtype:
    """How every variant stores the tensor `name` of a released folder, unless it quantises it."""
    *_, module, leaf = ("", *name.split("."))
    if leaf == "tid2eid":
        return torch.int32
    biases = {("gate", "e_score_correction_bias"), ("gate", "bias")}
    exact = leaf in ("attn_sink", "ape") or leaf.startswith("hc_") or (module, leaf) in biases
    return torch.float32 if exact else torch.bfloat16


def make_bundle(
    root: Path, target: Target, model: ModelConfig = MODEL, **settings: Any
) -> tuple[Bundle, Checkpoint]:
    """Export a fresh checkpoint under `root`, with `ExportConfig` fields from `settings`."""
    checkpoint = make_checkpoint(root / "checkpoint", model)
    corpus = make_corpus(root / "corpus")
    spec = ExportSpec(seed=1, target=target, export=ExportConfig(**(BRIEF | settings)))
    work = workspace_at(root / "bundle", Notebook())
    return export(spec, work, corpus=corpus, checkpoint=checkpoint), checkpoint
