"""Thirty questions on the capsules, each with two ways to its answer that share nothing but the data.

The first way is the cell that the reference agent runs: numpy, pandas and scipy, written out. The second is a
library's, or a loop's, and runs when the capsules are built.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import capsule_checks as check


@dataclass(frozen=True)
class Asked:
    """A question.

    Attributes
    ----------
    cell
        First way: code that prints the answer last.
    other
        Second way: a function of the capsule's folder.
    width
        Half the width of the range that is right; None where the answer is a name or a count.
    wrong
        Wrong answers that a mistake would give; where there are none, others are made of the right one.
    """

    capsule: str
    text: str
    cell: str
    other: Callable[[Any], Any]
    width: float | None = None
    wrong: tuple[str, ...] = ()


_KM = """
import numpy as np
import pandas as pd
def kaplan_meier(time, event):
    time, event = np.asarray(time, float), np.asarray(event, bool)
    steps = np.unique(time[event])
    at_risk = np.array([(time >= step).sum() for step in steps])
    died = np.array([((time == step) & event).sum() for step in steps])
    return steps, np.cumprod(1 - died / at_risk)
"""
_LUNG = _KM + "d = pd.read_csv('lung.csv')\n"
_GBSG = _KM + "d = pd.read_csv('gbsg2.csv')\n"
_ACTG = "import numpy as np\nimport pandas as pd\nd = pd.read_csv('actg320.csv')\n"
_GENES = """
import numpy as np
import pandas as pd
x = pd.read_csv('expression.csv', index_col='patient')
p = pd.read_csv('patients.csv', index_col='patient').loc[x.index]
"""
_CELLS = """
import numpy as np
import pandas as pd
x = pd.read_csv('expression.csv', index_col='cell')
c = pd.read_csv('cells.csv', index_col='cell').loc[x.index]
"""
_NUCLEI = "import numpy as np\nimport pandas as pd\nd = pd.read_csv('nuclei.csv')\n"

_COX = """
from scipy.optimize import minimize_scalar
def negative(beta):
    total = 0.0
    risk = np.exp(beta * x)
    for step in np.unique(time[event]):
        tied = (time == step) & event
        number, all_risk, tied_risk = tied.sum(), risk[time >= step].sum(), risk[tied].sum()
        total -= beta * x[tied].sum() - sum(np.log(all_risk - k / number * tied_risk) for k in range(number))
    return total
beta = minimize_scalar(negative, bounds=(-5, 5), method='bounded', options={'xatol': 1e-10}).x
print(f'{np.exp(beta):.2f}')
"""

_LUNG_QUESTIONS = (
    Asked(
        "lung",
        "By the Kaplan-Meier estimate over all patients of lung.csv (status 1 is death), what is the median "
        "survival time in days?",
        _LUNG + "steps, s = kaplan_meier(d.time, d.status)\nprint(int(steps[s <= 0.5][0]))",
        check.lung_median,
        wrong=("255", "285", "363"),
    ),
    Asked(
        "lung",
        "What is the Kaplan-Meier estimate of the probability to survive 365 days in lung.csv (status 1 is "
        "death)? Give three decimals.",
        _LUNG + "steps, s = kaplan_meier(d.time, d.status)\nprint(f'{s[steps <= 365][-1]:.3f}')",
        check.lung_year,
        width=0.002,
    ),
    Asked(
        "lung",
        "What is the p-value of the two-sided log-rank test that compares the survival of the two sexes in "
        "lung.csv? Give two significant digits.",
        _LUNG
        + """
from scipy.stats import chi2
observed = expected = variance = 0.0
first = d.sex == 1
for step in np.unique(d.time[d.status == 1]):
    at_risk, died = d.time >= step, (d.time == step) & (d.status == 1)
    n, n1, k = at_risk.sum(), (at_risk & first).sum(), died.sum()
    observed += (died & first).sum()
    expected += k * n1 / n
    if n > 1:
        variance += k * (n1 / n) * (1 - n1 / n) * (n - k) / (n - 1)
print(f'{chi2.sf((observed - expected) ** 2 / variance, 1):.2g}')
""",
        check.lung_log_rank,
        width=0.0001,
    ),
    Asked(
        "lung",
        "How many patients of lung.csv lack at least one value?",
        _LUNG + "print(int(d.isna().any(axis=1).sum()))",
        check.lung_incomplete,
        wrong=("47", "67", "14"),
    ),
    Asked(
        "lung",
        "What is the hazard ratio of death of sex 2 against sex 1 in a Cox model with sex alone, Efron's "
        "method for ties (lung.csv)? Give two decimals.",
        _LUNG
        + "time, event = d.time.to_numpy(float), d.status.to_numpy(bool)\nx = (d.sex == 2).to_numpy(float)\n"
        + _COX,
        check.lung_hazard,
        width=0.01,
        wrong=("(1.69,1.71)", "(0.52,0.54)", "(0.71,0.73)"),
    ),
)

_GBSG_QUESTIONS = (
    Asked(
        "gbsg2",
        "What share of the patients in gbsg2.csv had hormonal therapy (horTh)? Give three decimals.",
        _GBSG + "print(f\"{(d.horTh == 'yes').mean():.3f}\")",
        check.gbsg_share,
        width=0.001,
    ),
    Asked(
        "gbsg2",
        "By the Kaplan-Meier estimate, what is the median recurrence-free time in days of the patients with "
        "hormonal therapy in gbsg2.csv (cens 1 is an event)?",
        _GBSG
        + "one = d[d.horTh == 'yes']\nsteps, s = kaplan_meier(one.time, one.cens)\n"
        + "print(int(steps[s <= 0.5][0]))",
        check.gbsg_median,
        wrong=("1528", "1807", "2659"),
    ),
    Asked(
        "gbsg2",
        "What is the p-value of Pearson's chi-squared test of independence of tumour grade (tgrade) and "
        "hormonal therapy (horTh) in gbsg2.csv? Give three decimals.",
        _GBSG
        + """
from scipy.stats import chi2_contingency
print(f'{chi2_contingency(pd.crosstab(d.tgrade, d.horTh), correction=False).pvalue:.3f}')
""",
        check.gbsg_grade,
        width=0.002,
    ),
    Asked(
        "gbsg2",
        "What is Spearman's correlation of progesterone and oestrogen receptor (progrec, estrec) in "
        "gbsg2.csv? Give three decimals.",
        _GBSG
        + "a, b = d.progrec.rank(), d.estrec.rank()\n"
        + "a, b = a - a.mean(), b - b.mean()\n"
        + "print(f'{(a * b).sum() / np.sqrt((a ** 2).sum() * (b ** 2).sum()):.3f}')",
        check.gbsg_receptors,
        width=0.002,
    ),
    Asked(
        "gbsg2",
        "What is the restricted mean recurrence-free time over the first 1000 days, over all patients of "
        "gbsg2.csv (area under the Kaplan-Meier curve)? Give days, without decimals.",
        _GBSG
        + """
steps, s = kaplan_meier(d.time, d.cens)
steps, s = steps[steps < 1000], s[steps < 1000]
edges = np.concatenate(([0.0], steps, [1000.0]))
print(round(float((np.diff(edges) * np.concatenate(([1.0], s))).sum())))
""",
        check.gbsg_restricted,
        width=1.0,
    ),
)

_ACTG_QUESTIONS = (
    Asked(
        "actg320",
        "How many patients with three drugs (tx 1) in actg320.csv reached AIDS or death (censor 1)?",
        _ACTG + "print(int(((d.tx == 1) & (d.censor == 1)).sum()))",
        check.actg_events,
        wrong=("63", "96", "26"),
    ),
    Asked(
        "actg320",
        "What is the ratio of the rates of AIDS or death per time under observation (time, censor), three "
        "drugs (tx 1) against two, in actg320.csv? Give two decimals.",
        _ACTG
        + "g = d.groupby('tx')[['censor', 'time']].sum()\nr = g.censor / g.time\nprint(f'{r[1] / r[0]:.2f}')",
        check.actg_rates,
        width=0.01,
    ),
    Asked(
        "actg320",
        "What is the p-value of Welch's two-sided t-test that compares the age of women (sex 2) and men (sex "
        "1) in actg320.csv? Give two significant digits.",
        _ACTG
        + """
from scipy.stats import t
a, b = d.age[d.sex == 2], d.age[d.sex == 1]
va, vb = a.var() / len(a), b.var() / len(b)
freedom = (va + vb) ** 2 / (va ** 2 / (len(a) - 1) + vb ** 2 / (len(b) - 1))
print(f'{2 * t.sf(abs(a.mean() - b.mean()) / np.sqrt(va + vb), freedom):.2g}')
""",
        check.actg_age,
        width=0.0,
    ),
    Asked(
        "actg320",
        "What is Harrell's concordance of a low CD4 count (cd4) with early AIDS or death (time, censor) over "
        "all patients of actg320.csv? Give three decimals.",
        _ACTG
        + """
time, event, risk = d.time.to_numpy(), d.censor.to_numpy() == 1, -d.cd4.to_numpy()
right = pairs = 0.0
for i in np.flatnonzero(event):
    later = (time > time[i]) | ((time == time[i]) & ~event)
    pairs += later.sum()
    right += (risk[i] > risk[later]).sum() + 0.5 * (risk[i] == risk[later]).sum()
print(f'{right / pairs:.3f}')
""",
        check.actg_concordance,
        width=0.002,
    ),
    Asked(
        "actg320",
        "Which Karnofsky score (karnof) has the largest share of patients with AIDS or death (censor 1) in "
        "actg320.csv?",
        _ACTG + "print(int(d.groupby('karnof').censor.mean().idxmax()))",
        check.actg_score,
        wrong=("80", "90", "100"),
    ),
)

_GENE_QUESTIONS = (
    Asked(
        "gse7390",
        "Which gene (column of expression.csv) has the largest variance over the patients?",
        _GENES + "print(x.var().idxmax())",
        check.genes_variable,
        wrong=("X204540_at", "X206295_at", "X202240_at"),
    ),
    Asked(
        "gse7390",
        "Which gene of expression.csv differs most, by the size of Welch's t, between tumours with and "
        "without oestrogen receptor (er of patients.csv)?",
        _GENES
        + """
a, b = x[p.er == 'positive'], x[p.er == 'negative']
t = (a.mean() - b.mean()) / np.sqrt(a.var() / len(a) + b.var() / len(b))
print(t.abs().idxmax())
""",
        check.genes_receptor,
        wrong=("X204014_at", "X202418_at", "X218533_s_at"),
    ),
    Asked(
        "gse7390",
        "How many genes of expression.csv differ between tumours with and without oestrogen receptor at a "
        "false discovery rate of 5 % (Welch's t-test, Benjamini-Hochberg)?",
        _GENES
        + """
from scipy.stats import ttest_ind
q = np.sort(ttest_ind(x[p.er == 'positive'], x[p.er == 'negative'], equal_var=False).pvalue)
below = np.flatnonzero(q <= 0.05 * np.arange(1, len(q) + 1) / len(q))
print(int(below[-1]) + 1 if len(below) else 0)
""",
        check.genes_number,
    ),
    Asked(
        "gse7390",
        "What share of the variance of the standardised genes of expression.csv is on their first principal "
        "component? Give three decimals.",
        _GENES
        + """
z = (x - x.mean()) / x.std()
values = np.linalg.svd(z.to_numpy(), compute_uv=False) ** 2
print(f'{values[0] / values.sum():.3f}')
""",
        check.genes_component,
        width=0.002,
    ),
    Asked(
        "gse7390",
        "What is the Pearson correlation of the genes X202418_at and X206295_at in expression.csv among "
        "patients without metastasis (e.tdm 0 in patients.csv)? Give three decimals.",
        _GENES
        + """
one = x[p['e.tdm'] == 0]
a, b = one['X202418_at'], one['X206295_at']
a, b = a - a.mean(), b - b.mean()
print(f'{(a * b).sum() / np.sqrt((a ** 2).sum() * (b ** 2).sum()):.3f}')
""",
        check.genes_pair,
        width=0.002,
    ),
)

_CELL_QUESTIONS = (
    Asked(
        "pbmc68k",
        "Which is the most frequent cell type in cells.csv?",
        _CELLS + "print(c.cell_type.value_counts().idxmax())",
        check.cells_type,
        wrong=("CD14+ Monocyte", "CD19+ B", "CD56+ NK"),
    ),
    Asked(
        "pbmc68k",
        "In which cell type is the mean expression of NKG7 highest (expression.csv, cells.csv)?",
        _CELLS + "print(x.NKG7.groupby(c.cell_type).mean().idxmax())",
        check.cells_nkg7,
        wrong=("CD8+ Cytotoxic T", "Dendritic", "CD14+ Monocyte"),
    ),
    Asked(
        "pbmc68k",
        "What is the adjusted Rand index of cluster and cell_type in cells.csv? Give three decimals.",
        _CELLS
        + """
n = pd.crosstab(c.cluster, c.cell_type).to_numpy()
pairs = lambda v: (v * (v - 1) / 2).sum()
both, one, other = pairs(n), pairs(n.sum(1)), pairs(n.sum(0))
chance = one * other / pairs(np.array([n.sum()]))
print(f'{(both - chance) / ((one + other) / 2 - chance):.3f}')
""",
        check.cells_rand,
        width=0.002,
    ),
    Asked(
        "pbmc68k",
        "Which gene marks the CD19+ B cells best: the one with the largest difference of mean expression to "
        "all other cells (expression.csv, cells.csv)?",
        _CELLS + "b = c.cell_type == 'CD19+ B'\nprint((x[b].mean() - x[~b].mean()).idxmax())",
        check.cells_marker,
        wrong=("CD74", "MS4A1", "HLA-DRA"),
    ),
    Asked(
        "pbmc68k",
        "What share of all values of expression.csv is zero? Give three decimals.",
        _CELLS + "print(f'{(x == 0).to_numpy().mean():.3f}')",
        check.cells_zero,
        width=0.001,
    ),
)

_NUCLEI_QUESTIONS = (
    Asked(
        "wdbc",
        "What is the area under the ROC curve of mean_radius as a marker of malignant samples in nuclei.csv? "
        "Give three decimals.",
        _NUCLEI
        + """
m, b = d.mean_radius[d.diagnosis == 'malignant'], d.mean_radius[d.diagnosis == 'benign']
wins = (m.to_numpy()[:, None] > b.to_numpy()).mean() + 0.5 * (m.to_numpy()[:, None] == b.to_numpy()).mean()
print(f'{wins:.3f}')
""",
        check.nuclei_roc,
        width=0.001,
    ),
    Asked(
        "wdbc",
        "What is Cohen's d (pooled standard deviation) of mean_texture, malignant minus benign, in "
        "nuclei.csv? Give two decimals.",
        _NUCLEI
        + """
m, b = d.mean_texture[d.diagnosis == 'malignant'], d.mean_texture[d.diagnosis == 'benign']
pooled = ((len(m) - 1) * m.var() + (len(b) - 1) * b.var()) / (len(m) + len(b) - 2)
print(f'{(m.mean() - b.mean()) / np.sqrt(pooled):.2f}')
""",
        check.nuclei_effect,
        width=0.01,
    ),
    Asked(
        "wdbc",
        "How many other measurements of nuclei.csv have a Pearson correlation above 0.9 with mean_radius?",
        _NUCLEI
        + "x = d.drop(columns='diagnosis')\nr = x.corr()['mean_radius'].drop('mean_radius')\n"
        + "print(int((r > 0.9).sum()))",
        check.nuclei_correlated,
    ),
    Asked(
        "wdbc",
        "What is the leave-one-out accuracy of the 5 nearest neighbours (Euclidean, all measurements "
        "standardised over all samples) for the diagnosis in nuclei.csv? Give three decimals.",
        _NUCLEI
        + """
x = d.drop(columns='diagnosis')
z = ((x - x.mean()) / x.std(ddof=0)).to_numpy()
y = (d.diagnosis == 'malignant').to_numpy()
square = (z ** 2).sum(1)
distance = square[:, None] + square - 2 * z @ z.T
np.fill_diagonal(distance, np.inf)
near = np.argsort(distance, axis=1, kind='stable')[:, :5]
print(f'{((y[near].mean(1) > 0.5) == y).mean():.3f}')
""",
        check.nuclei_neighbours,
        width=0.001,
    ),
    Asked(
        "wdbc",
        "Which measurement of nuclei.csv separates the two diagnoses best: the one with the largest area "
        "under the ROC curve, whichever way it points?",
        _NUCLEI
        + """
y = (d.diagnosis == 'malignant').to_numpy()
ranks = d.drop(columns='diagnosis').rank()
area = (ranks[y].sum() - y.sum() * (y.sum() + 1) / 2) / (y.sum() * (~y).sum())
print((area - 0.5).abs().idxmax())
""",
        check.nuclei_best,
        wrong=("mean_radius", "mean_concave_points", "worst_texture"),
    ),
)

QUESTIONS = (
    *_LUNG_QUESTIONS,
    *_GBSG_QUESTIONS,
    *_ACTG_QUESTIONS,
    *_GENE_QUESTIONS,
    *_CELL_QUESTIONS,
    *_NUCLEI_QUESTIONS,
)
