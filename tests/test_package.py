"The package as others meet it: installed from a wheel, imported by name, quick to answer."
import importlib, inspect, os, re, subprocess, sys, sysconfig, time
from pathlib import Path
import pytest
from conftest import uad

ROOT = Path(__file__).resolve().parents[1]


def test_wheel_works_elsewhere(tmp_path):
    "The wheel (by way of the sdist) in an environment of its own, without the checkout. Its dependencies are lent from this one."
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "-o", tmp_path, ROOT], check=True, capture_output=True, timeout=200)
    wheel = next(tmp_path.glob("*.whl"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path/"venv"], check=True)
    python = tmp_path/"venv"/"bin"/"python"
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    site = next((tmp_path/"venv"/"lib").glob("python*/site-packages"))
    (site/"lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    def call(*a): return subprocess.run([tmp_path/"venv"/"bin"/"uad", *a], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=100)
    where = subprocess.run([python, "-c", "import uad_study; print(uad_study.__file__)"], capture_output=True, text=True, cwd=tmp_path, env=env).stdout
    assert str(tmp_path) in where
    assert "--train" in call("demo", "--help").stdout
    r = call("run", "demo", "--dry-run")
    assert r.returncode == 0 and r.stdout.count("to do") == 6, r.stderr
    assert call("manifest", "check", "IXI", "--split", "published").returncode == 1
    for name in ("experiments/train.ipynb", "studies/paper.yaml", "data_manifests/IXI.csv", "data_manifests/IXI.json", "schemas/judgement-1.schema.json", "explore.ipynb", "labs.ipynb"): assert (site/"uad_study"/name).is_file(), name


def test_help_is_quick():
    def once():
        t = time.perf_counter(); assert uad("--help").returncode == 0
        return time.perf_counter() - t
    assert min(once() for _ in range(5)) < .5
    from uad_study.runs import packaged_studies
    told = re.sub(r"\s", "", uad("run", "--help").stdout)
    assert not [s for s in packaged_studies() if not re.search(rf"[(,]{s}[,)]", told)]
    for c in ("demo", "run", "status", "report", "score", "clean", "explore", "manifest"): assert uad(c, "--help").returncode == 0


@pytest.mark.parametrize("module, without", [("scores", "monai nibabel nilearn matplotlib scipy pandas"), ("metrics", "monai nibabel nilearn matplotlib pandas"), ("postprocess", "torch monai"), ("phantom", "torch monai"), ("models", "monai"), ("train", "monai")])
def test_imports_leave_out_what_is_not_needed(module, without):
    code = f"import sys, uad_study.{module}; print(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert "numpy" in r.stdout.split() and not set(without.split()) & set(r.stdout.split())


def parameters(path):
    module, name = path.rsplit(".", 1)
    return list(inspect.signature(getattr(importlib.import_module("uad_study." + module), name)).parameters)


@pytest.mark.parametrize("path, names", [
    ("noise.simplex_noise", "n size octaves persistence frequency generator device"), ("scores.l1_map", "x x_hat"), ("scores.ssim_map", "x x_hat sigma data_range"),
    ("scores.ssim_ens", "x x_hat sigmas data_range"), ("postprocess.postprocess", "score brain_mask erode median"), ("postprocess.components", "mask min_voxels connectivity"),
    ("metrics.dice", "pred truth"), ("metrics.auprc", "scores labels"), ("metrics.best_threshold", "scores labels")])
def test_fixed_face(path, names): assert parameters(path)[:len(names.split())] == names.split()


def test_fixed_names():
    from uad_study.models import MODELS
    from uad_study.phantom import PATHOLOGIES
    from uad_study.scores import SCORES, SIGMAS
    assert {"ddpm", "ddpm_gaussian"} <= set(MODELS) and set(PATHOLOGIES) == {"tumour", "ms", "stroke", "wmh"} and SIGMAS == (.3, .5, .7, .9, 1.1, 1.3, 1.5, 1.7)
    assert {"intensity", "l1", "l2", "ssim_0.3", "ssim_1.7", "ssim_ens", "ssim_uniform"} <= set(SCORES)


def test_rooms_import_only_rooms_above():
    "House rule: a room imports only rooms above it."
    rooms = {p.stem.split("_", 1)[1]: int(p.stem[:2]) for p in (ROOT/"nbs").glob("[0-9]*.ipynb")}
    for name, number in rooms.items():
        source = (ROOT/"uad_study"/f"{name}.py").read_text()
        for other in re.findall(r"^\s*from \.(\w+) import|^\s*from uad_study\.(\w+) import", source, re.M):
            other = other[0] or other[1]
            assert rooms[other] < number, f"{name} imports {other}"


def test_nothing_of_the_workshop_is_in_the_repo():
    files = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True).stdout.split()
    assert files and not [f for f in files if f.endswith((".nii", ".nii.gz", ".pt", ".npz"))]
    sizes = {f: (ROOT/f).stat().st_size for f in files if (ROOT/f).is_file()}
    assert not [f for f, n in sizes.items() if n > 1_000_000 and not f.startswith("uad_study/checkpoints/")]
    assert sum(n for f, n in sizes.items() if f.startswith("uad_study/checkpoints/")) < 12e6


def test_stored_notebooks_are_small_and_fresh():
    "Stored outputs of the library notebooks: figures, no widget state, no errors, no warnings; explore.ipynb and the experiments hold none."
    import json
    for p in sorted((ROOT/"nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in p.parts: continue
        nb = json.loads(p.read_text())
        outputs = [o for c in nb["cells"] for o in c.get("outputs", [])]
        assert "widgets" not in nb["metadata"] and p.stat().st_size < 500_000, p
        assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"], p
        assert p.name[:2].isdigit() or not outputs, p
