# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: python3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # cli
#
# > `uad ...`: a thin face over the study wing.

# %%
#| default_exp cli

# %%
#| export
import os, sys
from pathlib import Path
from typing import Annotated, Optional
import typer
from uad_study import __version__
from uad_study.core import UadError, setup_logging

# %%
#| hide
import subprocess, tempfile, time
from fastcore.test import test_eq
from typer.testing import CliRunner

# %% [markdown]
# ## Rules
# Every command works from any folder, says one line when something is wrong (exit code 1) and shows the log with `-v`. Everything heavy is imported inside the commands, so that
# `uad --help` answers at once.

# %%
#| export
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]},
                  help="Unsupervised anomaly detection in brain MRI: a study you can run, trust and extend.")
manifest_app = typer.Typer(no_args_is_help=True, help="Which subjects belong to which split; what is wrong with a split.")
app.add_typer(manifest_app, name="manifest")

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of results; what is finished there is not done again.")]
Data = Annotated[Optional[Path], typer.Option("--data", help="Folder of real scans that holds manifest.csv (for studies that read some).")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the log.")]

def main():
    "Entry point of `uad`: run the command; turn a `UadError` into one line and exit code 1."
    try: app()
    except UadError as e: sys.exit(f"error: {e}")
    except KeyboardInterrupt: sys.exit("stopped: run the same command again to go on")

def _version(show: bool):
    if show: print(f"uad_study {__version__}"); raise typer.Exit()

@app.callback()
def _app(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False): pass


# %% [markdown]
# ## Running a study
# One line a run, and a bar for each that works. Where the output is no terminal, a line now and then.

# %%
#| export
class Show:
    "Hears the events of `run_study` and shows them on the terminal."
    def __init__(self):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
        import time
        self.console, self.clock, self.started, self.bars, self.said = Console(highlight=False, soft_wrap=True), time.monotonic, {}, {}, {}
        self.progress = Progress(TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn(), TextColumn("{task.fields[text]}"), console=self.console, transient=True)

    def __enter__(self):
        if self.console.is_terminal: self.progress.start()
        return self

    def __exit__(self, *a):
        if self.console.is_terminal: self.progress.stop()

    def __call__(self, kind, run, info):
        if kind == "skipped": self.console.print(f"  done already  {run.label}")
        if kind == "started":
            self.started[run.folder] = self.clock()
            if self.console.is_terminal: self.bars[run.folder] = self.progress.add_task(run.label, total=None, text="")
            else: self.console.print(f"  started       {run.label}")
        if kind == "progress" and info:
            if self.console.is_terminal: self.progress.update(self.bars[run.folder], completed=info["done"], total=info["total"], text=info["text"])
            elif self.clock() - self.said.get(run.folder, self.started[run.folder]) > 30:
                self.said[run.folder] = self.clock()
                self.console.print(f"  working       {run.label}: {info['done']}/{info['total']} {info['text']}")
        if kind in ("done", "failed"):
            if run.folder in self.bars: self.progress.remove_task(self.bars.pop(run.folder))
            self.console.print(f"  {kind:<13} {run.label} ({self.clock() - self.started[run.folder]:.0f} s)" if kind == "done" else f"  failed        {run.label}: {info['error']}")

def _run(study, data, out: Path, dry_run: bool, engine: str, verbose: bool):
    from uad_study.core import choice
    from uad_study.runs import done, plan, read_study, run_study
    setup_logging(verbose)
    if engine == "slurm": raise UadError("--engine: 'slurm' does not exist yet in this version: use local")
    choice(engine, ("local",), "--engine")
    s = read_study(study)
    if dry_run:
        for r in plan(s, data): print(f"{'done ' if done(out, r) else 'to do'}  {r.label:<36} {out/r.folder}")
        return
    print(f"{s.title} -> {out}")
    with Show() as show: run_study(s, out, data, show)
    print(f"report: {out/'report.html'}\ntable:  {out/'table.csv'}")

@app.command()
def demo(out: Out = Path("runs/demo"), train: Annotated[bool, typer.Option("--train", help="Train from scratch. (This version ships no weights, so the demo always does.)")] = False,
         verbose: Verbose = False):
    "The whole study in minutes, without data or a GPU: virtual brains, a small DDPM for each contrast, the paper's table and figures."
    _run("demo", None, out, False, "local", verbose)

@app.command()
def run(study: Annotated[str, typer.Argument(help="A packaged study (demo, real-t1, paper, released-code) or a YAML file.")], data: Data = None,
        out: Annotated[Optional[Path], typer.Option("--out", "-o", help="Folder of results (default: runs/STUDY).")] = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run, and run nothing.")] = False,
        engine: Annotated[str, typer.Option(help="Where runs are executed: local.")] = "local", verbose: Verbose = False):
    "Run a study: prepare, train, evaluate, report. What is finished is not done again."
    _run(study, data, out or Path("runs")/Path(study).stem, dry_run, engine, verbose)


# %% [markdown]
# ## Looking at it later

# %%
#| export
@app.command()
def status(out: Annotated[Path, typer.Argument(help="A folder of results.")] = Path("runs/demo")):
    "What is done, running, failed or waiting in a folder of results."
    from uad_study.core import read_json
    from uad_study.runs import RESULT, RUN
    import json
    folders = sorted((f.parent for f in Path(out).glob("*/run.json")), key=lambda f: (f/"run.json").stat().st_mtime)
    if not folders: raise UadError(f"{out}: holds no runs: name a folder that `uad run` or `uad demo` wrote")
    for f in folders:
        label = read_json(f/"run.json", RUN)["label"]
        if (f/"result.json").exists(): print(f"done       {label:<36} {read_json(f/'result.json', RESULT)['provenance']['seconds']:.0f} s")
        elif (f/"error.txt").exists(): print(f"failed     {label:<36} {(f/'error.txt').read_text().strip()}")
        else:
            try: p = json.loads((f/"progress.json").read_text()); print(f"unfinished {label:<36} {p['done']}/{p['total']} {p['text']}")
            except (OSError, ValueError): print(f"unfinished {label}")

@app.command()
def report(out: Annotated[Path, typer.Argument(help="A folder of results.")] = Path("runs/demo")):
    "Write report.html and the tables again from the finished runs of a folder of results, in seconds."
    from uad_study.report import open_results, write_report
    write_report(open_results(out), out)
    print(f"report: {Path(out)/'report.html'}")

@app.command()
def clean(out: Annotated[Path, typer.Argument(help="A folder of results.")], study: Annotated[str, typer.Option(help="Keep the runs of this study (a packaged name or a YAML file).")],
          data: Data = None, yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")] = False):
    "Remove the runs in OUT that the study, as it is now, does not refer to (those of earlier settings), after showing them."
    import shutil
    from uad_study.runs import out_folder, plan, read_study
    keep = {r.folder for r in plan(read_study(study), data)}
    if not Path(out).is_dir(): raise UadError(f"{out}: no such folder")
    with out_folder(out):
        old = sorted(f.parent for f in Path(out).glob("*/run.json") if f.parent.name not in keep)
        for f in old: print(f"{sum(p.stat().st_size for p in f.rglob('*') if p.is_file()) / 1e6:8.1f} MB  {f}")
        if not old: print("nothing to remove"); return
        if not yes and not typer.confirm(f"Remove these {len(old)} runs?"): return
        for f in old: shutil.rmtree(f)

@app.command()
def explore(out: Annotated[Path, typer.Argument(help="A folder of results.")] = Path("runs/demo")):
    "Open JupyterLab with a notebook to look at restorations and anomaly maps slice by slice."
    import shutil
    from importlib.resources import as_file, files
    from uad_study.runs import out_folder
    if not (Path(out)/"report.html").exists(): raise UadError(f"{out}: holds no finished study: run `uad demo` first")
    with as_file(files("uad_study")/"explore.ipynb") as source:
        notebook = Path(out)/"explore.ipynb"
        if not notebook.exists(): shutil.copyfile(source, notebook)
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", str(notebook)])


# %%
#| export
@manifest_app.command()
def check(dataset: Annotated[str, typer.Argument(help="IXI, BraTS21, MSLUB, ATLAS, WMH.")], split: Annotated[str, typer.Option(help="published or default.")] = "default",
          root: Annotated[Optional[Path], typer.Option(help="The data set's folder; without it no files are checked.")] = None):
    "Audit a data set's split: leakage, duplicates, overlapping folds. Exit code 1 if faults are found."
    from uad_study import manifest
    faults = manifest.check(dataset, split, root)
    for f in faults: print(f)
    print(f"{dataset}, {split} split: {len(faults) or 'no'} fault{'s' if len(faults) != 1 else ''}")
    if faults: raise typer.Exit(1)


# %%
runner = CliRunner()
help_text = runner.invoke(app, ["--help"]).output
assert all(c in help_text for c in ("demo", "run", "manifest", "status", "report", "clean", "explore"))
with tempfile.TemporaryDirectory() as d:
    def uad(*a): return subprocess.run([sys.executable, "-c", "from uad_study.cli import main; main()", *a], capture_output=True, text=True, cwd=d)
    r = uad("run", "dmo", "--dry-run")
    test_eq((r.returncode, r.stdout, r.stderr.count("\n")), (1, "", 1)); assert "did you mean 'demo'" in r.stderr
    r = uad("run", "demo", "--dry-run"); test_eq(r.returncode, 0); print(r.stdout)
    r = uad("status", "nowhere"); test_eq(r.returncode, 1); assert "holds no runs" in r.stderr
    t = time.perf_counter(); uad("--help"); print(f"uad --help: {time.perf_counter() - t:.2f} s")
