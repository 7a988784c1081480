"Real scans (not part of the repository): set UAD_REALDATA, or keep them in ../shared/realdata beside it."
import os
from pathlib import Path
import numpy as np, pytest
from uad_study.core import UadError
from uad_study.manifest import read_manifest, real_t1_subjects, verify
from uad_study.prepare import PrepareConfig, _prepare_subject, choose_shapes, iter_real_t1, load_template, sample
from uad_study.volume import GRID_SHAPE

DATA = Path(os.environ.get("UAD_REALDATA") or Path(__file__).resolve().parents[2]/"shared"/"realdata")
pytestmark = [pytest.mark.realdata, pytest.mark.skipif(not (DATA/"manifest.csv").is_file(), reason="no real scans here")]


@pytest.fixture(scope="module")
def roles(): return real_t1_subjects(DATA)


def test_roles(roles):
    subjects, shapes = roles
    healthy = subjects[subjects.pathology == "healthy"]
    assert subjects.subject_id.is_unique and {"train", "val", "test"} == set(healthy.split)
    assert not set(shapes[shapes.split == "val"].subject_id) & set(shapes[shapes.split == "test"].subject_id)
    assert (subjects[subjects.pathology != "healthy"].split == "test").all()
    assert verify(DATA, subjects.image.tolist()) == []


def test_one_healthy_scan(roles):
    row = roles[0][roles[0].lesions == "test"].iloc[0].to_dict()
    (_, a), (_, b) = (_prepare_subject(row, DATA, PrepareConfig()) for _ in range(2))
    assert not isinstance(a, UadError), a
    np.testing.assert_array_equal(a.image, b.image); np.testing.assert_array_equal(a.to_atlas, b.to_atlas)       # the same scan, the same numbers
    assert a.image.shape == GRID_SHAPE and a.image.dtype == np.float32 and a.image.min() == 0 and a.image.max() == 1
    assert not a.image[~a.brain_mask].any() and a.meta["mask_dice"] > .9 and a.meta["correlation"] > .4
    shapes = choose_shapes(roles[1][roles[1].split == "test"], DATA, 2, sample((m := load_template()[1]).data, m.affine) >= .5)
    assert 1 <= shapes[0][2]["lesion_ml"] < shapes[1][2]["lesion_ml"] <= 100


def test_one_bad_file_stops_nobody(tmp_path):
    "Four healthy subjects, one of them damaged: three are prepared, one is a `UadError` that names its file."
    t = read_manifest(DATA/"manifest.csv")
    images = t[(t.category == "healthy") & (t.modality == "T1w") & (t.kind == "image") & t.subject.isin(t[t.kind == "brainmask"].subject)].subject.unique()[:4]
    t = t[(t.subject.isin(images) & t.kind.isin(["image", "brainmask"])) | ((t.category == "stroke") & t.kind.str.contains("no image"))]
    for f in t.file: (tmp_path/f).parent.mkdir(parents=True, exist_ok=True); (tmp_path/f).symlink_to(DATA/f)
    bad = tmp_path/t[t.kind == "image"].file.iloc[0]
    bad.unlink(); bad.write_bytes((DATA/bad.relative_to(tmp_path)).read_bytes()[:100_000])
    t.to_csv(tmp_path/"manifest.csv", index=False)
    items = list(iter_real_t1(tmp_path, PrepareConfig(template_mm=4), alphas=(1.,)))
    failed, rest = [i for i in items if isinstance(i, UadError)], [i for i in items if not isinstance(i, UadError)]
    assert len(failed) == 1 and str(bad) in str(failed[0]) and "\n" not in str(failed[0])
    assert len({i["subject_id"] for i in rest}) == len(rest) >= 3
    for i in rest:
        if i["pathology"] == "semisynthetic":
            changed = np.abs(i["image"] - i["twin"]) > 1e-6
            assert i["lesion_mask"].any() and changed[i["lesion_mask"]].mean() > .9 and not i["lesion_mask"][~i["brain_mask"]].any()
