"Whole runs: from a YAML file to the report, again for free, killed and resumed."
import json, os, re, shutil, signal, subprocess, time
from pathlib import Path
import pandas as pd, pytest
from filelock import FileLock
from conftest import TINY, command, one_line, uad
from uad_study import cli, engines, runs
from uad_study.cohort import FORMAT
from uad_study.core import UadError, file_sha256, write_json
from uad_study.results import TABLE_COLUMNS


def result(out, stage): return json.loads(next(out.glob(f"{stage}-*/result.json")).read_text())


def test_report_and_table(tiny_out):
    t = pd.read_csv(tiny_out/"table.csv")
    assert list(t.columns) == TABLE_COLUMNS and set(t.pathology) == {"tumour", "ms"} and {"ddpm", "perfect map"} == set(t.model)
    assert {"l1", "ssim_ens", "ssim_uniform", "ssim_0.3", "truth", "truth_0.9"} <= set(t.score)
    own = t[t.model == "ddpm"]
    assert (own.threshold_from == "val").all() and own.dice.between(0, 1).all() and (own.oracle_dice >= own.dice - .05).all()
    page = (tiny_out/"report.html").read_text()
    assert page.count("data:image/png;base64,") >= 3 and not re.search(r"(src|href)=['\"]?https?:", page)
    assert "Under-trained" in page and "Virtual cohort" in page and "12" in page and "perfect map" in page


def test_case_rows(tiny_out):
    c = pd.read_csv(tiny_out/"cases.csv")
    assert not c.duplicated(["model", "pathology", "score", "fold", "subject_id", "threshold_from"]).any()
    tumour = c[(c.pathology == "tumour") & (c.model == "ddpm") & (c.score == "l1")]
    assert set(tumour.threshold_from) == {"val", "val:ms", "healthy", "healthy:1%", "healthy:5%", "healthy:10%", "val, components inside", "oracle"} and tumour.subject_id.nunique() == 2
    assert (c[c.pathology == "healthy"].lesion_ml == 0).all() and c[c.pathology == "healthy"].dice.isna().all()


def test_provenance_names_no_place(tiny_out):
    r = result(tiny_out, "train")
    assert r["provenance"]["packages"]["torch"] and r["provenance"]["seconds"] > 0 and r["results"]["best_step"] in (4, 8, 12)
    everything = re.sub(r"base64,[^'\"]+", "", (tiny_out/"report.html").read_text()) + "".join(p.read_text() for name in ("result.json", "notebook.ipynb") for p in tiny_out.glob(f"*/{name}"))
    everything = re.sub(r'"image/png": "[^"]+"', "", everything)
    assert len(everything) > 5000 and str(tiny_out) not in everything and str(Path.home()) + "/" not in everything
    assert not re.search(rf"\b{re.escape(os.uname().nodename)}\b", everything)


def test_results_say_what_they_were_made_from(tiny_out):
    e, cohort = result(tiny_out, "evaluate"), file_sha256(next(tiny_out.glob("prepare-*/cohort/cohort.json")))
    assert e["results"]["cohort_sha256"] == e["cohort"] == result(tiny_out, "train")["cohort"] == cohort
    assert e["results"]["checkpoint_sha256"] == file_sha256(next(tiny_out.glob("train-*/best.pt"))) and e["provenance"]["threads"] >= 1 and e["provenance"]["device"] == "cpu"


def test_executed_notebook_ran_with_its_parameters(tiny_out):
    folder = next(tiny_out.glob("train-*"))
    notebook = json.loads((folder/"notebook.ipynb").read_text())
    assert notebook["metadata"]["papermill"]["parameters"]["train_config"]["steps"] == 12
    assert any("image/png" in o.get("data", {}) for c in notebook["cells"] for o in c.get("outputs", []))


def test_again_is_free(tiny_out, tiny_yaml):
    before, page = {p: p.stat().st_mtime_ns for p in tiny_out.rglob("result.json")}, (tiny_out/"report.html").read_bytes()
    (tiny_out/"report.html").unlink()
    r = uad("run", tiny_yaml, "--out", tiny_out, cwd=tiny_yaml.parent)
    assert r.returncode == 0 and r.stdout.count("done already") == 4, r.stdout + r.stderr
    assert before == {p: p.stat().st_mtime_ns for p in tiny_out.rglob("result.json")}
    assert (tiny_out/"report.html").read_bytes() == page                     # what was deleted is there again
    dry = uad("run", tiny_yaml, "--out", tiny_out, "--dry-run")
    assert dry.stdout.count("done ") == 4 and "to do" not in dry.stdout


def test_status_and_report_again(tiny_out):
    assert uad("status", tiny_out).stdout.count("done ") == 4
    old = (tiny_out/"table.csv").read_bytes()
    (tiny_out/"table.csv").unlink()
    assert uad("report", tiny_out).returncode == 0 and (tiny_out/"table.csv").read_bytes() == old


def test_clean_keeps_what_the_study_needs(tiny_out, tiny_yaml, tmp_path):
    out = tmp_path/"out"
    shutil.copytree(tiny_out, out, ignore=shutil.ignore_patterns("*.npy", "*.pt"))
    (out/"train-old").mkdir(); (out/"train-old"/"run.json").write_text("{}"); (out/"mine").mkdir()
    (out/"train-busy").mkdir(); (out/"train-busy"/"run.json").write_text('{"train_dir": "../train-read"}'); (out/"train-read").mkdir(); (out/"train-read"/"run.json").write_text("{}")
    with FileLock(out/"train-busy"/".lock"): r = uad("clean", out, "--study", tiny_yaml, "--yes")                # a cluster's job is at it
    assert (out/"train-busy").exists() and (out/"train-read").exists() and "at work, or needed there: " in r.stdout
    assert r.returncode == 0 and "train-old" in r.stdout and not (out/"train-old").exists() and (out/"mine").exists() and len(list(out.glob("*/result.json"))) == 4


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition(): return True
        time.sleep(.02)
    return False


def test_kill_and_resume(tiny_out, tiny_yaml, tmp_path):
    "kill -9 of the driver in the middle of the training: its runs stop too, the next call goes on, and the numbers are those of the uninterrupted study."
    out = tmp_path/"out"
    study = tmp_path/"tiny.yaml"; study.write_text(tiny_yaml.read_text())
    shutil.copytree(next(tiny_out.glob("prepare-*")), out/next(tiny_out.glob("prepare-*")).name)
    driver = subprocess.Popen(command("run", study, "--out", out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert wait_for(lambda: list(out.glob("train-*/last.pt")), 90)
    driver.send_signal(signal.SIGKILL); driver.wait()
    folder = next(out.glob("train-*"))
    assert not (folder/"result.json").exists()
    assert wait_for(lambda: not subprocess.run(["pgrep", "-f", str(out)], capture_output=True).stdout, 20), "the killed driver's run went on"
    r = uad("run", study, "--out", out)
    assert r.returncode == 0 and "done already  prepare" in r.stdout, r.stdout + r.stderr
    assert (out/"table.csv").read_bytes() == (tiny_out/"table.csv").read_bytes()
    assert not [p for p in out.rglob("*") if ".tmp-" in p.name], "half-written files are left"


def test_ctrl_c(tiny_out, tiny_yaml, tmp_path):
    "Ctrl-C in the middle of the training: one line that says how to go on, an exit code, nobody left at work."
    out = tmp_path/"out"
    (tmp_path/"long.yaml").write_text(TINY.replace("steps: 12", "steps: 5000"))
    prepared = next(tiny_out.glob("prepare-*"))
    shutil.copytree(prepared, out/prepared.name)
    driver = subprocess.Popen(command("run", tmp_path/"long.yaml", "--out", out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
                              preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert wait_for(lambda: list(out.glob("train-*/last.pt")), 90)
    driver.send_signal(signal.SIGINT)
    assert driver.communicate(timeout=30)[1] == "stopped: run the same command again to go on\n" and driver.returncode == 130
    assert wait_for(lambda: not subprocess.run(["pgrep", "-f", str(out)], capture_output=True).stdout, 20), "a run went on"


class Instant:
    "Stands for the process of a run that ended well at once."
    pid = returncode = 0
    def poll(self): return 0


@pytest.fixture
def instant(monkeypatch):
    "Runs that take no time. Gives the labels of those that ran, and the list of subjects that the next preparation loses."
    ran, lost = [], []
    def start(out, run, threads, gpus=""):
        folder, results = out/run.folder, {}
        ran.append(run.label)
        if run.stage == "prepare":
            write_json(folder/"cohort"/"cohort.json", dict(failed=list(lost)), FORMAT)
            results = dict(failed=len(lost), source=run.parameters["data_config"]["source"])
        if run.stage == "report":
            for name in ("report.html", "interactive.html", "table.csv", "cases.csv", "cases.parquet", "judgement.json", "provenance.json", "figures/a.png", "tables/a.tex"): write_json(folder/run.parameters["out_dir"]/name, dict(title=run.parameters["title"]), "x")
        write_json(folder/"result.json", dict(key=run.key, cohort=json.loads((folder/"run.json").read_text())["cohort"], results=results), runs.RESULT)
        return Instant()
    monkeypatch.setattr(runs, "start_run", start)
    return ran, lost


def test_the_report_is_of_the_study_that_ran_last(instant, tmp_path):
    "A, then B with another title, then A again: nothing is left to do, and OUT shows A."
    out = tmp_path/"out"
    for name in "ab": (tmp_path/f"{name}.yaml").write_text(TINY.replace("A tiny study", f"Study {name}"))
    for name in "aba":
        engines.run_study(runs.read_study(tmp_path/f"{name}.yaml"), out)
        for file in ("report.html", "interactive.html", "table.csv", "cases.csv", "cases.parquet", "judgement.json", "provenance.json", "figures/a.png", "tables/a.tex"): assert f"Study {name}" in (out/file).read_text()
        newest = runs.planned_report(out)          # what `uad report` takes
        assert json.loads(newest.read_text())["parameters"]["title"] == f"Study {name}"
    assert len(instant[0]) == 5
    shutil.rmtree(newest.parent/"figures")
    with pytest.raises(UadError, match="figures: is missing: delete the folder report-"): engines.run_study(runs.read_study(tmp_path/"a.yaml"), out)


@pytest.fixture
def real(tmp_path):
    "A study of real scans, and a folder of stand-ins for them."
    (tmp_path/"real.yaml").write_text(TINY.split("data:")[0] + "data: {source: real_t1, contrasts: [T1w], folds: 1}\n" + TINY[TINY.index("models:"):])
    rows = [(f"h{i}_{k}", "healthy", "T1w", k, f"h{i}") for i in range(4) for k in ("image", "brainmask")] + [(f"s{i}", "stroke", "T1w", "lesion_mask", f"s{i}") for i in range(4)]
    (tmp_path/"data").mkdir()
    for r in rows: (tmp_path/"data"/r[0]).write_text(r[0])
    pd.DataFrame(rows, columns=["file", "category", "modality", "kind", "subject"]).to_csv(tmp_path/"data"/"manifest.csv", index=False)
    return runs.read_study(tmp_path/"real.yaml"), tmp_path/"data"


def test_a_failed_subject_is_told_and_tried_again(instant, real, tmp_path, capsys):
    (study, data), (ran, lost), out = real, instant, tmp_path/"out"
    lost.append("h2: cannot be read")
    with pytest.raises(UadError, match="1 subject failed .* run again"): cli._run(tmp_path/"real.yaml", data, out, False, "local", False)
    said = capsys.readouterr().out
    assert "h2: cannot be read" in said and "report.html" in said and len(ran) == 4           # the rest of the study ran
    assert engines.run_study(study, out, data) == lost and len(ran) == 5                          # prepared again; the same cohort, so nothing else
    lost.clear()
    assert engines.run_study(study, out, data) == [] and len(ran) == 9                            # mended: everything again ...
    assert len(list(out.glob("train-*-cohort-*/result.json"))) == 1                            # ... and the old training was put aside, not lost
    assert engines.run_study(study, out, data) == [] and len(ran) == 9


def test_a_scan_that_changes_makes_another_key(real):
    study, data = real
    keys = [[r.key for r in runs.plan(study, data)]]
    for change in (lambda: (data/"h1_image").write_text("h1_imagE"), lambda: (data/"s3").unlink(), lambda: (data/"s3").write_text("s3")):
        change(); keys.append([r.key for r in runs.plan(study, data)])
    assert keys[1] == keys[3] and not set(keys[0]) & set(keys[1]) and not set(keys[1]) & set(keys[2])
