"""The chat page in a headless Chromium, as somebody uses it with a keyboard, and on a phone."""

import json
import shutil

from playwright.sync_api import expect, sync_playwright


def check(url, key, question, answer):
    """Talks to the server at `url` and expects `answer` to `question` at temperature 0."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        user = {"http_credentials": {"username": "", "password": key}, "base_url": url}
        talk(browser.new_page(**user), url, question, answer)
        light, dark = (looks(browser.new_page(**user, color_scheme=scheme)) for scheme in ("light", "dark"))
        assert light != dark, light
        phone(browser.new_page(**user, viewport={"width": 340, "height": 560}, has_touch=True, is_mobile=True), question)
        browser.close()


def talk(page, url, question, answer):
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request))
    page.on("pageerror", lambda error: errors.append(error))
    # A page that is opened while the model is loaded shows it when it is there.
    page.route("**/v1/models", lambda route: route.fulfill(status=503, body="{}"), times=1)
    page.goto("/")
    expect(page.locator("#model")).to_contain_text("not there yet")
    expect(page.locator("#model")).to_contain_text("tokens")
    assert page.locator("#model").inner_text().startswith("demo · ")
    # The keyboard alone: settings, a question, its answer.
    page.locator("summary").press("Enter")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Top p").fill("0.9")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Max tokens").fill("99")
    message, answers = page.get_by_label("Message"), page.locator(".turn.assistant")
    message.fill(question)
    message.press("Enter")
    expect(answers).to_have_text([answer])
    body = json.loads(asked[-1].post_data)
    assert body == {
        "stream": True, "temperature": 0, "top_p": 0.9, "max_tokens": 99, "seed": 7,
        "messages": [{"role": "user", "content": question}],
    }, body
    page.get_by_role("button", name="Regenerate").click()
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    expect(answers).to_have_text([answer])
    assert json.loads(asked[-1].post_data) == body
    # A second turn knows the first; the system prompt goes before both.
    page.get_by_label("System prompt").fill("Be brief.")
    message.fill("And")
    message.press("Shift+Enter")
    message.press_sequentially("then?")
    message.press("Enter")
    expect(answers).to_have_count(2)
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    roles = [(m["role"], m["content"]) for m in json.loads(asked[-1].post_data)["messages"]]
    assert roles == [("system", "Be brief."), ("user", question), ("assistant", answer), ("user", "And\nthen?")], roles

    # An answer without end is stopped, by key and by button, and a conversation is cleared below it.
    def endless(route):
        route.continue_(post_data=json.dumps(json.loads(route.request.post_data) | {"ignore_eos": True, "max_tokens": 3000}))

    page.route("**/v1/chat/completions", endless)
    for stop in (lambda: page.keyboard.press("Escape"), lambda: page.get_by_role("button", name="Stop").click()):
        message.fill("Tell me a story.")
        message.press("Enter")
        expect(answers.last).not_to_be_empty()
        stop()
        expect(page.get_by_role("button", name="Send")).to_be_enabled()
        assert len(answers.last.inner_text()) < 3000
    message.fill("Tell me a story.")
    message.press("Enter")
    expect(answers.last).not_to_be_empty()
    page.get_by_role("button", name="Clear").click()
    expect(page.locator(".turn")).to_have_count(0)
    page.unroute("**/v1/chat/completions")
    # An error is shown; behind it the conversation goes on.
    page.get_by_label("Max tokens").fill("0")
    page.get_by_label("Temperature").fill("-1")
    message.fill(question)
    message.press("Enter")
    expect(page.locator(".turn.error")).to_contain_text("temperature")
    page.get_by_label("Max tokens").fill("99")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("System prompt").fill("")
    page.get_by_role("button", name="Regenerate").click()
    expect(answers).to_have_text([answer])
    assert json.loads(asked[-1].post_data)["messages"] == [{"role": "user", "content": question}]
    assert not errors and all(request.url.startswith((f"{url}/", "data:")) for request in asked), errors


def looks(page):
    """Colours of text and ground."""
    page.goto("/")
    colours = "[getComputedStyle(document.body).color, getComputedStyle(document.querySelector('textarea')).backgroundColor]"
    return page.evaluate(colours)


def phone(page, question):
    page.goto("/")
    page.get_by_label("Message").fill(question + " " + "word" * 60)
    page.get_by_role("button", name="Send").tap()
    expect(page.locator(".turn.assistant")).not_to_be_empty()
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    assert page.evaluate("document.documentElement.scrollWidth") <= 340
    for name in ("Send", "Stop", "Regenerate", "Clear"):
        box = page.get_by_role("button", name=name).bounding_box()
        assert 0 <= box["x"] and box["x"] + box["width"] <= 340 and box["y"] + box["height"] <= 560 and box["height"] >= 32, (name, box)
