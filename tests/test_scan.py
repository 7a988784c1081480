"`uad score`: scans of every kind a person may have, and every way in which one can be bad."
import json, os, re
from pathlib import Path
from types import SimpleNamespace
import nibabel, numpy as np, pandas as pd, pytest, torch
from conftest import one_line, uad
from uad_study import phantom, scan
from uad_study.core import UadError, read_json
from uad_study.judge import ScoreConfig
from uad_study.prepare import PrepareConfig, _resample
from uad_study.scan import RESEARCH_USE, SUMMARY, find_scans, label_of, score_file, score_files, score_scan, scan_state, write_scan
from uad_study.volume import GRID_AFFINE, GRID_SHAPE, Volume, load_volume, save_volume
from uad_study.weights import Weights, histogram

DATA = Path(os.environ.get("UAD_REALDATA") or Path(__file__).resolve().parents[2]/"shared"/"realdata")
QUICK = PrepareConfig(n4=False, brain_mask="atlas")
BALL = np.array([32, 56, 28])
OBLIQUE = np.eye(4); OBLIQUE[:3, :3] = [[np.cos(.2), -np.sin(.2), 0], [np.sin(.2), np.cos(.2), 0], [0, 0, 1]]; OBLIQUE[:3, 3] = 8, -12, 5


class Dimmer(torch.nn.Module):
    "A restoration whose result is known: what is above .75 becomes .75."
    config = SimpleNamespace()
    def reconstruct(self, x, generator): return x.clamp(max=.75)


@pytest.fixture(scope="module")
def patient():
    "A healthy virtual brain on the atlas's positions with a bright ball of 20 mL on its left: (image, brain mask, ball), each (H, W, D) of 2 mm."
    s = phantom.healthy(5, ("T1w",))
    ball = (((np.indices(GRID_SHAPE) - BALL.reshape(3, 1, 1, 1))**2).sum(0) < 8.4**2) & s.brain_mask
    return np.where(ball, 1.3, s.images["T1w"]), s.brain_mask, ball


@pytest.fixture(scope="module")
def weights():
    s = phantom.healthy(1, ("T1w",))
    share = histogram(s.images["T1w"], s.brain_mask)
    return Weights("dimmer", "T1w", Dimmer(), ScoreConfig(names=("l1", "ssim_0.9", "ssim_ens")), QUICK, {"l1": .12, "ssim_ens": .12}, dict(healthy=dict(n=1, error=[.01], histogram=share.tolist(), apart=[.02])))


def brain_scan(patient, spacing=(2, 2, 2), move=np.eye(4)) -> Volume:
    "The brain as a skull-stripped scan with voxels of `spacing` mm, its positions moved by `move`."
    x, mask, _ = patient
    shape = [int(np.ceil(n * 2 / s)) + 4 for n, s in zip(GRID_SHAPE, spacing)]
    box = np.diag([*map(float, spacing), 1.]); box[:3, 3] = GRID_AFFINE[:3, 3] - 2 * np.array(spacing)
    data = _resample(np.where(mask, 100 + 500 * x, 0), GRID_AFFINE, np.eye(4), box, shape, 1)
    return Volume(np.where(_resample(mask, GRID_AFFINE, np.eye(4), box, shape, 0) > 0, np.maximum(data, 1), 0).astype(np.float32), move @ box)


def head_scan(patient) -> Volume:
    "A head around the brain: skull, scalp and noisy air."
    from scipy.ndimage import distance_transform_edt, gaussian_filter
    x, m = (np.pad(a, 12) for a in patient[:2])
    out = distance_transform_edt(~m, sampling=2)
    shell = gaussian_filter(np.select([out == 0, out <= 7, out <= 14], [.2, .1, .75], 0), 1)
    head = 800 * np.where(m, .15 + .6 * x, shell) + np.abs(np.random.default_rng(0).normal(0, 8, m.shape))
    return Volume(head.astype(np.float32), GRID_AFFINE @ np.array([[1., 0, 0, -12], [0, 1, 0, -12], [0, 0, 1, -12], [0, 0, 0, 1]]))


def outputs(folder) -> dict:
    "The images of a scored scan by what they are."
    found = {k: list(Path(folder).glob(p)) for k, p in dict(anomaly="*_statmap.nii.gz", mask="*_mask.nii.gz", reconstruction="*_desc-restored_*.nii.gz").items()}
    assert all(len(v) == 1 for v in found.values()), found
    return {k: nibabel.load(v[0]) for k, v in found.items()}


def ball_found(folder, patient, move=np.eye(4)) -> float:
    "Dice of the written mask with the ball, counted at the voxels of the study's grid."
    image = outputs(folder)["mask"]
    there = _resample(np.asarray(image.dataobj), image.affine, np.linalg.inv(move), GRID_AFFINE, GRID_SHAPE, 0) > 0
    return 2 * (there & patient[2]).sum() / (there.sum() + patient[2].sum())


@pytest.fixture(scope="module")
def plain(patient, weights, tmp_path_factory):
    "The brain at 1 mm as RAS .nii.gz, scored: (row, folder)."
    d = tmp_path_factory.mktemp("plain"); v = brain_scan(patient, (1, 1, 1))
    save_volume(d/"plain.nii.gz", v.data, v.affine)
    return score_file(d/"plain.nii.gz", weights, d/"out", score="l1"), d/"out"/"sub-plain_T1w"


def test_the_ball_is_found_where_it_is(patient, plain):
    row, folder = plain
    s = read_json(folder/"summary.json", SUMMARY)
    assert ball_found(folder, patient) > .85 and row["components"] == 1 and abs(row["volume_ml"] / 20.1 - 1) < .2
    assert s["volume_ml"] == row["volume_ml"] and abs(s["mask_ml"] / s["volume_ml"] - 1) < .1
    np.testing.assert_allclose(s["components"][0]["centre_mm"], GRID_AFFINE[:3] @ [*BALL, 1], atol=2)
    assert s["research_use"] == RESEARCH_USE and s["weights"] == "dimmer" and s["verdict"] in ("in", "borderline", "out") and set(s["distance"]) == {"error", "histogram", "verdict"}
    assert {"read", "prepare", "restore", "score", "compare", "write"} == set(s["seconds"]) and str(folder.parent) not in json.dumps(s)
    restored, original = outputs(folder)["reconstruction"].get_fdata(), load_volume(folder.parents[1]/"plain.nii.gz").data
    inside = restored > 0
    assert abs(np.median(restored[inside] / original[inside]) - 1) < .05 and restored.max() < 620             # in the scan's intensities, without the ball


@pytest.mark.parametrize("axes", ["LPS", "PSR", "LAS"])
def test_another_orientation_gives_the_same(patient, weights, plain, tmp_path, axes):
    v = brain_scan(patient, (1, 1, 1))
    save_volume(tmp_path/"scan.nii", v.data, v.affine, axes)
    row = score_file(tmp_path/"scan.nii", weights, tmp_path/"out", score="l1")
    assert abs(row["volume_ml"] / plain[0]["volume_ml"] - 1) < .01 and row["verdict"] == plain[0]["verdict"]
    images = outputs(tmp_path/"out"/"sub-scan_T1w"); stored = nibabel.load(tmp_path/"scan.nii")
    for image in images.values():
        assert image.shape == stored.shape and "".join(nibabel.aff2axcodes(image.affine)) == axes
        np.testing.assert_allclose(image.affine, stored.affine, atol=1e-4)


@pytest.mark.parametrize("how", ["oblique", "1x1x5", "int16"])
def test_other_grids(patient, weights, plain, tmp_path, how):
    "Turned and moved, of 5 mm slices, and whole numbers with slope and intercept: the same volume within 5 % (5 mm slices: 15 %), outputs on the scan's own grid."
    move = OBLIQUE if how == "oblique" else np.eye(4)
    v = brain_scan(patient, (1, 1, 5) if how == "1x1x5" else (1, 1, 1), move)
    if how == "int16":
        image = nibabel.Nifti1Image(np.zeros(1, np.int16).reshape(1, 1, 1), v.affine); image.header.set_data_dtype(np.int16)
        image = nibabel.Nifti1Image(v.data, v.affine, image.header); image.header.set_slope_inter(.02, 0)
        image = nibabel.Nifti1Image.from_bytes(image.to_bytes())
        assert image.dataobj.slope != 1
        nibabel.save(image, tmp_path/"scan.nii.gz")
    else: save_volume(tmp_path/"scan.nii.gz", v.data, v.affine)
    row = score_file(tmp_path/"scan.nii.gz", weights, tmp_path/"out", score="l1")
    assert abs(row["volume_ml"] / plain[0]["volume_ml"] - 1) < (.15 if how == "1x1x5" else .05)
    assert ball_found(tmp_path/"out"/"sub-scan_T1w", patient, move) > (.75 if how == "1x1x5" else .85)
    for image in outputs(tmp_path/"out"/"sub-scan_T1w").values():
        assert image.shape == v.data.shape
        np.testing.assert_allclose(image.affine, v.affine, atol=1e-4)


def test_a_head(patient, weights, tmp_path):
    "A whole head, without and with its brain mask."
    v = head_scan(patient)
    assert scan_state(v) == "head" and scan_state(brain_scan(patient)) == "stripped"
    save_volume(tmp_path/"head.nii.gz", v.data, v.affine); save_volume(tmp_path/"head_mask.nii.gz", np.pad(patient[1], 12), v.affine)
    alone, given = (score_file(tmp_path/"head.nii.gz", weights, tmp_path/o, m, score="l1") for o, m in (("a", ""), ("b", "{name}_mask.nii.gz")))
    for row, o, how in ((alone, "a", "atlas"), (given, "b", "given")):
        s = read_json(tmp_path/o/"sub-head_T1w"/"summary.json", SUMMARY)
        assert s["preparation"]["mask_method"] == how and s["scan"]["state"] == "head" and ball_found(tmp_path/o/"sub-head_T1w", patient) > .8, (how, s)
    assert abs(alone["volume_ml"] / given["volume_ml"] - 1) < .1


def test_nothing_of_the_header_goes_along(patient, weights, tmp_path):
    "Names in the description, an extension and the intent of a scan stay there."
    v = brain_scan(patient)
    image = nibabel.Nifti1Image(v.data, v.affine)
    image.header["descrip"], image.header["intent_name"], image.header["aux_file"], image.header["db_name"] = b"Jane Doe 1970", b"Doe", b"doe.txt", b"Doe"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension(6, b"Patient: Jane Doe"))
    nibabel.save(image, tmp_path/"scan.nii.gz")
    score_file(tmp_path/"scan.nii.gz", weights, tmp_path/"out", score="l1")
    folder = tmp_path/"out"/"sub-scan_T1w"
    for image in outputs(folder).values():
        h = image.header
        assert not h.extensions and not any(h[k].tobytes().strip(b"\0") for k in ("descrip", "intent_name", "aux_file", "db_name")) and h.get_xyzt_units()[0] == "mm"
    assert not any(b"Doe" in f.read_bytes() for f in folder.iterdir())


def test_a_name_with_html(patient, weights, tmp_path):
    v = brain_scan(patient)
    save_volume(tmp_path/"<script>alert(1)<&'\">.nii.gz", v.data, v.affine)
    row = score_file(next(tmp_path.glob("*.nii.gz")), weights, tmp_path/"out", score="l1")
    page = (tmp_path/"out"/row["label"]/"index.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and RESEARCH_USE in page and "dimmer" in page
    assert not re.search(r"(src|href)\s*=\s*(?!['\"]?data:)", page) and "url(" not in page                    # asks for nothing


def write(path, x, affine=np.diag([2., 2, 2, 1]), codes=True):
    image = nibabel.Nifti1Image(np.asarray(x, np.float32), affine); nibabel.save(image, path)
    return path


def huge(path):
    "A file of a kilobyte that claims 32767 voxels along each axis."
    image = nibabel.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4))
    b = bytearray(image.to_bytes()); b[42:48] = np.array([32767] * 3, "<i2").tobytes()
    if path.name.endswith(".gz"):
        import gzip
        path.write_bytes(gzip.compress(bytes(b)))
    else: path.write_bytes(b)
    return path


BAD = {"missing": (lambda d, v: d/"none.nii.gz", "no such file"), "text": (lambda d, v: (d/"x.nii", (d/"x.nii").write_text("no image"))[0], "not a NIfTI file"),
       "four dimensions": (lambda d, v: write(d/"x.nii", np.ones((5, 5, 5, 2))), "4 dimensions"), "NaN": (lambda d, v: write(d/"x.nii", np.where(v.data > 300, np.nan, v.data)), "NaN"),
       "constant": (lambda d, v: write(d/"x.nii", np.ones((9, 9, 9))), "is empty"), "huge": (lambda d, v: huge(d/"x.nii"), "claims"), "huge, compressed": (lambda d, v: huge(d/"x.nii.gz"), "claims"),
       "no brain": (lambda d, v: write(d/"x.nii", np.random.default_rng(0).random((40, 40, 40)) + 1, np.diag([4., 4, 4, 1])), "x.nii:"),
       "cut short": (lambda d, v: (save_volume(d/"y.nii.gz", v.data, v.affine), (d/"x.nii.gz").write_bytes((d/"y.nii.gz").read_bytes()[:5000]), d/"x.nii.gz")[-1], "damaged")}


@pytest.mark.parametrize("kind", BAD)
def test_bad_scans(patient, weights, tmp_path, kind):
    make, words = BAD[kind]
    with pytest.raises(UadError, match=words) as e: score_file(make(tmp_path, brain_scan(patient)), weights, tmp_path/"out", score="l1")
    assert "\n" not in str(e.value) and not (tmp_path/"out").exists()


def test_bad_masks_and_settings(patient, weights, tmp_path):
    v = brain_scan(patient)
    save_volume(tmp_path/"scan.nii.gz", v.data, v.affine); save_volume(tmp_path/"empty.nii.gz", v.data < 0, v.affine); save_volume(tmp_path/"grid.nii.gz", v.data[1:] > 0, v.affine)
    for mask, words in (("empty.nii.gz", "mask is empty"), ("grid.nii.gz", "another grid"), ("none.nii.gz", "no such file")):
        with pytest.raises(UadError, match=words) as e: score_file(tmp_path/"scan.nii.gz", weights, tmp_path/"out", mask, score="l1")
        assert "\n" not in str(e.value) and not (tmp_path/"out").exists()
    with pytest.raises(UadError, match="have none for ssim_0.9"): score_file(tmp_path/"scan.nii.gz", weights, tmp_path/"out", score="ssim_0.9")
    assert score_file(tmp_path/"scan.nii.gz", weights, tmp_path/"out", score="ssim_0.9", threshold=.2)["threshold"] == .2


def test_nothing_half_written(patient, weights, tmp_path, monkeypatch):
    "A failure in the last step leaves nothing, or what was there before."
    v = brain_scan(patient); save_volume(tmp_path/"scan.nii.gz", v.data, v.affine)
    score_file(tmp_path/"scan.nii.gz", weights, tmp_path/"out", score="l1")
    folder = tmp_path/"out"/"sub-scan_T1w"
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    def full(*a): raise OSError(28, "No space left on device")
    monkeypatch.setattr(scan, "scan_page", full)
    with pytest.raises(UadError, match="No space left|disk is full"): score_file(tmp_path/"scan.nii.gz", weights, tmp_path/"out", score="l1", threshold=.2)
    with pytest.raises(UadError, match="No space left|disk is full"): score_file(tmp_path/"scan.nii.gz", weights, tmp_path/"new", score="l1")
    assert before == {f.name: f.read_bytes() for f in folder.iterdir()} and [f.name for f in (tmp_path/"out").iterdir()] == ["sub-scan_T1w"] and not list((tmp_path/"new").iterdir())


def test_an_empty_result(patient, weights, tmp_path):
    v = brain_scan(patient); save_volume(tmp_path/"scan.nii.gz", v.data, v.affine)
    row = score_file(tmp_path/"scan.nii.gz", weights, tmp_path/"out", score="l1", threshold=.9)
    s, page = read_json(tmp_path/"out"/"sub-scan_T1w"/"summary.json", SUMMARY), (tmp_path/"out"/"sub-scan_T1w"/"index.html").read_text()
    assert row["volume_ml"] == 0 == s["n_components"] == s["mask_ml"] and s["components"] == [] and "no statement about" in page and s["threshold_from"] == "given"


@pytest.fixture(scope="module")
def trained(tiny_out):
    "The training of the tiny study, T2w."
    return next(tiny_out.glob("train-T2w-*"))


def test_command(patient, trained, tmp_path):
    "From any folder: many scans, one of them broken; a second call does nothing again; then one scan alone."
    s = phantom.healthy(5, ("T2w",)); x, mask = s.images["T2w"], s.brain_mask
    (tmp_path/"in").mkdir()
    for i in (1, 2): save_volume(tmp_path/"in"/f"sub-0{i}_T2w.nii.gz", np.where(mask, 50 + i * 100 * x, 0), GRID_AFFINE)
    (tmp_path/"in"/"sub-03_T2w.nii.gz").write_text("no image"); save_volume(tmp_path/"in"/"sub-01_mask.nii.gz", mask, GRID_AFFINE)
    r = uad("score", "in", "--weights", trained, "--out", "out", "--score", "l1", cwd=tmp_path)
    assert r.returncode == 1 and r.stderr.count("failed: ") == 1 and "sub-03_T2w.nii.gz: " in r.stderr and RESEARCH_USE in r.stdout and "page: " in r.stdout, r.stdout + r.stderr
    table = pd.read_csv(tmp_path/"out"/"scores.csv")
    assert table.how.tolist() == ["scored", "scored", "failed"] and str(tmp_path) not in (tmp_path/"out"/"scores.csv").read_text()
    again = uad("score", "in/sub-01_T2w.nii.gz", "in/sub-02_T2w.nii.gz", "--weights", trained, "--out", "out", "--score", "l1", cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.count("done already") == 2, again.stdout + again.stderr
    assert pd.read_csv(tmp_path/"out"/"scores.csv").volume_ml.tolist() == table.volume_ml[:2].tolist()
    assert sorted(p.name for p in (tmp_path/"out").iterdir()) == [".lock", "scores.csv", "sub-01_T2w", "sub-02_T2w"]
    for arguments, words in ((("in/sub-03_T2w.nii.gz",), "not a NIfTI"), (("in/sub-01_T2w.nii.gz", "--contrast", "T1w"), "T1w"), (("in/sub-01_T2w.nii.gz", "--contrast", "FLAIR"), "--contrast"),
                             (("in/sub-01_T2w.nii.gz", "--score", "l3"), "l3"), (("in/sub-01_T2w.nii.gz", "--state", "x"), "state"), (("in", "--brain-mask", "in/sub-01_mask.nii.gz"), "--brain-mask")):
        one_line(uad("score", *arguments, "--weights", trained, "--out", "other", cwd=tmp_path), words)
    one_line(uad("score", "in", "--weights", "nobody", "--out", "other", cwd=tmp_path), "nobody")


def test_families(monkeypatch):
    "Of packaged weights for both contrasts the scans' names choose, or --contrast."
    asked = []
    monkeypatch.setattr(scan, "packaged_weights", lambda: ["dae-T2w", "ddpm-T1w", "ddpm-T2w"]); monkeypatch.setattr(scan, "load_weights", lambda *a: asked.append(a))
    scan.weights_for("ddpm", "T2w"); scan.weights_for("ddpm", "", ["a/sub-1_T1w.nii.gz", "sub-2_T1w.nii"]); scan.weights_for("dae"); scan.weights_for("ddpm-T1w")
    assert [a[:2] for a in asked] == [("ddpm", "T2w"), ("ddpm", "T1w"), ("dae", "T2w"), ("ddpm-T1w", None)]
    for scans in ((), ["x.nii"], ["a_T1w.nii", "a_T2w.nii"]):
        with pytest.raises(UadError, match="--contrast: is needed"): scan.weights_for("ddpm", "", scans)


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.skipif(not (DATA/"manifest.csv").is_file(), reason="no real scans here")
@pytest.mark.parametrize("file, state", [("train_healthy/ixi2mm/IXI012-HH-1211-T1_ds.nii.gz", "head"), ("eval_tumor/TCGA-DU-7294_t1.nii.gz", "stripped"), ("eval_ms/patient26_T1.nii.gz", "stripped")])
def test_real_scans(weights, tmp_path, file, state):
    "Prepared as they will be, with the stand-in for weights: state, affine and shape."
    from dataclasses import replace
    w = replace(weights, prepare=PrepareConfig())
    row = score_file(DATA/file, w, tmp_path, score="l1")
    s, stored = read_json(tmp_path/row["label"]/"summary.json", SUMMARY), nibabel.load(DATA/file)
    assert s["scan"]["state"] == state and s["preparation"]["mask_dice"] > .93 and not s["notes"]
    for image in outputs(tmp_path/row["label"]).values():
        assert image.shape == stored.shape[:3]
        np.testing.assert_allclose(image.affine, stored.affine, atol=1e-3)
