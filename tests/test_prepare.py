"Preparation of one scan: what needs no data first, then figures measured on real scans (slow)."
import errno, importlib.util, json, os, stat
from dataclasses import asdict
from pathlib import Path
import numpy as np, pytest
from nibabel.affines import apply_affine
from scipy.spatial.transform import Rotation
from uad_study import phantom, prepare
from uad_study.core import UadError, from_dict
from uad_study.prepare import (PrepareConfig, _resample, config_atlas, field_of_view, find_brain, lesion_on_grid, load_atlas, load_template, load_transform, prepare_row, prepare_scan, register, sample,
                               save_transform, to_native)
from uad_study.volume import GRID_AFFINE, GRID_SHAPE, Volume, load_volume, save_volume

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("UAD_REALDATA") or ROOT.parent/"shared"/"realdata")
NONE = PrepareConfig(registration="none", n4=False)
needs_data = [pytest.mark.slow, pytest.mark.realdata, pytest.mark.skipif(not (DATA/"manifest.csv").is_file(), reason="no real scans here")]
spec = importlib.util.spec_from_file_location("bench_prepare", ROOT/"benchmarks"/"prepare.py")
bench = importlib.util.module_from_spec(spec); spec.loader.exec_module(bench)


@pytest.fixture(scope="module")
def brain():
    "The template, brighter on its left, and a lesion there."
    t, _ = load_template(2)
    x = apply_affine(t.affine, np.indices(t.data.shape).reshape(3, -1).T)[:, 0].reshape(t.data.shape)
    lesion = np.zeros(t.data.shape, bool); lesion[22:32, 60:72, 40:52] = True
    return Volume(np.where(t.data > 0, t.data + .3 * (x < 0), 0).astype(np.float32), t.affine), Volume(lesion, t.affine)


def row(**kw):
    return dict(dataset="own", subject_id="s1", contrast="T1w", pathology="stroke", split="test", val_fold=-1, image="scan.nii.gz", brain_mask="", lesion_mask="", through="",
                state="stripped", space="", ignore="") | kw


def refused(words, row, root, config=NONE):
    with pytest.raises(UadError) as e: prepare_row(row, root, config)
    assert "\n" not in str(e.value) and words in str(e.value), str(e.value)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "PSR", "IRP"])
def test_left_is_decided_by_the_header(tmp_path, brain, axes):
    "Whatever order the file stores: the left stays on the left, and results go back in the file's own order."
    import nibabel
    scan, lesion = brain
    save_volume(tmp_path/"scan.nii.gz", scan.data, scan.affine, axes); save_volume(tmp_path/"lesion.nii.gz", lesion.data, lesion.affine, axes)
    assert "".join(nibabel.aff2axcodes(nibabel.load(tmp_path/"scan.nii.gz").affine)) == axes
    p = prepare_row(row(lesion_mask="lesion.nii.gz"), tmp_path, NONE)
    plain = prepare_scan(scan, None, lesion, NONE, state="stripped")
    np.testing.assert_array_equal(p.image, plain.image); np.testing.assert_array_equal(p.lesion_mask, plain.lesion_mask)
    assert p.lesion_mask[:48].any() and not p.lesion_mask[48:].any() and p.image[:48].mean() > 1.1 * p.image[48:].mean()
    save_volume(tmp_path/"back.nii.gz", to_native(p.lesion_mask, p), np.array(p.fine["scan_affine"]), p.fine["scan_axes"])
    a, b = nibabel.load(tmp_path/"back.nii.gz"), nibabel.load(tmp_path/"lesion.nii.gz")
    np.testing.assert_allclose(a.affine, b.affine)
    assert bench.dice(np.asarray(a.dataobj) > 0, np.asarray(b.dataobj) > 0) > .85        # the box ends in the middle of voxels: the worst case


def test_strict_settings():
    c = from_dict(PrepareConfig, dict(atlas="SRI24.nii.gz", n4_iterations=[200] * 4, percentiles=[0, 98], n4_sigma_mm=1), "study.yaml: prepare")
    assert c.n4_iterations == (200,) * 4 and c.percentiles == (0, 98)
    for bad in (dict(atlsa="x"), dict(n4="yes"), dict(lesion="all"), dict(registration="syn"), dict(percentiles=[5, 5]), dict(template_mm=0), dict(atlas_mask="m.nii.gz"), dict(n4_iterations=[])):
        with pytest.raises(UadError) as e: from_dict(PrepareConfig, bad, "study.yaml: prepare")
        assert "\n" not in str(e.value) and next(iter(bad)) in str(e.value)


def test_presets_are_read():
    from uad_study.core import read_yaml
    released = from_dict(PrepareConfig, read_yaml(ROOT/"uad_study/studies/released-code.yaml")["prepare"], "released-code")
    paper = from_dict(PrepareConfig, read_yaml(ROOT/"uad_study/studies/paper.yaml")["prepare"], "paper")
    assert released.denoise and released.lesion == "any" and released.field_of_view == "own" and released.interpolation == "bspline" and not released.n4_masked
    assert paper.n4 and not paper.denoise and paper.lesion == "area" and paper.field_of_view == "fixed"


def test_all_released_settings_run(brain):
    from uad_study.core import read_yaml
    released = asdict(from_dict(PrepareConfig, read_yaml(ROOT/"uad_study/studies/released-code.yaml")["prepare"], "")) | dict(registration="none", n4_iterations=(5, 5), n4_shrink=6)
    p = prepare_scan(*[brain[0], None, brain[1]], PrepareConfig(**released), state="stripped")
    q = prepare_scan(*[brain[0], None, brain[1]], NONE, state="stripped")
    assert p.image.shape == GRID_SHAPE and 0 <= p.image.min() and p.image.max() <= 1 and not np.allclose(p.grid_affine, q.grid_affine)
    assert p.meta["lesion_ml"] > 1.1 * q.meta["lesion_ml"]                                                  # any touch dilates
    back = to_native(p.lesion_mask, p); assert (back & brain[1].data).sum() > .95 * brain[1].data.sum()


def test_another_atlas(tmp_path, brain):
    "An atlas file in its own space, turned, moved and cropped: the grid follows it, and a scan in that space needs no registration."
    t, m = load_template(1)
    turn = np.eye(4); turn[:3, :3] = Rotation.from_euler("xyz", (4, -7, 30), degrees=True).as_matrix(); turn[:3, 3] = 31, -12, 55
    cut = tuple(slice(5, -3) for _ in range(3))
    affine = turn @ t.affine @ np.array([[1., 0, 0, 5], [0, 1, 0, 5], [0, 0, 1, 5], [0, 0, 0, 1]])
    save_volume(tmp_path/"SRI24_T1.nii.gz", 900 * t.data[cut], affine)
    config = PrepareConfig(atlas=str(tmp_path/"SRI24_T1.nii.gz"), n4=False)
    atlas = config_atlas(config)
    assert atlas.space == "SRI24" and abs(atlas.template.data.shape[0] * 2 - t.data[cut].shape[0]) <= 2
    off = apply_affine(np.linalg.inv(turn) @ atlas.grid, [[0, 0, 0], [95, 95, 49]]) - apply_affine(GRID_AFFINE, [[0, 0, 0], [95, 95, 49]])
    assert np.abs(off).max() < 1.01                                                                          # the same box of the same brain, to the mm of rounding
    np.testing.assert_allclose(atlas.grid, field_of_view(Volume(t.data[cut] > 0, affine)), atol=1e-3)
    save_volume(tmp_path/"scan.nii.gz", brain[0].data, turn @ brain[0].affine)
    p = prepare_row(row(space="SRI24"), tmp_path, config)
    np.testing.assert_array_equal(p.to_atlas, np.eye(4)); assert p.meta["mask_dice"] > .97 and p.fine["atlas"] == "SRI24_T1.nii.gz"


@pytest.mark.parametrize("shear", [0, .05])
def test_registration(shear):
    "Quick registrations: a scan turned by 20 degrees and shifted, and one with shear in its header, which ITK cannot express."
    t, m = load_template(4)
    move = bench.rigid((0, 0, 20), (20, -10, 15)); move[0, 1] += shear
    points = apply_affine(t.affine, np.argwhere(m.data))
    assert np.linalg.norm(apply_affine(register(Volume(t.data, move @ t.affine), t) @ move, points) - points, axis=1).mean() < 1


def test_whole_head_atlas_needs_a_mask(tmp_path):
    t, _ = load_template(4)
    save_volume(tmp_path/"head.nii.gz", t.data + 1, t.affine)
    with pytest.raises(UadError, match="prepare.atlas_mask"): load_atlas(str(tmp_path/"head.nii.gz"))


STAND_IN = """#!{python}
import sys, nibabel, numpy as np
a = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if {fails}: print("no weights", file=sys.stderr); sys.exit(3)
x = nibabel.load(a["-i"]); d = x.get_fdata()
nibabel.save(nibabel.Nifti1Image(np.where(d > 2, d, 0), x.affine), a["-o"])
"""


@pytest.fixture
def hd_bet(tmp_path, monkeypatch):
    "A program `hd-bet` that stands in for the real one: whatever is bright is brain."
    import sys
    def make(fails=False):
        p = tmp_path/"bin"/"hd-bet"; p.parent.mkdir(exist_ok=True); p.write_text(STAND_IN.format(python=sys.executable, fails=fails)); p.chmod(p.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{p.parent}{os.pathsep}{os.environ['PATH']}")
    return make


def test_hd_bet_is_called(hd_bet, monkeypatch):
    hd_bet()
    x = np.zeros((90, 100, 90), np.float32); x[20:70, 20:80, 20:70] = 5; x[40:44, 40:44, 40:44] = 0
    head = Volume(x, np.diag([2., 2, 2, 1]), "head.nii.gz")
    mask, method = find_brain(head)
    assert method == "hd-bet" and mask.sum() == 50 * 60 * 50                                                 # holes are filled
    hd_bet(fails=True)
    with pytest.raises(UadError, match=r"head.nii.gz: hd-bet failed \(no weights\)"): find_brain(head, "hd-bet")
    monkeypatch.setattr(prepare, "_deepbet", lambda h: x > 0); monkeypatch.setattr(prepare, "_atlas_mask", lambda *a: x > 0)
    assert find_brain(head)[1] in ("deepbet", "atlas")                                                       # auto goes on
    monkeypatch.setattr(prepare, "_deepbet", lambda h: x > 9); monkeypatch.setattr(prepare, "_atlas_mask", lambda *a: x > 9)
    with pytest.raises(UadError, match="no brain was found"): find_brain(head)


def test_methods_that_are_not_there(monkeypatch):
    head = Volume(np.ones((9, 9, 9), np.float32), np.eye(4), "h.nii")
    monkeypatch.setenv("PATH", ""); monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda n: None)
    with pytest.raises(UadError, match="hd-bet is not on the PATH"): find_brain(head, "hd-bet")
    with pytest.raises(UadError, match="pip install deepbet"): find_brain(head, "deepbet")
    with pytest.raises(UadError, match="has no brain mask"): find_brain(head, "given")


def test_bad_rows(tmp_path, brain, monkeypatch):
    scan, lesion = brain
    save_volume(tmp_path/"scan.nii.gz", scan.data, scan.affine); save_volume(tmp_path/"lesion.nii.gz", lesion.data, lesion.affine)
    save_volume(tmp_path/"small.nii.gz", lesion.data[1:], lesion.affine); save_volume(tmp_path/"floats.nii.gz", lesion.data * .4, lesion.affine)
    refused("has no image", row(image=""), tmp_path)
    refused("leaves the data folder", row(image="../scan.nii.gz"), tmp_path)
    refused("none.nii.gz: no such file", row(image="none.nii.gz"), tmp_path)
    refused("small.nii.gz: the mask lies on another grid", row(lesion_mask="small.nii.gz"), tmp_path)
    refused("small.nii.gz: the mask lies on another grid", row(brain_mask="small.nii.gz"), tmp_path)
    refused("floats.nii.gz: holds fractions", row(lesion_mask="floats.nii.gz"), tmp_path)
    refused("ignore must list label values", row(lesion_mask="lesion.nii.gz", ignore="two"), tmp_path)
    refused("contrast: 'FLAIR' is unknown", row(contrast="FLAIR"), tmp_path)
    refused("state: 'raw' is unknown", row(state="raw"), tmp_path)
    refused("has no brain mask", row(state="head"), tmp_path, PrepareConfig(brain_mask="given"))
    def full(*a, **k): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(prepare, "_locate", full)
    refused("No space left on device", row(), tmp_path)


def test_elsewhere_is_refused(tmp_path, brain):
    "A scan that claims to lie in the atlas's space but does not."
    off = brain[0].affine.copy(); off[0, 3] += 60
    save_volume(tmp_path/"scan.nii.gz", brain[0].data, off)
    refused("registration failed", row(space="MNI152NLin2009aSym"), tmp_path, PrepareConfig(n4=False))


def test_ignored_labels(tmp_path, brain):
    scan, lesion = brain
    labels = lesion.data * 1.; labels[27:32] *= 2
    save_volume(tmp_path/"scan.nii.gz", scan.data, scan.affine); save_volume(tmp_path/"wmh.nii.gz", labels, scan.affine)
    p, both = (prepare_row(row(lesion_mask="wmh.nii.gz", ignore=i), tmp_path, NONE) for i in ("2", ""))
    assert p.ignore_mask.any() and not (p.ignore_mask & p.lesion_mask).any() and both.ignore_mask is None
    np.testing.assert_array_equal(p.ignore_mask | p.lesion_mask, both.lesion_mask)                           # nothing falls between the two


def test_a_mask_on_the_t1_grid(brain):
    "A T2w with its T1w on another grid: the T1w's mask is carried over."
    scan, _ = brain
    t1 = Volume(scan.data[2:, 3:], scan.affine @ np.array([[1., 0, 0, 2], [0, 1, 0, 3], [0, 0, 1, 0], [0, 0, 0, 1]]), "t1")
    t2 = Volume(np.where(scan.data > 0, 1.6 - scan.data, 0), scan.affine, "t2")
    p = prepare_scan(t2, Volume(t1.data > 0, t1.affine), config=NONE, contrast="T2w", through=t1, state="stripped")
    assert p.meta["mask_method"] == "given, from its T1w" and p.meta["mask_dice"] > .97


def test_transform_file(tmp_path, brain):
    p = prepare_scan(brain[0], None, brain[1], PrepareConfig(registration="none", n4=False), state="stripped")
    save_transform(tmp_path/"t.json", p)
    t = load_transform(tmp_path/"t.json")
    assert t["format"] == "uad-transform/1" and t["settings"]["atlas"] == "MNI152" and str(ROOT) not in (tmp_path/"t.json").read_text()
    np.testing.assert_array_equal(to_native(p.lesion_mask, t), to_native(p.lesion_mask, p))
    labels = np.where(p.lesion_mask, 3., 0); assert set(np.unique(to_native(labels, p, order=0))) == {0, 3}
    with pytest.raises(UadError, match="not the grid's"): to_native(p.image[1:], p)
    data = json.loads((tmp_path/"t.json").read_text()); del data["to_atlas"]; (tmp_path/"t.json").write_text(json.dumps(data))
    with pytest.raises(UadError, match="lacks to_atlas"): load_transform(tmp_path/"t.json")
    with pytest.raises(UadError, match="no such file"): load_transform(tmp_path/"none.json")


def test_curvature_flow_is_off_by_default(brain):
    a, b = (prepare_scan(brain[0], config=PrepareConfig(registration="none", n4=False, denoise=d), state="stripped") for d in (False, True))
    assert PrepareConfig().denoise is False and np.abs(a.image - b.image).max() > 1e-3


@pytest.mark.slow
def test_n4_finds_a_known_field():
    rows = list(bench.n4(seeds=(1, 2)))
    for contrast in ("T1w", "T2w"): assert np.mean([r[2] for r in rows if r[0] == contrast]) >= .9, rows


class TestReal:
    pytestmark = needs_data

    def test_known_truth(self):
        for subject, how, mean, largest in bench.known_truth(DATA, 3): assert mean < (2 if how == "1x1x3" else 1.5), (subject, how, mean, largest)

    def test_round_trip(self):
        rows = [(k, f, ml, d["area", 1, .4]) for k, f, ml, d in bench.round_trip(DATA)]
        mean = lambda keep: np.mean([r[3] for r in rows if keep(r)])
        assert mean(lambda r: r[0] == "stroke" and r[2] > 10) >= .90
        assert mean(lambda r: r[0] == "stroke" and 1 <= r[2] <= 10) >= .80
        assert mean(lambda r: r[0] == "MS") >= .70

    def test_brain_masks(self):
        rows = list(bench.brain_masks(DATA, ("deepbet", "atlas") if importlib.util.find_spec("deepbet") else ("atlas",)))
        assert len(rows) >= 5 and min(r[2] for r in rows) >= .95, rows

    def test_t2w_alone_agrees_with_its_t1w(self):
        "MSLUB 26: the T2w registered by itself lands where its T1w does."
        t1, t2 = (load_volume(DATA/f"eval_ms/patient26_T{k}.nii.gz") for k in (1, 2))
        a, b = (prepare_scan(t2, config=PrepareConfig(n4=False), contrast="T2w", state="stripped", through=t) for t in (t1, None))
        points = apply_affine(t1.affine, np.argwhere(t1.data != 0)[::211])
        assert np.linalg.norm(apply_affine(a.to_atlas, points) - apply_affine(b.to_atlas, points), axis=1).mean() < 3

    def test_t2w_head_to_its_t1w_head(self):
        "A head with contrast turned round stands in for a T2w of 4 mm slices, moved far: the rigid step finds it."
        t1 = load_volume(next((DATA/"train_healthy/ixi2mm").glob("*012*_ds.nii.gz"))); mask = find_brain(t1, "atlas")[0]
        x = t1.data / np.percentile(t1.data, 99)
        move, box = bench.rigid((10, 0, -8), (20, -15, 25)), np.array([[1, 0, 0, -110.], [0, 1, 0, -130], [0, 0, 4, -70], [0, 0, 0, 1]])
        t2 = Volume(_resample(np.where(x > .08, 1.1 - np.clip(x, 0, 1), .02), t1.affine, move, box, (220, 240, 34), 1), box)
        points = apply_affine(t1.affine, np.argwhere(mask)[::101])
        assert np.linalg.norm(apply_affine(prepare._to_other(t2, t1, mask, 0) @ move, points) - points, axis=1).mean() < .5


@pytest.mark.parametrize("spacing, offset", [((1, 1, 3), 0), ((1, 1, 5), .3), ((1, 1, 1), 0), ((.5, .5, .5), 0), ((.25, .5, 1), .2), ((2, 2, 2), .7)])
def test_no_part_of_a_lesion_is_lost_on_the_way(spacing, offset):
    "A lesion that fills a scan to its last voxels, at any voxel size: its volume arrives whole (the edge of a scan is the edge of its outermost voxel, and fine voxels are not passed over)."
    shape = tuple(int(round(30 / s)) for s in spacing)
    affine = np.diag([*spacing, 1.]); affine[:3, 3] = np.array((-15, -20, 0)) + offset
    _, v = lesion_on_grid(Volume(np.ones(shape, bool), affine), np.ones(GRID_SHAPE, bool))
    assert v["lesion_ml_scan"] == pytest.approx(np.prod(np.array(shape) * spacing) / 1000) and v["lesion_lost"] < .01 and v["lesion_ml"] == pytest.approx(v["lesion_ml_scan"], rel=.1)
    rng = np.random.default_rng(0)
    _, v = lesion_on_grid(Volume(rng.random(shape) > .5, affine), np.ones(GRID_SHAPE, bool))
    assert v["lesion_lost"] < .02                                       # fine texture is averaged, not sampled


def test_a_lesion_on_the_t1_grid_takes_the_t1_way():
    "T2w with its lesion drawn on the T1w: the same as with the lesion moved onto the T2w."
    s = phantom.diseased(3, "ms")
    t2 = Volume(s.images["T2w"], GRID_AFFINE, "t2")
    t1 = Volume(np.pad(1 - s.images["T2w"], ((2, 0), (0, 3), (0, 0))) * np.pad(s.brain_mask, ((2, 0), (0, 3), (0, 0))), GRID_AFFINE @ np.array([[1, 0, 0, -2.], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "t1")
    lesion = Volume(np.pad(s.lesion_mask, ((2, 0), (0, 3), (0, 0))), t1.affine, "lesion")
    config = PrepareConfig(template_mm=4, n4=False, registration="none")
    p = prepare_scan(t2, None, lesion, config, "T2w", t1, "stripped")
    assert p.lesion_mask.any() and 2 * (p.lesion_mask & s.lesion_mask).sum() / (p.lesion_mask.sum() + s.lesion_mask.sum()) > .6
