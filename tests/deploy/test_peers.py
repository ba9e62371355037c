"""The comparison with other servers: what it needs of none of them."""

import json

import pytest

from deploy.peers import __main__ as peers
from tests.conftest import CLASSES, encode, noise

SUMMARY = {
    "answered_per_second": 120.4,
    "in_time_share": 0.99,
    "latency_ms": {"p50": 8.04, "p99": 12.0},
    "accuracy_of_answers": 0.731,
}


def test_the_table_holds_a_row_a_server_with_its_failures():
    measured = {"name": "fast", "clients": {str(n): SUMMARY for n in peers.CLIENTS}}
    *_, good, bad = peers.table([measured, {"name": "gone", "failed": "did not answer"}]).split(
        "\n"
    )
    assert good.startswith("| fast | 120 (8.0, 12.0), 1.0% failed |")
    assert good.endswith("| 73.1% |")
    assert bad == "| gone | did not answer | | | |"


def test_a_peer_that_ends_while_starting_is_a_row_that_says_so(tmp_path, capsys, monkeypatch):
    (tmp_path / "x.png").write_bytes(encode(noise()))
    monkeypatch.setattr(peers, "PEERS", (peers.Peer("broken", ("-c", "raise SystemExit(3)")),))
    assert peers.main(["--images", str(tmp_path)]) == 0
    assert "| broken | ended with status 3 while starting |" in capsys.readouterr().out


@pytest.mark.slow
def test_the_plainest_peer_answers_with_the_networks_own_labels(bundle_path, tmp_path, capsys):
    (tmp_path / CLASSES[0]).mkdir()
    (tmp_path / CLASSES[0] / "x.png").write_bytes(encode(noise()))
    out = tmp_path / "peers.json"
    command = ["--images", str(tmp_path), "--bundle", str(bundle_path), "--only", "FastAPI"]
    assert peers.main([*command, "--seconds", "0.2", "--json", str(out)]) == 0
    (row,) = json.loads(out.read_text())
    assert row["clients"]["8"]["accuracy_of_answers"] in (0.0, 1.0)
