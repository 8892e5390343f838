"""Counters of a worker's stream support, on SGLang's own `/metrics` page."""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from sglang_stream.policy import PolicyName

_LENGTHS = (0, 64, 256, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class EngineMetrics:
    """`sglang_stream_*` of one scheduler process. SGLang must have set up its collecting directory
    (`--enable-metrics`) before for them to reach the page. `policy`: a label of what it decides."""

    def __init__(
        self, policy: PolicyName = "slack", registry: CollectorRegistry = REGISTRY
    ) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            names = ["policy", *labels]
            return Counter(f"sglang_stream_{name}", text, names, registry=registry)

        self.open = Gauge(
            "sglang_stream_open_streams",
            "Streams that are not sealed yet.",
            multiprocess_mode="mostrecent",
            registry=registry,
        )
        self.held = Gauge(
            "sglang_stream_held_tokens",
            "KV tokens that streams hold, shared prefixes counted for each.",
            multiprocess_mode="mostrecent",
            registry=registry,
        )
        self._by_policy = {
            "passes": counter("passes", "Passes computed for open streams."),
            "pass_tokens": counter("pass_tokens", "Tokens computed in passes."),
            "recomputed": counter(
                "recomputed_tokens", "Tokens computed in passes that had been computed before."
            ),
            "swapped": counter("swapped_tokens", "KV tokens copied to host memory."),
            "restored": counter("restored_tokens", "KV tokens copied back from host memory."),
            "invalidated": counter("invalidated_tokens", "Tokens whose KV an update made useless."),
            "found_again": counter(
                "found_again_tokens",
                "Tokens that an update left behind and a later one found again.",
            ),
        }
        self._preemptions = counter(
            "preemptions", "Times that a stream's KV was given up for other requests.", "kind"
        )
        self.use(policy)
        self.chunks = Counter(
            "sglang_stream_chunks", "Chunks and updates applied.", registry=registry
        )
        self.odd = Counter(
            "sglang_stream_odd_events",
            "Events that were repeated, late, out of order (gap), unreadable, for a stream that is "
            "unknown, has moved or is not the sender's (foreign).",
            ["kind"],
            registry=registry,
        )
        self.kv_sent = Counter(
            "sglang_stream_kv_sent_bytes",
            "KV of streams sent to decode workers, before (early) and after (late) the last "
            "forward of each.",
            ["when"],
            registry=registry,
        )
        self.lcp = Histogram(
            "sglang_stream_lcp_tokens",
            "Prefix that an update shares with the prompt before.",
            buckets=_LENGTHS,
            registry=registry,
        )
        self.ttft = Histogram(
            "sglang_stream_ttft_seconds",
            "From the seal to the first token, at the scheduler.",
            buckets=_SECONDS,
            registry=registry,
        )

    def use(self, policy: PolicyName) -> None:
        """Counts under the name of this policy from now on."""
        self.passes = self._by_policy["passes"].labels(policy)
        self.pass_tokens = self._by_policy["pass_tokens"].labels(policy)
        self.recomputed = self._by_policy["recomputed"].labels(policy)
        self.swapped = self._by_policy["swapped"].labels(policy)
        self.restored = self._by_policy["restored"].labels(policy)
        self.invalidated = self._by_policy["invalidated"].labels(policy)
        self.found_again = self._by_policy["found_again"].labels(policy)
        self.recomputes = self._preemptions.labels(policy, "recompute")
        self.swaps = self._preemptions.labels(policy, "swap")


class _Silent:
    """Takes every measurement and keeps none."""

    def inc(self, amount: float = 1) -> None: ...

    def set(self, value: float) -> None: ...

    def observe(self, amount: float) -> None: ...

    def labels(self, *values: str) -> _Silent:
        return self


def silent_metrics() -> EngineMetrics:
    """Metrics for the ranks that only repeat what rank 0 counts already."""
    metrics = EngineMetrics(registry=CollectorRegistry())
    for name in vars(metrics):
        if not name.startswith("_"):
            setattr(metrics, name, _Silent())
    return metrics
