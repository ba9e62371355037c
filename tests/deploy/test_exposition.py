"""A server's metrics are read in one place."""

import pytest

from deploy.exposition import Exposition, scrape

TEXT = """\
# HELP x_seconds how long
# TYPE x_seconds histogram
x_seconds_bucket{stage="1",le="+Inf"} 2.0
x_seconds_sum{stage="1"} 1.5
x_seconds_count{stage="1"} 2.0
x_seconds_sum{stage="2"} 0.25
x_seconds_count{stage="2"} 1.0
# TYPE bytes gauge
bytes 7e+06
"""


def test_all_series_of_a_name_are_added_up():
    said = Exposition(TEXT)
    assert said.total("x_seconds_sum") == 1.75
    assert said.total("x_seconds_count") == 3.0
    assert said.total("bytes") == 7_000_000.0


def test_one_series_is_found_by_all_of_its_labels():
    said = Exposition(TEXT)
    assert said.value("x_seconds_sum", stage="2") == 0.25
    assert said.value("bytes") == 7_000_000.0
    for labels in ({}, {"stage": "3"}, {"stage": "2", "le": "+Inf"}):
        with pytest.raises(ValueError, match="does not export x_seconds_sum with"):
            said.value("x_seconds_sum", **labels)


def test_a_series_that_is_not_there_is_no_zero():
    with pytest.raises(ValueError, match="does not export x_seconds_total"):
        Exposition(TEXT).total("x_seconds_total")


def test_a_running_server_is_read(server):
    assert scrape(server.url).total("process_cpu_seconds_total") > 0


def test_a_server_that_is_gone_is_one_sentence():
    with pytest.raises(ConnectionError, match=r"^http://127.0.0.1:9 gives no metrics: "):
        scrape("http://127.0.0.1:9")


def test_what_is_no_exposition_is_one_sentence():
    with pytest.raises(ValueError):
        Exposition("<html>\n")
