"""What Prometheus gets to see: the names and labels of the contract, no others."""

from __future__ import annotations

from http.client import HTTPConnection

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from watchd import __version__
from watchd.metrics import Metrics, Snapshot
from watchd.records import Kind

CONTRACT = {
    "watchd_build_info": ("gauge", {"version"}),
    "watchd_events": ("counter", {"layer", "backend"}),
    "watchd_changes": ("counter", {"layer", "kind"}),
    "watchd_desyncs": ("counter", {"layer", "reason"}),
    "watchd_layers": ("gauge", {"state"}),
    "watchd_mounts": ("gauge", {"state"}),
    "watchd_mount_stale_entries": ("gauge", {"mount"}),
    "watchd_mount_pinned_entries": ("gauge", {"mount"}),
    "watchd_actions": ("counter", {"mount", "method", "result"}),
    "watchd_action_duration_seconds": ("histogram", {"method"}),
    "watchd_hooks": ("counter", {"mount", "result"}),
    "watchd_hook_duration_seconds": ("histogram", set()),
    "watchd_coherence_latency_seconds": ("histogram", set()),
    "watchd_verifications": ("counter", {"result"}),
    "watchd_journal_last_sequence": ("gauge", set()),
    "watchd_journal_size_bytes": ("gauge", set()),
    "watchd_journal_failed": ("gauge", set()),
    "watchd_cursor_lag_records": ("gauge", {"cursor"}),
    "watchd_journal_append_duration_seconds": ("histogram", set()),
    "watchd_journal_sync_duration_seconds": ("histogram", set()),
    "watchd_queue_bytes": ("gauge", set()),
    "watchd_muted_directories": ("gauge", set()),
    "watchd_drop_caches": ("counter", {"result"}),
    "watchd_config_last_reload_successful": ("gauge", set()),
    "watchd_config_last_reload_success_timestamp_seconds": ("gauge", set()),
}
"""Family -> type and labels. The parser takes the `_total` of counters off; a test below sees that it is there."""

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Scraper:
    """What is shown, without the way over HTTP, whose server takes half a second to end."""

    def __init__(self, metrics: Metrics) -> None:
        self._registry = metrics._registry

    def text(self) -> str:
        return generate_latest(self._registry).decode()

    def samples(self) -> Samples:
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(self.text())
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float | None:
        return self.samples().get((name, tuple(sorted(labels.items()))))


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def scraper(metrics: Metrics) -> Scraper:
    return Scraper(metrics)


def count_everything(metrics: Metrics) -> None:
    metrics.events("fanotify", {"base": 3})
    metrics.changes({("base", int(Kind.CREATE | Kind.MODIFY)): 2, ("base", int(Kind.CREATE)): 1})
    metrics.desync("base", "overflow")
    metrics.action("0:45", "invalidate", "coherent", 0.001)
    metrics.hook("0:45", "ok", 0.2)
    metrics.latency.observe(0.002)
    metrics.verification("coherent")
    metrics.append_duration.observe(0.001)
    metrics.sync_duration.observe(0.001)
    metrics.reloaded(ok=True, time_s=12345.0)
    metrics.show(
        lambda: Snapshot(
            layer_states=["live", "live", "failed"],
            mount_states=["coherent"],
            stale_entries={"0:45": 2},
            pinned_entries={"0:45": 2},
            journal_last_sequence=7,
            journal_bytes=4096,
            cursor_lags={"backup": 3},
            queue_bytes=24,
        )
    )


def test_names_types_and_labels_are_those_of_the_contract(metrics: Metrics, scraper: Scraper) -> None:
    count_everything(metrics)
    found = {}
    for family in text_string_to_metric_families(scraper.text()):
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[family.name] = (family.type, labels)
    assert found == CONTRACT


def test_no_series_are_added_that_the_contract_does_not_have(metrics: Metrics, scraper: Scraper) -> None:
    count_everything(metrics)
    suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
    allowed = {name + suffix for name, (kind, _) in CONTRACT.items() for suffix in suffixes[kind]}
    assert {name for name, _ in scraper.samples()} == allowed


def test_one_change_of_two_kinds_counts_for_both(metrics: Metrics, scraper: Scraper) -> None:
    count_everything(metrics)
    assert scraper.value("watchd_changes_total", layer="base", kind="create") == 3
    assert scraper.value("watchd_changes_total", layer="base", kind="modify") == 2
    assert scraper.value("watchd_changes_total", layer="base", kind="delete") is None


def test_every_state_is_shown_even_if_nothing_is_in_it(metrics: Metrics, scraper: Scraper) -> None:
    """Else an alert on it would never be evaluated."""
    count_everything(metrics)
    layers = {
        state: scraper.value("watchd_layers", state=state) for state in ("live", "scanning", "desynced", "failed")
    }
    assert layers == {"live": 2, "scanning": 0, "desynced": 0, "failed": 1}
    mounts = {s: scraper.value("watchd_mounts", state=s) for s in ("coherent", "stale", "pinned", "failed", "observed")}
    assert mounts == {"coherent": 1, "stale": 0, "pinned": 0, "failed": 0, "observed": 0}


def test_a_scrape_shows_the_numbers_of_now(metrics: Metrics, scraper: Scraper) -> None:
    sequence = iter((1, 2))
    metrics.show(lambda: Snapshot(journal_last_sequence=next(sequence)))
    assert [scraper.value("watchd_journal_last_sequence") for _ in range(2)] == [1, 2]


def test_a_mount_that_is_gone_leaves_no_series_behind(metrics: Metrics, scraper: Scraper) -> None:
    for mount in ("0:45", "0:46"):
        for result in ("coherent", "stale"):
            metrics.action(mount, "invalidate", result, 0.001)
        metrics.hook(mount, "ok", 0.1)
    metrics.forget_mount("0:45")
    metrics.forget_mount("0:99")
    of_mounts = [(name, dict(labels)["mount"]) for name, labels in scraper.samples() if "mount" in dict(labels)]
    assert {*of_mounts} == {("watchd_actions_total", "0:46"), ("watchd_hooks_total", "0:46")}


def test_a_bad_configuration_does_not_move_the_time_of_the_last_good_one(metrics: Metrics, scraper: Scraper) -> None:
    metrics.reloaded(ok=True, time_s=1000.0)
    metrics.reloaded(ok=False, time_s=2000.0)
    assert scraper.value("watchd_config_last_reload_successful") == 0
    assert scraper.value("watchd_config_last_reload_success_timestamp_seconds") == 1000.0


def test_the_version_is_told(scraper: Scraper) -> None:
    assert scraper.value("watchd_build_info", version=__version__) == 1


def get(port: int) -> str:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def test_listening_elsewhere_gives_the_old_port_up_and_keeps_the_counts(metrics: Metrics, scraper: Scraper) -> None:
    metrics.desync("base", "restart")
    first = metrics.listen("127.0.0.1", 0)
    assert get(first) == scraper.text()
    second = metrics.listen("127.0.0.1", 0)
    assert get(second) == scraper.text()
    with pytest.raises(ConnectionRefusedError):
        get(first)
    with pytest.raises(OSError):
        Metrics().listen("127.0.0.1", second)
    metrics.close()
    metrics.close()
    with pytest.raises(ConnectionRefusedError):
        get(second)
