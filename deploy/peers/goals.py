"""What was aimed at, beside what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploy.loadtest.schedules import PEAK
from deploy.peers import closed
from deploy.peers.peer import BEST_BACKEND, EAGER, OTHERS, OUR_WAYS, OURS, PLAIN
from model.policy import Reason
from model.table import markdown_table

LATENCY_TIMES_PLAIN = 6.0
LATENCY_TIMES_BEST_BACKEND = 1.5
THROUGHPUT_TIMES_EAGER = 4.0
THROUGHPUT_TIMES_BEST_BACKEND = 1.8
MOST_OVERHEAD = 0.15
MOST_ACCURACY_LOSS = 0.01
CALM_SHARE = 0.9
"""Of first-exit capacity: while no more is offered nothing may be refused or late."""
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Goal:
    """One goal and what became of it."""

    name: str
    value: float
    goal: float
    at_most: bool = False
    form: str = "{:.2f} times"

    @property
    def met(self) -> bool:
        """Whether the value is on the right side of the goal."""
        return self.value <= self.goal if self.at_most else self.value >= self.goal

    @property
    def cells(self) -> list[str]:
        """The goal as a row of the table."""
        said, goal = self.form.format(self.value), self.form.format(self.goal)
        bound = "at most" if self.at_most else "at least"
        return [self.name, said, f"{bound} {goal}", "met" if self.met else "missed"]


def table(goals: Sequence[Goal]) -> str:
    """Goals as Markdown."""
    return markdown_table(["goal", "measured", "aimed at", ""], [goal.cells for goal in goals])


def of_closed(rows: Sequence[Row]) -> list[Goal]:
    """The goals of the closed loop, as far as the servers that they name were measured.

    Of our own ways they are for the fastest that is as accurate as the best peer, within a point,
    and whose answers no load bent: those would be faster than what its accuracy is known of.
    """
    measured = {row["name"]: row for row in rows if "failed" not in row}
    ways = [measured[way.name] for way in OUR_WAYS if way.name in measured]
    ways = [way for way in ways if not _bent(way)]
    fair = [way for way in ways if (_accuracy_loss(way, measured) or 0) <= MOST_ACCURACY_LOSS]
    return list(_of_closed(max(fair, key=closed.saturated), measured)) if fair else []


def _bent(row: Row) -> bool:
    reasons = {reason for load in row["clients"].values() for reason in load["reasons"]}
    return bool(reasons & {Reason.OVERLOAD, Reason.DEADLINE})


def _of_closed(ours: Row, measured: Mapping[str, Row]) -> Iterator[Goal]:
    plain, best = measured.get(PLAIN.name), measured.get(BEST_BACKEND.name)
    eager = [measured[peer.name] for peer in EAGER if peer.name in measured]
    for name, other, goal in (
        ("plain FastAPI", plain, LATENCY_TIMES_PLAIN),
        (BEST_BACKEND.name, best, LATENCY_TIMES_BEST_BACKEND),
    ):
        if other:
            times = closed.unloaded_ms(other) / closed.unloaded_ms(ours)
            yield Goal(
                f"unloaded median latency of {name} over that of {ours['name']}", times, goal
            )
    if eager:
        fastest = max(eager, key=closed.saturated)
        times = closed.saturated(ours) / closed.saturated(fastest)
        name = (
            f"saturated throughput of {ours['name']} over the best eager peer's, {fastest['name']}"
        )
        yield Goal(name, times, THROUGHPUT_TIMES_EAGER)
    if best:
        times = closed.saturated(ours) / closed.saturated(best)
        name = f"saturated throughput of {ours['name']} over that of {BEST_BACKEND.name}"
        yield Goal(name, times, THROUGHPUT_TIMES_BEST_BACKEND)
    overhead = ours["profile"]["outside_stages"]
    name = "share of the machine outside stages at saturation"
    yield Goal(name, overhead, MOST_OVERHEAD, at_most=True, form="{:.1%}")
    loss = _accuracy_loss(ours, measured)
    if loss is not None:
        name = "accuracy below the best peer's"
        yield Goal(name, loss, MOST_ACCURACY_LOSS, at_most=True, form="{:.1%}")


def _accuracy_loss(ours: Row, measured: Mapping[str, Row]) -> float | None:
    """How far below the best peer's, if labels tell; 0.73 - 0.72 is 0.01 once it is rounded."""
    known = [measured[peer.name]["accuracy"] for peer in OTHERS if peer.name in measured]
    others = [accuracy for accuracy in known if accuracy is not None]
    if not others or ours["accuracy"] is None:
        return None
    loss: float = round(max(others) - ours["accuracy"], 6)
    return loss


def of_offered(rows: Sequence[Row], full_depth: float, first_exit: float) -> list[Goal]:
    """The goals of the offered loads.

    Args:
        rows: one a server and load.
        full_depth: our capacity, images a second.
        first_exit: our capacity if every image left at the first exit.
    """
    measured = [row for row in rows if "failed" not in row]
    ours = [row for row in measured if row["name"] == OURS.name]
    goals = []
    calm = [r for r in ours if r["load"] * _peak(r) * full_depth <= CALM_SHARE * first_exit]
    if calm:
        worst = max(calm, key=lambda r: r["late_share"] + r["refused_share"])
        share = worst["late_share"] + worst["refused_share"]
        name = f"late or refused up to {CALM_SHARE:g} of first-exit capacity, worst at {_at(worst)}"
        goals.append(Goal(name, share, 0.0, at_most=True, form="{:.2%}"))
    margins = [margin for row in ours for margin in _margins(row, measured)]
    if margins:
        margin, name = min(margins)
        name = f"effective accuracy above every other's at every load, least {name}"
        goals.append(Goal(name, margin, 0.0, form="{:+.1%}"))
    return goals


def _margins(ours: Row, measured: Sequence[Row]) -> Iterator[tuple[float, str]]:
    for row in measured:
        same = (row["kind"], row["load"]) == (ours["kind"], ours["load"])
        if same and row["name"] != ours["name"] and row["effective_accuracy"] is not None:
            margin = ours["effective_accuracy"] - row["effective_accuracy"]
            yield margin, f"over {row['name']} at {_at(ours)}"


def _peak(row: Row) -> float:
    """The highest rate of a load that lasts, over its mean."""
    return PEAK if row["kind"] == "bursts" else 1.0


def _at(row: Row) -> str:
    return f"{row['load']:g} ({row['kind']})"
