"""Seconds and peak memory of a training step and of restoring a volume, for every model at demo and at paper size: python benchmarks/models.py [--device cuda]. Writes benchmarks/models.md (models-cuda.md).

Each line is measured in a process of its own. A paper-size diffusion model takes minutes for one step of 32 slices on a CPU, so there it is measured at 1 (the DDPM also at 4)."""
import argparse, json, resource, subprocess, sys, time
from pathlib import Path

PAPER = ("ae", "vae", "ssim_ae", "dae", "ddpm", "ddpm_gaussian", "pddpm", "cddpm", "fae")


def measure(settings: dict, batch: int, restore: bool, device: str, threads: int, steps: int = 3) -> dict:
    "Best seconds of `steps` training steps (after one to warm up), seconds to restore 50 slices, and peak memory in MB: of the process, less what it held before the model; on a GPU of its tensors."
    import torch
    torch.set_num_threads(threads)
    from uad_study.models import MODELS, build_model, model_config, output, parameter_count, placed, restore_config
    from uad_study.train import TrainConfig, autocast
    import monai.networks.nets                                                   # its memory is not the model's
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    before, g = peak(), lambda: torch.Generator(device).manual_seed(0)
    model = placed(build_model(model_config(settings), restore=restore_config(settings["name"]) if MODELS[settings["name"]].restores else None), device, autocast(TrainConfig(), device)[1]).train()
    optimizer, x, times = torch.optim.Adam(model.parameters(), fused=True), torch.rand(batch, 1, 96, 96, generator=g(), device=device), []
    for _ in range(steps + 1):
        wait(); t = time.perf_counter()
        with autocast(TrainConfig(), device)[0]: loss = model.loss(x, g())
        optimizer.zero_grad(); loss.backward(); optimizer.step(); wait()
        times.append(time.perf_counter() - t)
    memory = torch.cuda.max_memory_allocated() / 2**20 if device != "cpu" else peak() - before
    if not restore: return dict(parameters=parameter_count(model), step=min(times[1:]), restore=None, memory=memory)
    t = time.perf_counter(); [output(model.eval(), s, g()) for s in torch.rand(50, 1, 96, 96, device=device).split(50 if batch > 4 or device != "cpu" or parameter_count(model) < 5e6 else 10)]; wait()
    return dict(parameters=parameter_count(model), step=min(times[1:]), restore=time.perf_counter() - t, memory=memory)


def main():
    p = argparse.ArgumentParser(); p.add_argument("--device", default="cpu"); p.add_argument("--threads", type=int, default=2); p.add_argument("--one")
    a = p.parse_args()
    if a.one:
        print(json.dumps(measure(*json.loads(a.one), a.device, a.threads)))
        return
    from uad_study.models import MODELS
    from uad_study.runs import provenance, read_study
    jobs = [(f"{e.label}, demo size", e.model, e.train["batch_size"], True) for e in read_study("matrix").entries]
    for name in PAPER:
        batches = (32,) if a.device != "cpu" or not MODELS[name].restores else {"ddpm": (1, 4), "ddpm_gaussian": ()}.get(name, (1,))
        jobs += [(f"{name}, paper size", dict(name=name), b, b == batches[0]) for b in batches]
    lines = []
    for label, settings, batch, restore in jobs:
        r = subprocess.run([sys.executable, __file__, "--device", a.device, "--threads", str(a.threads), "--one", json.dumps([settings, batch, restore])], capture_output=True, text=True)
        if r.returncode: sys.exit(r.stderr)
        m = json.loads(r.stdout.splitlines()[-1])
        lines.append(f"| {label} | {m['parameters']:,} | {batch} | {m['step']:.3f} | {m['step'] / batch * 1000:.0f} | {m['memory']:,.0f} | {'' if m['restore'] is None else format(m['restore'], '.2f')} |")
        print(lines[-1], flush=True)
    v = provenance(a.device)
    head = [f"Measured by `python benchmarks/models.py --device {a.device} --threads {a.threads}`, {v['time'][:10]}, commit {str(v['commit'])[:12]}{' with changes' if v['dirty'] else ''}: {v['device']}, {a.threads} threads of {v['cores']} cores ({v['machine']}), "
            f"Python {v['python']}, torch {v['packages']['torch']}. Slices of 96x96; best of 3 steps; precision as `train.precision: auto` chooses. Memory: what the process grew by (on a GPU: its tensors). "
            "Paper size is each model's default settings (the feature autoencoder's: with the encoder that this repo trains); a diffusion model's step of 32 slices was not measured on a CPU. Restored as each model's authors do: in one step, patch by patch (pddpm), from three steps (cddpm); of fae its map.", "", "| model | parameters | slices a step | seconds a step | ms a slice | peak memory, MB | seconds to restore 50 slices |", "|---|---|---|---|---|---|---|"]
    (Path(__file__).parent/f"models{'' if a.device == 'cpu' else '-' + a.device.split(':')[0]}.md").write_text("\n".join([*head, *lines, ""]))


if __name__ == "__main__": main()
