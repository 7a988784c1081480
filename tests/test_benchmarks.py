"The benchmarks run, compare results first, and refuse what is not there; their figures are nobody's test."
import os, subprocess, sys
from pathlib import Path
import pytest
from conftest import one_line

FOLDER = Path(__file__).resolve().parents[1]/"benchmarks"


def run(name, *args, **env): return subprocess.run([sys.executable, FOLDER/name, *args], capture_output=True, text=True, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1"} | env)


def test_rows_compare_results_before_they_are_timed():
    kept = (FOLDER/"bench.md").read_text()
    r = run("bench.py", "--rows", "median", "simplex", "--rounds", "1", "--least", "0")
    assert r.returncode == 0, r.stderr
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in r.stdout.splitlines()[2:]]
    assert len(rows) == 3 and rows[0][-1] == "equal" and "on the same gradients" in rows[1][-1]
    for _, _, ours, theirs, ratio, _, bar, met, _ in rows: assert float(ratio) == pytest.approx(float(theirs) / float(ours), rel=.1) and met == ("" if not bar else "yes" if float(theirs) / float(ours) >= float(bar) else "**no**")
    assert (FOLDER/"bench.md").read_text() == kept                                         # some rows do not replace the table


def test_a_row_whose_results_differ_is_not_timed(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import bench
    def same(a, b): assert a == b
    with pytest.raises(AssertionError): bench.race(bench.Row("a", "b", lambda: 1, lambda: 2, same), 1)
    def line(ours, theirs, bar): return bench.Measured("a", "b", bench.np.array(ours), bench.np.array(theirs), "equal", bar).line()
    assert "| 2.00 | 1.50 to 2.50 of 3 | 1.9 | yes |" in line([1., 2., 3.], [3., 4., 3.], 1.9)        # the rounds' ratios are 3, 2 and 1
    assert "| 1.29 |" in line([1.], [1.299], 1.3) and "| **no** |" in line([1.], [1.299], 1.3) and "| 9.9 |" in line([1.], [9.97], 10)
    with pytest.raises(AssertionError): bench.judge.agree(*(bench.np.full((2, 3), v) for v in (.5, .6)))


def test_gpu_benchmark_runs_small_on_a_cpu():
    r = run("gpu.py", "--smoke", CUDA_VISIBLE_DEVICES="")
    assert r.returncode == 0, r.stderr
    for w in ("copy bandwidth", "bf16 matrix product", "of the matrix rate", "MONAI's loop, mixed precision", "share of a step", "SSIM-ens"): assert w in r.stdout


def test_gpu_benchmark_without_a_gpu(): one_line(run("gpu.py", CUDA_VISIBLE_DEVICES=""), "no GPU", "--smoke")


def test_operations_of_the_paper_model(monkeypatch):
    "149 GFLOP a slice forward by MONAI's network, counted by hand in the design, 142 by ours, which convolves before it copies; backward is twice that."
    monkeypatch.syspath_prepend(FOLDER)
    import gpu, peers
    from uad_study.models import model_config
    for more, expected in (((peers.MonaiDenoiser,), 149e9), ((), 149e9 - 5 / 9 * 18 * 256**2 * (48**2 + 96**2))): assert gpu.step_flop(model_config("ddpm"), 2, *more) / 2 / 3 == pytest.approx(expected, rel=.005)


def test_cost_tables_are_those_of_their_figures(monkeypatch):
    "growth.md says what growth.json holds, a point of a table can be measured, and an unknown table is refused."
    import json
    monkeypatch.syspath_prepend(FOLDER)
    import growth
    kept = json.loads((FOLDER/"growth.json").read_text())
    assert (FOLDER/"growth.md").read_text() == growth.written(kept) and set(kept) == set(growth.POINTS)
    for name, points in growth.POINTS.items(): assert list(kept[name]["points"]) == list(map(str, points))
    point = json.loads(run("growth.py", "--point", "sigmas", "2").stdout)
    assert point["ens"]["seconds"] > 0 and point["ens"]["mb"] >= 0
    r = run("growth.py", "sizzes")
    assert r.returncode and "no table" in r.stderr
