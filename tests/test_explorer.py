"""docs/explorer.html in a real browser: its formulas are Python's, and it does what it says."""

import base64
import inspect
import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import dpo_variants
import kto
import world

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "explorer.html").read_text(encoding="utf-8")
SCRIPT = (DOCS / "losses.js").read_text(encoding="utf-8")
LOSSES = kto.LOSSES | dpo_variants.LOSSES
MEASURED = json.loads(re.search(r'id="measured">(.*?)</script>', PAGE, re.S)[1])
REFERENCE = [0.15, 0.10, 0.10, 0.30, 0.15, 0.20]
THUMBS_UP = [0.90, 0.75, 0.55, 0.25, 0.20, 0.05]


# --- what can be read without a browser ---------------------------------------------------------

def test_the_page_needs_no_network():
    for text in (PAGE, SCRIPT):
        assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttp|import\(", text)
    assert re.findall(r'src="([^"]+)"', PAGE) == ["losses.js"]
    for link in re.findall(r'href="([^"#]+)', PAGE):
        assert (DOCS / link).exists(), link


def test_every_text_stands_in_both_languages():
    tags = {lang: re.findall(rf'<(\w+)[^>]*?\slang="{lang}"', PAGE.split("<body>")[1])
            for lang in ("en", "zh")}
    assert tags["en"] == tags["zh"] and len(tags["en"]) > 30


def test_the_frontier_is_the_worlds_and_runs_lie_under_it():
    for kl, utility in MEASURED["frontier"][::8]:
        assert world.optimum_at_kl(kl).utility == pytest.approx(utility, abs=2e-3)
    assert MEASURED["optima"]["dpo"][1] == pytest.approx(world.dpo_optimum(0.5).utility, abs=1e-3)
    assert MEASURED["optima"]["kto"][1] == pytest.approx(world.kto_optimum(0.5).utility, abs=1e-3)
    assert set(MEASURED["runs"]) == {"kto", "dpo", "ppo"}
    for run in MEASURED["runs"].values():
        points = run["points"]
        assert points[0][:2] == [0, 0] and len(points) > 30
        for _, kl, utility, _ in points[1:]:
            # The mean of 192 utilities: three standard errors are about 0.45.
            assert utility < world.optimum_at_kl(kl).utility + 0.45


# --- the browser --------------------------------------------------------------------------------

needs_chromium = pytest.mark.skipif(not shutil.which("chromedriver"),
                                    reason="chromium and its driver are not here")


def in_browser(test):
    return pytest.mark.slow(needs_chromium(test))


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--lang=en", "--hide-scrollbars"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser):
    """The page as it opens; whatever the test did, the console must stay silent."""
    browser.get("about:blank")
    open_page(browser)
    yield browser
    assert browser.get_log("browser") == []


def open_page(browser, address="#lang=en&theme=light", width=1280, height=900):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600})
    browser.get("about:blank")
    browser.get((DOCS / "explorer.html").as_uri() + address)


def ask(browser, expression, *words):
    """The value of a JavaScript expression once everything is drawn; words are its arguments."""
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    return browser.execute_script(f"return {expression}", *words)


def wait_for(browser, expression, seconds=20):
    from selenium.webdriver.support.ui import WebDriverWait
    return WebDriverWait(browser, seconds).until(lambda _: ask(browser, expression))


def picture(browser):
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    from PIL import Image
    return Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")


def element(browser, selector):
    found = browser.find_element("css selector", selector)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
    return found


def slide(browser, selector, value):
    browser.execute_script("""const input = document.querySelector(arguments[0]);
        input.value = arguments[1]; input.dispatchEvent(new Event("input"))""", selector, value)


def choose(browser, menu, name):
    from selenium.webdriver.support.ui import Select
    Select(element(browser, menu)).select_by_visible_text(name)


# --- formulas -----------------------------------------------------------------------------------

DRAWN = {                                # where random settings lie; beta and tau log-uniform
    "beta": (0.01, 3), "tau": (0.02, 1), "lambda_d": (0, 3), "lambda_u": (0, 3), "z0": (0, 8),
    "label_smoothing": (1e-3, 0.45), "reward_shift": (-3, 3), "lam": (0, 50), "alpha": (0, 1),
    "score_gap": (0.3, 12), "chosen_win_prob": (0, 1), "rejected_win_prob": (0, 1),
}


def draw(rng, setting):
    if setting == "divergence":
        return str(rng.choice(["reverse_kl", "js", "forward_kl", "alpha"]))
    low, high = DRAWN[setting]
    if setting in ("beta", "tau"):
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))
    return float(rng.uniform(low, high))


def in_python(name, c, r, settings):
    """[loss, dL/dc, dL/dr] by torch; of thumbs the mean over one up and one down."""
    point = torch.tensor([c, r], dtype=torch.float64, requires_grad=True)
    told = {"logratios": point, "desirable": torch.tensor([True, False]),
            "chosen_logratios": point[:1], "rejected_logratios": point[1:]}
    for argument in inspect.signature(LOSSES[name]).parameters.values():
        if argument.name == "kl_logratios":
            told["kl_logratios"] = torch.tensor([settings["z0"]], dtype=torch.float64)
        elif argument.name not in told and argument.kind == argument.KEYWORD_ONLY:
            told[argument.name] = settings[argument.name]
        elif argument.name not in told:                      # measured: a tensor
            told[argument.name] = torch.tensor(settings[argument.name], dtype=torch.float64)
    wanted = inspect.signature(LOSSES[name]).parameters
    loss = LOSSES[name](**{key: told[key] for key in wanted}).mean()
    return [loss.item(), *torch.autograd.grad(loss, point)[0].tolist()]


@in_browser
def test_losses_and_slopes_are_pythons_on_thousands_of_points(page):
    rng = np.random.default_rng(0)
    settings_of = ask(page, "Object.fromEntries(Object.entries(OBJECTIVES)"
                            ".map(([name, it]) => [name, Object.keys(it.settings)]))")
    assert len(settings_of) >= 12
    cases = []
    for name, settings in settings_of.items():
        for reach in np.repeat([3.0, 15.0, 40.0], 50):
            c, r = rng.uniform(-reach, reach, 2)
            cases.append([name, c, r, {setting: draw(rng, setting) for setting in settings}])
    assert len(cases) >= 2000
    found = ask(page, """arguments[0].map(([name, c, r, p]) =>
        [OBJECTIVES[name].loss(c, r, p), ...OBJECTIVES[name].slope(c, r, p)])""", cases)
    expected = np.array([in_python(*case) for case in cases])
    # A few dozen roundings, of exponents up to 120: the relative error of e^x is x times one ulp.
    np.testing.assert_allclose(np.array(found, float), expected, rtol=1e-11, atol=1e-13)


@in_browser
def test_defaults_are_the_signatures_and_the_page_begins_with_the_embedded_worlds(page):
    objectives = ask(page, "Object.fromEntries(Object.entries(OBJECTIVES)"
                           ".map(([name, it]) => [name, [it.settings, it.start ?? {}]]))")
    for name, (settings, start) in objectives.items():
        for key, argument in inspect.signature(LOSSES[name]).parameters.items():
            if argument.kind == argument.KEYWORD_ONLY:
                assert settings[key] == argument.default, (name, key)
                preset = world.SETTINGS.get(name, {}).get(key, argument.default)
                assert start.get(key, settings[key]) == preset, (name, key)


@in_browser
def test_exact_optima_of_the_six_answers_are_the_worlds(page):
    rng = np.random.default_rng(1)
    ref, q = np.array(REFERENCE), np.array(THUMBS_UP)
    for beta in (0.05, 0.5, 1.0, 2.0, 8.0):
        for balance in (2 * q - 1, q - 4 / 3 * (1 - q), rng.uniform(-1, 1, 6)):
            z0 = float(rng.choice([0.0, 1.0]))
            found = ask(page, "ktoOptimum(...arguments)", REFERENCE, balance.tolist(), beta, z0)
            rows = list(zip(REFERENCE, balance.tolist()))
            exact = ref * np.exp(world.kto_logratios(rows, beta=beta, z0=z0))
            np.testing.assert_allclose(found, exact, atol=1e-9)
    # DPO's is the reference tilted by utility / beta; rDPO's, told the flips, is the same.
    utility = np.log(q / (1 - q))
    tilted = ref * np.exp(utility / 0.5)
    clean = "pairOptimum(arguments[0], preferences(arguments[1], 0), 0.5)"
    robust = "pairOptimum(arguments[0], preferences(arguments[1], 0.2), 0.5, 0.2, -1)"
    for expression in (clean, robust):
        found = ask(page, expression, REFERENCE, THUMBS_UP)
        np.testing.assert_allclose(found, tilted / tilted.sum(), atol=1e-7)
    # At IPO's minimum log pi/ref - chance / tau is one number.
    found = ask(page, "ipoOptimum(arguments[0], preferences(arguments[1], 0.1), 0.3)", REFERENCE,
                THUMBS_UP)
    chance = (0.1 + 0.8 / (1 + np.exp(utility - utility[:, None]))) @ ref
    constant = np.log(found / ref) - chance / 0.3
    np.testing.assert_allclose(constant, constant[0], atol=1e-9)


@in_browser
@pytest.mark.parametrize("method", ["kto", "dpo", "cdpo", "rdpo", "ipo"])
def test_training_of_the_six_answers_arrives_at_the_exact_optimum(page, method):
    open_page(page, f"#lang=en&answers={method}&flip=0.1&dpo.beta=1")
    page.execute_script("for (let i = 0; i < 3000; i++) learn(); update()")
    far = ask(page, """policy().reduce((sum, p, y) => sum + Math.abs(p - optimum(state.answers,
        rates(), state.flip, settings[state.answers])[y]) / 2, 0)""")
    assert far < 0.01                    # Adam at a rate of 0.1 ends within a per cent


@in_browser
def test_without_motion_a_run_ends_at_once(page):
    features = [{"name": "prefers-reduced-motion", "value": "reduce"}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    open_page(page)
    element(page, "[data-run=answers]").click()
    assert ask(page, "[learner.steps, learner.running]") == [1500, False]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


# --- what the reader does -----------------------------------------------------------------------

@in_browser
def test_a_point_is_dragged_moved_by_keys_and_runs_downhill(page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys
    canvas = element(page, "#hero")
    before = ask(page, "[state.c, state.r]")
    at = ask(page, "[hero.scale.toX(state.c), hero.scale.toY(state.r)]")
    middle = [canvas.size["width"] / 2, canvas.size["height"] / 2]
    start = [round(at[k] - middle[k]) for k in (0, 1)]
    ActionChains(page).move_to_element_with_offset(canvas, *start).click_and_hold().move_by_offset(
        -40, 60).release().perform()
    after = ask(page, "[state.c, state.r]")
    assert after[0] < before[0] and after[1] < before[1]

    canvas.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_UP)
    moved = ask(page, "[state.c, state.r]")
    assert moved == pytest.approx([after[0] + 0.25, after[1] + 0.25], abs=0.011)

    loss = "OBJECTIVES.kto.loss(...hero.now(), settings.kto)"
    high = ask(page, loss)
    canvas.send_keys(Keys.SPACE)
    wait_for(page, "hero.trail.length > 20")
    canvas.send_keys(Keys.SPACE)
    assert ask(page, loss) < high and not ask(page, "hero.running")
    element(page, "[data-reset=hero]").click()
    assert ask(page, "[state.c, state.r]") == [0, 0]


@in_browser
def test_a_finger_near_the_point_drags_and_elsewhere_scrolls(page):
    open_page(page, "#lang=en", 360, 740)
    element(page, "#hero")
    x, y = ask(page, """(box => [box.left + hero.scale.toX(state.c),
        box.top + hero.scale.toY(state.r)])(hero.canvas.getBoundingClientRect())""")
    before = ask(page, "[state.c, state.r, scrollY]")

    def touch(kind, *points):
        page.execute_cdp_cmd("Input.dispatchTouchEvent", {
            "type": kind, "touchPoints": [{"x": x, "y": y} for x, y in points]})

    touch("touchStart", (x, y))
    for k in range(1, 6):
        touch("touchMove", (x + 8 * k, y + 12 * k))
    touch("touchEnd")
    after = ask(page, "[state.c, state.r, scrollY]")
    assert after[0] > before[0] + 1 and after[1] < before[1] - 1 and after[2] == before[2]


@in_browser
def test_the_address_keeps_what_was_set(page):
    choose(page, "#method-hero", "cdpo")
    slide(page, "#hero-beta", math.log10(0.2))
    slide(page, "#hero-label_smoothing", 0.3)
    slide(page, "#reach", 20)
    element(page, "#language").click()
    element(page, "#theme").click()
    wait_for(page, "location.hash.includes('cdpo.beta=0.2')")
    address = page.current_url
    assert "lang=zh" in address and "theme=dark" in address and "reach=20" in address
    page.get("about:blank")
    page.get(address)
    kept = "[state.hero, settings.cdpo.beta, settings.cdpo.label_smoothing, state.reach]"
    assert ask(page, kept) == ["cdpo", 0.2, 0.3, 20]
    assert ask(page, "document.documentElement.lang") == "zh"
    assert ask(page, "document.documentElement.dataset.theme") == "dark"
    # Nonsense is left out, not obeyed.
    open_page(page, "#hero=nothing&c=x&dpo.gamma=3&answers=hinge")
    assert ask(page, "[state.hero, state.c, state.answers]") == ["kto", -4, "kto"]


@in_browser
def test_two_languages_and_nothing_left_in_the_other(page):
    words = {}
    for language in ("en", "zh"):
        open_page(page, f"#lang={language}")
        ask(page, "1")
        words[language] = page.find_element("tag name", "main").text
    assert not re.search(r"[\u4e00-\u9fff]", words["en"])
    for term in ("可取", "不可取", "参考模型", "对数概率比", "损失地形", "KL 约束", "精确前沿"):
        assert term in words["zh"] or term in ask(page, "JSON.stringify(WORDS)"), term


@in_browser
def test_tied_gradients_lower_the_chosen_reply_as_the_text_says(page):
    element(page, "#verdict")
    first = "flow('dpo', tiedMatrix())(0, 0)[0]"
    for cosine, ratio in ((0.8, 2), (0.8, 1), (0, 3), (-0.5, 2), (0.3, 4)):
        slide(page, "#cosine", cosine)
        slide(page, "#ratio", ratio)
        falls = ask(page, first) < 0
        assert falls == (cosine * ratio > 1)
        assert ("falls" in page.find_element("id", "verdict").text) == falls
    slide(page, "#cosine", 0)
    slide(page, "#ratio", 1)
    assert ask(page, first) == ask(page, "flow('dpo')(0, 0)[0]")


@in_browser
def test_flipped_labels_shrink_dpo_and_leave_kto_and_rdpo(page):
    element(page, "#shrink")
    slide(page, "#noise", 0.3)
    said = ask(page, "[...document.querySelectorAll('#shrink p')].map(p => p.textContent)")
    kl = {name: [float(x) for x in re.findall(r"\d+\.\d+", text)]
          for name, text in zip(("kto", "dpo", "cdpo", "rdpo"), said, strict=True)}
    assert kl["kto"][0] == kl["kto"][1] and kl["rdpo"][0] == kl["rdpo"][1]
    assert kl["cdpo"][1] < kl["dpo"][1] < 0.5 * kl["dpo"][0]


@in_browser
def test_probabilities_move_live_and_follow_a_slider(page):
    element(page, "[data-run=answers]").click()
    wait_for(page, "learner.steps > 60")
    assert ask(page, "policy()[0]") > 0.3                    # it began at 0.15
    best = "optimum('kto', rates(), state.flip, settings.kto)"
    assert ask(page, best)[3] == 0
    slide(page, "#q3", 0.95)
    assert ask(page, best)[3] > 0.3
    wait_for(page, "policy()[3] > 0.3")


@in_browser
def test_the_cut_reads_loss_and_slope_and_runs_are_played(page):
    from selenium.webdriver.common.action_chains import ActionChains
    canvas = element(page, "#section")
    ActionChains(page).move_to_element(canvas).perform()
    assert abs(ask(page, "state.cursor")) < 1.5
    for cut, slope in (("c", "a"), ("r", "b"), ("h", "(a - b) / 2")):
        ask(page, "(state.cut = arguments[0], update())", cut)
        rise = ask(page, "(cutAt(1.001).loss - cutAt(0.999).loss) / 0.002")
        assert ask(page, "cutAt(1).slope") == pytest.approx(rise, abs=1e-6), slope
    element(page, "[data-run=paths]").click()
    wait_for(page, "state.shown > 0 && state.shown < 1")
    slide(page, "#shown", 0.5)
    element(page, "#frontier").send_keys("\ue014")           # the right arrow key
    assert ask(page, "pointed.i") == 1


@in_browser
@pytest.mark.parametrize("width", [360, 1440])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_objective_is_drawn_on_phones_and_desktops(page, width, theme, tmp_path):
    open_page(page, f"#lang=zh&theme={theme}&real=1", width, 900)
    for name in ask(page, "Object.keys(OBJECTIVES)"):
        ask(page, "(state.hero = state.left = state.knot = arguments[0], draw(true))", name)
        assert ask(page, "document.documentElement.scrollWidth") <= width, name
        numbers = ask(page, "document.querySelector('main').innerText")
        assert "NaN" not in numbers and "undefined" not in numbers, name
    image = picture(page)
    image.save(tmp_path / f"explorer-{width}-{theme}.png")
    assert image.size[0] == width and len(image.getcolors(1 << 24)) > 1000
    dark = np.asarray(image).mean() < 100
    assert dark == (theme == "dark")
    assert page.execute_script("return performance.getEntriesByType('resource').map(r => r.name)"
                               ) in ([], [(DOCS / "losses.js").as_uri()])
