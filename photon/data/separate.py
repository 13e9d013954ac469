"""Cut prepared data into one folder per silo, for silos on machines or disks of their own."""

import shutil
from pathlib import Path

from photon.data.prepare import check_output
from photon.data.prepared import MANIFEST_NAME, PreparedData
from photon.state.atomic import atomic_directory


def separate(data: PreparedData, output: Path, *, overwrite: bool = False) -> list[Path]:
    """Write each silo's part of ``data`` as prepared data of its own, ``output/NAME``.

    Every part holds the one tokenizer, the arrays of its silo and a manifest that lists this silo alone, with
    the same figures.

    Parameters
    ----------
    data
        The prepared data of all silos.
    output
        Folder for the parts; made if it is not there.
    overwrite
        Replace parts that are prepared data already.

    Returns
    -------
    list of Path
        The parts, in the order of the silos' names.

    Raises
    ------
    PhotonError
        If a part is there already and ``overwrite`` is not set; then none is written.
    """
    parts = {name: output / name for name in data.silo_names}
    for part in parts.values():
        check_output(part, overwrite=overwrite)
    for name, part in parts.items():
        manifest = data.manifest.model_copy(update={"silos": {name: data.manifest.silos[name]}})
        with atomic_directory(part.resolve()) as folder:
            shutil.copytree(data.tokenizer_path, folder / "tokenizer")
            shutil.copytree(data.path / "silos" / name, folder / "silos" / name)
            (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return list(parts.values())
