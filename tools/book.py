"""Builds the course's website: ``python -m tools.book [--out site]`` (``make book``).

The notebooks with their saved outputs, the README as the first page, the other texts, and a
reference of ``lib`` from its docstrings, as static pages with a search. Sphinx and MyST-NB do the
work, those that Jupyter Book 1 is made of: one file of settings fewer, and the same pages. (Jupyter
Book 2 fetches Node.js first.) Nothing is executed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from lib.files import project_root
from lib.programs import as_path, program
from tools.colab import BRANCH, COLAB

PAGES = ("docs/*.md", "Dataset/README.md", "Test_set/README.md", "benchmarks/README.md")
PAGES += ("CONTRIBUTING.md", "LICENSE")
PACKAGES = ("data", "network", "training", "search", "evaluation", "studies", "demo", "app")
PACKAGES += ("cluster",)
ABSENT = ["ray", "pymilvus", "milvus_lite", "torch"]  # what modules import that may not be here

SETTINGS = {
    "project": "Image Retrieval System",
    "html_title": "Image Retrieval System",
    "html_theme": "sphinx_book_theme",
    "html_theme_options": {"show_toc_level": 2, "use_download_button": True},
    "html_show_copyright": False,
    "extensions": ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"],
    "nb_execution_mode": "off",
    "nb_merge_streams": True,
    "myst_enable_extensions": ["dollarmath", "colon_fence"],
    "myst_heading_anchors": 3,
    "autodoc_mock_imports": ABSENT,
    "autodoc_member_order": "bysource",
    "autodoc_typehints": "none",  # the signatures have them
    "napoleon_use_ivar": True,  # attributes are described once
    "exclude_patterns": ["LICENSE"],
    # Links to files of the repository that are no pages, and formulas of docstrings.
    "suppress_warnings": [
        "myst.xref_missing",
        "docutils",
        "ref.python",
        "mystnb.unknown_mime_type",
    ],
}


class BookError(RuntimeError):
    """The website can't be built; the message says what is missing."""


def gather(root: Path, source: Path) -> None:
    """Copy what becomes pages into ``source``, at the same places, and write the reference."""
    notebooks = ("notebooks/*.ipynb", "notebooks/solutions/*.ipynb", "notebooks/images/*")
    for pattern in (*notebooks, "benchmarks/results/*.png", *PAGES):
        for path in root.glob(pattern):
            target = source / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    course, solutions = (
        sorted(p.relative_to(source).with_suffix("").as_posix() for p in source.glob(pattern))
        for pattern in notebooks[:2]
    )
    texts = sorted(p.relative_to(source).with_suffix("").as_posix() for p in source.rglob("*.md"))
    (source / "reference").mkdir()
    for package in PACKAGES:
        (source / "reference" / f"{package}.rst").write_text(reference(root, package))
    trees = {
        "The course": course,
        "Solutions": solutions,
        "Texts": texts,
        "Reference": [f"reference/{package}" for package in PACKAGES],
    }
    first = (root / "README.md").read_text(encoding="utf-8")
    for caption, entries in trees.items():
        listed = "\n".join(entries)
        first += f"\n\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```\n"
    (source / "index.md").write_text(first, encoding="utf-8")


def reference(root: Path, package: str) -> str:
    """The page of a package: each of its modules with its public names."""
    lines = [f"lib.{package}", "=" * (4 + len(package)), ""]
    for path in sorted((root / "lib" / package).glob("[!_]*.py")):
        name = f"lib.{package}.{path.stem}"
        lines += [name, "-" * len(name), "", f".. automodule:: {name}", "   :members:", ""]
    return "\n".join(lines)


def show_examples(book, what: str, name: str, of, options, lines: list[str]) -> None:
    """Sphinx's hook: an indented block in a module's docstring is code, not a quotation."""
    shown, inside = [], False
    for before, line in zip(["", *lines], list(lines), strict=False):
        begins = what == "module" and line.startswith("    ") and not before.strip()
        if begins and not inside:
            shown += ["::", ""]
        inside = (inside or begins) and (not line.strip() or line.startswith("    "))
        shown.append(line)
    lines[:] = shown


def settings_of(repository: str) -> dict:
    """Sphinx's settings; with the address of the repository, notebooks open in Google Colab."""
    if not repository:
        return SETTINGS
    theme = {"repository_url": repository, "repository_branch": BRANCH}
    theme["launch_buttons"] = {"colab_url": COLAB}
    return SETTINGS | {"html_theme_options": SETTINGS["html_theme_options"] | theme}


def build(root: Path, out: Path, repository: str = "") -> int:
    """Write the website into ``out`` when all of it is built; returns the number of warnings.

    Raises:
        BookError: Sphinx and MyST-NB are not installed, or ``out`` holds something else.
    """
    if out.exists() and not (out / "searchindex.js").is_file():
        raise BookError(f"{out} is no website of this project: choose another folder with --out")
    try:
        from sphinx.application import Sphinx
    except ImportError:
        raise BookError(
            "Sphinx is not installed: run `make book`, or pip install '.[book]'"
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        gather(root, source)
        pages, trees = Path(folder) / "pages", Path(folder) / "trees"
        book = Sphinx(source, None, pages, trees, "html", settings_of(repository), status=None)
        book.connect("autodoc-process-docstring", show_examples)
        book.build(force_all=True)
        (pages / ".nojekyll").touch()  # else GitHub leaves out folders that begin with "_"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(pages, out)
        return book._warncount


@program()
def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.book", description=__doc__)
    parser.add_argument("--out", type=as_path, default=Path("site"), help="folder for the pages")
    address = "where the project is on GitHub: pages of notebooks open them in Colab (tools.colab)"
    parser.add_argument("--repository", default="", help=address)
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    warnings = build(project_root(), out, options.repository)
    print(f"\n{sum(1 for _ in out.rglob('*.html'))} pages: {out / 'index.html'}")
    if warnings:
        print(f"{warnings} warnings, see above: mend them", file=sys.stderr)
    return int(warnings > 0)


if __name__ == "__main__":
    sys.exit(main())
