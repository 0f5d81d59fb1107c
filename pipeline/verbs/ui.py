"""`ingot ui`: the embedded MLflow store in the browser, on this machine only."""

import argparse
import socket
from pathlib import Path

from configs.errors import MachineError
from configs.masking import masked, without_login
from configs.parallel import TrackingConfig
from pipeline.embedded import serve, set_environment
from pipeline.landing import landing_page
from pipeline.places import tracking_uri
from pipeline.tracking.server import Server, open_server
from pipeline.verbs.asked import load_asked


def ui(args: argparse.Namespace) -> int:
    """Serve until stopped. MachineError if the port is taken, or the store cannot be opened."""
    asked = load_asked(args)
    store, tracking = asked.store(print), asked.recipe.tracking
    uri = tracking_uri(tracking, store.root)
    set_environment(tracking)
    if uri.startswith("http"):
        link = _landing(tracking, uri, store.root, asked.recipe.name, uri)
        print(f"{masked(uri)} shows the runs: {link}")
        return 0
    if not is_free(args.port):
        raise MachineError(
            f"--port {args.port}: 127.0.0.1:{args.port} is taken; end what listens there, or "
            f"choose another: --port {args.port + 1}"
        )
    store.prepare()
    base = f"http://127.0.0.1:{args.port}"
    link = _landing(tracking, uri, store.root, asked.recipe.name, base)
    return serve(uri, store.root, args.port, ready=f"MLflow: {link} (Ctrl-C stops it)")


def _landing(tracking: TrackingConfig, uri: str, root: Path, recipe: str, base: str) -> str:
    """The page with the table of runs; makes or migrates an embedded store."""
    server = Server(tracking, uri, root, print)
    open_server(server)
    return landing_page(without_login(base), server.experiment_id, recipe)


def is_free(port: int) -> bool:
    """Whether a server may listen on this port of 127.0.0.1."""
    with socket.socket() as probe:
        # As servers do: a port that a stopped server left in TIME_WAIT counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
