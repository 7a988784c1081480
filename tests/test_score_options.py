"Options: SSIM in slices and inside a mask, and components inside the threshold search, against independent implementations; and the properties that every variant must have."
import itertools, warnings
import numpy as np, pytest, torch
from conftest import pair
from hypothesis import given, settings, strategies as st
from scipy.ndimage import gaussian_filter
from uad_study.core import UadError
from uad_study.metrics import best_threshold, best_threshold_components, dice
from uad_study.postprocess import components
from uad_study.scores import SCORES, SIGMAS, kernel_size, l1_map, score_maps, ssim_ens, ssim_map, ssim_uniform

SIZES = dict(zip(SIGMAS, (3, 5, 5, 7, 9, 11, 11, 13)))
VARIANTS = {"3-D": {}, "2-D": dict(dims=2), "masked": dict(mask=True), "masked 2-D": dict(mask=True, dims=2)}
variants, sigmas = pytest.mark.parametrize("kind", VARIANTS), pytest.mark.parametrize("sigma", SIGMAS)
seeds, quick = st.integers(0, 2**32 - 1), settings(max_examples=15, deadline=None)

def masked_pair(seed=0, shape=(14, 13, 12), dtype=np.float64):
    "`conftest.pair`, and a ragged brain mask."
    return *pair(seed, shape, dtype), (np.abs(np.indices(shape).T / shape - .5).max(-1).T < .42) & (np.random.default_rng(seed + 1).random(shape) < .8)

def options(kind, mask): return VARIANTS[kind] | (dict(mask=mask) if "mask" in VARIANTS[kind] else {})

def direct(x, y, at, sigma, L, mask=None, dims=3):
    "SSIM at the voxel `at` as it is written: a weighted mean over the window, weights 0 outside the mask; borders mirrored by np.pad."
    r = kernel_size(sigma) // 2
    pad = lambda v: np.pad(v, [(r, r)] * dims + [(0, 0)] * (3 - dims), mode="reflect")[tuple(slice(i, i + (2 * r + 1 if k < dims else 1)) for k, i in enumerate(at))]
    w = np.exp(-(np.indices((2 * r + 1,) * dims + (1,) * (3 - dims), dtype=float)[:dims] - r).__pow__(2).sum(0) / (2 * sigma**2)) * (1 if mask is None else pad(mask))
    mean = lambda v: (w * v).sum() / w.sum()
    a, b = pad(x), pad(y)
    va, vb, cov = mean((a - mean(a))**2), mean((b - mean(b))**2), mean((a - mean(a)) * (b - mean(b)))
    c1, c2 = (.01 * L)**2, (.03 * L)**2
    return (2 * mean(a) * mean(b) + c1) * (2 * cov + c2) / ((mean(a)**2 + mean(b)**2 + c1) * (va + vb + c2))

@sigmas
def test_ssim_in_slices_equals_torchmetrics(sigma):
    from torchmetrics.functional.image import structural_similarity_index_measure as reference
    x, y, _ = masked_pair(shape=(24, 20, 5))
    L, t = max(np.ptp(x), np.ptp(y)), lambda a: torch.tensor(np.moveaxis(a, -1, 0)[:, None])                       # a batch of slices
    assert kernel_size(sigma) == SIZES[sigma]
    _, theirs = reference(t(x), t(y), gaussian_kernel=True, sigma=sigma, kernel_size=SIZES[sigma], data_range=L, return_full_image=True)
    ours = ssim_map(x, y, sigma, dims=2)
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, np.moveaxis(theirs[:, 0].numpy(), 0, -1), atol=1e-5)
    np.testing.assert_allclose(ssim_map(x, y, sigma, L, dims=2), ours, atol=1e-12)
    same = [np.repeat(v[..., :1], 9, -1) for v in (x, y)]                                                          # nothing changes along D: the windows agree
    np.testing.assert_allclose(ssim_map(*same, sigma, L), ssim_map(*same, sigma, L, dims=2), atol=1e-12)
    np.testing.assert_allclose(ssim_map(x[..., 2:3], y[..., 2:3], sigma, L, dims=2), ours[..., 2:3], atol=1e-12)   # one slice is enough
    np.testing.assert_allclose(ssim_map(x.astype(np.float32), y.astype(np.float32), sigma, dims=2), ours, atol=1e-4)

@variants
@sigmas
def test_ssim_equals_a_direct_implementation(kind, sigma):
    x, y, mask = masked_pair()
    kw = options(kind, mask)
    ours, rng = ssim_map(x, y, sigma, **kw), np.random.default_rng(1)
    for at in [*(np.argwhere(mask)[rng.integers(0, mask.sum(), 12)]), (0, 0, 0), (13, 12, 11), (0, 6, 11)]:
        expected = direct(x, y, at, sigma, max(np.ptp(x), np.ptp(y)), **kw) if kw.get("mask") is None or mask[tuple(at)] else 1
        assert ours[tuple(at)] == pytest.approx(expected, abs=1e-9)

def test_slices_do_not_see_each_other():
    x, y, mask = masked_pair()
    z = y.copy(); z[..., 7] = np.random.default_rng(3).random(z.shape[:2])
    for s in SIGMAS:
        for m in (None, mask):
            changed = np.abs(ssim_map(x, y, s, 1., mask=m, dims=2) - ssim_map(x, z, s, 1., mask=m, dims=2)).max((0, 1)) > 0
            assert np.flatnonzero(changed).tolist() == [7]
    assert (np.abs(ssim_map(x, y, 1.7, 1.) - ssim_map(x, z, 1.7, 1.)).max((0, 1)) > 0).sum() == 11                   # the whole reach of 6 slices, cut at the end: 3-D does

@sigmas
@pytest.mark.parametrize("dims", (2, 3))
def test_nothing_outside_the_mask_touches_the_inside(sigma, dims):
    x, y, mask = masked_pair()
    s, rng = ssim_map(x, y, sigma, 1., mask=mask, dims=dims), np.random.default_rng(2)
    assert (s[~mask] == 1).all() and (s[mask] < 1).any()
    for scale in (1, 1e6):
        other = [np.where(mask, v, rng.normal(0, scale, v.shape)) for v in (x, y)]
        np.testing.assert_array_equal(ssim_map(*other, sigma, 1., mask=mask, dims=dims), s)
        assert np.abs(ssim_map(*other, sigma, 1., dims=dims) - ssim_map(x, y, sigma, 1., dims=dims))[mask].max() > .1
    largest = [np.where(mask, v, -1e200) for v in (x, y)]                                                          # squares overflow
    np.testing.assert_array_equal(ssim_map(*largest, sigma, 1., mask=mask, dims=dims), s)
    np.testing.assert_allclose(ssim_map(x, y, sigma, mask=np.ones_like(mask), dims=dims), ssim_map(x, y, sigma, dims=dims), atol=1e-12)
    assert (ssim_map(x, y, sigma, mask=mask & False, dims=dims) == 1).all()

def test_data_range_is_of_the_whole_volume():
    x, y, mask = masked_pair()
    assert not mask[0, 0, 0]
    x[0, 0, 0] = 5
    np.testing.assert_array_equal(ssim_map(x, y, .9, mask=mask), ssim_map(x, y, .9, 5., mask=mask))

@quick
@given(seeds, st.sampled_from(SIGMAS), st.sampled_from(list(VARIANTS)))
def test_every_variant_is_symmetric_bounded_and_one_on_equal(seed, sigma, kind):
    x, y, mask = masked_pair(seed, (9, 10, 8), np.float32)
    kw = options(kind, mask)
    s = ssim_map(x, y, sigma, **kw)
    assert s.dtype == np.float32
    np.testing.assert_array_equal(s, ssim_map(y, x, sigma, **kw))
    np.testing.assert_array_equal(ssim_map(x, x, sigma, **kw), np.ones_like(x))
    assert (np.abs(s) <= 1 + 1e-6).all()

@quick
@given(seeds, st.sampled_from(list(VARIANTS)))
def test_every_ensemble_lies_between_its_scales(seed, kind):
    x, y, mask = masked_pair(seed, (9, 10, 8))
    kw = options(kind, mask)
    anomaly = np.stack([1 - ssim_map(x, y, s, **kw) for s in SIGMAS])
    ens, uniform = ssim_ens(x, y, **kw), ssim_uniform(x, y, **kw)
    for e in (ens, uniform): assert (anomaly.min(0) - 1e-12 <= e).all() and (e <= anomaly.max(0) + 1e-12).all()
    w = np.exp(anomaly - 1); w /= w.sum(0)
    np.testing.assert_allclose(ens, (w * anomaly).sum(0), atol=1e-12)
    np.testing.assert_allclose(uniform, anomaly.mean(0), atol=1e-12)
    np.testing.assert_allclose(ssim_ens(x, y, sigmas=(.9, .9, .9), **kw), 1 - ssim_map(x, y, .9, **kw), atol=1e-12)   # the scales agree: equal weights
    np.testing.assert_allclose(ssim_ens(x, x, **kw), 0, atol=1e-12)
    if "mask" in kw: assert (ens[~mask] == 0).all() and (uniform[~mask] == 0).all()

@variants
def test_scores_by_name_take_the_options(kind):
    x, y, mask = masked_pair(dtype=np.float32)
    kw = options(kind, mask)
    together = score_maps(x, y, SCORES, **kw)
    for s in SIGMAS: np.testing.assert_allclose(together[f"ssim_{s:g}"], 1 - ssim_map(x, y, s, **kw), atol=1e-6)
    np.testing.assert_array_equal(together["ssim_ens"], ssim_ens(x, y, **kw))
    np.testing.assert_array_equal(together["ssim_uniform"], SCORES["ssim_uniform"](x, y, **kw))
    np.testing.assert_array_equal(together["l1"], l1_map(x, y))

def test_each_volume_of_a_stack_has_its_own_mask():
    x, y, mask = masked_pair(dtype=np.float32)
    X, Y, masks = np.stack([x, y, x]), np.stack([y, x * 2, x]), np.stack([mask, ~mask, mask & False])
    out = ssim_map(X, Y, 1.1, mask=masks)
    for i in range(3): np.testing.assert_array_equal(out[i], ssim_map(X[i], Y[i], 1.1, mask=masks[i]))
    np.testing.assert_array_equal(ssim_map(X, Y, 1.1, mask=mask)[1], ssim_map(X[1], Y[1], 1.1, mask=mask))
    for m in (torch.tensor(mask), mask.astype(np.uint8), mask.astype(np.uint16)): np.testing.assert_array_equal(ssim_map(x, y, 1.1, mask=m), out[0])

def test_a_read_only_mask_is_no_cause_for_warnings(tmp_path):
    x, y, mask = masked_pair()
    np.save(tmp_path/"m.npy", mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(ssim_map(x, y, .9, mask=np.load(tmp_path/"m.npy", mmap_mode="r")), ssim_map(x, y, .9, mask=mask))

@variants
@pytest.mark.parametrize("v, u", list(itertools.product((0., .3, 1.), repeat=2)))
def test_constant_volumes_are_defined(kind, v, u):
    a, b, mask = np.full((9, 9, 9), v), np.full((9, 9, 9), u), np.indices((9, 9, 9)).sum(0) < 12
    kw = options(kind, mask)
    expected = np.where(mask | ("mask" not in kw), 1 if u == v else 2 * u * v / (u * u + v * v), 1)
    np.testing.assert_allclose(ssim_map(a, b, 1.1, **kw), expected, atol=1e-12)
    np.testing.assert_allclose(ssim_ens(a, b, **kw), 1 - expected, atol=1e-12)
    assert np.isfinite(ssim_map(a * mask, b * mask, .3, **kw)).all()                                               # constant inside, not over all

@variants
def test_every_variant_refuses_nan_and_other_shapes(kind):
    x, y, mask = masked_pair()
    kw = options(kind, mask)
    for f in (lambda *a, **k: ssim_map(*a, .9, **k), ssim_ens, ssim_uniform, lambda *a, **k: score_maps(*a, ["ssim_0.3"], **k)):
        for bad in (np.nan, np.inf):
            z = y.copy(); z[0, 0, 0] = bad                                                                         # outside the mask, too: mend it, or a range would be NaN
            with pytest.raises(UadError, match="NaN"): f(x, z, **kw)
        with pytest.raises(UadError, match="differ in shape"): f(x, y[:-1], **kw)
        for m in (mask[:-1], mask[..., 0], mask[None]):
            with pytest.raises(UadError, match="mask .* differ in shape"): f(x, y, **kw | dict(mask=m))
        for dims in (1, 4, None, "3"):
            with pytest.raises(UadError, match="dims"): f(x, y, **kw | dict(dims=dims))

def test_too_small_for_the_window():
    x, y, _ = masked_pair(shape=(24, 20, 6))
    with pytest.raises(UadError, match="7 voxels"): ssim_map(x, y, 1.7)
    assert ssim_map(x, y, 1.7, dims=2).shape == x.shape                                                            # slices may be few
    for v in (x, x * 0):
        with pytest.raises(UadError, match="7 voxels"): ssim_map(v[:6], v[:6], 1.7, dims=2)

def test_variances_of_float32_volumes():
    "E[x^2] - E[x]^2 in float32 errs by 1e-4 and more where the window is narrow and the image bright and smooth: so the middle of the range is taken away first."
    from uad_study.scores import _blur
    x, y, _ = masked_pair(dtype=np.float32)
    L = float(max(np.ptp(x), np.ptp(y)))
    def naive(dtype):
        a, b = (torch.tensor(v, dtype=dtype) for v in (x, y))
        ma, mb, aa, bb, ab = _blur(torch.stack([a, b, a * a, b * b, a * b]), .3)
        c1, c2 = (.01 * L)**2, (.03 * L)**2
        return ((2 * ma * mb + c1) * (2 * (ab - ma * mb) + c2) / ((ma * ma + mb * mb + c1) * (aa - ma * ma + bb - mb * mb + c2))).double().numpy()
    exact = naive(torch.float64)
    assert np.abs(naive(torch.float32) - exact).max() > 5e-5 and np.abs(ssim_map(x, y, .3) - exact).max() < 1e-5
    assert np.abs(ssim_map(x.astype(float), y.astype(float), .3) - exact).max() < 1e-7
    far, far_y = x + np.float32(1e4), y + np.float32(1e4)                                                          # far from 0: float32 would err by 1e-3
    np.testing.assert_allclose(ssim_map(far, far_y, .3), ssim_map(far.astype(float), far_y.astype(float), .3), atol=1e-5)

def after(volumes, labels, t, least, connectivity=26):
    "Pooled Dice after removal of components."
    return dice(np.concatenate([components(v > t, least, connectivity).ravel() for v in volumes]), np.concatenate([l.ravel() for l in labels]))

@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(0, 12), st.sampled_from([6, 18, 26]), st.sampled_from(["float16", "float32", "float64"]))
def test_threshold_with_components_is_the_optimum_where_all_can_be_tried(seed, least, connectivity, dtype):
    rng = np.random.default_rng(seed)
    volumes = [np.round(gaussian_filter(rng.normal(size=s), .7) * 20).astype(dtype) for s in ((6, 7, 5), (8, 4, 6))]              # fewer than 48 distinct scores
    labels = [gaussian_filter(rng.normal(size=v.shape), 1) + .01 * v > .3 for v in volumes]
    values = np.unique(np.concatenate([v.ravel() for v in volumes]))
    t, best = best_threshold_components(volumes, labels, least, connectivity=connectivity)
    if not any(l.any() for l in labels): assert np.isnan(best); return
    assert len(values) <= 48 and isinstance(t, float) and isinstance(best, float)
    every = [after(volumes, labels, c, least, connectivity) for c in (values[0] - 1, *values)]
    assert best == max(every) == after(volumes, labels, t, least, connectivity)
    assert not (np.array(every)[np.r_[values[0] - 1, values] > t] == best).any()                                                  # of equal optima the highest
    if least < 2: assert (t, best) == best_threshold(np.concatenate([v.ravel() for v in volumes]), np.concatenate([l.ravel() for l in labels]))

@quick
@given(seeds, st.sampled_from([.6, 1., 1.5]), st.sampled_from([.3, .6, 1.]))
def test_threshold_with_components_beats_the_plain_optimum(seed, smooth, contrast):
    rng = np.random.default_rng(seed)
    labels = [((np.indices((16, 18, 12)).T - rng.uniform(4, 9, 3)).T**2).sum(0) < rng.uniform(4, 16) for _ in range(2)]
    volumes = [(gaussian_filter(rng.normal(size=l.shape), smooth) + contrast * l).astype(np.float32) for l in labels]
    t, best = best_threshold_components(volumes, labels)
    plain, _ = best_threshold(np.stack(volumes), np.stack(labels))
    assert best == after(volumes, labels, t, 8) >= after(volumes, labels, plain, 8)
    assert best >= max(after(volumes, labels, c, 8) for c in np.quantile(volumes, np.linspace(.5, 1, 100))) - .03                # a grid, not exact
    assert (t, best) == best_threshold_components(volumes, labels)                                                               # deterministic
    where = [rng.random(v.shape) < .9 for v in volumes]
    t, best = best_threshold_components([v[w] for v, w in zip(volumes, where)], [l[w] for l, w in zip(labels, where)], where=where)
    masked, truth = [np.where(w, v, -9) for v, w in zip(volumes, where)], [l & w for l, w in zip(labels, where)]
    assert best == after(masked, truth, t, 8)                                                                                    # nothing is predicted elsewhere

def test_threshold_with_components_at_its_edges():
    v, l = np.zeros((5, 6, 4), np.float32), np.zeros((5, 6, 4), bool)
    assert best_threshold_components([v], [l])[0] == 0 and np.isnan(best_threshold_components([v], [l])[1])                       # no positives
    l[1:3, 1:3, 1:3] = True
    t, best = best_threshold_components([v], [l])                                                                                # a constant map: everything
    assert t < 0 and best == 2 * 8 / (120 + 8)
    assert best_threshold_components([v, l.astype(np.float32)], [l, l], where=[v > 0, l | True])[1] == 1                          # a volume without any voxel
    assert best_threshold_components([l.astype(float)], [l], 9)[1] == 2 * 8 / (120 + 8)                                          # the lesion itself is too small: rather everything
    with pytest.raises(UadError, match="NaN"): best_threshold_components([v * np.nan], [l])
    with pytest.raises(UadError, match="same grid"): best_threshold_components([v], [l[1:]])
    with pytest.raises(UadError, match="one of each"): best_threshold_components([v], [])
    with pytest.raises(UadError, match="no voxels"): best_threshold_components([], [])
    with pytest.raises(UadError, match="volumes"): best_threshold_components([v.ravel()], [l.ravel()])

@pytest.mark.parametrize("kw", [{}, dict(median_first=True), dict(masked=True), dict(kernel_dims=2, masked=True, median_first=True), dict(median=1, erode=0, median_first=True)], ids=str)
def test_region_holds_all_that_a_map_can_be(kw):
    from types import SimpleNamespace
    from uad_study.core import from_dict
    from uad_study.judge import ScoreConfig, maps_of_reconstruction, maps_of_truth, perfect_names, post_processed, region
    from uad_study.postprocess import postprocess
    x, y, _ = masked_pair(shape=(20, 22, 12), dtype=np.float32)
    brain = ((np.indices(x.shape).T - (10, 11, 6)).T**2).sum(0) < 70
    lesion = (np.indices(x.shape)[0] > 12) & (np.abs(np.indices(x.shape)[1] - 11) < 4)                                            # reaches beyond the brain mask
    cohort = SimpleNamespace(images=x[None], brain_masks=brain[None], lesion_masks=lesion[None], ignore_masks=np.zeros_like(brain)[None])
    config, names = from_dict(ScoreConfig, dict(kw, names=["l1", "ssim_0.9", "ssim_ens"]), "scores"), ("l1", "ssim_0.9", "ssim_ens")
    inside = region(cohort, 0, config)
    maps, plain = post_processed(cohort, 0, maps_of_reconstruction(cohort, 0, y, names, config).values(), config), score_maps(x, y, names, mask=brain if config.masked else None, dims=config.kernel_dims)
    for n, m in zip(names, maps):
        whole = postprocess(plain[n], brain, config.erode, config.median, median_first=config.median_first)
        assert not whole[~inside].any() and whole.any()
        np.testing.assert_array_equal(whole[inside], m)
    assert post_processed(cohort, 0, maps_of_truth(cohort, 0).values(), config).shape == (len(perfect_names()), inside.sum())

@pytest.mark.parametrize("kw, error", [(dict(kernel_dims=1), "kernel_dims is 1"), (dict(min_voxels=-1), "min_voxels"),
                                       (dict(median=4), "scores.median"), (dict(names=("ssim_30",)), "too wide")])
def test_wrong_settings_are_refused(kw, error):
    from uad_study.core import from_dict
    from uad_study.judge import ScoreConfig
    with pytest.raises(UadError, match=error): ScoreConfig(**kw)
    with pytest.raises(UadError, match=error): from_dict(ScoreConfig, kw, "scores")
