"The feature autoencoder: its map against a plain slow version, an encoder that stays as it was, trainings that resume, and a model without restorations everywhere a result is shown."
import dataclasses, json, time
import numpy as np, pytest, torch, yaml
from conftest import one_line, uad
from training import assert_same_end, go, metrics, weights, write_heads
import training
from uad_study import labs
from uad_study.cohort import open_reconstructions
from uad_study.core import Stopped, UadError
from uad_study.fae import FAE, DenoisingPretext, read_encoder
from uad_study.judge import ScoreConfig, maps_of_volume
from uad_study.models import build_model, model_config, output
from uad_study.results import gather, open_results
from uad_study.runs import plan, read_study
from uad_study.scores import PLAIN, score_maps
from uad_study.train import TrainConfig, load_model, train_config
from uad_study.viewer import View, inspect, restored_models

TINY = dict(name="fae", encoder_width=.125, encoder_steps=4, channels=[8, 16])
g = lambda s=0: torch.Generator().manual_seed(s)
slices = lambda n=3, s=0: torch.rand(n, 1, 96, 96, generator=g(s))
LABEL = "fae (self-supervised encoder)"


def tiny(seed=1, **more):
    "A small model whose norms know the scale of what they meet."
    model = build_model(model_config(TINY | more), seed)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for m in norms: m.momentum = 1.
    with torch.no_grad(): model.train().loss(slices(8, 9), g(9))
    for m in norms: m.momentum = .1
    return model.eval()


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    "A file that looks like torchvision's ResNet-18: random weights under its names, and the layers that are not needed."
    from monai.networks.nets import resnet18
    net = resnet18(spatial_dims=2, n_input_channels=3, conv1_t_stride=2, num_classes=1000, bias_downsample=False)
    f = tmp_path_factory.mktemp("resnet")/"resnet18.pth"
    torch.save(net.state_dict(), f)
    return f


@pytest.mark.parametrize("kind", [FAE, DenoisingPretext])
def test_the_face(kind):
    "Seeds decide everything, global randomness is left alone, processes draw for the whole batch, and every weight that may learn does."
    before, x, config = torch.random.get_rng_state(), slices(), model_config(TINY)
    model, twin = (build_model(config, 3, kind=kind) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values()))
    assert model.train().loss(x, g(0)).item() == twin.train().loss(x, g(0)).item() != twin.loss(x, g(1)).item()
    model.loss(x, g()).backward()
    assert not [k for k, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all() or not p.grad.abs().sum() > 0)]
    with torch.autocast("cpu", torch.bfloat16): half = model.eval().loss(x, g(1))
    assert half.item() == pytest.approx(model.loss(x, g(1)).item(), rel=.01) and torch.equal(before, torch.random.get_rng_state())
    four = slices(4, 2)
    assert sum(model.loss(four[2 * i:2 * i + 2], g(3), (i, 2)).item() for i in (0, 1)) / 2 == pytest.approx(model.loss(four, g(3)).item(), rel=1e-5)
    if kind is FAE:
        model.load_state_dict(twin.state_dict())
        assert torch.equal(output(model, x, None), twin.eval().anomaly(x)) and model.anomaly(x).shape == x.shape and not model.anomaly(x).requires_grad


def by_loops(model, x):
    "The map of one slice (96, 96) by loops over channels, places and windows, from the weights alone."
    from scipy.signal.windows import gaussian
    c, e = model.config, model.encoder
    with torch.no_grad():
        h = e.bn1(e.conv1(x[None, None])).clamp(min=0)
        stem = torch.nn.functional.max_pool2d(h, 3, 2, 1)
        def block(b, v):
            y = b.bn2(b.conv2(b.bn1(b.conv1(v)).clamp(min=0)))
            return (y + (b.downsample(v) if b.downsample is not None else v)).clamp(min=0)
        first = block(e.layer1[1], block(e.layer1[0], stem))
        second = block(e.layer2[1], block(e.layer2[0], first))
        f = torch.cat([stem, first, enlarged(second[0].numpy(), 24)], 1)
        f_hat = model.told(f)
    a, b = (np.pad(v[0].double().numpy(), ((0, 0), *[(c.window // 2,) * 2] * 2), "reflect") for v in (f, f_hat))
    w = np.outer(*[gaussian(c.window, c.window_sigma)] * 2); w /= w.sum()
    out = np.zeros((24, 24))
    for i in range(24):
        for j in range(24):
            for k in range(len(a)):
                p, q = a[k, i:i + c.window, j:j + c.window], b[k, i:i + c.window, j:j + c.window]
                m, n = (w * p).sum(), (w * q).sum()
                ssim = (2 * m * n + (.01 * c.data_range)**2) * (2 * (w * (p - m) * (q - n)).sum() + (.03 * c.data_range)**2)
                ssim /= (m * m + n * n + (.01 * c.data_range)**2) * ((w * (p - m)**2).sum() + (w * (q - n)**2).sum() + (.03 * c.data_range)**2)
                out[i, j] += (1 - ssim) / len(a)
    return enlarged(out[None], 96)[0, 0]


def enlarged(v, size):
    "Maps (C, h, h) brought to (1, C, size, size), corner on corner, bilinear."
    at = np.linspace(0, v.shape[-1] - 1, size)
    along = lambda a: np.stack([np.interp(at, np.arange(v.shape[-1]), line) for line in a.reshape(-1, a.shape[-1])]).reshape(*a.shape[:-1], size)
    return torch.from_numpy(along(along(v.swapaxes(1, 2)).swapaxes(1, 2)))[None].float()


def test_the_map_equals_one_window_at_a_time():
    model, x = tiny(data_range=.7, channels=[4]), slices(2, 5)
    for s, m in zip(x[:, 0], model.anomaly(x)[:, 0]): torch.testing.assert_close(m, by_loops(model, s), atol=2e-4, rtol=1e-3)


def test_the_loss_is_the_mean_of_the_map_before_it_is_enlarged():
    model, x = tiny(), slices()
    f = model.features(x)
    assert f.shape == (3, 32, 24, 24) and model.loss(x, g()).item() == pytest.approx(model.dissimilarity(f, model.told(f)).mean().item(), rel=1e-6)
    assert model.dissimilarity(f, f).abs().max() < 1e-4
    with pytest.raises(UadError, match="too small for 5"): model.anomaly(x[..., :8, :8])


def test_every_layer_learns_for_itself():
    "What one map tells depends on its own head and what is below it, so no layer can leave the work to another."
    net = build_model(model_config(TINY), 1, kind=DenoisingPretext).eval()
    stem, first, second = net.told(slices())
    assert stem.shape == first.shape == second.shape == (3, 1, 96, 96)
    second.sum().backward()
    assert net.heads[2].weight.grad.abs().sum() > 0 and all(h.weight.grad is None for h in net.heads[:2])


SMALL = TrainConfig(steps=6, batch_size=2, lr=1e-3, val_every=2, val_slices=4, checkpoint_minutes=0, seed=1, weight_decay=.01)


@pytest.fixture(scope="module")
def heads(tmp_path_factory): return write_heads(tmp_path_factory.mktemp("heads")/"cohort")


@pytest.fixture(scope="module")
def trained(heads, tmp_path_factory):
    folder, ticks = tmp_path_factory.mktemp("trained"), []
    training.SMALL["fae"] = {k: v for k, v in TINY.items() if k != "name"}
    return folder, go(heads, "fae", folder, dataclasses.replace(SMALL, ema=.9, snapshots=(3,)), tick=lambda step, steps, text, **facts: ticks.append((step, steps, text))), ticks


def test_the_encoder_is_trained_first_and_then_frozen(trained):
    "Bit for bit, in every checkpoint, though the optimiser decays weights and the weights are averaged; its statistics too."
    folder, result, ticks = trained
    mine = weights(folder/"encoder"/"best.pt")
    mine = {k: v for k, v in mine.items() if k.startswith("encoder.")}
    assert len(mine) > 30
    for f in ("best.pt", "last.pt", "snapshot-000003.pt"):
        assert all(torch.equal(v, weights(folder/f)[k]) for k, v in mine.items()), f
    later = weights(folder/"last.pt")
    assert any(not torch.equal(v, later[k]) for k, v in weights(folder/"snapshot-000003.pt").items() if not k.startswith("encoder."))
    assert [t[0] for t in ticks] == [*range(5), 4, *range(5, 11)] and {t[1] for t in ticks} == {10} and [t[2].startswith("encoder: ") for t in ticks] == [True] * 5 + [False] * 7
    assert result["steps"] == 6 and result["encoder"]["steps"] == 4 and result["encoder"]["parameters"] > 0 and result["train_seconds"] >= result["encoder"]["train_seconds"]
    assert len(metrics(folder)) == 4 and len(metrics(folder/"encoder")) == 3
    model, _ = load_model(folder/"best.pt")
    assert not model.training and not any(p.requires_grad for p in model.encoder.parameters()) and not model.train().encoder.training


def test_resumed_equals_uninterrupted(heads, trained, tmp_path):
    "Stopped in the encoder's training and in the autoencoder's, with the last checkpoint damaged once."
    for at in (2, 8):
        def stop(step, steps, text, **facts):
            if step == at: (tmp_path/"stop").touch(); time.sleep(.6)
        with pytest.raises(Stopped): go(heads, "fae", tmp_path, dataclasses.replace(SMALL, ema=.9, snapshots=(3,)), tick=stop)
        (tmp_path/"stop").unlink()
        last = tmp_path/("encoder" if at == 2 else ".")/"last.pt"
        last.write_bytes(last.read_bytes()[:500])
    go(heads, "fae", tmp_path, dataclasses.replace(SMALL, ema=.9, snapshots=(3,)))
    assert_same_end(trained[0], tmp_path); assert_same_end(trained[0]/"encoder", tmp_path/"encoder")


@pytest.mark.slow
def test_two_processes_learn_what_one_does(heads, trained, tmp_path):
    result = go(heads, "fae", tmp_path, dataclasses.replace(SMALL, ema=.9, snapshots=(3,)), devices=2)
    assert result["encoder"]["best_val_loss"] == pytest.approx(trained[1]["encoder"]["best_val_loss"], rel=1e-3)
    for a, b in zip(metrics(trained[0]), metrics(tmp_path), strict=True): assert b["val_loss"] == pytest.approx(a["val_loss"], rel=1e-2)


def test_an_encoder_from_a_file(heads, resnet, tmp_path):
    "Its weights are taken as they are; a training goes on without the file; another file is refused."
    state, sha = read_encoder(resnet)
    config = model_config(dict(name="fae", encoder="imagenet", encoder_sha256=sha, channels=[8]))
    with pytest.raises(UadError, match="encoder_file: is missing, and encoder imagenet needs it"): training.train(heads, "T1w", 0, config, SMALL, tmp_path/"none")
    def stop(step, steps, text, **facts):
        if step == 2: (tmp_path/"t"/"stop").touch(); time.sleep(.6)
    with pytest.raises(Stopped): training.train(heads, "T1w", 0, config, SMALL, tmp_path/"t", encoder_file=resnet, tick=stop)
    (tmp_path/"t"/"stop").unlink()
    result = training.train(heads, "T1w", 0, config, SMALL, tmp_path/"t")
    assert result["encoder"] == dict(sha256=sha) and not (tmp_path/"t"/"encoder").exists()
    assert all(torch.equal(v, weights(tmp_path/"t"/"best.pt")[f"encoder.{k}"]) for k, v in state.items())
    torch.save({k: v + 1 for k, v in torch.load(resnet, weights_only=True).items()}, tmp_path/"other.pth")
    with pytest.raises(UadError, match="is not the file that was planned with"): training.train(heads, "T1w", 0, config, SMALL, tmp_path/"u", encoder_file=tmp_path/"other.pth")


def test_scores_of_a_model_without_restorations():
    rng = np.random.default_rng(0)
    x, own, brain = rng.random((20, 20, 8), np.float32), rng.random((20, 20, 8), np.float32), np.ones((20, 20, 8), bool)
    c = ScoreConfig(names=("intensity", "l1", "feature_ssim", "mahalanobis"), sigmas=(.5,), temperature=2., search_both=("l1",), draws=5)
    mine = c.for_own("feature_ssim")
    assert mine == dataclasses.replace(ScoreConfig(), names=("intensity", "feature_ssim"), search_both=("feature_ssim",)) and mine.own == "feature_ssim" and mine.for_own("feature_ssim") == mine
    assert c.without_own().names == ("intensity", "l1", "mahalanobis") and ScoreConfig().own == "" and ScoreConfig().without_own() == ScoreConfig()
    maps = maps_of_volume(x, own, brain, ("feature_ssim", "intensity"), mine)
    assert list(maps) == ["feature_ssim", "intensity"] and np.array_equal(maps["feature_ssim"], own) and np.array_equal(maps["intensity"], x)
    with pytest.raises(UadError, match="l1 compares a scan with its restoration, and the model makes none"): maps_of_volume(x, own, brain, ("l1",), mine)
    with pytest.raises(UadError, match="feature_ssim is a map that a model makes itself"): score_maps(x, x, ["feature_ssim"])
    with pytest.raises(UadError, match="no restorations \\(fae\\), but this one restores"): ScoreConfig(names=("feature_ssim",)).without_own()


STUDY = """format: uad-study/1
data: {source: virtual, contrasts: [T2w], pathologies: [tumour], folds: 1, n_train: 3, n_val: 1, n_test: 1, n_lesion_val: 1, n_lesion_test: 1}
models:
  - {name: fae, encoder_width: 0.125, encoder_steps: 4, channels: [8, 16]}
  - {name: ddpm, channels: [16, 32], num_res_blocks: 1, num_head_channels: 32, norm_num_groups: 16, patch: 4}
train: {steps: 4, batch_size: 2, lr: 0.001, val_every: 2, val_slices: 4, snapshots: [2]}
scores: {names: [intensity, l1, ssim_0.9, ssim_ens]}
report: {steps_val: 1, steps_test: 1, post_val: 1, post_test: 1, medians: [1], erosions: [3]}
engine: {threads: 1}
"""


def study(tmp_path, **changes):
    (tmp_path/"s.yaml").write_text(yaml.safe_dump(yaml.safe_load(STUDY) | changes))
    return read_study(tmp_path/"s.yaml")


def test_what_a_study_plans(tmp_path, resnet, caplog, monkeypatch):
    "Labels say the encoder; scores are those that each model has; a file counts by what it holds, not by where it lies; other runs keep their keys."
    without = {r.label: r.key for r in plan(study(tmp_path, models=yaml.safe_load(STUDY)["models"][1:]))}
    s = study(tmp_path, variants=[dict(of="fae", label="narrow", model=dict(channels=[8]))])
    assert [e.label for e in s.entries] == [LABEL, "ddpm", f"{LABEL}, narrow"]
    assert s.entries[0].scores["names"] == ["intensity", "feature_ssim"] and s.entries[1].scores["names"] == ["intensity", "l1", "ssim_0.9", "ssim_ens"]
    assert [r.message.partition(": ")[2] for r in caplog.records] == [f"l1 and ssim_0.9 and ssim_ens: left out for {LABEL}, which makes no restorations and is judged by its own map, feature_ssim"]
    now = {r.label: r.key for r in plan(s)}
    assert all(now[k] == without[k] for k in ("prepare", "train T2w ddpm f0"))
    caplog.clear()
    both = study(tmp_path, scores=dict(names=["intensity", "ssim_ens", "feature_ssim"]))
    assert [e.scores["names"] for e in both.entries] == [["intensity", "feature_ssim"], ["intensity", "ssim_ens"]]
    assert [r.message.partition(": ")[2] for r in caplog.records] == [f"ssim_ens: left out for {LABEL}, which makes no restorations and is judged by its own map, feature_ssim", "feature_ssim: left out for ddpm, which makes no such map"]
    monkeypatch.chdir(resnet.parent)
    found = []
    for place in (resnet.name, str(resnet.rename(resnet.with_name("moved.pth")))):
        if not found: resnet.with_name("moved.pth").rename(resnet); place = resnet.name
        s = study(tmp_path, models=[dict(name="fae", label="theirs", encoder="imagenet", encoder_file=place)])
        found.append(next(r for r in plan(s) if r.stage == "train"))
        if len(found) == 1: resnet.rename(resnet.with_name("moved.pth"))
    resnet.with_name("moved.pth").rename(resnet)
    assert s.entries[0].label == "theirs (ImageNet encoder)" and found[0].key == found[1].key and s.entries[0].encoder_file == str(resnet.with_name("moved.pth"))
    assert found[0].parameters["model_config"]["encoder_sha256"] == read_encoder(resnet)[1] and str(resnet.parent) not in json.dumps([f.parameters for f in found])


def test_a_variant_with_another_encoder_says_so(tmp_path, resnet, monkeypatch):
    "Both ways: a user's file for the study's own encoder, and the study's own for the file, which is left out then."
    monkeypatch.chdir(resnet.parent)
    theirs = dict(encoder="imagenet", encoder_width=1., encoder_file=resnet.name)
    s = study(tmp_path, variants=[dict(of="fae", label="ResNet", model=theirs)])
    assert s.entries[-1].label == f"{LABEL}, ResNet (ImageNet encoder)" and s.entries[-1].encoder_file
    s = study(tmp_path, models=[dict(name="fae", channels=[8], **theirs)], scores=dict(names=["intensity", "feature_ssim"]), variants=[dict(label="own", model=dict(encoder="self"))])
    assert [e.label for e in s.entries] == ["fae (ImageNet encoder)", "fae (ImageNet encoder), own (self-supervised encoder)"] and not s.entries[-1].encoder_file and s.entries[0].encoder_file


@pytest.mark.parametrize("changes, words", [
    (dict(models=[dict(name="ddpm", label="no model")]), "the label 'no model' is taken"), (dict(models=[dict(name="fae", encoder="imagnet")]), "did you mean 'imagenet'"), (dict(models=[dict(name="fae", encoder="imagenet")]), "model.encoder_file: is missing, and encoder imagenet needs it"),
    (dict(models=[dict(name="fae", encoder="imagenet", encoder_file="no.pth")]), "no.pth: no such file (model.encoder_file)"), (dict(models=[dict(name="fae", encoder="imagenet", encoder_file="s.yaml")]), "cannot be opened safely"),
    (dict(models=[dict(name="fae", encoder="imagenet", encoder_file=3)]), "encoder_file: must be the path of a file, not 3"), (dict(models=[dict(name="fae", encoder_file="resnet18.pth")]), "model.encoder_file: is for encoder imagenet"),
    (dict(models=[dict(name="fae", encoder_sha256="ab")]), "encoder_sha256: is found from encoder_file"), (dict(models=[dict(name="ddpm", encoder_file="resnet18.pth")]), "unknown setting 'encoder_file'"), (dict(models=[dict(name="cddpm", encoder_file="resnet18.pth")]), "unknown setting 'encoder_file'"),
    (dict(models=[dict(name="fae", encoder="imagenet", encoder_file="resnet18.pth", encoder_width=.5)]), "has the width 1"), (dict(models=[dict(name="fae", channels=[8, 8, 8, 8])]), "use fewer levels"),
    (dict(models=[dict(name="fae", restore=dict(t_test=5))]), "the model 'fae' has nothing to set there"), (dict(models=["fae"], restore=dict(t_test=5)), "has anything to set there"),
    (dict(models=[dict(name="fae", scores=dict(names=["l1"]))]), "l1 compares a scan with its restoration, and the model 'fae' makes none: name feature_ssim"),
    (dict(models=["fae", dict(name="ddpm", scores=dict(names=["feature_ssim", "l1"]))]), "feature_ssim is a map that the model fae makes itself, and the model 'ddpm' restores instead"),
    (dict(models=["fae", "ddpm"], scores=dict(names=["feature_ssim"])), "and the model 'ddpm' restores instead: remove it, or name another score"),
    (dict(models=["ddpm"], scores=dict(names=["feature_ssim", "l1"])), "none of the models ddpm does: remove it"), (dict(models=["fae"], scores=dict(names=["feature_sim"])), "did you mean 'feature_ssim'"),
])
def test_bad_settings_are_one_line(changes, words, tmp_path, resnet, monkeypatch):
    monkeypatch.chdir(tmp_path); (tmp_path/"resnet18.pth").symlink_to(resnet)
    with pytest.raises(UadError) as e: study(tmp_path, **changes)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_learning_is_that_of_the_authors():
    c = train_config("fae")
    assert (c.lr, c.steps, c.batch_size) == (2e-4, 10000, 64) and model_config("fae").encoder == "self"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    "A study of fae beside a ddpm, and in the folder `alone` the evaluation of fae by itself."
    folder = tmp_path_factory.mktemp("study")
    (folder/"s.yaml").write_text(STUDY)
    r = uad("run", "s.yaml", "--out", "out", cwd=folder)
    assert r.returncode == 0, r.stderr + r.stdout
    (folder/"alone").mkdir()
    for pattern in ("prepare-*", "train-*fae*", "evaluate-*fae*"):
        for d in (folder/"out").glob(pattern): (folder/"alone"/d.name).symlink_to(d)
    return folder/"out"


def both(out): return open_results(out), gather([out.parent/"alone"])


@pytest.mark.slow
def test_a_study_is_trained_judged_and_reported(out):
    results, alone = both(out)
    assert results.models == [LABEL, "ddpm"] and alone.models == [LABEL] and results.main_scores(LABEL) == ("feature_ssim",)
    scores = results.table.groupby("model").score.unique().map(set)
    assert scores[LABEL] == {"intensity", "feature_ssim"} and "feature_ssim" not in scores["ddpm"] and scores["ddpm"] >= {"l1", "ssim_ens"}
    row = int(results.cohort.select("test", pathology="tumour")[0])
    assert results.restoration(LABEL, row) is None and results.restoration("ddpm", row) is not None and results.maps(LABEL, row, ["l1"]) is None
    train_dir, = out.glob("train-*fae*")
    kept, info = open_reconstructions(next(train_dir.glob("reconstructions-*")))
    model, _ = load_model(train_dir/("best.pt" if info["step"] != 2 else "snapshot-000002.pt"))
    x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(results.cohort.images[row], -1, 0)))[:, None]
    assert info["holds"] == "feature_ssim" and set(results.steps.score[results.steps.model == LABEL]) == {"feature_ssim"}
    where = next(open_reconstructions(d)[0] for d in train_dir.glob("reconstructions-*") if open_reconstructions(d)[1]["step"] == info["step"] and row in open_reconstructions(d)[0])
    np.testing.assert_allclose(np.asarray(where[row]), np.moveaxis(model.anomaly(x)[:, 0].numpy(), 0, -1), atol=1e-5)
    assert np.array_equal(results.maps(LABEL, row, ["feature_ssim"])["feature_ssim"], results._kept(LABEL, row)) and set(results.restorations.model) == {"ddpm"}
    page, text = (out/"report.html").read_text(), (out/"table.csv").read_text()
    for shown in (page, text, *((out/"tables").glob("*.tex"))):
        shown = shown if isinstance(shown, str) else shown.read_text()
        assert "fae" not in shown.replace(LABEL, "").replace("fae-self", "").replace("train T2w", "") or shown is page
    assert "SSIM of features" in page and "one that restores nothing" in page and (out/"figures"/f"maps-fae-self-supervised-encoder.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_looked_at_without_restorations(out, which, tmp_path):
    "Inspector, gallery, labs and page, beside a model with restorations and alone."
    results = both(out)[which]
    i = inspect(out if which == 0 else out.parent/"alone")
    view, s = i.view, i.state
    assert view.models[0].name == LABEL and view.models[0].scores == ["intensity", "feature_ssim"] and s.score == "feature_ssim"
    assert i.figure.layout.annotations[1].text == "gives maps, no reconstruction" and "reconstruction" not in view.panels(s) and "Dice" in i.text.value
    judged = results.cases[(results.cases.model == LABEL) & (results.cases.score == "feature_ssim") & (results.cases.threshold_from == "val") & (results.cases.subject_id == results.cohort.table.subject_id[s.row])]
    assert view.numbers(s)["dice"] == pytest.approx(judged.dice.iloc[0], abs=1e-6)
    plain = dataclasses.replace(s, score="intensity", post=False)
    assert np.array_equal(view.map(plain), np.asarray(view.cohort.images[s.row]) * np.asarray(view.cohort.brain_masks[s.row]))
    table = labs.gallery(results)
    assert set(table.score) <= {"feature_ssim", "intensity"} and len(table) and all(g is not None for g in labs.Gallery(view, table, i.show).states)
    why = labs.WhyMissed(view, 0)
    assert why.score.value == "feature_ssim" and len(why.table) and not why.table.restoration.gt(0).any()
    assert "no sigma to choose" in labs.SigmaLab(view, s).text.value and "no diffusion model" in labs.ReconstructionLab(results, LABEL, s.row).text.value
    from uad_study.page import write_page
    write_page(results, tmp_path/"p.html")
    said = json.loads((tmp_path/"p.html").read_text().split("id=data>")[1].split("</script>")[0])
    names = {x["name"] for c in said["cases"] for x in c["scores"]}
    if which: assert names == {"feature_ssim"} and said["own_scores"] == [["feature_ssim", "SSIM of features"]] and not any("restoration" in c["stored"] for c in said["cases"]) and said["cases"][0]["curve"]["val post"]["feature_ssim"] == pytest.approx(judged.dice.iloc[0], abs=1e-4)
    else: assert "ssim_ens" in names and said["own_scores"] == [] and all("restoration" in c["stored"] for c in said["cases"])


@pytest.mark.slow
def test_judged_again_and_scored(out, tmp_path):
    r = uad("evaluate", out.parent/"out", "--out", tmp_path/"again", "--set", "names=[l1, ssim_ens]", cwd=tmp_path)
    assert r.returncode == 0 and f"left out for {LABEL}, which makes no restorations and is judged by its own map, feature_ssim: l1 and ssim_ens" in r.stdout
    again, old = gather([tmp_path/"again"]), open_results(out)
    of = lambda t: t.rows(model=LABEL, score="feature_ssim").dice.tolist()
    assert of(again) == of(old) and set(again.rows(model=LABEL).score) == {"feature_ssim"}
    one_line(uad("evaluate", out.parent/"out", "--out", tmp_path/"none", "--set", "names=[feature_ssim]", cwd=tmp_path), "feature_ssim is the map of a model that makes no restorations")
    from uad_study.volume import GRID_AFFINE, save_volume
    row = int(old.cohort.select("test", pathology="tumour")[0])
    save_volume(tmp_path/"sub-01_T2w.nii.gz", np.asarray(old.cohort.images[row]), GRID_AFFINE); save_volume(tmp_path/"mask.nii.gz", np.asarray(old.cohort.brain_masks[row]), GRID_AFFINE)
    train_dir, = out.glob("train-*fae*")
    how = ("score", "sub-01_T2w.nii.gz", "--weights", train_dir, "--brain-mask", "mask.nii.gz")
    r = uad(*how, "--out", "found", cwd=tmp_path)
    assert r.returncode == 0 and "feature_ssim above" in r.stdout, r.stderr
    folder, = (tmp_path/"found").glob("sub-*")
    summary, page = json.loads((folder/"summary.json").read_text()), (folder/"index.html").read_text()
    assert summary["score"] == "feature_ssim" and not list(folder.glob("*restored*")) and "Restored as healthy" not in page and "SSIM of features" in page and "restored" not in " ".join(summary["files"])
    kept = np.load(next(folder.glob("*scores.npz")))
    assert set(kept) == {"image", "brain_mask", "affine", "intensity", "feature_ssim"} and (kept["feature_ssim"] > 0).any()
    card = json.loads((train_dir/"weights"/"models"/"weights.json").read_text())
    assert LABEL in (train_dir/"weights"/"docs"/"README.md").read_text() and card["restore"] is None and card["training"]["encoder"]["steps"] == 4 and set(card["thresholds"]) == {"intensity", "feature_ssim"}
    one_line(uad(*how, "--out", "none", "--score", "l1", cwd=tmp_path), "'l1' is none of the weights", "restores nothing: choose feature_ssim or intensity")
