"Our scores, metrics, post-processing and noise against independent implementations, and the properties that they must have."
import numpy as np, pytest, torch
from conftest import pair
from hypothesis import given, settings, strategies as st
from scipy.ndimage import binary_erosion, label, median_filter
from uad_study.core import UadError
from uad_study.metrics import auprc, best_threshold, dice
from uad_study.noise import simplex_noise
from uad_study.postprocess import components, postprocess
from uad_study.scores import SIGMAS, SCORES, kernel_size, l1_map, score_maps, ssim_ens, ssim_map, ssim_uniform

SIZES = dict(zip(SIGMAS, (3, 5, 5, 7, 9, 11, 11, 13)))
seeds = st.integers(0, 2**32 - 1)
quick = settings(max_examples=25, deadline=None)

@pytest.mark.parametrize("sigma", SIGMAS)
def test_ssim_equals_torchmetrics(sigma):
    from torchmetrics.functional.image import structural_similarity_index_measure as reference
    x, y = pair()
    L = max(np.ptp(x), np.ptp(y))
    assert kernel_size(sigma) == SIZES[sigma]
    t = lambda a: torch.tensor(a)[None, None]
    _, theirs = reference(t(x), t(y), gaussian_kernel=True, sigma=sigma, kernel_size=SIZES[sigma], data_range=L, return_full_image=True)
    ours = ssim_map(x, y, sigma)
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, theirs[0, 0].numpy(), atol=1e-5)
    np.testing.assert_allclose(ssim_map(x, y, sigma, data_range=L), ours, atol=1e-12)
    np.testing.assert_allclose(ssim_map(x.astype(np.float32), y.astype(np.float32), sigma), ours, atol=1e-4)

def test_half_computes_in_float32():
    x, y = pair(dtype=np.float16)
    for f in (l1_map, ssim_ens, lambda a, b: ssim_map(a, b, .3)):
        half, single = f(torch.tensor(x), torch.tensor(y)), f(x.astype(np.float32), y.astype(np.float32))
        assert half.dtype == torch.float32 and single.dtype == np.float32
        np.testing.assert_array_equal(half.numpy(), single)

@quick
@given(seeds, st.sampled_from(SIGMAS))
def test_ssim_is_symmetric_bounded_and_one_on_equal(seed, sigma):
    x, y = pair(seed, (9, 10, 8), np.float32)
    s = ssim_map(x, y, sigma)
    np.testing.assert_array_equal(s, ssim_map(y, x, sigma))
    np.testing.assert_array_equal(ssim_map(x, x, sigma), np.ones_like(x))
    assert (np.abs(s) <= 1 + 1e-6).all()

@quick
@given(seeds)
def test_ensemble_lies_between_its_scales(seed):
    x, y = pair(seed, (9, 10, 8))
    anomaly = np.stack([1 - ssim_map(x, y, s) for s in SIGMAS])
    for ens in (ssim_ens(x, y), ssim_uniform(x, y)):
        assert (anomaly.min(0) - 1e-12 <= ens).all() and (ens <= anomaly.max(0) + 1e-12).all()
    w = np.exp(anomaly - 1); w /= w.sum(0)
    np.testing.assert_allclose(ssim_ens(x, y), (w * anomaly).sum(0), atol=1e-12)
    assert (ssim_ens(x, y) >= ssim_uniform(x, y) - 1e-12).all()                 # the softmax leans towards the suspicious scales

def test_ensemble_weights_are_uniform_where_scales_agree():
    x, y = pair()
    np.testing.assert_allclose(ssim_ens(x, y, sigmas=(.9, .9, .9)), 1 - ssim_map(x, y, .9), atol=1e-12)
    np.testing.assert_allclose(ssim_ens(x, x), np.zeros_like(x), atol=1e-12)

def test_stacks_give_each_volume_its_own_range():
    x, y = pair(dtype=np.float32)
    X, Y = np.stack([[x, 10 * x], [y, x]]), np.stack([[y, 10 * y], [x, x]])
    for f in (l1_map, ssim_ens, lambda a, b: ssim_map(a, b, 1.1)):
        out = f(X, Y)
        assert out.shape == X.shape
        for i in np.ndindex(2, 2): np.testing.assert_array_equal(out[i], f(X[i], Y[i]))
    np.testing.assert_allclose(ssim_map(X, Y, .9)[0, 0], ssim_map(X, Y, .9)[0, 1], atol=1e-5)

def test_score_maps_share_but_do_not_change():
    x, y = pair(dtype=np.float32)
    together = score_maps(x, y, SCORES)
    for name, f in SCORES.items(): np.testing.assert_array_equal(together[name], f(x, y))
    np.testing.assert_array_equal(together["ssim_ens"], ssim_ens(x, y))

@pytest.mark.parametrize("f", [l1_map, ssim_ens, ssim_uniform, lambda a, b: ssim_map(a, b, .9)])
def test_scores_refuse_nan_and_other_shapes(f):
    x, y = pair()
    for bad in (np.nan, np.inf):
        z = y.copy(); z[0, 0, 0] = bad
        with pytest.raises(UadError, match="NaN"): f(x, z)
        with pytest.raises(UadError, match="NaN"): f(z, x)
    with pytest.raises(UadError, match="shape"): f(x, y[:-1])
    with pytest.raises(UadError): f(x[0], y[0])

def test_too_small_for_the_window():
    x, y = pair(shape=(24, 20, 6))
    with pytest.raises(UadError, match="7 voxels"): ssim_map(x, y, 1.7)
    assert ssim_map(x, y, 1.5).shape == x.shape

def test_constant_volumes_are_defined():
    for v in (0., .3, 1.):
        c = np.full((9, 9, 9), v)
        np.testing.assert_array_equal(ssim_map(c, c, 1.1), 1)
        np.testing.assert_allclose(ssim_ens(c, c), 0, atol=1e-12)
    assert np.isfinite(ssim_map(np.zeros((9, 9, 9)), np.ones((9, 9, 9)), 1.1)).all()

@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=1, max_size=30), st.sampled_from(["float16", "float32", "float64"]), st.sampled_from([.1, 1e-7, 1.]))
def test_best_threshold_is_the_optimum(rows, dtype, step):
    scores, labels = np.array([1 + r[0] * step for r in rows]).astype(dtype), np.array([r[1] for r in rows])
    t, best = best_threshold(scores, labels)
    assert isinstance(t, float) and isinstance(best, float)
    if not labels.any():
        assert t == scores.max() and np.isnan(best); return
    candidates = [np.nextafter(scores.min(), scores.dtype.type(-np.inf)), *scores]
    assert best == max(dice(scores > c, labels) for c in candidates)
    assert best == dice(scores > t, labels)

@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_best_threshold_between_neighbouring_numbers(dtype):
    a = dtype(1)
    for _ in range(4):                                                                        # the middle of two neighbours rounds to either
        b = np.nextafter(a, dtype(2))
        scores, labels = np.array([a, b]), np.array([False, True])
        t, best = best_threshold(scores, labels)
        assert best == 1 == dice(scores > t, labels)
        a = b

def test_best_threshold_refuses_nan():
    with pytest.raises(UadError, match="NaN"): best_threshold([0., np.nan], [0, 1])
    with pytest.raises(UadError): best_threshold([0., 1.], [0, 2])
    with pytest.raises(UadError): best_threshold([0., 1.], [0])

@quick
@given(seeds, st.sampled_from([1, 4, 10**6]))
def test_auprc_equals_sklearn(seed, levels):
    from sklearn.metrics import average_precision_score
    rng = np.random.default_rng(seed)
    s, l = np.round(rng.random((5, 9, 4)) * levels).astype(np.float32), rng.random((5, 9, 4)) < .15
    l[0, 0, 0] = True
    assert auprc(s, l) == pytest.approx(average_precision_score(l.ravel(), s.ravel()), abs=1e-12)

@settings(max_examples=12, deadline=None)
@given(seeds, st.sampled_from([np.float32, np.float64]), st.sampled_from([0, 1, 3]), st.sampled_from([1, 3, 5, 7]), st.booleans())
def test_postprocess_equals_scipy(seed, dtype, erode, median, signed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(4, 30, 3))
    score, mask = (rng.random(shape) - .5 * signed).astype(dtype), rng.random(shape) < rng.choice([.5, .97, 1])
    cross = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], bool)
    eroded = np.stack([binary_erosion(mask[..., z], cross, iterations=erode) if erode else mask[..., z] for z in range(shape[2])], -1)
    ours = postprocess(score, mask, erode, median)
    assert ours.dtype == dtype
    np.testing.assert_array_equal(ours, median_filter(score * eroded, size=median))
    np.testing.assert_array_equal(postprocess(np.stack([score, score * 2]), mask, erode, median)[1], ours * 2)
    first = postprocess(score, mask, erode, median, median_first=True)
    assert first.dtype == dtype
    np.testing.assert_array_equal(first, median_filter(score, size=median) * eroded)
    np.testing.assert_array_equal(postprocess(np.stack([score, score * 2]), mask, erode, median, median_first=True)[1], first * 2)
    np.testing.assert_array_equal(postprocess(np.stack([score] * 2), np.stack([~mask, mask]), erode, median, median_first=True)[1], first)

@pytest.mark.parametrize("filled", [61, 62, 63, 64])
def test_postprocess_where_half_the_window_is_zero(filled):
    v = np.zeros((11, 11, 11), np.float32)
    block = np.zeros(125, np.float32); block[:filled] = 1 + np.arange(filled); v[3:8, 3:8, 3:8] = block.reshape(5, 5, 5)          # one window with `filled` of its 125 voxels
    ours = postprocess(v, np.ones(v.shape, bool), erode=0)
    assert (ours[5, 5, 5] > 0) == (filled >= 63)
    np.testing.assert_array_equal(ours, median_filter(v, size=5))

@quick
@given(seeds, st.sampled_from([6, 18, 26]), st.integers(1, 9))
def test_components_keeps_the_large(seed, connectivity, least):
    mask = np.random.default_rng(seed).random((8, 9, 7)) < .2
    kept = components(mask, least, connectivity)
    distance = {6: 1, 18: 2, 26: 3}[connectivity]
    labels, n = label(mask, (np.abs(np.indices((3, 3, 3)) - 1).sum(0) <= distance))
    expected = np.isin(labels, [i for i in range(1, n + 1) if (labels == i).sum() >= least])
    np.testing.assert_array_equal(kept, expected)

def package_fields(n, size, cells, seed=0):
    "Layers (n, len(cells), size, size) of the opensimplex package at random places."
    import opensimplex
    rng, out = np.random.default_rng(seed), []
    for i in range(n):
        opensimplex.seed(seed + i)
        out.append([opensimplex.noise2array(*(rng.random((2, 1)) * 50 + np.arange(size) / c)).T for c in cells])
    return np.array(out)

def test_simplex_layers_have_the_statistics_of_opensimplex():
    "Std, range, quantiles, autocorrelation and spectrum of layers with cells of 8 and 2 pixels."
    cells, size = (8, 2), 32
    theirs = package_fields(24, size, cells)
    g = torch.Generator().manual_seed(0)
    for k, cell in enumerate(cells):
        a, b = theirs[:, k], torch.cat([simplex_noise(8, size, octaves=1, frequency=cell, generator=g) for _ in range(50)])[:, 0].numpy()
        assert b.std() == pytest.approx(a.std(), rel=.06) and abs(b.mean()) < .02
        assert np.abs(b).max() == pytest.approx(.866, abs=.003)                               # reached by the package as well
        np.testing.assert_allclose(np.quantile(b, (.05, .25, .5, .75, .95)), np.quantile(a, (.05, .25, .5, .75, .95)), atol=.06)
        for lag in (1, 2, 4, 6):
            for axis in (1, 2):
                c = [float((f * np.roll(f, lag, axis)).take(range(lag, size), axis).mean() / f.var()) for f in (a, b)]
                assert c[0] == pytest.approx(c[1], abs=.08), (cell, lag, axis)
        power = [(np.abs(np.fft.rfft2(f))**2).mean(0) for f in (a, b)]
        r = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
        bands = [np.array([p[(r >= lo) & (r < hi)].sum() for lo, hi in ((0, .1), (.1, .2), (.2, .35), (.35, .8))]) / p.sum() for p in power]
        np.testing.assert_allclose(bands[1], bands[0], atol=.04)

def test_simplex_layer_equals_opensimplex_on_the_same_lattice():
    import opensimplex
    from opensimplex.internals import _init
    from uad_study.noise import _K, _reach, _weighted
    for seed in (1, 2):
        opensimplex.seed(seed)
        perm, p, low = _init(seed)[0], np.arange(45) / 5.3, -4
        at = np.arange(low, 14)
        pick = torch.tensor((perm[(perm[at[:, None] & 255] + at) & 255] & 14) // 2).view(-1, 1)
        x, y = torch.tensor(p).float()[:, None], torch.tensor(p).float()
        ours = _weighted(*_reach((1 - _K) * x - _K * y - low, (1 - _K) * y - _K * x - low, len(at)), pick)[0]
        np.testing.assert_allclose(ours, opensimplex.noise2array(p, p).T, atol=5e-6)

def test_simplex_octaves_halve_the_cell():
    "The same draws with one octave more differ by a layer of half the cell, weaker by the persistence."
    draw = lambda k, f=16, p=.5: simplex_noise(300, 32, octaves=k, frequency=f, persistence=p, generator=torch.Generator().manual_seed(2))[:, 0].numpy()
    correlation = lambda f, lag: float((f[:, lag:] * f[:, :-lag]).mean() / f.var())
    for k, cell in ((2, 8), (3, 4)):
        layer, alone = draw(k) - draw(k - 1), draw(1, cell)
        assert layer.std() / alone.std() == pytest.approx(.5 ** (k - 1), rel=.05)
        for lag in (1, 3, 6): assert correlation(layer, lag) == pytest.approx(correlation(alone, lag), abs=.05)

def test_simplex_octaves_add_up_as_the_released_code_s():
    "Amplitude persistence^o and frequency / 2^o, not normalised: the std within and over fields is that of the same sum with the package's layers."
    cells = [32 / 2**o for o in range(5)]
    theirs = (package_fields(20, 24, cells) * .8 ** np.arange(5)[:, None, None]).sum(1)
    ours = torch.cat([simplex_noise(8, 24, octaves=5, frequency=32, generator=torch.Generator().manual_seed(s)) for s in range(50)])[:, 0].numpy()
    assert ours.std() == pytest.approx(.37 * (.64 ** np.arange(5)).sum()**.5, rel=.05)        # independent layers, each with std 0.37
    assert theirs.std() == pytest.approx(ours.std(), rel=.15)
    assert theirs.std((1, 2)).mean() == pytest.approx(ours.std((1, 2)).mean(), rel=.1)

def test_simplex_fields_are_independent_and_seeded():
    draw = lambda s, **kw: simplex_noise(6, (33, 47), generator=torch.Generator().manual_seed(s), **kw)
    x = draw(0)
    assert x.shape == (6, 1, 33, 47) and x.dtype == torch.float32
    assert torch.equal(x, draw(0)) and not torch.equal(x, draw(1))
    assert len({float(v) for v in x[:, 0, 0, 0]}) == 6 and (x[:, 0, 0, 0] != 0).all()
    assert (draw(0, anchored=True)[:, 0, 0, 0] == 0).all()
    g = torch.Generator().manual_seed(3)
    many = torch.cat([simplex_noise(4, 8, generator=g) for _ in range(500)])[:, 0, 0, 0]
    assert abs(float((many[::2] * many[1::2]).mean() / many.var())) < .12 and float(many.std()) == pytest.approx(.59, abs=.04)

@pytest.mark.gpu
def test_scores_and_noise_on_cuda():
    if not torch.cuda.is_available(): pytest.skip("no CUDA device")
    x, y = (torch.tensor(a) for a in pair(dtype=np.float32))
    for f in (l1_map, ssim_ens): torch.testing.assert_close(f(x.cuda(), y.cuda()).cpu(), f(x, y), atol=1e-6, rtol=0)
    g = lambda: torch.Generator().manual_seed(0)
    torch.testing.assert_close(simplex_noise(4, 96, generator=g(), device="cuda").cpu(), simplex_noise(4, 96, generator=g()), atol=1e-4, rtol=0)
    assert simplex_noise(2, 32, generator=torch.Generator("cuda").manual_seed(0)).is_cuda
