"""The command line: python -m deploy.peers --images DIR.

Starts each server in turn with the same bundle, each peer in a virtual environment of its own,
loads it, and prints one table beside what was aimed at. A peer that cannot be installed or does not
answer is a row that says so.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from deploy.files import need_picture, need_writable
from deploy.loadtest.samples import Sample, read_samples
from deploy.loadtest.schedules import KINDS, check_swings
from deploy.options import count, positive
from deploy.peers import closed, goals, offered, profile
from deploy.peers.peer import OTHERS, OUR_WAYS, OURS, Peer, PeerError, pinned
from deploy.peers.running import prepare, started
from model.bundle import DESCRIPTION, Description

CLOSED_SECONDS, OFFERED_SECONDS = 8.0, 4.0
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every server; a failure that concerns them all is one sentence and status 2."""
    arguments = _parser().parse_args(argv)
    try:
        need_writable(arguments.json, arguments.plot)
        need_picture(arguments.plot)
        if arguments.offered:
            check_swings(arguments.seconds or OFFERED_SECONDS)
        samples = read_samples(arguments.images, arguments.most_images)
        said = _offered(arguments, samples) if arguments.offered else _closed(arguments, samples)
        said["images"] = len(samples)
        _write(arguments.json, said)  # already here, since what is made of the rows may fail
        _report(arguments, said)
        _write(arguments.json, said)
    except (ValueError, OSError, PeerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _write(file: Path | None, said: Row) -> None:
    if file:
        file.write_text(json.dumps(said, indent=1) + "\n")


def _report(arguments: argparse.Namespace, said: Row) -> None:
    """Add the goals, and print and draw what is made of the rows."""
    if arguments.offered:
        depths = said["full_depth_per_second"], said["first_exit_per_second"]
        aimed = goals.of_offered(said["rows"], *depths)
    else:
        aimed = goals.of_closed(said["rows"])
    said["goals"] = [goal.cells for goal in aimed]
    if aimed:
        print(f"\n{goals.table(aimed)}")
    for row in said["rows"]:
        if "profile" in row:
            print(f"\n{row['name']}\n\n{profile.table(row['profile'])}")
    if arguments.offered and arguments.plot:
        offered.plot(said["rows"], arguments.plot)


def _closed(arguments: argparse.Namespace, samples: list[Sample]) -> Row:
    rows: list[Row] = []
    for peer in tqdm(_chosen(arguments, (*OTHERS, *OUR_WAYS)), "servers"):
        try:
            rows.append(_closed_row(arguments, peer, _wrapped(peer, samples)))
        except (PeerError, OSError) as error:
            rows.append({"name": peer.name, "failed": str(error)})
    print(closed.table(rows))
    return {"rows": rows}


def _closed_row(arguments: argparse.Namespace, peer: Peer, samples: list[Sample]) -> Row:
    python = prepare(peer, arguments.environments.expanduser())
    with started(peer, python, arguments.bundle.resolve(), samples[0]) as pid:
        time.sleep(arguments.quiet_seconds)
        return closed.measure(peer, pid, samples, arguments.seconds or CLOSED_SECONDS)


def _offered(arguments: argparse.Namespace, samples: list[Sample]) -> Row:
    seconds = arguments.seconds or OFFERED_SECONDS
    exits = len(_description(arguments.bundle).exits)
    alone = [pinned(exit) for exit in range(1, exits + 1)]
    peers = _chosen(arguments, (*OTHERS, *alone, OURS))
    minutes = offered.longest_seconds(len(peers), seconds) / 60
    print(f"{len(peers)} servers, {minutes:.0f} minutes at most", file=sys.stderr)
    bundle = arguments.bundle.resolve()
    with started(OURS, sys.executable, bundle, samples[0]):
        full_depth = offered.capacity(OURS, samples, seconds, f"min_exit={exits}")
        first_exit = offered.capacity(OURS, samples, seconds, "max_exit=1")
    rows: list[Row] = []
    runs = [(peer, kind) for peer in peers for kind in KINDS]
    for peer, kind in tqdm(runs, "servers and kinds of load"):
        loads = offered.loads(kind, full_depth, seconds)
        mine = _wrapped(peer, samples)
        try:
            python = prepare(peer, arguments.environments.expanduser())
            with started(peer, python, bundle, mine[0]):
                time.sleep(arguments.quiet_seconds)
                for row in offered.measure(peer, mine, loads):
                    rows.append(row)  # at once, since a later one may fail
        except (PeerError, OSError) as error:
            rows.append({"name": peer.name, "kind": kind, "failed": str(error)})
    print(f"full depth {full_depth:.0f} images/s, first exit {first_exit:.0f} images/s\n")
    print(offered.table(rows))
    return {
        "full_depth_per_second": full_depth,
        "first_exit_per_second": first_exit,
        "rows": rows,
    }


def _chosen(arguments: argparse.Namespace, peers: Sequence[Peer]) -> list[Peer]:
    names = [peer.name for peer in peers]
    unknown = sorted(set(arguments.only or ()) - set(names))
    if unknown:
        raise ValueError(f"no server is called {unknown[0]}; there are {', '.join(names)}")
    return [peer for peer in peers if not arguments.only or peer.name in arguments.only]


def _wrapped(peer: Peer, samples: Sequence[Sample]) -> list[Sample]:
    return [Sample(peer.wrap(sample.data), sample.label) for sample in samples]


def _description(bundle: Path) -> Description:
    return Description.model_validate_json((bundle / DESCRIPTION).read_bytes())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.peers",
        description="Compare Offramp with other servers of the same network.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--images", type=Path, required=True, help="folder or tar of CLASS/*")
    parser.add_argument("--bundle", type=Path, default=Path("model/default"), help="what to serve")
    parser.add_argument(
        "--most-images",
        type=count,
        default=500,
        help="images to send; each server's accuracy is that of its answers to all of them",
    )
    parser.add_argument(
        "--offered",
        action="store_true",
        help="offer loads of 0.2 to 3 times our full-depth capacity with a deadline of 50 ms, "
        "whatever is answered, instead of waiting for answers",
    )
    parser.add_argument(
        "--seconds",
        type=positive,
        help=f"of each load, instead of {CLOSED_SECONDS:g}, or {OFFERED_SECONDS:g} with --offered",
    )
    parser.add_argument(
        "--quiet-seconds", type=float, default=1.0, help="between a server's start and its load"
    )
    parser.add_argument(
        "--environments",
        type=Path,
        default=Path("~/.cache/offramp/peers"),
        help="where virtual environments are made and kept",
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="a server; may be repeated")
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--plot", type=Path, help="write the picture of --offered here (PNG)")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: told to stop"))  # with the server
    sys.exit(main())
