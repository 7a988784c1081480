"The inspector's labs, without a browser: preferred sigma, gallery, why a lesion was missed, and noise levels, held to slow code and to a study's own tables."
import json, shutil
from importlib.resources import files
import numpy as np, pandas as pd, pytest
from scipy.ndimage import gaussian_filter, generate_binary_structure, label, median_filter
from scipy.stats import spearmanr
from uad_study import labs
from uad_study.cohort import Cohort, Item, write_cohort
from uad_study.core import UadError
from uad_study.models import RestoreConfig
from uad_study.postprocess import erode_mask
from uad_study.reconstruct import reconstruct_volume
from uad_study.results import invented_study, open_results
from uad_study.train import load_model
from uad_study.viewer import Inspector, Restored, View, ViewState, restored_models
from uad_study.volume import GRID_AFFINE, VOXEL_ML, save_volume

EIGHT, STAGES = generate_binary_structure(3, 3), [*labs.LOSSES, "found"]


def scene(folder, seed=0, twin=True, ignore=True, table=None, **post):
    "A view of one patient with many lesions, some of them copied by the restoration, some at the edge of the brain."
    rng = np.random.default_rng(seed)
    brain, field = np.zeros((96, 96, 50), bool), gaussian_filter(rng.normal(size=(96, 96, 50)), 2)
    brain[12:84, 12:84, 6:44] = True
    lesion = brain & (field > np.quantile(field, .985))
    healthy = np.where(brain, .4 + .1 * gaussian_filter(rng.normal(size=brain.shape), 1), 0).clip(0, 1).astype(np.float32)
    x = np.where(lesion, healthy + rng.uniform(.1, .4, brain.shape), healthy).clip(0, 1).astype(np.float32)
    x_hat = np.where(brain, healthy + (x - healthy) * (gaussian_filter(rng.normal(size=brain.shape), 3) > 0) * .8 + rng.normal(0, .05, brain.shape), 0).clip(0, 1).astype(np.float32)
    skip = brain & ~lesion & (gaussian_filter(rng.normal(size=brain.shape), 2) > .08) if ignore else None
    row = dict(subject_id="one", contrast="T2w", pathology="ms", split="test", val_fold=-1) | (table or {})
    write_cohort(folder/"cohort", [Item(row, x, brain, lesion, healthy if twin else None, skip)], 1)
    return View(Cohort(folder/"cohort"), [Restored("T2w planted", {0: x_hat}, {("l1", "ms"): {"val": .12, "healthy": np.nan}}, **post)])


@pytest.fixture
def study(tmp_path): return invented_study(tmp_path/"study")


# the sigma lab

def test_inspector_preferred_sigma_against_slow_counts(tmp_path):
    view = scene(tmp_path, erode=2)
    x, _, brain, lesion = view.case(ViewState())
    parts, n = label(lesion, EIGHT)
    inside = erode_mask(brain, 2) & ~np.asarray(view.cohort.ignore_masks[0])
    for post in (False, True):
        t = labs.preferred_sigma(view, 0, 0, post, sigmas=(.5, 1.1))
        assert len(t) == n > 5 and np.isclose(t.lesion_ml.sum(), lesion.sum() * VOXEL_ML)
        for s in (.5, 1.1):
            m = view.map(ViewState(score="ssim", sigma=s, post=post))
            well = m[inside & ~lesion]
            slow = {round((parts == k).sum() * VOXEL_ML, 6): np.exp(np.mean([np.log(((well >= v).sum() + 1) / (well.size + 1)) for v in m[inside & (parts == k)]])) for k in range(1, 6) if (inside & (parts == k)).any()}
            ours = {round(ml, 6): v for ml, v in zip(t.lesion_ml, t[f"ssim_{s:g}"])}
            assert len(slow) > 2
            for ml, v in slow.items():
                if (t.lesion_ml.round(6) == ml).sum() == 1: assert ours[ml] == pytest.approx(v)
        best = t[["ssim_0.5", "ssim_1.1"]].to_numpy()
        assert np.allclose(t.best, best.min(1), equal_nan=True) and (t.preferred == np.where(best[:, 0] <= best[:, 1], .5, 1.1))[t.best.notna()].all() and t.preferred.nunique() == 2


def test_inspector_preferred_sigma_where_nothing_is_seen(tmp_path):
    view = scene(tmp_path, erode=60)
    t = labs.preferred_sigma(view, 0, 0, sigmas=(.5,))
    assert len(t) > 5 and t.preferred.isna().all() and t.best.isna().all()
    assert np.isnan(labs.rank_correlation(t)["rho"])
    with pytest.raises(UadError, match="stroke"): labs.preferred_sigmas(view, 0, "stroke")


def test_inspector_rank_correlation():
    rng = np.random.default_rng(0)
    t = pd.DataFrame(dict(patient_id=np.repeat(list("abcdefgh"), 5), lesion_ml=rng.lognormal(size=40), best=.01))
    t["preferred"] = np.round(.7 + .2 * np.log(t.lesion_ml) + rng.normal(0, .1, 40), 1)
    c = labs.rank_correlation(t)
    assert c["rho"] == pytest.approx(spearmanr(t.lesion_ml, t.preferred).statistic) and c["lo"] < c["rho"] < c["hi"] and c["lo"] > 0
    twice = labs.rank_correlation(pd.concat([t, t]))                                     # more lesions of the same patients know no more
    assert (twice["hi"] - twice["lo"]) == pytest.approx(c["hi"] - c["lo"], rel=.15) and twice["lesions"] == 80 and twice["patients"] == 8
    more = labs.rank_correlation(pd.concat([t, *(t.assign(patient_id=t.patient_id + str(k)) for k in range(3))]))
    assert more["hi"] - more["lo"] < .7 * (c["hi"] - c["lo"])
    assert labs.rank_correlation(t.assign(best=np.where(t.patient_id == "a", .5, .01)), .1)["patients"] == 7


def test_inspector_weights_are_those_of_the_ensemble(tmp_path):
    view = scene(tmp_path)
    maps, weights = labs.sigma_maps(view, 0, 0)
    brain, whole = view.case(ViewState())[2], view.map(ViewState(score="ssim_ens", post=False))
    assert np.allclose(((weights * maps).mean(0))[brain], whole[brain], atol=1e-5) and weights.std() > .01 and np.allclose(weights.mean(0), 1, atol=1e-5)
    assert np.abs(labs.sigma_maps(view, 0, 0, temperature=100)[1] - 1).max() < .02


# why was it missed

@pytest.mark.parametrize("post", [dict(), dict(erode=0, median=1, min_voxels=40), dict(erode=6, median=3, min_voxels=60), dict(median_first=True, erode=4, median=3)])
def test_inspector_every_voxel_has_one_fate(tmp_path, post):
    view = scene(tmp_path, **post)
    x, x_hat, brain, lesion = view.case(ViewState())
    m, twin, skip, t = view.models[0], np.asarray(view.cohort.twins[0]), np.asarray(view.cohort.ignore_masks[0]), .12
    raw, inside = np.abs(x - x_hat) * brain, erode_mask(brain, m.erode)
    after = median_filter(raw, m.median) * inside if m.median_first else median_filter(raw * inside, m.median)
    parts, n = label((after > t) & ~skip, EIGHT)
    large = np.isin(parts, 1 + np.flatnonzero(np.bincount(parts.ravel(), minlength=n + 1)[1:] >= m.min_voxels))
    expected = {k: np.zeros_like(lesion) for k in STAGES}
    for v in map(tuple, np.argwhere(lesion)):
        share = (x_hat[v] - twin[v]) / (x[v] - twin[v]) if x[v] != twin[v] else 0
        fate = "found" if large[v] else "components" if after[v] > t else "erosion" if not inside[v] else "median" if raw[v] > t else "restoration" if share > .5 else "score"
        expected[fate][v] = True
    fate, known = labs.fates(view, labs.state_for(view, 0, 0, "l1"))
    wrong = {k: int(((fate == i + 1) != expected[k]).sum()) for i, k in enumerate(STAGES)}
    assert known and all(n <= 3 for n in wrong.values()), wrong                            # a share of exactly one half may round either way
    table, (lesions, n) = labs.waterfall(view, 0, 0, "l1"), label(lesion, EIGHT)
    assert len(table) == n and np.array_equal((table[STAGES] / VOXEL_ML).round().sum(axis=1), (table.lesion_ml / VOXEL_ML).round())
    assert sorted((table.lesion_ml / VOXEL_ML).round()) == sorted(np.bincount(lesions[lesion])[1:])
    assert table.found.sum() == pytest.approx((large & lesion).sum() * VOXEL_ML) and table.false_ml.iloc[0] == pytest.approx((large & ~lesion).sum() * VOXEL_ML)
    assert table.lifted.sum() == pytest.approx((large & lesion & ~(inside & (raw > t))).sum() * VOXEL_ML)
    shares = labs.stage_shares(table)
    assert shares.share.sum() == pytest.approx(1) and shares.mean_share.sum() == pytest.approx(1) and (shares.ml > 0).sum() >= 4


def test_inspector_waterfall_without_a_twin(tmp_path):
    with_twin, without = (labs.waterfall(scene(tmp_path/str(k), twin=k), 0, 0, "l1") for k in (True, False))
    assert without.restoration.isna().all() and with_twin.restoration.sum() > 0
    assert np.allclose(without.score, with_twin.score + with_twin.restoration) and np.allclose(without.found, with_twin.found)
    assert "twin" in labs.figure_waterfall(without)._suptitle.get_text() and "twin" not in labs.figure_waterfall(with_twin)._suptitle.get_text()


def test_inspector_waterfall_without_a_threshold(tmp_path):
    view = scene(tmp_path)
    for score, rule in (("l1", "healthy"), ("ssim_0.7", "val")):
        with pytest.raises(UadError) as e: labs.waterfall(view, 0, 0, score, rule)
        assert "\n" not in str(e.value) and "threshold" in str(e.value)
    assert labs.waterfall(view, 0, 0, "ssim_0.7", threshold=.3).rule.eq("free").all()
    why = labs.WhyMissed(view, score="l1")
    assert bytes(why.image.value)[:4] == b"\x89PNG" and not why.text.value and why.table.found.sum() > 0
    why.rule.value = "healthy"
    assert not bytes(why.image.value) and "threshold" in why.text.value and not len(why.table)


def test_inspector_what_was_lost_before_the_grid(tmp_path):
    virtual = scene(tmp_path/"a").cohort
    assert len(labs.before_grid(virtual, [0])) == 0
    ml = float(virtual.lesion_masks[0].sum() * VOXEL_ML)
    for k, (known, whole) in enumerate([(dict(lesion_ml_scan=ml, lesion_ml_outside=3., lesion_lost=.1, scale=1.4), 30.), (dict(lesion_ml_scan=ml, lesion_ml_outside=0., lesion_lost=0., scale=1.4), 1.4 * ml)]):
        view = scene(tmp_path/f"b{k}", table=known)
        b = labs.before_grid(view.cohort, [0]).iloc[0]
        assert b.whole_ml == pytest.approx(whole) and b.field_of_view + b.grid + b.on_grid == pytest.approx(b.whole_ml) and b.on_grid == pytest.approx(ml) and b.field_of_view == known["lesion_ml_outside"]
        names = [t.get_text() for t in labs.figure_waterfall(labs.waterfall(view, 0, 0, "l1"), labs.before_grid(view.cohort, [0])).axes[0].get_yticklabels()]
        assert names[:3] == ["lesions", "field of view", "2 mm grid"]


# the gallery

def test_inspector_gallery_ranks_the_extremes(study):
    c = study.cases
    at = lambda score, who: (c.score == score) & (c.subject_id == who) & (c.threshold_from == "val") & (c.fold == 0)
    c.loc[at("ssim_ens", "ms-3"), "false_ml"], c.loc[at("ssim_ens", "ms-3"), "predicted_ml"] = 500., 510.
    c.loc[at("ssim_ens", "tumour-2"), ["lesion_ml", "predicted_ml", "false_ml"]] = 900., 5., 1.
    c.loc[at("ssim_ens", "ms-1"), "dice"], c.loc[at("l1", "ms-1"), "dice"] = .99, .01
    c.loc[at("ssim_ens", "tumour-4"), "dice"], c.loc[at("l1", "tumour-4"), "dice"] = .02, .97
    c.loc[(c.threshold_from == "oracle"), "false_ml"] = 1e6                                   # never a headline
    c.loc[(c.pathology == "healthy") & (c.threshold_from == "healthy"), "false_ml"] = 1e6
    g = labs.gallery(study, n=3).set_index(["list", "rank"])
    top = {name: g.loc[(name, 1)] for name in dict.fromkeys(g.index.get_level_values(0))}
    assert list(top) == ["Worst false positives", "Most missed", "SSIM-ens ahead of l1", "l1 ahead of SSIM-ens"]
    assert {k: (v.subject_id, round(v.value, 6)) for k, v in top.items()} == {"Worst false positives": ("ms-3", 500), "Most missed": ("tumour-2", 896), "SSIM-ens ahead of l1": ("ms-1", 98), "l1 ahead of SSIM-ens": ("tumour-4", 95)}
    assert top["l1 ahead of SSIM-ens"].score == "l1" and top["SSIM-ens ahead of l1"].score == "ssim_ens" and g.false_ml.max() == 500
    assert (g.groupby(level=0).size() <= 3).all() and (g.row == -1).all()                      # these subjects have no volume here: only number 0 has
    for _, v in g.groupby(level=0): assert v.value.is_monotonic_decreasing and v.patient_id.is_unique
    everything = labs.gallery(study, n=None)
    assert "healthy" in set(everything.pathology) and set(everything.row) == {-1, 0, 1}
    with pytest.raises(UadError, match="intensity"): labs.gallery(study, score="intensity")


def test_inspector_gallery_counts_a_person_once(study):
    study.cases["patient_id"] = study.cases.subject_id.str.split("-").str[0]
    g = labs.gallery(study, n=None)
    assert g.groupby("list").patient_id.apply(lambda s: s.is_unique).all()


def test_inspector_gallery_click_opens_the_case(study):
    view, g, chosen = View(study.cohort, restored_models(study)), labs.gallery(study, n=None), []
    shown = labs.Gallery(view, g, chosen.append)
    here = np.flatnonzero(g.row >= 0)
    assert len(here) and [s is not None for s in shown.states] == (g.row >= 0).tolist() == [not b.disabled for b in shown.buttons]
    for i in here: shown.buttons[i].click()
    assert chosen == [shown.states[i] for i in here] and {s.row for s in chosen} == {0, 1}
    for i, s in zip(here, chosen):
        found, lesion = view.found(s), view.case(s)[3]
        what = {"Worst false positives": found & ~lesion, "Most missed": lesion & ~found}.get(g.list[i], lesion)
        assert view.threshold(s) == pytest.approx(g.threshold[i]) and (not what.any() or what[:, :, s.z].sum() == what.sum((0, 1)).max())
    inspector = Inspector(view)
    labs.Gallery(view, g, getattr(inspector, "show", None) or inspector.go).buttons[here[-1]].click()
    assert inspector.state == chosen[-1]
    empty = labs.Gallery(view, g[:0], chosen.append)
    assert not empty.buttons and "No case" in empty.widget.children[0].value


# what a study's own tables say

def test_inspector_labs_of_a_method_that_gives_maps(tmp_path):
    "A method without restorations has a gallery and fates, and no sigma and no noise level; each bench says so in one line."
    base = scene(tmp_path, table=dict(subject_id="ms-0"))
    save_volume(tmp_path/"map.nii.gz", base.map(ViewState(score="l1", post=False)), GRID_AFFINE)
    view = View(base.cohort, [base.models[0], Restored("T2w theirs", {}, {("mine", "ms"): {"val": .12}}, name="theirs", contrast="T2w", maps={"mine": {0: tmp_path/"map.nii.gz"}})])
    for f in (lambda: labs.sigma_maps(view, 1, 0), lambda: labs.preferences(view, 1)):
        with pytest.raises(UadError, match="T2w theirs: gives maps") as e: f()
    lab = labs.SigmaLab(view)
    assert len(lab.table) and bytes(lab.image.value)
    lab.model.value = 1
    assert lab.text.value == str(e.value) and not bytes(lab.image.value) and not len(lab.table)
    lab.model.value = 0
    assert "prefers sigma" in lab.text.value and bytes(lab.image.value)
    why = labs.WhyMissed(view, score="l1")
    ours, offered = why.table, why.score.options
    why.model.value = 1
    assert [n for _, n in why.score.options] == ["mine"] and not why.text.value and bytes(why.image.value) and why.table.restoration.isna().all()
    assert np.allclose(why.table.found, ours.found) and np.allclose(why.table.score, ours.score + ours.restoration)
    why.model.value = 0
    assert why.score.options == offered and why.table.scored_by.iloc[0] == why.score.value
    case = dict(list="Most missed", contrast="T2w", model="theirs", fold=0, row=0, score="mine", threshold_from="val", threshold=.12)
    assert labs.state_of(view, case).model == 1


@pytest.mark.parametrize("notebook", ["explore.ipynb", "labs.ipynb"])
def test_inspector_notebooks_of_an_unfinished_study(tiny_out, tmp_path, monkeypatch, notebook):
    "A run that is planned but not there is told. Without restorations, volumes, results or runs, the first cell of a notebook is one line, which says what is missing."
    nb = json.loads((files("uad_study")/notebook).read_text())
    first = "".join(next(c for c in nb["cells"] if c["cell_type"] == "code")["source"])
    out = tmp_path/"out"; shutil.copytree(tiny_out, out); monkeypatch.chdir(out)
    report = next(out.glob("report-*/run.json")); plan = json.loads(report.read_text())
    plan["parameters"]["evaluate_dirs"].append("evaluate-T2w-ae-f0-000000000000"); report.write_text(json.dumps(plan))
    exec(first, there := {})
    assert "Not all is here: evaluate-T2w-ae-f0-000000000000: is planned, but not there" in there["inspector"].text.value
    for gone, words in (("train-*/reconstructions-*", "holds no restorations or maps"), ("prepare-*/cohort", "its volumes are not here"), ("evaluate-*/result.json", "holds no finished evaluation"), ("evaluate-*", "holds no finished evaluation"),
                        ("report*", "nothing is judged yet"), ("*/run.json", "holds no study")):
        for f in list(out.glob(gone)): shutil.rmtree(f) if f.is_dir() else f.unlink()
        with pytest.raises(UadError, match=words) as e: exec(first, {})
        assert len(str(e.value).splitlines()) == 1 and e.value._render_traceback_() == [f"error: {e.value}"]


@pytest.fixture(scope="module")
def tiny(tiny_out):
    results = open_results(tiny_out)
    return results, View(results.cohort, restored_models(results))


def test_inspector_waterfall_agrees_with_the_study(tiny):
    results, view = tiny
    for p in results.pathologies:
        for score in ("l1", "ssim_0.9", "ssim_ens"):
            t = labs.waterfalls(view, 0, p, score)
            c = results.cases[(results.cases.pathology == p) & (results.cases.score == score) & (results.cases.threshold_from == "val")].set_index("subject_id")
            assert len(c) == 2
            for who, g in t.groupby("subject_id"):
                assert g.lesion_ml.sum() == pytest.approx(c.lesion_ml[who]) and g.found.sum() == pytest.approx(c.predicted_ml[who] - c.false_ml[who], abs=.02) and g.false_ml.iloc[0] == pytest.approx(c.false_ml[who], abs=.02)


def test_inspector_gallery_agrees_with_the_inspector(tiny):
    results, view = tiny
    g = labs.gallery(results)
    assert len(g) and (g.row >= 0).all()
    for c in g.to_dict("records"):
        n = view.numbers(labs.state_of(view, c))
        assert n["threshold"] == pytest.approx(c["threshold"]) and n["false_ml"] == pytest.approx(c["false_ml"], abs=.02) and (c["pathology"] == "healthy" or n["dice"] == pytest.approx(c["dice"], abs=1e-3))


# the reconstruction lab

def test_inspector_noise_levels_are_made_once(tiny, tmp_path, monkeypatch):
    results, _ = tiny
    row, train_dir = int(results.cohort.select("test", pathology=results.pathologies[0])[0]), results.train_dirs[0]
    ours, ticks = train_dir.glob("reconstructions-*"), []
    before = sorted(p.name for p in ours)
    volumes = labs.restored_at(results, "ddpm", row, (100, 500, 5000), folder=tmp_path, tick=lambda d, n: ticks.append((d, n)))
    assert list(volumes) == [100, 500] and ticks == [(1, 2), (2, 2)]                            # 5000 is beyond the schedule
    assert sorted(p.name for p in train_dir.glob("reconstructions-*")) == before and len(list(tmp_path.iterdir())) == 1      # 500 is the study's own
    assert (volumes[500] == results.restoration("ddpm", row)).all()
    model, _ = load_model(train_dir/"best.pt", restore=RestoreConfig(t_test=100))
    slow = reconstruct_volume(model, results.cohort.images[row], (0, "restore", results.cohort.table.subject_id[row]))
    assert (volumes[100] == slow).all()
    monkeypatch.setattr(labs, "reconstruct_cohort", lambda c, rows, f, folder, **kw: {rows[0]: np.load(next(folder.glob("*/reconstructions.npy")))[0]})
    assert (labs.restored_at(results, "ddpm", row, (100,), folder=tmp_path)[100] == slow).all()
    q = labs.erased_and_kept(results.cohort, row, volumes)
    assert list(q.t) == [100, 500] and q[["ssim", "copied"]].notna().all(axis=None)


def test_inspector_noise_levels_beside_a_folder_that_is_read_only(tiny, tmp_path, monkeypatch):
    results, _ = tiny
    row, seen = int(results.cohort.select("test", pathology=results.pathologies[0])[0]), []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(labs, "reconstruct_cohort", lambda c, rows, f, folder, **kw: seen.append(folder) or {rows[0]: np.zeros((96, 96, 50))})
    labs.restored_at(results, "ddpm", row, (100,))
    monkeypatch.setattr(labs.os, "access", lambda *a: False)
    labs.restored_at(results, "ddpm", row, (100,))
    assert seen == [results.train_dirs[0], tmp_path/"uad-study"]


def test_inspector_noise_levels_that_cannot_be_had(study):
    def says(words):
        with pytest.raises(UadError) as e: labs.restored_at(study, "ddpm", 0)
        assert words in str(e.value) and "\n" not in str(e.value)
        assert labs.ReconstructionLab(study, "ddpm", 0).text.value == str(e.value)
    says("checkpoint")                                                                       # the invented study never trained
    (study.train_dirs[0]/"best.pt").write_bytes(b"")
    study.trainings[0]["parameters"]["model_config"]["name"] = "vae"
    says("no diffusion model")
    study.train_dirs[0] = None
    says("checkpoint")
    cohort, study.cohort = study.cohort, None
    says("volumes")
    study.cohort = cohort
    with pytest.raises(UadError, match="unet"): labs.restored_at(study, "unet", 0)
