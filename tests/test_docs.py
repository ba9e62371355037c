"""The documentation says what the code does."""

import argparse
import re
import shlex
from pathlib import Path

import pytest
import yaml

import training.__main__ as training
from deploy import capacity
from deploy.bench import __main__ as bench
from deploy.grafana import plot
from deploy.loadtest import __main__ as loadtest
from deploy.peers import __main__ as peers
from deploy.sweep import __main__ as sweep
from server.errors import every_error
from server.metrics import Metrics
from server.reference import pages
from server.settings import Settings, load_settings
from tests.conftest import ROOT
from tests.server.test_openapi import curl, with_image

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def commands(page):
    """Every command line of a page, continued ones joined."""
    found = {"sh": [], "console": []}
    for kind, text in FENCE.findall(page.read_text()):
        found.get(kind, []).extend(text.replace("\\\n", " ").splitlines())
    typed = [line.removeprefix("$ ") for line in found["console"] if line.startswith("$ ")]
    lines = (line.strip() for line in [*found["sh"], *typed])
    return [line for line in lines if line and not line.startswith("#")]


def anchors(page):
    """What a link to a part of this page may name."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("name", pages())
def test_a_reference_page_is_what_the_code_says(name):
    assert (DOCS / name).read_text() == pages()[name].rstrip("\n") + "\n", (
        "run: python -m server.reference docs"
    )


def test_every_setting_metric_and_error_code_is_documented():
    settings, metrics, errors = (pages()[f"{n}.md"] for n in ("settings", "metrics", "errors"))
    for name in Settings.model_fields:
        assert f"`OFFRAMP_{name.upper()}`" in settings
    families = Metrics(2).registry.collect()
    for family in families:
        if family.name.startswith("offramp_"):
            assert f"`{family.name}" in metrics
            assert family.documentation in metrics
    for kind in every_error():
        assert re.search(rf"^\| `{kind.code}` +\| {kind.status} ", errors, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_within_the_repository_leads_somewhere(page):
    broken = []
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, part = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (part and part not in anchors(file)):
            broken.append(target)
    assert broken == []


ALERTS = [
    rule["alert"]
    for file in sorted((ROOT / "deploy/prometheus").rglob("*.y*ml"))
    for group in (yaml.safe_load(file.read_text()) or {}).get("groups", ())
    for rule in group["rules"]
    if "alert" in rule
]


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_has_a_runbook(alert):
    assert (DOCS / "runbooks" / f"{alert}.md").exists()


COMMANDS = [(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in commands(page)]


@pytest.fixture(scope="module")
def one(serve):
    with serve(admin_token="secret") as server:
        yield server


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_every_command_of_the_documentation_can_be_run(page, line, one, png):
    words = shlex.split(with_image(line, png).partition(" | ")[0], comments=True)
    words = words[next(i for i, word in enumerate(words) if "=" not in word) :]
    command = Path(words[0]).name
    check = {"curl": run_curl, "make": check_make, "python": check_python}.get(command)
    if check is not None:
        check(shlex.join(words), words, one, png)
    else:
        assert command in ELSEWHERE, f"{page} has a command that no test knows: {line}"


ELSEWHERE = {"docker"}
"""Commands that only their own tests, or nobody here, can run."""


def run_curl(line, words, server, png):
    if "localhost:8000" not in line:
        return
    response = curl(server, line, png)
    in_time = "deadline_ms" not in line  # a busy machine may miss one
    assert response.status_code in ({200} if in_time else {200, 429, 504}), response.text


def check_make(line, words, *_):
    """The target exists, and its options are ones that the server takes."""
    targets = re.findall(r"^([\w./]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    options = [word for word in words[1:] if word.startswith("ARGS=")]
    for target in (word for word in words[1:] if "=" not in word):
        assert target in targets
    if "serve" in words and options:
        load_settings(shlex.split(options[0].removeprefix("ARGS=")))


def check_python(line, words, *_):
    """The module's own parser takes the command line."""
    assert words[1] == "-m"
    module, arguments = words[2], words[3:]
    if module == "server":
        load_settings(arguments)
    else:
        PARSERS[module]().parse_args(arguments)


def training_parser():
    parser = argparse.ArgumentParser()
    steps = parser.add_subparsers(required=True)
    for command in training.COMMANDS:
        command.add_command(steps)
    return parser


PARSERS = {
    "training": training_parser,
    "deploy.bench": bench._parser,
    "deploy.capacity": capacity._parser,
    "deploy.grafana.plot": plot._parser,
    "deploy.loadtest": loadtest._parser,
    "deploy.peers": peers._parser,
    "deploy.sweep": sweep._parser,
}
"""By module, for every one but the server's, which makes its parser of its settings."""


def test_the_tree_of_the_readme_names_what_is_there():
    tree = next(text for kind, text in FENCE.findall(PAGES[0].read_text()) if "model/" in text)
    folder, named = ROOT, set()
    for line in tree.splitlines():
        name = line.split()[0]
        folder = folder if line.startswith(" ") else ROOT / name
        path = folder / name if line.startswith(" ") else folder
        assert path.exists(), f"the README's tree names {path.relative_to(ROOT)}"
        named.add(path.relative_to(ROOT).parts[0])
    assert named == {"model", "training", "server", "deploy", "docs", "tests"}
