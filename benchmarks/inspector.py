"""How long the inspector takes, in Python and from a key to new pixels in headless Chromium: python benchmarks/inspector.py RESULTS. Writes benchmarks/inspector.md; with `--pictures` only docs/inspector.png and docs/inspector-dark.png.

RESULTS: the folder of a study, such as runs/demo. `explore.ipynb` is put there, as `uad explore` does."""
import os, sys, tempfile, time
from dataclasses import replace
from pathlib import Path
import numpy as np, torch
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent/"tests"))
from test_browser import SEEN, chromium_on, jupyterlab, wait_for_inspector, with_notebooks
from uad_study.results import gather
from uad_study.runs import provenance
from uad_study.viewer import Inspector, View, restored_models

LIMITS = {"open a case": 1000, "another slice": 60, "a new sigma": 300}
KEY = """async ([selector, key]) => {
    const target = document.querySelector(selector), image = document.querySelectorAll('.uad-inspector image')[2];
    target.focus({preventScroll: true});
    const seen = new Promise(done => { const o = new MutationObserver(() => { o.disconnect(); requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now()))); }); o.observe(image, {attributes: true}); });
    const late = new Promise((_, no) => setTimeout(() => no(new Error('no new pixels within 10 s')), 10000));
    const start = performance.now();
    target.dispatchEvent(new KeyboardEvent('keydown', {key, code: key, bubbles: true, cancelable: true}));
    return await Promise.race([seen, late]) - start;
}"""


def ms(f) -> float:
    t = time.perf_counter(); f(); return 1e3 * (time.perf_counter() - t)


def in_python(out, n=12) -> list:
    "Rows (what, milliseconds of each time)."
    results = gather([out]); models = restored_models(results)
    view = View(results.cohort, models); inspector = Inspector(view)                       # imports, the first figure
    rows, s = view.rows(0), inspector.state
    cases = [r for r in rows if view.cohort.table.split[r] == "test"][1:6]
    inspector._later = lambda: None                                                        # the chart over the scales is computed when nothing else happens
    opened = [ms(lambda: inspector._visit(row=r)) for r in cases]
    slices = [ms(lambda: inspector._go(replace(inspector.state, z=20 + i))) for i in range(n)]
    sigmas = [ms(lambda: inspector._go(replace(inspector.state, score="ssim", sigma=round(.33 + .17 * i, 2)))) for i in range(n)]
    frees = [ms(lambda: inspector._go(replace(inspector.state, rule="free", threshold=.2 + .03 * i))) for i in range(n)]
    return [("open a case", opened), ("another slice", slices), ("a new sigma", sigmas), ("another threshold", frees)]


def in_browser(out, n=24) -> list:
    with tempfile.TemporaryDirectory() as home, jupyterlab(with_notebooks(Path(out)), Path(home)) as lab, chromium_on(lab) as opened:
        page = opened(); wait_for_inspector(page); time.sleep(3)
        def press(selector, key):
            times = []
            for _ in range(n): times.append(page.evaluate(KEY, [selector, key])); time.sleep(.4)
            return times
        return [("another slice", press(".uad-inspector", "ArrowLeft")), ("a new sigma", press(".uad-sigma .noUi-handle", "ArrowRight"))]


def pictures(out):
    for theme, name, width, height in (("Light", "inspector", 1280, 1060), ("Dark", "inspector-dark", 1920, 1120)):
        with tempfile.TemporaryDirectory() as home, jupyterlab(with_notebooks(Path(out)), Path(home), theme) as lab, chromium_on(lab) as opened:
            page = opened(width=width, height=height); wait_for_inspector(page)
            page.select_option(".uad-contrast select", label="T2w"); time.sleep(4)
            page.locator(".uad-sigma .noUi-handle").focus()
            for _ in range(4): page.keyboard.press("ArrowRight"); time.sleep(1)
            time.sleep(2)
            page.locator(".uad-inspector").screenshot(path=HERE.parent/"docs"/f"{name}.png")


def main(out):
    load = os.getloadavg()[0]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    python, browser, p = in_python(out), in_browser(out), provenance()
    row = lambda what, times, limit: f"| {what} | {np.median(times):.0f} | {np.quantile(times, .9):.0f} | {limit or ''} |"
    lines = [f"Measured by `python benchmarks/inspector.py`, {p['time'][:10]}, commit {str(p['commit'])[:12]}{' with changes' if p['dirty'] else ''}: {p['cores']} cores ({p['machine']}), load before {load:.1f}, torch {p['packages']['torch']}.", "",
             "In Python, per event, from the new state to the last message sent (controls, pictures, readout, numbers, histogram), milliseconds:", "", "| | median | 90 % | at most |", "|---|---|---|---|",
             *(row(k, v, LIMITS.get(k)) for k, v in python), "", "JupyterLab in headless Chromium, from the key to the second frame after the map's new pixels, milliseconds:", "", "| | median | 90 % | at most |", "|---|---|---|---|",
             *(row(k, v, {"another slice": 150}.get(k)) for k, v in browser), ""]
    (HERE/"inspector.md").write_text("\n".join(lines)); print("\n".join(lines))


if __name__ == "__main__":
    if not (args := [a for a in sys.argv[1:] if a != "--pictures"]): sys.exit(__doc__)
    (pictures if "--pictures" in sys.argv else main)(args[0])
