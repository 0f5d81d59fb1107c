"""The command line: reads the arguments, then loads the verb asked for and nothing else."""

import argparse
import difflib
import gc
import importlib
import importlib.metadata
import importlib.util
import io
import os
import sys
import traceback
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

_VERBS = {
    "run": "pipeline.verbs.run",
    "plan": "pipeline.verbs.plan",
    "status": "pipeline.verbs.inspect",
    "why": "pipeline.verbs.inspect",
    "show": "pipeline.verbs.show",
    "logs": "pipeline.verbs.logs",
    "runs": "pipeline.verbs.runs",
    "diff": "pipeline.verbs.diff",
    "ui": "pipeline.verbs.ui",
    "sample": "pipeline.verbs.sample",
    "eval": "pipeline.verbs.eval_",
    "verify": "pipeline.verbs.verify",
    "import": "pipeline.verbs.import_",
    "clean": "pipeline.verbs.clean",
    "doctor": "pipeline.verbs.doctor",
    "recipes": "pipeline.verbs.recipes",
    "fields": "pipeline.verbs.fields",
    "new": "pipeline.verbs.new",
    "completion": "pipeline.verbs.completion",
}
"""Where each verb's function of the same name stands (`import_` for `import`). Resolved when
called: stages load torch and ray, which takes seconds, and `--help` must answer at once."""

_DOCUMENT = "pipeline.verbs.document", "why_document"
"""What `why --document` calls: it loads what reads Parquet, for which `why` has no use."""
_TAKEN = frozenset({"import", "eval"})
"""Verbs that Python has taken: their functions end in `_`, as their modules do."""
_CLIENTS = ("transformers", "vllm", "llama.cpp", "lm-eval", "vllm-ascend")
_FLOORS = ("configs", "model", "cluster", "stages")
_INTERRUPTED = 130
_OBJECTS_A_COLLECTION = 50_000
_SEEDS = "--seeds"
_SEEDS_HELP = (
    "build the line once for each of these in place of the recipe's `seed`, which varies the "
    "corpus, what is held out of it, initial values, the order of training and all sampling (with "
    "[parity] the corpus alone); nodes that do not depend on it are built once"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. A deliberate error is one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show a sign is told its number instead.
            stream.reconfigure(errors="backslashreplace")
    words = sys.argv[1:] if argv is None else list(argv)
    if fault := _path_fault() or _verb_fault(words):
        _report(f"error: {fault}")
        return 2
    if not words:
        _parser().print_help()
        return 0
    if words[0] == "--version":
        print(f"ingot {importlib.metadata.version('ingot')}")
        return 0
    # Set before MLflow and pydantic are loaded, which read them then; looking for plugins of
    # pydantic among all installed packages would take longer than a plan.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    # What libraries make while they load stays: looking through it for garbage every 700 objects
    # takes a sixth to a quarter of the time of loading MLflow.
    gc.set_threshold(_OBJECTS_A_COLLECTION)
    errors = importlib.import_module("configs.errors")
    masked = importlib.import_module("configs.masking").masked
    try:
        return _call(parse(words))
    except errors.IngotError as error:
        _report(masked(f"error: {error}"))
        return int(error.exit_code)
    except KeyboardInterrupt:
        _report("stopped; what is committed stays, and the same command goes on from it")
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever reads, as `head`, has seen enough. What is still to be written goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        broken = importlib.import_module("cluster.autoload").why_torch_fails(error)
        if broken is not None:
            _report(f"error: {broken}")
            return 1
        # A fault of ours: say so in one line, and how to see more.
        why = masked(f"{type(error).__name__}: {error}")
        _report(f"internal error: {why} (INGOT_DEBUG=1 shows where)")
        return 1


def _call(args: argparse.Namespace) -> int:
    """Load the verb's function and call it."""
    if args.verb == "run" and args.dry_run:
        args.verb = "plan"
    module = _VERBS[args.verb]
    name = module.rpartition(".")[2] if args.verb in _TAKEN else args.verb
    if args.verb == "why" and args.document is not None:
        module, name = _DOCUMENT
    verb = getattr(importlib.import_module(module), name)
    code = int(verb(args))
    sys.stdout.flush()
    return code


def _path_fault() -> str | None:
    """What of the user's stands on Python's path where Ingot's own should, and what to do.

    Looked for before anything of ours is loaded. A `pipeline` of the user's cannot be told of: it
    would be run in place of this.
    """
    root = Path(__file__).resolve().parents[1]
    for floor in _FLOORS:
        spec = importlib.util.find_spec(floor)
        places = [] if spec is None else [*(spec.submodule_search_locations or ()), spec.origin]
        found = next((Path(place).resolve() for place in places if place), None)
        if found is None or not found.is_relative_to(root / floor):
            return (
                f"PYTHONPATH: {found} stands before Ingot's own {floor}; take its folder off "
                "PYTHONPATH, or rename it"
            )
    return None


def _report(message: str) -> None:
    if os.environ.get("INGOT_DEBUG") == "1":
        traceback.print_exc()
    print(f"ingot: {message}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the words, and where to look."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        if message.startswith("unrecognized arguments: ") and message.endswith(".toml"):
            name = message.split()[-1]
            message += f"; did you mean @{name}, which merges a file over the recipe?"
        self.exit(2, f"ingot: error: {message}; `{self.prog} --help` says what it takes\n")


def _verb_fault(words: Sequence[str]) -> str | None:
    """That there is no verb of this name, with the nearest spelling."""
    verb = next((word for word in words if not word.startswith(("-", "@"))), None)
    if verb is None or verb in _VERBS:
        return None
    near = difflib.get_close_matches(verb, _VERBS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"verbs: {', '.join(_VERBS)}"
    return f"{verb!r} is no verb; {hint}"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with `@overlay.toml` wherever it stands collected in `overlays`.

    Not for `sample`, whose prompts may begin with any sign.
    """
    if list(argv[:1]) == ["sample"]:
        args = _parser().parse_args(argv)
        args.overlays = []
        return args
    overlays = [one[1:] for one in argv if one.startswith("@")]
    args = _parser().parse_args(_bind([one for one in argv if not one.startswith("@")]))
    args.overlays = overlays
    return args


def _bind(words: list[str]) -> list[str]:
    """`--seeds -1,2` as one word, so that its value, which looks like an option, can be named."""
    for place, (word, value) in enumerate(pairwise(words)):
        if word == _SEEDS and value[:1] == "-" and value[1:2].isdigit():
            return [*words[:place], f"{word}={value}", *words[place + 2 :]]
    return words


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ingot",
        description="A DeepSeek-style mixture-of-experts model, from raw text to a bundle.",
    )
    parser.add_argument("--version", action="store_true", help="print it")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    run = _with_recipe(verbs.add_parser("run", help="build what is stale"))
    run.add_argument("--dry-run", action="store_true", help="the same as `ingot plan`")
    run.add_argument(
        "--profile",
        metavar="STEPS:RANK",
        help="trace these steps of training on this trainer, as 10-12:0",
    )
    plan = _with_recipe(verbs.add_parser("plan", help="say what a run would do, and why"))
    for command in (run, plan):
        told = "what became of each node" if command is run else "the plan"
        command.add_argument("--json", action="store_true", help=f"print {told} as JSON")
        command.add_argument(_SEEDS, metavar="0,1,2", help=_SEEDS_HELP)
        _add_selectors(command)

    status = _with_latest(
        verbs.add_parser("status", help="which nodes are fresh, stale or missing; exit code 3")
    )
    status.add_argument("--json", action="store_true", help="print as JSON")
    why = _with_latest(
        verbs.add_parser("why", help="why a node must be built, or what became of a document")
    )
    why.add_argument("stage", metavar="STAGE", help="a node or a stage; with --document a corpus")
    why.add_argument(
        "--document",
        metavar="ID",
        help="say whether a corpus has this document, and if not, why: source/document, the "
        "document's name, or its own key",
    )
    show = _with_latest(verbs.add_parser("show", help="what an artifact holds"))
    show.add_argument("artifact", metavar="ARTIFACT", help="a node or an artifact's folder")
    show.add_argument("--verify", action="store_true", help="hash every file again")
    show.add_argument(
        "--samples",
        metavar="RULE",
        nargs="?",
        const="",
        help="of a corpus, some documents that this rule dropped or cut, or some that are kept; "
        "without RULE, which rules there are",
    )
    logs = _with_latest(verbs.add_parser("logs", help="what a node's workers print"))
    logs.add_argument("node", metavar="NODE", help="a node or an artifact's folder")
    logs.add_argument("--rank", type=int, metavar="N", help="of this worker alone")
    logs.add_argument(
        "-f", "--follow", action="store_true", help="go on until the node is built or has failed"
    )
    runs = _with_latest(verbs.add_parser("runs", help="what was run here, the newest first"))
    runs.add_argument("--limit", type=int, default=20, help="default: %(default)s")
    runs.add_argument("--json", action="store_true", help="print as JSON, with all nodes")
    diff = _with_latest(
        verbs.add_parser("diff", help="how two runs, two recipes or two artifacts differ")
    )
    diff.add_argument("first", metavar="A", help="a run's id, a recipe, a node or a folder")
    diff.add_argument("second", metavar="B", help="another of the same kind")

    ui = _with_latest(verbs.add_parser("ui", help="browse runs in MLflow on 127.0.0.1"))
    ui.add_argument("--port", type=int, default=5000, help="default: %(default)s")

    sample = _with_latest(verbs.add_parser("sample", help="let a model answer prompts"))
    sample.add_argument(
        "model", metavar="MODEL", help="a node, or a checkpoint's or bundle's folder"
    )
    sample.add_argument("--prompt", action="append", required=True, help="may be repeated")
    sample.add_argument("--max-new-tokens", type=int, default=64, help="default: %(default)s")
    sample.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest")
    sample.add_argument("--top-k", type=int, help="draw from so many of the likeliest tokens")
    sample.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the likeliest that make up this share"
    )
    sample.add_argument("--seed", type=int, default=0, help="default: %(default)s")

    evaluation = _with_latest(
        verbs.add_parser("eval", help="how many problems a model answers rightly")
    )
    evaluation.add_argument(
        "model", metavar="MODEL", help="a node, or a checkpoint's or bundle's folder"
    )
    evaluation.add_argument(
        "--problems",
        metavar="FILE",
        help=".jsonl with prompt and answer, or a corpus's .parquet; default: the held-out "
        "problems of the corpus that the model was made of",
    )
    evaluation.add_argument("--limit", type=int, default=200, help="default: %(default)s")
    evaluation.add_argument("--samples", type=int, default=4, help="a problem; default: 4")
    evaluation.add_argument("--max-new-tokens", type=int, default=16, help="default: %(default)s")
    evaluation.add_argument("--seed", type=int, default=0, help="default: %(default)s")

    verify = _with_latest(
        verbs.add_parser("verify", help="whether a bundle is whole, and clients answer as Ingot")
    )
    verify.add_argument(
        "bundle", metavar="BUNDLE", help="a node, or a bundle's or variant's folder"
    )
    verify.add_argument(
        "--with", dest="client", choices=_CLIENTS, help="let this program load it as well"
    )
    verify.add_argument("--python", metavar="PATH", help="the Python of that program's environment")
    verify.add_argument(
        "--problems",
        metavar="FILE",
        help="for lm-eval: .jsonl with prompt and answer; default: sums of two digits",
    )

    imports = _with_latest(
        verbs.add_parser("import", help="take a model made elsewhere in place of pretraining")
    )
    imports.add_argument(
        "folder", metavar="HF_DIR", help="config.json, safetensors and tokenizer.json"
    )

    clean = _with_latest(
        verbs.add_parser("clean", help="delete artifacts that newer ones superseded")
    )
    clean.add_argument("--dry-run", action="store_true", help="only list bytes per artifact")
    clean.add_argument(
        "--unfinished",
        action="store_true",
        help="also delete what interrupted builds left, which a run would continue",
    )
    verbs.add_parser("doctor", help="what this machine has and lacks, with the fix for each")

    verbs.add_parser("recipes", help="what can be run here, and how long it took last")
    fields = verbs.add_parser("fields", help="every setting, its type, default and meaning")
    fields.add_argument("prefix", metavar="PREFIX", nargs="?", help="as pretrain.optim")
    new = verbs.add_parser("new", help="write a recipe of your own, to be edited")
    new.add_argument("name", metavar="NAME", help="the recipe's name, and its file's")
    new.add_argument(
        "--from", dest="source", default="tiny", metavar="RECIPE", help="a shipped one"
    )
    completion = verbs.add_parser("completion", help="a script that makes a shell complete words")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))
    completion.set_defaults(
        options={name: sorted(one._option_string_actions) for name, one in verbs.choices.items()},
        helps={one.dest: str(one.help) for one in verbs._choices_actions},
    )
    return parser


def _with_recipe(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    command.add_argument("recipe", metavar="RECIPE", help="a shipped recipe, as tiny, or a path")
    return _with_changes(command)


def _with_latest(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    command.add_argument(
        "--recipe", metavar="RECIPE", help="default: that of the latest run here, or tiny"
    )
    command.set_defaults(seeds=None)
    return _with_changes(command)


def _with_changes(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    command.epilog = "@overlay.toml, anywhere and repeatedly, merges a file over the recipe."
    command.add_argument(
        "--set", dest="sets", action="append", default=[], metavar="A.B=C", help="change one field"
    )
    return command


def _add_selectors(command: argparse.ArgumentParser) -> None:
    for flag, name, text in (
        ("--only", "only", "build it if it is stale, and nothing else"),
        ("--from", "start", "rebuild it and everything after it"),
        ("--force", "force", "rebuild it; a plain run then rebuilds what came out different"),
    ):
        command.add_argument(
            flag, dest=name, action="append", default=[], metavar="STAGE", help=text
        )


if __name__ == "__main__":
    sys.exit(main())
