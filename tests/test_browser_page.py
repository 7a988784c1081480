"The page without a kernel as a person uses it: opened from the file system in Debian's Chromium, the network off, keys, sliders and clicks; its numbers are the study's."
import json, os, re, shutil, statistics
from pathlib import Path
import numpy as np, pandas as pd, pytest
from uad_study.core import read_json, write_json
from uad_study.judge import ScoreConfig, region
from uad_study.metrics import dice
from uad_study.page import write_page
from uad_study.postprocess import components, postprocess
from uad_study.results import Results, invented_study, open_results
from uad_study.runs import RESULT
from uad_study.scores import sigma_of
from uad_study.volume import VOXEL_ML

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None and not os.environ.get("CI"), reason="no chromium (Debian: apt install chromium)")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args="--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync".split())
        yield b
        b.close()


def opened(browser, file, **how):
    "The file in a browser without network; `errors` and `elsewhere` of the page collect what must stay empty."
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900}, **how)
    page = context.new_page()
    page.errors, page.elsewhere = [], []
    page.on("pageerror", lambda e: page.errors.append(str(e)))
    page.on("console", lambda m: page.errors.append(m.text) if m.type in ("error", "warning") else None)
    page.on("request", lambda r: page.elsewhere.append(r.url) if r.url != file.as_uri() and not r.url.startswith("data:") else None)
    page.goto(file.as_uri())
    if how.get("java_script_enabled", True): page.wait_for_selector("body[data-ready]", timeout=60_000)
    return page


@pytest.fixture(scope="module")
def file(tiny_out, tmp_path_factory):
    f = tmp_path_factory.mktemp("page")/"page.html"
    write_page(open_results(tiny_out), f)
    return f


@pytest.fixture
def page(browser, file):
    page = opened(browser, file)
    yield page
    assert not page.errors and not page.elsewhere, (page.errors, page.elsewhere)
    page.context.close()


def data(file): return json.loads(re.search(r"<script type='application/json' id=data>(.*?)</script>", file.read_text(), re.S)[1])


def pictures(page): return page.evaluate("() => [0, 1, 2, 3].map(i => document.getElementById('p' + i).toDataURL())")


def after(page, act):
    "Do `act`, wait for the page to draw once more: (pictures that changed, Dice, the words of the numbers)."
    before, drawn = pictures(page), page.evaluate("document.body.dataset.drawn")
    act()
    page.wait_for_selector(f"body:not([data-drawn='{drawn}'])", timeout=10_000)
    now = pictures(page)
    return [i for i in range(4) if now[i] != before[i]], float(page.evaluate("document.getElementById('dice').dataset.value")), page.inner_text("#whole")


def slide(page, name, value):
    "Move a slider to a value, as a hand does: the input event."
    page.evaluate("([n, v]) => { const e = document.getElementById(n); e.value = v; e.dispatchEvent(new Event('input', {bubbles: true})) }", [name, value])


def press(page, group, value): page.click(f"#{group} button[data-v='{value}']")


def choose(page, m, score, rule):
    "Show a score of a case under a rule; its Dice and mL (marked, false)."
    sigma = sigma_of(score)
    press(page, "score", "ssim" if sigma else score)
    if sigma: slide(page, "sigma", sorted(s["sigma"] for s in m["scores"] if s["sigma"]).index(sigma))
    press(page, "rule", rule)
    page.evaluate("() => new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")
    return shown(page)


def shown(page):
    ml = lambda name: float(page.inner_text(f"#n-{name}").removesuffix(" mL"))
    return float(page.evaluate("document.getElementById('dice').dataset.value")), ml("marked"), ml("false")


def test_browser_page_shows_the_studys_numbers(page, file, tiny_out):
    t, seen = pd.read_csv(tiny_out/"cases.csv"), []
    for i, m in enumerate(data(file)["cases"]):
        if i: after(page, lambda: page.click(f"#tabs button:nth-child({i + 1})"))
        rows = t[(t.subject_id == m["subject"]) & (t.contrast == m["contrast"]) & (t.model == "ddpm")]
        for r in rows[rows.threshold_from.isin(["val", "healthy"]) & rows.score.isin([s["name"] for s in m["scores"]])].itertuples():
            d, marked, false = choose(page, m, r.score, r.threshold_from)
            assert abs(d - r.dice) < 1e-6 and abs(marked - r.predicted_ml) < .051 and abs(false - r.false_ml) < .051, (r, d, marked, false)
            seen.append(marked)
    assert len(data(file)["cases"]) == 4 and len(seen) >= 4 * 5 and len(set(seen)) > 8


def test_browser_page_sliders_and_buttons(page, file):
    text = page.inner_text("body")
    assert "Virtual cohort" in text and "Research use only" in text and "moves among the sigmas" in text and "SSIM-ens" in page.inner_text("#says") and len(set(pictures(page))) == 4
    first, words = page.evaluate("document.getElementById('dice').dataset.value"), page.inner_text("#whole")
    z = int(page.inner_text("#o-slice"))
    changed, d, w = after(page, lambda: slide(page, "slice", z + 3))                     # another slice: every picture, not the volume's numbers
    assert changed == [0, 1, 2, 3] and d == float(first) and w == words and page.inner_text("#o-slice") == str(z + 3)
    changed, d, w = after(page, lambda: page.keyboard.press("ArrowDown"))                # arrow keys step slices
    assert changed == [0, 1, 2, 3] and page.inner_text("#o-slice") == str(z + 2)
    changed, d, w = after(page, lambda: press(page, "score", "ssim"))                    # another score: another map, the same scan
    assert 2 in changed and not {0, 1} & set(changed) and "SSIM, sigma 0.7" in w and "found for sigma" in w
    page.locator("#sigma").focus()
    changed, d, w = after(page, lambda: page.keyboard.press("ArrowRight"))               # sigma by keyboard
    assert 2 in changed and not {0, 1} & set(changed) and "sigma 0.9" in w and "found for" not in w and page.inner_text("#o-slice") == str(z + 2)
    most = int(page.get_attribute("#threshold", "max"))
    after(page, lambda: slide(page, "threshold", most))
    low = after(page, lambda: slide(page, "threshold", 3))                               # the threshold: the result, not the map
    more = shown(page)[1]
    assert low[0] == [3] and "chosen freely" in low[2] and page.get_attribute("#rule button[data-v=free]", "aria-pressed") == "true" and float(page.inner_text("#o-threshold")) < .01
    high = after(page, lambda: slide(page, "threshold", most - 60))
    assert high[0] == [3] and shown(page)[1] < more and high[2] != low[2]
    changed, d, w = after(page, lambda: page.click("#post"))                             # without post-processing: another map and result
    assert changed == [2, 3] and w != high[2]
    after(page, lambda: page.click("#post"))
    changed, d, w = after(page, lambda: page.click("#smooth"))
    assert changed == [0, 1, 2, 3]
    after(page, lambda: page.click("#smooth"))
    changed, d, w = after(page, lambda: press(page, "rule", "val"))
    assert not {0, 1, 2} & set(changed) and "best on validation" in w
    changed, d, w = after(page, lambda: press(page, "rule", "healthy"))
    assert "healthy validation scans" in w
    for plane in ("coronal", "sagittal"):
        changed, d, w2 = after(page, lambda: press(page, "plane", plane))
        assert changed == [0, 1, 2, 3] and w2 == w
    after(page, lambda: press(page, "plane", "axial"))
    assert page.inner_text("#o-slice") == str(z + 2)                                     # it remembers where one was
    svg = page.locator("#curve svg").bounding_box()
    after(page, lambda: page.mouse.click(svg["x"] + 45, svg["y"] + 60))                  # a click on the curve takes a sigma
    assert page.inner_text("#o-sigma") == "0.3 voxels"
    other = after(page, lambda: page.click("#tabs button:nth-child(2)"))
    assert other[0] == [0, 1, 2, 3] and data(file)["cases"][1]["patient"] in page.inner_text("#u0")


def test_browser_page_pointer(page, file, tiny_out):
    results, m = open_results(tiny_out), data(file)["cases"][0]
    assert page.inner_text("#h-voxel") == "–"
    box, seen = page.locator("#p2").bounding_box(), set()
    for fx, fy in ((.5, .5), (.4, .6), (.62, .35)):
        page.mouse.move(box["x"] + fx * box["width"], box["y"] + fy * box["height"])
        i = tuple(map(int, page.inner_text("#h-voxel").split(",")))
        x = results.cohort.images[m["row"]][i]
        score = postprocess(results.maps("ddpm", m["row"], ["ssim_ens"])["ssim_ens"], results.cohort.brain_masks[m["row"]])[i]
        assert i[2] == int(page.inner_text("#o-slice")) and abs(float(page.inner_text("#h-input")) - x) < .011 and abs(float(page.inner_text("#h-score")) - score) < .01
        seen.add(i)
    assert len(seen) == 3
    page.mouse.move(2, 2)
    assert page.inner_text("#h-voxel") == "–"


@pytest.mark.parametrize("config", [{}, dict(median_first=True, median=3, erode=1, min_voxels=30), dict(median=1, erode=0, masked=True)], ids=["defaults", "median first", "bare"])
def test_browser_page_does_what_python_does(browser, tmp_path, config):
    "Median, components and Dice in the browser at thresholds that nobody chose, on levels, against the float maps; voxels to ignore, too."
    invented_study(tmp_path)
    e = read_json(tmp_path/"evaluate"/"result.json", RESULT); e["parameters"]["score_config"] = config
    write_json(tmp_path/"evaluate"/"result.json", {k: v for k, v in e.items() if k != "format"}, RESULT)
    results = Results("Invented </script> & <b>study</b>", "invented", tmp_path/"cohort", [tmp_path/"evaluate"])
    brain, lesion = (np.asarray(a[0]) for a in (results.cohort.brain_masks, results.cohort.lesion_masks))
    ignore = np.zeros(results.cohort.images.shape, bool); ignore[0, :, :50, 20:40] = True
    results.cohort.ignore_masks = ignore
    write_page(results, tmp_path/"page.html", [0])
    page, c, m = opened(browser, tmp_path/"page.html"), ScoreConfig(**config), data(tmp_path/"page.html")["cases"][0]
    counted = region(results.cohort, 0, c)
    assert page.title() == results.title and page.inner_text("h1") == results.title
    for name in ("l1", "ssim_1.1", "ssim_ens"):
        s, raw = next(s for s in m["scores"] if s["name"] == name), results.maps("ddpm", 0, [name])[name]
        choose(page, m, name, "val")
        for post in (True, False):
            page.set_checked("#post", post)
            q = postprocess(raw, brain, c.erode, c.median, median_first=c.median_first) if post else raw * brain
            for j in np.searchsorted(s["edges"], np.quantile(q[brain], [.3, .9, .99])):
                after(page, lambda: slide(page, "threshold", int(j)))
                found = (q > s["edges"][j]) & counted
                if post: found = components(found, c.min_voxels)
                want = dice(found, lesion & counted), found.sum() * VOXEL_ML, (found & ~lesion).sum() * VOXEL_ML
                got = shown(page)
                assert found.any() and abs(got[0] - want[0]) < 1e-6 and abs(got[1] - want[1]) < .051 and abs(got[2] - want[2]) < .051, (name, post, j, got, want)
    assert not page.errors and not page.elsewhere, (page.errors, page.elsewhere)
    page.context.close()


def test_browser_page_is_quick_and_fits(browser, file):
    page = opened(browser, file)
    took = []
    for name, values in (("slice", range(15, 24)), ("threshold", range(60, 150, 10))):
        for v in values:
            after(page, lambda: slide(page, name, v))
            took.append(float(page.evaluate("document.body.dataset.ms")))
    assert statistics.median(took) < 150, took                                           # some 10 ms on an idle core
    for width in (360, 390, 820, 1280, 1920):
        page.set_viewport_size({"width": width, "height": 900})
        over = page.evaluate("[document.documentElement.scrollWidth - innerWidth, ...[...document.querySelectorAll('button, dd, output, h2')].filter(e => e.offsetParent && e.scrollWidth > e.clientWidth + 1 && e.clientWidth).map(e => e.outerHTML)]")
        assert over[0] <= 0 and len(over) == 1, (width, over)
    if shot := os.environ.get("UAD_SCREENSHOT"): page.screenshot(path=Path(shot).with_stem(Path(shot).stem + "-page"))
    page.context.close()
    assert file.stat().st_size < 15e6


def test_browser_page_without_javascript(browser, file):
    page = opened(browser, file, java_script_enabled=False)
    assert "needs JavaScript" in page.inner_text("body") and not page.is_visible("#main")
    page.context.close()
