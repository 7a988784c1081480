"""Mahalanobis scoring of slices of some 4,000 brain pixels by a K x K system, against the matrix of all pixels: python benchmarks/mahalanobis.py [--pixels N ...]. Writes benchmarks/mahalanobis.md, if no --pixels are given.

The full way is Behrendt et al. (MICCAI 2024) as written: covariance of all pixels, regularised, inverted. The results are compared first, both in float64; then float32 is timed as well, which the published code inverts in."""
import argparse, time
from pathlib import Path
import numpy as np, torch
from uad_study.runs import provenance
from uad_study.scores import mahalanobis_map

K, REG, SLICES, PIXELS = 10, 1e-2, 50, (500, 1000, 2000, 4000)


def full(x, draws, mask, dtype=torch.float64) -> torch.Tensor:
    "The map of one slice (H, W), not scaled, from the matrix of all its brain pixels."
    r, a = draws[:, mask].to(dtype), x[mask].to(dtype)
    mean = r.mean(0)
    covariance = (r - mean).T @ (r - mean) / (len(r) - 1)
    covariance.diagonal().add_(REG)
    out = torch.zeros(x.shape, dtype=dtype)
    out[mask] = ((a - mean) @ torch.linalg.inv(covariance) * (a - mean)).clamp(min=0).sqrt()
    return out


def scene(pixels: int, seed: int = 0) -> tuple:
    "x (96, 96, SLICES), draws (K, 96, 96, SLICES), and a brain mask of `pixels` voxels in each slice: restorations that vary together, and a scan that differs from them."
    g = torch.Generator().manual_seed(seed)
    around = (torch.arange(96) - 47.5).square()
    mask = torch.zeros(96 * 96, dtype=torch.bool).index_fill_(0, (around[:, None] + around).flatten().argsort()[:pixels], True).view(96, 96, 1).expand(96, 96, SLICES)
    waves = torch.nn.functional.interpolate(torch.randn(1, K, 6, 6, SLICES // 5, generator=g), (96, 96, SLICES), mode="trilinear")[0]
    base = torch.rand(96, 96, SLICES, generator=g)
    draws = base + .03 * torch.einsum("kj,jhwd->khwd", torch.randn(K, K, generator=g), waves) / K**.5 + .01 * torch.randn(K, 96, 96, SLICES, generator=g)
    return base + .05 * torch.randn(96, 96, SLICES, generator=g), draws, mask


def seconds(f, rounds: int = 3) -> float:
    best = np.inf
    for _ in range(rounds): t = time.perf_counter(); f(); best = min(best, time.perf_counter() - t)
    return best


def row(pixels: int, rounds: int = 3) -> list:
    "Pixels; largest difference of one slice's map; seconds a slice of the full way in float64 and float32, and of ours, alone and in a volume."
    x, draws, mask = scene(pixels)
    ours = lambda s: mahalanobis_map(x[..., s], draws[..., s], mask[..., s], REG, scale=False)
    gap = float((full(x[..., 0], draws[..., 0], mask[..., 0]) - ours(slice(0, 1))[..., 0]).abs().max() / ours(slice(0, 1)).max())
    assert gap < 1e-6, f"results differ by {gap}"                                              # ours is returned in float32, as it came
    slow = [seconds(lambda: full(x[..., 0], draws[..., 0], mask[..., 0], t), min(rounds, 2)) for t in (torch.float64, torch.float32)]
    return [pixels, gap, *slow, seconds(lambda: ours(slice(0, 1)), rounds), seconds(lambda: ours(slice(None)), rounds) / SLICES]


def written(rows, p) -> str:
    table = "\n".join(f"| {n:,} | {gap:.0e} | {a:.2f} | {b:.2f} | {1000 * c:.2f} | {1000 * d:.2f} | {a / d:,.0f} | {b / d:,.0f} |" for n, gap, a, b, c, d in rows)
    return (f"Measured by `python benchmarks/mahalanobis.py`, {p['time'][:10]}, commit {str(p['commit'])[:12]}{' with changes' if p['dirty'] else ''}: {p['cores']} cores ({p['machine']}), Python {p['python']}, torch {p['packages']['torch']}, one thread.\n\n"
            f"The distance of each brain pixel of a slice to K = {K} restorations: the matrix of all pixels inverted, against a K x K system (Woodbury), alone and in a volume of {SLICES} slices.\n\n"
            f"| brain pixels | largest difference, relative | full, float64, s a slice | full, float32, s a slice | ours, one slice, ms | ours, in a volume, ms a slice | ratio to float64 | ratio to float32 |\n|---|---|---|---|---|---|---|---|\n{table}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", type=int, nargs="+", help="brain pixels of a slice, up to 9216")
    given = parser.parse_args().pixels
    torch.set_num_threads(1)
    text = written([row(n) for n in given or PIXELS], provenance())
    print(text)
    if not given: (Path(__file__).parent/"mahalanobis.md").write_text(text)
