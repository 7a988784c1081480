"Lesions found and false alarms, against sets of voxels and every possible pairing; and their edge cases."
import itertools, math, time
import numpy as np, pytest
from hypothesis import assume, given, settings, strategies as st
from scipy.ndimage import gaussian_filter, generate_binary_structure, label
from uad_study.core import UadError
from uad_study.metrics import dice, dice_released, lesion_table, lesion_wise

def sets(mask, connectivity):
    "The components of a mask as sets of voxels, in the order of their first voxels."
    labels, n = label(mask, generate_binary_structure(3, {6: 1, 18: 2, 26: 3}[connectivity]))
    return [set(map(tuple, np.argwhere(labels == k + 1))) for k in range(n)]

def slow(pred, truth, min_overlap, min_iou, ignore, connectivity):
    "`lesion_wise` and `lesion_table` from sets; for one-to-one matching all numbers of pairs that some best pairing has."
    lesions, parts, skip = sets(truth, connectivity), sets(pred, connectivity), set(map(tuple, np.argwhere(ignore & ~truth)))
    parts = [c - skip for c in parts if 2 * len(c & skip) < len(c)]
    iou = np.array([[len(l & c) / len(l | c) for c in parts] for l in lesions]).reshape(len(lesions), len(parts))
    covered = [len(l & set().union(*parts)) / len(l) for l in lesions]
    inside = [len(c & set().union(*lesions)) / len(c) for c in parts]
    table = [dict(lesion=k + 1, lesion_ml=len(l) * .008, covered=covered[k], found=covered[k] > 0, iou=max(iou[k], default=0)) for k, l in enumerate(lesions)]
    if not min_iou: return [(sum(c > 0 and c >= min_overlap for c in covered), sum(c > 0 and c >= min_overlap for c in inside))], len(lesions), len(parts), table
    a = np.where(iou >= min_iou, iou, 0)
    a = a if a.shape[0] <= a.shape[1] else a.T
    every = [(sum(a[i, j] for i, j in enumerate(p)), sum(a[i, j] > 0 for i, j in enumerate(p))) for p in itertools.permutations(range(a.shape[1]), a.shape[0])]
    top = max(s for s, _ in every)
    return [(n, n) for s, n in every if s > top - 1e-12], len(lesions), len(parts), table

@settings(max_examples=250, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(0, 0), (.1, 0), (.5, 0), (1, 0), (0, .1), (0, .3), (0, .5), (0, 1)]), st.sampled_from([6, 18, 26]), st.booleans())
def test_against_sets_of_voxels(seed, least, connectivity, ignoring):
    rng = np.random.default_rng(seed)
    shape, smooth = rng.integers(4, 9, 3), rng.choice([0, .6])
    field = gaussian_filter(rng.normal(size=shape), smooth)
    truth, pred, ignore = field > np.quantile(field, rng.choice([.9, .97, 1])), field + gaussian_filter(rng.normal(size=shape), smooth) * .8 > np.quantile(field, .93), rng.random(shape) < .2
    if not ignoring: ignore &= False
    few, many = sorted(len(sets(m, connectivity)) for m in (truth, pred))
    assume(least[1] == 0 or math.perm(many, few) <= 3000)                                                         # too many pairings to try
    counts, lesions, predicted, table = slow(pred, truth, *least, ignore, connectivity)
    ours = lesion_wise(pred, truth.astype(np.uint8), *least, ignore if ignoring else None, connectivity)
    assert (ours["lesions"], ours["predicted"]) == (lesions, predicted) and (ours["found"], predicted - ours["false_alarms"]) in counts
    assert ours["sensitivity"] == pytest.approx(ours["found"] / lesions if lesions else math.nan, nan_ok=True)
    assert ours["precision"] == pytest.approx((predicted - ours["false_alarms"]) / predicted if predicted else math.nan, nan_ok=True)
    r, p = ours["sensitivity"], ours["precision"]
    assert ours["f1"] == pytest.approx(math.nan if not lesions else 0 if not predicted or r + p == 0 else 2 * r * p / (r + p), nan_ok=True)
    rows = lesion_table(pred, truth, .008, ignore if ignoring else None, connectivity)
    assert len(rows) == len(table)
    for a, b in zip(rows, table): assert list(a) == list(b) and a == pytest.approx(b) and type(a["found"]) is bool

def boxes(*spans):
    m = np.zeros((12, 12, 6), bool)
    for x, y in spans: m[x[0]:x[1], y[0]:y[1], 1:4] = True
    return m

def test_one_component_over_many_lesions():
    truth, pred = boxes(((0, 2), (0, 2)), ((4, 6), (0, 2)), ((8, 12), (0, 4))), boxes(((0, 12), (0, 4)))
    assert lesion_wise(pred, truth) == dict(lesions=3, found=3, predicted=1, false_alarms=0, sensitivity=1, precision=1, f1=1)
    assert lesion_wise(pred, truth, min_iou=.1) == dict(lesions=3, found=1, predicted=1, false_alarms=0, sensitivity=1 / 3, precision=1, f1=.5)
    assert [r["iou"] for r in lesion_table(pred, truth, 1)] == pytest.approx([4 / 48, 4 / 48, 16 / 48])

def test_many_components_on_one_lesion():
    truth, pred = boxes(((0, 9), (0, 4))), boxes(((0, 2), (0, 4)), ((3, 5), (0, 4)), ((6, 9), (0, 4)), ((11, 12), (11, 12)))
    assert lesion_wise(pred, truth) == dict(lesions=1, found=1, predicted=4, false_alarms=1, sensitivity=1, precision=.75, f1=pytest.approx(6 / 7))
    assert lesion_wise(pred, truth, min_iou=.1) == dict(lesions=1, found=1, predicted=4, false_alarms=3, sensitivity=1, precision=.25, f1=.4)
    assert lesion_table(pred, truth, .5) == [dict(lesion=1, lesion_ml=54, covered=7 / 9, found=True, iou=pytest.approx(1 / 3))]

def test_pairs_are_chosen_together():
    "The first lesion's best component (IoU 6/13) is the only one of the second (2/11): with 3/10 for the first's other one, both are found."
    line = lambda *spans: np.isin(np.arange(16), np.concatenate([np.arange(*s) for s in spans]))[:, None, None]
    truth, pred = line((0, 10), (11, 15)), line((0, 3), (4, 13))
    assert [r["iou"] for r in lesion_table(pred, truth, 1)] == pytest.approx([6 / 13, 2 / 11])
    assert [lesion_wise(pred, truth, min_iou=v)["found"] for v in (.1, 2 / 11, .2, 6 / 13, .47)] == [2, 2, 1, 1, 0]

def test_half_in_the_mask_to_ignore():
    truth, pred, ignore = boxes(((0, 2), (0, 2))), boxes(((0, 2), (0, 2)), ((6, 8), (6, 8)), ((6, 8), (10, 12))), boxes(((6, 7), (6, 8)))
    assert lesion_wise(pred, truth, ignore=ignore)["false_alarms"] == 1                                           # exactly half: left out
    ignore[6, 7, 1] = False
    assert lesion_wise(pred, truth, ignore=ignore)["false_alarms"] == 2
    assert lesion_wise(pred, truth, ignore=ignore | True) == dict(lesions=1, found=1, predicted=1, false_alarms=0, sensitivity=1, precision=1, f1=1)     # the lesion itself is never ignored
    assert lesion_table(pred, truth, 1, ignore=ignore | True)[0]["iou"] == 1

@pytest.mark.parametrize("kw", [{}, dict(min_overlap=.1), dict(min_iou=.1)], ids=str)
def test_nothing_there(kw):
    some, none = boxes(((0, 2), (0, 2)), ((4, 6), (4, 6))), boxes()
    r = lesion_wise(none, some, **kw)
    assert (r["lesions"], r["found"], r["predicted"], r["false_alarms"], r["sensitivity"], r["f1"]) == (2, 0, 0, 0, 0, 0) and math.isnan(r["precision"])
    r = lesion_wise(some, none, **kw)
    assert (r["lesions"], r["predicted"], r["false_alarms"], r["precision"]) == (0, 2, 2, 0) and math.isnan(r["f1"]) and math.isnan(r["sensitivity"])
    r = lesion_wise(none, none, **kw)
    assert all(math.isnan(r[k]) for k in ("sensitivity", "precision", "f1")) and r["false_alarms"] == 0
    r = lesion_wise(some, np.roll(some, 2, 1), **kw)
    assert (r["found"], r["f1"]) == (0, 0)
    assert lesion_table(some, none, 1) == [] and [r["found"] for r in lesion_table(none, some, 1)] == [False, False]

def test_refusals():
    m = boxes(((0, 2), (0, 2)))
    for f in (lesion_wise, lambda p, t, **k: lesion_table(p, t, 1, **k)):
        for other in (m[1:], m[None], m[..., 0], m.ravel()):
            with pytest.raises(UadError, match="prediction .* same grid"): f(other, m)
            with pytest.raises(UadError, match="same grid"): f(m, other)
        with pytest.raises(UadError, match="ignore .* same grid"): f(m, m, ignore=m[1:])
        with pytest.raises(UadError, match="ignore hold values"): f(m, m, ignore=m * 2)
        with pytest.raises(UadError, match="truth hold values"): f(m, m * 3)
        with pytest.raises(UadError, match="6, 18 or 26"): f(m, m, connectivity=8)
    for kw in (dict(min_iou=1.1), dict(min_overlap=-.1), dict(min_iou=.1, min_overlap=.1), dict(min_iou=math.nan)):
        with pytest.raises(UadError, match="give one of them"): lesion_wise(m, m, **kw)

def test_any_layout_gives_the_same():
    rng = np.random.default_rng(0)
    truth, pred = rng.random((9, 8, 7)) < .1, rng.random((9, 8, 7)) < .2
    for view in (np.asfortranarray, lambda m: np.repeat(m, 2, 0)[::2], lambda m: m.astype(float)):
        assert lesion_table(view(pred), view(truth), 1) == lesion_table(pred, truth, 1)
        assert lesion_wise(view(pred), view(truth), min_iou=.1) == lesion_wise(pred, truth, min_iou=.1)

def test_a_volume_of_many_lesions_is_quick():
    rng = np.random.default_rng(0)
    field = gaussian_filter(rng.normal(size=(96, 96, 50)), 1.2)
    truth, pred = field > np.quantile(field, .997), field + gaussian_filter(rng.normal(size=field.shape), 1) * .3 > np.quantile(field, .996)
    assert 200 < len(lesion_table(pred, truth, .008)) < 1000
    def once(f): t = time.perf_counter(); f(); return time.perf_counter() - t
    assert min(once(lambda: lesion_table(pred, truth, .008)) for _ in range(7)) < .03                             # 5 ms or so; tripled for a busy machine
    assert min(once(lambda: lesion_wise(pred, truth, min_iou=.1)) for _ in range(7)) < .03

def test_dice_of_the_released_code():
    some, none = boxes(((0, 2), (0, 2))), boxes()
    assert dice_released(some, none) == 0 and math.isnan(dice(some, none)) and math.isnan(dice_released(none, none))
    assert dice_released(none, some) == dice(none, some) == 0 and dice_released(some, boxes(((0, 4), (0, 2)))) == dice(some, boxes(((0, 4), (0, 2)))) == 2 / 3
    with pytest.raises(UadError, match="same grid"): dice_released(some, none[1:])
