"""The chat page: what the server sends, and in headless Chromium, where there is one, what a user meets."""

import base64
import hashlib
import json
import pathlib
import re
import time

import httpx
import pytest

from jaxlm.serve.engine import Engine
from tests.serve import browser, live


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    feedback = tmp_path_factory.mktemp("feedback") / "feedback.jsonl"
    with live.serving(feedback=feedback, max_tokens=400) as (server, address):
        yield server, address, feedback


def test_the_page_may_do_nothing_but_talk_to_its_server(served):
    answer = httpx.get(f"{served[1]}/")
    text, policy = answer.text, dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert answer.headers["content-type"].startswith("text/html") and answer.headers["x-content-type-options"] == "nosniff"
    digest = lambda tag: base64.b64encode(hashlib.sha256(re.search(f"<{tag}>(.*)</{tag}>", text, re.DOTALL)[1].encode()).digest()).decode()
    assert policy["script-src"] == f"'sha256-{digest('script')}'" and policy["style-src"] == f"'sha256-{digest('style')}'"
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'" and policy["connect-src"] == "'self'"
    # Whatever is said becomes text nodes: no way to HTML or code is used, and nothing comes from elsewhere.
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "http://", "https://", " style=", " onclick="):
        assert way not in text, way
    for field in re.findall(r"<(?:input|textarea|select)\b[^>]*>", text):  # each inside its label, or named by one
        assert re.search(rf"<label[^>]*>[^<]*{re.escape(field)}", text) or 'id="text"' in field, field
    assert '<label class="sr" for="text">' in text and '<html lang="en">' in text and 'name="viewport"' in text


def test_the_page_goes_into_the_wheel():
    assert pathlib.Path(live.__file__).parents[2].joinpath("jaxlm", "serve", "page.html").is_file()
    assert "page.html" not in (pathlib.Path(live.__file__).parents[2] / ".gitignore").read_text()  # hatchling leaves out what git ignores


@pytest.fixture
def page(tmp_path):
    if browser.PATH is None:
        pytest.skip("no Chromium here")
    page = browser.Page(tmp_path / "profile")
    yield page
    page.close()


def last(page, what="innerText"):
    return page.js(f"document.querySelector('.assistant:last-child .said')?.{what}")


@pytest.mark.slow
def test_a_chat_in_the_browser(served, page, monkeypatch):
    server, address, feedback = served
    page.open(address)
    page.until("document.title === 'tiny' && document.activeElement.id === 'text'")
    # Random weights end a text when they like, and fast: answers here go on, a hundred tokens a second at most.
    page.js("(send => { window.fetch = (to, what) => send(to, what?.body?.includes('max_tokens') ? "
            "{...what, body: JSON.stringify({...JSON.parse(what.body), ignore_eos: true})} : what); })(window.fetch)")
    step = Engine._step
    monkeypatch.setattr(Engine, "_step", lambda *given: (time.sleep(0.01), step(*given))[1])
    page.type("Hello <img src=x onerror=alert(1)> `there`")
    page.key("Enter", shift=True)
    page.type("again")
    assert page.js("document.querySelectorAll('article').length") == 0, "Shift+Enter sends nothing"
    page.js("(e => { e.value = 12; e.dispatchEvent(new Event('input', {bubbles: true})); })(document.querySelector('[name=max_tokens]'))")
    page.key("Enter")
    page.until("document.querySelector('.assistant .under span').innerText.includes('12 tokens')")
    assert page.js("document.querySelector('.user .said').innerText") == "Hello <img src=x onerror=alert(1)> `there`\nagain"
    assert page.js("document.querySelectorAll('#log img').length") == 0
    assert page.js("document.querySelector('#status').innerText").startswith("The model")
    # Streaming and Esc: a part is there before the end, and stays.
    page.js("(e => { e.value = 300; e.dispatchEvent(new Event('input', {bubbles: true})); })(document.querySelector('[name=max_tokens]'))")
    page.type("More")
    page.key("Enter")
    page.until("document.querySelector('.busy .said').innerText.length > 3")
    assert page.js("document.querySelector('#send').innerText") == "Stop" and server.engine.load()["running"] == 1
    page.key("Escape")
    page.until("document.querySelector('.assistant:last-child .under span').innerText === 'stopped'")
    live.settled(server)
    said = last(page)
    page.js("[...document.querySelectorAll('.assistant:last-child button')].find(b => b.innerText === 'Good').click()")
    page.until("document.querySelector('[aria-pressed=true]')")
    assert json.loads(feedback.read_text())["rating"] == 1
    # The conversation is there after a reload, on a phone too, which shows it without scrolling sideways.
    page.size(360, 640, phone=True)
    page.open(address)
    page.until("document.querySelectorAll('article').length === 4")
    assert last(page) == said
    assert page.js("document.documentElement.scrollWidth <= 360 && document.querySelector('#send').getBoundingClientRect().right <= 360")
    # The right colours in the dark.
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert page.js("getComputedStyle(document.body).backgroundColor") == "rgb(20, 25, 34)"
    page.js("document.querySelector('#new').click()")
    page.until("document.querySelector('.empty')")
    page.open(address)
    page.until("document.querySelector('.empty') && document.title === 'tiny'")
    assert not page.problems


@pytest.mark.slow
def test_labels_keys_and_a_server_that_is_gone(page):
    with live.serving(live.CLASSIFIER, api_key="secret") as (server, address):
        page.open(address)
        page.until("!document.querySelector('#problem').hidden && document.activeElement.name === 'key'")
        page.type("secret")
        page.key("Enter")
        page.until("document.title === 'tiny' && document.querySelector('#settings').hidden")
        page.type("A fine day")
        page.key("Enter")
        page.until("document.querySelectorAll('.label').length === 3")
        shares = page.js("[...document.querySelectorAll('.label output')].map(o => parseFloat(o.innerText))")
        assert abs(sum(shares) - 100) < 0.3 and shares == sorted(shares, reverse=True)
        assert page.js("document.querySelector('.label.is span').innerText") in live.CLASSIFIER.label_names
    page.type("Another")
    page.key("Enter")
    page.until("document.querySelector('#problem').innerText.startsWith('The server cannot be reached')")
