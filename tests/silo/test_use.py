"""Whether a count of a silo's text is on the disk before an update leaves, and where nobody needs that."""

import os

import pytest

from photon.link.messages import TrainRequest
from photon.silo.policy import Cost, SiloPolicy
from photon.silo.site import SiloSite
from photon.silo.use import count_use
from photon.state.silo import SiloCounts
from tests.conftest import composed


@pytest.mark.parametrize("simulated", [False, True])
def test_a_count_is_flushed_where_updates_leave_the_machine(simulated, tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    config = composed("data.path=elsewhere")
    site = SiloSite(tmp_path, tmp_path, None, SiloPolicy(), config.privacy, simulated=simulated)
    request = TrainRequest(
        run_id="run", model_id="m", round=1, silo="alpha", members=["alpha"], global_step=0, steps=2,
        batch_size=4, last_round=0, position=0, cohort=1,
    )  # fmt: skip
    cost = Cost(tokens=64, releases=1, steps=2, start=0, windows=8)
    count_use(request, {"alpha": cost}, site, config, told=False)
    assert SiloCounts(tmp_path, "alpha").used()["run"].tokens == 64
    assert bool(flushed) is not simulated
