"The systems that build on the first models: each against a plain slow version of its mechanism, and the face that all models have."
import dataclasses, json, os, signal, time
import numpy as np, pytest, torch
from training import SMALL, assert_same_end, metrics, weights, write_heads
from uad_study.cohort import draw_slices, slice_index
from uad_study.core import Stopped, UadError, derive_seed
from uad_study.diffusion import q_sample
from uad_study.models import MODELS, RestoreConfig, build_model, model_config, placed, restore_config
from uad_study.runs import read_study
from uad_study.systems import ConditionedDDPM, MaskedPretext, patch_masks
from uad_study.train import TrainConfig, generator_for, load_model, take_batch, train, train_config

UNET = dict(channels=[16, 32], num_res_blocks=1, num_head_channels=16, norm_num_groups=16, patch=2)
TINY = dict(ssim_ae=dict(channels=[8, 16], latent=16, size=32, window=7), pddpm=UNET | dict(box=16, box_stride=16), cddpm=UNET | dict(encoder="resnet10", encoder_width=.125, features=8))
g = lambda s=0: torch.Generator().manual_seed(s)
slices = lambda n=3, s=0: torch.rand(n, 1, 32, 32, generator=g(s))


def tiny(name, seed=1, restore=None, **more):
    "A small model of that name whose zero-initialised layers are not zero, and whose batch norms know the scale of what they meet."
    model = build_model(model_config(TINY[name] | more | dict(name=name)), seed, restore)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for m in norms: m.momentum = 1.
    with torch.no_grad():
        for p in model.parameters(): p.add_(.05)
        model.train().loss(slices(8, 9), g(9))
    for m in norms: m.momentum = .1
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
    assert not model.reconstruct(x, g(5)).requires_grad and torch.equal(before, torch.random.get_rng_state())
    four, model = slices(4, 2).double(), model.double()
    assert sum(model.loss(four[2 * i:2 * i + 2], g(3), (i, 2)).item() for i in (0, 1)) / 2 == pytest.approx(model.loss(four, g(3)).item(), rel=1e-6)
    assert set(dataclasses.asdict(model.config)) == {f.name for f in dataclasses.fields(MODELS[name].Config)}


@pytest.mark.parametrize("name", TINY)
def test_every_weight_learns(name):
    model = tiny(name).train()
    model.loss(slices(), g()).backward()
    assert not [k for k, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all() or not p.grad.abs().sum() > 0)]


@pytest.mark.parametrize("name", TINY)
def test_half_precision_learns_the_same(name):
    model = tiny(name).train()
    with torch.autocast("cpu", torch.bfloat16): half = model.loss(slices(4), g(1))
    half.backward()
    assert half.item() == pytest.approx(model.loss(slices(4), g(1)).item(), rel=.01) and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("settings, words", [
    (dict(name="ssim_ae", window=4), "model.window: must be odd, and 3 to 95, not 4"), (dict(name="ssim_ae", window=97), "model.window"), (dict(name="ssim_ae", window_sigma=0), "model.window_sigma: must be more than 0"),
    (dict(name="ssim_ae", data_range=-1), "model.data_range"), (dict(name="ssim_ae", windw=7), "did you mean 'window'"),
    (dict(name="pddpm", box=97), "model.box: squares of 97 pixels do not fit into slices of (96, 96)"), (dict(name="pddpm", box=24), "model.box_stride: must be 1 to 24"), (dict(name="pddpm", box_stride=0), "model.box_stride"),
    (dict(name="pddpm", stitch="mean"), "model.stitch: 'mean' is unknown"), (dict(name="pddpm", places="gird"), "did you mean 'grid'"),
    (dict(name="cddpm", encoder_steps=-1), "model.encoder_steps: must be 0 or more, not -1"), (dict(name="cddpm", encoder_steps=5, mask_ratio=0), "model.mask_ratio: must be between 0 and 1, not 0"),
    (dict(name="cddpm", encoder_steps=5, mask_ratio=1.), "model.mask_ratio: must be between 0 and 1, not 1.0"), (dict(name="cddpm", mask_ratio=-.1), "model.mask_ratio: must be between 0 and 1"),
    (dict(name="cddpm", encoder_steps=5, mask_ratio=.05), "model.mask_ratio: 0.05 hides 0 of 9 patches: choose another, or smaller patches (model.mask_patch)"), (dict(name="cddpm", encoder_steps=5, mask_ratio=.95), "hides 9 of 9 patches"),
    (dict(name="cddpm", encoder_steps=5, mask_patch=40), "model.mask_patch: patches of 40 pixels do not fill slices of (96, 96): choose a divisor of 96"), (dict(name="cddpm", encoder_steps=5, mask_patch=0), "model.mask_patch"),
    (dict(name="cddpm", mask_ratio=.5), "model.mask_ratio: is for the encoder's own training: set encoder_steps too, or remove it"), (dict(name="cddpm", encoder_steps=5, mask_ration=.5), "did you mean 'mask_ratio'"),
    (dict(name="cddpm", encoder="imagenet"), "model.encoder: 'imagenet' is unknown"), (dict(name="cddpm", encoder="resnet51"), "did you mean 'resnet50'"), (dict(name="cddpm", encoder_width=.01), "model.encoder_width: must be at least 1/64"), (dict(name="cddpm", features=0), "model.features: must be 1 or more"),
])
def test_bad_settings_are_one_line(settings, words):
    with pytest.raises(UadError) as e: model_config(settings)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_learning_is_that_of_the_authors():
    c = train_config("ssim_ae")
    assert (c.lr, c.weight_decay, c.lr_schedule) == (2e-4, 1e-5, "constant") and not MODELS["ssim_ae"].restores
    assert train_config("pddpm") == train_config("ddpm") and restore_config("pddpm") == RestoreConfig(t_test=500) and model_config("pddpm").box == 48
    c, r = train_config("cddpm"), restore_config("cddpm")
    assert (c.lr, c.steps, c.augment) == (1e-5, 14400, True) and r.steps == (250, 500, 750) and restore_config("cddpm", dict(n_draws=2)).steps == r.steps and restore_config("cddpm", dict(t_test=90)).steps == (90,)
    assert tiny("cddpm").restore == r and tiny("cddpm", timesteps=200).restore.steps == (50, 100, 150) and tiny("pddpm", timesteps=200).restore.t_test == 100


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


def one_square_at_a_time(model, x, generator, t):
    "pDDPM by loops: each square of a slice noised by itself, restored, and put (or averaged) into its place."
    c, x0, n = model.config, 2 * x - 1, x.shape[-1]
    field, steps = model.noise(x, generator), -(-(n - c.box) // c.box_stride)
    starts = [round(i * (n - c.box) / steps) for i in range(steps + 1)] if steps else [0]
    corners, out = [(i, j) for i in starts for j in starts], torch.zeros_like(x)
    found, at = {}, torch.full((1,), t)
    for i, j in corners:
        for b in range(len(x)):
            seen = x0[b:b + 1].clone()
            seen[..., i:i + c.box, j:j + c.box] = q_sample(x0[b:b + 1], at, field[b:b + 1])[..., i:i + c.box, j:j + c.box]
            found[i, j, b] = model.denoiser(seen, at)[0, 0]
    for b in range(len(x)):
        for p in range(n):
            for q in range(n):
                over = [(i, j) for i, j in corners if i <= p < i + c.box and j <= q < j + c.box]
                middle = lambda s: (abs(p - s[0] - (c.box - 1) / 2), abs(q - s[1] - (c.box - 1) / 2))
                if c.stitch == "cut": over = [min(over, key=lambda s: (middle(s)[0]**2 + middle(s)[1]**2, s))]
                out[b, 0, p, q] = sum(found[i, j, b][p, q] for i, j in over) / len(over)
    return (out + 1) / 2


@pytest.mark.parametrize("more", [dict(), dict(box_stride=6, stitch="cut"), dict(box_stride=9, stitch="average"), dict(box=32, box_stride=32), dict(box=11, box_stride=5, stitch="average")])
def test_pddpm_equals_one_square_at_a_time(more):
    model, x = tiny("pddpm", restore=RestoreConfig(t_test=300), **more), slices(2, 5)
    with torch.no_grad(): torch.testing.assert_close(model.reconstruct(x, g(7)), one_square_at_a_time(model, x, g(7), 300), rtol=1e-4, atol=1e-4)


def test_a_square_as_large_as_the_slice_is_a_ddpm():
    x, pddpm = slices(3, 5), tiny("pddpm", box=32, box_stride=32)
    ddpm = build_model(model_config(UNET | dict(name="ddpm")), 1).eval()
    ddpm.load_state_dict(pddpm.state_dict())
    for r in (RestoreConfig(n_draws=2), RestoreConfig(t_test=8, sampler="ancestral"), RestoreConfig(t_test=(90, 200), sampler="ddim", sampler_steps=3)):
        pddpm.restore = ddpm.restore = r
        assert torch.equal(pddpm.reconstruct(x, g(1)), ddpm.reconstruct(x, g(1)))
    assert pddpm.loss(x, g(2)).item() == pytest.approx(ddpm.loss(x, g(2)).item(), rel=1e-6)


@pytest.mark.parametrize("places", ["grid", "anywhere"])
@pytest.mark.parametrize("sampler", [None, "one_step", "ancestral", "ddim"])
def test_only_one_square_is_ever_noised(places, sampler):
    "In training (None) and under every sampler, whatever else the chain does; the loss is of the square alone."
    model, x, seen, given = tiny("pddpm", places=places), slices(4, 6), [], []
    model.denoiser.register_forward_pre_hook(lambda m, a: seen.append(a))
    model.denoiser.register_forward_hook(lambda m, a, out: given.append(out))
    if sampler: model.restore = RestoreConfig(t_test=20, sampler=sampler, sampler_steps=4); model.reconstruct(x, g(1))
    else: loss = model.loss(x, g(1))
    assert len(seen) == {None: 1, "one_step": 4, "ancestral": 4 * 21, "ddim": 4 * 4}[sampler]
    corners = set()
    for x_t, t in seen:
        for b in range(4):
            rows, columns = (torch.nonzero((x_t[b, 0] != 2 * x[b, 0] - 1).any(d)).flatten().tolist() for d in (1, 0))
            assert rows[-1] - rows[0] < 16 and columns[-1] - columns[0] < 16 and (x_t[b, 0] != 2 * x[b, 0] - 1).sum() <= 256
            corners.add((rows[0], columns[0]))
    if sampler or places == "grid": assert corners <= {(i, j) for i in (0, 16) for j in (0, 16)}
    if sampler: assert len(corners) == 4
    else:
        inside = seen[0][0] != 2 * x - 1
        assert inside.sum() == 4 * 256 and loss.item() == pytest.approx((given[0] - (2 * x - 1)).abs()[inside].mean().item(), rel=1e-5)


def test_squares_anywhere_are_uniform():
    model, n = tiny("pddpm", places="anywhere"), 4000
    inside = model.squares(torch.zeros(n, 1, 32, 32), g(0))
    first = inside.flatten(1).int().argmax(1)
    for start in (first // 32, first % 32): assert start.min() == 0 and start.max() == 16 and abs(torch.bincount(start) / n * 17 - 1).max() < .35
    assert (inside.sum((1, 2, 3)) == 256).all()


def test_what_a_square_hid_is_not_seen_in_it():
    "At the last step (alpha-bar 2.4e-9 of the cosine schedule) a square's restoration depends on its surroundings, not on what was in it."
    model, x = tiny("pddpm", restore=RestoreConfig(t_test=999)), slices(1, 8)
    other = x.clone(); other[..., :16, :16] = 1 - other[..., :16, :16]
    a, b = model.reconstruct(x, g(2)), model.reconstruct(other, g(2))
    assert (a - b)[..., :16, :16].abs().max() < 1e-2 * (a - b)[..., 16:, :].abs().max()


def test_slices_too_small_for_the_square():
    with pytest.raises(UadError, match="squares of 16 pixels do not fit into slices of"): tiny("pddpm").reconstruct(slices()[..., :8, :8], g())


def test_cddpm_equals_the_unet_block_by_block():
    "The features of the clean slice go through two dense layers and are added to the time embedding; all else is MONAI's U-Net."
    from monai.networks.nets.diffusion_model_unet import get_timestep_embedding
    model, x, t = tiny("cddpm"), slices(2, 5), torch.tensor([3, 700])
    x_t, u = q_sample(2 * x - 1, t, model.noise(x, g(1))), model.denoiser.unet
    with torch.no_grad():
        emb = u.time_embed(get_timestep_embedding(t, 16)) + u.class_embedding(model.encoder(x))
        h = u.conv_in(torch.nn.functional.pixel_unshuffle(x_t, 2)); kept = [h]
        for block in u.down_blocks:
            h, more = block(hidden_states=h, temb=emb, context=None)
            kept += more
        h = u.middle_block(hidden_states=h, temb=emb, context=None)
        for block in u.up_blocks:
            n = len(block.resnets)
            h, kept = block(hidden_states=h, res_hidden_states_list=kept[-n:], temb=emb, context=None), kept[:-n]
        torch.testing.assert_close(model.seeing(x)(x_t, t), torch.nn.functional.pixel_shuffle(u.out(h), 2), rtol=1e-5, atol=1e-5)


def test_cddpm_without_its_features_is_a_ddpm():
    model, x = tiny("cddpm", restore=RestoreConfig(n_draws=2)), slices()
    ddpm = build_model(model_config(UNET | dict(name="ddpm")), 1, RestoreConfig(n_draws=2)).eval()
    ddpm.load_state_dict({k: v for k, v in model.state_dict().items() if k.startswith("denoiser") and "class_embedding" not in k})
    assert (model.reconstruct(x, g(3)) - ddpm.reconstruct(x, g(3))).abs().max() > 1e-3
    for p in model.denoiser.unet.class_embedding[-1].parameters(): p.data.zero_()
    assert torch.equal(model.reconstruct(x, g(3)), ddpm.reconstruct(x, g(3))) and model.loss(x, g(4)).item() == ddpm.loss(x, g(4)).item()


def test_restorations_of_several_steps_are_averaged():
    "Each from noise of its own, drawn in order; the encoder looks once, at the clean slice."
    model, x, seen = tiny("cddpm", restore=RestoreConfig(t_test=(250, 500, 750), n_draws=2)), slices(), []
    model.encoder.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    together, gen = model.reconstruct(x, g(6)), g(6)
    assert len(seen) == 1 and torch.equal(seen[0], x)
    with torch.no_grad():
        apart = [model.denoiser(q_sample(2 * x - 1, torch.full((3,), t), model.noise(x, gen)), torch.full((3,), t), model.encoder(x)) for _ in range(2) for t in (250, 500, 750)]
    torch.testing.assert_close(together, (sum(apart) / 6 + 1) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings, words", [(dict(t_test=[250, 1000]), "restore.t_test: 1000 is outside the schedule: choose 0 to 999"), (dict(t_test=[]), "restore.t_test: is empty"), (dict(t_test=[5, -1]), "restore.t_test: must be 0 or more, not -1"),
                                             (dict(t_test=[True]), "t_test"), (dict(t_test=[2.5]), "t_test"), (dict(t_test="500"), "t_test"), (dict(t_test=[600, 5], sampler="ddim"), "steps do not fit below t_test 5: take 6 or fewer")])
def test_bad_steps_are_one_line(settings, words):
    with pytest.raises(UadError) as e: restore_config("cddpm", settings).check(1000)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_all_networks_of_the_encoder_build():
    for encoder, millions in (("resnet10", 5), ("resnet18", 11), ("resnet34", 21), ("resnet50", 24)):
        with torch.device("meta"): net = MODELS["cddpm"](model_config(UNET | dict(name="cddpm", encoder=encoder))).encoder
        assert round(sum(p.numel() for p in net.parameters()) / 1e6) == millions
    assert tiny("cddpm").encoder(slices(2)).shape == (2, 8)


PRETEXT = UNET | dict(name="cddpm", encoder="resnet10", encoder_width=.125, features=8, encoder_steps=4)
large = lambda n=3, s=0: torch.rand(n, 1, 96, 96, generator=g(s)) * (torch.rand(n, 1, 96, 96, generator=g(s + 50)) > .3)                 # a third of the pixels is no brain


def pretext(seed=1, **more):
    "A small pretext, with biases that are not zero, in evaluation mode."
    model = build_model(model_config(PRETEXT | more), seed, kind=MaskedPretext)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.02)
        for _ in range(20): model.train().loss(large(8, 9), g(9))
    return model.eval()


@pytest.mark.parametrize("patch, ratio, hidden", [(32, .65, 6), (16, .65, 23), (8, .65, 94), (48, .25, 1), (4, .999, 575)])
def test_masks_hide_what_was_asked_for(patch, ratio, hidden):
    "Whole patches, the same number in each slice (round(ratio x all), never by luck), every place as often as any, drawn by the generator alone."
    before, n = torch.random.get_rng_state(), 96 // patch
    m = patch_masks(500, (96, 96), patch, ratio, g(1))
    assert m.dtype == torch.bool and m.shape == (500, 1, 96, 96) and torch.equal(before, torch.random.get_rng_state())
    blocks = m.view(500, n, patch, n, patch).permute(0, 1, 3, 2, 4).flatten(3)
    assert torch.equal(blocks.all(-1), blocks.any(-1)) and (blocks.all(-1).sum((1, 2)) == hidden).all()
    share = hidden / n**2
    assert (blocks.all(-1).float().mean(0) - share).abs().max() < 5 * (share * (1 - share) / 500)**.5 + 1e-6
    assert torch.equal(m, patch_masks(500, (96, 96), patch, ratio, g(1))) and not torch.equal(m, patch_masks(500, (96, 96), patch, ratio, g(2)))
    assert patch_masks(2, (32, 64), 16, .5, g()).sum((1, 2, 3)).tolist() == [4 * 256] * 2


@pytest.mark.parametrize("more", [dict(), dict(mask_patch=16, mask_ratio=.4), dict(mask_patch=12)])
def test_the_pretext_equals_one_place_at_a_time(more):
    "The loss by loops over pixels; what is told by blanking each map place by place, an own vector in the blanks."
    model, x = pretext(**more), large(2, 3)
    hidden = patch_masks(2, (96, 96), model.config.mask_patch, model.config.mask_ratio, g(5))
    e, f, maps = model.encoder, x.clone(), []
    with torch.no_grad():
        f[hidden] = 0
        f = e.maxpool(torch.relu(e.bn1(e.conv1(f))))
        for k, layer in enumerate((e.layer1, e.layer2, e.layer3, e.layer4)):
            f = layer(f)
            filled, s = f.clone(), 96 // f.shape[-1]
            assert s == 4 * 2**k
            for b in range(2):
                for i in range(96 // s):
                    for j in range(96 // s):
                        if hidden[b, 0, i * s:(i + 1) * s, j * s:(j + 1) * s].all(): f[b, :, i, j], filled[b, :, i, j] = 0, model.gaps[3 - k][:, 0, 0]
            maps.append(filled)
        y = model.wider[0](model.sides[0](maps[3]))
        y = model.wider[1](y + model.sides[1](maps[2]))
        y = model.wider[2](y + model.sides[2](maps[1]))
        y = model.last(y + model.sides[3](maps[0]))
        torch.testing.assert_close(model.told(x, hidden), y, rtol=1e-4, atol=1e-5)
        a, b, m, total, n = y.numpy().astype(float), x.numpy().astype(float), hidden.numpy(), 0., 0
        for at in np.argwhere(m):
            n += 1
            if b[tuple(at)] > .01: total += (a[tuple(at)] - b[tuple(at)])**2
        assert model.loss(x, g(5)).item() == pytest.approx(total / n, rel=1e-5) and n == m.sum()


def test_what_is_hidden_is_not_seen():
    "What is told does not depend on hidden pixels; the loss does on nothing that was told of shown pixels, or beside the brain."
    model, x = pretext(), large(2, 3)
    hidden = patch_masks(2, (96, 96), 32, .65, g(5))
    other = torch.where(hidden, torch.rand(x.shape, generator=g(6)), x)
    with torch.no_grad(): assert torch.equal(model.told(x, hidden), model.told(other, hidden)) and not torch.equal(model.told(x, hidden), model.told(x, ~hidden))
    told = []
    model.told = lambda x, hidden: told.append(MaskedPretext.told(model, x, hidden)) or told[0]
    model.loss(x, g(5)).backward(inputs=[p := next(iter(model.last.parameters()))], retain_graph=True)
    gradient, = torch.autograd.grad(((told[0] - x).square() * (hidden & (x > .01))).sum() / hidden.sum(), p)
    assert torch.equal(p.grad, gradient) and gradient.abs().sum() > 0


def test_the_face_of_the_pretext():
    "Seeds decide everything, global randomness is left alone, processes draw for the whole batch, every weight learns, half precision the same."
    before, x, config = torch.random.get_rng_state(), large(4, 1), model_config(PRETEXT)
    model, twin = (build_model(config, 3, kind=ConditionedDDPM.first(config)).train() for _ in range(2))
    assert model.loss(x, g(0)).item() == twin.loss(x, g(0)).item() != twin.loss(x, g(1)).item()
    model.loss(x, g()).backward()
    assert not [k for k, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.abs().sum() > 0]
    model = pretext()
    with torch.autocast("cpu", torch.bfloat16): half = model.loss(x, g(1))
    assert half.item() == pytest.approx(model.loss(x, g(1)).item(), rel=.01) and torch.equal(before, torch.random.get_rng_state())
    assert sum(model.loss(x[2 * i:2 * i + 2], g(3), (i, 2)).item() for i in (0, 1)) / 2 == pytest.approx(model.loss(x, g(3)).item(), rel=1e-5)
    with pytest.raises(UadError, match="patches of 32 pixels do not fill slices of"): model.loss(x[..., :40, :40], g())
    assert ConditionedDDPM.first(model_config("cddpm")) is None and model.told(x[..., :48, :80], patch_masks(4, (48, 80), 16, .5, g())).shape == (4, 1, 48, 80)


def test_settings_of_the_pretext_leave_no_trace_where_there_is_none():
    entries = {e.label: e.model for s in ("systems", "matrix", "matrix-paper") for e in read_study(s).entries if e.model["name"] == "cddpm"}
    assert entries and not [k for m in entries.values() for k in m if k in ("encoder_steps", "mask_ratio", "mask_patch")]
    base, variant = read_study("pretrain").entries
    assert "encoder_steps" not in base.model and (variant.model["encoder_steps"], variant.says, variant.label) == (300, "model.encoder_steps 0 → 300", "cddpm, pretrained encoder")


@pytest.fixture(scope="module")
def heads(tmp_path_factory): return write_heads(tmp_path_factory.mktemp("heads")/"cohort")


CONFIG = model_config(SMALL["cddpm"] | dict(name="cddpm", encoder_steps=4))
TRAIN = TrainConfig(steps=6, batch_size=2, lr=1e-3, val_every=2, val_slices=4, checkpoint_minutes=0, seed=1, weight_decay=.01, augment=True, ema=.9, snapshots=(3,))


@pytest.fixture(scope="module")
def trained(heads, tmp_path_factory):
    folder, ticks = tmp_path_factory.mktemp("trained"), []
    return folder, train(heads, "T1w", 0, CONFIG, TRAIN, folder, tick=lambda step, steps, text, **facts: ticks.append((step, steps, text))), ticks


@pytest.mark.parametrize("steps", [4, 0])
def test_pretrained_weights_arrive_in_the_conditional_encoder(heads, tmp_path, steps):
    "A training of three steps is, bit for bit, the model with the pretext's best encoder (or without), three steps on by hand; the encoder goes on learning."
    config = dataclasses.replace(CONFIG, encoder_steps=steps)
    train(heads, "T1w", 0, config, TrainConfig(steps=3, batch_size=2, lr=1e-3, val_slices=2, seed=1), tmp_path)
    model = placed(build_model(config, derive_seed(1, "weights")), "cpu").train()
    assert (tmp_path/"encoder").exists() == bool(steps)
    if steps:
        theirs, mine = weights(tmp_path/"encoder"/"best.pt"), {k: v.clone() for k, v in model.state_dict().items()}
        model.begin(theirs)
        changed = {k for k, v in model.state_dict().items() if not torch.equal(v, mine[k])}
        assert all(torch.equal(v, theirs[k]) for k, v in model.state_dict().items() if k.startswith("encoder.") and ".fc." not in k) and {k for k in theirs if k.startswith("encoder.")} >= changed
        assert {k for k in changed if "conv" in k} == {k for k in mine if k.startswith("encoder.") and "conv" in k} and not [k for k in changed if "fc" in k]
    begun = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer, index = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True), slice_index(heads, heads.select("train", 0, contrast="T1w", pathology="healthy"))
    for k in range(3):
        optimizer.zero_grad(); model.loss(take_batch(heads, draw_slices(index, 2, 1, "batch", k)), generator_for("cpu", 1, "noise", k)).backward(); optimizer.step()
    last = weights(tmp_path/"last.pt")
    assert last.keys() == begun.keys() and all(torch.equal(v, last[k]) for k, v in model.state_dict().items())
    assert all(not torch.equal(v, begun[k]) for k, v in last.items() if k.startswith("encoder.") and k.endswith("weight"))
    assert ("encoder_steps" in json.loads(torch.load(tmp_path/"last.pt", weights_only=True)["settings"])["model"]) == bool(steps)       # an interrupted training from before there was this setting goes on


def test_both_trainings_are_told_and_kept(trained):
    folder, result, ticks = trained
    assert [t[0] for t in ticks] == [*range(5), 4, *range(5, 11)] and {t[1] for t in ticks} == {10} and [t[2].startswith("encoder: ") for t in ticks] == [True] * 5 + [False] * 7
    assert result["steps"] == 6 and result["encoder"]["steps"] == 4 and result["encoder"]["parameters"] > 0 and result["train_seconds"] >= result["encoder"]["train_seconds"]
    assert [r["step"] for r in metrics(folder/"encoder")] == [0, 2, 4] and [r["step"] for r in metrics(folder)] == [0, 2, 4, 6] and all(np.isfinite(r["val_loss"]) for r in metrics(folder/"encoder"))
    model, _ = load_model(folder/"best.pt", config=CONFIG)
    assert not [k for k in model.state_dict() if k.startswith(("gaps", "sides", "wider", "last"))] and all(p.requires_grad for p in model.encoder.parameters())             # the decoder is gone


def test_a_pretrained_training_resumes_bit_for_bit(heads, trained, tmp_path):
    "Stopped by a signal in the encoder's training, where one gives way to the other, and in the second, with the last checkpoint damaged each time."
    for at, where in ((2, "encoder"), (4, "encoder"), (8, ".")):
        def stop(step, steps, text, **facts):
            if step == at: os.kill(os.getpid(), signal.SIGTERM); time.sleep(.05)
        with pytest.raises(Stopped): train(heads, "T1w", 0, CONFIG, TRAIN, tmp_path, tick=stop)
        assert (tmp_path/"last.pt").exists() == (at != 2)
        last = tmp_path/where/"last.pt"
        last.write_bytes(last.read_bytes()[:500])
    result = train(heads, "T1w", 0, CONFIG, TRAIN, tmp_path)
    assert_same_end(trained[0], tmp_path, ("best.pt", "last.pt", "snapshot-000003.pt")); assert_same_end(trained[0]/"encoder", tmp_path/"encoder")
    assert result["encoder"]["best_val_loss"] == trained[1]["encoder"]["best_val_loss"]


@pytest.mark.slow
def test_two_processes_learn_what_one_does(heads, trained, tmp_path):
    result = train(heads, "T1w", 0, CONFIG, TRAIN, tmp_path, devices=2)
    assert result["encoder"]["best_val_loss"] == pytest.approx(trained[1]["encoder"]["best_val_loss"], rel=1e-3)
    for a, b in zip(metrics(trained[0]), metrics(tmp_path), strict=True): assert b["val_loss"] == pytest.approx(a["val_loss"], rel=1e-2)


STUDY = """format: uad-study/1
data: {source: virtual, contrasts: [T2w], pathologies: [tumour], folds: 1, n_train: 2, n_val: 1, n_test: 1, n_lesion_val: 1, n_lesion_test: 1}
models:
  - {name: ssim_ae, channels: [8, 16, 16], latent: 16}
  - {name: pddpm, channels: [16, 32], num_res_blocks: 1, num_head_channels: 32, norm_num_groups: 16, patch: 4}
  - {name: cddpm, channels: [16, 32], num_res_blocks: 1, num_head_channels: 32, norm_num_groups: 16, patch: 4, encoder: resnet10, encoder_width: 0.125, features: 8}
train: {steps: 4, batch_size: 2, lr: 0.001, val_every: 2, val_slices: 4}
scores: {names: [l1, ssim_ens]}
variants:
  - {of: cddpm, restore: {t_test: 500}}
  - {of: cddpm, label: pretrained, model: {encoder_steps: 3}}
report: {steps_val: 1, steps_test: 1, post_val: 0, post_test: 0}
"""


@pytest.mark.slow
def test_a_study_of_systems(tmp_path):
    "From training to table, with the restorations that each model's authors choose; exported weights restore as they do."
    from conftest import uad
    from uad_study.results import open_results
    from uad_study.labs import restored_at
    from uad_study.viewer import restored_models
    from uad_study.weights import export_weights, load_weights
    (tmp_path/"s.yaml").write_text(STUDY)
    r = uad("run", "s.yaml", "--out", tmp_path/"out", cwd=tmp_path)
    assert r.returncode == 0, r.stderr + r.stdout
    results = open_results(tmp_path/"out")
    labels = ["ssim_ae", "pddpm", "cddpm", "cddpm, t_test 500", "cddpm, pretrained"]
    assert results.models == labels[:3] and set(results.table.model) == {*labels, "perfect map"} and results.table.dice.notna().any()
    assert [q["parameters"]["restore_config"].get("t_test") for q in results.evaluations] == [None, 500, [250, 500, 750], 500, [250, 500, 750]]
    assert [m.label for m in restored_models(results)] == ["T2w " + l for l in labels]
    along, pretrained = sorted((tmp_path/"out").glob("train-*cddpm*"), key=lambda f: (f/"encoder").exists())
    card = export_weights(pretrained, tmp_path/"pretrained")
    assert card["training"]["encoder"]["steps"] == 3 and card["model"]["encoder_steps"] == 3 and "encoder" not in export_weights(along, tmp_path/"weights")["training"]
    assert card["restore"]["t_test"] == (250, 500, 750) and load_weights(tmp_path/"weights").model.restore.steps == load_weights(tmp_path/"pretrained").model.restore.steps == (250, 500, 750)
    assert sorted(restored_at(results, "cddpm", int(next(iter(results.cohort.select("test")))), steps=(50, 500))) == [50, 500]                # the lab takes one level at a time
