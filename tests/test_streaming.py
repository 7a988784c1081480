"Pooled metrics that stream against the plain ones, scikit-learn and brute force, and their memory."
import math, subprocess, sys, tracemalloc
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import average_precision_score, precision_recall_curve
from uad_study.core import UadError
from uad_study.metrics import auprc, best_threshold, dice, lesion_free_threshold
from uad_study.streaming import Pooled

TINY = float(np.finfo(np.float32).smallest_subnormal)
FAR = float(np.finfo(np.float32).max)


def check(volumes, most=2**18, points=(1, 7, 200)):
    "Everything that `Pooled` says of `volumes` (a list) against the plain functions on their concatenation."
    s, l = (np.concatenate([np.ravel(v[i]) for v in volumes]) for i in (0, 1))
    l = l.astype(bool)
    p = Pooled(lambda: iter(volumes), most)
    assert (p.n, p.n_positive) == (s.size, l.sum())
    plain = best_threshold(s, l)
    np.testing.assert_array_equal(p.best_threshold(), plain)
    fractions = [0, .01, .5, 1 / 3, .999]
    np.testing.assert_array_equal(p.quantile_thresholds(fractions), [lesion_free_threshold(s, f) for f in fractions])
    if not l.any():
        assert math.isnan(p.auprc()) and p.best_threshold()[0] == s.max()
        return p
    assert p.best_threshold()[1] == dice(s > p.best_threshold()[0], l)
    assert p.auprc() == pytest.approx(auprc(s, l), abs=1e-12)
    for n in points:
        c = p.curve(n)
        assert c["recall"][-1] == 1 and 1 <= len(c["recall"]) <= n and c["threshold"].dtype == (s.dtype if s.dtype.kind == "f" else float)
        for t, recall, precision in zip(*c.values()): assert recall == (s[l] > t).mean() and precision == l[s > t].mean()
        steps = -(-np.arange(1, n + 1) * p.n_positive // n) / p.n_positive                                        # the smallest recalls that reach each step
        reached = np.unique([(s[l] >= v).mean() for v in np.sort(s[l])])
        np.testing.assert_array_equal(c["recall"], np.unique([reached[reached >= r - 1e-12].min() for r in steps]))
    return p


values = st.one_of(st.sampled_from([0., -0., TINY, -TINY, 2 * TINY, 1., np.nextafter(np.float32(1), np.float32(2)), -1., FAR, -FAR, .1]), st.floats(-FAR, FAR, width=32),
                   st.floats(-1, 1, width=16), st.integers(-3, 3).map(float))

@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(st.tuples(values, st.booleans()), max_size=30), min_size=1, max_size=5).filter(lambda v: sum(map(len, v))), st.sampled_from(["float16", "float32", "float64"]), st.sampled_from([16, 17, 40, 2**18]))
def test_any_values_in_any_volumes(volumes, dtype, most):
    with np.errstate(over="ignore"):
        volumes = [(np.clip(np.array([s for s, _ in v], np.float64), np.finfo(dtype).min, np.finfo(dtype).max).astype(dtype), np.array([l for _, l in v], bool)) for v in volumes]
    check(volumes, most, (1, 5))

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["float16", "float32", "float64"]), st.sampled_from([16, 64, 300, 2**18]), st.sampled_from([1, 3, 20, 1000, None]), st.floats(.001, .9))
def test_larger_volumes_with_and_without_ties(seed, dtype, most, steps, share):
    rng = np.random.default_rng(seed)
    volumes = []
    for _ in range(4):
        l = rng.random((9, 10, 11)) < share
        s = np.where(rng.random(l.shape) < .3, 0, rng.gamma(1, .1, l.shape)) + l * rng.gamma(1, .1, l.shape)
        volumes.append(((np.round(s * steps) / steps if steps else s).astype(dtype), rng.choice([l, l.astype(np.uint8)]) if rng.random() < .5 else l.astype(float)))
    check(volumes, most, (10,))

def plateau(n, higher=None):
    "n positives, then n times two others and a positive: Dice is 2/3 at each positive from the n-th on; a little higher at the one of number `higher`, whose neighbour it changes places with."
    flat = np.tile([False, False, True], n)
    if higher is not None: flat[3 * higher + 1:3 * higher + 3] = True, False
    return np.linspace(1, 0, 4 * n, dtype=np.float32), np.r_[np.ones(n, bool), flat]

def cases():
    rng = np.random.default_rng(0)
    n = 5000
    l = rng.random(n) < .02
    yield "all equal", np.full(n, .25, np.float32), l
    yield "all equal to zero, of both signs", np.where(rng.random(n) < .5, 0., -0.).astype(np.float32), l
    yield "one positive", rng.random(n, np.float32), np.arange(n) == 77
    yield "one positive, the lowest", np.sort(rng.random(n, np.float32)), np.arange(n) == 0
    yield "no positive", rng.random(n, np.float32), l & False
    yield "all positive", rng.random(n, np.float32), l | True
    yield "one voxel", np.array([.5], np.float32), np.array([True])
    yield "subnormal", (rng.integers(-50, 50, n) * TINY).astype(np.float32), l
    yield "neighbours", (np.float32(1).view(np.int32) + rng.integers(0, 40, n).astype(np.int32)).view(np.float32), l
    yield "one bin of float32", np.float32(.5) + rng.random(n).astype(np.float32) * np.float32(1e-4), l
    yield "one float64 bin", .5 + rng.random(n) * 1e-12, l
    yield "doubles that are one float", .1 + np.arange(n) * 1e-17, rng.random(n) < .5
    yield "the whole range", np.concatenate([rng.normal(size=n // 2), rng.normal(size=n // 2) * 1e38]).clip(-FAR, FAR).astype(np.float32), l
    yield "the largest", np.array([FAR, -FAR, FAR, 0, 0], np.float32), np.array([1, 0, 0, 0, 1])
    yield "a plateau of Dice", *plateau(800)
    yield "negative only", -rng.random(n, np.float32), l
    yield "integers", rng.integers(-4, 5, n), l
    yield "big-endian", rng.random(n).astype(">f4"), l
    yield "two maxima of Dice", np.concatenate([rng.normal(0, .5, n), rng.normal(2.6, .2, 150), rng.normal(4, .2, 200), rng.normal(1.6, .2, 300)]).astype(np.float32), np.arange(n + 650) >= n + 150
    yield "the mass at 0 just below the optimum", np.where(l, .5 + rng.random(n), 0).astype(np.float32), l

@pytest.mark.parametrize("most", [16, 100, 2**18])
@pytest.mark.parametrize("name, s, l", list(cases()), ids=lambda v: v if isinstance(v, str) else "")
def test_adversarial(name, s, l, most):
    check([(a, b) for a, b in zip(np.array_split(s, 7), np.array_split(l, 7))], most, (1, 30))

@pytest.mark.parametrize("n, most", [(60, 16), (60, 17), (60, 40), (500, 64)])
def test_the_optimum_is_found_anywhere_on_a_plateau(n, most):
    for higher in [None, *range(0, n, 1 + n // 60)]:
        s, l = plateau(n, higher)
        assert Pooled(lambda: [(s, l)], most).best_threshold() == best_threshold(s, l)

def test_against_brute_force_and_scikit_learn():
    rng = np.random.default_rng(1)
    for trial in range(60):
        n = int(rng.integers(2, 200)); l = rng.random(n) < .3; l[0] = True
        s = (rng.integers(0, 30, n) / 8).astype(np.float32) if trial % 2 else rng.random(n, np.float32)
        p = Pooled(lambda: zip(np.array_split(s, 3), np.array_split(l, 3)), 16)
        t, best = p.best_threshold()
        every = [dice(s > v, l) for v in (s.min() - 1, *np.unique(s))]
        assert best == max(every) == dice(s > t, l)
        assert p.auprc() == pytest.approx(average_precision_score(l, s), abs=1e-12)
        precision, recall, thresholds = precision_recall_curve(l, s)
        c = p.curve(10**4)                                                                                        # more points than positives: all of them
        theirs = {float(v): (q, r) for v, q, r in zip(thresholds, precision, recall)}
        for v in np.unique(s[l]):
            at = int(np.flatnonzero(c["threshold"] < v)[0])
            assert c["threshold"][at] == np.nextafter(v, np.float32(-np.inf))
            assert (c["precision"][at], c["recall"][at]) == pytest.approx(theirs[float(v)], abs=1e-15)
        assert len(c["recall"]) == len(np.unique(s[l]))

def test_how_often_it_reads():
    rng = np.random.default_rng(2)
    volumes = [(np.where(rng.random(40000) < .5, 0, rng.gamma(1, .1, 40000)).astype(np.float32), rng.random(40000) < .02) for _ in range(10)]
    p = Pooled(lambda: iter(volumes)); assert p.passes == 1
    p.best_threshold(); assert p.passes <= 3
    before = p.passes; p.auprc(); assert p.passes == before + 2
    before = p.passes; p.curve(); assert p.passes <= before + 3
    p = Pooled(lambda: iter(volumes), 1000); T = sum((s[l] > 0).sum() for s, l in volumes)                         # those at 0 are one score, and need only their counts
    p.auprc(); assert T / 1000 + 1 <= p.passes <= T / 1000 * 1.3 + 5

def test_refusals():
    s, l = np.random.default_rng(3).random((4, 5, 6), np.float32), np.zeros((4, 5, 6), bool); l[0] = True
    one = lambda *pairs: lambda: iter(pairs)
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(UadError, match="volume 1 of the stream: .*NaN or infinite"): Pooled(one((s, l), (np.where(l, s, bad), l)))
    with pytest.raises(UadError, match="volume 0 .*same grid"): Pooled(one((s, l[1:])))
    with pytest.raises(UadError, match="volume 0 .*same grid"): Pooled(one((s, l.ravel())))
    with pytest.raises(UadError, match="volume 0 .*0 and 1"): Pooled(one((s, l * 2)))
    with pytest.raises(UadError, match="one type"): Pooled(one((s, l), (s.astype(np.float16), l)))
    with pytest.raises(UadError, match="one type"): Pooled(one((s.astype(np.longdouble), l)))
    with pytest.raises(UadError, match="no voxels"): Pooled(one())
    with pytest.raises(UadError, match="no voxels"): Pooled(one((s[:0], l[:0])))
    with pytest.raises(UadError, match="fresh iterator"): Pooled(iter([(s, l)]))
    with pytest.raises(UadError, match="at least 16"): Pooled(one((s, l)), 15)
    for fractions in ([1], [-.1], [np.nan], []):
        with pytest.raises(UadError, match="below 1"): Pooled(one((s, l))).quantile_thresholds(fractions)
    with pytest.raises(UadError, match="needs both"): Pooled(one((s, l & False))).curve()
    with pytest.raises(UadError, match="needs both"): Pooled(one((s, l))).curve(0)
    used = iter([(s, l)])
    with pytest.raises(UadError, match="from the start"): Pooled(lambda: used).best_threshold()                    # an iterator that is spent after the first pass
    for method in (Pooled.best_threshold, Pooled.curve, Pooled.auprc, lambda p: p.quantile_thresholds([.1])):
        turn = iter(range(9))
        with pytest.raises(UadError, match="same each time"): method(Pooled(lambda: [(np.float32(2)**next(turn) * s, l)]))

def generated(n, size=40000):
    def volumes():
        for i in range(n):
            r = np.random.default_rng(i)
            l = r.random(size) < .02
            yield np.where(r.random(size) < .5, 0, r.exponential(.1, size) + l * .1).astype(np.float32), l
    return volumes

def test_memory_does_not_grow():
    def peak(n):
        tracemalloc.start()
        p = Pooled(generated(n), 2**12)
        p.best_threshold(); p.auprc(); p.curve(50); p.quantile_thresholds([.01, .05])
        high = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
        return high / 2**20
    few, many = peak(10), peak(100)
    assert many < few * 1.05 + .2 < 100 * 40000 * 5 / 2**20                                                       # far less than all scores and labels

def test_memory_of_the_whole_process_does_not_grow():
    code = ("import resource, sys; sys.path.insert(0, 'tests'); from test_streaming import generated; from uad_study.streaming import Pooled\n"
            "p = Pooled(generated(int(sys.argv[1]), 200_000)); p.best_threshold(); p.auprc(); p.curve(); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)")
    few, many = (float(subprocess.run([sys.executable, "-c", code, str(n)], capture_output=True, text=True, check=True).stdout) for n in (10, 100))
    assert many - few < 25 < 100 * 200_000 * 5 / 2**20 / 3, (few, many)                                           # 95 MB of scores and labels
