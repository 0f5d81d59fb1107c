"""`ingot import`: turn a Hugging Face folder into a checkpoint that the line can start from."""

import argparse
import json
from pathlib import Path

from pipeline.production import IMPORT
from pipeline.verbs.asked import command, load_asked
from pipeline.verbs.run import run


def import_(args: argparse.Namespace) -> int:
    """Build the import alone, as `ingot run --set base=FOLDER --only import` does.

    Says how to build the rest on it. Exit code as that of `run`.
    """
    folder = Path(args.folder).expanduser().absolute()
    args.sets = [*args.sets, f"base={json.dumps(str(folder))}"]
    args.only, args.start, args.force = [IMPORT], [], []
    args.dry_run = args.json = False
    args.profile = None
    asked = load_asked(args)
    code = run(args)
    if code == 0:
        print(f"`{command('run', asked.invocation)}` builds the rest of the line on it")
    return code
