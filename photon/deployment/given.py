"""What a silo has given to whom, as it stands on its own disk."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from photon.deployment.approved import ApprovedCode
from photon.errors import PhotonError
from photon.state.silo import COUNTS, Use, uses_of_silos


def silo_status(state: Path) -> dict[str, Any]:
    """Return what a node's state folder tells.

    Parameters
    ----------
    state
        The node's state folder.

    Returns
    -------
    dict
        ``silos``: of each what was used in which run, and when it last was; ``policy``: file and rules that
        are in force; ``started``, ``approved``, ``refused``: which code the node runs. None or empty where
        nothing is known.

    Raises
    ------
    PhotonError
        If there is no such folder, or something in it cannot be read.
    """
    if not state.is_dir():
        raise PhotonError(f"{state}: no such folder; give the state-dir of the silo's node config")
    approved = ApprovedCode(state)
    started = approved.started()
    return {
        "state_dir": str(state),
        "silos": {silo: _used(state / silo, uses) for silo, uses in uses_of_silos(state).items()},
        "policy": None if started is None else _policy(started.node_config),
        "started": None if started is None else started.model_dump(),
        "approved": [one.model_dump() for one in approved.approvals()],
        "refused": {file.stem: _time_of(file) for file in approved.refused()},
    }


def _used(folder: Path, uses: Mapping[str, Use]) -> dict[str, Any]:
    touched = [folder / COUNTS, folder / "tokens.json", *folder.glob("round-[0-9]*")]
    return {
        "runs": {run: {"tokens": use.tokens, "releases": use.releases} for run, use in uses.items()},
        "last_active": max(_time_of(path) for path in touched if path.exists()),
    }


def _policy(node_config: str) -> dict[str, Any]:
    from photon.flower_compat import parse_node_config
    from photon.silo.policy import read_policy
    from photon.silo.site import read_settings

    path = read_settings(parse_node_config(node_config)).policy
    # Without a file everything is accepted; rules that are on by default come with one.
    rules = {} if path is None else read_policy(path).model_dump(exclude_none=True)
    return {"file": None if path is None else str(path), "rules": rules}


def _time_of(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
