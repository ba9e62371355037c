"""The simulation of a recorded load."""

from __future__ import annotations

import random
from collections.abc import Sequence

from deploy.simulator import Arrival, Overhead, simulate
from deploy.sweep.engine import Row, cost_table
from deploy.sweep.measuring import Confidences
from model.policy import Rule
from server.overload import Level, OverloadController
from server.scheduler import Scheduler


def predict(
    engine: Row,
    sent: Sequence[tuple[float, float]],
    confidences: Sequence[Confidences],
    deadline: float,
    load_seconds: float,
    overhead: Overhead,
) -> Row:
    """Simulate a load on the server's scheduler.

    Args:
        engine: as `GET /engine` gives it.
        sent: when each request should have been sent, and when it was.
        confidences: by image; images are drawn as the load tester draws them.
        deadline: in seconds.
        load_seconds: length of the load; goodput is over it, as `summarise` measures it.
        overhead: what is spent outside stages.
    """
    costs = cost_table(engine)
    ladder = [Level(x["max_accuracy_loss"], tuple(x["thresholds"])) for x in engine["ladder"]]
    controller = OverloadController(ladder, deadline)
    scheduler = Scheduler(costs, controller, engine["max_batch"], engine.get("workers", 1))
    chance = random.Random(0)
    load = [Arrival(at, chance.choice(confidences), deadline) for _, at in sent]
    late = {id(a): at - intended for a, (intended, at) in zip(load, sent, strict=True)}
    rule = Rule((*ladder[0].thresholds, 0.0), 1, costs.stages)
    outcomes = simulate(scheduler, load, rule, overhead=overhead)
    in_time = [o for o in outcomes if o.exit and o.seconds + late[id(o.arrival)] <= deadline]
    return {
        "goodput_per_second": sum(o.finished <= load_seconds for o in in_time) / load_seconds,
        "in_time_share": len(in_time) / len(outcomes),
        "refused_share": sum(o.refused for o in outcomes) / len(outcomes),
        "exits": {str(k): sum(o.exit == k for o in outcomes) for k in range(1, costs.stages + 1)},
    }
