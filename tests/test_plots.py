"""Figures, beyond what the notebooks show of them."""

import itertools
import re
import time
import warnings

import numpy as np
import pandas as pd
import pytest

from lib import plots
from lib.files import project_root
from lib.studies import figures

# The name, a bracket, and what stands in it up to the end of the line.
LEGEND = re.compile(r"\.legend\((.*)")
ONE = {"one": {1: 0.5, 2: 0.6}, "other": {1: 0.4, 2: 0.7}}
PROBES = pd.DataFrame({"recall": [0.5, 1.0], "time": [0.1, 0.4]}, index=[1, 8])


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: plots.plot_curves(ONE, xlabel="x", ylabel="y", save=path),
        lambda path: plots.plot_distance_histograms({"a": (np.ones(3), np.ones(2))}, save=path),
        lambda path: plots.plot_histograms({n: np.arange(5.0) for n in ONE}, xlabel="x", save=path),
        lambda path: plots.plot_loss_surface(0.3, 0.1, save=path),
        lambda path: figures.plot_probes(PROBES, save=path),
    ],
)
def test_a_busy_machine_is_no_reason_for_a_warning(draw, tmp_path, monkeypatch):
    # Legends that took more than a second to place warned, in notebooks that are shared.
    monkeypatch.setattr(time, "perf_counter", itertools.count(step=2).__next__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_all_legends_have_a_place():
    root = project_root()
    texts = {
        p: p.read_text() for p in (*root.glob("lib/**/*.py"), *root.glob("notebooks/**/*.ipynb"))
    }
    calls = [(path.name, call) for path, text in texts.items() for call in LEGEND.findall(text)]
    assert len(calls) > 10
    assert [call for call in calls if "loc" not in call[1] and "**" not in call[1]] == []
