"""A run in a folder, as Python sees it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from photon.api.turn import Shown, shown_as, turn
from photon.config.compose import load
from photon.config.schema import RunConfig
from photon.errors import PhotonError
from photon.preflight import preflight_file

if TYPE_CHECKING:
    from pandas import DataFrame

    from photon.telemetry.events import Event

AnyPath = str | Path

_HISTORY_COLUMNS = (
    *("round", "tokens", "train_loss", "loss", "perplexity", "pseudo_gradient_norm", "silo_cosine"),
    *("bytes_up", "bytes_down", "seconds"),
)
_SILO_COLUMNS = (
    *("round", "silo", "steps", "tokens", "loss", "update_norm"),
    *("tokens_per_second", "bytes_up", "bytes_down"),
)


class Run:
    """A run in a folder, finished or not.

    Parameters
    ----------
    run_dir
        Its folder.

    Raises
    ------
    PhotonError
        If no run was started there.
    """

    def __init__(self, run_dir: AnyPath) -> None:
        self.run_dir = Path(run_dir).absolute()
        if not (self.run_dir / "config.yaml").is_file():
            raise PhotonError(f"{run_dir}: holds no run; start one with photon.train")

    def __repr__(self) -> str:
        """Say where the run is, and how far."""
        return f"Run({str(self.run_dir)!r}, {self.rounds} of {self.config.rounds} rounds)"

    @property
    def config(self) -> RunConfig:
        """The configuration that it was started with."""
        return load(self.run_dir / "config.yaml").model_copy(update={"run_dir": str(self.run_dir)})

    @property
    def events(self) -> "list[Event]":
        """What was told of it, without what an interrupted attempt told of rounds that were done again."""
        from photon.telemetry.log import current_history, read_events

        return current_history(read_events(self.run_dir / "events.jsonl"))

    @property
    def rounds(self) -> int:
        """Rounds that are done."""
        from photon.telemetry.events import RoundFinished

        return max((event.round for event in self.events if isinstance(event, RoundFinished)), default=0)

    @property
    def is_finished(self) -> bool:
        """Whether all rounds are done and ``summary`` is there."""
        return (self.run_dir / "summary.json").is_file()

    @property
    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` says: perplexities, bytes, seconds, tokens.

        Raises
        ------
        PhotonError
            If the run is not finished.
        """
        if not self.is_finished:
            raise PhotonError(f"{self.run_dir}: the run is not finished; go on with Run.resume()")
        from photon.telemetry.log import read_summary

        return read_summary(self.run_dir)

    @property
    def history(self) -> "DataFrame":
        """A row for each round, from 0, before training; perplexities are of the model after the round.

        Columns: ``round``, ``tokens`` (of all silos, so far), ``train_loss`` and ``loss`` (nats a token),
        ``perplexity``, ``pseudo_gradient_norm``, ``silo_cosine``, ``bytes_up`` and ``bytes_down`` (of the
        round's training), ``seconds``. What was not measured is NaN.
        """
        from pandas import DataFrame

        from photon.telemetry.events import Evaluated, RoundFinished

        rows: dict[int, dict[str, Any]] = {}
        for event in self.events:
            if isinstance(event, RoundFinished):
                names = (
                    "tokens",
                    "train_loss",
                    "pseudo_gradient_norm",
                    "silo_cosine",
                    "bytes_up",
                    "bytes_down",
                )
                told = {name: getattr(event, name) for name in names}
                rows.setdefault(event.round, {}).update(told, seconds=event.seconds["round"])
            elif isinstance(event, Evaluated):
                row = rows.setdefault(event.round, {"tokens": event.tokens_trained})
                row.update(loss=event.loss, perplexity=event.perplexity)
        table = DataFrame(
            [{"round": number, **row} for number, row in sorted(rows.items())], columns=_HISTORY_COLUMNS
        )
        return table.astype(dict.fromkeys(_HISTORY_COLUMNS[2:], float))

    @property
    def silos(self) -> "DataFrame":
        """A row for each silo's reply that counted.

        Columns: ``round``, ``silo``, ``steps``, ``tokens``, ``loss`` (nats a token), ``update_norm``,
        ``tokens_per_second``, ``bytes_up``, ``bytes_down``.
        """
        from pandas import DataFrame

        from photon.telemetry.events import SiloFinished

        replies = [event for event in self.events if isinstance(event, SiloFinished)]
        rows = [{name: getattr(reply, name) for name in _SILO_COLUMNS} for reply in replies]
        return DataFrame(rows, columns=_SILO_COLUMNS)

    def resume(self, *, back_to: int | None = None, display: Shown | None = None) -> "Run":
        """Go on, from the newest checkpoint or from an earlier one, and return this run.

        Parameters
        ----------
        back_to
            Go back to this round, which must be kept.
        display
            As of `train`.

        Raises
        ------
        PhotonError, RunError, KeyboardInterrupt
            As `train`.
        """
        from photon.engine.start import start
        from photon.node import answer

        with turn():
            config = preflight_file(self.run_dir / "config.yaml")
            config = shown_as(config, display).model_copy(update={"run_dir": str(self.run_dir)})
            start(config, answer, resume=True, back_to=back_to)
        return self

    def evaluate(self, data: AnyPath | None = None, *, sequences: int | None = None) -> "DataFrame":
        """Return the newest model's figures on each silo's validation text.

        Parameters
        ----------
        data
            Prepared data; None: the run's own, which has to be on this machine.
        sequences
            Validation windows of each silo, evenly spaced; None: all.

        Returns
        -------
        DataFrame
            Columns ``silo``, ``loss`` (nats a token), ``perplexity``, ``tokens``.

        Raises
        ------
        PhotonError
            If there is no checkpoint, no data, or they do not fit.
        """
        from pandas import DataFrame

        from photon.data.prepared import PreparedData
        from photon.evaluation.load import check_tokenizer, open_trained
        from photon.evaluation.perplexity import evaluate_data

        where = data or self.config.data.path
        if where is None:
            raise PhotonError(f"{self.run_dir}: the run's text is not on this machine; name prepared data")
        prepared = PreparedData.open(Path(where))
        with turn():
            trained = open_trained(self.run_dir)
            check_tokenizer(trained, prepared)
            scores = evaluate_data(
                trained.model, prepared, batch_size=32, device="cpu", precision="fp32", limit=sequences
            )
        rows = [
            {"silo": silo, "loss": score.loss, "perplexity": score.perplexity, "tokens": score.tokens}
            for silo, score in scores.items()
        ]
        return DataFrame(rows, columns=["silo", "loss", "perplexity", "tokens"])

    def export(self, output: AnyPath | None = None) -> Path:
        """Write the newest model as a Hugging Face folder, and return the folder.

        Parameters
        ----------
        output
            Folder to write; None: ``export`` in the run's folder, which a finished run has already.

        Raises
        ------
        PhotonError
            If there is no checkpoint, or the folder cannot be written.
        """
        from photon.evaluation.export import export_run

        folder = self.run_dir / "export" if output is None else Path(output)
        if output is not None or not folder.is_dir():
            export_run(self.run_dir, folder)
        return folder

    def generate(
        self, prompt: str, *, max_new_tokens: int = 64, temperature: float = 0.8, seed: int = 0
    ) -> str:
        """Return how the exported model continues a prompt; the same arguments give the same text.

        Raises
        ------
        PhotonError
            If the run has no checkpoint yet.
        """
        from photon.evaluation.generate import generate_text

        with turn():
            return generate_text(
                self.export(), prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
            )

    def report(self, output: AnyPath | None = None) -> Path:
        """Write the report that opens in a browser, and return its file."""
        from photon.report.write import write_report

        file = self.run_dir / "report.html" if output is None else Path(output)
        write_report([self.run_dir], file)
        return file
