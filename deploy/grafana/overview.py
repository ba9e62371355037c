"""The dashboard that says whether clients are well served."""

from deploy.grafana.panels import (
    HERE,
    HERE_MODEL,
    Dashboard,
    Kind,
    Panel,
    Query,
    Row,
    quantile,
    rate,
)
from deploy.objectives import AVAILABILITY, DEGRADED_SHARE, LATENCY_SECONDS

REQUESTS = "offramp_requests_total"
ANSWERS = "offramp_answers_total"
FAILED = "offramp_failed_images_total"
BAD = "offramp_rejected_images_total"
ONE_IMAGE = HERE + ',route="/classify"'

TRAFFIC = Row(
    "Traffic",
    [
        Panel(
            "Rate",
            "Requests a second by status. Growing 429: see Queue, then add replicas. Growing 4xx: "
            "see Rejected images on the Engine page. Growing 5xx: the server's log has the cause "
            "under the request id.",
            "reqps",
            [Query(rate(REQUESTS, "code", selector=HERE) + " > 0", "{{code}}")],
            Kind.STACK,
            runbook="OfframpAvailabilityBurn",
        ),
        Panel(
            "Error ratio",
            "Share of images that failed on our side, each entry of a batch by itself, against "
            f"the objective of {1 - AVAILABILITY:.1%}. Above the line the error budget burns: "
            "overloaded is load, deadline_exceeded a deadline that not even the first exit could "
            "meet, internal a fault in the log.",
            "percentunit",
            [
                Query(
                    rate(FAILED, "code", selector=HERE)
                    + " / ignoring(code) group_left() ("
                    + " + ".join(rate(images, selector=HERE) for images in (ANSWERS, BAD, FAILED))
                    + ")",
                    "{{code}}",
                )
            ],
            Kind.STACK,
            limit=round(1 - AVAILABILITY, 6),
            runbook="OfframpAvailabilityBurn",
        ),
        Panel(
            "Latency",
            "From the first byte of a /classify request to the last of its answer, of those that "
            f"got one; the objective is {LATENCY_SECONDS * 1e3:g} ms. When p99 alone is high look "
            "for large images (decode, on the Engine page); when all are, for a queue or a slower "
            "device.",
            "s",
            [
                Query(
                    quantile(q, "offramp_request_duration_seconds", selector=ONE_IMAGE),
                    f"p{100 * q:g}",
                )
                for q in (0.5, 0.95, 0.99)
            ],
            limit=LATENCY_SECONDS,
            runbook="OfframpLatencyBurn",
        ),
    ],
)

ANSWERING = Row(
    "Answers",
    [
        Panel(
            "Exit mix",
            "Share of answers that left at each exit. A slow drift means other images than those "
            "that were calibrated on; a jump to the shallow side means load, to the deep side a "
            "stricter operating point or harder images.",
            "percentunit",
            [Query(rate(ANSWERS, "exit"), "exit {{exit}}")],
            Kind.SHARES,
            top=1,
            runbook="OfframpExitMixShifted",
        ),
        Panel(
            "Compute saved",
            "Multiply-accumulates not spent, as a share of what full depth would have taken. Near "
            "zero: everything goes to the last exit, so early exits cost and gain nothing.",
            "percentunit",
            [
                Query(
                    "1 - "
                    + rate("offramp_macs_total", where='kind="spent"')
                    + " / "
                    + rate("offramp_macs_total", where='kind="full"'),
                    "saved",
                )
            ],
            top=1,
            runbook="OfframpAllAtLastExit",
        ),
        Panel(
            "Degraded share",
            "Share of answers that load or a deadline made shallower than their rule asked for. "
            "Bursts are what it is for; when it stays up the server is too small: add replicas, or "
            "accept a more lossy operating point.",
            "percentunit",
            [
                Query(
                    rate(ANSWERS, "reason", 'reason=~"overload|deadline"')
                    + " / ignoring(reason) group_left "
                    + rate(ANSWERS),
                    "{{reason}}",
                )
            ],
            Kind.STACK,
            limit=DEGRADED_SHARE,
            runbook="OfframpDegradedShareHigh",
        ),
    ],
)

LOAD = Row(
    "Load",
    [
        Panel(
            "Operating point",
            "Accuracy that answers may lose against full depth, as certified; 100 % is first-exit "
            "answers without a bound. It moves up under load and is back within a second of its "
            "end; when it stays up see Degraded share.",
            "percentunit",
            [Query(f"offramp_operating_point{{{HERE_MODEL}}}", "{{instance}} {{model}}")],
            Kind.STEPS,
            runbook="OfframpDegradedShareHigh",
        ),
        Panel(
            "Queue",
            "Images that wait for each stage. A queue at stage 1 is load; one at a later stage is "
            "survivors that wait for a batch. It should be empty most of the time.",
            "short",
            [Query(f"sum by (stage) (offramp_queue_jobs{{{HERE_MODEL}}})", "stage {{stage}}")],
            Kind.STACK,
            runbook="OfframpQueueSaturated",
        ),
        Panel(
            "In flight",
            "Images accepted and not yet answered, and the most there may be (MAX_QUEUE); at the "
            "limit every further request is refused with 429.",
            "short",
            [
                Query(f"offramp_in_flight_jobs{{{HERE}}}", "{{instance}}"),
                Query(f"min(offramp_max_queue_jobs{{{HERE}}})", "limit of one"),
            ],
            runbook="OfframpQueueSaturated",
        ),
    ],
)

DETAIL = Row(
    "Exits",
    [
        Panel(
            "Latency by exit",
            "95th percentile from arrival to answer, by the exit that answered. Deeper exits take "
            "longer by their compute; when all rise together it is waiting, not computing.",
            "s",
            [
                Query(
                    quantile(0.95, "offramp_answer_duration_seconds", "exit"),
                    "p95 of exit {{exit}}",
                )
            ],
            limit=LATENCY_SECONDS,
            runbook="OfframpLatencyBurn",
        ),
        Panel(
            "Reasons",
            "Why answers left where they did. Confident and final are the policy's own; deadline "
            "and overload are degraded; max_exit is what the client asked for.",
            "percentunit",
            [Query(rate(ANSWERS, "reason"), "{{reason}}")],
            Kind.SHARES,
            top=1,
            runbook="OfframpDegradedShareHigh",
        ),
    ],
)

OVERVIEW = Dashboard(
    "overview",
    "Offramp: overview",
    "Whether clients are well served, and what early exits save.",
    [TRAFFIC, ANSWERING, LOAD, DETAIL],
)
