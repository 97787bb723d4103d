"""The browser of the tests; as a program it says by its exit status whether there is one."""

import shutil
import subprocess
import sys

from playwright.sync_api import sync_playwright

OPTIONS = ["--no-sandbox", "--disable-dev-shm-usage"]  # for containers and root


def find_chromium(playwright) -> str | None:
    """A browser that does start: what Ubuntu calls chromium-browser may only say how to get one."""
    own = playwright.chromium.executable_path
    for name in (own, "chromium", "google-chrome", "chromium-browser"):
        path = shutil.which(name)
        if path and not subprocess.run([path, "--version"], capture_output=True).returncode:
            return path
    return None


if __name__ == "__main__":
    with sync_playwright() as started:
        sys.exit(find_chromium(started) is None)
