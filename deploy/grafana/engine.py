"""The dashboard that says what happens inside a server."""

from deploy.grafana.panels import (
    HERE,
    HERE_MODEL,
    WINDOW,
    Dashboard,
    Kind,
    Panel,
    Query,
    Row,
    quantile,
    rate,
)
from deploy.objectives import AUDIT_AGREEMENT

ANSWERED = rate("offramp_answers_total")
DECODE = rate("offramp_phase_duration_seconds_sum", where='phase="decode"', selector=HERE)
QUEUE = rate("offramp_phase_duration_seconds_sum", where='phase="queue"', selector=HERE)
ENCODE = rate("offramp_phase_duration_seconds_sum", where='phase="encode"', selector=HERE)
TO_ANSWER = rate("offramp_answer_duration_seconds_sum")
AUDITED = "sum by (exit) (increase(offramp_audited_total{%s}[1h]))"

TIME = Row(
    "Where time goes",
    [
        Panel(
            "Latency by phase",
            "Mean time of one image: decoding, waiting, computing (with the reading of its body) "
            "and encoding the answer. Decode high: large images, more DECODE_THREADS. Queue high: "
            "load. Compute high: deep answers, or a device that others use too.",
            "s",
            [
                Query(f"{DECODE} / {ANSWERED}", "decode"),
                Query(f"{QUEUE} / {ANSWERED}", "queue"),
                Query(
                    f"clamp_min({TO_ANSWER} - {DECODE} - {QUEUE}, 0) / {ANSWERED}",
                    "compute",
                ),
                Query(f"{ENCODE} / {ANSWERED}", "encode"),
            ],
            Kind.STACK,
            runbook="OfframpLatencyBurn",
        ),
        Panel(
            "Stage time",
            "Median and 99th percentile of one batch of each stage on the device. All stages "
            "slower than yesterday at the same batch size: the device is shared or throttled.",
            "s",
            [
                Query(
                    quantile(q, "offramp_stage_duration_seconds", "stage"),
                    f"p{100 * q:g} of stage {{{{stage}}}}",
                )
                for q in (0.5, 0.99)
            ],
            runbook="OfframpLatencyBurn",
        ),
        Panel(
            "Batch size",
            "Mean images in a batch of each stage. One in peace; it grows with load and makes each "
            "image cheaper. At MAX_BATCH for long: the server is at its capacity.",
            "short",
            [
                Query(
                    rate("offramp_batch_size_sum", "stage")
                    + " / "
                    + rate("offramp_batch_size_count", "stage"),
                    "stage {{stage}}",
                )
            ],
            runbook="OfframpQueueSaturated",
        ),
        Panel(
            "Thresholds",
            "Confidence that suffices at each exit, under the operating point in force. They fall "
            "together when load bends the policy, and never else but by PUT /policy.",
            "short",
            [
                Query(
                    f"avg by (model, exit) (offramp_policy_threshold{{{HERE_MODEL}}})",
                    "{{model}} exit {{exit}}",
                )
            ],
            Kind.STEPS,
            runbook="OfframpDegradedShareHigh",
        ),
    ],
)

PROMISES = Row(
    "Promises",
    [
        Panel(
            "Audit agreement",
            "Share of early answers of the last hour, run to the end in idle time, that the last "
            f"exit agreed with; it should stay where it was, and above {AUDIT_AGREEMENT:.0%}. "
            "Falling means drift: calibrate again on recent images. A busy server audits little.",
            "percentunit",
            [
                Query(
                    AUDITED % (HERE_MODEL + ',agreed="true"') + " / " + AUDITED % HERE_MODEL,
                    "exit {{exit}}",
                )
            ],
            limit=AUDIT_AGREEMENT,
            top=1,
            runbook="OfframpAuditAgreementLow",
        ),
        Panel(
            "Deadlines met",
            "Share of images with a deadline that were answered by then. Missed ones were "
            "answered late, or not at all (504) where not even the first exit was reached.",
            "percentunit",
            [
                Query(
                    rate("offramp_deadlines_total", where='outcome="met"', selector=HERE)
                    + " / "
                    + rate("offramp_deadlines_total", selector=HERE),
                    "met",
                )
            ],
            top=1,
            runbook="OfframpLatencyBurn",
        ),
        Panel(
            "Refusals",
            "Images refused with 429 by reason: not_in_time, since even the first exit would be "
            "late; queue_full, since MAX_QUEUE were in flight; bodies_full, since there were "
            "MAX_BODIES_BYTES in memory. All mean too much load for this server: add replicas.",
            "reqps",
            [Query(rate("offramp_refused_total", "reason", selector=HERE), "{{reason}}")],
            Kind.STACK,
            runbook="OfframpQueueSaturated",
        ),
        Panel(
            "Rejected images",
            "Images that could not be used, by error code. A jump after a client's release is "
            "that client's fault; image_too_large may be a limit that is too low (MAX_PIXELS).",
            "reqps",
            [Query(rate("offramp_rejected_images_total", "code", selector=HERE), "{{code}}")],
            Kind.STACK,
        ),
    ],
)

PROCESS = Row(
    "Process and device",
    [
        Panel(
            "Memory",
            "Resident memory of the server. Flat after the first minutes; steady growth ends in "
            "the container's limit.",
            "bytes",
            [Query(f"process_resident_memory_bytes{{{HERE}}}", "{{instance}}")],
            runbook="OfframpMemoryGrowing",
        ),
        Panel(
            "CPU",
            "Cores in use, of them by the event loop and by the engine's threads. At the "
            "container's limit it is throttled, and latency jumps by milliseconds: give it more, "
            "or set WORKERS to one less than the limit. An event loop near one core can take no "
            "more requests, whatever the device could: add replicas.",
            "short",
            [
                Query(
                    f"rate(process_cpu_seconds_total{{{HERE}}}[$__rate_interval])",
                    "{{instance}}",
                ),
                Query(
                    f"rate(offramp_cpu_seconds_total{{{HERE}}}[$__rate_interval])",
                    "{{instance}} {{part}}",
                ),
            ],
            runbook="OfframpLatencyBurn",
        ),
        Panel(
            "Device busy",
            "Share of time in which a batch of answers runs on the device, a CPU or a GPU; of "
            "several WORKERS, their mean. Near 100 % the server is at its capacity, and audits "
            "wait.",
            "percentunit",
            [
                Query(
                    rate("offramp_stage_duration_seconds_sum", "instance")
                    + f" / sum by (instance) (avg_over_time(offramp_workers{{{HERE}}}[{WINDOW}]))",
                    "{{instance}}",
                )
            ],
            top=1,
            runbook="OfframpQueueSaturated",
        ),
        Panel(
            "GPU memory",
            "Used on the whole card, of its total; allocated by this server's tensors, reserved by "
            "its allocator. Zero without a card. Used far above reserved: somebody else is on it.",
            "bytes",
            [
                Query(
                    f"offramp_gpu_memory_bytes{{{HERE}}}",
                    "{{instance}} {{kind}}",
                )
            ],
            runbook="OfframpMemoryGrowing",
        ),
    ],
)


def _heat(title: str, description: str, unit: str, histogram: str, label: str) -> Panel:
    query = rate(f"offramp_{histogram}_bucket", "le", f'{label}=~"$exit"')
    return Panel(title, description, unit, [Query(query, "{{le}}")], Kind.HEAT)


EACH_EXIT = Row(
    "Exit $exit",
    [
        _heat(
            "Stage $exit: time",
            "How long batches of this stage take. Two bands are two batch sizes; a band that "
            "splits at one size is a device with something else to do.",
            "s",
            "stage_duration_seconds",
            "stage",
        ),
        _heat(
            "Stage $exit: batch size",
            "How many images its batches hold. Small ones at a late stage under load: few "
            "survivors, as it should be.",
            "short",
            "batch_size",
            "stage",
        ),
        _heat(
            "Exit $exit: confidence",
            "Calibrated confidence of all images that reached this exit. Its shape should look as "
            "it did on calibration day; mass that moves down is harder or other images.",
            "percentunit",
            "confidence",
            "exit",
        ),
    ],
    repeat="exit",
)

ENGINE = Dashboard(
    "engine",
    "Offramp: engine",
    "Where time goes inside a server, and whether its promises hold.",
    [TIME, PROMISES, PROCESS, EACH_EXIT],
)
