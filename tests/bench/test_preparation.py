"""The data stage beside datatrove's line, on less text than `python -m tests.bench.preparation`.

Ratios and recalls of that hold here too; how memory grows shows only where there is more of it.
"""

from pathlib import Path

import pytest

from tests.bench import preparation
from tests.bench.preparation import OURS, OURS_FAST, THEIRS
from tests.clients.environments import Unavailable, python_of

pytestmark = pytest.mark.slow

MEGABYTES = 20.0
ROUNDS = 2
TARGET = 2.0
"""Times datatrove's throughput, end to end, both encoding with `tokenizers`."""
LEAST_MEGABYTES = 10.0
"""On less the time that it takes to begin tells more than throughput."""


def test_text_is_prepared_at_twice_datatroves_throughput_or_more(tmp_path: Path) -> None:
    try:
        theirs = python_of("datatrove")
    except Unavailable as error:
        pytest.skip(f"datatrove: {error}")
    facts = preparation.measure(tmp_path, MEGABYTES, ROUNDS, theirs=theirs)
    found = facts["found"]
    for line in (OURS, OURS_FAST):
        for similarity in ("0.9", "0.8"):
            assert found[line]["pairs"][similarity] >= found[THEIRS]["pairs"][similarity]
        assert found[line]["near"]["precision"] == 1
        assert found[line]["near"]["most_off"] < 1e-9
        assert found[line]["items"]["recall"] == found[line]["items"]["precision"] == 1
    if facts["megabytes"] >= LEAST_MEGABYTES:
        assert facts["ratios"][f"{OURS}, whole"] >= TARGET
