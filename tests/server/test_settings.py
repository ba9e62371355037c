"""What an operator sets reaches the server, and what cannot be meant stops the start."""

import os
import re

import pytest

from server.settings import Settings, SettingsError, load_settings, workers_at_once


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """An environment without settings, whatever the tests are started from."""
    for name in Settings.model_fields:
        monkeypatch.delenv(f"OFFRAMP_{name.upper()}", raising=False)
    return monkeypatch.setenv


def test_a_flag_goes_over_the_environment_and_that_over_the_default(environment):
    assert load_settings([]).max_batch == 32
    environment("OFFRAMP_MAX_BATCH", "16")
    assert load_settings([]).max_batch == 16
    assert load_settings(["--max-batch", "4"]).max_batch == 4


@pytest.mark.parametrize("name", ["OFFRAMP_MAX_BACTH", "offramp_port", "OFFRAMP_"])
def test_an_unknown_name_in_the_environment_stops_the_start(environment, name):
    environment(name, "1")
    with pytest.raises(SettingsError, match=f"unknown setting {name}; see .*--help"):
        load_settings([])


def test_what_kubernetes_sets_for_a_service_of_the_same_name_is_told_from_a_setting(environment):
    environment("OFFRAMP_SERVICE_HOST", "10.0.0.1")
    environment("OFFRAMP_PORT", "tcp://10.0.0.1:8000")
    with pytest.raises(SettingsError, match=r"OFFRAMP_SERVICE_HOST.* enableServiceLinks: false"):
        load_settings([])


def test_an_unknown_flag_stops_the_start_by_name(capsys):
    with pytest.raises(SystemExit) as stop:
        load_settings(["--max-bacth", "1"])
    assert stop.value.code == 2
    assert "--max-bacth" in capsys.readouterr().err


BAD = {
    "port": ["x", "-1", "65536"],
    "max_accuracy_loss": ["2", "-0.1", "nan", "much"],
    "default_deadline_ms": ["0", "-5", "soon", "inf", "1e400", "1e300", "nan"],
    "max_batch": ["0", "1.5"],
    "max_bodies_bytes": ["0", "16777215", "many"],
    "device": ["gpu"],
    "log_level": ["loud"],
    "audit_rate": ["1.1"],
    "overload_first_exit": ["maybe", "2", ""],
    "drain_seconds": ["-1", "inf", "1e300"],
    "drain_notice_seconds": ["-1", "inf", "nan"],
    "cache_dir": [""],
    "bundle": [""],
    "api_keys": [",", " ", '["one"]', "schlüssel", "one,schlüssel", "two\tparts"],
    "admin_token": ["schlüssel"],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_a_bad_value_stops_the_start_and_names_the_setting(environment, name, value):
    environment(f"OFFRAMP_{name.upper()}", value)
    with pytest.raises(SettingsError, match=f"^OFFRAMP_{name.upper()}: "):
        load_settings([])
    with pytest.raises(SettingsError, match=f"^OFFRAMP_{name.upper()}: "):
        load_settings([f"--{name.replace('_', '-')}={value}"])


def test_one_body_fits_into_what_all_may_take(environment):
    environment("OFFRAMP_MAX_BODY_BYTES", str(2**30))
    with pytest.raises(SettingsError, match=r"^OFFRAMP_MAX_BODIES_BYTES: must not be less than"):
        load_settings([])
    assert load_settings([f"--max-bodies-bytes={2**30}"]).max_bodies_bytes == 2**30


def test_every_bad_value_is_named_at_once(environment):
    environment("OFFRAMP_PORT", "x")
    environment("OFFRAMP_MAX_QUEUE", "0")
    with pytest.raises(SettingsError, match=r"OFFRAMP_PORT: .*; OFFRAMP_MAX_QUEUE: "):
        load_settings([])


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("1", True), ("on", True), ("false", False), ("0", False), ("no", False)],
)
def test_a_boolean_means_what_it_says(environment, text, value):
    environment("OFFRAMP_OVERLOAD_FIRST_EXIT", text)
    assert load_settings([]).overload_first_exit is value
    environment("OFFRAMP_OVERLOAD_FIRST_EXIT", str(not value).lower())
    assert load_settings(["--overload-first-exit", text]).overload_first_exit is value


def test_no_deadline_is_said_as_none(environment):
    assert load_settings([]).default_deadline_ms == 1000
    environment("OFFRAMP_DEFAULT_DEADLINE_MS", "none")
    assert load_settings([]).default_deadline_ms is None
    assert load_settings(["--default-deadline-ms", "none"]).default_deadline_ms is None


def test_keys_are_separated_by_commas_and_never_printed(environment):
    environment("OFFRAMP_API_KEYS", "first-key, second-key,,")
    environment("OFFRAMP_ADMIN_TOKEN", "a-token")
    settings = load_settings([])
    assert [key.get_secret_value() for key in settings.api_keys] == ["first-key", "second-key"]
    assert load_settings(["--api-keys", "third"]).api_keys[0].get_secret_value() == "third"
    assert not re.search("first-key|a-token", f"{settings!r}{settings}{settings.model_dump_json()}")


def test_nothing_is_no_key_and_no_token(environment):
    environment("OFFRAMP_API_KEYS", "")
    environment("OFFRAMP_ADMIN_TOKEN", " ")
    settings = load_settings([])
    assert settings.api_keys == ()
    environment("OFFRAMP_API_KEYS", "none")
    assert load_settings([]).api_keys == load_settings(["--api-keys", "none"]).api_keys == ()
    assert settings.admin_token is None
    assert load_settings(["--admin-token", ""]).admin_token is None


def test_a_secret_that_cannot_be_sent_is_not_repeated(environment):
    environment("OFFRAMP_API_KEYS", "schlüssel")
    with pytest.raises(SettingsError) as stop:
        load_settings([])
    assert str(stop.value).startswith("OFFRAMP_API_KEYS: must be of printable ASCII")
    assert "schl" not in str(stop.value)


def test_a_secret_beside_a_bad_value_is_not_repeated():
    with pytest.raises(SettingsError) as stop:
        load_settings(["--api-keys", "hush", "--port", "x"])
    assert "hush" not in str(stop.value)


def test_the_help_names_every_setting_with_its_description_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        load_settings(["--help"])
    assert stop.value.code == 0
    text = re.sub(r"-\s+", "-", " ".join(capsys.readouterr().out.split()))
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')} " in text
        said = re.sub(r"-\s+", "-", f"{field.description} (default:")
        assert said in text


@pytest.mark.parametrize(
    ("asked", "threads", "cores", "workers"),
    [(0, 1, 4, (3, 4)), (0, 2, 4, (1, 2)), (0, 2, 1, (1, 1)), (3, 1, 64, (3, 3))],
)
def test_workers_share_the_cores_out(asked, threads, cores, workers):
    assert workers_at_once(asked, threads, cores) == workers


def test_workers_are_no_more_than_the_cores_that_the_process_may_use():
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system keeps no process to some cores")
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert workers_at_once(0, 1) == (1, 1)
    finally:
        os.sched_setaffinity(0, before)
