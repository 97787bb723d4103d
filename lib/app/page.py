"""The search app as a page of its own: ``python -m lib.app.page``, or ``make app``.

It serves those cells of notebook 06 that are tagged ``parameters`` or ``app`` through Voila. What a
run lacks is made first: the exported tower, and the embeddings of the gallery.

The page is for this machine alone. It listens on 127.0.0.1, its address holds a secret token, a
request under another host's name is refused, and browsers can send the kernel no code.
"""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser
from pathlib import Path

import nbformat

from lib.app.answer import JOBS, SearchError, open_gallery
from lib.files import project_root, replacing, show_path
from lib.network.engine import ENGINE, Engine, EngineError, export_engine, load_engine

NOTEBOOK = "06_search_app.ipynb"
PAGE = "search_app.ipynb"  # in the run's folder
PORT = 8866
READY = 1  # kernels that wait for a visitor, the app being open in them

_IDLE = 600  # seconds until a kernel ends whose page is gone without having said so


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lib.app.page", description=__doc__)
    parser.add_argument("--run-dir", default="runs/latest", help="the run with the trained model")
    parser.add_argument(
        "--gallery", default="Dataset/demo_world/unseen", help="folder of photos to search in"
    )
    parser.add_argument(
        "--folders-root", default="", help="own folders must lie below it; default: your home"
    )
    parser.add_argument("--port", type=int, default=PORT, help="where it is served")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    options = parser.parse_args(arguments)
    root = project_root()
    try:
        run = (root / options.run_dir).resolve()
        engine = open_engine(run)
        open_gallery(engine, root / options.gallery, run / JOBS)
    except (FileNotFoundError, SearchError, EngineError) as error:
        print(f"app: {error}", file=sys.stderr)
        return 1
    parameters = {
        "run_dir": str(run),
        "gallery_dir": options.gallery,
        "folders_root": options.folders_root,
    }
    page = write_page_notebook(root / "notebooks" / NOTEBOOK, run / PAGE, parameters)
    serve(page, root / "notebooks" / "page", options.port, not options.no_browser)
    return 0


def open_engine(run: Path) -> Engine:
    """The exported tower of a run; it is exported now if the run has only the model.

    Raises:
        FileNotFoundError: the run has neither.
        EngineError: the exported tower is damaged.
    """
    if not (run / ENGINE).is_file():
        if not (run / "model.keras").is_file():
            raise FileNotFoundError(
                f"there is no trained model in {show_path(run)}: run `make demo` first"
            )
        from lib.network.tower import load_tower  # here: it takes seconds

        print("app: exporting the trained network", file=sys.stderr)
        export_engine(load_tower(run / "model.keras"), run / ENGINE)
    return load_engine(run / ENGINE)


def write_page_notebook(notebook: Path, path: Path, parameters: dict) -> Path:
    """Write the part of a notebook that makes the page.

    Args:
        notebook: of its cells, those tagged ``parameters`` or ``app`` are kept.
        path: to write to; the kernel starts in its folder.
        parameters: values for the page, set after the cell ``parameters``.
    """
    content = nbformat.read(notebook, as_version=4)
    cells = []
    for cell in content.cells:
        tags = cell.metadata.get("tags", [])
        if "parameters" in tags or "app" in tags:
            cells.append(cell)
        if "parameters" in tags:
            lines = (f"{name} = {value!r}" for name, value in parameters.items())
            cells.append(nbformat.v4.new_code_cell("\n".join(lines)))
    content.cells = cells
    content.metadata["title"] = "Landmark search"
    with replacing(path) as part:
        nbformat.write(content, part)
    return path


def serve(notebook: Path, templates: Path, port: int, open_browser: bool) -> None:
    """Serve a notebook as a page until the process is told to end.

    Args:
        notebook: from :func:`write_page_notebook`.
        templates: a folder of Jupyter's data, which has Voila's template ``search_app``.
        port: if it is taken, the next free one is.
        open_browser: whether to show the page.
    """
    # Voila looks for templates where Jupyter looks for its data, and starts kernels by these.
    os.environ["JUPYTER_PATH"] = str(templates)
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    from traitlets.config import Config
    from voila.app import Voila

    class Page(Voila):
        def launch_browser(self) -> None:
            webbrowser.open(self.display_url)  # Voila's own leaves out the token

    config = Config()
    config.Voila.ip = "127.0.0.1"
    config.Voila.port = port
    config.Voila.open_browser = open_browser
    config.Voila.auto_token = True
    config.Voila.tornado_settings = {"allow_remote_access": False}
    config.VoilaConfiguration.template = "search_app"
    config.VoilaConfiguration.allow_template_override = "NO"
    config.VoilaConfiguration.file_allowlist = []  # the page needs no files
    config.VoilaConfiguration.preheat_kernel = True
    config.VoilaConfiguration.default_pool_size = READY
    config.MappingKernelManager.cull_idle_timeout = _IDLE
    config.ZMQChannelsWebsocketConnection.limit_rate = False  # photos are large messages
    Page.launch_instance([str(notebook)], config=config)


if __name__ == "__main__":
    sys.exit(main())
