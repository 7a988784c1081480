"A real SLURM of one node, started for the tests in a temporary folder and on loopback alone, stopped after them; and what tests do to it. (No conftest.py: its name is taken by that of the other tests.)"
import json, os, shutil, signal, socket, subprocess, time
from pathlib import Path
import pytest, torch
from conftest import TINY
from uad_study import runs


CONF = """ClusterName=ci
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={S}/munge/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={S}/state
SlurmdSpoolDir={S}/spool
SlurmctldPidFile={S}/run/slurmctld.pid
SlurmdPidFile={S}/run/slurmd.pid
SlurmctldLogFile={S}/log/slurmctld.log
SlurmdLogFile={S}/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=20
GresTypes=gpu
NodeName=localhost NodeAddr=127.0.0.1 CPUs=8 Sockets=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=20000 Gres=gpu:4 State=UNKNOWN
PartitionName=gpu Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(n):
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets: s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets: s.close()
    return ports


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    "The folder of a running SLURM; SLURM_CONF points to it."
    pytest.importorskip("submitit", reason="submitit is not installed: make test-slurm")
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    if missing := [c for c in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(c)]: pytest.skip(f"{missing[0]} is not installed: make test-slurm")
    if os.getuid(): pytest.skip("the one-node SLURM runs as root: sudo make test-slurm")
    S = tmp_path_factory.mktemp("slurm", numbered=True)
    for p in (S, *S.parents):                                                # munged goes through only what others may enter
        if p.stat().st_uid == os.getuid() and p != Path("/"): p.chmod(p.stat().st_mode | 0o711)
    for d in ("state", "spool", "log", "run", "munge"): (S/d).mkdir()
    (S/"munge").chmod(0o711)
    for i in range(4): os.mknod(S/f"fakegpu{i}", 0o600 | 0o020000, os.makedev(1, 3))
    key = S/"munge"/"munge.key"; key.write_bytes(os.urandom(1024)); key.chmod(0o600)
    (S/"slurm.conf").write_text(CONF.format(S=S, ports=free_ports(2)))
    (S/"gres.conf").write_text(f"NodeName=localhost Name=gpu Count=4 File={S}/fakegpu[0-3]\n")
    os.environ["SLURM_CONF"] = str(S/"slurm.conf")
    m = S/"munge"
    start = lambda *c: subprocess.run(c, check=True, timeout=60, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=open(S/"log"/"start.txt", "a"))
    try:
        start("munged", "--force", f"--socket={m}/munge.socket", f"--key-file={m}/munge.key", f"--pid-file={m}/munged.pid", f"--log-file={m}/munged.log", f"--seed-file={m}/munged.seed")
        start("slurmctld", "-f", str(S/"slurm.conf"))
        start("slurmd", "-f", str(S/"slurm.conf"), "-N", "localhost")
        end = time.monotonic() + 30
        while "idle" not in subprocess.run(["sinfo", "-h", "-o", "%t"], capture_output=True, text=True).stdout:
            if time.monotonic() > end: pytest.fail("SLURM did not start: " + (S/"log"/"slurmctld.log").read_text()[-2000:] + (S/"log"/"slurmd.log").read_text()[-2000:])
            time.sleep(.2)
        yield S
    finally:
        subprocess.run(["scancel", "--user=root"], capture_output=True, timeout=60)
        time.sleep(1)
        for f in (S/"run"/"slurmd.pid", S/"run"/"slurmctld.pid", m/"munged.pid"):
            try: os.kill(int(f.read_text()), signal.SIGTERM)
            except (OSError, ValueError): pass
        del os.environ["SLURM_CONF"]


@pytest.fixture(autouse=True)
def empty_queue(request):
    "Each test ends with an empty queue and a node that works."
    yield
    if "slurm" in request.fixturenames:
        subprocess.run(["scontrol", "update", "NodeName=localhost", "State=RESUME"], capture_output=True)
        subprocess.run(["scancel", "--user=root"], capture_output=True)
        end = time.monotonic() + 60
        while subprocess.run(["squeue", "-h"], capture_output=True, text=True).stdout.strip() and time.monotonic() < end: time.sleep(.5)


ENGINE = "engine: {{device: cpu, slots: 1, threads: 1, slurm: {{partition: gpu, cpus: 1, memory_gb: 2, gres: 'gpu:1', time: 60, signal_seconds: 40{more}}}}}\n"


def write_study(folder, steps=12, more="", contrasts="T2w", extra=""):
    "A tiny study as a YAML file, its judging made short. `more`: settings of engine.slurm; `extra`: a change of its text, (old, new)."
    text = TINY.split("engine:")[0].replace("contrasts: [T2w]", f"contrasts: [{contrasts}]").replace("steps: 12", f"steps: {steps}").replace("[intensity, l1, ssim_0.3, ssim_0.9, ssim_1.7, ssim_uniform, ssim_ens]", "[intensity, l1, ssim_0.9]")
    text = text.replace("report: {steps_val: 1, steps_test: 1, post_val: 1, post_test: 1,", "report: {steps_val: 0, steps_test: 0, post_val: 0, post_test: 0,").replace("snapshots: [4]", "snapshots: []")
    settings = dict(partition="gpu", cpus=1, memory_gb=2, gres="gpu:1", time=60, signal_seconds=40) | (more or {})
    (Path(folder)/"s.yaml").write_text((text.replace(*extra) if extra else text) + "engine: " + json.dumps(dict(device="cpu", slots=1, threads=1, slurm=settings)) + "\n")
    return Path(folder)/"s.yaml"


def run_here(out, study, run):
    "Execute one planned run without SLURM, as the local engine does."
    runs.write_run(out, run, study, "cpu")
    assert runs.start_run(out, run, 1).wait() == 0, (Path(out)/run.folder/"log.txt").read_text()


def trained(out):
    "What a training left that must not depend on interruptions: the losses, the weights, the choice of the best."
    [f] = Path(out).glob("train-*")
    losses = [{k: v for k, v in json.loads(l).items() if k in ("step", "loss", "val_loss", "lr")} for l in (f/"metrics.jsonl").read_text().splitlines()]
    weights = torch.load(f/"best.pt", weights_only=False, map_location="cpu")
    tensors = lambda d, at="": {k: v for n, x in d.items() for k, v in (tensors(x, f"{at}{n}.") if isinstance(x, dict) else {f"{at}{n}": x}).items()}
    return [l for l in losses if "step" in l], {k: v.numpy().tobytes() if isinstance(v, torch.Tensor) else v for k, v in tensors(weights).items() if isinstance(v, (torch.Tensor, int, float))}


def saved(out):
    "The step of the newest whole checkpoint."
    [f] = Path(out).glob("train-*")
    newest = next(f/n for n in ("last.pt", "previous.pt") if (f/n).exists())              # a kill may come between the two renames
    return torch.load(newest, weights_only=False, map_location="cpu")["step"]


def sh(*command): return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)


def jobs(out, stage): return [j["id"] for j in json.loads((Path(out)/"jobs.json").read_text())["jobs"] if j["stage"] == stage]


def until(what, true, seconds=240):
    "Wait for `true()`; fail with what is there else."
    end = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < end, (what, sh("squeue", "-r").stdout, *([what.read_text()] if isinstance(what, Path) else []))
        time.sleep(.3)
    return value


def drained(seconds=240):
    "Wait until the queue is empty."
    until("the queue is empty", lambda: not sh("squeue", "-h").stdout.strip(), seconds)


def state(job): return sh("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%T").stdout.strip()


def step(out, stage="train"):
    "How far the training is, by its progress file; -1 before its first."
    for f in Path(out).glob(f"{stage}-*/progress.json"):
        try: return json.loads(f.read_text())["done"]
        except (OSError, ValueError): pass
    return -1


def logs(out): return "\n".join(f"--- {f.name}\n{f.read_text()[-3000:]}" for f in sorted((Path(out)/"slurm").glob("*log.err")))
