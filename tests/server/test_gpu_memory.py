"""The card's memory in /metrics, with a made-up card."""

import pytest
import torch

from server.metrics import Metrics


def memory(metrics):
    values = {}
    for kind in ("allocated", "reserved", "used", "total"):
        values[kind] = metrics.registry.get_sample_value("offramp_gpu_memory_bytes", {"kind": kind})
    return values


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 10)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70, 100))


def test_the_cards_memory_is_read_at_every_scrape(card, monkeypatch):
    metrics = Metrics(8, on_cuda=True)
    assert memory(metrics) == {"allocated": 10, "reserved": 20, "used": 30, "total": 100}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (40, 100))
    assert memory(metrics)["used"] == 60


def test_a_server_on_cpu_leaves_the_card_alone(card):
    metrics = Metrics(8)
    assert set(memory(metrics).values()) == {0}
