"Mahalanobis scoring and equalised intensity: against slow versions, by their invariances, at their edges; and through a study, whose key changes only where it asks for them."
import json, logging, shutil, subprocess, sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch
from conftest import TINY
from hypothesis import given, settings, strategies as st
from scipy.ndimage import gaussian_filter
from uad_study import phantom, runs
from uad_study.cohort import Cohort, Item, open_reconstructions, write_cohort
from uad_study.core import UadError, digest, from_dict
from uad_study.evaluate import ReportConfig, evaluate_again, evaluate_training, kept_restorations
from uad_study.judge import ScoreConfig, maps_of_reconstruction
from uad_study.models import build_model, model_config, placed
from uad_study.reconstruct import further_draws, reconstruct_volume
from uad_study.scores import DRAWN, SCORES, check_score, equalised_map, l1_ssim, mahalanobis_map, score_maps, ssim_map
from uad_study.train import save_checkpoint

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


# ---- in a study

AE = "  - {name: ae, channels: [8, 16], latent: 8}\n"
BOTH = TINY.replace("train: {steps", AE + "train: {steps")
NAMES = ("intensity", "intensity_eq", "l1", "ssim_ens", "l1_ssim", *DRAWN)


def read(tmp_path, text, **changes):
    "The study of a YAML text with some sections replaced."
    for section, line in changes.items(): text = "\n".join(f"{section}: {line}" if l.startswith(f"{section}:") else l for l in text.splitlines())
    (tmp_path/"s.yaml").write_text(text)
    return runs.read_study(tmp_path/"s.yaml")


def keys(study): return {r.label: r.key for r in runs.plan(study)}


def test_only_a_study_that_asks_has_another_key(tmp_path):
    before = {k: v for k, v in asdict(ScoreConfig()).items() if k not in ("draws", "mahalanobis_reg")}
    assert digest(ScoreConfig()) == digest(before) and list(json.loads(json.dumps(before))) == list(read(tmp_path, TINY).entries[0].scores)       # as it was before there were these settings
    for name in ("demo", "demo-train", "paper", "ablation"):
        assert not {"draws", "mahalanobis_reg"} & {k for e in runs.read_study(name).entries for k in e.scores}
    plain, asked, ten, five = (keys(read(tmp_path, TINY, scores=s)) for s in ("{names: [l1]}", "{names: [l1, mahalanobis]}", "{names: [l1, mahalanobis], draws: 10, mahalanobis_reg: 0.01}", "{names: [l1, mahalanobis], draws: 5}"))
    changed = lambda a, b: sorted({l.split()[0] for l in a if a[l] != b[l]})
    assert asked == ten and changed(plain, asked) == changed(asked, five) == ["evaluate", "report"]                                            # nothing is trained again
    assert from_dict(ScoreConfig, before) == ScoreConfig()                                                                                      # older results still open


def test_a_model_that_restores_always_the_same_goes_without(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "uad_study"): ddpm, ae = read(tmp_path, BOTH, scores="{names: [l1, mahalanobis, ssim_mahalanobis], draws: 4, mahalanobis_reg: 0.1}").entries
    assert [r.message.partition(": ")[2] for r in caplog.records] == ["mahalanobis and ssim_mahalanobis: left out for ae, which restores always the same"]
    assert ddpm.scores["names"] == ["l1", *DRAWN] and ddpm.scores["draws"] == 4 and ddpm.scores["mahalanobis_reg"] == .1
    assert ae.scores == read(tmp_path, BOTH, scores="{names: [l1]}").entries[1].scores
    caplog.clear()
    own = BOTH.replace("latent: 8}", "latent: 8, scores: {names: [l1, l2]}}")
    with caplog.at_level(logging.WARNING, "uad_study"): assert read(tmp_path, own, scores="{names: [l1, mahalanobis], draws: 4}").entries[1].scores["names"] == ["l1", "l2"]
    assert not caplog.records                                                                                                                  # it never asked


@pytest.mark.parametrize("text, scores, message", [
    (BOTH.replace("latent: 8}", "latent: 8, scores: {names: [l1, mahalanobis]}}"), "{names: [l1]}", "models[1], scores.names: mahalanobis compares a scan with several restorations, and the model 'ae' restores always the same: remove it"),
    (BOTH, "{names: [mahalanobis]}", "models[1], scores.names: mahalanobis compares"),
    (BOTH.replace("  - {name: ddpm, channels: [16, 32], num_res_blocks: 1, num_head_channels: 32, norm_num_groups: 16, patch: 4}\n", ""), "{names: [l1, mahalanobis]}", "none of the models ae makes different ones"),
    (TINY, "{names: [l1], draws: 5}", "scores.draws: is for the scores mahalanobis and ssim_mahalanobis"),
    (TINY, "{names: [l1], mahalanobis_reg: 0.1}", "scores.mahalanobis_reg: is for the scores"),
    (TINY, "{names: [l1, mahalanobis], draws: 1}", "scores.draws: a covariance needs 2 or more, not 1"),
    (TINY, "{names: [l1, mahalanobis], mahalanobis_reg: 0}", "scores.mahalanobis_reg: must be 0.000001 or more"),
    (TINY, "{names: [l1, mahalanobi]}", "did you mean 'mahalanobis'"),
])
def test_what_cannot_be_is_refused_in_one_line(tmp_path, text, scores, message):
    with pytest.raises(UadError) as e: read(tmp_path, text, scores=scores)
    assert message in str(e.value) and "\n" not in str(e.value) and "s.yaml" in str(e.value)


def test_variants_of_these_settings(tmp_path):
    more = "variants: [{label: five, scores: {draws: 5}}]\n"
    a, b = read(tmp_path, TINY + more, scores="{names: [l1, mahalanobis]}").entries
    assert b.says == "scores.draws 10 → 5" and b.scores["draws"] == 5 and "draws" not in a.scores
    a, b = read(tmp_path, TINY + more.replace("draws: 5", "draws: 10"), scores="{names: [l1, mahalanobis], draws: 4}").entries
    assert b.says == "scores.draws 4 → 10" and "draws" not in b.scores
    with pytest.raises(UadError, match="changes nothing"): read(tmp_path, TINY + more.replace("draws: 5", "draws: 10"), scores="{names: [l1, mahalanobis]}")


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    "A cohort of six volumes, an untrained diffusion model and an AE, and what judging the first gives with and without the scores of several restorations: a namespace."
    d = tmp_path_factory.mktemp("drawn")
    subjects = [("val", "healthy", phantom.healthy(1, ("T2w",))), *(("val", "tumour", phantom.diseased(k, "tumour")) for k in (2,)), *(("test", "tumour", phantom.diseased(k, "tumour")) for k in (3, 4)), ("test", "healthy", phantom.healthy(5, ("T2w",)))]
    items = [Item(dict(subject_id=f"s{i}", contrast="T2w", pathology=p, split=split, val_fold=0 if split == "val" else -1), s.images["T2w"], s.brain_mask, *((s.lesion_mask, s.twins["T2w"]) if p == "tumour" else ())) for i, (split, p, s) in enumerate(subjects)]
    write_cohort(d/"cohort", items, len(items), {"source": "virtual"})
    model = placed(build_model(model_config(dict(channels=[16, 32], num_res_blocks=1, num_head_channels=16, norm_num_groups=16, patch=4)), 1), "cpu")
    with torch.no_grad():
        for p in model.parameters(): p.add_(.02)
    for name, m in (("train", model), ("ae", build_model(model_config(dict(name="ae", channels=[8, 16], latent=8)), 1))): save_checkpoint(d/name/"best.pt", m, step=7, contrast="T2w", fold=0)
    cohort, report = Cohort(d/"cohort"), ReportConfig(0, 0, 0, 0)
    run = lambda names, folder, train="train", **kw: evaluate_training(cohort, "T2w", 0, d/train, d/folder, ScoreConfig(names=names, **kw), report=report, perfect=False)
    without = run(("intensity", "l1", "ssim_ens"), "plain")
    kept = sorted(p.name for p in (d/"train").iterdir())
    return SimpleNamespace(d=d, cohort=cohort, model=model.eval(), report=report, run=run, without=without, kept_without=kept, tables=run(NAMES, "out", draws=3), config=ScoreConfig(names=NAMES, draws=3))


def test_the_other_scores_and_restorations_stay_as_they_are(judged):
    assert [p.split("-")[0] for p in judged.kept_without] == ["best.pt", "reconstructions"]                                                     # nobody asked for draws: none are made
    shared = ("intensity", "l1", "ssim_ens")
    cases = judged.tables["cases"]
    assert set(cases.score) == set(NAMES)
    same = cases[cases.score.isin(shared)].reset_index(drop=True)
    assert same.equals(judged.without["cases"].set_index("score").loc[list(dict.fromkeys(same.score))].reset_index()[same.columns].reset_index(drop=True))
    assert sorted(p.name.split("-")[0] for p in (judged.d/"train").iterdir()) == ["best.pt", "draws", "reconstructions"]


def test_draws_are_kept_in_order_and_made_once(judged):
    folder, = (judged.d/"train").glob("draws-*")
    volumes, info = open_reconstructions(folder)
    assert info["draws"] == 2 and info["step"] == 7 and list(volumes) == [0, 1, 2, 3, 4] and volumes[0].shape == (2, 96, 96, 50) and volumes[0].dtype == np.float16
    x, seed = judged.cohort.images[2], (0, "restore", "s2")
    np.testing.assert_array_equal(volumes[2], further_draws(judged.model, x, 2, seed))
    np.testing.assert_array_equal(volumes[2], further_draws(judged.model, x, 4, seed)[:2])                                                      # more draws begin with these
    first = reconstruct_volume(judged.model, x, seed)
    np.testing.assert_array_equal(kept_restorations(judged.d/"train", [2], 7)[2], first)
    assert min(np.abs(a - b).mean() for a, b in ((first, volumes[2][0]), (first, volumes[2][1]), (volumes[2][0], volumes[2][1]))) > 1e-4       # all are different
    before = {p: p.stat().st_mtime_ns for p in (judged.d/"train").rglob("*.npy")}
    again = judged.run(NAMES, "again", draws=3)
    assert before == {p: p.stat().st_mtime_ns for p in (judged.d/"train").rglob("*.npy")} and again["cases"].equals(judged.tables["cases"])


def test_the_maps_that_are_judged(judged):
    "Of one volume, from what is kept, against the functions themselves."
    x, brain = np.asarray(judged.cohort.images[2]), np.asarray(judged.cohort.brain_masks[2])
    x_hat, more = kept_restorations(judged.d/"train", [2], 7)[2], kept_restorations(judged.d/"train", [2], 7, draws=2)[2]
    maps, several = maps_of_reconstruction(judged.cohort, 2, x_hat, NAMES, judged.config, more), np.concatenate([x_hat[None], more])
    np.testing.assert_array_equal(maps["mahalanobis"], mahalanobis_map(x, several, brain))
    np.testing.assert_array_equal(maps["intensity_eq"], equalised_map(x, brain))
    np.testing.assert_array_equal(maps["l1_ssim"], l1_ssim(x, np.asarray(x_hat)))                                                              # of the one restoration that the others score
    assert not np.array_equal(maps["mahalanobis"], maps_of_reconstruction(judged.cohort, 2, x_hat, NAMES, replace(judged.config, mahalanobis_reg=1e-4), more)["mahalanobis"])
    two = maps_of_reconstruction(judged.cohort, 2, x_hat, NAMES, replace(judged.config, draws=2), more)                                       # of those that are kept, as many as are asked for
    np.testing.assert_array_equal(two["mahalanobis"], mahalanobis_map(x, several[:2], brain))


def test_judged_again_from_what_is_kept(judged, tmp_path):
    again = lambda config, **kw: evaluate_again(judged.cohort, "T2w", 0, judged.d/"train", 7, tmp_path/"again", config, "ddpm", None, False, judged.report, **kw)
    assert again(judged.config)["cases"].equals(judged.tables["cases"])
    assert set(again(replace(judged.config, draws=2, names=("l1", "ssim_mahalanobis")))["cases"].score) == {"l1", "ssim_mahalanobis"}
    with pytest.raises(UadError, match="keeps no 4 restorations of each volume, which mahalanobis needs"): again(replace(judged.config, draws=4))
    shutil.copytree(judged.d/"train", tmp_path/"older", ignore=shutil.ignore_patterns("draws-*"))                                                # of a study that never asked
    older = lambda config: evaluate_again(judged.cohort, "T2w", 0, tmp_path/"older", 7, tmp_path/"again", config, "ddpm", None, False, judged.report)
    assert older(ScoreConfig(names=("intensity", "l1", "ssim_ens")))["cases"].equals(judged.without["cases"])
    with pytest.raises(UadError, match="keeps no 3 restorations"): older(judged.config)


def test_nothing_to_draw(judged):
    with pytest.raises(UadError, match="'ae' restores always the same.* score it without mahalanobis and ssim_mahalanobis") as e: judged.run(("l1", "mahalanobis"), "none", "ae")
    assert "\n" not in str(e.value) and not list((judged.d/"ae").glob("draws-*"))


def test_results_and_inspector_show_what_was_judged(judged, tmp_path):
    from uad_study.results import Results, invented_study, score_label, score_order
    from uad_study.viewer import View, restored_models
    d = tmp_path/"study"
    shutil.copytree(judged.d/"cohort", d/"cohort"); shutil.copytree(judged.d/"train", d/"train"); shutil.copytree(judged.d/"out", d/"evaluate")
    invented_study(tmp_path/"invented")
    for name in ("metrics.jsonl", "result.json"): (d/"train"/name).write_text((tmp_path/"invented"/"train"/name).read_text().replace('"best_step": 900', '"best_step": 7'))
    e = json.loads((tmp_path/"invented"/"evaluate"/"result.json").read_text())
    e["parameters"] |= dict(score_config=dict(names=NAMES, draws=3), train_dir="../train")
    (d/"evaluate"/"result.json").write_text(json.dumps(e))
    r = Results("Drawn", "drawn", d/"cohort", [d/"evaluate"])
    assert score_order(set(r.table.score)) == ["intensity", "intensity_eq", "l1", "ssim_ens", "l1_ssim", *DRAWN] and all("_" not in score_label(s) for s in r.table.score)
    model, = restored_models(r)
    assert set(DRAWN) | {"intensity_eq", "l1_ssim"} <= set(model.scores) and model.scores[-1] == "ssim_ens" and set(model.draws) == set(model.volumes)
    view = View(r.cohort, [model])
    for score in ("intensity_eq", "l1_ssim", *DRAWN):
        state = view.settle(replace(view.first(), score=score, rule="val"))
        case = r.cases[(r.cases.score == score) & (r.cases.subject_id == r.cohort.table.subject_id[state.row]) & (r.cases.threshold_from == "val")].iloc[0]
        assert state.score == score and view.threshold(state) == pytest.approx(case.threshold) and view.numbers(state)["dice"] == pytest.approx(case.dice)
    maps = r.maps(model.name, view.first().row, ["l1", *DRAWN])
    assert list(maps) == ["l1", *DRAWN] and all(np.isfinite(m).all() and m.max() > 0 for m in maps.values())
    shutil.rmtree(next((d/"train").glob("draws-*")))                                                                                             # the arrays are gone: the rest can be looked at
    model, = restored_models(r)
    assert model.draws is None and not set(DRAWN) & set(model.scores) and "intensity_eq" in model.scores
    assert r.maps(model.name, view.first().row, ["mahalanobis"]) is None and r.maps(model.name, view.first().row, ["l1"])


class Jittery(torch.nn.Module):
    "A restoration that differs from draw to draw: what is above .75 becomes .75, and a smooth field is added."
    config, restores = SimpleNamespace(), True
    def reconstruct(self, x, generator): return x.clamp(max=.75) + .02 * torch.nn.functional.interpolate(torch.randn(len(x), 1, 6, 6, generator=generator), x.shape[-2:], mode="bilinear")


def test_a_scan_of_ones_own():
    from uad_study.prepare import PrepareConfig
    from uad_study.scan import score_scan
    from uad_study.volume import GRID_AFFINE, Volume
    from uad_study.weights import Weights, histogram
    s = phantom.healthy(5, ("T1w",))
    share = histogram(s.images["T1w"], s.brain_mask).tolist()
    names = ("intensity_eq", "l1", "l1_ssim", *DRAWN)
    w = Weights("jittery", "T1w", Jittery(), ScoreConfig(names=names, draws=4), PrepareConfig(n4=False, brain_mask="atlas", template_mm=4), dict.fromkeys(ScoreConfig(names=names).names_for("T1w"), .3), dict(healthy=dict(n=1, error=[.01], histogram=share, apart=[.02])))
    scan = Volume(np.where(s.brain_mask, 100 + 500 * s.images["T1w"], 0).astype(np.float32), GRID_AFFINE)
    r = score_scan(scan, w, score="ssim_mahalanobis")
    assert set(r.maps) == {*names, "intensity_eq_dark"} and all(np.isfinite(m).all() and m.max() > 0 for m in r.maps.values()) and r.native()["anomaly"].shape == scan.data.shape
    again = score_scan(scan, w, score="mahalanobis")
    np.testing.assert_array_equal(again.maps["mahalanobis"], r.maps["mahalanobis"])                                                             # seeded
