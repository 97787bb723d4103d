"""The search app's widget and its page, without a browser (see test_app_browser.py)."""

import base64
import io
import logging
import os
import tempfile
from dataclasses import replace

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from lib.app import page as app_page
from lib.app.answer import Question
from lib.app.box import LEAST
from lib.app.drop import PhotoDrop
from lib.app.gallery import SearchError, landmark_of, open_gallery
from lib.app.upload import MOST_BYTES
from lib.app.widget import LARGE, SAMPLES, SearchApp, _thumbnail
from lib.files import only_writer
from lib.network.engine import ENGINE
from lib.search.embedding import EmbeddingJobError, JobBusyError
from tests.app.test_answer import colour, fake_engine, shapes, with_views

ODD = '<b>a & "b"'


@pytest.fixture
def folder(tmp_path):
    """Three photos of each of twelve landmarks, one of them with an odd name."""
    for landmark in range(12):
        name = ODD if landmark == 11 else f"landmark_{landmark:02}"
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(3):
            path = tmp_path / "photos" / name / f"{number}.png"
            Image.fromarray(colour(number, landmark)).save(path)
    return tmp_path / "photos"


@pytest.fixture
def app(folder, tmp_path):
    engine = fake_engine()
    gallery = open_gallery(engine, folder, tmp_path / "jobs")
    return SearchApp(engine, gallery, tmp_path / "jobs", folders_root=tmp_path)


def png(landmark):
    buffer = io.BytesIO()
    Image.fromarray(colour(4, landmark)).save(buffer, "PNG")
    return buffer.getvalue()


# What a browser does.


def send(drop, content, piece=1000):
    for start in range(0, max(len(content), 1), piece):
        part = memoryview(content)[start : start + piece]
        drop._on_message(drop, {"start": start, "size": len(content)}, [part])


def button(app, rank, which):
    return app._grid.children[rank].children[1].children[which]


def draw(app, *box):
    app._box._on_message(app._box, {"box": list(box)}, [])


def shown_large(app, monkeypatch, rank):
    sent = []
    monkeypatch.setattr(app._large, "send", sent.append)
    button(app, rank, 2).click()
    return sent


def results(app):
    return [cell.children[0].value for cell in app._grid.children]


def test_a_photo_in_pieces_is_answered(app):
    assert app.answer is None and "36 photos ready" in app._status.value
    send(app._drop, png(5), piece=50)
    assert landmark_of(app.answer.names[0]) == "landmark_05" and len(results(app)) == 8
    assert "Looks most like landmark 05." in app._status.value
    assert 'alt="Result 1: landmark 05, similarity 1.00"' in results(app)[0]
    assert app._votes.value.index("landmark 05") < app._votes.value.index("%")
    app._k.value = 24
    assert len(results(app)) == 24 and len(set(app.answer.names)) == 24


def test_names_are_text_not_html(app):
    send(app._drop, png(11))
    assert "&lt;b&gt;a &amp; &quot;b&quot;" in results(app)[0] and "<b>" not in results(app)[0]
    assert "<b>" not in app._votes.value + app._status.value


@pytest.mark.parametrize(
    ("content", "buffers"),
    [
        ({"start": 0, "size": 10}, []),
        ({"start": 5, "size": 10}, [b"12345"]),
        ({"start": 0, "size": 3}, [b"12345"]),
        ({"start": "0", "size": 5}, [b"12345"]),
        ({"start": 0}, [b"12345"]),
        ({"refused": "much"}, []),
        ("hello", []),
        (None, []),
    ],
)
def test_what_a_browser_does_not_send_is_dropped(app, content, buffers):
    app._drop._on_message(app._drop, content, buffers)
    assert app.answer is None and "36 photos ready" in app._status.value
    send(app._drop, png(5))
    assert landmark_of(app.answer.names[0]) == "landmark_05"


def photo_with(part, at):
    """A photo that shows a part at a place, as a PNG file."""
    wall = Image.new("RGB", (200, 100), "grey")
    wall.paste(Image.fromarray(part).resize((48, 48), Image.Resampling.NEAREST), at)
    wall.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("views", [False, True])
def test_a_box_searches_with_a_part_in_full_resolution(folder, tmp_path, views):
    engine = with_views(fake_engine()) if views else fake_engine()
    app = SearchApp(engine, open_gallery(engine, folder, tmp_path / "jobs"), tmp_path / "jobs")
    content, box = photo_with(colour(4, 5), (140, 2)), (140, 2, 188, 50)
    send(app._drop, content)
    whole = app.answer.similarities
    assert app._box.sides == [200, 100] and app._box.box == []
    draw(app, *box)
    part = app.search.read(io.BytesIO(content), box)
    np.testing.assert_array_equal(app._query.upload.pixels, part)
    expected = app.search.answer(part, Question(8, fold=True))
    assert app.answer.names == expected.names and whole[0] < app.answer.similarities[0] > 0.98
    assert landmark_of(app.answer.names[0]) == "landmark_05" and app._box.box == list(box)
    assert "for the upper right part, 48 x 48 pixels." in app._status.value
    button(app, 0, 1).click()
    assert "the part of your photo, bright where" in app._why.value
    app._k.value = 4  # the box stays
    np.testing.assert_array_equal(app._query.upload.pixels, part)
    draw(app)
    assert app._box.box == [] and "part" not in app._status.value
    np.testing.assert_allclose(app.answer.similarities, whole[:4], atol=1e-6)


def test_a_box_on_a_photo_of_the_gallery(app):
    app._samples.children[3].click()
    query, without = app._query.name, app.answer.names
    draw(app, 0, 0, 24, 12)
    assert query not in app.answer.names and app._query.name == query
    assert app.answer.names != without and "upper middle part, 24 x 12 pixels" in app._status.value
    (app.search.gallery.folder / query).unlink()
    draw(app)
    assert "This photo can no longer be read." in app._status.value
    draw(app, 0, 0, 12, 12)
    send(app._drop, png(5))
    assert app._box.box == [] and "part" not in app._status.value


@pytest.mark.parametrize(
    "box",
    [
        *([0, 0, 10, 25], [-1, 0, 10, 10], [10, 0, 0, 10], [0, 0, 24, LEAST - 1], [0, 0, 24]),
        *([0, 0, 10, float("nan")], [0, 0, float("inf"), 24], [0, 0, 10, "24"], [0, 0, True, 24]),
        *([0, 0, 10**400, 24], [0, 0, 10, None], "0 0 10 10", None, [[0, 0, 10, 10]], 5),
    ],
)
def test_a_box_that_is_none_is_ignored(app, box):
    app._box._on_message(app._box, {"box": box}, [])
    draw(app, 0, 0, 10, 10)  # before there is a photo
    assert app.answer is None
    send(app._drop, png(5))
    answer = app.answer
    app._box.sides = [10**6, 10**6]  # which a browser may set
    app._box._on_message(app._box, {"box": box}, [])
    assert app.answer is answer and app._query.box is None


def test_a_photo_opens_large_in_its_own_shape(app, folder, monkeypatch):
    photo = shapes(3).resize((3000, 1000))
    photo.save(folder / ODD / "0.png")
    photo.save(folder / "landmark_05" / "0.png")
    send(app._drop, png(5))
    rank = app.answer.names.index("landmark_05/0.png")
    (sent,) = shown_large(app, monkeypatch, rank)
    content = base64.b64decode(sent["uri"].partition(",")[2])
    assert sent["name"] == "landmark_05/0.png"
    assert Image.open(io.BytesIO(content)).size == (LARGE, round(LARGE / 3))
    (folder / "landmark_05" / "0.png").unlink()
    assert shown_large(app, monkeypatch, rank) == []
    assert "This photo can no longer be read." in app._status.value


def test_copies_are_one_tile_or_one_by_one(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(6):
        shapes(seed).save(folder / f"{seed}.png")
    shapes(2).save(folder / "<b>copy.jpg", quality=80)
    engine = with_views(fake_engine())
    app = SearchApp(engine, open_gallery(engine, folder, tmp_path / "jobs"), tmp_path / "jobs")
    shapes(2).resize((100, 75)).save(file := io.BytesIO(), "PNG")
    send(app._drop, file.getvalue())
    assert len(app.answer.names) == 6 and {app.answer.names[0], *app.answer.copies[0]} == {
        *("2.png", "<b>copy.jpg")
    }
    assert "<summary>+1 copy</summary>" in results(app)[0] and "<b>" not in results(app)[0]
    assert "".join(results(app)).count("<details") == 1
    app._fold.value = False
    assert len(app.answer.names) == 7 and "<details" not in "".join(results(app))


def test_folders_that_are_no_landmarks_are_not_named_so(folder, tmp_path):
    """The vote was for a month."""
    months = tmp_path / "months"
    for path in folder.glob("*/*.png"):
        (months / path.stem).mkdir(parents=True, exist_ok=True)
        path.rename(months / path.stem / f"{path.parent.name.strip('<>')}.png")
    engine = with_views(fake_engine())
    app = SearchApp(engine, open_gallery(engine, months, tmp_path / "jobs"), tmp_path / "jobs")
    assert "<h1>Search with a photo</h1>" in app._head.value
    assert "landmark" not in app._head.value.rpartition("</style>")[2]
    assert len(app._samples.children) == SAMPLES
    send(app._drop, png(5))
    assert "None of your photos shows this place" in app._status.value
    assert app._votes.value == "" and "only similar" in "".join(results(app))
    assert ". 1/landmark 05.png</span>" in "".join(results(app))


def test_no_more_is_kept_than_may_come():
    photos = []
    drop = PhotoDrop(photos.append, pytest.fail)
    half = bytes(MOST_BYTES // 2)
    for start in (0, len(half), 2 * len(half)):
        drop._on_message(drop, {"start": start, "size": 10 * MOST_BYTES}, [half])
    assert len(drop._received) <= MOST_BYTES and photos == []


def test_a_failure_is_one_line_for_the_user_and_a_traceback_for_the_log(app, caplog):
    def fails(photos):
        raise RuntimeError("/secret/path is broken")

    engine = app.search.engine
    app.search.engine = replace(engine, compute=fails)
    with caplog.at_level(logging.ERROR):
        send(app._drop, png(5))
    assert "That went wrong, and was noted." in app._status.value
    assert "secret" not in app._status.value and 'role="alert"' in app._status.value
    assert "/secret/path is broken" in caplog.text and "Traceback" in caplog.text
    app.search.engine = engine
    send(app._drop, png(5))
    assert "Looks most like landmark 05." in app._status.value


KERNEL = """
from pathlib import Path
from lib.app.widget import Gallery, SearchApp
from tests.app.test_answer import fake_engine
app = SearchApp(fake_engine(), Gallery(Path("x"), [], None, 0), Path("x"))
app.search = None
app._on_gallery_photo("/secret/path")
"""


def test_the_log_goes_to_the_terminal_of_the_server_and_not_into_the_page(tmp_path):
    """What a kernel writes to stderr is sent to the browser: it was the traceback."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(KERNEL)])
    with (tmp_path / "terminal").open("w") as terminal:
        # Below pytest, ipykernel would leave alone what is written past Python's sys.stderr.
        env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
        root = str(app_page.project_root())
        NotebookClient(notebook, kernel_name="python3").execute(cwd=root, stderr=terminal, env=env)
    told = str(notebook)  # outputs, and what the widgets show
    assert "AttributeError" in (tmp_path / "terminal").read_text()
    assert "That went wrong" in told and "Traceback" not in told


def test_a_sample_is_not_compared_with_itself(app):
    samples = app._samples.children
    assert len(samples) == SAMPLES
    samples[0].click()
    query = app.search.gallery.names[0]
    assert query not in app.answer.names and landmark_of(app.answer.names[0]) == landmark_of(query)
    more, why = button(app, 1, 0), button(app, 1, 1)
    second = app.answer.names[1]
    why.click()
    assert app._why.value.count("<img") == 2 and "result 2, bright where" in app._why.value
    more.click()
    assert second not in app.answer.names and app._why.value == ""


def test_a_photo_that_is_gone_is_named_so_and_stops_nothing(app, folder):
    """It was a grey picture that was called the photo."""
    (folder / "landmark_05" / "1.png").unlink()
    send(app._drop, png(5))
    assert "landmark_05/1.png" in app.answer.names and len(results(app)) == 8
    for name, result in zip(app.answer.names, results(app), strict=True):
        gone = name == "landmark_05/1.png"
        assert result.count("landmark 05 (file gone or unreadable)") == 2 * gone  # alt, caption
    assert "Gone or unreadable: 1 file of those shown." in app._status.value
    send(app._drop, png(6))
    app._k.value = 4
    assert "unreadable" not in app._status.value + "".join(results(app))
    send(app._drop, png(5))
    for which in range(2):
        button(app, app.answer.names.index("landmark_05/1.png"), which).click()
        assert "This photo can no longer be read." in app._status.value
    app._show_gallery()
    assert len(app._samples.children) == SAMPLES
    (folder / app.search.gallery.names[0]).unlink()
    app._thumbnail.cache_clear()
    app._show_gallery()
    assert len(app._samples.children) == SAMPLES - 1


def test_a_folder_of_ones_own(app, tmp_path):
    (tmp_path / "mine" / "harbour").mkdir(parents=True)
    for number in range(40):
        Image.fromarray(colour(number % 5, number)).save(
            tmp_path / "mine/harbour" / f"{number}.png"
        )
    (tmp_path / "mine" / "phone.jxl").touch()
    seen = []
    app._progress.observe(lambda change: seen.append(change.new), "value")
    app._folder.value = "mine"
    app._open.click()
    assert "40 photos ready. Left out: 1 .jxl files." in app._status.value
    assert app._where.value == "mine"
    assert ["of 40 photos" in text for text in seen] == [True, True, False]
    assert 'value="32"' in seen[0] and 'aria-label="Photos read"' in seen[0]
    assert seen[1].endswith(" per second, 00:00 left")
    send(app._drop, png(30))
    assert app.answer.names[0] == "harbour/30.png"
    app._where.value = "the gallery"
    assert app.answer is None and "36 photos ready." in app._status.value
    for typed in ("", "mine/harbour/3.png", "../photos/..", "jobs"):
        app._folder.value = typed
        app._open.click()
        assert 'role="alert"' in app._status.value and str(tmp_path) not in app._status.value
        assert not app._open.disabled and app._where.value == "the gallery"


def test_a_folder_opened_again_shows_its_new_photo(app, tmp_path):
    """The dropdown kept its value, so nothing was told and the old gallery stayed."""
    (tmp_path / "mine" / "harbour").mkdir(parents=True)
    Image.fromarray(colour(0, 1)).save(tmp_path / "mine/harbour/0.png")
    for number in (1, 2):
        app._folder.value = "mine"
        app._open.click()
        assert f"{number} photo" in app._status.value and "ready" in app._status.value
        assert len(app.search.gallery.names) == number
        Image.fromarray(colour(1, 1)).save(tmp_path / "mine/harbour/1.png")


def test_a_link_out_of_the_gallery_shows_nothing(app, folder, tmp_path):
    """A photo replaced by a link to a place outside was shown."""
    secret = tmp_path / "secret.png"
    Image.fromarray(colour(0, 5)).save(secret)
    (folder / "landmark_05" / "0.png").unlink()
    (folder / "landmark_05" / "0.png").symlink_to(secret)
    with pytest.raises(SearchError, match="no longer in the folder"):
        app.search.photo("landmark_05/0.png")
    assert _thumbnail(app.search.gallery, "landmark_05/0.png") == ""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (EmbeddingJobError("job.json is damaged"), "The stored embeddings of this folder can"),
        (JobBusyError("busy"), "being read in another window"),
    ],
)
def test_a_job_that_fails_is_told_by_its_kind(app, tmp_path, monkeypatch, error, line):
    """Every such error was called "being read in another window"."""

    def fails(*_):
        raise error

    (tmp_path / "mine").mkdir()
    monkeypatch.setattr("lib.app.widget.open_gallery", fails)
    app._folder.value = "mine"
    app._open.click()
    assert line in app._status.value and 'role="alert"' in app._status.value


# ---- The page


def run_main(tmp_path, monkeypatch, gallery, fails=None, *options):
    """The page's command with a fake network; returns its status and what it would serve."""
    served = []
    monkeypatch.setattr(app_page, "open_engine", lambda run: fake_engine())
    monkeypatch.setattr(app_page, "serve", lambda page, *_: served.append((page, page.read_text())))
    if fails:
        monkeypatch.setattr(
            "lib.app.gallery.open_gallery", lambda *_, **__: (_ for _ in ()).throw(fails)
        )
    places = "--run-dir", str(tmp_path), "--gallery", str(gallery)
    return app_page.main([*places, *options]), served


def test_each_page_has_a_notebook_of_its_own(folder, tmp_path, monkeypatch):
    """All pages of a run shared a file: the second's folders became those of the first."""
    other = folder / "landmark_00"
    (first,), (second,) = (run_main(tmp_path, monkeypatch, f)[1] for f in (folder, other))
    assert first[0] != second[0] and str(other) not in first[1] and str(other) in second[1]
    assert not first[0].parent.exists() and not list(tmp_path.glob("*.ipynb"))


def test_the_title_says_what_is_searched(folder, tmp_path, monkeypatch):
    """It was "Landmark search" for own photos, too."""
    monkeypatch.setattr(app_page, "packaged_engine", lambda run: fake_engine())
    monkeypatch.setattr(app_page, "OWN_PHOTOS", str(tmp_path / "run"))
    own = ["--photos", f"{folder}/."]
    for title, options in {"Landmark search": [], "Search in photos": own}.items():
        status, ((_, notebook),) = run_main(tmp_path, monkeypatch, folder, None, *options)
        assert status == 0 and nbformat.reads(notebook, 4).metadata.title == title


def test_folders_of_killed_servers_are_removed(tmp_path, monkeypatch):
    """Each left its notebook and its kernels' files in the system's temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("dead", "served", "young", "foreign"):
        folder = tmp_path / (name if name == "foreign" else f"landmark_search_{name}")
        (folder / "voila_x").mkdir(parents=True)
        os.utime(folder, times=None if name == "young" else (0, 0))
    (tmp_path / "landmark_search_link").symlink_to(tmp_path / "foreign")
    with only_writer(tmp_path / "landmark_search_served", busy=None):
        os.utime(tmp_path / "landmark_search_served", (0, 0))
        with app_page._own_folder() as own:
            left = {path.name.removeprefix("landmark_search_") for path in tmp_path.iterdir()}
            assert left - {own.name.removeprefix("landmark_search_")} == {
                *("served", "young", "foreign", "link")
            }
    assert not own.exists() and (tmp_path / "foreign" / "voila_x").is_dir()


@pytest.mark.parametrize("fails", [JobBusyError("wait"), PermissionError("locked"), None])
def test_a_gallery_that_can_not_be_opened_is_one_line(tmp_path, monkeypatch, capsys, fails):
    """The first two were tracebacks; an absent folder was not named."""
    gallery = tmp_path if fails else tmp_path / "nope"
    assert run_main(tmp_path, monkeypatch, gallery, fails) == (1, [])
    printed = capsys.readouterr().err
    assert printed.startswith("app: ") and printed.count("\n") == 1
    assert (str(fails) if fails else "nope") in printed


def test_the_page_has_the_cells_of_the_app_with_its_parameters(tmp_path):
    notebook = app_page.project_root() / "notebooks" / app_page.NOTEBOOK
    app_page.write_page_notebook(notebook, tmp_path / "page.ipynb", {"run_dir": "x'y"})
    cells = nbformat.read(tmp_path / "page.ipynb", as_version=4).cells
    assert [cell.cell_type for cell in cells] == ["code"] * 5
    assert cells[0].metadata.tags == ["parameters"] and cells[1].source == 'run_dir = "x\'y"'
    assert cells[-1].source.startswith("SearchApp(")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--run-dir", "absent"], "there is no trained model in absent: run `make demo` first"),
        (["--run-dir", "{tmp}"], "run `make demo` first"),
    ],
)
def test_without_a_run_the_command_says_what_to_do(tmp_path, capsys, arguments, line):
    assert app_page.main([argument.format(tmp=tmp_path) for argument in arguments]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("app: ") and line in printed and printed.count("\n") == 1


def test_a_damaged_network_is_one_line_too(tmp_path, capsys):
    (tmp_path / ENGINE).write_bytes(b"damaged")
    assert app_page.main(["--run-dir", str(tmp_path)]) == 1
    assert "export it anew" in capsys.readouterr().err
    assert np.asarray(list(tmp_path.iterdir())).size == 1  # and nothing was written
