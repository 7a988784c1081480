"What a user can get wrong: one clear line, exit code not 0, nothing half-written."
import errno, json, os, shutil
import numpy as np, pandas as pd, pytest
from conftest import TINY, one_line, uad
from uad_study import cli, cohort, engines, prepare, runs
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


@pytest.mark.parametrize("line, words", [
    ("models: 3", ["models: must be a list"]),
    ("models: ddpm", ["models: must be a list, such as [ddpm]", "'ddpm'"]),
    ("variants: none", ["variants: must be a list, such as [{train: {lr: 0.0001}}]"]),
    ("models: [3]", ["models[0]", "a mapping of settings, not 3"]),
    ("models: [{name: [ddpm]}]", ["models[0].name", "known are ae, vae, dae, ddpm"]),
    ("models: [{channels: []}]", ["model.channels: is empty"]),
    ("models: [{channels: [0]}]", ["model.channels: 0"]),
    ("models: [{norm_num_groups: 0}]", ["model.norm_num_groups: must be more than 0"]),
    ("models: [{num_head_channels: 0}]", ["model.num_head_channels: must be more than 0"]),
    ("models: [{patch: 0}]", ["model.patch: must be more than 0"]),
    ("models: [{patch: 5}]", ["model.patch 5", "multiple of 20 pixels", "96"]),
    ("models: [{channels: [64, 64, 64, 64, 64, 64, 64]}]", ["7 levels", "multiple of 64 pixels"]),
    ("data: {contrasts: []}", ["data.contrasts: is empty", "T1w, T2w"]),
    ("data: {contrasts: [T1w, T1w]}", ["data.contrasts: T1w appears twice"]),
    ("data: {pathologies: [tumor]}", ["data.pathologies: 'tumor'", "known are tumour, ms, stroke, wmh"]),
    ("data: {pathologies: []}", ["data.pathologies: is empty"]),
    ("data: {pathologies: [ms, ms]}", ["data.pathologies: ms appears twice"]),
    ("data: {contrasts: [T1w], pathologies: [ms]}", ["data.pathologies: no lesion of ms", "wmh: T1w"]),
    ("data: {source: real_t1}", ["real_t1", "set contrasts to [T1w] and folds to 1"]),
    ("data: {source: real_t1, contrasts: [T1w], folds: 2}", ["real_t1", "folds to 1"]),
    ("engine: {slots: -1}", ["engine.slots", "-1"]),
    ("engine: {threads: -2}", ["engine.threads", "-2"]),
])
def test_study_is_refused_when_read(tmp_path, line, words):
    (tmp_path/"s.yaml").write_text(f"format: uad-study/1\n{line}\n")
    with pytest.raises(UadError) as e: runs.read_study(tmp_path/"s.yaml")
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), e.value


def test_a_title_may_be_a_number(tmp_path):
    (tmp_path/"s.yaml").write_text("format: uad-study/1\ntitle: 2024\n")
    assert runs.read_study(tmp_path/"s.yaml").title == "2024"


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
    monkeypatch.chdir(tmp_path)                                             # as in a run's notebook: the reader needs the whole path
    with pytest.raises(UadError) as e: cohort.write_cohort("c", [], 3)
    assert str(e.value).startswith(f"{tmp_path/'c'}: ")


def test_fault_second_driver(tmp_path, tiny_yaml):
    from filelock import FileLock
    (tmp_path/"out").mkdir()
    with FileLock(tmp_path/"out"/".lock"): one_line(uad("run", tiny_yaml, "--out", tmp_path/"out"), "another `uad` command works there")


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


def test_what_killed_runs_left_is_removed(tmp_path, tiny_yaml):
    from uad_study.dataset import prepare_dataset
    def leave(*folders):
        for f in folders: (f/".tmp-7-cohort").mkdir(parents=True); (f/".tmp-7-cohort"/"images.npy").write_text("half"); (f/".tmp-7-last.pt").write_text("half")
    folder = planned(tmp_path, tiny_yaml, data_confg={})
    leave(folder, folder/"maps")
    assert runs.main([str(folder)]) == 1                                     # it fails; but what an earlier one left is gone
    leave(tmp_path, tmp_path/"figures", tmp_path/"train-x")
    with runs.out_folder(tmp_path): pass
    assert not [p for p in tmp_path.rglob(".tmp-*")]
    leave(tmp_path/"d", tmp_path/"d"/"sub-1"/"anat")
    row = dict(dict.fromkeys(["through", "brain_mask", "lesion_mask", "space", "ignore"], ""), dataset="d", subject_id="1", contrast="T2w", state="stripped", image="none.nii", pathology="healthy", split="test", val_fold=-1)
    with pytest.raises(UadError, match="none.nii: no such file"): prepare_dataset(pd.DataFrame([row]), tmp_path, tmp_path/"d")
    assert not [p for p in tmp_path.rglob(".tmp-*")]


def test_failed_scans_are_named_without_their_place(tmp_path, monkeypatch):
    grid = np.ones(cohort.GRID_SHAPE, np.float32)
    good = dict(subject_id="b", contrast="T1w", pathology="healthy", split="train", val_fold=-1, image=grid, brain_mask=grid > 0, lesion_mask=None, twin=None, meta={})
    monkeypatch.setattr(prepare, "iter_real_t1", lambda *a, **k: [UadError(f"{tmp_path/'data'/'x'/'a.nii.gz'}: no such file"), good])
    cohort.build_real_t1(cohort.DataConfig("real_t1", ("T1w",), folds=1), tmp_path/"c", tmp_path/"data")
    assert cohort.Cohort(tmp_path/"c").info["failed"] == ["x/a.nii.gz: no such file"]


def test_fault_folder_that_cannot_be_written(tmp_path, monkeypatch, tiny_yaml):
    "`uad explore` and `uad clean` where the system refuses (root may write anywhere: so the refusal is made up)."
    def refuse(*a, **k): raise PermissionError(errno.EACCES, "Permission denied")
    for f in ("evaluate-x/result.json", "old/run.json"): (tmp_path/f).parent.mkdir(); (tmp_path/f).write_text("{}")
    with monkeypatch.context() as m:
        m.setattr(shutil, "copyfile", refuse)
        with pytest.raises(UadError, match="labs.ipynb: cannot be written: no permission"): cli.explore(tmp_path)
        m.setattr(shutil, "rmtree", refuse)
        with pytest.raises(UadError, match="old: cannot be written: no permission"): cli.clean(tmp_path, [str(tiny_yaml)], None, True)


def test_workers_keep_to_the_cores_of_this_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert engines.resolve_engine(runs.EngineConfig("cpu")) == ("cpu", [""], 1) and runs.provenance()["cores"] == 1
    pids, threads = zip(*runs.parallel_map(eval, ["(__import__('os').getpid(), __import__('os').environ['OMP_NUM_THREADS'])"] * 4))
    assert len(set(pids)) == 1 and set(threads) == {"1"}


def test_usage_errors_keep_their_exit_code():
    r = uad("run", "demo", "--no-such-option")
    assert r.returncode == 2 and "No such option" in r.stderr and "Traceback" not in r.stderr
