"Trainings killed at any moment, stopped, on a full disk, with damaged checkpoints: each ends as one that nothing happened to, bit for bit."
import dataclasses, errno, json, multiprocessing, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from training import assert_same_end, go, metrics, write_heads
from uad_study.cohort import Cohort
from uad_study.core import Stopped, UadError, remove_leftovers
from uad_study.train import TrainConfig, read_checkpoint

CONFIG = TrainConfig(steps=12, batch_size=4, lr=1e-3, val_every=4, val_slices=8, snapshots=(6,), ema=.9, augment=True, checkpoint_minutes=0)
NAMES = ("ddpm", "ae")


def attempt(cohort, name, folder, die_at=None, **more):
    """One attempt, in a process of its own: exit code 0 when done, 3 when stopped. `die_at`: the process kills itself (SIGKILL) at that moment of its writing:
    before or after a file takes its name, or in the middle of a file."""
    torch.set_num_threads(1)
    Path(folder).mkdir(exist_ok=True)
    remove_leftovers(folder)                                          # as the process that starts a run does
    if die_at is not None: _die_while_writing(die_at)
    try: go(Cohort(cohort), name, folder, CONFIG if not more else dataclasses.replace(CONFIG, steps=400), **more)
    except Stopped: os._exit(3)
    os._exit(0)


def _die_while_writing(moment: int):
    left, replace, save = [moment], os.replace, torch.save
    def moment_passes():
        left[0] -= 1
        if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)
    def replacing(*a): moment_passes(); replace(*a); moment_passes()
    class Half:
        "A file that may die in the middle: half of what it is given is written then."
        def __init__(self, f): self.f = f
        def __getattr__(self, k): return getattr(self.f, k)
        def write(self, b):
            left[0] -= 1
            if left[0] < 0: self.f.write(bytes(b)[:len(bytes(b)) // 2]); self.f.flush(); os.kill(os.getpid(), signal.SIGKILL)
            return self.f.write(b)
    os.replace, torch.save = replacing, lambda content, f: save(content, Half(f))


class Attempts:
    "Attempts in fresh processes, forked from one that has loaded the libraries and nothing else."
    def __init__(self):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["test_train_faults", "monai.networks.nets", "uad_study.train"])

    def start(self, *a, **kw):
        p = self.context.Process(target=attempt, args=a, kwargs=kw)
        p.start()
        return p

    def end(self, *a, **kw) -> int:
        p = self.start(*a, **kw)
        p.join(120)
        return p.exitcode


@pytest.fixture(scope="module")
def attempts(): return Attempts()


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    d = tmp_path_factory.mktemp("heads")/"cohort"
    write_heads(d)
    return d


@pytest.fixture(scope="module")
def whole(attempts, cohort, tmp_path_factory):
    "The uninterrupted trainings by name, and the seconds that one takes."
    out = {}
    for name in NAMES:
        assert attempts.end(cohort, name, d := tmp_path_factory.mktemp(name)) == 0
        began = time.monotonic()
        shutil.rmtree(d); assert attempts.end(cohort, name, d) == 0
        out[name] = d, time.monotonic() - began
    return out


def killed_until_done(attempts, cohort, name, folder, seconds, rng, wanted) -> int:
    "Attempts killed at `wanted` random moments or more, then one to the end. Every second kill strikes while something is written. Returns the number of kills."
    kills = 0
    while kills < wanted:
        if kills % 2: code = attempts.end(cohort, name, folder, die_at=rng.randrange(60))
        else:
            p = attempts.start(cohort, name, folder)
            time.sleep(rng.uniform(.02, seconds)); p.kill(); p.join()
            code = p.exitcode
        assert code in (0, -signal.SIGKILL), code
        kills += code == -signal.SIGKILL
        if code == 0: return kills
    assert attempts.end(cohort, name, folder) == 0
    return kills


@pytest.mark.parametrize("name", NAMES)
def test_killed_training_resumes_to_the_same_end(attempts, cohort, whole, tmp_path, name):
    kills = killed_until_done(attempts, cohort, name, tmp_path, whole[name][1], random.Random(1), 3)
    assert kills and not list(tmp_path.glob(".tmp-*"))
    assert_same_end(whole[name][0], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_hundred_random_kills_of_a_training(attempts, cohort, whole, tmp_path):
    rng, kills, n = random.Random(3141), 0, 0
    while kills < 120:
        name, d, n = NAMES[n % 2], tmp_path/str(n), n + 1
        kills += killed_until_done(attempts, cohort, name, d, whole[name][1], rng, 6)
        assert_same_end(whole[name][0], d); assert not list(d.glob(".tmp-*"))
        shutil.rmtree(d)
    print(f"{kills} kills of {n} trainings")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kill_at_each_moment_of_writing(attempts, cohort, whole, tmp_path):
    "The first, second, third ... moment of an attempt that goes on from step 3 or so, until it has none left."
    assert attempts.end(cohort, "ae", tmp_path/"start", die_at=70) == -signal.SIGKILL
    for moment in range(0, 400, 11):
        shutil.copytree(tmp_path/"start", tmp_path/"x")
        code = attempts.end(cohort, "ae", tmp_path/"x", die_at=moment)
        if code == 0: break
        assert code == -signal.SIGKILL and attempts.end(cohort, "ae", tmp_path/"x") == 0
        assert_same_end(whole["ae"][0], tmp_path/"x"); shutil.rmtree(tmp_path/"x")
    assert moment > 60


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGUSR1])
def test_fault_signal_stops_and_the_training_resumes(attempts, cohort, whole, tmp_path, sign):
    folder, seconds = whole["ddpm"]
    for _ in range(5):                                                     # a busy machine may notice the checkpoint only when the training is over
        shutil.rmtree(tmp_path)
        p = attempts.start(cohort, "ddpm", tmp_path)
        while not (tmp_path/"last.pt").exists(): time.sleep(.01)
        os.kill(p.pid, sign); p.join()
        if p.exitcode: break
    assert p.exitcode == 3
    parts = json.loads((tmp_path/"parts.json").read_text())["parts"]
    assert parts[-1]["how"] == "stopped" and parts[-1]["end"] == read_checkpoint(tmp_path/"last.pt")["step"] > 0
    assert metrics(tmp_path) == metrics(folder)[:len(metrics(tmp_path))]
    assert attempts.end(cohort, "ddpm", tmp_path) == 0
    assert_same_end(folder, tmp_path)


def as_elsewhere(file):
    "The checkpoint as a GPU in float32 would have written it, or the version before the fused optimiser: tensors in torch's own order of memory. Returns how many lay otherwise."
    content, moved = read_checkpoint(file), []
    for values in (content["model"], content["ema"], *content["optimizer"]["state"].values()):
        for k, v in values.items():
            if not v.is_contiguous(): values[k] = v.contiguous(); moved.append(k)
    for group in content["optimizer"]["param_groups"]: group["fused"] = None
    torch.save(content, file)
    return len(moved)


def test_a_checkpoint_from_elsewhere_resumes_to_the_same_end(cohort, whole, tmp_path):
    for name in NAMES:
        shutil.copytree(whole[name][0], d := tmp_path/name)
        os.replace(d/"previous.pt", d/"last.pt")                           # one step before the end
        assert read_checkpoint(d/"last.pt")["step"] == 11 and as_elsewhere(d/"last.pt") > 5
        go(Cohort(cohort), name, d, CONFIG)
        assert_same_end(whole[name][0], d)


def test_fault_damaged_checkpoints_at_twenty_places(cohort, whole, tmp_path, capsys):
    "A flipped byte anywhere in last.pt: noticed, or harmless; the end is the same."
    rng, told, folder = random.Random(7), 0, whole["ae"][0]
    for i in range(20):
        shutil.copytree(folder, d := tmp_path/str(i))
        file = d/"last.pt"
        spoilt = bytearray(file.read_bytes()); spoilt[rng.randrange(len(spoilt))] ^= 0xff; file.write_bytes(spoilt)
        result = go(Cohort(cohort), "ae", d, CONFIG)
        out = capsys.readouterr().out
        if "last.pt is damaged: going on from previous.pt, step 11" in out: told += 1; assert "last.pt is damaged" in result["parts"][-1]["says"]
        else: assert out == ""
        assert_same_end(folder, d)
    assert told > 10


def test_fault_truncated_and_missing_checkpoints(cohort, whole, tmp_path, capsys):
    def spoil(*names):
        for n in names: (tmp_path/n).write_bytes((tmp_path/n).read_bytes()[:1000])
    shutil.copytree(whole["ae"][0], tmp_path, dirs_exist_ok=True)
    spoil("last.pt"); go(Cohort(cohort), "ae", tmp_path, CONFIG)
    assert "last.pt is damaged: going on from previous.pt, step 11" in capsys.readouterr().out
    (tmp_path/"last.pt").rename(tmp_path/"previous.pt")                # as a kill between two names leaves it
    go(Cohort(cohort), "ae", tmp_path, CONFIG)
    assert capsys.readouterr().out == "" and (tmp_path/"last.pt").exists()
    c = torch.load(tmp_path/"last.pt", weights_only=True); c.pop("optimizer"); torch.save(c, tmp_path/"last.pt")
    spoil("best.pt")
    go(Cohort(cohort), "ae", tmp_path, CONFIG)
    assert "starting from the beginning" in capsys.readouterr().out
    assert_same_end(whole["ae"][0], tmp_path)
    with pytest.raises(UadError, match="other settings or data .train.lr = 0.001, not 0.01"): go(Cohort(cohort), "ae", tmp_path, dataclasses.replace(CONFIG, lr=.01))
    spoil("last.pt", "previous.pt")
    go(Cohort(cohort), "ae", tmp_path, CONFIG)
    assert "last.pt and previous.pt are damaged or missing: starting from the beginning" in capsys.readouterr().out
    assert_same_end(whole["ae"][0], tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    "A disk of 8 MB."
    d = tmp_path/"disk"
    d.mkdir()
    r = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", d], capture_output=True, text=True) if shutil.which("mount") else None
    if r is None or r.returncode: pytest.skip(f"a small disk cannot be mounted: {r.stderr.strip() if r else 'no mount'}")
    yield d
    subprocess.run(["umount", d], check=True)


def test_fault_full_disk_while_a_checkpoint_is_written(cohort, whole, small_disk):
    "One clear line, nothing half-written, the earlier checkpoint whole; with space again the training resumes to the same end."
    run, ballast = small_disk/"run", small_disk/"ballast"
    def fill(step, *a, **facts):
        if step == 5:
            with suppress_full(), open(ballast, "wb", buffering=0) as f:
                while True: f.write(bytes(4096))
    with pytest.raises(UadError, match="cannot be written: the disk is full: free some space") as e: go(Cohort(cohort), "ae", run, CONFIG, tick=fill)
    assert "\n" not in str(e.value) and not list(run.glob(".tmp-*"))
    ballast.unlink()
    assert read_checkpoint(run/"last.pt")["step"] == 5
    go(Cohort(cohort), "ae", run, CONFIG)
    assert_same_end(whole["ae"][0], run)


class suppress_full:
    def __enter__(self): pass
    def __exit__(self, kind, e, trace): return isinstance(e, OSError) and e.errno == errno.ENOSPC


def test_resumed_tensorboard_shows_each_step_once(cohort, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    class Broken(Exception): pass
    def breaking(step, *a, **facts):
        if step == 7: raise Broken
    config = dataclasses.replace(CONFIG, checkpoint_minutes=60)
    with pytest.raises(Broken): go(Cohort(cohort), "ae", tmp_path, config, tick=breaking, tensorboard=True)       # steps 1 to 7, none of which is in a checkpoint
    time.sleep(1.1)                                                                                                   # event files are ordered by the second in their names
    go(Cohort(cohort), "ae", tmp_path, config, tensorboard=True)
    shown = accumulator.EventAccumulator(str(tmp_path/"tensorboard")).Reload()
    assert [s.step for s in shown.Scalars("loss")] == list(range(1, 13)) and [s.step for s in shown.Scalars("val_loss")] == [0, 4, 8, 12]
    assert [s.value for s in shown.Scalars("val_loss")] == pytest.approx([m["val_loss"] for m in metrics(tmp_path)])


def test_fault_without_tensorboard(cohort, tmp_path, monkeypatch):
    for m in ("tensorboard", "torch.utils.tensorboard"): monkeypatch.setitem(sys.modules, m, None)
    with pytest.raises(UadError, match="^engine.tensorboard: .*pip install 'uad_study.tensorboard.'"): go(Cohort(cohort), "ae", tmp_path, CONFIG, tensorboard=True)


@pytest.mark.slow
def test_killed_caller_of_two_processes(attempts, cohort, tmp_path):
    "Those that it started notice, save, and end."
    p = attempts.start(cohort, "ae", tmp_path/"x", devices=2)
    while not (tmp_path/"x"/"last.pt").exists(): assert p.is_alive(); time.sleep(.05)
    p.kill(); p.join()
    def members(): return [q for q in os.listdir("/proc") if q.isdigit() and b"_member" in _command(q) and str(tmp_path).encode() in _folder(q)]
    for _ in range(200):
        if not members(): break
        time.sleep(.1)
    parts = json.loads((tmp_path/"x"/"parts.json").read_text())["parts"]
    assert not members() and parts[-1]["how"] == "stopped" and parts[-1]["end"] == read_checkpoint(tmp_path/"x"/"last.pt")["step"] > 0


def _command(pid) -> bytes:
    try: return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError: return b""


def _folder(pid) -> bytes:
    try: return b" ".join(os.readlink(f).encode() for f in Path(f"/proc/{pid}/fd").iterdir())
    except OSError: return b""
