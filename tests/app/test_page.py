import io
import json
import shutil
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest

from trl_interfere.app import tables
from trl_interfere.app.page import EXAMPLE, ROLLED_BACK, VIEWS
from trl_interfere.app.stored_run import StoredRun


DATA = Path(__file__).parents[2] / "space" / "data" / "lab"
LAB = "lab · 0-math-after-qa-writing"
HOSTILE = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>${window.hacked=1}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A second run, and some that are broken, foreign, newer or hostile."""
    root = tmp_path_factory.mktemp("runs")
    ignored = shutil.ignore_patterns("scores", "stages", "routes.safetensors", "1-*")
    for name in ("second", "hostile", "newer", "broken", "foreign"):
        shutil.copytree(DATA, root / name, ignore=ignored)
        shutil.copyfile(
            DATA / "analysis" / "0-math-after-qa-writing" / "routes.safetensors",
            root / name / "analysis" / "0-math-after-qa-writing" / "routes.safetensors",
        )

    def change(name, file, function):
        path = root / name / file
        content = json.loads(path.read_text())
        function(content)
        path.write_text(json.dumps(content))

    report = "analysis/0-math-after-qa-writing/report.json"

    def other(content):
        for stage in content["stages"]:
            stage["scores"]["math"]["value"] -= 7

    def hostile(content):
        for stage in content["stages"]:
            stage["scores"][HOSTILE] = stage["scores"].pop("qa")
            stage["domain"] = HOSTILE if stage["domain"] == "qa" else stage["domain"]
        for row in content["rollback"]:
            row["criterion"] += HOSTILE

    change("second", "results.json", other)
    change("hostile", "results.json", hostile)
    change("hostile", report, lambda content: content.update(earlier=HOSTILE, later=[HOSTILE]))
    change("newer", report, lambda content: content.update(schema_version=99))
    (root / "broken" / report).write_text('{"schema_version": 3, ')
    (root / "foreign" / report).write_text('{"schema_version": 3, "loss": [1, 2]}')
    card = f"# Card\n\n{HOSTILE}\n\n[click](javascript:window.hacked=1) ![x](http://127.0.0.1:9/x.png)\n"
    (root / "hostile" / "report.md").write_text(card)
    return root


@pytest.fixture(scope="module")
def address(serve, folders):
    return serve([folders], lab=DATA, hub=False)


def choose(page, name):
    """Add a run to those that are compared."""
    page.click("#models input")
    page.locator("#models ul[role=listbox] li, ul[role=listbox] li").filter(has_text=name).first.click()
    page.keyboard.press("Escape")


def show(page, view):
    """Choose a view, and wait until it and its link are there."""
    page.locator("#view label").filter(has_text=VIEWS[view]).click()
    page.wait_for_function(f"() => new URLSearchParams(location.search).get('view') === '{view}'")


def compare(visit, address, *names, view="scores"):
    query = "&".join(["tab=compare", f"view={view}", *(f"model={name}" for name in names)])
    return visit(f"{address}?{query}", wait="#message p, #message .ti-notice")


def test_first_screen(visit, address, shoot):
    page = visit(address)
    assert [text.split(". ")[1] for text in page.locator(".ti-card h3").all_inner_texts()] == [
        "What was trained",
        "What broke",
        "Where",
        "What repaired it",
    ]
    bottom = page.locator(".ti-cards").bounding_box()
    assert bottom["y"] + bottom["height"] < 900  # without scrolling
    lines = page.locator("#story svg")
    assert {"code", "math", "qa", "writing"} <= set(lines.locator("text").all_text_contents())
    shoot(page, "story-desktop")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_and_dark_mode(visit, address, shoot, scheme):
    phone = visit(f"{address}?__theme={scheme}", viewport={"width": 390, "height": 844}, color_scheme=scheme)
    shoot(phone, f"story-phone-{scheme}")
    for tab in ("story", "compare", "try", "rollback"):
        page = phone
        page.goto(f"{address}?__theme={scheme}&tab={tab}")
        page.wait_for_selector(
            {"story": ".ti-card", "compare": "#plot svg", "try": "#ask", "rollback": "#budget"}[tab]
        )
        page.wait_for_timeout(500)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), tab
        shoot(page, f"{tab}-phone-{scheme}")
    desktop = compare(visit, f"{address}", "lab", view=f"lines&__theme={scheme}")
    desktop.wait_for_selector("#plot svg text")
    color = desktop.evaluate("getComputedStyle(document.querySelector('#plot svg text')).fill")
    brightness = np.mean([float(part) for part in color[color.index("(") + 1 : -1].split(",")[:3]])
    assert (brightness > 150) == (scheme == "dark")
    shoot(desktop, f"lines-desktop-{scheme}")


def test_compare_two_models_in_every_view(visit, address, shoot):
    page = visit(address)
    page.get_by_role("tab", name="Compare models").click()
    page.wait_for_selector("#plot svg")
    choose(page, "second")
    page.wait_for_function("() => new URLSearchParams(location.search).getAll('model').length === 2")
    for view in VIEWS:
        show(page, view)
        assert not page.locator("#message .ti-notice").count(), page.locator("#message").inner_text()
        if view == "table":
            assert "0-base" in page.locator("#table").inner_text()
        elif view == "card":
            assert page.locator("#card h1").count() >= 2
        else:
            shown = page.locator("#plot svg").text_content() if view != "overlaps" else "lab second"
            assert "lab" in shown and "second" in shown, view
        shoot(page, f"compare-{view}")


def test_table_is_filtered(visit, address, shoot):
    page = compare(visit, address, "lab", view="table")
    page.wait_for_selector("#table table")
    assert "0-base" in page.locator("#table").inner_text()
    field = page.locator("#table input:visible").first
    field.fill("2-math")
    field.press("Enter")
    page.wait_for_function("() => !document.querySelector('#table').innerText.includes('0-base')")
    assert "2-math" in page.locator("#table").inner_text()
    shoot(page, "table-filtered")


def test_exports(visit, address):
    page = compare(visit, address, "lab", "second", view="scores")
    page.wait_for_selector("#plot svg")
    with page.expect_download() as csv:
        page.click("#csv")
    found = pd.read_csv(csv.value.path())
    runs = [StoredRun.read(DATA, "lab")]
    pd.testing.assert_frame_equal(found[found["run"] == "lab"].reset_index(drop=True), tables.score_table(runs))
    assert set(found["run"]) == {"lab", "second"}
    with page.expect_download() as png:
        page.click("#png")
    with open(png.value.path(), "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    show(page, "repair")
    with page.expect_download() as csv:
        page.click("#csv")
    assert len(pd.read_csv(csv.value.path())) == len(tables.repair_table(runs)) * 2


def test_link_restores_the_view(visit, address):
    page = compare(visit, address, "lab")
    choose(page, "second")
    page.wait_for_function("() => new URLSearchParams(location.search).getAll('model').length === 2")
    show(page, "damage")
    link = page.locator("#link textarea, #link input").first.input_value()
    assert link == page.url and "view=damage" in link and "model=second" in link
    again = visit(link, wait="#plot svg")
    assert again.locator("#plot svg").text_content() == page.locator("#plot svg").text_content()
    assert again.locator("#view input:checked").get_attribute("value") == "damage"
    assert again.get_by_role("tab", name="Compare models").get_attribute("aria-selected") == "true"


def measured(page, before=""):
    """The text of a measurement, when there is one that differs from the one before."""
    condition = "(text) => { const now = document.querySelector('#live-text .ti-lead')?.innerText;"
    page.wait_for_function(f"{condition} return now && !text.includes(now); }}", arg=before)
    return "\n".join(page.locator("#live-text p").all_inner_texts())


def test_roll_back_live(visit, address, shoot):
    page = visit(address)
    page.click("#to-rollback")
    first = measured(page)
    assert "random ones" in first and "predicted" in first
    page.wait_for_selector("#live-plot figure svg")
    shoot(page, "rollback-first")
    handle = page.locator("#budget input[type=range]")
    handle.focus()
    for _ in range(6):
        handle.press("ArrowRight")
    handle.dispatch_event("pointerup")
    second = measured(page, first)
    parts = [int(text.split()[0]) for text in (first, second)]
    assert parts[1] > 2 * parts[0]  # 5% instead of 2% of the channels
    page.locator("#scope label").filter(has_text="attention").click()
    assert measured(page, second) != second
    shoot(page, "rollback-attention")


def test_try_it(visit, address, shoot):
    page = visit(f"{address}?tab=try", wait="#ask")
    page.click("#ask")
    for side in "ab":
        page.wait_for_selector(f"#answer-{side} .ti-answer")
    assert page.locator("#prompt textarea").input_value() == EXAMPLE
    assert "right, says math" in page.locator("#answer-a").inner_text()
    assert "wrong, says math" in page.locator("#answer-b").inner_text()
    shoot(page, "try")
    page.click("#side-b input")
    page.locator("ul[role=listbox] li").filter(has_text=ROLLED_BACK).first.click()
    page.locator("#prompt textarea").fill(HOSTILE)
    page.click("#ask")
    page.wait_for_function("() => document.querySelector('#answer-b').innerText.includes('rolled back')")
    assert "no verifier knows this prompt" in page.locator("#answer-b").inner_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("newer", "expected schema_version 3, found 99"),
        ("broken", "report.json: expected JSON"),
        ("foreign", "report.json: unknown field 'loss'"),
        ("missing", "'missing': expected one of"),
        ("user/repo", "the Hub is switched off here"),
        ("../../etc", "expected one of"),
    ],
)
def test_bad_models_are_a_message(visit, address, name, message, shoot):
    page = compare(visit, address, "lab", name, view="damage")
    page.wait_for_selector("#message .ti-notice")
    assert message in page.locator("#message").inner_text()
    assert page.locator("#plot svg").count() == 1  # the other one is shown
    if name == "newer":
        shoot(page, "message")


def test_hostile_run(visit, address, shoot):
    page = compare(visit, address, "hostile")
    for view in VIEWS:
        show(page, view)
        page.wait_for_timeout(300)
        shoot(page, f"hostile-{view}")
    assert "<script>" in page.locator("#card").inner_text()  # as text
    link = page.locator("#card a").filter(has_text="click")
    assert not link.count() or "javascript:" not in (link.first.get_attribute("href") or "")
    assert page.locator("#card img").count() == 0


def test_hostile_link(visit, address):
    page = visit(f"{address}?tab=%3Cscript%3E&view=%22%3E&model={HOSTILE}&report=..%2F..", wait=".ti-card")
    page.get_by_role("tab", name="Compare models").click()
    page.wait_for_selector("#message .ti-notice")
    assert "<script>" in page.locator("#message").inner_text()


def test_upload(visit, address, folders, tmp_path, shoot):
    page = compare(visit, address, "lab", view="damage")
    page.locator("#more button").first.click()
    source = DATA / "analysis" / "0-math-after-qa-writing"
    broken = folders / "newer" / "analysis" / "0-math-after-qa-writing" / "report.json"
    page.locator("#upload input[type=file]").set_input_files([broken])
    page.wait_for_selector("#outcome .ti-notice[role=alert]")
    assert "expected schema_version 3, found 99" in page.locator("#outcome").inner_text()
    page.reload()
    page.wait_for_selector("#plot svg")
    page.locator("#more button").first.click()
    page.locator("#upload input[type=file]").set_input_files([source / "report.json", source / "routes.safetensors"])
    page.wait_for_selector("#outcome .ti-notice[role=status]")
    page.wait_for_function("() => document.querySelector('#plot svg')?.textContent.includes('upload')")
    shoot(page, "upload")
    assert "upload" not in page.url


def test_files_outside_are_not_served(address, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("nobody reads this")
    inside = DATA / "results.json"
    with httpx.Client(base_url=address) as client:
        for path in (secret, inside, "/etc/passwd", "../pyproject.toml", DATA / ".." / ".." / "app.py"):
            for route in ("gradio_api/file=", "file=", "gradio_api/stream/"):
                response = client.get(f"{route}{path}")
                assert response.status_code in (403, 404, 405) and "nobody reads" not in response.text, (route, path)


def test_a_handler_takes_no_file_of_the_server(address, tmp_path):
    # What the browser would send, with a path of the server in place of an upload.
    secret = tmp_path / "report.json"
    secret.write_text("{}")
    with httpx.Client(base_url=address) as client:
        config = client.get("config").json()
        number = next(entry["id"] for entry in config["dependencies"] if entry["api_name"] == "upload")
        body = {
            "data": [[{"path": str(secret), "meta": {"_type": "gradio.FileData"}}], [], None],
            "fn_index": number,
            "session_hash": "x",
        }
        client.post("gradio_api/queue/join", json=body)
        with client.stream("GET", "gradio_api/queue/data?session_hash=x", timeout=30) as stream:
            events = io.StringIO("".join(stream.iter_text()))
    assert '"success":true' not in events.getvalue().replace(" ", "")
