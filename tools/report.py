"""One page that tells what a run was and what came of it: ``python -m tools.report [run folder]``.

    record_environment(run, profile="gldv2.yaml")    # when the run starts
    write_report(run)                                # -> run / "report.html"

The page needs no other file and no network. It shows whatever the run's folder holds, and names
what it lacks: a run that stopped half-way has a report too.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import nbformat

from lib.evaluation.metrics import Interval
from lib.files import project_root, read_json, replacing, show_path, write_json

REPORT, ENVIRONMENT = "report.html", "environment.json"


class Notebook(NamedTuple):
    """A notebook as the page shows it."""

    title: str
    section: str  # of metrics.json, which it writes at its end


NOTEBOOKS = {
    "01_data_exploration": Notebook("01 · Data exploration", "data"),
    "02_triplet_training": Notebook("02 · Training with triplets", "training"),
    "03_gem_ablation": Notebook("03 · What GeM pooling is worth", "gem_ablation"),
    "04_faiss_evaluation": Notebook("04 · Search with Faiss", "unseen"),
    "05_index_at_scale": Notebook("05 · An index at scale", "index"),
    "06_search_app": Notebook("06 · The search app", "search_app"),
}

# --------------------------------------------------------------------------------------------------
# What the run ran on
# --------------------------------------------------------------------------------------------------

PACKAGES = (
    "keras",
    "tensorflow",
    "tensorflow-cpu",
    "jax",
    "torch",
    "faiss-cpu",
    "numpy",
)


def environment() -> dict[str, Any]:
    """What this process runs on, in a form for JSON; without names of machines or folders.

    Returns:
        ``python`` and ``platform``; ``keras_backend``; ``versions`` of those of ``PACKAGES`` that
        are installed; ``commit`` of this project and whether there are ``uncommitted_changes``,
        both None where there is no git repository.
    """
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    commit, changed = _commit(project_root())
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "keras_backend": _keras_backend(),
        "versions": versions,
        "commit": commit,
        "uncommitted_changes": changed,
    }


def record_environment(run: Path, profile: str = "") -> Path:
    """Write ``environment.json`` into a run's folder, for the report: call it as the run starts.

    A run that goes on later keeps the latest start.

    Args:
        run: the folder.
        profile: name of the profile that the run was started with; "" for none.
    """
    path = Path(run) / ENVIRONMENT
    started = datetime.now().isoformat(sep=" ", timespec="seconds")
    write_json(path, {"started": started, "profile": profile} | environment())
    return path


def _keras_backend() -> str:
    """What Keras chooses when it is imported, which would take seconds and load the backend."""
    if chosen := os.environ.get("KERAS_BACKEND"):
        return chosen
    home = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(read_json(home / "keras.json")["backend"])
    return "tensorflow"


def _commit(root: Path) -> tuple[str | None, bool | None]:
    """The commit in ``root``, and whether files differ from it."""

    def git(*arguments: str) -> str:
        # No optional locks: a report must not get in the way of someone's commit.
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        # A copy without .git that lies in another repository is not at that one's commit.
        if git("rev-parse", "--show-prefix").strip():
            return None, None
        return git("rev-parse", "HEAD").strip(), bool(git("status", "--porcelain").strip())
    except (OSError, subprocess.CalledProcessError):
        return None, None


# --------------------------------------------------------------------------------------------------
# Numbers and names for people
# --------------------------------------------------------------------------------------------------

MOST = 50  # rows of a list, or values in one cell, that are shown

_WORDS = {"map": "mAP", "gem": "GeM", "val": "validation", "infonce": "InfoNCE"}


class Table(NamedTuple):
    """A table of texts. The first cell of each row names the row."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def metric_tables(content: dict, caption: str = "", *, exact: bool = False) -> Iterator[Table]:
    """Turn a section of ``metrics.json``, however nested, into tables.

    Plain values come into one table. Dicts beside each other that have the same keys, such as a
    measure of several models, come into one table as well, with the longer side downwards; so does
    a list of dicts. What is nested deeper follows in tables of its own.

    Args:
        content: the section; ``{value, low, high}`` counts as one value, an interval.
        caption: names the place of ``content`` in its section.
        exact: show names and values as code has them, not as prose.
    """
    name, text = (str, repr) if exact else (_name, _text)

    def below(key: str) -> str:
        return f"{caption} · {name(key)}" if caption else name(key)

    leaves = {key: value for key, value in content.items() if _is_leaf(value)}
    if leaves:
        yield Table(caption, ("", "value"), [(name(k), text(v)) for k, v in leaves.items()])

    groups: list[dict[str, dict]] = []
    deeper: dict[str, dict] = {}
    for key, value in content.items():
        if key in leaves:
            continue
        if isinstance(value, list) and all(map(_is_flat, value)):
            columns = list(dict.fromkeys(column for row in value for column in row))
            rows = [
                (str(number), *(text(row[c]) if c in row else "–" for c in columns))
                for number, row in enumerate(value[:MOST], 1)
            ]
            note = f" (the first {MOST} of {len(value)})" if len(value) > MOST else ""
            yield Table(below(key) + note, ("", *map(name, columns)), rows)
        elif not _is_flat(value):
            deeper[key] = value if _is_nested(value) else dict(enumerate(value, 1))
        else:
            for group in groups:
                first = next(iter(group.values()))
                if value.keys() <= first.keys() or value.keys() >= first.keys():
                    group[key] = value
                    break
            else:
                groups.append({key: value})

    for group in groups:
        rows = list(dict.fromkeys(row for column in group.values() for row in column))
        if len(group) == 1:
            (key, column), *_ = group.items()
            yield Table(below(key), ("", "value"), [(name(r), text(column[r])) for r in rows])
            continue
        columns = list(group)
        cells = {(r, c): text(group[c][r]) if r in group[c] else "–" for r in rows for c in columns}
        if len(columns) > len(rows):
            rows, columns = columns, rows
            cells = {(c, r): cell for (r, c), cell in cells.items()}
        yield Table(
            "" if leaves else caption,  # said already
            ("", *map(name, columns)),
            [(name(r), *(cells[r, c] for c in columns)) for r in rows],
        )

    for key, value in deeper.items():
        yield from metric_tables(value, below(key), exact=exact)


def _is_interval(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == set(Interval._fields)
        and all(isinstance(bound, int | float) for bound in value.values())
    )


def _is_nested(value: Any) -> bool:
    """Whether a value is a dict that takes more than one cell."""
    return isinstance(value, dict) and bool(value) and not _is_interval(value)


def _is_leaf(value: Any) -> bool:
    """Whether a value fits into one cell."""
    if isinstance(value, list):
        return all(map(_is_leaf, value))
    return not _is_nested(value)


def _is_flat(value: Any) -> bool:
    """Whether a value is a dict of values that fit into one cell each."""
    return _is_nested(value) and all(map(_is_leaf, value.values()))


def _text(value: Any) -> str:
    """A value that fits into one cell, for people."""
    if _is_interval(value):
        return str(Interval(**value))
    if isinstance(value, list) and value:
        more = f", … ({len(value)} in all)" if len(value) > MOST else ""
        return ", ".join(map(_text, value[:MOST])) + more
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if abs(value) >= 1000:
            return f"{value:,.0f}"
        return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.2g}"
    return str(value) if value else "–"


def _name(key: Any) -> str:
    """A key of ``metrics.json`` for people: ``map_at_10`` becomes mAP@10."""
    key = str(key)
    if not re.fullmatch(r"[a-z0-9_]+", key):
        return key  # is prose already
    key = re.sub(r"_at_(\d+)", r"@\1", key)
    return re.sub(r"[a-z]+", lambda word: _WORDS.get(word[0], word[0]), key.replace("_", " "))


def _heading(key: str) -> str:
    name = _name(key)
    return name if name.startswith("mAP") else name[:1].upper() + name[1:]


# --------------------------------------------------------------------------------------------------
# What the run's folder holds
# --------------------------------------------------------------------------------------------------

FIRST = ("02_training_curves", "04_retrieval_grid")  # figures

# What to see in a figure, and what it looks like to someone who doesn't.
CAPTIONS = {
    "01_triplets": (
        "Triplets as they are stored: anchor, positive, negative.",
        "Rows of three photos each, two of one landmark and one of another.",
    ),
    "01_degenerate": (
        "Degenerate triplets: anchor and positive are the same photo, and teach nothing.",
        "Pairs of identical photos.",
    ),
    "01_landmark": ("Photos that were found to show one landmark.", "A row of photos."),
    "01_pictures_per_landmark": (
        "How many different pictures there are of a landmark.",
        "Histogram of the number of pictures of a landmark.",
    ),
    "01_leak": (
        "How many of the held back photos training has seen, in a split by shard and by landmark.",
        "Bars of the share of held back photos that were seen, one for each kind of split.",
    ),
    "01_colours": (
        "Colours alone: how similar those of positives and negatives are to the anchor's.",
        "Two overlapping histograms of colour similarity.",
    ),
    "02_triplets_before": (
        "Triplets and their distances before training.",
        "Rows of photo triplets, with distances above positives and negatives.",
    ),
    "02_training_curves": (
        "The training, epoch by epoch: loss, distances, signs of life, and validation.",
        "Four panels of curves over epochs; the first is the training loss.",
    ),
    "02_triplets_after": (
        "The same triplets and their distances after training.",
        "Rows of photo triplets, with distances above positives and negatives.",
    ),
    "02_distances": (
        "Distances of validation pairs: the less they overlap, the better.",
        "Histograms of the distances of positives and negatives, before and after training.",
    ),
    "02_mining": (
        "Triplets of one batch by their two distances: easy ones have nothing left to teach.",
        "Scatter plots of a triplet's two distances, before and after training, coloured by "
        "whether it is easy, semi-hard or hard.",
    ),
    "02_ladder": (
        "What each fix to an earlier pipeline is worth; on real photographs, as measured before.",
        "Bars of mAP for each step of the ladder, and points with intervals of what it adds.",
    ),
    "03_contribution": (
        "Which places of a photo count in the pooled vector, for three exponents of GeM.",
        "Photos, each beside three heat maps, for the exponents 1, 3 and 10.",
    ),
    "03_ablation": (
        "Validation mAP of six ways to pool, with 95 % intervals.",
        "Bars with intervals for the average, GeM fixed, trained and per channel, the maximum and "
        "R-MAC.",
    ),
    "03_image_sizes": (
        "Validation mAP against the size of the photos, for three ways to pool.",
        "Three curves with intervals over the side of the photos in pixels.",
    ),
    "04_retrieval_grid": (
        "A query (blue) and what was found for it, nearest first; green is right, red is wrong.",
        "A grid of photos with coloured frames and their similarity to the query.",
    ),
    "04_unseen_map": (
        "mAP on landmarks that training has never seen, with 95 % intervals.",
        "Bars with intervals for the trained and the untrained network and the baselines.",
    ),
    "04_recall": (
        "How many of the right photos are found when one looks at so many.",
        "Curves of the share of positives found over the number of photos looked at.",
    ),
    "04_distances": (
        "Distances of pairs of unseen photos: the less they overlap, the better.",
        "Histograms of distances within and between landmarks, untrained and trained.",
    ),
    "04_post_processing": (
        "What each step after training is worth, and what it costs per query.",
        "Bars of mAP for each step, points with intervals of its gain, bars of milliseconds.",
    ),
    "04_nearest": (
        "How similar each query is to the nearest photo of its landmark, and of another.",
        "Scatter plot; below the diagonal the wrong photo comes first.",
    ),
    "04_worst": (
        "The queries with the worst results (blue), and the photos found first for them.",
        "Rows of photos with coloured frames: a query, then what was found.",
    ),
    "04_looked_at": (
        "Where the descriptors of a query, of the wrong photo found first and of a right one come "
        "from: bright places count most.",
        "Rows of three photos, each beside a heat map of it.",
    ),
    "04_projection": (
        "Embeddings of some unseen landmarks, a colour each, in two dimensions.",
        "Scatter plots by PCA and t-SNE, untrained and trained.",
    ),
    "04_map": (
        "All unseen landmarks by t-SNE; point at a dot to see its photo.",
        "Interactive scatter plot of embeddings.",
    ),
    "05_made_up": (
        "Made-up descriptors are as similar to each other as real ones.",
        "Histograms of the similarity to the nearest and to any other photo.",
    ),
    "05_probes": (
        "An inverted file: what it finds, and in what time, by the number of lists visited.",
        "Two curves over the lists visited; recall rises faster than time.",
    ),
    "05_compression": (
        "Similarities as compressed indexes have them: fewer bytes, wider clouds.",
        "Scatter plots of similarity in the index against true similarity, one for each kind.",
    ),
    "05_lost": (
        "The query for which compression loses most: found by exact search (above) and by the "
        "compressed index (below).",
        "Two rows of photos behind the same query; green frames show its landmark.",
    ),
    "05_frontier": (
        "Kinds of index and settings: what is found, how fast, in how much memory (area).",
        "Marks of settings by recall and queries per second, with the line of the best ones.",
    ),
    "05_growth": (
        "How building, searching and memory grow with the number of photos.",
        "Three panels with lines on logarithmic axes, for flat and for tuned search.",
    ),
    "06_answer": (
        "An answer of the search app: the query (blue) and what was found for it.",
        "Grid of photos with similarities; a green frame marks the query's landmark.",
    ),
    "06_what_matched": (
        "What the query and a photo found have in common, by covering parts of each.",
        "Rows of the query and a photo found, each beside its heat map.",
    ),
}


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
        name = _heading(re.sub(r"^\d+_", "", path.stem))
        caption, alt = CAPTIONS.get(path.stem, (f"{name}.", f"Figure: {name}."))
        if interactive:
            caption += " Interactive."
            source = path.read_text(encoding="utf-8", errors="replace")
        else:
            source = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
        groups[group].append(Figure(caption, alt, source, interactive))
    return {heading: figures for heading, figures in groups.items() if figures}


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
    rows += [
        ("Python", _text(recorded.get("python"))),
        ("platform", _text(recorded.get("platform"))),
        *((name, _text(v)) for name, v in (versions if isinstance(versions, dict) else {}).items()),
        ("Keras' backend", _text(recorded.get("keras_backend"))),
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
        return _text(value) if value is not None and _is_leaf(value) else None

    validation = [at("training", "validation", when, "val_map") for when in ("before", "after")]
    minutes = [e.minutes for e in executions.values() if e.minutes is not None]
    results = [
        ("mAP, unseen landmarks", at("unseen", "map", "trained")),
        ("the same, untrained", at("unseen", "map", "untrained")),
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
        raise FileNotFoundError(f"no run at {show_path(run)}")
    lacks: list[str] = []
    metrics = _read_object(run / "metrics.json", lacks)
    recorded = _read_object(run / ENVIRONMENT, lacks)
    lacks += [name for name in ("model.keras", "gallery.index") if not (run / name).exists()]
    stems = {path.stem for path in (run / "figures").glob("*.png")}
    for name, notebook in NOTEBOOKS.items():
        if metrics and notebook.section not in metrics:
            lacks.append(f"metrics of notebook {notebook.title}")
        if name[:3] not in {stem[:3] for stem in stems}:
            lacks.append(f"figures of notebook {notebook.title}")
    lacks += [f"figures/{stem}.png" for stem in FIRST if stem not in stems]
    executions = {name: read_execution(run / f"{name}.ipynb") for name in NOTEBOOKS}

    # What notebook 02 made of its parameters is shown with them, not among the results.
    training = metrics.get("training")
    settings = {}
    if isinstance(training, dict):
        settings = {k: training[k] for k in ("tower", "settings") if k in training}
        metrics = metrics | {"training": {k: v for k, v in training.items() if k not in settings}}
    sections = [
        (_heading(key), list(metric_tables(content if _is_nested(content) else {key: content})))
        for key, content in metrics.items()
    ]
    page = _TEMPLATE.render(
        title=f"Image retrieval: run {run.name}",
        started=_started(run, recorded),
        results=_results(metrics, executions),
        lacks=lacks,
        figures=read_figures(run),
        sections=sections,
        parameters=[
            _parameter_table(NOTEBOOKS[name].title, execution)
            for name, execution in executions.items()
            if execution.parameters
        ],
        settings=list(metric_tables(settings, exact=True)),
        notebooks=[
            (
                NOTEBOOKS[name].title,
                f"{name}.html" if (run / f"{name}.html").is_file() else "",
                execution.state,
                "–" if execution.minutes is None else f"{execution.minutes:.1f}",
            )
            for name, execution in executions.items()
        ],
        recorded=bool(recorded),
        environment=_environment_table(recorded or environment()),
        model=_model_table(run),
    )
    with replacing(run / REPORT) as part:  # JSON can hold half a character, UTF-8 can't
        part.write_text(page, encoding="utf-8", errors="replace")
    return run / REPORT


# The policy forbids all network, to interactive figures as well. Their scripts are sandboxed.
_PAGE = """\
{% macro show(table, label) %}
<div class="scroll" role="region" tabindex="0" aria-label="{{ table.caption or label }}">
<table>
{% if table.caption %}
<caption>{{ table.caption }}</caption>
{% endif %}
<thead><tr>
{% for cell in table.header %}
{% if cell %}
<th scope="col">{{ cell }}</th>
{% else %}
<td></td>
{% endif %}
{% endfor %}
</tr></thead>
<tbody>
{% for row in table.rows %}
<tr{% if "seed" in row[0] %} class="seed"{% endif %}><th scope="row">{{ row[0] }}</th>
{%- for cell in row[1:] %}
<td class="{{ "short" if cell | length <= 32 else "long" }}">{{ cell }}</td>
{%- endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'unsafe-inline' data: blob:">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1d2129; --soft: #5b6470; --line: #d8dce2;
  --paper: #fff; --tint: #f3f5f8; --link: #0b57d0; --mark: #fff3c4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --soft: #a3acb8; --line: #3a414c;
  --paper: #15181d; --tint: #1f242b; --link: #8ab4f8; --mark: #4a3f14; } }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 58rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; margin: 3rem 0 1rem; padding-top: .75rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.1rem; margin: 2rem 0 .75rem; }
p, li { max-width: 44rem; }
a { color: var(--link); }
.soft, figcaption, caption { color: var(--soft); }
.results { display: grid; grid-template-columns: repeat(auto-fill, minmax(12.5rem, 1fr));
  gap: .75rem; margin: 1.5rem 0; }
.results div { background: var(--tint); border-radius: .4rem; padding: .6rem .8rem; }
.results div:first-child { grid-column: 1 / -1; font-size: 1.25rem; }
.results dt { color: var(--soft); font-size: .85rem; }
.results dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; }
.lacks { border-left: .25rem solid #d98e04; background: var(--tint); padding: .75rem 1rem; }
.lacks h2 { border: 0; margin: 0; padding: 0; font-size: 1rem; }
.lacks ul { margin: .25rem 0 0; padding-left: 1.2rem; }
figure { margin: 0 0 2rem; }
figure img { display: block; max-width: 100%; height: auto; background: #fff;
  border: 1px solid var(--line); border-radius: .3rem; padding: .4rem; }
figure iframe { display: block; width: 100%; height: 40rem; background: #fff;
  border: 1px solid var(--line); border-radius: .3rem; resize: vertical; overflow: auto; }
figcaption { font-size: .9rem; margin-top: .4rem; }
.scroll { overflow-x: auto; margin: 0 0 1.5rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .2rem 0; font-weight: 600; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1.5rem .3rem .4rem;
  border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 400; min-width: 9rem; }
.short { white-space: nowrap; }
.long { overflow-wrap: anywhere; min-width: 13rem; }
.seed th, .seed td { background: var(--mark); font-weight: 600; }
.code td, .code tbody th { font-family: ui-monospace, monospace; font-size: .85rem; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  figure, tr, .results div { break-inside: avoid; }
  h2, h3, caption { break-after: avoid; }
  .scroll { overflow: visible; }
  th { white-space: normal !important; }
}
</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
<p class="soft">{% if started %}Made on {{ started }}.{% else %}When it was made is not known.
{%- endif %}</p>
</header>
<main>
{% if results %}
<dl class="results">
{% for label, value in results %}
<div><dt>{{ label }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
{% endif %}
{% if lacks %}
<section class="lacks" aria-labelledby="lacks">
<h2 id="lacks">Missing in this run's folder</h2>
<ul>
{% for line in lacks %}
<li>{{ line }}</li>
{% endfor %}
</ul>
</section>
{% endif %}
<nav aria-label="On this page"><p><a href="#figures">Figures</a> · <a href="#metrics">Metrics</a> ·
<a href="#settings">Settings</a> · <a href="#notebooks">Notebooks</a> ·
<a href="#versions">Versions</a> · <a href="#model">Model</a></p></nav>

<h2 id="figures">Figures</h2>
{% for group, shown in figures.items() %}
<h3>{{ group }}</h3>
{% for figure in shown %}
<figure>
{% if figure.interactive %}
<iframe sandbox="allow-scripts" title="{{ figure.alt }}" srcdoc="{{ figure.source }}"></iframe>
{% else %}
<img src="{{ figure.source }}" alt="{{ figure.alt }}">
{% endif %}
<figcaption>{{ figure.caption }}</figcaption>
</figure>
{% endfor %}
{% else %}
<p>There are none.</p>
{% endfor %}

<h2 id="metrics">Metrics</h2>
{% for name, tables in sections %}
<h3>{{ name }}</h3>
{% for table in tables %}
{{ show(table, name) }}
{% endfor %}
{% else %}
<p>There are none.</p>
{% endfor %}
{% if sections %}
<p class="soft">A value with brackets is a mean and its 95 % interval.</p>
{% endif %}

<h2 id="settings">Settings</h2>
<div class="code">
{% for table in parameters %}
{{ show(table, "Settings") }}
{% else %}
<p>The run's folder holds no executed notebook: their parameters are not known.</p>
{% endfor %}
{% if settings %}
<h3>As the training used them</h3>
{% for table in settings %}
{{ show(table, "Settings") }}
{% endfor %}
{% endif %}
</div>

<h2 id="notebooks">Notebooks</h2>
{% if notebooks | selectattr(1) | list %}
<p>The links lead to the notebooks' pages beside this file; they are not part of it.</p>
{% endif %}
<div class="scroll" role="region" tabindex="0" aria-label="Notebooks">
<table>
<thead><tr><th scope="col">notebook</th><th scope="col">state</th><th scope="col">minutes</th></tr>
</thead>
<tbody>
{% for title, page, state, minutes in notebooks %}
<tr><th scope="row">{% if page %}<a href="{{ page }}">{{ title }}</a>{% else %}{{ title }}
{%- endif %}</th><td>{{ state }}</td><td>{{ minutes }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>

<h2 id="versions">Versions</h2>
{% if not recorded %}
<p>The run recorded none. These are the versions when this page was made.</p>
{% endif %}
{{ show(environment, "Versions") }}

<h2 id="model">Model</h2>
{% if model %}
{{ show(model, "Model") }}
{% else %}
<p>There is none.</p>
{% endif %}
</main>
</body>
</html>
"""

_TEMPLATE = jinja2.Environment(
    autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
).from_string(_PAGE)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.report", description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="folder of a run; default: the newest")
    options = parser.parse_args(arguments)
    try:
        report = write_report(options.run or project_root() / "runs" / "latest")
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"Open {report.as_uri()} in a browser.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
