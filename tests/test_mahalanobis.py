"Mahalanobis scoring and equalised intensity: against slow versions, by their invariances, at their edges; and through a study, whose key changes only where it asks for them."
import subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.ndimage import gaussian_filter
from uad_study.core import UadError
from uad_study.scores import DRAWN, SCORES, check_score, equalised_map, mahalanobis_map, score_maps, ssim_map

seeds, quick = st.integers(0, 2**32 - 1), settings(max_examples=15, deadline=None)


def scene(seed=0, shape=(13, 11, 6), k=5, together=3, dtype=np.float64):
    "x, draws (k, ...) that vary in a few ways together and a little each, a ragged brain mask with one empty slice."
    rng = np.random.default_rng(seed)
    base, ways = rng.random(shape), rng.normal(0, .15, (together, *shape))
    draws = base + np.einsum("kj,jhwd->khwd", rng.normal(size=(k, together)), ways) + rng.normal(0, .02, (k, *shape))
    mask = rng.random(shape) < .6
    mask[..., 2] = False
    return (base + rng.normal(0, .2, shape)).astype(dtype), draws.astype(dtype), mask


def by_inverse(x, draws, mask, reg):
    "Slice by slice, pixel by pixel, as it is written: the published way, but in float64. And D^2 of each slice."
    out, squares = np.zeros(x.shape), np.zeros(x.shape[-1])
    for z in range(x.shape[-1]):
        m = mask[..., z]
        if not m.any(): continue
        r = draws[..., z][:, m].astype(float)
        covariance = np.cov(r, rowvar=False).reshape(m.sum(), m.sum()) + reg * np.eye(m.sum())
        d = x[..., z][m].astype(float) - r.mean(0)
        shares = (np.linalg.inv(covariance) @ d) * d
        out[..., z][m], squares[z] = np.sqrt(np.maximum(shares, 0)), shares.sum()
    return out, squares


@quick
@given(seeds, st.sampled_from([2, 3, 10]), st.sampled_from([1e-4, 1e-2, 1.]))
def test_equals_the_matrix_of_all_pixels(seed, k, reg):
    x, draws, mask = scene(seed, k=k)
    expected, squares = by_inverse(x, draws, mask, reg)
    ours = mahalanobis_map(x, draws, mask, reg, scale=False)
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours**2, expected**2, atol=1e-8 * max(1, expected.max()**2))
    assert (squares[[0, 1, 3]] > 0).all() and (ours**2).sum((0, 1))[0] >= squares[0] - 1e-8             # shares below 0 are left out of the map, not of the distance
    np.testing.assert_allclose(mahalanobis_map(x, draws, mask, reg), ours / ours.max(), atol=1e-12)
    everywhere, _ = by_inverse(x, draws, mask | True, reg)
    np.testing.assert_allclose(mahalanobis_map(x, draws, reg=reg), (everywhere - everywhere.min()) / np.ptp(everywhere), atol=1e-6)


def test_equals_the_published_formula_with_more_pixels_than_usual():
    x, draws, mask = scene(3, (40, 36, 3), 10)
    mask = np.ones(x.shape, bool)
    expected, _ = by_inverse(x, draws, mask, 1e-2)
    np.testing.assert_allclose(mahalanobis_map(x, draws, mask, scale=False), expected, atol=1e-7)
    np.testing.assert_allclose(mahalanobis_map(x.astype(np.float32), draws.astype(np.float32), mask, scale=False), expected, atol=2e-2)       # roots of rounded numbers near 0
    half = mahalanobis_map(x.astype(np.float32), draws.astype(np.float16), mask)
    assert half.dtype == np.float32 and np.abs(half - expected / expected.max()).mean() < 1e-3                                               # draws kept in half precision


@quick
@given(seeds)
def test_invariances(seed):
    x, draws, mask = scene(seed)
    rng, m = np.random.default_rng(seed + 1), mahalanobis_map(x, draws, mask, scale=False)
    same = lambda a, b: np.testing.assert_allclose(a**2, b**2, atol=1e-8 * max(1, m.max()**2))
    same(mahalanobis_map(x, draws[rng.permutation(len(draws))], mask, scale=False), m)                                                     # the order of the draws
    field = rng.normal(size=x.shape)
    same(mahalanobis_map(x + field, draws + field, mask, scale=False), m)                                                                  # only differences count
    same(mahalanobis_map(3 * x, 3 * draws, mask, reg=9e-2, scale=False), m)                                                                # and units do not, if reg has them too
    np.testing.assert_allclose(mahalanobis_map(3 * x, 3 * draws, mask, reg=9e-2)**2, mahalanobis_map(x, draws, mask)**2, atol=1e-8)
    shuffle = rng.permutation(x.shape[0] * x.shape[1])
    mixed = lambda v: v.reshape(*v.shape[:-3], -1, v.shape[-1])[..., shuffle, :].reshape(v.shape)
    same(mahalanobis_map(mixed(x), mixed(draws), mixed(mask), scale=False), mixed(m))                                                      # a slice is a set of pixels
    outside = [np.where(mask, v, rng.normal(0, 1e3, v.shape)) for v in (x, draws)]
    np.testing.assert_array_equal(mahalanobis_map(*outside, mask), mahalanobis_map(x, draws, mask))                                        # nothing outside touches the inside
    assert (m[~mask] == 0).all() and (m >= 0).all()


def test_slices_do_not_see_each_other():
    x, draws, mask = scene()
    other = draws.copy(); other[..., 4] += np.random.default_rng(2).normal(0, 1, other.shape[:-1])
    changed = np.abs(mahalanobis_map(x, draws, mask, scale=False) - mahalanobis_map(x, other, mask, scale=False)).max((0, 1))
    assert np.flatnonzero(changed).tolist() == [4]
    alone = np.concatenate([mahalanobis_map(x[..., z:z + 1], draws[..., z:z + 1], mask[..., z:z + 1], scale=False) for z in range(x.shape[-1])], -1)
    np.testing.assert_allclose(alone, mahalanobis_map(x, draws, mask, scale=False), atol=1e-10)


def test_its_limits():
    x, draws, mask = scene()
    d = np.abs(x - draws.mean(0)) * mask
    np.testing.assert_allclose(mahalanobis_map(x, draws, mask, 1e9, scale=False) * 1e9**.5, d, atol=1e-6)                                  # a large reg: the plain difference
    np.testing.assert_allclose(mahalanobis_map(x, draws, mask, 1e9), d / d.max(), atol=1e-6)
    np.testing.assert_allclose(mahalanobis_map(x, np.stack([draws[0]] * 4), mask, scale=False), np.abs(x - draws[0]) * mask / .1, atol=1e-9)   # restorations that agree
    a, b = draws[0], draws[1]                                                                                                              # two draws, and a scan that differs the way they do
    with_them = a + 1.5 * (b - a)
    much = mahalanobis_map(with_them, np.stack([a, b]), mask, 1e-4, scale=False) * 1e-4**.5
    assert much.max() < .05 * np.abs(with_them - (a + b) / 2)[mask].max()


def test_degenerate_inputs():
    x, draws, mask = scene(dtype=np.float32)
    assert not mahalanobis_map(x, draws, mask & False).any()                                                                               # no brain
    flat = np.full_like(x, .4)
    assert not mahalanobis_map(flat, np.stack([flat] * 3), mask).any() and not mahalanobis_map(flat, np.stack([flat] * 3)).any()           # a constant brain, restored as it is
    up = mahalanobis_map(flat + np.float32(.1), np.stack([flat] * 3), mask)
    np.testing.assert_allclose(up, mask, atol=1e-6)                                                                                        # and as another constant
    assert not mahalanobis_map(flat + np.float32(.1), np.stack([flat] * 3)).any()                                                          # the same everywhere says nothing
    one = mask & False; one[3, 4, 1] = True
    assert mahalanobis_map(x, draws, one).sum() == 1                                                                                       # a single pixel
    for k in (0, 1):
        with pytest.raises(UadError, match="covariance needs 2 or more"): mahalanobis_map(x, draws[:k], mask)
    for bad in (draws[0], draws[..., :-1], draws[:, None]):
        with pytest.raises(UadError, match="do not fit"): mahalanobis_map(x, bad, mask)
    with pytest.raises(UadError, match="mask .* differ in shape"): mahalanobis_map(x, draws, mask[1:])
    for reg in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UadError, match="reg is"): mahalanobis_map(x, draws, mask, reg)
    for bad in (np.nan, np.inf):
        y, z = x.copy(), draws.copy(); y[0, 0, 0] = z[1, 0, 0, 0] = bad
        with pytest.raises(UadError, match="NaN"): mahalanobis_map(y, draws, mask)
        with pytest.raises(UadError, match="NaN"): mahalanobis_map(x, z, mask)


def test_stacks_kinds_and_inputs_left_alone():
    (x, draws, mask), (y, more, other) = scene(1), scene(2)
    X, D, M = np.stack([[x, y], [y, x]]), np.stack([[draws, more], [more, draws]]).transpose(2, 0, 1, 3, 4, 5), np.stack([[mask, other], [other, mask]])
    out = mahalanobis_map(X, D, M)
    for i, a in (((0, 0), (x, draws, mask)), ((0, 1), (y, more, other)), ((1, 0), (y, more, other))): np.testing.assert_array_equal(out[i], mahalanobis_map(*a))
    t = mahalanobis_map(*map(torch.tensor, (x, draws, mask)))
    assert isinstance(t, torch.Tensor) and t.dtype == torch.float64
    np.testing.assert_array_equal(t.numpy(), out[0, 0])
    assert isinstance(mahalanobis_map(x, torch.tensor(draws), mask), np.ndarray)
    a, b = torch.tensor(x[..., :1]), torch.tensor(draws[..., :1])                                                                          # one slice of float64: nothing needs a copy, all the more must be one
    kept = a.clone(), b.clone()
    mahalanobis_map(a, b); mahalanobis_map(a, b, torch.ones(a.shape, dtype=torch.bool))
    assert torch.equal(a, kept[0]) and torch.equal(b, kept[1])


def test_scores_by_name():
    x, draws, mask = scene(5, (16, 15, 12), dtype=np.float32)
    maps = score_maps(x, draws[0], ("l1", *DRAWN, "ssim_0.9"), draws=draws, brain_mask=mask, reg=.05)
    assert list(maps) == ["l1", *DRAWN, "ssim_0.9"]
    np.testing.assert_array_equal(maps["mahalanobis"], mahalanobis_map(x, draws, mask, .05))
    np.testing.assert_allclose(maps["ssim_mahalanobis"], gaussian_filter(maps["mahalanobis"].astype(float), 1, mode="mirror", radius=4) * (1 - ssim_map(x, draws.mean(0), 1)), atol=1e-4)
    np.testing.assert_array_equal(maps["ssim_0.9"], score_maps(x, draws[0], ["ssim_0.9"])["ssim_0.9"])
    masked = score_maps(x, draws[0], DRAWN, draws=draws, brain_mask=mask, mask=mask, dims=2)
    np.testing.assert_allclose(masked["ssim_mahalanobis"], gaussian_filter(masked["mahalanobis"].astype(float), (1, 1, 0), mode="mirror", radius=4) * (1 - ssim_map(x, draws.mean(0), 1, mask=mask, dims=2)), atol=1e-4)
    assert set(DRAWN).isdisjoint(SCORES) and all(check_score(n) == n for n in DRAWN)
    with pytest.raises(UadError, match="ssim_mahalanobis needs several reconstructions"): score_maps(x, draws[0], ["l1", "ssim_mahalanobis"])
    with pytest.raises(UadError, match="did you mean 'mahalanobis'"): check_score("mahalanobi")


@quick
@given(seeds, st.sampled_from([np.float32, np.float64]), st.booleans())
def test_equalised_intensity(seed, dtype, ties):
    rng = np.random.default_rng(seed)
    x, mask = rng.random((7, 6, 5)).astype(dtype), rng.random((7, 6, 5)) < .7
    if ties: x = np.round(x * 8) / 8
    inside = x[mask]
    for dark in (False, True):
        ours = equalised_map(x, mask, dark=dark)
        assert ours.dtype == x.dtype and not ours[~mask].any()
        np.testing.assert_allclose(ours[mask], [((inside >= v) if dark else (inside <= v)).mean() for v in inside], atol=1e-6)             # as it is written
        np.testing.assert_array_equal(equalised_map(np.exp(3 * x) - 7, mask, dark=dark), ours)                                             # any rising change of contrast
    np.testing.assert_array_equal(equalised_map(-x, mask), equalised_map(x, mask, dark=True))
    np.testing.assert_array_equal(equalised_map(x * mask), equalised_map(x * mask, x * mask > 0))                                          # without a mask: what is above 0
    for n, dark in (("intensity_eq", False), ("intensity_eq_dark", True)): np.testing.assert_array_equal(score_maps(x, x, [n], brain_mask=mask)[n], equalised_map(x, mask, dark=dark))


def test_equalised_intensity_at_its_edges():
    x, _, mask = scene()
    assert (equalised_map(np.full((4, 4, 3), .3)) == 1).all() and not equalised_map(np.zeros((4, 4, 3))).any() and not equalised_map(x, mask & False).any()
    X, M = np.stack([x, x * 2 - 1]), np.stack([mask, mask])
    np.testing.assert_array_equal(equalised_map(X, M)[1], equalised_map(X[0], mask))
    assert isinstance(equalised_map(torch.tensor(x), mask), torch.Tensor)
    with pytest.raises(UadError, match="NaN"): equalised_map(np.where(mask, x, np.nan), mask)
    with pytest.raises(UadError, match="mask .* differ in shape"): equalised_map(x, mask[1:])


def test_the_benchmark_compares_before_it_times(monkeypatch, tmp_path):
    folder = Path(__file__).resolve().parents[1]/"benchmarks"
    kept = (folder/"mahalanobis.md").read_text()
    r = subprocess.run([sys.executable, folder/"mahalanobis.py", "--pixels", "200", "1200"], capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr
    few, many = [[float(c.replace(",", "")) for c in line.split("|")[1:-1]] for line in r.stdout.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert few[1] < 1e-6 and many[1] < 1e-6 and many[6] > 3 * few[6]                                                                       # the ratio grows with the pixels
    assert (folder/"mahalanobis.md").read_text() == kept                                                                                   # a few sizes do not replace the table
    monkeypatch.syspath_prepend(folder)
    import mahalanobis
    monkeypatch.setattr(mahalanobis, "mahalanobis_map", lambda x, *a, **k: x * 0 + 1)
    with pytest.raises(AssertionError, match="results differ"): mahalanobis.row(100, 1)
