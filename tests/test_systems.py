"The systems that build on the first models: each against a plain slow version of its mechanism, and the face that all models have."
import dataclasses
import numpy as np, pytest, torch
from uad_study.core import UadError
from uad_study.models import MODELS, RestoreConfig, build_model, model_config, restore_config
from uad_study.train import train_config

UNET = dict(channels=[16, 32], num_res_blocks=1, num_head_channels=16, norm_num_groups=16, patch=2)
TINY = dict(ssim_ae=dict(channels=[8, 16], latent=16, size=32, window=7))
g = lambda s=0: torch.Generator().manual_seed(s)
slices = lambda n=3, s=0: torch.rand(n, 1, 32, 32, generator=g(s))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(name, seed=1, restore=None, **more):
    "A small model of that name whose zero-initialised layers are not zero."
    model = build_model(model_config(TINY[name] | more | dict(name=name)), seed, restore)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.05)
    return model.eval()


@pytest.mark.parametrize("name", TINY)
def test_the_face(name):
    "Seeds decide everything, global randomness is left alone, shapes stay, processes draw for the whole batch, and checkpoints hold all there is."
    before, x, model = torch.random.get_rng_state(), slices(), tiny(name)
    twin = tiny(name)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values()))
    for m in (model, twin): m.train()
    assert model.loss(x, g(0)).item() == twin.loss(x, g(0)).item() != twin.loss(x, g(1)).item()
    model.eval(); twin.load_state_dict(model.state_dict()); twin.eval()
    assert model.reconstruct(x, g(5)).shape == x.shape and torch.equal(model.reconstruct(x, g(5)), twin.reconstruct(x, g(5)))
    four = slices(4, 2)
    assert sum(model.loss(four[2 * i:2 * i + 2], g(3), (i, 2)).item() for i in (0, 1)) / 2 == pytest.approx(model.loss(four, g(3)).item(), rel=1e-5)
    assert not model.reconstruct(x, g(5)).requires_grad and torch.equal(before, torch.random.get_rng_state())
    assert set(dataclasses.asdict(model.config)) == {f.name for f in dataclasses.fields(MODELS[name].Config)}


@pytest.mark.parametrize("name", TINY)
def test_every_weight_learns(name):
    model = tiny(name).train()
    model.loss(slices(), g()).backward()
    assert not [k for k, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all() or not p.grad.abs().sum() > 0)]


@pytest.mark.parametrize("settings, words", [
    (dict(name="ssim_ae", window=4), "model.window: must be odd, and 3 to 95, not 4"), (dict(name="ssim_ae", window=97), "model.window"), (dict(name="ssim_ae", window_sigma=0), "model.window_sigma: must be more than 0"),
    (dict(name="ssim_ae", data_range=-1), "model.data_range"), (dict(name="ssim_ae", windw=7), "did you mean 'window'"),
])
def test_bad_settings_are_one_line(settings, words):
    with pytest.raises(UadError) as e: model_config(settings)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_learning_is_that_of_the_authors():
    c = train_config("ssim_ae")
    assert (c.lr, c.weight_decay, c.lr_schedule) == (2e-4, 1e-5, "constant") and not MODELS["ssim_ae"].restores


def test_the_ssim_loss_equals_one_window_at_a_time():
    from scipy.signal.windows import gaussian
    model, x, y = tiny("ssim_ae", data_range=.8), slices(2, 3).double(), slices(2, 4).double()
    w = np.outer(gaussian(7, 1.5), gaussian(7, 1.5)); w /= w.sum()
    found = []
    for a, b in zip(x[:, 0].numpy(), y[:, 0].numpy()):
        for i in range(32 - 6):
            for j in range(32 - 6):
                p, q = a[i:i + 7, j:j + 7], b[i:i + 7, j:j + 7]
                m, n = (w * p).sum(), (w * q).sum()
                found.append((2 * m * n + .008**2) * (2 * (w * (p - m) * (q - n)).sum() + .024**2) / ((m * m + n * n + .008**2) * ((w * (p - m)**2).sum() + (w * (q - n)**2).sum() + .024**2)))
    assert float(model.distance(x, y)) == pytest.approx(1 - np.mean(found), abs=2e-6)
    with torch.autocast("cpu", torch.bfloat16): assert float(model.distance(x, y)) == pytest.approx(1 - np.mean(found), abs=2e-6)
