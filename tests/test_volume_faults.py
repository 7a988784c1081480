"Every fault of a NIfTI file that a user can meet is one line that names the file."
import nibabel, numpy as np, pytest
from uad_study.core import UadError
from uad_study.volume import load_labels, load_mask, load_volume, save_volume

X = np.random.default_rng(0).random((6, 7, 8), np.float32)
M = (X > .5).astype(np.float32)


def write(path, data=X, affine=np.eye(4)):
    nibabel.save(nibabel.Nifti1Image(data, affine), path)
    return path


def refused(path, words, read=load_volume, **kw):
    with pytest.raises(UadError) as e: read(path, **kw)
    message = str(e.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and words in message, message


def test_missing(tmp_path): refused(tmp_path/"no.nii.gz", "no such file")


def test_folder(tmp_path): refused(tmp_path, "no such file")


@pytest.mark.parametrize("name", ["text.nii", "text.nii.gz", "text.txt"])
def test_not_nifti(tmp_path, name):
    (tmp_path/name).write_text("hello " * 200)
    with pytest.raises(UadError) as e: load_volume(tmp_path/name)
    assert name in str(e.value) and "\n" not in str(e.value)


def test_other_format(tmp_path):
    nibabel.save(nibabel.MGHImage(X, np.eye(4)), tmp_path/"x.mgz")
    refused(tmp_path/"x.mgz", "not a NIfTI file")


@pytest.mark.parametrize("keep", [0, 5, 100, .5, .99])
def test_truncated_gz(tmp_path, keep):
    p = write(tmp_path/"x.nii.gz"); whole = p.read_bytes()
    p.write_bytes(whole[:int(keep * len(whole)) if 0 < keep < 1 else keep])
    with pytest.raises(UadError) as e: load_volume(p)
    assert str(p) in str(e.value) and "\n" not in str(e.value)


def test_truncated_nii(tmp_path):
    p = write(tmp_path/"x.nii"); p.write_bytes(p.read_bytes()[:600]); refused(p, "cut short")


def test_damaged_gz(tmp_path):
    p = write(tmp_path/"x.nii.gz"); b = bytearray(p.read_bytes()); b[len(b) // 2] ^= 255; p.write_bytes(b)
    refused(p, "damaged")


def test_4d(tmp_path): refused(write(tmp_path/"x.nii", np.stack([X, X], -1)), "extract one volume")


def test_2d(tmp_path): refused(write(tmp_path/"x.nii", X[0]), "dimensions")


def test_trailing_one_is_squeezed(tmp_path): assert load_volume(write(tmp_path/"x.nii", X[..., None, None])).data.shape == X.shape


def test_zero_size(tmp_path):
    p = write(tmp_path/"x.nii"); b = bytearray(p.read_bytes()); b[42:44] = b"\0\0"; p.write_bytes(b)      # dim[1] = 0
    refused(p, "empty")


@pytest.mark.parametrize("value", [0, 7])
def test_constant(tmp_path, value): refused(write(tmp_path/"x.nii", np.full_like(X, value)), "every voxel")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(tmp_path, value):
    x = X.copy(); x[1, 2, 3] = value
    refused(write(tmp_path/"x.nii", x), "NaN or infinite")
    refused(write(tmp_path/"x.nii", x), "NaN or infinite", load_mask)


@pytest.mark.parametrize("bad", ["zero", "nan"])
def test_affine(tmp_path, bad):
    a = np.eye(4); a[2, :3] = 0 if bad == "zero" else np.nan
    image = nibabel.Nifti1Image(X, None); image.header.set_sform(a, 2); image.header["qform_code"] = 0
    nibabel.save(image, tmp_path/"x.nii")
    refused(tmp_path/"x.nii", "affine")


def test_mask_on_another_grid(tmp_path):
    scan = load_volume(write(tmp_path/"scan.nii"))
    shift = np.eye(4); shift[1, 3] = 1
    refused(write(tmp_path/"shape.nii", M[:5]), "another grid", load_mask, like=scan)
    refused(write(tmp_path/"shift.nii", M, shift), "another grid", load_mask, like=scan)
    assert load_mask(write(tmp_path/"same.nii", M, np.eye(4) + 1e-6), like=scan).data.dtype == bool


def test_empty_mask(tmp_path):
    refused(write(tmp_path/"m.nii", X * 0), "empty", load_mask)
    refused(write(tmp_path/"m.nii", -M), "empty", load_mask)


@pytest.mark.parametrize("factor", [.5, .997, 1.4])
def test_a_mask_of_fractions(tmp_path, factor):
    "A mask that was interpolated, or a probability map: `> 0` would dilate it."
    refused(write(tmp_path/"m.nii.gz", M * np.float32(factor)), "holds fractions", load_mask)
    refused(write(tmp_path/"m.nii.gz", M * np.float32(factor)), "holds fractions", load_labels)
    assert load_mask(write(tmp_path/"m.nii.gz", M * np.float32(1.0001))).data.sum() == M.sum()               # the rounding of a header's slope


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_zero_bytes(tmp_path, name):
    (tmp_path/name).touch(); refused(tmp_path/name, "0 bytes")


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_wrong_magic(tmp_path, name):
    import gzip
    p = write(tmp_path/name); open_ = gzip.open if name.endswith("gz") else open
    with open_(p, "rb") as f: b = bytearray(f.read())
    b[344:348] = b"XXX\0"
    with open_(p, "wb") as f: f.write(bytes(b))
    refused(p, "not a NIfTI file")


def two_affines(path, sform, qform, codes=(1, 1)):
    image = nibabel.Nifti1Image(X, None); image.set_qform(qform, codes[1]); image.set_sform(sform, codes[0])
    nibabel.save(image, path)
    return path


def test_sform_and_qform_disagree(tmp_path):
    far, near, flipped = np.eye(4), np.eye(4), np.diag([-1., 1, 1, 1]); far[2, 3], near[2, 3] = 1.2, .4
    refused(two_affines(tmp_path/"far.nii", np.eye(4), far), "sform and qform disagree by 1.2 mm")
    refused(two_affines(tmp_path/"flipped.nii", np.eye(4), flipped), "disagree", load_mask)
    assert load_volume(two_affines(tmp_path/"near.nii", np.eye(4), near)).affine[2, 3] == 0                  # rounding: the sform counts
    assert load_volume(two_affines(tmp_path/"one.nii", np.eye(4), far, (1, 0))).affine[2, 3] == 0            # only one of them is in use
    np.testing.assert_allclose(load_volume(two_affines(tmp_path/"other.nii", np.eye(4), far, (0, 1))).affine[2, 3], 1.2, rtol=1e-5)


def test_no_positions(tmp_path): refused(two_affines(tmp_path/"x.nii.gz", np.eye(4), np.eye(4), (0, 0)), "left and right are unknown")


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_no_permission(tmp_path, name, monkeypatch):
    "As root every file can be read, so the refusal is simulated."
    import gzip
    p = write(tmp_path/name)
    def no(*a, **k): raise PermissionError(13, "Permission denied", str(p))
    monkeypatch.setattr(gzip, "open", no); monkeypatch.setattr(nibabel, "load", no)
    refused(p, "no permission")


def test_disk_full(tmp_path, monkeypatch):
    def full(image, path): raise OSError(28, "No space left on device", str(path))
    monkeypatch.setattr(nibabel, "save", full)
    with pytest.raises(UadError, match="the disk is full") as e: save_volume(tmp_path/"x.nii.gz", X, np.eye(4))
    assert str(tmp_path/"x.nii.gz") in str(e.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PSR", "ILA"])
def test_written_in_the_order_it_came(tmp_path, axes):
    affine = np.diag([1., 2, 3, 1]); affine[:3, 3] = -4, 5, 6
    save_volume(tmp_path/"a.nii.gz", X, affine, axes)
    v = load_volume(tmp_path/"a.nii.gz")
    assert v.axes == axes; np.testing.assert_array_equal(v.data, X); np.testing.assert_allclose(v.affine, affine)
    save_volume(tmp_path/"b.nii.gz", v.data, v.affine, v.axes)
    a, b = nibabel.load(tmp_path/"a.nii.gz"), nibabel.load(tmp_path/"b.nii.gz")
    np.testing.assert_array_equal(a.get_fdata(), b.get_fdata()); np.testing.assert_array_equal(a.affine, b.affine)


def test_labels_become_one_mask(tmp_path):
    labels = np.zeros((3, 3, 3), np.uint8); labels[0], labels[2] = 4, 1
    assert load_mask(write(tmp_path/"m.nii", labels)).data.sum() == 18


def test_left_is_left(tmp_path):
    "A scan stored right to left (as most are) reads the same as one stored left to right."
    flip = np.diag([-1., 1, 1, 1]); flip[0, 3] = X.shape[0] - 1
    v = load_volume(write(tmp_path/"x.nii", X[::-1], flip))
    np.testing.assert_array_equal(v.data, X); np.testing.assert_allclose(v.affine, np.eye(4))


def test_wrong_name_to_write(tmp_path):
    with pytest.raises(UadError, match="nii.gz"): save_volume(tmp_path/"x.png", X, np.eye(4))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_a_header_that_claims_too_much(tmp_path, name):
    "A small file that says it has 35 million million voxels: refused before memory is asked for."
    import gzip
    b = bytearray(nibabel.Nifti1Image(X, np.eye(4)).to_bytes()); b[42:48] = np.array([32767] * 3, "<i2").tobytes()
    (tmp_path/name).write_bytes(gzip.compress(bytes(b)) if name.endswith(".gz") else b)
    refused(tmp_path/name, "claims 32767 x 32767 x 32767 voxels")


def test_a_file_that_unpacks_to_too_much(tmp_path, monkeypatch):
    p = tmp_path/"x.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros((200, 200, 200), np.float32), np.eye(4)), p)
    monkeypatch.setattr("uad_study.volume.MOST_VOXELS", 100_000)
    refused(p, "when unpacked")
