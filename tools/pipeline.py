"""Runs the notebooks in order into one folder: ``python -m tools.pipeline [profile.yaml]``.

Without a profile, the notebooks run with their own parameters, those of the demo. A profile is a
YAML file of parameters; each notebook gets those that its ``parameters`` cell has. Afterwards the
run's folder holds the executed notebooks, an HTML page of each, ``metrics.json``, figures, model,
index, ``environment.json`` and ``report.html``.
"""

from __future__ import annotations

import argparse
import ast
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm
from traitlets.config import Config

from lib.files import only_writer, project_root, replacing, show_path
from lib.programs import UsageError, as_path, check_types, one_line, program
from lib.runs import open_run
from lib.training.settings import check_stages, read_settings
from tools.environment import record_environment
from tools.report import NOTEBOOKS, OF_A_RUN, write_report

RESULTS = {
    "report": "report.html",
    "executed notebooks": "*.ipynb",
    "pages of them": "0*.html",
    "metrics": "metrics.json",
    "figures": "figures/*.png",
    "model": "model.keras",
    "index": "gallery.index",
}


_LARGEST = 64_000  # bytes of a profile


class _Loader(yaml.SafeLoader):
    """Refuses references: a few of them can stand for more values than fit into any memory."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has a reference (*): write the value itself")
        return super().compose_node(parent, index)


def read_profile(path: Path, known: Mapping[str, str]) -> dict:
    """Read a profile's parameters.

    Args:
        path: YAML file, a mapping of parameter names to values.
        known: the names of the types of all parameters that any notebook has, by name.

    Raises:
        UsageError: no such file, more than 64 kB, neither UTF-8 nor YAML, references within it,
            not a mapping, a name that no notebook knows, or a value of another type.
    """
    where = show_path(path)
    try:
        with Path(path).open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise UsageError(f"{where} has more than {_LARGEST // 1000} kB: this is no profile")
        profile = yaml.load(content.decode("utf-8-sig"), _Loader) or {}
    except UsageError:
        raise
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{where} can't be read: {one_line(str(reason))[:500]}") from None
    if not isinstance(profile, dict):
        raise UsageError(f"{where} must map parameter names to values")
    check_types(profile, known, where)
    check_stages(profile.get("stages", []), f"{where}: stages")
    read_settings(profile.get("settings", {}), f"{where}: settings")
    return profile


def notebook_parameters(notebook: Path) -> dict[str, str]:
    """Names of the parameters in a notebook's ``parameters`` cell, and of their types.

    Not by ``papermill.inspect_notebook``, which skips a parameter whose comment has a "=".
    """
    cells = nbformat.read(notebook, as_version=4).cells
    source = "\n".join(c.source for c in cells if "parameters" in c.metadata.get("tags", []))
    found = (s for s in ast.parse(source).body if isinstance(s, ast.AnnAssign))
    return {ast.unparse(s.target): ast.unparse(s.annotation) for s in found}


def run_notebooks(run: Path, parameters: dict, notebooks: Path, names: Iterable[str]) -> None:
    """Execute the notebooks in order with papermill, and write a page of each.

    Args:
        run: the folder for what they produce; it is also passed to them as ``run_dir``.
        parameters: values by name; a notebook gets those it knows.
        notebooks: the folder they are in.
        names: of the notebooks.

    Raises:
        PapermillExecutionError: a cell failed. ``run`` holds the notebook as far as it got.
        DeadKernelError: the notebook's process ended, for lack of memory for example.
    """
    root = project_root()
    run_dir = run.relative_to(root).as_posix() if run.is_relative_to(root) else str(run)
    parameters = {**parameters, "run_dir": run_dir}
    with (
        tempfile.TemporaryDirectory() as sockets,
        tqdm(names, unit=" notebooks", file=sys.stderr) as bar,
    ):
        connection = reached_by_files(f"{sockets}/kernel")
        for name in bar:
            bar.set_description(name)
            source, target = notebooks / f"{name}.ipynb", run / f"{name}.ipynb"
            known = notebook_parameters(source)
            try:
                papermill.execute_notebook(  # which keeps the two paths in the result
                    os.path.relpath(source),
                    os.path.relpath(target),
                    {k: v for k, v in parameters.items() if k in known},
                    kernel_name="python3",
                    cwd=str(notebooks),
                    progress_bar=False,
                    store_widget_state=False,  # photos, once more, that no page shows
                    config=Config(KernelManager=connection),
                )
            finally:
                if target.is_file():
                    write_page(target)


def reached_by_files(name: str) -> dict[str, str]:
    """Settings of a kernel that is reached by files, ``name-1`` to ``name-5``, if that is possible.

    By TCP, another program could take a port before the kernel does.
    """
    # The path of a socket may have 103 bytes on macOS, 107 on Linux.
    usable = os.name == "posix" and len(os.fsencode(name)) <= 100
    return {"transport": "ipc", "ip": name} if usable else {}


def write_page(notebook: Path) -> Path:
    """Write an executed notebook as an HTML page beside it."""
    # A progress bar is one line on the page, not one for each step.
    exporter = HTMLExporter()
    exporter.register_preprocessor(CoalesceStreamsPreprocessor(), enabled=True)
    page, _ = exporter.from_notebook_node(nbformat.read(notebook, as_version=4))
    with replacing(notebook.with_suffix(".html")) as part:
        part.write_text(page, encoding="utf-8")
    return notebook.with_suffix(".html")


@program()
def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 2 for a wrong profile, 1 for what failed."""
    parser = argparse.ArgumentParser(prog="python -m tools.pipeline", description=__doc__)
    parser.add_argument("profile", nargs="?", type=as_path, help="YAML file of notebook parameters")
    parser.add_argument("--run-dir", default="", help="folder for the results; default: a new one")
    numbers = [name[:2] for name in NOTEBOOKS]
    only = {"nargs": "+", "choices": numbers, "metavar": "NUMBER", "default": numbers}
    parser.add_argument("--only", **only, help="run these notebooks alone, such as 02 05")
    options = parser.parse_args(arguments)

    # For the kernels: they write into this terminal, and TensorFlow is chatty. They are those of
    # this environment, not of one registered under the same name elsewhere.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    # OpenMP's threads spin while they wait: beside another program, an index took minutes for
    # what takes seconds.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of comments with a "="
    start = time.monotonic()
    notebooks = project_root() / "notebooks"
    known = {}
    for name in NOTEBOOKS:
        known |= notebook_parameters(notebooks / f"{name}.ipynb")
    parameters = read_profile(options.profile, known) if options.profile else {}
    # The first page has photos of its own: a run on other data need not draw them.
    names = OF_A_RUN if options.profile else list(NOTEBOOKS)
    names = [name for name in names if name[:2] in options.only]
    run = open_run(options.run_dir, start_new=True)
    where = show_path(run)
    busy = f"another pipeline writes into {where}: choose another folder with --run-dir"
    failure = ""
    # Not the lock of ``run`` itself, nor that of its training: the notebooks take these meanwhile.
    with only_writer(run / "figures", RuntimeError(busy)):
        record_environment(run, options.profile.name if options.profile else "", names)
        try:
            run_notebooks(run, parameters, notebooks, names)
        except PapermillExecutionError as error:
            failure = one_line(f"{error.ename}: {error.evalue}")
        except DeadKernelError:
            failure = "the notebook's process ended by itself; often memory is short"
        except KeyboardInterrupt:
            failure = "interrupted"
        report = write_report(run)
    print(f"\nResults of {(time.monotonic() - start) / 60:.1f} minutes in {where}:")
    list_results(run)
    if failure:
        print(f"\nStopped: {failure}", file=sys.stderr)
        return 1
    print(f"\nOpen {report.as_uri()} in a browser.")
    return 0


def list_results(run: Path) -> None:
    """Print where the results of a run are."""
    for what, name in RESULTS.items():
        if found := sorted(run.glob(name)):
            place, more = (found[0], "") if len(found) == 1 else (run, f"/{name} ({len(found)})")
            print(f"  {what:<20} {show_path(place)}{more}")


if __name__ == "__main__":
    sys.exit(main())
