"Group norm and SiLU in one pass: PyTorch's result and gradients for any shape, number of threads and caller; and what happens where Numba cannot do its part."
import subprocess, sys
from concurrent.futures import ThreadPoolExecutor
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.nn.functional import group_norm, silu
from uad_study import kernels, models
from uad_study.kernels import norm_silu


def result(f, shape, groups, seed=0, dtype=torch.float32, scale=1., shift=0.):
    g = torch.Generator().manual_seed(seed)
    x, w, b, dz = (torch.randn(s, generator=g) for s in (shape, shape[1], shape[1], shape))
    inputs = [v.to(dtype).requires_grad_() for v in ((x * scale + shift).to(memory_format=torch.channels_last), w, b)]
    z = f(inputs[0], groups, *inputs[1:], 1e-6)
    return [z.detach(), *torch.autograd.grad(z, inputs, dz.to(dtype))]


def torchs(x, groups, *rest): return silu(group_norm(x, groups, *rest))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.sampled_from([1, 2, 3, 8]), st.sampled_from([1, 2, 3, 16]), st.integers(1, 40), st.integers(1, 13), st.integers(0, 99), st.sampled_from([1., 1e-3, 30.]), st.sampled_from([0., 5.]), st.sampled_from([1, 2]))
def test_as_near_to_float64_as_pytorch(n, groups, each, h, w, seed, scale, shift, threads):
    if each * h * w == 1: h = 2
    torch.set_num_threads(threads)
    case = dict(shape=(n, groups * each, h, w), groups=groups, seed=seed, scale=scale, shift=shift)
    exact, ours, theirs = result(torchs, dtype=torch.float64, **case), result(norm_silu, **case), result(torchs, **case)
    for a, b, e in zip(ours, theirs, exact): assert (a - e).abs().max() <= 3 * (b - e).abs().max() + 2e-6 * e.abs().max()


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


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_what_is_not_finite_is_not_hidden(value):
    "A training that breaks must be noticed by its loss."
    def z(f):
        x = torch.rand(3, 8, 6, 5, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
        x[1, 2, 3, 4] = value
        return f(x, 4, torch.ones(8), torch.zeros(8), 1e-6)
    ours, theirs = z(norm_silu).isfinite(), z(torchs).isfinite()
    assert ours[[0, 2]].all() and ours[1, [0, 1, 4, 5, 6, 7]].all() and ((value == 1e30) or not ours[1, 2:4].any()) and (value == 1e30 or torch.equal(ours, theirs))


def test_extreme_values_of_y():
    "SiLU far out: exp at its limits."
    for v in (-1e4, -120., -88., -87., -30., 30., 87., 88., 120., 1e4):
        x = torch.tensor([-1., 1.]).view(1, 1, 1, 2); b = torch.tensor([v])
        a, e = norm_silu(x, 1, torch.ones(1), b), torchs(x.double(), 1, torch.ones(1).double(), b.double(), 1e-6)
        assert (a - e).abs().max() <= 2e-6 * e.abs().max() + 1e-30, v


def test_a_gradient_of_the_gradient_is_refused():
    x = torch.rand(1, 2, 3, 3, requires_grad=True)
    dx, = torch.autograd.grad(norm_silu(x, 1, torch.ones(2), torch.zeros(2)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"): dx.sum().backward()


def test_other_tensors_take_pytorchs_operations(monkeypatch):
    called = []
    monkeypatch.setattr(models, "_kernel", lambda: lambda *a: called.append(1) or norm_silu(*a))
    m = models.NormSiLU(2, 4)
    last = torch.rand(2, 4, 5, 6).to(memory_format=torch.channels_last)
    for x in (last.contiguous(), last.double(), last.to("meta")):
        net = m if x.dtype == torch.float32 else models.NormSiLU(2, 4).double()
        assert net.to(x.device)(x).shape == x.shape and not called
        m.to_empty(device="cpu"); torch.nn.init.ones_(m.weight); torch.nn.init.zeros_(m.bias)
    assert torch.allclose(m(last), m(last.contiguous()), atol=1e-6) and called == [1]


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


@pytest.mark.parametrize("how", ["hide", "NUMBA_DISABLE_JIT"])
def test_without_numba(how, tmp_path):
    import os
    r = subprocess.run([sys.executable, "-c", WITHOUT, how], capture_output=True, text=True, env=os.environ | {how: "1"}, cwd=tmp_path)
    assert (r.returncode, r.stdout, r.stderr) == (0, "None False\n", "")


def test_where_nothing_can_be_kept():
    "Numba compiles for this process alone where it has no place for what it compiles (here: a function that is in no file)."
    space = {}
    exec("def twice(x): return 2 * x", space)
    assert kernels._compiled(space["twice"])(21) == 42
