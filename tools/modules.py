"""The table of all modules, from the first lines of their docstrings.

    python -m tools.modules                            # prints it
    python -m tools.modules --write docs/modules.md    # puts it between the file's two markers

Sources are parsed, never imported.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import tomllib
from pathlib import Path

from lib.files import project_root, replacing, show_path
from lib.programs import as_path, program

START, END = "<!-- modules -->", "<!-- /modules -->"


def summary(source: Path) -> str:
    """The first line of a module's docstring; "" without one."""
    docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def packages(root: Path) -> list[Path]:
    """The folders with modules, in the order of imports from the bottom up; ``tools`` comes last.

    The order is that of the layers in ``pyproject.toml``.
    """
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    (layers,) = (
        c["layers"] for c in settings["tool"]["importlinter"]["contracts"] if "layers" in c
    )
    names = [name.strip() for layer in reversed(layers) for name in layer.split("|")]
    folders = [root / "lib" / name for name in names]
    return [root / "lib", *(folder for folder in folders if folder.is_dir()), root / "tools"]


def table(root: Path) -> str:
    """A heading for each package, and below it a Markdown table with a row for each module."""
    parts = []
    for package in packages(root):
        parts += [f"\n## `{package.relative_to(root).as_posix()}`\n", "| module | what it is for |"]
        parts.append("|---|---|")
        for source in sorted(package.glob("*.py")):
            if source.name != "__init__.py":
                line = re.sub(r"`+", "`", summary(source)).replace("|", "\\|")
                parts.append(
                    f"| [`{source.stem}`](../{source.relative_to(root).as_posix()}) | {line} |"
                )
    return "\n".join(parts).strip() + "\n"


def with_table(text: str, content: str) -> str:
    """A page's text with ``content`` between its markers.

    Raises:
        ValueError: the text lacks the markers.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"the page lacks the markers {START} and {END}")
    return f"{before}{START}\n{content}{END}{after}"


@program()
def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.modules", description=__doc__)
    parser.add_argument("--write", type=as_path, metavar="FILE", help="a page with the two markers")
    page = parser.parse_args(arguments).write
    content = table(project_root())
    if page is None:
        print(content, end="")
        return 0
    try:
        text = with_table(page.read_text(encoding="utf-8"), content)
    except ValueError as error:  # not UTF-8, or without the markers
        raise ValueError(f"{show_path(page)} (--write): {error}") from None
    with replacing(page) as part:
        part.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
