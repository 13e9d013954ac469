"""Cut prepared data into one folder per silo, for silos on machines or disks of their own."""

import shutil
from collections.abc import Callable
from pathlib import Path

from photon.data.prepare import check_output
from photon.data.prepared import MANIFEST_NAME, PreparedData
from photon.files.atomic import atomic_directory


def separate_silo(
    data: PreparedData,
    silo: str,
    output: Path,
    *,
    overwrite: bool = False,
    copy: Callable[[str, str], object] = shutil.copy2,
) -> None:
    """Write one silo's part of ``data`` as prepared data of its own.

    It holds the one tokenizer, the arrays of the silo and a manifest that lists this silo alone, with the
    same figures.

    Parameters
    ----------
    data
        The prepared data of all silos.
    silo
        Name of one of them.
    output
        Folder of the part.
    overwrite
        Replace it if it is prepared data already.
    copy
        Copies a file of arrays, from and to a path.

    Raises
    ------
    PhotonError
        If something is there that is not to be replaced.
    """
    check_output(output, overwrite=overwrite)
    manifest = data.manifest.model_copy(update={"silos": {silo: data.manifest.silos[silo]}})
    with atomic_directory(output.resolve()) as folder:
        shutil.copytree(data.tokenizer_path, folder / "tokenizer")
        shutil.copytree(data.path / "silos" / silo, folder / "silos" / silo, copy_function=copy)
        (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def separate(data: PreparedData, output: Path, *, overwrite: bool = False) -> list[Path]:
    """Write each silo's part of ``data`` as prepared data of its own, ``output/NAME``.

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
        separate_silo(data, name, part, overwrite=overwrite)
    return list(parts.values())
