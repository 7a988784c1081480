"""Measure the preparation of scans: python benchmarks/prepare.py --data DIR (DIR holds manifest.csv; no part needs all of it). Writes benchmarks/prepare.md; -k NAME runs one part and only prints."""
import argparse, platform, resource, tempfile, time
from functools import partial
from pathlib import Path
import numpy as np, pandas as pd
from nibabel.affines import apply_affine
from scipy.spatial.transform import Rotation
from uad_study import phantom
from uad_study.dataset import prepare_dataset
from uad_study.manifest import read_manifest
from uad_study.prepare import PrepareConfig, _resample, bias_field, find_brain, largest_component, lesion_on_grid, load_template, prepare_scan, sample, to_native
from uad_study.runs import parallel_map
from uad_study.volume import GRID_AFFINE, GRID_SHAPE, Volume, load_mask, load_volume, save_volume

PLAIN = PrepareConfig(n4=False)
MOVES = {"LPS": ((20, 0, 0), (20, 0, 0)), "RAS": ((0, -20, 0), (0, -20, 0)), "PSR": ((0, 0, 20), (0, 0, 20)), "oblique": ((-12, 10, 12), (-10, 12, 10)), "1x1x3": ((12, -12, 10), (10, 10, -14))}


def dice(a, b): return 2 * (a & b).sum() / (a.sum() + b.sum())


def rigid(degrees, mm, stretch=1.0):
    m = np.eye(4); m[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() * stretch; m[:3, 3] = mm
    return m


def healthy(data, n=3):
    "The first `n` skull-stripped OASIS scans and their masks."
    t = read_manifest(Path(data)/"manifest.csv")
    masks = t[t.kind == "brainmask"].set_index("subject").file
    for r in t[(t.category == "healthy") & (t.kind == "image") & t.subject.isin(masks.index)].sort_values("subject").head(n).itertuples():
        scan = load_volume(Path(data)/r.file)
        yield r.subject, scan, load_mask(Path(data)/masks[r.subject], like=scan)


def stored(scan, mask, how, move, folder):
    "Scan and mask moved by `move` (scan mm to new mm), written as `how` says, and read again."
    if how == "oblique": pairs = [(v.data, move @ v.affine, "RAS") for v in (scan, mask)]
    else:
        corners = apply_affine(move @ scan.affine, np.indices((2, 2, 2)).reshape(3, -1).T * (np.array(scan.data.shape) - 1))
        box = np.eye(4); box[:3, 3] = np.floor(corners.min(0))
        shape = 3 * np.ceil((corners.max(0) - box[:3, 3]) / 3).astype(int)
        x, m = (_resample(v.data, v.affine, move, box, shape, 1) for v in (scan, mask))
        if how == "1x1x3":
            x, m = (v.reshape(*shape[:2], -1, 3).mean(3) for v in (x, m))
            box = box @ np.array([[1., 0, 0, 0], [0, 1, 0, 0], [0, 0, 3, 1], [0, 0, 0, 1]])
        pairs = [(x, box, "RAS" if how == "1x1x3" else how), (m >= .5, box, "RAS" if how == "1x1x3" else how)]
    for (d, a, axes), name in zip(pairs, ("scan", "mask")): save_volume(f"{folder}/{name}.nii.gz", d, a, axes)
    scan = load_volume(f"{folder}/scan.nii.gz")
    return scan, load_mask(f"{folder}/mask.nii.gz", like=scan)


def known_truth(data, n=3):
    "Mean displacement (mm) inside the brain, of a moved scan's transform against the unmoved scan's own: (subject, storage, mean, largest)."
    for subject, scan, mask in healthy(data, n):
        brain = largest_component(mask.data)
        points = apply_affine(scan.affine, np.argwhere(brain)[::53])
        reference = apply_affine(prepare_scan(scan, mask, config=PLAIN).to_atlas, points)
        for how, (degrees, mm) in MOVES.items():
            move = rigid(degrees, mm)
            with tempfile.TemporaryDirectory() as tmp: p = prepare_scan(*stored(scan, mask, how, move, tmp), config=PLAIN)
            off = np.linalg.norm(apply_affine(p.to_atlas @ move, points) - reference, axis=1)
            yield subject, how, off.mean(), off.max()


def round_trip(data, ways=("area",), back=((1, .4),), n=32):
    """Dice of real lesion masks, native to grid to native, through an affine (some 6 degrees, 8 % larger): (kind, file, mL, {(way, order, level): Dice}). All MS masks and `n` stroke ones, evenly
    from the list; lesions of which a tenth or more lies outside the grid are left out."""
    t = read_manifest(Path(data)/"manifest.csv")
    t = t[t.kind.str.startswith("lesion_mask") & t.category.isin(["MS", "stroke"]) & ~t.file.str.contains("clinical")].sort_values("file")
    stroke = t[t.category == "stroke"]
    everything, to_atlas = np.ones(GRID_SHAPE, bool), rigid((4, -3, 4), (3, -4, 2), 1.08)
    for r in [*t[t.category == "MS"].itertuples(), *stroke.iloc[::max(1, len(stroke) // n)].itertuples()]:
        whole = load_mask(Path(data)/r.file); row = {}
        where = np.argwhere(whole.data); low = np.maximum(where.min(0) - 8, 0)                              # its surroundings are enough, and quicker
        lesion = Volume(whole.data[tuple(slice(a, b) for a, b in zip(low, where.max(0) + 9))], whole.affine.copy()); lesion.affine[:3, 3] = apply_affine(whole.affine, low)
        for way in ways:
            on_grid, v = lesion_on_grid(lesion, everything, to_atlas, how=way)
            fine = dict(to_atlas=to_atlas, grid_affine=GRID_AFFINE, grid_shape=GRID_SHAPE, scan_affine=lesion.affine, scan_shape=lesion.data.shape)
            maps = {order: to_native(on_grid.astype(np.float32), fine, order=order) for order, _ in back}
            row |= {(way, order, level): dice(maps[order] >= level, lesion.data) for order, level in back}
        if v["lesion_lost"] < .1: yield r.category, r.file, v["lesion_ml_scan"], row


def brain_masks(data, methods=("deepbet", "atlas")):
    "Dice of brain masks of the IXI heads against their automatic labels (> 0): (subject, method, Dice, seconds)."
    t = read_manifest(Path(data)/"manifest.csv")
    labels = t[t.kind.str.startswith("anat_labels")].set_index("subject").file
    for r in t[(t.kind == "image") & t.subject.isin(labels.index)].itertuples():
        head = load_volume(Path(data)/r.file); truth = load_volume(Path(data)/labels[r.subject]).data > 0
        for m in methods:
            clock = time.perf_counter(); mask = find_brain(head, m)[0]
            yield r.subject, m, dice(mask, truth), time.perf_counter() - clock


def field():
    "A known multiplicative field on the grid, some 10 % standard deviation."
    i, j, k = (np.linspace(-1, 1, n) for n in GRID_SHAPE)
    return np.exp(.25 * (i[:, None, None] + .6 * j[None, :, None]**2 - .7 * k * i[:, None, None]))


def n4(seeds=(1, 2, 3), config=PrepareConfig(n4_shrink=2)):
    "Correlation of the field found by N4 with a known one, inside the mask of virtual heads: (contrast, seed, of the field found, of its ratio to the one found without)."
    b = field()
    for c in ("T1w", "T2w"):
        for s in seeds:
            h = phantom.healthy(s, (c,)); m = h.brain_mask; x = (h.images[c] + .05) * m
            with_, without = (bias_field(v, m, config, GRID_AFFINE) for v in (x * b, x))
            yield c, s, np.corrcoef(with_[m], b[m])[0, 1], np.corrcoef((with_ / without)[m], b[m])[0, 1]


def seconds(data, mm=(2, 1)):
    "Wall seconds of each step for one stripped 1 mm scan and one head, at template_mm 2 and 1, and the mean distance inside the brain between the two transforms."
    subject, scan, mask = next(healthy(data, 1))
    found = []
    for k in mm:
        p = prepare_scan(scan, mask, config=PrepareConfig(template_mm=k)); found.append(p.to_atlas)
        points = apply_affine(scan.affine, np.argwhere(mask.data)[::53])
        apart = np.linalg.norm(apply_affine(found[0], points) - apply_affine(found[-1], points), axis=1).mean()
        yield f"template_mm {k}", *(p.meta[f"seconds_{s}"] for s in ("mask", "register", "resample", "n4")), p.meta["mask_dice"], apart


def workers(data, counts=(1, 2), n=6):
    "A data set of `n` stripped scans through `prepare_dataset`, as `uad prepare` does it: (workers, wall seconds a scan, GB of the largest process so far)."
    t = read_manifest(Path(data)/"manifest.csv")
    masks = t[t.kind == "brainmask"].set_index("subject").file
    t = t[(t.category == "healthy") & (t.kind == "image") & t.subject.isin(masks.index)].sort_values("subject").head(n)
    table = pd.DataFrame([dict(dataset="bench", subject_id=r.subject, contrast="T1w", pathology="healthy", split="train", val_fold=-1, image=r.file, brain_mask=masks[r.subject], lesion_mask="", through="",
                               state="stripped", space="", ignore="") for r in t.itertuples()])
    for k in counts:
        with tempfile.TemporaryDirectory() as out:
            clock = time.perf_counter()
            done = prepare_dataset(table, data, out, pmap=partial(parallel_map, workers=k))
            assert (done.error == "").all(), done.error.tolist()
            yield k, (time.perf_counter() - clock) / len(table), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6


def summary(data, parts):
    "The lines of the report."
    if "known_truth" in parts:
        rows = list(known_truth(data))
        yield "| known truth: stored as | mean displacement, mm (worst subject) | largest |\n|---|---|---|"
        for how in MOVES: yield f"| {how} | {np.mean([r[2] for r in rows if r[1] == how]):.2f} ({max(r[2] for r in rows if r[1] == how):.2f}) | {max(r[3] for r in rows if r[1] == how):.2f} |"
    if "round_trip" in parts:
        ways, back = ("area", "nearest", "any"), ((1, .5), (1, .4), (0, .5))
        rows = list(round_trip(data, ways, back))
        stroke = [r for r in rows if r[0] == "stroke"]
        groups = {"stroke, above 10 mL": [r for r in stroke if r[2] > 10], "stroke, 1 to 10 mL": [r for r in stroke if 1 <= r[2] <= 10], "MS": [r for r in rows if r[0] == "MS"]}
        columns = [(w, o, l) for w in ways for o, l in back]
        yield "\n| round trip of lesion masks: mean Dice (least) | masks | " + " | ".join(f"{w}, back {f'linear > {l}' if o else 'nearest'}" for w, o, l in columns) + " |\n|---|---|" + "---|" * len(columns)
        for name, g in groups.items(): yield f"| {name} | {len(g)} | " + " | ".join(f"{np.mean([r[3][c] for r in g]):.3f} ({min(r[3][c] for r in g):.2f})" for c in columns) + " |"
    if "brain_masks" in parts:
        rows = list(brain_masks(data))
        yield "\n| brain mask of IXI heads, 2 mm | Dice, mean | least | seconds |\n|---|---|---|---|"
        for m in ("deepbet", "atlas"): d = [r[2] for r in rows if r[1] == m]; yield f"| {m} | {np.mean(d):.3f} | {min(d):.3f} | {np.mean([r[3] for r in rows if r[1] == m]):.1f} |"
    if "n4" in parts:
        yield "\n| N4, a known field on virtual heads | correlation | least | of the ratio to the field found without |\n|---|---|---|---|"
        for name, config in {"three levels of 50, tolerance 1e-3 (default)": {}, "four of 200, 5e-4 (released code)": dict(n4_iterations=(200,) * 4, n4_tolerance=5e-4)}.items():
            rows = list(n4(config=PrepareConfig(n4_shrink=2, **config)))
            for c in ("T1w", "T2w"):
                r = np.array([r[2:] for r in rows if r[0] == c])
                yield f"| {c}, {name} | {r[:, 0].mean():.3f} | {r[:, 0].min():.3f} | {r[:, 1].mean():.3f} |"
    if "seconds" in parts:
        yield "\n| one stripped scan of 1 mm, one thread: seconds | brain mask | registration | resampling | N4 | overlap with the atlas | mm to the first row's transform |\n|---|---|---|---|---|---|---|"
        for name, *numbers in seconds(data): yield f"| {name} | " + " | ".join(f"{v:.1f}" for v in numbers[:4]) + f" | {numbers[4]:.3f} | {numbers[5]:.2f} |"
    if "workers" in parts:
        yield "\n| six stripped scans, `prepare_dataset` with its own start-up | wall seconds a scan | GB, largest process |\n|---|---|---|"
        for k, s, gb in workers(data): yield f"| {k} worker{'s' * (k > 1)} | {s:.1f} | {gb:.2f} |"


if __name__ == "__main__":
    parts = ("known_truth", "round_trip", "brain_masks", "n4", "seconds", "workers")
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--data", required=True); p.add_argument("-k", choices=parts)
    a, lines = p.parse_args(), []
    for line in summary(a.data, [a.k] if a.k else parts): print(line, flush=True); lines.append(line)
    head = f"# Preparation, measured\n\n`python benchmarks/prepare.py --data DIR` on {platform.machine()}, Python {platform.python_version()}, one thread.\n\n"
    if not a.k: (Path(__file__).parent/"prepare.md").write_text(head + "\n".join(lines) + "\n")
