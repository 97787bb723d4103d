"""The search app in a real browser: the page that `make app` serves, and in JupyterLab."""

import http.client
import io
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from lib.app.page import write_page_notebook
from lib.app.upload import MOST_BYTES
from lib.files import project_root
from lib.network.engine import ENGINE, export_engine
from lib.network.tower import TowerSettings, build_tower
from tests.conftest import be_a_project, end_server, new_page, one_block, wait_for

api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: make browser")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

from tests.notebooks.test_browser import run_all, start_lab  # noqa: E402

pytestmark = pytest.mark.long

LANDMARKS, PHOTOS = 10, 6
NOTEBOOK = project_root() / "notebooks" / "10_search_app.ipynb"


def scene(number, landmark):
    """A photo of a landmark: four colours, which a network without training tells apart as well."""
    colours = np.random.default_rng(landmark).integers(30, 256, (4, 3))
    photo = np.empty((120, 160, 3))
    photo[:60, :80], photo[:60, 80:], photo[60:, :80], photo[60:, 80:] = colours
    return Image.fromarray((photo * (1 - 0.03 * number)).astype(np.uint8))


def jpeg(image):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def photo_of(landmark):
    """A photo of a landmark that is not in the gallery, as Playwright hands it over."""
    return {"name": "mine.jpg", "mimeType": "image/jpeg", "buffer": jpeg(scene(2.5, landmark))}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A project's folder with a run, a gallery, and folders of somebody's own photos."""
    root = tmp_path_factory.mktemp("project")
    be_a_project(root)
    (root / "run").mkdir()
    settings = TowerSettings(image_size=32, last_stage=3, embedding_size=16, weights="")
    with one_block():
        tower = build_tower(settings)
    export_engine(tower, root / "run" / ENGINE)
    for landmark in range(LANDMARKS + 2):
        place = "gallery" if landmark < LANDMARKS else "home/Pictures"
        folder = root / place / f"landmark_{landmark:03}"
        folder.mkdir(parents=True)
        for number in range(PHOTOS):
            (folder / f"{number}.jpg").write_bytes(jpeg(scene(number, landmark)))
    (root / "home" / "Pictures" / "broken.jpg").write_text("no photo")
    return root


@contextmanager
def serve(root, home, program):
    """The page's address, as the app opens it in a browser; nothing of the user's is used."""
    log, opened, user_browser = home / "log", home / "opened", home / "browser"
    user_browser.write_text(f'#!/bin/sh\necho "$1" >{opened}.part && mv {opened}.part {opened}\n')
    user_browser.chmod(0o755)
    folders = {f"JUPYTER_{kind}_DIR": str(home / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    with log.open("w") as output:
        server = subprocess.Popen(
            [
                *(sys.executable, *program, "--port=8950"),
                *("--run-dir", root / "run", "--gallery", root / "gallery"),
                *("--folders-root", root / "home"),
            ],
            env=os.environ
            | folders
            | {"HOME": str(home), "IPYTHONDIR": str(home), "BROWSER": f"{user_browser} %s"},
            cwd=project_root(),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        wait_for(opened.is_file, server, log)
        yield opened.read_text().strip()
    finally:
        end_server(server)


@pytest.fixture(scope="module")
def address(browser, root, tmp_path_factory):
    """Of a server as `make app` starts it."""
    with serve(root, tmp_path_factory.mktemp("home"), ["-m", "lib.app.page"]) as address:
        yield address


def changed(**constants):
    """The program of the app with other constants."""
    return ["-c", f"import lib.app.page as page; vars(page).update({constants}); page.main()"]


class App:
    """The app as somebody in front of it sees it."""

    def __init__(self, page):
        self.page, self.input = page, page.locator(".photo-drop input")
        self.photos = page.locator(".app-grid .app-cell img")

    def open(self, address):
        self.page.goto(address)
        self.page.get_by_text(f"{LANDMARKS * PHOTOS} photos ready.").wait_for()
        return self

    def status(self, text):
        """Wait for a line."""
        self.page.locator(".status").get_by_text(text).wait_for()

    def shows(self, landmark, photos=8):
        """Wait for an answer, the landmark first, in the vote and among the photos."""
        self.status(f"Looks most like landmark {landmark:03}. ")
        first = re.compile(rf"^Result 1: landmark {landmark:03}, similarity (0\.9|1\.0)")
        api.expect(self.photos.first).to_have_attribute("alt", first, timeout=60_000)
        api.expect(self.photos).to_have_count(photos, timeout=60_000)
        votes = self.page.locator(".votes li").first
        api.expect(votes).to_contain_text(f"landmark {landmark:03}", timeout=60_000)


@pytest.fixture(scope="module")
def shared_page(browser, address):
    """To open the app takes seconds, so most tests share one page."""
    with new_page(browser) as page:
        yield page
        page.goto("about:blank")  # it would complain about the end of the server


@pytest.fixture
def own_page(shared_page):
    """For tests that need the app as it is at first, or leave its controls changed."""
    shared_page.goto("about:blank")  # to leave the page ends its kernel; close() does not tell it
    yield
    shared_page.goto("about:blank")


@pytest.fixture
def app(shared_page, address, request):
    """The app; after each test nothing of the machine may be on the page."""
    app = App(shared_page)
    if shared_page.url == "about:blank" or request.session.testsfailed:
        app.open(address)
    yield app
    content = shared_page.content()
    assert "Traceback" not in content and "/tmp/" not in content and str(Path.home()) not in content
    assert shared_page.errors == []


@pytest.mark.usefixtures("own_page")
def test_a_photo_finds_its_landmark_and_the_controls_matter(app):
    requests = []
    app.page.on("request", lambda request: requests.append(request.url))
    app.input.set_input_files(photo_of(3))
    app.shows(3)
    assert app.page.locator(".app-grid .bar").count() == 8
    # The photos that are shown are those of the landmark: the colour of a corner tells.
    shown = Image.open(io.BytesIO(app.photos.first.screenshot())).convert("RGB")
    difference = np.asarray(shown, int)[40, 40] - np.asarray(scene(2.5, 3), int)[30, 40]
    assert np.abs(difference).max() < 20

    app.page.get_by_label("Photos to show").select_option("4")
    app.shows(3, photos=4)
    assert [
        re.findall(r"landmark \d+", app.photos.nth(i).get_attribute("alt")) for i in range(4)
    ] == [["landmark 003"]] * 4
    app.page.get_by_label("Photos to show").select_option("12")
    app.shows(3, photos=12)
    kinds = {
        "those along a graph (HNSW)": "graph",
        "those in the nearest lists (IVF)": "inverted lists",
    }
    for label, kind in (kinds | {"every photo": "exact"}).items():
        app.page.get_by_label("Compare with").select_option(label)
        app.status(f"({kind}).")
        app.shows(3, photos=12)
    again = "search again with the best found (query expansion)"
    app.page.get_by_label("Then").select_option(again)
    app.status("(exact, query expansion).")
    app.shows(3, photos=12)
    assert all(url.startswith(("data:", "blob:")) for url in requests)


def test_whatever_is_uploaded_gets_a_line_and_the_page_lives_on(app, tmp_path):
    good = photo_of(1)["buffer"]
    files = {
        "This is no picture that can be read.": b"MZ\x90 no photo",
        "This picture is damaged": good[: len(good) // 2],
        "This is no picture that can be read": b"",
        "This file has 21 MB; up to 20 MB": bytes(MOST_BYTES + 2**20),
    }
    for number, (line, content) in enumerate(files.items()):
        (tmp_path / "photo.jpg").write_bytes(content)
        app.input.set_input_files(tmp_path / "photo.jpg")
        alert = app.page.get_by_role("alert")
        alert.wait_for()
        assert line in alert.text_content()
        app.input.set_input_files(photo_of(number))  # the page lives on
        app.shows(number)


def test_a_large_photo_arrives_whole(app, tmp_path):
    """More bytes than a server of Jupyter takes in one message, and many pixels."""
    noise = np.random.default_rng(0).integers(-20, 21, (3000, 4000, 3))
    pixels = np.asarray(scene(2.5, 6).resize((4000, 3000), Image.NEAREST)) + noise
    path = tmp_path / "large.jpg"
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=99)
    assert 10 * 2**20 < path.stat().st_size < MOST_BYTES
    app.input.set_input_files(path)
    app.status("Looks most like landmark 006.")


def test_thirty_photos_in_a_row(app):
    for number in range(30):
        app.input.set_input_files(photo_of(number * 7 % LANDMARKS))
        app.shows(number * 7 % LANDMARKS)


def test_two_people_at_once(app, browser, address):
    other = App(browser.new_page())
    other.page.set_default_timeout(60_000)
    other.open(address)
    for number in range(4):
        app.input.set_input_files(photo_of(number))
        other.input.set_input_files(photo_of(9 - number))
        app.shows(number)
        other.shows(9 - number)
    other.page.get_by_label("Photos to show").select_option("4")
    other.shows(6, photos=4)
    app.shows(3, photos=8)
    other.page.goto("about:blank")
    other.page.close()


@pytest.mark.usefixtures("own_page")
def test_a_page_whose_kernel_was_culled_starts_again(app):
    """It stayed, and answered to nothing."""
    app.input.set_input_files(photo_of(2))
    app.shows(2)
    status = app.page.evaluate("""async () => {
      const config = JSON.parse(document.getElementById("jupyter-config-data").textContent);
      const xsrf = document.cookie.match(/_xsrf=([^;]*)/)[1];
      const options = { method: "DELETE", headers: { "X-XSRFToken": xsrf } };
      return (await fetch(`${config.baseUrl}api/kernels/${config.kernelId}`, options)).status;
    }""")
    assert status == 204
    app.page.evaluate("dispatchEvent(new Event('focus'))")
    app.status(f"{LANDMARKS * PHOTOS} photos ready.")
    app.input.set_input_files(photo_of(4))
    app.shows(4)
    assert all("404" in error for error in app.page.errors)  # how the page finds it out
    app.page.errors.clear()


def test_dropped_and_pasted(app):
    hand_over = """([kind, bytes]) => {
      const data = new DataTransfer();
      data.items.add(new File([new Uint8Array(bytes)], "photo.jpg", { type: "image/jpeg" }));
      const event = kind === "paste"
        ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true })
        : new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
      document.querySelector(kind === "beside" ? "h1" : ".photo-drop").dispatchEvent(event);
    }"""
    for landmark, kind in enumerate(("drop", "beside", "paste")):
        app.page.evaluate(hand_over, [kind, list(photo_of(landmark)["buffer"])])
        app.shows(landmark)


def test_samples_what_matched_and_more_like_this(app):
    samples = app.page.locator(".sample")
    assert samples.count() == 8
    assert "data:image/jpeg" in samples.first.evaluate("e => getComputedStyle(e).backgroundImage")
    samples.nth(7).click()
    app.shows(9)
    # The sample itself is not among the results: three photos of its landmark are left.
    own = [app.photos.nth(i).get_attribute("alt") for i in range(8)]
    assert sum("landmark 009" in text for text in own) == PHOTOS - 1
    app.page.get_by_title("Show what matched in result 2, landmark 009").click()
    pair = app.page.locator(".why img")
    api.expect(pair).to_have_count(2)
    assert pair.nth(1).get_attribute("alt") == "result 2, bright where it matches"
    app.status("What matched between your photo and result 2 is shown.")
    fourth = re.search(r"landmark (\d+)", own[3])[1]
    app.page.get_by_title("Search with result 4,").click()
    app.shows(int(fourth))
    api.expect(pair).to_have_count(0)


@pytest.mark.usefixtures("own_page")
def test_a_folder_of_ones_own(app, root):
    folder = app.page.get_by_label("A folder of yours")
    button = app.page.get_by_role("button", name="Search in this folder")
    for typed in ("", "../gallery", "/etc", str(root / "run"), "nowhere"):
        folder.fill(typed)
        folder.blur()
        button.click()
        app.page.get_by_role("alert").wait_for()
        assert str(root) not in app.page.get_by_role("alert").text_content()
        app.input.set_input_files(photo_of(2))
        app.shows(2)
    folder.fill("Pictures")
    button.click()
    app.status("12 photos ready. 1 file could not be read.")
    app.input.set_input_files(photo_of(LANDMARKS))
    app.shows(LANDMARKS)
    app.page.get_by_label("Search in").select_option("the gallery")
    app.status("60 photos ready.")


def tab_to(page, locator):
    """Press Tab until an element has the focus."""
    for _ in range(60):
        if locator.evaluate("e => e === document.activeElement"):
            return
        page.keyboard.press("Tab")
    pytest.fail("Tab does not get there")


@pytest.mark.usefixtures("own_page")
def test_by_the_keyboard_alone(app):
    # From here on Playwright waits for file choosers; begun later, it may miss the first one.
    app.page.on("filechooser", lambda chooser: None)
    tab_to(app.page, app.page.locator(".sample").first)
    app.page.keyboard.press("Enter")
    app.shows(0)
    tab_to(app.page, app.input)
    zone = app.page.locator(".photo-drop")
    assert zone.evaluate("e => getComputedStyle(e).outlineWidth") == "3px"
    with app.page.expect_file_chooser() as chooser:
        app.page.keyboard.press("Space")
    chooser.value.set_files(photo_of(4))
    app.shows(4)
    tab_to(app.page, app.page.get_by_label("Photos to show"))
    app.page.keyboard.press("ArrowUp")
    app.shows(4, photos=4)
    why = app.page.get_by_title("Show what matched in result 1,")
    tab_to(app.page, why)
    assert why.evaluate("e => getComputedStyle(e).outlineWidth") == "3px"
    app.page.keyboard.press("Space")
    app.page.locator(".why img").first.wait_for()


def drag(app, start, end):
    """Draw on the query, between two places given as shares of its width and height."""
    at = app.page.locator(".photo-box img").bounding_box()
    for move, (x, y) in enumerate((start, end)):
        app.page.mouse.move(at["x"] + x * at["width"], at["y"] + y * at["height"], steps=4)
        (app.page.mouse.up if move else app.page.mouse.down)()


def touch(app, start, end):
    """The same with a finger."""
    at = app.page.locator(".photo-box img").bounding_box()
    session = app.page.context.new_cdp_session(app.page)
    for kind, share in (("touchStart", start), ("touchMove", end), ("touchEnd", None)):
        x, y = share or (0, 0)
        point = {"x": at["x"] + x * at["width"], "y": at["y"] + y * at["height"]}
        event = {"type": kind, "touchPoints": [point] if share else []}
        session.send("Input.dispatchTouchEvent", event)


def two_scenes(left, right):
    """A photo of two landmarks side by side, as Playwright hands it over."""
    photo = Image.new("RGB", (320, 120))
    photo.paste(scene(2.5, left))
    photo.paste(scene(2.5, right), (160, 0))
    return photo_of(0) | {"buffer": jpeg(photo)}


@pytest.mark.usefixtures("own_page")
def test_a_box_searches_with_a_part(app):
    """Drawn by mouse, finger and keyboard."""
    frame, mark = app.page.locator(".photo-box .frame"), app.page.locator(".photo-box .mark")
    api.expect(frame).to_be_hidden()
    app.input.set_input_files(two_scenes(2, 7))
    app.status("(exact).")
    drag(app, (0.99, 0.99), (0.5, 0.01))
    app.shows(7)
    app.status("for the middle right part, 157 x")
    share = mark.bounding_box()["width"] / frame.bounding_box()["width"]
    assert 0.45 < share < 0.5
    drag(app, (0.7, 0.5), (0.705, 0.5))  # a click clears it
    app.status("(exact).")
    api.expect(mark).to_be_hidden()
    touch(app, (0.01, 0.01), (0.5, 0.99))
    app.shows(2)
    app.status("for the middle left part, 157 x")
    app.page.get_by_role("button", name="Whole photo").click()
    app.status("(exact).")
    api.expect(frame).to_be_focused()
    app.page.keyboard.press("Enter")
    app.status("for the middle part, 160 x 60 pixels.")
    for key in (*5 * ["ArrowRight"], "ArrowDown", "Shift+ArrowLeft", "Shift+ArrowUp"):
        app.page.keyboard.press(key)
    app.status("for the middle right part, 144 x 54 pixels.")
    app.shows(7)
    for _ in range(20):
        app.page.keyboard.press("ArrowLeft")
    app.status("for the middle left part, 144 x 54 pixels.")
    app.page.keyboard.press("Escape")
    app.status("(exact).")
    api.expect(mark).to_be_hidden()
    app.page.keyboard.press("Enter")
    app.status("for the middle part, 160 x 60 pixels.")
    app.input.set_input_files(photo_of(3))  # another photo has no box
    app.shows(3)
    api.expect(mark).to_be_hidden()


def test_a_photo_opens_large_and_closes(app):
    app.input.set_input_files(photo_of(4))
    app.shows(4)
    button, dialog = app.page.get_by_title("Open result 2,"), app.page.locator("dialog")
    tab_to(app.page, button)
    for close in ("Escape", "Enter"):
        app.page.keyboard.press("Enter")
        api.expect(dialog).to_be_visible()
        photo = dialog.locator("img")
        assert re.fullmatch(r"landmark_004/\d\.jpg", photo.get_attribute("alt"))
        assert photo.evaluate("e => [e.naturalWidth, e.naturalHeight]") == [160, 120]
        assert dialog.evaluate("e => e.matches(':modal')")
        app.page.keyboard.press(close)  # the button to close it has the focus
        api.expect(dialog).to_be_hidden()
        api.expect(button).to_be_focused()


def sample(name, box, longest=640):
    """A part of one of scikit-learn's sample photographs."""
    photo = Image.fromarray(load_sample_image(f"{name}.jpg")).crop(box)
    photo.thumbnail((longest, longest))
    return photo


@pytest.fixture(scope="module")
def own_photos(tmp_path_factory):
    """Photographs in folders of months, two of them copies; and the page that searches them."""
    home = tmp_path_factory.mktemp("own")
    photos = home / "Us & <i>them"
    for name in ("china", "flower"):
        for number in range(5):
            folder = photos / f"2024/{5 + number % 2:02}"
            folder.mkdir(parents=True, exist_ok=True)
            part = sample(name, (70 * number, 40 * number, 70 * number + 340, 40 * number + 260))
            part.save(folder / f"{name} {number}.jpg")
    for folder in (home / "home", photos / "sent"):
        folder.mkdir()
    sample("china", (0, 0, 340, 260), 170).save(photos / "sent/<i>small.jpg", quality=80)
    program = [*changed(OWN_PHOTOS=str(home / "run")), "--photos", photos]
    with serve(home, home, program) as address:
        yield address


def test_photos_of_ones_own(page, own_photos):
    """With the packaged network: no landmarks, one tile for copies, a box, a photo opened large."""
    app = App(page)
    page.goto(own_photos)
    app.status("11 photos ready.")
    assert page.title() == "Search in Us & <i>them"
    api.expect(page.get_by_role("heading", level=1)).to_have_text("Search with a photo")
    both = Image.new("RGB", (680, 260))
    both.paste(sample("flower", (0, 0, 340, 260)))
    both.paste(sample("china", (0, 0, 340, 260)), (340, 0))
    app.input.set_input_files(photo_of(0) | {"buffer": jpeg(both)})
    app.status("this place. 11 photos searched")
    drag(app, (0.51, 0.02), (0.99, 0.98))
    app.status("for the middle right part")
    first = page.locator(".app-cell").first
    api.expect(first.locator("img")).to_have_attribute("alt", re.compile("china 0|small"))
    assert page.locator(".votes").count() == 0
    api.expect(first.locator(".verdict")).to_have_text("same place")
    copies = first.locator("details")
    api.expect(copies.locator("li")).to_be_hidden()
    copies.locator("summary").click()
    api.expect(copies.locator("li")).to_have_text(re.compile("china 0|<i>small"))
    nothing_serious(page)
    first.get_by_title("Show what matched in result 1,").click()
    page.locator(".why img").first.wait_for()
    first.get_by_title("Open result 1,").click()
    page.locator("dialog img").wait_for()
    nothing_serious(page)
    page.get_by_role("button", name="Close").click()
    page.get_by_label("Copies").select_option("one by one")
    api.expect(page.locator(".app-cell details")).to_have_count(0)
    page.goto("about:blank")


def nothing_serious(page):
    """To axe-core."""
    result = axe.Axe().run(page).response
    assert len(result["passes"]) > 15
    bad = [v for v in result["violations"] if v["impact"] in ("serious", "critical")]
    assert bad == [], [(v["id"], [node["html"] for node in v["nodes"]]) for v in bad]


@pytest.mark.usefixtures("own_page")
def test_usable_for_everybody(app):
    """axe-core finds nothing serious, before and after an answer, and with a message of failure."""
    states = [
        lambda: None,
        lambda: (app.input.set_input_files(photo_of(5)), app.shows(5)),
        lambda: app.page.get_by_title("Show what matched in result 1,").click(),
        lambda: app.page.locator(".why img").first.wait_for(),
        lambda: app.input.set_input_files(photo_of(5) | {"buffer": b"no photo"}),
        lambda: app.page.get_by_role("alert").wait_for(),
    ]
    for reach in states:
        reach()
        nothing_serious(app.page)
    assert app.page.evaluate("document.documentElement.lang") == "en"
    assert app.page.title() == "Landmark search"


def test_a_narrow_window_needs_no_scrolling_to_the_side(app):
    app.input.set_input_files(photo_of(5))
    app.shows(5)
    for width in (420, 1000, 1400):
        app.page.set_viewport_size({"width": width, "height": 900})
        width_of_page = app.page.evaluate("document.documentElement.scrollWidth")
        assert width_of_page <= width


def request(url, method="GET", **headers):
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, method=method, headers=headers), timeout=120
        ) as got:
            content, end = b"", time.monotonic() + 180
            while part := got.read1():  # signs of life of a page that never comes go on for ever
                content += part
                assert time.monotonic() < end, "the page does not come"
            return got.status, got.url, content.decode()
    except urllib.error.HTTPError as error:
        return error.code, url, error.read().decode()


def test_the_page_is_for_this_machine_and_this_user(address):
    base, _, token = address.partition("?token=")
    assert base.startswith("http://127.0.0.1:") and len(token) > 30
    _, url, content = request(base)
    assert "/login" in url and "search-app" not in content  # without the token
    assert request(address, Host="example.org")[0] == 403  # another site's name for 127.0.0.1
    port = int(re.search(r":(\d+)/", base)[1])
    listening = Path("/proc/net/tcp")
    if listening.is_file():  # Linux
        local = [line.split()[1] for line in listening.read_text().splitlines()[1:]]
        assert {a.split(":")[0] for a in local if a.endswith(f":{port:04X}")} == {"0100007F"}
    for path in ("voila/files/search_app.ipynb", f"voila/files/{ENGINE}", "voila/files/../x"):
        assert request(f"{base}{path}?token={token}")[0] in (403, 404)


def kernel_of(content):
    return re.search(r'"kernelId": *"([^"]+)"', content)[1]


def host_of(address):
    return re.search(r"//([^/]+)/", address)[1]


def connect(address, kernel, query="", **headers):
    """Ask for a connection to a kernel; returns it, and the status of the answer."""
    connection = http.client.HTTPConnection(host_of(address), timeout=60)
    headers |= {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
    headers |= {"Sec-WebSocket-Key": "A" * 22 + "=="}
    connection.request("GET", f"/api/kernels/{kernel}/channels{query}", headers=headers)
    return connection, connection.getresponse().status


def test_no_other_site_gets_a_connection_to_the_kernel(app):
    """The user's cookies come with its request."""
    cookies = "; ".join(f"{c['name']}={c['value']}" for c in app.page.context.cookies())
    kernel = kernel_of(app.page.content())
    status = []
    host = host_of(app.page.url)
    for origin in (f"http://{host}", "http://example.org", f"http://{host}.example.org", "null"):
        connection, answer = connect(app.page.url, kernel, Origin=origin, Cookie=cookies)
        status.append(answer)
        connection.close()
    assert status == [101, 403, 403, 403]


SEND_CODE = """async ([kernel, code]) => {
  const socket = new WebSocket(`ws://${location.host}/api/kernels/${kernel}/channels`);
  await new Promise((resolve) => (socket.onopen = resolve));
  const send = (channel, msg_type, content) => {
    const date = new Date().toISOString(), msg_id = `${channel} ${msg_type}`;
    const header = { msg_id, msg_type, session: "s", username: "", date, version: "5.3" };
    const message = { channel, header, parent_header: {}, metadata: {}, content, buffers: [] };
    socket.send(JSON.stringify(message));
  };
  const answers = [];
  const last = new Promise((resolve) => {
    socket.onmessage = ({ data }) => {
      const { msg_type, parent_header } = JSON.parse(data);
      answers.push(`${parent_header.msg_id}: ${msg_type}`);
      if (parent_header.msg_id === "shell kernel_info_request" && msg_type === "kernel_info_reply")
        resolve();
    };
  });
  for (const channel of ["control", "shell"]) {
    send(channel, "execute_request", { code, silent: false, user_expressions: {} });
    send(channel, "complete_request", { code: "run_d", cursor_pos: 5 });
    send(channel, "inspect_request", { code: "run_dir", cursor_pos: 5, detail_level: 0 });
  }
  send("shell", "kernel_info_request", {});
  await last;
  socket.close();
  return answers;
}"""


def test_a_page_can_send_no_code_to_the_kernel(app, tmp_path):
    """Nor ask what is in it; what is sent last is allowed, and is answered."""
    code = f"open({str(tmp_path / 'executed')!r}, 'w')"
    answers = app.page.evaluate(SEND_CODE, [kernel_of(app.page.content()), code])
    assert "shell kernel_info_request: kernel_info_reply" in answers
    assert not re.search("(execute|complete|inspect)_", " ".join(answers))
    assert not (tmp_path / "executed").exists()


class Kernels:
    """Those of a server."""

    def __init__(self, address):
        self.base, _, self.token = address.partition("?token=")

    def request(self, kernel, method="GET"):
        return request(f"{self.base}api/kernels/{kernel}?token={self.token}", method)

    def lives(self, kernel):
        status = self.request(kernel)[0]
        assert status in (200, 404)
        return status == 200

    def wait_for_end(self, kernel):
        wait_for(lambda: not self.lives(kernel), seconds=120)  # that of a vanished page lives on


LEAVE_AT_ONCE = """
new MutationObserver((_, observer) => {
  const config = document.getElementById("jupyter-config-data")?.textContent.trim();
  if (!config?.endsWith("}")) return;
  observer.disconnect();
  location = `about:blank#${JSON.parse(config).kernelId}`;
}).observe(document, { childList: true, subtree: true });
"""


def test_a_page_that_is_reloaded_or_left_ends_its_kernel(page, address):
    """Also before its scripts are loaded, of which one does the same."""
    kernels = Kernels(address)
    App(page).open(address)
    first = kernel_of(page.content())
    assert kernels.lives(first)
    page.add_init_script(LEAVE_AT_ONCE)
    page.reload(wait_until="commit")
    kernels.wait_for_end(first)
    page.wait_for_url("about:blank#*", wait_until="commit")
    second = page.url.partition("#")[2]
    assert second and second != first
    kernels.wait_for_end(second)


def test_the_kernel_of_a_page_that_vanished_ends(root, tmp_path):
    """Not before, however long it was idle before there was a page for it."""
    idle = 8  # seconds; a kernel that starts on a busy machine must not be taken for an idle one
    with serve(root, tmp_path, changed(_IDLE=idle, _IDLE_CHECK=1)) as address:
        kernels = Kernels(address)
        kernel = kernel_of(request(address)[2])
        connection, status = connect(address, kernel, f"?token={kernels.token}")
        assert status == 101
        time.sleep(idle + 2)
        assert kernels.lives(kernel)
        connection.close()
        kernels.wait_for_end(kernel)
        # Meanwhile one was made in advance, and had nothing to do.
        start = time.monotonic()
        kernels.wait_for_end(kernel_of(request(address)[2]))
        assert time.monotonic() - start >= idle


def test_one_page_too_many_is_told_so(root, tmp_path):
    """Asked for together or one after the other, until one was ended, or left before it came."""
    # A kernel that was made in advance would make a page that can't be left before it comes.
    with serve(root, tmp_path, changed(MOST_KERNELS=2, READY=0)) as address:
        kernels = Kernels(address)
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(request, [address] * 3))
        assert sorted(status for status, _, _ in answers) == [200, 200, 503]
        refused = [content for status, _, content in [*answers, request(address)] if status == 503]
        assert len(refused) == 2
        assert all(text.startswith("Too many pages of the app are open") for text in refused)
        page = next(content for status, _, content in answers if status == 200)
        kernels.request(kernel_of(page), "DELETE")
        left = urllib.request.urlopen(address, timeout=120)  # its first lines; the kernel starts
        assert request(address)[0] == 503
        left.close()
        wait_for(lambda: request(address)[0] == 200, seconds=120)


def test_in_jupyterlab(browser, page, root, tmp_path_factory):
    """The notebook itself, its first half, with this run's parameters."""
    parameters = {"run_dir": str(root / "run"), "gallery_dir": str(root / "gallery")}
    write_page_notebook(NOTEBOOK, root / "app.ipynb", parameters)
    with start_lab(root, tmp_path_factory.mktemp("lab")) as lab:
        run_all(page, lab("app"))
        app = App(page)
        app.status(f"{LANDMARKS * PHOTOS} photos ready.")
        app.input.set_input_files(photo_of(8))
        app.shows(8)
        page.goto("about:blank")  # it would complain about the end of the server
        assert nbformat.read(root / "app.ipynb", as_version=4).cells[0].metadata.tags == [
            "parameters"
        ]
