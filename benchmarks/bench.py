"""Time the parts of the study on this machine: `make bench`, or python benchmarks/bench.py. Writes benchmarks/bench.md."""
import time
from pathlib import Path
import numpy as np, torch
from scipy.ndimage import median_filter
from uad_study import phantom
from uad_study.judge import ScoreConfig
from uad_study.metrics import best_threshold
from uad_study.models import build_model, model_config, parameter_count
from uad_study.noise import simplex_noise
from uad_study.postprocess import components, erode_mask, median3d, postprocess
from uad_study.reconstruct import reconstruct_volume
from uad_study.runs import provenance, read_study
from uad_study.scores import score_maps, ssim_ens


def best(f, n=3):
    f()
    times = []
    for _ in range(n):
        t = time.perf_counter(); f(); times.append(time.perf_counter() - t)
    return min(times)


def main(threads=1):
    torch.set_num_threads(threads)
    g = lambda: torch.Generator().manual_seed(0)
    s = phantom.diseased(1, "ms"); x = s.images["T2w"]; x_hat = s.twins["T2w"]
    names = ScoreConfig().names
    rows = [("virtual healthy subject, T1w and T2w", best(lambda: phantom.healthy(1)))]
    for p in phantom.PATHOLOGIES: rows.append((f"virtual subject with {p}", best(lambda: phantom.diseased(1, p))))
    rows.append(("simplex noise, 32 fields 96x96, 6 octaves", best(lambda: simplex_noise(32, 96, generator=g()))))
    rows.append((f"all {len(names)} scores of a volume", best(lambda: score_maps(x, x_hat, names))))
    rows.append(("SSIM-ens of a volume", best(lambda: ssim_ens(x, x_hat))))
    eroded = erode_mask(s.brain_mask)
    noise = np.random.default_rng(0).random(eroded.shape, np.float32) * eroded                      # other than 0 everywhere in the brain, as a model's map is
    for size in (3, 5):
        assert np.array_equal(median3d(noise, size), median_filter(noise, size))
        rows += [(f"median of {size}x{size}x{size} voxels, noise in an eroded brain: scipy.ndimage", best(lambda: median_filter(noise, size))), ("the same: median3d", best(lambda: median3d(noise, size)))]
    rows.append(("post-processing of such a map", best(lambda: postprocess(noise, s.brain_mask))))
    rows.append(("components of a prediction", best(lambda: components(x > .4))))
    scores, labels = np.random.default_rng(0).random(1_500_000, np.float32), np.random.default_rng(1).random(1_500_000) > .95
    rows.append(("exact best threshold, 1.5 million voxels", best(lambda: best_threshold(scores, labels))))
    demo = read_study("demo").entries[0]
    model = build_model(model_config(demo.model))
    optimizer = torch.optim.Adam(model.parameters()); batch = torch.rand(demo.train["batch_size"], 1, 96, 96)
    def step(): loss = model.loss(batch, g()); optimizer.zero_grad(); loss.backward(); optimizer.step()
    rows.append((f"demo DDPM ({parameter_count(model):,} parameters), training step of {len(batch)}", best(step)))
    rows.append(("demo DDPM, restoring a volume", best(lambda: reconstruct_volume(model.eval(), x, (0,)))))
    p = provenance()
    lines = [f"Measured by `make bench`, {p['time'][:10]}, commit {str(p['commit'])[:12]}{' with changes' if p['dirty'] else ''}: {threads} thread of {p['cores']} ({p['machine']}), Python {p['python']}, "
             f"torch {p['packages']['torch']}. Best of 3.", "", "| what | seconds |", "|---|---|", *(f"| {n} | {t:.3f} |" for n, t in rows), ""]
    (Path(__file__).parent/"bench.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__": main()
