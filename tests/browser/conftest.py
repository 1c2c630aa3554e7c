"""A real Chromium for all tests of the page, and views that watch over what the page does."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

PATIENCE_S = 60  # of a machine that has other work: no test waits for it when all is well
DESKTOP, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")  # while Playwright is there, its event loop runs, and nobody else's can
def browser() -> Iterator[Browser]:
    """Debian's package chromium; Playwright's own downloads are not used."""
    path = shutil.which("chromium")
    if path is None:
        missing = "there is no chromium on this machine: apt-get install chromium"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path)
        yield chromium
        chromium.close()


@contextmanager
def watched(browser: Browser, url: str, root: str, size: tuple[int, int] = DESKTOP, **options) -> Iterator[Page]:
    """A page whose errors, dialogs and requests for anything beyond `root` fail the test."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
    context.set_default_timeout(1000 * PATIENCE_S)
    page, trouble = context.new_page(), []
    page.on("console", lambda message: trouble.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: trouble.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (trouble.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: _within(request.url, root) or trouble.append(f"request: {request.url}"))
    page.goto(url)
    until(page, "document.getElementById('found').textContent !== ''")
    yield page
    context.close()
    assert trouble == []


def until(page: Page, condition: str) -> None:
    """Wait until some JavaScript is true. Playwright's own way of it evaluates texts, which the page forbids."""
    for _ in range(20 * PATIENCE_S):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never true: {condition}")


def _within(url: str, root: str) -> bool:
    return url.startswith((f"{root}/", f"blob:{root}/", "data:image/svg+xml,"))


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing of requests."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Lend the address of a web server over a folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module", params=["file", "http"])
def root(request, job_folder: Path) -> Iterator[str]:
    """Where the job's folder is, for a browser: once on the disk, and once behind a web server."""
    if request.param == "file":
        yield f"file://{job_folder}"
    else:
        with served(job_folder) as address:
            yield address


@pytest.fixture
def look(browser: Browser, root: str) -> Callable:
    """Open the report at a view, such as `look("method=flow")`."""
    return lambda view="", **options: watched(browser, f"{root}/report/index.html#{view}", root, **options)
