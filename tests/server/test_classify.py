"""The contract of an answer, over real HTTP."""

import json

import pytest

from server.classify import admit
from server.context import Context
from server.metrics import Metrics
from server.parameters import Parameters
from tests.conftest import CLASSES, encode, noise, until
from tests.server.test_bad_input import check_error

FIELDS = [
    *("label", "class_id", "confidence", "exit", "exits", "reason", "degraded", "top_k"),
    *("model", "version", "request_id", "timing_ms"),
]


@pytest.fixture(scope="module")
def images():
    return [encode(noise(seed=seed)) for seed in range(24)]


def without_chance(body):
    return {k: v for k, v in body.items() if k not in ("request_id", "timing_ms", "seen")}


def test_an_answer_has_the_fields_of_the_contract_in_its_order(server, png):
    body = server.post(png).json()
    assert list(body) == FIELDS
    assert body["label"] == CLASSES[body["class_id"]]
    assert (body["model"], body["version"], body["exits"]) == ("tiny", "7", 4)
    assert set(body["timing_ms"]) == {"decode", "queue", "compute", "total"}
    assert len(body["top_k"]) == 5
    assert body["top_k"][0]["label"] == body["label"]
    probabilities = [label["probability"] for label in body["top_k"]]
    assert probabilities == sorted(probabilities, reverse=True)


def test_a_multipart_file_is_answered_like_a_raw_body(server, png):
    raw = server.post(png).json()
    part = server.client.post("/classify", files={"file": ("x.png", png)}).json()
    assert without_chance(part) == without_chance(raw)


def test_a_request_id_is_taken_or_made_and_returned(server, png):
    sent = {"x-request-id": "abc-123"}
    given = server.client.post("/classify", content=png, headers=sent)
    assert given.headers["x-request-id"] == given.json()["request_id"] == "abc-123"
    bad = server.client.post("/classify", content=png, headers={"x-request-id": "a b\tc"})
    assert bad.headers["x-request-id"] == bad.json()["request_id"] != "a b\tc"


def test_the_timings_are_in_the_server_timing_header_too(server, png):
    response = server.post(png)
    for name, ms in response.json()["timing_ms"].items():
        assert f"{name};dur={ms}" in response.headers["server-timing"]


def test_top_k_is_cut_at_the_number_of_classes(server, png):
    assert len(server.post(png, top_k=1).json()["top_k"]) == 1
    everything = server.post(png, top_k=1000).json()["top_k"]
    assert sum(label["probability"] for label in everything) == pytest.approx(1, abs=1e-4)
    assert len(everything) == len(CLASSES)


def test_a_threshold_of_zero_answers_at_the_first_exit_and_of_one_at_the_last(server, images):
    for image in images[:4]:
        first = server.post(image, threshold=0).json()
        assert (first["exit"], first["reason"]) == (1, "confident")
        last = server.post(image, threshold=1).json()
        assert (last["exit"], last["reason"]) == (4, "final")


def test_min_exit_and_max_exit_bound_where_an_image_leaves(server, images):
    assert server.post(images[0], threshold=0, min_exit=3).json()["exit"] == 3
    bounded = server.post(images[0], threshold=1, max_exit=2).json()
    assert (bounded["exit"], bounded["reason"]) == (2, "max_exit")
    assert server.post(images[0], min_exit=2, max_exit=2).json()["exit"] == 2


def test_explain_shows_every_exit_on_the_way(server, images):
    body = server.post(images[0], threshold=1, explain="true").json()
    assert [seen["exit"] for seen in body["seen"]] == [1, 2, 3, 4]
    assert body["seen"][-1]["label"] == body["label"]
    assert body["seen"][-1]["confidence"] == body["confidence"]
    assert "seen" not in server.post(images[0]).json()


def events(response):
    pairs = [block.split("\n") for block in response.text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data[6:])) for name, data in pairs]


def test_a_stream_has_one_event_an_exit_and_ends_with_the_answer(server, images):
    headers = {"accept": "text/event-stream"}
    response = server.client.post("/classify?threshold=1", content=images[0], headers=headers)
    assert response.headers["content-type"].startswith("text/event-stream")
    *exits, (last, answer) = events(response)
    assert [(name, data["exit"]) for name, data in exits] == [("exit", k) for k in (1, 2, 3, 4)]
    assert last == "answer"
    plain = server.post(images[0], threshold=1).json()
    assert without_chance(answer) == without_chance(plain)


def test_a_bad_image_has_its_status_where_a_stream_is_asked_for(server):
    headers = {"accept": "text/event-stream"}
    response = server.client.post("/classify", content=b"no image", headers=headers)
    check_error(response, 400, "unsupported_image")


def test_a_batch_answers_in_order_like_single_requests(server, images):
    files = [("files", image) for image in images]
    results = server.client.post("/classify/batch", files=files).json()["results"]
    singles = [server.post(image).json() for image in images]
    for one, other in zip(results, singles, strict=True):
        assert (one["label"], one["exit"], one["reason"]) == (
            other["label"],
            other["exit"],
            other["reason"],
        )
        assert one["confidence"] == pytest.approx(other["confidence"], abs=1e-4)


def test_metrics_count_what_the_answers_say(serve, images):
    with serve() as one:
        said = [one.post(image).json() for image in images]
        for exit in range(1, 5):
            for reason in ("confident", "final"):
                count = one.metric("answers_total", model="tiny", exit=str(exit), reason=reason)
                assert count == sum((a["exit"], a["reason"]) == (exit, reason) for a in said)
        assert one.metric("requests_total", route="/classify", code="200") == len(images)
        assert one.metric("deadlines_total", outcome="met") == len(images)
        assert one.metric("in_flight_jobs") == 0
        spent, full = (one.metric("macs_total", model="tiny", kind=k) for k in ("spent", "full"))
        macs = [e.macs for e in one.served.loaded.bundle.description.exits]
        assert spent == sum(macs[a["exit"] - 1] for a in said)
        assert full == macs[-1] * len(images)


def test_a_deadline_is_met_by_when_the_client_wants_the_answer_not_by_when_the_engine_must(server):
    context = Context("1", arrived=100.0)
    admission = admit(Parameters(deadline_ms=20), server.served, context)
    assert admission.promised == pytest.approx(100.02)
    assert admission.deadline == pytest.approx(100.016)
    metrics = Metrics(4, 1.0)
    for now in (100.019, 100.02, 100.021):
        metrics.answered_by(100.02, now)
    counted = [
        metrics.registry.get_sample_value("offramp_deadlines_total", {"outcome": outcome})
        for outcome in ("met", "missed")
    ]
    assert counted == [2, 1]


def test_every_series_is_there_before_the_first_request(serve):
    with serve() as fresh:
        text = fresh.client.get("/metrics").text
    for reason in ("confident", "final", "deadline", "overload", "max_exit"):
        assert f'offramp_answers_total{{exit="1",model="tiny",reason="{reason}"}} 0.0' in text
    assert 'offramp_refused_total{reason="not_in_time"} 0.0' in text
    assert 'offramp_deadlines_total{outcome="missed"} 0.0' in text
    assert 'offramp_operating_point{model="tiny"} 0.01' in text


def test_model_and_policy_describe_what_is_served(server):
    model = server.client.get("/model").json()
    assert model["labels"] == list(CLASSES)
    assert [e["exit"] for e in model["exits"]] == [1, 2, 3, 4]
    assert model["exits"][-1]["macs_share"] == 1
    policy = server.client.get("/policy").json()
    assert policy["in_force"]["max_accuracy_loss"] == 0.01
    assert [p["max_accuracy_loss"] for p in policy["operating_points"]] == [0, 0.01, 0.05]
    assert policy["overloaded"] is False


@pytest.mark.slow
def test_audited_answers_are_compared_with_the_last_exit(serve, images, eager_path):
    with serve(bundle=eager_path, audit_rate=1.0) as one:
        for image in images:
            assert one.post(image).json()["reason"] == "confident"

        def audited():
            return sum(
                one.metric("audited_total", model="tiny", exit="1", agreed=agreed)
                for agreed in ("true", "false")
            )

        until(lambda: audited() == len(images))
