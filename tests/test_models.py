"Several models and variants in one study; what only a GPU can show."
import dataclasses, json, re
import numpy as np, pandas as pd, pytest, torch
from conftest import one_line, uad
from uad_study.cohort import Cohort, Item, write_cohort
from uad_study.models import MODELS, model_config
from uad_study.results import open_results
from uad_study.train import TrainConfig, read_checkpoint, train, train_config
from uad_study.viewer import restored_models
from uad_study.volume import GRID_SHAPE

STUDY = """format: uad-study/1
data: {source: virtual, contrasts: [T2w], pathologies: [tumour], folds: 1, n_train: 2, n_val: 1, n_test: 1, n_lesion_val: 1, n_lesion_test: 2}
models:
  - {name: ddpm, channels: [16, 32], num_res_blocks: 1, num_head_channels: 32, norm_num_groups: 16, patch: 4, timesteps: 400}
  - {name: ae, label: "007", channels: [8, 16, 16], latent: 16, dropout: 0}
train: {steps: 6, batch_size: 2, lr: 0.001, val_every: 3, val_slices: 4}
scores: {names: [l1, ssim_0.9, ssim_ens]}
restore: {t_test: 200}
variants:
  - {restore: {t_test: 100}}
  - {label: small median, scores: {median: 3, masked: true}}
  - {of: "007", train: {ema: 0.9, augment: true, clip_norm: 1, lr_schedule: linear}}
report: {steps_val: 1, steps_test: 1, post_val: 1, post_test: 1, medians: [1], erosions: [3]}
"""
LABELS = ["ddpm", "007", "ddpm, t_test 100", "ddpm, small median", "007, lr_schedule linear, clip_norm 1.0, ema 0.9, augment True"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    p = tmp_path_factory.mktemp("variants")/"several.yaml"
    p.write_text(STUDY)
    r = uad("run", p, "--out", p.parent/"out", cwd=p.parent)
    assert r.returncode == 0, r.stderr + r.stdout
    return p.parent/"out"


def test_entries_share_what_they_can(out):
    results = {p.parent.name: json.loads(p.read_text()) for p in out.glob("*/result.json")}
    assert [sum(n.startswith(s) for n in results) for s in ("prepare", "train", "evaluate", "report")] == [1, 3, 5, 1]
    by = {r["parameters"]["label"]: r["parameters"] for n, r in results.items() if n.startswith("evaluate")}
    assert set(by) == set(LABELS) and len({by[l]["train_dir"] for l in LABELS if l.startswith("ddpm")}) == 1
    assert by["ddpm, t_test 100"]["restore_config"]["t_test"] == 100 and by["007"]["restore_config"] == {}
    kept = [json.loads(p.read_text())["restore"]["t_test"] for p in out.glob("train-*ddpm*/reconstructions-*/reconstructions.json")]
    assert sorted(kept) == [100, 200]


def test_the_report_tells_variants_from_models(out):
    t, page, r = pd.read_csv(out/"table.csv"), (out/"report.html").read_text(), open_results(out)
    assert set(t.model) == {*LABELS, "perfect map"}
    assert r.models == LABELS[:2] and list(r.variants) == LABELS[2:]
    assert "What matters" in page and "scores.median 5 → 3; scores.masked False → True" in page and "restore.t_test 200 → 100" in page
    main = page[page.index("Dice by score and pathology</h2>"):page.index("What matters</h2>")]
    assert "007" in main and "t_test 100" not in main                       # variants stand in their own table
    assert {f.name for f in (out/"figures").iterdir()} >= {"variants-ddpm.png", "variants-007.png", "sigma-007.png", "maps-ddpm.png"}
    assert [m.label for m in restored_models(r)] == ["T2w ddpm", "T2w 007", "T2w ddpm, t_test 100", "T2w " + LABELS[4]]
    late = re.search(r"Under-trained: [^<]*", page).group()
    assert "ddpm on T2w (fold 0): its restorations are blurred" in late and not re.search(r"007 on T2w[^;]*blurred", late)      # a bottleneck blurs by nature


def test_the_training_notebook_shows_restorations(out):
    for folder in out.glob("train-*"):
        cells = json.loads((folder/"notebook.ipynb").read_text())["cells"]
        looks = [o for c in cells for o in c.get("outputs", []) if o["output_type"] == "display_data" and "image/png" in o["data"]]
        assert len(looks) >= 3, folder                                           # the grid that updates, the curve, the best weights
        assert not any("first validation brings" in json.dumps(o) for o in looks)


def test_bad_settings_are_one_line(tmp_path):
    for line, words in (("models: [{name: ae, chanels: [8]}]", ("models[0]", "'chanels'", "did you mean 'channels'")), ("models: [{name: dae, noise_std: much}]", ("noise_std", "float")),
                        ("models: [unet]", ("'unet'", "known are ae, vae, dae, ddpm, ddpm_gaussian")), ("models: [{name: ae, kernel_size: 4}]", ("model.kernel_size", "odd")),
                        ("models: [{name: ddpm, channels: 32}]", ("'channels'", "[32]")), ("models: [{name: ae, size: 64}]", ("model.size", "96")), ("train: {lr: .nan}", ("'lr'", "finite")),
                        ("restore: {sampler: dim}", ("restore.sampler", "did you mean 'ddim'")), ("models: [{name: vae, train: {precision: fp8}}]", ("train.precision", "bf16"))):
        (tmp_path/"s.yaml").write_text(f"format: uad-study/1\n{line}\n")
        one_line(uad("run", "s.yaml", "--dry-run", cwd=tmp_path), *words)


def test_every_model_has_its_authors_training():
    assert {n: (train_config(n).lr, train_config(n).lr_schedule, train_config(n).amsgrad) for n in MODELS} == {
        "ae": (1e-4, "constant", False), "ssim_ae": (2e-4, "constant", False), "vae": (1e-4, "constant", False), "dae": (1e-4, "cosine", True), "ddpm": (1e-5, "constant", False), "ddpm_gaussian": (1e-5, "constant", False), "pddpm": (1e-5, "constant", False), "cddpm": (1e-5, "constant", False), "fae": (2e-4, "constant", False)}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    rng, d = np.random.default_rng(0), tmp_path_factory.mktemp("cohort")/"cohort"
    def item(i):
        x = rng.random(GRID_SHAPE, dtype=np.float32)
        return Item(dict(subject_id=f"s{i}", contrast="T2w", pathology="healthy", split="train", val_fold=0 if i == 2 else -1), x, x >= 0)
    write_cohort(d, [item(i) for i in range(3)], 3)
    return Cohort(d)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ddpm", "ae", "dae"])
def test_resume_and_half_precision_on_a_gpu(cohort, name, tmp_path):
    "A resumed training on a GPU ends within 2 % of the uninterrupted one's validation loss; bf16 (chosen by itself) within 5 % of float32."
    if not torch.cuda.is_available(): pytest.skip("no CUDA device")
    small = dict(ddpm=dict(channels=[32, 64], num_res_blocks=1, num_head_channels=32, norm_num_groups=16), ae=dict(), dae=dict(channels=[16, 32, 64]))[name]
    model, config = model_config(small | dict(name=name)), TrainConfig(steps=60, batch_size=8, lr=1e-3, val_every=20, val_slices=32, ema=.9, augment=True)
    class Killed(Exception): pass
    def kill(step, *_, **facts):
        if step == 37: raise Killed
    whole = train(cohort, "T2w", 0, model, config, tmp_path/"whole", "cuda")
    with pytest.raises(Killed): train(cohort, "T2w", 0, model, dataclasses.replace(config, checkpoint_minutes=0), tmp_path/"killed", "cuda", tick=kill)
    assert read_checkpoint(tmp_path/"killed"/"last.pt")["step"] == 37
    again = train(cohort, "T2w", 0, model, config, tmp_path/"killed", "cuda")
    full = train(cohort, "T2w", 0, model, dataclasses.replace(config, precision="float32"), tmp_path/"full", "cuda")
    assert whole["precision"] == "bf16" and full["precision"] == "float32"
    assert again["last_val_losses"][-1] == pytest.approx(whole["last_val_losses"][-1], rel=.02) and full["last_val_losses"][-1] == pytest.approx(whole["last_val_losses"][-1], rel=.05)
