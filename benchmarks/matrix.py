"""Hours that a study takes, from a few measured training steps, restorations and judged volumes of each of its models: python benchmarks/matrix.py [STUDY] [--device cuda] [--slots 2]. Writes benchmarks/STUDY-hours.md (STUDY-hours-cuda.md).

Each model is measured in a process of its own; on a CPU with one thread (as `uad run` gives each of its two slots), by the time of the processor, which other work on the machine does not make longer. `--batch`: measure smaller batches, where
a step of the study's own takes too long, and count its slices."""
import argparse, json, subprocess, sys, tempfile, time
from pathlib import Path


def measure(settings: dict, batch: int, device: str, steps: int = 4) -> dict:
    "Median seconds of training steps of `batch` slices (after one to warm up), and of restoring 50 slices, or making their maps (of a large model on a CPU: 10 times those of 5); of steps of what is trained `first`, 0 without."
    import numpy as np, torch
    from uad_study.models import MODELS, build_model, model_config, output, parameter_count, placed
    from uad_study.train import TrainConfig, autocast
    torch.set_num_threads(1)
    config, g = model_config(settings), lambda: torch.Generator(device).manual_seed(0)
    precision = autocast(TrainConfig(), device)[1]
    model, first = placed(build_model(config), device, precision).train(), getattr(MODELS[config.name], "first", lambda c: None)(config)
    x, y = torch.rand(batch, 1, 96, 96, device=device), torch.rand(50, 1, 96, 96, device=device)
    times = 10 if device == "cpu" and parameter_count(model) > 5e6 else 1
    def step_of(model):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], fused=True)
        def step():
            with autocast(TrainConfig(), device)[0]: loss = model.loss(x, g())
            optimizer.zero_grad(); loss.backward(); optimizer.step()
        return step
    def seconds(f, n):
        took = []
        for _ in range(n + 1):
            t = clock(device); f(); took.append(clock(device) - t)
        return float(np.median(took[1:]))
    return dict(parameters=parameter_count(model), step=seconds(step_of(model), steps), first=seconds(step_of(placed(build_model(config, kind=first), device, precision).train()), steps) if first else 0., restore=times * seconds(lambda: [output(model.eval(), s, g()) for s in y[:50 // times].split(50 if device != "cpu" else 10)], 1))


def clock(device="cpu") -> float:
    "Seconds: of the processor, or (of a GPU, once it is done) of the wall."
    if device == "cpu": return time.process_time()
    import torch
    torch.cuda.synchronize()
    return time.perf_counter()


def judged(contrast: str, scores: dict, n: int = 2) -> dict:
    "Seconds to judge a volume by all scores (of virtual subjects, their restorations the twins, noise for the further draws), and to judge one under the other settings of the report."
    import numpy as np, torch
    torch.set_num_threads(1)
    from uad_study.cohort import Cohort, DataConfig, build_virtual
    from uad_study.core import from_dict
    from uad_study.evaluate import ReportConfig, evaluate_restorations
    from uad_study.judge import ScoreConfig
    config, place = from_dict(ScoreConfig, scores), dict(T1w="stroke", T2w="tumour")[contrast]
    with tempfile.TemporaryDirectory() as d:
        build_virtual(DataConfig(contrasts=(contrast,), pathologies=(place,), folds=1, n_train=1, n_val=n, n_test=n, n_lesion_val=n, n_lesion_test=n), f"{d}/c")
        cohort, rng = Cohort(f"{d}/c"), np.random.default_rng(0)
        rows = [int(r) for s in ("val", "test") for r in cohort.select(s, 0)]
        draws = {r: (cohort.twins[r] + rng.normal(0, .02, (config.draws - 1, *cohort.twins.shape[1:]))).astype(np.float16) for r in rows} if config.drawn else None
        def once(post):
            t = clock()
            evaluate_restorations(cohort, contrast, 0, {r: cohort.twins[r] for r in rows}, f"{d}/out", config, perfect=False, report=ReportConfig(steps_val=0, steps_test=0, post_val=post, post_test=post), draws=draws)
            return clock() - t
        once(0); plain = once(0)
        return dict(volume=plain / len(rows), swept=(once(n) - plain) / (2 * n))


def hours(study, model: dict, judging: dict, label: str) -> dict:
    "Hours of training and of evaluating one model of `study`, all folds and contrasts, from what `measure` and `judged` found."
    from uad_study.phantom import PATHOLOGIES
    e, d, r = next(e for e in study.entries if e.label == label), study.data, study.report
    per_contrast = [sum(PATHOLOGIES[p] == c for p in d["pathologies"]) for c in d["contrasts"]]
    step, restore, t = model["step"] * e.train["batch_size"] / model["batch"], model["restore"], e.train
    looks = (t["steps"] // t["val_every"] + 1) * t["val_slices"] / 50 * restore
    train = d["folds"] * len(d["contrasts"]) * (t["steps"] * step + e.model.get("encoder_steps", 0) * model["first"] * t["batch_size"] / model["batch"] + looks * (2 if model["first"] else 1))
    draws, evaluate = (e.scores.get("draws", 10) if judging["drawn"] else 1), 0.
    for k in per_contrast:
        n, few = d["n_val"] + d["n_test"] + k * (d["n_lesion_val"] + d["n_lesion_test"]), k * (r["steps_val"] + r["steps_test"])
        evaluate += d["folds"] * (n * (draws * restore + judging["volume"]) + len(t["snapshots"]) * few * (restore + judging["volume"] / 4) + k * (r["post_val"] + r["post_test"]) * judging["swept"])
    return dict(train=train / 3600, evaluate=evaluate / 3600)


def main():
    p = argparse.ArgumentParser(); p.add_argument("study", nargs="?", default="matrix"); p.add_argument("--device", default="cpu"); p.add_argument("--slots", type=int, default=2); p.add_argument("--batch", type=int, default=0); p.add_argument("--one")
    a = p.parse_args()
    if a.one:
        kind, *args = json.loads(a.one)
        print(json.dumps(measure(*args, a.device) if kind == "model" else judged(*args)))
        return
    from uad_study.judge import ScoreConfig
    from uad_study.core import from_dict
    from uad_study.runs import provenance, read_study
    def alone(*job):
        r = subprocess.run([sys.executable, __file__, "--device", a.device, "--one", json.dumps(job)], capture_output=True, text=True)
        if r.returncode: sys.exit(r.stderr)
        return json.loads(r.stdout.splitlines()[-1])
    study, judging, lines, total = read_study(a.study), {}, [], dict(train=0., evaluate=0.)
    for e in study.entries:
        drawn = bool(from_dict(ScoreConfig, e.scores).drawn)
        if drawn not in judging: judging[drawn] = alone("scores", study.data["contrasts"][-1], e.scores) | dict(drawn=drawn)
        batch = min(a.batch or e.train["batch_size"], e.train["batch_size"])
        m = alone("model", e.model, batch) | dict(batch=batch)
        h = hours(study, m, judging[drawn], e.label)
        total = {k: total[k] + h[k] for k in total}
        lines.append(f"| {e.label} | {m['parameters']:,} | {e.train['steps']:,} | {e.train['batch_size']} | {m['step'] * 1000 / batch:.1f} | {m['restore']:.2f} | {judging[drawn]['volume']:.2f} | {h['train']:.2f} | {h['evaluate']:.2f} |")
        print(lines[-1], flush=True)
    v = provenance(a.device)
    said = (f"`python benchmarks/matrix.py {a.study}{'' if a.device == 'cpu' else f' --device {a.device}'}{f' --batch {a.batch}' if a.batch else ''} --slots {a.slots}`, {v['time'][:10]}, commit {str(v['commit'])[:12]}{' with changes' if v['dirty'] else ''}: {v['device']}, {v['cores']} cores, torch {v['packages']['torch']}. "
            f"The training in total: {total['train']:.1f} h, restoring and judging {total['evaluate']:.1f} h; on {a.slots} slots at once {sum(total.values()) / a.slots:.1f} h. Without preparation and report (minutes).")
    head = ["| model | parameters | steps | slices a step | ms a slice, training | s to restore a volume | s to judge a volume | h to train | h to evaluate |", "|---|---|---|---|---|---|---|---|---|"]
    (Path(__file__).parent/f"{a.study}-hours{'' if a.device == 'cpu' else '-' + a.device.split(':')[0]}.md").write_text("\n".join([said, "", *head, *lines, ""]))
    print(said)


if __name__ == "__main__": main()
