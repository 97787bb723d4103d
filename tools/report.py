"""Writes one page about a run: ``python -m tools.report [run folder]``.

    write_report(run)    # -> run / "report.html"

The page needs no other file and no network. It shows whatever the run's folder holds, and names
what is missing: a run that stopped half-way has a report too.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import os
import re
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import yaml

from lib.app.web import data_uri
from lib.files import project_root, read_json, replacing, show_path
from lib.programs import as_path, program
from tools.environment import ENVIRONMENT, environment
from tools.pages import PAGES, TEMPLATES
from tools.tables import Table, cell_text, heading, is_leaf, is_nested, metric_tables

REPORT = "report.html"


class Notebook(NamedTuple):
    """A notebook as the page shows it."""

    title: str
    section: str  # of metrics.json, which it writes at its end; "" for the page without a run


NOTEBOOKS = {
    "00_in_one_page": Notebook("00 · The whole idea in one page", ""),
    "01_data_exploration": Notebook("01 · Data exploration", "data"),
    "02_triplet_training": Notebook("02 · Training with triplets", "training"),
    "03_nine_faults": Notebook("03 · Nine faults, priced", "ladder"),
    "04_gem_ablation": Notebook("04 · What GeM pooling is worth", "gem_ablation"),
    "05_faiss_evaluation": Notebook("05 · Search with Faiss", "unseen"),
    "06_post_processing": Notebook("06 · Better answers without training", "post_processing"),
    "07_index_at_scale": Notebook("07 · An index at scale", "index"),
    "08_your_own_photos": Notebook("08 · Your own photos", "own_photos"),
    "09_same_place": Notebook("09 · The same place", "same_place"),
    "10_search_app": Notebook("10 · The search app", "search_app"),
}

OF_A_RUN = [name for name, notebook in NOTEBOOKS.items() if notebook.section]

# --------------------------------------------------------------------------------------------------
# What the run's folder holds
# --------------------------------------------------------------------------------------------------

FIRST = ("02_training_curves", "05_retrieval_grid")  # figures

# By a figure's name: what to see in it, and what it looks like to someone who doesn't.
CAPTIONS: dict[str, list[str]] = yaml.safe_load((TEMPLATES / "figures.yaml").read_text("utf-8"))


class Figure(NamedTuple):
    """A figure, whole: ``source`` is a data URI, or the HTML of an interactive one."""

    caption: str
    alt: str
    source: str
    interactive: bool


class Execution(NamedTuple):
    """What an executed notebook in the run's folder tells."""

    state: str
    minutes: float | None
    defaults: dict[str, Any]  # the notebook's own parameters
    parameters: dict[str, Any]  # those it ran with


def read_figures(run: Path) -> dict[str, list[Figure]]:
    """A run's figures under headings: ``FIRST``, each notebook's by their number, the others."""
    titles = {name[:3]: notebook.title for name, notebook in NOTEBOOKS.items()}
    first, other = "Training and search at a glance", "Other figures"
    groups: dict[str, list[Figure]] = {title: [] for title in (first, *titles.values(), other)}
    paths = [
        path
        for path in (run / "figures").glob("*")
        if path.suffix in (".png", ".html") and not path.name.startswith(".") and path.is_file()
    ]
    order = list(CAPTIONS)  # that of the notebooks
    paths.sort(key=lambda path: (path.stem, path.suffix != ".png"))
    paths.sort(key=lambda path: order.index(path.stem) if path.stem in order else len(order))
    for path in paths:
        interactive = path.suffix == ".html"
        is_first = path.stem in FIRST and not interactive
        group = first if is_first else titles.get(path.name[:3], other)
        name = heading(re.sub(r"^\d+_", "", path.stem))
        caption, alt = CAPTIONS.get(path.stem, (f"{name}.", f"Figure: {name}."))
        if interactive:
            caption += " Interactive."
            source = path.read_text(encoding="utf-8", errors="replace")
        else:
            source = data_uri(path.read_bytes(), "png")
        groups[group].append(Figure(caption, alt, source, interactive))
    return {title: figures for title, figures in groups.items() if figures}


def read_execution(notebook: Path) -> Execution:
    """Read an executed notebook; one that is absent or damaged has a state only."""
    if not notebook.is_file():
        return Execution("no executed notebook here", None, {}, {})
    try:
        content = nbformat.read(notebook, as_version=4)
        errors = [
            output
            for cell in content.cells
            for output in cell.get("outputs", [])
            if output.output_type == "error"
        ]
        papermill = content.metadata.get("papermill", {})
        state = "ran to its end"
        if errors:
            reason = (str(errors[0].evalue).splitlines() or [""])[0]
            # People share the report: it need not say whose machine this is.
            for folder, short in ((project_root(), "."), (os.path.expanduser("~"), "~")):
                reason = reason.replace(f"{folder}{os.sep}", f"{short}{os.sep}")
            state = f"stopped: {errors[0].ename}: {reason}"
        elif papermill.get("start_time") and not papermill.get("end_time"):
            state = "was not run to its end"
        defaults, given = (
            _assignments(
                "\n".join(c.source for c in content.cells if tag in c.metadata.get("tags", []))
            )
            for tag in ("parameters", "injected-parameters")
        )
        seconds = papermill.get("duration")
        return Execution(state, seconds and float(seconds) / 60, defaults, defaults | given)
    except Exception:  # nbformat's, json's, or any that a notebook of another form leads to
        return Execution("can't be read", None, {}, {})


def _assignments(source: str) -> dict[str, Any]:
    """The variables that a cell of parameters sets."""
    values = {}
    for statement in ast.parse(source).body:
        match statement:
            case (
                ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
                | ast.Assign(targets=[ast.Name(id=name)], value=value)
            ):
                try:
                    values[name] = ast.literal_eval(value)
                except ValueError:  # an expression, such as float("inf")
                    values[name] = ast.unparse(value)
    return values


def _read_object(path: Path, lacks: list[str]) -> dict:
    """A JSON object; where there is none, an empty one and a line in ``lacks``."""
    if not path.is_file():
        lacks.append(path.name)
        return {}
    try:
        content = read_json(path)
    except ValueError:
        content = None
    if isinstance(content, dict):
        return content
    lacks.append(f"{path.name}: the file is damaged")
    return {}


def _model_table(run: Path) -> Table | None:
    rows = []
    if (run / "model.keras").is_file():
        with (run / "model.keras").open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = f"{file.tell() / 1e6:.1f} MB"
        rows += [("model.keras, size", size), ("model.keras, SHA-256", digest)]
    if (run / "gallery.index").exists():
        try:
            made_by = str(read_json(run / "gallery.index" / "manifest.json")["model"])
        except (OSError, ValueError, KeyError, TypeError):
            made_by = "can't be read"
        rows.append(("fingerprint of the model that made gallery.index", made_by))
    return Table("", ("", "value"), rows) if rows else None


def _environment_table(recorded: dict) -> Table:
    rows = []
    if recorded.get("started"):
        rows = [
            ("run started", str(recorded["started"])),
            ("profile", str(recorded.get("profile") or "none: the notebooks' own parameters")),
        ]
    commit = str(recorded.get("commit") or "not known: no git repository")
    if recorded.get("uncommitted_changes"):
        commit += ", with uncommitted changes"
    versions = recorded.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    rows += [
        ("Python", cell_text(recorded.get("python"))),
        ("platform", cell_text(recorded.get("platform"))),
        *(
            (name, cell_text(v))
            for name, v in (versions if isinstance(versions, dict) else {}).items()
        ),
        ("Keras' backend", cell_text(recorded.get("keras_backend"))),
        ("commit of this project", commit),
    ]
    return Table("", ("", "value"), rows)


def _started(run: Path, recorded: dict) -> str:
    """When the run was made: as recorded, or by the name of its folder."""
    if recorded.get("started"):
        return str(recorded["started"])
    with contextlib.suppress(ValueError):
        return str(datetime.strptime(run.name[:19], "%Y-%m-%d_%H-%M-%S"))
    return ""


def _results(metrics: dict, executions: dict[str, Execution]) -> list[tuple[str, str]]:
    """The main results that there are, as label and value."""

    def at(*keys: str) -> Any:
        value: Any = metrics
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return cell_text(value) if value is not None and is_leaf(value) else None

    validation = [at("training", "validation", when, "val_map") for when in ("frozen", "trained")]
    minutes = [e.minutes for e in executions.values() if e.minutes is not None]
    results = [
        ("mAP, unseen landmarks", at("unseen", "map", "trained")),
        ("the same, frozen network", at("unseen", "map", "frozen")),
        ("validation mAP", " → ".join(validation) if all(validation) else None),
        ("training epochs", at("training", "epochs")),
        ("final training loss", at("training", "final_loss")),
        ("test set, average precision", at("test_set", "average_precision", "trained")),
        ("minutes of the notebooks", f"{sum(minutes):.1f}" if minutes else None),
    ]
    return [(label, value) for label, value in results if value is not None]


def _parameter_table(title: str, execution: Execution) -> Table:
    """All parameters of a notebook, the seeds first."""
    defaults = execution.defaults
    rows = []
    for name, value in execution.parameters.items():
        changed = name in defaults and defaults[name] != value
        rows.append((name, repr(value), repr(defaults[name]) if changed else ""))
    rows.sort(key=lambda row: "seed" not in row[0])
    if not any(default for *_, default in rows):
        return Table(title, ("parameter", "value"), [row[:2] for row in rows])
    return Table(title, ("parameter", "value", "in the notebook, if it differs"), rows)


# --------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------


def write_report(run: Path) -> Path:
    """Write ``report.html`` into a run's folder, from what is there.

    Args:
        run: the folder. Nothing in it is required; the page names what is missing.

    Returns:
        The page's path. The same content of the folder gives the same page, unless the run
        recorded no environment: then the page shows the present one, and says so.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    run = Path(run).resolve()
    if not run.is_dir():
        raise FileNotFoundError(f"no run at {show_path(run)}: name the folder of a run")
    lacks: list[str] = []
    metrics = _read_object(run / "metrics.json", lacks)
    recorded = _read_object(run / ENVIRONMENT, lacks)
    lacks += _missing(run, metrics, _names(recorded))
    executions = {name: read_execution(run / f"{name}.ipynb") for name in NOTEBOOKS}
    metrics, settings = _apart(metrics)
    sections = [
        (heading(key), list(metric_tables(content if is_nested(content) else {key: content})))
        for key, content in metrics.items()
    ]
    parameters = [
        _parameter_table(NOTEBOOKS[name].title, execution)
        for name, execution in executions.items()
        if execution.parameters
    ]
    page = PAGES.get_template("report.html.j2").render(
        title=f"Image retrieval: run {run.name}",
        started=_started(run, recorded),
        results=_results(metrics, executions),
        lacks=lacks,
        figures=read_figures(run),
        sections=sections,
        parameters=parameters,
        settings=list(metric_tables(settings, exact=True)),
        notebooks=[_notebook_row(run, name, e) for name, e in executions.items()],
        recorded=bool(recorded),
        environment=_environment_table(recorded or environment()),
        model=_model_table(run),
    )
    with replacing(run / REPORT) as part:  # JSON can hold half a character, UTF-8 can't
        part.write_text(page, encoding="utf-8", errors="replace")
    return run / REPORT


def _missing(run: Path, metrics: dict, names: list[str]) -> list[str]:
    """What a run of these notebooks has and this one lacks, apart from its JSON files."""
    lacks = [name for name in ("model.keras", "gallery.index") if not (run / name).exists()]
    stems = {path.stem for path in (run / "figures").glob("*.png")}
    for name in OF_A_RUN:
        notebook = NOTEBOOKS[name]
        if name not in names:
            continue
        if metrics and notebook.section not in metrics:
            lacks.append(f"metrics of notebook {notebook.title}")
        if name[:3] not in {stem[:3] for stem in stems}:
            lacks.append(f"figures of notebook {notebook.title}")
    return lacks + [f"figures/{stem}.png" for stem in FIRST if stem not in stems]


def _names(recorded: dict) -> list[str]:
    """The notebooks that a run was to run."""
    names = recorded.get("notebooks")
    return names if isinstance(names, list) and names else OF_A_RUN


def _apart(metrics: dict) -> tuple[dict, dict]:
    """The metrics without notebook 02's settings, and these: the page shows them as parameters."""
    training = metrics.get("training")
    if not isinstance(training, dict):
        return metrics, {}
    settings = {k: training[k] for k in ("tower", "settings") if k in training}
    results = {k: v for k, v in training.items() if k not in settings}
    return metrics | {"training": results}, settings


def _notebook_row(run: Path, name: str, execution: Execution) -> tuple[str, str, str, str]:
    """Title, page beside the report ("" for none), state and minutes of a notebook."""
    page = f"{name}.html" if (run / f"{name}.html").is_file() else ""
    minutes = "–" if execution.minutes is None else f"{execution.minutes:.1f}"
    return NOTEBOOKS[name].title, page, execution.state, minutes


@program()
def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.report", description=__doc__)
    parser.add_argument("run", nargs="?", type=as_path, help="folder of a run; default: the newest")
    options = parser.parse_args(arguments)
    report = write_report(options.run or project_root() / "runs" / "latest")
    print(f"Open {report.as_uri()} in a browser.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
