"A whole data set through `uad prepare`: names, resuming, failures, the quality page, and a study on what was prepared."
import gzip, json, re
import nibabel, numpy as np, pandas as pd, pytest
from conftest import TINY, one_line, uad
from uad_study import phantom
from uad_study.cohort import Cohort
from uad_study.dataset import derivative, prepare_dataset
from uad_study.core import UadError
from uad_study.prepare import PrepareConfig, load_transform, to_native
from uad_study.volume import GRID_AFFINE, load_volume

QUICK = PrepareConfig(template_mm=4, n4=False)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    "Virtual stripped T2w scans as files, off the atlas by some mm, and their table: four healthy, four with tumours (one label-2 corner to ignore), one damaged."
    root, rows = tmp_path_factory.mktemp("scans"), []
    moved = GRID_AFFINE.copy(); moved[:3, 3] += (5, -4, 3)
    for i in range(9):
        s = phantom.healthy(i, ("T2w",)) if i < 4 else phantom.diseased(i, "tumour")
        name = f"s{i}<b>" if i == 1 else f"s{i}"                                            # an id that would be HTML
        nibabel.save(nibabel.Nifti1Image(s.images["T2w"], moved), root/f"s{i}_T2w.nii.gz")
        row = dict(dataset="mine", subject_id=name, contrast="T2w", pathology="healthy" if i < 4 else "tumour", split=["train", "train", "train", "test"][i] if i < 4 else ["val", "test", "test", "test", "test"][i - 4],
                   val_fold=0 if i == 0 else -1, image=f"s{i}_T2w.nii.gz", brain_mask="", lesion_mask="", through="", state="stripped", space="", ignore="")
        if i >= 4:
            labels = s.lesion_mask.astype(np.uint8); labels[30:40, 60:70, 20:30] = 2
            nibabel.save(nibabel.Nifti1Image(labels, moved), root/f"s{i}_seg.nii.gz")
            row |= dict(lesion_mask=f"s{i}_seg.nii.gz", ignore="2")
        rows.append(row)
    (root/"s8_T2w.nii.gz").write_bytes((root/"s8_T2w.nii.gz").read_bytes()[:20_000])
    return root, pd.DataFrame(rows)


@pytest.fixture(scope="module")
def prepared(scans, tmp_path_factory):
    "The command on the table; its output folder and what it said."
    from uad_study.manifest import write_subjects
    root, table = scans
    out = tmp_path_factory.mktemp("out")/"mine"
    write_subjects(table, root/"subjects.csv")
    (root/"quick.yaml").write_text(TINY + "prepare: {template_mm: 4, n4: false}\n")
    return out, uad("prepare", root/"subjects.csv", "--root", root, "--out", out, "--preset", root/"quick.yaml"), root


def test_one_damaged_scan_stops_nobody(prepared):
    out, r, root = prepared
    failed = [l for l in r.stderr.splitlines() if l.startswith("failed:")]
    assert r.returncode == 1 and "8 of 9 scans prepared" in r.stdout and len(failed) == 1 and "s8_T2w.nii.gz" in failed[0] and "Traceback" not in r.stderr, r.stderr + r.stdout
    c = Cohort(out/"cohort")
    assert len(c) == 8 and len(c.info["failed"]) == 1 and str(root) not in (out/"cohort"/"cohort.json").read_text() and (c.table.mask_dice > .9).all()


def test_derivatives(prepared):
    out, _, root = prepared
    row = dict(subject_id="s5", contrast="T2w")
    space = Cohort(out/"cohort").info["space"]
    at = {k: out/derivative(row, k, space) for k in ("image", "json", "brain", "lesion", "ignored", "transform")}
    assert all(p.is_file() and p.name.startswith("sub-s5_") for p in at.values()), sorted(p.name for p in (out/"sub-s5").rglob("*"))
    image = load_volume(at["image"])
    assert image.data.shape == (96, 96, 50) and np.allclose(image.affine, GRID_AFFINE)
    side = json.loads(at["json"].read_text())
    assert side["format"] == "uad-prepared/1" and side["settings"]["template_mm"] == 4 and len(side["sha256"]) == 2 and str(root) not in at["json"].read_text() + at["transform"].read_text()
    back = to_native(image.data, load_transform(at["transform"]))
    own = load_volume(root/"s5_T2w.nii.gz").data
    assert back.shape == own.shape and np.corrcoef(back[own > 0], own[own > 0])[0, 1] > .9


def test_ignored_labels(prepared):
    c = Cohort(prepared[0]/"cohort")
    ill = c.table.pathology == "tumour"
    assert c.ignore_masks[ill].any((1, 2, 3)).all() and not c.ignore_masks[~ill].any() and not (c.ignore_masks[:] & c.lesion_masks[:]).any()


def test_quality_page(prepared):
    page = (prepared[0]/"quality.html").read_text()
    assert page.count("<figure>") == 8 and "s1&lt;b&gt;" in page and "s1<b>" not in page and "s8_T2w.nii.gz" in page and not re.search(r"(src|href)=['\"]?https?:", page)


def test_again_is_free_and_a_changed_scan_is_not(scans, prepared, tmp_path):
    "What is there is not made again; a changed scan is; a changed split only packs again."
    (root, table), out = scans, prepared[0]
    made = []
    def pmap(f, rows):
        for r in rows: made.append(r); yield f(r)
    space = Cohort(out/"cohort").info["space"]
    times = {p: p.stat().st_mtime_ns for p in out.rglob("sub-*.nii.gz")}
    prepare_dataset(table.assign(split="test", val_fold=-1), root, out, QUICK, pmap)
    assert times == {p: p.stat().st_mtime_ns for p in out.rglob("sub-*.nii.gz")} and len(made) == 9 and set(Cohort(out/"cohort").table.split) == {"test"}
    x = load_volume(root/"s3_T2w.nii.gz")
    nibabel.save(nibabel.Nifti1Image(x.data * 2 + (x.data > 0), x.affine), root/"s3_T2w.nii.gz")
    prepare_dataset(table, root, out, QUICK)
    assert {p.parent.parent.name for p, t in times.items() if p.stat().st_mtime_ns != t} == {"sub-s3"}


def test_a_lost_or_changed_derivative_is_made_again(scans, prepared):
    "The sidecar vouches for its files: one that is gone, or not as it was written, is not taken for a scan without a lesion."
    (root, table), out = scans, prepared[0]
    space = Cohort(out/"cohort").info["space"]
    at = {k: out/derivative(dict(subject_id="s5", contrast="T2w"), k, space) for k in ("image", "lesion")}
    before = {k: p.read_bytes() for k, p in at.items()}
    at["lesion"].unlink(); at["image"].write_bytes(before["image"][:5000])
    prepare_dataset(table, root, out, QUICK)
    c = Cohort(out/"cohort")
    assert c.lesion_masks[int(np.flatnonzero(c.table.subject_id == "s5")[0])].any() and len(c) == 8
    assert {k: load_volume(p).data.tobytes() for k, p in at.items()} == {k: nibabel.Nifti1Image.from_bytes(gzip.decompress(b)).get_fdata(dtype=np.float32).tobytes() for k, b in before.items()}


def test_whatever_a_library_raises_harms_one_subject(scans, tmp_path, monkeypatch):
    from uad_study import dataset
    def boom(*a): raise KeyError("strange")
    monkeypatch.setattr(dataset, "prepare_row", boom)
    r = dataset.prepare_subject(scans[1].iloc[0].to_dict(), scans[0], tmp_path, QUICK)
    assert isinstance(r, UadError) and "s0 T2w: cannot be prepared (KeyError" in str(r) and not list(tmp_path.rglob("*.json"))


def test_two_ids_that_become_one(scans, tmp_path):
    root, table = scans
    with pytest.raises(UadError, match="same name"): prepare_dataset(table.assign(subject_id=["a-1", "A1", *table.subject_id[2:]]), root, tmp_path/"o", QUICK)
    assert not (tmp_path/"o").exists()


def test_prepare_faults(scans, tmp_path):
    root, table = scans
    one_line(uad("prepare", "IXI", "--root", tmp_path, "--out", tmp_path/"o"), "IXI")
    one_line(uad("prepare", tmp_path/"none.csv", "--root", root, "--out", tmp_path/"o"), "none.csv", "no such file")
    one_line(uad("prepare", root/"subjects.csv", "--root", root, "--out", "/proc/uad"), "/proc/uad")
    one_line(uad("prepare", root/"subjects.csv", "--root", root, "--out", tmp_path/"o", "--brain-mask", "magic"), "magic", "deepbet")
    one_line(uad("run", root/"quick.yaml", "--data", root), "--data")


def test_study_on_prepared_scans(prepared, tmp_path):
    "A study that takes its scans from what `uad prepare` wrote, to the report."
    out, _, root = prepared
    text = TINY.replace("source: virtual, contrasts: [T2w], folds: 1, n_train: 3, n_val: 1, n_test: 1, n_lesion_val: 1, n_lesion_test: 2", "source: prepared, contrasts: [T2w], folds: 1")
    (tmp_path/"mine.yaml").write_text(text)
    (tmp_path/"over.yaml").write_text(text.replace("names: [", "names: [l1_healthy, "))
    one_line(uad("run", tmp_path/"over.yaml", "--data", out.parent, "--out", tmp_path/"over"), "l1_healthy needs 2 or more healthy validation scans", "fold 0", "there is 1")
    assert not (tmp_path/"over").exists()                                                                         # nothing is trained for it
    r = uad("run", tmp_path/"mine.yaml", "--data", out.parent, "--out", tmp_path/"o")
    assert r.returncode == 0, r.stderr + r.stdout
    t = pd.read_csv(tmp_path/"o"/"table.csv")
    assert set(t.pathology) == {"tumour"} and (t[t.model == "ddpm"].n_test == 3).all() and "Virtual cohort" not in (tmp_path/"o"/"report.html").read_text()
    one_line(uad("run", tmp_path/"mine.yaml", "--data", tmp_path/"nothing", "--out", tmp_path/"o"), "uad prepare")
