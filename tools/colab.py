"""Prepares the notebooks for Google Colab: ``python -m tools.colab https://github.com/NAME/NAME``.

Colab opens a notebook alone. Each gets a link that opens it there, and a first cell that, in Colab
only, fetches the project around it and installs it. The workflow of the website keeps notebooks so
prepared on a branch of their own, which its "Open in Colab" leads to: the saved notebooks need not
know where the project is published.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import nbformat

from lib.files import project_root, replacing
from lib.programs import UsageError, program

BRANCH, TAG = "colab", "colab"
COLAB, GITHUB = "https://colab.research.google.com", "https://github.com/"

_SOURCE = """\
# Colab has this notebook alone: fetch the project around it. Elsewhere this cell does nothing.
import os
import subprocess
import sys

if "google.colab" in sys.modules:
    if not os.path.isdir("/content/project"):
        clone = ["git", "clone", "--quiet", "--depth", "1", "{address}", "/content/project"]
        subprocess.run(clone, check=True)
        install = [sys.executable, "-m", "pip", "install", "-q", "/content/project"]
        subprocess.run(install, check=True)
    sys.path.insert(0, "/content/project")
    os.chdir("/content/project/notebooks")"""


def prepare(notebook: Path, address: str, place: str) -> None:
    """Put link and cell into a notebook, in place of those it may have.

    Args:
        notebook: the file.
        address: of the repository.
        place: of the notebook in the repository, such as "notebooks/01_data_exploration.ipynb".
    """
    content = nbformat.read(notebook, as_version=4)
    cells = [cell for cell in content.cells if TAG not in cell.metadata.get("tags", [])]
    link = (
        f"{COLAB}/{address.removeprefix('https://').replace('.com', '', 1)}/blob/{BRANCH}/{place}"
    )
    badge = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({link})"
    link_cell = nbformat.v4.new_markdown_cell(badge, metadata={"tags": [TAG]}, id="colab-link")
    source = _SOURCE.format(address=address)
    code_cell = nbformat.v4.new_code_cell(source, metadata={"tags": [TAG]}, id="colab-fetch")
    content.cells = [link_cell, code_cell, *cells]
    with replacing(notebook) as part:
        nbformat.write(content, part)


@program()
def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.colab", description=__doc__)
    parser.add_argument("address", help="of the repository on GitHub")
    address = parser.parse_args(arguments).address.removesuffix("/").removesuffix(".git")
    if not re.fullmatch(rf"{GITHUB}[\w.-]+/[\w.-]+", address):
        raise UsageError(f"{address!r} is not like https://github.com/NAME/PROJECT")
    root = project_root()
    for notebook in sorted((root / "notebooks").rglob("[0-9]*.ipynb")):
        prepare(notebook, address, notebook.relative_to(root).as_posix())
    print(f"The notebooks open in Colab once they are on the branch {BRANCH} of {address}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
