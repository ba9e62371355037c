"""How many images a second a machine answers in time, be it at hand or not.

    python -m deploy.capacity sweep.json --deadline-ms 25
    python -m deploy.capacity sweep.json --speed 2 --cores 8 --workers 7 --rates 5000 10000

The server's own scheduler and overload controller are simulated with what a recording of
`deploy.sweep` holds: what stages and requests cost, and what every exit said of the images.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from deploy.files import need_writable
from deploy.loadtest.schedules import KINDS, SWING_SECONDS
from deploy.options import count, positive, share
from deploy.sweep.engine import Row, workers_of
from deploy.sweep.prediction import overhead_of, predict
from deploy.sweep.recording import read_recording
from model.table import markdown_table

FEWEST_REQUESTS, MOST_REQUESTS = 100, 20_000
"""Of one simulation: its load is made longer, or shorter, for as many."""
FEWEST_DEADLINES = 20
"""Of a load that is made shorter, if they are no more than a swing: in fewer no backlog would be
late."""
WITHIN = 0.02
"""How exactly a capacity is found, as a share of it."""


@dataclass(frozen=True, slots=True)
class Imagined:
    """How a machine differs from the one that was recorded."""

    speed: float = 1.0
    """Of everything."""
    stage_speed: float = 1.0
    """Of stages, on top of that."""
    cores: int | None = None
    workers: int | None = None
    deadline_ms: float | None = None
    clients: bool = False
    """Whether clients share its cores, as they did where the recording was made."""


def simulated(said: Row, machine: Imagined, kind: str, rate: float, seconds: float) -> Row:
    """What becomes of a load.

    Args:
        said: a recording of a sweep.
        machine: what to imagine.
        kind: of the load.
        rate: mean, in images a second.
        seconds: its length.

    Returns:
        As `predict` gives it, and how many a second were offered, of as many as were drawn.
    """
    cores = machine.cores or said["cores"]
    deadline = (machine.deadline_ms or said["deadline_ms"]) / 1e3
    # Stages take longer the busier a machine is, so costs come from a load as heavy for its own.
    own_rate = rate * said["cores"] / (cores * machine.speed)
    heavy = said["costs"]["full_depth_per_second"]
    row = min(said["rows"], key=lambda r: (r["kind"] != kind, abs(r["load"] * heavy - own_rate)))
    faster = machine.speed * machine.stage_speed
    engine = {
        **row["engine"],
        "seconds": {
            stage: {size: s / faster for size, s in sizes.items()}
            for stage, sizes in row["engine"]["seconds"].items()
        },
        **_workers(row["engine"], machine, cores),
    }
    client_seconds = row["client_ms"] / 1e3 / machine.speed if machine.clients else 0.0
    overhead = overhead_of(said["costs"], client_seconds, deadline, cores, machine.speed)
    sent = [(at, at) for at in KINDS[kind](rate, seconds)]
    found = predict(
        engine, sent, said["confidences"], deadline, seconds, overhead, said.get("right")
    )
    return {"offered_per_second": len(sent) / seconds, **found}


def _workers(engine: Row, machine: Imagined, cores: float) -> Row:
    """How many there are, and for what the last one leaves its core: never where it is asked for,
    nor where there is a core beside it."""
    most = machine.workers or workers_of(engine)
    shared = machine.workers is None and most >= cores
    http_seconds = engine.get("http_seconds", 0.0) / machine.speed if shared else 0.0
    return {"most_workers": most, "http_seconds": http_seconds}


def load_seconds(kind: str, rate: float, wanted: float, deadline: float) -> float:
    """How long a load to simulate is: as wanted, but for too few or too many requests.

    In whole swings of bursts, over which alone their mean rate is kept.

    Args:
        kind: of the load.
        rate: mean, in images a second.
        wanted: seconds of a load of usual rate.
        deadline: of every request, in seconds.
    """
    least = min(SWING_SECONDS, FEWEST_DEADLINES * deadline)
    length = max(FEWEST_REQUESTS / rate, min(wanted, max(least, MOST_REQUESTS / rate)))
    return SWING_SECONDS * max(1, round(length / SWING_SECONDS)) if kind == "bursts" else length


def capacity(answered: Callable[[float], bool], step: Callable[[], object] = lambda: None) -> float:
    """The largest rate, in images a second, at which a load is answered well enough.

    Args:
        answered: whether it is, at a rate.
        step: called after each try.

    Returns:
        0 where not even one image a second is.
    """
    low, high = 0.0, 1.0
    while answered(high):
        low, high = high, 2 * high
        step()
    while low and high / low > 1 + WITHIN:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if answered(middle) else (low, middle)
        step()
    return low


def main(argv: list[str] | None = None) -> int:
    """Print capacities, then a row for each rate; a failure is one sentence and status 2."""
    arguments = _parser().parse_args(argv)
    try:
        need_writable(arguments.json)
        said = read_recording(arguments.recording)
        machine = _imagined(arguments, said)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    deadline = (machine.deadline_ms or said["deadline_ms"]) / 1e3

    def load(rate: float) -> Row:
        length = load_seconds(arguments.kind, rate, arguments.seconds, deadline)
        return simulated(said, machine, arguments.kind, rate, length)

    enough = arguments.in_time
    with tqdm(desc="simulations", leave=False, disable=None) as bar:
        bent = capacity(lambda r: load(r)["in_time_share"] >= enough, bar.update)
        whole = capacity(
            lambda r: (x := load(r))["in_time_share"] - x["degraded_share"] >= enough, bar.update
        )
        # Of few requests that are drawn at random there are noticeably more or fewer than asked.
        whole, bent = (load(rate)["offered_per_second"] if rate else 0.0 for rate in (whole, bent))
        rates = arguments.rates or [max(1, round(f * bent)) for f in (0.5, 1.0, 1.5)]
        rows = [{"rate": rate, **load(rate)} for rate in rates]
    print(
        f"{arguments.kind}, {enough:.1%} in time: {whole:.0f} images a second as the policy asks, "
        f"{bent:.0f} with answers bent\n\n{_table(rows)}"
    )
    if arguments.json:
        found = {"machine": dataclasses.asdict(machine), "as_asked": whole, "bent": bent}
        arguments.json.write_text(json.dumps({**found, "rows": rows}) + "\n")
    return 0


def _imagined(arguments: argparse.Namespace, said: Row) -> Imagined:
    names = [f.name for f in dataclasses.fields(Imagined)]
    machine = Imagined(**{name: getattr(arguments, name) for name in names})
    cores = machine.cores or said["cores"]
    workers = machine.workers or max(workers_of(row["engine"]) for row in said["rows"])
    if workers > cores:
        raise ValueError(f"{workers} workers want a core each, and there are {cores}")
    return machine


def _table(rows: list[Row]) -> str:
    exits = sorted({k for row in rows for k in row["exits"]}, key=int)
    heads = ["offered/s", "in time/s", "in time", "refused", "degraded", "effective accuracy"]
    heads += [f"exit {k}" for k in exits]
    return markdown_table(heads, [_cells(row, exits) for row in rows])


def _cells(row: Row, exits: list[str]) -> list[str]:
    accuracy, answers = row["effective_accuracy"], max(1, sum(row["exits"].values()))
    return [
        _offered(row),
        f"{row['goodput_per_second']:.0f}",
        *(f"{row[f'{name}_share']:.1%}" for name in ("in_time", "refused", "degraded")),
        "-" if accuracy is None else f"{accuracy:.1%}",
        *(f"{row['exits'].get(k, 0) / answers:.0%}" for k in exits),
    ]


def _offered(row: Row) -> str:
    """The rate that was drawn; beside the asked one, where few requests make them differ."""
    drawn, asked = row["offered_per_second"], row["rate"]
    return f"{asked:.0f}" if abs(drawn - asked) <= WITHIN * asked else f"{drawn:.0f} of {asked:.0f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.capacity",
        description=__doc__.split("\n", 1)[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("recording", type=Path, help="what deploy.sweep --json wrote")
    parser.add_argument("--speed", type=positive, default=1.0, help="of the machine, times its own")
    parser.add_argument(
        "--stage-speed", type=positive, default=1.0, help="of stages, times that (an accelerator)"
    )
    parser.add_argument("--cores", type=count, help="by default the recorded machine's")
    parser.add_argument(
        "--workers", type=count, help="stage batches at the same time; by default as recorded"
    )
    parser.add_argument("--deadline-ms", type=positive, help="by default as recorded")
    parser.add_argument("--clients", action="store_true", help="that share the cores, as recorded")
    parser.add_argument("--kind", choices=sorted(KINDS), default="poisson", help="of the load")
    parser.add_argument("--rates", type=positive, nargs="+", help="images a second, a row for each")
    parser.add_argument(
        "--seconds", type=positive, default=4.0, help="length of a load of usual rate"
    )
    parser.add_argument(
        "--in-time", type=share, default=0.999, help="share of answers that is enough"
    )
    parser.add_argument("--json", type=Path, help="write every figure here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
