"""Draws the figures of the studies: the ladder of fixes, post-processing, kinds of index.

    plot_ladder({"demo world": summary}, save=run / "ladder.png")

``save`` is a file to write the figure to, as in :mod:`lib.plots`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.ticker import MaxNLocator

from lib.plots import LEGEND, WRONG, error_bars, finish
from lib.studies.index_tuning import Loss


def plot_ladder(summaries: Mapping[str, pd.DataFrame], *, save: Path | None = None) -> None:
    """Draw the mAP of each rung, and the gain of each fix.

    Left: the rungs with their intervals; vertical lines mark the references without a trained head.
    Right: the gain when the fix is added, and the loss when the full recipe lacks it. An interval
    that contains 0 is not significant. One fix dominates, so the axis is logarithmic beyond 0.1.

    Args:
        summaries: title -> table of :func:`lib.studies.fixes.summarize`; one row of panels each.
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
        # The loss is the negated gain of the arm without the fix, so low and high swap.
        without = summary[summary["kind"] == "without"].set_index("fix")
        losses = -without[["gain", "gain_high", "gain_low"]]
        at = [one["fix"].tolist().index(fix) + 0.14 for fix in losses.index]
        _draw_intervals(right, at, losses, missed, "missing from the whole recipe")
        right.axvline(0, color="black", linewidth=0.8)
        right.set_xscale("symlog", linthresh=0.1, linscale=2)
        ticks = [-0.1, -0.05, 0, 0.05, 0.1, 0.3, 1]
        right.set(
            title="what the fix is worth",
            xlabel="difference in mAP (logarithmic beyond 0.1)",
            xlim=(min(-0.1, *gains["gain_low"], *losses["gain_high"]), 1),
            xticks=ticks,
            xticklabels=[f"{tick:g}" for tick in ticks],
        )
        right.legend(fontsize=9, **LEGEND)
        left.invert_yaxis()
    finish(save)


def plot_postprocessing(summaries: Mapping[str, pd.DataFrame], *, save: Path | None = None) -> None:
    """Draw the gain of each post-processing step, and its cost per query.

    Left: mAP with its interval. Middle: gain over the step it builds on. Right: milliseconds per
    query for embedding and search together.

    Args:
        summaries: title -> table of :func:`lib.studies.postprocessing.summarize`; one row of panels
            each.
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
        left.xaxis.set_major_locator(MaxNLocator(5))
        left.legend(fontsize=9, loc="lower left")
        middle.axvline(0, color="black", linewidth=0.8)
        middle.set(title="gain against what it builds on", xlabel="difference in mAP")
        right.set(title="milliseconds per query", xlabel="embedding and search")
        right.margins(x=0.15)
        left.invert_yaxis()
    finish(save)


def plot_frontier(frontier: pd.DataFrame, *, save: Path | None = None) -> None:
    """Draw recall against speed for every setting of an index; larger marks take more memory.

    Args:
        frontier: from :func:`lib.studies.index_tuning.tune`. Only measurements of the full index
            are drawn. The line joins the settings that no other beats; the ring marks the choice.
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
    finish(save)


COSTS = {"build_seconds": "seconds to build", "query_ms": "ms per query", "bytes": "bytes"}


def plot_growth(
    table: pd.DataFrame,
    fits: Mapping[str, Mapping[str, Mapping[str, float]]],
    *,
    save: Path | None = None,
) -> None:
    """Draw costs by the number of photos on logarithmic axes, where n^a is a line of slope a.

    Args:
        table: columns ``side``, ``photos``, and those of ``COSTS``.
        fits: side -> cost -> ``exponent``, its standard ``error``, and ``factor``, as
            ``python -m benchmarks.growth`` fits them.
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
        axis.legend(fontsize=9, **LEGEND)
    finish(save)


def plot_probes(table: pd.DataFrame, *, save: Path | None = None) -> None:
    """Draw the recall of an inverted file and its share of flat search's time, by lists visited.

    Args:
        table: indexed by the number of lists visited: ``recall``, and ``time`` as a share of the
            time of comparing everything, which may be more than 1.
    """
    _, axis = plt.subplots(figsize=(7.5, 4))
    axis.plot(table.index, table["recall"], "o-", label="of the ten nearest, found")
    axis.plot(table.index, table["time"], "s--", label="of the time of comparing everything")
    axis.set(xscale="log", xlabel="lists visited", ylabel="share", ylim=(0, None))
    axis.set_xticks(table.index, labels=map(str, table.index), minor=False)
    axis.legend(**LEGEND)
    finish(save)


def plot_kinds(table: pd.DataFrame, target_recall: float, *, save: Path | None = None) -> None:
    """Draw recall against the time of a query: a line for each kind of index, through its settings.

    Args:
        table: of :func:`lib.studies.index_kinds.measure_kinds`.
        target_recall: drawn as a vertical line. What finds less than 0.8 lies beyond the axis.
    """
    _, axis = plt.subplots(figsize=(7.5, 4.4))
    styles = zip(sns.color_palette(), "osDv^PX*", strict=False)
    kinds = table.groupby("kind", sort=False)
    for (kind, rows), (colour, marker) in zip(kinds, styles, strict=False):
        style = {"color": colour, "marker": marker, "markersize": 6, "linewidth": 1}
        axis.plot(rows["recall"], rows["ms"], label=kind, **style)
    axis.axvline(target_recall, color="black", linestyle=":", linewidth=1, label="asked for")
    axis.set(xlabel="recall@10", ylabel="milliseconds per query, one by one", yscale="log")
    axis.set_xlim(min(0.8, kinds["recall"].max().min() - 0.02), 1.005)
    axis.legend(fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
    finish(save)


def plot_compression(losses: Sequence[Loss], *, save: Path | None = None) -> None:
    """Draw the similarities in compressed indexes against the exact ones.

    Args:
        losses: from :func:`lib.studies.index_tuning.compression_losses`, a panel for each.
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
    finish(save)


def _draw_intervals(axis, rows, values: pd.DataFrame, color, label: str | None) -> None:
    """Draw points with error bars; ``values`` has the columns mean, low, high."""
    mean, low, high = values.to_numpy(float).T
    errors = error_bars(mean, low, high)
    axis.errorbar(mean, rows, xerr=errors, fmt="o", color=color, capsize=4, label=label)
