"""The simulation of a recorded load."""

from __future__ import annotations

import random
from collections.abc import Sequence

from deploy.simulator import Arrival, Overhead, simulate
from deploy.sweep.engine import Row, cost_table, workers_of
from deploy.sweep.measuring import Confidences
from deploy.sweep.pace import Moments, pace_of, together
from model.policy import Rule
from server.arrival import reserve_seconds
from server.overload import Level, OverloadController
from server.scheduler import Scheduler
from server.tickets import DEGRADED


def overhead_of(
    costs: Row, client_seconds: float, deadline: float, cores: float, speed: float = 1.0
) -> Overhead:
    """What is spent outside stages.

    Args:
        costs: as a recording holds them.
        client_seconds: of each request's client on the same cores.
        deadline: of every request, in seconds.
        cores: of the machine.
        speed: of the machine, over the recorded one's.
    """
    return Overhead(
        begin_seconds=costs["begin"] / speed,
        answer_seconds=costs["answer"] / speed,
        refuse_seconds=costs["refuse"] / speed,
        batch_seconds=costs["batch"] / speed,
        client_seconds=client_seconds,
        reserve_seconds=reserve_seconds(deadline),
        cores=cores,
    )


def predict(
    engine: Row,
    sent: Sequence[tuple[float, float]],
    confidences: Sequence[Confidences],
    deadline: float,
    load_seconds: float,
    overhead: Overhead,
    right: Sequence[Sequence[bool]] | None = None,
    moments: Moments = (),
) -> Row:
    """Simulate a load on the server's scheduler.

    Args:
        engine: as `GET /engine` gives it.
        sent: when each request should have been sent, and when it was.
        confidences: by image; images are drawn as the load tester draws them.
        deadline: in seconds.
        load_seconds: length of the load; goodput is over it, as `summarise` measures it.
        overhead: what is spent outside stages.
        right: by image, whether each exit is right; for the effective accuracy.
        moments: how long batches took in the course of the load, where that was watched; else as
            long as the engine says throughout.
    """
    costs = cost_table(engine, moments[0][1] / together(engine) if moments else 1.0)
    ladder = [Level(x["max_accuracy_loss"], tuple(x["thresholds"])) for x in engine["ladder"]]
    controller = OverloadController(ladder, deadline)
    scheduler = Scheduler(
        costs, controller, engine["max_batch"], workers_of(engine), engine.get("http_seconds", 0.0)
    )
    chance, images = random.Random(0), range(len(confidences))
    drawn = [chance.choice(images) for _ in sent]
    load = [
        Arrival(at, tuple(confidences[image]), deadline)
        for image, (_, at) in zip(drawn, sent, strict=True)
    ]
    late = {id(a): at - intended for a, (intended, at) in zip(load, sent, strict=True)}
    rule = Rule((*ladder[0].thresholds, 0.0), 1, costs.stages)
    outcomes = simulate(scheduler, load, rule, overhead, pace_of(moments))
    in_time = [o for o in outcomes if o.exit and o.seconds + late[id(o.arrival)] <= deadline]
    of_image = {id(a): image for a, image in zip(load, drawn, strict=True)}
    return {
        "goodput_per_second": sum(o.finished <= load_seconds for o in in_time) / load_seconds,
        "in_time_share": len(in_time) / len(outcomes),
        "refused_share": sum(o.refused for o in outcomes) / len(outcomes),
        "degraded_share": sum(o.reason in DEGRADED for o in outcomes) / len(outcomes),
        "effective_accuracy": None
        if right is None
        else sum(right[of_image[id(o.arrival)]][o.exit - 1] for o in in_time) / len(outcomes),
        "exits": {str(k): sum(o.exit == k for o in outcomes) for k in range(1, costs.stages + 1)},
    }
