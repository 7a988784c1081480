"The inspector as a person uses it: JupyterLab, Debian's Chromium, keys and clicks."
import json, os, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None and not os.environ.get("CI"), reason="no chromium (Debian: apt install chromium)")


def free_port():
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); return s.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tiny_out, tmp_path_factory):
    "JupyterLab on the tiny study's folder, with the notebook that `uad explore` puts there."
    from importlib.resources import files
    folder, home = tiny_out, tmp_path_factory.mktemp("jupyter")
    shutil.copyfile(files("uad_study")/"explore.ipynb", folder/"explore.ipynb")
    settings = home/"settings"/"@jupyterlab"/"apputils-extension"; settings.mkdir(parents=True)
    (settings/"notification.jupyterlab-settings").write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    port = free_port()
    env = os.environ | {f"JUPYTER_{k}": str(home/k.lower()) for k in ("CONFIG_DIR", "RUNTIME_DIR", "DATA_DIR")} | {"JUPYTERLAB_SETTINGS_DIR": str(home/"settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home/"work"), "OMP_NUM_THREADS": "1"}
    log = open(home/"log.txt", "wb")
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=",
                               "--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={folder}"], cwd=folder, env=env, stdout=log, stderr=log)
    try:
        for _ in range(240):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=2); break
            except OSError: time.sleep(.25)
        else: pytest.fail((home/"log.txt").read_text()[-2000:])
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try: server.wait(10)
        except subprocess.TimeoutExpired: server.kill()


@pytest.fixture
def page(lab, tmp_path):
    "A page of JupyterLab with the notebook run; `page.errors` and `page.elsewhere` collect what must stay empty."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args="--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync".split())
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.errors, page.elsewhere = [], []
        page.on("pageerror", lambda e: page.errors.append(str(e)))
        page.on("console", lambda m: page.errors.append(m.text) if m.type == "error" and "favicon" not in m.text else None)
        page.on("request", lambda r: page.elsewhere.append(r.url) if not r.url.startswith((lab, lab.replace("http", "ws"), "data:", "blob:")) else None)
        page.goto(f"{lab}/doc/tree/explore.ipynb")
        page.wait_for_function("""() => { const c = window.jupyterapp?.shell?.currentWidget; const k = c?.sessionContext?.session?.kernel; return c?.context?.isReady && k?.status === 'idle' }""", timeout=60_000)
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        page.wait_for_function("() => document.querySelectorAll('.js-plotly-plot .imagelayer-above, .js-plotly-plot .im image, .js-plotly-plot image').length >= 4", timeout=90_000)
        yield page
        browser.close()


SEEN = "() => [...document.querySelectorAll('.js-plotly-plot image')].map(i => i.getAttribute('href') || i.getAttribute('xlink:href'))"


def settle(page, before, which, text):
    "Wait until the panels `which` differ from `before` and the words from `text`; returns (pictures, words)."
    page.wait_for_function(f"([b, w, t]) => {{ const s = ({SEEN})(); return w.every(i => s[i] !== b[i]) && document.querySelector('.uad-text').innerText !== t }}", arg=[before, which, text], timeout=20_000)
    return page.evaluate(SEEN), page.inner_text(".uad-text")


def test_inspector_in_the_browser(page):
    words, seen = page.inner_text(".uad-text"), page.evaluate(SEEN)
    assert len(seen) == 4 and len(set(seen)) == 4 and "Dice" in words and "SSIM-ens" in words
    if shot := os.environ.get("UAD_SCREENSHOT"): page.screenshot(path=shot)
    page.select_option(".uad-score select", label="l1")                                   # another score: another map, the same scan
    after, words = settle(page, seen, [2], words)
    assert after[:2] == seen[:2] and "l1" in words
    page.select_option(".uad-score select", label="SSIM at sigma")
    seen, words = settle(page, after, [2], words)
    page.locator(".uad-sigma .noUi-handle").focus(); page.keyboard.press("ArrowRight")    # sigma by keyboard
    after, words = settle(page, seen, [2], words)
    assert after[:2] == seen[:2] and "0.8" in words
    seen = after
    page.locator(".uad-z .noUi-handle").focus(); page.keyboard.press("ArrowRight")        # another slice: every picture; the volume's Dice stays
    page.wait_for_function(f"b => ({SEEN})().every((s, i) => s !== b[i])", arg=seen, timeout=20_000)
    assert page.inner_text(".uad-text") == words
    seen = page.evaluate(SEEN)
    page.select_option(".uad-rule select", label="free")                                  # a free threshold: another result, the same map
    after, words = settle(page, seen, [], words)
    assert after[:3] == seen[:3] and "threshold 0.100" in words
    assert not page.errors and not page.elsewhere, (page.errors, page.elsewhere)
