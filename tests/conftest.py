"Shared by the tests: `uad` as a user calls it, and one tiny study that runs once."
import os, subprocess, sys
from pathlib import Path
import numpy as np, pytest

TINY = """format: uad-study/1
title: "A tiny study"
data: {source: virtual, contrasts: [T2w], folds: 1, n_train: 3, n_val: 1, n_test: 1, n_lesion_val: 1, n_lesion_test: 2}
models:
  - {name: ddpm, channels: [16, 32], num_res_blocks: 1, num_head_channels: 32, norm_num_groups: 16, patch: 4}
train: {steps: 12, batch_size: 4, lr: 0.001, val_every: 4, val_slices: 8, snapshots: [4], checkpoint_minutes: 0}
scores: {names: [intensity, l1, ssim_0.3, ssim_0.9, ssim_1.7, ssim_uniform, ssim_ens]}
report: {steps_val: 1, steps_test: 1, post_val: 1, post_test: 1, medians: [1, 5], erosions: [3]}
engine: {threads: 1}
"""


LONG = ("test_run_faults.py", "test_judge.py", "test_models.py", "test_browser.py", "test_study.py", "test_dataset.py", "test_scan.py", "test_realdata.py", "test_shipped.py", "test_mahalanobis.py", "test_faults.py")


def pytest_collection_modifyitems(items):
    "The longest files first, so that of two workers (`pytest -n 2 --dist loadfile --no-loadscope-reorder`) none is left alone with one at the end."
    rank = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONG)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    "One thread for each test and its fixtures, whatever a test before it did: what sums round to depends on it, and Numba's first parallel loop (in opensimplex) sets PyTorch's number."
    if torch := sys.modules.get("torch"): torch.set_num_threads(1)


def command(*args): return [sys.executable, "-c", "from uad_study.cli import main; main()", *map(str, args)]


def uad(*args, cwd=None, timeout=500):
    "Run `uad ARGS` in a process of its own, from a folder that is not the checkout."
    return subprocess.run(command(*args), capture_output=True, text=True, cwd=cwd, timeout=timeout, env=os.environ | {"OMP_NUM_THREADS": "1"})


def one_line(result, *words):
    "Assert that a command failed with one clear line on stderr that holds `words`."
    assert result.returncode != 0, result.stdout
    lines = [l for l in result.stderr.splitlines() if l.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for w in words: assert w in lines[0], (w, lines[0])


@pytest.fixture(scope="session")
def tiny_yaml(tmp_path_factory):
    p = tmp_path_factory.mktemp("study")/"tiny.yaml"
    p.write_text(TINY)
    return p


@pytest.fixture(scope="session")
def tiny_out(tiny_yaml):
    "The results of the tiny study, run by `uad run`."
    out = tiny_yaml.parent/"out"
    r = uad("run", tiny_yaml, "--out", out, cwd=tiny_yaml.parent)
    assert r.returncode == 0, r.stderr + r.stdout
    return out


def pair(seed=0, shape=(24, 20, 16), dtype=np.float64):
    "A volume with smooth and with rough parts, and a reconstruction of it."
    rng = np.random.default_rng(seed)
    x = rng.random(shape)
    x[: shape[0] // 2] = x[: shape[0] // 2] * .05 + .6
    x[:, : shape[1] // 4] = 0
    return x.astype(dtype), np.clip(x * .9 + .1 * rng.random(shape) * (x > 0), 0, 1).astype(dtype)
