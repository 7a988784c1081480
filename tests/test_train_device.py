"What a training does for the sake of a GPU, tried on a CPU: losses that are read late, networks that are compiled."
import dataclasses, json, os, signal
import pytest, torch
from torch.utils._python_dispatch import TorchDispatchMode
from training import TrainConfig, assert_same_end, go, small, write_heads
from uad_study import train as room
from uad_study.core import UadError
from uad_study.train import Team, _advance, _Training

CONFIG = TrainConfig(steps=12, batch_size=4, lr=1e-3, val_every=6, val_slices=8, snapshots=(10,), checkpoint_minutes=0)


@pytest.fixture(scope="module")
def heads(tmp_path_factory): return write_heads(tmp_path_factory.mktemp("device")/"cohort")


def stop_at(step):
    return lambda done, *_, **__: done == step and os.kill(os.getpid(), signal.SIGUSR1)


def test_losses_that_are_read_late_change_nothing(heads, tmp_path, monkeypatch):
    seen = {}
    for name, patience in (("at once", 1), ("late", 5), ("later", 100)):
        monkeypatch.setitem(room._PATIENCE, "cpu", patience)
        seen[name] = []
        config = dataclasses.replace(CONFIG, checkpoint_minutes=0 if name == "at once" else 60)           # a checkpoint reads them, too
        go(heads, "ddpm", tmp_path/name, config, lambda done, *_, loss, **__: seen[name].append((done, loss)))
    for name in ("late", "later"): assert_same_end(tmp_path/"at once", tmp_path/name, ("best.pt", "last.pt", "snapshot-000010.pt"))
    assert [s for s, _ in seen["late"]] == [s for s, _ in seen["at once"]] and len({l for _, l in seen["later"]}) < len({l for _, l in seen["at once"]}) == 13
    kept = torch.load(tmp_path/"late"/"last.pt", weights_only=True)
    assert kept["step"] == 12 and [r["step"] for r in json.loads(kept["records"])] == [0, 6, 12]


def test_stopped_with_losses_unread(heads, tmp_path, monkeypatch):
    go(heads, "ddpm", tmp_path/"one", CONFIG)
    monkeypatch.setitem(room._PATIENCE, "cpu", 100)
    with pytest.raises(room.Stopped): go(heads, "ddpm", tmp_path/"two", dataclasses.replace(CONFIG, checkpoint_minutes=60), stop_at(3))
    kept = torch.load(tmp_path/"two"/"last.pt", weights_only=True)
    assert 3 <= kept["step"] == len(kept["running"]) < 6
    go(heads, "ddpm", tmp_path/"two", CONFIG)
    assert_same_end(tmp_path/"one", tmp_path/"two")


def test_fault_a_loss_that_is_not_finite_is_told_with_its_step(heads, tmp_path, monkeypatch):
    for patience in (1, 4, 100):
        monkeypatch.setitem(room._PATIENCE, "cpu", patience)
        with pytest.raises(UadError, match="^train.lr: the loss is not finite at step 3:"): go(heads, "ddpm", tmp_path/str(patience), dataclasses.replace(CONFIG, lr=1e25, val_every=12, snapshots=(6,), checkpoint_minutes=60))
        assert not list((tmp_path/str(patience)).glob("snapshot*")) and not (tmp_path/str(patience)/"best.pt").exists()


class Reads(TorchDispatchMode):
    "Counts the numbers that `item`, or a test for truth, brings from a tensor to Python, for each of which the host would wait for a GPU (`tolist` is not seen here)."
    n = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.n += f is torch.ops.aten._local_scalar_dense.default
        return f(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["ddpm", "ddpm_gaussian", "dae", "ae"])
def test_nothing_is_read_from_the_device_between(heads, tmp_path, monkeypatch, name):
    monkeypatch.setitem(room._PATIENCE, "cpu", 3)
    t = _Training(heads, "T1w", 0, small(name), dataclasses.replace(CONFIG, clip_norm=1.), tmp_path, "cpu", tensorboard=False, team=Team(), stop=lambda: False, tell=lambda *a, **k: None)
    counts, unread = [], []
    for _ in range(6):
        with Reads() as reads: _advance(t)
        counts.append(reads.n); unread.append(len(t.unread))
    assert counts == [0] * 6 and unread == [1, 2, 0, 1, 2, 0] and len(t.running) == 6


@pytest.fixture
def graphs(monkeypatch):
    "What is compiled is traced, and replayed by PyTorch's operations (no compiler is needed); the operations of each trace are kept."
    seen, compile_ = [], torch.compile
    def backend(graph, inputs): seen.append(len(graph.graph.nodes)); return graph.forward
    monkeypatch.setattr(torch, "compile", lambda f: compile_(f, backend=backend))
    torch._dynamo.reset()
    return seen


@pytest.mark.parametrize("name, least", [("ddpm", 200), ("ae", 60), ("dae", 60), ("cddpm", 200)])
def test_compiled_networks_learn_the_same(heads, tmp_path, graphs, name, least):
    config, plain = (dataclasses.replace(CONFIG, compile=c, ema=.5) for c in (True, False))
    go(heads, name, tmp_path/"plain", plain)
    assert not graphs
    with pytest.raises(room.Stopped): go(heads, name, tmp_path/"compiled", config, stop_at(7))
    assert sum(graphs) >= least, graphs
    go(heads, name, tmp_path/"compiled", config)
    a, b = ([json.loads(line) for line in open(tmp_path/k/"metrics.jsonl")] for k in ("plain", "compiled"))
    assert [m["val_loss"] for m in b] == pytest.approx([m["val_loss"] for m in a], rel=1e-3)
    x, y = (torch.load(tmp_path/k/"best.pt", weights_only=True)["model"] for k in ("plain", "compiled"))
    assert x.keys() == y.keys()
    far, size = (sum(float(v.double().square().sum()) for v in values)**.5 for values in ([x[k] - y[k] for k in x if x[k].is_floating_point()], [x[k] for k in x if x[k].is_floating_point()]))
    assert far < .01 * size, far / size                                     # the norm of the kernel and PyTorch's differ in the last digits, which Adam's first steps enlarge
    with pytest.raises(UadError, match="train.compile = True, not False"): go(heads, name, tmp_path/"compiled", plain)             # other settings than the checkpoint's


@pytest.mark.parametrize("name", ["dae", "ae"])
def test_fault_what_cannot_be_compiled_is_one_line(heads, tmp_path, monkeypatch, name):
    compile_ = torch.compile
    def broken(graph, inputs): raise RuntimeError("no compiler")
    monkeypatch.setattr(torch, "compile", lambda f: compile_(f, backend=broken))
    torch._dynamo.reset()
    with pytest.raises(UadError, match="^train.compile: the network can't be compiled on cpu here .BackendCompilerFailed.: set it to false$"): go(heads, name, tmp_path, dataclasses.replace(CONFIG, compile=True))
