"""Pages are well-formed, load nothing, escape what others have named, and say what their documents say."""

import math

import pytest
from kits import page_documents as made
from kits.page import Page
from kits.reports import kernel_bench, model_bench

from sqs_pyro.reporting.page.bench import bench_page
from sqs_pyro.reporting.page.compared import compared_page
from sqs_pyro.reporting.page.run import run_page
from sqs_pyro.reporting.page.study import study_page

OLDER = {"reliability", "machine", "latency", "coverage", "findings", "validation", "search"}


def _bare():
    """A run of an older version: metrics alone, and fewer of them."""
    metrics = {key: value for key, value in made.run()["metrics"].items() if key not in OLDER}
    return {"metrics": {**metrics, "size": made.size(parts=False)}}


PAGES = {
    "a run": lambda: run_page(made.run()),
    "a run of an older version": lambda: run_page(_bare()),
    "a language model": lambda: run_page(made.language_model()),
    "several runs": lambda: compared_page({made.EVIL: made.run(), "b": made.run(), "c": made.language_model()}),
    "a study": lambda: study_page(made.study()),
    "products": lambda: bench_page({**kernel_bench(), "command": made.EVIL}),
    "networks": lambda: bench_page({**model_bench(), "command": made.EVIL}),
}


@pytest.fixture(scope="module", params=PAGES)
def text(request):
    return PAGES[request.param]()


def test_it_is_whole_and_loads_nothing(text):
    Page(text).check()
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert len(text.encode()) < 300_000


def test_what_others_have_named_is_text(text):
    assert "<img" not in text and "<script>alert" not in text
    assert text.count("<script") == 1  # ours
    if "alert" in text:
        assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in text


def test_what_is_below_a_heading_is_in_the_contents(text):
    page = Page(text)
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    headings = [attributes["id"] for tag, attributes in page.elements if tag == "h2"]
    assert links == ["#content", *(f"#{heading}" for heading in headings)]


def test_a_run_says_what_its_documents_say():
    run = made.run()
    page, size = Page(run_page(run)), run["metrics"]["size"]
    assert page.row("accuracy, %") == ["accuracy, %", "95.12", "93.87", "93.87"]
    assert page.row("ratio") == ["ratio", "20", "20.00"]
    assert page.row("the file") == ["the file", f"{size['file_bytes']:,}", "100.0"]
    listed = sum(int(page.row(name)[1]) for name in ("codes", "masks of zeros", "codebooks and scales"))
    assert listed == sum(row["bytes"] for row in size["tensors"])
    assert page.row("layer1.weight") == ["layer1.weight", "16×16", "bitmap, 3 bits", "256", "68.8", "100", "3.12"]
    assert page.row("1") == ["1", "2.000", "1.600", "1.25×"]  # the latency, by batch
    shown = [element for element in page.texts["dd"] if "→" in element]
    assert shown == ["95.12 → 93.87 %", "2 → 1.6 ms"]


def test_a_language_model_is_told_by_its_perplexities_and_blocks():
    page = Page(run_page(made.language_model()))
    held_out = ["held_out", "12.345", "13.579", "1.1000", "16,384", "512", "256"]
    assert page.row("held_out") == held_out
    assert page.row(made.EVIL)[2:4] == ["–", "–"]  # infinite ones, as JSON has them
    assert page.row("3") == ["3", "3.300", "0.04000", "2.0"]
    assert page.row("bits a compressed weight") == ["bits a compressed weight", "3.2", "1.250"]
    assert {"Training", "Calibration", "Latency"}.isdisjoint(page.heading())


def test_what_was_not_measured_is_left_out():
    least = ["Asked and got", "Findings", "Where the bytes are", "Layers", "Make it again"]
    assert Page(run_page(_bare())).heading() == least
    everything = Page(run_page(made.run())).heading()
    assert {"Sizes that were tried", "Latency", "Training", "Calibration", "ELBO and its bracket"} <= set(
        everything
    )


def test_a_finding_stands_with_its_repair():
    page = Page(run_page(made.run()))
    assert "Exclude the layer." in page.texts["span"]


def test_tiles_are_as_large_as_their_bytes():
    size = made.size()
    page = Page(run_page(made.run()))
    tiles = [attributes for tag, attributes in page.elements if tag == "svg" and attributes.get("class") == "tile"]
    areas = {tile["data-tip"]: float(tile["width"]) * float(tile["height"]) for tile in tiles}
    whole = sum(areas.values())
    for row in size["tensors"]:
        (area,) = [area for tip, area in areas.items() if tip.startswith(f"{row['name']}: ")]
        assert math.isclose(area / whole, row["bytes"] / size["file_bytes"], rel_tol=0.05)  # but for the gaps


def test_a_large_network_stays_below_three_megabytes():
    run = made.run()
    size = {**run["metrics"]["size"], "tensors": made.size(5000)["tensors"]}
    run["layers"] = [{**run["layers"][0], "name": row["name"]} for row in size["tensors"]]
    text = run_page({**run, "metrics": {**run["metrics"], "size": size}})
    assert len(text.encode()) < 3_000_000
    assert "3,000 more are left out" in text


def test_several_runs_show_where_their_recipes_differ():
    first, second = made.run(), made.run()
    second["recipe"] = {**second["recipe"], "compression": {**second["recipe"]["compression"], "epochs": 9}}
    second["recipe"]["seed"] = None  # as if it were not there
    page = Page(compared_page({"a": first, "b": second}))
    assert page.row("compression.epochs") == ["compression.epochs", "4", "9"]
    assert not any(row[0] in ("seed", "compression.num_components") for row in page.rows if row)
    assert page.row("layer2.weight") == ["layer2.weight", "140", "140"]


def test_a_study_shows_its_points_and_what_failed():
    summary = made.study()
    page = Page(study_page(summary))
    for point in summary["points"]:
        if point["mean"]:
            assert page.row(point["variant"])[2].startswith(f"{100 * point['mean']['accuracy']:.2f}")
    assert f" It failed: {made.EVIL}." in page.texts["li"]
