"""Two machines and a server of objects, as namespaces of the network on this one.

    first 10.77.1.2 ---- hub 10.77.1.1, 10.77.2.1 ---- second 10.77.2.2
    head of Ray, driver   S3 at port 9000               a node of Ray

Each has caches and temporary folders of its own, so that the two share the network and nothing
else. Needs root and iproute2.
"""

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.line.runs import INGOT, environment
from tests.objects import BUCKET, CREDENTIALS

RAY = Path(sys.executable).with_name("ray")
HUB, FIRST, SECOND = "ingot-hub", "ingot-first", "ingot-second"
_ADDRESS = {FIRST: "10.77.1.2", SECOND: "10.77.2.2"}
_GATEWAY = {FIRST: "10.77.1.1", SECOND: "10.77.2.1"}
_PORT = 6379
_START_SECONDS, _WAIT_SECONDS = 90.0, 300.0


def is_possible() -> bool:
    """Whether this process may make namespaces, and has what makes them."""
    return os.geteuid() == 0 and shutil.which("ip") is not None


@dataclass
class Cluster:
    """Namespaces, and what was started in them."""

    folder: Path
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    processes: list["subprocess.Popen[str]"] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Where the bucket is."""
        return f"s3://{BUCKET}"

    @property
    def address(self) -> str:
        """What `cluster.address` is to be."""
        return f"{_ADDRESS[FIRST]}:{_PORT}"

    def start(
        self, machine: str, words: Sequence[str], *, name: str, **variables: str | None
    ) -> "subprocess.Popen[str]":
        """Start a command on a machine; what it prints goes to `<name>.txt`.

        A variable of its environment that is None is taken away.
        """
        settings = environment() | self._environment() | variables
        own = self.folder / machine
        binds = []
        for path in (Path("/tmp/ray"), self.folder / "cache", self.folder / "work"):
            (own / path.name).mkdir(parents=True, exist_ok=True)
            path.mkdir(parents=True, exist_ok=True)
            binds.append(f"mount --bind '{own / path.name}' '{path}'")
        script = " && ".join([*binds, f"cd '{self.folder / 'work'}'", 'exec "$@"'])
        with (self.folder / f"{name}.txt").open("w") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", machine, "sh", "-c", script, "sh", *words],
                env={key: value for key, value in settings.items() if value is not None},
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def printed(self, name: str) -> str:
        """What a command printed so far."""
        return (self.folder / f"{name}.txt").read_text()

    def run(
        self, *settings: str, name: str = "driver", machine: str = FIRST, **variables: str | None
    ) -> "subprocess.Popen[str]":
        """Start `ingot run smoke`, its store on the server."""
        words = [str(INGOT), "run", "smoke"]
        for one in (f"store.url={self.url}/store", *settings):
            words += ["--set", one]
        return self.start(machine, words, name=name, **variables)

    def files(self, machine: str, pattern: str) -> list[Path]:
        """What a machine keeps of the store, by a pattern below `artifacts`."""
        return sorted((self.folder / machine / "cache").glob(f"ingot/stores/*/artifacts/{pattern}"))

    def start_ray(self, machine: str, **variables: str | None) -> "subprocess.Popen[str]":
        """Start Ray on a machine, the head on the first."""
        words = [str(RAY), "start", "--block", f"--node-ip-address={_ADDRESS[machine]}"]
        words += ["--num-cpus=2", "--object-store-memory=200000000", "--disable-usage-stats"]
        if machine == FIRST:
            words += ["--head", f"--port={_PORT}", "--include-dashboard=false"]
        else:
            words += [f"--address={self.address}"]
        process = self.start(
            machine, words, name=f"ray-{machine}", RAY_worker_niceness="0", **variables
        )
        self.wait_for(lambda: "will now block" in self.printed(f"ray-{machine}"), process, machine)
        return process

    def wait_for(
        self, happened: Callable[[], bool], process: "subprocess.Popen[str]", what: str
    ) -> None:
        """Return once something happened; an error if the process ends first, or it takes long."""
        deadline = time.monotonic() + _WAIT_SECONDS
        while not happened():
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(
                    f"{what}: ended with {process.poll()}:\n{self.printed('driver')[-8000:]}"
                )
            time.sleep(0.2)

    def kill(self, process: "subprocess.Popen[str]") -> None:
        """End a process and all below it, as a machine that loses its power does."""
        with suppress(psutil.NoSuchProcess):
            family = [*psutil.Process(process.pid).children(recursive=True)]
            for one in [psutil.Process(process.pid), *family]:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
        process.wait(30)

    def _environment(self) -> dict[str, str]:
        return {
            **CREDENTIALS,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": "http://10.77.1.1:9000",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }


@contextmanager
def machines(folder: Path) -> Iterator[Cluster]:
    """The machines and the server, without Ray, ended afterwards."""
    made = Cluster(folder)
    try:
        _lay_wires()
        _serve(made)
        yield made
    finally:
        for process in reversed(made.processes):
            made.kill(process)
        for name in (HUB, FIRST, SECOND):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _lay_wires() -> None:
    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    for name in (HUB, FIRST, SECOND):
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")
    for number, name in enumerate((FIRST, SECOND), start=1):
        near, far = f"ingot{number}", f"ingoth{number}"
        ip("link", "add", near, "netns", name, "type", "veth", "peer", "name", far, "netns", HUB)
        ip("-n", name, "address", "add", f"{_ADDRESS[name]}/24", "dev", near)
        ip("-n", HUB, "address", "add", f"{_GATEWAY[name]}/24", "dev", far)
        ip("-n", name, "link", "set", near, "up")
        ip("-n", HUB, "link", "set", far, "up")
        ip("-n", name, "route", "add", "default", "via", _GATEWAY[name])
    ip("netns", "exec", HUB, "sysctl", "-qw", "net.ipv4.ip_forward=1")


def _serve(made: Cluster) -> None:
    serving = [sys.executable, "-m", "moto.server", "-H", "0.0.0.0", "-p", "9000"]
    made.start(HUB, serving, name="objects")
    making = "import s3fs; s3fs.S3FileSystem().mkdir('" + BUCKET + "')"
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if made.start(FIRST, [sys.executable, "-c", making], name="bucket").wait(60) == 0:
            return
        time.sleep(1)
    raise TimeoutError(made.printed("objects") + made.printed("bucket"))
