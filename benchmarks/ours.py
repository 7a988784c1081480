"""Scores over several restorations, found on virtual validation patients, judged once on virtual test patients: python benchmarks/ours.py restore|search|judge OUT. OUT keeps the cohort and the restorations."""
import sys
from itertools import product
from pathlib import Path
import numpy as np, torch
from uad_study.cohort import Cohort, DataConfig, build_virtual, patients
from uad_study.core import atomic_file
from uad_study.models import RestoreConfig
from uad_study.reconstruct import reconstruct_volume
from uad_study.shipped import packaged_folder, read_card, read_model

DATA = DataConfig(folds=1, n_train=0, n_val=20, n_test=0, n_lesion_val=10, n_lesion_test=30)      # the subjects of the study `demo-full`
LEVELS, DRAWS, SEED = (500, 250, 750), 5, 0


def cohort_in(out) -> Cohort:
    folder = Path(out)/"cohort"
    if not folder.exists(): build_virtual(DATA, folder)
    return Cohort(folder)


def few(cohort, split, lesions: int, healthy: int = 0) -> list[int]:
    "The first volumes of each pathology (and contrast) of a split."
    places = [(p, c) for p in ("tumour", "ms", "stroke", "wmh", "healthy") for c in ("T1w", "T2w")]
    return [int(r) for p, c in places for r in cohort.select(split, 0, contrast=c, pathology=p)[:healthy if p == "healthy" else lesions]]


def _by_eights(model):
    "The same model, whose network sees 8 slices at a time: the same numbers from the same noise, up to rounding, in 3/4 of the time, since a CPU's cache then holds them."
    whole = model.denoiser.forward
    model.denoiser.forward = lambda x, t: torch.cat([whole(*some) for some in zip(x.split(8), t.split(8))])
    return model


class Restorations:
    "Restorations (H, W, D) of cohort rows by the packaged DDPM of their contrast, from noise draw k at level t, kept in `folder`, half precision. Draw k at level 500 is the study's own."
    def __init__(self, cohort, folder): self.cohort, self.folder, self.models, self.who = cohort, Path(folder), {}, patients(cohort.table)

    def file(self, row, k, t): return self.folder/f"{self.cohort.table.subject_id.iloc[row]}-{self.cohort.table.contrast.iloc[row]}-k{k}-t{t}.npy"

    def make(self, row, k, t):
        contrast = self.cohort.table.contrast.iloc[row]
        if contrast not in self.models: folder = packaged_folder("ddpm", contrast); self.models[contrast] = _by_eights(read_model(folder, read_card(folder)))
        model = self.models[contrast]
        model.restore = RestoreConfig(t_test=t)
        seed = (SEED, "restore", str(self.who[row]), *(["draw", k] if k else []), *(["level", t] if t != 500 else []))
        x_hat = reconstruct_volume(model, self.cohort.images[row], seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.file(row, k, t)) as tmp, open(tmp, "wb") as f: np.save(f, x_hat.astype(np.float16))

    def __call__(self, row, k=0, t=500) -> np.ndarray:
        if not self.file(row, k, t).exists(): self.make(row, k, t)
        return np.load(self.file(row, k, t)).astype(np.float32)

    def all(self, rows, draws, levels):
        todo = [(r, k, t) for k, t in product(range(draws), levels) for r in rows if not self.file(r, k, t).exists()]
        for i, one in enumerate(todo):
            self.make(*one)
            if i % 20 == 19: print(f"{i + 1} of {len(todo)}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, out = sys.argv[1:3]
    cohort = cohort_in(out)
    kept = Restorations(cohort, Path(out)/"restorations")
    if what == "restore":
        kept.all(few(cohort, "val", 8, 10), DRAWS, LEVELS)
