"""The search app as a widget: drop a photo, see its landmark and the most similar photos.

SearchApp(engine, gallery, jobs=run / JOBS)        # the last line of a notebook's cell

It runs in JupyterLab, and as a web page, which ``make app`` serves (:mod:`lib.app.page`). An error
is shown as one line, with its traceback in the server's log, and the app goes on.
"""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache, partial, wraps
from pathlib import Path
from typing import NamedTuple

import ipywidgets as widgets
import numpy as np
from tqdm import tqdm

from lib.app.answer import KINDS, RERANKINGS, Answer, Question, Search
from lib.app.box import LargePhoto, PhotoBox
from lib.app.drop import PhotoDrop
from lib.app.gallery import GONE, Gallery, SearchError, folder_below, landmark_of, open_gallery
from lib.app.upload import Upload, UploadError, read_upload, with_picture
from lib.app.web import counted, load, message, picture_uri, valid
from lib.data.decoding import resize
from lib.data.photos import Box, open_picture, picture_of
from lib.network.engine import Engine
from lib.search.embedding import EmbeddingJobError, JobBusyError
from lib.search.same_place import SAME, SIMILAR, TOP, VERDICTS

GALLERY = "the gallery"  # the name of the first one in the list of galleries
SAMPLES = 8  # photos offered as queries
NUMBERS = (4, 8, 12, 24)  # of results
SIDE = 240  # longer side of a result in pixels
LARGE = 1600  # the same, of a photo that is opened
VOTES = 3  # landmarks shown
_COMPARED = ("every photo", "those in the nearest lists (IVF)", "those along a graph (HNSW)")
_THEN = ("nothing", "search again with the best found (query expansion)")
_VERIFY = ("verified by geometry", "not verified")

_BUSY = "This folder is being read in another window: try again in a moment."
_UNUSABLE = "The stored embeddings of this folder can't be used; the log of the app says why."
_FAILED = "That went wrong, and was noted. Please try another photo."


@cache
def _grey() -> str:
    """A picture in place of a photo that is gone."""
    return picture_uri(np.full((SIDE, SIDE, 3), 200, np.uint8))


def _guarded(method: Callable) -> Callable:
    """Show the user a message if a callback raises an exception."""

    @wraps(method)
    def guarded(self: SearchApp, *arguments) -> None:
        try:
            method(self, *arguments)
        except (UploadError, SearchError) as error:
            self._tell(str(error), failed=True)
        except Exception as error:
            # A widget's log is the kernel's; others end on stderr, which the browser is sent.
            self.log.exception("a callback of the search app failed")
            text = {JobBusyError: _BUSY, EmbeddingJobError: _UNUSABLE}.get(type(error), _FAILED)
            self._tell(text, failed=True)

    return guarded


class _Query(NamedTuple):
    """What was searched with: an uploaded file's content, or a photo of the gallery by name."""

    upload: Upload
    name: str  # "" for a file
    content: bytes
    box: Box | None  # the part searched for


class SearchApp(widgets.VBox):
    """The app.

    Attributes:
        search: of the chosen gallery.
        answer: the last answer; None before the first.
    """

    def __init__(
        self, engine: Engine, gallery: Gallery, jobs: Path, folders_root: Path | None = None
    ):
        """Lay out the app and show the samples.

        Args:
            engine: from :func:`lib.network.engine.load_engine`.
            gallery: the first to search in, from :func:`lib.app.gallery.open_gallery`.
            jobs: folder that stores the embeddings of galleries.
            folders_root: users can search in the folders below it; None: the home folder.
        """
        self._jobs = Path(jobs)
        self._folders_root = Path.home() if folders_root is None else Path(folders_root)
        self.search = Search(engine, gallery)
        self._searches = {GALLERY: self.search}
        self.answer: Answer | None = None
        self._query: _Query | None = None
        self._thumbnail = lru_cache(maxsize=512)(_thumbnail)
        self._threads = ThreadPoolExecutor(2, "thumbnails")

        self._drop = PhotoDrop(self._on_photo, lambda message: self._tell(message, failed=True))
        self._head, self._status = widgets.HTML(), widgets.HTML()
        self._samples = _box("samples")
        self._box, self._large = PhotoBox(self._on_box), LargePhoto()
        self._votes, self._why = widgets.HTML(), widgets.HTML()
        self._k = widgets.Dropdown(description="Photos to show", options=NUMBERS, value=8)
        self._kind = _choice("Compare with", _COMPARED, KINDS)
        self._rerank = _choice("Then", _THEN, RERANKINGS)
        self._fold = _choice("Copies", ("folded", "one by one"), (True, False))
        self._verify = _choice("Same place", _VERIFY, (True, False))
        self._where = widgets.Dropdown(description="Search in", options=[GALLERY])
        self._cells = [self._new_cell(rank) for rank in range(max(NUMBERS))]
        self._grid = _box("grid")
        self._folder = widgets.Text(
            description="A folder of yours", placeholder="Pictures/2024", continuous_update=False
        )
        self._open = widgets.Button(description="Search in this folder")
        self._progress = widgets.HTML()

        left = _box("left", self._drop, self._box, self._votes, self._why)
        settings = self._k, self._kind, self._rerank, self._fold, self._verify
        right = _box(
            "right", self._status, _box("controls", *settings, self._where), self._grid, self._large
        )
        own = _box("own", self._folder, self._open, self._progress)
        style = widgets.HTML(f"<style>{load('widget.css')}</style>")
        super().__init__([style, self._head, self._samples, _box("main", left, right), own])
        self.add_class("search-app")

        for control in settings:
            control.observe(lambda _: self._on_control(), "value")
        self._where.observe(lambda _: self._on_where(), "value")
        self._open.on_click(lambda _: self._on_folder())
        self._show_gallery()

    # ---- Callbacks

    @_guarded
    def _on_photo(self, content: bytes) -> None:
        self._ask(self._read("", content))

    @_guarded
    def _on_gallery_photo(self, name: str) -> None:
        self._ask(self._read(name, b""))

    @_guarded
    def _on_box(self, box: Box | None) -> None:
        if self._query is not None:
            self._ask(self._read(self._query.name, self._query.content, box))

    @_guarded
    def _on_control(self) -> None:
        if self._query is not None:
            self._ask(self._query)

    @_guarded
    def _on_large(self, rank: int) -> None:
        name = self.answer.names[rank]
        self._large.show(_picture(self.search.gallery, name, LARGE), name)

    @_guarded
    def _on_why(self, rank: int) -> None:
        from lib.evaluation.explain import overlay  # here: it loads pandas and Matplotlib

        name, (query, _, _, box) = self.answer.names[rank], self._query
        heats = self.search.why(query.pixels, self.search.photo(name))
        part = query.picture if box is None else _in_shape(query.pixels, box)
        pictures = part, _picture(self.search.gallery, name, SIDE)
        figures = ""
        own = "your photo" if box is None else "the part of your photo"
        titles = (own, f"result {rank + 1}")
        for picture, heat, title in zip(pictures, heats, titles, strict=True):
            shown = overlay(picture[None], heat[None])[0] if heat.max() > 0 else picture
            img = _img(picture_uri(shown), f"{title}, bright where it matches")
            figures += f"<figure>{img}<figcaption>{title}</figcaption></figure>"
        self._why.value = (
            f'<div class="why"><h2>What matched</h2><div class="pair">{figures}</div>'
            "<p>Bright: where covering a part makes the two photos less alike.</p></div>"
        )
        self._tell(f"What matched between {own} and result {rank + 1} is shown.")

    @_guarded
    def _on_where(self) -> None:
        self.search = self._searches[self._where.value]
        self._show_gallery()

    @_guarded
    def _on_folder(self) -> None:
        typed = self._folder.value.strip()
        if not typed:
            raise SearchError("Type the name of a folder first.")
        folder = folder_below(self._folders_root, typed)
        self._open.disabled, self._began, self._done = True, time.monotonic(), 0
        try:
            gallery = open_gallery(self.search.engine, folder, self._jobs, self._show_progress)
        finally:
            self._open.disabled = False
            self._progress.value = ""
        title = folder.relative_to(self._folders_root.resolve()).as_posix()
        if title == GALLERY:
            title = f"./{title}"
        self._searches[title] = search = Search(self.search.engine, gallery)
        self._where.options = list(self._searches)
        self._where.value = title
        if self.search is not search:  # the title was already chosen, so no event was sent
            self._on_where()

    # ---- Display

    def _show_gallery(self) -> None:
        """Show the chosen gallery, and clear the last answer."""
        gallery = self.search.gallery
        landmarks = len(self.search.landmarks)
        photos = counted(len(gallery.names), "photo")
        of = f" of {counted(landmarks, 'landmark')}" if landmarks else ""
        heading = "Which landmark is this?" if landmarks else "Search with a photo"
        samples = {
            name: self._new_sample(name)
            for name in _samples(gallery.names, self._title)
            if self._thumbnail(gallery, name)
        }
        rules = "".join(
            f".search-app .sample.sample-{sample.model_id} "
            f"{{ background-image: url({self._thumbnail(gallery, name)}) }}\n"
            for name, sample in samples.items()
        )
        self._head.value = (
            f"<style>{rules}</style><h1>{heading}</h1>"
            f"<p>Drop a photo, and see the photos most like it among {photos}{of}. "
            "Nothing leaves this machine.</p>"
        )
        old, self._samples.children = self._samples.children, list(samples.values())
        for sample in old:
            sample.close()
        self._query = self.answer = None
        self._verify.layout.display = "none" if gallery.features is None else ""
        self._votes.value = self._why.value = ""
        self._box.show(np.empty((0, 0, 3), np.uint8), (1, 1))
        self._grid.children = ()
        unreadable = counted(gallery.unreadable, "file")
        skipped = f" {unreadable} could not be read." if gallery.unreadable else ""
        skipped += gallery.left_out
        self._tell(f"{photos} ready.{skipped} Drop a photo, or choose one of the samples.")

    def _read(self, name: str, content: bytes, box: Box | None = None) -> _Query:
        """Read a photo, or a part of it in its own resolution; see _Query."""
        search = self.search
        if not name:
            upload = read_upload(content, search.image_size, search.engine.squashes, box)
        else:
            pixels = search.photo(name, box)
            with open_picture(search.gallery.path(name)) as image:
                upload = with_picture(pixels, image)
        return _Query(upload, name, content, box)

    def _ask(self, query: _Query) -> None:
        """Search with a photo, and show the answer."""
        self._query, upload = query, query.upload
        question = Question(
            self._k.value,
            self._kind.value,
            self._rerank.value,
            fold=self._fold.value,
            verify=self._verify.value,
        )
        self.answer = answer = self.search.answer(upload.pixels, question, query.name)
        self._why.value = ""
        self._box.show(upload.picture, upload.size, query.box)
        self._votes.value = _vote_bars(answer.votes)
        uris = list(self._threads.map(partial(self._thumbnail, self.search.gallery), answer.names))
        for rank, (found, uri) in enumerate(zip(answer.names, uris, strict=True)):
            self._draw_cell(rank, found, uri)
        self._grid.children = self._cells[: len(answer.names)]
        best = next(iter(answer.votes), "")
        first = f"Looks most like {_title(best)}." if best else "The photos most like it:"
        how = question.kind + f", {question.rerank}" * (question.rerank != "none")
        if answer.verdicts:
            verified = min(TOP, len(self.search.gallery.names) - bool(query.name))
            how += f", the first {verified} verified"
            first = f"{_places_in_words(answer.verdicts)} {first if best else ''}".strip()
        part = f" {_in_words(query.box, upload.size)}" if query.box else ""
        gone = uris.count("")
        lost = f" Gone or unreadable: {counted(gone, 'file')} of those shown." if gone else ""
        self._tell(
            f"{first} {counted(len(self.search.gallery.names), 'photo')} searched in "
            f"{1000 * answer.seconds:.0f} ms ({how}){part}.{lost}"
        )

    def _new_cell(self, rank: int) -> widgets.Box:
        """Build a cell of the grid, which is reused for each answer."""
        more = widgets.Button(description="More like this")
        why = widgets.Button(description="Why?")
        large = widgets.Button(description="Large")
        more.on_click(lambda _: self._on_gallery_photo(self.answer.names[rank]))
        why.on_click(lambda _: self._on_why(rank))
        large.on_click(lambda _: self._on_large(rank))
        return _box("cell", widgets.HTML(), _box("buttons", more, why, large))

    def _draw_cell(self, rank: int, name: str, uri: str) -> None:
        shown, buttons = self._cells[rank].children
        answer, title = self.answer, self._title(name)
        similarity = float(answer.similarities[rank])
        gone = "" if uri else " (file gone or unreadable)"
        img = _img(uri or _grey(), f"Result {rank + 1}: {title}{gone}, similarity {similarity:.2f}")
        bar = _bar(f"{rank + 1}. {title}{gone}", similarity, f"{similarity:.2f}")
        place = ""
        if answer.verdicts:
            verdict, probability = answer.verdicts[rank], answer.probabilities[rank]
            place = (
                f'<div class="verdict verdict-{VERDICTS.index(verdict)}" '
                f'title="probability of the same place: {probability:.0%}">{verdict}</div>'
            )
        shown.value = img + bar + place + _folded(answer.copies[rank])
        more, why, large = buttons.children
        more.tooltip = f"Search with result {rank + 1}, {title}"
        why.tooltip = f"Show what matched in result {rank + 1}, {title}"
        large.tooltip = f"Open result {rank + 1}, {title}, large"

    def _new_sample(self, name: str) -> widgets.Button:
        # The photo is the background of a real button, so that the keyboard reaches it.
        title = self._title(name)
        button = widgets.Button(description=f"Sample: {title}", tooltip=f"Search with {title}")
        button.on_click(lambda _: self._on_gallery_photo(name))
        return button.add_class("sample").add_class(f"sample-{button.model_id}")

    def _title(self, name: str) -> str:
        """The landmark of a photo, or the name of a photo without one, made readable."""
        return _title((landmark_of(name) if self.search.landmarks else "") or name)

    def _show_progress(self, done: int, total: int) -> None:
        if done <= self._done:  # the photos are read again, for their local features
            self._began = time.monotonic()
        self._done = done
        bar = f'<progress max="{total}" value="{done}" aria-label="Photos read"></progress>'
        rate = done / max(time.monotonic() - self._began, 1e-3)
        left = tqdm.format_interval((total - done) / rate)
        self._progress.value = (
            f"{bar} {done} of {counted(total, 'photo')}, {rate:.0f} per second, {left} left"
        )

    def _tell(self, text: str, failed: bool = False) -> None:
        """Show a message above the results."""
        self._status.value = message(text, failed)


# ---- Pieces of the page


def _box(name: str, *children: widgets.Widget) -> widgets.Box:
    """Build a box with a class name for the style sheet."""
    return widgets.Box(children).add_class(f"app-{name}")


def _choice(what: str, labels: Sequence[str], values: Sequence) -> widgets.Dropdown:
    return widgets.Dropdown(description=what, options=list(zip(labels, values, strict=True)))


def _samples(names: list[str], title: Callable[[str], str]) -> list[str]:
    """Choose photos of different titles, spread over the gallery."""
    first = np.sort(np.unique([title(name) for name in names], return_index=True)[1])
    places = np.linspace(0, len(first) - 1, min(SAMPLES, len(first))).round().astype(int)
    return [names[row] for row in first[places]]


def _title(name: str) -> str:
    """Make a file or folder name readable."""
    return valid(name).replace("_", " ")


def _bar(text: str, share: float, number: str) -> str:
    """Draw a bar from 0 to 1 below a text and a number; screen readers read only these."""
    width = 100 * min(max(share, 0.0), 1.0)
    return (
        f'<div class="caption"><span>{html.escape(text)}</span><span>{number}</span></div>'
        f'<div class="bar" aria-hidden="true"><div style="width: {width:.0f}%"></div></div>'
    )


def _vote_bars(votes: dict[str, float]) -> str:
    if not votes:
        return ""
    rows = "".join(
        f"<li>{_bar(_title(landmark), share, f'{share:.0%}')}</li>"
        for landmark, share in list(votes.items())[:VOTES]
    )
    return f'<div class="votes"><h2>Landmark</h2><ol>{rows}</ol></div>'


def _places_in_words(verdicts: list[str]) -> str:
    """Say how many of the photos found show the query's place."""
    if same := verdicts.count(SAME):
        return (
            f"{counted(same, 'photo')} of those shown {'show' if same > 1 else 'shows'} this place."
        )
    if set(verdicts) == {SIMILAR}:
        return "None of your photos shows this place, as far as can be told."
    return "Perhaps one of these shows this place."


def _folded(copies: list[str]) -> str:
    if not copies:
        return ""
    names = "".join(f"<li>{html.escape(valid(name))}</li>" for name in copies)
    number = f"+{len(copies)} {'copy' if len(copies) == 1 else 'copies'}"
    return f'<details class="copies"><summary>{number}</summary><ul>{names}</ul></details>'


def _in_words(box: Box, size: tuple[int, int]) -> str:
    """Say which part of a photo of ``size``, width and height in pixels, a box is."""
    x, y = ((low + high) / 2 / side for low, high, side in zip(box, box[2:], size, strict=False))
    down = ("upper", "middle", "lower")[min(int(3 * y), 2)]
    across = ("left", "middle", "right")[min(int(3 * x), 2)]
    where = " ".join(dict.fromkeys([down, across]))
    return f"for the {where} part, {box[2] - box[0]:.0f} x {box[3] - box[1]:.0f} pixels"


def _in_shape(pixels: np.ndarray, box: Box) -> np.ndarray:
    """What the network was given of a box, uint8 (h, w, 3), in the shape of the box."""
    sides = box[3] - box[1], box[2] - box[0]
    return resize(pixels, tuple(max(round(SIDE * side / max(sides)), 1) for side in sides))


def _img(uri: str, alt: str) -> str:
    return f'<img src="{uri}" alt="{html.escape(alt)}">'


def _picture(gallery: Gallery, name: str, longest: int) -> np.ndarray:
    """Read a photo of the gallery for display, uint8 (h, w, 3); raises a SearchError."""
    try:
        with open_picture(gallery.path(name)) as image:
            return np.asarray(picture_of(image, longest))
    except Exception:  # it was readable when the gallery was embedded
        raise SearchError(GONE) from None


def _thumbnail(gallery: Gallery, name: str) -> str:
    """Make a data URI of a photo of the gallery; "" if it can no longer be read."""
    try:
        return picture_uri(_picture(gallery, name, SIDE))
    except SearchError:
        return ""
