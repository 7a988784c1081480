"""How often 95 % intervals of a mean Dice hold it, and how often tests find a difference where there is none, by number of patients: python benchmarks/interval_coverage.py. Writes benchmarks/coverage.md.

Patients' Dice are drawn from skewed distributions between 0 and 1, 2,000 studies each. The expanded percentile interval is `bootstrap_interval` of all studies at once (that it is the same is asserted), percentile the same without expansion; BCa and t are scipy's."""
import time, warnings
from pathlib import Path
import numpy as np
from scipy import stats
from uad_study.metrics import bootstrap_interval, expanded_tail, holm, paired_test
from uad_study.runs import provenance

SIZES, STUDIES, RESAMPLES, METHODS = (5, 8, 16, 30, 100), 2000, 2000, 8


def beta(a, b, zeros=0.):
    "Draws of beta(a, b), a share `zeros` of them replaced by 0; and their mean."
    return lambda r, shape: r.beta(a, b, shape) * (r.random(shape) >= zeros), (1 - zeros) * a / (a + b)

def mixed(share, one, other):
    return lambda r, shape: np.where(r.random(shape) < share, one[0](r, shape), other[0](r, shape)), share * one[1] + (1 - share) * other[1]

POPULATIONS = {"one hump: beta(4, 4)": beta(4, 4), "low: beta(1.2, 5)": beta(1.2, 5), "high: beta(6, 1.5)": beta(6, 1.5), "low, a quarter 0: beta(1.5, 4)": beta(1.5, 4, .25),
               "two groups: half beta(2, 12), half beta(8, 4)": mixed(.5, beta(2, 12), beta(8, 4)), "mostly missed: 0.85 beta(1, 20), 0.15 beta(8, 3)": mixed(.85, beta(1, 20), beta(8, 3))}


def percentiles(v):
    "The plain percentile interval and `bootstrap_interval` of each row: with its fixed seed it resamples every study of n patients alike, so that one matrix of counts serves all."
    n = v.shape[1]
    index = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
    counts = np.bincount((index + n * np.arange(RESAMPLES)[:, None]).ravel(), minlength=n * RESAMPLES).reshape(RESAMPLES, n)
    plain, out = (np.quantile(v @ counts.T / n, [tail, 1 - tail], 1) for tail in (.025, expanded_tail(n)))
    np.testing.assert_allclose(out[:, :20].T, [bootstrap_interval(x, RESAMPLES) for x in v[:20]], atol=1e-12)
    return plain, out

def bca(v, seed=0):
    "BCa intervals of scipy; where all values are equal, that value."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        c = stats.bootstrap((v,), np.mean, axis=1, n_resamples=RESAMPLES, batch=50, method="BCa", random_state=np.random.default_rng(seed)).confidence_interval
    return np.where(v.min(1) == v.max(1), v[:, 0], [c.low, c.high])

def student(v): return v.mean(1) + np.array([[-1], [1]]) * stats.t.ppf(.975, v.shape[1] - 1) * stats.sem(v, 1)


def intervals():
    "Rows: population, n, then for each interval its coverage and mean width."
    for i, (name, (draw, mean)) in enumerate(POPULATIONS.items()):
        for n in SIZES:
            v = draw(np.random.default_rng([i, n]), (STUDIES, n))
            yield name, n, [((low <= mean) & (mean <= high), high - low) for low, high in (*percentiles(v), bca(v), student(v))]

def tests():
    "Rows: n, share of studies where `paired_test` rejects at 0.05, where any of 8 does, and where any does after `holm`: 8 methods that differ by chance only from a ninth."
    for n in SIZES[1:]:
        r = np.random.default_rng([99, n])
        patients = POPULATIONS["two groups: half beta(2, 12), half beta(8, 4)"][0](r, (STUDIES, n))
        d = np.clip(patients[:, None] + r.normal(0, .1, (STUDIES, METHODS + 1, n)), 0, 1)                          # exchangeable, with ties at 0
        p = np.array([[paired_test(a, s[0]) for a in s[1:]] for s in d])
        yield n, (p[:, 0] < .05).mean(), (p < .05).any(1).mean(), np.mean([(holm(q) < .05).any() for q in p])


def main():
    clock = time.perf_counter()
    rows, kinds = list(intervals()), ("percentile", "expanded", "BCa", "t")
    p = lambda x: f"{100 * x:.1f}"
    lines = [f"| {name} | {n} | " + " | ".join(p(hit.mean()) for hit, _ in r) + " | " + " | ".join(f"{w.mean():.3f}" for _, w in r) + " |" for name, n, r in rows]
    over = [f"| all | {n} | " + " | ".join(f"{p(np.mean([r[k][0].mean() for _, m, r in rows if m == n]))} ({p(min(r[k][0].mean() for _, m, r in rows if m == n))})" for k in range(4)) + " | | | | |" for n in SIZES]
    tested = [f"| {n} | " + " | ".join(p(x) for x in xs) + " |" for n, *xs in tests()]
    v = provenance()
    text = [f"Measured by `python benchmarks/interval_coverage.py`, {v['time'][:10]}, commit {str(v['commit'])[:12]}{' with changes' if v['dirty'] else ''}: Python {v['python']}, numpy {v['packages']['numpy']}, scipy {v['packages']['scipy']}; {time.perf_counter() - clock:.0f} s. "
            f"{STUDIES:,} simulated studies for each line ({RESAMPLES:,} resamples): the standard error of a coverage near 95 % is 0.5 %.", "",
            "How often a 95 % interval holds the mean Dice of the population, in %, and its mean width. percentile: the plain one; expanded: `metrics.bootstrap_interval`; BCa: `scipy.stats.bootstrap`; t: mean ± t · standard error. In the last lines: the mean over the populations, in brackets the lowest.", "",
            "| patients' Dice | n | " + " | ".join(f"{k}, % hold" for k in kinds) + " | " + " | ".join(f"{k}, width" for k in kinds) + " |", "|---|---|---|---|---|---|---|---|---|---|", *lines, *over, "",
            f"How often a difference is found at 0.05 where there is none, in %: {METHODS} methods against a ninth, all with the same Dice but for chance (normal, 0.1, cut at 0 and 1), in patients of two groups. "
            "A Wilcoxon test of n pairs cannot give less than 2 / 2^n, so 5 patients are too few for any, and 8 for Holm's first step over 8 tests (0.00625). The share of studies with any false finding may be 5 % at most after `holm`.", "",
            "| n | `paired_test` | any of 8, uncorrected | any of 8, `holm` |", "|---|---|---|---|", *tested, ""]
    (Path(__file__).parent/"coverage.md").write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__": main()
