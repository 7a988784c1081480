"`uad score`: scans of every kind a person may have, and every way in which one can be bad."
import json, os, re, shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import nibabel, numpy as np, pandas as pd, pytest, torch
from conftest import one_line, uad
from typer.testing import CliRunner
from uad_study import phantom, scan
from uad_study.cli import app
from uad_study.core import UadError, read_json
from uad_study.judge import ScoreConfig
from uad_study.prepare import PrepareConfig, _resample
from uad_study.scan import SUMMARY, find_scans, label_of, score_file, score_files, score_scan, scan_state, write_scan
from uad_study.volume import GRID_AFFINE, GRID_SHAPE, Volume, load_volume, save_volume
from uad_study.weights import RESEARCH_ONLY, Weights, histogram

DATA = Path(os.environ.get("UAD_REALDATA") or Path(__file__).resolve().parents[2]/"shared"/"realdata")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PLAIN = PrepareConfig(n4=False, brain_mask="atlas")
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


def make_weights() -> Weights:
    s = phantom.healthy(1, ("T1w",))
    share = histogram(s.images["T1w"], s.brain_mask)
    return Weights("dimmer", "T1w", Dimmer(), ScoreConfig(names=("l1", "ssim_0.9", "ssim_ens")), PLAIN, {"l1": .12, "ssim_ens": .12}, dict(healthy=dict(n=20, error=[.01], histogram=share.tolist(), apart=[.02])))


@pytest.fixture(scope="module")
def weights(): return make_weights()


@pytest.fixture(scope="module")
def quick(weights):
    "The same with a cruder registration, where places to the mm are not the question."
    return replace(weights, prepare=replace(PLAIN, template_mm=4))


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
def result(patient, quick):
    "A scored scan of 2 mm."
    v = brain_scan(patient)
    return score_scan(Volume(v.data, v.affine, "scan.nii.gz"), quick, score="l1")


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
    assert s["volume_ml"] == row["volume_ml"] and abs(s["atlas_ml"] / s["volume_ml"] - 1) < .3
    np.testing.assert_allclose(s["components"][0]["centre_mm"], GRID_AFFINE[:3] @ [*BALL, 1], atol=2)
    assert .5 < s["judged_share"] < .9 and f"{100 * s['judged_share']:.0f} % of the brain was looked at" in (folder/"index.html").read_text() and s["notes"] == []
    assert s["research_only"] == RESEARCH_ONLY and s["weights"] == "dimmer" and s["verdict"] in ("in", "borderline", "out") and set(s["distance"]) == {"error", "histogram", "verdict"}
    assert {"read", "prepare", "restore", "score", "compare", "write"} == set(s["seconds"]) and str(folder.parent) not in json.dumps(s)
    restored, original = outputs(folder)["reconstruction"].get_fdata(), load_volume(folder.parents[1]/"plain.nii.gz").data
    inside = (restored > 0) & (original > 0)
    assert abs(np.median(restored[inside] / original[inside]) - 1) < .05 and restored.max() < 620             # in the scan's intensities, without the ball


@pytest.mark.parametrize("axes", ["LPS", "PSR"])
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
    mask = outputs(tmp_path/"out"/"sub-scan_T1w")["mask"]
    assert abs(np.abs(np.linalg.det(mask.affine[:3, :3])) * (mask.get_fdata() > 0).sum() / 1000 - row["volume_ml"]) < 2e-3         # what the file holds
    for image in outputs(tmp_path/"out"/"sub-scan_T1w").values():
        assert image.shape == v.data.shape
        np.testing.assert_allclose(image.affine, v.affine, atol=1e-4)


def test_a_head(patient, quick, tmp_path):
    "A whole head, with its brain mask and without. The atlas's mask takes some of this head's skull for brain, so of that only the ball is asked for."
    v = head_scan(patient)
    assert scan_state(v) == "head" and scan_state(brain_scan(patient)) == "stripped"
    save_volume(tmp_path/"head.nii.gz", v.data, v.affine); save_volume(tmp_path/"head_mask.nii.gz", np.pad(patient[1], 12), v.affine)
    alone, given = (score_file(tmp_path/"head.nii.gz", quick, tmp_path/o, m, score="l1") for o, m in (("a", ""), ("b", "{name}_mask.nii.gz")))
    for o, how in (("a", "atlas"), ("b", "given")):
        s = read_json(tmp_path/o/"sub-head_T1w"/"summary.json", SUMMARY)
        assert s["preparation"]["mask_method"] == how and s["scan"]["state"] == "head" and s["preparation"]["mask_dice"] > .93, (how, s)
        found = np.asarray(outputs(tmp_path/o/"sub-head_T1w")["mask"].dataobj)[12:-12, 12:-12, 12:-12] > 0
        assert (found & patient[2]).sum() > .8 * patient[2].sum()
    assert ball_found(tmp_path/"b"/"sub-head_T1w", patient) > .8 and given["components"] == 1


def test_nothing_of_the_header_goes_along(patient, quick, tmp_path):
    "Names in the description, an extension and the intent of a scan stay there."
    import gzip
    v = brain_scan(patient)
    image = nibabel.Nifti1Image(v.data, v.affine)
    for k in ("descrip", "intent_name", "aux_file", "db_name"): image.header[k] = b"JaneDoe70"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension(6, b"Patient JaneDoe70"))
    nibabel.save(image, tmp_path/"scan.nii.gz"); assert gzip.decompress((tmp_path/"scan.nii.gz").read_bytes()).count(b"JaneDoe70") == 5
    score_file(tmp_path/"scan.nii.gz", quick, tmp_path/"out", score="l1")
    folder = tmp_path/"out"/"sub-scan_T1w"
    for image in outputs(folder).values():
        h = image.header
        assert not h.extensions and not any(h[k].tobytes().strip(b"\0") for k in ("descrip", "intent_name", "aux_file", "db_name")) and h.get_xyzt_units()[0] == "mm"
    for f in folder.iterdir(): assert b"JaneDoe70" not in (gzip.decompress(f.read_bytes()) if f.suffix == ".gz" else f.read_bytes())


def test_a_name_with_html(result, tmp_path):
    named = replace(result, scan=replace(result.scan, path="/home/somebody/<script>alert(1)<&'\">.nii.gz"), weights=replace(result.weights, name="<b>mine"))
    folder = tmp_path/label_of(named.scan.path, "T1w")
    write_scan(named, folder)
    page = (folder/"index.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and "<b>mine" not in page and "&lt;b&gt;mine" in page and RESEARCH_ONLY in page
    assert not re.search(r"(src|href)\s*=\s*(?!['\"]?data:)", page) and "url(" not in page                    # asks for nothing
    assert not any(b"somebody" in f.read_bytes() for f in folder.iterdir())


@pytest.mark.skipif(CHROMIUM is None and not os.environ.get("CI"), reason="no chromium (Debian: apt install chromium)")
def test_the_page_in_a_browser(plain):
    "Without network, light and dark, wide and narrow: every picture is there, nothing is asked for, nothing overflows, and what must be seen is seen."
    from playwright.sync_api import sync_playwright
    file = plain[1]/"index.html"
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args="--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync".split())
        colours = set()
        for scheme, width in (("light", 1280), ("dark", 1280), ("light", 400)):
            page, bad = b.new_context(offline=True, viewport=dict(width=width, height=900), color_scheme=scheme).new_page(), []
            page.on("console", lambda m: bad.append(m.text)); page.on("request", lambda r: bad.append(r.url) if r.url != file.as_uri() and not r.url.startswith("data:") else None)
            page.goto(file.as_uri())
            assert page.evaluate("[...document.images].filter(i => i.complete && i.naturalWidth > 50).length") == 12 and page.evaluate("document.documentElement.scrollWidth") <= width and not bad, bad
            assert page.evaluate("[...document.images].every(i => Math.abs(i.clientWidth / i.clientHeight / (i.naturalWidth / i.naturalHeight) - 1) < .02)")      # nobody's head is stretched
            for words in (RESEARCH_ONLY, "dimmer", "Is the scan like those of the training?"): assert page.get_by_text(words).first.is_visible()
            assert page.get_by_text(RESEARCH_ONLY).first.bounding_box()["y"] < 300
            colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        b.close()
    assert len(colours) == 2


def write(path, x, affine=np.diag([2., 2, 2, 1])):
    nibabel.save(nibabel.Nifti1Image(np.asarray(x, np.float32), affine), path)
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
       "cut short": (lambda d, v: (save_volume(d/"y.nii.gz", v.data, v.affine), (d/"x.nii.gz").write_bytes((d/"y.nii.gz").read_bytes()[:5000]), d/"x.nii.gz")[-1], "damaged")}


@pytest.mark.parametrize("kind", BAD)
def test_bad_scans(patient, weights, tmp_path, kind):
    make, words = BAD[kind]
    with pytest.raises(UadError, match=words) as e: score_file(make(tmp_path, brain_scan(patient)), weights, tmp_path/"out", score="l1")
    assert "\n" not in str(e.value) and not (tmp_path/"out").exists()


def test_bad_masks_and_settings(patient, quick, tmp_path):
    v = brain_scan(patient)
    save_volume(tmp_path/"scan.nii.gz", v.data, v.affine); save_volume(tmp_path/"empty.nii.gz", v.data < 0, v.affine); save_volume(tmp_path/"grid.nii.gz", v.data[1:] > 0, v.affine)
    for mask, words in (("empty.nii.gz", "mask is empty"), ("grid.nii.gz", "another grid"), ("none.nii.gz", "no such file")):
        with pytest.raises(UadError, match=words) as e: score_file(tmp_path/"scan.nii.gz", quick, tmp_path/"out", mask, score="l1")
        assert "\n" not in str(e.value) and not (tmp_path/"out").exists()
    with pytest.raises(UadError, match="have none for ssim_0.9"): score_file(tmp_path/"scan.nii.gz", quick, tmp_path/"out", score="ssim_0.9")
    assert score_file(tmp_path/"scan.nii.gz", quick, tmp_path/"out", score="ssim_0.9", threshold=.2)["threshold"] == .2


def test_what_is_not_looked_at(patient, quick):
    "The share that is judged is counted by hand: the brain above the grid's lower end, less the rim."
    from uad_study.postprocess import erode_mask
    from uad_study.scan import judged_share
    v = brain_scan(patient)
    r = score_scan(v, quick, score="l1")
    brain, judged = (v.data != 0).sum() * 8e-3, erode_mask(r.prepared.brain_mask, 3).sum() * 8e-3 / abs(np.linalg.det(r.prepared.to_atlas[:3, :3]))
    assert abs(judged_share(r.prepared, 3) - judged / brain) < .02 and judged_share(r.prepared, 0) > judged_share(r.prepared, 3)


def test_few_healthy_scans(patient, quick):
    "Weights that know two healthy scans say so, and don't say what a scan is like."
    two = replace(quick, card=dict(healthy=quick.card["healthy"] | dict(n=2)))
    r = score_scan(brain_scan(patient), two, score="l1")
    assert r.distance["verdict"] == "unknown" and r.notes[0].startswith("Only 2 healthy scans set the threshold")


def test_a_threshold_that_nothing_passes(quick):
    "Plain intensity reaches 1 in healthy scans: a threshold there would mark nothing, whatever is in the scan."
    bright = replace(quick, scores=ScoreConfig(names=("intensity", "l1")), thresholds={"intensity": 1., "intensity_dark": .9, "l1": .1})
    with pytest.raises(UadError, match="intensity reaches its largest value in healthy scans"): scan.choose_threshold(bright, "intensity")
    assert scan.choose_threshold(bright, "intensity", .8) == (.8, "given") and scan.choose_threshold(bright, "intensity_dark")[0] == .9


def test_nothing_half_written(result, tmp_path, monkeypatch):
    "A failure in the last step leaves nothing, or what was there before; a folder of somebody's own is never replaced."
    folder = tmp_path/"out"/"sub-scan_T1w"
    write_scan(result, folder)
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    def full(*a): raise OSError(28, "No space left on device")
    monkeypatch.setattr(scan, "scan_page", full)
    for out in (folder, tmp_path/"new"/"sub-scan_T1w"):
        with pytest.raises(UadError, match="the disk is full"): write_scan(result, out)
    assert before == {f.name: f.read_bytes() for f in folder.iterdir()} and [f.name for f in (tmp_path/"out").iterdir()] == ["sub-scan_T1w"] and not list((tmp_path/"new").iterdir())
    (tmp_path/"sub-scan_T1w").mkdir(); (tmp_path/"sub-scan_T1w"/"thesis.txt").write_text("years of work")
    with pytest.raises(UadError, match="not replaced"): write_scan(result, tmp_path/"sub-scan_T1w")
    assert (tmp_path/"sub-scan_T1w"/"thesis.txt").read_text() == "years of work"


def test_an_empty_result(result, tmp_path):
    s = write_scan(replace(result, threshold=.9, threshold_from="given", found=np.zeros(GRID_SHAPE, bool), parts=[]), tmp_path/"sub-scan_T1w")
    page = (tmp_path/"sub-scan_T1w"/"index.html").read_text()
    assert 0 == s["volume_ml"] == s["n_components"] == s["atlas_ml"] and s["components"] == [] and "no statement about" in page and s["threshold_from"] == "given"


@pytest.fixture(scope="module")
def trained(tiny_out):
    "The training of the tiny study, T2w."
    return next(tiny_out.glob("train-T2w-*"))


def test_command(trained, tmp_path, monkeypatch):
    "From any folder: many scans, one of them broken; a second call does nothing again; then one scan alone."
    s = phantom.healthy(5, ("T2w",)); x, mask = s.images["T2w"], s.brain_mask
    (tmp_path/"in").mkdir()
    for i in (1, 2): save_volume(tmp_path/"in"/f"sub-0{i}_T2w.nii.gz", np.where(mask, 50 + i * 100 * x, 0), GRID_AFFINE)
    (tmp_path/"in"/"sub-03_T2w.nii.gz").write_text("no image"); save_volume(tmp_path/"in"/"sub-01_mask.nii.gz", mask, GRID_AFFINE)
    r = uad("score", "in", "--weights", trained, "--out", "out", "--score", "l1", cwd=tmp_path)
    assert r.returncode == 1 and r.stderr.count("failed: ") == 1 and "sub-03_T2w.nii.gz: " in r.stderr and RESEARCH_ONLY in r.stdout and "page: " in r.stdout, r.stdout + r.stderr
    table = pd.read_csv(tmp_path/"out"/"scores.csv")
    assert table.how.tolist() == ["scored", "scored", "failed"] and str(tmp_path) not in (tmp_path/"out"/"scores.csv").read_text()
    again = uad("score", "in/sub-01_T2w.nii.gz", "in/sub-02_T2w.nii.gz", "--weights", trained, "--out", "out", "--score", "l1", cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.count("done already") == 2, again.stdout + again.stderr
    assert pd.read_csv(tmp_path/"out"/"scores.csv").volume_ml.tolist() == table.volume_ml[:2].tolist()
    assert sorted(p.name for p in (tmp_path/"out").iterdir()) == [".lock", "scores.csv", "sub-01_T2w", "sub-02_T2w"]
    other = uad("score", "in/sub-01_T2w.nii.gz", "--weights", trained, "--out", "out", "--score", "ssim_ens", cwd=tmp_path)             # a folder holds one result a scan
    assert other.returncode == 0 and other.stdout.count("replaced") == 1, other.stdout + other.stderr
    assert pd.read_csv(tmp_path/"out"/"scores.csv").set_index("label").how.to_dict() == {"sub-02_T2w": "kept", "sub-01_T2w": "replaced"}
    (tmp_path/"bad").mkdir(); [(tmp_path/"bad"/f"{k}.nii.gz").write_text("no image") for k in "ab"]
    none = CliRunner().invoke(app, ["score", "--weights", str(trained), "--out", str(tmp_path/"none"), str(tmp_path/"bad")])
    assert none.exit_code == 1 and none.output.count("failed: ") == 2 and [p.name for p in (tmp_path/"none").iterdir()] == [".lock"]                       # nothing listed where nothing was found
    one_line(uad("score", "in/sub-03_T2w.nii.gz", "--weights", trained, "--out", "other", cwd=tmp_path), "not compressed")
    monkeypatch.chdir(tmp_path)
    for arguments, words in ((("in/sub-01_T2w.nii.gz", "--contrast", "T1w"), "T1w"), (("in/sub-01_T2w.nii.gz", "--contrast", "FLAIR"), "--contrast"),
                             (("in/sub-01_T2w.nii.gz", "--score", "l3"), "l3"), (("in/sub-01_T2w.nii.gz", "--state", "x"), "state"), (("in", "--brain-mask", "in/sub-01_mask.nii.gz"), "--brain-mask"),
                             (("in", "--weights", "nobody"), "nobody")):
        error = CliRunner().invoke(app, ["score", "--weights", str(trained), "--out", "other", *arguments]).exception
        assert isinstance(error, UadError) and words in str(error) and "\n" not in str(error), error


def test_families(monkeypatch, tmp_path):
    "Of packaged weights for both contrasts the scans' names choose, or --contrast."
    asked = []
    monkeypatch.setattr(scan, "packaged_weights", lambda: ["dae-T2w", "ddpm-T1w", "ddpm-T2w"]); monkeypatch.setattr(scan, "load_weights", lambda *a: asked.append(a))
    scan.weights_for("ddpm", "T2w"); scan.weights_for("ddpm", "", ["a/sub-1_T1w.nii.gz", "sub-2_T1w.nii"]); scan.weights_for("dae"); scan.weights_for("ddpm-T1w")
    assert [a[:2] for a in asked] == [("ddpm", "T2w"), ("ddpm", "T1w"), ("dae", "T2w"), ("ddpm-T1w", None)]
    monkeypatch.chdir(tmp_path); (tmp_path/"ddpm").mkdir(); (tmp_path/"in").mkdir()                               # a folder of the user's that happens to have the name; and scans in a folder
    for name in ("sub-1_T1w.nii.gz", "sub-2_T1w.NII.GZ", "sub-1_T1w_brainmask.nii.gz", "sub-1_FLAIR.nii.gz"): (tmp_path/"in"/name).touch()
    scan.weights_for("ddpm", "", ["in"]); assert asked[-1][:2] == ("ddpm", "T1w")
    assert [f.name for f in find_scans(["in"], "T1w")] == ["sub-1_T1w.nii.gz", "sub-2_T1w.NII.GZ"] and label_of("in/sub-2_T1w.NII.GZ", "T1w") == "sub-2_T1w"
    scan.weights_for("ddpm", "", ["patient07_T1.nii.gz", "b-t1w.nii"]); assert asked[-1][:2] == ("ddpm", "T1w")
    with pytest.raises(UadError, match="x.nii: no such file"): scan.weights_for("ddpm", "", ["x.nii"])              # before it is asked for a contrast
    for name in ("x.nii", "a_T1w.nii", "a_T2w.nii"): (tmp_path/name).touch()
    for scans in ((), ["x.nii"], ["a_T1w.nii", "a_T2w.nii"]):
        with pytest.raises(UadError, match="--contrast: is needed"): scan.weights_for("ddpm", "", scans)


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.skipif(not (DATA/"manifest.csv").is_file(), reason="no real scans here")
@pytest.mark.parametrize("file, state", [("train_healthy/ixi2mm/IXI012-HH-1211-T1_ds.nii.gz", "head"), ("eval_tumor/TCGA-DU-7294_t1.nii.gz", "stripped"), ("eval_ms/patient26_T1.nii.gz", "stripped")])
def test_real_scans(weights, tmp_path, file, state):
    "Prepared as they will be, with the stand-in for weights: state, affine and shape."
    w = replace(weights, prepare=PrepareConfig())
    row = score_file(DATA/file, w, tmp_path, score="l1")
    s, stored = read_json(tmp_path/row["label"]/"summary.json", SUMMARY), nibabel.load(DATA/file)
    assert s["scan"]["state"] == state and s["preparation"]["mask_dice"] > .93 and not s["notes"]
    for image in outputs(tmp_path/row["label"]).values():
        assert image.shape == stored.shape[:3]
        np.testing.assert_allclose(image.affine, stored.affine, atol=1e-3)


def test_a_missing_scan_is_named_before_a_contrast_is_asked_for(tmp_path):
    one_line(uad("score", tmp_path/"nothere.nii.gz", "--out", tmp_path/"o"), "nothere.nii.gz: no such file")
    (tmp_path/"there.nii.gz").touch()
    one_line(uad("score", tmp_path/"there.nii.gz", "--out", tmp_path/"o"), "--contrast: is needed")
