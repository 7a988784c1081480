"The core (virtual cohort, training, restoration, judging) runs on a machine that has little more than torch and MONAI, as GPU machines often do."
import importlib.metadata as md, re, subprocess, sys
from pathlib import Path

CORE = ["torch", "monai", "numpy", "scipy", "pandas", "nibabel", "nilearn", "einops", "dacite"]          # einops: MONAI's U-Net needs it; dacite: our configs

def with_what_they_need(names) -> set[str]:
    "Distributions by name, and those that pip would install with them."
    todo, found = list(names), set()
    while todo:
        try: d = md.distribution(todo.pop())
        except md.PackageNotFoundError: continue
        name = re.sub(r"[-_.]+", "-", d.name).lower()
        if name in found: continue
        found.add(name)
        todo += [re.match(r"[\w.-]+", r)[0] for r in d.requires or [] if "extra ==" not in r]
    return found

def site_of(distributions, folder: Path):
    "A site folder with these distributions and no others, of links to the installed ones."
    folder.mkdir()
    for d in map(md.distribution, distributions):
        for top in {Path(f).parts[0] for f in d.files or [] if Path(f).parts[0] not in ("..", "__pycache__")}:
            if not (folder/top).exists(): (folder/top).symlink_to(d.locate_file(top))
    return folder

SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from uad_study.cohort import Cohort, DataConfig, build_virtual
from uad_study.evaluate import ReportConfig, evaluate_training
from uad_study.judge import ScoreConfig
from uad_study.models import DDPMConfig
from uad_study.train import TrainConfig, train
out = Path(sys.argv[1])
build_virtual(DataConfig(contrasts=("T2w",), pathologies=("tumour",), folds=1, n_train=2, n_val=1, n_test=1, n_lesion_val=1, n_lesion_test=2), out/"cohort")
cohort = Cohort(out/"cohort")
train(cohort, "T2w", 0, DDPMConfig(channels=(16, 32), num_res_blocks=1, num_head_channels=16, norm_num_groups=16, patch=4), TrainConfig(steps=4, batch_size=2, val_every=2, val_slices=4), out/"train")
tables = evaluate_training(cohort, "T2w", 0, out/"train", out/"evaluate", ScoreConfig(names=("l1", "ssim_ens")), report=ReportConfig(0, 0, 0))
print(tables["cases"].dice.max())
"""

def test_core_runs_with_few_packages(tmp_path):
    site = site_of(with_what_they_need(CORE), tmp_path/"site")
    assert not any((site/m).exists() for m in ("pyarrow", "skimage", "yaml", "papermill", "lightning_fabric", "cc3d", "psutil"))
    r = subprocess.run([sys.executable, "-S", "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, env={"PYTHONPATH": f"{site}:{Path(__file__).parents[1]}", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"})
    assert r.returncode == 0, r.stderr[-3000:]
    assert 0 <= float(r.stdout.split()[0]) <= 1
