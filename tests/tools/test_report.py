"""The report: one file that shows whatever a run's folder holds, and names what it lacks."""

import json
import os
import re
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import nbformat
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lib.files import project_root, write_json
from tools import report
from tools.environment import PACKAGES, commit_of, environment, record_environment
from tools.report import NOTEBOOKS, main, read_execution, write_report
from tools.tables import Table, metric_tables

INTERVAL = {"value": 0.9054, "low": 0.8812, "high": 0.9285}
SHOWN = "0.905 [0.881, 0.928]"
METRICS = {
    "data": {"records": 9908},
    "training": {
        "tower": {"image_size": 32, "weights": ""},
        "settings": {"stages": [{"train": "head", "epochs": 6}], "jit": "auto"},
        "epochs": 9,
        "final_loss": 0.3275,
        "validation": {"frozen": {"val_map": 0.758}, "trained": {"val_map": 0.865}},
    },
    "ladder": {"frozen": {"demo world": 0.3}},
    "post_processing": {},
    "gem_ablation": {"seeds": [1, 2], "map": {"GeM, p = 3": INTERVAL}},
    "unseen": {
        "photos": 500,
        "map": {"trained": INTERVAL, "raw_pixels": INTERVAL},
        "map_at_10": {"trained": INTERVAL, "raw_pixels": INTERVAL},
    },
    "index": {"photos": 60_000, "flat": {"recall@10": 1.0}},
    "own_photos": {"photos": 30, "map": {}},
    "same_place": {"photos": 30, "first_changed": 4},
    "search_app": {"photos": 500, "landmark_named_first": 0.99},
}
HOSTILE = "<script>alert('x')</script>&\"\ud800"
INTERACTIVE = '<!doctype html><script>document.title = "a" + \'b\' && "</iframe>"</script>'


class Page(HTMLParser):
    """What a page refers to, its policy, and the text that a reader sees."""

    def __init__(self, path):
        super().__init__()
        self.links, self.images, self.frames, self.rows = [], [], [], []
        self.tags, self.text, self.identifiers, self.policy = [], "", [], ""
        self._skips = self._in_cell = False
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self._skips = tag == "style"
        self.links += [attributes[name] for name in ("href", "src") if name in attributes]
        self.identifiers += [attributes["id"]] if "id" in attributes else []
        if tag == "img":
            self.images.append(attributes)
        if tag == "iframe":
            self.frames.append(attributes)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._in_cell = True
            self.rows[-1].append("")
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]

    def handle_endtag(self, tag):
        self._skips = False
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self._skips:
            return
        self.text += data
        if self._in_cell:
            self.rows[-1][-1] += data.strip()


def execute(path, source="seed: int = 1\nlimit = 400  # triplets", injected="", outputs=(), **meta):
    """Write a notebook as papermill leaves it behind."""
    code = nbformat.v4.new_code_cell
    cells = [
        code(source, metadata={"tags": ["parameters"]}),
        code(injected, metadata={"tags": ["injected-parameters"]}),
        code("1 / 0", outputs=list(outputs)),
    ]
    papermill = {"start_time": "2026-11-24T16:45:55", "end_time": "2026-11-24T16:46:55"}
    papermill |= {"duration": 60.0} | meta
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"papermill": papermill}), path)


def save_figure(path):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)


@pytest.fixture
def run(tmp_path):
    """A whole run, without a notebook having run."""
    folder = tmp_path / "2026-11-24_16-45-55"
    folder.mkdir()
    write_json(folder / "metrics.json", METRICS)
    record_environment(folder, "gldv2.yaml")
    names = ["01_leak", "02_training_curves", "02_mining", "03_ladder", "04_ablation"]
    names += ["05_retrieval_grid", "06_post_processing"]
    for name in (*names, "07_frontier", "08_answer", "09_inliers", "10_answer"):
        save_figure(folder / "figures" / f"{name}.png")
    for name in NOTEBOOKS:
        execute(folder / f"{name}.ipynb")
    (folder / "model.keras").write_bytes(b"model")
    write_json(folder / "gallery.index" / "manifest.json", {"model": "f00d" * 16})
    return folder


def test_a_whole_run_is_shown_and_nothing_is_missing(run):
    assert write_report(run) == run / "report.html"
    page = Page(run / "report.html")
    assert "Missing in this run" not in page.text
    assert "Image retrieval: run 2026-11-24_16-45-55" in page.text
    assert f"mAP, unseen landmarks{SHOWN}" in page.text.replace("\n", "")
    assert "0.758 → 0.865" in page.text
    assert ["trained", SHOWN, SHOWN] in page.rows and ["", "mAP", "mAP@10"] in page.rows
    assert ["GeM, p = 3", SHOWN] in page.rows
    assert ["records", "9,908"] in page.rows
    assert ["1", "'head'", "6"] in page.rows
    assert ["profile", "gldv2.yaml"] in page.rows
    assert ["01 · Data exploration", "ran to its end", "1.0"] in page.rows
    digest = "9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4"  # of b"model"
    assert ["model.keras, SHA-256", digest] in page.rows
    assert ["fingerprint of the model that made gallery.index", "f00d" * 16] in page.rows
    # The settings of the training stand once, and headings leave out no level.
    assert sum(row[0] == "image_size" for row in page.rows if row) == 1
    levels = [int(tag[1]) for tag in page.tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))


def test_the_page_needs_no_other_file(run):
    (run / "02_triplet_training.html").write_text("")
    (run / "figures" / "05_map.html").write_text(INTERACTIVE)
    page = Page(write_report(run))
    others = [link for link in page.links if not link.startswith(("data:image/png;base64,", "#"))]
    assert others == ["02_triplet_training.html"]
    assert "beside this file" in page.text
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.identifiers)
    assert len(page.identifiers) == len(set(page.identifiers))
    assert not {"script", "link", "object", "embed"} & set(page.tags)
    assert page.policy == "default-src 'unsafe-inline' data: blob:"  # no address of any network
    assert str(run) not in (run / "report.html").read_text()


def test_figures_stand_in_order_with_captions(run):
    save_figure(run / "figures" / "99_new_thing.png")
    save_figure(run / "figures" / "05_nearest.png")
    save_figure(run / "figures" / "02_losses.png")
    save_figure(run / "figures" / ".part-x-02_mining.png")  # left behind by a crash
    page = Page(write_report(run))
    alternatives = [image["alt"] for image in page.images]
    assert alternatives == [
        report.CAPTIONS[name][1]
        for name in (
            "02_training_curves",
            "05_retrieval_grid",
            "01_leak",
            "02_losses",
            "02_mining",
            "03_ladder",
            "04_ablation",
            "05_nearest",
            "06_post_processing",
            "07_frontier",
            "08_answer",
            "09_inliers",
            "10_answer",
        )
    ] + ["Figure: New thing."]
    assert "Other figures" in page.text
    assert page.tags.count("figcaption") == len(page.images)


def test_every_figure_of_the_notebooks_has_a_caption():
    for name in report.OF_A_RUN:
        source = (project_root() / "notebooks" / f"{name}.ipynb").read_text()
        figures = set(re.findall(r'figures / \\"(\w+)\.png', source))
        assert figures and figures <= set(report.CAPTIONS)


def test_an_interactive_figure_is_sandboxed(run):
    (run / "figures" / "05_map.html").write_text(INTERACTIVE)
    (frame,) = Page(write_report(run)).frames
    assert frame["srcdoc"] == INTERACTIVE
    assert frame["sandbox"] == "allow-scripts"
    assert frame["title"] and "src" not in frame


def test_values_cannot_become_markup(run):
    metrics = {
        HOSTILE: {HOSTILE: HOSTILE, "list": [HOSTILE]},
        "training": {"tower": {"a": HOSTILE}},
    }
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "environment.json").write_text(json.dumps({"started": HOSTILE, "python": [HOSTILE]}))
    execute(run / "02_triplet_training.ipynb", injected="weights = '<script>alert(1)</script>'")
    error = nbformat.v4.new_output("error", ename="<b>", evalue="<script>\nmore", traceback=[])
    execute(run / "04_gem_ablation.ipynb", outputs=[error])
    save_figure(run / "figures" / '04_"><script>.png')
    page = Page(write_report(run))
    assert "script" not in page.tags and "b" not in page.tags
    assert ["weights", "'<script>alert(1)</script>'"] in page.rows
    assert ["04 · What GeM pooling is worth", "stopped: <b>: <script>", "1.0"] in page.rows


def test_parameters_are_those_the_notebook_ran_with(run):
    execute(
        run / "02_triplet_training.ipynb",
        source='rate: float = (\n    3e-3  # at its highest\n)\nnext: int\nseed = 1\nname = ""',
        injected='# Parameters\nseed = 7\nlimit = float("inf")',
    )
    found = read_execution(run / "02_triplet_training.ipynb")
    assert found.defaults == {"rate": 3e-3, "seed": 1, "name": ""}
    assert found.parameters == {"rate": 3e-3, "seed": 7, "name": "", "limit": "float('inf')"}
    page = write_report(run)
    rows = Page(page).rows
    first = rows.index(["parameter", "value", "in the notebook, if it differs"])
    assert rows[first + 1] == ["seed", "7", "1"]  # seeds first
    assert rows[first + 2] == ["rate", "0.003", ""]
    assert '<tr class="seed"><th scope="row">seed</th>' in page.read_text()


def test_the_state_of_a_notebook_is_told(tmp_path):
    path = tmp_path / "02.ipynb"
    assert read_execution(path).state == "no executed notebook here"
    path.write_text("{")
    assert read_execution(path).state == "can't be read"
    execute(path, end_time=None, duration=None)
    assert read_execution(path)[:2] == ("was not run to its end", None)
    error = nbformat.v4.new_output("error", ename="OSError", evalue="disk\nfull", traceback=[])
    execute(path, outputs=[error])
    assert read_execution(path)[:2] == ("stopped: OSError: disk", 1.0)
    reason = f"in {project_root() / 'runs'} and {Path.home() / 'my photos'}"
    error = nbformat.v4.new_output("error", ename="OSError", evalue=reason, traceback=[])
    execute(path, outputs=[error])
    assert read_execution(path).state == "stopped: OSError: in ./runs and ~/my photos"


def test_an_empty_folder_has_a_report(tmp_path):
    page = Page(write_report(tmp_path))
    for name in ("metrics.json", "environment.json", "model.keras", "gallery.index"):
        assert f"\n{name}\n" in page.text
    assert "figures of notebook 04" in page.text
    assert "versions when this page was made" in page.text
    assert "their parameters are not known" in page.text
    assert "When it was made is not known" in page.text


def test_damaged_files_are_named(run):
    (run / "metrics.json").write_text('{"unseen": ')
    (run / "environment.json").write_text("[]")
    (run / "gallery.index" / "manifest.json").write_text("{")
    page = Page(write_report(run))
    assert "metrics.json: the file is damaged" in page.text
    assert "environment.json: the file is damaged" in page.text
    assert ["fingerprint of the model that made gallery.index", "can't be read"] in page.rows
    assert "Made on 2026-11-24 16:45:55" in page.text  # by the folder's name


def test_half_a_run_says_what_is_missing(run):
    half = {name: METRICS[name] for name in ("data", "training")}
    write_json(run / "metrics.json", half)
    (run / "figures" / "04_ablation.png").unlink()
    (run / "figures" / "02_training_curves.png").unlink()
    text = Page(write_report(run)).text
    assert "metrics of notebook 04 · What GeM pooling is worth" in text
    assert "figures of notebook 04 · What GeM pooling is worth" in text
    assert "metrics of notebook 05" in text and "metrics of notebook 02" not in text
    assert "figures/02_training_curves.png" in text
    assert "mAP, unseen landmarks" not in text


def test_the_same_run_gives_the_same_page(run):
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_a_report_that_fails_leaves_the_old_one(run, monkeypatch):
    write_report(run).write_text("old")
    monkeypatch.setattr(os, "fsync", lambda handle: 1 / 0)
    before = sorted(run.iterdir())
    with pytest.raises(ZeroDivisionError):
        write_report(run)
    assert (run / "report.html").read_text() == "old"
    assert sorted(run.iterdir()) == before


def test_dicts_of_models_become_columns_and_the_longer_side_goes_down():
    measures = {"value": {"a": 1, "b": 2, "c": 3}, "gain": {"b": 0.5}}
    assert list(metric_tables(measures)) == [
        Table("", ("", "value", "gain"), [("a", "1", "–"), ("b", "2", "0.500"), ("c", "3", "–")])
    ]
    methods = {name: {"map": INTERVAL, "seconds": 0.0002} for name in ("x", "y", "z")}
    assert list(metric_tables(methods)) == [
        Table("", ("", "mAP", "seconds"), [(name, SHOWN, "0.0002") for name in "xyz"])
    ]


def test_nested_sections_follow_in_tables_of_their_own():
    content = {"n": 12345, "deep": {"on": True, "no": None, "er": {"a_at_1": [1.0, 2]}, "l": [{}]}}
    assert list(metric_tables(content)) == [
        Table("", ("", "value"), [("n", "12,345")]),
        Table("deep", ("", "value"), [("on", "yes"), ("no", "–"), ("l", "–")]),
        Table("deep · er", ("", "value"), [("a@1", "1.000, 2")]),
    ]
    (table,) = metric_tables({"failures": [{"rank": n} for n in range(60)]})
    assert table.caption == "failures (the first 50 of 60)" and len(table.rows) == 50


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["value", "low", "high", "a"]) | st.text(max_size=5), inner, max_size=4
        )
    ),
    max_leaves=20,
)


@given(
    sections=st.dictionaries(st.sampled_from([*METRICS, "new"]), JSON),
    recorded=st.dictionaries(st.sampled_from(["started", "python", "versions"]), JSON, min_size=1),
)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_recorded_there_is_a_page(tmp_path, sections, recorded):
    write_json(tmp_path / "metrics.json", sections)
    write_json(tmp_path / "environment.json", recorded)
    Page(write_report(tmp_path))


def test_the_environment_names_versions_and_no_machine(run, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    found = environment()
    assert found["keras_backend"] == "jax"
    assert {"keras", "faiss-cpu", "numpy"} <= set(found["versions"]) <= set(PACKAGES)
    assert found["versions"]["numpy"] == np.__version__
    text = (run / "environment.json").read_text()
    assert os.uname().nodename not in text and str(project_root()) not in text


def test_the_backend_is_that_of_keras_own_settings(tmp_path, monkeypatch):
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    assert environment()["keras_backend"] == "tensorflow"
    (tmp_path / "keras.json").write_text('{"backend": "torch"}')
    assert environment()["keras_backend"] == "torch"
    (tmp_path / "keras.json").write_text("[")
    assert environment()["keras_backend"] == "tensorflow"


def test_the_commit_is_this_projects_or_none(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True
        )

    copy = tmp_path / "copy"
    copy.mkdir()
    assert commit_of(tmp_path) == (None, None)
    git("init")
    assert commit_of(tmp_path) == (None, None)  # no commit yet
    git("commit", "--allow-empty", "-m", "x")
    commit, changed = commit_of(tmp_path)
    assert len(commit) == 40 and changed is False
    (copy / "new.py").write_text("")
    assert commit_of(tmp_path) == (commit, True)
    assert commit_of(copy) == (None, None)  # lies in another project's repository
    monkeypatch.setenv("PATH", "")
    assert commit_of(tmp_path) == (None, None)


def test_the_command_writes_the_page_or_says_why_not(run, capsys):
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"Open {(run / 'report.html').as_uri()} in a browser.\n"
    assert main([str(run / "absent")]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("no run at ") and printed.err.count("\n") == 1
    assert not printed.out
    assert main([str(run / "metrics.json")]) == 1
