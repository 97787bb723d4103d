"""A widget to label a test set: choose the query, click its positives, and save.

Labeller(Path("Test_set"), names, embeddings)  # the last line of a notebook's cell

It reads and writes the ``ground_truth.csv`` of :func:`lib.data.photos.read_test_set`.
"""

from __future__ import annotations

import csv
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd

from lib.app.web import load, picture_uri
from lib.data.photos import GROUND_TRUTH, read_test_set
from lib.files import replacing, show_path

PAGE = 24  # photos per page
SIDE = 150  # side of a photo in pixels


# --------------------------------------------------------------------------------------------------
# The labels, without a widget
# --------------------------------------------------------------------------------------------------


@dataclass
class Labels:
    """The query of a test set, and the other photos of its landmark.

    Attributes:
        query: a file name.
        positives: file names, without the query.
    """

    query: str
    positives: set[str] = field(default_factory=set)

    def copy(self) -> Labels:
        """Copy the labels, including the set of positives."""
        return Labels(self.query, set(self.positives))

    def toggle(self, name: str) -> None:
        """Add a photo to the positives, or remove it.

        Raises:
            ValueError: it is the query.
        """
        if name == self.query:
            raise ValueError(f"{name!r} is the query: it can't be a positive as well")
        self.positives ^= {name}

    def make_query(self, name: str) -> set[str]:
        """Make another photo the query.

        A positive shows the same landmark: it changes places with the old query. Any other photo
        may show another landmark, so all positives are removed.

        Returns:
            the positives that were removed.
        """
        forgotten: set[str] = set()
        if name in self.positives:
            self.positives = self.positives - {name} | {self.query}
        elif name != self.query:
            forgotten, self.positives = self.positives, set()
        self.query = name
        return forgotten


def read_labels(folder: Path, names: Sequence[str], query: int, positives: np.ndarray) -> Labels:
    """Read the labels of a test set that :func:`lib.data.photos.read_test_set` has accepted.

    Positives whose photo can't be read now are included, so that saving does not lose them.

    Args:
        folder: holds ``ground_truth.csv``.
        names: n file names, of the photos that can be read.
        query: index of the query in ``names``.
        positives: bool (n,), the positives among ``names``.
    """
    table = pd.read_csv(folder / GROUND_TRUTH, dtype=str, keep_default_na=False)
    unreadable = table[(table["role"] == "positive") & ~table["image"].isin(names)]
    readable = {name for name, positive in zip(names, positives, strict=True) if positive}
    return Labels(names[query], readable | set(unreadable["image"]))


def write_labels(folder: Path, names: Iterable[str], labels: Labels) -> Path:
    """Write ``ground_truth.csv`` atomically, a row per photo, sorted by name.

    Args:
        folder: of the photos.
        names: file names of all photos; those without a label are distractors.
        labels: query and positives.

    Returns:
        the file's path.

    Raises:
        OSError: the file can't be written.
        UnicodeEncodeError: a name is not valid Unicode.
    """
    path = Path(folder) / GROUND_TRUTH
    roles = dict.fromkeys(names, "distractor") | dict.fromkeys(labels.positives, "positive")
    roles[labels.query] = "query"
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "role"))
        writer.writerows(sorted(roles.items()))
    return path


# --------------------------------------------------------------------------------------------------
# The widget
# --------------------------------------------------------------------------------------------------


class Labeller(widgets.VBox):
    """The widget.

    Photos are sorted by similarity to the query, so that most positives are on the first page.

    Attributes:
        labels: the current choice, saved or not.
    """

    def __init__(self, folder: Path, names: Sequence[str], embeddings: np.ndarray):
        """Read the photos, and their ground truth if there is one.

        Args:
            folder: of photos.
            names: m file names, which include all readable photos of the folder.
            embeddings: float (m, d) of unit norm, in the order of ``names``.

        Raises:
            TestSetError: no photo can be read, or the ground truth does not match the photos.
            ValueError: a photo has no embedding, or ``embeddings`` is not (m, d) and finite.
        """
        self._folder = Path(folder)
        test_set = read_test_set(self._folder, SIDE)
        self._names, self._photos = test_set.names, test_set.photos
        self._embeddings = _embeddings_of(self._names, names, embeddings)
        truth = show_path(self._folder / GROUND_TRUTH)
        if test_set.positives is None:
            self.labels = Labels(self._names[test_set.query])
            self._saved: Labels | None = None
            status = f"There is no {truth} yet: choose the query first, then its positives."
        else:
            self.labels = read_labels(self._folder, self._names, test_set.query, test_set.positives)
            self._saved = self.labels.copy()
            status = f"Read from {truth}: {self._count()}."

        self._history: list[Labels] = []
        self._style, self._head, self._status = (widgets.HTML() for _ in range(3))
        self._style.layout.display = "none"  # a hidden style sheet still applies
        self._previous = widgets.Button(description="Previous page")
        self._next = widgets.Button(description="Next page")
        self._where = widgets.HTML()
        self._save = widgets.Button(description="Save", button_style="primary")
        self._undo = widgets.Button(description="Undo", disabled=True)
        self._cells: dict[int, widgets.VBox] = {}
        # The grid scrolls separately, so that the query and the chosen photos stay in sight.
        self._grid_layout = widgets.Layout(
            grid_template_columns=f"repeat(auto-fill, {SIDE}px)",
            grid_gap="8px",
            padding="4px",
            max_height="60vh",
            overflow="auto",
        )
        bar = widgets.HBox(
            [self._previous, self._where, self._next, self._undo, self._save],
            layout=widgets.Layout(flex_flow="row wrap", align_items="center"),
        )
        notice = widgets.HTML(_unreadable(test_set.skipped))
        super().__init__([self._style, self._head, notice, bar, self._status, widgets.GridBox()])
        self.add_class("labeller")

        self._previous.on_click(lambda _: self._turn_to(self._page - 1))
        self._next.on_click(lambda _: self._turn_to(self._page + 1))
        self._save.on_click(lambda _: self._on_save())
        self._undo.on_click(lambda _: self._on_undo())
        self._rank()
        self._tell(status)

    def _count(self) -> str:
        chosen = len(self.labels.positives & set(self._names))
        return f"{chosen} positive{'' if chosen == 1 else 's'}"

    # ---- Display

    def _rank(self) -> None:
        """Sort the photos by similarity to the query, and show the first page."""
        query = self._names.index(self.labels.query)
        self._similarities = self._embeddings @ self._embeddings[query]
        order = np.argsort(-self._similarities, kind="stable")
        self._order = order[order != query]
        self._turn_to(0)
        self._draw_head()

    def _turn_to(self, page: int) -> None:
        pages = max(1, -(-len(self._order) // PAGE))
        self._page = page
        self._previous.disabled, self._next.disabled = page == 0, page == pages - 1
        self._where.value = f"<span>Page {page + 1} of {pages}</span>"
        self._shown = self._order[page * PAGE : (page + 1) * PAGE].tolist()
        pictures = "".join(
            f".labeller .labeller-photo.{self._photo_class(i)} "
            f"{{ background-image: url({picture_uri(self._photos[i], quality=85)}) }}\n"
            for i in self._shown
        )
        self._style.value = f"<style>{load('labeller.css')}{pictures}</style>"
        for i in self._shown:
            if i not in self._cells:
                self._cells[i] = self._new_cell(i)
            self._draw_cell(i)
        cells = [self._cells[i] for i in self._shown]
        *others, old = self.children
        # A new grid, since an old one would keep its scroll position.
        self.children = (*others, widgets.GridBox(cells, layout=self._grid_layout))
        old.close()

    def _photo_class(self, i: int) -> str:
        return f"labeller-{self.model_id}-{i}"  # two labellers may stand on one page

    def _new_cell(self, i: int) -> widgets.VBox:
        """Build a photo's buttons.

        They are not reused for other photos, so a click that arrives after a change of page still
        counts for the photo that was clicked.
        """
        toggle = widgets.ToggleButton()
        toggle.add_class("labeller-photo")
        toggle.add_class(self._photo_class(i))
        toggle.observe(lambda change: self._on_toggle(i, change.new), "value")
        swap = widgets.Button(
            description="Make it the query", tooltip=f"Make {_text(self._names[i])} the query"
        )
        swap.add_class("labeller-swap")
        swap.on_click(lambda _: self._on_swap(self._names[i]))
        return widgets.VBox([toggle, swap], layout=widgets.Layout(width=f"{SIDE}px"))

    def _draw_cell(self, i: int) -> None:
        toggle, name = self._cells[i].children[0], _text(self._names[i])
        with toggle.hold_sync():
            toggle.value = self._names[i] in self.labels.positives
            toggle.description = f"✓ positive: {name}" if toggle.value else name
            toggle.tooltip = f"{name}, similarity {self._similarities[i]:.2f}"

    def _draw_head(self) -> None:
        """Show the query and the positives of all pages."""
        chosen = [i for i in self._order if self._names[i] in self.labels.positives]
        self._head.value = (
            f'<div class="labeller-head">{self._img(self.labels.query, "query")}'
            f"<div><b>Query:</b> {_html(self.labels.query)}<br>"
            f"<b>{self._count()} chosen</b><br>Click each photo that shows the query's "
            "landmark; click it again to undo.<br>The photos most like the query come first."
            f'<div class="chosen">{"".join(self._img(self._names[i]) for i in chosen)}</div>'
            "</div></div>"
        )

    def _img(self, name: str, kind: str = "positive") -> str:
        uri = picture_uri(self._photos[self._names.index(name)], quality=85)
        what = f"{kind} {_html(name)}"
        return f'<img class="{kind}" src="{uri}" alt="{what}" title="{what}">'

    def _tell(self, text: str, failed: bool = False) -> None:
        """Show a message below the buttons; screen readers announce it."""
        role = 'role="alert" class="labeller-failed"' if failed else 'role="status"'
        self._status.value = f"<div {role}>{_html(text)}</div>"

    # ---- Callbacks

    def _on_toggle(self, i: int, chosen: bool) -> None:
        name = self._names[i]
        if name == self.labels.query or chosen == (name in self.labels.positives):
            return  # not a click: _draw_cell set the value
        self._remember()
        self.labels.toggle(name)
        self._draw_cell(i)
        self._draw_head()
        self._tell(f"{self._count()} chosen, {self._state()}.")

    def _on_swap(self, name: str) -> None:
        self._remember()
        old = self.labels.query
        lost = f"; Undo brings back what was chosen for {old}"
        if not self.labels.make_query(name):
            lost = ""
        self._rank()
        self._tell(f"The query is {name}: {self._count()} chosen, {self._state()}{lost}.")

    def _remember(self) -> None:
        self._history.append(self.labels.copy())
        self._undo.disabled = False

    def _on_undo(self) -> None:
        query = self.labels.query
        self.labels = self._history.pop()
        self._undo.disabled = not self._history
        if self.labels.query != query:
            self._rank()
        else:
            for i in self._shown:
                self._draw_cell(i)
            self._draw_head()
        self._tell(f"Undone: {self._count()} chosen, {self._state()}.")

    def _state(self) -> str:
        return "as saved" if self.labels == self._saved else "not saved yet"

    def _on_save(self) -> None:
        try:
            path = write_labels(self._folder, self._names, self.labels)
        except UnicodeEncodeError:
            bad = next(name for name in self._names if name != _text(name))
            self._tell_failure(f"the name of {bad} is no valid Unicode")
        except OSError as error:
            self._tell_failure(error.strerror or str(error))
        else:
            self._saved = self.labels.copy()
            self._tell(f"Saved in {show_path(path)}: {self._count()}.")

    def _tell_failure(self, reason: str) -> None:
        path = show_path(self._folder / GROUND_TRUTH)
        self._tell(
            f"Not saved in {path}: {reason}. Your choices are still here: put that right, "
            "then save again.",
            failed=True,
        )


def _embeddings_of(
    photos: Sequence[str], names: Sequence[str], embeddings: np.ndarray
) -> np.ndarray:
    """Select the embeddings of the photos, in their order."""
    embeddings = np.asarray(embeddings, dtype=np.float32)
    if embeddings.ndim != 2 or len(embeddings) != len(names) or not np.isfinite(embeddings).all():
        raise ValueError(f"embeddings must be finite and ({len(names)}, d), not {embeddings.shape}")
    row = {name: i for i, name in enumerate(names)}
    absent = [name for name in photos if name not in row]
    if absent:
        raise ValueError(f"{len(absent)} photos have no embedding, such as {absent[0]!r}")
    return embeddings[[row[name] for name in photos]]


def _text(name: str) -> str:
    """Make a file name valid Unicode, which old names may not be, so that it can be sent."""
    return name.encode("utf-8", "replace").decode("utf-8")


def _html(text: str) -> str:
    return html.escape(_text(text))


def _unreadable(skipped: list[str]) -> str:
    if not skipped:
        return ""
    items = "".join(f"<li>{_html(message)}</li>" for message in skipped)
    return (
        f"<details><summary>{len(skipped)} of the folder's files can't be read</summary>"
        f"<ul>{items}</ul></details>"
    )
