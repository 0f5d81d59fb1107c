"""`ingot ui`: the embedded MLflow store in the browser, on this machine only."""

import argparse
import socket

from configs.errors import MachineError
from pipeline.embedded import serve, set_environment
from pipeline.places import tracking_uri
from pipeline.tracking import make_schema
from pipeline.verbs.asked import load_asked


def ui(args: argparse.Namespace) -> int:
    """Serve until stopped. MachineError if the port is taken."""
    asked = load_asked(args)
    store = asked.store(print)
    uri = tracking_uri(asked.recipe.tracking, store.root)
    if uri.startswith("http"):
        print(f"tracking.uri = {uri}: that server shows the runs; open it in a browser")
        return 0
    if not is_free(args.port):
        raise MachineError(
            f"--port {args.port}: 127.0.0.1:{args.port} is taken; end what listens there, or "
            f"choose another: --port {args.port + 1}"
        )
    store.prepare()
    set_environment(asked.recipe.tracking)
    make_schema(uri, store.root)
    print(f"MLflow on http://127.0.0.1:{args.port} (Ctrl-C stops it)", flush=True)
    return serve(uri, store.root, args.port)


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
