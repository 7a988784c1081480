"l1 times SSIM-ens: against a slow version, by name, in a study; and the benchmark that chose it."
import json, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch
from conftest import TINY, one_line, uad
from hypothesis import given, settings, strategies as st
from scipy.ndimage import gaussian_filter
from uad_study import runs
from uad_study.core import UadError, digest
from uad_study.judge import ScoreConfig, maps_of_volume
from uad_study.scores import DRAWN, ENSEMBLES, SCORES, SIGMAS, check_score, kernel_size, l1_map, l1_ssim, score_maps, ssim_ens

BENCHMARKS = Path(__file__).parents[1]/"benchmarks"


def slow(x, y, sigmas, temperature=1.):
    "As it is written, in float64, with SciPy."
    L = max(np.ptp(x), np.ptp(y)); c1, c2 = (.01 * L)**2, (.03 * L)**2
    similar = []
    for s in sigmas:
        blur = lambda v: gaussian_filter(v, s, mode="mirror", radius=kernel_size(s) // 2)
        a, b = blur(x), blur(y)
        similar.append((2 * a * b + c1) * (2 * (blur(x * y) - a * b) + c2) / ((a * a + b * b + c1) * (blur(x * x) - a * a + blur(y * y) - b * b + c2)))
    w = np.exp(-np.array(similar) / temperature)
    return np.abs(x - y) * (1 - (w * similar).sum(0) / w.sum(0))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([SIGMAS, (.9,), (.5, 1.5)]), st.sampled_from([1., .2]))
def test_equals_the_formula(seed, sigmas, temperature):
    x, y = np.random.default_rng(seed).random((2, 14, 13, 12))
    np.testing.assert_allclose(l1_ssim(x, y, sigmas, temperature=temperature), slow(x, y, sigmas, temperature), atol=1e-9)
    single = l1_ssim(x.astype(np.float32), torch.tensor(y, dtype=torch.float32), sigmas, temperature=temperature)
    assert isinstance(single, torch.Tensor) and single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), slow(x, y, sigmas, temperature), atol=1e-4)


def test_what_it_must_be():
    x, y = np.random.default_rng(0).random((2, 2, 16, 15, 14))
    m = l1_ssim(x, y)
    assert m.shape == x.shape and (m >= 0).all() and (m <= 2 * l1_map(x, y)).all()
    np.testing.assert_allclose(m, l1_ssim(y, x), atol=1e-12)                                                # neither is the reference
    np.testing.assert_allclose(l1_ssim(3 * x, 3 * y), 3 * m, atol=1e-9)
    assert not l1_ssim(x, x).any()
    np.testing.assert_array_equal(m[1], l1_ssim(x[1], y[1]))                                                # volumes do not see each other
    for bad in (np.nan, np.inf):
        with pytest.raises(UadError, match="NaN or infinite"): l1_ssim(x, np.where(y > .9, bad, y))
    with pytest.raises(UadError, match="differ in shape"): l1_ssim(x, y[:1])


def test_by_name():
    x, y = np.random.default_rng(1).random((2, 16, 15, 14), dtype=np.float32)
    mask = np.random.default_rng(2).random(x.shape) < .7
    how = dict(mask=mask, dims=2, sigmas=(.5, 1.1), temperature=.3)
    maps = score_maps(x, y, ["l1_ssim"], **how)
    assert list(maps) == ["l1_ssim"] and not maps["l1_ssim"][~mask].any()
    np.testing.assert_array_equal(maps["l1_ssim"], l1_map(x, y) * score_maps(x, y, ["ssim_ens"], **how)["ssim_ens"])
    np.testing.assert_array_equal(maps["l1_ssim"], l1_ssim(x, y, how.pop("sigmas"), **how))
    together = score_maps(x, y, ["l1", "ssim_uniform", "l1_ssim", "ssim_ens"])
    assert list(together) == ["l1", "ssim_uniform", "l1_ssim", "ssim_ens"]
    np.testing.assert_array_equal(together["ssim_ens"], ssim_ens(x, y))                                     # the product leaves its factors alone
    np.testing.assert_array_equal(together["l1_ssim"], l1_ssim(x, y))
    assert "l1_ssim" in ENSEMBLES and "l1_ssim" in SCORES and "l1_ssim" not in DRAWN and check_score("l1_ssim") == "l1_ssim"
    with pytest.raises(UadError, match="did you mean 'l1_ssim'"): check_score("l1_sim")
    with pytest.raises(UadError, match="l1-ssim"): check_score("l1-ssim")


def test_a_study_that_asks_for_it(tmp_path):
    "Any model has it; the default scores, and so the keys of studies that are there, are as before."
    assert "l1_ssim" not in ScoreConfig().names
    ae = "  - {name: ae, channels: [8, 16], latent: 8}\n"
    text = TINY.replace("train: {steps", ae + "train: {steps").replace("ssim_ens]", "ssim_ens, l1_ssim], temperature: 0.5")
    (tmp_path/"s.yaml").write_text(text); (tmp_path/"plain.yaml").write_text(text.replace(", l1_ssim]", "]"))
    study, plain = (runs.read_study(tmp_path/f"{n}.yaml") for n in ("s", "plain"))
    assert all("l1_ssim" in e.scores["names"] and "draws" not in e.scores for e in study.entries)
    key = lambda s: {r.label: r.key for r in runs.plan(s)}
    assert {l.split()[0] for l in key(study) if key(study)[l] != key(plain)[l]} == {"evaluate", "report"}
    x, y = np.random.default_rng(1).random((2, 16, 15, 14), dtype=np.float32)
    config = ScoreConfig(names=("l1_ssim",), temperature=.5, masked=True)
    brain = x > .2
    np.testing.assert_array_equal(maps_of_volume(x, y, brain, config.names, config)["l1_ssim"], l1_ssim(x, y, mask=brain, temperature=.5))


@pytest.fixture
def ours(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import ours
    return ours


def test_the_benchmark_restores_as_a_study_does(ours, tmp_path):
    import pandas as pd
    from uad_study.models import RestoreConfig
    from uad_study.phantom import diseased
    from uad_study.reconstruct import reconstruct_volume
    from uad_study.shipped import packaged_folder, read_card, read_model
    image = diseased(5, "stroke").images["T1w"].astype(np.float32)
    cohort = SimpleNamespace(table=pd.DataFrame([dict(subject_id="s", contrast="T1w")]), images=[image])
    kept = ours.Restorations(cohort, tmp_path)
    levels, folder = kept.levels(0), packaged_folder("ddpm", "T1w")
    for restore, found in ((RestoreConfig(t_test=ours.LEVELS), levels.mean(0)), (RestoreConfig(), levels[0])):
        np.testing.assert_allclose(found, reconstruct_volume(read_model(folder, read_card(folder), restore), image, (0, "restore", "s")), atol=2e-3)     # kept in half precision
    assert min(np.abs(levels[i] - levels[j]).mean() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3
    before = sorted(p.stat().st_mtime_ns for p in tmp_path.iterdir()); kept.levels(0)
    assert before == sorted(p.stat().st_mtime_ns for p in tmp_path.iterdir())                                # made once


def test_healthy_reference(ours, monkeypatch):
    "A map over what it is in healthy scans at the same place, smoothed there, plus a fifth of its mean; what lies outside the brain plays no part."
    rng, brain = np.random.default_rng(0), np.zeros((14, 13, 12), bool)
    brain[3:11, 2:11, 2:10] = True
    cases = [SimpleNamespace(brain=brain, contrast="T2w", map=np.linspace(1, 3, 14)[:, None, None] * rng.uniform(.5, 1.5, brain.shape) + 100 * ~brain) for _ in range(4)]
    monkeypatch.setattr(ours, "Case", lambda cohort, kept, row: cases[row])
    f = ours.Healthy(lambda c: c.map, SimpleNamespace(select=lambda split, fold, contrast, pathology: {("val", "T2w", "healthy"): np.arange(4)}[split, contrast, pathology]), None)
    mean, weight = np.mean([c.map for c in cases], 0) * brain, gaussian_filter(brain.astype(float), 1.5)
    smooth = gaussian_filter(mean, 1.5)[brain] / weight[brain]
    np.testing.assert_allclose(f.reference("T2w")[brain], smooth + .2 * smooth.mean(), rtol=1e-4)
    assert f(SimpleNamespace(contrast="T2w", map=3 * f.reference("T2w"))) == pytest.approx(3) and np.isfinite(f(cases[0])).all()


def test_written_figures_are_those_of_the_file(ours):
    kept = json.loads((BENCHMARKS/"ours.json").read_text())
    assert kept["format"] == ours.FORMAT and ours.written(kept) == (BENCHMARKS/"ours.md").read_text()
    dice = ours.of_places(kept["judge"])
    assert {len(v) for d in dice.values() for v in d.values()} == {kept["judge"]["patients"]}
    rows = {r[0]: r for r in ours.differences(dice, ours.OURS, ours.PLAIN["SSIM-ens"])}
    a, b = (np.array([v[0] for k, v in sorted(kept["judge"]["cases"][s].items()) if k.startswith("ms ")]) for s in (ours.OURS, ours.PLAIN["SSIM-ens"]))
    assert rows["ms"][1] == pytest.approx((a - b).mean()) and rows["ms"][3] == (a > b).sum() and f"{100 * a.mean():.1f} [" in (BENCHMARKS/"ours.md").read_text()
    assert digest(sorted(kept["judge"]["cases"][ours.OURS])) == digest(sorted(kept["judge"]["cases"][ours.PLAIN["l1"]]))                       # the same patients


def test_nobody_is_judged_twice(tmp_path):
    r = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import ours; ours.cohort_in = lambda out: None; ours.Restorations = lambda c, f: None; ours.main('judge', {str(tmp_path)!r})"], capture_output=True, text=True, timeout=300)
    assert r.returncode and "were judged already" in r.stderr and len(r.stderr.strip().splitlines()) == 1


def test_weights_are_exported_with_it(tiny_out, tmp_path):
    "`uad export --set`: a score that the study did not ask for, with a threshold of its own; `uad score` takes it."
    train = next(tiny_out.glob("train-*"))
    r = uad("export", train, "--out", tmp_path/"w", "--set", "names=[l1, ssim_ens, l1_ssim]", "--set", "t_test=[250, 500]")
    assert r.returncode == 0, r.stderr
    card = json.loads((tmp_path/"w"/"models"/"weights.json").read_text())
    assert set(card["thresholds"]) == {"l1", "ssim_ens", "l1_ssim"} and card["restore"]["t_test"] == [250, 500] and card["results"] == [] and "l1_ssim" in (tmp_path/"w"/"docs"/"README.md").read_text()
    one_line(uad("export", train, "--out", tmp_path/"w2", "--set", "t_tset=250"), "t_test")
    one_line(uad("export", train, "--out", tmp_path/"w2", "--set", "t_test=1000"), "t_test")
    one_line(uad("export", train, "--out", tmp_path/"w2", "--set", "names=[feature_ssim]"), "feature_ssim")
    assert not (tmp_path/"w2").exists()
