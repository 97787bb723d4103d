"""A widget to label a test set: choose the query, click its positives, and save.

Labeller(Path("Test_set"), names, embeddings)  # the last line of a notebook's cell

It reads and writes the ``ground_truth.csv`` of :func:`lib.data.test_set.read_test_set`.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd

from lib.app.web import counted, load, message, picture_uri, valid
from lib.data.test_set import GROUND_TRUTH, read_roles, read_test_set
from lib.files import replacing, show_path

PAGE = 24  # photos per page
SIDE = 150  # side of a photo in pixels


# ---- The labels, without a widget


@dataclass(frozen=True)
class Labels:
    """The file names of a test set's query, and of the other photos of its landmark."""

    query: str
    positives: frozenset[str] = frozenset()

    def toggled(self, name: str) -> Labels:
        """Add a photo to the positives, or remove it.

        Raises:
            ValueError: it is the query.
        """
        if name == self.query:
            raise ValueError(f"{name!r} is the query: it can't be a positive as well")
        return Labels(self.query, self.positives ^ {name})

    def with_query(self, name: str) -> Labels:
        """Make another photo the query.

        A positive shows the same landmark: it changes places with the old query. Any other photo
        may show another landmark, so all positives are removed.
        """
        if name == self.query:
            return self
        same_landmark = name in self.positives
        return Labels(name, self.positives ^ {name, self.query} if same_landmark else frozenset())


def read_labels(folder: Path) -> Labels:
    """Read the labels of a test set that :func:`lib.data.test_set.read_test_set` has accepted.

    Positives whose photo can't be read now are included, so that saving does not lose them.
    """
    roles = read_roles(folder)
    (query,) = (name for name, role in roles.items() if role == "query")
    return Labels(query, frozenset(name for name, role in roles.items() if role == "positive"))


def write_labels(folder: Path, names: Iterable[str], labels: Labels) -> Path:
    """Write ``ground_truth.csv`` atomically, a row per photo, sorted by name; return its path.

    Args:
        folder: of the photos.
        names: file names of all photos; those without a label are distractors.
        labels: query and positives.

    Raises:
        OSError: the file can't be written.
        UnicodeEncodeError: a name is not valid Unicode.
    """
    path = Path(folder) / GROUND_TRUTH
    roles = dict.fromkeys(names, "distractor") | dict.fromkeys(labels.positives, "positive")
    roles[labels.query] = "query"
    table = pd.DataFrame(sorted(roles.items()), columns=["image", "role"])
    with replacing(path) as part:
        table.to_csv(part, index=False, lineterminator="\r\n")
    return path


# ---- The widget


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
        self._file = show_path(self._folder / GROUND_TRUTH)
        if test_set.positives is None:
            self.labels, self._saved = Labels(self._names[test_set.query]), None
            status = f"There is no {self._file} yet: choose the query first, then its positives."
        else:
            self.labels = self._saved = read_labels(self._folder)
            status = f"Read from {self._file}: {self._count()}."

        self._history: list[Labels] = []
        self._style, self._head, self._status = (widgets.HTML() for _ in range(3))
        self._style.layout.display = "none"  # a hidden style sheet still applies
        self._previous = widgets.Button(description="Previous page")
        self._next = widgets.Button(description="Next page")
        self._where = widgets.HTML()
        self._save = widgets.Button(description="Save", button_style="primary")
        self._undo = widgets.Button(description="Undo", disabled=True)
        self._cells: dict[int, widgets.VBox] = {}
        bar = widgets.HBox([self._previous, self._where, self._next, self._undo, self._save])
        bar.add_class("labeller-bar")
        items = "".join(f"<li>{_html(reason)}</li>" for reason in test_set.skipped)
        others = sum(reason.startswith("left out: ") for reason in test_set.skipped)
        summary = f"{len(test_set.skipped) - others} of the folder's files can't be read"
        summary += ", others were left out" if others else ""
        details = f"<details><summary>{summary}</summary><ul>{items}</ul></details>"
        notice = widgets.HTML(details if items else "")
        super().__init__([self._style, self._head, notice, bar, self._status, widgets.GridBox()])
        self.add_class("labeller")

        self._previous.on_click(lambda _: self._turn_to(self._page - 1))
        self._next.on_click(lambda _: self._turn_to(self._page + 1))
        self._save.on_click(lambda _: self._on_save())
        self._undo.on_click(lambda _: self._take(self._history.pop(), "Undone: "))
        self._rank()
        self._status.value = message(status)

    def _count(self) -> str:
        return counted(len(self.labels.positives & set(self._names)), "positive")

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
        pictures = ""
        for i in self._shown:
            if i not in self._cells:
                self._cells[i] = self._new_cell(i)
            self._draw_cell(i)
            photo = f".labeller .labeller-photo.photo-{self._cells[i].children[0].model_id}"
            pictures += f"{photo} {{ background-image: url({picture_uri(self._photos[i])}) }}\n"
        self._style.value = f"<style>{load('labeller.css')}{pictures}</style>"
        *others, old = self.children
        # A new grid, since an old one would keep its scroll position.
        grid = widgets.GridBox([self._cells[i] for i in self._shown]).add_class("labeller-grid")
        self.children = (*others, grid)
        old.close()

    def _new_cell(self, i: int) -> widgets.VBox:
        """Build a photo's buttons.

        They are not reused for other photos, so a click that arrives after a change of page still
        counts for the photo that was clicked.
        """
        name = self._names[i]
        toggle = widgets.ToggleButton().add_class("labeller-photo")
        toggle.add_class(f"photo-{toggle.model_id}")
        toggle.observe(lambda change: self._on_toggle(name, change.new), "value")
        swap = widgets.Button(description="Make it the query").add_class("labeller-swap")
        swap.tooltip = f"Make {valid(name)} the query"
        swap.on_click(lambda _: self._on_swap(name))
        return widgets.VBox([toggle, swap])

    def _draw_cell(self, i: int) -> None:
        toggle, name = self._cells[i].children[0], valid(self._names[i])
        with toggle.hold_sync():
            toggle.value = self._names[i] in self.labels.positives
            toggle.description = f"✓ positive: {name}" if toggle.value else name
            toggle.tooltip = f"{name}, similarity {self._similarities[i]:.2f}"

    def _draw_head(self) -> None:
        """Show the query and the positives of all pages."""
        chosen = [self._names[i] for i in self._order if self._names[i] in self.labels.positives]
        self._head.value = (
            f'<div class="labeller-head">{self._img(self.labels.query, "query")}'
            f"<div><b>Query:</b> {_html(self.labels.query)}<br>"
            f"<b>{self._count()} chosen</b><br>Click each photo that shows the query's "
            "landmark; click it again to undo.<br>The photos most like the query come first."
            f'<div class="chosen">{"".join(self._img(name, "positive") for name in chosen)}</div>'
            "</div></div>"
        )

    def _img(self, name: str, kind: str) -> str:
        uri = picture_uri(self._photos[self._names.index(name)])
        what = f"{kind} {_html(name)}"
        return f'<img class="{kind}" src="{uri}" alt="{what}" title="{what}">'

    # ---- Callbacks

    def _on_toggle(self, name: str, chosen: bool) -> None:
        if name == self.labels.query or chosen == (name in self.labels.positives):
            return  # not a click: _draw_cell set the value
        self._history.append(self.labels)
        self._take(self.labels.toggled(name))

    def _on_swap(self, name: str) -> None:
        old, new = self.labels, self.labels.with_query(name)
        hint = f"; Undo brings back what was chosen for {old.query}"
        lost = old.positives and not new.positives
        self._history.append(old)
        self._take(new, f"The query is {name}: ", hint if lost else "")

    def _take(self, labels: Labels, before: str = "", after: str = "") -> None:
        """Replace the labels, show them, and tell how many there are."""
        same_query, self.labels = labels.query == self.labels.query, labels
        self._undo.disabled = not self._history
        if same_query:
            for i in self._shown:
                self._draw_cell(i)
            self._draw_head()
        else:
            self._rank()
        state = "as saved" if labels == self._saved else "not saved yet"
        self._status.value = message(f"{before}{self._count()} chosen, {state}{after}.")

    def _on_save(self) -> None:
        try:
            write_labels(self._folder, self._names, self.labels)
        except UnicodeEncodeError:
            bad = next(name for name in self._names if name != valid(name))
            reason = f"the name of {bad} is no valid Unicode"
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            self._saved = self.labels
            self._status.value = message(f"Saved in {self._file}: {self._count()}.")
            return
        self._status.value = message(
            f"Not saved in {self._file}: {reason}. Your choices are still here: put that right, "
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
    if absent := [name for name in photos if name not in row]:
        raise ValueError(f"{len(absent)} photos have no embedding, such as {absent[0]!r}")
    return embeddings[[row[name] for name in photos]]


def _html(text: str) -> str:
    return html.escape(valid(text))
