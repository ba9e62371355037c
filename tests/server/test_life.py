"""The life of a real process, from its start to its drain."""

import asyncio
import gc
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import uvicorn

from model.bundle import BundleError
from server.__main__ import Server, main
from server.served import Served
from tests.conftest import ROOT, RunningServer, until


def server_of(served, **options):
    return Server(uvicorn.Config(app=None, log_config=None), served, **options)


def fake_served(ready=True):
    """What a server knows of the bundle that it serves."""
    return SimpleNamespace(ready=ready, failed=False, leaving=False, draining=False)


@contextmanager
def process(bundle_path, *flags, **options):
    command = [sys.executable, "-m", "server", "--bundle", str(bundle_path), "--threads", "1"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OFFRAMP_")}
    child = subprocess.Popen(
        [*command, "--max-batch", "2", *flags],
        cwd=ROOT,
        env={**environment, "OFFRAMP_COMPILE": "off"},
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    try:
        yield child
    finally:
        child.kill()
        child.stderr.close()
        child.wait()


def port_of(child):
    """Where it listens, from its log."""
    for line in child.stderr:
        message = json.loads(line)["message"]
        if message.startswith("listening on"):
            return int(message.rpartition(":")[2])
    raise AssertionError("it ended before it listened")


def refuses(server):
    """Whether nothing new gets in: the port is closed, or says that it is draining."""
    try:
        return httpx.post(f"{server.url}/classify").status_code == 503
    except httpx.TransportError:
        return True


@pytest.mark.slow
def test_a_process_serves_until_its_notice_is_over_and_a_drain_answers_what_was_accepted(
    bundle_path, png
):
    flags = ("--port", "0", "--log-format", "json")
    with process(
        bundle_path, *flags, "--drain-notice-seconds", "60", "--drain-seconds", "3"
    ) as child:
        server = RunningServer(None, port_of(child))
        until(lambda: server.client.get("/readyz").status_code == 200)
        sent = {"x-request-id": "before"}
        assert server.client.post("/classify", content=png, headers=sent).status_code == 200

        head = "POST /classify?deadline_ms=60000 HTTP/1.1\r\nHost: x\r\n"
        head += f"Content-Length: {len(png)}\r\n"
        accepted = server.send(head.encode() + b"Expect: 100-continue\r\n\r\n")
        assert accepted.recv(100).startswith(b"HTTP/1.1 100")  # it waits for the body
        stuck = server.send(head.encode() + b"Expect: 100-continue\r\n\r\n")
        assert stuck.recv(100).startswith(b"HTTP/1.1 100")
        stuck.sendall(png[:100])  # and no more
        child.send_signal(signal.SIGTERM)
        until(lambda: server.client.get("/readyz").text == "draining\n")
        assert httpx.post(f"{server.url}/classify", content=png).status_code == 200
        until(lambda: server.client.get("/livez").headers.get("connection") == "close")
        child.send_signal(signal.SIGTERM)  # ends the notice
        until(lambda: refuses(server))
        accepted.sendall(png)
        assert accepted.recv(4000).startswith(b"HTTP/1.1 200")
        accepted.close()
        server.client.close()
        with stuck, stuck.makefile("rb") as said:  # head and body may come apart
            assert b'"code":"draining"' in said.read()

        assert child.wait(10) == 0
        lines = [json.loads(line) for line in child.stderr]
        requests = [line for line in lines if line["message"] == "request"]
        assert [r["request_id"] for r in requests].count("before") == 1
        assert [r["status"] for r in requests if r.get("code") == "draining"][-1] == 503
        assert not [r for r in lines if "exception" in r]
        told = [line["message"] for line in lines if line["level"] not in ("info", "warning")]
        assert told == ["Cancel 1 running task(s), timeout graceful shutdown exceeded"]


def hears(pid, number):
    """Whether a process has a handler for a signal."""
    (caught,) = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(caught, 16) >> (number - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says who hears what")
def test_a_process_that_is_ended_before_it_serves_hears_it():
    """As a container's first process it would live on: there no signal ends who has no handler."""
    with process("no/such/folder") as child:  # which is read when all is imported
        until(lambda: hears(child.pid, signal.SIGTERM) or child.poll() is not None)
        child.send_signal(signal.SIGTERM)
        assert (child.wait(10), child.stderr.read()) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "number"),
    [
        pytest.param(os.kill, signal.SIGTERM, id="one"),
        pytest.param(os.killpg, signal.SIGINT, id="group"),
    ],
)
def test_a_drain_while_required_programs_are_compiled_is_quiet(bundle_path, tmp_path, end, number):
    flags = ("--port", "0", "--log-format", "json", "--max-batch", "64")
    compiled = ("--compile", "require", "--cache-dir", str(tmp_path))
    with process(bundle_path, *flags, *compiled, start_new_session=True) as child:
        port_of(child)
        until(lambda: list(tmp_path.iterdir()))  # a folder for what is to be compiled
        end(child.pid, number)
        said = child.stderr.read()
        assert child.wait(10) == 0, said
    assert {json.loads(line)["level"] for line in said.splitlines()} <= {"info"}


def test_a_drain_begins_when_the_notice_is_over():
    served, now = fake_served(), [100.0]
    one = server_of(served, notice_seconds=5.0, clock=lambda: now[0])
    one.handle_exit(signal.SIGTERM, None)
    for now[0], over in ((100.0, False), (104.9, False), (105.0, True)):
        assert asyncio.run(one.on_tick(1)) is over
        assert (served.leaving, served.draining) == (True, over)
    assert not one.force_exit


@pytest.mark.parametrize(("ready", "seconds"), [(True, 0.0), (False, 5.0)])
def test_a_drain_begins_at_once_unless_a_ready_server_is_to_give_notice(ready, seconds):
    served = fake_served(ready)
    one = server_of(served, notice_seconds=seconds)
    one.handle_exit(signal.SIGTERM, None)
    assert served.draining
    assert one.should_exit
    assert not one.force_exit


@pytest.mark.parametrize("seconds", [0.0, 5.0])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_notice_and_ctrl_c_the_drain_too(number, seconds):
    served = fake_served()
    one = server_of(served, notice_seconds=seconds, clock=lambda: 100.0)
    one.handle_exit(number, None)
    served.ready = False
    one.handle_exit(number, None)
    assert served.draining
    assert one.should_exit
    assert one.force_exit == (number == signal.SIGINT)


def test_a_port_in_use_stops_the_start_before_anything_is_loaded(server, capsys, monkeypatch):
    monkeypatch.setattr("server.__main__.configure", lambda *_: None)  # the log stays pytest's
    assert main(["--port", str(server.port), "--bundle", "no/such/folder"]) == 2
    said = f"error: cannot listen on 127.0.0.1:{server.port}: Address already in use\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--bundle", "no/such/folder"], "is not a bundle"),
        (["--port", "x"], "OFFRAMP_PORT"),
        (["--max-accuracy-loss", "0", "--bundle", "lossy"], "no operating point"),
    ],
)
def test_a_start_that_cannot_succeed_is_one_sentence_and_status_2(
    flags, said, lossy, capsys, monkeypatch
):
    monkeypatch.setattr("server.__main__.configure", lambda *_: None)  # the log stays pytest's
    assert main([str(lossy) if flag == "lossy" else flag for flag in flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1


def test_a_network_that_cannot_run_ends_the_process(bundle_path, monkeypatch, caplog):
    def fail(_):
        raise RuntimeError("no kernel for this card")

    monkeypatch.setattr("server.__main__.configure", lambda *_: None)
    monkeypatch.setattr("server.served.Served.warm_up", fail)
    assert main(["--bundle", str(bundle_path), "--port", "0"]) == 1
    assert "no kernel for this card" in caplog.text


def test_a_device_that_runs_nothing_any_more_ends_the_process(bundle_path, monkeypatch):
    warm_up = Served.warm_up

    def break_after(served):
        warm_up(served)
        assert served.ready and served.alive
        served.loaded._engine.broken = True
        assert not served.ready and not served.alive

    monkeypatch.setattr("server.__main__.configure", lambda *_: None)
    monkeypatch.setattr("server.served.Served.warm_up", break_after)
    assert main(["--bundle", str(bundle_path), "--port", "0", "--max-batch", "1"]) == 1


def test_a_shutdown_waits_for_no_compiler(monkeypatch):
    """Which a request may wait for that brings in another bundle."""
    done = []

    async def shutdown(*_):
        done.append("shut down")

    monkeypatch.setattr(uvicorn.Server, "shutdown", shutdown)
    served = fake_served()
    served.stop_compiling = lambda: done.append("stopped")
    asyncio.run(server_of(served).shutdown())
    assert done == ["stopped", "shut down"]


def test_what_was_imported_is_never_looked_through_for_garbage(monkeypatch, capsys):
    begun = []

    def serve(_):
        begun.append("a bundle")
        raise BundleError("there is none")

    monkeypatch.setattr("server.__main__.configure", lambda *_: None)
    monkeypatch.setattr("server.__main__.Served", serve)
    monkeypatch.setattr(gc, "freeze", lambda: begun.append("keep"))
    assert main(["--port", "0"]) == 2
    assert begun == ["keep", "a bundle"]


@pytest.fixture
def lossy(bundle_path, tmp_path):
    """A copy of the bundle without its lossless operating point."""
    for file in bundle_path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    policy = json.loads((tmp_path / "policy.json").read_text())
    del policy["operating_points"][0]
    (tmp_path / "policy.json").write_text(json.dumps(policy))
    return tmp_path
