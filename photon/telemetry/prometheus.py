"""Metrics of a run for Prometheus to scrape (``pip install 'photon-fl[prometheus]'``).

Labels are words of Photon's own, never a silo's name: so the number of series is fixed, however many silos
there are, and whoever reads the metrics learns nothing of any one of them.
"""

from typing import Any, cast

from photon import DISTRIBUTION
from photon.errors import PhotonError
from photon.telemetry.events import (
    Checkpointed,
    Evaluated,
    Event,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunInterrupted,
    RunStarted,
    SiloFailed,
    SiloFinished,
)
from photon.telemetry.listener import ListenerRun

#: Kinds of `SiloFailed`.
_KINDS = ("error", "rejected", "refused", "deadline", "unavailable")
_STATES = ("starting", "running", "finished", "interrupted")

#: Gauges, and what each tells.
_GAUGES = {
    "round": "The last round that is done.",
    "rounds_planned": "Rounds that the run has.",
    "cohort_silos": "Silos of the current cohort.",
    "silos": "Silos of the federation.",
    "tokens_trained": "Tokens that all silos have trained on together.",
    "train_loss": "Mean training loss of the last round, in nats per token.",
    "validation_loss": "Loss of the last validation, in nats per token.",
    "validation_perplexity": "Perplexity of the last validation.",
    "validation_silos": "Silos that the last validation rests on.",
    "pseudo_gradient_norm": "L2 norm of the last pseudo-gradient.",
    "checkpoint_round": "Round of the last checkpoint.",
    "last_event_time_seconds": "When the run last told anything, in unix seconds.",
}


class PrometheusListener:
    """Listener that answers scrapes over HTTP.

    Parameters
    ----------
    address, port
        Where to listen; port 0 takes any that is free.

    Raises
    ------
    PhotonError
        The client is not installed, or nothing can listen there.
    """

    def __init__(self, address: str, port: int) -> None:
        try:
            from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
        except ImportError:
            raise PhotonError(
                "telemetry=prometheus needs the client of Prometheus; run: "
                f"pip install '{DISTRIBUTION}[prometheus]'"
            ) from None
        # Of its own: the process may train another run later.
        registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {
            name: Gauge(f"photon_{name}", told, registry=registry) for name, told in _GAUGES.items()
        }
        self._state = Gauge("photon_state", "1 for the state of the run.", ["state"], registry=registry)
        self._seconds = Gauge(
            "photon_round_seconds", "Where the last round's time went.", ["phase"], registry=registry
        )
        self._replies = Counter("photon_silo_replies", "Replies that were accepted.", registry=registry)
        self._failures = Counter(
            "photon_silo_failures", "Silos that gave no usable reply.", ["kind"], registry=registry
        )
        self._bytes = Counter(
            "photon_link_bytes",
            "Bytes over the link, of training and validation.",
            ["way"],
            registry=registry,
        )
        for kind in _KINDS:
            self._failures.labels(kind)
        self._set_state("starting")
        try:
            self._server, _ = start_http_server(port, addr=address, registry=registry)
        except OSError as error:
            raise PhotonError(
                f"telemetry: Prometheus cannot listen at {address}:{port} ({error.strerror}); "
                "choose another port of that listener"
            ) from None
        self.port: int = self._server.server_port

    def __call__(self, event: Event) -> None:
        """Keep what ``event`` tells for the next scrape."""
        found: dict[str, Any] = {"last_event_time_seconds": event.time}
        if isinstance(event, RunStarted):
            self._set_state("running")
            found |= {"rounds_planned": event.rounds, "silos": len(event.silos)}
            found["round"] = event.resumed_from or 0
        elif isinstance(event, RoundStarted):
            found["cohort_silos"] = len(event.cohort)
        elif isinstance(event, SiloFinished):
            self._replies.inc()
        elif isinstance(event, SiloFailed):
            self._failures.labels(event.kind).inc()
        elif isinstance(event, RoundFinished):
            found |= {"round": event.round, "tokens_trained": event.tokens, "train_loss": event.train_loss}
            found["pseudo_gradient_norm"] = event.pseudo_gradient_norm
            for phase, seconds in cast("dict[str, float]", event.seconds).items():
                self._seconds.labels(phase).set(seconds)
        elif isinstance(event, Evaluated):
            found |= {"validation_loss": event.loss, "validation_perplexity": event.perplexity}
            found["validation_silos"] = len(event.per_silo)
        elif isinstance(event, Checkpointed):
            found["checkpoint_round"] = event.round
        elif isinstance(event, RunFinished):
            self._set_state("finished")
        elif isinstance(event, RunInterrupted):
            self._set_state("interrupted")
        if isinstance(event, RoundFinished | Evaluated):
            self._bytes.labels("up").inc(event.bytes_up)
            self._bytes.labels("down").inc(event.bytes_down)
        for name, value in found.items():
            self._gauges[name].set(value)

    def _set_state(self, now: str) -> None:
        for state in _STATES:
            self._state.labels(state).set(state == now)

    def close(self) -> None:
        """Answer no more scrapes."""
        self._server.shutdown()
        self._server.server_close()


def prometheus(run: ListenerRun, *, address: str = "127.0.0.1", port: int = 9464) -> PrometheusListener:
    """Return what answers scrapes while a run lasts; others reach it only where ``address`` says so."""
    return PrometheusListener(address, port)
