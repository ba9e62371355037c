"""The files that containers are made of, held against each other; no engine is needed."""

import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from server import metrics
from server.settings import PREFIX, Settings, workers_at_once
from tests.conftest import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
GPU = yaml.safe_load((ROOT / "deploy/compose.gpu.yml").read_text())
SERVICES = COMPOSE["services"]
GPU_SERVER = GPU["services"]["server"]
GRAFANA = ROOT / "deploy/grafana"


def instructions(kind):
    return re.findall(rf"^{kind} +(.*)$", DOCKERFILE, re.MULTILINE)


def variables():
    """ENV of the image."""
    return dict(word.split("=", 1) for line in instructions("ENV") for word in shlex.split(line))


def copied():
    """Sources of COPY that come from the repository, with where they go."""
    for line in instructions("COPY"):
        if not line.startswith("--from"):
            *sources, target = line.split()
            yield from ((source, target) for source in sources)


def mounts(service):
    """(source, target) of a service's volumes; a source with a slash is a path."""
    return [tuple(v.split(":")[:2]) for v in SERVICES[service].get("volumes", [])]


def seconds(text):
    return float(text.removesuffix("s"))


# --- the image -------------------------------------------------------------------------------


def test_what_the_image_copies_exists_and_reaches_the_builder():
    ignored = (ROOT / ".dockerignore").read_text().split()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    for source, _ in copied():
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source, k) for k in kept), f".dockerignore keeps {source} out"


def test_the_image_is_pinned_and_runs_as_a_fixed_unprivileged_user():
    assert re.fullmatch(r"\d+\.\d+\.\d+-slim-\w+", instructions("ARG")[0].split("=")[1])
    (user,) = instructions("USER")
    uid, gid = map(int, user.split(":"))
    assert uid == gid >= 10_000
    assert f"useradd --uid {uid} " in DOCKERFILE


def test_what_compose_builds_with_are_arguments_of_the_image():
    known = {line.split("=")[0] for line in instructions("ARG")}
    builds = [s.get("build") for file in (COMPOSE, GPU) for s in file["services"].values()]
    given = [b["args"] for b in builds if isinstance(b, dict)]
    assert given
    assert {name for args in given for name in args} <= known


def test_dependencies_are_installed_by_hash():
    assert "--require-hashes -r requirements.lock" in DOCKERFILE


@pytest.mark.slow
def test_the_health_check_tells_a_ready_server_from_none(server):
    (check,) = re.findall(r'CMD \["python", "-c", (".*")\]$', DOCKERFILE, re.MULTILINE)
    program = json.loads(check)
    asked = [sys.executable, "-c", program]
    proxy = {"http_proxy": "http://127.0.0.1:9"}  # which asks other machines
    environment = {**os.environ, **proxy, "OFFRAMP_PORT": str(server.port)}
    assert subprocess.run(asked, env=environment).returncode == 0
    nobody = {**os.environ, "OFFRAMP_PORT": "9"}
    assert subprocess.run(asked, env=nobody, stderr=subprocess.DEVNULL).returncode != 0


def test_the_port_is_the_same_everywhere():
    port = str(Settings().port)
    assert variables()["OFFRAMP_PORT"] == port
    assert instructions("EXPOSE") == [port]
    assert SERVICES["server"]["ports"] == [f"{port}:{port}"]
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    targets = {c["job_name"]: c["static_configs"][0]["targets"] for c in scraped["scrape_configs"]}
    assert targets["offramp"] == [f"server:{port}"]
    assert SERVICES["load"]["command"][0] == f"http://server:{port}/classify"


@pytest.mark.slow
def test_the_image_tree_serves_read_only_with_only_the_locked_packages(
    tmp_path, bundle_path, cifar
):
    """What the Dockerfile copies, run by its entry point."""
    tree, cache, blocker = (tmp_path / name for name in ("tree", "cache", "blocker"))
    for source, target in copied():
        to = tree / target / Path(source).name if target.endswith("/") else tree / target
        to.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, to)
    shutil.rmtree(tree / "model/default", ignore_errors=True)
    shutil.copytree(bundle_path, tree / "model/default")
    (tree / "images/one").mkdir(parents=True)
    (tree / "images/one/a.png").write_bytes(cifar[0][1])
    cache.mkdir()
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(only_locked())
    subprocess.run(["chmod", "-R", "a-w,a+rX", tree, blocker], check=True)
    # Root could write anyway, unless it is told not to.
    bound = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(blocker),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(cache),
        "OFFRAMP_PORT": "0",
        "OFFRAMP_THREADS": "1",
        "OFFRAMP_MAX_BATCH": "2",
    }
    command = [*bound, sys.executable, *json.loads(instructions("ENTRYPOINT")[0])[1:]]
    process = subprocess.Popen(
        command, cwd=tree, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        with pytest.raises(subprocess.CalledProcessError):
            subprocess.run([*bound, "touch", tree / "new"], check=True, stderr=subprocess.DEVNULL)
        url = next(m[0] for line in process.stderr if (m := re.search(r"http://\S+", line)))
        wait_until_ready(url)
        entry = SERVICES["load"]["entrypoint"][1:]
        load = [sys.executable, *entry, f"{url}/classify", "--images", "images", "--seconds", "0.5"]
        subprocess.run(load, cwd=tree, env=environment, check=True)
        test = [sys.executable, "-m", "deploy.loadtest", f"{url}/classify", "--images", "images"]
        test += ["--clients", "1", "--seconds", "0.5"]
        subprocess.run(test, cwd=tree, env=environment, check=True)
        exposition = urllib.request.urlopen(f"{url}/metrics").read().decode()
        answered = re.search(r'requests_total\{code="200",route="/classify"\} (\S+)', exposition)
        assert float(answered[1]) > 0
    finally:
        process.terminate()
        assert process.wait(20) in (0, -signal.SIGTERM)  # uvicorn raises it again in the end
        process.stderr.close()


def only_locked():
    """A sitecustomize that imports nothing but the standard library and locked packages."""
    lock = re.findall(r"^([\w.-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    allowed = {name.lower() for name in lock} | {"torch"}
    distributions = packages_distributions().items()
    outside = [
        module
        for module, names in distributions
        if not {n.lower().replace("_", "-") for n in names} & allowed
    ]
    return f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {outside!r}:
            raise ModuleNotFoundError(f"{{name}} is not in requirements.lock", name=name)
sys.meta_path.insert(0, Blocker())
"""


def wait_until_ready(url):
    for _ in range(200):
        try:
            urllib.request.urlopen(f"{url}/readyz")
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("never ready")


# --- compose ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_pinned_limited_restarted_and_confined(name):
    service = SERVICES[name]
    assert re.search(r":v?\d+\.\d+\.\d+", service["image"])
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}
    assert service["restart"] == "unless-stopped"
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert int(service["user"].split(":")[0]) > 0
    assert "healthcheck" in service or "build" in service


def test_our_images_carry_our_version_and_user():
    (user,) = instructions("USER")
    for name in ("server", "load"):
        assert SERVICES[name]["image"] == f"offramp:{metrics.VERSION}"
        assert SERVICES[name]["user"] == user


def test_what_is_mounted_exists_and_named_volumes_are_declared():
    for service in SERVICES:
        for source, _ in mounts(service):
            assert (ROOT / source).exists() if "/" in source else source in COMPOSE["volumes"]
    used = {source for service in SERVICES for source, _ in mounts(service) if "/" not in source}
    assert used == set(COMPOSE["volumes"])


def test_the_cache_is_mounted_where_the_image_writes():
    assert dict(mounts("server"))["cache"] == variables()["XDG_CACHE_HOME"]


@pytest.mark.parametrize("compose", [SERVICES, {**SERVICES, **GPU["services"]}])
def test_every_image_that_is_built_is_built_once(compose):
    """Two builds of one tag at once may fail."""
    assert [name for name, service in compose.items() if "build" in service] == ["server"]
    assert compose["load"]["image"] == compose["server"]["image"]


def test_every_setting_that_is_given_exists():
    given = {*variables(), *SERVICES["server"]["environment"], *GPU_SERVER["environment"]}
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    assert {name for name in given if name.startswith(PREFIX)} <= known


def test_the_server_computes_on_the_cores_of_its_limit_by_itself():
    server = SERVICES["server"]
    given = {*variables(), *server["environment"], *GPU_SERVER["environment"]}
    assert not given & {"OFFRAMP_THREADS", "OFFRAMP_WORKERS"}
    cores = int(server["deploy"]["resources"]["limits"]["cpus"])
    settings = Settings(workers=0)
    assert workers_at_once(settings.workers, settings.threads, cores) == (cores - 1, cores)


def test_draining_ends_before_the_container_is_killed():
    settings = Settings()
    drain = settings.drain_notice_seconds + settings.drain_seconds
    assert seconds(SERVICES["server"]["stop_grace_period"]) > drain


def test_who_waits_for_health_waits_for_a_service_that_has_a_check():
    for service in SERVICES.values():
        for name, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[name] or "build" in SERVICES[name]


def test_the_demo_load_comes_by_profile_only_and_has_its_images():
    assert {n for n, s in SERVICES.items() if s.get("profiles")} == {"load"}
    assert SERVICES["load"]["profiles"] == ["demo"]
    _, option, archive = SERVICES["load"]["command"]
    ((source, target),) = mounts("load")
    assert option == "--images"
    assert (ROOT / source / Path(archive).relative_to(target)).exists()


def test_the_demo_load_ends_when_it_is_told_to():
    """It handles no signal, and a first process without a handler is not ended by one."""
    assert SERVICES["load"]["init"] is True


def test_the_gpu_override_changes_services_that_exist_and_asks_for_a_card():
    assert set(GPU["services"]) <= set(SERVICES)
    assert set(GPU_SERVER["build"]["args"]) <= {a.split("=")[0] for a in instructions("ARG")}
    (device,) = GPU_SERVER["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


# --- what is provisioned ---------------------------------------------------------------------


def test_grafana_finds_prometheus_and_reads_it_as_often_as_it_is_scraped():
    provisioned = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())
    (source,) = provisioned["datasources"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert SERVICES[host]["image"].startswith("prom/prometheus:")
    assert SERVICES[host]["ports"] == [f"127.0.0.1:{port}:{port}"]
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]


def test_grafana_shows_our_dashboards_and_opens_with_one():
    provisioned = yaml.safe_load((GRAFANA / "provisioning/dashboards/offramp.yml").read_text())
    folder = provisioned["providers"][0]["options"]["path"]
    targets = {target: source for source, target in mounts("grafana")}
    assert ROOT / targets[folder] == GRAFANA / "dashboards"
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert home.parent == Path(folder)
    assert (GRAFANA / "dashboards" / home.name).exists()


def test_prometheus_finds_its_configuration_and_rules():
    targets = {target: source for source, target in mounts("prometheus")}
    flags = dict(f.removeprefix("--").split("=", 1) for f in SERVICES["prometheus"]["command"])
    config = flags["config.file"]
    assert (ROOT / targets[config]).exists()
    for pattern in yaml.safe_load((ROOT / targets[config]).read_text())["rule_files"]:
        folder, name = os.path.split(Path(config).parent / pattern)
        assert list((ROOT / targets[folder]).glob(name))
    assert targets[f"{flags['web.user-assets']}/runbooks"] == "./docs/runbooks"
    assert targets.get(flags["storage.tsdb.path"]) == "prometheus"
