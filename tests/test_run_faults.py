"Whatever ends a run, nothing finished is lost, nothing is done twice, and the numbers are those of an undisturbed study."
import contextlib, json, os, random, shutil, signal, subprocess, time
from unittest import mock
import psutil, pytest, torch
from filelock import FileLock
from conftest import TINY, command, one_line, uad
from uad_study import engines, results, runs
from uad_study.core import UadError, read_json, write_json
from uad_study.train import read_checkpoint


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition(): return found
        time.sleep(.02)
    raise AssertionError(f"waited {seconds} s in vain")


@pytest.fixture
def training(tiny_out, tiny_yaml, tmp_path):
    "The tiny study's training, to be run again in a folder of its own: (study, run, out, the undisturbed run's folder)."
    study = runs.read_study(tiny_yaml)
    prepare, train = runs.plan(study)[:2]
    shutil.copytree(tiny_out/prepare.folder, tmp_path/prepare.folder)
    runs.write_run(tmp_path, train, study, "cpu")
    return study, train, tmp_path, tiny_out/train.folder


def same_training(a, b):
    "Assert that two training runs have the same weights and the same record, bit for bit."
    for name in ("best.pt", "snapshot-000004.pt"):
        one, two = (read_checkpoint(f/name) for f in (a, b))
        assert one["step"] == two["step"] and all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"]), name
    lines = [[{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (f/"metrics.jsonl").read_text().splitlines()] for f in (a, b)]
    assert lines[0] == lines[1]


@pytest.fixture
def longer_training(tiny_out, tmp_path):
    "As `training`, of so many steps that nobody comes too late to disturb it, on a busy machine either."
    (tmp_path/"longer.yaml").write_text(TINY.replace("steps: 12", "steps: 240").replace("val_every: 4", "val_every: 60"))
    study = runs.read_study(tmp_path/"longer.yaml")
    prepare, train = runs.plan(study)[:2]
    for out in ("out", "undisturbed"): shutil.copytree(tiny_out/prepare.folder, tmp_path/out/prepare.folder)
    for out in ("out", "undisturbed"): runs.write_run(tmp_path/out, train, study, "cpu")
    assert runs.start_run(tmp_path/"undisturbed", train, 1).wait(300) == 0
    return study, train, tmp_path/"out", tmp_path/"undisturbed"/train.folder


def test_kill_stop_and_resume_a_training_run(longer_training):
    "One run is stopped, its kernel killed, then its process; the fourth attempt ends it. Only what came after the last checkpoint is done again, and the run tells all four."
    study, run, out, undisturbed = longer_training
    folder = out/run.folder

    def begin():
        "Start the run, and wait until it has kept a step more."
        before = read_checkpoint(folder/"last.pt")["step"] if (folder/"last.pt").exists() else 0
        p = runs.start_run(out, run, 1)
        wait_for(lambda: p.poll() is not None or runs.read_progress(out, run.folder).get("done", 0) > before and engines.at_work(folder))
        assert p.poll() is None, (folder/"log.txt").read_text()
        return p

    p = begin(); p.send_signal(signal.SIGTERM)
    assert p.wait(90) == runs.STOPPED_CODE and not (folder/"result.json").exists() and not (folder/"error.txt").exists()
    stopped = read_checkpoint(folder/"last.pt")["step"]
    assert runs.attempts(folder)[0]["how"] == "stopped" and f"stopped at step {stopped} of 240" in (folder/"log.txt").read_text()

    p = begin()
    kernel, = [c for c in psutil.Process(p.pid).children(recursive=True) if "ipykernel" in " ".join(c.cmdline())]
    kernel.kill()
    assert p.wait(90) == 1 and "the kernel died" in (folder/"error.txt").read_text()

    p = begin()
    kernel, = [c for c in psutil.Process(p.pid).children(recursive=True) if "ipykernel" in " ".join(c.cmdline())]
    p.kill(); p.wait()
    wait_for(lambda: not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE, 20)                # nobody trains on unseen
    assert engines._state(folder, run.label, run.stage, "").state == "killed"

    assert runs.start_run(out, run, 1).wait(300) == 0
    same_training(folder, undisturbed)
    result = read_json(folder/"result.json", runs.RESULT)
    assert [a["how"] for a in result["attempts"]] == ["stopped", "failed", "killed", "done"]
    parts = result["results"]["parts"]
    assert parts[0]["start"] == 0 and parts[1]["start"] == stopped and parts[-1]["end"] == 240
    cells = [o for c in json.loads((folder/"notebook.ipynb").read_text())["cells"] for o in c.get("outputs", []) if "text/html" in o.get("data", {})]
    table = next(h for o in cells if "stopped" in (h := "".join(o["data"]["text/html"])))                  # the whole story, not its last part
    told = {how: table.count(f"<td>{how}</td>") for how in ("stopped", "broken off", "done")}
    assert sum(told.values()) == len(parts) and told["stopped"] == told["done"] == 1 and told["broken off"] >= 1, told       # (the last kill may have come after the last step)
    assert not [q for q in folder.rglob(".tmp-*")]


def test_lock_two_processes_on_one_run(training):
    "Two processes start the same run: one works, the other waits, finds the result and changes nothing."
    study, run, out, undisturbed = training
    folder = out/run.folder
    both = [runs.start_run(out, run, 1) for _ in "ab"]
    assert [p.wait(240) for p in both] == [0, 0]
    assert len(runs.attempts(folder)) == 1 and read_json(folder/"result.json", runs.RESULT)["key"] == run.key
    same_training(folder, undisturbed)


def test_fault_damaged_results_are_made_again(tiny_out, tiny_yaml, tmp_path):
    "A result that is cut short, and one that says another key, are no results; what is whole is not done again."
    out = tmp_path/"out"; shutil.copytree(tiny_out, out)
    study = runs.read_study(tiny_yaml)
    planned = runs.plan(study)
    assert all(runs.done(out, r) for r in planned)
    whole = (out/planned[1].folder/"result.json").read_text()
    for text in (whole[:200], "", whole.replace(planned[1].key, "0" * len(planned[1].key)), "[]"):
        (out/planned[1].folder/"result.json").write_text(text)
        assert [runs.done(out, r) for r in planned] == [True, False, True, True], text[:40]
    s = engines.states(out)[1]
    assert s.state == "waiting" and "damaged" in s.note


def test_fault_damaged_metrics(training):
    "A notebook whose last act was cut short: the run has failed, with a line that names the file."
    study, run, out, undisturbed = training
    folder = out/run.folder
    def half(folder_, label, notebook, parameters, asked): (folder/"metrics.json").write_text('{"format": "uad-me')
    with mock.patch.object(runs, "_execute", half), pytest.raises(UadError, match=r"metrics.json: is damaged \(not JSON\)"): runs.execute_run(folder)
    assert not (folder/"result.json").exists() and "metrics.json" in (folder/"error.txt").read_text() and runs.attempts(folder)[-1]["how"] == "failed"


def test_fault_clock_set_back(tiny_out, tiny_yaml, tmp_path):
    "Files that seem to come from tomorrow change nothing: what is done is done, and the report is that of the plan, not of the newest file."
    out = tmp_path/"out"; shutil.copytree(tiny_out, out)
    planned = runs.plan(runs.read_study(tiny_yaml))
    other = out/"report-0ther"; shutil.copytree(out/planned[-1].folder, other)
    spec = read_json(other/"run.json", runs.RUN); spec["parameters"]["title"] = "of tomorrow"; spec.pop("format")
    write_json(other/"run.json", spec, runs.RUN)
    tomorrow = time.time() + 86400
    for f in out.rglob("*"): os.utime(f, (tomorrow, tomorrow))
    os.utime(other/"run.json", (tomorrow + 60, tomorrow + 60))
    assert all(runs.done(out, r) for r in planned)
    assert results.gather([out]).title == "A tiny study" and runs.planned_report(out).parent.name == planned[-1].folder
    assert uad("run", tiny_yaml, "--out", out).stdout.count("done already") == 4
    (out/"plan.json").unlink()                                              # results of a version that wrote no plan
    assert results.gather([out]).title == "of tomorrow"


def test_fault_results_that_can_only_be_read(tiny_out, tiny_yaml, tmp_path):
    "A read-only file system: looking works, working is refused in one line."
    out, ro = tmp_path/"out", tmp_path/"ro"
    shutil.copytree(tiny_out, out); ro.mkdir()
    if subprocess.run(["mount", "--bind", out, ro], capture_output=True).returncode or subprocess.run(["mount", "-o", "remount,bind,ro", ro], capture_output=True).returncode: pytest.skip("mounting is not allowed here")
    try:
        assert uad("status", ro).stdout.count("done ") >= 4
        one_line(uad("run", tiny_yaml, "--out", ro), "read-only")
        assert uad("report", ro, "--out", tmp_path/"report").returncode == 0
    finally: subprocess.run(["umount", ro])


def test_fault_a_notebook_that_sets_its_own_parameters(training):
    "A stage's notebook that gives a parameter another value after papermill's cell: the run fails and names it, whatever papermill recorded."
    import nbformat
    study, run, out, undisturbed = training
    with runs.stage_notebook("prepare") as source: nb = nbformat.read(str(source), 4)
    prepare = runs.plan(study)[0]
    shutil.rmtree(out/prepare.folder); runs.write_run(out, prepare, study, "cpu")
    nb.cells = [c for c in nb.cells if "parameters" in c.metadata.get("tags", [])] + [nbformat.v4.new_code_cell("data_config['folds'] = 7\nfrom uad_study.runs import write_metrics\nwrite_metrics('.', volumes=0)")]
    nbformat.write(nb, out/"prepare.ipynb")
    with mock.patch.object(runs, "stage_notebook", lambda stage: contextlib.nullcontext(out/"prepare.ipynb")), pytest.raises(UadError, match="ran with data_config = .*'folds': 7.*, not .*'folds': 1"): runs.execute_run(out/prepare.folder)
    assert not (out/prepare.folder/"result.json").exists()


def test_fault_retry_failed(tiny_out, tiny_yaml, tmp_path):
    "`--retry-failed` with nothing that failed is refused; what was killed counts as failed; a report is never promised that is not there."
    out = tmp_path/"out"; shutil.copytree(tiny_out, out)
    planned = runs.plan(runs.read_study(tiny_yaml))
    one_line(uad("run", tiny_yaml, "--out", out, "--retry-failed"), "no run of this study failed", "--retry-failed")
    for r in planned[2:]: (out/r.folder/"result.json").unlink()
    for r in planned[2:]: (out/r.folder/"attempts.jsonl").unlink()
    runs.note_attempt(out/planned[2].folder, attempt=1, event="start")
    assert [r.stage for r in engines.failed_again(out, planned)] == ["prepare", "train", "evaluate", "report"]
    (out/planned[1].folder/"result.json").unlink(); (out/planned[1].folder/"error.txt").write_text("bad luck")
    assert [r.stage for r in engines.failed_again(out, planned)] == ["prepare", "train", "evaluate", "report"]
    (out/planned[1].folder/"error.txt").unlink(); (out/planned[1].folder/"attempts.jsonl").unlink()             # a training that never began is not one that failed
    with mock.patch.object(engines, "failed_again", lambda out, planned: planned[:1]): assert engines.run_study(runs.read_study(tiny_yaml), out, only_failed=True) == []


def test_an_evaluation_of_other_weights_is_not_done(tiny_out, tiny_yaml, tmp_path):
    "A training that was made again, with other weights, is judged again."
    out = tmp_path/"out"; shutil.copytree(tiny_out, out)
    planned = runs.plan(runs.read_study(tiny_yaml))
    r = read_json(out/planned[1].folder/"result.json", runs.RESULT); r.pop("format")
    r["results"]["checkpoint_sha256"] = "0" * 64
    write_json(out/planned[1].folder/"result.json", r, runs.RESULT)
    assert [runs.done(out, r) for r in planned] == [True, True, False, True]


def test_lock_is_seen_by_all_and_hinders_nobody(tmp_path):
    "Whether somebody works on a run: many may look at the same time, also where they cannot write."
    assert not engines.at_work(tmp_path) and not list(tmp_path.iterdir())
    with FileLock(tmp_path/".lock"): assert engines.at_work(tmp_path)
    import fcntl
    with open(tmp_path/".lock") as f:
        fcntl.flock(f, fcntl.LOCK_SH)                                       # another looker
        assert not engines.at_work(tmp_path)


def test_fault_torn_line_of_attempts(tmp_path):
    (tmp_path/"attempts.jsonl").write_text('{"attempt": 1, "event": "st')
    with runs._attempt(tmp_path) as n: pass
    assert n == 1 and [a["how"] for a in runs.attempts(tmp_path)] == ["done"]


def test_kill_the_driver_softly(tiny_out, tmp_path):
    "SIGTERM to `uad run` does what Ctrl-C does; the training saves its state, the next call goes on from there."
    (tmp_path/"long.yaml").write_text(TINY.replace("steps: 12", "steps: 5000").replace("checkpoint_minutes: 0", "checkpoint_minutes: 60"))
    prepared, out = next(tiny_out.glob("prepare-*")), tmp_path/"out"
    shutil.copytree(prepared, out/prepared.name)
    driver = subprocess.Popen(command("run", "long.yaml", "--out", "out"), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})      # relative, as people type it
    wait_for(lambda: any(json.loads(p.read_text())["done"] > 2 for p in out.glob("train-*/progress.json")))
    folder = next(out.glob("train-*"))
    with pytest.raises(UadError, match="another `uad` command works there"), runs.out_folder(out): pass       # a second driver is refused
    driver.send_signal(signal.SIGTERM)
    said, error = driver.communicate(timeout=90)
    assert driver.returncode == 130 and error == "stopped: run the same command again to go on\n" and "trainings save their state" in said
    step = read_checkpoint(folder/"last.pt")["step"]
    assert step > 2 and runs.attempts(folder)[-1]["how"] == "stopped"
    states = {s.stage: s.state for s in engines.states(out)}
    assert states == dict(prepare="done", train="stopped", evaluate="waiting", report="waiting")


def test_many_finished_runs_are_skipped_without_work(tmp_path):
    "A study of some 200 runs that are all done: planned, found done and skipped, without starting a process or asking for a GPU."
    models = ", ".join(f"{{name: ae, label: m{i}, train: {{seed: {i}}}}}" for i in range(10))
    (tmp_path/"many.yaml").write_text(f"format: uad-study/1\ndata: {{contrasts: [T2w], folds: 10, n_train: 20, n_val: 2}}\nmodels: [{models}]\n")
    study, out = runs.read_study(tmp_path/"many.yaml"), tmp_path/"out"
    planned = runs.plan(study)
    assert len(planned) == 202
    for r in planned: write_json(out/r.folder/"result.json", dict(key=r.key, results={}, provenance=dict(seconds=1)), runs.RESULT)
    seen = []
    with mock.patch.object(runs, "start_run", side_effect=AssertionError), mock.patch.object(engines, "resolve_engine", side_effect=AssertionError), mock.patch.object(engines, "publish"):
        engines.run_study(study, out, on_event=lambda kind, run, info: seen.append(kind))
    assert seen == ["planned"] + ["skipped"] * 202 and {s.state for s in engines.states(out)} == {"done"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_kill_points_through_papermill(training, seed):
    "SIGKILL to the run's process or its kernel at a random moment, again and again, until an attempt gets through."
    study, run, out, undisturbed = training
    draw, folder, killed = random.Random(seed), out/run.folder, 0
    long = read_json(undisturbed/"result.json", runs.RESULT)["provenance"]["seconds"]
    while not (folder/"result.json").exists():
        p, end = runs.start_run(out, run, 1), time.monotonic() + (draw.uniform(0, .8 * long) if killed < 3 else 600)
        while time.monotonic() < end and p.poll() is None: time.sleep(.02)
        if p.poll() is None:
            family = [psutil.Process(p.pid), *psutil.Process(p.pid).children(recursive=True)]
            family[-1 if draw.random() < .5 else 0].kill(); killed += 1
        p.wait(240)
    assert killed and read_json(folder/"result.json", runs.RESULT)["attempts"][-1]["how"] == "done"
    same_training(folder, undisturbed)
