"""Sums of float64 under masks, with a silo that lies, one that is away, and a server that asks too much."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from photon.errors import PhotonError, RunError
from photon.federation.admission import _problem_with_values
from photon.federation.failures import UndoneError
from photon.link.encoding import Packed
from photon.link.messages import TrainRequest
from photon.privacy.masking import FixedPoint
from photon.silo import secure
from photon.strategy.contract import Contract, Leaving
from tests.conftest import small_run
from tests.federation import test_secure_liars as liars
from tests.federation.test_secure_liars import LIAR, NAMES, SECURE

GRAM, COUNT = torch.Size([6, 5]), torch.Size([])
LIMIT = 1024.0


def contract(*, needs_all: bool = False) -> Contract:
    shapes = {"gram": GRAM, "zeros": torch.Size([7]), "count": COUNT}
    leaving = Leaving("sum", shapes, masked=frozenset(shapes), limit=LIMIT)
    return Contract({}, {"shared/sums": leaving}, needs_all=needs_all)


class Cohort(liars.Cohort):
    """A server and its silos, which sum."""

    def __init__(self, *args: Any, needs_all: bool = False) -> None:
        super().__init__(*args)
        self.contract = contract(needs_all=needs_all)
        generator = torch.Generator().manual_seed(3)
        self.sums = {
            name: {
                "gram": 100 * torch.randn(GRAM, generator=generator, dtype=torch.float64),
                "zeros": torch.zeros(7, dtype=torch.float64),
                "count": torch.tensor(3.0, dtype=torch.float64),
            }
            for name in NAMES
        }

    def total(self, sending: list[str] | None = None, server_round: int = 1) -> dict[str, torch.Tensor]:
        """Do a round, and return what is unmasked."""
        requests = {
            name: TrainRequest(
                run_id="r", model_id="m", round=server_round, silo=name, members=[name], global_step=0,
                steps=0, batch_size=1, last_round=0, position=0, cohort=5,
            )
            for name in NAMES
        }  # fmt: skip
        server = liars.SecureSum(
            self.config.privacy,
            requests,
            self.contract,
            self.ask,
            lambda name, failure: self.failed.__setitem__(name, failure.reason),
            self.warnings.append,
        )
        agreed = server.agree()
        for name in [name for name in agreed if name in (sending or NAMES)]:
            reply = {"shared/sums": {key: Packed(tensor) for key, tensor in self.sums[name].items()}}
            masked = self.masked(agreed[name], reply, self.sites[name], self.config, self.contract)
            packed = self.contract.masked_of(masked)
            assert {one.data.dtype for one in packed.values()} == {torch.int64}
            server.add(name, {key: one.data for key, one in packed.items()})
        assert server.opens_sums
        return server.opened()


@pytest.fixture
def make(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Cohort]:
    monkeypatch.setattr("os.fsync", lambda _: None)
    config = small_run(*SECURE, data=corpus, run_dir=tmp_path / "run")
    return lambda **changes: Cohort(tmp_path, config, **changes)


@pytest.mark.parametrize("sending", [NAMES, NAMES[:3]])
def test_the_sum_is_that_of_those_who_sent_within_the_stated_error(
    make: Callable[..., Cohort], sending: list[str]
) -> None:
    cohort = make()
    found = cohort.total(sending)
    step = FixedPoint({"x": LIMIT}, 5).step("x")
    assert step == 2.0**-49
    for key in ("gram", "zeros", "count"):
        expected = sum(cohort.sums[name][key] for name in sending)
        error = (found[f"shared/sums/{key}"] - expected).abs()
        assert float(error.max()) <= len(sending) * step / 2 + 2**-50 * float(expected.abs().max())
    assert found["shared/sums/count"] == 3 * len(sending)


def test_a_value_beyond_its_range_does_not_leave(make: Callable[..., Cohort]) -> None:
    cohort = make()
    cohort.sums["gamma"]["gram"][0, 0] = LIMIT * 1.01
    with pytest.raises(PhotonError, match=r"privacy.ranges: the sum shared/sums/gram reaches 1034.24, and"):
        cohort.total()


def test_a_liar_moves_a_sum_no_further_than_so_many_can_reach(make: Callable[..., Cohort]) -> None:
    cohort = make()
    mask = secure.mask

    def forged(request: TrainRequest, *rest: Any) -> Any:
        reply = mask(request, *rest)
        if request.silo == LIAR:
            integers = reply["shared/sums"]["count"].data.numpy().view(np.uint64)
            integers += np.uint64(2**62)
        return reply

    cohort.masked = forged
    with pytest.raises(UndoneError, match="the sum of shared/sums/count is beyond what 5 silos within 1024"):
        cohort.total()


def test_what_a_sum_has_of_another_binds_it_to_the_same_silos(make: Callable[..., Cohort]) -> None:
    """Of two requests some tensors may be equal: the difference of the sums would be somebody's."""
    cohort = make()
    cohort.total()
    for name in NAMES:
        cohort.sums[name]["count"] += 1
    with pytest.raises(RunError, match=r"helped to unmask.*was in a sum over other silos before"):
        cohort.total([name for name in NAMES if name != "alpha"], server_round=2)
    # Over the same ones it may be; and zeros and single numbers are equal by chance.
    cohort.total(server_round=3)
    for name in NAMES:
        cohort.sums[name]["gram"] *= 1 + 1e-9
    cohort.total([name for name in NAMES if name != "alpha"], server_round=4)


def test_a_sum_of_all_is_of_all_or_none(make: Callable[..., Cohort]) -> None:
    cohort = make(needs_all=True)
    with pytest.raises(RunError, match="4 of 5 silos sent a masked update, and it takes 5"):
        cohort.total([name for name in NAMES if name != "alpha"])
    cohort.total()


def test_a_silo_does_not_mask_what_fewer_could_unmask(make: Callable[..., Cohort]) -> None:
    """A server that keeps to no promise asks for a sum over fewer than were told of."""
    cohort = make()
    lax = cohort.contract
    cohort.contract = contract(needs_all=True)
    honest = cohort.masked

    def masked(request: TrainRequest, reply: Any, site: Any, config: Any, _: Contract) -> Any:
        return honest(request, reply, site, config, contract(needs_all=True))

    cohort.contract, cohort.masked = lax, masked
    with pytest.raises(PhotonError, match="the sum is of all 5 silos or none, and 3 of 5 could unmask it"):
        cohort.total()


def test_masked_sums_are_integers_of_64_bits() -> None:
    sums = torch.zeros(3, dtype=torch.float64)
    for kind, dtype in (("sum", torch.int64), ("parameters", torch.int32)):
        assert _problem_with_values(sums.to(dtype), kind, masked=True) is None
        for other in (torch.int32, torch.int64, torch.float64):
            if other != dtype:
                assert "expected masked integers" in str(
                    _problem_with_values(sums.to(other), kind, masked=True)
                )
