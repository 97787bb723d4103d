"""What becomes a page of the website; `make book` builds it, and fails for a warning."""

import sys

import pytest

from lib.files import project_root
from tools import book

ROOT = project_root()


def test_every_notebook_and_text_becomes_a_page(tmp_path):
    book.gather(ROOT, tmp_path)
    first = (tmp_path / "index.md").read_text(encoding="utf-8")
    for path in (ROOT / "notebooks").rglob("[0-9]*.ipynb"):
        place = path.relative_to(ROOT)
        assert f"\n{place.with_suffix('').as_posix()}\n" in first
        assert (tmp_path / place).read_bytes() == path.read_bytes()
    for place in ("docs/training", "benchmarks/README", "Test_set/README", "CONTRIBUTING"):
        assert f"\n{place}\n" in first and (tmp_path / f"{place}.md").is_file()
    assert first.startswith((ROOT / "README.md").read_text(encoding="utf-8"))
    packages = {path.parent.name for path in (ROOT / "lib").glob("*/__init__.py")}
    assert packages == set(book.PACKAGES)
    page = (tmp_path / "reference" / "search.rst").read_text()
    assert ".. automodule:: lib.search.rerank" in page and "__init__" not in page


def test_examples_of_modules_are_code():
    lines = ["Text.", "", "    a = 1", "", "    b = 2", "", "More.", "", "    c", ""]
    shown = list(lines)
    book.show_examples(None, "module", "", None, None, shown)
    assert shown == ["Text.", "", "::", "", *lines[2:8], "::", "", *lines[8:]]
    book.show_examples(None, "function", "", None, None, lines)
    assert "::" not in lines


def test_without_sphinx_or_in_a_wrong_folder_one_line_says_so(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.txt").touch()
    assert book.main(["--out", str(tmp_path)]) == 1
    assert "is no website of this project" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").is_file()
    monkeypatch.setitem(sys.modules, "sphinx.application", None)
    with pytest.raises(book.BookError, match="make book"):
        book.build(ROOT, tmp_path / "site")
