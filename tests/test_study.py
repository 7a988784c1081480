"Whole runs: from a YAML file to the report, again for free, killed and resumed."
import json, os, re, shutil, signal, subprocess, time
from pathlib import Path
import pandas as pd, pytest
from conftest import command, one_line, uad
from uad_study.report import TABLE_COLUMNS


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
    assert set(tumour.threshold_from) == {"val", "val:ms", "healthy", "oracle"} and tumour.subject_id.nunique() == 2
    assert (c[c.pathology == "healthy"].lesion_ml == 0).all() and c[c.pathology == "healthy"].dice.isna().all()


def test_provenance_names_no_place(tiny_out):
    r = result(tiny_out, "train")
    assert r["provenance"]["packages"]["torch"] and r["provenance"]["seconds"] > 0 and r["results"]["best_step"] in (4, 8, 12)
    everything = re.sub(r"base64,[^'\"]+", "", (tiny_out/"report.html").read_text()) + "".join(p.read_text() for p in tiny_out.glob("*/result.json"))
    assert len(everything) > 5000 and str(tiny_out) not in everything and str(Path.home()) + "/" not in everything
    assert not re.search(rf"\b{re.escape(os.uname().nodename)}\b", everything)


def test_executed_notebook_ran_with_its_parameters(tiny_out):
    folder = next(tiny_out.glob("train-*"))
    notebook = json.loads((folder/"notebook.ipynb").read_text())
    assert notebook["metadata"]["papermill"]["parameters"]["train_config"]["steps"] == 12
    assert any("image/png" in o.get("data", {}) for c in notebook["cells"] for o in c.get("outputs", []))


def test_again_is_free(tiny_out, tiny_yaml):
    before = {p: p.stat().st_mtime_ns for p in tiny_out.rglob("result.json")}
    r = uad("run", tiny_yaml, "--out", tiny_out, cwd=tiny_yaml.parent)
    assert r.returncode == 0 and r.stdout.count("done already") == 4, r.stdout + r.stderr
    assert before == {p: p.stat().st_mtime_ns for p in tiny_out.rglob("result.json")}
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
    r = uad("clean", out, "--study", tiny_yaml, "--yes")
    assert r.returncode == 0 and "train-old" in r.stdout and not (out/"train-old").exists() and (out/"mine").exists() and len(list(out.glob("*/result.json"))) == 4


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition(): return True
        time.sleep(.2)
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
