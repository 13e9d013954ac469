"""What a report shows of requests that something be forgotten."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from photon.report.unlearned_section import unlearned_section
from photon.state.unlearned import Changed, Unlearned, write_unlearned


def entry(**changed: Any) -> Unlearned:
    given: dict[str, Any] = {
        "asked_by": "a\nmember",
        "time": 0.0,
        "weight": "h.2.mlp.c_proj.weight",
        "layer": 2,
        "ridge": 0.001,
        "coefficient": 2.0,
        "positions": "last",
        "prompts": {"forget": 3},
        "before": {"forget/rouge1": 1.0, "retain/rouge1": 0.98},
        "after": {"forget/rouge1": 0.05, "retain/rouge1": 0.95, "forget/refused": 0.9},
        "hash_before": "a",
        "hash_after": "b",
    }
    return Unlearned(**{**given, **changed})


def test_requests_are_rows_and_attacks_a_table_of_their_own(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(folder=tmp_path, history=[], evaluations=[])
    assert unlearned_section(run) == []
    other = Changed(weight="h.1", layer=1, ridge=0.0, coefficient=1.0, hash_before="", hash_after="")
    (tmp_path / "export").mkdir()
    write_unlearned(
        tmp_path / "export", [entry(), entry(also=(other,), attacks={"skip the block": 0.95}, time=86400.0)]
    )
    ((title, (panel,)),) = unlearned_section(run)
    assert (title, panel.title) == ("Forgetting", "Requests, export")
    requests, attacks = panel.tables
    assert requests.rows[0] == [
        "1",
        "a\\nmember",
        "1970-01-01 00:00 UTC",
        "h.2.mlp.c_proj.weight (ridge 0.001, coefficient 2)",
        "1.00 → 0.05",
        "– → 0.90",
        "0.98 → 0.95",
        "– → –",
        "– → –",
    ]
    assert requests.rows[1][2:4] == [
        "1970-01-02 00:00 UTC",
        "h.2.mlp.c_proj.weight (ridge 0.001, coefficient 2), h.1 (ridge 0, coefficient 1)",
    ]
    assert attacks.columns == ["request", "skip the block"]
    assert attacks.rows == [["1", "–"], ["2", "0.95"]]


def test_a_ledger_that_cannot_be_read_costs_its_table(tmp_path: Path) -> None:
    (tmp_path / "unlearned.json").write_text("[{}]")
    ((_, (panel,)),) = unlearned_section(SimpleNamespace(folder=tmp_path, history=[], evaluations=[]))  # type: ignore[arg-type]
    assert panel.title == "Requests"
    assert "cannot be read" in panel.note
    assert panel.tables == []
