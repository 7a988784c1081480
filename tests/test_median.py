"The median filter is SciPy's, whatever the values, shapes and sizes; the erosion and the components are SciPy's too."
import numpy as np, pytest
from hypothesis import example, given, settings, strategies as st
from scipy.ndimage import binary_erosion, generate_binary_structure, label, median_filter
from uad_study.postprocess import components, erode_mask, median3d

seeds, sizes, dtypes = st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 5, 7]), st.sampled_from([np.float32, np.float64])
shapes = st.tuples(*[st.integers(1, 14)] * 3)
KINDS = {"dense": lambda r, s: r.random(s) + 1, "signed": lambda r, s: r.standard_normal(s), "ties": lambda r, s: r.integers(0, 3, s), "signed ties": lambda r, s: r.integers(-2, 3, s),
         "all equal": lambda r, s: np.full(s, r.choice([-1.5, 0, 2.5])), "half zeros": lambda r, s: r.standard_normal(s) * (r.random(s) < .5), "few": lambda r, s: r.random(s) * (r.random(s) < .1),
         "huge and tiny": lambda r, s: r.choice([-1e30, -1e-30, 0, 1e-30, 1e30], s), "not finite": lambda r, s: r.choice([-np.inf, -1, 0, 1, np.inf], s)}

def same(a, b):
    "Bit for bit; a zero has one sign."
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a + 0.).tobytes() == (b + 0.).tobytes()

@settings(max_examples=150, deadline=None)
@given(seeds, shapes, sizes, dtypes, st.sampled_from(list(KINDS)))
def test_median_is_scipys(seed, shape, size, dtype, kind):
    v = KINDS[kind](np.random.default_rng(seed), shape).astype(dtype)
    before = v.copy()
    same(median3d(v, size), median_filter(v, size))
    np.testing.assert_array_equal(v, before)                                        # the input is left as it was

@settings(max_examples=60, deadline=None)
@given(seeds, shapes, sizes, dtypes, st.sampled_from(list(KINDS)), st.sampled_from([0, .1, .5, 1]))
def test_where_is_a_mask_afterwards(seed, shape, size, dtype, kind, share):
    r = np.random.default_rng(seed)
    v, where = KINDS[kind](r, shape).astype(dtype), r.random(shape) < share
    same(median3d(v, size, where), np.where(where, median_filter(v, size), dtype(0)))

@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_median_of_a_masked_volume(size, dtype):
    h, w, d = np.meshgrid(*[np.linspace(-1, 1, n) for n in (48, 50, 27)], indexing="ij")
    v = (np.random.default_rng(0).random(h.shape) * ((h / .75)**2 + (w / .93)**2 + (d / 1.3)**2 < 1)).astype(dtype)
    expected = median_filter(v, size)
    same(median3d(v, size), expected)
    for view, back in ((np.asfortranarray(v), v), (v[::-1, :, ::2], v[::-1, :, ::2].copy()), (v.transpose(2, 0, 1), v.transpose(2, 0, 1).copy())):        # not contiguous
        same(median3d(view, size), median_filter(back, size))

@settings(max_examples=60, deadline=None)
@given(seeds, st.tuples(*[st.integers(1, 12)] * 4), st.integers(0, 5), st.sampled_from([.5, .95, 1]))
def test_erosion_is_scipys(seed, shape, erode, share):
    mask = np.random.default_rng(seed).random(shape) < share
    cross = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], bool)[None, :, :, None]
    np.testing.assert_array_equal(erode_mask(mask, erode), binary_erosion(mask, cross, iterations=erode) if erode else mask)

@settings(max_examples=60, deadline=None)
@given(seeds, st.tuples(*[st.integers(1, 14)] * 3), st.sampled_from([0, .05, .2, .4, .9, 1]), st.sampled_from([6, 18, 26]), st.integers(0, 12), st.booleans())
@example(3, (1, 1, 10), .2, 26, 0, False)                                           # one line, on which cc3d 4.1 fails
def test_components_are_scipys(seed, shape, share, connectivity, least, fortran):
    mask = np.random.default_rng(seed).random(shape) < share
    labels, _ = label(mask, generate_binary_structure(3, {6: 1, 18: 2, 26: 3}[connectivity]))
    np.testing.assert_array_equal(components(np.asfortranarray(mask) if fortran else mask, least, connectivity), mask & (np.bincount(labels.ravel()) >= least)[labels])
