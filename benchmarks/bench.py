"""The parts of the study against what anyone can install: `make bench`, or python benchmarks/bench.py [--rows NAME ...] [--threads N] [--rounds N] [--least SECONDS]. All rows together are written to benchmarks/bench.md.

Each row: the same inputs for ours and the peer, results compared first, then both timed in turn, round by round. A busy minute of the machine slows both of a round: the ratio is the median of the rounds'."""
import argparse, gc, itertools, math, subprocess, sys, tempfile, time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Callable
from unittest import mock
import numpy as np, scipy.fft, torch
from scipy.ndimage import gaussian_filter
sys.path.insert(0, str(Path(__file__).parent))
import judge, peers, streaming
from uad_study import models, noise as noise_room, phantom
from uad_study.cohort import Cohort, Item, slice_index, take_slices, write_cohort
from uad_study.metrics import best_threshold
from uad_study.models import GaussianDDPMConfig, build_model, model_config, parameter_count, placed
from uad_study.noise import simplex_noise
from uad_study.postprocess import erode_mask, median3d
from uad_study.runs import provenance, read_study
from uad_study.scores import SIGMAS, kernel_size, ssim_ens
from uad_study.train import Team, TrainConfig, _advance, _Training


@dataclass
class Row:
    "`same(result of ours, result of the peer)` raises where they differ and returns how near they are, in words. `bar`: peer / ours must reach it."
    what: str
    peer: str
    ours: Callable
    theirs: Callable
    same: Callable
    bar: float | None = None


@dataclass
class Measured:
    what: str
    peer: str
    ours: np.ndarray                     # seconds, round by round
    theirs: np.ndarray
    same: str
    bar: float | None

    def line(self) -> str:
        low, r, high = np.quantile(self.theirs / self.ours, (.25, .5, .75))
        digits = 2 if r < 4 else 1
        low, r, high = np.floor(np.array([low, r, high]) * 10**digits) / 10**digits                      # never up to the bar
        met = "" if self.bar is None else "yes" if r >= self.bar else "**no**"
        return (f"| {self.what} | {self.peer} | {np.median(self.ours):.3f} | {np.median(self.theirs):.3f} | {r:.{digits}f} | {low:.{digits}f} to {high:.{digits}f} of {len(self.ours)} | "
                f"{self.bar or ''} | {met} | {self.same} |")


def seconds(f, least=.2) -> float:
    "The best time of `f` in calls that together take `least` seconds."
    times = []
    while sum(times) < least: t = time.perf_counter(); f(); times.append(time.perf_counter() - t)
    return min(times)


def in_turn(ours, theirs, rounds: int, least: float) -> np.ndarray:
    "Seconds of both, (2, rounds or more): they take turns until `least` seconds are over, too."
    times, began = [], time.perf_counter()
    while len(times) < rounds or time.perf_counter() - began < least: times.append((seconds(ours), seconds(theirs)))
    return np.transpose(times)


def race(row: Row, rounds: int, least: float = 0) -> Measured:
    same = row.same(row.ours(), row.theirs())
    return Measured(row.what, row.peer, *in_turn(row.ours, row.theirs, rounds, least), same, row.bar)


def ssim():
    x, x_hat, _, _ = judge.scene()
    def ensemble(ssims):
        S = np.stack(list(ssims)); w = np.exp(-S)
        return 1 - (w * S).sum(0) / w.sum(0)
    def exact(a, b, sigma, L):
        m, n, aa, bb, ab = (gaussian_filter(v, sigma, mode="mirror", radius=kernel_size(sigma) // 2) for v in (a, b, a * a, b * b, a * b))
        return (2 * m * n + (.01 * L)**2) * (2 * (ab - m * n) + (.03 * L)**2) / ((m * m + n * n + (.01 * L)**2) * (aa - m * m + bb - n * n + (.03 * L)**2))
    def same(mine, theirs):                                                              # torchmetrics in float64 would take 12 GB
        a, b = x.astype(np.float64), x_hat.astype(np.float64)
        d, e = (np.abs(v - ensemble(exact(a, b, s, max(np.ptp(x), np.ptp(x_hat))) for s in SIGMAS)).max() for v in (mine, theirs))
        assert mine.dtype == np.float32 and d < 1e-4 and e < 1e-2, (d, e)
        return f"to {d:.0e} of SciPy's in float64 (peer: {e:.0e})"
    yield Row("SSIM-ens, eight sigmas, 96x96x50", "torchmetrics: 3-D SSIM image, eight calls", lambda: ssim_ens(x, x_hat), lambda: ensemble(judge.torchmetrics_ssims(x, x_hat).values()), same, 25)


def with_table_of(perm, size, octaves=6, frequency=64):
    "A field of `simplex_noise`, anchored, with the gradients of an opensimplex table `perm`: what is drawn is given instead."
    cell = frequency / 2**(octaves - 1)
    low = math.floor(-noise_room._K * (size - 1) / cell) - 2
    def table(_, shape, **kw):
        i, j = (np.arange(low, low + n) for n in shape[:2])
        return torch.tensor((perm[(perm[i[:, None] & 255] + j) & 255] & 14) // 2)[..., None]
    with mock.patch.object(noise_room.torch, "randint", table): return simplex_noise(1, size, octaves, frequency=frequency, anchored=True)[0, 0].numpy()

def simplex(n=32, size=96):
    tables, g, seeds = peers.opensimplex_tables(n), torch.Generator().manual_seed(0), itertools.count(0, n)
    def same(mine, theirs):
        d = np.abs(with_table_of(tables[0]._perm, size) - peers.opensimplex_fields(tables[:1], size)[0]).max()
        assert mine.shape == (n, 1, size, size) and theirs.shape == (n, size, size) and d < 2e-5, d
        assert abs(mine.std() / theirs.std() - 1) < .1
        return f"to {d:.0e} on the same gradients"
    ours, what = lambda: simplex_noise(n, size, generator=g), f"simplex noise, {n} fresh fields {size}x{size} (ours: on one lattice, shifted at each call), 6 octaves"
    yield Row(what, f"opensimplex with numba, {n} seeds, {n} x 6 calls", ours, lambda: peers.opensimplex_fields(peers.opensimplex_tables(n, next(seeds)), size), same, 3)
    yield Row(what, f"the same {n} fields again and again (no seeds counted)", ours, lambda: peers.opensimplex_fields(tables, size), same)


def median():
    from scipy.ndimage import median_filter
    _, _, brain, _ = judge.scene()
    eroded = erode_mask(brain)
    x = np.random.default_rng(0).random(brain.shape, np.float32) * eroded                # other than 0 everywhere in the brain, as a model's map is
    def same(a, b): assert np.array_equal(a, b); return "equal"
    yield Row("median of 5x5x5 voxels, noise in an eroded brain", "scipy.ndimage.median_filter", lambda: median3d(x, 5), lambda: median_filter(x, 5), same, 3)


def threshold(n=20):
    from sklearn.metrics import precision_recall_curve
    s, l = (np.stack(a) for a in zip(*streaming.volumes(n)()))
    def plain():
        precision, recall, thresholds = precision_recall_curve(l.ravel(), s.ravel())
        f = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        k = len(thresholds) - 1 - f[:-1][::-1].argmax()                                 # of equal optima the highest
        return thresholds[k], f[k]
    def same(mine, theirs):
        assert np.array_equal(s > mine[0], s >= theirs[0]) and abs(mine[1] - theirs[1]) < 1e-12
        return "the same voxels predicted, Dice to 1e-12"
    yield Row(f"exact best threshold over {n} volumes", "scikit-learn: precision_recall_curve", lambda: best_threshold(s, l), plain, same, 5)
    rounds, many, at = [(streaming.run("pooled", n), seconds(lambda: best_threshold(s, l))) for _ in range(7)], streaming.run("pooled", 5 * n), best_threshold(s, l)
    assert all(few["best"]["out"] == list(at) for few, _ in rounds)
    took, memory = [few["counted"]["seconds"] + few["best"]["seconds"] for few, _ in rounds], [m["best"]["memory"] for m in (rounds[0][0], many)]
    assert memory[1] < .15 * 5 * n * (s[0].nbytes + l[0].nbytes) / 2**20, memory
    yield Measured(f"the same, streamed; memory {memory[0]:.0f} MB, of {5 * n} volumes {memory[1]:.0f} MB", "our best_threshold on one array", np.array(took), np.array([t for _, t in rounds]), "equal", .5)


def whole():
    scene = judge.scene()
    def same(mine, theirs): d = judge.agree(mine, theirs); return f"Dice to {d[0]:.0e}, AUPRC to {d[1]:.0e}"
    yield Row(f"one volume judged whole by {len(judge.NAMES)} scores", "torchmetrics, scipy, scikit-image, scikit-learn, written plainly", lambda: judge.ours(*scene), lambda: judge.plain(*scene), same, 10)


def all_coefficients(rng, n, spectrum):
    "`random_fields` with the draws of the first version: those too that the spectrum leaves out."
    (at, amplitude), out = spectrum, []
    for _ in range(-(-n // 2)):
        drawn, f = rng.standard_normal((2, math.prod(phantom.GRID_SHAPE)), np.float32), np.zeros(phantom.GRID_SHAPE, np.complex64)
        f.reshape(-1)[at] = amplitude * (drawn[0] + 1j * drawn[1])[at]
        f = scipy.fft.ifftn(f, norm="ortho")
        out += [f.real, f.imag]
    return out[:n]

def subject(n=8):
    first = peers.first_phantom()
    def statistics(module):
        people = [module.healthy(i) for i in range(n)]
        return {(c, k): v for c in ("T1w", "T2w") for k, v in phantom.image_statistics([p.images[c] for p in people], [p.brain_mask for p in people], pairs=6).items()}
    def same(*_):
        phantom.common_folds.cache_clear()
        with mock.patch.object(phantom, "random_fields", all_coefficients):                 # the same draws
            x, y = (m.draw_anatomy(np.random.default_rng(3), 50).tissues for m in (phantom, first))
            a, b = statistics(phantom), statistics(first)
        phantom.common_folds.cache_clear()
        worst, d = max(abs(a[k] - b[k]) / max(abs(b[k]), .05) for k in a), float(np.abs(x - y).mean())
        assert worst < .15 and d < 1e-3, (worst, d)                                     # scanners are drawn from other streams since, so that a few subjects differ by chance
        return f"tissues to {d:.0e} at the mean where the same coefficients are drawn; quantiles, power and SSIM of {n} subjects to {worst:.0%}"
    yield Row("virtual healthy subject, T1w and T2w", f"first version in this repo ({peers.FIRST_PHANTOM})", lambda: phantom.healthy(1), lambda: first.healthy(1), same, 2)


def training(steps=10**6, batch=16):
    demo = read_study("demo").entries[0].model
    with tempfile.TemporaryDirectory() as place:
        people = [phantom.healthy(i, ("T2w",)) for i in range(4)]
        write_cohort(Path(place)/"cohort", [Item(dict(subject_id=p.subject_id, contrast="T2w", pathology="healthy", split="train", val_fold=0 if i == 3 else -1), p.images["T2w"], p.brain_mask) for i, p in enumerate(people)], 4)
        cohort = Cohort(Path(place)/"cohort")
        for name, noise, precision in (("ddpm", "simplex noise", "float32"), ("ddpm", "simplex noise", "bf16"), ("ddpm_gaussian", "Gaussian noise", "float32")):
            config, settings = model_config({k: v for k, v in demo.items() if name == "ddpm" or k in GaussianDDPMConfig.__dataclass_fields__} | dict(name=name)), TrainConfig(steps=steps, batch_size=batch, lr=1e-4, precision=precision)
            ours = _Training(cohort, "T2w", 0, config, settings, Path(place)/f"{name}-{precision}", "cpu", tensorboard=False, team=Team(), stop=lambda: False, tell=lambda *a, **k: None)
            slices = take_slices(cohort, slice_index(cohort, ours.rows["train"]))
            theirs = peers.MonaiLoop(slices, peers.MonaiDenoiser(config), batch, settings.lr, simplex=name == "ddpm")
            theirs.network.denoiser.load_state_dict(ours.model.denoiser.state_dict())
            def same(*_):
                g = torch.Generator().manual_seed(0)
                for p in ours.model.parameters(): p.data.add_(.02 * torch.randn(p.shape, generator=g))      # layers that start at zero would keep the gradient from the others
                theirs.network.denoiser.load_state_dict(ours.model.denoiser.state_dict())
                x = torch.from_numpy(slices[:batch])
                d = same_loss(ours.model, theirs, x)
                if precision == "float32": return f"loss and gradient on the same noise to {d:.0e}"
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): rounded = float(ours.model.loss(x, torch.Generator().manual_seed(0)))
                with torch.no_grad(): r = abs(rounded / float(ours.model.loss(x, torch.Generator().manual_seed(0))) - 1)
                assert r < .01, r
                return f"loss to {r:.0e} of that in float32"
            yield Row(f"training step, demo U-Net ({parameter_count(ours.model):,} parameters), batch {batch}, {noise}{', train.precision: bf16 (the peer in float32)' * (precision == 'bf16')}",
                      f"MONAI: DiffusionInferer, DataLoader, its own network of the same function; {'opensimplex with numba' if name == 'ddpm' else 'torch.randn'}", lambda: _advance(ours), theirs.step, same, 1.3 if (name, precision) == ("ddpm", "float32") else None)

def same_loss(model, loop, x) -> float:
    "The largest relative difference of loss and of each weight's gradient, of our loss and the loop's on the same steps and noise. (MONAI's table of the cosine schedule is shifted by one step: both get ours.)"
    from uad_study.diffusion import alpha_bars
    g = torch.Generator().manual_seed(0)
    steps, noise = torch.randint(1000, (len(x),), generator=g), model.noise(x, g)
    with mock.patch.object(loop.inferer.scheduler, "alphas_cumprod", alpha_bars()):
        a, b = model.loss(x, torch.Generator().manual_seed(0)), loop.loss(2 * x - 1, noise, steps)
        grads = [torch.autograd.grad(loss, list(net.parameters())) for loss, net in ((a, model.denoiser), (b, loop.network))]
    assert np.mean([bool(q.abs().max() > 0) for q in grads[1]]) > .9
    d = max(abs(float(a.detach() / b.detach()) - 1), *(float((p - q).norm() / (q.norm() + 1e-6)) for p, q in zip(*grads)))
    assert d < 1e-3, d
    return d


ROWS = dict(ssim=ssim, simplex=simplex, median=median, threshold=threshold, whole=whole, subject=subject, training=training)


PROFILED, BEFORE = ("ssim", "simplex", "subject", "training"), {
    "ssim": "float64 matrix products were 70 % (0.26 s in all)", "simplex": "every field had an offset of its own: four gathers and some thirty passes over each octave of each field (0.044 s)",
    "subject": "drawing Fourier coefficients that the filter then set to nothing was a third (0.21 s)", "training": "convolutions were 78 %, of .86 s"}
"The rows whose time is looked into, and what was found there before they were made faster (same machine, 2026-11)."

def profile(row: Row) -> str:
    "The four places where `row.ours` spends most of its own time, by torch's profiler, or Python's where torch does little."
    import cProfile, pstats
    row.ours()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p, cProfile.Profile() as c: row.ours()
    inner = {e.key: e.self_cpu_time_total / 1e6 for e in p.key_averages()}
    outer = {f"{Path(file).stem}.{name}" if file != "~" else name.strip("<>").replace("built-in method ", ""): t[2] for (file, _, name), t in pstats.Stats(c).stats.items()}
    whole = sum(outer.values())
    times = inner if sum(inner.values()) > .5 * whole else outer
    return ", ".join(f"{k} {v / (sum(inner.values()) if times is inner else whole):.0%}" for k, v in sorted(times.items(), key=lambda kv: -kv[1])[:4])

def floor(batch=16, n=1024) -> str:
    "How near a training step is to what the processor can do: its operations a second against those of a matrix product, float32."
    from torch.utils.flop_counter import FlopCounterMode
    model, g, x, a = placed(build_model(model_config(read_study("demo").entries[0].model)), "cpu"), torch.Generator().manual_seed(0), torch.rand(batch, 1, 96, 96), torch.rand(n, n)
    def step(): model.zero_grad(); model.loss(x, g).backward()
    with FlopCounterMode(display=False) as counted: step()
    work, reached, best = counted.get_total_flops(), counted.get_total_flops() / seconds(step, 3), 2 * n**3 / seconds(lambda: a @ a, 10)
    return f"A training step is {work / 1e9:.0f} GFLOP, done at {reached / 1e9:.0f} GFLOP/s; a product of {n}x{n} matrices reaches {best / 1e9:.0f}. No loop around this network in float32 could be more than {best / reached:.1f} times as fast as ours."

def tried(batch=16) -> str:
    "What makes training and restoring faster than by MONAI's network, each taken away, and what was tried and left: as ratios, each of two in turn."
    def work(monai=False, last=True, kernel=True, compiled=False, bf16=False, restore=False):
        model, x = build_model(model_config(read_study("demo").entries[0].model)), torch.rand(batch, 1, 96, 96)
        if monai: model.denoiser = peers.MonaiDenoiser(model.config)
        placed(model, "cpu", "float32" if last else "bf16")
        if compiled: model.denoiser.compile()
        def step():
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16): loss = model.loss(x, torch.Generator().manual_seed(0))
            loss.backward()
        def f():
            with mock.patch.object(models, "_kernel", models._kernel if kernel else lambda: None): model.reconstruct(x, torch.Generator().manual_seed(0)) if restore else step()
        f()
        return f
    def faster(ours: dict, than: dict) -> str:
        a, b = work(**ours), work(**than)
        a, b = in_turn(a, b, 7, 12)
        return f"{np.median(b / a):.2f}"
    def optimizer(fused):
        model = build_model(model_config(read_study("demo").entries[0].model))
        for p in model.parameters(): p.grad = torch.zeros_like(p)
        return seconds(torch.optim.Adam(model.parameters(), fused=fused).step, 1)
    one, fused = optimizer(None), optimizer(True)
    def both(ours, than): return f"{faster(ours, than)} and {faster(ours | dict(restore=True), than | dict(restore=True))} times"
    plain = dict(kernel=False)
    text = (f"Ours is faster by weights that lie channels last (a step and restoring {both(plain, plain | dict(last=False))} as fast as without), by embedding, group norm and SiLU in one operation ({both({}, plain)}), "
            f"by upsampling and the convolution after it as one transposed convolution, its bias added with the embedding ({both(plain, dict(monai=True))}) and by a fused optimiser ({(one - fused) * 1000:.0f} ms of a step). Tried and left: in bf16, channels last ({faster(dict(bf16=True), dict(bf16=True, last=False))} times as fast)")
    try: return text + f"; compiled (`torch.compile`, {faster(dict(compiled=True), {})} times as fast)."
    except Exception as e: return text + f"; compiled it does not run here ({type(e).__name__})."


def start_up() -> list[str]:
    "Sentences on what starting takes."
    def run(code): subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    empty, help_ = (seconds(lambda: run(code), 2) for code in ("pass", "import sys; sys.argv = ['uad', '--help']\nfrom uad_study.cli import main\ntry: main()\nexcept SystemExit: pass"))
    scores, torch_ = (seconds(lambda: run(f"import {m}"), 4) for m in ("uad_study.scores", "torch, numpy"))
    return [f"Start-up, whole processes: `uad --help` {help_:.2f} s (Python that does nothing: {empty:.2f} s; bar 0.3 s: {'met' if help_ < .3 else '**not met**'}). `import uad_study.scores`: {scores:.2f} s, of which numpy and torch {torch_:.2f} s; "
            "that it leaves MONAI out is a test."]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="only these, not written to bench.md")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--rounds", type=int, default=7, help="at least so many a row, and for `--least` seconds")
    p.add_argument("--least", type=float, default=20)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    if "simplex" in a.rows or "training" in a.rows:
        peers.opensimplex_tables(1)
        import numba; numba.set_num_threads(min(a.threads, numba.config.NUMBA_NUM_THREADS))
    head = ["| what | peer | ours, s | peer, s | ratio | quartiles of the rounds | bar | met | same result |", "|---|---|---|---|---|---|---|---|---|"]
    print(*head, sep="\n")
    lines, found = [], []
    for name in a.rows:
        for i, row in enumerate(ROWS[name]()):
            gc.collect()
            if name in PROFILED and i == 0: found.append(f"- {row.what}: {profile(row)}. Before: {BEFORE[name]}.")
            lines.append((row if isinstance(row, Measured) else race(row, a.rounds, a.least)).line())
            print(lines[-1], flush=True)
    if set(a.rows) != set(ROWS): return
    v = provenance()
    packages = ", ".join(f"{k} {version(k)}" for k in ("torch", "numpy", "scipy", "scikit-learn", "scikit-image", "torchmetrics", "monai", "opensimplex", "numba"))
    text = ["# Speed on a CPU", f"Measured by `make bench`, {v['time'][:10]}, commit {str(v['commit'])[:12]}{' with changes' if v['dirty'] else ''}: {a.threads} {'thread' if a.threads == 1 else 'threads'} for ours and the peer, of {v['cores']} cores ({v['machine']}); "
            f"Python {v['python']}, {packages}. float32. Ours and the peer in turn, {a.rounds} rounds or more of each row; seconds are the rounds' medians on this machine, the ratio is the median of the rounds' ratios.", "\n".join(head + lines), "Where the time of ours goes (torch's profiler, or Python's):\n\n" + "\n".join(found), floor() + " " + tried(), *start_up()]
    (Path(__file__).parent/"bench.md").write_text("\n\n".join(text) + "\n")
    print("", text[-1], sep="\n")


if __name__ == "__main__": main()
