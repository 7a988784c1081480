# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: python3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Labs
# > Four questions to a finished study: which sigma does a lesion prefer, which cases are worth a look, why was a lesion missed, and what does a noise level erase?
#
# Every lab is a function that returns numbers, a matplotlib figure of them, and a thin widget for JupyterLab. The functions read a `viewer.View` (volumes, restorations and thresholds of a study) or `results.Results`
# (its tables); nothing is judged anew.

# %%
#| default_exp labs

# %%
#| export
import io, os
import numpy as np, pandas as pd
from dataclasses import asdict, replace
from pathlib import Path
from uad_study.core import UadError
from uad_study.cohort import Cohort
from uad_study.evaluate import kept_restorations, restoration_quality
from uad_study.judge import headline_rule
from uad_study.metrics import expanded_tail
from uad_study.models import MODELS, RestoreConfig, model_config
from uad_study.postprocess import erode_mask
from uad_study.reconstruct import reconstruct_cohort
from uad_study.results import NAMES, Results, score_label
from uad_study.scores import SIGMAS, sigma_of
from uad_study.viewer import View, ViewState
from uad_study.volume import VOXEL_ML


# %%
#| export
def state_for(view: View, model: int, row: int, score: str = "ssim_ens", rule: str = "val", threshold: float | None = None) -> ViewState:
    "The state of a case at its slice with most lesion. `score`: any name the study knows, also 'ssim_S'; with a `threshold` the rule is 'free'."
    sigma = sigma_of(score)
    s = replace(view.at(ViewState(model=model), row), score="ssim" if sigma else score, rule=rule)
    if sigma: s = replace(s, sigma=sigma)
    return s if threshold is None else replace(s, rule="free", threshold=float(threshold))

def _judged(view: View, model: int, row: int):
    "Of a case: labels (H, W, D) of the true lesions (26-connected, numbered from 1; 0 elsewhere), and the eroded brain mask. Voxels to ignore are in neither."
    from cc3d import connected_components
    _, _, mask, lesion = view.case(ViewState(model=model, row=row))
    seen = ~np.asarray(view.cohort.ignore_masks[row])
    return connected_components(np.require(lesion & seen, requirements="CW"), connectivity=26), erode_mask(mask, view.models[model].erode) & seen

def _about(view: View, row: int) -> dict:
    "Subject, contrast, pathology and person of a row of the cohort."
    from uad_study.cohort import patients
    t = view.cohort.table
    return dict(row=int(row), subject_id=t.subject_id.iloc[row], patient_id=str(patients(t)[row]), contrast=t.contrast.iloc[row], pathology=t.pathology.iloc[row])

def test_rows(view: View, model: int, pathology: str, split: str = "test") -> list[int]:
    "The rows of a pathology and split that a model has restored. Raises `UadError` when there are none."
    t = view.cohort.table
    rows = [r for r in view.rows(model) if t.pathology.iloc[r] == pathology and t.split.iloc[r] == split]
    if not rows: raise UadError(f"{view.models[model].label}: has restored no {pathology} volume in split {split!r}: choose another pathology or model")
    return rows


# %% [markdown]
# ## Sigma lab
# SSIM-ens weighs the scales of a voxel by softmax(-SSIM / temperature): the less similar a scale, the more it counts. Divided by equal weights the weights are shares, $n\,w_i$: 1 is what a plain mean would give.

# %%
#| export
def sigma_maps(view: View, model: int, row: int, sigmas=SIGMAS, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """The anomaly maps 1 - SSIM at each sigma, (n, H, W, D), 0 outside the brain; and the weight of each in SSIM-ens as a share of equal weight, same shape: n softmax(-SSIM / temperature), 1 outside the brain.

    Behrendt et al. 2024, eq. 4."""
    maps = np.stack([view.map(ViewState(model=model, row=row, score="ssim", sigma=s, post=False)) for s in sigmas])
    e = np.exp((maps - maps.max(0)) / temperature)
    return maps, len(sigmas) * e / e.sum(0)


# %%
#| hide
import tempfile
import matplotlib.pyplot as plt
from scipy.ndimage import gaussian_filter
from fastcore.test import ExceptionExpected
from uad_study import phantom
from uad_study.cohort import Item, write_cohort
from uad_study.metrics import auprc
from uad_study.scores import ssim_ens
from uad_study.viewer import Restored, restored_models

# %% [markdown]
# Two virtual patients, "restored" by their lesion-free twins with some blur, as a model would leave them.

# %%
made = {"tumour": phantom.diseased(3, "tumour"), "ms": phantom.diseased(5, "ms")}
folder = Path(tempfile.mkdtemp())/"cohort"
write_cohort(folder, [Item(dict(subject_id=f"{p}-0", contrast="T2w", pathology=p, split="test", val_fold=-1), s.images["T2w"], s.brain_mask, s.lesion_mask, s.twins["T2w"]) for p, s in made.items()], 2)
cohort = Cohort(folder)
known = {(n, p): {"val": .1 if n == "l1" else .3, "healthy": .5} for n in ("l1", *(f"ssim_{s:g}" for s in SIGMAS), "ssim_ens") for p in made}
view = View(cohort, [Restored("T2w twin", {r: gaussian_filter(cohort.twins[r], .6) for r in range(2)}, known)])
maps, weights = sigma_maps(view, 0, 0)
x, x_hat, mask, lesion = view.case(ViewState())
assert np.allclose(weights.mean(0), 1) and np.allclose((weights * maps).mean(0)[mask], ssim_ens(x, x_hat)[mask], atol=1e-5)          # these are the ensemble's weights
print("share of the smallest and the largest sigma in the lesion:", [round(float(w[lesion].mean()), 2) for w in (weights[0], weights[-1])])


# %% [markdown]
# Which sigma does a lesion prefer? For each lesion (26-connected) and sigma: the average precision (AUPRC) of its voxels against the healthy voxels of the same brain, other lesions left out. It is high where some threshold
# marks the lesion and little else, so it looks at the end of the ranking that Dice looks at. (The mean percentile of the lesion among healthy voxels does not: it is as much about the 99 % of the brain that no threshold would
# mark.) Size and prevalence are the same for all sigmas of a lesion, so within a lesion the values compare; between lesions they don't.

# %%
#| export
def _average_precision(values, healthy) -> float:
    "AUPRC of lesion scores `values` against the sorted scores `healthy`, as `metrics.auprc` of both; NaN without values."
    v, equal = np.unique(values, return_counts=True)
    tp = equal[::-1].cumsum()[::-1]
    return float((equal * tp / (tp + healthy.size - np.searchsorted(healthy, v))).sum() / len(values)) if len(v) else np.nan

def preferred_sigma(view: View, model: int, row: int, post: bool = False, sigmas=SIGMAS) -> pd.DataFrame:
    """A row for each true lesion (26-connected) of a case: subject_id ..., `lesion` (number from 1), `lesion_ml`, `preferred` (the sigma with the highest AUPRC), `best` (that AUPRC), and AUPRC at each sigma, columns 'ssim_S'.

    AUPRC: of the lesion's voxels against healthy ones of the same brain, both inside the eroded brain mask, in the map 1 - SSIM; with `post` in the map after erosion and median. Of equal values the smallest sigma.
    NaN where no voxel of a lesion is inside the eroded mask: no sigma could find it. No rows without a lesion."""
    labels, inside = _judged(view, model, row)
    numbers = np.arange(1, labels.max() + 1)
    own = [inside & (labels == k) for k in numbers]
    table = pd.DataFrame([_about(view, row) | dict(lesion=int(k), lesion_ml=float((labels == k).sum() * VOXEL_ML)) for k in numbers], columns=[*_about(view, row), "lesion", "lesion_ml"])
    values = {}
    for s in sigmas:
        m = view.map(ViewState(model=model, row=row, score="ssim", sigma=s, post=post))
        healthy = np.sort(m[inside & (labels == 0)])
        values[f"ssim_{s:g}"] = [_average_precision(m[o], healthy) for o in own]
    v = pd.DataFrame(values, index=table.index)
    seen = v.notna().all(axis=1)
    at = v[seen].to_numpy().argmax(1) if seen.any() else []
    return table.assign(preferred=pd.Series(np.array(sigmas, float)[at], v.index[seen], dtype=float).reindex(v.index), best=v.max(axis=1)).join(v)

def preferred_sigmas(view: View, model: int, pathology: str, post: bool = False, split: str = "test", sigmas=SIGMAS) -> pd.DataFrame:
    "`preferred_sigma` of all volumes of a pathology and split that a model has restored. Raises `UadError` when there are none."
    return pd.concat([preferred_sigma(view, model, r, post, sigmas) for r in test_rows(view, model, pathology, split)], ignore_index=True)


# %%
t = preferred_sigmas(view, 0, "ms")
m, (labels, inside) = view.map(ViewState(row=1, score="ssim", sigma=.7, post=False)), _judged(view, 0, 1)
for lesion_number, value in zip(t.lesion, t["ssim_0.7"]):                               # the same as metrics.auprc of the two together
    among = inside & ((labels == 0) | (labels == lesion_number))
    assert not (inside & (labels == lesion_number)).any() or abs(auprc(m[among], labels[among] > 0) - value) < 1e-9
t[["subject_id", "lesion", "lesion_ml", "preferred", "best", "ssim_0.3", "ssim_0.7", "ssim_1.7"]].round(2)

# %% [markdown]
# A planted example: where noise hides a wide, faint lesion and not a small, strong one, the small one must prefer a small sigma and the wide one a large sigma.

# %%
rng = np.random.default_rng(1)
brain, small, wide = np.zeros((3, 96, 96, 50), bool); brain[10:86, 10:86, 4:46] = True; small[24:26, 24:26, 20:22] = True; wide[45:65, 45:65, 14:30] = True
healthy = np.where(brain, .5 + .33 * gaussian_filter(rng.normal(size=brain.shape), 1), 0).clip(0, 1).astype(np.float32)
scan = np.where(brain, healthy + rng.normal(0, .02, brain.shape) + .2 * small + .03 * wide, 0).clip(0, 1).astype(np.float32)
write_cohort(folder.parent/"planted", [Item(dict(subject_id="planted", contrast="T2w", pathology="ms", split="test", val_fold=-1), scan, brain, small | wide, healthy)], 1)
planted = View(Cohort(folder.parent/"planted"), [Restored("planted", {0: healthy}, {})])
t = preferred_sigma(planted, 0, 0).set_index("lesion_ml")
assert list(t.index.round(2)) == [.06, 51.2] and list(t.preferred) == [.3, 1.7] and (t["ssim_0.3"] > t["ssim_1.7"]).tolist() == [True, False]
t[["preferred", *(f"ssim_{s:g}" for s in SIGMAS)]].round(2)


# %% [markdown]
# Seen: the maps of one subject with their weights below; and, over the patients of a pathology, the preferred sigma against the size of the lesion. Lesions of one patient are alike, so the interval of the rank correlation
# comes from drawing patients, not lesions. A lesion that no sigma separates (its best AUPRC is small) prefers nothing in earnest: `least` leaves it out, and its mark is hollow.

# %%
#| export
def rank_correlation(t: pd.DataFrame, least: float = 0.0, n: int = 2000, seed: int = 0) -> dict:
    """Spearman's rank correlation `rho` of preferred sigma and size, over the lesions of `preferred_sigma` whose `best` is at least `least`, with its 95 % bootstrap interval `lo`, `hi` over patients (expanded percentile).

    NaN for fewer than three lesions or when all prefer one sigma; the interval also for fewer than three patients. `lesions`, `patients`: how many count."""
    from scipy.stats import rankdata
    t = t[t.best >= least]
    x, y, who = t.lesion_ml.to_numpy(), t.preferred.to_numpy(), t.groupby("patient_id", sort=False).indices
    def rho(i):
        if len(i) < 3 or np.ptp(x[i]) == 0 or np.ptp(y[i]) == 0: return np.nan
        return float(np.corrcoef(rankdata(x[i]), rankdata(y[i]))[0, 1])
    groups, rng, lo, hi = list(who.values()), np.random.default_rng(seed), np.nan, np.nan
    if len(groups) > 2:
        drawn = [rho(np.concatenate([groups[k] for k in rng.integers(0, len(groups), len(groups))])) for _ in range(n)]
        tail = expanded_tail(len(groups))
        if np.isfinite(drawn).mean() > .5: lo, hi = map(float, np.nanquantile(drawn, [tail, 1 - tail]))
    return dict(rho=rho(np.arange(len(t))), lo=lo, hi=hi, lesions=len(t), patients=len(groups))

def figure_preference(tables: dict[str, pd.DataFrame], least: float = 0.05):
    "Preferred sigma against lesion size, a panel for each {title: table of `preferred_sigma`}, with `rank_correlation`; hollow where the best AUPRC is below `least`. Returns a matplotlib figure."
    import matplotlib.pyplot as plt
    columns = min(2, len(tables))
    rows = -(-len(tables) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(3.7 * columns, .3 + 2.5 * rows), dpi=90, squeeze=False, sharey=True, layout="constrained")
    for ax in axes.flat[len(tables):]: ax.remove()
    for ax, (title, t) in zip(axes.flat, tables.items()):
        seen, c, nudge = t.best >= least, rank_correlation(t, least), np.random.default_rng(0).uniform(-.045, .045, len(t))
        ax.scatter(t.lesion_ml, t.preferred + nudge, s=16, facecolors=np.where(seen, "#0072B2", "none"), edgecolors="#0072B2", linewidths=.7, alpha=.75)
        interval = f" ({c['lo']:.2f} to {c['hi']:.2f})" if c["lo"] == c["lo"] else ""
        says = f"rank correlation {c['rho']:.2f}{interval}" if c["rho"] == c["rho"] else "no rank correlation"
        ax.set_title(f"{title}\n{says}, {c['lesions']} of {len(t)} lesions, {c['patients']} patients", fontsize=8)
        ax.set(xscale="log", yticks=SIGMAS, ylim=(.15, 1.85)); ax.grid(color="0.93"); ax.set_axisbelow(True); ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False); ax.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
        if ax in axes[:, 0]: ax.set_ylabel("preferred sigma (voxels)", fontsize=8)
        ax.set_xlabel("lesion (mL)", fontsize=8)
    return fig


# %%
fig = figure_preference({f"MS, one patient, {name}": preferred_sigmas(view, 0, "ms", post) for name, post in (("raw map", False), ("after the median", True))})
fake = pd.DataFrame(dict(patient_id=list("aabbccddee"), lesion_ml=np.arange(1, 11), preferred=[.3, .3, .5, .5, .7, .9, .9, 1.1, 1.3, 1.7], best=[.5] * 9 + [.01]))
c = rank_correlation(fake)
assert .95 < c["rho"] < 1 and .6 < c["lo"] <= c["rho"] <= c["hi"] <= 1 and c["patients"] == 5 and rank_correlation(fake, .05)["lesions"] == 9
assert rank_correlation(fake.assign(preferred=fake.preferred.to_numpy()[::-1]))["hi"] < -.6 and np.isnan(rank_correlation(fake.assign(preferred=.3))["rho"])


# %%
#| export
def _coloured(plane, low: float, high: float, name: str) -> np.ndarray:
    "A slice (H, W) as colours (W, H, 3) uint8, anterior up."
    from matplotlib import colormaps
    return np.ascontiguousarray((colormaps[name](np.clip((plane - low) / (high - low), 0, 1))[..., :3] * 255).astype(np.uint8).transpose(1, 0, 2)[::-1])

def sigma_panels(view: View, s: ViewState, sigmas=SIGMAS, temperature: float = 1.0) -> dict[str, np.ndarray]:
    "The pictures of the sigma lab at the slice of a state, (W, H, 3) uint8: 'input', 'truth', then 'map S' (each scaled to its own 99.8 % quantile in the brain) and 'weight S' (share of equal weight: 0 to 2, white is 1) for each sigma S."
    maps, weights = sigma_maps(view, s.model, s.row, sigmas, temperature)
    x, _, mask, lesion = view.case(s)
    panels = {"input": _coloured(x[:, :, s.z], 0, 1, "gray"), "truth": _coloured(np.where(lesion, 1, .45 * x)[:, :, s.z], 0, 1, "gray")}
    for sigma, m, w in zip(sigmas, maps, weights):
        top = max(float(np.quantile(m[mask], .998)) if mask.any() else 0, 1e-6)
        panels |= {f"map {sigma:g}": _coloured(m[:, :, s.z], 0, top, "inferno"), f"weight {sigma:g}": _coloured(w[:, :, s.z], 0, 2, "PuOr_r")}
    return panels

def figure_sigmas(view: View, s: ViewState, sigmas=SIGMAS, temperature: float = 1.0):
    "`sigma_panels` of a state: maps above, weights below. Returns a matplotlib figure."
    import matplotlib.pyplot as plt
    from matplotlib.cm import ScalarMappable
    panels = sigma_panels(view, s, sigmas, temperature)
    fig, axes = plt.subplots(2, len(sigmas) + 1, figsize=(.95 * (len(sigmas) + 1) + .7, 2.3), dpi=90, layout="constrained")
    fig.get_layout_engine().set(w_pad=.01, h_pad=.01, wspace=0, hspace=0)
    for axs, kind, first in zip(axes, ("map", "weight"), ("input", "truth")):
        for ax, name in zip(axs, [first, *(f"{kind} {v:g}" for v in sigmas)]):
            ax.imshow(panels[name]); ax.set(xticks=[], yticks=[]); ax.spines[:].set_visible(False)
            ax.set_title(first if name == first else f"$\\sigma$ {name.split()[1]}" if kind == "map" else "", fontsize=8)
    bar = fig.colorbar(ScalarMappable(plt.Normalize(0, 2), "PuOr_r"), ax=axes[1], ticks=[0, 1, 2], pad=.01, aspect=12)
    bar.set_label("weight /\nequal weight", fontsize=7); bar.ax.tick_params(labelsize=7)
    return fig


# %%
fig = figure_sigmas(view, state_for(view, 0, 0))
