"""What workers print: found again by role and rank, and short enough to be shown."""

import os
import subprocess
import sys
from pathlib import Path

from cluster.output import TAIL_LINES, Output, log_files


def test_a_process_that_captures_writes_both_streams_to_its_file(tmp_path: Path) -> None:
    script = (
        "import os, subprocess, sys\n"
        "from cluster.output import Output\n"
        "print('before')\n"
        f"Output({str(tmp_path)!r}, 'trainer').capture(3)\n"
        "print('python')\n"
        "sys.stdout.flush()\n"
        "os.write(2, b'below python\\n')\n"
        "subprocess.run(['echo', 'a child'])\n"
    )
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
        )
        assert (done.stdout, done.stderr) == ("before\n", "")
    log = (tmp_path / "trainer-3.log").read_text()
    assert log.count("python\nbelow python\na child\n") == 2
    assert log.count(" begins\n") == 2


def test_the_tail_is_the_end_of_the_file_and_no_more(tmp_path: Path) -> None:
    output = Output(str(tmp_path), "sampler")
    assert output.tail(0) == ""
    output.path(0).write_text("".join(f"line {n}\n" for n in range(100_000)) + "the end")
    first, *lines = output.tail(0).splitlines()
    assert first == f"the last lines of {output.path(0)}:"
    assert len(lines) == TAIL_LINES
    assert lines[-2:] == ["  line 99999", "  the end"]
    output.path(1).write_bytes(b"\xff\xfe not text\n")
    assert "not text" in output.tail(1)


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    Output(str(tmp_path / "logs"), "trainer").add(0, "died")


def test_files_come_by_role_and_by_rank_as_a_number(tmp_path: Path) -> None:
    for name in ("trainer-10.log", "trainer-9.log", "sampler-0.log", "notes.txt", "x.log"):
        (tmp_path / name).touch()
    found = log_files(tmp_path)
    assert list(found) == [("sampler", 0), ("trainer", 9), ("trainer", 10)]
    assert os.path.basename(found["trainer", 9]) == "trainer-9.log"
    assert log_files(tmp_path / "nowhere") == {}
