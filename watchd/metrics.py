"""What watchd tells Prometheus; the only user of prometheus_client.

Facts: prometheus_client binds to all addresses unless told otherwise, and adds a `_created` series to every counter unless
disabled. Its HTTP server runs in threads of its own; a scrape reads what is in memory or in our own files, never a mount.
Labels hold names that were configured or discovered (layer names, major:minor), never file paths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from watchd import __version__
from watchd.records import Kind

LATENCY_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)
DURATION_BUCKETS = (0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
HOOK_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
LAYER_STATES = ("live", "scanning", "desynced", "failed")
MOUNT_STATES = ("coherent", "stale", "pinned", "failed", "observed")


@dataclass(frozen=True)
class Snapshot:
    """What a scrape shows besides the counters."""

    layer_states: Iterable[str] = ()
    mount_states: Iterable[str] = ()
    stale_entries: Mapping[str, int] = field(default_factory=dict)
    """Mount -> names."""
    pinned_entries: Mapping[str, int] = field(default_factory=dict)
    journal_last_sequence: int = 0
    journal_bytes: int = 0
    journal_failed: bool = False
    cursor_lags: Mapping[str, int] = field(default_factory=dict)
    """Named cursor -> records behind it."""
    queue_bytes: int = 0
    muted_directories: int = 0
    drop_caches: int = 0
    drop_caches_refused: int = 0
    """Host-wide drops, and those that came too early."""


class Metrics:
    """The counters, and the server that shows them. Counting is safe in every thread."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = CollectorRegistry()
        self._server: tuple[WSGIServer, Thread] | None = None
        counter, gauge = partial(Counter, registry=registry), partial(Gauge, registry=registry)
        histogram = partial(Histogram, registry=registry)
        timed = partial(histogram, buckets=DURATION_BUCKETS)
        gauge("watchd_build_info", "The version that runs; always 1.", ["version"]).labels(__version__).set(1)
        self._events = counter("watchd_events", "Names that events were read for.", ["layer", "backend"])
        self._changes = counter("watchd_changes", "Changes journalled; one may be of several kinds.", ["layer", "kind"])
        self._desyncs = counter("watchd_desyncs", "Times that changes may have been missed.", ["layer", "reason"])
        self._actions = counter("watchd_actions", "Actions on merged mounts.", ["mount", "method", "result"])
        self.action_duration = timed("watchd_action_duration_seconds", "Time an action took.", ["method"])
        self._hooks = counter("watchd_hooks", "Runs of the command that is configured in `after`.", ["mount", "result"])
        self._hook_duration = histogram("watchd_hook_duration_seconds", "Time such a run took.", buckets=HOOK_BUCKETS)
        self.latency = histogram(
            "watchd_coherence_latency_seconds",
            "From the reading of an event to the verified coherence of the mounts it concerns.",
            buckets=LATENCY_BUCKETS,
        )
        self._verifications = counter(
            "watchd_verifications", "Verifications of a mount, by what they found.", ["result"]
        )
        self.append_duration = timed("watchd_journal_append_duration_seconds", "Time a commit took to write.")
        self.sync_duration = timed("watchd_journal_sync_duration_seconds", "Time a commit took to sync.")
        self._reload_ok = gauge(
            "watchd_config_last_reload_successful", "Whether the configuration was good when last read."
        )
        self._reload_time = gauge(
            "watchd_config_last_reload_success_timestamp_seconds", "When a good one was last read."
        )

    def show(self, snapshot: Callable[[], Snapshot]) -> None:
        """Ask `snapshot` at every scrape; it must not block."""
        self._registry.register(_Gauges(snapshot))

    def listen(self, host: str, port: int) -> int:
        """Serve /metrics; returns the port. Raises OSError."""
        self.close()
        server, thread = start_http_server(port, addr=host, registry=self._registry)
        self._server = (server, thread)
        return int(server.server_port)

    def close(self) -> None:
        """Stop serving."""
        if self._server:
            server, thread = self._server
            server.shutdown()
            server.server_close()
            thread.join()
            self._server = None

    def events(self, backend: str, counts: Mapping[str, int]) -> None:
        """Names read, by layer."""
        for layer, count in counts.items():
            self._events.labels(layer, backend).inc(count)

    def changes(self, counts: Mapping[tuple[str, int], int]) -> None:
        """Changes by layer and `Kind` bits."""
        for (layer, kinds), count in counts.items():
            for kind in Kind:
                if kinds & kind:
                    self._changes.labels(layer, kind.name.lower()).inc(count)  # type: ignore[union-attr]

    def desync(self, layer: str, reason: str) -> None:
        """Changes may have been missed."""
        self._desyncs.labels(layer, reason).inc()

    def action(self, mount: str, method: str, result: str, duration_s: float) -> None:
        """Something was done to a mount."""
        self._actions.labels(mount, method, result).inc()
        self.action_duration.labels(method).observe(duration_s)

    def hook(self, mount: str, result: str, duration_s: float) -> None:
        """The command of a mount has ended."""
        self._hooks.labels(mount, result).inc()
        self._hook_duration.observe(duration_s)

    def verification(self, result: str) -> None:
        """A mount was verified."""
        self._verifications.labels(result).inc()

    def forget_mount(self, mount: str) -> None:
        """The mount is gone; its series go too."""
        for counter in (self._actions, self._hooks):
            for labels in [labels for labels in counter._metrics if labels[0] == mount]:
                counter.remove(*labels)

    def reloaded(self, *, ok: bool, time_s: float) -> None:
        """The configuration was read."""
        self._reload_ok.set(ok)
        if ok:
            self._reload_time.set(time_s)


class _Gauges(Collector):
    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        now = self._snapshot()
        yield _by_state("watchd_layers", "Lower layers.", LAYER_STATES, list(now.layer_states))
        yield _by_state("watchd_mounts", "Merged mounts.", MOUNT_STATES, list(now.mount_states))
        yield _by_mount("watchd_mount_stale_entries", "Names known to be stale.", now.stale_entries)
        yield _by_mount("watchd_mount_pinned_entries", "Stale names that somebody holds.", now.pinned_entries)
        yield GaugeMetricFamily(
            "watchd_journal_last_sequence", "Sequence number of the last record.", value=now.journal_last_sequence
        )
        yield GaugeMetricFamily("watchd_journal_size_bytes", "Size of the journal.", value=now.journal_bytes)
        lags = GaugeMetricFamily(
            "watchd_cursor_lag_records", "Records that lie behind a named cursor.", labels=["cursor"]
        )
        for cursor, lag in now.cursor_lags.items():
            lags.add_metric([cursor], lag)
        yield lags
        yield GaugeMetricFamily(
            "watchd_journal_failed", "Whether the journal cannot be written.", value=now.journal_failed
        )
        yield GaugeMetricFamily(
            "watchd_queue_bytes", "Events that the kernel holds for watchd to read.", value=now.queue_bytes
        )
        drops = CounterMetricFamily("watchd_drop_caches", "Host-wide drops of caches asked for.", labels=["result"])
        drops.add_metric(["done"], now.drop_caches)
        drops.add_metric(["refused"], now.drop_caches_refused)
        yield drops
        yield GaugeMetricFamily(
            "watchd_muted_directories",
            "Busy directories outside of all layers, not heard.",
            value=now.muted_directories,
        )


def _by_mount(name: str, text: str, counts: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=["mount"])
    for mount, count in counts.items():
        family.add_metric([mount], count)
    return family


def _by_state(name: str, text: str, states: tuple[str, ...], found: list[str]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=["state"])
    for state in states:
        family.add_metric([state], found.count(state))
    return family
