"""Serves the search app as a web page: ``python -m lib.app.page``, or ``make app``.

Voila serves the cells of notebook 10 that are tagged ``parameters`` or ``app``. First, the exported
tower and the gallery's embeddings are made if the run lacks them.

The page is for this machine only: it listens on 127.0.0.1, its address contains a secret token,
requests for another host name are refused, and browsers can't send code to the kernel.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import shutil
import sys
import tempfile
import time
import webbrowser
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

from lib.app.gallery import JOBS, open_option
from lib.files import only_writer, or_cache, project_root, show_name, show_path
from lib.network.engine import OWN_PHOTOS, open_engine, packaged_engine
from lib.programs import UsageError, as_path, program

NOTEBOOK = "10_search_app.ipynb"
TITLE = "Landmark search"
PORT = 8866
READY = 1  # kernels started in advance
MOST_KERNELS = 8  # of some 260 MB each, with those in advance; more pages are refused

_FOLDER = "landmark_search_"  # prefix of a server's temporary folder
_IDLE = 180  # seconds until a kernel ends whose page vanished without closing it
_IDLE_CHECK = 30  # seconds between two looks for such kernels
_START = 5  # seconds that a kernel takes to start, at most, if the machine is not busy
_FULL = "Too many pages of the app are open: close one, wait a moment, then load this page again."


@program(prefix="app: ")
def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lib.app.page", description=__doc__)
    parser.add_argument(
        "--photos",
        type=as_path,
        metavar="FOLDER",
        help="your photos, to be searched with a pre-trained network",
    )
    parser.add_argument(
        "--run-dir", type=as_path, default="runs/latest", help="the run with the trained model"
    )
    parser.add_argument(
        "--gallery", type=as_path, default="Dataset/demo_world/unseen", help="folder of photos"
    )
    parser.add_argument(
        "--folders-root", default="", help="own folders lie below it; default: home"
    )
    parser.add_argument("--port", type=int, default=PORT, help="the next free one if it is taken")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    options = parser.parse_args(arguments)
    if not 1 <= options.port <= 65535:
        raise UsageError(f"--port {options.port}: choose a number from 1 to 65535")
    root, title = project_root(), TITLE
    run, gallery, option = (root / options.run_dir).resolve(), root / options.gallery, "--gallery"
    if options.photos is not None:
        gallery, option = options.photos.absolute(), "--photos"
        title = f"Search in {show_name(gallery.resolve().name or str(gallery))}"
    else:
        engine = open_engine(run)
    for name, folder in {option: gallery, "--folders-root": root / options.folders_root}.items():
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {show_path(folder)} ({name})")
    if options.photos is not None:
        run = or_cache(root / OWN_PHOTOS)
        engine = packaged_engine(run)
    open_option(engine, gallery, run / JOBS, option)
    parameters = {
        "run_dir": str(run),
        "gallery_dir": str(gallery),
        "folders_root": options.folders_root,
    }
    # For a check of addresses that no notebook needs, nbformat would compile a grammar for 1.5
    # seconds; it does without where the package can't be imported.
    sys.modules.setdefault("rfc3987_syntax", None)
    # Not shared between processes, since the notebook contains this one's gallery and folders.
    with _own_folder() as folder:
        page = folder / "search_app.ipynb"
        write_page_notebook(root / "notebooks" / NOTEBOOK, page, parameters, root, title)
        serve(page, root / "notebooks" / "page", options.port, not options.no_browser)
    return 0


@contextlib.contextmanager
def _own_folder() -> Iterator[Path]:
    """A temporary folder, locked while the page is served; removes those of killed servers."""
    for left in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        with contextlib.suppress(OSError):  # of another user
            # A younger one may not be locked yet.
            if time.time() - left.lstat().st_mtime > 60 and not left.is_symlink():
                with only_writer(left, BlockingIOError()):
                    shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=_FOLDER) as name, only_writer(Path(name), busy=None):
        yield Path(name)


def write_page_notebook(
    notebook: Path,
    path: Path,
    parameters: dict,
    start_in: Path | None = None,
    title: str = TITLE,
) -> None:
    """Write the notebook of the page to ``path``.

    Args:
        notebook: its cells tagged ``parameters`` or ``app`` are copied.
        parameters: values to set after the cell tagged ``parameters``.
        start_in: working directory of the page; None: the folder of ``path``.
        title: of the page, as text; Voila's template escapes it.
    """
    import nbformat  # here: it takes half a second

    content = nbformat.read(notebook, as_version=4)
    lines = [f"{name} = {value!r}" for name, value in parameters.items()]
    if start_in is not None:
        lines += ["import os", f"os.chdir({str(start_in)!r})"]
    cells, content.cells = content.cells, []
    for cell in cells:
        tags = cell.metadata.get("tags", [])
        if "parameters" in tags or "app" in tags:
            content.cells.append(cell)
        if "parameters" in tags:
            content.cells.append(nbformat.v4.new_code_cell("\n".join(lines)))
    content.metadata["title"] = title
    nbformat.write(content, path)


def serve(notebook: Path, templates: Path, port: int, open_browser: bool) -> None:
    """Serve a notebook of :func:`write_page_notebook` until the process is terminated.

    Args:
        notebook, open_browser: the page, and whether to open it in a browser.
        templates: a data folder of Jupyter with Voila's template ``search_app``.
        port: to listen on; the next free one if it is taken.
    """
    # Voila finds templates and kernels by these variables.
    os.environ.update(JUPYTER_PATH=str(templates), JUPYTER_PREFER_ENV_PATH="1")
    from traitlets.config import Config
    from voila.app import Voila
    from voila.tornado.handler import TornadoVoilaHandler

    page_handler = _page_handler(TornadoVoilaHandler)

    class Page(Voila):
        def launch_browser(self) -> None:
            webbrowser.open(self.display_url)  # Voila's own method omits the token

        def init_handlers(self) -> list:
            return [
                (url, page_handler if handler is TornadoVoilaHandler else handler, *rest)
                for url, handler, *rest in super().init_handlers()
            ]

    config = Config()
    config.Voila.ip = "127.0.0.1"
    config.Voila.port = port
    config.Voila.open_browser = open_browser
    config.Voila.auto_token = True
    config.Voila.connection_dir_root = str(notebook.parent)  # kernels' files go with it
    config.Voila.tornado_settings = {"allow_remote_access": False}
    config.VoilaConfiguration.template = "search_app"
    config.VoilaConfiguration.allow_template_override = "NO"
    config.VoilaConfiguration.file_allowlist = []  # the page needs no files
    config.VoilaConfiguration.preheat_kernel = True
    config.VoilaConfiguration.default_pool_size = READY
    config.VoilaKernelManager.fill_delay = 2.0  # seconds: the next one, when the page is complete
    config.MappingKernelManager.cull_idle_timeout = _IDLE
    config.MappingKernelManager.cull_interval = _IDLE_CHECK
    config.ZMQChannelsWebsocketConnection.limit_rate = False  # photos are large messages
    Page.launch_instance([str(notebook)], config=config)


def _page_handler(voilas: type) -> type:
    """Derive from Voila's handler one that limits the pages, and ends the kernels of left ones."""
    import tornado.web

    class PageHandler(voilas):
        kernels: ClassVar[set[str]] = set()  # those of pages
        waiting = 0  # pages whose kernel is not known yet
        kernel = None  # this page's
        left = False  # before the page was complete

        @tornado.web.authenticated
        async def get(self, path=None):
            # Neither kernels made in advance nor those of waiting pages are in the set.
            PageHandler.kernels &= set(self.kernel_manager.list_kernel_ids())
            if len(PageHandler.kernels) + PageHandler.waiting + READY >= MOST_KERNELS:
                self.set_status(503)
                self.finish(_FULL)
                return
            _ = self.xsrf_token  # sets the cookie without which a closing page can't end its kernel
            PageHandler.waiting += 1
            try:
                # At first the kernel made in advance is not known yet: another one beside it would
                # delay both.
                until = time.monotonic() + _START
                while READY and not self.kernel_manager.notebook_data and time.monotonic() < until:
                    await asyncio.sleep(0.05)
                await super().get(path)
            finally:
                if self.kernel is None:
                    PageHandler.waiting -= 1
                elif self.left and self.kernel in self.kernel_manager:
                    await self.kernel_manager.shutdown_kernel(self.kernel)

        def write(self, chunk):
            found = self.kernel is None and re.search(r'"kernelId": *"([^"]+)"', str(chunk))
            if found:
                self.kernel = found[1]
                PageHandler.kernels.add(self.kernel)
                PageHandler.waiting -= 1
                # Made in advance, it may have been idle for so long that it would be ended at once.
                kernel = self.kernel_manager.get_kernel(self.kernel)
                kernel.last_activity = datetime.now(UTC)
            super().write(chunk)

        def on_connection_close(self):
            super().on_connection_close()
            self.left = True

    return PageHandler


if __name__ == "__main__":
    sys.exit(main())
