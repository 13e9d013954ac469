"""Who is turned away: a stranger, an impostor of the aggregator, an app or SuperExec without credentials."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from photon.deployment.keys import make_authority, make_node_key
from photon.deployment.local import SUPEREXEC, SUPERLINK, Program
from photon.engine.processes import stop_tree
from tests.conftest import write_corpus
from tests.deployment.harness import Deployment, wait_until

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A secure SuperLink that knows the keys of two silos; none of them is started."""
    folder = tmp_path_factory.mktemp("secure")
    data = write_corpus(folder / "corpus", {"alpha": "abcdefgh", "beta": "ijklmnop"})
    with Deployment(folder / "fed", data) as started:
        started.start(SUPERLINK)
        started.federation.wait_until_up(started.processes[SUPERLINK])
        for silo in started.federation.silos:
            started.federation.register(silo)
        yield started


def variant(deployment: Deployment, name: str, log: Path, **changes: str) -> Program:
    """Return a program with other values for some of its options."""
    program = deployment.program(name)
    command = list(program.command)
    for option, value in changes.items():
        command[command.index(f"--{option.replace('_', '-')}") + 1] = value
    return replace(program, command=tuple(command), log=log)


def assert_turned_away(deployment: Deployment, program: Program, reason: str, told_in: Path) -> None:
    process = program.start(supervised=False)
    try:
        wait_until(lambda: reason in told_in.read_text(), f"{reason!r} in {told_in}", 120)
    finally:
        stop_tree(process, at_once=True)
    assert deployment.federation.nodes_online() == 0


def test_an_unregistered_key(deployment: Deployment, tmp_path: Path) -> None:
    stranger, _ = make_node_key(tmp_path / "keys", "stranger")
    program = variant(
        deployment, "alpha", tmp_path / "stranger.log", auth_supernode_private_key=str(stranger)
    )
    assert_turned_away(deployment, program, "Failed to activate SuperNode", program.log)


def test_an_aggregator_of_another_authority(deployment: Deployment, tmp_path: Path) -> None:
    _, other = make_authority(tmp_path / "keys")
    program = variant(deployment, "alpha", tmp_path / "other.log", root_certificates=str(other))
    assert_turned_away(deployment, program, "Connection attempt failed", program.log)


def test_a_superexec_without_the_secret(deployment: Deployment, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"0" * 32)
    program = variant(
        deployment, SUPEREXEC, tmp_path / "superexec.log", superexec_auth_secret_file=str(secret)
    )
    told_in = deployment.program(SUPERLINK).log
    assert_turned_away(deployment, program, "SuperExec authentication failed", told_in)


def test_an_app_that_no_trusted_entity_has_signed(deployment: Deployment, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = Ed25519PrivateKey.generate().public_key()
    text = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (tmp_path / "entities.yaml").write_text(f"fpk_00000000-0000-0000-0000-000000000000: '{text.decode()}'\n")
    program = deployment.program("beta")
    command = (*program.command, "--trusted-entities", str(tmp_path / "entities.yaml"))
    process = replace(program, command=command, log=tmp_path / "beta.log").start(supervised=False)
    try:
        deployment.start(SUPEREXEC)
        deployment.wait_online(1)
        run = deployment.submit(["federation.wait_for_silos=20", "rounds=1", "cohort=1"])
        assert run.wait() == "finished:failed"
        assert "The FAB could not be verified" in (tmp_path / "beta.log").read_text()
    finally:
        stop_tree(process, at_once=True)
