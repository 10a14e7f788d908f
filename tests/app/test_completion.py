import json

import httpx
import pytest

from trl_interfere.app import completion
from trl_interfere.app.completion import HubModels, check_prompt, complete, complete_on_server, load_folder
from trl_interfere.evaluation.scorer import Scorer
from trl_interfere.lab.build import MODEL_FOLDER


def asked(handler, **arguments):
    settings = {"endpoint": "http://server/v1", "model": "m", "prompt": "1+1?", "tokens": 5, "temperature": 0.5}
    return complete_on_server(**{**settings, **arguments}, transport=httpx.MockTransport(handler))


def test_server():
    requests = []

    def handler(request):
        requests.append(request)
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "first"}, {"id": "second"}]})
        return httpx.Response(200, json={"choices": [{"message": {"content": " 2"}}]})

    assert asked(handler, model="", key="secret", seed=3) == " 2"
    assert [str(request.url) for request in requests] == [
        "http://server/v1/models",
        "http://server/v1/chat/completions",
    ]
    assert json.loads(requests[1].content) == {
        "model": "first",
        "messages": [{"role": "user", "content": "1+1?"}],
        "max_tokens": 5,
        "temperature": 0.5,
        "seed": 3,
    }
    assert requests[1].headers["Authorization"] == "Bearer secret"


def no_answer(request):
    raise httpx.ConnectError("refused")


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (lambda request: httpx.Response(500, text="<b>broken</b>"), "expected status 200, found 500"),
        (lambda request: httpx.Response(302, headers={"Location": "http://other"}), "expected status 200, found 302"),
        (lambda request: httpx.Response(200, text="<html>"), "expected JSON"),
        (
            lambda request: httpx.Response(200, json={"choices": []}),
            "expected an answer with choices.0.message.content",
        ),
        (lambda request: httpx.Response(200, json={"choices": [{"message": {"content": None}}]}), "expected text"),
        (lambda request: httpx.Response(200, content=b"x" * (2**20 + 1)), "expected at most 1 MB"),
        (no_answer, "no answer"),
    ],
)
def test_server_that_fails(handler, message):
    with pytest.raises(ValueError, match=message):
        asked(handler)


@pytest.mark.parametrize(
    "endpoint", ["", "file:///etc/passwd", "ftp://server", "http://user:key@server/v1", "server:8000"]
)
def test_addresses_that_are_refused(endpoint):
    with pytest.raises(ValueError, match="endpoint: expected"):
        asked(no_answer, endpoint=endpoint)


def test_bounds():
    for arguments, message in (
        ((" ", 5, 0), "expected some text"),
        (("x" * 4001, 5, 0), "at most 4,000 characters"),
        (("x", 0, 0), "tokens"),
        (("x", 513, 0), "tokens"),
        (("x", 5, -0.1), "temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            check_prompt(*arguments)


def test_model_in_a_folder():
    model, tokenizer = load_folder(MODEL_FOLDER)
    expected = Scorer(tokenizer, max_new_tokens=8).complete(model, ["Q: 4+5 A:"])[0]
    assert complete(model, tokenizer, "Q: 4+5 A:", 8, 0) == expected
    sampled = {complete(model, tokenizer, "Q: 4+5 A:", 8, 2.0, seed) for seed in range(4)}
    assert len(sampled) > 1


def test_folder_that_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}'
    )
    with pytest.raises(ValueError, match="not a model that transformers loads"):
        load_folder(tmp_path)


def test_names_of_the_hub_are_never_folders(tmp_path, monkeypatch):
    (tmp_path / "user" / "repo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(completion, "load_folder", lambda folder: pytest.fail(f"read {folder}"))
    for name, message in (
        ("user/repo", "not readable from the Hub"),
        ("../user", "expected user/repo"),
        ("/etc/passwd", "expected user/repo"),
        ("user/repo/more", "expected user/repo"),
        ("user/..repo", "expected user/repo"),
    ):
        with pytest.raises(ValueError, match=message):
            HubModels().load(name)
