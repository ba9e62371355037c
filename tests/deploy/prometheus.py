"""A real Prometheus on a free port, and what it is asked."""

import re
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager

import httpx
import pytest
import yaml

from tests.conftest import ROOT

RULES = ROOT / "deploy/prometheus/rules"
MISSING = "{} is not installed; on Debian: apt-get install prometheus"


def program(name):
    """Its path, or a skipped test."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(MISSING.format(name))
    return path


def shortened(text):
    """The same rules with windows of seconds instead of minutes and hours."""
    text = re.sub(r"\[\d+[mh]\]", "[4s]", text)
    text = re.sub(r"for: \d+m", "for: 0s", text)
    text = re.sub(r"offset \d+[hd]", "offset 2s", text)
    return text.replace("increase6h > 300", "increase6h > 1")  # of hours, so hardly any of seconds


class Prometheus:
    """Asks a running one."""

    def __init__(self, url):
        self.url = url
        self._client = httpx.Client(base_url=url, timeout=10)

    def get(self, path, **parameters):
        answer = self._client.get(f"/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression):
        """[(labels, value)] that are numbers."""
        result = self.get("query", query=expression)["result"]
        found = [(r["metric"], float(r["value"][1])) for r in result]
        return [(labels, value) for labels, value in found if value == value]

    def firing(self):
        """{(alert, job)}"""
        alerts = self.get("alerts")["alerts"]
        return {
            (a["labels"]["alertname"], a["labels"].get("job"))
            for a in alerts
            if a["state"] == "firing"
        }

    def close(self):
        self._client.close()


@contextmanager
def scraping(folder, jobs):
    """Scrape `{job: port}` twice a second until the block ends."""
    (folder / "rules").mkdir()
    for file in RULES.glob("*.yml"):
        (folder / "rules" / file.name).write_text(shortened(file.read_text()))
    config = yaml.safe_load((RULES.parent / "prometheus.yml").read_text())
    config["global"] = dict.fromkeys(("scrape_interval", "evaluation_interval"), "500ms")
    config["global"]["scrape_timeout"] = "400ms"
    config["scrape_configs"] = [
        {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
        for job, port in jobs.items()
    ]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / "user").symlink_to(ROOT / "docs")
    url = f"http://127.0.0.1:{free_port()}"
    command = [
        program("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={url.removeprefix('http://')}",
        f"--web.user-assets={folder / 'user'}",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log)
        try:
            wait_until(lambda: httpx.get(f"{url}/-/ready").status_code == 200, 10)
            one = Prometheus(url)
            yield one
            one.close()
        finally:
            process.terminate()
            process.wait(10)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_until(condition, seconds=30):
    """Whether it came true in time, with patience for a busy machine; a refused connection counts
    as not yet."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    assert condition()
