"""A corpus of twenty sums, a model that half knows them, and post-training on both, in seconds."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch.nn import functional as F

from configs.rl import PosttrainConfig, PosttrainSpec
from model.transformer import Transformer
from model.weights.files import save_pretrained
from stages.artifacts import Checkpoint, Corpus
from stages.contract import Workspace
from stages.framing import BOS_ID, BOS_TOKEN, EOS_ID, EOS_TOKEN
from stages.posttrain import loop
from stages.steps import METRICS, read_metrics
from stages.tokens import begin_texts
from stages.verifiers import Problem, write_problems
from tests.references import random_model, tiny
from tests.stages.pools import Book, LocalPools

SEED = 3
VOCABULARY = {
    token: number
    for number, token in enumerate((BOS_TOKEN, EOS_TOKEN, *"0123+-=", "Ġ"))  # Ġ is a space
}
SPACE_ID = VOCABULARY["Ġ"]
END_TOKENS = (EOS_ID, SPACE_ID)
"""What ends an answer: the base model's generation config names a second token."""
PROBLEMS = [
    Problem(
        id=f"sums/{a}{sign}{b}=", prompt=f"{a}{sign}{b}=", answer=str(right), source="arithmetic"
    )
    for a in range(4)
    for b in range(4)
    for sign, right in (("+", a + b), ("-", a - b))
    if 0 <= right < 4
]
HELD_OUT, TRAIN = PROBLEMS[::3], [one for at, one in enumerate(PROBLEMS) if at % 3]
SETTINGS: Mapping[str, Any] = {
    "steps": 5,
    "prompts_per_step": 4,
    "group_size": 4,
    "max_new_tokens": 3,
    "temperature": 0.7,
    "minibatches": 2,
    "warmup_steps": 3,
    "checkpoint_every_steps": 2,
    "evaluate_every_steps": 2,
    "evaluate_problems": 4,
    "evaluate_samples_per_problem": 2,
    "optim": {"learning_rate": 3e-3},
    "grpo": {"kl_weight": 0.05},
}
MODEL = tiny(vocab_size=len(VOCABULARY))


@dataclass
class Lab:
    """Runs the stage; `pools` remembers what was asked of the pools of the latest run."""

    folder: Path
    corpus: Corpus
    base: Checkpoint
    patch: pytest.MonkeyPatch
    pools: LocalPools = field(default_factory=LocalPools)

    @property
    def book(self) -> Book:
        return self.pools.book

    def fresh(self) -> Book:
        """Forget what was asked so far."""
        self.pools = LocalPools(samplers=self.pools.samplers)
        return self.book

    def spec(self, **settings: Any) -> PosttrainSpec:
        """`SETTINGS` with some changed."""
        return PosttrainSpec(seed=SEED, posttrain=PosttrainConfig(**{**SETTINGS, **settings}))

    def run(self, work: Workspace, **settings: Any) -> Checkpoint:
        """The stage on local pools."""
        self.patch.setattr(loop, "open_trainers", self.pools.open_trainers)
        self.patch.setattr(loop, "open_generation", self.pools.open_generation)
        self.patch.setattr(loop, "ray_for", lambda *asked, **more: nullcontext())
        spec = self.spec(**settings)
        return loop.posttrain(spec, work, corpus=self.corpus, base=self.base)

    def log(self, work: Workspace) -> list[dict[str, Any]]:
        """The step log without what is measured of the machine."""
        lines = read_metrics(work.beside(METRICS))
        return [{k: v for k, v in line.items() if not k.endswith("_seconds")} for line in lines]


def make_lab(folder: Path, patch: pytest.MonkeyPatch) -> Lab:
    """A lab whose corpus and base lie in `folder`."""
    tokenizer = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[]))
    tokenizer.add_special_tokens([BOS_TOKEN, EOS_TOKEN])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = begin_texts(tokenizer)
    base, corpus = folder / "base", folder / "corpus"
    save_pretrained(half_taught(), base)
    (base / "generation_config.json").write_text(f'{{"eos_token_id": {list(END_TOKENS)}}}')
    tokenizer.save(str(base / "tokenizer.json"))
    write_problems(corpus / "problems" / "train.parquet", TRAIN)
    write_problems(corpus / "problems" / "held_out.parquet", HELD_OUT)
    return Lab(
        folder,
        Corpus(
            uri=str(corpus),
            train_rows=0,
            held_out_rows={},
            sequence_tokens=8,
            vocab_size=len(VOCABULARY),
            train_problems=len(TRAIN),
            held_out_problems=len(HELD_OUT),
        ),
        Checkpoint(uri=str(base), step=1, sequences_seen=7, model=MODEL, final_loss=1.0),
        patch,
    )


@cache
def half_taught() -> Transformer:
    """A model that has read the sums, held-out ones aside, with as many wrong answers as right."""
    model = random_model(MODEL).train()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        rows = []
        for problem in TRAIN:
            answer = problem.answer
            if torch.rand((), generator=generator) < 0.5:
                answer = str(int(torch.randint(4, (), generator=generator)))
            rows.append([BOS_ID, *(VOCABULARY[c] for c in problem.prompt + answer), EOS_ID])
        tokens = torch.tensor(rows)
        loss = F.cross_entropy(model(tokens)[:, 3:-1].flatten(0, 1), tokens[:, 4:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def text_of(token_ids: Any) -> str:
    """Token ids as characters; those that end an answer and padding are left out."""
    letters = {number: token for token, number in VOCABULARY.items()}
    return "".join(letters[int(one)] for one in token_ids if int(one) not in (BOS_ID, *END_TOKENS))
