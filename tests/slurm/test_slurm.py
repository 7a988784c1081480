"A study on a real SLURM of one node: the same table as at home, and what a cluster does to jobs. Each fault loses at most what came after the last checkpoint, and no result differs by a bit."
import json, os, re, shutil, subprocess, sys, time
import pandas as pd, psutil, pytest
from cluster import drained, empty_queue, jobs, logs, run_here, saved, sh, slurm, state, step, trained, until, write_study
from conftest import command, one_line, uad
from uad_study import runs
from uad_study import slurm as engine

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]
STEPS, LONG = 160, 1000              # SLURM looks at time limits once or twice a minute: a training must last for some minutes to meet one


def undisturbed(folder, steps):
    "A folder in which the preparation and the training of `steps` steps ran without SLURM and without a break."
    path = write_study(folder, steps)
    study = runs.read_study(path)
    for r in runs.plan(study)[:2]: run_here(path.parent/"out", study, r)
    return path.parent/"out"


@pytest.fixture(scope="session")
def at_home(tmp_path_factory): return undisturbed(tmp_path_factory.mktemp("home"), STEPS)


@pytest.fixture(scope="session")
def long_at_home(tmp_path_factory): return undisturbed(tmp_path_factory.mktemp("long"), LONG)


def training(at_home, tmp_path, steps=STEPS, **more):
    "A study of one long training, prepared, and the training's job submitted: (path, out, id)."
    path = write_study(tmp_path, steps, more)
    study, out = runs.read_study(path), tmp_path/"out"
    prepare, train = runs.plan(study)[:2]
    shutil.copytree(at_home/prepare.folder, out/prepare.folder)
    [array] = engine.submit(study, out, only=[train.folder])
    assert array.items == [[train]] and array.dependency() == ""
    return path, out, array.ids[0]


def begun(out, at_least=10, seconds=240): return until("the training is on its way", lambda: step(out) if step(out) >= at_least else 0, seconds)


def finished(out, at_home, job):
    "Wait for the training's end; it is the one of the uninterrupted training, bit for bit."
    until("the job ends", lambda: state(job) not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING"), 400)
    assert list(out.glob("train-*/result.json")), logs(out)
    assert trained(out) == trained(at_home)


def restarts(job): return int(re.search(r"Restarts=(\d+)", sh("scontrol", "show", "job", job).stdout)[1])


def goes_on(out, lost=0):
    "After a stop: the first step that is told again is not before the checkpoint (less `lost` steps)."
    at = saved(out)
    for f in out.glob("train-*/progress.json"): f.unlink()
    first = until("the training goes on", lambda: step(out) if step(out) >= 0 else 0)
    assert at - lost <= first, (at, first)
    return at


def submit(path, *args):
    r = uad("run", path, "--out", path.parent/"out", "--engine", "slurm", *args)
    assert r.returncode == 0, r.stderr
    return path.parent/"out", r.stdout


def test_a_study_on_slurm_is_bitwise_the_local_one(slurm, tmp_path):
    (tmp_path/"home").mkdir()
    home, path = write_study(tmp_path/"home", contrasts="T1w, T2w"), write_study(tmp_path, contrasts="T1w, T2w")
    dry = uad("run", path, "--out", tmp_path/"out", "--engine", "slurm", "--dry-run")
    assert dry.returncode == 0 and not (tmp_path/"out").exists() and re.search(r"evaluate +2 jobs, +2 runs  dependency aftercorr:train", dry.stdout), dry
    out, said = submit(path)
    assert f"uad status {out}" in said and "scancel" in said
    status = uad("status", out).stdout
    assert "queued" in status and "waits for the runs it needs" in status, status
    one_line(uad("run", path, "--out", out), "in the queue of SLURM")                        # the local engine keeps out
    assert "nothing to submit" in submit(path)[1]                                            # a second submission while jobs live
    drained(800)
    assert (out/"table.csv").exists(), logs(out)
    assert all(l.startswith("done ") for l in uad("status", out).stdout.splitlines()[:-1]), uad("status", out).stdout
    assert "nothing to submit" in submit(path)[1]
    for f in (out/"jobs.json", *out.glob("*/result.json"), *out.glob("*/run.json")): assert str(tmp_path) not in f.read_text(), f
    r = uad("run", home, "--out", home.parent/"out")
    assert r.returncode == 0, r.stderr
    assert (out/"table.csv").read_text() == (home.parent/"out"/"table.csv").read_text()
    assert pd.read_csv(out/"cases.csv").equals(pd.read_csv(home.parent/"out"/"cases.csv")) and (out/"report.html").exists()


def test_fault_one_training_fails(slurm, tmp_path):
    "The others finish, the report has them and says what is missing; a second `uad run` submits what is missing alone."
    path = write_study(tmp_path, extra=("\ntrain:", "\n  - {name: ddpm, label: wild, channels: [16, 32], num_res_blocks: 1, num_head_channels: 32, norm_num_groups: 16, patch: 4, train: {lr: 1.0e+30}}\ntrain:"))
    out, _ = submit(path)
    ids = {s: jobs(out, s) for s in ("train", "evaluate", "report")}
    drained(800)
    assert [state(i) for i in ids["train"]] == ["COMPLETED", "FAILED"] and [state(i) for i in ids["evaluate"]] == ["COMPLETED", "CANCELLED"] and state(ids["report"][0]) == "FAILED", logs(out)
    status = uad("status", out).stdout
    assert re.search(r"failed .*train T2w wild f0 .*the loss is not finite", status) and re.search(r"cancelled .*evaluate T2w wild f0 .*what it needs failed", status), status
    assert re.search(r"failed .*report .*2 of 5 runs are missing", status), status
    assert set(pd.read_csv(out/"table.csv").model.dropna()) >= {"ddpm"} and "wild" not in set(pd.read_csv(out/"table.csv").model) and "wild" in (out/"report.html").read_text()
    again = uad("run", path, "--out", out, "--engine", "slurm", "--dry-run").stdout
    assert [(l.split()[0], l.split()[1]) for l in again.splitlines() if re.match(r"  \w", l)] == [("train", "1"), ("evaluate", "1"), ("report", "1")], again


def test_fault_preempted_by_usr2(slurm, at_home, tmp_path):
    path, out, job = training(at_home, tmp_path)
    at = begun(out)
    assert not sh("scancel", "--signal=USR2", job).returncode
    until("requeued", lambda: restarts(job))
    assert goes_on(out) >= at and "requeued" in uad("status", out).stdout
    finished(out, at_home, job)
    assert state(job) == "COMPLETED"


def test_fault_time_limit(slurm, long_at_home, tmp_path):
    "SLURM's own signal before its time limit, which is lowered once the training is on its way (a busy machine takes long to start)."
    path, out, job = training(long_at_home, tmp_path, LONG, time=10, signal_seconds=100)
    at = begun(out)
    assert not sh("scontrol", "update", f"JobId={job}", "TimeLimit=2").returncode
    until("requeued", lambda: restarts(job))
    assert at <= saved(out) < LONG
    sh("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    goes_on(out)
    finished(out, long_at_home, job)
    assert state(job) == "COMPLETED" and "this job is timed-out" in "".join(f.read_text() for f in (out/"slurm").glob(f"{job}_0_log.*"))


def test_fault_time_limit_met_too_often(slurm, at_home, tmp_path):
    "The job fails with a line that says so; the next submission goes on from what was saved. (In jobs of up to ten minutes submitit takes every USR2 for the time limit.)"
    path, out, job = training(at_home, tmp_path, time=10, requeues=0)
    at = begun(out)
    sh("scancel", "--signal=USR2", job)
    until("failed", lambda: state(job) == "FAILED")
    assert re.search(r"failed +train T2w ddpm f0 .*met its time limit once more than engine.slurm.requeues", uad("status", out).stdout), uad("status", out).stdout
    assert at <= saved(out) < STEPS
    study = runs.read_study(path)
    [array] = engine.submit(study, out, only=[runs.plan(study)[1].folder])
    goes_on(out)
    finished(out, at_home, array.ids[0])


def test_fault_scancel_and_resume(slurm, at_home, tmp_path):
    path, out, job = training(at_home, tmp_path)
    begun(out)
    sh("scancel", job)
    until("cancelled", lambda: state(job) == "CANCELLED")
    assert re.search(rf"cancelled +train T2w ddpm f0 .*job {job}", uad("status", out).stdout), uad("status", out).stdout
    before = saved(out)
    assert 10 <= before < STEPS
    study = runs.read_study(path)
    [array] = engine.submit(study, out, only=[runs.plan(study)[1].folder])
    assert goes_on(out) >= before
    finished(out, at_home, array.ids[0])


def test_fault_requeued_by_the_administrator(slurm, at_home, tmp_path):
    path, out, job = training(at_home, tmp_path)
    begun(out)
    assert not sh("scontrol", "requeue", job).returncode
    until("waits again", lambda: state(job) == "PENDING")
    assert re.search(rf"queued .*job {job}, requeued", uad("status", out).stdout), uad("status", out).stdout
    goes_on(out)
    finished(out, at_home, job)


def test_fault_node_fails(slurm, at_home, tmp_path):
    "The node dies with all that runs there, and nothing is asked to save: SLURM requeues the job by itself, and it goes on from its last checkpoint when the node is back."
    path, out, job = training(at_home, tmp_path)
    at = begun(out)
    stepd = subprocess.run(["pgrep", "-f", rf"slurmstepd: \[{job}\."], capture_output=True, text=True).stdout.split()
    dead = [psutil.Process(int(i)) for i in ((slurm/"run"/"slurmd.pid").read_text(), *stepd)]
    for p in [*dead, *(c for p in dead[1:] for c in p.children(recursive=True))]:
        try: p.kill()
        except psutil.NoSuchProcess: pass
    sh("scontrol", "update", "NodeName=localhost", "State=DOWN", "Reason=test")
    until("waits again", lambda: state(job) == "PENDING")
    assert re.search(rf"queued .*job {job}, requeued", uad("status", out).stdout), uad("status", out).stdout
    assert saved(out) >= at - 1
    sh("slurmd", "-f", slurm/"slurm.conf", "-N", "localhost")
    sh("scontrol", "update", "NodeName=localhost", "State=RESUME")
    goes_on(out)
    assert [a["how"] for a in runs.attempts(*out.glob("train-*"))][0] == "killed"
    finished(out, at_home, job)


def test_fault_node_drained_while_jobs_wait(slurm, tmp_path):
    sh("scontrol", "update", "NodeName=localhost", "State=DRAIN", "Reason=disk")
    path = write_study(tmp_path)
    study, out = runs.read_study(path), tmp_path/"out"
    [array] = engine.submit(study, out, only=[runs.plan(study)[0].folder])
    until("says why", lambda: re.search("queued .*prepare .*(drained|DRAINED)", uad("status", out).stdout))
    sh("scontrol", "update", "NodeName=localhost", "State=RESUME")
    drained()
    assert re.search("done +prepare", uad("status", out).stdout)


def test_fault_run_killed_in_its_job(slurm, at_home, tmp_path):
    "kill -9 of the run, not of the job: the job fails, and the next submission goes on."
    path, out, job = training(at_home, tmp_path)
    begun(out)
    [pid] = subprocess.run(["pgrep", "-f", f"from uad_study.runs import main.*{out}/train"], capture_output=True, text=True).stdout.split()
    os.kill(int(pid), 9)
    until("failed", lambda: state(job) == "FAILED")
    assert re.search(r"failed +train T2w ddpm f0", uad("status", out).stdout) and "ended with code -9" in logs(out)
    study = runs.read_study(path)
    [array] = engine.submit(study, out, only=[runs.plan(study)[1].folder])
    goes_on(out)
    finished(out, at_home, array.ids[0])


def test_lock_two_submissions_at_once(slurm, tmp_path):
    "One submits, the other is refused with its line or finds everything in the queue: each run has one job."
    path = write_study(tmp_path, more=dict(extra=dict(hold=True)), contrasts="T1w, T2w")
    both = [subprocess.Popen(command("run", path, "--out", tmp_path/"out", "--engine", "slurm"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted([(*p.communicate(), p.returncode) for p in both], key=lambda x: "cancel: scancel" not in x[0])
    assert said[0][2] == 0 and "submitted" in said[0][0], said
    assert ("nothing to submit" in said[1][0]) != ("another `uad` command works there" in said[1][1]), said
    queued = sh("squeue", "-h", "-r", "-o", "%i").stdout.split()
    assert len(queued) == 6 and sorted(queued) == sorted(j["id"] for j in json.loads((tmp_path/"out"/"jobs.json").read_text())["jobs"])
    assert "held: scontrol release" in uad("status", tmp_path/"out").stdout


def test_ninety_runs_are_submitted_and_asked_for(slurm, tmp_path, capsys):
    "30 trainings and 60 evaluations of the paper's size, held: four submissions. `make test-slurm` prints the seconds; nothing is asserted on them."
    (tmp_path/"s.yaml").write_text("format: uad-study/1\nmodels: [ddpm, dae, vae]\nvariants: [{label: a, scores: {median: 3}}, {label: b, scores: {erode: 0}}, {label: c, scores: {kernel_dims: 2}}]\n"
                                   "engine: {slurm: {partition: gpu, cpus: 1, memory_gb: 1, gres: 'gpu:1', extra: {hold: true}}}\n")
    study, out, seconds = runs.read_study(tmp_path/"s.yaml"), tmp_path/"out", {}
    for what, do in (("dry", lambda: engine.submit(study, out, dry_run=True)), ("submitted", lambda: engine.submit(study, out)), ("states", lambda: engine.job_states(out)), ("again", lambda: engine.submit(study, out))):
        t = time.perf_counter(); found = do(); seconds[what] = round(time.perf_counter() - t, 2)
        if what in ("dry", "submitted"): assert [(a.stage, len(a.items), sum(map(len, a.items))) for a in found] == [("prepare", 1, 1), ("train", 30, 30), ("evaluate", 30, 60), ("report", 1, 1)]
    assert found == [] and len(engine.job_states(out)) == 92 and len(sh("squeue", "-h", "-r").stdout.splitlines()) == 62
    with capsys.disabled(): print(f"\n92 runs, seconds: {seconds}")


@pytest.mark.parametrize("setting, says", [(dict(partition="nowhere"), "invalid partition specified: nowhere"), (dict(gres="gpu:9"), "Requested node configuration is not available"), (dict(gres="tpu:1"), "Invalid generic resource")])
def test_fault_sbatch_refuses(slurm, tmp_path, setting, says):
    "At once, or in the middle (the preparation needs no gres): one line, and nothing is left."
    path = write_study(tmp_path, more=setting)
    one_line(uad("run", path, "--out", tmp_path/"out", "--engine", "slurm"), "sbatch: ", says, "engine.slurm")
    until("the queue is empty", lambda: not sh("squeue", "-h").stdout.strip(), 60)
    assert [p.name for p in (tmp_path/"out").iterdir() if p.name not in ("slurm", ".lock")] == []


def test_in_a_container(slurm, tmp_path):
    "The command prefix of a container: here one that only sets a variable, which the run's log shows."
    (tmp_path/"box").write_text("#!/bin/sh\necho in the box: $*\nexec env IN_A_BOX=1 \"$@\"\n"); (tmp_path/"box").chmod(0o755)
    path = write_study(tmp_path, more=dict(container=f"{tmp_path}/box", setup=["export PATH=" + os.path.dirname(sys.executable) + ":$PATH"]))
    study, out = runs.read_study(path), tmp_path/"out"
    prepare = runs.plan(study)[0]
    [array] = engine.submit(study, out, only=[prepare.folder])
    drained()
    assert runs.done(out, prepare), logs(out)
    assert "in the box: python -c" in (out/prepare.folder/"log.txt").read_text()
