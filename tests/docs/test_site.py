"""The built site: no warning, no address outside, and in a browser nothing dead or missing."""

import functools
import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTHS = {"desktop": (1440, 900), "phone": (390, 844)}
# no request of the browser's own leaves this machine
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
             "--disable-component-update", "--no-first-run"]  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("mkdocs") is None or find_spec("latex2mathml") is None,
        reason="the site is not built: pip install -e '.[docs]'",
    ),
]


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The site, built once; every warning of MkDocs is an error."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return folder


def pages_of(folder):
    return sorted(folder.rglob("*.html"))


def test_no_page_fetches_anything_from_outside(site):
    loads = re.compile(r'<(?:script|img|link|iframe)\b[^>]*(?:src|href)="((?:https?:)?//[^"]+)"')
    for page in pages_of(site):
        assert loads.findall(page.read_text()) == [], page


def test_every_formula_was_understood(site):
    """latex2mathml leaves a command that it does not know as it stands."""
    formulas = [
        formula for page in pages_of(site)
        for formula in re.findall(r"<math.*?</math>", page.read_text(), re.DOTALL)
    ]  # fmt: skip
    assert len(formulas) > 40
    assert [formula for formula in formulas if "\\" in formula] == []


def test_every_numbered_file_has_its_page(site):
    for name in ("lora", "inject", "nf4", "double_quant", "qlora", "prefix"):
        assert 'class="pair"' in (site / "course" / f"{name}.html").read_text()


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder and prints nothing."""

    def log_message(self, *arguments):
        pass


@contextmanager
def served(folder):
    """The address of a folder on a free port of this machine."""
    handler = functools.partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def browser():
    found = [path for path in map(shutil.which, BROWSERS) if path]
    if find_spec("playwright") is None or not found:
        pytest.skip("no playwright, or none of these browsers: " + ", ".join(BROWSERS))
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found[0], args=ARGUMENTS)
        yield opened
        opened.close()


def complaints_of(folder, address, browser, width):
    """What a reader would miss at this width: dead links and places, pictures, console errors."""
    size = dict(zip(("width", "height"), WIDTHS[width], strict=True))
    tab = browser.new_page(viewport=size)
    found: list[str] = []
    tab.on("console", lambda said: found.append(f"{tab.url}: {said.type}: {said.text}")
           if said.type in ("error", "warning") else None)  # fmt: skip
    tab.on("pageerror", lambda error: found.append(f"{tab.url}: {error}"))
    # what is still being fetched when the next page is opened is broken off, and no fault of a page
    tab.on("requestfailed", lambda request: found.append(f"{request.url}: {request.failure}")
           if "ERR_ABORTED" not in (request.failure or "") else None)  # fmt: skip
    places: dict[str, set[str]] = {}
    links: set[tuple[str, str, str]] = set()
    for page in pages_of(folder):
        if page.name == "404.html":
            continue
        url = f"{address}/{page.relative_to(folder)}"
        tab.goto(url, wait_until="load")
        places[url] = set(tab.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)"))
        for href in tab.evaluate("[...document.querySelectorAll('a[href]')].map(a => a.href)"):
            target, _, place = href.partition("#")
            links.add((url, target, place))
        broken = tab.evaluate(
            "[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"
        )
        found += [f"{url}: no picture {picture}" for picture in broken]
        wider = tab.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        if wider > 0:
            found.append(f"{url}: wider than the screen by {wider} pixels")
    for source, target, place in sorted(links):
        if not target.startswith(address):
            found.append(f"{source}: a link to {target}")  # none is meant to leave the site
        elif (known := target + "index.html" if target.endswith("/") else target) not in places:
            found.append(f"{source}: no page {target}")
        elif place and place not in places[known]:
            found.append(f"{source}: no place {place} in {target}")
    tab.close()
    assert places
    return found


@pytest.mark.browser
@pytest.mark.parametrize("width", WIDTHS)
def test_in_a_browser_nothing_is_dead_or_missing(site, browser, width):
    assert len(pages_of(site)) > 20
    with served(site) as address:
        assert complaints_of(site, address, browser, width) == []


@pytest.mark.browser
def test_a_bad_page_is_complained_of(tmp_path, browser):
    (tmp_path / "index.html").write_text(
        "<p id=here><a href='#here'>good</a> <a href='#there'>no place</a> <a href='x.html'>no page"
        "</a> <a href='http://127.0.0.1:9/'>away</a> <img src='none.svg'>"
        "<div style='width: 3000px'>wide</div> <script>missing()</script>"
    )
    with served(tmp_path) as address:
        found = "\n".join(complaints_of(tmp_path, address, browser, "phone"))
    for words in ("no place there", "no page", "a link to http://127.0.0.1:9/", "no picture",
                  "wider than the screen", "missing is not defined", "404"):  # fmt: skip
        assert words in found
    assert "no place here" not in found
