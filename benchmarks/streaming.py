"""Seconds and peak memory of `streaming.Pooled` for 10 to 1,000 volumes, against the plain functions and scikit-learn: python benchmarks/streaming.py. Writes benchmarks/streaming.md.

Each line is measured in a process of its own. The volumes are made on the fly; the time to make them is measured apart and taken off, once for each pass."""
import argparse, json, subprocess, sys, time
from pathlib import Path
import numpy as np

SHAPE, COUNTS, PLAIN, FRACTIONS = (96, 96, 50), (10, 20, 100, 1000), (10, 20, 100), (.01, .05, .1)


def volumes(n):
    "A function that gives `n` maps of 96x96x50 with their labels: 0 outside an ellipsoid (60 %), a tail of scores within, 2 % of all voxels positive, which score higher. Cheap: shifted and scaled from one map."
    r = np.random.default_rng(0)
    x, y, z = (np.linspace(-.5, .5, k, dtype=np.float32)**2 for k in SHAPE)
    brain, background = x[:, None, None] + y[:, None] + z < .215, r.exponential(.05, SHAPE)
    labels = brain & (r.random(SHAPE) < .02 / brain.mean())
    noise, lesion = background.astype(np.float32), np.where(labels, r.gamma(2, .08, SHAPE), 0).astype(np.float32)
    def make():
        for i in range(n):
            s = np.roll(noise.ravel(), 7919 * i).reshape(SHAPE) * np.float32(1 + .2 * np.sin(i))
            s += lesion * np.float32(1 + .3 * np.cos(3 * i))
            s *= brain
            yield s, labels
    return make


def timed(f, repeat):
    times = []
    for _ in range(repeat): t = time.perf_counter(); out = f(); times.append(time.perf_counter() - t)
    return out, min(times)

def measure(kind: str, n: int) -> dict:
    "Seconds, passes and results of each method; peak memory in MB that the process grew by. `kind`: pooled, plain or sklearn."
    from uad_study.metrics import auprc, best_threshold, lesion_free_threshold
    from uad_study.streaming import Pooled
    if kind == "sklearn": from sklearn.metrics import precision_recall_curve
    make, repeat, r = volumes(n), 3 if n <= 20 else 1, {}
    for _ in make(): pass
    Path("/proc/self/clear_refs").write_text("5")                                # the peak so far is forgotten
    peak = lambda: int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")).split()[1]) / 1024
    before = peak()
    if kind == "pooled":
        making = timed(lambda: sum(1 for _ in make()), repeat)[1]
        p, first = timed(lambda: Pooled(make), repeat)
        r = dict(making=making, n=p.n, n_positive=p.n_positive, counted=dict(seconds=first - making, passes=1, memory=peak() - before))
        for name, f in (("best", p.best_threshold), ("curve", p.curve), ("quantiles", lambda: p.quantile_thresholds(FRACTIONS)), ("auprc", p.auprc)):
            at = p.passes
            out, seconds = timed(f, 1 if name == "auprc" and n > 20 else repeat)
            passes = (p.passes - at) // (1 if name == "auprc" and n > 20 else repeat)
            r[name] = dict(seconds=seconds - passes * making, passes=passes, memory=peak() - before, out={k: v[::10].tolist() for k, v in out.items()} if name == "curve" else np.asarray(out).tolist())
        return r
    s, l = np.empty((n, *SHAPE), np.float32), np.empty((n, *SHAPE), bool)
    for i, (a, b) in enumerate(make()): s[i], l[i] = a, b
    jobs = dict(best=lambda: best_threshold(s, l), quantiles=lambda: [lesion_free_threshold(s, f) for f in FRACTIONS], auprc=lambda: auprc(s, l)) if kind == "plain" else dict(curve=lambda: precision_recall_curve(l.ravel(), s.ravel()))
    for name, f in jobs.items():
        out, seconds = timed(f, repeat)
        if name == "curve": out = np.stack([out[2], out[1][:-1], out[0][:-1]])[:, np.r_[np.searchsorted(out[2], json.loads(sys.stdin.read()), "right")]]
        r[name] = dict(seconds=seconds, memory=peak() - before, out=np.asarray(out).tolist())
    return r

def run(kind, n, given=None):
    r = subprocess.run([sys.executable, __file__, "--one", kind, str(n)], capture_output=True, text=True, input=json.dumps(given))
    if r.returncode: sys.exit(r.stderr)
    return json.loads(r.stdout.splitlines()[-1])


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--one", nargs=2)
    a = p.parse_args()
    if a.one:
        print(json.dumps(measure(a.one[0], int(a.one[1]))))
        return
    from uad_study.runs import provenance
    lines, more, names = [], [], ("best", "curve", "quantiles", "auprc")
    for n in COUNTS:
        m = run("pooled", n)
        lines.append(f"| {n:,} | {m['n'] / 1e6:,.1f} | {m['n_positive'] / 1e6:.2f} | {m['making']:.2f} | {m['counted']['seconds']:.2f} | " + " | ".join(f"{m[k]['seconds']:.2f} ({m[k]['passes']})" for k in names)
                     + f" | {m['quantiles']['memory']:.0f} | {m['auprc']['memory']:.0f} |")
        print(lines[-1], flush=True)
        if n in PLAIN:
            q, first = run("plain", n), m["counted"]["seconds"]
            assert q["best"]["out"] == m["best"]["out"] and q["quantiles"]["out"] == m["quantiles"]["out"] and abs(q["auprc"]["out"] - m["auprc"]["out"]) < 1e-12, n
            more.append(f"| {n} | " + " | ".join(f"{q[k]['seconds']:.2f} | {first + m[k]['seconds']:.2f} | {(first + m[k]['seconds']) / q[k]['seconds']:.2f}" for k in ("best", "auprc", "quantiles")) + f" | {q['auprc']['memory']:,.0f} |")
            print(more[-1], flush=True)
        if n == 20:
            c = m["curve"]["out"]
            q = run("sklearn", n, c["threshold"])["curve"]
            assert np.allclose(q["out"][1], c["recall"], rtol=0, atol=1e-12) and np.allclose(q["out"][2], c["precision"], rtol=0, atol=1e-12)
            sk = f"`sklearn.metrics.precision_recall_curve` of the 20 volumes: {q['seconds']:.2f} s and {q['memory']:,.0f} MB; `curve`, first pass included: {m['counted']['seconds'] + m['curve']['seconds']:.2f} s. The same points."
            print(sk, flush=True)
    v = provenance()
    text = [f"Measured by `python benchmarks/streaming.py`, {v['time'][:10]}, commit {str(v['commit'])[:12]}{' with changes' if v['dirty'] else ''}: {v['cores']} cores ({v['machine']}), one used; Python {v['python']}, numpy {v['packages']['numpy']}. "
            "Volumes of 96x96x50, float32. Best of 3 up to 20 volumes. `most` is 2^18.", "",
            "Seconds without the time to make the volumes (that of one pass stands in its own column); in brackets the passes, beside the first one, in which bins are counted. Memory: what the process grew by since the volumes' maker stood, MB; the first without average precision.", "",
            "| volumes | million voxels | million positives | making, a pass | first pass | best threshold | curve, 200 points | 3 thresholds of healthy voxels | average precision | memory | memory with average precision |", "|" + "---|" * 11, *lines, "",
            "Against the plain functions on one array of all voxels (first pass included; results are equal, average precision to 1e-12). Memory: MB of the array and of the functions.", "",
            "| volumes | best threshold, plain | streamed | ratio | average precision, plain | streamed | ratio | 3 healthy thresholds, plain | streamed | ratio | memory, plain |", "|" + "---|" * 11, *more, "", sk, ""]
    (Path(__file__).parent/"streaming.md").write_text("\n".join(text))


if __name__ == "__main__": main()
