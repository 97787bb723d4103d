"""The figures of the notebooks. Each function draws, shows, optionally saves, and returns nothing.

set_style()
plot_retrieval_grid(photos, titles, frames, save=run / "figures" / "grid.png")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from lib.evaluation.metrics import Interval
from lib.files import replacing

if TYPE_CHECKING:  # figures need no Faiss
    from lib.search.tuning import Loss

RIGHT, WRONG, QUERY, UNKNOWN = "#2a9d3a", "#d1372c", "#2563c9", "#9aa0a6"


def set_style() -> None:
    """One look for all figures, small enough for a notebook in a repository."""
    sns.set_theme(style="whitegrid", context="notebook", palette="colorblind")
    plt.rcParams.update(
        {"figure.dpi": 80, "savefig.dpi": 120, "figure.constrained_layout.use": True}
    )


def _finish(save: Path | None) -> None:
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
    """A sheet of photos, row by row.

    Args:
        photos: n pictures, uint8 (h, w, 3) or float (h, w) maps.
        columns: photos in a row.
        titles: a text over each photo.
        frames: the colour of a frame round each photo, or None for no frame.
        row_labels: a text at the left of each row.
        size: side of a photo in inches.
        save: a file to write the figure to.
    """
    rows = -(-len(photos) // columns)
    height = size * (1.22 if titles is not None else 1.0)
    _, axes = plt.subplots(rows, columns, figsize=(size * columns, height * rows), squeeze=False)
    for i, axis in enumerate(axes.flat):
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        frame = frames[i] if frames is not None and i < len(photos) else None
        for spine in axis.spines.values():
            spine.set(visible=frame is not None, color=frame, linewidth=4)
        if i >= len(photos):
            continue
        axis.imshow(photos[i], cmap="magma", interpolation="nearest")
        if titles is not None:
            axis.set_title(titles[i], fontsize=9)
        if row_labels is not None and i % columns == 0:
            axis.set_ylabel(row_labels[i // columns], fontsize=9)
    _finish(save)


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
    """The query and what was found for it, with similarities; green frames are right, red wrong.

    Args:
        photos: uint8 (n, h, w, 3), all photos.
        query: index of the query.
        retrieved: indices of the photos found, the best first.
        similarities: cosine of each of them to the query.
        positives: bool (n,), which photos show the query's landmark; None if not known (grey).
        columns: photos in a row.
        save: a file to write the figure to.
    """

    def frame(photo: int) -> str:
        if positives is None:
            return UNKNOWN
        return RIGHT if positives[photo] else WRONG

    titles = ["query", *(f"{r}: {s:.2f}" for r, s in enumerate(similarities, start=1))]
    plot_photo_grid(
        [photos[query], *(photos[i] for i in retrieved)],
        columns,
        titles=titles,
        frames=[QUERY, *(frame(i) for i in retrieved)],
        save=save,
    )


def plot_training_curves(history: pd.DataFrame, *, save: Path | None = None) -> None:
    """Loss, what it does to the distances, and what it is worth on landmarks not trained on.

    Args:
        history: from :func:`lib.training.stages.train`, a row an epoch. A dotted line stands where
            a stage ends and the next begins.
        save: a file to write the figure to.
    """
    begins = [i for a, i in pairwise(history.index) if history["stage"][a] != history["stage"][i]]
    panels = {
        "training loss": ["loss"],
        "squared distances": ["positive_distance", "negative_distance"],
        "signs of life": ["active_share", "embedding_spread"],
        "validation": ["val_map", "val_accuracy"],
    }
    _, axes = plt.subplots(1, len(panels), figsize=(14, 3.2))
    for axis, (title, columns) in zip(axes, panels.items(), strict=True):
        for column in columns:
            axis.plot(history.index, history[column], marker="o", label=column)
        for epoch in begins:
            axis.axvline(epoch - 0.5, color="grey", linestyle=":")
        axis.set(title=title, xlabel="epoch")
        axis.set_ylim(bottom=0)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if len(columns) > 1:
            axis.legend(fontsize=9)
    _finish(save)


def plot_distance_histograms(
    distances: Mapping[str, tuple[np.ndarray, np.ndarray]], *, save: Path | None = None
) -> None:
    """Distances to positives and to negatives, a panel for each entry.

    Args:
        distances: title -> (squared distances to positives, to negatives).
        save: a file to write the figure to.
    """
    _, axes = plt.subplots(1, len(distances), figsize=(5.2 * len(distances), 3.2), squeeze=False)
    bins = np.linspace(0, 4, 41)
    for axis, (title, (positive, negative)) in zip(axes.flat, distances.items(), strict=True):
        axis.hist(positive, bins, alpha=0.65, density=True, color=RIGHT, label="same landmark")
        axis.hist(negative, bins, alpha=0.65, density=True, color=WRONG, label="other landmark")
        axis.set(title=title, xlabel="squared distance", ylabel="density", xlim=(0, 4))
        axis.legend(fontsize=9)
    _finish(save)


def plot_histograms(
    values: Mapping[str, np.ndarray], *, xlabel: str, save: Path | None = None
) -> None:
    """Distributions over one axis.

    Args:
        values: name -> float (n,).
        xlabel: what is measured.
        save: a file to write the figure to.
    """
    _, axis = plt.subplots(figsize=(6.5, 3.2))
    bins = np.histogram_bin_edges(np.concatenate(list(values.values())), bins=40)
    for name, sample in values.items():
        axis.hist(sample, bins, alpha=0.6, label=name)
    axis.set(xlabel=xlabel, ylabel="count")
    if len(values) > 1:
        axis.legend(fontsize=9)
    _finish(save)


def plot_bars(values: Mapping[str, float], *, xlabel: str, save: Path | None = None) -> None:
    """A bar with its value written to it for each entry.

    Args:
        values: name -> share, from 0 to 1.
        xlabel: what is measured.
        save: a file to write the figure to.
    """
    _, axis = plt.subplots(figsize=(7, 0.5 * len(values) + 1))
    colours = sns.color_palette()[: len(values)]
    bars = axis.barh(list(values), list(values.values()), color=colours, height=0.6)
    axis.bar_label(bars, fmt="{:.0%}", padding=4)
    axis.invert_yaxis()
    axis.set(xlabel=xlabel, xlim=(0, 1))
    _finish(save)


def plot_intervals(
    values: Mapping[str, Interval], *, xlabel: str, save: Path | None = None
) -> None:
    """A bar with its confidence interval for each entry.

    Args:
        values: name -> mean and interval.
        xlabel: what is measured.
        save: a file to write the figure to.
    """
    names = list(values)
    means = np.array([v.value for v in values.values()])
    low, high = (np.array([getattr(v, end) for v in values.values()]) for end in ("low", "high"))
    _, axis = plt.subplots(figsize=(7, 0.5 * len(names) + 1))
    axis.barh(names, means, color=sns.color_palette()[: len(names)], height=0.6)
    errors = np.clip([means - low, high - means], 0, None)
    axis.errorbar(means, names, xerr=errors, fmt="none", ecolor="black", capsize=4)
    axis.invert_yaxis()
    axis.set(xlabel=xlabel, xlim=(0, None))
    _finish(save)


def plot_mining(
    distances: Mapping[str, tuple[np.ndarray, np.ndarray]],
    margin: float,
    *,
    save: Path | None = None,
) -> None:
    """All triplets of a batch by their two distances, coloured by what they have to teach.

    Args:
        distances: title of a panel -> (distances of anchor and positive, of anchor and negative),
            float (t,) each, of t triplets.
        margin: below the diagonal plus the margin a triplet is active.
        save: a file to write the figure to.
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
    _finish(save)


def plot_loss_surface(margin: float, temperature: float, *, save: Path | None = None) -> None:
    """The margin loss and its soft form against the distance of the negative.

    Args:
        margin: of the margin loss.
        temperature: of the soft loss.
        save: a file to write the figure to.
    """
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
        axis.legend(fontsize=9)
    _finish(save)


def plot_projection(
    points: Mapping[str, np.ndarray], labels: np.ndarray, *, save: Path | None = None
) -> None:
    """Embeddings in the plane, coloured by landmark.

    Args:
        points: title -> float (n, 2), a panel each.
        labels: (n,), the landmark of each photo.
        save: a file to write the figure to.
    """
    _, number = np.unique(labels, return_inverse=True)
    rows = -(-len(points) // 2)
    _, axes = plt.subplots(rows, 2, figsize=(10, 3.6 * rows), squeeze=False)
    for axis, (title, xy) in zip(axes.flat, points.items(), strict=False):
        axis.scatter(*xy.T, c=number, cmap="tab20", s=36, edgecolor="white", linewidth=0.5)
        axis.set(title=title, xticks=[], yticks=[])
        axis.grid(False)
    _finish(save)


def plot_intervals_by(
    values: Mapping[str, Mapping[float, Interval]],
    *,
    xlabel: str,
    ylabel: str,
    save: Path | None = None,
) -> None:
    """Curves of values with their intervals.

    Args:
        values: name of the curve -> x -> the value there.
        xlabel: what x is.
        ylabel: what the values are.
        save: a file to write the figure to.
    """
    _, axis = plt.subplots(figsize=(6, 3.4))
    markers = "osDv^"
    for number, (name, of) in enumerate(values.items()):
        x = np.array(list(of), dtype=float)
        value, low, high = np.array(list(of.values()), dtype=float).T
        shift = 1 + 0.008 * (number - (len(values) - 1) / 2)  # so that no bar hides another
        axis.errorbar(
            x * shift,
            value,
            yerr=np.clip([value - low, high - value], 0, None),
            marker=markers[number % len(markers)],
            capsize=3,
            label=name,
        )
    axis.set(xlabel=xlabel, ylabel=ylabel, xticks=x, xticklabels=[f"{v:g}" for v in x])
    axis.legend(fontsize=9)
    _finish(save)


def plot_nearest(right: np.ndarray, wrong: np.ndarray, *, save: Path | None = None) -> None:
    """The most similar photo of the query's landmark against the most similar of another.

    Args:
        right: (q,), cosine of each query to the first.
        wrong: (q,), to the second.
        save: a file to write the figure to.
    """
    _, axis = plt.subplots(figsize=(4.6, 4.2))
    failed = wrong > right
    for chosen, colour, label in (
        (~failed, RIGHT, f"right one first: {np.sum(~failed)}"),
        (failed, WRONG, f"wrong one first: {np.sum(failed)}"),
    ):
        axis.scatter(wrong[chosen], right[chosen], s=12, color=colour, alpha=0.6, label=label)
    low, high = min(right.min(), wrong.min()), 1.0
    axis.plot([low, high], [low, high], color="black", linewidth=0.8)
    axis.set(xlabel="most similar photo of another landmark", ylabel="of the query's landmark")
    axis.legend(fontsize=9, loc="lower left")
    _finish(save)


def plot_recall_by_rank(curves: Mapping[str, np.ndarray], *, save: Path | None = None) -> None:
    """Recall against the number of photos looked at.

    Args:
        curves: name -> recall at rank 1, 2, ...
        save: a file to write the figure to.
    """
    _, axis = plt.subplots(figsize=(6, 3.4))
    for name, recall in curves.items():
        axis.plot(np.arange(1, len(recall) + 1), recall, label=name)
    axis.set(
        xlabel="photos looked at", ylabel="share of positives found", ylim=(0, 1), xscale="log"
    )
    axis.legend(fontsize=9)
    _finish(save)


def plot_ladder(summaries: Mapping[str, pd.DataFrame], *, save: Path | None = None) -> None:
    """What each fix is worth: the mAP rung by rung, and each fix's share of it.

    Left, each rung with its interval; the vertical lines are what no head is trained for.
    Right, what a fix adds when its turn comes, and what the whole recipe loses when it alone is
    missing; an interval that holds 0 proves nothing. Most fixes are worth little beside the largest
    one, so the axis is logarithmic beyond 0.1.

    Args:
        summaries: title -> from :func:`lib.studies.fixes.summarize`; a row of panels each.
        save: a file to write the figure to.
    """
    added, missed = sns.color_palette()[:2]
    _, axes = plt.subplots(
        len(summaries), 2, figsize=(13, 4.4 * len(summaries)), squeeze=False, sharey="row"
    )
    for (left, right), (title, summary) in zip(axes, summaries.items(), strict=True):
        one = summary[summary["kind"] == "rung"]
        rows = np.arange(len(one))
        left.barh(rows, one["map"], color=added, alpha=0.35, height=0.7)
        _draw_intervals(left, rows, one[["map", "low", "high"]], added, None)
        references = summary.loc[summary["kind"] == "reference", "map"]
        for (name, value), style in zip(references.items(), ("--", ":"), strict=True):
            left.axvline(value, color="black", linestyle=style, label=name)
        left.set(title=title, xlabel="mAP", xlim=(0, 1), yticks=rows, yticklabels=one.index)
        left.legend(fontsize=9, loc="lower left")
        gains = one.loc[one["fix"] != "", ["gain", "gain_low", "gain_high"]]
        _draw_intervals(right, rows[1:] - 0.14, gains, added, "added in its turn")
        # What is missing is the negative gain of the arm without it, its ends exchanged.
        without = summary[summary["kind"] == "without"].set_index("fix")
        losses = -without[["gain", "gain_high", "gain_low"]]
        at = [one["fix"].tolist().index(fix) + 0.14 for fix in losses.index]
        _draw_intervals(right, at, losses, missed, "missing from the whole recipe")
        right.axvline(0, color="black", linewidth=0.8)
        right.set_xscale("symlog", linthresh=0.1, linscale=2)
        ticks = [-0.1, -0.05, 0, 0.05, 0.1, 0.2, 0.5, 1]
        right.set(
            title="what the fix is worth",
            xlabel="difference in mAP (logarithmic beyond 0.1)",
            xlim=(min(-0.1, *gains["gain_low"], *losses["gain_high"]), 1),
            xticks=ticks,
            xticklabels=[f"{tick:g}" for tick in ticks],
        )
        right.legend(fontsize=9)
        left.invert_yaxis()
    _finish(save)


def plot_postprocessing(summaries: Mapping[str, pd.DataFrame], *, save: Path | None = None) -> None:
    """What each step after training is worth, and what it costs per query.

    Left the mAP with its interval, in the middle the gain against what the step builds on, right
    the milliseconds for one query, embedding and search together.

    Args:
        summaries: title -> from :func:`lib.studies.postprocessing.summarize`; a row of panels each.
        save: a file to write the figure to.
    """
    colours = dict(zip(("descriptor", "re-ranking"), sns.color_palette(), strict=False))
    _, axes = plt.subplots(
        len(summaries), 3, figsize=(14, 4.6 * len(summaries)), squeeze=False, sharey="row"
    )
    for (left, middle, right), (title, summary) in zip(axes, summaries.items(), strict=True):
        for kind, colour in colours.items():
            rows = np.flatnonzero(summary["kind"] == kind)
            one = summary.iloc[rows]
            left.barh(rows, one["map"], color=colour, alpha=0.35, height=0.7, label=kind)
            _draw_intervals(left, rows, one[["map", "low", "high"]], colour, None)
            gains = one[["gain", "gain_low", "gain_high"]]
            _draw_intervals(middle, rows, gains, colour, None)
            both = one["embedding_ms"] + one["search_ms"]
            right.barh(rows, both, color=colour, alpha=0.35, height=0.7)
            for row, value in zip(rows, both, strict=True):
                right.text(value, row, f" {value:.3g}", va="center", fontsize=9)
        lowest = 0.1 * np.floor(10 * summary["low"].min())
        left.set(
            title=title,
            xlabel="mAP (95 % interval)",
            xlim=(lowest, min(1, summary["high"].max() + 0.02)),
            yticks=np.arange(len(summary)),
            yticklabels=summary.index,
        )
        left.legend(fontsize=9, loc="lower left")
        middle.axvline(0, color="black", linewidth=0.8)
        middle.set(title="gain against what it builds on", xlabel="difference in mAP")
        right.set(title="milliseconds per query", xlabel="embedding and search")
        right.margins(x=0.15)
        left.invert_yaxis()
    _finish(save)


def _draw_intervals(axis, rows, values: pd.DataFrame, color, label: str | None) -> None:
    """Points with error bars; ``values`` has the columns mean, low, high."""
    mean, low, high = values.to_numpy(float).T
    errors = np.clip([mean - low, high - mean], 0, None)
    axis.errorbar(mean, rows, xerr=errors, fmt="o", color=color, capsize=4, label=label)


def plot_frontier(frontier: pd.DataFrame, *, save: Path | None = None) -> None:
    """Recall against speed for every setting of an index; the larger a mark, the more memory.

    Args:
        frontier: of :func:`lib.search.tuning.tune`. Marks of the full index only; the line joins
            those that no other one beats, the ring is round the choice.
        save: a file to write the figure to.
    """
    table = frontier[frontier["vectors"] == frontier["vectors"].max()]
    _, axis = plt.subplots(figsize=(7.5, 4.4))
    for factory, rows in table.groupby("factory", sort=False):
        size = 400 * rows["bytes"] / table["bytes"].max() + 12  # area by memory
        label = f"{factory}: {rows['bytes'].iloc[0] / 1e6:,.3g} MB"
        axis.scatter(rows["recall"], rows["qps_2"], size, alpha=0.5, label=label)
    front = table[table["frontier"]].sort_values("recall")
    axis.plot(front["recall"], front["qps_2"], color="black", linewidth=1)
    chosen = table[table["chosen"]]
    axis.scatter(chosen["recall"], chosen["qps_2"], 220, "none", edgecolor=WRONG, linewidth=2)
    axis.set(xlabel="recall", ylabel="queries per second, 2 threads", yscale="log")
    for handle in axis.legend(fontsize=9, loc="lower left").legend_handles:
        handle.set_sizes([40])
    _finish(save)


COSTS = {"build_seconds": "seconds to build", "query_ms": "ms per query", "bytes": "bytes"}


def plot_growth(
    table: pd.DataFrame,
    fits: Mapping[str, Mapping[str, Mapping[str, float]]],
    *,
    save: Path | None = None,
) -> None:
    """Costs by the number of photos on logarithmic axes, where n^a is a line of slope a.

    Args:
        table: columns ``side``, ``photos``, and those of ``COSTS``.
        fits: side -> cost -> ``exponent``, its standard ``error``, and ``factor``, as
            ``python -m benchmarks.growth`` fits them.
        save: a file to write the figure to.
    """
    _, axes = plt.subplots(1, len(COSTS), figsize=(14, 4))
    for axis, (cost, label) in zip(axes, COSTS.items(), strict=True):
        for number, (side, rows) in enumerate(table.groupby("side")):
            line = fits[side][cost]
            n, colour = rows["photos"].to_numpy(float), f"C{number}"
            name = f"{side}: n^({line['exponent']:.2f} ± {line['error']:.2f})"
            axis.plot(n, rows[cost], "o", color=colour, label=name)
            axis.plot(n, line["factor"] * n ** line["exponent"], color=colour, linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="photos", title=label)
        axis.legend(fontsize=9)
    _finish(save)


def plot_probes(table: pd.DataFrame, *, save: Path | None = None) -> None:
    """What an inverted file finds and what share of the time it takes, by lists visited.

    Args:
        table: by number of lists visited (index): ``recall``, and ``time``, a share of that of
            comparing everything.
        save: a file to write the figure to.
    """
    _, axis = plt.subplots(figsize=(7.5, 4))
    axis.plot(table.index, table["recall"], "o-", label="of the ten nearest, found")
    axis.plot(table.index, table["time"], "s--", label="of the time of comparing everything")
    axis.set(xscale="log", xlabel="lists visited", ylabel="share", ylim=(0, 1.05))
    axis.set_xticks(table.index, labels=map(str, table.index), minor=False)
    axis.legend()
    _finish(save)


def plot_compression(losses: Sequence[Loss], *, save: Path | None = None) -> None:
    """Similarities as compressed indexes have them, against the true ones.

    Args:
        losses: of :func:`lib.search.tuning.compression_losses`, a panel each.
        save: a file to write the figure to.
    """
    size = (3.4 * len(losses), 3.8)
    _, axes = plt.subplots(1, len(losses), figsize=size, sharex=True, sharey=True, squeeze=False)
    for axis, loss in zip(axes[0], losses, strict=True):
        axis.scatter(loss.exact, loss.found, 3, alpha=0.2, linewidth=0, rasterized=True)
        axis.axline((1, 1), slope=1, color="black", linewidth=1)
        title = f"{loss.factory}: {loss.bytes_each} bytes a photo"
        axis.set(title=f"{title}\nrecall {loss.recall:.2f}, re-ranked {loss.reranked:.2f}")
        axis.set(xlabel="true similarity", aspect="equal")
    axes[0, 0].set_ylabel("similarity in the index")
    _finish(save)


def plot_capacity(table: pd.DataFrame, *, save: Path | None = None) -> None:
    """Time and room against the number of photos, both axes logarithmic.

    Args:
        table: from :func:`lib.cluster.capacity.capacity`.
        save: a file to write the figure to.
    """
    _, (hours, room) = plt.subplots(1, 2, figsize=(10, 3.6))
    for axis, columns, scale, label in (
        (hours, ("training_hours", "embedding_hours"), 1, "hours"),
        (room, ("photo_bytes", "embedding_bytes", "index_bytes"), 1e12, "10^12 bytes"),
    ):
        for column in columns:
            name = column.rpartition("_")[0]
            axis.loglog(table.index, table[column] / scale, marker="o", label=name)
        axis.set(xlabel="photos", ylabel=label)
        axis.legend()
    _finish(save)
