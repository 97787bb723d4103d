"""Notebooks that are opened alone in Colab fetch their project; elsewhere nothing changes."""

import os
import shutil
import subprocess
import sys
import types

import nbformat
import pytest

from lib.files import project_root
from tools import colab

ADDRESS = "https://github.com/somebody/image-retrieval"
NAME = "01_data_exploration.ipynb"


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    shutil.copytree(project_root() / "notebooks", tmp_path / "notebooks")
    monkeypatch.setattr(colab, "project_root", lambda: tmp_path)
    assert colab.main([f"{ADDRESS}.git"]) == 0
    return tmp_path / "notebooks"


def test_each_notebook_has_a_link_and_a_first_cell_once(prepared, capsys):
    assert colab.main([ADDRESS]) == 0  # again
    for path in prepared.rglob("*.ipynb"):
        before = nbformat.read(project_root() / "notebooks" / path.relative_to(prepared), 4)
        link, code, *others = nbformat.read(path, 4).cells
        assert others == before.cells
        place = f"notebooks/{path.relative_to(prepared).as_posix()}"
        opened = "https://colab.research.google.com/github/somebody/image-retrieval/blob/colab/"
        assert f"({opened}{place})" in link.source
        assert code.cell_type == "code" and ADDRESS in code.source and not code.outputs


def test_the_first_cell_fetches_in_colab_alone(prepared, monkeypatch):
    source = nbformat.read(prepared / NAME, 4).cells[1].source
    commands, place = [], os.getcwd()
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr(os, "chdir", lambda folder: commands.append(folder))
    monkeypatch.setattr(sys, "path", list(sys.path))
    exec(source, {})
    assert not commands and os.getcwd() == place and "/content/project" not in sys.path
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    exec(source, {})
    clone, install, folder = commands
    assert clone == ["git", "clone", "--quiet", "--depth", "1", ADDRESS, "/content/project"]
    assert install[1:] == ["-m", "pip", "install", "-q", "/content/project"]
    assert folder == "/content/project/notebooks" and sys.path[0] == "/content/project"


@pytest.mark.parametrize("address", ["github.com/a/b", "https://github.com/a", "https://x.org/a/b"])
def test_another_address_is_refused(address, capsys):
    assert colab.main([address]) == 2
    assert "is not like https://github.com/NAME/PROJECT" in capsys.readouterr().err
