"The interactive page as a person uses it: Chromium without a network, the mouse on points and drop-downs."
import copy, os, shutil, subprocess, sys
import numpy as np, pandas as pd, pytest
from uad_study import figures, interactive
from uad_study.results import invented_study
from uad_study.scores import SIGMAS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
browser_only = pytest.mark.skipif(CHROMIUM is None and not os.environ.get("CI"), reason="no chromium (Debian: apt install chromium)")
IDS = ["sigma-0", "sigma-1", "cases", "size", "curves", "transfer", "calibration"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    "An invented study of two models; the second is 0.05 of Dice worse, and a patient has a name that is not fit for HTML."
    r = invented_study(tmp_path_factory.mktemp("study")/"x")
    two = lambda t: pd.concat([t, t.assign(model="vae", **({"dice": t.dice - .05} if "dice" in t else {}))], ignore_index=True) if len(t) else t
    for name in ("cases", "pooled", "curves", "calibration", "lesions", "table"): setattr(r, name, two(getattr(r, name)))
    r.cases["patient_id"] = r.cases.patient_id.replace("tumour-0", "<i>&tumour")
    r.models = ["ddpm", "vae"]
    return r


@pytest.fixture(scope="module")
def file(results, tmp_path_factory):
    f = tmp_path_factory.mktemp("page")/"interactive.html"
    interactive.write_interactive(results, f)
    return f


@pytest.fixture
def page(file):
    "The page, opened without a network; `page.errors` and `page.asked` collect what goes wrong and every request."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args="--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync".split())
        context = browser.new_context(viewport={"width": 1200, "height": 1000}, offline=True)
        page = context.new_page()
        page.errors, page.asked = [], []
        page.on("pageerror", lambda e: page.errors.append(str(e)))
        page.on("console", lambda m: page.errors.append(m.text) if m.type in ("error", "warning") else None)
        page.on("request", lambda r: page.asked.append(r.url))
        page.goto(file.as_uri())
        page.wait_for_function("n => document.querySelectorAll('.plot .main-svg').length >= n && [...document.querySelectorAll('.plot > div')].every(d => d.calcdata)", arg=len(IDS), timeout=60_000)
        yield page
        assert not page.errors and page.asked == [file.as_uri()], (page.errors, page.asked)
        browser.close()


def choose(page, plot, prefix, label):
    "Choose an entry of a drop-down, with the mouse."
    page.locator(f"#{plot}").scroll_into_view_if_needed()
    page.locator(f"#{plot} .updatemenu-header", has_text=prefix + ":").click()
    page.locator(f"#{plot} .updatemenu-dropdown-button").get_by_text(f"{prefix}: {label}", exact=True).click()
    page.locator(f"#{plot} .updatemenu-header").get_by_text(f"{prefix}: {label}", exact=True).wait_for()
    page.wait_for_timeout(300)


def point_at(page, plot, trace, i, silent=False):
    "Move the mouse to a point; returns the words that appear (`silent`: or none)."
    page.locator(f"#{plot}").scroll_into_view_if_needed()
    at = page.evaluate("""([id, t, i]) => { const g = document.getElementById(id), f = g._fullData[t], l = g._fullLayout, x = l[f.xaxis.replace('x', 'xaxis')], y = l[f.yaxis.replace('y', 'yaxis')], b = g.getBoundingClientRect();
                          return [b.left + x._offset + x.c2p(x.d2c(f.x[i])), b.top + y._offset + y.c2p(y.d2c(f.y[i]))] }""", [plot, trace, i])
    page.mouse.move(5, 5); page.mouse.move(at[0] - 3, at[1]); page.mouse.move(*at)
    if silent: page.wait_for_timeout(500)
    else: page.wait_for_selector(f"#{plot} .hoverlayer .hovertext", timeout=5_000)
    return "\n".join(page.locator(f"#{plot} .hoverlayer text").all_text_contents())


def drawn(page, plot, trace):
    "Where the points of a trace are on the screen: (2, n), pixels from the left and from the top."
    moves = page.evaluate("([id, t]) => [...document.querySelectorAll(`#${id} .scatterlayer .trace`)[t].querySelectorAll('.point')].map(p => p.getAttribute('transform'))", [plot, trace])
    return np.array([[float(v) for v in m.removeprefix("translate(")[:-1].split(",")] for m in moves]).T


@browser_only
def test_everything_is_drawn(page):
    assert page.evaluate("[...document.querySelectorAll('.plot > div')].map(d => d.id)") == IDS
    marks = page.evaluate("Object.fromEntries([...document.querySelectorAll('.plot > div')].map(d => [d.id, d.querySelectorAll('.scatterlayer .js-line, .scatterlayer .point, .heatmaplayer image').length]))")
    assert all(marks[i] >= n for i, n in dict(zip(IDS, (20, 20, 12, 12, 3, 1, 20))).items()), marks
    assert "Virtual cohort" in page.inner_text(".note") and page.evaluate("document.querySelector('.note').getBoundingClientRect().top < document.getElementById('sigma-0').getBoundingClientRect().top")
    assert {b.get_attribute("data-title") for b in page.locator(".modebar-btn").all()} == {"Download plot as a PNG", "Zoom", "Pan", "Reset axes"}, "no button that sends the chart away"
    if shot := os.environ.get("UAD_SCREENSHOT"): page.screenshot(path=shot, full_page=True)


@browser_only
def test_a_drop_down_moves_the_points(page):
    before = drawn(page, "cases", 0)
    assert before.shape == (2, 6)
    choose(page, "cases", "across", "SSIM, sigma 0.3")
    after = drawn(page, "cases", 0)
    assert np.abs(before[0] - after[0]).max() > 2 and np.allclose(before[1], after[1]), "across changed, up did not"
    assert "SSIM, sigma 0.3" in page.locator("#cases .xtitle").text_content()
    choose(page, "cases", "model", "vae")
    moved = drawn(page, "cases", 2)
    assert (moved[0] < after[0]).all() and (moved[1] > after[1]).all(), "the other model's points lie further down and to the left"
    assert "vae" in point_at(page, "cases", 2, 1)
    assert not any("ddpm" in point_at(page, "cases", 0, i, silent=True) for i in range(3)), "a point that is hidden answers"
    choose(page, "cases", "pathology", "Multiple sclerosis")
    assert page.evaluate("document.getElementById('cases')._fullData.map(t => t.visible)") == [False, True, False, True]
    choose(page, "size", "show", "vae, Multiple sclerosis")
    assert set(page.evaluate("document.getElementById('size')._fullData[0].text")) == {f"ms-{i}" for i in range(6)}
    dice = page.evaluate("document.getElementById('transfer')._fullData[0].z[0][0]")
    choose(page, "transfer", "score", "l1")
    assert page.evaluate("document.getElementById('transfer')._fullData[0].z[0][0]") < dice


@browser_only
def test_pointing_names_the_patient(page, results):
    words = point_at(page, "cases", 0, 0)
    c = results.cases[(results.cases.model == "ddpm") & (results.cases.patient_id == "<i>&tumour") & (results.cases.threshold_from == "val")]
    assert "<i>&tumour" in words and f"l1: {100 * c[c.score == 'l1'].dice.mean():.1f} % at threshold 0.3" in words and f"SSIM-ens: {100 * c[c.score == 'ssim_ens'].dice.mean():.1f} %" in words, words
    assert "lesion" in words and "mL" in words
    assert "tumour-" in point_at(page, "size", 0, 3)
    assert "AUPRC 0.180" in point_at(page, "curves", 0, 5)


@browser_only
def test_a_panel_takes_the_whole_width(page):
    width = lambda: page.evaluate("document.getElementById('sigma-0')._fullLayout.xaxis2._length")
    narrow = width()
    page.locator("#sigma-0 .updatemenu-button", has_text="Multiple sclerosis").click(); page.wait_for_timeout(400)
    assert width() > 1.8 * narrow and not page.locator("#sigma-0 .annotation", has_text="Tumour").count()
    page.locator("#sigma-0 .updatemenu-button", has_text="all").click(); page.wait_for_timeout(400)
    assert width() == narrow


def test_same_results_same_bytes(tmp_path):
    "In two processes that order their sets differently."
    program = "import sys; from uad_study import interactive, results; interactive.write_interactive(results.invented_study(sys.argv[1] + '/x'), sys.argv[1] + '/page.html')"
    pages = []
    for seed in "12":
        (tmp_path/seed).mkdir()
        subprocess.run([sys.executable, "-c", program, str(tmp_path/seed)], check=True, env=os.environ | {"PYTHONHASHSEED": seed})
        pages.append((tmp_path/seed/"page.html").read_bytes())
    assert pages[0] == pages[1]


def test_colours_are_those_of_the_figures():
    assert {k: v for k, v in interactive.COLORS.items() if k in figures.COLORS} == {k: v for k, v in figures.COLORS.items() if k != "perfect map"}
    for score in interactive.COLORS: assert interactive._by_score([score])[0]["line"]["color"] == interactive.COLORS[score]


def test_a_study_of_the_papers_size_fits(results, tmp_path):
    "Five models, five folds, the paper's test sets: below 8 MB."
    r, rng = copy.copy(results), np.random.default_rng(0)
    r.models, scores, patients = [f"model {i}" for i in range(5)], ["intensity", "l1", "l2", *(f"ssim_{s:g}" for s in SIGMAS), "ssim_val", "ssim_uniform", "ssim_ens"], {"tumour": 1151, "ms": 20, "stroke": 480, "wmh": 45}
    keys = pd.MultiIndex.from_product([r.models, patients, scores], names=["model", "pathology", "score"]).to_frame(index=False).assign(contrast="T2w", fold=0)
    row = results.table.iloc[0]
    r.table = keys.assign(**{c: row[c] for c in results.table.columns if c not in keys})
    r.pathologies = list(patients)
    people = pd.concat([pd.DataFrame(dict(pathology=p, patient_id=[f"{p}-{i:05d}" for i in range(n)], lesion_ml=rng.lognormal(2, 1, n))) for p, n in patients.items()])
    r.cases = keys.merge(people).assign(threshold_from="val", threshold=.3, subject_id=lambda t: t.patient_id)
    r.cases["dice"] = rng.random(len(r.cases))
    r.lesions = r.cases.assign(lesion=1, found=rng.random(len(r.cases)) > .5, covered=.5, iou=.3)
    points = pd.DataFrame(dict(recall=np.linspace(.01, 1, 100)))
    r.curves = keys.drop(columns="fold").merge(pd.DataFrame(dict(fold=range(5))), how="cross").merge(points, how="cross")
    r.curves[["precision", "threshold"]] = rng.random((len(r.curves), 2))
    r.pooled = keys.assign(auprc_pooled=.2, prevalence=.02)
    file = tmp_path/"large.html"
    interactive.write_interactive(r, file)
    print(f"{file.stat().st_size / 1e6:.2f} MB")
    assert file.stat().st_size < 8e6
