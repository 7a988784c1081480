"A cohort of six small noisy heads and models that train in seconds, for the tests of training."
import json
from pathlib import Path
import numpy as np, torch
from uad_study.cohort import Cohort, Item, write_cohort
from uad_study.models import model_config
from uad_study.train import TrainConfig, train
from uad_study.volume import GRID_SHAPE

UNET = dict(channels=[16, 32], num_res_blocks=1, num_head_channels=16, norm_num_groups=16, patch=4)
SMALL = dict(ddpm=UNET, ddpm_gaussian=UNET, pddpm=UNET, cddpm=UNET | dict(encoder="resnet10", encoder_width=.125, features=8), dae=dict(channels=[8, 16, 32]), ae=dict(channels=[8, 16], latent=16), vae=dict(channels=[8, 16], latent=16), ssim_ae=dict(channels=[8, 16], latent=16))


def small(name): return model_config(SMALL[name] | dict(name=name))


def write_heads(folder, spoilt=None) -> Cohort:
    "Five training volumes (one for validation) and one of the test split; `spoilt`: a training volume that gets a NaN in every slice."
    rng, inside = np.random.default_rng(0), np.zeros(GRID_SHAPE, bool)
    inside[20:80, 20:80, 5:45] = True
    def item(i):
        x = (rng.random(GRID_SHAPE) * .5 + .2).astype(np.float32) * inside
        if i == spoilt: x[40, 40] = np.nan
        return Item(dict(subject_id=f"s{i}", contrast="T1w", pathology="healthy", split="train" if i < 5 else "test", val_fold=0 if i == 4 else -1), x, inside)
    write_cohort(folder, [item(i) for i in range(6)], 6)
    return Cohort(folder)


def metrics(folder) -> list[dict]:
    "The lines of metrics.jsonl without the seconds."
    return [json.loads(line) | dict(seconds=0) for line in Path(folder, "metrics.jsonl").open()]


def weights(file) -> dict: return torch.load(file, weights_only=True)["model"]


def assert_same_end(a, b, files=("best.pt", "last.pt")):
    "Two trainings ended in the same weights, bit for bit, and wrote the same metrics."
    for f in files:
        x, y = weights(Path(a, f)), weights(Path(b, f))
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), f
    assert metrics(a) == metrics(b)


def go(cohort, name, folder, config: TrainConfig, tick=None, **more): return train(cohort, "T1w", 0, small(name), config, folder, tick=tick, **more)
