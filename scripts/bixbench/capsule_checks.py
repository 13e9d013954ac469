"""The second way to each answer: libraries where there are any, and loops over plain rows otherwise."""

import csv
import math
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

Row = dict[str, str]


def rows(folder: Path, name: str) -> list[Row]:
    """Return a table's rows as texts."""
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


def column(table: list[Row], name: str) -> list[float]:
    return [float(row[name]) for row in table]


# --- lung -----------------------------------------------------------------------------------------------


def lung_median(folder: Path) -> int:
    from lifelines import KaplanMeierFitter

    table = rows(folder, "lung.csv")
    fitted = KaplanMeierFitter().fit(column(table, "time"), column(table, "status"))
    return int(fitted.median_survival_time_)


def lung_year(folder: Path) -> float:
    from sksurv.nonparametric import kaplan_meier_estimator

    table = rows(folder, "lung.csv")
    died = [row["status"] == "1" for row in table]
    times, survival = kaplan_meier_estimator(died, column(table, "time"))
    return float(survival[times <= 365][-1])


def lung_log_rank(folder: Path) -> float:
    from lifelines.statistics import logrank_test

    table = rows(folder, "lung.csv")
    one, two = ([row for row in table if row["sex"] == sex] for sex in ("1", "2"))
    test = logrank_test(
        column(one, "time"), column(two, "time"), column(one, "status"), column(two, "status")
    )
    return float(test.p_value)


def lung_incomplete(folder: Path) -> int:
    return sum(any(value in ("", "NA", "nan") for value in row.values()) for row in rows(folder, "lung.csv"))


def lung_hazard(folder: Path) -> float:
    import numpy as np
    from sksurv.linear_model import CoxPHSurvivalAnalysis

    table = rows(folder, "lung.csv")
    outcome = np.array(
        [(row["status"] == "1", float(row["time"])) for row in table], dtype=[("died", bool), ("time", float)]
    )
    sex = np.array([[row["sex"] == "2"] for row in table], dtype=float)
    return math.exp(CoxPHSurvivalAnalysis(ties="efron", tol=1e-12).fit(sex, outcome).coef_[0])


# --- gbsg2 ----------------------------------------------------------------------------------------------


def gbsg_share(folder: Path) -> float:
    counts = Counter(row["horTh"] for row in rows(folder, "gbsg2.csv"))
    return counts["yes"] / counts.total()


def gbsg_median(folder: Path) -> int:
    from lifelines import KaplanMeierFitter

    table = [row for row in rows(folder, "gbsg2.csv") if row["horTh"] == "yes"]
    return int(KaplanMeierFitter().fit(column(table, "time"), column(table, "cens")).median_survival_time_)


def gbsg_grade(folder: Path) -> float:
    table = rows(folder, "gbsg2.csv")
    cells = Counter((row["tgrade"], row["horTh"]) for row in table)
    grades, therapies = (Counter(row[name] for row in table) for name in ("tgrade", "horTh"))
    statistic = 0.0
    for grade in grades:
        for therapy in therapies:
            expected = grades[grade] * therapies[therapy] / len(table)
            statistic += (cells[grade, therapy] - expected) ** 2 / expected
    # With two degrees of freedom the tail is an exponential.
    assert (len(grades) - 1) * (len(therapies) - 1) == 2
    return math.exp(-statistic / 2)


def gbsg_receptors(folder: Path) -> float:
    from scipy.stats import spearmanr

    table = rows(folder, "gbsg2.csv")
    return float(spearmanr(column(table, "progrec"), column(table, "estrec")).statistic)


def gbsg_restricted(folder: Path) -> float:
    from lifelines import KaplanMeierFitter
    from lifelines.utils import restricted_mean_survival_time

    table = rows(folder, "gbsg2.csv")
    fitted = KaplanMeierFitter().fit(column(table, "time"), column(table, "cens"))
    return float(restricted_mean_survival_time(fitted, t=1000))


# --- actg320 --------------------------------------------------------------------------------------------


def actg_events(folder: Path) -> int:
    return sum(row["tx"] == "1" and row["censor"] == "1" for row in rows(folder, "actg320.csv"))


def actg_rates(folder: Path) -> float:
    events, time = Counter[str](), Counter[str]()
    for row in rows(folder, "actg320.csv"):
        events[row["tx"]] += int(row["censor"])
        time[row["tx"]] += int(float(row["time"]))
    return (events["1"] / time["1"]) / (events["0"] / time["0"])


def actg_age(folder: Path) -> float:
    from scipy.stats import ttest_ind

    table = rows(folder, "actg320.csv")
    women, men = ([float(row["age"]) for row in table if row["sex"] == sex] for sex in ("2", "1"))
    return float(ttest_ind(women, men, equal_var=False).pvalue)


def actg_concordance(folder: Path) -> float:
    from sksurv.metrics import concordance_index_censored

    table = rows(folder, "actg320.csv")
    import numpy as np

    event = np.array([row["censor"] == "1" for row in table])
    time, risk = np.array(column(table, "time")), -np.array(column(table, "cd4"))
    return float(concordance_index_censored(event, time, risk, tied_tol=0)[0])


def actg_score(folder: Path) -> str:
    found: dict[str, list[int]] = defaultdict(list)
    for row in rows(folder, "actg320.csv"):
        found[row["karnof"]].append(int(row["censor"]))
    return max(found, key=lambda score: statistics.mean(found[score]))


# --- gse7390 --------------------------------------------------------------------------------------------


def _genes(folder: Path) -> tuple[list[str], list[Row], list[Row]]:
    table, about = (
        rows(folder, "expression.csv"),
        {row["patient"]: row for row in rows(folder, "patients.csv")},
    )
    return [name for name in table[0] if name != "patient"], table, [about[row["patient"]] for row in table]


def genes_variable(folder: Path) -> str:
    names, table, _ = _genes(folder)
    return max(names, key=lambda name: statistics.variance(column(table, name)))


def _by_receptor(folder: Path) -> tuple[list[str], Any]:
    from scipy.stats import ttest_ind

    names, table, about = _genes(folder)
    tests = []
    for name in names:
        groups: dict[str, list[float]] = defaultdict(list)
        for row, patient in zip(table, about, strict=True):
            groups[patient["er"]].append(float(row[name]))
        tests.append(ttest_ind(groups["positive"], groups["negative"], equal_var=False))
    return names, tests


def genes_receptor(folder: Path) -> str:
    names, tests = _by_receptor(folder)
    return names[max(range(len(names)), key=lambda place: abs(tests[place].statistic))]


def genes_number(folder: Path) -> int:
    from scipy.stats import false_discovery_control

    _, tests = _by_receptor(folder)
    return int((false_discovery_control([test.pvalue for test in tests]) <= 0.05).sum())


def genes_component(folder: Path) -> float:
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    names, table, _ = _genes(folder)
    values = [[float(row[name]) for name in names] for row in table]
    return float(PCA().fit(StandardScaler().fit_transform(values)).explained_variance_ratio_[0])


def genes_pair(folder: Path) -> float:
    _, table, about = _genes(folder)
    chosen = [row for row, patient in zip(table, about, strict=True) if patient["e.tdm"] == "0"]
    return statistics.correlation(column(chosen, "X202418_at"), column(chosen, "X206295_at"))


# --- pbmc68k --------------------------------------------------------------------------------------------


def cells_type(folder: Path) -> str:
    return Counter(row["cell_type"] for row in rows(folder, "cells.csv")).most_common(1)[0][0]


def _expression(folder: Path) -> tuple[list[Row], dict[str, str]]:
    return rows(folder, "expression.csv"), {
        row["cell"]: row["cell_type"] for row in rows(folder, "cells.csv")
    }


def cells_nkg7(folder: Path) -> str:
    table, types = _expression(folder)
    found: dict[str, list[float]] = defaultdict(list)
    for row in table:
        found[types[row["cell"]]].append(float(row["NKG7"]))
    return max(found, key=lambda name: math.fsum(found[name]) / len(found[name]))


def cells_rand(folder: Path) -> float:
    from sklearn.metrics import adjusted_rand_score

    table = rows(folder, "cells.csv")
    return float(adjusted_rand_score([row["cell_type"] for row in table], [row["cluster"] for row in table]))


def cells_marker(folder: Path) -> str:
    table, types = _expression(folder)
    inside = [row for row in table if types[row["cell"]] == "CD19+ B"]
    outside = [row for row in table if types[row["cell"]] != "CD19+ B"]
    genes = [name for name in table[0] if name != "cell"]
    return max(
        genes,
        key=lambda name: (
            math.fsum(column(inside, name)) / len(inside) - math.fsum(column(outside, name)) / len(outside)
        ),
    )


def cells_zero(folder: Path) -> float:
    values = [
        float(value)
        for row in rows(folder, "expression.csv")
        for name, value in row.items()
        if name != "cell"
    ]
    return sum(value == 0 for value in values) / len(values)


# --- wdbc -----------------------------------------------------------------------------------------------


def _nuclei(folder: Path) -> tuple[list[str], list[Row], list[bool]]:
    table = rows(folder, "nuclei.csv")
    names = [name for name in table[0] if name != "diagnosis"]
    return names, table, [row["diagnosis"] == "malignant" for row in table]


def nuclei_roc(folder: Path) -> float:
    from sklearn.metrics import roc_auc_score

    _, table, malignant = _nuclei(folder)
    return float(roc_auc_score(malignant, column(table, "mean_radius")))


def nuclei_effect(folder: Path) -> float:
    from scipy.stats import ttest_ind

    _, table, malignant = _nuclei(folder)
    one, two = (
        [float(row["mean_texture"]) for row, is_bad in zip(table, malignant, strict=True) if is_bad is side]
        for side in (True, False)
    )
    # Student's t is Cohen's d over a factor of the two sizes.
    return float(ttest_ind(one, two).statistic) * math.sqrt(1 / len(one) + 1 / len(two))


def nuclei_correlated(folder: Path) -> int:
    names, table, _ = _nuclei(folder)
    first = column(table, "mean_radius")
    others = [name for name in names if name != "mean_radius"]
    return sum(statistics.correlation(first, column(table, name)) > 0.9 for name in others)


def nuclei_neighbours(folder: Path) -> float:
    from sklearn.model_selection import LeaveOneOut, cross_val_score
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import StandardScaler

    names, table, malignant = _nuclei(folder)
    values = StandardScaler().fit_transform([[float(row[name]) for name in names] for row in table])
    model = KNeighborsClassifier(5, algorithm="brute")
    return float(cross_val_score(model, values, malignant, cv=LeaveOneOut()).mean())


def nuclei_best(folder: Path) -> str:
    from sklearn.metrics import roc_auc_score

    names, table, malignant = _nuclei(folder)
    return max(names, key=lambda name: abs(roc_auc_score(malignant, column(table, name)) - 0.5))
