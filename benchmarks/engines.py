"""What the machinery of runs costs on this machine: python benchmarks/engines.py. Writes benchmarks/engines.md."""
import json, os, subprocess, sys, tempfile, time
from pathlib import Path
from unittest import mock
import nbformat
from uad_study import engines, runs
from uad_study.core import write_json

TINY = """format: uad-study/1
data: {source: virtual, contrasts: [T2w], folds: 1, n_train: 3, n_val: 1, n_test: 1, n_lesion_val: 1, n_lesion_test: 1}
models: [{name: ae}]
train: {steps: 4, batch_size: 4, lr: 0.001, val_every: 4, val_slices: 8}
engine: {device: cpu, threads: 1}
"""
STEP = """import os, time, torch
from uad_study.models import build_model, model_config, placed
from uad_study.runs import read_study
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
e = read_study("demo").entries[0]
m = placed(build_model(model_config(e.model)), "cpu"); o = torch.optim.Adam(m.parameters(), fused=True); x = torch.rand(e.train["batch_size"], 1, 96, 96)
def step(): l = m.loss(x, torch.Generator().manual_seed(0)); o.zero_grad(); l.backward(); o.step()
step(); times = []
for _ in range(12): t = time.perf_counter(); step(); times.append(time.perf_counter() - t)
print(sorted(times)[6])"""


def clock(f):
    t = time.perf_counter(); f(); return time.perf_counter() - t


def skipping(d: Path) -> list:
    "202 finished runs, planned and skipped: in a process that has everything loaded, and as a command."
    models = ", ".join(f"{{name: ae, label: m{i}, train: {{seed: {i}}}}}" for i in range(10))
    (d/"many.yaml").write_text(f"format: uad-study/1\ndata: {{contrasts: [T2w], folds: 10, n_train: 20, n_val: 2}}\nmodels: [{models}]\n")
    planned = runs.plan(runs.read_study(d/"many.yaml"))
    for r in planned: write_json(d/"many"/r.folder/"result.json", dict(key=r.key, results={}, provenance=dict(seconds=1)), runs.RESULT)
    def again(): engines.run_study(runs.read_study(d/"many.yaml"), d/"many")
    with mock.patch.object(engines, "publish"): inside = min(clock(again) for _ in range(3))
    command = [sys.executable, "-c", "from uad_study import engines; engines.publish = lambda *a: None; from uad_study.cli import main; main()", "run", str(d/"many.yaml"), "--out", str(d/"many")]
    def from_shell(): assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.count("done already") == len(planned)
    return [(f"{len(planned)} finished runs planned and skipped, in a process", inside), ("the same as a command, with its imports", min(clock(from_shell) for _ in range(3)))]


def overhead(d: Path) -> list:
    "What a run costs beyond the cells of its notebook: process, kernel, papermill, checks, result."
    (d/"tiny.yaml").write_text(TINY)
    study, rows = runs.read_study(d/"tiny.yaml"), []
    for r in runs.plan(study):
        runs.write_run(d/"tiny", r, study, "cpu")
        seconds = clock(lambda: runs.start_run(d/"tiny", r, 1).wait())
        nb = nbformat.read(d/"tiny"/r.folder/"notebook.ipynb", 4)
        assert (d/"tiny"/r.folder/"result.json").exists(), r.label
        rows.append((f"{r.stage}: a run beyond its notebook's cells", seconds - sum(c.metadata.get("papermill", {}).get("duration") or 0 for c in nb.cells if c.cell_type == "code")))
    return rows


def threads() -> list:
    "A training step of the demo's DDPM (median of 12) with one and two threads, alone and beside a process that keeps one core busy; threads that wait spin as long as the library likes, or shortly, as in our runs."
    rows = []
    for beside in (False, True):
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if beside else None
        for n, spin in (1, {}), (2, {}), (2, {"GOMP_SPINCOUNT": "1000"}):
            env = os.environ | dict(OMP_NUM_THREADS=str(n)) | spin
            rows.append((f"training step, {n} thread{'s' * (n > 1)}{', spinning shortly' if spin else ''}{', beside a busy process' if beside else ''}",
                         float(subprocess.run([sys.executable, "-c", STEP], env=env, capture_output=True, text=True, check=True).stdout)))
        if other: other.kill(); other.wait()
    return rows


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as d: rows = [*skipping(Path(d)), *overhead(Path(d)), *threads()]
    p = runs.provenance()
    text = "\n".join(["# What the machinery of runs costs", "", f"`python benchmarks/engines.py`, {p['time'][:10]}, commit {str(p['commit'])[:12]}{' with changes' if p['dirty'] else ''}, {p['cores']} cores ({p['machine']}), torch {p['packages']['torch']}.",
                      "", "| what | seconds |", "|---|---|", *(f"| {what} | {s:.3g} |" for what, s in rows), ""])
    (Path(__file__).parent/"engines.md").write_text(text)
    print(text)
