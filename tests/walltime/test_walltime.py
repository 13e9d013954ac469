"""The wall-time model against the tables of the Photon and DES-LOC papers."""

import pytest
from typer.testing import CliRunner

from photon.commands.app import app
from photon.commands.walltime import bytes_per_second
from photon.errors import PhotonError
from photon.walltime.model import Network, methods, wall_time

GBPS_10 = 1250e6

#: parameters, local steps, steps, silos, steps per second; hours in total by ring, all-reduce, server.
PHOTON = [
    (1_315_950_592, 500, 9_500, 8, 0.147, (17.97, 18.03, 18.13)),
    (1_315_950_592, 1, 19_759, 8, 0.8396, (26.76, 87.43, 191.44)),
    (2_651_837_440, 500, 13_000, 4, 0.144, (25.12, 25.17, 25.32)),
    (2_651_837_440, 1, 22_900, 4, 0.395, (56.59, 97.07, 232.02)),
    (6_658_859_008, 500, 11_000, 4, 0.032, (95.58, 95.68, 96.01)),
    (6_658_859_008, 1, 21_908, 4, 0.12, (147.97, 245.22, 569.41)),
]


@pytest.mark.parametrize(("parameters", "period", "steps", "silos", "throughput", "hours"), PHOTON)
def test_photons_table(
    parameters: float, period: int, steps: int, silos: int, throughput: float, hours: tuple[float, ...]
) -> None:
    """Bytes per second of 10 Gbit/s, two bytes a parameter; all 18 totals within 0.01 h."""
    for topology, expected in zip(("ring", "all-reduce", "parameter-server"), hours, strict=True):
        network = Network(silos, GBPS_10, topology=topology)
        time = wall_time(steps, throughput, {"params": period}, 2 * parameters, network)
        assert time.total / 3600 == pytest.approx(expected, abs=0.01)


def test_the_7b_rows_communication() -> None:
    federated = wall_time(11_000, 0.032, {"params": 500}, 2 * 6_658_859_008, Network(4, GBPS_10))
    centralised = wall_time(21_908, 0.12, {"gradient": 1}, 2 * 6_658_859_008, Network(4, GBPS_10))
    assert federated.communication / 3600 == pytest.approx(0.098, abs=5e-4)
    assert centralised.communication / 3600 == pytest.approx(97.25, abs=0.2)


@pytest.mark.parametrize(
    ("method", "period", "seconds"),
    [
        ("DDP", 16, 6389.76),
        ("FedAvg, DiLoCo", 16, 399.36),
        ("Local Adam", 16, 1198.08),
        ("DES-LOC", 16, 599.04),
        ("DES-LOC", 256, 37.44),
    ],
)
def test_deslocs_communication(method: str, period: int, seconds: float) -> None:
    """d = 1.3e9, 2 bytes, B = 12.5e9 B/s, M = 4, T = 20,480."""
    network = Network(4, 12.5e9)
    assert network.sync_seconds(2.6e9) == pytest.approx(0.312)
    time = wall_time(20_480, 1.0, methods(period)[method], 2.6e9, network)
    # The slower states of the longest plan are not due a whole number of times in T.
    assert time.communication == pytest.approx(seconds, rel=0.02 if method == "DES-LOC" else 1e-9)


def test_deslocs_computing() -> None:
    """t_compute = 6 d D / (MFU S M)."""
    tokens = 20_480 * 1024 * 2048
    step = 6 * 1.3e9 * 1024 * 2048 / (0.4 * 8 * 989e12 * 4)
    assert wall_time(20_480, 1 / step, {}, 0.0, Network(4, 1.0)).compute == pytest.approx(
        6 * 1.3e9 * tokens / (0.4 * 8 * 989e12 * 4)
    )
    assert 20_480 * step == pytest.approx(26_463.6, abs=0.1)


def test_hidden_communication_and_lone_silos_cost_nothing() -> None:
    assert wall_time(100, 1.0, {"params": 1}, 1e9, Network(4, 1e6, exposed=0.0)).total == 100
    assert wall_time(100, 1.0, {"params": 1}, 1e9, Network(1, 1e6, latency=5.0)).total == 100
    assert Network(2, 1e6, latency=0.5).sync_seconds(1e6) == pytest.approx(1.5)


def test_bandwidths_are_bits_in_decimal_units() -> None:
    assert bytes_per_second("10Gbps") == GBPS_10
    assert bytes_per_second("100 Mbps") == 12.5e6
    with pytest.raises(PhotonError, match="as in 10Gbps"):
        bytes_per_second("fast")


def test_the_command_prints_photons_7b_row(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    options = "--model photon-7b --silos 4 --steps 11000 --local-steps 500 --throughput 0.032"
    plot = tmp_path / "curves.svg"
    result = CliRunner().invoke(app, ["walltime", "compare", *options.split(), "--plot", str(plot)])
    assert result.exit_code == 0, result.output
    row = next(line for line in result.output.splitlines() if "FedAvg" in line)
    assert [cell in row for cell in ("95.49", "96.01", "95.68", "95.58")] == [True] * 4
    assert "DES-LOC" in plot.read_text()


def test_what_is_missing_is_named() -> None:
    result = CliRunner().invoke(app, ["walltime", "compare", "--silos", "4"])
    assert isinstance(result.exception, PhotonError)
    assert "--parameters is needed" in str(result.exception)


def test_periods_are_suggested_for_an_optimizer(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(app, ["walltime", "suggest", "--optimizer", "adamw", "--local-steps", "32"])
    assert result.exit_code == 0, result.output
    assert "strategy.sync={exp_avg: 96, exp_avg_sq: 192}" in result.output


def test_a_finished_run_brings_its_figures(run_small, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    run_small()
    result = CliRunner().invoke(app, ["walltime", "compare", "--run", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert "3 silos, 12 steps" in result.output
