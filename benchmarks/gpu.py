"""Training and scoring on a GPU, against what the GPU can do and against MONAI: `make bench-gpu`, or python benchmarks/gpu.py. Writes benchmarks/gpu.md. --smoke: every part once, tiny, on the CPU; writes nothing."""
import argparse, sys, tempfile, time, warnings
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from unittest import mock
import numpy as np, torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
sys.path.insert(0, str(Path(__file__).parent))
import judge, peers
from uad_study import phantom
from uad_study.cohort import Cohort, Item, slice_index, take_slices, write_cohort
from uad_study.judge import ScoreConfig, judge as judging, maps_of_reconstruction
from uad_study.models import Denoiser, build_model, model_config, parameter_count
from uad_study.reconstruct import reconstruct_cohort
from uad_study.runs import cores, provenance, read_study
from uad_study.scores import ssim_ens
from uad_study.train import Team, TrainConfig, _advance, _Training, generator_for, save_checkpoint

PAPER_STEPS, FOLD_MINUTES = 19200, 18


def seconds(f, device, calls: int, warm: int) -> float:
    "Mean seconds of a call of `f` once it has been called `warm` times; the best of three runs of `calls` calls, the device waited for at both ends of a run."
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    for _ in range(warm): f()
    runs = []
    for _ in range(3):
        wait(); t = time.perf_counter()
        for _ in range(calls): f()
        wait(); runs.append((time.perf_counter() - t) / calls)
    return min(runs)


def copy_bandwidth(device, megabytes: int, calls: int) -> float:
    "Bytes per second, read and written, of a copy."
    a = torch.zeros(megabytes * 2**20, dtype=torch.uint8, device=device); b = torch.empty_like(a)
    return 2 * a.numel() / seconds(lambda: b.copy_(a), device, calls, 3)


def matmul_rate(device, n: int, calls: int) -> float:
    "FLOP/s of a product of bfloat16 matrices of edge `n`."
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2)); c = torch.empty_like(a)
    return 2 * n**3 / seconds(lambda: torch.mm(a, b, out=c), device, calls, 3)


def step_flop(config, batch: int, network=Denoiser) -> int:
    "FLOP of forward and backward pass of a training step, counted on small tensors' shapes only (nothing is computed)."
    with torch.device("meta"): denoiser = network(config)
    x, t = torch.empty(batch, 1, 96, 96, device="meta"), torch.zeros(batch, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter: denoiser(x, t).sum().backward()
    return counter.get_total_flops()


class _Traffic(torch.utils._python_dispatch.TorchDispatchMode):
    "Counts the bytes that operations read and write when each reads its inputs and writes its results once; views move nothing."
    bytes = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        if not f.is_view: self.bytes += sum(t.numel() * t.element_size() for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor))
        return out


def step_bytes(config, batch: int) -> int:
    "Bytes that the operations of forward and backward pass of a training step move one by one (a compiler joins some of them), in bfloat16; nothing is computed."
    with torch.device("meta"): denoiser = Denoiser(config).bfloat16()
    x, t = torch.empty(batch, 1, 96, 96, device="meta", dtype=torch.bfloat16), torch.zeros(batch, dtype=torch.int64, device="meta")
    with _Traffic() as counted: denoiser(x, t).sum().backward()
    return counted.bytes


def host_waits(f, device) -> int:
    "How often the host waits for the GPU in a call of `f`."
    if torch.device(device).type != "cuda": return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found: warnings.simplefilter("always"); f()
    finally: torch.cuda.set_sync_debug_mode("default")
    for w in found: print(w.filename, w.lineno, w.message, file=sys.stderr)
    return sum("synchroniz" in str(w.message) for w in found)


def heads(folder, n: int) -> Cohort:
    "A cohort of `n` healthy virtual T2w volumes, the last for validation."
    people = [phantom.healthy(i, ("T2w",)) for i in range(n)]
    write_cohort(folder, [Item(dict(subject_id=p.subject_id, contrast="T2w", pathology="healthy", split="train", val_fold=0 if i == n - 1 else -1), p.images["T2w"], p.brain_mask) for i, p in enumerate(people)], n)
    return Cohort(folder)


def training(config, batch: int, device, volumes: int, calls: int, rate: float, bandwidth: float, backend: str) -> list[str]:
    "Lines on the training step: its floors, ours (as `train` does it; compiled, too), MONAI's loop in float32 and in mixed precision, the noise's share."
    with tempfile.TemporaryDirectory() as place:
        cohort, settings = heads(Path(place)/"cohort", volumes), TrainConfig(batch_size=batch)
        def begun(name, settings): return _Training(cohort, "T2w", 0, config, settings, Path(place)/name, device, tensorboard=False, team=Team(), stop=lambda: False, tell=lambda *a, **k: None)
        t = begun("run", settings)
        plain = seconds(lambda: _advance(t), device, calls, 2)
        t.read_losses(); waits = host_waits(lambda: _advance(t), device)
        try:
            with mock.patch.object(torch, "compile", partial(torch.compile, backend=backend)): c = begun("compiled", replace(settings, compile=True))
            compiled = seconds(lambda: _advance(c), device, calls, 3)
        except Exception as e: compiled = float("inf"); print(f"compiled it does not run: {type(e).__name__}", file=sys.stderr)
        ours = min(plain, compiled)
        slices, weights = take_slices(cohort, slice_index(cohort, t.rows["train"])), t.model.denoiser.state_dict()
        x = torch.from_numpy(slices[:batch]).to(device)
        noise = seconds(lambda: t.model.noise(x, generator_for(device, 0)), device, calls, 2)
        peer = {}
        for amp in (False, True):
            loop = peers.MonaiLoop(slices, peers.MonaiDenoiser(config), batch, settings.lr, amp=amp, device=device)
            loop.network.denoiser.load_state_dict(weights)
            peer[amp] = seconds(loop.step, device, calls, 2)
        flop, moved = step_flop(config, batch), step_bytes(config, batch)
        fold, share = ours * PAPER_STEPS / 60, flop / ours / rate
        line = lambda what, figure, bar, met: f"| {what} | {figure} | {bar} | {'yes' if met else '**no**'} |"
        return [f"| training step, {parameter_count(t.model):,} parameters, batch {batch}, {t.precision}: operations | {flop / 1e12:.3g} TFLOP | | |", f"| the same: floor at the measured matrix rate | {flop / rate * 1e3:.3g} ms | | |",
                f"| the same: bytes that its operations move, one by one, in bf16 | {moved / 1e9:.3g} GB, at the measured bandwidth {moved / bandwidth * 1e3:.3g} ms | | |",
                f"| the same: ours, whole (data, noise, network, optimiser) | {plain * 1e3:.3g} ms | | |", f"| the same with train.compile | {compiled * 1e3:.3g} ms | | |",
                line("the better of both", f"{ours * 1e3:.3g} ms, {ours / max(flop / rate, 1e-12):.2f} times the floor, {share:.0%} of the matrix rate", "35 %", share >= .35),
                line("times that the host waits for the device in a step (besides each 20th, whose losses are read)", waits, "0", not waits),
                line("MONAI's DDPM tutorial loop, float32, Gaussian noise", f"{peer[False] * 1e3:.3g} ms, {peer[False] / ours:.2f} times ours", "5 times", peer[False] / ours >= 5),
                line("MONAI's loop, mixed precision", f"{peer[True] * 1e3:.3g} ms, {peer[True] / ours:.2f} times ours", "1.5 times", peer[True] / ours >= 1.5),
                line(f"a fold of {PAPER_STEPS:,} such steps", f"{fold:.3g} minutes", f"{FOLD_MINUTES} minutes", fold <= FOLD_MINUTES),
                line("simplex noise, share of a step", f"{noise * 1e3:.3g} ms, {noise / ours:.2%}", "1 %", noise < .01 * ours)]


def orders(config, batch: int, device, calls: int, backend: str = "inductor") -> list[str]:
    "Lines on forward and backward pass of the network alone in bf16, as MONAI has it and as ours is, in both orders of memory, compiled or not: what `models.placed` should choose on this device."
    g, lines = torch.Generator(device).manual_seed(0), []
    x, t = torch.rand(batch, 1, 96, 96, generator=g, device=device), torch.randint(1000, (batch,), generator=g, device=device)
    for compiled in (False, True):
        for name, network in (("MONAI's network", peers.MonaiDenoiser), ("ours", Denoiser)):
            for order, form in (("as torch makes it", torch.contiguous_format), ("channels last", torch.channels_last)):
                net = network(config).to(device, memory_format=form)
                if compiled: net.compile(backend=backend)
                def step():
                    net.zero_grad()
                    with torch.autocast(torch.device(device).type, torch.bfloat16): loss = net(x, t).square().mean()
                    loss.backward()
                try: figure = f"{seconds(step, device, calls, 3) * 1e3:.3g} ms"
                except Exception as e: figure = f"does not run ({type(e).__name__})"
                lines.append(f"| network alone, forward and backward: {name}, {order}{', compiled' * compiled} | {figure} | | |")
    return lines


def scoring(device, calls: int, bandwidth: float) -> list[str]:
    "Lines on SSIM-ens of a volume on the device, compared with the CPU's result first."
    x, x_hat, _, _ = judge.scene()
    a, b = (torch.from_numpy(v).to(device) for v in (x, x_hat))
    d = float((ssim_ens(a, b).cpu() - torch.from_numpy(ssim_ens(x.astype(np.float64), x_hat.astype(np.float64)))).abs().max())
    assert d < 1e-4, d
    t, least = seconds(lambda: ssim_ens(a, b), device, calls, 2), 3 * a.numel() * 4 / bandwidth
    with FlopCounterMode(display=False) as work, _Traffic() as counted: ssim_ens(a, b)
    return [f"| SSIM-ens of 96x96x50, eight sigmas (to {d:.0e} of float64 on the CPU) | {t * 1e3:.3g} ms; reading two volumes and writing one takes {least * 1e3:.2g} ms | 2 ms | {'yes' if t <= .002 else '**no**'} |",
            f"| the same: operations, and bytes that they move one by one | {work.get_total_flops() / 1e9:.3g} GFLOP; {counted.bytes / 1e9:.3g} GB, at the measured bandwidth {counted.bytes / bandwidth * 1e3:.3g} ms | | |"]


def cohort_of(config, device, n: int) -> list[str]:
    "Lines on `n` patients (ten are made, and packed again and again), a tenth of them for validation: restored by an untrained model, then scored and judged by SSIM-ens with all processors."
    ten, threads = [phantom.diseased(i, "tumour") for i in range(min(n, 10))], torch.get_num_threads()
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        write_cohort(place/"cohort", (Item(dict(subject_id=f"p{i}", contrast="T2w", pathology="tumour", split="val" if i < max(1, n // 10) else "test", val_fold=-1), (p := ten[i % len(ten)]).images["T2w"], p.brain_mask, p.lesion_mask, p.twins["T2w"]) for i in range(n)), n)
        c, names = Cohort(place/"cohort"), ("ssim_ens",)
        save_checkpoint(place/"untrained.pt", build_model(config), step=0, contrast="T2w")
        began = time.perf_counter()
        x_hat = reconstruct_cohort(c, range(n), place/"untrained.pt", place, device=device)
        restored = time.perf_counter()
        torch.set_num_threads(cores())
        try: cases = judging(c, "T2w", 0, lambda r: maps_of_reconstruction(c, r, x_hat[r], names, ScoreConfig()).values(), names, ScoreConfig(names=names), place/"maps", "untrained")["cases"]
        finally: torch.set_num_threads(threads)
        over = time.perf_counter()
        assert len(cases.subject_id.unique()) == n - max(1, n // 10)
    return [f"| {n:,} volumes (packed before): restored in {restored - began:.3g} s, scored and judged by SSIM-ens, with {cores()} processors, in {over - restored:.3g} s | {over - began:.3g} s | 2 minutes | {'yes' if over - began <= 120 else '**no**'} |"]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--smoke", action="store_true")
    a = p.parse_args()
    if not a.smoke and not torch.cuda.is_available(): sys.exit(f"error: no GPU is visible to torch {torch.__version__}: run this where one is (--smoke tries every part, tiny, on the CPU)")
    device, calls = ("cpu", 1) if a.smoke else ("cuda", 20)
    size = dict(megabytes=8, n=128, volumes=2, batch=2) if a.smoke else dict(megabytes=2048, n=8192, volumes=20, batch=32)
    bandwidth, rate = copy_bandwidth(device, size["megabytes"], calls), matmul_rate(device, size["n"], calls)
    demo = read_study("demo").entries[0].model
    config = model_config(demo | dict(channels=[16, 32], num_head_channels=16, patch=4) if a.smoke else "ddpm")
    lines = ["| what | measured | bar | met |", "|---|---|---|---|", f"| copy bandwidth, read and written | {bandwidth / 1e12:.3g} TB/s | | |", f"| bf16 matrix product, {size['n']} x {size['n']} | {rate / 1e12:.3g} TFLOP/s | | |",
             *training(config, size["batch"], device, size["volumes"], calls, rate, bandwidth, "eager" if a.smoke else "inductor"), *orders(config, size["batch"], device, calls, "eager" if a.smoke else "inductor"), *scoring(device, calls, bandwidth),
             *cohort_of(config, device, 3 if a.smoke else 1000)]
    v = provenance(device)
    text = ["# A smoke run on the CPU: its figures mean nothing" if a.smoke else "# Speed on a GPU", f"Measured by `make bench-gpu`, {v['time'][:10]}, commit {str(v['commit'])[:12]}{' with changes' if v['dirty'] else ''}: {v['device']}; Python {v['python']}, "
            f"torch {v['packages']['torch']}, monai {version('monai')}. Means over {calls} calls, the best of three runs.", "\n".join(lines)]
    print("\n\n".join(text))
    if not a.smoke: (Path(__file__).parent/"gpu.md").write_text("\n\n".join(text) + "\n")


if __name__ == "__main__": main()
