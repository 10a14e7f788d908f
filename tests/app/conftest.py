"""The page, served, and a headless Chromium that looks at it."""

import json
import os
import shutil
from pathlib import Path

import pytest
from space_run import DATA, HOSTILE


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
WAIT = 60_000  # milliseconds; a limit, not a measurement


@pytest.fixture(scope="session")
def hostile(tmp_path_factory):
    """A run with a domain, prompts, completions and a report that hold HTML, Markdown and a formula."""
    folder = tmp_path_factory.mktemp("runs") / "hostile"
    shutil.copytree(DATA, folder, ignore=shutil.ignore_patterns("delta.safetensors", "math-after-qa"))
    for path in (folder / "stages.json", folder / "repair" / "repair.json", *folder.glob("analysis/*/report.json")):
        text = path.read_text().replace('"method": "subspace"', f'"method": {json.dumps(HOSTILE)}')
        path.write_text(text.replace('"math"', json.dumps(HOSTILE)))
    for path in folder.glob("scores/*/math.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [{**row, "prompt": f"=1+1 {HOSTILE}", "completions": [HOSTILE]} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def evaluation(tmp_path_factory):
    """Two strangers' checkpoints that `evaluate` has scored: prompt 0 is lost, prompt 1 is gained."""
    folder = tmp_path_factory.mktemp("evaluation") / "strangers"
    models = []
    for number, values in enumerate(([1, 0, 1, 0], [0, 1, 1, 0])):
        file = f"scores/{number}-m/sums.jsonl"
        (folder / file).parent.mkdir(parents=True)
        rows = [{"score": v, "prompt": f"sum {i}", "completions": [f"{number}: {i}"]} for i, v in enumerate(values)]
        rows[0]["reason"] = "not a number"
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        entry = {"value": 50.0, "low": 0.0, "high": 100.0, "n": 4, "file": file}
        models.append({"model": f"user/m{number}", "scores": {"sums": entry}})
    content = {"schema_version": 2, "peak": None, "sampling": {"score_temperature": 0.0}, "models": models}
    (folder / "scores.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def serve():
    """Function that serves a page and returns its address."""
    from trl_interfere.app.page import build_page, launch

    pages = []

    def start(folders=(), **settings) -> str:
        pages.append(build_page(folders, hub=False, **settings))
        _, address, _ = launch(pages[-1], server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
        return address

    yield start
    for page in pages:
        page.close()


@pytest.fixture(scope="session")
def chromium():
    """A headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the page is driven by playwright")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no Chromium at {CHROMIUM}: apt-get install -y --no-install-recommends chromium, or set CHROMIUM")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Function that opens an address in a window of its own; no error may come, and no text of a run may run."""
    contexts, alarms = [], []

    def open_page(address: str, wait: str = "#verdict .ti-card", **settings):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.on("dialog", lambda dialog: (alarms.append(dialog.message), dialog.dismiss()))
        page.on("pageerror", lambda error: alarms.append(str(error)))
        page.on("console", lambda message: alarms.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: alarms.append(request.url) if "127.0.0.1:9/" in request.url else None)
        page.goto(address)
        page.wait_for_selector(wait)
        return page

    yield open_page
    for context in contexts:
        for page in context.pages:
            assert page.evaluate("window.hacked") is None
        context.close()
    assert alarms == []
