"Group norm and SiLU in one operation: PyTorch's result and gradients for any shape, number of threads and caller; and what happens where Numba cannot do its part."
import copy, os, pickle, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.nn.functional import group_norm, silu
from uad_study import kernels, models
from uad_study.kernels import norm_silu


def result(f, shape, groups, seed=0, dtype=torch.float32, scale=1., offset=0., first=0., shifts=None, unused=False):
    "Maps of standard deviation `scale` around `offset`, their first pixel `first` off, and, of size `shifts`, numbers that f adds: output, and the gradients of maps, weight, bias and those."
    g = torch.Generator().manual_seed(seed)
    x, w, b, dz, e = (torch.randn(s, generator=g) for s in (shape, shape[1], shape[1], shape, shape[:2]))
    x[..., 0, 0] += first
    inputs = [v.to(dtype).requires_grad_() for v in ((x * scale + offset).to(memory_format=torch.channels_last), w, b, *([] if shifts is None else [shifts * e]))]
    z = f(inputs[0], groups, *inputs[1:3], 1e-6, *inputs[3:])
    return [z.detach(), *torch.autograd.grad(z, inputs, dz.to(dtype), allow_unused=unused)]


def torchs(x, groups, weight, bias, eps, shift=None): return silu(group_norm(x if shift is None else x + shift[:, :, None, None], groups, weight, bias, eps))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1, 5), st.sampled_from([1, 2, 3, 8]), st.sampled_from([1, 2, 3, 16]), st.integers(1, 40), st.integers(1, 13), st.integers(0, 99), st.sampled_from([1., 1e-3, 30.]), st.sampled_from([0., 5.]), st.sampled_from([0., 100.]), st.sampled_from([None, .5, 20.]), st.sampled_from([1, 2]))
def test_as_near_to_float64_as_pytorch(n, groups, each, h, w, seed, scale, offset, first, shifts, threads):
    if each * h * w == 1: h = 2
    torch.set_num_threads(threads)
    case = dict(shape=(n, groups * each, h, w), groups=groups, seed=seed, scale=scale, offset=offset, first=first, shifts=shifts)
    exact, ours, theirs = result(torchs, dtype=torch.float64, **case), result(norm_silu, **case), result(torchs, **case)
    x = result(lambda x, groups, w, b, eps, shift=torch.zeros(()): x + (shift[:, :, None, None] if shift.ndim else shift), dtype=torch.float64, unused=True, **case)[0].reshape(n, groups, -1)
    deviation = (x.var(-1, correction=0) + 1e-6).sqrt()
    normed = ((x - x.mean(-1, keepdim=True)) / deviation[..., None]).abs().max()
    rounded = 1 + x.abs().max() / deviation.min()                           # how much larger what is rounded is than what is left of it
    summands = 3 * rounded, 10 * rounded / deviation.min(), 5 * rounded * normed, 5 * rounded, 10 * rounded / deviation.min() * h * w        # the size of what is added up, and may cancel
    assert len(ours) == 4 + (shifts is not None)
    for a, b, e, size in zip(ours, theirs, exact, summands): assert (a - e).abs().max() <= 3 * (b - e).abs().max() + 2e-6 * max(e.abs().max(), size)


def test_the_same_bits_with_any_number_of_threads_and_from_several_callers_at_once():
    case, found = ((7, 32, 9, 11), 8), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(result(norm_silu, *case))
        assert torch.get_num_threads() == threads
    def call(seed): torch.set_num_threads(2); return [result(norm_silu, *case, seed=seed) for _ in range(20)]
    with ThreadPoolExecutor(3) as pool: many = list(pool.map(call, [0, 0, 1]))
    for other in (found[1], *many[0], *many[1]): assert all(map(torch.equal, found[0], other))
    assert not torch.equal(many[2][0][0], found[0][0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e25, 1e38])
def test_what_is_not_finite_is_not_hidden(value):
    "A training that breaks must be noticed by its loss."
    def z(f):
        x = torch.rand(3, 8, 6, 5, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
        x[1, 2, 3, 4] = value
        return f(x, 4, torch.ones(8), torch.zeros(8), 1e-6)
    assert torch.equal(z(norm_silu).isfinite(), z(torchs).isfinite()) and not z(norm_silu).isfinite().all()


def test_extreme_values_of_y():
    "SiLU far out: exp at its limits."
    for v in (-1e4, -120., -88., -87., -30., 30., 87., 88., 120., 1e4):
        x = torch.tensor([-1., 1.]).view(1, 1, 1, 2); b = torch.tensor([v])
        (a, da), (e, de) = ((z := f(x.to(d), 1, torch.ones(1, dtype=d), y := b.to(d).requires_grad_(), 1e-6), torch.autograd.grad(z, y, torch.tensor([[[[1., 2.]]]]).to(d))[0]) for f, d in ((norm_silu, torch.float32), (torchs, torch.float64)))
        for p, q in ((a, e), (da, de)): assert (p - q).abs().max() <= 2e-6 * q.abs().max() + 1e-33, v


def test_a_gradient_of_the_gradient_is_refused():
    x = torch.rand(1, 2, 3, 3, requires_grad=True)
    dx, = torch.autograd.grad(norm_silu(x, 1, torch.ones(2), torch.zeros(2)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"): dx.sum().backward()


def test_other_tensors_take_pytorchs_operations(monkeypatch):
    called = []
    monkeypatch.setattr(models, "_kernel", lambda: lambda *a: called.append(1) or norm_silu(*a))
    m = models.NormSiLU(2, 4)
    last = torch.rand(2, 4, 5, 6).to(memory_format=torch.channels_last)
    for x in (last.double(), last.to("meta"), last.bfloat16()):
        net = models.NormSiLU(2, 4).to(x.device, x.dtype)
        assert net(x, torch.ones_like(x[..., 0, 0])).shape == x.shape and not called
    assert m(last, torch.rand(2, 4).bfloat16()).isfinite().all() and not called
    shift = torch.rand(2, 4)
    torch.testing.assert_close(m(last, shift), silu(group_norm(last + shift[:, :, None, None], 2))); assert torch.equal(m(last), m(last.contiguous())) and called == [1, 1, 1]


@pytest.mark.parametrize("shape, groups, w, b", [((2, 10, 3, 3), 4, 10, 10), ((2, 8, 3, 3), 4, 4, 8), ((2, 8, 3, 3), 4, 8, 4), ((2, 8, 3), 4, 8, 8), ((2, 8, 0, 3), 4, 8, 8), ((2, 8, 1, 1), 8, 8, 8)])
def test_shapes_that_do_not_fit_are_refused(shape, groups, w, b):
    with pytest.raises(ValueError, match="groups"): norm_silu(torch.rand(shape), groups, torch.ones(w), torch.zeros(b))


def test_shifts_that_do_not_fit_are_refused():
    for shape in ((8,), (2, 4), (3, 8)):
        with pytest.raises(ValueError, match="shift"): norm_silu(torch.rand(2, 8, 3, 3), 4, torch.ones(8), torch.zeros(8), shift=torch.rand(shape))


def test_as_a_part_of_a_model():
    "Frozen weights, gradients that add up, an empty batch, copies, inference, operations in place, maps and gradients in any order of memory."
    m = models.NormSiLU(2, 4)
    x = torch.rand(3, 4, 5, 6).to(memory_format=torch.channels_last)
    z = m(x); z.sum().backward(); once = m.weight.grad.clone()
    m(x).sum().backward(); torch.testing.assert_close(m.weight.grad, 2 * once)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))): assert torch.equal(other(x), z)
    with torch.inference_mode(): assert torch.equal(m(x), z)
    assert torch.equal(m(x).add_(1), z + 1) and z.is_contiguous(memory_format=torch.channels_last)
    m.weight.requires_grad_(False); y = x.clone(memory_format=torch.preserve_format).requires_grad_()
    m(y)[..., 1:, :].permute(3, 0, 1, 2).sum().backward(); strided = y.grad.clone(); y.grad = None
    norm_silu(y.contiguous(), 2, m.weight, m.bias, m.eps)[..., 1:, :].sum().backward(); assert torch.allclose(y.grad, strided, atol=1e-7) and torch.equal(m.weight.grad, 2 * once)
    empty = x[:0].requires_grad_(); m(empty).sum().backward(); assert empty.grad.shape == (0, 4, 5, 6)


def test_a_placed_denoiser_uses_it(monkeypatch):
    called = []
    monkeypatch.setattr(models, "_kernel", lambda: lambda *a: called.append(1) or norm_silu(*a))
    model = models.build_model(models.model_config(dict(name="ddpm", channels=[16, 32, 32], num_res_blocks=1, num_head_channels=16, norm_num_groups=16, patch=4)))
    norms = sum(isinstance(m, models.NormSiLU) for m in model.modules())
    for precision, expected in (("float32", norms), ("bf16", 0)):
        called.clear()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"): models.placed(model, "cpu", precision).denoiser(torch.rand(2, 1, 96, 96), torch.tensor([3, 7]))
        assert norms > 25 and len(called) == expected


WITHOUT = """
import sys
if "hide" in sys.argv: sys.modules["numba"] = None
import torch
from uad_study import models
m = models.NormSiLU(2, 4)
x = torch.rand(2, 4, 8, 8).to(memory_format=torch.channels_last)
torch.testing.assert_close(m(x), torch.nn.functional.silu(torch.nn.functional.group_norm(x, 2)))
print(models._kernel(), "uad_study.kernels" in sys.modules)
"""


@pytest.mark.parametrize("how", ["hide", "NUMBA_DISABLE_JIT", "broken"])
def test_without_numba(how, tmp_path):
    if how == "broken": (tmp_path/"numba.py").write_text("raise OSError('libllvmlite.so: cannot open shared object file')\n")
    r = subprocess.run([sys.executable, "-c", WITHOUT, how], capture_output=True, text=True, env=os.environ | {how: "1", "PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    assert (r.returncode, r.stdout) == (0, "None False\n")
    assert ("does not work (libllvmlite.so" in r.stderr) if how == "broken" else r.stderr == ""


def test_where_nothing_can_be_kept():
    "Numba compiles for this process alone where it has no place for what it compiles (here: a function that is in no file)."
    space = {}
    exec("def twice(x): return 2 * x", space)
    assert kernels._compiled(space["twice"])(21) == 42


CALL = """
import resource, sys
{before}
import torch
torch.set_num_threads(1)
from uad_study import kernels
x = torch.linspace(0, 1, 96).view(1, 4, 4, 6).contiguous(memory_format=torch.channels_last)
print(float(kernels.norm_silu(x, 2, torch.ones(4), torch.zeros(4)).sum()), kernels._forward_alone.stats.cache_hits.total())
"""


def test_fault_what_numba_kept_is_damaged_or_cannot_be_written(tmp_path):
    def call(before=""):
        r = subprocess.run([sys.executable, "-c", CALL.format(before=before)], capture_output=True, text=True, env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}, cwd=tmp_path)
        assert (r.returncode, r.stderr) == (0, "")
        return r.stdout.split()
    full = "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"                      # no file may be longer: the same error path as a full disk
    value, hits = call("import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); " + full); assert hits == "0"
    assert call() == [value, "0"] and call() == [value, "1"]
    for kind, rest in (("nbc", 100), ("nbi", 20)):
        files = list(tmp_path.rglob(f"kernels._forward*.{kind}")); assert files
        for f in files: f.write_bytes(f.read_bytes()[:rest])
        assert call() == [value, "0"]


FORK = """
import os, sys, torch
torch.set_num_threads(2)
from uad_study.kernels import norm_silu
def z(): return norm_silu(torch.linspace(0, 1, 192).view(2, 4, 4, 6), 2, torch.ones(4), torch.zeros(4))
a = z()
if (child := os.fork()) == 0: os._exit(0 if torch.equal(z(), a) else 1)
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_in_a_forked_process(tmp_path):
    r = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert r.stdout == "0\n", r.stderr
