"""What a machine could take, from a recording of known costs."""

import json

import pytest

from deploy.capacity import (
    FEWEST_REQUESTS,
    MOST_REQUESTS,
    Imagined,
    capacity,
    load_seconds,
    main,
    simulated,
)
from deploy.loadtest.schedules import BURST_SECONDS, KINDS, bursts
from tests.deploy.test_sweep import SURE, UNSURE, recording

NOTHING = {"begin": 0.0, "answer": 0.0, "refuse": 0.0, "batch": 0.0}


def said(*confidences, right=None, **costs):
    """Stages of 10 ms, batches of 8 in 40 ms; nothing outside them but what is said."""
    made = recording() | {"deadline_ms": 500.0, "confidences": list(confidences), "right": right}
    made["costs"].update(NOTHING | costs)
    seconds = {str(k): {"1": 0.01, "8": 0.04} for k in (1, 2)}
    made["rows"][0]["engine"] = made["rows"][0]["engine"] | {"seconds": seconds}
    return made


def found(recorded, machine):
    def answered(rate):
        told = simulated(
            recorded, machine, "poisson", rate, load_seconds("poisson", rate, 5.0, 0.5)
        )
        return told["in_time_share"] >= 0.99

    return capacity(answered)


@pytest.mark.parametrize("edge", [1.0, 7.3, 950.0, 12345.0])
def test_a_capacity_is_found_to_two_percent(edge):
    assert edge / 1.02 <= capacity(lambda rate: rate <= edge) <= edge


def test_a_machine_that_answers_nothing_has_none():
    assert capacity(lambda rate: False) == 0.0


@pytest.mark.slow
def test_capacity_is_what_full_batches_allow():
    assert 150 < found(said(SURE), Imagined()) <= 200 * 1.1


@pytest.mark.slow
def test_a_machine_twice_as_fast_takes_twice_as_much():
    once, twice = (found(said(SURE), Imagined(speed=s)) for s in (1.0, 2.0))
    assert 1.8 < twice / once < 2.4


@pytest.mark.slow
def test_faster_stages_leave_the_event_loop_as_it_is():
    slow_loop = said(SURE, begin=5e-3, answer=5e-3)
    assert found(slow_loop, Imagined(stage_speed=10.0)) < 110
    assert found(slow_loop, Imagined(stage_speed=10.0, speed=2.0)) > 120


@pytest.mark.slow
def test_a_second_worker_takes_as_much_again():
    one, two = (found(said(SURE), Imagined(workers=w)) for w in (1, 2))
    assert 1.7 < two / one < 2.2


@pytest.mark.slow
def test_the_last_of_the_recorded_workers_keeps_its_core_where_there_is_one_more():
    recorded = said(SURE)
    more = {"workers": 2, "most_workers": 2, "http_seconds": 1.0}
    recorded["rows"][0]["engine"] = recorded["rows"][0]["engine"] | more
    two, three = (found(recorded, Imagined(cores=c)) for c in (2, 3))
    assert 1.7 < three / two < 2.2


def test_workers_without_a_core_each_are_refused(tmp_path, capsys):
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps(said(SURE)))
    assert main([str(file), "--workers", "3"]) == 2
    assert capsys.readouterr().err == "error: 3 workers want a core each, and there are 2\n"


@pytest.mark.slow
def test_a_deadline_that_no_batch_can_keep_leaves_single_images():
    assert found(said(SURE), Imagined(deadline_ms=30.0)) < found(said(SURE), Imagined()) / 3


@pytest.mark.slow
def test_clients_on_the_same_cores_take_of_them():
    recorded = said(SURE)
    recorded["rows"][0]["client_ms"] = 50.0
    alone, shared = (found(recorded, Imagined(clients=c)) for c in (False, True))
    assert shared < 30 < alone


def test_costs_are_those_of_the_load_that_was_as_heavy():
    recorded = said(SURE)
    calm = recorded["rows"][0]
    busy = json.loads(json.dumps(calm)) | {"load": 3.0}
    for sizes in busy["engine"]["seconds"].values():
        for size in sizes:
            sizes[size] *= 100
    recorded["rows"].append(busy)
    answered = [
        simulated(recorded, machine, "poisson", rate, 1.0)["in_time_share"]
        for machine, rate in (
            (Imagined(), 20.0),
            (Imagined(), 600.0),
            (Imagined(cores=16), 600.0),
        )
    ]
    assert answered[0] == 1.0 and answered[1] < 0.1 < 0.25 < answered[2]


def test_effective_accuracy_counts_what_is_right_and_in_time():
    known = said(SURE, UNSURE, right=[(True, True), (False, True)])
    calm = simulated(known, Imagined(), "poisson", 10.0, 5.0)
    assert calm["effective_accuracy"] == calm["in_time_share"] == 1.0
    flooded = simulated(known, Imagined(), "poisson", 190.0, 5.0)
    assert 0.4 < flooded["effective_accuracy"] < 0.9 * flooded["in_time_share"]
    assert flooded["degraded_share"] > 0.1
    assert simulated(said(SURE), Imagined(), "poisson", 9.0, 5.0)["effective_accuracy"] is None


@pytest.mark.slow
def test_the_command_prints_capacities_and_a_row_for_each_rate(tmp_path, capsys):
    file, out = tmp_path / "sweep.json", tmp_path / "found.json"
    file.write_text(json.dumps(said(SURE, UNSURE, right=[(True, True), (False, True)])))
    command = [str(file), "--rates", "10", "500", "--seconds", "2", "--json", str(out)]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "poisson, 99.9% in time: " in told and told.count("\n| ") == 4
    figures = json.loads(out.read_text())
    assert 0 < figures["as_asked"] < figures["bent"]
    assert [row["rate"] for row in figures["rows"]] == [10.0, 500.0]
    assert figures["machine"]["speed"] == 1.0


def test_a_machine_that_answers_nothing_in_time_is_shown_as_that(tmp_path, capsys):
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps(said(SURE)))
    assert main([str(file), "--deadline-ms", "1"]) == 0
    assert ": 0 images a second as the policy asks, 0 with" in capsys.readouterr().out


def test_recorded_workers_want_a_core_each_too(tmp_path, capsys):
    made = said(SURE)
    made["rows"][0]["engine"] = made["rows"][0]["engine"] | {"workers": 2}
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps(made))
    assert main([str(file), "--cores", "1"]) == 2
    assert "2 workers want a core each, and there are 1" in capsys.readouterr().err


@pytest.mark.parametrize("rate", [1.0, 33.0, 1000.0, 7000.0, 1e5])
def test_bursts_keep_their_mean_rate(rate):
    length = load_seconds("bursts", rate, 5.0, 0.05)
    assert len(bursts(rate, length)) / length == pytest.approx(rate, rel=0.2)
    assert length % (2 * BURST_SECONDS) == 0


@pytest.mark.parametrize("rate", [1.0, 33.0, 6000.0, 19_000.0])
def test_a_load_has_neither_too_few_nor_too_many_requests(rate):
    requests = rate * load_seconds("poisson", rate, 5.0, 0.05)
    assert FEWEST_REQUESTS <= round(requests) <= MOST_REQUESTS


@pytest.mark.parametrize(("deadline", "seconds"), [(0.025, 0.5), (0.05, 1.0), (0.5, 2.0)])
def test_a_load_is_never_so_short_that_no_backlog_is_late(deadline, seconds):
    assert load_seconds("poisson", 1e6, 5.0, deadline) == pytest.approx(seconds)


def test_the_rate_that_was_drawn_is_shown_where_it_is_another(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(KINDS, "poisson", lambda rate, seconds: [0.0] * round(1.5 * rate * seconds))
    monkeypatch.setattr("deploy.capacity.capacity", lambda answered, step: 40.0)
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps(said(SURE)))
    assert main([str(file), "--rates", "40"]) == 0
    told = capsys.readouterr().out
    assert ": 60 images a second as the policy asks, 60 with answers bent" in told
    assert "| 60 of 40 " in told


@pytest.mark.slow
def test_rates_around_the_capacity_are_shown_by_themselves(tmp_path, capsys):
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps(said(SURE)))
    assert main([str(file), "--seconds", "2", "--kind", "bursts"]) == 0
    assert capsys.readouterr().out.count("\n| ") == 5


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "no JSON",
        json.dumps(recording() | {"rows": []}),
        json.dumps({"costs": {}, "rows": [1]}),
    ],
)
def test_a_file_that_is_no_recording_is_one_sentence(tmp_path, capsys, content):
    file = tmp_path / "x.json"
    file.write_text(content)
    assert main([str(file)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {file} is no recording of a sweep: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("words", [["--speed", "0"], ["--in-time", "1.1"], ["--workers", "x"]])
def test_numbers_that_mean_nothing_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        main(["x.json", *words])
    assert "is no" in capsys.readouterr().err
