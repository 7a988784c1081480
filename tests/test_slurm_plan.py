"Jobs of a cluster without a cluster: who waits for whom, what is refused, what SLURM's answers become. tests/slurm has the real one."
import json, os, signal, subprocess, sys, time
import pytest
from conftest import TINY, one_line, uad
from uad_study import runs, slurm
from uad_study.core import UadError


@pytest.fixture
def study(tmp_path):
    def make(more="", engine="{}"):
        (tmp_path/"s.yaml").write_text("format: uad-study/1\ndata: {contrasts: [T1w, T2w], folds: 2}\nmodels: [ddpm, dae]\nengine: " + engine + "\n" + more)
        return runs.read_study(tmp_path/"s.yaml")
    return make


def shape(arrays): return [(a.stage, [len(i) for i in a.items], a.dependency()) for a in arrays]


@pytest.mark.parametrize("setting, words", [
    ("{partitoin: gpu}", ["engine, slurm: unknown setting 'partitoin'", "did you mean 'partition'"]),
    ("{time: {trian: 60}}", ["engine.slurm.time", "did you mean 'train'"]),
    ("{time: 0}", ["engine.slurm.time", "whole minutes"]),
    ("{time: {train: 2.5}}", ["engine.slurm.time.train", "2.5"]),
    ("{time: a day}", ["'time'", "'a day'"]),
    ("{time: {report: 1}}", ["engine.slurm.signal_seconds: 120", "60 s"]),
    ("{cpus: 0}", ["engine.slurm.cpus"]),
    ("{memory_gb: 16GB}", ["'memory_gb'", "'16GB'"]),
    ("{at_once: -1}", ["engine.slurm.at_once"]),
    ("{setup: module load cuda}", ["'setup'", "must be a list, such as [module load cuda]"]),
    ("{extra: {dependency: 3}}", ["engine.slurm.extra.dependency", "remove it"]),
    ("{extra: {cpus_per_task: 3}}", ["engine.slurm.extra.cpus_per_task", "remove it"]),
    ("{extra: {--nice: 3}}", ["engine.slurm.extra", "without --"]),
    ("{extra: {exclusive: no}}", ["engine.slurm.extra.exclusive", "true for an option without a value"]),
    ("3", ["engine, slurm: must be a mapping of settings, not int"]),
])
def test_fault_settings(study, setting, words):
    with pytest.raises(UadError) as e: study(engine=f"{{slurm: {setting}}}")
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), e.value


def test_a_study_of_thirty_trainings(study, tmp_path):
    paper = runs.plan(runs.read_study("paper"))
    assert shape(slurm.arrays(paper, tmp_path)) == [("prepare", [1], ""), ("train", [1] * 30, "afterok:prepare[0]"), ("evaluate", [1] * 30, "aftercorr:train"), ("report", [1], "afterany:prepare:train:evaluate")]


def test_every_run_has_one_job_and_restorations_are_never_shared(study, tmp_path):
    planned = runs.plan(study("variants: [{label: a, restore: {t_test: 250}}, {label: b, scores: {kernel_dims: 2}}, {label: c, train: {steps: 5}}, {label: d, data: {n_train: 200}}]"))
    todo = slurm.arrays(planned, tmp_path)
    assert sorted(r.folder for a in todo for i in a.items for r in i) == sorted(r.folder for r in planned)
    jobs = [i for a in todo for i in a.items if a.stage == "evaluate"]
    restorations = [{(r.parameters["train_dir"], json.dumps(r.parameters["restore_config"], sort_keys=True)) for r in i} for i in jobs]
    assert sum(map(len, restorations)) == len(set().union(*restorations)) and max(len(i) for i in jobs) == 3
    for a in todo:
        if a.dependency().startswith("aftercorr"):
            for item, [t] in zip(a.items, a.after[0][1].items, strict=True): assert all(t.folder in r.needs for r in item)


def test_second_preparation_holds_up_only_its_own(study, tmp_path):
    planned = runs.plan(study("variants: [{label: more, data: {n_train: 200}}]"))
    todo = slurm.arrays(planned, tmp_path)
    assert shape(todo)[:3] == [("prepare", [1, 1], ""), ("train", [1] * 8, "afterok:prepare[0]"), ("train", [1] * 4, "afterok:prepare[1]")]


def test_what_is_done_or_queued_is_left(study, tmp_path, monkeypatch):
    planned = runs.plan(study())
    folders = {s: [r.folder for r in planned if r.stage == s] for s in runs.STAGES}
    done = {*folders["prepare"], *folders["train"][:2], folders["evaluate"][0]}
    monkeypatch.setattr(runs, "done", lambda out, r: r.folder in done)
    assert shape(slurm.arrays(planned, tmp_path)) == [("train", [1] * 6, ""), ("evaluate", [1] * 6, "aftercorr:train"), ("evaluate", [1], ""), ("report", [1], "afterany:train:evaluate")]
    queued = {f: [f"7_{i}"] for i, f in enumerate(folders["train"][2:])} | {folders["report"][0]: ["9"]}                        # trainings wait, their evaluations were cancelled
    assert shape(slurm.arrays(planned, tmp_path, queued))[:2] == [("evaluate", [1], ""), ("evaluate", [1], "afterok:7_0")] and shape(slurm.arrays(planned, tmp_path, queued))[-1][2].endswith(":9")
    monkeypatch.setattr(runs, "done", lambda out, r: True)
    assert slurm.arrays(planned, tmp_path) == []
    monkeypatch.setattr(runs, "done", lambda out, r: r.stage != "prepare")                                                    # made again: whoever needs it looks for itself
    assert [len(a.items) for a in slurm.arrays(planned, tmp_path)] == [1, 8, 8, 1]


def test_an_evaluation_waits_for_one_that_reads_the_same_training(study, tmp_path, monkeypatch):
    planned = runs.plan(study("variants: [{label: b, scores: {kernel_dims: 2}}]"))
    evaluations = [r for r in planned if r.stage == "evaluate"]
    first = next(r for r in evaluations if sum(q.parameters["train_dir"] == r.parameters["train_dir"] for q in evaluations) == 2)
    done = {r.folder for r in planned if r.stage in ("prepare", "train")}
    monkeypatch.setattr(runs, "done", lambda out, r: r.folder in done)
    waiting = [a for a in slurm.arrays(planned, tmp_path, {first.folder: ["5"]}) if a.dependency() == "afterany:5"]
    assert len(waiting) == 1 and [len(i) for i in waiting[0].items] == [1] and slurm._training(waiting[0].items[0][0]) == slurm._training(first)


def test_only_some(study, tmp_path):
    planned = runs.plan(study())
    train = next(r for r in planned if r.stage == "train")
    assert shape(slurm.arrays(planned, tmp_path, only=[planned[0].folder, train.folder])) == [("prepare", [1], ""), ("train", [1], "afterok:prepare[0]")]
    assert slurm.arrays(planned, tmp_path, only=[train.folder]) == []                                                         # what it needs is neither there nor coming


SQUEUE = "".join(f"{i:<40}{s:<20}{n:<10}{r:<80}\n" for i, s, n, r in [("4_0", "RUNNING", 1, "None"), ("4_1", "PENDING", 0, "ReqNodeNotAvail, UnavailableNodes:n1"), ("4_2", "CANCELLED", 0, "DependencyNeverSatisfied")])


def answer(monkeypatch, **said):
    monkeypatch.setattr(slurm.shutil, "which", lambda c: c if c in said else None)
    monkeypatch.setattr(slurm, "_ask", lambda *c: subprocess.CompletedProcess(c, *said[c[0]]))


def test_states_of_jobs(tmp_path, monkeypatch):
    slurm._record(tmp_path, [dict(id=f"4_{i}", stage="train", runs=[f"train-{i}"], after="", submitted="") for i in range(4)])
    answer(monkeypatch, squeue=(0, SQUEUE, ""))
    assert slurm.job_states(tmp_path) == {"train-0": "running: job 4_0, requeued", "train-1": "queued: job 4_1, a node is drained, down or reserved [ReqNodeNotAvail, UnavailableNodes:n1]",
                                          "train-2": "cancelled: job 4_2, what it needs failed", "train-3": "gone: job 4_3, SLURM has forgotten it: run again to go on"}
    assert slurm.live(tmp_path) == {"train-0": ["4_0"], "train-1": ["4_1"]}
    answer(monkeypatch, squeue=(0, SQUEUE, ""), sacct=(0, "4_3|CANCELLED by 0|None\n", ""))
    assert slurm.job_states(tmp_path)["train-3"] == "cancelled: job 4_3"
    answer(monkeypatch, squeue=(1, "", "slurm_load_jobs error: Invalid job id specified"), sacct=(1, "", "accounting storage is disabled"))
    assert slurm.live(tmp_path) == {} and slurm.job_states(tmp_path)["train-0"].startswith("gone: job 4_0")
    answer(monkeypatch, squeue=(1, "", "squeue: error: Unable to contact slurm controller"))
    assert "Unable to contact" in slurm.job_states(tmp_path)["train-0"]
    with pytest.raises(UadError, match="^squeue: Unable to contact"): slurm.live(tmp_path)                                    # no second job out of ignorance
    answer(monkeypatch)
    assert slurm.job_states(tmp_path) == {}


def test_newer_jobs_replace_older(tmp_path):
    job = lambda i, *f: dict(id=i, stage="evaluate", runs=list(f), after="", submitted="")
    slurm._record(tmp_path, [job("1", "a", "b"), job("2", "c")])
    slurm._record(tmp_path, [job("3", "a"), job("4", "c")])
    assert [j["id"] for j in slurm.read_jobs(tmp_path)] == ["1", "3", "4"] and json.loads((tmp_path/"jobs.json").read_text())["format"] == "uad-jobs/1"


def test_fault_no_submitit(study, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UadError, match=r"submitit is not installed: pip install 'uad_study\[slurm\]'"): slurm.submit(study(), tmp_path/"out")
    assert not (tmp_path/"out").exists()


def test_fault_no_cluster(tmp_path):
    pytest.importorskip("submitit", reason="submitit is not installed: pip install 'uad_study[slurm]'")
    (tmp_path/"s.yaml").write_text(TINY)
    r = subprocess.run([sys.executable, "-c", "from uad_study.cli import main; main()", "run", str(tmp_path/"s.yaml"), "--out", str(tmp_path/"out"), "--engine", "slurm"], capture_output=True, text=True, env=os.environ | {"PATH": str(tmp_path)})
    one_line(r, "sbatch is not here", "--engine local")


def child(code): return subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)


def test_a_child_is_shielded_from_usr2_and_asked_by_sigterm(study, tmp_path):
    "A cluster that signals every process of a job must not kill the run that is to be saved."
    with slurm._shield(): p = child("import signal, sys, time; signal.signal(signal.SIGTERM, lambda *a: sys.exit(75)); print(1, flush=True); time.sleep(60)")
    p.stdout.readline()
    assert signal.SIGUSR2 not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    p.send_signal(signal.SIGUSR2); time.sleep(.3)
    assert not slurm._ended(p)
    pytest.importorskip("submitit")
    job = slurm.Job(str(tmp_path), study(), [])
    job.child = p
    again = job.checkpoint().function
    assert slurm._ended(p) and p.wait() == 75 and not hasattr(again, "child") and again == job


def test_a_child_that_does_not_heed_is_killed(study, tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    job = slurm.Job(str(tmp_path), study(engine="{slurm: {signal_seconds: 1}}"), [])
    job.child = child("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)")
    job.child.stdout.readline()
    job.checkpoint()
    assert job.child.wait(10) == -9


def test_fault_container_that_does_not_start(study, tmp_path, capfd):
    s = study(engine="{slurm: {container: no-such-program exec}}")
    run = runs.plan(s)[0]
    with pytest.raises(SystemExit): slurm.Job(str(tmp_path), s, [run])()
    assert (tmp_path/run.folder/"error.txt").read_text() == "engine.slurm.container: no-such-program: No such file or directory: mend it, or load it in engine.slurm.setup\n"
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
