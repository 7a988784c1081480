"""Scores over several restorations, found on virtual validation patients, judged once on virtual test patients: python benchmarks/ours.py restore|search|judge|write OUT [PATIENTS]. OUT keeps the cohort and the restorations.

`restore` makes the restorations that both need and goes on where it was stopped; `search` compares candidates on validation patients alone; `judge` takes what was chosen (`OURS`) and the plain DDPM to PATIENTS (default 30)
test patients a pathology, and refuses to do so twice. Both write their part of benchmarks/ours.json, and benchmarks/ours.md from it, as `write` does again."""
import json, sys
from functools import cached_property
from pathlib import Path
import numpy as np, torch
from scipy.ndimage import gaussian_filter
from uad_study.cohort import Cohort, DataConfig, build_virtual, patients
from uad_study.core import atomic_file, write_json
from uad_study.judge import ScoreConfig, judge
from uad_study.metrics import bootstrap_interval, holm, paired_test
from uad_study.models import RestoreConfig
from uad_study.phantom import PATHOLOGIES
from uad_study.reconstruct import further_draws, reconstruct_volume
from uad_study.results import NAMES
from uad_study.runs import provenance
from uad_study.scores import SIGMAS, healthy_reference, mahalanobis_map, over_healthy, score_maps, ssim_ens, ssim_map
from uad_study.shipped import packaged_folder, read_card, read_model

HERE, FORMAT = Path(__file__).parent, "uad-ours/1"
DATA = DataConfig(folds=1, n_train=0, n_val=20, n_test=0, n_lesion_val=10, n_lesion_test=30)      # the subjects of the study `demo-full`
LEVELS, DRAWS, SEED = (500, 250, 750), 3, 0
SEARCHED, HEALTHY = 8, 10           # validation patients a pathology, and healthy ones a contrast, of the search


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


class Case:
    "A scan x with what was made of it: restorations of one level each (`levels`), of level 500 (`draws`), the maps of SSIM-ens and their like, each computed once."
    def __init__(self, cohort, kept, row): self.x, self.brain, self.contrast, self._kept, self.row = np.asarray(cohort.images[row]), np.asarray(cohort.brain_masks[row]), cohort.table.contrast.iloc[row], kept, row

    @cached_property
    def levels(self): return self._kept.levels(self.row)
    @cached_property
    def draws(self): return self._kept.draws(self.row)
    @cached_property
    def one(self): return self.levels[0]
    @cached_property
    def mean(self): return self.levels.mean(0)
    @cached_property
    def of_one(self): return score_maps(self.x, self.one, SCORES)
    @cached_property
    def of_mean(self): return score_maps(self.x, self.mean, SCORES)
    @cached_property
    def of_draws(self): return score_maps(self.x, self.draws.mean(0), SCORES)
    @cached_property
    def by_level(self): return np.mean([self.of_one["ssim_ens"], *(ssim_ens(self.x, v) for v in self.levels[1:])], 0)
    @cached_property
    def by_draw(self): return np.mean([self.of_one["ssim_ens"], *(ssim_ens(self.x, v) for v in self.draws[1:])], 0)
    @cached_property
    def sigmas(self): return {s: 1 - ssim_map(self.x, self.mean, s) for s in SIGMAS}
    @cached_property
    def towards(self): return (self.x > self.mean) == (self.contrast == "T2w")
    @cached_property
    def spread(self): return np.sqrt(inside_mean(self.levels.var(0, ddof=1), self.brain)) + .1

    def mahalanobis(self, of, scale=False): return mahalanobis_map(self.x, of, self.brain, scale=scale)


SCORES = ("l1", "ssim_ens", "l1_ssim")


def inside_mean(m, brain, sigma=1.5):
    "`m` (H, W, D) smoothed by a Gaussian of `sigma` voxels, of the voxels in the brain alone."
    return gaussian_filter(m * brain, sigma) / np.maximum(gaussian_filter(brain.astype(np.float32), sigma), .3)


class Healthy:
    "Divides a map `f(case)` by what it is at this place in healthy validation scans on average, as the scores NAME_healthy do (`scores.over_healthy`)."
    def __init__(self, f, cohort, kept): self.f, self.cohort, self.kept, self.found = f, cohort, kept, {}

    def reference(self, contrast):
        if contrast not in self.found:
            cases = [Case(self.cohort, self.kept, r) for r in self.cohort.select("val", 0, contrast=contrast, pathology="healthy")[:HEALTHY]]
            self.found[contrast] = healthy_reference(np.sum([self.f(c) * c.brain for c in cases], 0), np.sum([c.brain for c in cases], 0), len(cases))
        return self.found[contrast]

    def __call__(self, case): return over_healthy(self.f(case), self.reference(case.contrast))


def candidates(cohort, kept) -> dict:
    "Maps of a case, by what they are called in the table."
    product = lambda c: c.of_mean["l1_ssim"]
    healthy = lambda f: Healthy(f, cohort, kept)
    by_sigma = [healthy(lambda c, s=s: c.sigmas[s]) for s in SIGMAS]
    return {
        "l1, one restoration (plain)": lambda c: c.of_one["l1"], "SSIM-ens, one restoration (plain)": lambda c: c.of_one["ssim_ens"], "l1 times SSIM-ens, one restoration": lambda c: c.of_one["l1_ssim"],
        "SSIM-ens of the mean of 3 draws": lambda c: c.of_draws["ssim_ens"], "mean of SSIM-ens of each of 3 draws": lambda c: c.by_draw, "l1 times SSIM-ens of the mean of 3 draws": lambda c: c.of_draws["l1_ssim"],
        "Mahalanobis of 3 draws": lambda c: c.mahalanobis(c.draws, True), "Mahalanobis of 3 draws, not scaled, times SSIM-ens of their mean": lambda c: c.mahalanobis(c.draws) * c.of_draws["ssim_ens"],
        "l1 of the mean of 3 levels": lambda c: c.of_mean["l1"], "SSIM-ens of the mean of 3 levels": lambda c: c.of_mean["ssim_ens"], "mean of SSIM-ens of each of 3 levels": lambda c: c.by_level, OURS: product,
        "the same over the spread of the 3 levels": lambda c: product(c) / c.spread, "the same where the scan is brighter (T2w) or darker (T1w)": lambda c: product(c) * c.towards,
        "SSIM-ens of the mean of 3 levels over that of healthy scans": healthy(lambda c: c.of_mean["ssim_ens"]), "sigmas of the mean of 3 levels, each over that of healthy scans, averaged": lambda c: np.mean([f(c) for f in by_sigma], 0),
        AGAINST_HEALTHY: healthy(product)}


MEAN = "SSIM-ens of the mean of 3 levels"
OURS, AGAINST_HEALTHY = "l1 times SSIM-ens of the mean of 3 levels", "l1 times SSIM-ens of the mean of 3 levels over that of healthy scans"
PLAIN = {"l1": "l1, one restoration (plain)", "SSIM-ens": "SSIM-ens, one restoration (plain)"}
PEERS = PLAIN | {"SSIM-ens of the same mean restoration": MEAN}


def dice_of(cohort, kept, chosen: dict, val: int, test: int | None, work):
    "A row for each patient and score, judged as a study does, at thresholds from `val` validation patients a pathology: on `test` test patients, or (None) on the validation patients themselves."
    import pandas as pd
    tables = []
    for contrast in ("T1w", "T2w"):
        pick = lambda split, n: np.array([r for p, c in PATHOLOGIES.items() if c == contrast for r in cohort.select(split, 0, contrast=contrast, pathology=p)[:n]])
        rows = dict(val=pick("val", val), test=pick("val", val) if test is None else pick("test", test))
        def maps_of(row): case = Case(cohort, kept, row); return [f(case) for f in chosen.values()]
        tell = lambda done, n, what: done % 10 or print(f"{contrast}: {done} of {n}, {what}", flush=True)
        tables.append(judge(cohort, contrast, 0, maps_of, list(chosen), ScoreConfig(), Path(work)/contrast, "ddpm", tell, rows, brief=True)["cases"])
    return pd.concat(tables, ignore_index=True)


def search(cohort, kept, work) -> dict:
    cases = dice_of(cohort, kept, candidates(cohort, kept), SEARCHED, None, work)
    return dict(provenance=provenance(), patients=SEARCHED, healthy=HEALTHY, scores={s: {p: [float(g.dice.mean()), float(g.auprc.mean())] for p, g in t.groupby("pathology")} for s, t in cases.groupby("score", sort=False)})


def once(cohort, kept, work, n) -> dict:
    everything = candidates(cohort, kept)
    chosen = {s: everything[s] for s in (*PLAIN.values(), "l1 times SSIM-ens, one restoration", MEAN, OURS, AGAINST_HEALTHY)}
    cases = dice_of(cohort, kept, chosen, 10, n, work)
    table = {s: {f"{c.pathology} {c.patient_id}": [round(c.dice, 5), round(c.auprc, 5), round(c.threshold, 6)] for c in t.itertuples()} for s, t in cases.groupby("score", sort=False)}
    return dict(provenance=provenance(), patients=n, validation=10, healthy=HEALTHY, cases=table)


def of_places(judged: dict) -> dict:
    "{score: {pathology: Dice of its patients, in one order}}."
    return {s: {p: np.array([v[0] for k, v in sorted(cases.items()) if k.startswith(f"{p} ")]) for p in PATHOLOGIES} for s, cases in judged["cases"].items()}


def differences(dice: dict, score: str, other: str):
    "(place, mean difference, interval, higher, lower, p) of each pathology, and of all patients together."
    d = {p: dice[score][p] - dice[other][p] for p in PATHOLOGIES}
    return [(p, v.mean(), bootstrap_interval(v), int((v > 0).sum()), int((v < 0).sum()), paired_test(v, 0 * v)) for p, v in (d | {"all": np.concatenate(list(d.values()))}).items()]


def table(head, rows) -> str: return "\n".join("| " + " | ".join(map(str, r)) + " |" for r in [head, ["---"] * len(head), *rows])


def told(p) -> str: return f"{p['time'][:10]}, commit {str(p['commit'])[:12]}{' with changes' if p['dirty'] else ''}, {p['cores']} cores, Python {p['python']}, torch {p['packages']['torch']}"


def written(all_: dict) -> str:
    places, parts = list(PATHOLOGIES), ["# A score over several restorations, against the plain ones"]
    parts.append("Of virtual patients (study `demo-full`), restored by the DDPM that comes with the package; they say nothing about real ones. No score learned from lesions; which score to take was chosen by Dice on validation patients, and so are the thresholds.")
    if j := all_.get("judge"): parts += judgement_text(j, places)
    if s := all_.get("search"): parts += search_text(s, places)
    return "\n\n".join(parts) + "\n"


SHORT = {OURS: "ours", AGAINST_HEALTHY: "ours over healthy", MEAN: "SSIM-ens of the mean", PLAIN["l1"]: "l1", PLAIN["SSIM-ens"]: "SSIM-ens"}

def verdict(m, corrected) -> str: return "the same" if abs(m) < .0005 else "undecided" if not corrected < .05 else "won" if m > 0 else "lost"


def summary(said, score, peer) -> str:
    "A line: what a score won and lost against another."
    mine = {p: (m, lo, hi, v) for a, b, p, m, lo, hi, v in said if (a, b) == (score, peer)}
    points = lambda p: "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in mine[p][:3]))
    by = {v: [p for p in PATHOLOGIES if mine[p][3] == v] for v in ("won", "lost", "undecided", "the same")}
    return f"- **{SHORT[score]} against {SHORT[peer]}: {mine['all'][3]}** over all patients ({points('all')}); " + "; ".join(f"{v} on {', '.join(f'{NAMES[p].lower()} ({points(p)})' for p in ps)}" for v, ps in by.items() if ps) + "."


def judgement_text(j, places) -> list[str]:
    dice, names = of_places(j), [NAMES[p] for p in places]
    cell = lambda v: f"{100 * v.mean():.1f} [{100 * bootstrap_interval(v)[0]:.0f}, {100 * bootstrap_interval(v)[1]:.0f}]"
    rows = [[(f"**{SHORT[s]}**: {s}" if s in (OURS, AGAINST_HEALTHY, MEAN) else s), *(cell(d[p]) for p in places), f"{100 * np.mean([d[p].mean() for p in places]):.1f}"] for s, d in dice.items()]
    found = [(a, b, *r) for a in (OURS, AGAINST_HEALTHY) for b in PEERS.values() for r in differences(dice, a, b)]
    corrected = holm([f[-1] for f in found])
    said = [(a, b, p, m, lo, hi, verdict(m, c)) for (a, b, p, m, (lo, hi), *_), c in zip(found, corrected)]
    tests = [[SHORT[a], SHORT[b], NAMES.get(p, "all patients"), f"{100 * m:+.1f} [{100 * lo:+.1f}, {100 * hi:+.1f}]", f"{up} / {down}", f"{q:.3f}" if q >= .001 else "<0.001", f"{c:.3f}" if c >= .001 else "<0.001", verdict(m, c)] for (a, b, p, m, (lo, hi), up, down, q), c in zip(found, corrected)]
    return ["## Judged once, on test patients", f"`python benchmarks/ours.py judge OUT {j['patients']}`: {told(j['provenance'])}. {j['patients']} test patients a pathology{' (of 30, for want of CPU time)' * (j['patients'] < 30)}, thresholds from {j['validation']} validation patients each; post-processing and threshold of a study. Chosen before on validation patients, as the best that a study could make then (candidates that did better there, see the last table, need maps of healthy scans, or know which way lesions differ): *ours*, {OURS}: "
            f"in a study `scores: {{names: [l1_ssim]}}` with `restore: {{t_test: [500, 250, 750]}}`. *Ours over healthy* divides it by its mean map over {j['healthy']} healthy validation scans: in a study `scores: {{names: [l1_ssim_healthy]}}`, which takes all that it has. "
            "Other virtual patients than those of [weights.md](weights.md) (another seed), so that the plain scores differ from there, too: l1 on tumours most. On real T1w scans: [real.md](../docs/real.md).", "\n".join(summary(said, a, b) for a in (OURS, AGAINST_HEALTHY) for b in PEERS.values()), "Dice (%), mean over patients, 95 % bootstrap interval:", table(["score", *names, "mean"], rows),
            "Paired differences in Dice points, 95 % bootstrap interval over patients (not corrected), two-sided Wilcoxon signed-rank p, and Holm's over this table; won or lost where Holm's p is below 0.05 (the same: less than 0.05 points apart, as where both are at chance):", table(["score", "minus", "patients with", "difference", "higher / lower in", "p", "p (Holm)", ""], tests)]


def search_text(s, places) -> list[str]:
    mean = lambda v, i: np.mean([v[p][i] for p in places])
    rows = [[f"**{k}**" if k == OURS else k, *(f"{100 * v[p][0]:.1f}, {v[p][1]:.3f}" for p in places), f"{100 * mean(v, 0):.1f}, {mean(v, 1):.3f}"] for k, v in s["scores"].items()]
    return ["## Found on validation patients", f"`python benchmarks/ours.py search OUT`: {told(s['provenance'])}. {s['patients']} validation patients a pathology, disjoint from the test patients; Dice (%) at the best threshold of these same patients, and AUPRC, mean over patients. "
            f"A draw restores from level 500; the levels are {', '.join(map(str, LEVELS))}, one draw each. Healthy scans: {s['healthy']} validation scans of the contrast. So few patients tell large differences only.", table(["score", *(NAMES[p] for p in places), "mean"], rows)]


def keep(part: str = "format", value=FORMAT):
    "Write a part of ours.json, and ours.md anew."
    file = HERE/"ours.json"
    all_ = (json.loads(file.read_text()) if file.exists() else {}) | {part: value}
    write_json(file, all_, FORMAT)
    with atomic_file(HERE/"ours.md") as tmp: tmp.write_text(written(all_))


def main(what, out, n="30"):
    torch.set_num_threads(1)
    out, cohort = Path(out), cohort_in(out)
    kept = Restorations(cohort, out/"restorations")
    if what == "restore":
        rows = list(dict.fromkeys(few(cohort, "val", 10, HEALTHY) + [r for k in (16, 20, 24, 30) if k <= int(n) for r in few(cohort, "test", k)]))
        for i, r in enumerate(rows):
            kept.levels(r)
            if i % 10 == 9: print(f"{i + 1} of {len(rows)}", flush=True)
        for r in few(cohort, "val", SEARCHED): kept.draws(r)
    elif what == "search": keep("search", search(cohort, kept, out/"search"))
    elif what == "judge":
        if (HERE/"ours.json").exists() and "judge" in json.loads((HERE/"ours.json").read_text()): sys.exit(f"{HERE/'ours.json'}: these test patients were judged already: a second choice needs others (another data.seed)")
        keep("judge", once(cohort, kept, out/"judge", int(n)))
    elif what == "write": keep()
    else: sys.exit(f"{what}: is none of restore, search, judge, write")


if __name__ == "__main__": main(*sys.argv[1:])
