"""What `tests/mutants.py` is told by hand: which tests concern a file, which faults must always be
found, and which changes are none.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.mutations import Edit, Mutant, Text, make

TESTS: dict[str, tuple[str, ...]] = {
    "pipeline/runner.py": (
        "tests/pipeline/test_runner.py",
        "tests/pipeline/test_overtaken.py",
        "tests/pipeline/test_decide.py",
        "tests/pipeline/test_agreement.py",
        "tests/pipeline/test_side_by_side.py",
    ),
    "pipeline/building.py": (
        "tests/pipeline/test_runner.py",
        "tests/pipeline/test_overtaken.py",
        "tests/pipeline/test_provenance.py",
        "tests/pipeline/test_late_builders.py",
        "tests/pipeline/test_tracking.py",
    ),
    "pipeline/listeners.py": ("tests/pipeline/test_listeners.py",),
    "pipeline/crew.py": ("tests/pipeline/test_crew.py", "tests/pipeline/test_side_by_side.py"),
    "cluster/session.py": ("tests/cluster/test_sharing.py", "tests/cluster/test_session.py"),
    "pipeline/slots.py": (
        "tests/pipeline/test_store.py",
        "tests/pipeline/test_late_builders.py",
        "tests/pipeline/test_store_apart.py",
    ),
    "pipeline/store.py": (
        "tests/pipeline/test_store.py",
        "tests/pipeline/test_removal.py",
        "tests/pipeline/test_runner.py",
        "tests/pipeline/test_late_builders.py",
        "tests/pipeline/test_overtaken.py",
        "tests/pipeline/test_moved.py",
        "tests/pipeline/test_clean.py",
    ),
    "pipeline/lease.py": (
        "tests/pipeline/test_lease.py",
        "tests/pipeline/test_removal.py",
        "tests/pipeline/test_late_builders.py",
        "tests/pipeline/test_overtaken.py",
        "tests/pipeline/test_store.py",
        "tests/pipeline/test_clean.py",
    ),
    "pipeline/states.py": ("tests/pipeline/test_decide.py", "tests/pipeline/test_clean.py"),
    "pipeline/decide.py": (
        "tests/pipeline/test_judge.py",
        "tests/pipeline/test_decide.py",
        "tests/pipeline/test_agreement.py",
        "tests/pipeline/test_runner.py",
        "tests/pipeline/test_clean.py",
        "tests/pipeline/test_cli.py",
    ),
    "cluster/files.py": ("tests/cluster/test_files.py",),
    "pipeline/tracking/*.py": ("tests/pipeline/test_tracking.py",),
    "pipeline/plain.py": ("tests/pipeline/test_tracking.py",),
    "pipeline/embedded.py": ("tests/pipeline/test_cli.py",),
    "pipeline/verbs/run.py": ("tests/pipeline/test_cli.py",),
    "cluster/pool.py": ("tests/cluster/test_pool.py", "tests/stages/test_posttrain*.py"),
    "cluster/generation.py": ("tests/cluster/test_generation.py", "tests/cluster/test_pool.py"),
    "cluster/checkpoint.py": (
        "tests/cluster/test_checkpoint.py",
        "tests/cluster/test_trainer.py",
        "tests/stages/test_resume.py",
        "tests/cluster/test_pool.py",
    ),
    "cluster/expert_parallel.py": (
        "tests/contracts/test_dispatcher.py",
        "tests/cluster/test_expert_parallel.py",
    ),
    "cluster/fit.py": (
        "tests/cluster/test_fit_ranks.py",
        "tests/stages/test_resume.py",
        "tests/cluster/test_fit.py",
    ),
    "cluster/mesh.py": ("tests/cluster/test_mesh.py",),
    "cluster/groups.py": ("tests/cluster/test_mesh.py", "tests/cluster/test_warmup.py"),
    "cluster/trainer.py": (
        "tests/cluster/test_trainer.py",
        "tests/cluster/test_mesh.py",
        "tests/stages/test_micro_batches.py",
        "tests/cluster/test_fit.py",
    ),
    "model/moe.py": (
        "tests/model/test_moe.py",
        "tests/model/test_v4.py",
        "tests/model/test_fp8_scheme.py",
        "tests/model/test_balance.py",
        "tests/model/test_gradients.py",
        "tests/model/test_continuous.py",
        "tests/model/test_transformer.py",
        "tests/cluster/test_trainer.py",
    ),
    "model/balance.py": ("tests/model/test_balance.py", "tests/stages/test_pretrain.py"),
    "model/optim.py": ("tests/model/test_optim.py", "tests/cluster/test_trainer.py"),
    "model/loss.py": ("tests/model/test_loss.py", "tests/model/test_fp8_scheme.py"),
    "stages/conventions.py": ("tests/stages/test_conventions.py", "tests/stages/test_export.py"),
    "stages/data/loop.py": (
        "tests/stages/test_data.py",
        "tests/stages/test_held_out.py",
        "tests/stages/test_drawn.py",
    ),
    "stages/evaluate/loop.py": ("tests/stages/test_evaluate.py",),
    "stages/imported/loop.py": (
        "tests/stages/test_imported.py",
        "tests/stages/test_conventions.py",
    ),
    "stages/loss_parity/loop.py": ("tests/stages/test_loss_parity.py",),
    "stages/posttrain/learner.py": (
        "tests/stages/test_learner.py",
        "tests/stages/test_posttrain*.py",
    ),
    "stages/posttrain/loop.py": ("tests/stages/test_posttrain*.py", "tests/stages/test_rollout.py"),
    "stages/posttrain/objective.py": (
        "tests/stages/test_objective.py",
        "tests/stages/test_estimators.py",
        "tests/stages/test_learner.py",
    ),
    "stages/posttrain/rollout.py": ("tests/stages/test_rollout.py",),
    "stages/posttrain/exam.py": ("tests/stages/test_exam.py", "tests/stages/test_posttrain*.py"),
    "stages/posttrain/journal.py": (
        "tests/stages/test_journal.py",
        "tests/stages/test_posttrain*.py",
    ),
    "stages/posttrain/*.py": ("tests/stages/test_posttrain*.py",),
    "configs/rl.py": ("tests/stages/test_posttrain*.py", "tests/configs/test_meaning.py"),
    "stages/pretrain/loop.py": ("tests/stages/test_pretrain.py", "tests/stages/test_resume.py"),
}
"""By pattern of a source, the first that fits counts: its tests, in the order in which they are
tried, those first that are quick and find most."""


@dataclass(frozen=True, slots=True)
class Named:
    """A fault that must be found whatever is drawn; its place is told by what stands there."""

    name: str
    file: str
    find: str
    """An expression or a statement, however it is laid out. `_` stands for any expression, `*_`
    for any further arguments."""
    replacement: str
    function: str = ""
    """Only within the function of this name."""
    tests: tuple[str, ...] = ()
    """Tried instead of the file's own; may name a single test, where a file takes long."""

    def mutant(self, root: Path) -> Mutant:
        """The file with every such place replaced; LookupError if there is none."""
        text = Text((root / self.file).read_text())
        found = list(self._places(ast.parse(text.source)))
        if not found:
            where = f"{self.file}, {self.function}" if self.function else self.file
            raise LookupError(f"{self.name}: `{self.find}` is nowhere in {where}; adapt `NAMED`")
        edits = [Edit(text.start(one), text.end(one), self.replacement) for one in found]
        return make(self.file, text, self.name, self.function, edits)

    def _places(self, tree: ast.Module) -> Iterator[ast.AST]:
        (wanted,) = ast.parse(self.find).body
        pattern = wanted.value if isinstance(wanted, ast.Expr) else wanted
        for scope in ast.walk(tree):
            inside = isinstance(scope, ast.FunctionDef) and scope.name == self.function
            if inside or (scope is tree and not self.function):
                yield from (one for one in ast.walk(scope) if matches(pattern, one))


def matches(pattern: object, node: object) -> bool:
    """Whether a syntax tree is that of the pattern, with its wildcards filled in."""
    if isinstance(pattern, ast.Name) and pattern.id == "_":
        return isinstance(node, ast.expr)
    if isinstance(pattern, ast.expr_context):
        return True
    if isinstance(pattern, ast.Call) and isinstance(node, ast.Call):
        *first, last = [None, *pattern.args]
        if isinstance(last, ast.Starred):
            begin = node.args[: len(first) - 1]
            return matches(pattern.func, node.func) and matches(first[1:], begin)
    if isinstance(pattern, list):
        return (
            isinstance(node, list)
            and len(node) == len(pattern)
            and all(map(matches, pattern, node))
        )
    if isinstance(pattern, ast.AST):
        return type(node) is type(pattern) and all(
            matches(value, getattr(node, name)) for name, value in ast.iter_fields(pattern)
        )
    return pattern == node


_POSTTRAIN = "stages/posttrain/loop.py"
_STEP = "stages/posttrain/step.py"
_CLI = "tests/pipeline/test_cli.py"
NAMED = (
    Named("samplers never updated", _POSTTRAIN, "samplers.update_weights(step, *_)", "None"),
    Named("no staleness check", _STEP, "check_staleness(*_)", "None"),
    Named("no KL reference", _STEP, "trainers.reference(*_)", 'batch["behaviour_logprobs"]'),
    Named("no warm-up", "configs/rl.py", "min(1.0, step / max(1, self.warmup_steps))", "1.0"),
    Named(
        "the same problems",
        _STEP,
        'derive(run.config.seed, "posttrain", "problems", step)',
        'derive(run.config.seed, "posttrain", "problems")',
    ),
    Named(
        "the same draws",
        _STEP,
        'derive(seed, "posttrain", step, slot, prompt.problem.id, index)',
        'derive(seed, "posttrain", slot, prompt.problem.id, index)',
    ),
    Named("fsync of a text removed", "cluster/files.py", "os.fsync(_)", "None", "_put"),
    Named("fsync of a folder removed", "cluster/files.py", "os.fsync(_)", "None", "sync_to_disk"),
    Named(
        "fsync after a replacement removed",
        "cluster/files.py",
        "sync_to_disk(_)",
        "None",
        "replace",
    ),
    Named(
        "fsync after a creation removed",
        "cluster/files.py",
        "sync_to_disk(_)",
        "None",
        "create_exclusively",
    ),
    Named("fsync of an artifact removed", "pipeline/slots.py", "os.fsync(_)", "None"),
    Named("fsync of a slot removed", "pipeline/store.py", "sync_folders(*_)", "None", "commit"),
    Named(
        "fsync of a save removed", "cluster/checkpoint.py", "sync_to_disk(draft)", "None", "_settle"
    ),
    Named(
        "SIGTERM handler of a run removed",
        "pipeline/verbs/run.py",
        "signal.signal(signal.SIGTERM, _)",
        "None",
        tests=(f"{_CLI}::test_a_run_that_a_scheduler_ends_is_one_that_the_user_stopped",),
    ),
    Named(
        "signal handlers of the server removed",
        "pipeline/embedded.py",
        "signal.signal(ending, _)",
        "None",
        tests=(f"{_CLI}::test_a_server_ends_with_the_command_that_started_it",),
    ),
    Named(
        "MLflow params cut at 100",
        "pipeline/tracking/runs.py",
        "range(0, len(params), _PARAMS_A_BATCH)",
        "range(0, min(1, len(params)), _PARAMS_A_BATCH)",
    ),
    Named("upload limit off", "pipeline/plain.py", "entry.bytes < SMALL_BYTES", "True"),
    Named(
        "do_sample dropped",
        "stages/conventions.py",
        '{"do_sample": True, "temperature": 1.0}',
        '{"temperature": 1.0}',
        tests=(
            "tests/stages/test_conventions.py"
            "::test_servers_draw_from_a_model_made_here_as_it_was_trained",
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class Equivalent:
    """A change after which nobody can tell the programs apart by what is promised."""

    file: str
    removed: str
    """The line before, stripped; empty if the change adds one."""
    added: str
    reason: str

    def is_of(self, mutant: Mutant) -> bool:
        lines = " ".join(mutant.removed), " ".join(mutant.added)
        return (self.file, self.removed, self.added) == (mutant.file, *lines)


EQUIVALENTS: tuple[Equivalent, ...] = (
    Equivalent(
        "pipeline/lease.py",
        "_LOOK_SECONDS = 0.25",
        "_LOOK_SECONDS = (0.25 + 1)",
        "how often a silent holder is looked at; what is found is the same",
    ),
    Equivalent(
        "model/loss.py",
        "torch.log_softmax(logits_CV, dim=1, out=logits_CV)",
        "torch.log_softmax(logits_CV, dim=(-1), out=logits_CV)",
        "of two dimensions the last is the second",
    ),
    Equivalent(
        "model/moe.py",
        "if groups > 1:",
        "if groups > (-1):",
        "the one group of all experts is always kept",
    ),
)
