"""``python -m lightning_curvadion store``: holds the address at which the replicas of an elastic run meet."""

import argparse
import sys
import time

from ..sync.membership import host_store, pulse

# How often it looks whether a run goes on.
_POLL = 1.0


def main(args: list[str]) -> int:
    """Run the command, until it is ended or nothing goes on.

    Args:
        args: What follows ``python -m lightning_curvadion store``.

    Returns:
        The exit status: 0, or 2 where the port cannot be had.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lightning_curvadion store",
        description="Hold the address at which the replicas of runs with CurvaDionStrategy(elastic=True) meet. It must"
        " outlive every replica. Whoever reaches it may join: keep it in a private network.",
    )
    parser.add_argument("--port", type=int, default=29400, help="default: %(default)s")
    parser.add_argument("--host", default="0.0.0.0", metavar="ADDRESS", help="of the interface; default: %(default)s")
    parser.add_argument("--idle", type=float, metavar="SECONDS", help="end once nothing has gone on for so long")
    options = parser.parse_args(args)
    try:
        store = host_store(options.port, options.host)
    except RuntimeError as error:
        print(f"store: port {options.port} cannot be had: {error}", file=sys.stderr)
        return 2
    print(f"store: replicas meet at port {store.port}", flush=True)
    last, beat = time.monotonic(), pulse(store)
    try:
        while options.idle is None or time.monotonic() < last + options.idle:
            time.sleep(_POLL)
            if (now := pulse(store)) != beat:
                last, beat = time.monotonic(), now
    except KeyboardInterrupt:
        pass
    return 0
