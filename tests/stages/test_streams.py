"""Rows of streams that span files."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.data import encode
from stages.data.encode import Stream, write_stream


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("streams")


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 17))
def test_row_j_is_its_tokens_wherever_files_end(folder: Path, sizes: list[int], width: int) -> None:
    whole, paths = np.arange(sum(sizes), dtype=np.int32), []
    for number, end in enumerate(np.cumsum(sizes)):
        paths.append(folder / f"{number}.bin")
        block = whole[end - sizes[number] : end]
        assert write_stream(paths[-1], [block]) == len(block)
    stream = Stream(paths, width)
    assert len(stream) == len(whole) // width
    rows = np.random.default_rng(0).permutation(len(stream))
    expected = whole[: len(stream) * width].reshape(-1, width)[rows]
    assert np.array_equal(stream.take(rows), expected)


def test_few_files_are_open_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_OPEN_FILES", 2)
    paths = [folder / f"many-{number}.bin" for number in range(9)]
    for number, path in enumerate(paths):
        write_stream(path, [np.full(5, number, np.int32)])
    assert Stream(paths, 3).take(np.arange(15)).reshape(-1).tolist() == [
        number for number in range(9) for _ in range(5)
    ]
