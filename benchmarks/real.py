"""What weights say about real scans: python benchmarks/real.py --data DIR [--run RUN] (DIR holds manifest.csv; RUN is the training of `uad run real-t1`). Writes benchmarks/real.json, docs/real.md and docs/real.png;
without --data docs/real.md alone, from benchmarks/real.json (with --run its section on the study anew).

Every scan goes through `scan.score_scan`, as `uad score` does it; thresholds are those of the weights, set on healthy scans. Pictures are of scans whose licence allows it."""
import argparse, json, tempfile
from pathlib import Path
import matplotlib; matplotlib.use("Agg")
import matplotlib.pyplot as plt, numpy as np, pandas as pd, torch
from uad_study.metrics import best_threshold, dice
from uad_study.postprocess import components
from uad_study.prepare import lesion_on_grid, to_native
from uad_study.runs import provenance
from uad_study.scan import judged_share, score_scan
from uad_study.volume import load_mask, load_volume
from uad_study.weights import export_weights, load_weights

HERE = Path(__file__).resolve().parent.parent
IXI = "train_healthy/ixi2mm/"
SCANS = [                                            # name, contrast, scan, lesion mask, state, whether a picture may be shown
    ("TCGA-DU-7294", "T1w", "eval_tumor/TCGA-DU-7294_t1.nii.gz", "eval_tumor/TCGA-DU-7294_seg.nii.gz", "stripped", True),
    ("MSLUB 07", "T1w", "eval_ms/patient07_T1.nii.gz", "eval_ms/masks_mni/patient07_gold.nii.gz", "stripped", True),
    ("MSLUB 26", "T1w", "eval_ms/patient26_T1.nii.gz", "eval_ms/masks_mni/patient26_gold.nii.gz", "stripped", True),
    *((n[:6], "T1w", f"{IXI}{n}-T1_ds.nii.gz", "", "head", False) for n in ("IXI012-HH-1211", "IXI013-HH-1212", "IXI014-HH-1236", "IXI015-HH-1258", "IXI033-HH-1259")),
    ("TCGA-DU-7294", "T2w", "eval_tumor/TCGA-DU-7294_t2.nii.gz", "eval_tumor/TCGA-DU-7294_seg.nii.gz", "stripped", True),
    ("MSLUB 07", "T2w", "eval_ms/patient07_T2.nii.gz", "eval_ms/masks_mni/patient07_gold.nii.gz", "stripped", True),
    ("MSLUB 26", "T2w", "eval_ms/patient26_T2.nii.gz", "eval_ms/masks_mni/patient26_gold.nii.gz", "stripped", True),
    ("stroke", "T2w", "eval_stroke/clinical_T2.nii", "eval_stroke/clinical_T2_lesion.nii", "head", True),
    ("healthy T2w", "T2w", "healthy_t2/allineate_T2w.nii.gz", "", "head", False)]
SHOWN = {"l1": "l1", "ssim_ens": "SSIM-ens", "l1_ssim": "l1 times SSIM-ens"}
READING = """## What is seen

Read on 2026-11-26 from the tables of that day.

Weights that have only seen brains made by a program find the real tumour and the real stroke on T2w, at a threshold that no lesion set, and by SSIM-ens with far less beside the lesion than by l1. On T1w l1 finds a quarter of the
tumour; SSIM-ens is highest there, too, and stays below its threshold. The lesions of multiple sclerosis are missed or drown: they are smaller than what the restoration smooths away; and in the slices of MSLUB 07 the cerebellum is
marked, whose folds the restoration does not draw. In whole heads of other scanners l1 marks 21 to 96 mL that nobody would call a lesion, SSIM-ens 1 to 26 mL: intensities that differ from the training's are errors to l1 first.
l1 times SSIM-ens finds the tumour on T1w as l1 does (33 and 44 % of Dice, with virtual and real weights) and tumour and stroke on T2w as SSIM-ens does (61 and 50), and its best possible Dice is the highest of all there; but in whole heads of
other scanners it marks 16 to 82 mL, hardly less than l1.
Weights of 14 real brains mark more than those of 300 virtual ones in other scanners' heads, and find a little more in the patients. Every real scan of these tables is called *borderline* or *out* by the virtual weights, which is what that verdict is for.
"""
CREDIT = ("TCGA-DU-7294: The Cancer Imaging Archive, TCGA-LGG (CC BY 3.0), segmentation fused from five algorithms. MSLUB 07 and 26: Lesjak et al., Neuroinformatics 2018 (CC BY). "
          "Stroke: the clinical toolbox's tutorial scan (Rorden et al., 2012; BSD).")


def judge(r, lesion):
    "A row per score of a `ScanResult`: mL marked in the scan; with a lesion mask (on the scan's grid) Dice there, and the Dice of the best threshold, which nobody knows."
    rows, plain = [], "intensity_dark" if r.weights.contrast == "T1w" else "intensity"                     # lesions are dark on T1w
    for s in (plain, *SHOWN):
        t = r.weights.thresholds.get(s, np.nan)
        none = s == plain and not t < 1                                                                        # healthy scans reach its largest value, too: no threshold keeps them clear
        found = to_native(components(r.maps[s] > t, r.weights.scores.min_voxels), r.prepared)
        row = dict(score=s, threshold=np.nan if none else t, ml=np.nan if none else float(found.sum() * abs(np.linalg.det(r.scan.affine[:3, :3])) / 1000))
        if lesion is not None:
            anomaly = to_native(r.maps[s], r.prepared)
            row |= dict(dice=np.nan if none else float(dice(found, lesion.data)), oracle=float(best_threshold(anomaly, lesion.data)[1]))
        rows.append(row)
    return rows


def picture(cases, file):
    "A row per case: scan, restoration, the maps with the found and the true outline, at the slice with most lesion."
    fig, axes = plt.subplots(len(cases), 2 + len(SHOWN), figsize=(2.05 * (2 + len(SHOWN)), 2.2 * len(cases)), dpi=100, squeeze=False, layout="constrained")
    for i, (row, (name, r, lesion)) in enumerate(zip(axes, cases)):
        on_grid = lesion_on_grid(lesion, r.prepared.brain_mask, r.prepared.to_atlas, r.prepared.grid_affine)[0]
        z = int(on_grid.sum((0, 1)).argmax())
        cut = lambda a: np.asarray(a)[:, :, z].T
        for ax, (s, title, a, kw) in zip(row, [("", title, np.where(r.prepared.brain_mask, a, 0), dict(cmap="gray", vmin=0, vmax=1)) for title, a in (("scan", r.prepared.image), ("restored", r.reconstruction))]
                                         + [(s, title, r.maps[s], dict(cmap="inferno", vmin=0)) for s, title in SHOWN.items()]):
            ax.imshow(cut(a), origin="lower", **kw); ax.set_xticks([]); ax.set_yticks([])
            if i == 0: ax.set_title(title, fontsize=9)
            if title == "scan": ax.contour(cut(on_grid), [.5], colors="#56b4e9", linewidths=.9)
            if s:
                found = components(r.maps[s] > r.weights.thresholds[s], r.weights.scores.min_voxels)
                if found[:, :, z].any(): ax.contour(cut(found), [.5], colors="w", linewidths=.7)
                ax.contour(cut(on_grid), [.5], colors="#56b4e9", linewidths=.7)
        row[0].set_ylabel(name, fontsize=8)
    fig.savefig(file, metadata={"Software": None}); plt.close(fig)


def run(data, trained):
    rows, cases, real = [], [], None
    if trained:
        with tempfile.TemporaryDirectory() as place:
            export_weights(trained, Path(place)/"real", "real", scoring=dict(names=["intensity", *SHOWN]))
            real = load_weights(Path(place)/"real")
    for name, contrast, file, lesion, state, show in SCANS:
        scan = load_volume(data/file)
        truth = load_mask(data/lesion, like=scan) if lesion else None
        for source, w in [("virtual", load_weights("ddpm", contrast))] + ([("real", real)] if real and contrast == "T1w" else []):
            r = score_scan(scan, w, state=state)
            common = dict(scan=name, contrast=contrast, weights=source, verdict=r.distance["verdict"], healthy=r.weights.card["healthy"]["n"], judged=judged_share(r.prepared, r.weights.scores.erode), error=r.distance["error"]["value"], error_largest=r.distance["error"]["largest"], seconds=sum(r.seconds.values()),
                          lesion_ml=float(truth.data.sum() * abs(np.linalg.det(scan.affine[:3, :3])) / 1000) if truth else None)
            rows += [common | j for j in judge(r, truth)]
            print(*(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
            if show and source == "virtual": cases.append((f"{name}, {contrast}", r, truth))
    return pd.DataFrame(rows), cases


def study(run) -> str:
    "What the study of the training found, as a section; '' without it."
    if not run: return ""
    from uad_study.results import NAMES, open_results
    r = open_results(run.parent)
    said = lambda v: f"{100 * v.dice:.1f}" + ("" if v.dice_lo != v.dice_lo else f" [{100 * v.dice_lo:.0f}, {100 * v.dice_hi:.0f}]")
    rows = [(f"*{'virtual' if 'virtual' in m else 'real'}*, {label}", [said(t.iloc[0]) if len(t := r.rows(model=m, score=k, pathology=p)) else "" for p in r.pathologies]) for m in r.models for k, label in (("l1", "l1"), ("ssim_ens", "SSIM-ens"))]
    rows += [(f"*{'virtual' if 'virtual' in m else 'real'}*, mean of three noise levels, {label}", [said(t.iloc[0]) if len(t := r.rows(model=m, score=k, pathology=p)) else "" for p in r.pathologies]) for m in r.variants for k, label in SHOWN.items()]
    rows = [("plain intensity, dark", [said(r.rows(model=r.models[0], score="intensity_dark", pathology=p).iloc[0]) for p in r.pathologies]), *rows]
    return "\n".join(["## The study", "", f"`uad run real-t1`: threshold from semi-synthetic lesions in two people, Dice (%) on the study's grid, in brackets 95 % intervals over people. All tables: [real-t1](../benchmarks/real-t1.md).", "",
                      "| | " + " | ".join(NAMES.get(p, p) for p in r.pathologies) + " |", "|" + " --- |" * (1 + len(r.pathologies)), *("| " + " | ".join([n, *c]) + " |" for n, c in rows), "",
                      "*Mean of three noise levels*: restored from levels 250, 500 and 750 and averaged; l1 times SSIM-ens of it is what did best on virtual validation patients ([ours](../benchmarks/ours.md)). Four people with semi-synthetic lesions, two with multiple sclerosis, one with a tumour: too few to tell scores apart. (The tables above judge the written maps on each scan's own grid, by thresholds of healthy scans alone.)", ""])


def page(t, p, of_study) -> str:
    number = lambda v, f=".1f": "none" if v is None or v != v else format(v, f)
    healthy = t.groupby("weights", sort=False).healthy.first()
    named = dict(virtual="*virtual*", real="*real*")
    def table(rows, lesions):
        head = ["scan", "weights", "like the training?", "judged (%)", *(["lesion (mL)"] if lesions else []), *(f"{s}: " + ("Dice, best possible, mL marked" if lesions else "mL marked") for s in ("plain intensity", *SHOWN.values()))]
        out = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        for (n, c, w), g in rows.groupby(["scan", "contrast", "weights"], sort=False):
            cells = [f"{number(100 * r.dice)}, {number(100 * r.oracle)}, {number(r.ml)}" if lesions else number(r.ml) for r in g.itertuples()]
            out.append("| " + " | ".join([f"{n}, {c}", w, g.verdict.iloc[0], number(100 * g.judged.iloc[0], ".0f"), *([number(g.lesion_ml.iloc[0])] if lesions else []), *cells]) + " |")
        return "\n".join(out)
    return f"""# Real scans: what the weights say

`python benchmarks/real.py --data DIR --run RUN`, {p['time'][:10]}, commit {str(p['commit'])[:12]}{' with changes' if p['dirty'] else ''}, {p['cores']} cores, torch {p['packages']['torch'].split('+')[0]}. The numbers: [real.json](../benchmarks/real.json).

Weights: *virtual* are those that come with this package (a DDPM of 1.2 million parameters, trained on 300 brains that a program made); *real* is the same network trained on healthy T1w scans of the OASIS subjects by `uad run real-t1`
(they are not part of this package). Thresholds are set on healthy scans of the weights' own kind ({', '.join(f"{n} for {named[w]}" for w, n in healthy.items())}), no lesion was seen; plain intensity has none, for it reaches its largest value in healthy brains.
*Best possible* is the highest Dice of any threshold on the written map, which nobody knows beforehand; a hair below the own threshold's in places, for the marks are made on the grid of 2 mm, without small components, and then carried back. Dice in percent, on the scan's own grid; *judged* is the share of the brain that was looked at.
A handful of scans supports no claim; they show what happens.

## With a lesion

{table(t[t.lesion_ml.notna()], True)}

## Without

{table(t[t.lesion_ml.isna()], False)}

What is marked in these is false (the T2w scan looks normal; nobody vouches for it).

{READING}
{of_study}
## Pictures

![Scan, restoration, and maps of the virtual weights](real.png)

Blue: the lesion mask; white: above the threshold. Slices with most lesion. {CREDIT}
"""


if __name__ == "__main__":
    a = argparse.ArgumentParser(); a.add_argument("--data", type=Path); a.add_argument("--run", type=Path); a = a.parse_args()
    torch.set_num_threads(2)
    kept = HERE/"benchmarks"/"real.json"
    if a.data:
        t, cases = run(a.data, a.run)
        p = provenance()
        kept.write_text(json.dumps(dict(format="uad-benchmark-real/1", provenance={k: p[k] for k in ("time", "commit", "dirty", "cores", "packages")}, rows=json.loads(t.round(5).to_json(orient="records")), study=study(a.run)), indent=1) + "\n")
        picture(cases, HERE/"docs"/"real.png")
    made = json.loads(kept.read_text())
    if a.run and not a.data: kept.write_text(json.dumps(made := made | dict(study=study(a.run)), indent=1) + "\n")
    (HERE/"docs"/"real.md").write_text(page(pd.DataFrame(made["rows"]), made["provenance"], made["study"]))
