"The inspector as a person uses it: JupyterLab, Debian's Chromium, keys and clicks."
import json, os, re, shutil, socket, subprocess, sys, time, urllib.request
from contextlib import contextmanager
from importlib.resources import files
import pytest
from uad_study.cohort import Cohort
from uad_study.core import UadError
from uad_study.viewer import inspect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None and not os.environ.get("CI"), reason="no chromium (Debian: apt install chromium)")


def free_port():
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); return s.getsockname()[1]


@contextmanager
def jupyterlab(folder, home, theme="Light"):
    "JupyterLab on `folder`, its own settings in `home`; gives its address. The notebook that `uad explore` puts there is copied."
    shutil.copyfile(files("uad_study")/"explore.ipynb", folder/"explore.ipynb")
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


@contextmanager
def chromium_on(lab):
    "A function (folder, width, height) that opens the notebook there in JupyterLab and runs it; its page's `errors` and `elsewhere` collect what must stay empty."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args="--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync".split())
        def opened(folder="", width=1280, height=1000):
            page = chromium.new_page(viewport={"width": width, "height": height})
            page.errors, page.elsewhere = [], []
            page.on("pageerror", lambda e: page.errors.append(str(e)))
            page.on("console", lambda m: page.errors.append(m.text) if m.type == "error" and "favicon" not in m.text else None)
            page.on("request", lambda r: page.elsewhere.append(r.url) if not r.url.startswith((lab, lab.replace("http", "ws"), "data:", "blob:")) else None)
            page.goto(f"{lab}/doc/tree/{folder}explore.ipynb")
            page.wait_for_function("""() => { const c = window.jupyterapp?.shell?.currentWidget; const k = c?.sessionContext?.session?.kernel; return c?.context?.isReady && k?.status === 'idle' }""", timeout=60_000)
            page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
            return page
        yield opened
        chromium.close()


def wait_for_inspector(page):
    "Wait until pictures, numbers and both charts are there."
    page.wait_for_function(f"() => {{ const s = ({SEEN})(); return s.length === 4 && new Set(s).size === 4 && {NUMBERS}.includes('Dice') && document.querySelectorAll('.uad-inspector [class^=legend][class$=text]').length >= 5 }}", timeout=90_000)


@pytest.fixture(scope="module")
def lab(tiny_out, tmp_path_factory):
    with jupyterlab(tiny_out, tmp_path_factory.mktemp("jupyter")) as address: yield address


@pytest.fixture
def browser(lab):
    with chromium_on(lab) as opened: yield opened


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
    page = browser()
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
    look.after(lambda: [keys.press("ArrowLeft") for _ in range(40)], [3], words=True, until=f"document.querySelector('.uad-threshold .widget-readout').innerText <= {t - .035}")
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
    assert not page.errors and not page.elsewhere, (page.errors, page.elsewhere)


def test_inspector_without_a_study_is_one_line_in_the_browser(browser, tiny_out):
    (tiny_out/"empty").mkdir(exist_ok=True); shutil.copyfile(tiny_out/"explore.ipynb", tiny_out/"empty"/"explore.ipynb")
    page = browser("empty/")
    page.wait_for_selector(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']", timeout=60_000)
    lines = page.inner_text(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']").strip().splitlines()
    assert len(lines) == 1 and "holds no study: run `make demo`" in lines[0], lines


def test_inspector_of_an_unfinished_study(tiny_out, tmp_path):
    "A run that is planned but not there is told; evaluations without their restorations or volumes, and none at all, are one line."
    out = tmp_path/"out"; shutil.copytree(tiny_out, out)
    report = next(out.glob("report-*/run.json")); plan = json.loads(report.read_text())
    plan["parameters"]["evaluate_dirs"].append("evaluate-T2w-ae-f0-000000000000"); report.write_text(json.dumps(plan))
    assert "Not all is here: evaluate-T2w-ae-f0-000000000000: is planned, but not there" in inspect(out).text.value
    for pattern, words in (("train-*/reconstructions-*", "holds no restorations or maps"), ("prepare-*", "its volumes are not here"), ("evaluate-*/result.json", "holds no finished evaluation")):
        for f in list(out.glob(pattern)): shutil.rmtree(f) if f.is_dir() else f.unlink()
        with pytest.raises(UadError, match=words) as e: inspect(out)
        assert len(str(e.value).splitlines()) == 1 and len(e.value._render_traceback_()) == 1
