"""How cost grows with subjects, slices, sigmas, image size and devices, and what 100,000 scans would cost: python benchmarks/growth.py [TABLE ...].

Each line is measured in a process of its own, with one thread. The figures go to benchmarks/growth.json, and all tables that it holds to benchmarks/growth.md; a table can be measured again by itself."""
import argparse, json, os, subprocess, sys, tempfile, threading, time
from pathlib import Path
import numpy as np, psutil

HERE = Path(__file__).parent
POINTS = dict(subjects=(10, 100, 1000), slices=(10, 50, 250, 1000), sigmas=(1, 2, 4, 8, 16, 32), sizes=(96, 128, 192, 256), devices=(1, 2))
ALL_SCORES = 100                # of so many patients all scores are judged as well


def own_mb() -> float:
    "MB of memory of this process and its children; pages of mapped files, which the system may drop at any time, are not counted."
    total = 0
    for p in (me := psutil.Process(), *me.children(recursive=True)):
        try: total += int(next(x for x in Path(f"/proc/{p.pid}/status").read_text().splitlines() if x.startswith("RssAnon")).split()[1]) / 1024
        except (OSError, StopIteration): pass                                               # it has just ended
    return total

def cost(f, repeat: int = 1) -> dict:
    "Seconds of `f` (the best of `repeat`), and the MB by which the process's own memory grew at its peak (looked at every 20 ms)."
    before, seen, times, over = own_mb(), [], [], threading.Event()
    def watch():
        while not over.wait(.02): seen.append(own_mb())
    watcher = threading.Thread(target=watch); watcher.start()
    try:
        for _ in range(repeat): t = time.perf_counter(); f(); times.append(time.perf_counter() - t)
    finally: over.set(); watcher.join()
    return dict(seconds=min(times), mb=max([*seen, own_mb()]) - before)

def demo_model():
    from uad_study.models import build_model, model_config, placed
    from uad_study.runs import read_study
    return placed(build_model(model_config(read_study("demo").entries[0].model)), "cpu").eval()

def on_disk(folder: Path) -> dict:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return dict(files=len(files), bytes=sum(p.stat().st_size for p in files))


def subjects(n: int, place: Path) -> dict:
    "`n` healthy subjects made and packed (one contrast); training steps that draw from them; `n` patients judged (ten made, and packed again and again)."
    from uad_study import phantom
    from uad_study.cohort import Cohort, DataConfig, Item, build_virtual, write_cohort
    from uad_study.judge import ScoreConfig, judge
    from uad_study.models import model_config
    from uad_study.scores import score_maps
    from uad_study.train import TrainConfig, train
    phantom.healthy(0, ("T2w",))                                                            # the atlas is made once
    out = dict(build=cost(lambda: build_virtual(DataConfig(contrasts=("T2w",), pathologies=("tumour",), folds=1, n_train=n - 2, n_val=1, n_test=1, n_lesion_val=1, n_lesion_test=1), place/"healthy")))
    out |= on_disk(place/"healthy")
    out["open"] = cost(lambda: Cohort(place/"healthy"))
    small = model_config(dict(name="ae", channels=(8, 16), latent=16))
    times = []
    def tick(*_, **__): times.append(time.perf_counter())
    whole = cost(lambda: train(Cohort(place/"healthy"), "T2w", 0, small, TrainConfig(steps=200, batch_size=8, val_every=10**6, val_slices=8, checkpoint_minutes=60), place/"train", tick=tick))
    out["step"] = dict(seconds=float(np.median(np.diff(times[20:200]))), mb=whole["mb"])
    ten = [phantom.diseased(i, "tumour") for i in range(10)]
    items = (Item(dict(subject_id=f"p{i}", contrast="T2w", pathology="tumour", split="val" if i < max(1, n // 10) else "test", val_fold=-1), (p := ten[i % 10]).images["T2w"], p.brain_mask, p.lesion_mask, p.twins["T2w"]) for i in range(n))
    out["pack"] = cost(lambda: write_cohort(place/"patients", items, n))
    c = Cohort(place/"patients")
    def maps(row): yield np.abs(np.asarray(c.images[row], np.float32) - np.asarray(c.twins[row], np.float32) * np.float32(.9))
    out["judge"] = cost(lambda: judge(c, "T2w", 0, maps, ("l1",), ScoreConfig(names=("l1",)), place/"work", "plain"))
    if n == ALL_SCORES: out["judge_all"] = cost(lambda: judge(c, "T2w", 0, lambda row: score_maps(np.asarray(c.images[row]), np.asarray(c.twins[row]) * np.float32(.9), ScoreConfig().names).values(), ScoreConfig().names, ScoreConfig(), place/"all", "plain"))
    return out

def slices(n: int, place: Path) -> dict:
    "`n` slices restored by the demo's DDPM."
    from uad_study.reconstruct import reconstruct_volume
    model, volume = demo_model(), np.random.default_rng(0).random((96, 96, n), np.float32)
    reconstruct_volume(model, volume[..., :1], (0,))                                        # what a process does once (Numba's start) is no cost of slices
    return dict(restore=cost(lambda: reconstruct_volume(model, volume, (0,))))

def sigmas(n: int, place: Path) -> dict:
    "SSIM-ens of one volume over `n` sigmas from 0.3 to 1.7."
    from uad_study.scores import ssim_ens
    x, y = np.random.default_rng(0).random((2, 96, 96, 50), np.float32)
    scales = np.linspace(.3, 1.7, n) if n > 1 else [1.1]
    return dict(ens=cost(lambda: ssim_ens(x, y, scales), 3))

def sizes(n: int, place: Path) -> dict:
    "Slices of n x n pixels: noise for 16, a training step of the demo's DDPM with 4, SSIM-ens of 50."
    import torch
    from uad_study.noise import simplex_noise
    from uad_study.scores import ssim_ens
    g, model = torch.Generator().manual_seed(0), demo_model().train()
    x, y = np.random.default_rng(0).random((2, n, n, 50), np.float32)
    def step(): model.zero_grad(); model.loss(torch.from_numpy(x[..., :4].copy()).permute(2, 0, 1)[:, None], g).backward()
    step()
    return dict(noise=cost(lambda: simplex_noise(16, n, frequency=n * 2 / 3, generator=g), 3), step=cost(step, 3), ens=cost(lambda: ssim_ens(x, y), 3))

def devices(n: int, place: Path) -> dict:
    "The demo's DDPM, 16 slices a step, trained by `n` processes of one thread each."
    import torch
    from uad_study.cohort import Cohort, DataConfig, build_virtual
    from uad_study.models import model_config
    from uad_study.runs import read_study
    from uad_study.train import TrainConfig, train
    torch.set_num_threads(n)                                                                # shared among the processes
    build_virtual(DataConfig(contrasts=("T2w",), pathologies=("tumour",), folds=1, n_train=4, n_val=1, n_test=1, n_lesion_val=1, n_lesion_test=1), place/"cohort")
    model, times = model_config(read_study("demo").entries[0].model), []
    def tick(step, *_, **__): times.append(time.perf_counter())
    def go(): train(Cohort(place/"cohort"), "T2w", 0, model, TrainConfig(steps=14, batch_size=16, val_every=10**6, val_slices=8, checkpoint_minutes=60), place/"train", devices=n, tick=tick)
    whole = cost(go)
    return dict(step=dict(seconds=float(np.median(np.diff(times[3:14]))), mb=whole["mb"]), start=times[0] and whole["seconds"] - (times[-1] - times[0]), **on_disk(place/"train"))


def measured(table: str, n: int) -> dict:
    r = subprocess.run([sys.executable, __file__, "--point", table, str(n)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if r.returncode: sys.exit(r.stderr)
    return json.loads(r.stdout.splitlines()[-1])

def table(head: list, rows: list) -> str: return "\n".join("| " + " | ".join(map(str, r)) + " |" for r in (head, ["---"] * len(head), *rows))
def gb(bytes_: float) -> str: return f"{bytes_ / 1e9:,.2f}" if bytes_ < 1e10 else f"{bytes_ / 1e9:,.0f}"
def sec(s: float) -> str: return f"{s:.4f}" if s < .01 else f"{s:.3f}" if s < 1 else f"{s:.1f}"

def written(f: dict) -> str:
    "The Markdown of the tables in `f`."
    t, parts = {k: {int(n): p for n, p in v["points"].items()} for k, v in f.items()}, []
    if "subjects" in t: parts += ["## Subjects", table(["healthy subjects, one contrast", "made and packed, s", "MB", "GB on disk", "files", "opened, s", "a training step of 8 slices, s", "MB", "as many patients judged by one score, s", "MB"],
        [[n, sec(p["build"]["seconds"]), f"{p['build']['mb']:.0f}", gb(p["bytes"]), p["files"], sec(p["open"]["seconds"]), sec(p["step"]["seconds"]), f"{p['step']['mb']:.0f}", sec(p["judge"]["seconds"]), f"{p['judge']['mb']:.0f}"] for n, p in t["subjects"].items()])]
    if "slices" in t: parts += ["## Slices", table(["slices restored by the demo's DDPM", "s", "ms a slice", "MB"], [[n, sec(p["restore"]["seconds"]), f"{1000 * p['restore']['seconds'] / n:.0f}", f"{p['restore']['mb']:.0f}"] for n, p in t["slices"].items()])]
    if "sigmas" in t: parts += ["## Sigmas", table(["sigmas of SSIM-ens, 96x96x50", "s", "ms a sigma", "MB"], [[n, sec(p["ens"]["seconds"]), f"{1000 * p['ens']['seconds'] / n:.0f}", f"{p['ens']['mb']:.0f}"] for n, p in t["sigmas"].items()])]
    if "sizes" in t: parts += ["## Image size", table(["pixels", "noise for 16 slices, s", "training step of 4 slices (demo's DDPM), s", "MB", "SSIM-ens of 50 slices, s", "MB"],
        [[f"{n}x{n}", sec(p["noise"]["seconds"]), sec(p["step"]["seconds"]), f"{p['step']['mb']:.0f}", sec(p["ens"]["seconds"]), f"{p['ens']['mb']:.0f}"] for n, p in t["sizes"].items()])]
    if "devices" in t: parts += ["## Devices", table(["processes, one thread each (two cores)", "training step of 16 slices, s", "speed-up", "MB, all processes", "beside the steps, s", "files"],
        [[n, sec(p["step"]["seconds"]), f"{t['devices'][1]['step']['seconds'] / p['step']['seconds']:.2f}", f"{p['step']['mb']:.0f}", sec(p["start"]), p["files"]] for n, p in t["devices"].items()])]
    if "subjects" in t and "slices" in t: parts += plan(t)
    stamps = "; ".join(f"{k}: {v['when']}" for k, v in f.items()) + "".join(f". {v['note']}" for v in list(f.values())[:1] if v.get("note"))
    return "\n\n".join(["# How cost grows", f"`python benchmarks/growth.py`, each line in a process of its own, one thread. MB: what the memory of the process (and its children) grew by at its peak (pages of mapped files do not count: the system may drop them). {stamps}.", *parts]) + "\n"

def plan(t: dict, n: int = 100_000) -> list:
    "What a biobank would cost, stage by stage: measured rates of one core, times `n`."
    many, points = max(t["subjects"]), t["subjects"]
    disk, pack, judge = (points[many][k] / many if k == "bytes" else points[many][k]["seconds"] / many for k in ("bytes", "pack", "judge"))
    all_scores, restore = points[ALL_SCORES]["judge_all"]["seconds"] / ALL_SCORES, t["slices"][50]["restore"]["seconds"]
    held = n * (points[many]["judge"]["mb"] - points[ALL_SCORES]["judge"]["mb"]) / (many - ALL_SCORES) / 1000
    flop, rate = 149e9, .35 * 788e12                                                    # the paper's U-Net, a slice forward; what bench-gpu asks of an H200
    hours = lambda s: f"{s / 3600:,.0f}" if s > 36000 else f"{s / 3600:.1f}"
    rows = [["prepare", hours(9.5 * n), "of a core: 9.5 s a scan of 1 mm (benchmarks/prepare.md); scans are independent, any number of workers"],
            ["pack", hours(pack * n), f"{1000 * pack:.0f} ms a scan, one writer; {gb(disk * n)} GB on disk"],
            ["train, the paper's DDPM, one fold", hours(3 * 19200 * 32 * flop / rate), "of a GPU, computed: 275 PFLOP at 35 % of 788 TFLOP/s. Its 19,200 steps of 32 slices would see an eighth of the slices once"],
            ["restore, the demo's DDPM", hours(n * restore), f"of a core: {restore:.1f} s for 50 slices"],
            ["restore, the paper's DDPM", hours(n * 50 * flop / rate), "of a GPU, computed, at the same rate"],
            ["judge, one score", hours(n * judge), f"of a core: {judge:.2f} s a patient"],
            ["judge, all scores", hours(n * all_scores), f"of a core: {all_scores:.2f} s a patient (measured with {ALL_SCORES}; one score cost {points[many]['judge']['seconds'] / many / (points[ALL_SCORES]['judge']['seconds'] / ALL_SCORES):.1f} times as much a patient with {many:,} as with {ALL_SCORES})"]]
    return [f"## On paper: {n:,} scans of one contrast", table(["stage", "hours", "of what"], rows),
            f"""Rates are those of the tables above (one core, {many:,} subjects), where nothing else is said. What would break first, in this order:

1. **One process packs one file of each kind.** {gb(n * 4 * 96 * 96 * 50)} GB of images in a single `.npy`: it is mapped, so that memory stays flat, but one changed subject means packing all again. Shards of some thousand volumes, each with its hash, would mend it.
2. **One process judges a training.** {hours(n * all_scores)} hours for all scores, and its second search (components inside) holds the validation maps of one pathology in memory: at the growth above, some {held:,.0f} GB. The streaming judge's counts add up, so volumes could be shared among processes as they are among its threads; no engine does that yet.
3. **The table of cases is one data frame**, a row for each case, score and rule: at 13 scores and 7 rules {n * 91 / 1e6:.1f} million rows, from which the bootstrap over patients draws.
4. **The page of a data set** holds a picture of each subject: no browser opens {n:,} of them.

What does not break: training (slices come from the mapped file: time and memory of a step do not grow in the table), restoring (a volume at a time), the search for a threshold (streamed, memory flat: benchmarks/streaming.md)."""]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(POINTS)}; default: all")
    p.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.point:
        import torch
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as place: print(json.dumps(globals()[a.point[0]](int(a.point[1]), Path(place))))
        return
    if wrong := [x for x in a.tables if x not in POINTS]: p.error(f"{wrong[0]} is no table: choose from {', '.join(POINTS)}")
    from uad_study.runs import provenance
    kept = HERE/"growth.json"
    for name in a.tables or POINTS:
        found = dict(when=f"{time.strftime('%F')}, commit {(provenance().get('commit') or 'none')[:12]}", points={n: measured(name, n) for n in POINTS[name]})
        figures = (json.loads(kept.read_text()) if kept.exists() else {}) | {name: found}
        kept.write_text(json.dumps({k: figures[k] for k in POINTS if k in figures}, indent=1) + "\n")
        print(name, "measured", flush=True)
    (HERE/"growth.md").write_text(written(json.loads(kept.read_text())))
    print(written(json.loads(kept.read_text())))

if __name__ == "__main__": main()
