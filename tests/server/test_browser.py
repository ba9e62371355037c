"""The page in a real browser, against a real server."""

import base64
import json
import shutil
from contextlib import contextmanager

import pytest

from tests.conftest import encode, noise, until
from tests.gate import gated

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
QUIET = [
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
    *("--disable-component-update", "--disable-sync", "--disable-quic"),
]
PHONE = {"viewport": {"width": 360, "height": 740}}
SEND = """([data, kind]) => {
    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], "sent.png", { type: "image/png" }));
    const options = { bubbles: true, cancelable: true };
    const event = kind === "paste"
        ? new ClipboardEvent("paste", { ...options, clipboardData: transfer })
        : new DragEvent("drop", { ...options, dataTransfer: transfer });
    document.body.dispatchEvent(event);
}"""

FOCUSED = "[document.activeElement].map((e) => e.id || e.title || e.textContent.trim())[0]"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens a server's page; at the end, nothing may have been wrong with any page."""

    @contextmanager
    def opened(server, path="/", failures=(), **options):
        with browser.new_context(reduced_motion="reduce", **options) as context:
            page = context.new_page()
            page.set_default_timeout(10_000)
            page.requested, said = [], []
            page.on("request", lambda request: page.requested.append(request.url))
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.goto(server.url + path)
            if path == "/":
                page.wait_for_selector("#road li, #key-form:not([hidden])")
            yield page
            wrong = [text for text in said if not any(f in text for f in failures)]
            assert wrong == []
            here = (server.url, f"blob:{server.url}")
            assert [url for url in page.requested if not url.startswith(here)] == []

    return opened


def answered(page):
    """Wait for an answer; the exit that gave it and the exits that are lit."""
    page.wait_for_selector(".exit.left")
    lit = page.locator(".exit.reached").count()
    return int(page.locator(".exit.left .name").inner_text().removeprefix("Exit ")), lit


def check_answer(server, page, data, **parameters):
    expected = server.post(data, **parameters).json()
    exit, lit = answered(page)
    assert exit == lit == expected["exit"]
    said = page.get_by_role("status").inner_text()
    assert expected["label"] in said
    assert f"{round(100 * expected['confidence'])} %" in said


def last_query(page):
    sent = [url for url in page.requested if "/classify" in url]
    return sent[-1].partition("?")[2]


@pytest.mark.slow
def test_a_sample_is_classified_and_its_exits_light_up(server, visit):
    with visit(server) as page:
        page.get_by_role("button", name="Sample: tiger").click()
        data = server.client.get("/static/samples/tiger.png").content
        check_answer(server, page, data)
        assert page.locator("#preview").evaluate("image => image.naturalWidth") == 32


@pytest.mark.slow
def test_a_file_that_is_chosen_is_classified(server, visit, png):
    with visit(server) as page:
        file = {"name": "mine.png", "mimeType": "image/png", "buffer": png}
        page.get_by_label("Drop or paste an image").set_input_files(file)
        check_answer(server, page, png)
        assert page.locator("#preview").get_attribute("alt") == "Your image, mine.png"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_an_image_that_is_dropped_or_pasted_is_classified(server, visit, png, kind):
    with visit(server) as page:
        page.evaluate(SEND, [base64.b64encode(png).decode(), kind])
        check_answer(server, page, png)


@pytest.mark.slow
def test_each_exit_lights_up_when_its_event_comes(serve, visit):
    with serve() as one, visit(one) as page:
        page.get_by_text("More ways to ask").click()
        page.get_by_label("Fixed threshold").fill("1")
        with gated(one) as gate:
            page.get_by_role("button", name="Sample: fox").click()
            for lit in (1, 2, 3):
                gate.let_through()
                page.wait_for_selector(f".exit.reached >> nth={lit - 1}")
                assert page.locator(".exit.reached").count() == lit
                assert page.locator(".exit.left").count() == 0
        assert answered(page) == (4, 4)


@pytest.mark.slow
def test_the_slider_says_what_is_at_stake_and_asks_for_it(server, visit):
    with visit(server) as page:
        page.get_by_role("button", name="Sample: fox").click()
        answered(page)
        assert last_query(page) == ""
        slider = page.get_by_role("slider", name="Operating point")
        assert slider.get_attribute("aria-valuetext").startswith("at most 1 point of accuracy")
        slider.focus()
        page.keyboard.press("ArrowLeft")
        assert slider.get_attribute("aria-valuetext").startswith("at most 5 points of accuracy")
        assert "≤ 5 points" in page.locator("#stake").inner_text()
        until(lambda: last_query(page) == "max_accuracy_loss=0.05" or page.wait_for_timeout(10))
        page.keyboard.press("End")
        assert "≤ 0 points" in page.locator("#stake").inner_text()
        until(lambda: last_query(page) == "max_accuracy_loss=0" or page.wait_for_timeout(10))
        page.wait_for_selector(".exit.left .name:text('Exit 4')")
        dots = page.locator("#curve .dot:not(.chosen)")
        assert dots.count() == len(server.served.loaded.policy.operating_points)
        assert server.client.get("/policy").json()["in_force"]["max_accuracy_loss"] == 0.01


@pytest.mark.slow
def test_the_options_go_with_the_request(server, visit):
    with visit(server) as page:
        page.get_by_text("More ways to ask").click()
        page.get_by_label("Fixed threshold").fill("0")
        page.get_by_label("Shallowest exit").fill("2")
        page.get_by_role("button", name="Sample: fox").click()
        assert answered(page) == (2, 2)
        assert last_query(page) == "threshold=0&min_exit=2"
        page.get_by_label("Shallowest exit").fill("9")
        page.get_by_label("Shallowest exit").blur()
        page.wait_for_timeout(50)
        assert last_query(page) == "threshold=0&min_exit=2"  # it is out of range, and marked so


@pytest.mark.slow
def test_the_live_figures_are_those_of_the_metrics(serve, visit):
    with serve() as one:
        answers = [one.post(encode(noise(seed=s))).json() for s in range(12)]
        with visit(one) as page:
            page.get_by_text("since its start").wait_for()
            for exit in range(1, 5):
                share = sum(a["exit"] == exit for a in answers) / len(answers)
                row = page.locator("#mix-legend li").nth(exit - 1).inner_text()
                assert f"{100 * share:.0f} %" in row
            page.get_by_role("button", name="Sample: fox").click()
            page.get_by_text("in the last minute").wait_for()
            assert "compute saved" in page.locator("#live").inner_text()
            assert "at most 1 point" in page.locator("#in-force").inner_text()


@pytest.mark.slow
def test_what_is_no_image_is_said_kindly_and_the_next_image_works(server, visit):
    with visit(server, failures=["400"]) as page:
        text = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"hello"}
        page.get_by_label("Drop or paste an image").set_input_files(text)
        page.get_by_role("alert").get_by_text("Not an image, or not one of PNG").wait_for()
        assert page.get_by_text("No preview of this image").is_visible()
        page.get_by_role("button", name="Sample: otter").click()
        answered(page)
        assert not page.get_by_role("alert").is_visible()


@pytest.mark.slow
def test_a_server_that_is_gone_is_said_kindly_and_can_be_tried_again(serve, visit):
    with serve() as one, visit(one, failures=["ERR_FAILED"]) as page:
        page.route("**/classify*", lambda route: route.abort())
        page.get_by_role("button", name="Sample: otter").click()
        page.get_by_text("The server does not answer.").wait_for()
        page.unroute("**/classify*")
        page.get_by_role("button", name="Try again").click()
        answered(page)


@pytest.mark.slow
def test_a_busy_server_is_said_kindly(serve, visit):
    with serve(max_queue=1) as one, visit(one, failures=["429"]) as page:
        one.served.in_flight = 1
        page.get_by_role("button", name="Sample: otter").click()
        page.get_by_text("The server cannot answer in time now").wait_for()
        one.served.in_flight = 0
        page.get_by_role("button", name="Try again").click()
        answered(page)


@pytest.mark.slow
def test_a_key_is_asked_for_and_used(serve, visit):
    with serve(api_keys="right") as one, visit(one, failures=["401", "403"]) as page:
        key = page.get_by_label("This server asks for an API key")
        key.fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_text("This key is not allowed here.").wait_for()
        key.fill("right")
        page.get_by_role("button", name="Use this key").click()
        page.get_by_text("Serving tiny, version 7").wait_for()
        assert not key.is_visible()
        page.get_by_role("button", name="Sample: otter").click()
        answered(page)


@pytest.mark.slow
def test_all_can_be_done_with_the_keyboard_from_top_to_bottom(server, visit):
    with visit(server) as page:
        page.wait_for_selector("#point:enabled")
        order = []
        for _ in range(13):
            page.keyboard.press("Tab")
            order.append(page.evaluate(FOCUSED))
        assert order[:3] == ["HTTP reference", "Metrics", "file"]
        assert order[3] == "sunflower"
        assert order[10:] == ["otter", "point", "More ways to ask"]
        page.locator("#samples button").nth(2).focus()
        page.keyboard.press("Enter")
        answered(page)
        assert page.locator("#samples button").nth(2).get_attribute("aria-pressed") == "true"


@pytest.mark.slow
def test_a_screen_reader_is_told_what_eyes_see(server, visit):
    with visit(server) as page:
        page.get_by_role("button", name="Sample: fox").click()
        exit, _ = answered(page)
        row = page.get_by_role("list", name="Exits").get_by_role("listitem").nth(exit - 1)
        assert "% sure" in " ".join(row.all_text_contents()).replace("\n", " ")
        assert "of the compute" in row.text_content()
        mix = page.get_by_role("img", name="exit 1:")
        mix.wait_for()
        curve = page.get_by_role("img", name="Accuracy at stake over mean compute")
        assert curve.count() == 1
        unnamed = "img:not([alt]), input:not([id]), button:empty"
        assert page.locator(unnamed).count() == 0


CONTRAST = """() => {
    const light = (rgb) => {
        const [r, g, b] = rgb.match(/[\\d.]+/g).map(Number)
            .map((c) => c / 255)
            .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (e) => {
        for (; e; e = e.parentElement) {
            const color = getComputedStyle(e).backgroundColor;
            if (!color.endsWith(", 0)")) return color;
        }
        return "rgb(255, 255, 255)";
    };
    const texts = [...document.querySelectorAll("body *")].filter((e) =>
        e.checkVisibility() && !(e instanceof SVGElement) &&
        [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()));
    return texts.map((e) => {
        const pair = [light(getComputedStyle(e).color), light(ground(e))].sort((a, b) => b - a);
        return [(pair[0] + 0.05) / (pair[1] + 0.05), e.textContent.trim().slice(0, 40)];
    }).filter(([ratio]) => ratio < 4.5);
}"""


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/", "/docs"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read_in_light_and_dark_and_on_a_phone(server, visit, scheme, path):
    with visit(server, path, color_scheme=scheme, **PHONE) as page:
        if path == "/":
            page.get_by_role("button", name="Sample: fox").click()
            answered(page)
        else:
            page.wait_for_selector("article")
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        dark = int(ground.removeprefix("rgb(").partition(",")[0]) < 128
        assert dark == (scheme == "dark")
        assert page.evaluate(CONTRAST) == []
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(wide) == 0


@pytest.mark.slow
def test_the_policy_of_the_page_stops_code_and_requests_from_elsewhere(server, visit):
    blocked = ["Content Security Policy", "violates", "fetch"]
    with visit(server, failures=blocked) as page:
        page.evaluate("""() => {
            window.violations = [];
            document.addEventListener("securitypolicyviolation", (event) =>
                window.violations.push(event.effectiveDirective));
            const script = document.createElement("script");
            script.textContent = "window.injected = true";
            document.body.append(script);
            fetch("https://example.invalid/").catch(() => 0);
        }""")
        seen = "window.violations.length"
        until(lambda: page.evaluate(seen) == 2 or page.wait_for_timeout(10))
        assert page.evaluate("window.injected") is None
        violated = page.evaluate("window.violations")
        assert sorted(violated) == ["connect-src", "script-src-elem"]


@pytest.mark.slow
def test_the_reference_shows_every_operation_of_the_document(serve, visit):
    with serve(admin_token="secret") as one, visit(one, "/docs") as page:
        page.wait_for_selector("article")
        paths = json.loads(one.client.get("/openapi.json").text)["paths"]
        shown = page.locator("article h2").all_inner_texts()
        operations = {f"{m.upper()}{path}" for path, item in paths.items() for m in item}
        assert operations <= {"".join(text.split()) for text in shown}
        page.get_by_role("navigation", name="Operations").get_by_text("/classify/batch").click()
        assert page.url.endswith("#post-classify-batch")
        assert page.locator("#post-classify-batch").evaluate(
            "article => Math.abs(article.getBoundingClientRect().top) < innerHeight"
        )
