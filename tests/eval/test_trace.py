"""The trace page shows what the decodes did, and nothing in it breaks out of it or needs a network."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from decoding import Decoder, make_strategy
from decoding.config import DecodeConfig
from decoding.generate import BUNDLED
from decoding.output import empty_output
from eval.command import command
from eval.trace import TEMPLATE, main, page, spaced, trace
from models.predictor import MaskPredictor

PROMPT = "Sort from small to large: lamp 20, vase 7, bell 31."
SETTINGS = {"gen_length": 32, "block_length": 8}
HOSTILE = 'a </script><script>alert(1)</script> <!-- "quoted" \'& &lt;b&gt;\nsecond line \u2028 TRACE_DATA'


@pytest.fixture(scope="module")
def predictor(tiny_checkpoint):
    """Random, but it says EoT now and then, also where text left of it is still to come."""
    predictor = MaskPredictor.from_pretrained(tiny_checkpoint)
    predictor.model.model.transformer["ff_out"].weight[predictor.ids.eot] *= 3.375
    return predictor


@pytest.fixture(scope="module")
def bundled():
    return MaskPredictor.from_pretrained(BUNDLED / "llada-tiny")


def strategy_of(name):
    folders = {"learn2pd": {"filter": BUNDLED / "filter-llada-tiny"}, "apd": {"helper": BUNDLED / "helper-llada-tiny"}}
    return make_strategy(name, **folders.get(name, {}))


def state_after(panel, step, mask, eot):
    """The generated region after a step, as the page makes it up from commits and drops."""
    places = zip(panel["commit"], panel["drop"], panel["token"], strict=True)
    return [
        eot if drop and drop <= step else token if commit and commit <= step else mask for commit, drop, token in places
    ]


@pytest.mark.parametrize("eot", ["off", "commit", "published"])
@pytest.mark.parametrize(("name", "options"), [("full_step", {}), ("threshold", {"threshold": 0.2}), ("dico", {})])
def test_every_step_is_the_decodes_own(predictor, name, options, eot):
    # A drop shown at the wrong step would tell a wrong story of the rule for the end of the text.
    config, strategy, ids = DecodeConfig(**SETTINGS, eot=eot), make_strategy(name, **options), predictor.ids
    prompt = "12 mats cat"  # to which it says EoT left of a committed token
    (panel,) = trace(predictor, prompt, [strategy], config)["panels"]
    output = empty_output(1, config)
    stream = Decoder(predictor, strategy).stream(prompt, output=output, **SETTINGS, eot=eot)
    states = [step.sequences[0].tolist() for step in stream]
    assert panel["nfe"] == len(panel["steps"]) == int(output.nfe[0])
    assert [state_after(panel, step, ids.mask, ids.eot) for step in range(1, len(states) + 1)] == states
    assert panel["final"] == states[-1]
    assert any(panel["drop"]) == (eot != "off")
    if name == "full_step" and eot == "commit":
        assert any(commit and drop for commit, drop in zip(panel["commit"], panel["drop"], strict=True))


@pytest.mark.parametrize("name", ["full_step", "threshold", "learn2pd", "dico", "oracle", "apd"])
def test_guesses_and_commits_are_the_evidence(bundled, name):
    strategy = strategy_of(name)
    (panel,) = trace(bundled, PROMPT, [strategy], DecodeConfig())["panels"]
    full = Decoder(bundled, make_strategy("full_step")).generate([PROMPT])
    references = full.sequences if name == "oracle" else None
    out = Decoder(bundled, strategy).generate([PROMPT], trace=True, references=references)
    assert out.trace is not None
    assert (panel["nfe"], panel["tokens"], panel["text"]) == (int(out.nfe[0]), len(out.tokens[0]), out.text[0])
    committed = []
    for number, (shown, step) in enumerate(zip(panel["steps"], out.trace, strict=True), 1):
        first = int(step.block) * step.transfer.shape[1]
        masked = step.evidence.masked[0].nonzero()[:, 0]
        assert shown["at"] == (first + masked).tolist()
        assert shown["token"] == step.evidence.token[0, masked].tolist()
        assert shown["confidence"] == pytest.approx(step.evidence.confidence[0, masked].tolist(), abs=5.1e-5)
        for place in step.transfer[0].nonzero()[:, 0].tolist():
            committed.append(first + place)
            assert panel["commit"][first + place] == number
            assert panel["token"][first + place] == int(step.committed[0, place])
    assert len(committed) == len(set(committed))
    dropped = {position for position, step in enumerate(panel["drop"]) if step}
    assert dropped | set(committed) == set(range(128))
    assert {position for position, step in enumerate(panel["commit"]) if step} == set(committed)


def test_panels_are_compared_with_the_first(bundled):
    names = ["full_step", "learn2pd", "oracle", "apd"]
    data = trace(bundled, PROMPT, [strategy_of(name) for name in names], DecodeConfig(cache="dual"))
    first = data["panels"][0]
    for panel in data["panels"]:
        assert panel["ratio"] == first["nfe"] / panel["nfe"]
        assert panel["same"] == (panel["text"] == first["text"])
    assert data["panels"][2]["same"]
    assert [panel["settings"]["cache"] for panel in data["panels"]] == ["dual", "dual", "dual", "none"]
    assert data["panels"][1]["settings"]["fingerprints"].keys() == {"base", "filter"}
    assert first["tokens"] < data["columns"] < 128  # no columns of nothing but EoT
    for panel in data["panels"]:
        assert "".join(data["pieces"][token] for token in panel["final"][: panel["tokens"]]) == panel["text"]


def test_a_lookahead_is_not_shown_as_seen_where_it_does_not_reach(bundled):
    strategy = make_strategy("apd", helper=BUNDLED / "helper-llada-tiny", max_lookahead=4)
    (panel,) = trace(bundled, PROMPT, [strategy], DecodeConfig())["panels"]
    assert all(len(step["at"]) <= 4 for step in panel["steps"])


class Scripts(HTMLParser):
    """Collects script elements and the names of all tags."""

    def __init__(self):
        super().__init__()
        self.tags, self.scripts = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script":
            self.scripts[-1] += data

    def handle_endtag(self, tag):
        self.tags.append(f"/{tag}")


def parsed(text):
    parser = Scripts()
    parser.feed(text)
    return parser


def test_no_text_breaks_out_of_the_page(predictor):
    data = trace(predictor, HOSTILE, [make_strategy("threshold")], DecodeConfig(**SETTINGS))
    data["pieces"][next(iter(data["pieces"]))] = HOSTILE
    shown = parsed(page(data))
    assert shown.tags == parsed(TEMPLATE.read_text(encoding="utf-8")).tags
    embedded = json.loads(shown.scripts[0])
    assert embedded == json.loads(json.dumps(data))
    assert embedded["prompt"] == HOSTILE


def test_the_page_needs_no_network(predictor):
    text = page(trace(predictor, PROMPT, [make_strategy("threshold")], DecodeConfig(**SETTINGS)))
    assert not re.search(r"https?:|//\w+\.|\b(src|href)\s*=|url\(|@import|fetch\(|XMLHttpRequest|WebSocket", text)
    assert "default-src 'none'" in text  # and the browser would refuse to load anything


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--strategies", "a", "b", "--prompt", "x"], ["--strategies", "[a,b]", "--prompt", "x"]),
        (["--prompt", "x", "--strategies", "a"], ["--prompt", "x", "--strategies", "[a]"]),
        (["--strategies", "[a, b]"], ["--strategies", "[a, b]"]),
        (["--strategies", "[a,", "b]", "--seed", "1"], ["--strategies", "[a, b]", "--seed", "1"]),
        (["--strategies", "--prompt", "x"], ["--strategies", "[]", "--prompt", "x"]),
        (["--strategies=[a,b]"], ["--strategies=[a,b]"]),
        (["--strategies+", "a"], ["--strategies+", "a"]),
        (["--help"], ["--help"]),
    ],
)
def test_strategies_are_written_with_spaces_or_as_a_list(words, expected):
    assert spaced(words) == expected


def test_the_command_writes_the_page_and_says_what_each_decode_took(tiny_checkpoint, tmp_path):
    out = tmp_path / "new" / "page.html"
    words = [sys.executable, "eval/trace.py", "--prompt", PROMPT, "--base", tiny_checkpoint, "--out", out]
    words += ["--gen_length", "16", "--block_length", "8", "--options", '{"threshold": {"threshold": 0.3}}']
    done = subprocess.run(
        [*words, "--strategies", "full_step", "threshold"], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[0] == f"wrote {out}"
    assert re.fullmatch(r"full_step: \d+ forwards, \d+ tokens, the same text", lines[1])
    assert lines[2].startswith("threshold: ")
    panels = json.loads(parsed(out.read_text(encoding="utf-8")).scripts[0])["panels"]
    assert [panel["settings"]["strategy"] for panel in panels] == ["full_step", "threshold"]
    assert panels[1]["settings"]["threshold"] == 0.3


def test_a_learned_end_of_the_text_is_shown(predictor, head, tmp_path):
    config = DecodeConfig(**SETTINGS, **head(predictor), eot_risk=0.9)
    panel = trace(predictor, PROMPT, [make_strategy("full_step")], config)["panels"][0]
    assert (panel["settings"]["eot"], panel["settings"]["eot_risk"]) == ("learned", 0.9)
    assert any(panel["drop"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--strategies", "full_step", "--eot", "learned"],
            "eot_head: found None; accepted: the folder of an exported",
        ),
        (["--strategies", "full_step", "best"], "strategy: found 'best'; accepted: full_step | threshold | "),
        (["--strategies"], "strategies: found none; accepted: one or more of full_step | threshold | "),
        (
            ["--strategies", "full_step", "klass", "--options", '{"dico": {"seeds": 2}}'],
            "options: found 'dico', which is not decoded; accepted: full_step | klass",
        ),
        (
            ["--strategies", "klass", "--options", '{"klass": {"sure": 2}}'],
            "klass.sure: found an unknown setting; accepted: ",
        ),
        (["--strategies", "full_step", "--block_length", "7"], "block_length: found 7; accepted: a divisor"),
        (["--strategies", "apd", "--eot", "published"], "eot: found 'published' with apd"),
        (["--strategies", "full_step", "--base", "/nowhere"], "base checkpoint: found '/nowhere'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        command(main, args=spaced(["--prompt", PROMPT, "--out", str(tmp_path / "page.html"), *words]))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert message in lines[-1]
    assert len(lines) == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture
def browser(tmp_path):
    """A headless Chromium with a profile of its own."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    flags += " disable-component-update disable-sync window-size=1400,1000"
    for flag in [*flags.split(), f"user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # A service with a path: selenium's manager would look for a driver in the network.
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


def set_step(browser, step):
    browser.execute_script(
        "const slider = document.getElementById('step'); slider.value = arguments[0]; "
        "slider.dispatchEvent(new Event('input', {bubbles: true}));",
        step,
    )


def texts(browser):
    return browser.execute_script("return [...document.querySelectorAll('.text')].map((text) => text.textContent)")


@pytest.mark.slow
def test_the_page_works_in_a_browser(browser, bundled, tmp_path):
    from PIL import Image
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    prompt = f"{HOSTILE} Mia has 14 books. Mia loses 5 books. How many books does Mia have now?"
    names = ["full_step", "learn2pd", "dico", "apd"]
    data = trace(bundled, prompt, [strategy_of(name) for name in names], DecodeConfig())
    file = tmp_path / "page.html"
    file.write_text(page({"base": "llada-tiny"} | data), encoding="utf-8")
    browser.get(file.as_uri())
    assert browser.execute_script("return document.querySelectorAll('.text').length") == 4
    set_step(browser, data["panels"][0]["nfe"])
    assert texts(browser) == [panel["text"] for panel in data["panels"]]

    data["pieces"][data["panels"][0]["final"][0]] = HOSTILE
    whole = ["".join(data["pieces"][token] for token in panel["final"][: panel["tokens"]]) for panel in data["panels"]]
    file.write_text(page({"base": "llada-tiny"} | data), encoding="utf-8")
    browser.refresh()
    assert browser.execute_script("return document.getElementById('prompt').textContent") == prompt
    masked = "return [...document.querySelectorAll('.text span')].every((span) => span.className === 'masked')"
    assert browser.execute_script(masked)
    start = texts(browser)
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.ARROW_RIGHT)
    first = texts(browser)
    assert first != start
    assert browser.execute_script("return document.querySelectorAll('.text .new').length") > 0
    browser.find_element(By.ID, "step").send_keys(Keys.ARROW_RIGHT)
    assert browser.find_element(By.ID, "count").text == f"2 of {data['panels'][0]['nfe']}"
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.ARROW_LEFT)
    assert texts(browser) == first

    set_step(browser, data["panels"][0]["nfe"])
    assert texts(browser) == whole
    browser.find_element(By.ID, "play").click()  # from the end, it begins anew
    assert browser.find_element(By.ID, "play").text == "Pause"
    assert texts(browser) == start

    colours = """return [...document.querySelectorAll('figure canvas')].map((canvas) => {
        const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
        return new Set(new Uint32Array(data.buffer)).size; })"""
    assert min(browser.execute_script(colours)) > 8
    browser.save_screenshot(str(tmp_path / "page.png"))
    seen = Image.open(tmp_path / "page.png").convert("RGB").getcolors(maxcolors=1 << 24)
    assert seen is not None
    assert len(seen) > 100
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
