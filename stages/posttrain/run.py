"""What stays the same while post-training runs, read and checked before any worker is started."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from cluster import checkpoint
from cluster.generation import Sampling
from cluster.memory import less_memory
from cluster.pool import TrainerSpec
from cluster.saves import Saves
from configs.errors import DataError
from configs.rl import PosttrainConfig, PosttrainSpec
from configs.train import BalanceConfig, check_fp8
from model.fp8.scheme import Numerics
from stages.answers import choose
from stages.artifacts import Checkpoint, Corpus
from stages.contract import Workspace
from stages.conventions import read_end_tokens
from stages.posttrain.exam import Exam, exam_seed
from stages.posttrain.learner import Grpo
from stages.prompts import Prompt, answer_text, encode_prompts
from stages.telemetry import SAVES
from stages.tokens import load_tokenizer
from stages.verifiers import Problem, read_problems


@dataclass(frozen=True)
class Run:
    """One build."""

    config: PosttrainSpec
    work: Workspace
    base: Checkpoint
    prompts: Sequence[Prompt]
    """The training problems."""
    sampling: Sampling
    answer_text: Callable[[Sequence[int]], str]
    """An answer as the verifier reads it."""
    exam: Exam | None
    """What is asked of held-out problems; none if nothing is."""
    saves: Saves
    """Its `start` is chosen once: a builder that is late may still write beside it."""

    @property
    def rl(self) -> PosttrainConfig:
        """The section of the recipe."""
        return self.config.posttrain

    @property
    def algorithm(self) -> Grpo:
        """What is done with rewards."""
        return Grpo(self.rl.grpo, self.rl.temperature)

    @property
    def numerics(self) -> Numerics:
        """Samplers' and trainers', so that their log-probabilities agree."""
        return Numerics(self.rl.precision, self.rl.fp8, self.work.machines.fp8_backend)

    @property
    def trainers(self) -> TrainerSpec:
        """What every trainer is built from."""
        rl = self.rl
        return TrainerSpec(
            optim=rl.optim,
            balance=BalanceConfig(bias_update_speed=rl.bias_update_speed),
            precision=self.numerics,
            seed=self.config.seed,
            reference=self.algorithm.reference is not None,
            less_memory=f"{less_memory(self.work.machines.ep)}, raise posttrain.minibatches = "
            f"{rl.minibatches}, or lower posttrain.group_size = {rl.group_size} or "
            f"posttrain.max_new_tokens = {rl.max_new_tokens}",
        )


def prepare(config: PosttrainSpec, work: Workspace, corpus: Corpus, base: Checkpoint) -> Run:
    """Read what is asked and how; DataError or ConfigError if it does not fit the model."""
    rl = config.posttrain
    if not corpus.train_problems:
        raise DataError(
            f"{corpus.uri}: train_problems = 0, and reinforcement learning needs problems with "
            'checkable answers; add a source of type = "arithmetic" or "problems" to data.sources'
        )
    check_fp8("posttrain", rl, base.model)
    end_tokens = read_end_tokens(base.path())
    tokenizer = load_tokenizer(base.path("tokenizer.json"))
    sampling = Sampling(rl.max_new_tokens, rl.temperature, end_tokens)
    read = partial(answer_text, tokenizer, end_tokens=end_tokens)

    def encode(problems: Sequence[Problem]) -> list[Prompt]:
        return encode_prompts(
            problems,
            tokenizer,
            context_tokens=base.model.max_position_embeddings,
            max_new_tokens=rl.max_new_tokens,
        )

    held_out = _held_out(config, work, corpus)
    own, *earlier = work.resumable(SAVES)
    seed, each = exam_seed(config.seed), rl.evaluate_samples_per_problem
    return Run(
        config=config,
        work=work,
        base=base,
        prompts=encode(read_problems(corpus.path("problems", "train.parquet"))),
        sampling=sampling,
        answer_text=read,
        exam=Exam(encode(held_out), sampling, each, seed, read) if held_out else None,
        saves=Saves(own, tuple(earlier), checkpoint.latest(*earlier), work.supply),
    )


def _held_out(config: PosttrainSpec, work: Workspace, corpus: Corpus) -> list[Problem]:
    """The held-out problems to ask; the user is told if they are fewer than the recipe says."""
    wanted, there = config.posttrain.evaluate_problems, corpus.held_out_problems
    if there < wanted:
        work.tracker.note(
            f"posttrain.evaluate_problems = {wanted}, but {there} are held out: all asked"
        )
    if not wanted or not there:
        return []
    problems = read_problems(corpus.path("problems", "held_out.parquet"))
    return choose(problems, wanted, seed=exam_seed(config.seed))
