"""The widget, the map and notebook 05 in a real browser: JupyterLab's user is played."""

import contextlib
import csv
import io
import json
import os
import secrets
import shutil
import subprocess
import sys
import urllib.request

import keras
import nbconvert
import nbformat
import numpy as np
import pytest
from nbconvert.preprocessors import ClearOutputPreprocessor
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from PIL import Image, ImageColor

from lib import plots
from lib.app.picture_map import framed, picture_map
from lib.files import project_root
from lib.network.tower import TowerSettings, build_tower, save_tower
from lib.training.stages import MODEL
from tests.conftest import be_a_project, end_server, free_port, wait_for

api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: make browser")

pytestmark = pytest.mark.long

PHOTOS = 30  # two pages of the widget
LANDMARKS = 5

LABELLING = """
from pathlib import Path

import numpy as np

from lib.app.labeller import Labeller

embeddings = np.load("embeddings.npy")
names = sorted(path.name for path in Path("Test_set").glob("*.jpg"))
Labeller(Path("Test_set"), names, embeddings)
"""

MAP = """
import numpy as np
from IPython.display import HTML

from lib.app.picture_map import framed, picture_map

photos = np.load("photos.npy")
points = np.random.default_rng(0).normal(size=(len(photos), 2))
HTML(framed(picture_map(points, photos, np.arange(len(photos)) % 5, title="A map")))
"""


def scene(number: int, landmark: int) -> np.ndarray:
    """A photo of something: uint8 (96, 96, 3)."""
    rng = np.random.default_rng(landmark)
    photo = np.empty((96, 96, 3), dtype=np.uint8)
    photo[:] = rng.integers(120, 255, 3)
    left = 10 + number % 30
    photo[30:, left : left + 30] = rng.integers(0, 120, 3)
    return photo


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project's folder with photos, the first is landmark 0's, and two notebooks."""
    root = tmp_path_factory.mktemp("project")
    be_a_project(root)
    (root / "Test_set").mkdir()
    landmark = np.arange(PHOTOS) % LANDMARKS
    photos = np.stack([scene(i, k) for i, k in enumerate(landmark)])
    for i, photo in enumerate(photos):
        Image.fromarray(photo).save(root / "Test_set" / f"{i:02}.jpg")
    (root / "Test_set" / "broken.jpg").write_text("")
    embeddings = np.eye(LANDMARKS)[landmark] + np.random.default_rng(0).normal(0, 0.1, (PHOTOS, 5))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    np.save(root / "embeddings.npy", np.vstack([embeddings, embeddings[:1]]))  # also broken.jpg's
    np.save(root / "photos.npy", photos)
    for name, code in {"label": LABELLING, "map": MAP}.items():
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(code)], metadata={"kernelspec": kernel}
        )
        nbformat.write(notebook, root / f"{name}.ipynb")
    return root


@pytest.fixture(scope="module")
def lab(browser, project, tmp_path_factory):
    with start_lab(project, tmp_path_factory.mktemp("home")) as address:
        yield address


@contextlib.contextmanager
def start_lab(project, home):
    """JupyterLab's address, as a function of the notebook's name; nothing of the user's is used."""
    settings = home / "config" / "labconfig" / "page_config.json"
    settings.parent.mkdir(parents=True)
    # It would ask whether it may fetch news.
    announcements = "@jupyterlab/apputils-extension:announcements"
    settings.write_text(json.dumps({"disabledExtensions": {announcements: True}}))
    kinds = ("config", "data", "runtime")
    folders = {f"JUPYTER_{kind.upper()}_DIR": str(home / kind) for kind in kinds}
    token = secrets.token_hex()
    port = free_port()
    with (home / "log").open("w") as log:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"),
                *("--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"),
                *(f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={project}"),
                "--KernelManager.shutdown_wait_time=1",
            ],
            env={name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
            | folders
            | {"HOME": str(home), "IPYTHONDIR": str(home), "JUPYTER_PREFER_ENV_PATH": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(f"{address}/api?token={token}"), server, home / "log")
        yield lambda notebook: f"{address}/lab/tree/{notebook}.ipynb?token={token}&reset"
    finally:
        end_server(server)


def answers(address) -> bool:
    try:
        urllib.request.urlopen(address, timeout=5).close()
    except OSError:
        return False
    return True


def run_all(page, address):
    """Open a notebook and run its cells."""
    page.goto(address)
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def test_notebook_05_down_to_its_grid(browser, page, small_world, tmp_path):
    """Opened in JupyterLab, with a small run and a small world; its user looks for the grid."""
    shutil.copytree(small_world, tmp_path / "project")
    root = tmp_path / "project"
    be_a_project(root)
    (root / "run").mkdir()
    for seed, name in enumerate((MODEL, "untrained.keras")):
        keras.utils.set_random_seed(seed)
        settings = TowerSettings(image_size=32, last_stage=3, embedding_size=16, weights="")
        save_tower(build_tower(settings), root / "run" / name)
    parameters = {
        "run_dir": "run",
        "demo": False,  # the small world is there
        "validation_share": 0.3,
    }
    source = project_root() / "notebooks" / "05_faiss_evaluation.ipynb"
    notebook = parameterize_notebook(load_notebook_node(str(source)), parameters)
    grids = [i for i, cell in enumerate(notebook.cells) if "plot_retrieval_grid(" in cell.source]
    notebook.cells = notebook.cells[: grids[0] + 1]
    nbformat.write(ClearOutputPreprocessor().preprocess(notebook, {})[0], root / "05.ipynb")
    with start_lab(root, tmp_path / "home") as lab:
        run_all(page, lab("05"))
        # The last cell writes it; a cell that fails would be the last one.
        picture = root / "run" / "figures" / "05_retrieval_grid.png"
        for _ in range(3000):
            if picture.is_file():
                break
            page.wait_for_timeout(100)
        assert picture.is_file()
        cell = page.locator(".jp-CodeCell", has_text="plots.plot_retrieval_grid(")
        grid = cell.locator(".jp-OutputArea img")
        panel = page.locator(".jp-WindowedPanel-outer")
        for place in range(0, 20_000, 400):  # only what is near is on the page
            panel.evaluate("(panel, place) => { panel.scrollTop = place }", place)
            page.wait_for_timeout(100)
            if grid.is_visible():
                break
        grid.scroll_into_view_if_needed()
        seen = np.asarray(Image.open(io.BytesIO(grid.screenshot())).convert("RGB"), dtype=int)
        page.goto("about:blank")  # it would complain about the end of the server
    for colour in (plots.QUERY, plots.WRONG):  # the frames
        near = np.abs(seen - ImageColor.getrgb(colour)).max(axis=-1) < 16
        assert near.sum() > 200


def roles(folder):
    with (folder / "ground_truth.csv").open(newline="", encoding="utf-8") as file:
        return {row["image"]: row["role"] for row in csv.DictReader(file)}


def button(page, name):
    return page.locator(".labeller").get_by_role("button", name=name, exact=True)


def test_labelling(lab, page, project):
    folder = project / "Test_set"
    run_all(page, lab("label"))
    widget = page.locator(".labeller")
    widget.get_by_text("There is no Test_set/ground_truth.csv yet").wait_for()
    assert "broken.jpg" in widget.locator("details").text_content()

    # The photos of the query's landmark come first: one by the mouse, one by the keyboard.
    first = widget.locator(".labeller-photo")
    assert {first.nth(i).text_content() for i in range(5)} == {
        f"{i:02}.jpg" for i in range(5, 30, 5)
    }
    button(page, "05.jpg").click()
    chosen = button(page, "✓ positive: 05.jpg")
    frame = "element => getComputedStyle(element).borderTopColor"
    assert chosen.evaluate(frame) == "rgb(42, 157, 58)"
    assert "data:image/jpeg" in chosen.evaluate("e => getComputedStyle(e).backgroundImage")
    button(page, "10.jpg").focus()
    page.keyboard.press("Space")
    assert (
        button(page, "✓ positive: 10.jpg").evaluate("e => getComputedStyle(e).outlineWidth")
        == "4px"
    )
    button(page, "✓ positive: 10.jpg").wait_for()
    widget.get_by_text("2 positives chosen, not saved yet.").wait_for()

    button(page, "Next page").click()
    widget.get_by_text("Page 2 of 2").wait_for()
    api.expect(first).to_have_count(PHOTOS - 1 - 24, timeout=60_000)
    last = first.last.text_content()
    first.last.click()
    button(page, f"✓ positive: {last}").click()  # once more: undone
    button(page, last).wait_for()
    button(page, "Save").click()
    widget.get_by_text("Saved in Test_set/ground_truth.csv: 2 positives.").wait_for()
    assert {name for name, role in roles(folder).items() if role == "positive"} == {
        "05.jpg",
        "10.jpg",
    }

    # Another day: the choices are there, and a change of the query can be undone.
    run_all(page, lab("label"))
    widget.get_by_text("Read from Test_set/ground_truth.csv: 2 positives.").wait_for()
    button(page, "✓ positive: 05.jpg").wait_for()
    button(page, "15.jpg").click()
    button(page, "✓ positive: 15.jpg").wait_for()
    widget.get_by_title("Make 01.jpg the query").click()
    widget.get_by_text("Undo brings back what was chosen for 00.jpg").wait_for()
    assert first.first.text_content() in {f"{i:02}.jpg" for i in range(6, 30, 5)}
    button(page, "Undo").click()
    widget.get_by_text("Undone: 3 positives chosen, not saved yet.").wait_for()
    button(page, "✓ positive: 15.jpg").wait_for()

    # A folder in the file's place: it can't be written, whoever the user is.
    before = (folder / "ground_truth.csv").read_bytes()
    (folder / "ground_truth.csv").unlink()
    (folder / "ground_truth.csv").mkdir()
    button(page, "Save").click()
    alert = widget.get_by_role("alert")
    alert.wait_for()
    assert "Not saved in Test_set/ground_truth.csv: Is a directory." in alert.text_content()
    (folder / "ground_truth.csv").rmdir()
    button(page, "Save").click()
    widget.get_by_text("Saved in Test_set/ground_truth.csv: 3 positives.").wait_for()
    assert (folder / "ground_truth.csv").read_bytes() != before
    assert roles(folder)["15.jpg"] == "positive" and len(roles(folder)) == PHOTOS


def look_around(map_, page):
    """Use the map, as a page or within one: by the mouse, then by the keyboard."""
    dots = map_.locator("circle")
    assert dots.count() == PHOTOS
    dots.nth(7).hover()
    assert map_.locator("#label").text_content() == "1"
    assert map_.locator("#count").text_content() == "photo 2 of 6"
    style = map_.locator("#photo").evaluate("e => getComputedStyle(e).backgroundImage")
    assert style.startswith('url("data:image/webp;base64,')
    assert map_.locator("circle.same").count() == 6
    assert map_.locator("#others div").count() == 5
    dots.nth(7).focus()
    page.keyboard.press("ArrowRight")
    assert map_.locator("#count").text_content() == "photo 3 of 6"
    page.keyboard.press("ArrowDown")
    assert map_.locator("#label").text_content() == "2"
    assert dots.nth(12).evaluate("e => document.activeElement === e")


def draw_map(project):
    """The page that the notebook `map` shows, and its photos."""
    photos = np.load(project / "photos.npy")
    points = np.random.default_rng(0).normal(size=(PHOTOS, 2))
    return picture_map(points, photos, np.arange(PHOTOS) % LANDMARKS, title="A map"), photos


def test_map_as_a_page(page, project, tmp_path):
    html, photos = draw_map(project)
    (tmp_path / "map.html").write_text(html, encoding="utf-8")
    requests = []
    page.on("request", lambda request: requests.append(request.url.partition(":")[0]))
    page.goto((tmp_path / "map.html").as_uri())
    look_around(page, page)
    # What is shown is the photo of the dot.
    shown = page.locator("#photo").screenshot()
    middle = np.asarray(Image.open(io.BytesIO(shown)).convert("RGB"), dtype=int)[20, 100]
    assert np.abs(middle - photos[2][10, 48]).max() < 12

    before = page.locator("svg").get_attribute("viewBox")
    page.keyboard.press("+")
    zoomed = page.locator("svg").get_attribute("viewBox")
    assert zoomed != before
    page.mouse.move(300, 300)
    page.mouse.down()
    page.mouse.move(350, 300)
    page.mouse.up()
    assert page.locator("svg").get_attribute("viewBox") != zoomed
    page.keyboard.press("0")
    assert page.locator("svg").get_attribute("viewBox") == before
    assert set(requests) <= {"file", "data"}


def test_map_in_an_exported_notebook(page, project, tmp_path):
    data = {"text/html": framed(draw_map(project)[0])}
    cell = nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("display_data", data)])
    # The template `basic` is the one that loads nothing from elsewhere.
    exporter = nbconvert.HTMLExporter(template_name="basic")
    html, _ = exporter.from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
    (tmp_path / "notebook.html").write_text(html, encoding="utf-8")
    page.goto((tmp_path / "notebook.html").as_uri())
    look_around(page.frame_locator("iframe"), page)


def test_map_in_a_notebook(lab, page):
    run_all(page, lab("map"))
    page.locator("iframe").wait_for()
    look_around(page.frame_locator("iframe"), page)
