"Manifests: the stored splits, the five layouts as their archives unpack, a user's own folders, and every fault by name."
import os, re
import nibabel, numpy as np, pandas as pd, pytest
from conftest import one_line, uad
from uad_study import manifest as m
from uad_study.core import UadError, digest
from uad_study.volume import fingerprint

# Where the files of two or three subjects lie in each archive; and other ways in which it is found on disks.
ATLAS = "sub-r001s001", "sub-r052s032"
SPACE = "ses-1_space-MNI152NLin2009aSym"
WMH = "Amsterdam/GE3T/137", "Utrecht/49", "Singapore/68"
LAYOUTS = {
    "IXI": [f"IXI-{k}/{s}-{k}.nii.gz" for s in ("IXI002-Guys-0828", "IXI012-HH-1211") for k in ("T1", "T2", "PD")],
    "BraTS21": [f"BraTS2021_{i}/BraTS2021_{i}_{k}.nii.gz" for i in ("00000", "01666") for k in ("t1", "t1ce", "t2", "flair", "seg")],
    "MSLUB": [f"patient{i}/{d}patient{i}_{k}.nii.gz" for i in ("01", "30") for k in ("T1W", "T1WKS", "T2W", "FLAIR") for d in ("", "raw/")]
             + [f"patient{i}/patient{i}_{k}.nii.gz" for i in ("01", "30") for k in ("brainmask", "consensus_gt")],
    "ATLAS": [f"Training/R0{s[6:8]}/{s}/ses-1/anat/{s}_{SPACE}_{k}.nii.gz" for s in ATLAS for k in ("T1w", "label-L_desc-T1lesion_mask")]
             + ["MNI152NLin2009aSym.nii.gz", f"Testing/R005/sub-r005s999/ses-1/anat/sub-r005s999_{SPACE}_T1w.nii.gz"],
    "WMH": [f"{s}/{k}.nii.gz" for s in [f"training/{s}" for s in WMH] + ["test/Amsterdam/GE1T5/150", "test/Amsterdam/Philips_VU .PETMR_01./161"]
            for k in ("wmh", "pre/T1", "pre/3DT1", "pre/FLAIR", "orig/T1", "orig/3DT1", "orig/FLAIR")] + ["additional_annotations/observer_o3/training/Utrecht/49/result.nii.gz"],
    "MSLUB, mirror": [f"cross_sectional/{d}/patient{i}/{k}.nii.gz" for i in ("01", "30") for d in ("raw", "coregistered") for k in ("T1W", "T1WKS", "T2W", "brainmask", "consensus_gt")],
    "ATLAS, of ISLES 2022": [f"train/derivatives/ATLAS/{s}/ses-1/anat/{s}_{SPACE}_{k}.nii.gz" for s in ATLAS for k in ("T1w", "label-L_desc-T1lesion_mask")],
    "WMH, a zip per site": [f"{s.removeprefix('Amsterdam/')}/{k}.nii.gz" for s in WMH for k in ("wmh", "pre/T1", "orig/3DT1")],
    "BraTS21, unpacked": [f"UPENN-GBM/BraTS2021_{i}/BraTS2021_{i}_{k}.nii" for i in ("00000", "01666") for k in ("t1", "t2", "seg")],
}
FOUND = {"IXI": ["IXI002-Guys-0828", "IXI012-HH-1211"], "BraTS21": ["BraTS2021_00000", "BraTS2021_01666"], "MSLUB": ["patient01", "patient30"], "ATLAS": ["sub-r001s001", "sub-r052s032"],
         "WMH": ["GE3T_137", "Singapore_68", "Utrecht_49"]}


def touch(root, *paths):
    for p in paths: (root/p).parent.mkdir(parents=True, exist_ok=True); (root/p).touch()
    return root


def scan(path, shape=(6, 7, 8), affine=np.diag([1., 1, 2, 1]), data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.random.default_rng(0).random(shape, np.float32) + .1 if data is None else data, affine), path)


def test_stored_default_is_what_the_command_makes(tmp_path):
    r = uad("manifest", "make-splits", "--out", tmp_path)
    assert r.returncode == 0, r.stderr
    stored = m.files("uad_study.data_manifests")
    for n in m.PAPER_SIZES: assert (tmp_path/f"{n}.csv").read_text() == (stored/f"{n}.csv").read_text(), n


def test_published_lists_are_lossless():
    "Row for row the released file of 4311 rows, repeats included (the digest was taken of that file)."
    t = m.published_splits()
    rows = sorted([r.dataset, r.subject_id, r.split, int(r.fold), "" if pd.isna(r.has_t2) else str(r.has_t2)] for r in t.itertuples())
    assert len(rows) == 4311 and digest(rows) == "33ae261b0d04"


def test_default_split():
    "Leak-free, disjoint, the paper's sizes in every fold, and every site's share in every part."
    t = pd.concat([m.listing(n) for n in m.PAPER_SIZES])
    table = m.by_fold(t[t.split != ""])
    assert m.audit(table) == [] and m.paper_faults(table) == [] and m._folds(table[table.dataset == "IXI"]) == [0, 1, 2, 3, 4]
    for n, g in t[t.split != ""].groupby("dataset"):
        parts = g.split + g.val_fold.astype(str)
        share = g.groupby([parts, "site"]).size().unstack(fill_value=0)
        expected = np.outer(share.sum(axis=1), g.groupby("site").size()) / len(g)
        assert np.abs(share - expected).max().max() < 1.5, n
    assert (t[(t.dataset == "WMH") & (t.split == "val")].groupby("site").size() == 5).all()


def test_every_published_fault_is_named():
    "The data table of the study's reproduction notes, line by line."
    r = uad("manifest", "check", "IXI", "--split", "published")
    assert r.returncode == 1
    for unique, fold in zip((374, 374, 376, 377, 377), range(5)): assert f"IXI fold {fold}: duplicates: train has 387 rows but {unique} subjects" in r.stdout
    for n, fold in zip((9, 9, 9, 7, 8), range(5)): assert f"IXI fold {fold}: leakage: train and test share {n} subjects" in r.stdout
    for n, fold in ((2, 2), (3, 3), (3, 4)): assert f"IXI fold {fold}: leakage: train and val share {n} subjects" in r.stdout
    assert "IXI fold 3: leakage: val and test share 2 subjects" in r.stdout and "IXI fold 4: leakage: val and test share 1 subject" in r.stdout
    assert len(re.findall("overlap: val of fold", r.stdout)) == 10 and "test has 160 rows but 157 subjects" in r.stdout
    assert "566 subjects in all, 562 with T2w, the paper says 560" in r.stdout and "rows left with T2w: test 158, train 385 to 386, val 43 to 44" in r.stdout
    assert "ATLAS: sizes: val holds 66 subjects, the paper says 175" in m.check("ATLAS", "published")
    assert "not in the default split: IXI116-Guys-0739, " in uad("manifest", "check", "IXI").stdout


@pytest.mark.parametrize("key", LAYOUTS)
def test_layout_is_found_whole(tmp_path, key):
    name = key.split(",")[0]
    root = touch(tmp_path/"a folder", *LAYOUTS[key])
    members = m.listing(name)
    table, faults = m._located(name, root, members[members.subject_id.isin(FOUND[name])])
    f = m.facts(name)
    assert faults == [] and sorted(set(table.subject_id)) == FOUND[name] and len(table) == len(FOUND[name]) * len(f["contrasts"])
    assert set(table.contrast) == set(f["contrasts"]) and (table.through != "").equals(table.contrast == "T2w")
    assert ((table.lesion_mask != "") == (f["pathology"] != "healthy")).all() and ((table.brain_mask != "") == (name == "MSLUB")).all()
    assert set(table.ignore) == {"2" if name == "WMH" else ""} and set(table.state) == {f["state"]} and set(table.space) == {f["space"]}
    used = [p for c in ("image", "lesion_mask", "brain_mask", "through") for p in table[c] if p]
    assert all((root/p).is_file() for p in used) and not any(re.search("raw/|T1WKS|t1ce|3DT1|orig/|PD", p) for p in used)
    m.write_subjects(table.assign(split=table.split.replace("", "test")), tmp_path/"s.csv")
    assert m.missing_files(m.read_subjects(tmp_path/"s.csv"), root) == []
    assert all(f[k] for k in ("title", "licence", "url", "citation", "traps", "verified", "splits"))


def test_examples_of_the_facts_fit_their_patterns():
    for n in m.PAPER_SIZES:
        f = m.facts(n)
        assert set(f["example"]) == set(f["layout"])
        for kind, example in f["example"].items():
            match = m._regex(f["layout"][kind][0]).fullmatch(example)
            assert f["subject"].format(**match.groupdict()) in set(m.listing(n).subject_id)


def test_faults_of_files(tmp_path):
    "One line each, with file and mend; that subject is left out, the others stay."
    root, (a, b) = touch(tmp_path/"MSLUB", *LAYOUTS["MSLUB"]), ("patient01", "patient30")
    def faults():
        table, lines = m.subjects("MSLUB", root)
        return set(table.subject_id), [l for l in lines if a in l or "link" in l]
    touch(root, f"copy/{a}/{a}_T2W.nii.gz")
    ids, lines = faults()
    assert ids == {b} and len(lines) == 1 and f"2 files for its T2w: copy/{a}/{a}_T2W.nii.gz, {a}/{a}_T2W.nii.gz: keep one" in lines[0]
    (root/f"copy/{a}/{a}_T2W.nii.gz").unlink()
    (root/f"{a}/{a}_T1W.nii.gz").unlink()
    ids, lines = faults()
    assert ids == {a, b} and "no T1w of" in lines[0] and "patient01_T1W" in lines[0] and "T1WKS.nii.gz does not stand in: it is contrast-enhanced" in lines[0]
    assert (m.subjects("MSLUB", root)[0].query("subject_id == @a").through == "").all()
    (root/f"{a}/{a}_consensus_gt.nii.gz").unlink()
    ids, lines = faults()
    assert ids == {b} and "no lesion_mask of" in lines[-1]
    for p in (root/a).rglob("*.nii.gz"): p.unlink()
    touch(root, f"Patient01/Patient01_T2W.nii.gz")
    ids, lines = faults()
    assert ids == {b} and any("Patient01/Patient01_T2W.nii.gz: the id differs from patient01 only in case: rename it" in l for l in lines)
    outside = touch(tmp_path/"else", f"{a}_T2W.nii.gz")
    (root/a/f"{a}_T2W.nii.gz").symlink_to(outside/f"{a}_T2W.nii.gz"); (root/"more").symlink_to(outside); (root/a/f"{a}_T1W.nii.gz").symlink_to("nothing")
    lines = faults()[1]
    assert sum("is a link that leaves" in l for l in lines) == 2 and sum("is a link to nothing" in l for l in lines) == 1
    with pytest.raises(UadError, match="no such folder"): m.subjects("MSLUB", tmp_path/"none")
    with pytest.raises(UadError, match="use default"): m.subjects("IXI", root, "published")
    assert m.subjects("IXI", tmp_path/"else")[0].empty and "IXI002-Guys-0828-T1" in m.subjects("IXI", tmp_path/"else")[1][0]


def test_fault_folder_without_permission(tmp_path, monkeypatch):
    touch(tmp_path, "Utrecht/49/pre/T1.nii.gz", "Utrecht/49/wmh.nii.gz", "Singapore/68/pre/T1.nii.gz", "Singapore/68/wmh.nii.gz")
    scandir = os.scandir
    def refused(path):
        if str(path).endswith("Singapore"): raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refused)
    table, faults = m.subjects("WMH", tmp_path)
    assert set(table.subject_id) == {"Utrecht_49"} and f"{tmp_path/'Singapore'}: cannot be read: Permission denied: change its permissions" in faults


@pytest.mark.parametrize("change, words", [
    (dict(contrast="T2"), ["'a'", "contrast", "did you mean 'T2w'"]), (dict(split="tset"), ["split", "did you mean 'test'"]), (dict(pathology="tumor"), ["did you mean 'tumour'"]),
    (dict(state="skull"), ["state", "head, stripped"]), (dict(space="MNI"), ["space", "SRI24"]), (dict(val_fold="x"), ["val_fold", "-1 for none"]), (dict(val_fold="0"), ["split is train"]),
    (dict(split="train"), ["healthy"]), (dict(image=""), ["may not be empty"]), (dict(image="/a.nii"), ["image", "leaves the root"]),
    (dict(lesion_mask="b/../../a.nii"), ["lesion_mask", "leaves the root"]),
    (dict(subject_id="../a"), ["no slash"]), (dict(through="C:\\a.nii"), ["through", "leaves the root"]),
    (dict(ignore="two"), ["ignore", "label values"]), (dict(extra="1"), ["columns", "extra"]),
])
def test_faults_of_a_table(tmp_path, change, words):
    row = dict(zip(m.SUBJECT_COLUMNS, ("X", "a", "T2w", "ms", "val", "-1", "a.nii", "", "m.nii", "", "head", "", ""))) | change
    (tmp_path/"s.csv").write_text(f"# {m.SUBJECTS_FORMAT}\n" + pd.DataFrame([row]).to_csv(index=False))
    with pytest.raises(UadError) as e: m.read_subjects(tmp_path/"s.csv")
    assert "\n" not in str(e.value) and "s.csv" in str(e.value) and all(w in str(e.value) for w in words), e.value


def test_faults_of_a_table_file(tmp_path):
    (tmp_path/"s.csv").write_text("subject_id\na\n")
    with pytest.raises(UadError, match="s.csv: begins with 'subject_id', but '# uad-subjects/1' is needed"): m.read_subjects(tmp_path/"s.csv")
    with pytest.raises(UadError, match="no such file"): m.read_subjects(tmp_path/"none.csv")
    (tmp_path/"s.csv").write_text(f"# {m.SUBJECTS_FORMAT}\n" + ",".join(m.SUBJECT_COLUMNS) + "\n")
    with pytest.raises(UadError, match="lists nothing"): m.read_subjects(tmp_path/"s.csv")


def test_own_folder(tmp_path):
    names = [f"sub_{i:02d}" for i in range(30)]
    root = touch(tmp_path/"scans", *(f"{s}/{c}.nii.gz" for s in names for c in ("t1", "T2w", "flair", "lesion", "brain")))
    healthy, faults = m.from_folder(root, "{subject}/{contrast}.nii.gz", masks="{subject}/brain.nii.gz", folds=3, val=4, test=6)
    assert faults == [] and list(healthy) == m.SUBJECT_COLUMNS and len(healthy) == 60 and set(healthy.dataset) == {"scans"} and (healthy.brain_mask != "").all()
    assert (healthy.groupby("subject_id")[["split", "val_fold"]].nunique() == 1).all().all() and m.audit(m.by_fold(healthy)) == []
    assert healthy[healthy.contrast == "T1w"].groupby(["split", "val_fold"]).size().to_dict() == {("test", -1): 6, ("train", -1): 12, ("train", 0): 4, ("train", 1): 4, ("train", 2): 4}
    again = m.from_folder(root, "{subject}/{contrast}.nii.gz", masks="{subject}/brain.nii.gz", folds=3, val=4, test=6)[0]
    assert healthy.equals(again) and not healthy.equals(m.from_folder(root, "{subject}/{contrast}.nii.gz", masks="{subject}/brain.nii.gz", folds=3, val=4, test=6, seed=1)[0])
    sick, faults = m.from_folder(root, "{subject}/t1.nii.gz", lesions="{subject}/lesion.nii.gz", contrast="T1w", pathology="stroke", state="stripped", val=5, test=20)
    assert sick.groupby("split").size().to_dict() == {"test": 20, "val": 5} and set(sick.lesion_mask) == {s.replace("t1", "lesion") for s in sick.image}
    assert len(faults) == 1 and "in neither val nor test: 5 subjects" in faults[0]
    (root/"sub_00/lesion.nii.gz").unlink()
    sick, faults = m.from_folder(root, "{subject}/t1.nii.gz", lesions="{subject}/lesion.nii.gz", contrast="T1w", pathology="stroke")
    assert len(sick) == 29 and "no lesion mask of 1 subject: sub_00" in faults[0]


@pytest.mark.parametrize("kw, words", [
    (dict(pattern="*_T1.nii.gz"), ["--pattern", "lacks {subject}"]),
    (dict(pattern="../{subject}_{contrast}.nii.gz"), ["leaves the root"]), (dict(pattern="{subject}_{contast}.nii.gz"), ["did you mean 'contrast'"]),
    (dict(pattern="{subject}-{contrast}.nii.gz"), ["matches none of its 4 NIfTI files"]),
    (dict(pattern="{subject}.nii.gz"), ["--contrast"]), (dict(pattern="{subject}.nii.gz", contrast="T1"), ["did you mean 'T1w'"]),
    (dict(pathology="ms"), ["--lesions"]), (dict(lesions="seg.nii.gz", pathology="ms"), ["--lesions", "lacks {subject}"]),
    (dict(lesions="{subject}_seg.nii.gz", pathology="mss"), ["did you mean 'ms'"]),
    (dict(lesions="{subject}_seg.nii.gz", pathology="ms"), ["no subject is left", "no lesion mask of 4 subjects"]),
    (dict(state="haed"), ["--state", "'head'"]), (dict(val=3), ["needs", "there are 4"]), (dict(val=-1, test=1), ["positive"]),
])
def test_faults_of_own_folder(tmp_path, kw, words):
    touch(tmp_path, *(f"s{i}_T1.nii.gz" for i in range(4)))
    with pytest.raises(UadError) as e: m.from_folder(tmp_path, **(dict(pattern="{subject}_{contrast}.nii.gz") | kw))
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), e.value


def test_own_bids(tmp_path):
    lesions = "label-L_mask", "label-lesion_mask", "space-T1w_label-L_desc-T1lesion_mask", "desc-lesion_mask", "label-lesion_dseg", "label-L_dseg"
    touch(tmp_path, "dataset_description.json", "sub-00/func/sub-00_task-rest_bold.nii.gz",
          *(f"sub-{i:02d}/anat/sub-{i:02d}_{c}.nii.gz" for i in range(8) for c in ("T1w", "acq-tse_T2w", "FLAIR")),
          *(f"derivatives/lesions/sub-{i:02d}/anat/sub-{i:02d}_{what}.nii.gz" for i, what in enumerate(lesions)),
          *(f"derivatives/fmriprep/sub-{i:02d}/anat/sub-{i:02d}_{what}.nii.gz" for i in range(8) for what in ("desc-brain_mask", "dseg", "desc-preproc_T1w")))
    table, faults = m.from_bids(tmp_path, pathology="ms", test=4)
    assert sorted(set(table.subject_id)) == [f"sub-{i:02d}" for i in range(6)] and len(table) == 12 and "no lesion mask of 2 subjects: sub-06, sub-07" in faults[0]
    assert table.lesion_mask.str.startswith("derivatives/lesions/").all() and table.brain_mask.str.endswith("desc-brain_mask.nii.gz").all() and table.image.str.startswith("sub-").all()
    healthy, faults = m.from_bids(tmp_path, folds=2)
    assert faults == [] and len(healthy) == 16 and (healthy.lesion_mask == "").all()
    touch(tmp_path, *(f"derivatives/fmriprep/sub-{i:02d}/anat/sub-{i:02d}_space-MNI152NLin2009cAsym_desc-brain_mask.nii.gz" for i in range(8)), "sub-09/anat/sub-09_ce-gad_T1w.nii.gz")
    same, faults = m.from_bids(tmp_path, folds=2)
    assert same.equals(healthy) and len(faults) == 1 and "sub-09_ce-gad_T1w.nii.gz: is contrast-enhanced" in faults[0]
    (tmp_path/"sub-09/anat/sub-09_ce-gad_T1w.nii.gz").unlink()
    touch(tmp_path, "sub-08/ses-a/anat/sub-08_ses-a_T1w.nii.gz", "sub-08/ses-b/anat/sub-08_ses-b_T1w.nii.gz")
    table, faults = m.from_bids(tmp_path, folds=2)
    assert len(faults) == 1 and faults[0].startswith("sub-08: 2 files for its T1w") and "sub-08" not in set(table.subject_id)
    with pytest.raises(UadError, match="needs"): m.from_bids(tmp_path, session="a")
    with pytest.raises(UadError, match="matches none of its"): m.from_bids(tmp_path/"derivatives")


def test_from_folder_hash_check(tmp_path):
    "From a folder of scans to a table, its fingerprint, and every kind of damage, as a user types it."
    root = tmp_path/"scans"
    for i in range(9):
        affine = np.diag([1, 1, 2 + 4. * (i == 4), 1])
        scan(root/f"p{i}_T2.nii.gz", affine=affine, data=np.arange(336.).reshape(6, 7, 8) + i); scan(root/f"p{i}_seg.nii.gz", affine=affine, data=np.ones((6, 7, 8), np.uint8))
    own = "from-folder", root, "--pattern", "{subject}_{contrast}.nii.gz", "--lesions", "{subject}_seg.nii.gz", "--pathology", "ms"
    r = uad("manifest", *own, "--val", "3", "--out", "s.csv", cwd=tmp_path)
    assert r.returncode == 0 and "9 subjects (test 6, val 3), 9 scans: no faults" in r.stdout, r.stdout + r.stderr
    assert uad("manifest", "hash", "s.csv", "--root", root, "--out", "h.json", cwd=tmp_path).returncode == 0
    r = uad("manifest", "check", "s.csv", "--root", root, "--hash", "h.json", cwd=tmp_path)
    assert r.returncode == 0 and "outlier: p4 T2w: voxel_z 6 (median 2)" in r.stdout and "lesion_ml" in r.stdout and "6x7x8" in r.stdout, r.stdout + r.stderr
    scan(root/"p0_seg.nii.gz", data=np.zeros((6, 7, 8), np.uint8)); scan(root/"p1_seg.nii.gz", data=np.ones((6, 7, 9), np.uint8)); scan(root/"p2_seg.nii.gz")
    (root/"p3_T2.nii.gz").write_bytes((root/"p3_T2.nii.gz").read_bytes()[:99]); (root/"p5_T2.nii.gz").unlink()
    r = uad("manifest", "check", "s.csv", "--root", root, "--hash", "h.json", cwd=tmp_path)
    assert r.returncode == 1
    for words in ("p0_seg.nii.gz: holds no lesion", "p1_seg.nii.gz: unexpected shape 6x7x9", "p2_seg.nii.gz: holds 0.", "p3_T2.nii.gz: cannot be read", "p5_T2.nii.gz: no such file",
                  "p0_seg.nii.gz: changed"): assert words in r.stdout, (words, r.stdout)
    one_line(uad("manifest", "check", "s.csv", "--hash", "h.json", cwd=tmp_path), "--root")
    one_line(uad("manifest", "from-folder", root, "--pattern", "{subject}_{contrast}.nii", "--out", "t.csv", cwd=tmp_path), "matches none")
    assert not (tmp_path/"t.csv").exists()


def test_check_a_data_set_on_disk(tmp_path):
    for k, affine in (("T1", np.array([[0, 0, 1.2, 0], [-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])), ("T2", np.eye(4))): scan(tmp_path/f"IXI-{k}/IXI002-Guys-0828-{k}.nii.gz", affine=affine)
    r = uad("manifest", "check", "ixi", "--root", tmp_path)
    assert r.returncode == 1 and "IXI: no T1w of 559 subjects: IXI012-HH-1211" in r.stdout and "leakage" not in r.stdout and "PSR" in r.stdout and "RAS" in r.stdout, r.stdout + r.stderr
    one_line(uad("manifest", "check", "IXI", "--root", tmp_path/"none"), "no such folder")


def test_fingerprints_of_a_data_set(tmp_path):
    "Label 2 of WMH is not lesion volume; BraTS of another shape, or with an unknown label, is a fault."
    scan(tmp_path/"w/Utrecht/49/pre/T1.nii.gz"); labels = np.zeros((6, 7, 8), np.uint8); labels[0, 0, :5] = 1; labels[1] = 2
    scan(tmp_path/"w/Utrecht/49/wmh.nii.gz", data=labels)
    prints, faults = m.fingerprints(m.subjects("WMH", tmp_path/"w")[0], tmp_path/"w", fingerprint, labels=m.facts("WMH")["labels"])
    assert faults == [] and prints.lesion_ml.tolist() == [pytest.approx(.01)]
    for k in ("t1", "t2", "seg"): scan(tmp_path/f"b/BraTS2021_00000/BraTS2021_00000_{k}.nii.gz", data=None if k != "seg" else labels + np.uint8(1))
    f = m.facts("BraTS21")
    faults = m.fingerprints(m.subjects("BraTS21", tmp_path/"b")[0], tmp_path/"b", fingerprint, f["shape"], f["labels"])[1]
    assert len(faults) == 3 and sum("unexpected shape 6x7x8, not 240x240x155" in l for l in faults) == 2 and "unexpected label 3" in faults[2]


def test_a_table_with_leakage(tmp_path):
    row = dict(zip(m.SUBJECT_COLUMNS, ("X", "a", "T2w", "ms", "val", -1, "a.nii", "", "m.nii", "", "head", "", "")))
    m.write_subjects(pd.DataFrame([row, row | dict(contrast="T1w", split="test")]), tmp_path/"s.csv")
    r = uad("manifest", "check", tmp_path/"s.csv")
    assert r.returncode == 1 and "X: leakage: val and test share 1 subject: a" in r.stdout
    with pytest.raises(UadError, match="'[aA]': differs from another id only in case"): m.write_subjects(pd.DataFrame([row, row | dict(subject_id="A")]), tmp_path/"t.csv")


def test_one_scan_under_two_ids(tmp_path):
    "The same bytes as two subjects are one person in two splits; files of equal size but other content are not."
    for s, content in (("a", b"one"), ("b", b"one"), ("c", b"two")): (tmp_path/f"{s}_T1w.nii.gz").write_bytes(content)
    table = m.from_folder(tmp_path, "{subject}_{contrast}.nii.gz", val=1, test=1, folds=1)[0]
    lines = m.same_scans(table, tmp_path)
    assert len(lines) == 1 and "2 subjects: a, b" in lines[0]


def test_masks_that_are_asked_for_must_be_there(tmp_path):
    for i in range(6): touch(tmp_path, f"s{i}_T1w.nii.gz", *([f"s{i}_mask.nii.gz"] if i else []))
    table, faults = m.from_folder(tmp_path, "{subject}_{contrast}.nii.gz", masks="{subject}_mask.nii.gz", val=1, test=1, folds=1)
    assert len(faults) == 1 and "no brain mask of 1 subject: s0" in faults[0] and (table.brain_mask != "").all() and table.subject_id.nunique() == 5
