"Several processes train one model: the losses of one, stopped, resumed and killed as one."
import dataclasses, os, signal, time
import numpy as np, pytest, torch
from training import assert_same_end, go, metrics, small, weights, write_heads
from uad_study.core import Stopped, UadError
from uad_study.train import TrainConfig

# Measured: training losses differ by 4e-6 or less over the first 11 steps and by 3e-5 or less over 40; validation losses by 4e-5 or less. Adam blows rounding up where gradients are nearly zero
# (as of a bias before batch norm), and two threads against one thread differ as much: 3e-5 over these 40 steps of the autoencoder; at lr 1e-3, 4e-3 (two processes: 2e-3).
EARLY, LOSS, VAL, WEIGHTS = 1e-5, 1e-4, 3e-4, 1e-3
CONFIG = TrainConfig(steps=20, batch_size=4, lr=1e-4, val_every=5, val_slices=26, snapshots=(10,), ema=.9, clip_norm=1., augment=True, checkpoint_minutes=60)


@pytest.fixture(scope="module")
def heads(tmp_path_factory): return write_heads(tmp_path_factory.mktemp("heads")/"cohort")


class Curve:
    "A tick that keeps the losses by step, and may do something at one of them."
    def __init__(self, at=None, act=None): self.losses, self.at, self.act = {}, at, act

    def __call__(self, step, steps, text, **facts):
        if facts["loss"] is not None: self.losses[step] = facts["loss"]
        if step == self.at: self.act()


def interrupt(): os.kill(os.getpid(), signal.SIGUSR1)


def assert_close(one, two, a: Curve, b: Curve):
    for s in b.losses: assert b.losses[s] == pytest.approx(a.losses[s], rel=EARLY if s < 12 else LOSS), s
    for x, y in zip(metrics(one), metrics(two), strict=True):
        assert x["step"] == y["step"] and y["val_loss"] == pytest.approx(x["val_loss"], rel=VAL) and y.get("loss", 0) == pytest.approx(x.get("loss", 0), rel=LOSS)
    for f in ("best.pt", "snapshot-000010.pt"):
        x, y = weights(one/f), weights(two/f)
        assert x.keys() == y.keys()
        far, size = (sum(float(d.double().square().sum()) for d in v) ** .5 for v in ([x[k] - y[k] for k in x if x[k].is_floating_point()], [x[k] for k in x if x[k].is_floating_point()]))
        assert far < WEIGHTS * size, far / size


@pytest.mark.parametrize("name", ["ddpm", pytest.param("ddpm_gaussian", marks=pytest.mark.slow), pytest.param("dae", marks=pytest.mark.slow), pytest.param("vae", marks=pytest.mark.slow), *(pytest.param(n, marks=pytest.mark.slow) for n in ("ssim_ae", "pddpm", "cddpm"))])
def test_two_processes_learn_what_one_does(heads, tmp_path, name):
    "And a training that one process began goes on with two."
    one, two, looks = Curve(), Curve(), []
    go(heads, name, tmp_path/"one", CONFIG, one)
    with pytest.raises(Stopped): go(heads, name, tmp_path/"two", CONFIG, Curve(2, interrupt))
    result = go(heads, name, tmp_path/"two", CONFIG, two, devices=2, look=lambda step, x, x_hat: looks.append((step, x.shape == x_hat.shape)))
    assert sorted(two.losses) == list(range(3, 21)) and looks == [(s, True) for s in (5, 10, 15, 20)]
    assert [(p["start"], p["end"], p["how"]) for p in result["parts"]] == [(0, 3, "stopped"), (3, 20, "done")]
    assert_close(tmp_path/"one", tmp_path/"two", one, two)


def test_stop_and_resume_of_two_processes(heads, tmp_path):
    "Batch norm over both; a stop that reaches both; the rest on one device."
    one, two, rest = Curve(), Curve(11, interrupt), Curve()
    config = dataclasses.replace(CONFIG, steps=40, lr=1e-5)
    go(heads, "ae", tmp_path/"one", config, one)
    with pytest.raises(Stopped) as e: go(heads, "ae", tmp_path/"two", config, two, devices=2)
    stopped = int(str(e.value).split()[3])
    assert 11 < stopped <= 40 and torch.load(tmp_path/"two"/"last.pt", weights_only=True)["step"] == stopped
    go(heads, "ae", tmp_path/"two", config, rest)
    assert sorted(two.losses | rest.losses) == list(range(1, 41))
    two.losses |= rest.losses
    assert_close(tmp_path/"one", tmp_path/"two", one, two)


def test_killed_process_ends_the_others_and_resume(heads, tmp_path):
    config = dataclasses.replace(CONFIG, checkpoint_minutes=0, lr=1e-5)
    pids = []
    def kill():
        pids.extend(int(p) for p in os.listdir("/proc") if p.isdigit() and b"_member" in _command(p))
        os.kill(next(p for p in pids if b"RANK=1" in open(f"/proc/{p}/environ", "rb").read().split(b"\0")), signal.SIGKILL)
    with pytest.raises(UadError, match="^engine.devices: process 1 of 2 was killed") as e: go(heads, "ae", tmp_path/"two", config, Curve(6, kill), devices=2)
    assert "\n" not in str(e.value) and len(pids) >= 2
    for _ in range(50):
        if not any(b"_member" in _command(p) for p in pids): break
        time.sleep(.1)
    else: raise AssertionError("a process of the team is still there")
    assert go(heads, "ae", tmp_path/"two", config)["parts"][-1]["how"] == "done"
    go(heads, "ae", tmp_path/"one", config)
    assert [m["val_loss"] for m in metrics(tmp_path/"two")] == pytest.approx([m["val_loss"] for m in metrics(tmp_path/"one")], rel=VAL)


def _command(pid) -> bytes:
    try: return open(f"/proc/{pid}/cmdline", "rb").read()
    except OSError: return b""


@pytest.mark.slow
def test_fault_of_one_process_is_one_line(tmp_path):
    spoilt = write_heads(tmp_path/"cohort", spoilt=2)
    with pytest.raises(UadError, match="subject s2 .T1w. has NaN") as e: go(spoilt, "ae", tmp_path/"two", dataclasses.replace(CONFIG, steps=400), devices=2)
    assert "\n" not in str(e.value)


def test_fault_batch_that_cannot_be_shared(heads, tmp_path):
    with pytest.raises(UadError, match="train.batch_size: 4 slices cannot be shared evenly among 3 devices .engine.devices.: choose a multiple of 3"): go(heads, "ae", tmp_path/"x", CONFIG, devices=3)
    with pytest.raises(UadError, match="engine.devices: must be 1 or more"): go(heads, "ae", tmp_path/"x", CONFIG, devices=0)
    with pytest.raises(UadError, match="engine.device: 'cuda:1' is one device"): go(heads, "ae", tmp_path/"x", CONFIG, devices=2, device="cuda:1")
    if torch.cuda.device_count() < 4:
        with pytest.raises(UadError, match="engine.devices: 4 GPUs are asked for"): go(heads, "ae", tmp_path/"x", CONFIG, devices=4, device="cuda")
    assert not list((tmp_path/"x").iterdir())


@pytest.mark.slow
def test_two_processes_in_half_precision(heads, tmp_path):
    one, two = Curve(), Curve()
    config = dataclasses.replace(CONFIG, precision="bf16")
    assert go(heads, "dae", tmp_path/"one", config, one)["precision"] == go(heads, "dae", tmp_path/"two", config, two, devices=2)["precision"] == "bf16"
    assert list(two.losses.values()) == pytest.approx(list(one.losses.values()), rel=.01)
