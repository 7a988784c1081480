"Scores over healthy scans: against a slow version, each scan left out of its own mean, and from a study's settings to its tables, its inspector and a scan of one's own."
import json, shutil
from dataclasses import replace
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.ndimage import correlate1d, gaussian_filter
from uad_study import phantom
from uad_study.cohort import Cohort, Item, write_cohort
from uad_study.core import UadError, plain_settings
from uad_study.evaluate import ReportConfig, evaluate_again, evaluate_training, kept_restorations
from uad_study.judge import HealthyMaps, ScoreConfig, maps_of_reconstruction
from uad_study.metrics import volume_threshold
from uad_study.models import build_model, model_config
from uad_study.postprocess import postprocess
from uad_study.scores import healthy_reference, l1_map, l1_ssim, over_healthy, ssim_map
from uad_study.train import save_checkpoint
from uad_study.volume import GRID_SHAPE, VOXEL_ML

NAMES = ("intensity", "l1", "ssim_ens", "l1_healthy", "ssim_0.9_healthy", "l1_ssim_healthy")
SIGMAS = (.5, .9)                     # fewer than the paper's, for speed


def slowly(maps, brains):
    "Voxel by voxel from the formula: a Gaussian of 1.5 voxels, cut at 4 sigma, edges reflected, in the brain alone; a fifth of the mean where most have brain."
    t = np.arange(-6, 7)
    g = np.exp(-t**2 / 4.5) / np.exp(-t**2 / 4.5).sum()
    def blurred(v):
        for axis in range(3): v = correlate1d(v, g, axis, mode="reflect")
        return v
    n = len(maps)
    total, share = np.zeros(maps[0].shape), np.zeros(maps[0].shape)
    for m, b in zip(maps, brains): total[b] += m[b] / n; share[b] += 1 / n
    mean = blurred(total) / np.maximum(blurred(share), .3 / n)
    return mean + .2 * np.mean([mean[i] for i in zip(*np.nonzero(share > .5 + 1e-9))])


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from([np.float32, np.float64]))
def test_against_a_slow_version(seed, n, dtype):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(7, 15, 3))
    core = gaussian_filter(rng.random(shape), 1.5)
    brains = [gaussian_filter(core + .02 * rng.random(shape), .5) > np.quantile(core, .4) for _ in range(n)]
    maps = [(rng.random(shape) * 10**rng.uniform(-3, 1)).astype(dtype) for _ in range(n)]
    reference = healthy_reference(sum(m * b for m, b in zip(maps, brains)), sum(b.astype(int) for b in brains), n)
    np.testing.assert_allclose(reference, slowly(maps, brains), rtol=2e-5)
    out = over_healthy(maps[0], reference)
    assert out.dtype == dtype and out.shape == shape
    np.testing.assert_allclose(out, maps[0] / slowly(maps, brains), rtol=5e-5)
    np.testing.assert_allclose(over_healthy(torch.tensor(np.stack(maps)), torch.tensor(reference))[0], out, rtol=1e-6)
    outside = [np.where(b, m, 1e3) for m, b in zip(maps, brains)]                                                 # what is outside plays no part
    np.testing.assert_allclose(healthy_reference(sum(m * b for m, b in zip(outside, brains)), sum(b.astype(int) for b in brains), n), reference, rtol=1e-6)


@settings(max_examples=10, deadline=None)
@given(st.floats(1e-3, 1e3))
def test_the_unit_of_a_map_does_not_matter(c):
    rng = np.random.default_rng(0)
    m, brain = rng.random((3, 10, 9, 8)), np.ones((10, 9, 8), bool)
    ratio = lambda c: over_healthy(c * m[0], healthy_reference(c * m.sum(0), 3 * brain, 3))
    np.testing.assert_allclose(ratio(c), ratio(1.), rtol=1e-5)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    "A model that learnt nothing on five virtual volumes, judged over three healthy validation scans."
    d = tmp_path_factory.mktemp("over")
    subjects = [*(("val", "healthy", phantom.healthy(k, ("T2w",))) for k in (1, 7, 8)), ("val", "tumour", phantom.diseased(2, "tumour")), ("test", "tumour", phantom.diseased(3, "tumour"))]
    items = [Item(dict(subject_id=f"s{i}", contrast="T2w", pathology=p, split=split, val_fold=0 if (split, p) == ("val", "healthy") else -1), s.images["T2w"], s.brain_mask, *((s.lesion_mask, s.twins["T2w"]) if p == "tumour" else ())) for i, (split, p, s) in enumerate(subjects)]
    write_cohort(d/"cohort", items, len(items), {"source": "virtual"})
    model = build_model(model_config(dict(name="ae", channels=[8, 16], latent=8)), 1)
    save_checkpoint(d/"train"/"best.pt", model, step=7, contrast="T2w", fold=0)
    cohort, report, config = Cohort(d/"cohort"), ReportConfig(0, 0, 0, 0), ScoreConfig(names=NAMES, sigmas=SIGMAS)
    run = lambda folder, config=config: evaluate_training(cohort, "T2w", 0, d/"train", d/folder, config, report=report, perfect=False)
    return SimpleNamespace(d=d, cohort=cohort, report=report, config=config, run=run, tables=run("out"), x_hat=kept_restorations(d/"train", range(len(items)), 7))


def parts(judged, rows):
    "What l1 is divided by, from the restorations, without the package's sums."
    c = judged.cohort
    return slowly([l1_map(c.images[r], judged.x_hat[r]) for r in rows], [np.asarray(c.brain_masks[r]) for r in rows])


def test_each_healthy_scan_is_left_out_of_its_own_mean(judged):
    "The threshold that keeps healthy scans clear is that of their maps over the others', to the last digit but rounding; with themselves in the mean it would be lower."
    c = judged.cohort
    after = lambda m, r: postprocess(m.astype(np.float32), np.asarray(c.brain_masks[r]))
    l1 = {r: l1_map(c.images[r], judged.x_hat[r]) for r in range(3)}
    threshold = lambda of: volume_threshold([after(l1[r] / parts(judged, of(r)), r) for r in range(3)], None, VOXEL_ML, 1., .95)
    apart, together = threshold(lambda r: [q for q in range(3) if q != r]), threshold(lambda r: [0, 1, 2])
    cases = judged.tables["cases"]
    found = cases[(cases.score == "l1_healthy") & (cases.threshold_from == "healthy")].threshold.unique()
    assert len(found) == 1 and found[0] == pytest.approx(apart, rel=1e-4) and together < .95 * apart


def test_others_are_over_all_healthy_scans(judged):
    c, kept = judged.cohort, HealthyMaps.read(judged.d/"out", judged.cohort)
    assert kept.names == judged.config.over_healthy == ("l1", "ssim_0.9", "l1_ssim") and kept.rows == [0, 1, 2]
    maps, x, y = maps_of_reconstruction(c, 4, judged.x_hat[4], NAMES, judged.config, healthy=kept), np.asarray(c.images[4]), np.asarray(judged.x_hat[4])
    np.testing.assert_allclose(maps["l1_healthy"], l1_map(x, y) / parts(judged, range(3)), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(maps["l1_ssim_healthy"], l1_ssim(x, y, SIGMAS) / kept.reference("l1_ssim"))
    np.testing.assert_array_equal(maps["ssim_0.9_healthy"], (1 - ssim_map(x, y, .9)) / kept.reference("ssim_0.9"))
    assert list(maps) == list(NAMES) and set(judged.tables["cases"].score) == set(NAMES)


def test_the_other_scores_stay_as_they_are(judged):
    plain = judged.run("plain", ScoreConfig(names=("intensity", "l1", "ssim_ens"), sigmas=SIGMAS))
    for k in ("cases", "pooled"):
        t = judged.tables[k]
        pd.testing.assert_frame_equal(t[t.score.isin(("intensity", "l1", "ssim_ens"))].reset_index(drop=True), plain[k])
    assert not (judged.d/"plain"/HealthyMaps.FILE).exists() and (judged.d/"out"/HealthyMaps.FILE).stat().st_size < 6e6
    assert set(plain_settings(ScoreConfig())) == {"names", "erode", "median", "min_voxels", "healthy_share", "healthy_ml", "kernel_dims", "masked", "median_first", "components_in_search", "search_both", "healthy_rates", "sigmas", "temperature"}       # keys of older studies


def test_judged_again(judged, tmp_path):
    again = evaluate_again(judged.cohort, "T2w", 0, judged.d/"train", 7, tmp_path/"again", ScoreConfig(names=("l1_healthy", "l2_healthy")), "ae", None, False, judged.report)["cases"]
    before = judged.tables["cases"]
    assert again[again.score == "l1_healthy"].threshold.tolist() == before[before.score == "l1_healthy"].threshold.tolist() and (again[again.score == "l1_healthy"].dice.to_numpy() == before[before.score == "l1_healthy"].dice.to_numpy()).all()
    assert set(again.score) == {"l1_healthy", "l2_healthy"} and HealthyMaps.read(tmp_path/"again").names == ("l1", "l2")                     # one that nobody asked for before


def test_refused_before_anything_is_restored(judged, tmp_path, monkeypatch):
    monkeypatch.setitem(judged.cohort.info, "prepare", {"field_of_view": "own"})
    shutil.copytree(judged.d/"train", tmp_path/"train", ignore=shutil.ignore_patterns("recon*"))
    go = lambda: evaluate_training(judged.cohort, "T2w", 0, tmp_path/"train", tmp_path/"out", judged.config, report=judged.report)
    with pytest.raises(UadError, match="each on a grid of its own: prepare them with 'fixed', or remove it") as e: go()
    monkeypatch.setitem(judged.cohort.info, "prepare", {"field_of_view": "fixed"})
    monkeypatch.setattr(judged.cohort, "table", judged.cohort.table.assign(val_fold=[0, 1, 1, *judged.cohort.table.val_fold[3:]]))
    with pytest.raises(UadError, match="l1_healthy needs 2 or more healthy validation scans, but of T2w, fold 0, there is 1: add some") as f: go()
    assert "\n" not in f"{e.value}{f.value}" and sorted(p.name for p in tmp_path.iterdir()) == ["train"] and sorted(p.name for p in (tmp_path/"train").iterdir()) == ["best.pt"]


def test_whose_brain_carries_a_lesion_is_left_out_too():
    "Semi-synthetic lesions lie in brains that may be healthy validation scans."
    rng, brain = np.random.default_rng(0), np.zeros(GRID_SHAPE, bool)
    brain[20:70, 20:70, 10:40] = True
    maps = [np.where(brain, rng.random() + rng.random(GRID_SHAPE), 0) for _ in range(4)]
    cohort = SimpleNamespace(table=pd.DataFrame(dict(subject_id=list("abcd"), healthy_id=[None, None, None, "b"])), brain_masks=[brain] * 4, info={})
    asked = []
    def of(r): asked.append(r); return {"l1": maps[r]}
    h = HealthyMaps.made(cohort, [0, 1, 2], ["l1"], of, "T1w")
    assert asked == [0, 1, 2]
    np.testing.assert_allclose(h.reference("l1", 3, {"l1": maps[3]}), slowly([maps[0], maps[2]], [brain] * 2), rtol=1e-4)        # b's own scan, made again; not the map of b with the lesion
    assert asked == [0, 1, 2, 1]
    np.testing.assert_allclose(h.reference("l1", 1, {"l1": maps[1]}), slowly([maps[0], maps[2]], [brain] * 2), rtol=1e-4)
    np.testing.assert_allclose(h.reference("l1"), slowly(maps[:3], [brain] * 3), rtol=1e-4)
    assert asked == [0, 1, 2, 1]


def test_tables_figures_and_inspector(judged, tmp_path):
    from uad_study.interactive import plot_cases
    from uad_study.results import Results, invented_study
    from uad_study.tables import matrix, matrix_shown, table_dice, table_matrix, table_tests
    from uad_study.viewer import View, restored_models
    d = tmp_path/"study"
    invented_study(tmp_path/"invented")
    for name in ("first", "second"):
        shutil.copytree(judged.d/"out", d/name)
        for f in ("cases", "pooled", "curves", "calibration", "lesions", "restorations", "seconds"):
            if (text := (d/name/f"{f}.csv").read_text().strip()): pd.read_csv(d/name/f"{f}.csv").assign(model=name).to_csv(d/name/f"{f}.csv", index=False)
        e = json.loads((tmp_path/"invented"/"evaluate"/"result.json").read_text())
        e["parameters"] |= dict(label=name, score_config=dict(names=NAMES, sigmas=SIGMAS), train_dir="../train")
        (d/name/"result.json").write_text(json.dumps(e))
    shutil.copytree(judged.d/"cohort", d/"cohort"); shutil.copytree(judged.d/"train", d/"train")
    for name in ("metrics.jsonl", "result.json"): (d/"train"/name).write_text((tmp_path/"invented"/"train"/name).read_text().replace('"best_step": 900', '"best_step": 7'))
    r = Results("Over", "over", d/"cohort", [d/"first", d/"second"])
    labels = ["l1 over healthy", "l1 times SSIM-ens over healthy"]
    for t in (table_dice(r), table_matrix(r)): assert set(labels) <= {str(getattr(row[1], "text", row[1])) for row in t.rows}, t.name
    assert set(labels) <= {str(getattr(row[2], "text", row[2])) for row in table_tests(r).rows} and "ssim_0.9_healthy" in set(matrix(r).score) and "ssim_0.9_healthy" not in set(matrix_shown(r).score)
    assert plot_cases(r) is not None and any(n.startswith("Over healthy") for n in table_dice(r).notes)
    view = View(r.cohort, restored_models(r))
    for score in [n for n in NAMES if n.endswith("_healthy")]:
        state = view.settle(replace(view.first(), score=score, rule="val"))
        case = r.cases[(r.cases.model == "first") & (r.cases.score == score) & (r.cases.subject_id == r.cohort.table.subject_id[state.row]) & (r.cases.threshold_from == "val")].iloc[0]
        assert state.score == score and view.threshold(state) == pytest.approx(case.threshold) and view.numbers(state)["dice"] == pytest.approx(case.dice)
    for row in (0, state.row):                                                                                    # a healthy validation scan: left out here, too
        np.testing.assert_allclose(r.maps("first", row, ["l1_healthy"])["l1_healthy"], l1_map(r.cohort.images[row], judged.x_hat[row]) / parts(judged, [q for q in range(3) if q != row]), rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(view.map(replace(view.at(state, row), score="l1_healthy", post=False)), r.maps("first", row, ["l1_healthy"])["l1_healthy"] * r.cohort.brain_masks[row])
    (d/"first"/HealthyMaps.FILE).unlink()                                                                         # the sums are gone: the rest can be looked at
    model = restored_models(r)[0]
    assert not any(n.endswith("_healthy") for n in model.scores) and r.maps("first", 4, ["l1_healthy"]) is None and r.maps("first", 4, ["l1"])


@pytest.mark.parametrize("text, error", [("data: {n_val: 1}\nscores: {names: [l1, l1_healthy]}", "l1_healthy compares scans with the mean of healthy validation scans: set data.n_val to at least 2"),
                                         ("scores: {names: [l1, mahalanobis_healthy]}", "only a score of one restoration"), ("scores: {names: [l1_healthi]}", "did you mean 'l1_healthy'"),
                                         ("scores: {names: [ssim_30_healthy]}", "too wide"), ("scores: {names: [intensity_healthy]}", "name 'intensity', or one of these with _healthy")])
def test_settings_that_are_refused(tmp_path, text, error):
    from uad_study.runs import read_study
    (tmp_path/"s.yaml").write_text(f"format: uad-study/1\n{text}\n")
    with pytest.raises(UadError, match=error) as e: read_study(tmp_path/"s.yaml")
    assert "\n" not in str(e.value)


def test_keys_change_only_where_it_is_asked_for(tmp_path):
    from uad_study.runs import plan, read_study
    def runs(text):
        (tmp_path/"s.yaml").write_text(f"format: uad-study/1\ndata: {{folds: 1, contrasts: [T2w]}}\nmodels: [ddpm, fae]\n{text}\n")
        return {r.label: r.key for r in plan(read_study(tmp_path/"s.yaml"))}
    before, after = runs("scores: {names: [l1, ssim_ens]}"), runs("scores: {names: [l1, ssim_ens, l1_healthy]}")
    assert {k for k in before if before[k] != after[k]} == {"evaluate T2w ddpm f0", "report"}                        # neither trainings nor the model that is judged by its own map


def test_a_scan_of_ones_own():
    from uad_study.prepare import PrepareConfig
    from uad_study.scan import score_scan
    from uad_study.volume import GRID_AFFINE, Volume
    from uad_study.weights import Weights, histogram
    class Flat(torch.nn.Module):
        config, restores = SimpleNamespace(), False
        def reconstruct(self, x, generator): return x.clamp(max=.7)
    s, names = phantom.healthy(5, ("T1w",)), ("l1", "l1_healthy")
    brain = np.asarray(s.brain_mask)
    sums = HealthyMaps(None, ("l1",), range(3), (3 * .05 * brain)[None].astype(np.float32), brain * 3)
    make = lambda sums: Weights("flat", "T1w", Flat(), ScoreConfig(names=names), PrepareConfig(n4=False, brain_mask="atlas", template_mm=4, registration="none"), dict.fromkeys(names, 2.), dict(healthy=dict(n=3, error=[.01], histogram=histogram(s.images["T1w"], brain).tolist(), apart=[.02])), sums)
    scan = Volume(np.where(brain, 100 + 500 * s.images["T1w"], 0).astype(np.float32), GRID_AFFINE)
    r = score_scan(scan, make(sums), score="l1_healthy")
    x = r.prepared.image
    np.testing.assert_allclose(r.maps["l1_healthy"], postprocess(over_healthy(l1_map(x, r.reconstruction), sums.reference("l1")), r.prepared.brain_mask), rtol=1e-5)
    assert r.maps["l1_healthy"].max() > 5 * r.maps["l1"].max() and r.native()["anomaly"].shape == scan.data.shape
    with pytest.raises(UadError, match="l1_healthy needs the maps of healthy validation scans, which are not here"): score_scan(scan, make(None), score="l1_healthy")
