"""The search app: a widget to drop a photo on, which shows the landmark and the photos like it.

SearchApp(engine, gallery, jobs=run / JOBS)        # the last line of a notebook's cell

It runs in JupyterLab, and as a page of its own, which ``make app`` serves (:mod:`lib.app.page`).
Whatever happens, the page says so in a friendly line and lives on; what went wrong goes to the log.
"""

from __future__ import annotations

import base64
import html
import io
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, wraps
from pathlib import Path

import ipywidgets as widgets
import numpy as np
from PIL import Image

from lib.app.answer import (
    KINDS,
    RERANKINGS,
    Answer,
    Gallery,
    Question,
    Search,
    SearchError,
    folder_below,
    landmark_of,
    open_gallery,
)
from lib.app.drop import PhotoDrop
from lib.app.upload import UploadError, read_upload
from lib.data.photos import picture_of
from lib.evaluation.explain import overlay
from lib.network.engine import Engine
from lib.search.embedding import EmbeddingJobError

SAMPLES = 8  # photos to begin with
NUMBERS = (4, 8, 12, 24)  # of photos to find
SIDE = 240  # pixels of the longer side of a photo that was found
VOTES = 3  # landmarks that are named

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Query:
    """The photo that is searched with.

    Attributes:
        square: uint8 (s, s, 3), for the network.
        picture: uint8 (h, w, 3), for people.
        name: in the gallery; "" for a photo from outside.
    """

    square: np.ndarray
    picture: np.ndarray
    name: str = ""


def _guarded(method: Callable) -> Callable:
    """Let a callback end in a line for the user, whatever it raises."""

    @wraps(method)
    def guarded(self: SearchApp, *arguments) -> None:
        try:
            method(self, *arguments)
        except (UploadError, SearchError) as error:
            self._tell(str(error), failed=True)
        except Exception:
            log.exception("a callback of the search app failed")
            self._tell("That went wrong, and was noted. Please try another photo.", failed=True)

    return guarded


class SearchApp(widgets.VBox):
    """Drop a photo, see its landmark.

    Attributes:
        search: what answers at the moment.
        answer: the last answer; None before the first.
    """

    def __init__(
        self,
        engine: Engine,
        gallery: Gallery,
        jobs: Path,
        title: str = "the gallery",
        folders_root: Path | None = None,
    ):
        """Show the app.

        Args:
            engine: from :func:`lib.network.engine.load_engine`.
            gallery: to search in at first, from :func:`lib.app.answer.open_gallery`.
            jobs: where the embeddings of folders are kept.
            title: of the gallery.
            folders_root: only folders below it can be searched in; None: the user's home folder.
        """
        self._jobs = Path(jobs)
        self._folders_root = Path.home() if folders_root is None else Path(folders_root)
        self._searches = {title: Search(engine, gallery)}
        self.search = self._searches[title]
        self.answer: Answer | None = None
        self._query: Query | None = None
        self._thumbnail = lru_cache(maxsize=512)(_thumbnail)  # data URIs of photos, by their path
        self._threads = ThreadPoolExecutor(2, "thumbnails")

        self._drop = PhotoDrop(self._on_photo, lambda message: self._tell(message, failed=True))
        self._head, self._status = widgets.HTML(), widgets.HTML()
        self._samples = _box("samples")
        self._shown, self._why = widgets.HTML(), widgets.HTML()
        self._k = _dropdown("Photos to show", NUMBERS, 8)
        self._kind = _dropdown("Index", KINDS, KINDS[0])
        self._rerank = _dropdown("Re-ranking", RERANKINGS, RERANKINGS[0])
        self._where = _dropdown("Search in", [title], title)
        self._cells = [self._new_cell(rank) for rank in range(max(NUMBERS))]
        self._grid = _box("grid")
        self._folder = widgets.Text(
            description="A folder of yours", placeholder="Pictures/2024", continuous_update=False
        )
        self._open = widgets.Button(description="Search in this folder")
        self._progress = widgets.HTML()

        left = _box("left", self._drop, self._shown, self._why)
        controls = _box("controls", self._k, self._kind, self._rerank, self._where)
        right = _box("right", self._status, controls, self._grid)
        own = _box("own", self._folder, self._open, self._progress)
        main = _box("main", left, right)
        style = widgets.HTML(STYLE)
        super().__init__([style, self._head, self._samples, main, own])
        self.add_class("search-app")

        for control in (self._k, self._kind, self._rerank):
            control.observe(lambda _: self._on_control(), "value")
        self._where.observe(lambda _: self._on_where(), "value")
        self._open.on_click(lambda _: self._on_folder())
        self._show_gallery()

    # ---- What the user does

    @_guarded
    def _on_photo(self, content: bytes) -> None:
        self._ask(Query(*read_upload(content, self.search.engine.image_size)))

    @_guarded
    def _on_gallery_photo(self, name: str) -> None:
        self._ask(Query(self.search.photo(name), _picture(self._path(name), 480), name))

    @_guarded
    def _on_control(self) -> None:
        if self._query is not None:
            self._ask(self._query)

    @_guarded
    def _on_why(self, rank: int) -> None:
        name = self.answer.names[rank]
        pictures = self._query.picture, _picture(self._path(name), SIDE)
        heats = self.search.why(self._query.square, self.search.photo(name))
        figures = "".join(
            f"<figure>{_img(_warm(picture, heat), f'{what}, bright where it matches')}"
            f"<figcaption>{what}</figcaption></figure>"
            for picture, heat, what in zip(
                pictures, heats, ("your photo", f"result {rank + 1}"), strict=True
            )
        )
        self._why.value = (
            f'<div class="why"><h2>What matched</h2><div class="pair">{figures}</div>'
            "<p>Bright: where covering a part makes the two photos less alike.</p></div>"
        )
        self._tell(f"What matched between your photo and result {rank + 1} is shown.")

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
        self._open.disabled = True
        try:
            gallery = open_gallery(self.search.engine, folder, self._jobs, self._show_progress)
        except EmbeddingJobError:
            log.info("a folder is being embedded elsewhere", exc_info=True)
            raise SearchError(
                "This folder is being read in another window: try again in a moment."
            ) from None
        finally:
            self._open.disabled = False
            self._progress.value = ""
        self._searches[typed] = Search(self.search.engine, gallery)
        self._where.options = list(self._searches)
        self._where.value = typed

    # ---- What is shown

    def _show_gallery(self) -> None:
        """Begin anew, in the gallery that is chosen."""
        gallery = self.search.gallery
        landmarks = gallery.landmarks()
        photos = _count(len(gallery.names), "photo")
        of = f" of {_count(len(landmarks), 'landmark')}" if landmarks else ""
        self._head.value = (
            "<h1>Which landmark is this?</h1>"
            f"<p>Drop a photo, and see the photos most like it among {photos}{of}. "
            "Nothing leaves this machine.</p>"
        )
        samples = [self._new_sample(name) for name in _samples(gallery)]
        old, self._samples.children = self._samples.children, samples
        for sample in old:
            for part in (*sample.children, sample):
                part.close()
        self._query = self.answer = None
        self._shown.value = self._why.value = ""
        self._grid.children = ()
        skipped = f" {_count(gallery.unreadable, 'file')} could not be read." * bool(
            gallery.unreadable
        )
        self._tell(f"{photos} ready.{skipped} Drop a photo, or choose one of the samples.")

    def _ask(self, query: Query) -> None:
        """Search, and show the answer."""
        self._query = query
        question = Question(self._k.value, self._kind.value, self._rerank.value)
        self.answer = answer = self.search.answer(query.square, question, query.name)
        self._why.value = ""
        self._shown.value = (
            f'<div class="query">{_img(_jpeg(query.picture), "The photo that is searched with")}'
            f"</div>{_vote_bars(answer.votes)}"
        )
        uris = self._threads.map(self._thumbnail, map(self._path, answer.names))
        for rank, (name, uri) in enumerate(zip(answer.names, uris, strict=True)):
            self._draw_cell(rank, name, uri, float(answer.similarities[rank]))
        self._grid.children = self._cells[: len(answer.names)]
        best = next(iter(answer.votes), "")
        found = f"Looks most like {_title(best)}." if best else "The photos most like it:"
        how = question.kind + f", {question.rerank}" * (question.rerank != "none")
        self._tell(
            f"{found} {_count(len(self.search.gallery.names), 'photo')} searched in "
            f"{1000 * answer.seconds:.0f} ms ({how})."
        )

    def _new_cell(self, rank: int) -> widgets.Box:
        """A place of the grid. It stays; what it shows changes."""
        more = widgets.Button(description="More like this")
        why = widgets.Button(description="Why?")
        more.on_click(lambda _: self._on_gallery_photo(self.answer.names[rank]))
        why.on_click(lambda _: self._on_why(rank))
        return _box("cell", widgets.HTML(), _box("buttons", more, why))

    def _draw_cell(self, rank: int, name: str, uri: str, similarity: float) -> None:
        shown, buttons = self._cells[rank].children
        title = _title(landmark_of(name)) or _title(name)
        shown.value = (
            f"{_img(uri, f'Result {rank + 1}: {title}, similarity {similarity:.2f}')}"
            f'<div class="caption"><span>{rank + 1}. {html.escape(title)}</span>'
            f"<span>{similarity:.2f}</span></div>{_bar(similarity)}"
        )
        more, why = buttons.children
        more.tooltip = f"Search with result {rank + 1}, {title}"
        why.tooltip = f"Show what matched in result {rank + 1}, {title}"

    def _new_sample(self, name: str) -> widgets.Box:
        # A photo is the background of a real button, as in lib.app.labeller.
        title = _title(landmark_of(name)) or _title(name)
        button = widgets.Button(description=f"Sample: {title}", tooltip=f"Search with {title}")
        style = f"sample-{button.model_id}"
        button.add_class("sample")
        button.add_class(style)
        button.on_click(lambda _: self._on_gallery_photo(name))
        uri = self._thumbnail(self._path(name))
        rule = f".search-app .sample.{style} {{ background-image: url({uri}) }}"
        return _box("sample-box", widgets.HTML(f"<style>{rule}</style>"), button)

    def _path(self, name: str) -> Path:
        return self.search.gallery.folder / name

    def _show_progress(self, done: int, total: int) -> None:
        self._progress.value = (
            f'<progress max="{total}" value="{done}" aria-label="Photos read"></progress> '
            f"{done} of {total} photos"
        )

    def _tell(self, text: str, failed: bool = False) -> None:
        """Show a line over the results, which a screen reader reads out."""
        role = 'role="alert" class="status failed"' if failed else 'role="status" class="status"'
        self._status.value = f"<div {role}>{html.escape(text)}</div>"


# --------------------------------------------------------------------------------------------------
# Pieces of the page
# --------------------------------------------------------------------------------------------------


def _box(name: str, *children: widgets.Widget) -> widgets.Box:
    """A box whose place and size the style sheet decides by its name."""
    box = widgets.Box(children)
    box.add_class(f"app-{name}")
    return box


def _dropdown(description: str, options, value) -> widgets.Dropdown:
    return widgets.Dropdown(description=description, options=list(options), value=value)


def _samples(gallery: Gallery) -> list[str]:
    """Photos to begin with: of different landmarks, spread over the gallery."""
    first: dict[str, str] = {}
    for name in gallery.names:
        first.setdefault(landmark_of(name) or name, name)
    names = list(first.values())
    places = np.linspace(0, len(names) - 1, min(SAMPLES, len(names))).round().astype(int)
    return [names[place] for place in places]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _title(name: str) -> str:
    """A file's or a folder's name for people; one from an old system may be no valid Unicode."""
    return name.encode("utf-8", "replace").decode("utf-8").replace("_", " ")


def _bar(share: float) -> str:
    """A bar from 0 to 1; the number stands beside it, so a screen reader passes over it."""
    width = 100 * min(max(share, 0.0), 1.0)
    return f'<div class="bar" aria-hidden="true"><div style="width: {width:.0f}%"></div></div>'


def _vote_bars(votes: dict[str, float]) -> str:
    if not votes:
        return ""
    rows = "".join(
        f'<li><div class="caption"><span>{html.escape(_title(landmark))}</span>'
        f"<span>{share:.0%}</span></div>{_bar(share)}</li>"
        for landmark, share in list(votes.items())[:VOTES]
    )
    return f'<div class="votes"><h2>Landmark</h2><ol>{rows}</ol></div>'


def _img(uri: str, alt: str) -> str:
    return f'<img src="{uri}" alt="{html.escape(alt)}">'


def _jpeg(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _picture(path: Path, longest: int) -> np.ndarray:
    """A photo of the gallery for people, uint8 (h, w, 3); a grey one if it can't be read."""
    try:
        with Image.open(path) as image:
            return np.asarray(picture_of(image, longest))
    except Exception:  # it was readable when the gallery was embedded
        log.info("a photo of the gallery can't be read any more", exc_info=True)
        return np.full((longest, longest, 3), 200, np.uint8)


def _thumbnail(path: Path) -> str:
    return _jpeg(_picture(path, SIDE))


def _warm(picture: np.ndarray, heat: np.ndarray) -> str:
    """A photo with its heat map, as a data URI; without heat it is the photo itself."""
    return _jpeg(overlay(picture[None], heat[None])[0] if heat.max() > 0 else picture)


STYLE = """<style>
.search-app, .search-app .widget-box { overflow: visible; }
.search-app { max-width: 1280px; margin: 0 auto; padding: 8px 16px 24px; box-sizing: border-box;
  width: 100%; gap: 14px; color: #1f2937; font-size: 15px; }
.search-app .widget-html, .search-app .widget-html-content { height: auto; width: auto; margin: 0;
  line-height: 1.45; font-size: 15px; }
.search-app h1 { font-size: 30px; font-weight: 650; margin: 8px 0 2px; }
.search-app h2 { font-size: 16px; font-weight: 650; margin: 14px 0 6px; }
.search-app p { margin: 0; color: #4b5563; }
.search-app img { display: block; width: 100%; border-radius: 8px; object-fit: cover; }
.search-app button:focus-visible, .search-app select:focus-visible,
.search-app input:focus-visible { outline: 3px solid #2563c9 !important; outline-offset: 2px; }
.search-app .app-samples { flex-wrap: wrap; gap: 10px; }
.search-app .sample { width: 96px; height: 96px; margin: 0; border-radius: 8px; font-size: 0;
  background: #e5e7eb center / cover no-repeat; }
.search-app .sample:hover { box-shadow: 0 0 0 3px #2563c9; }
.search-app .app-main { gap: 28px; align-items: flex-start; flex-wrap: wrap; }
.search-app .app-left { flex: 1 1 260px; max-width: 300px; flex-direction: column; gap: 12px; }
.search-app .app-right { flex: 3 1 520px; flex-direction: column; gap: 10px; min-width: 0; }
.search-app .app-grid { display: grid; width: 100%; gap: 18px 16px;
  grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); }
.search-app .app-cell { flex-direction: column; gap: 4px; }
.search-app .app-cell img { aspect-ratio: 1; }
.search-app .query img { border: 4px solid #2563c9; box-sizing: border-box; }
.search-app .caption { display: flex; justify-content: space-between; gap: 8px; margin-top: 4px;
  overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.search-app .bar { height: 8px; border-radius: 4px; background: #e5e7eb; margin: 3px 0 6px; }
.search-app .bar div { height: 8px; border-radius: 4px; background: #2a9d3a; }
.search-app .votes ol { list-style: none; margin: 0; padding: 0; }
.search-app .votes li:first-child { font-weight: 650; }
.search-app .app-buttons { gap: 6px; }
.search-app .app-buttons button { flex: 1 1 auto; width: auto; margin: 0; padding: 0 4px;
  font-size: 13px; border-radius: 6px; background: #f3f4f6; color: #1f2937; }
.search-app .pair { display: flex; gap: 10px; }
.search-app .pair figure { flex: 1; margin: 0; }
.search-app .pair figcaption { font-size: 13px; color: #4b5563; }
.search-app .why p { font-size: 13px; }
.search-app .status { padding: 8px 12px; border-radius: 8px; background: #eef4ff; font-size: 16px; }
.search-app .status.failed { background: #fdecea; color: #8c1d18; }
.search-app .app-controls, .search-app .app-own { flex-wrap: wrap; gap: 6px 20px;
  align-items: center; }
.search-app .app-own { padding-top: 14px; border-top: 1px solid #e5e7eb; }
.search-app .app-controls .widget-label, .search-app .app-own .widget-label { width: auto;
  color: #1f2937; font-size: 14px; margin-right: 6px; }
.search-app .widget-dropdown { width: auto; }
.search-app .app-own .widget-text { width: 340px; }
.search-app .app-own button { width: auto; border-radius: 6px; color: #1f2937; }
</style>"""
