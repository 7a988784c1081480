"""One volume judged whole, against the same written plainly with torchmetrics, scipy, scikit-image and scikit-learn: python benchmarks/judge.py. Writes benchmarks/judge.md.

l1, l2, SSIM at eight sigmas, SSIM-ens and the uniform mean; erosion, 5x5x5 median, exact best threshold, removal of components, Dice, AUPRC. The results are compared first."""
import time
from pathlib import Path
import numpy as np, torch
from scipy.ndimage import binary_erosion, gaussian_filter, median_filter
from skimage.morphology import remove_small_objects
from sklearn.metrics import average_precision_score, precision_recall_curve
from torchmetrics.functional.image import structural_similarity_index_measure
from uad_study import phantom
from uad_study.metrics import auprc, best_threshold, dice
from uad_study.postprocess import components, postprocess
from uad_study.runs import provenance
from uad_study.scores import SIGMAS, kernel_size, score_maps

NAMES = ("l1", "l2", *(f"ssim_{s:g}" for s in SIGMAS), "ssim_uniform", "ssim_ens")


def ours(x, x_hat, brain, truth) -> np.ndarray:
    "(scores, 3): threshold, Dice, AUPRC."
    maps = score_maps(x, x_hat, NAMES)
    done = postprocess(np.stack([maps[n] for n in NAMES]), brain)
    inside, out = truth[brain], []
    for m in done:
        scores = m[brain]
        t, _ = best_threshold(scores, inside)
        out.append((t, dice(components(m > t), truth), auprc(scores, inside)))
    return np.array(out)


def torchmetrics_ssims(x, x_hat) -> dict:
    "The SSIM image of each sigma."
    a, b = (torch.from_numpy(v)[None, None] for v in (x, x_hat))
    L = float(max(a.max() - a.min(), b.max() - b.min()))
    return {s: structural_similarity_index_measure(a, b, sigma=float(s), kernel_size=kernel_size(s), data_range=L, gaussian_kernel=True, return_full_image=True)[1][0, 0].numpy() for s in SIGMAS}


def plain(x, x_hat, brain, truth) -> np.ndarray:
    ssim = torchmetrics_ssims(x, x_hat)
    S = np.stack(list(ssim.values())); w = np.exp(-S); w /= w.sum(0)
    maps = [np.abs(x - x_hat), (x - x_hat)**2, *(1 - s for s in ssim.values()), 1 - S.mean(0), 1 - (w * S).sum(0)]
    cross = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], bool)[:, :, None]
    eroded, out = binary_erosion(brain, cross, iterations=3), []
    inside = truth[brain]
    for m in maps:
        m = median_filter((m * eroded).astype(np.float32), 5)
        scores = m[brain]
        precision, recall, thresholds = precision_recall_curve(inside, scores)
        f = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        t = thresholds[f[:-1].argmax()]
        p = remove_small_objects(m >= t, max_size=7, connectivity=3)
        out.append((t, 2 * (p & truth).sum() / (p.sum() + truth.sum()), average_precision_score(inside, scores)))
    return np.array(out)


def scene() -> tuple:
    "Image, reconstruction, brain mask and truth of a virtual patient."
    s = phantom.diseased(1, "ms")
    return s.images["T2w"], (gaussian_filter(s.twins["T2w"], .6) * s.brain_mask).astype(np.float32), s.brain_mask, s.lesion_mask


def agree(mine, theirs) -> np.ndarray:
    "The largest difference in Dice and in AUPRC, which must be small."
    d = np.abs(mine - theirs)[:, 1:].max(0)
    assert d[0] < 2e-3 and d[1] < 2e-4, d
    return d


def main(n=3):
    args, rows = scene(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        times = {}
        for f in (ours, plain):
            each = []
            for _ in range(n): t = time.perf_counter(); result = f(*args); each.append(time.perf_counter() - t)
            times[f] = min(each), result
        (a, mine), (b, theirs) = times[ours], times[plain]
        rows.append((threads, a, b, agree(mine, theirs)))
    p = provenance()
    lines = [f"Measured by `python benchmarks/judge.py`, {p['time'][:10]}, commit {str(p['commit'])[:12]}{' with changes' if p['dirty'] else ''}: {p['cores']} cores ({p['machine']}), Python {p['python']}, torch {p['packages']['torch']}. Best of {n}.", "",
             f"One volume of 96x96x50 judged whole by {len(NAMES)} scores: maps, erosion, median, exact best threshold, components, Dice, AUPRC. Peer: torchmetrics, scipy, scikit-image, scikit-learn, written plainly.", "",
             "| threads | ours, s | peer, s | ratio | largest difference in Dice | in AUPRC |", "|---|---|---|---|---|---|", *(f"| {k} | {a:.2f} | {b:.2f} | {b / a:.1f} | {d[0]:.1e} | {d[1]:.1e} |" for k, a, b, d in rows), ""]
    (Path(__file__).parent/"judge.md").write_text("\n".join(lines)); print("\n".join(lines))


if __name__ == "__main__": main()
