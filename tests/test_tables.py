"Tables and the page at their edges: missing folds, one class, no numbers, nothing at all, two models, variants, data sets of the paper, awkward names."
import copy, json, re
import numpy as np, pandas as pd, pytest
from html.parser import HTMLParser
from types import SimpleNamespace
from typer.testing import CliRunner
from uad_study import page, report, tables
from uad_study.cli import app
from uad_study.core import UadError, placeless
from uad_study.manifest import listing
from uad_study.page import choose_cases
from uad_study.report import PROVENANCE, SECTIONS, provenance_of, report_page, table_provenance, write_report
from uad_study.results import CASE_TABLES, chosen_sigma, invented_study, summarise
from uad_study.tables import (Cell, Table, cautions, html, latex, markdown, matrix_shown, paper_dataset, table_auprc, table_calibration, table_dice, table_false_positives, table_folds, table_lesions, table_restorations,
                              table_sizes, table_tests, table_thresholds, table_variants, tex, text)

ALL = (table_dice, table_tests, table_thresholds, table_auprc, table_lesions, table_sizes, table_folds, table_false_positives, table_calibration, table_restorations, table_variants)
AWKWARD = "a_b & 50% <i>#1</i> $x$ {y} \\z ~^ |p| [q]"


@pytest.fixture(scope="module")
def study(tmp_path_factory): return invented_study(tmp_path_factory.mktemp("invented")/"s")


def changed(study, **tables_):
    "The study with other tables; what is made from them is made again."
    r = copy.copy(study)
    for k, t in tables_.items(): setattr(r, k, t)
    r.cases = r.cases[r.cases.score != "ssim_val"]
    r.table = summarise(r.cases, r.pooled)
    more = chosen_sigma(r.cases, r.pooled, r.table)
    r.cases, r.table = (pd.concat(pair, ignore_index=True) for pair in zip((r.cases, r.table), more))
    r.models = [m for m in dict.fromkeys(r.table.model) if m != "perfect map" and m not in r.variants]
    return r


def renamed(study, name):
    return changed(study, **{k: t.assign(model=t.model.where(t.model == "perfect map", name)) for k in CASE_TABLES if len(t := getattr(study, k))})


def column(t, name): return [r[t.head.index(name)] for r in t.rows]


def row(t, *first): return next(r for r in t.rows if [c.text for c in r[:len(first)]] == list(first))


def complete(t):
    "Every row is as long as the head; every cell says something, and none of them nan."
    for r in t.rows:
        assert len(r) == len(t.head)
        for c in r: assert c.text.strip() and "nan" not in str(c).lower().split() and not re.search(r"\bnan\b", str(c)), (t.name, [str(x) for x in r])
    return t


class Cells(HTMLParser):
    "Texts of the cells of a table, as a browser shows them; fails on tags that a table of ours has not."
    def __init__(self, page):
        super().__init__(); self.texts, self.inside = [], False
        self.feed(page)
    def handle_starttag(self, tag, attrs):
        assert tag in "div table caption thead tbody tr th td span small p".split(), tag
        if tag == "td": self.texts.append(""); self.inside = True
    def handle_endtag(self, tag): self.inside &= tag != "td"
    def handle_data(self, data):
        if self.inside: self.texts[-1] += data


@pytest.mark.parametrize("make", ALL)
def test_awkward_names_survive_every_writer(study, make):
    t = complete(make(renamed(study, AWKWARD)))
    if not t.rows: return
    assert Cells(html(t)).texts[0] == AWKWARD
    made = latex(t)
    assert tex(AWKWARD) in made and made.count(r"\begin{tabular}") == made.count(r"\end{tabular}") == 1 and made.count("{") - made.count(r"\{") == made.count("}") - made.count(r"\}")
    body = made[made.index(r"\midrule"):made.index(r"\bottomrule")].splitlines()[1:]
    assert len(body) == len(t.rows) and all(len(re.findall(r"(?<!\\)&", line)) == len(t.head) - 1 and line.endswith(r" \\") and not line.startswith("[") for line in body)
    lines = markdown(t).splitlines()
    assert all(len(re.findall(r"(?<!\\)\|", line)) == len(t.head) + 1 for line in lines[:len(t.rows) + 2]) and "<i>" not in markdown(t)
    assert AWKWARD in text(t)


def test_tex_leaves_nothing_that_latex_reads():
    assert re.sub(r"\\[&%$#_{}]|\\text\w+\{\}|\{\[\}|\{\]\}", "", tex("&%$#_{}~^\\<>|[]")) == ""
    assert tex("50 % ± 2 → 3 ≥ 1") == r"50 \% $\pm$ 2 $\rightarrow$ 3 $\geq$ 1"


def test_missing_folds_are_said(study):
    other = study.cases[study.cases.fold != 1].assign(model="dae")
    r = changed(study, cases=pd.concat([study.cases, other]), pooled=pd.concat([study.pooled, study.pooled.assign(model="dae")]))
    assert r.models == ["ddpm", "dae"]
    t = complete(table_folds(r))
    assert row(t, "dae", "Tumour, T2w", "l1")[t.head.index("fold 1")] == Cell("missing", marks=("none",)) and row(t, "ddpm", "Tumour, T2w", "l1")[t.head.index("fold 1")].text != "missing"
    d = complete(table_dice(r))
    assert "2 of 3 folds" in row(d, "dae", "l1")[2].more and "folds" not in row(d, "ddpm", "l1")[2].more
    dice = r.rows(model="dae", score="l1", pathology="tumour").dice * 100
    assert row(d, "dae", "l1")[2].text == f"{dice.mean():.1f} ± {dice.std():.1f}" and len(dice) == 2
    assert any("dae on T2w lacks fold 1" in n for n in cautions(r))
    assert not any("lacks fold" in n for n in cautions(study))


def test_a_model_that_was_not_judged_everywhere(study):
    "Another contrast: the columns are told apart, the empty ones say missing, and it is a caution."
    other = study.cases[study.cases.pathology == "tumour"].assign(model="dae", contrast="T1w")
    r = changed(study, cases=pd.concat([study.cases, other]), pooled=pd.concat([study.pooled, study.pooled.assign(model="dae", contrast="T1w")]))
    t = complete(table_dice(r))
    assert t.head[2:] == ["Tumour, T1w", "Tumour, T2w", "Multiple sclerosis, T2w"]
    assert [c.text for c in row(t, "dae", "l1")[3:]] == ["missing"] * 2 and row(t, "ddpm", "l1")[2].text == "missing" and row(t, "ddpm", "l1")[3].text == row(table_dice(study), "ddpm", "l1")[2].text
    assert any("ddpm was not judged on T1w" in n and "dae was not judged on T2w" in n for n in cautions(r))


def test_two_contrasts_of_one_pathology_are_not_mixed(study):
    other = study.cases[study.cases.pathology == "tumour"].assign(contrast="T1w", dice=0.)
    r = changed(study, cases=pd.concat([study.cases, other]), pooled=pd.concat([study.pooled, study.pooled.assign(contrast="T1w")]))
    l1 = row(complete(table_dice(r)), "ddpm", "l1")
    assert l1[2].text == "0.0 ± 0.0" and l1[3] == row(table_dice(study), "ddpm", "l1")[2]
    assert {t.text for t in column(table_tests(r), "Dice points [95 %]")[:1]} == {"0.0"}


def test_fewer_patients_in_one_fold(study):
    r = changed(study, cases=study.cases[~((study.cases.fold == 2) & (study.cases.patient_id == "tumour-3"))])
    assert any(n.startswith("Tumour: not all of the 6 test patients were judged everywhere (ddpm, fold 2: 5)") for n in cautions(r))
    assert column(complete(table_tests(r)), "patients")[0].text == "6"                    # averaged over the folds that the patient is in


def test_one_class_only(study):
    "A pathology whose every truth is empty: no number anywhere, and each table says why."
    empty = study.cases.pathology == "ms"
    c = study.cases.assign(dice=study.cases.dice.where(~empty), auprc=study.cases.auprc.where(~empty), lesion_ml=study.cases.lesion_ml.where(~empty, 0.), dice_released=study.cases.dice_released.where(~empty, 0.),
                           lesions=study.cases.lesions.where(~empty, 0), lesions_found=study.cases.lesions_found.where(~empty, 0), lesion_f1=study.cases.lesion_f1.where(~empty), lesion_f1_iou=study.cases.lesion_f1_iou.where(~empty))
    p = study.pooled.assign(auprc_pooled=study.pooled.auprc_pooled.where(study.pooled.pathology != "ms"), prevalence=study.pooled.prevalence.where(study.pooled.pathology != "ms", 0.))
    r = changed(study, cases=c, pooled=p)
    for make in ALL: complete(make(r))
    assert {row[3].text for row in table_dice(r).rows if row[0].text == "ddpm"} == {"no lesion on the grid"} and not any("best" in row[3].marks or row[3].arrow for row in table_dice(r).rows)
    assert row(table_lesions(r), "ddpm", "Multiple sclerosis, T2w", "l1")[4].text == "no lesion on the grid"
    sizes = row(table_sizes(r), "ddpm", "Multiple sclerosis, T2w", "l1")
    assert [c.text for c in sizes[3:]] == ["no lesion on the grid"] * 4 + ["0.0"]           # the released code counts a false prediction as 0
    assert row(table_tests(r), "ddpm", "Multiple sclerosis, T2w", "l1")[4].text == "fewer than 2 patients"
    said = [n for n in cautions(r) if n.startswith("Multiple sclerosis")]
    assert len(said) == 1 and "no test patient has a lesion voxel" in said[0]
    assert not any("same value everywhere" in n for n in cautions(r))
    report_page(r, {h: [t(r) for t in made] for h, made in SECTIONS.items()}, {}, provenance_of(r))


def test_no_threshold(study):
    "Neither validation scans with lesions nor healthy ones: only the oracle is left, which is no headline."
    c = study.cases[(study.cases.threshold_from == "oracle") | (study.cases.pathology == "healthy")]
    r = changed(study, cases=c[c.score != "ssim_val"])
    for make in ALL: complete(make(r))
    assert {c.text for row in table_dice(r).rows for c in row[2:] if row[0].text == "ddpm"} == {"no threshold"}
    t = table_thresholds(r)
    assert row(t, "ddpm", "Tumour, T2w", "l1")[3].text == "no threshold" and row(t, "ddpm", "Tumour, T2w", "l1")[-1].text not in ("no threshold", "missing")


def test_empty_tables(study):
    "Nothing but cases: the other tables of the evaluation have no columns."
    r = copy.copy(study)
    for k in CASE_TABLES:
        if k not in ("cases", "pooled"): setattr(r, k, pd.DataFrame())
    r.cases = r.cases.drop(columns=["lesions", "lesions_found", "lesions_false", "lesion_f1", "lesion_f1_iou", "dice_released"])
    assert [len(make(r)) for make in (table_calibration, table_restorations, table_variants)] == [1, 1, 1]
    assert {c.text for row in complete(table_lesions(r)).rows for c in row[3:]} == {"not counted"}
    assert "nothing to show" in html(table_restorations(r)) and r"\bottomrule" in latex(table_restorations(r)) and len(markdown(table_restorations(r)).splitlines()) == 2
    r.losses = [[]]
    assert cautions(r)                                                                       # a training without a record of its loss


def test_only_healthy_test_scans(study):
    r = copy.copy(study)
    r.cases, r.table, r.models, r.pathologies = study.cases[study.cases.pathology == "healthy"], study.table[:0], [], []
    for make in ALL: assert make is table_restorations or complete(make(r)).rows == []
    assert isinstance(cautions(r), list)


def test_variants_stay_out_of_the_headline(study):
    label = "ddpm, median 3"
    v = study.cases[study.cases.model == "ddpm"].assign(model=label)
    r = copy.copy(study)
    r.variants = {label: dict(label=label, base="ddpm", says="scores.median 5 → 3")}
    r = changed(r, cases=pd.concat([study.cases, v.assign(dice=v.dice + .01)]), pooled=pd.concat([study.pooled, study.pooled.assign(model=label)]))
    assert list(table_dice(r)) == list(table_dice(study)) and list(table_tests(r)) == list(table_tests(study)) and not any(label in c for line in table_folds(r) for c in line)
    t = complete(table_variants(r))
    assert t.rows[1][2].more == "+1.0: +1.0, +1.0" and t.rows[1][1].text == "scores.median 5 → 3"


def test_tests_count_what_they_compare(study):
    "A score with the same Dice as l1 is no further comparison; Holm's correction counts the others, over all models."
    l2 = study.cases[study.cases.score == "l1"].assign(score="l2")
    r = changed(study, cases=pd.concat([study.cases, l2]), pooled=pd.concat([study.pooled, study.pooled[study.pooled.score == "l1"].assign(score="l2")]))
    t = complete(table_tests(r))
    assert row(t, "ddpm", "Tumour, T2w", "l2")[4].text == "same as l1" and "over the 6 comparisons" in t.notes[0]
    assert [c.text for c in column(t, "p (Holm)") if c.text != "same as l1"] == [c.text for c in column(table_tests(study), "p (Holm)")]


def test_holm_by_hand(study, monkeypatch):
    p = iter([.01, .04, .03, .005, .5, .2])
    monkeypatch.setattr(tables, "paired_test", lambda a, b: next(p))
    assert [c.text for c in column(table_tests(study), "p (Holm)")] == ["0.050", "0.120", "0.120", "0.030", "0.500", "0.400"]     # 6 x .005, 5 x .01, 4 x .03, 3 x .04 (not below the one before), 2 x .2, .5


def test_sizes_by_hand(study):
    "Nine patients of 1 to 9 mL whose Dice is a tenth of it: thirds of three, means .2, .5 and .8."
    c = pd.concat([study.cases[(study.cases.patient_id == "tumour-0")].assign(patient_id=f"t{i}", subject_id=f"t{i}", lesion_ml=float(i), dice=i / 10) for i in range(1, 10)])
    t = table_sizes(changed(study, cases=pd.concat([study.cases[study.cases.pathology != "tumour"], c])))
    assert [str(x) for x in row(t, "ddpm", "Tumour, T2w", "l1")[3:7]] == ["20.0 [n 3]", "50.0 [n 3]", "80.0 [n 3]", "50.0"]
    assert "small up to 3.67 mL, large above 6.33 mL" in t.notes[0]
    few = table_sizes(changed(study, cases=pd.concat([study.cases[study.cases.pathology != "tumour"], c[c.lesion_ml < 5]])))
    assert [x.text for x in row(few, "ddpm", "Tumour, T2w", "l1")[3:6]] == ["fewer than 6 patients"] * 3


def test_arrows_and_best_are_of_what_is_printed(study):
    "SSIM-ens above, below and equal to l1."
    for ens, arrow, best in ((.21, "↑", (False, True)), (.19, "↓", (True, False)), (.20004, "", (True, True))):
        c = study.cases[study.cases.score.isin(["l1", "ssim_ens"])]
        c = c.assign(dice=np.where(c.score == "l1", .2, ens))
        t = table_dice(changed(study, cases=c, pooled=study.pooled[study.pooled.score.isin(["l1", "ssim_ens"])]))
        l1, e = row(t, "ddpm", "l1")[2], row(t, "ddpm", "SSIM-ens")[2]
        assert (e.arrow, ("best" in l1.marks, "best" in e.marks)) == (arrow, best) and not l1.arrow
        if arrow: assert f"class={'up' if arrow == '↑' else 'down'}" in html(t) and (r"\uparrow" if arrow == "↑" else r"\downarrow") in latex(t).split(r"\bottomrule")[0]


@pytest.fixture
def real(study):
    "The study as if its tumours were BraTS21's and its MS cohort somebody's own."
    r, ids = copy.copy(study), listing("BraTS21")
    test = ids.subject_id[ids.published.str.contains("test")].iloc[0]
    r.cohort = copy.copy(study.cohort)
    r.cohort.table = study.cohort.table.assign(dataset=["BraTS21", "mine"], subject_id=[test, "ms-0"])
    r.source = "prepared"
    return r


def test_the_papers_numbers_only_beside_its_data_sets(study, real):
    t = complete(table_dice(real))
    assert [c.text for c in row(t, "ddpm", "l1, as published")[2:]] == ["44.25 ± 1.49", "not in the paper"] and [c.text for c in row(t, "ddpm", "SSIM-ens, as published")[2:]] == ["57.44 ± 1.40", "not in the paper"]
    assert t.kinds.count("paper") == 2 and any("1 test patients here, 1151 in the paper; all of these" in n for n in t.notes)
    assert not any(c.marks for r, k in zip(t.rows, t.kinds) if k == "paper" for c in r[2:3])
    for source in ("virtual", "real_t1", ""):
        real.source = source
        assert "paper" not in table_dice(real).kinds, source
    real.source = "prepared"
    real.cohort.table = real.cohort.table.assign(subject_id=["somebody", "ms-0"])           # says BraTS21, but the ids are others
    assert paper_dataset(real, "tumour", "T2w") == "" and "paper" not in table_dice(real).kinds
    real.cohort = None                                                                        # merged from other machines
    assert "paper" not in table_dice(real).kinds


def test_the_papers_table_as_it_is_written_down():
    "A digit that slipped would be believed: sums of the table's rows, added up by hand from the paper's Table 1."
    sums = {m: {s: round(sum(v for v, _ in row.values()), 2) for s, row in rows.items()} for m, rows in tables.PAPER.items()}
    assert sums == {"ae": {"l1": 58.18, "ssim_ens": 44.21}, "dae": {"l1": 65.09, "ssim_ens": 84.86}, "ddpm": {"l1": 71.98, "ssim_ens": 91.51}}


def test_cautions_about_runs(study):
    r = copy.copy(study)
    p = study.evaluations[0]["provenance"]
    r.evaluations = [study.evaluations[0] | dict(key=k, provenance=p | dict(commit=k * 40, dirty=k == "b", packages={"torch": v})) for k, v in (("a", "2.11.0"), ("b", "2.13.0"))]
    r.trainings, r.labels, r.losses = [None, None], ["ddpm"] * 2, [None, None]
    said = "\n".join(cautions(r))
    for words in ("commit aaaaaaaaaaaa (1 of 2 runs)", "commit bbbbbbbbbbbb (1 of 2 runs)", "not committed made 1 of 2 runs", "torch (2.11.0, 2.13.0)", "The training is not here: ddpm on T2w (fold 0)"): assert words in said, words
    r.evaluations = [e | dict(parameters=e["parameters"] | dict(judged="maps")) for e in r.evaluations]
    assert "The training is not here" not in "\n".join(cautions(r))                          # maps of another method never had one


def test_caution_about_a_constant_map(study):
    p = study.pooled.assign(auprc_pooled=study.pooled.auprc_pooled.where(study.pooled.score != "ssim_ens", study.pooled.chance))
    said = [n for n in cautions(changed(study, pooled=p)) if "same value everywhere" in n]
    assert len(said) == 1 and "SSIM-ens of ddpm on tumour" in said[0] and "l1" not in said[0].split(":")[1]


@pytest.mark.parametrize("best, due", [(.3, True), (.7, False)])
def test_caution_about_the_ceiling(study, best, due):
    r = copy.copy(study)
    l1 = study.rows(score="l1", pathology="ms", fold=0).assign(model="perfect map")
    r.table = pd.concat([study.table, l1.assign(score="truth", dice=.2), l1.assign(score="truth_0.7", dice=best)])
    assert any("even a perfect map reaches a Dice of 30 % at most" in n and "(the truth itself 20 %)" in n for n in cautions(r)) == due
    assert not any("even a perfect map" in n and "Tumour" in n for n in cautions(r))


def test_provenance_names_no_place(study, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "FIGURES", ())
    r = copy.copy(study)
    e = study.evaluations[0]
    r.evaluations = [e | dict(parameters=e["parameters"] | dict(atlas="/home/somebody/my atlas/sri24.nii", maps_dir="../../../home/somebody/maps", seed_config={"seed": 7}),
                              results=dict(checkpoint_sha256="c" * 64), provenance=e["provenance"] | dict(commit="d" * 40, dirty=True, threads=2, packages={"torch": "2.13.0"}))]
    r.notes = ["/home/somebody/out/evaluate-x: is planned, but not there"]
    write_report(r, tmp_path/"out")
    written = json.loads((tmp_path/"out"/"provenance.json").read_text())
    page = re.sub(r"base64,[^']+", "", (tmp_path/"out"/"report.html").read_text())
    assert written["format"] == PROVENANCE and "somebody" not in json.dumps(written) + page and str(tmp_path) not in json.dumps(written) + page and "sri24.nii" in page and "evaluate-x: is planned" in page
    line = dict(zip((t := table_provenance(provenance_of(r))).head, map(str, t.rows[-1])))
    assert (line["commit"], line["torch"], line["threads"], line["seed"], line["checkpoint"], line["time (s)"]) == ("d" * 8 + ", changed", "2.13.0", "2", "7", "c" * 8, "60")
    assert placeless({"a": [1, None, "x/y"]}) == {"a": [1, None, "x/y"]}


def test_a_report_without_the_volumes(study, tmp_path):
    "Results merged from other machines: no pictures, no failures, but every table and the other figures."
    r = copy.copy(study)
    r.cohort, r.source, r.trainings, r.train_dirs, r.losses = None, "", [None], [None], [None]
    r.places = [p | dict(train_dir=None) for p in study.places]
    write_report(r, tmp_path)
    page = (tmp_path/"report.html").read_text()
    assert "The training is not here" in page and "maps-ddpm" not in "".join(p.name for p in (tmp_path/"figures").iterdir()) and (tmp_path/"figures"/"sigma-ddpm.pdf").exists() and "Virtual cohort" not in page


def test_files_of_an_older_report_are_gone(study, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "FIGURES", ())
    (tmp_path/"figures").mkdir(); (tmp_path/"figures"/"old.png").write_text("x"); (tmp_path/"mine.txt").write_text("x")
    write_report(study, tmp_path)
    assert not (tmp_path/"figures"/"old.png").exists() and (tmp_path/"mine.txt").exists()


def test_a_table_by_hand():
    t = Table("n", "c", ["a", "b"])
    t.add("x", Cell("1.0", "0, 2", ("best", "down")))
    assert list(t) == [["a", "b"], ["x", "1.0↓* [0, 2]"]] and len(t) == 2 and t[1] == ["x", "1.0↓* [0, 2]"]
    assert tables.number(float("nan"), why="no lesion on the grid").text == "no lesion on the grid" and tables.number(2, "d").text == "2"


def test_what_is_at_chance_is_neither_best_nor_compared(study):
    "Of a score whose AUPRC is that of a flat map: a dagger, no bold, no arrow, and a word below; others are marked as before."
    flat = (study.pooled.pathology == "ms") & (study.pooled.score != "l1")
    t = complete(table_dice(changed(study, pooled=study.pooled.assign(auprc_pooled=study.pooled.auprc_pooled.where(~flat, study.pooled.chance)))))
    plain = table_dice(study)
    for r in [r for r in t.rows if r[0].text == "ddpm"]:
        assert r[3].text.endswith("†") == (r[1].text != "l1") and r[2] == row(plain, "ddpm", r[1].text)[2]
        assert r[3].marks == (("best",) if r[1].text == "l1" else ()), r[1].text
    assert any(n.startswith("†: no better than chance") for n in t.notes) and not any("†" in n for n in plain.notes)
    t = pd.DataFrame(dict(model="ddpm", score=["l1", "ssim_ens"], contrast="T2w", pathology="ms", dice=[.5, .3], auprc_pooled=[.02, .2], chance=.02))
    assert matrix_shown(study, t).best.tolist() == [False, True] and matrix_shown(study, t.assign(auprc_pooled=.2)).best.tolist() == [True, False]


def test_cases_are_chosen_by_a_main_score():
    "Not by the last score that was judged, such as one over healthy scans."
    t = pd.DataFrame(dict(subject_id=["a", "b", "c"], contrast="T2w", pathology="ms"))
    judged = [t.assign(model="ddpm", fold=0, threshold_from="val", score=s, dice=d) for s, d in (("ssim_ens", [.1, .2, .3]), ("ssim_ens_healthy", [.2, .3, .1]))]
    r = SimpleNamespace(cohort=SimpleNamespace(table=t), cases=pd.concat(judged), pathologies=["ms"], main_scores=lambda model: ("l1", "ssim_ens"))
    assert choose_cases(r, "ddpm", 0) == {1: "median", 0: "worst", 2: "best"}


def test_the_report_comes_without_a_page_of_cases(monkeypatch, tmp_path):
    "`uad report --interactive` where no case can be shown: one line and exit code 1, after a report that links none."
    links = []
    monkeypatch.setattr("uad_study.results.gather", lambda folders: SimpleNamespace(notes=[], cohort=None, evaluations=[], evaluate_dirs=[tmp_path]))
    monkeypatch.setattr("uad_study.report.write_report", lambda results, out, cases_page, tick: links.append(cases_page))
    error = CliRunner().invoke(app, ["report", str(tmp_path), "--interactive"]).exception
    assert isinstance(error, UadError) and "write the page on the machine that has them" in str(error) and links == [""]


def test_a_case_that_is_none_stops_at_once(monkeypatch, tmp_path):
    "A typo in --case: one line with the nearest names, and nothing is written over."
    monkeypatch.setattr("uad_study.results.gather", lambda folders: SimpleNamespace(notes=[], evaluations=[], cohort=SimpleNamespace(table=pd.DataFrame(dict(subject_id=["tumour-0001", "ms-0001"])))))
    monkeypatch.setattr("uad_study.report.write_report", lambda *a: pytest.fail("written"))
    error = CliRunner().invoke(app, ["report", str(tmp_path), "--interactive", "--case", "tumor-0001"]).exception
    assert isinstance(error, UadError) and "did you mean tumour-0001 or" in str(error)


def test_a_report_keeps_the_link_to_its_cases(monkeypatch, tmp_path):
    "A plain `uad report` links the page of cases that is there, if it is of the same evaluations."
    links, results = [], SimpleNamespace(notes=[], cohort=None, evaluations=[dict(key="a"), dict(key="b")])
    monkeypatch.setattr("uad_study.results.gather", lambda folders: results)
    monkeypatch.setattr("uad_study.report.write_report", lambda results, out, cases_page, tick: links.append(cases_page))
    for keys in ((), ("a", "c"), ("b", "a")):
        if keys: (tmp_path/"cases.html").write_text(f"<head><meta name=shows content='{page._shows(SimpleNamespace(evaluations=[dict(key=k) for k in keys]))}'>")
        assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 0
    assert links == ["", "", "cases.html"]
