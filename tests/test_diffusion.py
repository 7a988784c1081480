"Restoration in one step and many against MONAI's schedulers and closed forms, and the sum of noise octaves against the opensimplex package."
import numpy as np, pytest, torch
from uad_study.core import UadError
from uad_study.diffusion import alpha_bars, posterior, q_sample, restore_ancestral, restore_ddim, restore_one_step
from uad_study.noise import simplex_noise, simplex_std

SCHEDULES = ("cosine", "linear")
seeded = lambda s=0: torch.Generator().manual_seed(s)
draws = lambda shape, s=0, dtype=torch.float64: (lambda g: lambda: torch.randn(shape, generator=g, dtype=dtype))(seeded(s))
def curved(x, t): return torch.tanh(1.3 * x - .2) * (1 - t.view(-1, 1, 1, 1) / 1500)                   # a denoiser with no special property

def monai(kind, schedule, **kw):
    "MONAI's scheduler on our alpha-bars, in float64."
    from monai.networks import schedulers
    s = getattr(schedulers, kind)(num_train_timesteps=1000, schedule={"cosine": "cosine", "linear": "linear_beta"}[schedule], prediction_type="sample", clip_sample=False, **kw)
    s.alphas_cumprod = alpha_bars(schedule).double()
    s.alphas = s.alphas_cumprod / torch.cat([torch.ones(1).double(), s.alphas_cumprod[:-1]])
    s.betas = 1 - s.alphas
    return s

@pytest.mark.parametrize("schedule", SCHEDULES)
def test_posterior_step_equals_monai(schedule):
    scheduler, shape = monai("DDPMScheduler", schedule, variance_type="fixed_small"), (2, 1, 5, 4)
    x, estimate, eps = (draws(shape, s)() for s in (1, 2, 3))
    for s in (0, 1, 2, 7, 100, 499, 500, 998, 999):
        theirs, _ = scheduler.step(estimate, s, x, generator=seeded(3))                               # draws the same field
        w0, ws, std = posterior(s, schedule)
        torch.testing.assert_close(w0 * estimate + ws * x + std * eps, theirs, rtol=1e-9, atol=1e-10)
    assert posterior(0, schedule) == (1, 0, 0)

@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ancestral_chain_equals_monai(schedule, dtype, atol):
    scheduler, shape = monai("DDPMScheduler", schedule, variance_type="fixed_small"), (2, 1, 6, 5)
    x0 = draws(shape, 5, dtype)().tanh()
    for t in (0, 1, 40, 300):
        ours, g = restore_ancestral(curved, x0, t, draws(shape, 6, dtype), schedule), seeded(6)
        at = lambda s: torch.full((2,), s)
        x = q_sample(x0, at(t), torch.randn(shape, generator=g, dtype=dtype), schedule)
        for s in range(t, 0, -1): x, _ = scheduler.step(curved(x, at(s)), s, x, generator=g)
        torch.testing.assert_close(ours, curved(x, at(0)).to(dtype), rtol=0, atol=atol)
        assert ours.dtype == dtype

@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_equals_monai(schedule, dtype, atol):
    scheduler, shape = monai("DDIMScheduler", schedule, set_alpha_to_one=True), (2, 1, 6, 5)
    x0, eps = draws(shape, 7, dtype)().tanh(), draws(shape, 8, dtype)()
    for t, leap in ((499, 100), (499, 250), (999, 20), (79, 1)):                                      # the last leap ends at the image: t + 1 is a multiple of the leap
        scheduler.set_timesteps(1000 // leap)
        x = q_sample(x0, torch.full((2,), t), eps, schedule)
        for s in range(t, -1, -leap): x, _ = scheduler.step(curved(x, torch.full((2,), s)), s, x, eta=0)
        ours = restore_ddim(curved, x0, t, eps, (t + 1) // leap, schedule)
        torch.testing.assert_close(ours, x.to(dtype), rtol=0, atol=atol)
        assert ours.dtype == dtype

@pytest.mark.parametrize("t, steps, visited", [(499, 1, [499]), (499, 2, [499, 249]), (10, 3, [10, 7, 3]), (4, 5, [4, 3, 2, 1, 0]), (0, 1, [0])])
def test_steps_visited(t, steps, visited):
    seen, x0 = [], torch.zeros(3, 1, 4, 4)
    def spy(x, at):
        assert at.shape == (3,) and at.dtype == torch.int64 and len(set(at.tolist())) == 1
        seen.append(int(at[0])); return x
    restore_ddim(spy, x0, t, torch.zeros(1, 1, 4, 4), steps)
    assert seen == visited
    fields = []
    def draw(): fields.append(1); return torch.zeros(1, 1, 4, 4)
    seen.clear(); restore_ancestral(spy, x0, t, draw)
    assert seen == list(range(t, -1, -1)) and len(fields) == t + 1                                     # t + 1 calls; one field to start, one for each step but the last
    fields.clear(); restore_ancestral(spy, x0, t, draw, start=torch.zeros(1, 1, 4, 4))
    assert len(fields) == t

def test_every_number_of_ddim_steps_visits_distinct_steps_from_t():
    for t in (0, 1, 6, 97):
        for steps in range(1, t + 2):
            seen = []
            restore_ddim(lambda x, at: (seen.append(int(at[0])), x)[1], torch.zeros(1, 1, 2, 2), t, torch.zeros(1, 1, 2, 2), steps)
            gaps = -np.diff([*seen, -1])
            assert len(seen) == steps and seen[0] == t and gaps.min() >= 1 and gaps.max() - gaps.min() <= 1

@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_ddim_step_is_the_one_step_restoration(schedule):
    x0, eps = draws((2, 1, 6, 5), 1, torch.float32)().tanh(), simplex_noise(1, (6, 5), generator=seeded())
    for t in (0, 3, 500, 999): assert torch.equal(restore_ddim(curved, x0, t, eps, 1, schedule), restore_one_step(curved, x0, t, eps, schedule))
    assert torch.equal(restore_ancestral(curved, x0, 0, lambda: eps, schedule), restore_one_step(curved, x0, 0, eps, schedule))

@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_perfect_denoiser_restores_exactly(schedule):
    x0 = torch.rand(2, 1, 12, 12, generator=seeded()) * 2 - 1
    know, draw = lambda x, t: x0, lambda: simplex_noise(2, 12, generator=g)
    g = seeded(1)
    for t in (0, 1, 37, 500):
        assert torch.equal(restore_one_step(know, x0, t, draw(), schedule), x0) and torch.equal(restore_ancestral(know, x0, t, draw, schedule), x0)
        for steps in {1, t // 3 + 1, t + 1}: assert torch.equal(restore_ddim(know, x0, t, draw(), steps, schedule), x0)

@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_chain_with_the_true_image_keeps_the_noise_level_and_kind(schedule):
    "On its way every x_s must look like one noised directly: mean sqrt(a) x0, covariance that of the field times 1 - a, simplex noise too."
    n, x0, g, seen = 1000, torch.linspace(-1, 1, 8).expand(1000, 1, 8, 8), seeded(2), {}
    def spy(x, at): seen[int(at[0])] = x.clone(); return x0
    fields = lambda n: torch.cat([simplex_noise(50, 8, octaves=2, frequency=8, generator=g) for _ in range(n // 50)])       # the fields of one call share their lattice
    restore_ancestral(spy, x0, 200, lambda: fields(n), schedule)
    field = fields(4 * n)
    neighbour = lambda f: float((f[..., 1:] * f[..., :-1]).mean() / f.square().mean())
    for s in (199, 120, 50, 10, 0):
        a = alpha_bars(schedule)[s]
        rest = (seen[s] - a.sqrt() * x0) / (1 - a).sqrt()
        assert abs(float(rest.mean())) < .03 and float(rest.std()) == pytest.approx(simplex_std(2), rel=.03)
        assert neighbour(rest) == pytest.approx(neighbour(field), abs=.015)

def gaussian_oracle(mu, sd, schedule):
    "E[x0 | x_t] for x0 ~ N(mu, sd^2) and unit Gaussian noise: linear in x_t."
    def denoise(x, t):
        a = alpha_bars(schedule).double()[t].view(-1, 1, 1, 1)
        return mu + sd**2 * a.sqrt() / (a * sd**2 + 1 - a) * (x - a.sqrt() * mu)
    return denoise

@pytest.mark.parametrize("mu, sd", [(.3, .5), (-.6, 1.2)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gaussian_data_come_out_of_the_chain_as_they_went_in(schedule, mu, sd):
    "From x0 = 1, of which nothing is left at t = 999, the chains end in samples of N(mu, sd^2); from a middle t they keep data distributed so."
    shape, oracle = (16, 1, 32, 32), gaussian_oracle(mu, sd, schedule)
    n = np.prod(shape)
    for t, x0 in ((999, torch.ones(shape).double()), (400, mu + sd * draws(shape, 3)())):
        left = alpha_bars(schedule)[t].sqrt().item() if t == 999 else 0
        for out in (restore_ancestral(oracle, x0, t, draws(shape, 4), schedule), restore_ddim(oracle, x0, t, draws(shape, 5)(), t + 1, schedule)):
            assert float(out.mean()) == pytest.approx(mu, abs=4 * sd / n**.5 + 2 * left)
            assert float(out.std()) == pytest.approx(sd, rel=.02 + 3 / (2 * n)**.5)                     # steps are finite: within 2 %
            z = (out - out.mean()) / out.std()
            assert abs(float((z**3).mean())) < .1 and float((z**4).mean()) == pytest.approx(3, abs=.15)

@pytest.mark.parametrize("schedule", SCHEDULES)
def test_chain_variance_follows_its_recursion(schedule):
    "With a linear denoiser the variance of every step is known exactly: v' = (w0 k + ws)^2 v + std^2."
    mu, sd, t, shape = 0., .8, 60, (32, 1, 32, 32)
    a = alpha_bars(schedule).double()
    k = lambda s: float(sd**2 * a[s].sqrt() / (a[s] * sd**2 + 1 - a[s]))
    v = float(1 - a[t])                                                                               # x0 = 0, noised
    for s in range(t, 0, -1):
        w0, ws, std = posterior(s, schedule)
        v = (w0 * k(s) + ws)**2 * v + std**2
    out = restore_ancestral(gaussian_oracle(mu, sd, schedule), torch.zeros(shape).double(), t, draws(shape, 9), schedule)
    assert float(out.std()) == pytest.approx(k(0) * v**.5, rel=4 / (2 * np.prod(shape))**.5)

@pytest.mark.parametrize("t", [-1, 1000, 5000])
def test_a_step_outside_the_schedule_is_refused(t):
    x, never = torch.zeros(1, 1, 4, 4), lambda x, t: pytest.fail("the network was called")
    for f in (lambda: restore_one_step(never, x, t, x), lambda: restore_ancestral(never, x, t, lambda: x), lambda: restore_ddim(never, x, t, x, 1)):
        with pytest.raises(UadError, match=r"restore.t_test: -?\d+ is outside the schedule: choose 0 to 999"): f()
    with pytest.raises(UadError, match="0 to 9$"): restore_ancestral(never, x, 10, lambda: x, timesteps=10)

@pytest.mark.parametrize("steps", [0, -3, 12])
def test_impossible_ddim_steps_are_refused(steps):
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(UadError, match="restore.sampler_steps: .* choose 1 to 11"): restore_ddim(lambda x, t: x, x, 10, x, steps)

@pytest.mark.gpu
def test_chains_on_cuda():
    if not torch.cuda.is_available(): pytest.skip("no CUDA device")
    x0 = torch.rand(2, 1, 16, 16, generator=seeded()) * 2 - 1
    def run(device):
        g = seeded(1)
        draw = lambda: simplex_noise(2, 16, generator=g, device=device)
        x = x0.to(device)
        return [f.cpu() for f in (restore_ancestral(curved, x, 50, draw), restore_ddim(curved, x, 500, draw(), 10), restore_one_step(curved, x, 500, draw()))]
    for a, b in zip(run("cpu"), run("cuda")): torch.testing.assert_close(a, b, atol=1e-4, rtol=0)

def package_sums(n, size, octaves, frequency, anchored=False):
    "Fields (n, size, size) of summed octaves made with the opensimplex package; anchored: one lattice for all octaves from (0, 0), as in the released code, else each at a random place."
    import opensimplex
    rng, out = np.random.default_rng(0), []
    for i in range(n):
        opensimplex.seed(i)
        places = np.zeros((octaves, 2, 1)) if anchored else rng.random((octaves, 2, 1)) * 200
        out.append(sum(.8**o * opensimplex.noise2array(*(places[o] + np.arange(size) / (frequency / 2**o))).T for o in range(octaves)))
    return np.array(out)

def spectrum(f):
    "Shares of the power by radial frequency in cycles a field, edges 0, 1.5, 3, 6, 12 and the rest; Hann window."
    size = f.shape[-1]
    p = (np.abs(np.fft.fft2(f * np.outer(np.hanning(size), np.hanning(size))))**2).mean(0)
    r = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)) * size
    bands = np.array([p[(r >= a) & (r < b)].sum() for a, b in zip((0, 1.5, 3, 6, 12), (1.5, 3, 6, 12, size))])
    return bands / bands.sum()

def correlation(f, lag): return float(((f[:, lag:] * f[:, :-lag]).mean() + (f[..., lag:] * f[..., :-lag]).mean()) / 2 / (f * f).mean())

@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("n, size, octaves, frequency", [(40, 48, 5, 32), pytest.param(100, 96, 6, 64, marks=pytest.mark.slow)], ids=["half-size", "as-used"])
def test_octave_sums_have_the_statistics_of_opensimplex(n, size, octaves, frequency, anchored):
    "Std, quantiles, kurtosis, radial spectrum and autocorrelation of the sum of octaves; the field is 1.5 of the largest cells wide, the finest cell 2 pixels, as in the paper's noise."
    theirs = package_sums(n, size, octaves, frequency, anchored)
    ours = torch.cat([simplex_noise(50, size, octaves, .8, frequency, generator=seeded(s), anchored=anchored) for s in range(20)])[:, 0].numpy()
    assert abs(ours.mean()) < .02 and theirs.std() == pytest.approx(ours.std(), rel=.06)
    if not anchored: assert ours.std() == pytest.approx(simplex_std(octaves, .8), rel=.02)
    np.testing.assert_allclose(np.quantile(ours, (.01, .05, .25, .5, .75, .95, .99)), np.quantile(theirs, (.01, .05, .25, .5, .75, .95, .99)), atol=.09)
    kurtosis = [(f**4).mean() / (f**2).mean()**2 for f in (theirs, ours)]
    assert kurtosis[0] == pytest.approx(kurtosis[1], abs=.15) and kurtosis[1] < 2.9                       # flatter than a Gaussian's 3
    np.testing.assert_allclose(spectrum(ours), spectrum(theirs), atol=.05)
    for lag in (1, 2, 4, 8, 16, 24): assert correlation(theirs, lag) == pytest.approx(correlation(ours, lag), abs=.06), lag

def test_anchored_fields_have_the_std_map_of_one_lattice_for_all_octaves():
    "Exactly 0 at pixel (0, 0); near it the octaves share a gradient, so that the std rises as in the released code, and twice as fast as with a lattice for each octave."
    theirs, ours = package_sums(400, 8, 6, 64, anchored=True), simplex_noise(4000, 8, generator=seeded(), anchored=True)[:, 0].numpy()
    assert (ours[:, 0, 0] == 0).all() and (theirs[:, 0, 0] == 0).all() and ours[:, 0, 1].std() > .35
    np.testing.assert_allclose(ours.std(0), theirs.std(0), atol=.08)

def test_simplex_std_is_the_std_at_every_pixel_for_every_cell_size():
    g = seeded()
    def std(*args, **kw): return torch.cat([simplex_noise(60, (3, 4), *args, generator=g, **kw) for _ in range(600)]).std(0)       # many lattices, and many gradients on each
    for frequency in (64, 3.7, 1): np.testing.assert_allclose(std(octaves=1, frequency=frequency), simplex_std(1), rtol=.05)
    for octaves, persistence in ((6, .8), (2, 1.)): np.testing.assert_allclose(std(octaves, persistence), simplex_std(octaves, persistence), rtol=.05)
    assert simplex_std() == pytest.approx(.592, abs=5e-4) and simplex_std(1) == pytest.approx(.368, abs=5e-4)
    with pytest.raises(UadError, match="octaves is 0"): simplex_std(0)
