"""Which applications a silo has approved, what it has refused, and what it was started with.

::

    STATE_DIR/_code/approved.json      the approvals, for the silo's user alone
    STATE_DIR/_code/started.json       what `photon silo run` was started with (class Started)
    STATE_DIR/_code/bin/               what the SuperNode starts in place of Flower's programs
    STATE_DIR/_code/approved/SHA.fab   each approved bundle, to compare the next one with
    STATE_DIR/_code/refused/SHA.fab    the last few bundles that were refused, to be looked at
    STATE_DIR/_code/unpacked/SHA/      files of an approved bundle, compared with it before every use

No silo can have a name that begins with an underscore.
"""

import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from photon.deployment.bundle import APP, VERSION, Bundle, digest
from photon.errors import PhotonError, RefusedError
from photon.files.atomic import atomic_directory, write_bytes

MOST_APPROVALS = 100
MOST_REFUSED = 4


class _Kept(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


_Kind = TypeVar("_Kind", bound=_Kept)


class Approval(_Kept):
    """A bundle that a silo runs."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    app: str
    version: str
    clientapp: str
    date: str = ""
    note: str = ""


class Started(_Kept):
    """What `photon silo run` was started with; ``own`` is the bundle that the installed Photon makes."""

    date: str
    arguments: list[str]
    node_config: str
    own: Approval


class _List(_Kept):
    approvals: list[Approval] = Field([], max_length=MOST_APPROVALS)


def approval(bundle: Bundle, note: str = "") -> Approval:
    """Return the approval of a bundle as of now."""
    return Approval(
        sha256=bundle.sha256,
        app=bundle.app,
        version=bundle.version,
        clientapp=bundle.clientapp,
        date=now(),
        note=note,
    )


def now() -> str:
    """Return the time as it is written down."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class ApprovedCode:
    """The applications that a silo runs, in its state folder.

    Parameters
    ----------
    state
        The node's state folder.
    """

    def __init__(self, state: Path) -> None:
        self.state = state.absolute()
        self.folder = self.state / "_code"

    def make(self) -> None:
        """Make the folder, for this user alone.

        Raises
        ------
        PhotonError
            If that cannot be.
        """
        try:
            for folder in (self.state, self.folder):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                folder.chmod(0o700)
        except OSError as error:
            raise PhotonError(f"state-dir: {self.folder} cannot be used ({error.strerror})") from error

    def approvals(self) -> list[Approval]:
        """Return the approvals, oldest first.

        Raises
        ------
        PhotonError
            If the list is damaged, or others could have written it.
        """
        read = self._read("approved.json", _List)
        return [] if read is None else read.approvals

    def started(self) -> Started | None:
        """Return what the silo was last started with; None: it never was."""
        return self._read("started.json", Started)

    def note_start(self, started: Started) -> None:
        """Write down what the silo is started with."""
        self._write("started.json", started)

    def approve(self, content: bytes, note: str = "") -> Approval:
        """Write a bundle down as approved.

        Raises
        ------
        PhotonError
            If it is no bundle, or there are too many approvals.
        """
        made, kept = approval(Bundle.read(content), note), self.approvals()
        if len(kept) >= MOST_APPROVALS:
            raise PhotonError(f"{len(kept)} applications are approved; revoke some with photon silo revoke")
        self.make()
        write_bytes(self._bundle("approved", made.sha256), content, mode=0o600)
        self._write("approved.json", _List(approvals=[*kept, made]))
        self._bundle("refused", made.sha256).unlink(missing_ok=True)
        return made

    def revoke(self, sha256: str) -> Approval:
        """Take an approval back; ``sha256`` may be its beginning.

        Raises
        ------
        PhotonError
            If there is not exactly one.
        """
        kept = self.approvals()
        found = [one for one in kept if sha256 and one.sha256.startswith(sha256)]
        if len(found) != 1:
            raise PhotonError(f"{sha256!a:.70} begins the SHA-256 of {len(found)} approvals, not of one")
        (gone,) = found
        self._write("approved.json", _List(approvals=[one for one in kept if one != gone]))
        self._bundle("approved", gone.sha256).unlink(missing_ok=True)
        shutil.rmtree(self.folder / "unpacked" / gone.sha256, ignore_errors=True)
        return gone

    def judge(self, content: bytes, app: str, version: str) -> tuple[str, Path | None]:
        """Say which code answers for a bundle.

        Parameters
        ----------
        content
            The whole bundle, as it came.
        app, version
            What the SuperLink calls it.

        Returns
        -------
        tuple
            ``module:object``, and the folder that it lies in; None: the installed Photon.

        Raises
        ------
        RefusedError
            If the bundle is not approved, or is called what it is not.
        PhotonError
            If the silo's own files cannot be read.
        """
        sha256 = digest(content)
        started = self.started()
        if started is None:
            raise PhotonError(f"{self.folder}: no silo was started here; start it with photon silo run")
        own = sha256 == started.own.sha256
        known = [started.own] if own else [one for one in self.approvals() if one.sha256 == sha256]
        if not known:
            self._keep_refused(content)
            sound = APP.fullmatch(app) and VERSION.fullmatch(version)
            named = f"{app} {version}" if sound else "under a forged name"
            raise RefusedError(
                f"this silo has not approved the application with the SHA-256 {sha256} ({named}); "
                "photon silo approve STATE_DIR shows its operator what is in it"
            )
        if (app, version) != (known[0].app, known[0].version):
            raise RefusedError(
                f"this silo knows the SHA-256 {sha256} as {known[0].app} {known[0].version}; the SuperLink "
                f"calls it {app!a:.70} {version!a:.70}"
            )
        return known[0].clientapp, None if own else self._unpacked(Bundle.read(content))

    def refused(self) -> list[Path]:
        """Return the bundles that were refused, the last one first."""
        files = (self.folder / "refused").glob("*.fab")
        return sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)

    def baseline(self, app: str) -> tuple[Approval, dict[str, bytes]] | None:
        """Return the application of that name that was approved last, with its files."""
        for one in reversed(self.approvals()):
            file = self._bundle("approved", one.sha256)
            if one.app == app and file.exists():
                return one, dict(Bundle.read(file.read_bytes()).files)
        return None

    def _keep_refused(self, content: bytes) -> None:
        try:
            bundle = Bundle.read(content)
        except PhotonError:
            return
        file = self._bundle("refused", bundle.sha256)
        if file.exists():
            os.utime(file)
        else:
            write_bytes(file, content, mode=0o600)
        for old in self.refused()[MOST_REFUSED:]:
            old.unlink(missing_ok=True)

    def _unpacked(self, bundle: Bundle) -> Path:
        """Return a folder with the files of a bundle, whatever lay there before."""
        folder = self.folder / "unpacked" / bundle.sha256
        if not bundle.is_at(folder):
            if folder.is_symlink():
                folder.unlink()
            with atomic_directory(folder, flush=False) as made:
                bundle.write(made)
        return folder

    def _bundle(self, kind: str, sha256: str) -> Path:
        return self.folder / kind / f"{sha256}.fab"

    def _write(self, name: str, content: BaseModel) -> None:
        self.make()
        text = content.model_dump_json(indent=1) + "\n"
        write_bytes(self.folder / name, text.encode(), mode=0o600)

    def _read(self, name: str, kind: type[_Kind]) -> _Kind | None:
        path = self.folder / name
        try:
            for file in (self.state, self.folder, path):
                status = file.stat()
                if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                    raise PhotonError(
                        f"{file}: others than the silo's user may write it; mend owner and mode"
                    )
            return kind.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise PhotonError(f"{path}: it cannot be read ({error.strerror})") from error
        except ValidationError as error:
            raise PhotonError(f"{path}: damaged ({error.errors()[0]['msg']}); mend or remove it") from error
