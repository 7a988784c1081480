"The matrix of models, scores and pathologies: its numbers are those of plain pandas, its costs those of the records; what is not known is said; one model is no matrix."
import copy, json
import numpy as np, pandas as pd, pytest
from conftest import uad
from test_tables import changed, complete
from uad_study.figures import figure_cost, figure_matrix
from uad_study.models import MODELS
from uad_study.report import write_report
from uad_study.results import Results, invented_study
from uad_study.runs import read_study
from uad_study.tables import CHANCE, MATRIX, NO_MODEL, cost, html, matrix, matrix_shown, table_cost, table_matrix


@pytest.fixture(scope="module")
def place(tmp_path_factory): return tmp_path_factory.mktemp("several")


@pytest.fixture(scope="module")
def two(place): return invented_study(place/"s", folds=2, patients=5, more=("dae", "ae"))


def with_plain(study):
    "The study with thresholded intensity for each model, and on T1w, where MS is judged then, also upside down."
    c, p = study.cases.copy(), study.pooled.copy()
    for t in (c, p): t.loc[t.pathology == "ms", "contrast"] = "T1w"
    add = lambda t, score, **kw: t[(t.score == "l1")].assign(score=score, **kw)
    dark = lambda t: t[t.contrast == "T1w"]
    r = changed(study, cases=pd.concat([c, add(c, "intensity", dice=.05), add(dark(c), "intensity_dark", dice=.15)]), pooled=pd.concat([p, add(p, "intensity"), add(dark(p), "intensity_dark")]))
    r.labels, r.trainings, r.evaluations = r.labels * 2, r.trainings * 2, r.evaluations + [e | dict(parameters=e["parameters"] | dict(contrast="T1w")) for e in r.evaluations]
    return r


def test_numbers_are_those_of_plain_pandas(two, place):
    m = matrix(two)
    assert list(m) == MATRIX and not m.duplicated(MATRIX[:4]).any() and set(m.model) == {"ddpm", "dae", "ae"}
    for model, folder in (("ddpm", "evaluate"), ("dae", "evaluate-dae"), ("ae", "evaluate-ae")):
        cases, pooled = (pd.read_csv(place/"s"/folder/f"{name}.csv") for name in ("cases", "pooled"))
        by_hand = cases[(cases.threshold_from == "val") & (cases.pathology != "healthy")].groupby(["pathology", "score", "fold"])[["dice", "auprc"]].mean().groupby(["pathology", "score"]).mean()
        mine = m[(m.model == model) & (m.score != "ssim_val")].set_index(["pathology", "score"])
        assert len(mine) == len(by_hand) == 2 * 11
        np.testing.assert_allclose(mine.dice, by_hand.dice.loc[mine.index]); np.testing.assert_allclose(mine.auprc, by_hand.auprc.loc[mine.index])
        np.testing.assert_allclose(mine.auprc_pooled, pooled.groupby(["pathology", "score"]).auprc_pooled.mean().loc[mine.index])
        assert (mine.n == 5).all() and (mine.dice_lo <= mine.dice).all() and (mine.dice <= mine.dice_hi).all()
    shown = matrix_shown(two)
    assert not shown.score.str.fullmatch(r"ssim_[\d.]+").any() and (shown.chance_level == (shown.auprc_pooled < CHANCE * shown.chance)).all() and 0 < shown.chance_level.sum() < len(shown)
    for _, g in shown.groupby("pathology"): assert (g[g.best].dice.round(3) == g.dice.max().round(3)).all() and g.best.any()
    t = complete(table_matrix(two))
    for r in t.rows:
        g = shown[(shown.model == r[0].text) & (shown.pathology == "tumour")].iloc[[x[1].text for x in t.rows if x[0].text == r[0].text].index(r[1].text)]
        assert r[2].text == f"{100 * g.dice:.1f}" + "†" * bool(g.chance_level) and ("best" in r[2].marks) == g.best


def test_costs_are_those_of_the_records(two, place):
    m = matrix(two).set_index(["model", "score", "pathology"])
    for model, folder in (("ddpm", "train"), ("dae", "train-dae"), ("ae", "train-ae")):
        r = json.loads((place/"s"/folder/"result.json").read_text())["results"]
        assert (m.loc[model].parameters == r["parameters"]).all() and np.allclose(m.loc[model].training_hours, r["train_seconds"] / 3600)
    assert m.loc[("ddpm", "ssim_ens", "ms")][["restorations", "restore_seconds", "score_seconds", "seconds", "restored_on", "why"]].tolist() == [1, 4, .6, 4.6, "cpu, 1 thread", ""]
    assert m.loc["ae"].seconds.isna().all() and set(m.loc["ae"].why) == {"not recorded"}
    ten = copy.copy(two); ten.seconds = two.seconds.assign(restorations=10, device="a GPU")
    r = matrix(ten).set_index(["model", "score", "pathology"]).loc[("dae", "l1", "ms")]
    assert r.restore_seconds == pytest.approx(4.) and r.seconds == pytest.approx(4.1) and r.restored_on == "a GPU"          # a score over ten restorations pays for ten
    ten.seconds = two.seconds.assign(restore_seconds=np.nan)
    r = matrix(ten).set_index(["model", "score", "pathology"]).loc[("dae", "l1", "ms")]
    assert np.isnan(r.seconds) and r.score_seconds == .1 and r.why == "restoring was not recorded"
    ten.seconds = pd.concat([two.seconds, *(two.seconds[two.seconds.score == "ssim_ens"].assign(score=f"ssim_{s}", score_seconds=t) for s, t in ((.3, .2), (1.7, .4)))])
    assert matrix(ten).set_index(["model", "score", "pathology"]).loc[("dae", "ssim_val", "ms")].score_seconds == pytest.approx(.3)      # a chosen sigma costs what sigmas do


def test_one_model_is_no_matrix(tmp_path):
    one = invented_study(tmp_path/"one", folds=1, patients=2)
    assert not len(matrix(one)) and list(matrix(one)) == MATRIX and not table_matrix(one).rows and not table_cost(one).rows and figure_matrix(one) is None and figure_cost(one) is None
    one.variants = {"ddpm, worse": dict(label="ddpm, worse", base="ddpm", says="a.b 1 → 2")}
    v = changed(one, cases=pd.concat([one.cases, one.cases.assign(model="ddpm, worse", dice=one.cases.dice / 2)]), pooled=pd.concat([one.pooled, one.pooled.assign(model="ddpm, worse")]))
    assert set(matrix(v).model) == {"ddpm", "ddpm, worse"} and set(matrix_shown(v).score[matrix_shown(v).model == "ddpm, worse"]) == {"l1", "ssim_ens"}          # but one with a variant is
    assert {"the training is not here", "not recorded"} <= {c.text for r in complete(table_matrix(v)).rows for c in r if "none" in c.marks} and figure_matrix(v) is not None
    assert [r[0].text for r in complete(table_cost(v)).rows] == ["ddpm", "ddpm, worse"]


def test_a_point_of_dice_costs(two):
    plain = with_plain(two); c = cost(plain)
    base = c[c.base].iloc[0]
    assert base.model == NO_MODEL and base.dice == pytest.approx(10) and len(c[c.model == NO_MODEL]) == 1               # tumours 5, and upside down on T1w 15
    r = c[c.model == "ddpm"].iloc[0]
    at = lambda p: 100 * plain.cases[(plain.cases.model == "ddpm") & (plain.cases.score == "ssim_ens") & (plain.cases.pathology == p) & (plain.cases.threshold_from == "val")].groupby(["fold", "patient_id"]).dice.mean().groupby("fold").mean().mean()
    assert r.points == pytest.approx((at("tumour") + at("ms")) / 2 - 10) and r.training_hours_a_point == pytest.approx(60 / 3600 / r.points if r.points > 0 else np.nan, nan_ok=True)
    m = matrix(plain)
    assert set(m[m.model == NO_MODEL].score) == {"intensity", "intensity_dark"} and (m[m.model == NO_MODEL].parameters == 0).all() and (m[m.model == NO_MODEL].restore_seconds == 0).all()
    t = complete(table_cost(plain))
    assert not any(mark in n for made in (table_matrix(two), table_matrix(with_plain(two)), t) for n in made.notes for mark in "{}")
    assert "upside down" in t.notes[0] and {"the base", "gains nothing"} <= {c.text for r in t.rows for c in r} and "upside down" not in table_cost(two).notes[0]
    timed = copy.copy(plain); timed.seconds = pd.concat([two.seconds, two.seconds.assign(contrast="T1w"), two.seconds[two.seconds.score == "l1"].assign(score="intensity", restorations=0), two.seconds[two.seconds.score == "l1"].assign(score="intensity", restorations=0, contrast="T1w"),
                                                             two.seconds[two.seconds.score == "l1"].assign(score="intensity_dark", restorations=0, contrast="T1w")])
    c = cost(timed); r = c[c.model == "ddpm"].iloc[0]
    assert c[c.base].seconds.iloc[0] == pytest.approx(.1) and r.seconds == pytest.approx(4.6) and (r.seconds_a_point == pytest.approx(4.5 / r.points) if r.points > 0 else np.isnan(r.seconds_a_point))


def test_figures_say_it_and_fit(two):
    import matplotlib.pyplot as plt
    from matplotlib.text import Text
    several = copy.copy(two); several.seconds = pd.concat([two.seconds, two.seconds[two.seconds.score == "ssim_ens"].assign(model="ae", restore_seconds=250.)])
    for study in (two, several, with_plain(two)):
        for draw in (figure_matrix, figure_cost):
            fig = draw(study); fig.draw_without_rendering()
            said = [t for t in fig.findobj(Text) if t.get_text().strip() and t.get_visible()]
            inside = fig.bbox.padded(1)
            for t in said if draw is figure_matrix else [t for ax in fig.axes for t in (ax.title, ax.xaxis.label, ax.yaxis.label)]:
                if t.get_text(): b = t.get_window_extent(); assert inside.x0 <= b.x0 and b.x1 <= inside.x1 and inside.y0 <= b.y0 and b.y1 <= inside.y1, t.get_text()
            words = {t.get_text() for t in said}
            assert {"ddpm", "dae", "ae"} <= words
            if draw is figure_matrix: assert {"l1", "SSIM-ens", "SSIM, sigma by validation", "parameters", "training\n(h)", "restoring\n(s / vol.)", "scoring\n(s / vol.)"} <= words and (NO_MODEL in words) == (study not in (two, several))
            else: assert {"seconds a volume", "parameters", "Dice (%)"} <= words
            plt.close(fig)


def test_the_figure_knows_no_more_than_the_table(two):
    "Costs that are not known for one of two contrasts are not known in the figure, either."
    import matplotlib.pyplot as plt
    r = with_plain(two)
    r.seconds = r.seconds.assign(contrast="T2w", restore_seconds=4321.)
    unknown = [c.text for row in table_matrix(r).rows if row[0].text == "ddpm" for c in row[-2:]]
    assert set(unknown) == {"not recorded"}
    fig = figure_matrix(r)
    assert not any("4321" in t.get_text() or "4,321" in t.get_text() for t in fig.axes[0].texts)
    plt.close(fig)


def test_the_report_has_it(tmp_path):
    old = tmp_path/"old"; invented_study(old, folds=1, patients=2, more=("dae",))
    for f in old.glob("evaluate*/seconds.csv"): f.unlink()
    older = Results("Old", "old", old/"cohort", [old/"evaluate", old/"evaluate-dae"])                            # as runs were before seconds were recorded
    assert not len(older.seconds) and matrix(older).seconds.isna().all() and "not recorded" in html(table_matrix(older)) and figure_matrix(older) is not None
    heard = []
    write_report(older, tmp_path/"report", tick=heard.append)
    assert {"figure matrix", "figure cost", "interactive.html"} <= set(heard)
    page, m = (tmp_path/"report"/"report.html").read_text(), pd.read_csv(tmp_path/"report"/"tables"/"matrix.csv", keep_default_na=False, na_values=[""])
    assert list(m) == MATRIX and np.allclose(m.dice, matrix(older).dice) and set(m.why) == {"not recorded"}
    for words in ("The matrix: which model, which score, at what cost?", "<table id='matrix'>", "<table id='cost'>", "What does a point of Dice cost?", "<h2 id='Words'>"): assert words in page
    assert "cases.html" not in page
    assert {"matrix.png", "matrix.pdf", "cost.png", "cost.pdf"} <= {f.name for f in (tmp_path/"report"/"figures").iterdir()} and (tmp_path/"report"/"tables"/"matrix.tex").is_file()


def test_a_run_records_its_seconds(tiny_out):
    t = pd.read_csv(next(tiny_out.glob("evaluate-*"))/"seconds.csv")
    assert t.score.tolist() == ["intensity", "l1", "ssim_0.3", "ssim_0.9", "ssim_1.7", "ssim_uniform", "ssim_ens"] and t.restorations.tolist() == [0] + [1] * 6
    kept = json.loads(next(tiny_out.glob("train-*/reconstructions-*/reconstructions.json")).read_text())
    assert (t.restore_seconds > 0).all() and (t.score_seconds > 0).all() and set(t.device) == {"cpu"} and set(t.threads) == {kept["threads"]} and kept["threads"] >= 1
    assert not (tiny_out/"tables"/"matrix.csv").exists() and "the matrix" not in (tiny_out/"report.html").read_text().lower()


@pytest.mark.parametrize("name", ["matrix", "matrix-paper"])
def test_packaged_studies_have_every_model_and_score(name):
    study = read_study(name)
    assert {e.model["name"] for e in study.entries} == set(MODELS) and set(study.data["contrasts"]) == {"T1w", "T2w"}
    own, others = [e for e in study.entries if e.model["name"] == "fae"], [e for e in study.entries if e.model["name"] != "fae"]
    assert all({"feature_ssim", "intensity", "intensity_eq"} == set(e.scores["names"]) for e in own)
    for e in others: assert {"l1", "l1_ssim", "l2", "ssim_0.9", "ssim_ens", "intensity_eq"} <= set(e.scores["names"]) and ({"mahalanobis", "ssim_mahalanobis"} <= set(e.scores["names"])) == bool(e.restore)
    r = uad("run", name, "--dry-run")
    assert r.returncode == 0 and f"0 of {2 + study.data['folds'] * 2 * 2 * len(study.entries)} runs are done" in r.stdout
