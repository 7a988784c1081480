"A study on a real SLURM of one node: the same table as at home, and what a cluster does to jobs."
import json, shutil, subprocess
import pandas as pd, pytest
from cluster import drained, empty_queue, jobs, logs, sh, slurm, state, step, until, write_study
from conftest import command, one_line, uad

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


@pytest.fixture(scope="session")
def at_home(tmp_path_factory):
    "The table of a study by the local engine: at_home(steps) -> text of table.csv."
    made = {}
    def table(steps=12):
        if steps not in made:
            p = write_study(tmp_path_factory.mktemp("home"), steps)
            r = uad("run", p, "--out", p.parent/"out")
            assert r.returncode == 0, r.stderr
            made[steps] = (p.parent/"out"/"table.csv").read_text()
        return made[steps]
    return table


def submit(path, *args):
    r = uad("run", path, "--out", path.parent/"out", "--engine", "slurm", *args)
    assert r.returncode == 0, r.stderr
    return path.parent/"out", r.stdout


def test_a_study_on_slurm_is_bitwise_the_local_one(slurm, tmp_path, at_home):
    path = write_study(tmp_path)
    dry = uad("run", path, "--out", tmp_path/"out", "--engine", "slurm", "--dry-run")
    assert dry.returncode == 0 and not (tmp_path/"out").exists() and "aftercorr" not in dry.stdout and "after afterok:train" in dry.stdout
    out, said = submit(path)
    assert f"uad status {out}" in said and "scancel" in said
    status = uad("status", out).stdout
    assert "queued" in status and "waits for the runs it needs" in status
    one_line(uad("run", path, "--out", out), "in the queue of SLURM")                        # the local engine keeps out
    assert "nothing to submit" in submit(path)[1]                                            # a second submission while jobs live
    drained()
    assert (out/"table.csv").exists(), logs(out)
    assert (out/"table.csv").read_text() == at_home()
    assert (out/"report.html").exists() and set(l.split()[0] for l in uad("status", out).stdout.splitlines()) == {"done"}
    assert "nothing to submit" in submit(path)[1]
    assert str(tmp_path) not in (out/"jobs.json").read_text() + "".join(f.read_text() for f in out.glob("*/result.json"))
