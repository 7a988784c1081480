"""The tables of a finished study as Markdown, to be kept in the repo: python benchmarks/study.py OUT NAME. Writes benchmarks/NAME.md from the results in the folder OUT, and of a study of three models or more docs/NAME.png and docs/NAME-cost.png."""
import re, shutil, sys
from pathlib import Path
from uad_study.results import NAMES, open_results, score_label
from uad_study.tables import cautions, table_cost, table_dice, table_false_positives, table_matrix, table_restorations, table_tests, table_thresholds, table_variants


def markdown(cells) -> str:
    bold = lambda text: re.sub(r"^([^*\[]+)\*( \[.*)?$", r"**\1**\2", text)                          # a table's mark for the best
    head, *body = [[bold(str(c).replace("|", "\\|")) if i else str(c) for c in line] for i, line in enumerate(cells)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body))


def folded(note: str, most: int = 600) -> str:
    "A long note of many items, closed behind its beginning."
    return note if len(note) <= most else f"<details><summary>{note[:note.rfind(';', 0, most)]}; and {note.count(';') - note[:note.rfind(';', 0, most)].count(';')} more</summary>{note}</details>"


def auprc(r) -> list[list[str]]:
    "Pooled AUPRC of each score, and the prevalence."
    cells = [["model", "score", *(NAMES.get(p, p) for p in r.pathologies)]]
    for m in r.models:
        for s in ("intensity", "intensity_dark", "l1", "l2", "ssim_0.3", "ssim_0.9", "ssim_1.7", "ssim_uniform", "ssim_ens"):
            line = [t.auprc_pooled.mean() if len(t := r.rows(model=m, score=s, pathology=p)) else None for p in r.pathologies]
            if any(v is not None for v in line): cells.append([m, score_label(s), *("" if v is None else f"{v:.3f}" for v in line)])
    return [*cells, ["", "prevalence", *(f"{r.rows(pathology=p, model=r.models[0]).prevalence.mean():.3f}" for p in r.pathologies)]]


def matrix(r, out, name) -> list[str]:
    "The matrix as a section, its two figures copied to docs; [] for a study of fewer than three models."
    if len(r.models) < 3 or not (t := table_matrix(r)).rows or not all((Path(out)/"figures"/f"{k}.png").is_file() for k in ("matrix", "cost")): return []
    docs = Path(__file__).parents[1]/"docs"
    for figure, copy in (("matrix", f"{name}.png"), ("cost", f"{name}-cost.png")): shutil.copyfile(Path(out)/"figures"/f"{figure}.png", docs/copy)
    return ["## Which model, which score, at what cost?", "Hours and seconds are of a machine that did other work, too, at some times more than at others: not to be compared between models. By the processor's time: [matrix-hours](matrix-hours.md).", f"![Every model with every score on every pathology, and what it costs](../docs/{name}.png)", f"![Dice against seconds a volume and parameters](../docs/{name}-cost.png)", markdown(t), *t.notes, markdown(table_cost(r)), *table_cost(r).notes]


def lengths(r) -> list[list[str]]:
    "Dice of l1 and SSIM-ens on a few test volumes at each snapshot of the trainings, each with its own threshold from validation."
    steps = sorted(r.steps.step.unique()) if len(r.steps) else []
    cells = [["model", "pathology", "score", *(f"step {s}" for s in steps)]]
    for (m, p, s), g in r.steps.groupby(["model", "pathology", "score"], sort=False) if steps else ():
        if m in r.models: cells.append([m, NAMES.get(p, p), score_label(s), *(f"{100 * x.dice.mean():.1f}" if len(x := g[g.step == k]) else "" for k in steps)])
    return cells


def main(out, name):
    r = open_results(out)
    p, notes = r.evaluations[0]["provenance"], cautions(r)
    commits = " and ".join(dict.fromkeys(str(q["provenance"]["commit"])[:12] + (" with changes" if q["provenance"]["dirty"] else "") for q in r.trainings + r.evaluations if q))
    unique = {t["key"]: t for t in r.trainings if t}.values()
    trainings = [["training", "parameters", "steps", "best step", "validation loss", "minutes"], *([t["label"], f"{q['parameters']:,}", q["steps"], q["best_step"], f"{q['best_val_loss']:.4f}", f"{q['train_seconds'] / 60:.1f}"] for t in unique for q in [t["results"]])]
    parts = [f"# {r.title}", f"`uad run {r.study}`, then `python benchmarks/study.py OUT {name}`: {p['time'][:10]}, commit {commits}, {p['device']}, {p['cores']} cores, torch {p['packages']['torch']}. "
             "Other work may have run beside it: minutes are an upper bound.", "\n".join(f"- {folded(n)}" for n in notes), *matrix(r, out, name), "## Dice (%)", markdown(table_dice(r)), *table_dice(r).notes, "## SSIM-ens against l1", markdown(table_tests(r)),
             "## AUPRC, pooled", markdown(auprc(r)), "## Thresholds", markdown(table_thresholds(r)), "## False marks in healthy scans", markdown(table_false_positives(r)), "## Restorations", markdown(table_restorations(r))]
    val = r.restorations[(r.restorations.split == "val") & (r.restorations.pathology == "healthy")].groupby(["model", "contrast"], sort=False)[["l1", "ssim"]].mean()
    parts += ["Healthy validation volumes:", markdown([["model", "contrast", "l1 (brain)", "SSIM (sigma 1.5)"], *([m, c, f"{v.l1:.4f}", f"{v.ssim:.3f}"] for (m, c), v in val.iterrows())])]
    if len(r.steps) and r.steps.groupby("model").step.nunique().max() > 1: parts += ["## Dice (%) against the length of training", f"On {r.steps.groupby(['model', 'pathology', 'step']).n_test.first().max()} test volumes a pathology.", markdown(lengths(r))]
    if r.variants: parts[3:3] = ["## What matters", "![Paired differences with 95 % intervals](../docs/ablation.png)" if name == "ablation" else "", markdown(table_variants(r)), "In brackets: mean paired difference to the base in Dice points: 95 % bootstrap interval over patients, one seed, not corrected for the number of comparisons."]
    parts += ["## Trainings", markdown(trainings)]
    (Path(__file__).parent/f"{name}.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__": main(*sys.argv[1:3])
