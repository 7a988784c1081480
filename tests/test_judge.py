"The judge as others use it: a planted study with known answers through `uad evaluate --maps`, re-scoring, merging, and what is refused."
import json, shutil, threading
from importlib.resources import files
import jsonschema, numpy as np, pandas as pd, pytest
from conftest import one_line, uad
from uad_study.cohort import Cohort, Item, write_cohort
from uad_study.core import Stopped
from uad_study.judge import KeptMaps, ScoreConfig, judge
from uad_study.volume import GRID_AFFINE, GRID_SHAPE, VOXEL_ML, save_volume

PLAIN = [a for s in ("median=1", "erode=0", "min_voxels=1") for a in ("--set", s)]          # nothing happens to the maps
BRAIN, LESION = 40 * 40 * 20, 10 * 10 * 4
# of each volume: lesion voxels at score 3, at 1, (others at 0); healthy voxels at 3, at 2
PLANTED = {"ms-v0": (240, 80, 60, 0), "ms-v1": (260, 60, 40, 4000), "ms-t0": (200, 100, 100, 50), "ms-t1": (400, 0, 0, 0), "ms-t2": (0, 400, 30, 10), "tumour-v0": (100, 300, 0, 9), "tumour-t0": (100, 200, 300, 0)}


def dice(tp, fp): return 2 * tp / (tp + fp + LESION)


def average_precision(volumes):
    "By hand: the sum over the levels 3, 2, 1, 0 of the gain in recall times precision."
    a, b, c, d = np.array(volumes).sum(0)
    n, total = LESION * len(volumes), BRAIN * len(volumes)
    levels = [(a, a + c), (0, d), (b, b), (n - a - b, total - a - b - c - d)]
    tp = predicted = area = 0
    for positives, voxels in levels:
        tp, predicted = tp + positives, predicted + voxels
        if positives: area += positives / n * tp / predicted
    return area


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    "A folder with a cohort, planted maps, and their judgement."
    d = tmp_path_factory.mktemp("planted")
    brain, lesion = np.zeros((2, *GRID_SHAPE), bool)
    brain[20:60, 20:60, 10:30] = True; lesion[30:40, 30:40, 15:19] = True
    items = []
    for name, (a, b, c, e) in PLANTED.items():
        m = np.zeros(GRID_SHAPE, np.float32)
        inside, outside = np.flatnonzero(lesion), np.flatnonzero(brain & ~lesion)
        for places, value in ((inside[:a], 3), (inside[a:a + b], 1), (outside[:c], 3), (outside[c:c + e], 2)): m.ravel()[places] = value
        items.append(Item(dict(subject_id=name, contrast="T2w", pathology=name.split("-")[0], split={"v": "val", "t": "test"}[name.split("-")[1][0]], val_fold=-1), brain * np.float32(.5), brain, lesion))
        save_volume(d/"maps"/f"{name}_T2w.nii.gz", m, GRID_AFFINE)
    write_cohort(d/"cohort", items, len(items), {"source": "virtual"})
    r = uad("evaluate", d/"cohort", "--maps", d/"maps", "--model", "planted", "--out", d/"out", *PLAIN)
    assert r.returncode == 0, r.stderr
    return d


def test_planted_answers_come_back(planted):
    "Dice at the validation's, the other pathology's and the oracle's threshold, AUPRC of each volume and pooled, prevalence: all as computed by hand."
    t, c = pd.read_csv(planted/"out"/"table.csv"), pd.read_csv(planted/"out"/"cases.csv")
    row = t[(t.model == "planted") & (t.score == "map")].set_index("pathology")
    above2, above0 = (2 * sum(s) / (sum(p) + 2 * LESION) for s, p in (((240, 260), (300, 300)), ((320, 320), (380, 4360))))
    assert above2 > above0 and 2 <= row.threshold["ms"] < 3 and 0 <= row.threshold["tumour"] < 1                       # ms: only level 3 is worth it; tumours: all that is not 0
    three = [dice(200, 100), dice(400, 0), dice(0, 30)]
    np.testing.assert_allclose(row.dice["ms"], np.mean(three)); np.testing.assert_allclose(row.dice["tumour"], dice(300, 300))
    for name, d in zip(("ms-t0", "ms-t1", "ms-t2"), three):
        np.testing.assert_allclose(c[(c.subject_id == name) & (c.score == "map") & (c.threshold_from == "val")].dice.item(), d)
    carried = c[(c.score == "map") & (c.threshold_from == "val:tumour")].set_index("subject_id").dice
    np.testing.assert_allclose(carried["ms-t0"], dice(300, 150)); np.testing.assert_allclose(carried["ms-t2"], dice(400, 40))
    np.testing.assert_allclose(row.oracle_dice["ms"], np.mean([dice(300, 150), dice(400, 0), dice(400, 40)]))
    np.testing.assert_allclose(row.auprc_pooled["ms"], average_precision([PLANTED[k] for k in ("ms-t0", "ms-t1", "ms-t2")])); np.testing.assert_allclose(row.auprc["tumour"], average_precision([PLANTED["tumour-t0"]]))
    np.testing.assert_allclose(row.prevalence, LESION / BRAIN); assert row.n_test.tolist() == [3, 1] and row.n_val.tolist() == [2, 1]
    assert (t[(t.model == "perfect map") & (t.score == "truth")].dice == 1).all()                                      # nothing happened to the maps
    at = c[(c.subject_id == "ms-t0") & (c.score == "map") & (c.threshold_from == "val")].iloc[0]
    np.testing.assert_allclose([at.lesion_ml, at.predicted_ml, at.false_ml], np.array([LESION, 300, 100]) * VOXEL_ML)


def test_result_follows_the_published_schema(planted):
    told = json.loads((planted/"out"/"judgement.json").read_text())
    jsonschema.validate(told, json.loads((files("uad_study")/"schemas"/"judgement-1.schema.json").read_text()))
    assert told["methods"][0]["judged"] == "maps" and len(told["methods"][0]["files_sha256"]) == 64 and told["volumes"]["n"] == len(PLANTED)
    everything = "".join(p.read_text() for p in (planted/"out").rglob("*.json") if p.name != "places.json") + (planted/"out"/"report.html").read_text()
    assert str(planted) not in everything


def maps_of_planted(cohort, where=None):
    "Two maps of each row: noise in the brain, brighter in lesions. `where`: collects the threads that ask."
    def of(row):
        if where is not None: where.add(threading.current_thread())
        noise = np.random.default_rng(row).random((2, *GRID_SHAPE), np.float32)
        yield from (noise + .4 * cohort.lesion_masks[row]) * cohort.brain_masks[row]
    return of


def test_several_threads_judge_as_one_does(planted, tmp_path):
    cohort, names, config, tables, ticks = Cohort(planted/"cohort"), ("l1", "ssim_ens"), ScoreConfig(erode=0, median=3, healthy_rates=(.1,)), {}, {}
    for n in (1, 3, 50):
        asking, ticks[n] = set(), []
        tables[n] = judge(cohort, "T2w", 0, maps_of_planted(cohort, asking), names, config, tmp_path/str(n), "m", lambda *a: ticks[n].append(a), threads=n)
        assert asking == {threading.current_thread()} and not (tmp_path/str(n)).exists() and ticks[n] == ticks[1] and len(ticks[n]) == len(PLANTED) + 2
        for k in tables[1]: pd.testing.assert_frame_equal(tables[n][k], tables[1][k])
    assert len(tables[1]["cases"]) > 20 and tables[1]["cases"].dice.nunique() > 8 and len(tables[1]["lesions"])


def test_fault_or_stop_among_several_threads(planted, tmp_path, monkeypatch):
    "Either reaches the caller, and what has not begun is left."
    cohort, kept = Cohort(planted/"cohort"), KeptMaps.keep
    names, config = ("l1", "ssim_ens"), ScoreConfig(erode=0, median=1)
    def full(self, row, maps):
        if row == 2: raise OSError(28, "No space left on device")
        kept(self, row, maps)
    monkeypatch.setattr(KeptMaps, "keep", full)
    with pytest.raises(OSError, match="No space"): judge(cohort, "T2w", 0, maps_of_planted(cohort), names, config, tmp_path/"full", "m", threads=3)
    monkeypatch.setattr(KeptMaps, "keep", kept)
    def stop(done, total, what):
        if done == 3: raise Stopped("stopped")
    before = threading.active_count()
    with pytest.raises(Stopped): judge(cohort, "T2w", 0, maps_of_planted(cohort), names, config, tmp_path/"full", "m", stop, threads=2)
    assert threading.active_count() == before and len(list((tmp_path/"full").glob("*.npy"))) < 2 * len(PLANTED)
    again = judge(cohort, "T2w", 0, maps_of_planted(cohort), names, config, tmp_path/"full", "m", threads=2)                       # goes on from what was kept
    pd.testing.assert_frame_equal(again["cases"], judge(cohort, "T2w", 0, maps_of_planted(cohort), names, config, tmp_path/"one", "m", threads=1)["cases"])


def test_post_processing_changes_what_is_judged(planted, tmp_path):
    "With the default post-processing a lesion of 10x10x4 voxels loses its corners: the truth itself is no longer 100 %."
    r = uad("evaluate", planted/"cohort", "--maps", planted/"maps", "--out", tmp_path/"out")
    assert r.returncode == 0, r.stderr
    t = pd.read_csv(tmp_path/"out"/"table.csv")
    assert t[(t.model == "perfect map") & (t.score == "truth")].dice.between(.5, .99).all() and set(t.model) == {"maps", "perfect map"}


def test_maps_that_cannot_be_judged(planted, tmp_path):
    def refused(change, *words):
        shutil.rmtree(tmp_path/"maps", ignore_errors=True); shutil.copytree(planted/"maps", tmp_path/"maps")
        change(tmp_path/"maps")
        one_line(uad("evaluate", planted/"cohort", "--maps", tmp_path/"maps", "--out", tmp_path/"out"), *words)
        assert not list((tmp_path/"out").rglob("result.json")) and not (tmp_path/"out"/"table.csv").exists()
    refused(lambda f: (f/"ms-t1_T2w.nii.gz").unlink(), "ms-t1", "no file")
    refused(lambda f: save_volume(f/"ms-t1_T2w.nii.gz", np.full(GRID_SHAPE, np.nan, np.float32), GRID_AFFINE), "ms-t1_T2w.nii.gz", "NaN")
    refused(lambda f: save_volume(f/"ms-t1_T2w.nii.gz", np.zeros((91, 109, 91)), GRID_AFFINE), "ms-t1_T2w.nii.gz", "another grid")
    refused(lambda f: shutil.copy(f/"ms-t1_T2w.nii.gz", f/"ms-t1.nii.gz"), "ms-t1", "keep one")
    refused(lambda f: (f/"ms-t1_T2w.nii.gz").write_bytes(b"no"), "ms-t1_T2w.nii.gz")


def test_again_with_other_settings(tiny_out, tmp_path):
    "Kept restorations under a new sigma set, temperature and post-processing, without weights; both reports in one; nothing of the study is changed."
    study, out = tmp_path/"study", tmp_path/"again"
    shutil.copytree(tiny_out, study)
    for p in study.glob("train-*/*.pt"): p.unlink()
    before = {p: p.stat().st_mtime_ns for p in study.rglob("*") if p.is_file() and p.name != ".lock"}
    args = ("evaluate", study, "--out", out, "--label", "mine", "--set", "sigmas=[0.5, 1.5]", "--set", "temperature=0.1", "--set", "median=3", "--set", "names=[l1, ssim_0.4, ssim_ens]")
    r = uad(*args)
    assert r.returncode == 0, r.stderr
    t = pd.read_csv(out/"table.csv")
    assert set(t.model) == {"ddpm, mine", "perfect map"} and {"ssim_0.4", "ssim_ens", "l1"} <= set(t.score) and {p: p.stat().st_mtime_ns for p in before} == before
    again = uad(*args); assert again.returncode == 0 and pd.read_csv(out/"table.csv").equals(t)
    both = uad("report", study, out, "--out", tmp_path/"both")
    assert both.returncode == 0, both.stderr
    assert {"ddpm", "ddpm, mine"} <= set(pd.read_csv(tmp_path/"both"/"table.csv").model)
    same = uad("evaluate", study, "--out", tmp_path/"same", "--set", "median=3")
    assert same.returncode == 0
    one_line(uad("report", study, tmp_path/"same", "--out", tmp_path/"clash"), "does not belong with", "score_config.median: 5 against 3")
    assert not (tmp_path/"clash").exists()


def test_runs_that_do_not_belong_together(tiny_out, tmp_path):
    def copy(name, change):
        shutil.copytree(tiny_out, tmp_path/name, ignore=shutil.ignore_patterns("reconstructions-*", "*.pt", "cohort"))
        f = next((tmp_path/name).glob("evaluate-*/result.json")); r = json.loads(f.read_text()); change(r); f.write_text(json.dumps(r))
        (tmp_path/name/f.parent.name).rename(tmp_path/name/f"{f.parent.name}-{name}")
        for p in (tmp_path/name).glob("report-*"): shutil.rmtree(p)
        return tmp_path/name
    def fold(r): r["parameters"]["fold"] = 1; r["key"] = "other"
    one_line(uad("report", tiny_out, copy("prepared", lambda r: (fold(r), r["results"]["cohort"].update(prepare={"n4": False}))), "--out", tmp_path/"x"), "prepare")
    one_line(uad("report", tiny_out, copy("split", lambda r: (fold(r), r["results"]["cohort"]["sha256"].update(volumes="0"))), "--out", tmp_path/"x"), "other subjects, or other splits")
    one_line(uad("report", tiny_out, copy("old", lambda r: r.update(version=3)), "--out", tmp_path/"x"), "version 3", "run the study again")
    assert not (tmp_path/"x").exists()


def test_partial_results_are_reported(tiny_out, tmp_path):
    "A failed run and one that is gone are told; the rest is reported."
    shutil.copytree(tiny_out, tmp_path/"s", ignore=shutil.ignore_patterns("*.pt"))
    plan = next((tmp_path/"s").glob("report-*/run.json")); p = json.loads(plan.read_text())
    p["parameters"]["evaluate_dirs"] += ["../evaluate-T2w-ddpm-f1-failed", "../evaluate-T2w-ddpm-f2-gone"]; plan.write_text(json.dumps(p))
    failed = tmp_path/"s"/"evaluate-T2w-ddpm-f1-failed"; failed.mkdir()
    run = json.loads(next((tmp_path/"s").glob("evaluate-*/run.json")).read_text()); (failed/"run.json").write_text(json.dumps(run | {"label": "evaluate T2w ddpm f1"})); (failed/"error.txt").write_text("the disk is full\n")
    r = uad("report", tmp_path/"s")
    assert r.returncode == 0 and "evaluate T2w ddpm f1: the disk is full" in r.stderr and "f2-gone" in r.stderr
    page = (tmp_path/"s"/"report.html").read_text()
    assert "evaluate T2w ddpm f1: the disk is full" in page and "f2-gone" in page
    shutil.rmtree(tmp_path/"s"/"evaluate-T2w-ddpm-f1-failed"); [shutil.rmtree(f) for f in (tmp_path/"s").glob("evaluate-*")]
    one_line(uad("report", tmp_path/"s"), "holds no finished evaluation")
