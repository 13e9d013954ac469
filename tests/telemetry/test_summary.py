import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
from rich.console import Console

from photon.errors import PhotonError
from photon.telemetry.events import (
    Evaluated,
    Event,
    Notice,
    RoundFinished,
    RunFinished,
    RunStarted,
    SiloEvaluation,
    SiloFailed,
    SiloFinished,
    plain_json,
)
from photon.telemetry.summary import (
    build_summary,
    format_bytes,
    format_count,
    format_perplexity,
    format_seconds,
    print_summary,
)


def _started(at: float = 100.0, rounds: int = 2, resumed_from: int | None = None) -> RunStarted:
    return RunStarted(
        time=at,
        run_id="id",
        name="run",
        strategy="photon",
        model="tiny",
        parameters=1000,
        silos=[
            {"name": "a", "train_tokens": 300, "validation_tokens": 30, "unigram_loss": math.log(50)},
            {"name": "b", "train_tokens": 100, "validation_tokens": 10, "unigram_loss": math.log(800)},
        ],
        rounds=rounds,
        cohort=2,
        local_steps=4,
        batch_size=2,
        sequence_length=8,
        engine="inprocess",
        device="cpu",
        roofline_flops=1e9,
        resumed_from=resumed_from,
        flops_per_token=6000.0,
    )


def _evaluated(at: float, number: int, a: float, b: float) -> Evaluated:
    return Evaluated(
        time=at,
        round=number,
        per_silo={
            "a": {"loss": math.log(a), "perplexity": a, "tokens": 30},
            "b": {"loss": math.log(b), "perplexity": b, "tokens": 10},
        },
        loss=1.0,
        perplexity=(a + b) / 2,
        tokens_trained=0,
        bytes_up=1,
        bytes_down=1000,
        seconds=0.5,
    )


def _silo(number: int, silo: str, training: float, mfu: float | None) -> SiloFinished:
    return SiloFinished(
        time=101.0,
        round=number,
        silo=silo,
        steps=4,
        tokens=64,
        loss=3.0,
        loss_last=2.5,
        learning_rate=0.1,
        seconds={"total": training + 1, "training": training, "load": 0.5, "save": 0.5},
        bytes_up=10,
        bytes_down=20,
        update_norm=1.0,
        tokens_per_second=64 / training,
        mfu=mfu,
        gradient_norm=1.0,
    )


def _finished(at: float, number: int, tokens: int, training: float, up: int, down: int) -> RoundFinished:
    return RoundFinished(
        time=at,
        round=number,
        global_step=4 * number,
        tokens=tokens,
        train_loss=3.0,
        pseudo_gradient_norm=1.0,
        silo_cosine=0.5,
        consensus=0.9,
        parameter_norm=10.0,
        bytes_up=up,
        bytes_down=down,
        group_bytes_up={"params": up - 1},
        group_bytes_down={"params": down - 1},
        seconds={
            "round": 6.0,
            "training": training,
            "fold": 0.1,
            "outer": 0.1,
            "evaluate": 0.5,
            "checkpoint": 0.1,
            "overhead": 6.0 - training,
        },
    )


RUN: list[Event] = [
    _started(),
    _evaluated(102.0, 0, 900.0, 1100.0),
    _silo(1, "a", 3.0, 0.2),
    _silo(1, "b", 4.0, 0.4),
    _finished(108.0, 1, 128, 4.0, 20, 40),
    _silo(2, "a", 1.0, None),
    SiloFailed(time=110.0, round=2, silo="b", kind="deadline", reason="late"),
    _evaluated(113.0, 2, 60.0, 100.0),
    _finished(114.0, 2, 192, 2.5, 10, 40),
]


LOSSES = {"initial_loss": ANY, "final_loss": ANY}


def test_a_perplexity_beyond_all_numbers_is_shown_by_its_loss() -> None:
    event = dataclasses.replace(_evaluated(113.0, 2, math.inf, 100.0), loss=2000.0, perplexity=math.inf)
    event.per_silo["a"]["loss"] = 2000.0
    summary = build_summary([_started(), event], weights_sha256=None)
    console = Console(file=io.StringIO(), width=100)
    print_summary(console, json.loads(json.dumps(plain_json(summary))), None, None, None)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().count("1e869") >= 2
    assert "inf" not in console.file.getvalue()


def test_the_figures_are_those_computed_by_hand() -> None:
    summary = build_summary(RUN, weights_sha256="ff")
    assert summary == {
        "run_id": "id",
        "status": "finished",
        "strategy": "photon",
        "model": "tiny",
        "engine": "inprocess",
        "parameters": 1000,
        "rounds": 2,
        "tokens": 192,
        "tree": None,
        "perplexity": {
            **{"initial": 1000.0, "final": 80.0, "initial_loss": 1.0, "final_loss": 1.0},
            # The geometric mean of 50 and 800, weighted 3 to 1.
            "unigram": pytest.approx((50**3 * 800) ** 0.25),
            "per_silo": {
                "a": {"initial": 900.0, "final": 60.0, **LOSSES, "unigram": pytest.approx(50.0)},
                "b": {"initial": 1100.0, "final": 100.0, **LOSSES, "unigram": pytest.approx(800.0)},
            },
            "final_round": 2,
            "final_silos": 2,
            "final_error": None,
            "per_node": {},
            "mean_of_silos": None,
        },
        "bytes": {
            "up": 32,
            "down": 2080,
            "evaluation": {"up": 2, "down": 2000},
            "per_silo": {"a": {"up": 20, "down": 40}, "b": {"up": 10, "down": 20}},
            "per_group": {"params": {"up": 28, "down": 78}},
        },
        "seconds": {"total": 14.0, "training": 6.5, "overhead": 7.5},
        "tokens_per_second": pytest.approx(192 / 14),
        "mfu": pytest.approx((0.2 * 3 + 0.4 * 4) / 7),
        "density": None,
        "privacy": None,
        "tasks": None,
        "unlearned": [],
        "recall_of_forgotten": None,
        "labels": None,
        "failures": 1,
        "weights_sha256": "ff",
    }


def test_the_summary_is_the_same_after_the_end_was_told() -> None:
    summary = build_summary(RUN, weights_sha256="ff")
    end = RunFinished(time=130.0, summary=summary)
    assert build_summary([*RUN, end], weights_sha256="ff") == summary


def test_an_unfinished_run_has_what_it_has() -> None:
    summary = build_summary(RUN[:5], weights_sha256=None)
    assert summary["status"] == "interrupted"
    assert summary["rounds"] == 1
    assert summary["tokens"] == 128
    assert summary["perplexity"]["final"] == 1000.0
    nothing = build_summary(RUN[:1], weights_sha256=None)
    assert nothing["perplexity"]["per_silo"]["a"]["initial"] is None
    assert (nothing["tokens"], nothing["mfu"], nothing["tokens_per_second"]) == (0, None, None)
    json.dumps(nothing, allow_nan=False)


def test_what_was_done_twice_counts_once() -> None:
    lost = [_silo(2, "a", 9.0, 0.9), _finished(120.0, 2, 256, 9.0, 500, 500)]
    resumed = [_started(at=500.0, resumed_from=1), _silo(2, "a", 1.0, None)]
    resumed += [_evaluated(505.0, 2, 60.0, 100.0), _finished(506.0, 2, 192, 2.5, 10, 40)]
    summary = build_summary([*RUN[:5], *lost, *resumed], weights_sha256="ff")
    assert summary["bytes"]["up"] == 32
    assert summary["tokens"] == 192
    assert summary["failures"] == 0
    assert summary["seconds"] == {"total": 14.0, "training": 6.5, "overhead": 7.5}


def test_a_model_that_diverged_has_no_perplexity() -> None:
    diverged = _evaluated(115.0, 2, math.inf, math.nan)
    summary = build_summary([*RUN, diverged], weights_sha256="ff")
    assert summary["perplexity"]["final"] is None
    assert summary["perplexity"]["per_silo"]["a"]["final"] is None
    json.dumps(summary, allow_nan=False)


def test_the_unigram_model_is_weighed_as_the_evaluation() -> None:
    evaluation = _evaluated(113.0, 2, 60.0, 100.0)
    evaluation.per_silo["a"]["tokens"] = 10
    summary = build_summary([_started(), evaluation], weights_sha256=None)
    assert summary["perplexity"]["unigram"] == pytest.approx(math.sqrt(50 * 800))
    del evaluation.per_silo["b"]
    summary = build_summary([_started(), evaluation], weights_sha256=None)
    assert summary["perplexity"]["unigram"] == pytest.approx(50)
    # Before anything is evaluated there is nothing that it could stand beside.
    summary = build_summary([_started()], weights_sha256=None)
    assert summary["perplexity"]["unigram"] is None


def test_no_start_is_an_error() -> None:
    with pytest.raises(PhotonError, match="no run_started"):
        build_summary([Notice(level="info", message="x")], weights_sha256=None)


def test_the_table_shows_the_figures(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(file=out, width=100)
    summary = build_summary(RUN, weights_sha256="ff")
    print_summary(console, summary, tmp_path / "report.html", tmp_path / "export", "[bold]Once upon")
    text = " ".join(out.getvalue().split())
    for expected in (
        "a 900.0 60.0 50.0",
        "b 1,100.0 100.0 800.0",
        "overall 1,000.0 80.0 100.0",
        "a 20 B 40 B",
        "for validation 2 B 2.00 kB",
        "all 32 B 2.08 kB",
        "192 in 2 rounds",
        "training 6.5 s",
        "everything else 7.5 s of 14.0 s",
        "14 tokens/s",
        "31.4%",
        "failed silos 1",
        "[bold]Once upon",
    ):
        assert expected in text
    assert str(tmp_path / "report.html") in out.getvalue().replace("\n", "").replace(" ", "")


def test_a_path_stays_in_one_piece_on_a_narrow_terminal(tmp_path: Path) -> None:
    out = io.StringIO()
    report = tmp_path / ("long" * 20) / "report.html"
    print_summary(Console(file=out, width=40), build_summary(RUN, weights_sha256=None), report, None, None)
    assert str(report) in out.getvalue()


def test_the_table_leaves_out_what_there_is_not() -> None:
    out = io.StringIO()
    summary = build_summary(RUN[:1], weights_sha256=None)
    print_summary(Console(file=out, width=80), summary, None, None, None)
    assert "report" not in out.getvalue()
    assert "FLOPs" not in out.getvalue()
    assert "nan" not in out.getvalue().lower()


def _own_models(tree: dict[str, Any] | None, **perplexities: float) -> dict[str, Any]:
    """Return the summary of a run whose nodes have own models of these perplexities."""
    found = {name: _evaluation(value) for name, value in perplexities.items()}
    evaluation = dataclasses.replace(_evaluated(113.0, 2, 60.0, 100.0), per_node=found)
    return build_summary([dataclasses.replace(_started(), tree=tree), evaluation], weights_sha256=None)


def _evaluation(perplexity: float) -> SiloEvaluation:
    return {"loss": math.log(perplexity), "perplexity": perplexity, "tokens": 10}


def _printed(summary: dict[str, Any]) -> list[str]:
    out = io.StringIO()
    print_summary(Console(file=out, width=100), summary, None, None, None)
    return [line.strip("\n") for line in out.getvalue().splitlines()]


def test_own_models_stand_in_the_levels_of_the_tree() -> None:
    tree = {"a": {"children": {"c": None, "d": None}, "data": "e"}, "b": None}
    summary = _own_models(tree, b=80.0, a=50.0, d=30.0, c=20.0, e=70.0)
    assert summary["tree"] == tree
    assert summary["perplexity"]["mean_of_silos"] == pytest.approx((20 + 30 + 70 + 80) / 4)
    lines = _printed(summary)
    begin = next(index for index, line in enumerate(lines) if "Own models" in line)
    rows = [line.rstrip() for line in lines[begin + 4 : begin + 12] if line.strip("─ ")]
    words = [row.split() for row in rows]
    assert words[:5] == [["a", "50.0"], ["c", "20.0"], ["d", "30.0"], ["e", "70.0"], ["b", "80.0"]]
    assert words[5] == ["mean", "of", "silos", "50.0"]
    assert rows[1].index("c") == rows[0].index("a") + 2


def test_own_models_of_silos_alone_are_shown_where_they_differ_from_the_global_one() -> None:
    same = _own_models(None, a=60.0, b=100.0)
    assert same["perplexity"]["mean_of_silos"] == 80.0
    assert not any("Own models" in line for line in _printed(same))
    own = _own_models(None, a=40.0, b=100.0)
    assert own["perplexity"]["mean_of_silos"] == 70.0
    assert any("Own models" in line for line in _printed(own))
    # Which of them are silos nobody says.
    assert _own_models(None, a=40.0, b=100.0, c=30.0)["perplexity"]["mean_of_silos"] is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_count(0), "0"),
        (format_count(987), "987"),
        (format_count(12_345), "12.3 k"),
        (format_count(999_999), "1.00 M"),
        (format_count(1_234_567), "1.23 M"),
        (format_count(2.4e11), "240 G"),
        (format_count(None), "–"),
        (format_bytes(12), "12 B"),
        (format_bytes(12_926_976), "12.9 MB"),
        (format_seconds(8.25), "8.2 s"),
        (format_seconds(59.97), "1:00"),
        (format_seconds(125), "2:05"),
        (format_seconds(3725), "1:02:05"),
        (format_perplexity(math.nan), "–"),
        (format_perplexity(8280.19), "8,280.2"),
        (format_perplexity(123_456.7), "123,457"),
    ],
)
def test_figures_are_written_shortly(text: str, expected: str) -> None:
    assert text == expected


def test_an_estimate_says_on_how_many_silos_it_rests() -> None:
    last = dataclasses.replace(_evaluated(113.0, 2, 60.0, 100.0), asked=2, of_silos=50, error=0.25)
    summary = build_summary([*RUN[:-2], last, RUN[-1]], weights_sha256="ff")
    assert summary["perplexity"]["final_silos"] == 2
    # The standard error of e^L is e^L times that of L.
    assert summary["perplexity"]["final_error"] == pytest.approx(80.0 * 0.25)
    assert any("± 20.0, by 2 silos after round 2" in line for line in _printed(summary))
