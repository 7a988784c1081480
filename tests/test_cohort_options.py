"Options of the cohort room: training augmentation and the denoised virtual cohort."
import os, platform, random, subprocess, sys, tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
import numpy as np, pytest, torch
from scipy.ndimage import binary_dilation, gaussian_filter
from uad_study import phantom
from uad_study.cohort import AUGMENTATIONS, Cohort, DataConfig, augment_slices, bias_fields, blurred, build_virtual, draw_augmentations, ghosted, virtual_items, virtual_subjects
from uad_study.core import UadError, from_dict


@pytest.fixture(scope="module")
def x():
    "16 virtual slices (16, 1, 96, 96)."
    v = phantom.healthy(5, ("T2w",)).images["T2w"]
    return torch.from_numpy(np.stack([v[:, :, z] for z in range(17, 33)])[:, None].astype(np.float32))


class TestAugmentation:
    def test_the_seed_decides_and_nothing_else(self, x):
        "Equal seeds, equal slices; another step, others; a slice does not depend on the rest of the batch; the input stays."
        before = x.clone(); a = augment_slices(x, 0, "augment", 7)
        assert torch.equal(a, augment_slices(x, 0, "augment", 7)) and torch.equal(x, before)
        assert a.shape == x.shape and a.dtype == x.dtype and a.device == x.device and type(a) is torch.Tensor and a.isfinite().all()
        b = augment_slices(x, 0, "augment", 8)
        assert (a != b).flatten(1).any(1).float().mean() > .8
        torch.testing.assert_close(augment_slices(x[:3], 0, "augment", 7), a[:3], rtol=0, atol=1e-6)
        torch.testing.assert_close(augment_slices(torch.cat([x[:3], x[8:9]]), 0, "augment", 7)[:3], a[:3], rtol=0, atol=1e-6)
        assert augment_slices(x[:0], 0).shape == (0, 1, 96, 96)

    def test_global_random_state_is_untouched(self, x):
        augment_slices(x, 0)                                                # importing MONAI is not what is tested
        state = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
        for k in AUGMENTATIONS: augment_slices(x, 1, p={k: 1})
        assert random.getstate() == state[0] and (np.random.get_state()[1] == state[1]).all() and torch.equal(torch.get_rng_state(), state[2])

    def test_shares_and_ranges_are_the_released_codes(self):
        "Each augmentation touches its share of the slices (five standard errors), independently of the others; the values fill TorchIO's default ranges."
        n = 8000; d = draw_augmentations(n, 3)
        for k, p in AUGMENTATIONS.items(): assert abs(d[f"on_{k}"].mean() - p) < 5 * (p * (1 - p) / n)**.5, k
        assert AUGMENTATIONS == dict(gamma=.5, bias=.25, blur=.25, ghosting=.5)
        on = np.array([d[f"on_{k}"] for k in AUGMENTATIONS], float)
        assert np.abs(np.corrcoef(on) - np.eye(4)).max() < .06
        for values, low, high in ((np.log(d["gamma"]), -.3, .3), (d["bias"], -.5, .5), (d["blur"], 0, 2), (d["ghosts"], 4, 10), (d["intensity"], .5, 1)):
            assert low <= values.min() < low + .01 * (high - low) and high - .01 * (high - low) < values.max() <= high
            assert values.mean() == pytest.approx((low + high) / 2, abs=.02 * (high - low))
        assert abs((d["axis"] == 2).mean() - .5) < .03 and (np.bincount(d["ghosts"])[4:] / n == pytest.approx(1 / 7, abs=.02))

    def test_what_is_drawn_is_what_is_changed(self, x):
        "Slices for which nothing was drawn are bitwise the same; all others change."
        big = x.repeat(8, 1, 1, 1); d = draw_augmentations(len(big), 11)
        drawn = np.any([d[f"on_{k}"] for k in AUGMENTATIONS], 0)
        assert 5 < (~drawn).sum() < 40 and ((augment_slices(big, 11) != big).flatten(1).any(1).numpy() == drawn).all()
        assert torch.equal(augment_slices(x, 11, p={}), x)
        with pytest.raises(UadError, match="did you mean 'ghosting'"): augment_slices(x, 11, p={"ghostin": 1})

    @pytest.mark.parametrize("name", ["gamma", "bias"])
    def test_background_stays_zero(self, x, name):
        y = augment_slices(x, 2, p={name: 1})
        assert not y[x == 0].any() and (y[x > 0] > 0).all() and (y != x).flatten(1).any(1).all()

    def test_gamma_is_a_power(self, x):
        "Also where a slice's maximum is not 1 (MONAI's AdjustContrast would rescale by it); negative and constant slices stay finite."
        g = torch.from_numpy(draw_augmentations(len(x), 2)["gamma"]).float().view(-1, 1, 1, 1)
        torch.testing.assert_close(augment_slices(x / 2, 2, p={"gamma": 1}), (x / 2)**g)
        for y in (x - .1, torch.zeros_like(x), torch.ones_like(x)): assert augment_slices(y, 2, p={k: 1 for k in AUGMENTATIONS}).isfinite().all()

    def test_bias_is_a_cubic_in_both_directions(self):
        "The logarithm of the field is what polynomial it was drawn as: constant, u and v alone are there."
        c = torch.zeros(3, 10); c[0, 0] = .5; c[1, 1] = .5; c[2, 4] = .5      # 1, v, u
        f = bias_fields(c, (96, 64)).log()[:, 0]; v, u = torch.linspace(-.5, .5, 64), torch.linspace(-.5, .5, 96)
        torch.testing.assert_close(f, torch.stack([torch.full((96, 64), .5), v.expand(96, 64), u[:, None].expand(96, 64)]), rtol=0, atol=1e-6)

    def test_blur_is_a_gaussian_in_mm(self, x):
        "Std in mm on 2 mm voxels, a sampled kernel as scipy's (which TorchIO calls); a tiny one changes nothing."
        d, y = draw_augmentations(len(x), 2), augment_slices(x, 2, p={"blur": 1})
        for i in range(len(x)): np.testing.assert_allclose(y[i, 0], gaussian_filter(x[i, 0].numpy(), d["blur"][i] / 2, mode="constant"), atol=1e-4)
        assert ((y - x).mean((1, 2, 3)).abs() < 1e-4).all() and y.min() >= 0 and y.max() <= 1 + 1e-6
        torch.testing.assert_close(blurred(x, (0, 1e-9)), x)

    def test_ghosting(self, x):
        "Sizes of any parity keep their means exactly; a removed line is gone from k-space, all others stay; more intensity, more ghost; and every 6th line makes copies a 6th of the field apart."
        n = len(x); k, s = torch.full((n,), 6), torch.full((n,), 1.)
        for dim in (2, 3):
            for y in (x, x[..., 1:, 1:], x[..., ::4, ::4]):
                torch.testing.assert_close(ghosted(y, k, s, dim).mean(dim), y.mean(dim), rtol=0, atol=1e-5)
            y = ghosted(x, k, s, dim); power = torch.fft.fftshift(torch.fft.fft(y, dim=dim), dim=dim).abs().sum([d for d in range(4) if d != dim])
            before = torch.fft.fftshift(torch.fft.fft(x, dim=dim), dim=dim).abs().sum([d for d in range(4) if d != dim])
            gone = [f for f in range(0, 96, 6) if f != 48]
            assert (power[gone] < 1e-2 * before[gone]).all()
            rest = [f for f in range(96) if f not in gone]
            torch.testing.assert_close(power[rest], before[rest], rtol=1e-3, atol=1e-2)
        assert (ghosted(x, k, .5 * s, 2) - x).abs().mean() < (ghosted(x, k, s, 2) - x).abs().mean()
        point = torch.zeros(1, 1, 96, 96); point[..., 10, 40] = 1
        copies = (ghosted(point, k[:1], s[:1], 2, restore=0) - point)[0, 0, :, 40].abs() > .05
        assert np.flatnonzero(copies).tolist() == [10, 26, 42, 58, 74, 90]

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    def test_gpu_agrees(self, x):
        y = augment_slices(x.cuda(), 4)
        assert y.is_cuda; torch.testing.assert_close(y.cpu(), augment_slices(x, 4), rtol=1e-4, atol=1e-5)


TINY = dict(folds=1, n_train=1, n_val=1, n_test=0, n_lesion_val=1, n_lesion_test=1, pathologies=("stroke",), contrasts=("T1w",))
roughness = lambda x, mask: np.abs(sum(np.roll(x, 1, i) + np.roll(x, -1, i) - 2 * x for i in range(3)))[mask].mean()


class TestDenoise:
    def test_default_is_the_phantom_itself(self):
        "Bitwise, image and twin."
        assert DataConfig().denoise is False
        for row in virtual_subjects(DataConfig(**TINY)).to_dict("records")[::3]:
            s = phantom.healthy(row["seed"], ("T1w",)) if row["pathology"] == "healthy" else phantom.diseased(row["seed"], row["pathology"])
            item = virtual_items(row, ("T1w",))[0]
            np.testing.assert_array_equal(item.image, s.images["T1w"])
            if row["pathology"] != "healthy": np.testing.assert_array_equal(item.twin, s.twins["T1w"])
            else: assert item.twin is None

    def test_smoother_and_twins_alike(self, tmp_path):
        "Built in two processes: smoother inside, 0 outside, in [0, 1]; a twin differs from its image only where it did before, and three voxels around (three iterations)."
        configs = DataConfig(**TINY), DataConfig(**TINY, denoise=True)
        with ProcessPoolExecutor(2, get_context("spawn")) as pool:
            for name, config in zip("ab", configs): build_virtual(config, tmp_path/name, pool.map)
        a, b = Cohort(tmp_path/"a"), Cohort(tmp_path/"b")
        assert a.table.equals(b.table) and a.info["sha256"]["images"] != b.info["sha256"]["images"]
        for k in ("brain_masks", "lesion_masks", "volumes"): assert a.info["sha256"][k] == b.info["sha256"][k]
        for i in range(len(a)):
            m = a.brain_masks[i]
            for k in ("images", "twins"):
                x, y = getattr(a, k)[i], getattr(b, k)[i]
                assert roughness(y, m) < .6 * roughness(x, m) and not y[~m].any() and y.min() >= 0 and y.max() <= 1 and np.abs(y - x)[m].mean() < .1
            differ = a.images[i] != a.twins[i]
            np.testing.assert_array_equal(b.images[i][far := ~binary_dilation(differ, np.ones((3, 3, 3)), 3)], b.twins[i][far])
            inside, around = a.lesion_masks[i], m & ~a.lesion_masks[i]                          # around: a large lesion pushes, so compare with the images as they were
            before, after = (np.abs(c.images[i] - c.twins[i]) for c in (a, b))
            assert after[around].mean() < 1.02 * before[around].mean() + 1e-4
            if inside.any(): assert after[inside].mean() > .8 * before[inside].mean() > .05

    @pytest.mark.parametrize("source", [dict(source="prepared"), dict(source="real_t1", contrasts=["T1w"], folds=1)])
    def test_only_virtual_images(self, source):
        "Other sources are refused, pointing to the setting that does it; the strict reader takes the setting."
        with pytest.raises(UadError, match=r"data\.denoise: .*prepare\.denoise") as e: from_dict(DataConfig, source | dict(denoise=True), "data")
        assert "\n" not in str(e.value)
        assert from_dict(DataConfig, dict(denoise=True), "data").denoise


def test_virtual_subjects_do_not_depend_on_the_processor():
    "Which Fourier coefficients are drawn must not hang on the order in which a processor's instructions leave equally strong ones, nor on last bits."
    code = "import sys, numpy as np; from uad_study.phantom import healthy; s = healthy(1, ('T2w',)); np.savez(sys.argv[1], image=s.images['T2w'], mask=s.brain_mask)"
    with tempfile.TemporaryDirectory() as place:
        made = []
        for off in ("", "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR AVX2 FMA3" if platform.machine() == "x86_64" else ""):
            subprocess.run([sys.executable, "-W", "ignore", "-c", code, f"{place}/s.npz"], check=True, env=os.environ | {"NPY_DISABLE_CPU_FEATURES": off, "OMP_NUM_THREADS": "1"})
            with np.load(f"{place}/s.npz") as f: made.append({k: f[k] for k in f})
    assert (made[0]["mask"] != made[1]["mask"]).sum() < 5
    np.testing.assert_allclose(made[0]["image"], made[1]["image"], atol=1e-3)
