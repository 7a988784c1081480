"The inspector and the labs as a person uses them: JupyterLab, Debian's Chromium, keys and clicks. One server, one browser, the tiny study."
import json, os, re, shutil, socket, subprocess, sys, time, urllib.request
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import files
import numpy as np, pandas as pd, pytest
from scipy.ndimage import gaussian_filter
from uad_study import phantom
from uad_study.cohort import Cohort, Item, write_cohort, write_reconstructions
from uad_study.core import write_json
from uad_study.results import invented_study
from uad_study.runs import RUN, STAGES
from uad_study.viewer import inspect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None and not os.environ.get("CI"), reason="no chromium (Debian: apt install chromium)")


def free_port():
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); return s.getsockname()[1]


@contextmanager
def jupyterlab(folder, home, theme="Light"):
    "JupyterLab on `folder`, its own settings in `home`; gives its address."
    settings = home/"settings"/"@jupyterlab"/"apputils-extension"; settings.mkdir(parents=True)
    for name, values in (("notification", {"fetchNews": "false", "checkForUpdates": False}), ("themes", {"theme": f"JupyterLab {theme}"})): (settings/f"{name}.jupyterlab-settings").write_text(json.dumps(values))
    port = free_port()
    env = os.environ | {f"JUPYTER_{k}": str(home/k.lower()) for k in ("CONFIG_DIR", "RUNTIME_DIR", "DATA_DIR")} | {"JUPYTERLAB_SETTINGS_DIR": str(home/"settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home/"work")}
    log = open(home/"log.txt", "wb")
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=",
                               "--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={folder}"], cwd=folder, env=env, stdout=log, stderr=log)
    try:
        for _ in range(240):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=2); break
            except OSError: time.sleep(.25)
        else: raise AssertionError((home/"log.txt").read_text()[-2000:])
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try: server.wait(10)
        except subprocess.TimeoutExpired: server.kill()


def with_notebooks(folder):
    "The folder, made where it is not there, with the notebooks that `uad explore` puts there."
    folder.mkdir(exist_ok=True)
    for name in ("explore.ipynb", "labs.ipynb"): shutil.copyfile(files("uad_study")/name, folder/name)
    return folder


@contextmanager
def chromium_on(lab):
    "A function (notebook, width, height) that opens a notebook in JupyterLab and runs it; its page's `errors` and `elsewhere` collect what must stay empty."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args="--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync".split())
        def opened(notebook="explore.ipynb", width=1280, height=1000):
            page = chromium.new_page(viewport={"width": width, "height": height})
            page.errors, page.elsewhere = [], []
            page.on("pageerror", lambda e: page.errors.append(str(e)))
            page.on("console", lambda m: page.errors.append(m.text) if m.type == "error" and "favicon" not in m.text else None)
            page.on("request", lambda r: page.elsewhere.append(r.url) if not r.url.startswith((lab, lab.replace("http", "ws"), "data:", "blob:")) else None)
            page.goto(f"{lab}/doc/tree/{notebook}")
            page.wait_for_function("""() => { const c = window.jupyterapp?.shell?.currentWidget; const k = c?.sessionContext?.session?.kernel; return c?.context?.isReady && k?.status === 'idle' }""", timeout=60_000)
            page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
            return page
        yield opened
        chromium.close()


def wait_for_inspector(page):
    "Wait until pictures, numbers and both charts are there."
    page.wait_for_function(f"() => {{ const s = ({SEEN})(); return s.length === 4 && new Set(s).size === 4 && {NUMBERS}.includes('Dice') && document.querySelectorAll('.uad-inspector [class^=legend][class$=text]').length >= 5 }}", timeout=90_000)
    seen = None
    for _ in range(60):                                                                                                 # and until the charts have found their width: a slow browser lays them out twice
        now = page.evaluate("() => [...document.querySelectorAll('.uad-inspector .main-svg, .uad-inspector .js-line')].map(e => e.getAttribute('d') || e.getBoundingClientRect().width).join()")
        if now == seen: return
        seen = now; page.wait_for_timeout(500)


@pytest.fixture(scope="module")
def opened(tiny_out, tmp_path_factory):
    with_notebooks(tiny_out)
    with jupyterlab(tiny_out.parent, tmp_path_factory.mktemp("jupyter")) as lab, chromium_on(lab) as opened: yield opened


@pytest.fixture
def browser(opened):
    pages = []
    def one(notebook, **how): pages.append(opened(notebook, **how)); return pages[-1]
    yield one
    for page in pages: page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()"); page.close()


def clean(page):
    "Assert that nothing was said on the console, nothing asked of another machine, and no chart offers buttons of its own."
    assert not page.errors and not page.elsewhere, (page.errors, page.elsewhere)
    assert page.locator(".modebar, .modebar-btn").count() == 0 and "Share" not in page.inner_text(".jp-Notebook")


SEEN = "() => [...document.querySelectorAll('.uad-inspector image')].map(i => i.getAttribute('href') || i.getAttribute('xlink:href'))"
NUMBERS = "document.querySelector('.uad-text').innerText"


class Look:
    "What a person sees of the inspector."
    def __init__(self, page): self.page = page
    pictures = property(lambda self: self.page.evaluate(SEEN))
    words = property(lambda self: self.page.inner_text(".uad-text"))
    def chosen(self, name): return self.page.evaluate(f"() => document.querySelector('.uad-{name} select').selectedOptions[0].text")
    def value(self, name): return float(self.page.inner_text(f".uad-{name} .widget-readout"))

    def after(self, act, pictures=(), words=False, until="true"):
        "Do `act`; wait until the `pictures` changed, the numbers if `words`, and `until` is true; the other pictures, and without `words` the numbers, must be as before."
        before, said = self.pictures, self.words
        act()
        self.page.wait_for_function(f"([b, w, t]) => {{ const s = ({SEEN})(); return w.every(i => s[i] !== b[i]) && (t === null || {NUMBERS} !== t) && ({until}) }}", arg=[before, list(pictures), said if words else None], timeout=20_000)
        now = self.pictures
        assert [i for i in range(4) if now[i] != before[i] and i not in pictures] == [], "other pictures changed, too"
        assert words or self.words == said, (said, self.words)


def test_inspector_in_the_browser(browser, tiny_out):
    page = browser("out/explore.ipynb")
    wait_for_inspector(page)
    look, keys = Look(page), page.keyboard
    handle = lambda name: page.locator(f".uad-{name} .noUi-handle")
    chart = lambda n: page.evaluate(f"() => [...document.querySelectorAll('.uad-inspector .x{n}y{n} .js-line, .uad-inspector .x{n}y{n} .point')].map(p => [p.getAttribute('d'), p.getAttribute('transform')]).join()")
    bars, dices = chart(5), chart(6)

    look.after(lambda: page.select_option(".uad-score select", label="l1"), [2, 3], words=True)                         # another score: another map, the same scan
    assert chart(5) != bars and chart(6) == dices and "carried" not in look.words
    handle("sigma").focus()
    look.after(lambda: keys.press("ArrowRight"), [2, 3], words=True, until="document.querySelector('.uad-score select').selectedOptions[0].text.startsWith('SSIM')")
    assert look.value("sigma") == .75 and "sigma 0.3 and 0.9" in look.words and chart(6) != dices                       # its threshold lies between two that were judged; the chart marks it
    z = look.value("slice")
    page.locator(".uad-inspector .nsewdrag").first.click(position={"x": 60, "y": 70})                                  # the keyboard, with the focus on a picture
    look.after(lambda: keys.press("ArrowRight"), [0, 1, 2, 3], until=f"document.querySelector('.uad-slice .widget-readout').innerText == {z + 1}")
    look.after(lambda: keys.press("ArrowDown"), [0, 1, 2, 3], until=f"document.querySelector('.uad-slice .widget-readout').innerText == {z}")
    handle("slice").focus()
    look.after(lambda: keys.press("ArrowLeft"), [0, 1, 2, 3], until=f"document.querySelector('.uad-slice .widget-readout').innerText == {z - 1}")   # and on its slider, which steps once

    who, there = look.chosen("row"), look.pictures                                                                     # the next subject, and back to where one was
    look.after(lambda: keys.press("PageDown"), [0, 1, 2, 3], words=True); assert look.chosen("row") != who
    look.after(lambda: keys.press("PageUp"), [0, 1, 2, 3], words=True); assert (look.chosen("row"), look.value("slice"), look.pictures) == (who, z - 1, there)
    look.after(lambda: page.select_option(".uad-row select", index=1), [0, 1, 2, 3], words=True); assert look.chosen("row") != who
    look.after(lambda: page.select_option(".uad-row select", index=0), [0, 1, 2, 3], words=True); assert look.pictures == there

    look.after(lambda: page.select_option(".uad-rule select", index=3), [3], words=True); assert "healthy, 5 % of voxels" in look.words     # another threshold: another result, the same map
    handle("threshold").focus(); t = look.value("threshold")
    look.after(lambda: [keys.press("ArrowLeft") for _ in range(40)], [3], words=True, until=f"(v => v <= {t - .035} && {NUMBERS}.includes('threshold ' + v))(document.querySelector('.uad-threshold .widget-readout').innerText)")
    look.after(lambda: page.uncheck(".uad-post input"), [2, 3], words=True)
    look.after(lambda: page.locator(".uad-plane button", has_text="coronal").click(), [0, 1, 2, 3], until=f"document.querySelector('.uad-slice .widget-readout').innerText != {z - 1}")
    box = page.locator(".uad-inspector image").first.bounding_box()
    assert abs(box["width"] / box["height"] - 96 / 50) < .02                                                           # voxels are square

    page.locator(".uad-inspector .nsewdrag").first.hover(position={"x": box["width"] * .45, "y": box["height"] * .5})    # the readout tells what the volume holds there
    page.wait_for_function("() => document.querySelector('.uad-readout').innerText.startsWith('voxel')", timeout=5000)
    i, j, k, value = re.match(r"voxel \((\d+), (\d+), (\d+)\) +input ([\d.]+) ", page.inner_text(".uad-readout")).groups()
    cohort = Cohort(next(tiny_out.glob("prepare-*/cohort"))); row = cohort.table.subject_id.tolist().index(who.split()[0])
    assert int(j) == look.value("slice") and abs(cohort.images[row, int(i), int(j), int(k)] - float(value)) < 6e-4 and float(value) > 0
    page.locator(".jp-Notebook .cm-content").last.click()                                                              # in a cell, keys are the cell's
    at = look.value("slice"); keys.press("ArrowLeft"); page.wait_for_timeout(500); assert look.value("slice") == at
    clean(page)


def several(out):
    "A study that never ran, of two contrasts, two folds and two models, as far as it is looked at: each evaluation has restorations of its own."
    invented_study(out/"base", folds=1, patients=1)
    person, contrasts = phantom.diseased(4, "ms"), ("T1w", "T2w")
    brain, image, twin = person.brain_mask, person.images["T2w"], person.twins["T2w"]
    pictures = {"T1w": [np.where(brain, 1 - a, 0) for a in (image, twin)], "T2w": [image, twin]}
    write_cohort(out/"prepare-0"/"cohort", [Item(dict(subject_id="ms-0", contrast=c, pathology="ms", split="test", val_fold=-1), pictures[c][0], brain, person.lesion_mask, pictures[c][1]) for c in contrasts], 2, {"source": "virtual"})
    cohort = Cohort(out/"prepare-0"/"cohort")
    for contrast, name, fold, blur in (("T1w", "ddpm", 0, .9), ("T2w", "ddpm", 0, .6), ("T2w", "ddpm", 1, 1.2), ("T2w", "vae", 0, 2.)):
        train, evaluate, row = out/f"train-{contrast}-{name}-{fold}", out/f"evaluate-{contrast}-{name}-{fold}", contrasts.index(contrast)
        for made, base in ((train, out/"base"/"train"), (evaluate, out/"base"/"evaluate")):
            shutil.copytree(base, made, ignore=shutil.ignore_patterns("reconstructions-*"))
            result = json.loads((made/"result.json").read_text())
            result["parameters"] |= dict(contrast=contrast, fold=fold, label=name, cohort_dir="../prepare-0/cohort", train_dir=f"../{train.name}")
            result |= dict(key=made.name, version=STAGES["evaluate"], results=result["results"] | dict(cohort=cohort.facts()))
            (made/"result.json").write_text(json.dumps(result))
        write_json(evaluate/"run.json", dict(label=evaluate.name), RUN)
        for f in evaluate.glob("*.csv"):
            t = pd.read_csv(f)
            t.assign(**{k: v for k, v in dict(model=name, contrast=contrast, fold=fold).items() if k in t}).to_csv(f, index=False)
        write_reconstructions(train/"reconstructions-0", [row], [gaussian_filter(cohort.twins[row], blur)], {"step": 900})
    return with_notebooks(out)


def test_inspector_contrast_model_and_fold_in_the_browser(browser, tiny_out):
    out = several(tiny_out.parent/"several")
    view = inspect(out).view
    page = browser("several/explore.ipynb")
    wait_for_inspector(page)
    look, models = Look(page), [(m.contrast, m.name, m.fold) for m in view.models]
    def at(*chosen):
        "The controls say what was chosen, and the numbers are those of that model."
        dice = view.numbers(replace(view.first(models.index(chosen)), score="ssim_ens"))["dice"]
        assert (look.chosen("contrast"), look.chosen("name"), int(look.chosen("fold"))) == chosen and f"Dice {100 * dice:.1f} %" in look.words, (chosen, dice, look.words)
    choose = lambda name, label, pictures: look.after(lambda: page.select_option(f".uad-{name} select", label=label), pictures, words=True)
    off = lambda name: page.is_disabled(f".uad-{name} select")
    at("T1w", "ddpm", 0); assert off("name") and off("fold") and not off("contrast")
    choose("contrast", "T2w", [0, 1, 2, 3]); at("T2w", "ddpm", 0); assert not off("name") and not off("fold")
    there = look.pictures
    choose("fold", "1", [1, 2, 3]); at("T2w", "ddpm", 1)                                                               # the same scan, restored by another training
    choose("name", "vae", [1, 2, 3]); at("T2w", "vae", 0); assert off("fold")                                          # which has no such fold
    choose("name", "ddpm", [1, 2, 3]); at("T2w", "ddpm", 0); assert look.pictures == there
    choose("contrast", "T1w", [0, 1, 2, 3]); at("T1w", "ddpm", 0)
    clean(page)


BENCHES = """() => {
    const drawn = s => { const i = document.querySelector(s + ' img, img' + s); if (!i?.naturalWidth) return ''; const c = document.createElement('canvas'); c.width = i.naturalWidth; c.height = i.naturalHeight; c.getContext('2d').drawImage(i, 0, 0); return c.toDataURL() };
    const sources = s => [...document.querySelectorAll(s + ' image')].map(i => i.getAttribute('href') || i.getAttribute('xlink:href')), text = s => document.querySelector(s)?.textContent ?? '';
    const [input, restoration, difference] = sources('.uad-erased');
    return {inspector: sources('.uad-inspector').join(), sigmas: drawn('.uad-sigmas'), lesions: text('.uad-sigmas-text'), why: drawn('.uad-why-image'), input, restoration, difference, noise: text('.uad-erased-text')} }"""


def test_inspector_labs_in_the_browser(browser):
    "A control of each bench of labs.ipynb: what should change does, and the other benches stay."
    page = browser("out/labs.ipynb", height=4200)                                                                       # every cell in sight: what is not, JupyterLab may leave out
    page.wait_for_function(f"() => {{ const b = ({BENCHES})(); return Object.values(b).every(v => v) && document.querySelector('.uad-thumb') && new Set([b.input, b.restoration, b.difference]).size === 3 }}", timeout=120_000)
    wait_for_inspector(page)
    look, keys = Look(page), page.keyboard
    def after(act, *changed):
        before = page.evaluate(BENCHES)
        act()
        for _ in range(200):
            now = page.evaluate(BENCHES)
            different = {k for k in now if now[k] != before[k]}
            if all(now.values()) and different == set(changed): break                                                       # a picture is empty for a moment while it is changed
            page.wait_for_timeout(100)
        assert all(now.values()) and different == set(changed)
    handle = lambda name: page.locator(f".uad-{name} .noUi-handle")

    thumbs = [(b, b.get_attribute("title")) for b in page.locator(".uad-thumb:not([disabled])").all()]                  # the gallery opens the case in the inspector
    thumb, says = next((b, t) for b, t in thumbs if t.partition(",")[0] != look.chosen("row").split()[0] and t.endswith(" mL"))
    after(thumb.click, "inspector")
    for _ in range(200):                                                                                                # the subject comes first, then its slice: a slow browser shows both
        if f"of it false {says.partition(': ')[2]}" in look.words: break
        page.wait_for_timeout(100)
    assert look.chosen("row").split()[0] == says.partition(",")[0] and f"of it false {says.partition(': ')[2]}" in look.words, (says, look.words)

    after(lambda: page.select_option(".uad-sigma-row select", index=1), "sigmas", "lesions")                            # the sigma lab: another subject; another slice of the same lesions
    handle("sigma-z").focus(); after(lambda: keys.press("ArrowLeft"), "sigmas")

    for name, index in (("score", 0), ("pathology", 1)): after(lambda: page.select_option(f".uad-why-{name} select", index=index), "why")

    assert "t = 500" in page.inner_text(".uad-erased-text")                                                             # more noise: another restoration of the same scan
    handle("t").focus(); after(lambda: keys.press("ArrowRight"), "restoration", "difference", "noise")
    assert "t = 650" in page.inner_text(".uad-erased-text")
    handle("t-z").focus(); after(lambda: keys.press("ArrowLeft"), "input", "restoration", "difference")
    clean(page)


def test_inspector_without_a_study_is_one_line_in_the_browser(browser, tiny_out):
    with_notebooks(tiny_out.parent/"empty")
    page = browser("empty/labs.ipynb")
    page.wait_for_selector(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']", timeout=60_000)
    lines = page.inner_text(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']").strip().splitlines()
    assert len(lines) == 1 and "holds no study: run `make demo`" in lines[0], lines
