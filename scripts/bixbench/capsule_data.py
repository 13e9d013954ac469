"""The data of the capsules: real biomedical tables that installed packages bring, written as plain files."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pandas as pd

PACKAGES = {
    "lifelines": "lifelines",
    "sksurv": "scikit-survival",
    "scanpy": "scanpy",
    "sklearn": "scikit-learn",
}


def file_of(package: str, path: str) -> Path:
    """Return a data file of an installed package, which is not imported for that."""
    found = find_spec(package)
    places = [] if found is None else found.submodule_search_locations or []
    file = next((Path(place, path) for place in places if Path(place, path).exists()), None)
    if file is None:
        raise SystemExit(f"{PACKAGES[package]} is not installed; pip install 'photon-fl[bench-capsules]'")
    return file


def _arff(path: str) -> pd.DataFrame:
    from scipy.io import arff

    table = pd.DataFrame(arff.loadarff(file_of("sksurv", f"datasets/data/{path}"))[0])
    for column in table.select_dtypes("object"):
        table[column] = table[column].str.decode("utf-8")
    return table


def _write(table: pd.DataFrame, file: Path) -> None:
    table.to_csv(file, index=False)


def lung(folder: Path) -> None:
    """Advanced lung cancer (NCCTG): 228 patients."""
    table = pd.read_csv(file_of("lifelines", "datasets/lung.csv"))
    _write(table, folder / "lung.csv")


def breast_trial(folder: Path) -> None:
    """Node-positive breast cancer (GBSG 2): 686 patients."""
    _write(pd.read_csv(file_of("lifelines", "datasets/gbsg2.csv")), folder / "gbsg2.csv")


def aids_trial(folder: Path) -> None:
    """HIV (ACTG 320): 1,151 patients, two or three drugs."""
    _write(_arff("actg320.arff"), folder / "actg320.csv")


def expression(folder: Path) -> None:
    """Breast tumours (GSE7390): 198 patients, 76 genes, apart from what is known of the patients."""
    table = _arff("breast_cancer_GSE7390-metastasis.arff")
    table.insert(0, "patient", [f"P{number:03d}" for number in range(1, len(table) + 1)])
    genes = [name for name in table.columns if name.startswith("X") and name.endswith("_at")]
    _write(table[["patient", *genes]], folder / "expression.csv")
    _write(table.drop(columns=genes), folder / "patients.csv")


def cells(folder: Path) -> None:
    """Blood cells (PBMC 68k, reduced): 700 cells, 765 genes, log-normalised counts."""
    import h5py
    import numpy as np

    with h5py.File(file_of("scanpy", "datasets/10x_pbmc68k_reduced.h5ad")) as file:
        observed, genes = file["obs"][:], [name.decode() for name in file["raw.var"]["index"]]
        labels = [name.decode() for name in file["uns/bulk_labels_categories"][:]]
        clusters = [name.decode() for name in file["uns/louvain_categories"][:]]
        raw = file["raw.X"]
        data, indices, starts = raw["data"][:], raw["indices"][:], raw["indptr"][:]
    counts = np.zeros((len(observed), len(genes)), dtype=np.float32)
    for row in range(len(observed)):
        place = slice(starts[row], starts[row + 1])
        counts[row, indices[place]] = data[place]
    names = [f"C{number:03d}" for number in range(1, len(observed) + 1)]
    about = pd.DataFrame(
        {
            "cell": names,
            "cell_type": [labels[code] for code in observed["bulk_labels"]],
            "cluster": [f"L{clusters[code]}" for code in observed["louvain"]],
            "n_counts": observed["n_counts"],
        }
    )
    _write(about, folder / "cells.csv")
    table = pd.DataFrame(counts, columns=genes).round(4)
    table.insert(0, "cell", names)
    _write(table, folder / "expression.csv")


def nuclei(folder: Path) -> None:
    """Nuclei of breast masses (WDBC): 569 samples, 30 measurements."""
    file = file_of("sklearn", "datasets/data/breast_cancer.csv")
    parts = ["radius", "texture", "perimeter", "area", "smoothness", "compactness", "concavity"]
    parts += ["concave_points", "symmetry", "fractal_dimension"]
    columns = [f"{kind}_{part}" for kind in ("mean", "error", "worst") for part in parts]
    table = pd.read_csv(file, skiprows=1, names=[*columns, "diagnosis"])
    table["diagnosis"] = table["diagnosis"].map({0: "malignant", 1: "benign"})
    _write(table, folder / "nuclei.csv")


#: Capsule to what writes its data, and what it is about.
CAPSULES: dict[str, tuple[Callable[[Path], None], str]] = {
    "lung": (lung, "Survival"),
    "gbsg2": (breast_trial, "Survival"),
    "actg320": (aids_trial, "Clinical trials"),
    "gse7390": (expression, "Gene expression"),
    "pbmc68k": (cells, "Single cells"),
    "wdbc": (nuclei, "Imaging"),
}
