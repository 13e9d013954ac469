"""Where questions and capsules come from: local files, or the Hugging Face hub."""

import re
from pathlib import Path

from photon.benchmarks.bixbench.questions import QuestionSet, read_questions
from photon.errors import PhotonError, printable

#: How a source on the hub is written: ``hub:futurehouse/BixBench``, and after an @ a revision.
HUB = "hub:"
_FILE = "BixBench.jsonl"


class Source:
    """Questions, and the archives of their capsules.

    Parameters
    ----------
    where
        A JSON Lines file, a folder with ``BixBench.jsonl``, or ``hub:OWNER/NAME@REVISION``.
    archives
        Folder of capsules' archives; default: beside the questions.

    Raises
    ------
    PhotonError
        If the name is none of these, or the file cannot be had.
    """

    def __init__(self, where: str, archives: Path | None = None) -> None:
        self._repository: tuple[str, str | None] | None = None
        self.name = where
        if where.startswith(HUB):
            match = re.fullmatch(r"hub:([\w.\-]+/[\w.\-]+)(?:@([\w.\-/]+))?", where)
            if match is None:
                raise PhotonError(f"{printable(where)}: expected hub:OWNER/NAME, or hub:OWNER/NAME@REVISION")
            self._repository = match[1], match[2]
            self._file = self._download(_FILE)
        else:
            path = Path(where)
            self._file = path / _FILE if path.is_dir() else path
        self._archives = archives or (None if self._repository else self._file.parent)

    def questions(self) -> QuestionSet:
        """Read the questions; `photon.benchmarks.bixbench.questions.read_questions` says what is raised."""
        return read_questions(self._file)

    def archive(self, name: str) -> Path:
        """Return an archive: a zip file, or a folder of its name.

        Raises
        ------
        PhotonError
            If there is none.
        """
        if self._archives is None:
            return self._download(name)
        stem = name.removesuffix(".zip")
        for path in (self._archives / name, self._archives / f"{stem}.zip", self._archives / stem):
            if path.exists():
                return path
        raise PhotonError(f"{printable(self._archives / name)}: the capsule's archive is not there")

    def _download(self, name: str) -> Path:
        # It takes a second to import, and only the hub needs it.
        from huggingface_hub import hf_hub_download

        assert self._repository is not None
        repository, revision = self._repository
        try:
            return Path(hf_hub_download(repository, name, repo_type="dataset", revision=revision))
        except Exception as error:  # of the hub, of HTTP and of the disk, in many classes
            said = str(error).strip().split("\n")[0][:200]
            raise PhotonError(
                f"hub:{repository}: cannot get {printable(name)} ({printable(said)}); "
                "name a local file of questions where there is no network"
            ) from None
