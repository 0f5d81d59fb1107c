"""`ingot ui` in a folder of runs, and what a stranger's process gets from its registry."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.line.runs import ingot, start
from tests.pipeline.test_tracking_servers import free_port

_START_SECONDS = 180.0


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """`ingot ui` in the folder: the link that it prints once its server answers."""
    server = start(folder, "ui", "--port", str(free_port()))
    try:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and server.poll() is None:
            if found := re.search(r"^MLflow: (\S+)", (folder / "output.txt").read_text(), re.M):
                yield found[1]
                return
            time.sleep(0.2)
        raise TimeoutError((folder / "output.txt").read_text())
    finally:
        server.terminate()
        server.wait(30)


def base(link: str) -> str:
    """The address of the server in its link."""
    return link.partition("/#/")[0]


def strangers_answer(link: str, model: str, prompt: str, *, apart: Path) -> str:
    """The greedy answer of a registered model in a process that knows MLflow and transformers."""
    code = (
        "import sys, mlflow; mlflow.set_tracking_uri(sys.argv[1]);"
        "model = mlflow.pyfunc.load_model(sys.argv[2]);"
        "print('answer', model.predict([sys.argv[3]], params={'do_sample': False})[0])"
    )
    words = [sys.executable, "-I", "-c", code, base(link), f"models:/{model}", prompt]
    done = subprocess.run(words, cwd=apart, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].removeprefix("answer ")


def our_answer(folder: Path, prompt: str) -> str:
    """The greedy answer of the post-trained model of the folder's store."""
    done = ingot(folder, "sample", "posttrain", "--prompt", prompt, "--temperature", "0")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]
