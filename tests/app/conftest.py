"""The page, served, and a headless Chromium that looks at it."""

import os
import shutil
from pathlib import Path

import pytest
from comparison_fixtures import save_report, save_run  # noqa: F401


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
SCREENSHOTS = Path(__file__).parent / "screenshots"  # git-ignored; to be looked at
DATA = Path(__file__).parents[2] / "space" / "data" / "lab"
WAIT = 30_000  # milliseconds; a limit, not a measurement


@pytest.fixture(scope="session")
def serve():
    """Function that serves a page and returns its address."""
    from trl_interfere.app.page import build_page, launch

    pages = []

    def start(folders=(), **settings) -> str:
        pages.append(build_page(folders, **settings))
        _, address, _ = launch(pages[-1], server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
        return address

    yield start
    for page in pages:
        page.close()


@pytest.fixture(scope="session")
def chromium():
    """A headless Chromium."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="the page is driven by playwright, which is missing"
    )
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no Chromium at {CHROMIUM}: apt-get install -y --no-install-recommends chromium, or set CHROMIUM")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Function that opens an address in a window of its own; nothing may run that a visitor brought."""
    contexts, alarms = [], []

    def open_page(address: str, wait: str = "#story .ti-card", **settings):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.on("dialog", lambda dialog: (alarms.append(dialog.message), dialog.dismiss()))
        page.on("pageerror", lambda error: alarms.append(str(error)))
        page.goto(address)
        page.wait_for_selector(wait)
        return page

    yield open_page
    for context in contexts:
        for page in context.pages:
            assert page.evaluate("window.hacked") is None
        context.close()
    assert alarms == []


@pytest.fixture
def shoot():
    """Function that keeps a screenshot."""

    def take(page, name: str) -> None:
        SCREENSHOTS.mkdir(exist_ok=True)
        page.wait_for_timeout(300)  # transitions
        page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)

    return take
