"What a user can get wrong: one clear line, exit code not 0, nothing half-written."
import errno, json, os, shutil
import numpy as np, pytest
from conftest import TINY, one_line, uad
from uad_study import cohort, runs
from uad_study.core import UadError


@pytest.mark.parametrize("line, words", [
    ("models: [dpm]", ["models[0]", "'dpm'", "did you mean 'ddpm'"]),
    ("scores: {names: [ssim_enz]}", ["ssim_enz", "ssim_ens"]),
    ("train: {stepz: 5}", ["unknown setting 'stepz'", "did you mean 'steps'"]),
    ("trian: {}", ["unknown setting 'trian'"]),
    ("data: {source: virtuel}", ["data.source"]),
    ("data: {folds: 9, n_train: 2, n_val: 2}", ["n_train"]),
    ("train: {lr: fast}", ["lr", "float"]),
    ("models: [{name: ddpm, channels: [33]}]", ["model.channels", "33"]),
    ("engine: {device: tpu}", ["engine.device", "tpu"]),
])
def test_study_faults(tmp_path, line, words):
    key = line.split(":")[0]
    (tmp_path/"s.yaml").write_text("\n".join(l for l in TINY.splitlines() if not l.startswith((key, "  -") if key == "models" else key)) + "\n" + line + "\n")
    one_line(uad("run", tmp_path/"s.yaml", "--out", tmp_path/"out"), *words)
    assert not list((tmp_path/"out").rglob("result.json"))


def test_fault_not_yaml(tmp_path):
    (tmp_path/"s.yaml").write_text("format: [uad")
    one_line(uad("run", tmp_path/"s.yaml"), "s.yaml", "not valid YAML", "line")


def test_fault_unknown_study(): one_line(uad("run", "dmo"), "did you mean 'demo'")


def test_fault_real_study_without_data(tmp_path):
    one_line(uad("run", "real-t1", "--out", tmp_path/"o"), "--data")
    one_line(uad("run", "real-t1", "--data", tmp_path, "--out", tmp_path/"o"), "manifest.csv", "no such file")


@pytest.mark.parametrize("kind", ["file", "readonly"])
def test_fault_output_folder(tmp_path, tiny_yaml, kind):
    if kind == "file": (tmp_path/"f").write_text(""); out = tmp_path/"f"/"out"
    else: out = "/proc/uad-out"
    one_line(uad("run", tiny_yaml, "--out", out), str(out).split("/")[1])


def test_fault_full_disk(tmp_path, monkeypatch):
    def full(*a): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UadError, match="disk is full"): cohort.write_cohort(tmp_path/"c", [], 3)
    assert not any(tmp_path.iterdir())


def test_fault_second_driver(tmp_path, tiny_yaml):
    from filelock import FileLock
    (tmp_path/"out").mkdir()
    with FileLock(tmp_path/"out"/".lock"): one_line(uad("run", tiny_yaml, "--out", tmp_path/"out"), "another `uad run` works there")


def planned(tmp_path, tiny_yaml, **change):
    study = runs.read_study(tiny_yaml)
    run = runs.plan(study)[0]
    run.parameters |= change
    runs.write_run(tmp_path, run, study, "cpu")
    return tmp_path/run.folder


def test_fault_unknown_papermill_parameter(tmp_path, tiny_yaml, capsys):
    folder = planned(tmp_path, tiny_yaml, data_confg={})
    assert runs.main([str(folder)]) == 1
    err = capsys.readouterr().err.strip()
    assert "\n" not in err and "unknown parameter 'data_confg'" in err and "did you mean 'data_config'" in err
    assert not (folder/"result.json").exists() and not (folder/"notebook.ipynb").exists()


def test_fault_lost_parameters_tag(tmp_path):
    with runs.stage_notebook("train") as p: nb = json.loads(p.read_text())
    for c in nb["cells"]: c["metadata"].pop("tags", None)
    (tmp_path/"train.ipynb").write_text(json.dumps(nb))
    with pytest.raises(UadError, match="no cell tagged 'parameters'"): runs.check_parameters(tmp_path/"train.ipynb", {"fold": 1})


def test_fault_missing_papermill_parameter():
    with runs.stage_notebook("train") as p, pytest.raises(UadError, match="'contrast' is missing"): runs.check_parameters(p, {"cohort_dir": "x"})


def test_every_stage_keeps_its_tag():
    import papermill as pm
    for stage in runs.STAGES:
        with runs.stage_notebook(stage) as p: assert "device" in pm.inspect_notebook(str(p)), stage


def test_fault_in_a_run_is_one_line(tmp_path, tiny_yaml):
    "A run that fails inside its notebook: its one line reaches the terminal, and the next call tries again."
    (tmp_path/"s.yaml").write_text(TINY.replace("lr: 0.001", "lr: 1.0e+30"))
    r = uad("run", tmp_path/"s.yaml", "--out", tmp_path/"out")
    assert r.returncode == 1 and "train.lr: the loss is not finite" in r.stderr and r.stderr.strip().count("\n") == 0, r.stderr
    assert len(list((tmp_path/"out").rglob("result.json"))) == 1 and "failed" in uad("status", tmp_path/"out").stdout


def test_fault_damaged_cohort(tiny_out, tmp_path):
    shutil.copytree(next(tiny_out.glob("prepare-*/cohort")), tmp_path/"c")
    (tmp_path/"c"/"images.npy").write_bytes((tmp_path/"c"/"images.npy").read_bytes()[:5000])
    with pytest.raises(UadError, match="images.npy: is damaged"): cohort.Cohort(tmp_path/"c")
    (tmp_path/"c"/"images.npy").unlink()
    with pytest.raises(UadError, match="prepare the cohort again"): cohort.Cohort(tmp_path/"c")


def test_manifest_check():
    r = uad("manifest", "check", "IXI", "--split", "published")
    assert r.returncode == 1 and "leakage" in r.stdout
    assert uad("manifest", "check", "IXI").returncode == 0
    one_line(uad("manifest", "check", "IXY"), "IXI")
