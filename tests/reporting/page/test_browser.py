"""Pages in headless Chromium: a silent console, no request, nothing too wide, axe-core content.

Skipped where there is no Chromium; axe-core is looked for at ``SQS_AXE``, or in ``node_modules`` of this
repository.
"""

import os
from pathlib import Path

import pytest
from kits import page_documents as made
from kits.browser import CHROMIUM, chromium
from kits.reports import kernel_bench, model_bench

from sqs_pyro.reporting.page.bench import bench_page
from sqs_pyro.reporting.page.compared import compared_page
from sqs_pyro.reporting.page.run import run_page
from sqs_pyro.reporting.page.study import study_page

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason="Chromium is not installed")

AXE = Path(os.environ.get("SQS_AXE", Path(__file__).parents[3] / "node_modules/axe-core/axe.min.js"))
LOOKS = [(1280, False), (1280, True), (390, False), (390, True)]
MAKERS = {
    "run": lambda: run_page(made.run()),
    "language model": lambda: run_page(made.language_model()),
    "compared": lambda: compared_page({"a": made.run(), made.EVIL: made.run()}),
    "study": lambda: study_page(made.study()),
    "products": lambda: bench_page(kernel_bench()),
    "networks": lambda: bench_page(model_bench()),
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(params=MAKERS)
def page(request, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(MAKERS[request.param](), encoding="utf-8")
    return path


def test_it_is_silent_loads_nothing_and_fits(browser, page):
    for width, dark in LOOKS:
        browser.events.clear()
        browser.open(page, width, dark=dark)
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.run("document.querySelectorAll('[aria-sort]').length") == browser.run(
            "document.querySelectorAll('[aria-sort] button').length"
        )
        told = [event["method"] for event in browser.events]
        assert not {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"} & set(told)
        asked = [
            e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"
        ]
        assert asked == [page.resolve().as_uri()]


@pytest.mark.skipif(not AXE.exists(), reason="axe-core is not installed")
def test_axe_finds_nothing_serious(browser, page):
    for width, dark in LOOKS:
        browser.open(page, width, dark=dark)
        browser.run(AXE.read_text(encoding="utf-8") + ";0")
        browser.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        found = browser.run(
            "axe.run().then((found) => found.violations.map((v) => [v.impact, v.id, v.nodes[0].html]))"
        )
        assert [each for each in found if each[0] in ("serious", "critical")] == []


def test_the_browser_itself_refuses_what_a_page_must_not_do(browser, tmp_path):
    path = tmp_path / "report.html"
    forged = "<main><script>window.forged = 1</script><img src='https://example.org/x.png'>"
    path.write_text(run_page(made.run()).replace("<main", forged + "<main", 1), encoding="utf-8")
    browser.open(path, 1280)
    assert browser.run("window.forged === undefined")
    refused = [e["params"]["entry"]["text"] for e in browser.events if e["method"] == "Log.entryAdded"]
    assert any("script" in text for text in refused) and any("img" in text or "image" in text for text in refused)


def test_layers_sort_filter_and_are_chosen(browser, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(run_page(made.run()), encoding="utf-8")
    browser.open(path, 1280)
    weights = "[...document.querySelectorAll('#layers tbody tr')].map((row) => row.cells[3].textContent)"
    head = "document.querySelectorAll('#layers th[aria-sort]')[3]"
    for order, wanted in (("ascending", ["128", "256", "384"]), ("descending", ["384", "256", "128"])):
        browser.run(f"{head}.querySelector('button').click()")
        assert browser.run(weights) == wanted and browser.run(f"{head}.getAttribute('aria-sort')") == order
    browser.run("document.querySelector('[data-shows=layer-2]').click()")
    shown = "[...document.querySelectorAll('figure.layer')].filter((each) => !each.hidden).map((each) => each.id)"
    assert browser.run(shown) == ["layer-2"]
    browser.run(
        "document.querySelector('.tile[data-layer=\"1\"]').dispatchEvent(new Event('click', {bubbles: true}))"
    )
    assert browser.run(shown) == ["layer-1"]
    browser.run("document.getElementById('layer-filter').value = 'LAYER1'")
    browser.run("document.getElementById('layer-filter').dispatchEvent(new Event('input'))")
    assert browser.run("document.getElementById('layer-count').textContent") == "1 of 3 tensors"
    assert browser.run("[...document.querySelectorAll('#layers tbody tr')].filter((r) => !r.hidden).length") == 1


def test_charts_are_read_with_the_arrow_keys(browser, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(run_page(made.run()), encoding="utf-8")
    browser.open(path, 1280)
    browser.run("document.querySelector('#training').parentElement.querySelector('svg[data-points]').focus()")
    for key in ("ArrowRight", "ArrowRight", "End"):
        browser.call("Input.dispatchKeyEvent", type="keyDown", key=key)
    assert browser.run("document.getElementById('tip').textContent") == "step 400: 0.005"
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="Escape")
    assert browser.run("document.getElementById('tip').hidden")
