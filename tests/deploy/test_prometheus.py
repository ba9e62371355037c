"""A real Prometheus scrapes real servers: a good one and some with a fault each."""

import json
import re
import subprocess
import threading
import time
from contextlib import ExitStack
from dataclasses import replace

import httpx
import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from PIL import Image
from prometheus import RULES, free_port, program, scraping, wait_until

from deploy.grafana import plot
from deploy.grafana.__main__ import DASHBOARDS, FOLDER
from deploy.grafana.dashboard import RUNBOOKS, render
from deploy.grafana.panels import Kind
from deploy.objectives import AUDIT_AGREEMENT, AVAILABILITY, LATENCY_SECONDS, LATENCY_SHARE
from server.metrics import SECONDS_BUCKETS
from tests.conftest import ROOT

QUERIES = [
    pytest.param(query.expression, id=f"{dashboard.name}: {panel.title}: {query.legend}")
    for dashboard in DASHBOARDS
    for panel in dashboard.panels
    for query in panel.queries
]
ALERTS = [
    rule
    for g in yaml.safe_load((RULES / "alerts.yml").read_text())["groups"]
    for rule in g["rules"]
]
RULE_TESTS = RULES.parent / "tests"
RUNBOOK_FOLDER = ROOT / "docs/runbooks"


def concrete(expression):
    """With Grafana's variables filled in."""
    expression = expression.replace("$__rate_interval", "4s")
    return re.sub(r"\$(job|instance|model|exit)", ".+", expression)


# --- what needs no Prometheus ----------------------------------------------------------------


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda d: d.name)
def test_dashboards_are_as_described(dashboard):
    written = (FOLDER / f"{dashboard.name}.json").read_text()
    assert written == render(dashboard), "run python -m deploy.grafana"


def test_a_chosen_model_leaves_only_its_servers_and_exits_to_choose():
    variables = json.loads(render(DASHBOARDS[0]))["templating"]["list"]
    asked = {v["name"]: v["query"]["query"] for v in variables if v["type"] == "query"}
    assert list(asked) == ["job", "model", "instance", "exit"]
    chosen = {name: re.findall(r'(\w+)=~"\$\1"', query) for name, query in asked.items()}
    assert chosen["model"] == ["job"]
    assert chosen["instance"] == ["job", "model"]
    assert chosen["exit"] == ["job", "instance", "model"]


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda d: d.name)
def test_every_panel_has_a_unit_legends_and_says_what_to_do(dashboard):
    for panel in json.loads(render(dashboard))["panels"]:
        if panel["type"] == "row":
            continue
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert all(target["legendFormat"] for target in panel["targets"])
        assert len(panel["description"].split()) > 12
        for link in panel["links"]:
            assert (RUNBOOK_FOLDER / link["url"].removeprefix("${runbooks}/")).exists()


def test_no_two_panels_overlap():
    for dashboard in DASHBOARDS:
        taken = set()
        for panel in json.loads(render(dashboard))["panels"]:
            place = panel["gridPos"]
            for x in range(place["x"], place["x"] + place["w"]):
                for y in range(place["y"], place["y"] + place["h"]):
                    assert (x, y) not in taken and x < 24
                    taken.add((x, y))


def test_every_metric_that_is_asked_for_is_exported(server):
    exported = set(re.findall(r"^(\w+)", server.client.get("/metrics").text, re.MULTILINE))
    recorded = (RULES / "recording.yml").read_text()
    asked = "\n".join(
        [recorded, (RULES / "alerts.yml").read_text(), *(q.values[0] for q in QUERIES)]
    )
    names = set(re.findall(r"(?<![\w:])(?:offramp|process)_\w+", asked))
    assert len(names) > 20
    assert names <= exported
    records = set(re.findall(r"record: (\S+)", recorded))
    assert set(re.findall(r"\bjob\w*:[\w:]+", asked)) <= records


def test_alerts_watch_the_objectives_that_dashboards_draw():
    burns = {"Availability": 1 - AVAILABILITY, "Latency": 1 - LATENCY_SHARE}
    for name, budget in burns.items():
        expressions = [a["expr"] for a in ALERTS if a["alert"] == f"Offramp{name}Burn"]
        allowed = [re.findall(r"> ([\d.]+) \* ([\d.]+)", e) for e in expressions]
        assert allowed == [[("14.4", f"{budget:g}")] * 2, [("6", f"{budget:g}")] * 2]
    assert LATENCY_SECONDS in SECONDS_BUCKETS
    assert f'le="{LATENCY_SECONDS}"' in (RULES / "recording.yml").read_text()
    assert any(f"< {AUDIT_AGREEMENT}" in a["expr"] for a in ALERTS)


def test_every_alert_has_a_runbook_and_every_runbook_an_alert():
    names = {a["alert"] for a in ALERTS}
    for alert in ALERTS:
        link = f"{{{{ $externalURL }}}}/user/runbooks/{alert['alert']}.md"
        assert alert["annotations"]["runbook_url"] == link
        assert alert["labels"]["severity"] in ("page", "ticket")
    assert {f.stem for f in RUNBOOK_FOLDER.glob("*.md")} == names | {"README"}
    index = (RUNBOOK_FOLDER / "README.md").read_text()
    assert all(f"({name}.md)" in index for name in names)


def test_runbooks_are_linked_where_compose_serves_them():
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    flags = compose["services"]["prometheus"]["command"]
    (external,) = [f.split("=")[1] for f in flags if f.startswith("--web.external-url")]
    assert f"{external}/user/runbooks" == RUNBOOKS


@pytest.mark.parametrize("kind", ["config", "rules"])
def test_promtool_finds_no_fault(kind):
    files = [RULES.parent / "prometheus.yml"] if kind == "config" else sorted(RULES.glob("*.yml"))
    subprocess.run([program("promtool"), "check", kind, *files], check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["alerts.yml", "trends.yml"])
def test_alerts_fire_on_what_they_are_for_and_nothing_else_does(file):
    command = [program("promtool"), "test", "rules", RULE_TESTS / file]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested():
    files = sorted(file.name for file in RULE_TESTS.glob("*"))
    assert files == ["alerts.yml", "trends.yml"]
    tested = "".join((RULE_TESTS / file).read_text() for file in files)
    assert all(f'alertname="{alert["alert"]}"' in tested for alert in ALERTS)


# --- what does -------------------------------------------------------------------------------


class Load:
    """Clients of some servers, until it is stopped."""

    def __init__(self, images):
        self._images = [*images, images[0][:40]]
        self._stop = threading.Event()
        self._threads = []

    def add(self, server, clients, pause=0.0, **parameters):
        for i in range(clients):
            one = threading.Thread(target=self._run, args=(server, i, pause, parameters))
            one.start()
            self._threads.append(one)

    def _run(self, server, number, pause, parameters):
        with httpx.Client(base_url=server.url, timeout=20) as client:
            while not self._stop.wait(pause):
                for image in self._images[number:]:
                    if self._stop.wait(pause):
                        return
                    client.post("/classify", content=image, params=parameters)

    def stop(self):
        self._stop.set()
        for thread in self._threads:
            thread.join()


def slow_down(server, seconds):
    """Every stage batch takes at least so long."""
    runner = server.served.engine._runner
    run = runner.run

    def slowly(stage, inputs, alone=False):
        time.sleep(seconds)
        return run(stage, inputs, alone)

    runner.run = slowly


def contradict(server):
    """The last exit never says what the others say."""
    runner = server.served.engine._runner
    run = runner.run

    def wrongly(stage, inputs, alone=False):
        output = run(stage, inputs, alone)
        if stage < runner.exits:
            return output
        return replace(output, probabilities=np.roll(output.probabilities, 1, axis=1))

    runner.run = wrongly


@pytest.fixture(scope="module")
def prometheus(serve, cifar, eager_path, tmp_path_factory):
    """Scrapes a good server and some that are slow, overloaded, wrong, too deep or dead."""
    program("prometheus")
    load = Load([data for _, data in cifar[::10]])
    with ExitStack() as stack:
        servers = {
            # With so much time that no busy machine makes it bend.
            "offramp": serve(max_accuracy_loss=0.05, default_deadline_ms=30_000),
            "offramp-slow": serve(),
            "offramp-full": serve(max_queue=2),
            "offramp-wrong": serve(bundle=eager_path, audit_rate=1.0),
            "offramp-deep": serve(max_accuracy_loss=0.0),
        }
        servers = {job: stack.enter_context(server) for job, server in servers.items()}
        slow_down(servers["offramp-slow"], 0.15)
        slow_down(servers["offramp-full"], 0.02)
        contradict(servers["offramp-wrong"])
        jobs = {job: server.port for job, server in servers.items()}
        folder = tmp_path_factory.mktemp("prometheus")
        one = stack.enter_context(scraping(folder, {**jobs, "offramp-dead": free_port()}))
        stack.callback(load.stop)
        load.add(servers["offramp"], 1, pause=0.02)
        load.add(servers["offramp"], 1, pause=0.05, max_exit=1)
        load.add(servers["offramp-slow"], 1, deadline_ms=5000)
        load.add(servers["offramp-slow"], 2, deadline_ms=350)
        load.add(servers["offramp-full"], 6, pause=0.01)
        load.add(servers["offramp-wrong"], 1, pause=0.04)
        load.add(servers["offramp-deep"], 1, pause=0.05)
        yield one


@pytest.mark.slow
def test_every_panel_has_data(prometheus):
    missing = {q.id: concrete(q.values[0]) for q in QUERIES}

    def all_seen():
        for name in [name for name, query in missing.items() if prometheus.query(query)]:
            del missing[name]
        return missing == {}

    wait_until(all_seen)


@pytest.mark.slow
def test_every_rule_is_loaded_and_evaluates(prometheus):
    groups = prometheus.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    written = "".join(file.read_text() for file in RULES.glob("*.yml"))
    assert len(rules) == len(re.findall(r"- (?:record|alert):", written))
    wait_until(lambda: all_healthy(prometheus))
    records = [rule["name"] for rule in rules if rule["type"] == "recording"]
    wait_until(lambda: all(prometheus.query(record) for record in records))


def all_healthy(prometheus):
    groups = prometheus.get("rules")["groups"]
    return all(rule["health"] == "ok" for group in groups for rule in group["rules"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("alert", "job"),
    [
        ("OfframpTargetDown", "offramp-dead"),
        ("OfframpLatencyBurn", "offramp-slow"),
        ("OfframpDegradedShareHigh", "offramp-slow"),
        ("OfframpAvailabilityBurn", "offramp-full"),
        ("OfframpQueueSaturated", "offramp-full"),
        ("OfframpAuditAgreementLow", "offramp-wrong"),
        ("OfframpAllAtLastExit", "offramp-deep"),
    ],
)
def test_a_faulty_server_fires_its_alert_and_the_good_one_does_not(prometheus, alert, job):
    wait_until(lambda: (alert, job) in prometheus.firing())
    if alert not in ("OfframpLatencyBurn", "OfframpAuditAgreementLow"):
        assert (alert, "offramp") not in prometheus.firing()


@pytest.mark.slow
def test_a_firing_alert_links_to_its_runbook(prometheus):
    wait_until(lambda: prometheus.firing())
    for alert in prometheus.get("alerts")["alerts"]:
        page = httpx.get(alert["annotations"]["runbook_url"].replace("localhost", "127.0.0.1"))
        assert page.text.startswith(f"# {alert['labels']['alertname']}")


def test_a_mean_of_nothing_is_drawn_as_nothing():
    """As where a scrape saw the sum of an observation but not its count."""
    axes = Figure().add_subplot()
    series = [plot.Series("decode", {}, np.array([np.inf, np.nan, 2.0]))]
    plot._draw_lines(axes, Kind.STACK, series, np.arange(3.0), 1000)
    assert axes.collections[0].get_paths()[0].vertices[:, 1].max() == 2000


@pytest.mark.slow
def test_dashboards_can_be_drawn(prometheus, tmp_path):
    wait_until(lambda: prometheus.query("rate(offramp_confidence_bucket[4s]) > 0"))
    assert plot.main([prometheus.url, str(tmp_path), "--minutes", "0.2"]) == 0
    for dashboard in DASHBOARDS:
        with Image.open(tmp_path / f"{dashboard.name}.png") as image:
            assert image.width > 800 and len(image.convert("RGB").getcolors(1 << 24)) > 20


def test_drawing_without_prometheus_is_one_sentence(tmp_path, capsys):
    assert plot.main([f"http://127.0.0.1:{free_port()}", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: http://127.0.0.1")
