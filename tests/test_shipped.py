"The weights that come with the package: small, light, of subjects that no demo tests on; and in a study, in a training's place."
import json, re, shutil
import numpy as np, pytest, torch
from conftest import one_line, uad
from uad_study import phantom, runs
from uad_study.core import UadError, read_json
from uad_study.metrics import dice
from uad_study.postprocess import components, postprocess
from uad_study.reconstruct import reconstruct_volume
from uad_study.scores import score_maps
from uad_study.shipped import packaged_folder, packaged_weights, read_card, read_model
from uad_study.train import load_model
from uad_study.weights import RESEARCH_ONLY, distance, load_weights

NAMES = [f"{m}-{c}" for m in ("ae", "dae", "ddpm") for c in ("T1w", "T2w")]


def test_all_are_there_and_small():
    assert packaged_weights() == NAMES
    size = sum(p.stat().st_size for n in NAMES for p in packaged_folder(n).rglob("*") if p.is_file())
    assert size < 12e6, size


@pytest.mark.parametrize("name", NAMES)
def test_a_card_and_its_model(name):
    "At least 300 virtual subjects of another seed than the demos', about a million parameters, at most 2 GFLOP a slice, and what they are not for."
    from torch.utils.flop_counter import FlopCounterMode
    folder = packaged_folder(name); card, model = read_card(folder), None
    made = card["data"]["config"]
    assert made["source"] == "virtual" and made["n_train"] >= 300 and card["training"]["subjects"] >= 300 and card["healthy"]["n"] >= 20
    assert made["seed"] not in {e.data["seed"] for s in ("demo", "demo-full", "demo-train") for e in runs.read_study(s).entries}
    assert set(card["thresholds"]) == set(runs.read_study("weights").entries[0].scores["names"]) | ({"intensity_dark"} if name.endswith("T1w") else set()) and "l1_ssim" in card["healthy_test"]
    assert len(card["training"]["commit"]) == 40 and card["training"]["best_val_loss"] < card["training"]["curve"][0]["val_loss"] / 3
    assert {r["pathology"] for r in card["results"]} == ({"stroke", "wmh"} if name.endswith("T1w") else {"tumour", "ms"}) and all(r["n_test"] >= 25 for r in card["results"])
    text = (folder/"docs"/"README.md").read_text()
    assert RESEARCH_ONLY in text and "Not for: Diagnosis" in text and "| ssim_ens |" in text
    model = read_model(folder, card)
    assert card["parameters"] < 1.3e6
    with torch.no_grad(), FlopCounterMode(display=False) as flops: model.reconstruct(torch.rand(2, 1, 96, 96), torch.Generator().manual_seed(0))
    assert flops.get_total_flops() / 2 < 2e9, flops.get_total_flops()
    assert not re.search(r"/(home|root|tmp|work)/", json.dumps(card) + text)


@pytest.mark.parametrize("contrast", ["T1w", "T2w"])
def test_the_ddpm_restores_a_brain_it_has_never_seen(contrast):
    "A healthy virtual brain of another seed is like the training and is hardly marked; the restoration is nearer to it than a blur of 3 mm is."
    from scipy.ndimage import gaussian_filter
    w, s = load_weights("ddpm", contrast), phantom.healthy(4242, (contrast,))
    x = s.images[contrast]; x_hat = reconstruct_volume(w.model, x, (0, "new"))
    inside = s.brain_mask & (x > 0)
    assert distance(w, x, x_hat, s.brain_mask)["verdict"] in ("in", "borderline")
    assert np.abs(x - x_hat)[inside].mean() < np.abs(x - gaussian_filter(x, 1.5))[inside].mean()
    marked = components(postprocess(score_maps(x, x_hat, ("ssim_ens",))["ssim_ens"], s.brain_mask) > w.thresholds["ssim_ens"])
    assert .008 * marked.sum() < 10                                                                                                # mL; 95 % of the validation scans carry at most 1


def test_a_tumour_is_found():
    "At the threshold set on healthy scans, without a look at any lesion, l1 finds something of tumours it has never seen."
    w, found = load_weights("ddpm", "T2w"), []
    for i in range(4):
        s = phantom.diseased(900 + i, "tumour")
        x = s.images["T2w"]; x_hat = reconstruct_volume(w.model, x, (0, str(i)))
        a = postprocess(score_maps(x, x_hat, ("l1",))["l1"], s.brain_mask)
        found.append(dice(components(a > w.thresholds["l1"]), s.lesion_mask))
    assert np.mean(found) > .1, found


MINI = """format: uad-study/1
data: {source: virtual, contrasts: [T2w], pathologies: [tumour], folds: 1, n_train: 0, n_val: 1, n_test: 1, n_lesion_val: 1, n_lesion_test: 1}
models: [{weights: dae}]
scores: {names: [l1, ssim_0.9, ssim_ens]}
report: {steps_val: 0, steps_test: 0, post_val: 0, post_test: 0}
engine: {threads: 1}
"""


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    "A study that trains nothing: (its file, its results)."
    d = tmp_path_factory.mktemp("mini"); (d/"mini.yaml").write_text(MINI)
    r = uad("run", d/"mini.yaml", "--out", d/"out", cwd=d)
    assert r.returncode == 0, r.stderr + r.stdout
    return d/"mini.yaml", d/"out"


def test_a_study_that_trains_nothing(mini):
    file, out = mini
    train, = out.glob("train-*")
    card, result = read_card(packaged_folder("dae-T2w")), read_json(train/"result.json", runs.RESULT)
    assert result["label"] == "weights T2w dae f0" and result["results"]["weights"] == "dae-T2w" and result["results"]["train_volumes"] == card["training"]["subjects"]
    mine, shipped = load_model(train/"best.pt")[0].state_dict(), read_model(packaged_folder("dae-T2w"), card).state_dict()
    assert all(torch.equal(v, mine[k]) for k, v in shipped.items())
    page = (out/"report.html").read_text()
    assert "Nothing was trained here" in page and "dae-T2w (300 subjects" in page
    assert uad("run", file, "--out", out).stdout.count("done already") == 4
    assert load_weights(train).card == load_weights("dae", "T2w").card                                         # its run stands for the weights ...
    one_line(uad("export", train, "--out", out.parent/"mine"), "came with the package", "dae-T2w")            # ... which need no export
    assert load_weights(train).card["name"] == "dae-T2w"
    stale = shutil.copytree(train, out.parent/"stale"); facts = json.loads((stale/"run.json").read_text()); facts["parameters"]["weights"]["sha256"] = "0" * 64; (stale/"run.json").write_text(json.dumps(facts))
    with pytest.raises(UadError, match="came with another version"): load_weights(stale)
    assert not (out.parent/"mine").exists()


def test_other_weights_make_another_run(mini, monkeypatch):
    file, out = mini
    from uad_study import shipped
    study = runs.read_study(file)
    planned, read = runs.plan(study), shipped.read_card
    monkeypatch.setattr(shipped, "read_card", lambda f: read(f) | dict(tensors_sha256="0" * 64))
    assert [a.key == b.key for a, b in zip(planned, runs.plan(study))] == [True, False, False, False]


@pytest.mark.parametrize("old, new, words", [
    ("weights: dae", "weights: dea", ["models[0], weights", "'dea'", "did you mean 'dae'"]),
    ("weights: dae", "weights: dae, name: dae", ["models[0], name", "weights bring their model"]),
    ("weights: dae", "weights: dae, train: {steps: 5}", ["models[0], train", "are trained"]),
    ("folds: 1, n_train: 0", "folds: 2, n_train: 1", ["data.folds to 1"]),
    ("folds: 1", "folds: 1, seed: 1", ["data.seed 1", "set another"]),
    ("weights: dae", "name: dae", ["nothing to train on", "data.n_train"]),
    ("scores:", "variants: [{train: {lr: 0.1}}]\nscores:", ["variants[0], train", "trained already"])])
def test_fault_a_study_that_cannot_take_weights(tmp_path, old, new, words):
    (tmp_path/"bad.yaml").write_text(MINI.replace(old, new))
    one_line(uad("run", tmp_path/"bad.yaml", "--dry-run", cwd=tmp_path), *words)


def test_a_variant_of_weights(tmp_path):
    "Scores of the same weights may vary; they are taken up once."
    (tmp_path/"v.yaml").write_text(MINI + "variants: [{label: no median, scores: {median: 1}}]\n")
    assert [r.label for r in runs.plan(runs.read_study(tmp_path/"v.yaml"))] == ["prepare", "weights T2w dae f0", "evaluate T2w dae f0", "evaluate T2w dae, no median f0", "report"]


def test_the_demos(tmp_path):
    one_line(uad("demo", "--train", "--full"), "--train, --full")
    for flags, labels in (((), ["weights T1w ddpm f0"]), (("--train",), ["train T1w ddpm f0"]), (("--full",), [f"weights T1w {m} f0" for m in ("ddpm", "dae", "ae")])):
        study = "-".join(["demo", *(f.strip("-") for f in flags)])
        assert set(labels) <= {r.label for r in runs.plan(runs.read_study(study))}
    demo = runs.read_study("demo").entries[0].data
    assert (demo["n_lesion_val"], demo["n_lesion_test"], len(demo["pathologies"])) == (4, 8, 4)


def test_a_scan_and_nothing_else(tmp_path):
    "`uad score SCAN --out DIR`: contrast from the name, the weights that come along, a tumour on the scan's own grid."
    from uad_study.volume import GRID_AFFINE, load_volume, save_volume
    s = phantom.diseased(905, "tumour")
    x = np.where(s.brain_mask, 100 + 500 * s.images["T2w"], 0).astype(np.float32)
    save_volume(tmp_path/"sub-7_T2w.nii.gz", x, GRID_AFFINE); save_volume(tmp_path/"brain.nii.gz", s.brain_mask, GRID_AFFINE)
    r = uad("score", tmp_path/"sub-7_T2w.nii.gz", "--brain-mask", tmp_path/"brain.nii.gz", "--out", tmp_path/"out", cwd=tmp_path)
    assert r.returncode == 0 and "weights ddpm-T2w (T2w)" in r.stdout, r.stderr + r.stdout
    folder = tmp_path/"out"/"sub-7_T2w"
    summary = json.loads((folder/"summary.json").read_text())
    assert summary["trained_on"] == "trained on 300 healthy subjects (virtual)" and summary["weights_sha256"] == read_card(packaged_folder("ddpm-T2w"))["tensors_sha256"]
    restored = load_volume(next(folder.glob("*desc-restored*"))).data
    assert restored.shape == x.shape and np.corrcoef(restored[s.brain_mask], x[s.brain_mask])[0, 1] > .8
    one_line(uad("score", tmp_path/"brain.nii.gz", "--out", tmp_path/"more"), "contrast")                     # nothing says which
