import contextlib
import json
import socket
import subprocess
import sys
import time
from urllib.parse import parse_qsl, urlencode, urlsplit

import httpx
import pytest
import torch
from space_run import DATA, HOSTILE

from trl_interfere.lab import MODEL_FOLDER
from trl_interfere.lab.domains import lab_rows
from trl_interfere.models import load_model, load_tokenizer


@pytest.fixture(scope="module")
def address(serve, hostile, evaluation):
    return serve([hostile, evaluation], lab=DATA)


# Lowest contrast of a text with the ground that it stands on (WCAG 2.2).
CONTRAST = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => channels(color).slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0);
  const ground = (one) => {
    for (; one; one = one.parentElement) {
      const color = getComputedStyle(one).backgroundColor;
      if ((channels(color)[3] ?? 1) > 0) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const texts = [...document.querySelectorAll(".ti-lead, .ti-detail, .ti-table th, .ti-table td, .ti-answer *")];
  return Math.min(...texts.filter((one) => one.checkVisibility()).map((one) => {
    const [low, high] = [light(getComputedStyle(one).color), light(ground(one))].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  }));
}"""


def opened(address, tab, **query):
    return f"{address}?{urlencode({'tab': tab, **query})}"


def show(page, tab):
    page.get_by_role("tab", name=tab).click()


def test_walk(visit, address, tmp_path):
    """Verdict, a lost prompt that came back, the price, and the page as a file with tables that sort and filter."""
    page = visit(address)
    assert page.locator("#verdict .ti-lead").inner_text().startswith("math lost 25.0 of 63.5 points")
    page.wait_for_selector("#verdict .ti-plot svg")
    show(page, "Prompts")
    page.wait_for_selector("#flips table")
    page.locator("#kind label").filter(has_text="regained").click()
    page.wait_for_function("() => !document.querySelector('#prompts').innerText.includes('kept')")
    page.locator("#prompts [role=gridcell]").filter(has_text="Q: 71-64 A:").first.click()
    page.wait_for_selector("#answers .ti-answer")
    answers = page.locator("#answers").inner_text()
    assert "2-math" in answers and "5-heal" in answers and "wrong, 0 of 1" in answers and "right, 1 of 1" in answers
    page.wait_for_function("() => new URLSearchParams(location.search).get('prompt') === '5'")
    link = page.url
    show(page, "Repairs")
    page.wait_for_selector("#repairs .ti-plot svg")
    assert page.locator("#repairs title").first.text_content().startswith("heal, subspace of rank 64: 99%")
    show(page, "Where")
    page.wait_for_selector("#where .ti-plot svg")
    with page.expect_download() as download:
        page.click("#save")
    download.value.save_as(tmp_path / "saved.html")
    saved = visit((tmp_path / "saved.html").as_uri(), wait="svg")
    assert "math lost 25.0" in saved.locator("main").inner_text() and saved.locator("svg").count() >= 4
    flips = saved.locator("table.ti-sort").nth(1)
    flips.get_by_role("button", name="newly lost").click()
    assert flips.locator("tbody th").all_inner_texts()[0] == "writing"
    saved.locator("input[placeholder=filter]").nth(1).fill("math")
    assert flips.locator("tbody tr:visible").count() == 1
    again = visit(link, wait="#answers .ti-answer")
    assert "71-64" in again.locator("#answers").inner_text()


def test_a_link_opens_all_that_it_names(visit, address):
    chosen = {"run": "lab", "domain": "qa", "from": "0-base", "to": "2-math", "prompt": "3", "kind": "kept"}
    chosen |= {"report": "math-after-qa", "figure": "damage_concentration"}  # none is what the page opens with
    page = visit(opened(address, "prompts", **chosen), wait="#answers .ti-answer")
    assert page.locator("#domain input").input_value() == "qa"
    show(page, "Where")  # from here the address is made of what the controls hold
    page.wait_for_function("() => new URLSearchParams(location.search).get('tab') === 'where'")
    assert dict(parse_qsl(urlsplit(page.url).query)) == {**chosen, "tab": "where"}
    page.wait_for_selector("#where svg[aria-label=damage_concentration]")
    page = visit(opened(address, "verdict", run="missing"), wait="#message .ti-notice")
    assert "'missing': expected one of" in page.locator("#message").inner_text()


@pytest.mark.slow
def test_heal_live_and_its_control(visit, address):
    page = visit(opened(address, "live"), wait="#live-text table")
    first = page.locator("#live-text .ti-lead").inner_text()
    assert page.locator("#live-examples .ti-answer").count() == 9
    page.wait_for_selector("#live-maps .ti-plot svg")
    page.click("#live-control")
    page.wait_for_function("() => document.querySelector('#live-text')?.innerText.startsWith('Control')")
    second = page.locator("#live-text .ti-lead").inner_text()
    shares = [int(text.split("%")[0].split()[-1]) for text in (first, second)]
    assert shares[0] > shares[1] + 20
    page.get_by_label("route rollback").check()
    page.locator("#live-heal label").filter(has_text="code").click()  # the first domain with a report is math
    page.click("#live-start")
    page.wait_for_function("() => document.querySelector('#live-maps')?.innerHTML.includes('rolled back')")
    rolled = page.locator("#live-text .ti-lead").inner_text()
    assert shares[1] < int(rolled.split("%")[0]) < shares[0]
    assert "rollback lab-out --domain math --budget 0.32" in page.locator("body").inner_text()
    page.get_by_label("heal", exact=True).check()
    while page.locator("#live-heal input:checked").count():
        page.locator("#live-heal input:checked").first.click()
    page.click("#live-start")
    page.wait_for_selector("#live-text .ti-notice[role=alert]")
    assert "domains: expected at least one of" in page.locator("#live-text").inner_text()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screen(visit, address, scheme):
    for tab, wait in {
        "verdict": "#verdict .ti-plot svg",
        "prompts": "#flips table",
        "repairs": "#repairs .ti-plot svg",
        "live": "#live-text table",
        "where": "#where .ti-plot svg",
    }.items():
        phone = {"viewport": {"width": 390, "height": 844}, "color_scheme": scheme}
        page = visit(opened(address, tab, __theme=scheme), wait=wait, **phone)
        page.wait_for_timeout(500)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), tab
        assert page.evaluate(CONTRAST) >= 4.5, tab


@pytest.mark.slow
def test_two_checkpoints_with_no_run_and_no_report(visit, tmp_path):
    rows = lab_rows("math", "test", 16)
    (tmp_path / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    domain = {"name": "sums", "reward_funcs": "lab_math", "eval_dataset": "math.jsonl"}
    recipe = {"model": str(MODEL_FOLDER), "training": {"max_completion_length": 8}, "domains": [domain]}
    (tmp_path / "domains.yaml").write_text(json.dumps(recipe))
    model = load_model(MODEL_FOLDER)
    weight = model.get_input_embeddings().weight.data
    weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(tmp_path / "noisy")
    load_tokenizer(MODEL_FOLDER).save_pretrained(tmp_path / "noisy")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "trl_interfere", "compare", str(MODEL_FOLDER), "noisy", "--recipe"]
    options = ["domains.yaml", "--no_browser", "--no_hub", "--port", str(port)]
    with subprocess.Popen([*command, *options], cwd=tmp_path) as process:
        try:
            while process.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    httpx.get(f"http://127.0.0.1:{port}/")
                    break
                time.sleep(0.5)
            page = visit(f"http://127.0.0.1:{port}/?tab=prompts", wait="#flips table")
            rows = (tmp_path / "comparison" / "scores").glob("*/sums.jsonl")
            scores = [[json.loads(line)["score"] for line in path.read_text().splitlines()] for path in sorted(rows)]
            lost = sum(before > after for before, after in zip(*scores, strict=True))
            row = page.locator("#flips tbody tr").filter(has_text="sums").inner_text().split()
            assert lost > 2 and str(lost) in row, row
            page.close()  # before the server ends
        finally:
            process.terminate()


@pytest.mark.slow
def test_hostile_run(visit, address, tmp_path):
    page = visit(opened(address, "prompts", run="hostile", prompt=0), wait="#answers .ti-answer")
    for place in ("#answers", "#flips", "#prompts"):
        assert "<script>" in page.locator(place).inner_text(), place
    for tab in ("Verdict", "Repairs", "Where"):
        show(page, tab)
        page.wait_for_selector(f"#{tab.lower()} .ti-plot svg")
    with page.expect_download() as download:
        page.click("#save")
    download.value.save_as(tmp_path / "saved.html")
    saved = visit((tmp_path / "saved.html").as_uri(), wait="svg")
    saved.locator("details summary").first.click()
    assert HOSTILE in saved.locator("main").text_content() and saved.locator("img").count() == 0


def test_files_outside_are_not_served(address, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("nobody reads this")
    with httpx.Client(base_url=address) as client:
        for path in (secret, DATA / "stages.json", "/etc/passwd", "../pyproject.toml", DATA / ".." / ".." / "app.py"):
            for route in ("gradio_api/file=", "file=", "gradio_api/stream/"):
                response = client.get(f"{route}{path}")
                assert response.status_code in (403, 404, 405) and "nobody reads" not in response.text, (route, path)
