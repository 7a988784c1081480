"""Scores over several restorations, found on virtual validation patients, judged once on virtual test patients: python benchmarks/ours.py restore|search|judge OUT. OUT keeps the cohort and the restorations."""
import sys
from pathlib import Path
import numpy as np, torch
from uad_study.cohort import Cohort, DataConfig, build_virtual, patients
from uad_study.core import atomic_file
from uad_study.models import RestoreConfig
from uad_study.reconstruct import further_draws, reconstruct_volume
from uad_study.shipped import packaged_folder, read_card, read_model

DATA = DataConfig(folds=1, n_train=0, n_val=20, n_test=0, n_lesion_val=10, n_lesion_test=30)      # the subjects of the study `demo-full`
LEVELS, DRAWS, SEED = (500, 250, 750), 3, 0


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
    """Restorations of cohort rows by the packaged DDPM of their contrast, kept in `folder` in half precision: as a study makes them with `restore: {t_test: [500, 250, 750]}`, one by one (of which the first is the plain study's),
    and further ones from level 500, as `scores.draws` makes them."""
    def __init__(self, cohort, folder): self.cohort, self.folder, self.models, self.who = cohort, Path(folder), {}, patients(cohort.table)

    def model(self, row):
        contrast = self.cohort.table.contrast.iloc[row]
        if contrast not in self.models: folder = packaged_folder("ddpm", contrast); self.models[contrast] = _by_eights(read_model(folder, read_card(folder)))
        return self.models[contrast]

    def _kept(self, row, kind, make):
        file = self.folder/f"{self.cohort.table.subject_id.iloc[row]}-{self.cohort.table.contrast.iloc[row]}-{kind}.npy"
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as tmp, open(tmp, "wb") as f: np.save(f, make().astype(np.float16))
        return np.load(file).astype(np.float32)

    def levels(self, row) -> np.ndarray:
        "A restoration from each of `LEVELS`: (levels, H, W, D). Their mean is what the model restores with `restore.t_test` so."
        def make():
            model, found = self.model(row), []
            plain = type(model).estimate
            def estimate(*args): found.append(plain(model, *args)); return found[-1]
            model.restore, model.estimate = RestoreConfig(t_test=LEVELS), estimate
            reconstruct_volume(model, self.cohort.images[row], (SEED, "restore", str(self.who[row])))
            del model.estimate
            return np.stack([((x + 1) / 2)[:, 0].permute(1, 2, 0).numpy() for x in found])
        return self._kept(row, "levels", make)

    def draws(self, row) -> np.ndarray:
        "All restorations from level 500: (DRAWS, H, W, D)."
        def make():
            model = self.model(row); model.restore = RestoreConfig()
            return further_draws(model, self.cohort.images[row], DRAWS - 1, (SEED, "restore", str(self.who[row])))
        return np.concatenate([self.levels(row)[:1], self._kept(row, "draws", make)])


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, out = sys.argv[1:3]
    cohort = cohort_in(out)
    kept = Restorations(cohort, Path(out)/"restorations")
    rows = few(cohort, "val", 8) + few(cohort, "test", 30) + few(cohort, "val", 10, 10)
    for i, r in enumerate(rows):
        kept.levels(r)
        if i % 10 == 9: print(f"{i + 1} of {len(rows)}", flush=True)
    for r in few(cohort, "val", 8): kept.draws(r)
    print("all", flush=True)
