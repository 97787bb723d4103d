"""The table of modules is made of the modules' own first lines."""

import pytest

from lib.files import project_root
from tools.modules import main, packages, table, with_table

PAGE = project_root() / "docs" / "modules.md"


def test_the_page_holds_the_modules_first_lines():
    text = PAGE.read_text(encoding="utf-8")
    hint = "run: python -m tools.modules --write docs/modules.md"
    assert text == with_table(text, table(project_root())), hint


def test_every_module_stands_in_the_table_with_one_plain_line():
    root = project_root()
    rows = [row for row in table(root).splitlines() if row.startswith("| [")]
    sources = [p for top in ("lib", "tools") for p in (root / top).rglob("*.py")]
    assert len(rows) == sum(source.name != "__init__.py" for source in sources)
    for row in rows:
        line = row.split(" | ", 1)[1].removesuffix(" |")
        assert line.endswith((".", "?")), row


def test_packages_come_in_the_order_of_imports():
    names = [package.name for package in packages(project_root())]
    assert names[:6] == ["lib", "data", "evaluation", "network", "training", "search"]
    assert names[-1] == "tools"


def test_writing_leaves_the_rest_of_the_page_alone(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- modules -->\nstale rows\n<!-- /modules -->\nafter\n")
    assert main(["--write", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- modules -->\n## `lib`\n") and "stale rows" not in text
    assert text.endswith("|\n<!-- /modules -->\nafter\n")
    assert main(["--write", str(page)]) == 0 and page.read_text() == text
    page.write_text("no markers")
    assert main(["--write", str(page)]) == 1
    assert "lacks the markers" in capsys.readouterr().err
    assert page.read_text() == "no markers"


def test_a_page_without_its_second_marker_is_refused():
    with pytest.raises(ValueError, match="lacks the markers"):
        with_table("<!-- modules -->", "")
