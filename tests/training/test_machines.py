"""Where the machines of a silo meet, and what each is told when another fails."""

import json
import re
import threading
from contextlib import contextmanager

import pytest

from photon.errors import PhotonError
from photon.training import machines
from photon.training.machines import Machines, Meeting, interface_to, serve_machine, split_address


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machines, "ARRIVAL_SECONDS", 1.0)
    monkeypatch.setattr(machines, "_RETRY_SECONDS", 0.05)
    monkeypatch.setattr(machines, "_BEAT_SECONDS", 0.05)


class EndedError(Exception):
    """Ends what would go on for ever."""


class Other:
    """Machine 1 in a thread; ``work`` does its part of a job."""

    def __init__(self, meeting, below, work, number=1):
        self.said, self.left, self.failed = [], threading.Event(), None
        self._end = False

        @contextmanager
        def group(found):
            try:
                yield work
            finally:
                self.left.set()

        def say(text):
            if self._end:
                raise EndedError
            self.said.append(text)

        def run():
            try:
                serve_machine(f"127.0.0.1:{meeting.port}", number, below, group, say)
            except EndedError:
                pass
            except PhotonError as error:
                self.failed = str(error)

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def end(self):
        self._end = True
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture
def meeting():
    return Meeting(Machines(2, 4))


def job_in(folder):
    folder.mkdir()
    (folder / "job.json").write_text("{}")
    return folder


def test_jobs_come_one_after_the_other(meeting, tmp_path):
    done, both = [], threading.Event()

    def work(folder):
        done.append(folder.name)
        if len(done) == 2:
            both.set()

    other = Other(meeting, tmp_path, work)
    for name in ("one", "two"):
        meeting.publish(job_in(tmp_path / name))
    assert both.wait(20)
    assert done == ["one", "two"]
    assert meeting.trouble() is None
    assert "joined" in " ".join(other.said)
    del meeting._store  # the first machine ends its group
    assert other.left.wait(20), "the other's processes are ended, too"
    other.end()


def test_who_does_not_come_is_named(meeting, tmp_path):
    with pytest.raises(PhotonError, match=r"machine 1 has not come to .* within 1 s; start `photon silo"):
        meeting.publish(tmp_path)


@pytest.mark.parametrize(
    ("where", "why"),
    [("work", "machine 1: the disk is full"), ("outside", "is not below"), ("absent", "is not here")],
)
def test_why_another_machine_failed_is_told(meeting, tmp_path, where, why):
    def work(folder):
        raise PhotonError("the disk is full")

    below = tmp_path / "state"
    job = job_in(below.parent / "elsewhere") if where == "outside" else below / "job"
    below.mkdir()
    if where == "work":
        job_in(job)
    other = Other(meeting, below, work)
    meeting.publish(job)
    assert other.left.wait(20)
    assert why in meeting.trouble()
    other.end()


def test_silence_is_told(meeting, tmp_path, monkeypatch):
    monkeypatch.setattr(machines, "SILENCE_SECONDS", 0.0)
    assert meeting.trouble() is None
    assert meeting.trouble() == "machine 1 has been silent for 0 s"


@pytest.mark.parametrize(
    ("number", "setting", "why"),
    [
        (2, {}, "--machine 2: 2 machines meet at 127.0.0.1:.*, from 0 to 1"),
        (1, {"count": None}, "who meets there is no silo of Photon"),
        (1, {"count": 0}, "4 processes on 0 machines meet there"),
        (1, {"processes": 10**9}, "1,000,000,000 processes on 2 machines meet there"),
        (1, {"versions": "photon 0"}, "the first machine has photon 0, and this one photon"),
    ],
)
def test_who_has_no_place_is_told(meeting, tmp_path, number, setting, why):
    found = json.loads(meeting._store.get("photon/setting"))
    meeting._store.set("photon/setting", json.dumps(found | setting))
    other = Other(meeting, tmp_path, lambda folder: None, number)
    other.thread.join(20)
    assert re.search(why, other.failed)


@pytest.mark.parametrize("text", ["10.0.0.1", ":1", "host:", "host:0", "host:65536", "host:x", "host:²"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(PhotonError, match=r"is no HOST:PORT, such as"):
        split_address(text)


def test_a_port_that_is_taken_is_named(meeting):
    with pytest.raises(
        PhotonError, match=rf"rendezvous=127.0.0.1:{meeting.port}: this machine cannot listen"
    ):
        Meeting(Machines(2, 2, "127.0.0.1", meeting.port))


def test_the_interface_of_an_address_is_found():
    assert interface_to("127.0.0.1", 80) in ("lo", "lo0")
    assert interface_to("no such host", 80) is None
