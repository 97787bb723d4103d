"""The figures of the notebooks: photos, training curves, search results.

    set_style()
    plot_retrieval_grid(photos, query, retrieved, similarities, positives, save=run / "grid.png")

Each function draws and shows one figure, and returns nothing. With ``save`` it also writes the
figure to that file; the suffix names the format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.container import BarContainer
from matplotlib.patches import Rectangle

from lib.evaluation.metrics import Interval
from lib.files import replacing

Distances = tuple[np.ndarray, np.ndarray]  # to positives and to negatives, float (n,) each

# Of Okabe and Ito's colours, which nearly everybody can tell apart; photos get a mark as well.
RIGHT, WRONG, QUERY, UNKNOWN = "#0072b2", "#d55e00", "#222222", "#9aa0a6"
MARKS = {RIGHT: "\N{CHECK MARK}", WRONG: "\N{BALLOT X}", QUERY: "?"}
# Where a legend hides least. Asked for in so many words: where a busy machine is slow to find the
# place, matplotlib would otherwise warn.
LEGEND = {"loc": "best"}


def set_style() -> None:
    """Set one style for all figures, small enough for notebooks in a repository."""
    sns.set_theme(style="whitegrid", context="notebook", palette="colorblind")
    plt.rcParams.update(
        {"figure.dpi": 96, "savefig.dpi": 120, "figure.constrained_layout.use": True}
    )


def finish(save: Path | None) -> None:
    """Save the current figure if a file is given, show it and close it."""
    if save is not None:
        with replacing(save) as part:
            plt.savefig(part, format=save.suffix[1:])
    plt.show()
    plt.close()


def plot_photo_grid(
    photos: Sequence[np.ndarray],
    columns: int,
    *,
    titles: Sequence[str] | None = None,
    frames: Sequence[str | None] | None = None,
    row_labels: Sequence[str] | None = None,
    size: float = 1.3,
    save: Path | None = None,
) -> None:
    """Draw photos in a grid, row by row.

    Args:
        photos: n pictures, uint8 (h, w, 3) or float (h, w) maps.
        columns: photos in a row.
        titles: a text above each photo.
        frames: the colour of each photo's frame, with a mark of ``MARKS``; None: no frame.
        row_labels: a text to the left of each row.
        size: side of a photo in inches.
    """
    rows = -(-len(photos) // columns)
    height = size * (1.22 if titles is not None else 1.0)
    _, axes = plt.subplots(rows, columns, figsize=(size * columns, height * rows), squeeze=False)
    for i, axis in enumerate(axes.flat):
        if i >= len(photos):
            axis.axis("off")
            continue
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        frame = frames[i] if frames is not None else None
        for spine in axis.spines.values():
            spine.set(visible=frame is not None, color=frame, linewidth=4)
        axis.imshow(photos[i], cmap="magma", interpolation="nearest")
        if mark := MARKS.get(frame):
            box = {"facecolor": "white", "edgecolor": frame, "boxstyle": "round,pad=0.15"}
            place = {"transform": axis.transAxes, "ha": "right", "va": "top"}
            axis.text(0.97, 0.97, mark, color=frame, fontsize=9, bbox=box, **place)
        if titles is not None:
            axis.set_title(titles[i], fontsize=9)
        if row_labels is not None and i % columns == 0:
            axis.set_ylabel(row_labels[i // columns], fontsize=9)
    finish(save)


def plot_retrieval_grid(
    photos: np.ndarray,
    query: int,
    retrieved: Sequence[int],
    similarities: Sequence[float],
    positives: np.ndarray | None,
    *,
    columns: int = 6,
    save: Path | None = None,
) -> None:
    """Draw a query and its results with their similarities; a tick is right, a cross wrong.

    Args:
        photos: uint8 (n, h, w, 3), all photos.
        query: index of the query.
        retrieved: indices of the results, the most similar first.
        similarities: the cosine of each result to the query.
        positives: bool (n,), which photos show the query's landmark; None: unknown (grey frames).
        columns: photos in a row.
    """
    marks = [
        UNKNOWN if positives is None else RIGHT if positives[photo] else WRONG
        for photo in retrieved
    ]
    titles = ["query", *(f"{r}: {s:.2f}" for r, s in enumerate(similarities, start=1))]
    shown = photos[[query, *retrieved]]
    plot_photo_grid(shown, columns, titles=titles, frames=[QUERY, *marks], save=save)


def plot_matches(
    photos: tuple[np.ndarray, np.ndarray],
    points: tuple[np.ndarray, np.ndarray],
    fits: np.ndarray | None = None,
    *,
    outlines: Mapping[str, np.ndarray] | None = None,
    title: str = "",
    size: float = 5.6,
    save: Path | None = None,
) -> None:
    """Draw lines between the matching points of two photos, side by side.

    Args:
        photos: two pictures, uint8 (h, w, 3), of any shapes.
        points: of each photo, float (t, 2), x and y in pixels; match i joins points i of both.
        fits: bool (t,), the matches that are drawn thick and blue, over the thin orange others;
            None: all are thin and orange.
        outlines: name -> polygon in the second photo, float (m, 2), which is clipped by the photo.
        size: width of the figure in inches.
    """
    (left, right), gap = photos, 8
    height, (start, width) = max(map(len, photos)), (left.shape[1] + gap, right.shape[1])
    canvas = np.full((height, start + width, 3), 255, np.uint8)
    canvas[: len(left), : start - gap], canvas[: len(right), start:] = left, right
    _, axis = plt.subplots(figsize=(size, size * height / (start + width) + 0.4))
    axis.imshow(canvas)
    fits = np.zeros(len(points[0]), bool) if fits is None else fits
    ends = np.stack([points[0], points[1] + (start, 0)], axis=1)  # (t, 2, 2)
    for chosen, colour, wide in ((~fits, "#e39b2d", 0.6), (fits, RIGHT, 1.1)):
        wide *= np.clip(150 / (len(fits) + 1), 0.4, 1)  # many would hide the photos
        axis.plot(*np.moveaxis(ends[chosen], -1, 0).swapaxes(1, 2), color=colour, linewidth=wide)
    frame = Rectangle((start, 0), width, len(right), transform=axis.transData)
    styles = zip(("-", ":"), ("black", "white"), strict=True)
    for (name, corners), (dashes, colour) in zip((outlines or {}).items(), styles, strict=False):
        closed = np.add([*corners, corners[0]], (start, 0))
        style = {"color": colour, "linestyle": dashes, "linewidth": 2.5}
        axis.plot(*closed.T, label=name, **style)[0].set_clip_path(frame)
    axis.set(xticks=[], yticks=[], xlim=(0, start + width), ylim=(height, 0))
    axis.set_title(title, fontsize=10)
    axis.grid(False)
    if outlines:
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "ncols": len(outlines)}
        axis.legend(fontsize=9, facecolor="#b0b0b0", framealpha=1, **below)  # white is seen on it
    finish(save)


def plot_training_curves(
    history: pd.DataFrame,
    names: Sequence[str] = (),
    *,
    before: float | None = None,
    references: Mapping[str, float] | None = None,
    save: Path | None = None,
) -> None:
    """Draw the loss, and below it the validation mAP, by epoch.

    Args:
        history: from :func:`lib.training.stages.train`; dotted lines separate the stages.
        names: of the stages.
        before: the mAP before the first epoch, drawn as epoch 0.
        references: name -> mAP to compare with, drawn as level lines.
    """
    _, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 6.4), sharex=True, height_ratios=(3, 2), squeeze=True
    )
    top.plot(history.index, history["loss"], marker="o", label="training, augmented photos")
    if history["val_loss"].notna().any():
        top.plot(history.index, history["val_loss"], marker="s", label="validation")
    top.set(ylabel="loss, mean of the epoch", ylim=(0, None))
    value = (
        history["val_map"]
        if before is None
        else pd.concat([pd.Series({0: before}), history["val_map"]])
    )
    bottom.plot(value.index, value, marker="s", color=sns.color_palette()[1], label="this training")
    for (name, level), dashes in zip((references or {}).items(), ("--", ":", "-."), strict=False):
        bottom.axhline(level, color="black", linestyle=dashes, linewidth=1, label=name)
    bottom.set(xlabel="epoch", ylabel="validation mAP", ylim=(0, 1))
    bottom.xaxis.get_major_locator().set_params(integer=True)
    stages = history["stage"].unique()
    for number, stage in enumerate(stages):
        first = history.index[history["stage"] == stage][0]
        for axis in (top, bottom) if number else ():
            axis.axvline(first - 0.5, color="grey", linestyle=":")
        if number < len(names):
            place = {"transform": top.get_xaxis_transform(), "va": "bottom", "fontsize": 10}
            top.text(first - 0.4, 1.01, names[number], **place)
    for axis in (top, bottom):
        axis.legend(fontsize=9, **LEGEND)
    finish(save)


def plot_distance_histograms(
    distances: Mapping[str, Distances], *, save: Path | None = None
) -> None:
    """Draw histograms of the squared distances to positives and to negatives, a panel for each."""
    _, axes = plt.subplots(1, len(distances), figsize=(5.2 * len(distances), 3.2), squeeze=False)
    bins = np.linspace(0, 4, 41)
    for axis, (title, (positive, negative)) in zip(axes.flat, distances.items(), strict=True):
        axis.hist(positive, bins, alpha=0.65, density=True, color=RIGHT, label="same landmark")
        axis.hist(negative, bins, alpha=0.65, density=True, color=WRONG, label="other landmark")
        axis.set(title=title, xlabel="squared distance", ylabel="density", xlim=(0, 4))
        axis.legend(fontsize=9, **LEGEND)
    finish(save)


def plot_histograms(
    values: Mapping[str, np.ndarray], *, xlabel: str, save: Path | None = None
) -> None:
    """Draw histograms of the entries of ``values``, name -> float (n,), over one axis."""
    _, axis = plt.subplots(figsize=(6.5, 3.2))
    bins = np.histogram_bin_edges(np.concatenate(list(values.values())), bins=40)
    for name, sample in values.items():
        axis.hist(sample, bins, alpha=0.6, label=name)
    axis.set(xlabel=xlabel, ylabel="count")
    if len(values) > 1:
        axis.legend(fontsize=9, **LEGEND)
    finish(save)


def plot_bars(values: Mapping[str, float], *, xlabel: str, save: Path | None = None) -> None:
    """Draw a bar for each entry, name -> share from 0 to 1, labelled with its value."""
    axis, bars = _draw_bars(list(values), list(values.values()))
    axis.bar_label(bars, fmt="{:.0%}", padding=4)
    axis.set(xlabel=xlabel, xlim=(0, 1))
    finish(save)


def plot_intervals(
    values: Mapping[str, Interval], *, xlabel: str, save: Path | None = None
) -> None:
    """Draw a bar with its confidence interval for each entry."""
    means, low, high = np.array(list(values.values())).T
    axis, _ = _draw_bars(list(values), means)
    errors = error_bars(means, low, high)
    axis.errorbar(means, list(values), xerr=errors, fmt="none", ecolor="black", capsize=4)
    axis.set(xlabel=xlabel, xlim=(0, None))
    finish(save)


def plot_differences(
    differences: Mapping[str, Interval], *, xlabel: str, save: Path | None = None
) -> None:
    """Draw differences with their intervals; one that contains 0 is hollow."""
    _, axis = plt.subplots(figsize=(7, 0.5 * len(differences) + 1))
    for row, (value, low, high) in enumerate(differences.values()):
        style = {"color": QUERY, "marker": "o", "capsize": 4}
        hollow = {"markerfacecolor": "white"} if low <= 0 <= high else {}
        axis.errorbar(
            value, row, xerr=error_bars(*np.array([[value], [low], [high]])), **style | hollow
        )
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(xlabel=xlabel, yticks=range(len(differences)), yticklabels=list(differences))
    axis.invert_yaxis()
    finish(save)


def _draw_bars(names: list[str], values: Sequence[float]) -> tuple[plt.Axes, BarContainer]:
    """Draw horizontal bars, the first on top."""
    _, axis = plt.subplots(figsize=(7, 0.5 * len(names) + 1))
    axis.invert_yaxis()
    return axis, axis.barh(names, values, color=sns.color_palette()[: len(names)], height=0.6)


def error_bars(mean: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Compute how far intervals reach below and above their means: three (n,) -> (2, n)."""
    return np.clip([mean - low, high - mean], 0, None)


def plot_mining(
    distances: Mapping[str, Distances], margin: float, *, save: Path | None = None
) -> None:
    """Draw the triplets of a batch by their two distances: easy, semi-hard or hard.

    Args:
        distances: title of a panel -> the anchors' distances, of t triplets.
        margin: a triplet is active below the diagonal plus the margin.
    """
    _, axes = plt.subplots(1, len(distances), figsize=(5.2 * len(distances), 4), squeeze=False)
    for axis, (title, (positive, negative)) in zip(axes.flat, distances.items(), strict=True):
        kinds = {
            "easy": (UNKNOWN, negative >= positive + margin),
            "semi-hard": ("#e39b2d", (negative > positive) & (negative < positive + margin)),
            "hard": (WRONG, negative <= positive),
        }
        for kind, (colour, chosen) in kinds.items():
            label = f"{kind}: {chosen.mean():.1%}"
            axis.scatter(positive[chosen], negative[chosen], 3, color=colour, label=label)
        end = max(positive.max(), negative.max())
        axis.plot([0, end], [0, end], color="black", linewidth=1)
        axis.plot([0, end], [margin, end + margin], color="black", linewidth=1, linestyle="--")
        axis.set(title=title, xlabel="distance of the positive", ylabel="distance of the negative")
        axis.legend(fontsize=9, markerscale=4, loc="lower right")
    finish(save)


def plot_loss_surface(margin: float, temperature: float, *, save: Path | None = None) -> None:
    """Draw the margin loss and its soft form against the distance of the negative."""
    negative = np.linspace(0, 2.5, 200)
    _, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharex=True)
    for positive in (0.4, 1.0):
        excess = positive - negative
        label = f"positive at {positive}"
        axes[0].plot(negative, np.maximum(excess + margin, 0), label=label)
        axes[1].plot(negative, np.logaddexp(0, excess / (2 * temperature)), label=label)
    axes[0].set(title=f"margin {margin}", ylabel="loss of one triplet")
    axes[1].set(title=f"soft, temperature {temperature}")
    for axis in axes:
        axis.set(xlabel="squared distance of the negative")
        axis.legend(fontsize=9, **LEGEND)
    finish(save)


def plot_projection(
    points: Mapping[str, np.ndarray], labels: np.ndarray, *, save: Path | None = None
) -> None:
    """Draw embeddings projected to two dimensions, coloured by landmark.

    Args:
        points: title of a panel -> float (n, 2).
        labels: (n,), the landmark of each photo.
    """
    _, number = np.unique(labels, return_inverse=True)
    rows = -(-len(points) // 2)
    _, axes = plt.subplots(rows, 2, figsize=(10, 3.6 * rows), squeeze=False)
    for axis, (title, xy) in zip(axes.flat, points.items(), strict=False):
        axis.scatter(*xy.T, c=number, cmap="tab20", s=36, edgecolor="white", linewidth=0.5)
        axis.set(title=title, xticks=[], yticks=[])
        axis.grid(False)
    finish(save)


def plot_intervals_by(
    values: Mapping[str, Mapping[float, Interval]],
    *,
    xlabel: str,
    ylabel: str,
    save: Path | None = None,
) -> None:
    """Draw a curve for each entry of ``values``, name -> x -> the value there, with intervals."""
    _, axis = plt.subplots(figsize=(6.5, 3.6))
    markers = "osDv^"
    for number, (name, of) in enumerate(values.items()):
        x = np.array(list(of), dtype=float)
        value, low, high = np.array(list(of.values()), dtype=float).T
        shift = 1 + 0.008 * (number - (len(values) - 1) / 2)  # apart, so that none hides another
        style = {"marker": markers[number % len(markers)], "capsize": 3, "label": name}
        axis.errorbar(x * shift, value, error_bars(value, low, high), **style)
    axis.set(xlabel=xlabel, ylabel=ylabel, xticks=x, xticklabels=[f"{v:g}" for v in x])
    above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3}  # no bar is there
    axis.legend(fontsize=9, frameon=False, **above)
    finish(save)


def plot_nearest(right: np.ndarray, wrong: np.ndarray, *, save: Path | None = None) -> None:
    """Draw each query's nearest positive against its nearest negative.

    Args:
        right: float (q,), cosine of each query to its most similar positive.
        wrong: float (q,), cosine to its most similar photo of another landmark.
    """
    _, axis = plt.subplots(figsize=(4.6, 4.2))
    failed = wrong > right
    for kind, chosen, colour in (("right", ~failed, RIGHT), ("wrong", failed, WRONG)):
        label = f"{kind} one first: {np.sum(chosen)}"
        axis.scatter(wrong[chosen], right[chosen], s=12, color=colour, alpha=0.6, label=label)
    low, high = min(right.min(), wrong.min()), 1.0
    axis.plot([low, high], [low, high], color="black", linewidth=0.8)
    axis.set(xlabel="most similar photo of another landmark", ylabel="of the query's landmark")
    axis.legend(fontsize=9, loc="lower left")
    finish(save)


def plot_curves(
    curves: Mapping[str, Mapping[float, float]],
    levels: Mapping[str, float] | None = None,
    *,
    xlabel: str,
    ylabel: str,
    logarithmic: bool = False,
    save: Path | None = None,
) -> None:
    """Draw a curve for each entry, name -> x -> a value from 0 to 1.

    Args:
        levels: name -> value to compare with, drawn as level lines.
        logarithmic: the axis of x.
    """
    _, axis = plt.subplots(figsize=(7, 3.6))
    for (name, of), marker in zip(curves.items(), cycle("osDv^"), strict=False):
        many = len(of) > 12
        axis.plot(list(of), list(of.values()), marker="" if many else marker, label=name)
    for (name, level), dashes in zip((levels or {}).items(), cycle(("--", ":")), strict=False):
        axis.axhline(level, color="black", linestyle=dashes, linewidth=1, label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 1))
    if logarithmic:
        axis.set(xscale="log")
    else:
        axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=9, **LEGEND)
    finish(save)


def plot_capacity(table: pd.DataFrame, *, save: Path | None = None) -> None:
    """Draw hours and bytes by photos, as of :func:`lib.cluster.capacity.capacity`."""
    _, (hours, room) = plt.subplots(1, 2, figsize=(10, 3.6))
    for axis, columns, scale, label in (
        (hours, ("training_hours", "embedding_hours"), 1, "hours"),
        (room, ("photo_bytes", "embedding_bytes", "index_bytes"), 1e12, "10^12 bytes"),
    ):
        for column in columns:
            name = column.rpartition("_")[0]
            axis.loglog(table.index, table[column] / scale, marker="o", label=name)
        axis.set(xlabel="photos", ylabel=label)
        axis.legend(**LEGEND)
    finish(save)
