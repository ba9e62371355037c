"""The command line of training: one command for each step of a bundle's life."""

from __future__ import annotations

import argparse
import io
import sys

import torch

from model.bundle import BundleError
from training import calibrate, evaluate, export, report, resample, train
from training.data import DataError
from training.interrupt import Interrupted
from training.run import TrainingError

COMMANDS = (train, calibrate, resample, evaluate, export, report)


def main(argv: list[str] | None = None) -> int:
    """Run one command; a failure that the user can mend is one sentence and exit status 2."""
    _print_any_name()
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_command(commands)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except (DataError, TrainingError, BundleError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print(
            "error: the card's memory is full; train takes less of it with a larger --accumulate "
            "or a smaller --batch-size",
            file=sys.stderr,
        )
        return 2
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Interrupted as left:
        print(left, file=sys.stderr)
        return left.status
    return 0


def _print_any_name() -> None:
    """Names of files that are no UTF-8 have codes in them, where Python would stop."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
