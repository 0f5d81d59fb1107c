"""Promises of token rows on disk and of the order in which they are read."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import DataError
from stages.framing import BOS_ID
from stages.segments import segments_of
from stages.shards import Rows, consumed_rows, row_order, write_rows


@pytest.mark.parametrize("largest", [1023, 65535, 65536])
def test_rows_come_back_as_they_were_written(tmp_path: Path, largest: int) -> None:
    rows = np.random.default_rng(0).integers(0, largest, size=(23, 8))
    rows[3, 3] = largest
    write_rows(tmp_path, rows, rows_per_shard=10)
    stored = Rows(tmp_path)
    assert len(stored) == 23
    assert stored.sequence_tokens == 8
    wanted = np.array([22, 0, 10, 9, 10, 19, 20])
    taken = stored.take(wanted)
    assert taken.dtype == np.int64
    np.testing.assert_array_equal(taken, rows[wanted])


def test_a_small_vocabulary_costs_two_bytes_a_token(tmp_path: Path) -> None:
    write_rows(tmp_path / "small", np.full((4, 8), 65535))
    write_rows(tmp_path / "large", np.full((4, 8), 65536))
    kinds = [
        pa.ipc.open_file(pa.memory_map(str(tmp_path / name / "00000.arrow"))).schema.field(0).type
        for name in ("small", "large")
    ]
    assert kinds == [pa.list_(pa.uint16(), 8), pa.list_(pa.int32(), 8)]


def test_equal_rows_are_equal_files(tmp_path: Path) -> None:
    rows = np.arange(80).reshape(10, 8)
    for name in ("a", "b"):
        write_rows(tmp_path / name, rows, rows_per_shard=4)
    for one in sorted((tmp_path / "a").iterdir()):
        assert one.read_bytes() == (tmp_path / "b" / one.name).read_bytes()


@pytest.mark.parametrize("index", [-1, 10])
def test_a_row_that_does_not_exist_is_refused(tmp_path: Path, index: int) -> None:
    write_rows(tmp_path, np.zeros((10, 8), dtype=np.int64))
    with pytest.raises(IndexError, match="10 exist"):
        Rows(tmp_path).take(np.array([0, index]))


def test_a_folder_without_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.arrow files"):
        Rows(tmp_path)


def test_the_first_pass_reads_rows_as_they_were_packed() -> None:
    np.testing.assert_array_equal(row_order(7, 0, 7, seed=5), np.arange(7))


@given(st.integers(1, 12), st.integers(0, 40), st.integers(0, 40), st.integers(0, 9))
def test_the_order_does_not_depend_on_where_one_begins(
    total: int, start: int, count: int, seed: int
) -> None:
    whole = row_order(total, 0, start + count, seed=seed)
    np.testing.assert_array_equal(row_order(total, start, count, seed=seed), whole[start:])


@given(st.integers(1, 12), st.integers(0, 5), st.integers(0, 9))
def test_every_pass_reads_each_row_once(total: int, epoch: int, seed: int) -> None:
    order = row_order(total, epoch * total, total, seed=seed)
    assert sorted(order.tolist()) == list(range(total))


def test_later_passes_differ_from_one_another_and_by_seed() -> None:
    passes = [tuple(row_order(50, 50 * e, 50, seed=s)) for e in (1, 2) for s in (0, 1)]
    assert len(set(passes)) == 4


def test_consumed_rows_count_repeats() -> None:
    seen = consumed_rows(10, 25, seed=0)
    np.testing.assert_array_equal(seen, row_order(10, 0, 25, seed=0))
    assert sorted(np.bincount(seen).tolist()) == [2] * 5 + [3] * 5


def test_every_begin_of_text_opens_the_next_segment() -> None:
    rows = torch.tensor([[7, 1, BOS_ID, 5, BOS_ID, BOS_ID], [BOS_ID, 5, 5, 5, 5, 5]])
    assert segments_of(rows).tolist() == [[0, 0, 1, 1, 2, 3], [1] * 6]


def test_a_loss_is_computed_without_the_library_that_rows_are_stored_by() -> None:
    script = "import sys; sys.modules['pyarrow'] = None; import stages.pretrain.objective"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
