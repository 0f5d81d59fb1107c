"""What processes that are forked for tests find done: the C of the CPU's kernels is compiled.

Nothing is computed with it here: a process that has threads cannot be forked safely.
"""

from pathlib import Path

from model.compiled import compiled
from model.experts_cpu import FLAGS, SOURCE

_MODEL = Path(__file__).parents[1] / "model"

for flags in FLAGS.values():
    compiled(SOURCE, *flags)
compiled(_MODEL / "fp8" / "cpu.c", "-ffp-contract=off")
