"""A bundle takes another's place while requests are answered."""

import json
import logging
import shutil
import threading
import weakref
from contextlib import contextmanager

import pytest
import torch

from model.bundle import load_bundle, save_bundle, save_policy
from model.network import build
from model.policy import Calibration, Policy
from tests.card import Card
from tests.conftest import PREPROCESS, encode, noise, point, until
from tests.gate import gated

ADMIN = {"authorization": "Bearer secret"}
SLOW = {"deadline_ms": 60_000}


@pytest.fixture
def folder(bundle_path, tmp_path):
    """A copy of the bundle, which a test may change."""
    return shutil.copytree(bundle_path, tmp_path / "bundle")


@pytest.fixture
def server(serve, folder):
    with serve(bundle=folder, admin_token="secret", drain_seconds=0.2) as one:
        yield one


def repository(server, call, **sent):
    return server.client.post(f"/v2/repository/{call}", headers=ADMIN, **sent)


def load(server, **sent):
    return repository(server, "models/tiny/load", **sent)


def unload(server, **sent):
    return repository(server, "models/tiny/unload", **sent)


def index(server, **sent):
    return repository(server, "index", **sent).json()


def change(folder, file_name="bundle.json", **fields):
    file = folder / file_name
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def put_shallower(folder):
    """Another network, of other classes, with an exit less."""
    torch.manual_seed(1)
    net = build("wide-resnet16-4", 3, width=4).eval()
    description = save_bundle(
        folder,
        net,
        name="tiny",
        version="8",
        architecture="wide-resnet16-4",
        arguments={"width": 4},
        classes=("one", "two", "three"),
        preprocess=PREPROCESS,
        training={},
    )
    shares = {"exit_shares": (0.3, 0.3, 0.4)}
    save_policy(
        folder,
        Policy(
            weights_sha256=description.weights_sha256,
            method="by hand",
            delta=0.1,
            calibration_images=100,
            calibrations=(Calibration(temperature=1.0),) * 3,
            operating_points=(
                point(0.01, 0.6, 0.6).model_copy(update=shares),
                point(0.02, 0.5, 0.5).model_copy(update=shares),
            ),
        ),
    )


def version_of(server, png):
    response = server.post(png, **SLOW)
    assert response.status_code == 200, response.text
    return response.json()["version"]


def test_the_bundle_in_the_folder_takes_the_place_of_the_one_that_answers(server, folder, png):
    assert version_of(server, png) == "7"
    put_shallower(folder)
    assert version_of(server, png) == "7"
    response = load(server)
    assert (response.status_code, response.content) == (200, b"")
    answer = server.post(png, max_exit=3, threshold=1, **SLOW).json()
    assert (answer["version"], answer["exits"], answer["exit"]) == ("8", 3, 3)
    assert {each["label"] for each in answer["top_k"]} == {"one", "two", "three"}
    assert server.client.get("/model").json()["labels"] == ["one", "two", "three"]
    points = server.client.get("/policy").json()["operating_points"]
    assert [p["max_accuracy_loss"] for p in points] == [0.01, 0.02]
    assert index(server) == [{"name": "tiny", "version": "8", "state": "READY", "reason": ""}]


def test_metrics_tell_of_the_one_that_answers(server, folder, png):
    version_of(server, png)
    before = server.metric("cpu_seconds_total", part="engine")
    put_shallower(folder)
    load(server)
    until(lambda: len(server.served._held) == 1)
    assert server.metric("cpu_seconds_total", part="engine") >= before > 0
    text = server.client.get("/metrics").text
    (info,) = (line for line in text.splitlines() if line.startswith("offramp_model_info"))
    assert 'version="8"' in info
    assert server.metric("policy_threshold", model="tiny", exit="2") == 0.6
    assert (
        'policy_threshold{exit="4"' not in text and 'queue_jobs{model="tiny",stage="4"' not in text
    )
    answers = server.metric("answers_total", model="tiny", exit="3", reason="final")
    server.post(png, threshold=1, **SLOW)
    assert server.metric("answers_total", model="tiny", exit="3", reason="final") == answers + 1


def test_gauges_speak_of_the_former_no_more(server, png):
    """Not even where it is told something after another took its place."""
    former = server.served.loaded
    load(server)
    former.use(0.05)
    until(lambda: len(server.served._held) == 1)
    assert server.metric("operating_point", model="tiny") == 0.01


def test_the_former_leaves_nothing_behind(server):
    networks = [weakref.ref(unit) for unit in server.served.engine._runner.units]
    load(server)
    until(lambda: all(network() is None for network in networks))


@contextmanager
def asking(server, png):
    """A request is in the device until the block ends; a list of its answer, once there is one."""
    answers = []
    with gated(server) as device:
        waiting = threading.Thread(target=lambda: answers.append(server.post(png, **SLOW)))
        waiting.start()
        device.wait_for_a_batch()
        yield answers
    waiting.join(10)


def test_what_was_let_in_before_is_answered_by_the_former(server, folder, png):
    with asking(server, png) as answers:
        put_shallower(folder)
        assert load(server).status_code == 200
        assert version_of(server, png) == "8"
        assert not answers
    assert (answers[0].json()["version"], answers[0].json()["exits"]) == ("7", 4)


def begin(server, png):
    """A request that was let in, and whose body is yet to come."""
    head = "POST /classify?deadline_ms=60000 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    head += f"Content-Length: {len(png)}\r\nExpect: 100-continue\r\n\r\n"
    begun = server.send(head.encode())
    assert begun.recv(100).startswith(b"HTTP/1.1 100")
    return begun


def rest(begun, png):
    begun.sendall(png)
    with begun, begun.makefile("rb") as said:
        return said.read()


def test_a_body_that_comes_late_is_the_formers_for_as_long_as_a_drain_waits(serve, folder, png):
    with serve(bundle=folder, admin_token="secret", drain_seconds=60) as server:
        begun = begin(server, png)
        put_shallower(folder)
        load(server)
        assert b'"version":"7"' in rest(begun, png)


@pytest.mark.parametrize("side", [32, 400])
def test_one_that_comes_later_still_is_refused_and_not_forgotten(server, folder, side):
    image = encode(noise(side))
    begun = begin(server, image)
    put_shallower(folder)
    load(server)
    until(lambda: len(server.served._held) == 1)
    said = rest(begun, image)
    assert said.startswith(b"HTTP/1.1 503") and b'"code":"draining"' in said
    assert server.served.in_flight == 0


def test_no_request_is_lost_however_often_it_is_replaced(server, folder, png):
    replace_under_load(server, folder, png)


@pytest.mark.gpu
@pytest.mark.skipif(torch.__version__ < (2, 12), reason="one thread's capture stops all replays")
def test_nor_is_one_on_a_card(serve, folder, tmp_path, png):
    chosen = {"device": "cuda", "compile": "require", "cache_dir": tmp_path / "cache"}
    with serve(bundle=folder, admin_token="secret", drain_seconds=0.2, **chosen) as server:
        replace_under_load(server, folder, png)
        until(lambda: len(server.served._held) == 1)
        assert version_of(server, png) == "10"
        assert not server.served.failed


def replace_under_load(server, folder, png):
    ended, statuses, versions = threading.Event(), [], set()

    def ask():
        while not ended.is_set():
            response = server.post(png, **SLOW)
            statuses.append(response.status_code)
            versions.add(response.json()["version"])

    clients = [threading.Thread(target=ask) for _ in range(3)]
    for client in clients:
        client.start()
    for version in ("8", "9", "10"):
        change(folder, version=version)
        assert load(server).status_code == 200
        until(lambda wanted=version: wanted in versions)
    ended.set()
    for client in clients:
        client.join(10)
    assert set(statuses) == {200} and versions == {"7", "8", "9", "10"}


def damage(folder):
    (folder / "weights.safetensors").write_bytes(b"damaged")


def rename(folder):
    change(folder, name="other")


def take_away_its_policy(folder):
    (folder / "policy.json").unlink()


def compute_no_numbers(folder):
    bundle = load_bundle(folder)
    with torch.no_grad():
        next(bundle.net.parameters()).fill_(float("nan"))
    described = bundle.description.model_dump(exclude={"exits", "weights_sha256"})
    digest = save_bundle(folder, bundle.net, **described | {"preprocess": PREPROCESS})
    policy = bundle.policy.model_copy(update={"weights_sha256": digest.weights_sha256})
    save_policy(folder, policy)


def be_careless(folder):
    policy = json.loads((folder / "policy.json").read_text())
    change(folder, "policy.json", operating_points=policy["operating_points"][2:])


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (damage, "SHA-256"),
        (rename, "holds the bundle other now; put tiny back, or start a server for it"),
        (take_away_its_policy, "training calibrate"),
        (be_careless, "0.01"),
        (compute_no_numbers, "no numbers"),
        (shutil.rmtree, "is not a bundle"),
    ],
)
def test_one_that_cannot_be_served_changes_nothing(server, folder, png, harm, said):
    harm(folder)
    response = load(server)
    assert (response.status_code, response.json()["code"]) == (409, "unusable_bundle")
    assert said in response.json()["error"]
    assert version_of(server, png) == "7"
    assert len(server.served._held) == 1
    assert server.client.get("/readyz").status_code == 200
    assert 'model="other"' not in server.client.get("/metrics").text


@pytest.fixture
def card(monkeypatch):
    return Card(monkeypatch)


@pytest.fixture
def on_card(card, serve, folder):
    chosen = {"bundle": folder, "dtype": "float32", "compile": "auto", "drain_seconds": 0.1}
    return lambda: serve(admin_token="secret", max_batch=1, **chosen)


TO_WARM_UP, TO_CAPTURE, TO_PREPARE = 0, 2, 4
"""What a card has room for that has too little for one of these, of a network with three exits."""


@pytest.mark.parametrize("room", [TO_CAPTURE, TO_PREPARE])
def test_one_that_a_card_has_no_room_for_changes_nothing_and_leaves_nothing_behind(
    on_card, card, folder, png, caplog, room
):
    caplog.set_level(logging.CRITICAL, "offramp")  # pytest keeps the errors that are logged
    with on_card() as server:
        put_shallower(folder)
        card.room, former = room, len(card.units)
        response = load(server)
        assert (response.status_code, response.json()["code"]) == (409, "unusable_bundle")
        assert response.json()["error"] == "it cannot be run here: the card's memory is full"
        assert version_of(server, png) == "7"
        assert len(server.served._held) == 1
        assert len(card.units) == former + 3
        until(lambda: all(unit() is None for unit in card.units[former:]))


def test_why_one_cannot_be_run_is_in_the_log(on_card, card, caplog):
    with on_card() as server:
        card.room = TO_WARM_UP
        assert load(server).status_code == 409
    assert "tiny: the bundle in the folder cannot be run" in caplog.text
    assert "CUDA out of memory. Tried to allocate" in caplog.text


def test_one_that_cannot_be_captured_takes_no_place_of_one_that_was(on_card, card, folder):
    with on_card() as server:
        card.captures = False
        response = load(server)
        assert (response.status_code, response.json()["code"]) == (409, "unusable_bundle")
        assert response.json()["error"] == (
            "it cannot be run here: operation not permitted when stream is capturing"
        )
        unload(server)
        assert load(server).status_code == 200
        assert load(server).status_code == 200  # now that the former does without graphs


def test_one_without_the_point_that_was_put_in_force_meanwhile_is_let_go_of(server, folder):
    put_shallower(folder)
    warm = server.served._warm

    def meanwhile(fresh):
        warm(fresh)
        server.served.use(0.0)

    server.served._warm = meanwhile
    response = load(server)
    assert (response.status_code, response.json()["code"]) == (409, "unusable_bundle")
    assert len(server.served._held) == 1


def test_the_operating_point_that_was_put_in_force_stays(server, folder):
    sent = {"headers": ADMIN, "json": {"max_accuracy_loss": 0.05}}
    assert server.client.put("/policy", **sent).status_code == 200
    assert load(server).status_code == 200
    assert server.client.get("/policy").json()["in_force"]["max_accuracy_loss"] == 0.05
    assert server.metric("operating_point", model="tiny") == 0.05
    put_shallower(folder)
    assert load(server).status_code == 200
    assert server.client.get("/policy").json()["in_force"]["max_accuracy_loss"] == 0.02


def test_without_a_bundle_the_server_lives_and_is_not_ready(server, png):
    response = unload(server, json={"parameters": {"unload_dependents": False}})
    assert (response.status_code, response.content) == (200, b"")
    refused = server.post(png)
    assert (refused.status_code, refused.json()["code"]) == (503, "not_ready")
    assert "no bundle is loaded" in refused.json()["error"]
    assert server.client.get("/livez").status_code == 200
    ready = server.client.get("/readyz")
    assert (ready.status_code, ready.text) == (503, "no bundle is loaded\n")
    assert server.client.get("/v2/models/tiny/ready").status_code == 503
    (one,) = index(server)
    assert (one["state"], one["reason"]) == ("UNAVAILABLE", "no bundle is loaded")
    assert index(server, json={"ready": True}) == []
    until(lambda: not server.served._held)
    assert "offramp_model_info{" not in server.client.get("/metrics").text
    assert server.metric("workers") == 0
    assert server.client.get("/model").json()["version"] == "7"
    assert unload(server).status_code == 200  # which changes nothing

    assert load(server).status_code == 200
    assert version_of(server, png) == "7"
    assert server.client.get("/readyz").status_code == 200


def test_what_waits_when_it_is_unloaded_is_answered(server, png):
    with asking(server, png) as answers:
        unload(server)
    assert answers[0].status_code == 200


@pytest.mark.parametrize("change", [load, unload])
def test_nothing_is_changed_while_the_first_warms_up(serve, change):
    with serve(warm=False, admin_token="secret") as server:
        response = change(server)
        assert (response.status_code, response.json()["code"]) == (503, "not_ready")
        assert index(server)[0]["state"] == "LOADING"


def test_a_drain_does_not_wait_for_one_that_warms_up(serve, folder, png):
    with serve(bundle=folder, admin_token="secret") as server:
        warmed = []
        warm = server.served._warm

        def amid_a_drain(fresh):
            server.served.draining = True
            warmed.append(True)
            warm(fresh)

        server.served._warm = amid_a_drain
        response = load(server)
        assert (response.status_code, response.json()["code"]) == (503, "draining")
        assert warmed and len(server.served._held) == 1


@pytest.mark.parametrize(
    ("call", "sent", "status", "code"),
    [
        ("models/other/load", {}, 404, "not_found"),
        ("models/other/unload", {}, 404, "not_found"),
        ("models/tiny/load", {"json": {"parameters": {"config": "{}"}}}, 422, "invalid_parameter"),
        ("models/tiny/unload", {"json": {"parameters": {"now": True}}}, 422, "invalid_parameter"),
        ("models/tiny/load", {"content": b"{"}, 400, "bad_request"),
        ("models/tiny/load", {"json": []}, 400, "bad_request"),
        ("index", {"json": {"ready": "maybe"}}, 400, "bad_request"),
    ],
)
def test_what_cannot_be_meant_changes_nothing(server, call, sent, status, code):
    loaded = server.served.loaded
    response = repository(server, call, **sent)
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert server.served.loaded is loaded and server.served.ready


CALLS = ("index", "models/tiny/load", "models/tiny/unload")


@pytest.mark.parametrize("call", CALLS)
def test_only_administrators_may(server, call):
    for headers, status in (({}, 401), ({"authorization": "Bearer other"}, 403)):
        assert server.client.post(f"/v2/repository/{call}", headers=headers).status_code == status


@pytest.mark.parametrize("call", CALLS)
def test_without_an_admin_token_there_are_no_such_paths(shared_server, call):
    response = shared_server.client.post(f"/v2/repository/{call}", headers=ADMIN)
    assert (response.status_code, response.json()["code"]) == (404, "not_found")
    assert shared_server.client.get("/v2").json()["extensions"] == ["binary_tensor_data"]


@pytest.mark.slow
def test_one_that_is_loaded_is_compiled_before_it_answers(serve, folder, tmp_path, png):
    chosen = {"compile": "auto", "cache_dir": tmp_path / "cache", "drain_seconds": 0.1}
    with serve(bundle=folder, admin_token="secret", **chosen) as server:
        put_shallower(folder)
        assert load(server).status_code == 200
        assert server.served.loaded._compiling.complete
        assert version_of(server, png) == "8"
