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
rng = np.random.default_rng(0)
brain, z = np.zeros((96, 96, 50), bool), np.zeros((96, 96, 50), bool); brain[10:86, 10:86, 4:46] = True
small, wide = z.copy(), z.copy(); small[24:26, 24:26, 20:22] = True; wide[45:70, 45:70, 14:36] = True
healthy = np.where(brain, .5 + .1 * gaussian_filter(rng.normal(size=brain.shape), 1) / .0842, 0).astype(np.float32)
scan = np.where(brain, healthy + rng.normal(0, .06, brain.shape) + .5 * small + .08 * wide * np.sign(np.sin(np.arange(50) * 1.2)), 0).clip(0, 1).astype(np.float32)
write_cohort(folder.parent/"planted", [Item(dict(subject_id="planted", contrast="T2w", pathology="ms", split="test", val_fold=-1), scan, brain, small | wide, healthy)], 1)
planted = View(Cohort(folder.parent/"planted"), [Restored("planted", {0: healthy}, {})])
t = preferred_sigma(planted, 0, 0)
print(t.drop(columns=["row", "patient_id", "contrast", "pathology"]).round(3).to_string())
assert t.lesion_ml[0] < 1 < t.lesion_ml[1] and t.preferred[0] < t.preferred[1]
