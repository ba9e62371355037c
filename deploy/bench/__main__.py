"""The command line: python -m deploy.bench stages --bundle DIR."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

from deploy.bench.stages import CLOCKS, measure, table
from model.bundle import BundleError, load_servable
from server.programs import compiler


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table; a failure is one sentence and exit status 2."""
    arguments = _parser().parse_args(argv)
    warnings.filterwarnings("ignore")  # torch's own, while compiling
    try:
        if arguments.clock == "cpu" and arguments.threads != 1:
            raise RuntimeError("--clock cpu counts one thread, so --threads must be 1")
        if compiler() is None:
            raise RuntimeError("there is no C++ compiler (g++, or the one CXX names)")
        bundle = load_servable(arguments.bundle)
        clock = CLOCKS[arguments.clock]
        rows = measure(bundle, arguments.batches, arguments.threads, arguments.seconds, clock)
        if arguments.json:
            said = [
                {**row.as_dict(), "threads": arguments.threads, "clock": arguments.clock}
                for row in rows
            ]
            arguments.json.write_text(json.dumps(said, indent=2) + "\n")
    except (BundleError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    stages = commands.add_parser(
        "stages",
        help="what it costs to run a network stage by stage, against the whole at once",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    stages.add_argument("--bundle", type=Path, default=Path("model/default"), help="what to run")
    stages.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="batch sizes")
    stages.add_argument("--threads", type=int, default=1, help="inside one operation")
    stages.add_argument("--seconds", type=float, default=4.0, help="length of each measurement")
    stages.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu leaves out what other programs take of the core",
    )
    stages.add_argument("--json", type=Path, help="write every figure here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
