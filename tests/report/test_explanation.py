"""The explanation: up to date, true to its sources, safe to embed, and honest when a package is missing."""

from __future__ import annotations

import re
import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest
from reading import Reader

import flashtile
from flashtile.backends.cpu import tiled
from flashtile.bench import plots
from flashtile.errors import MissingExtra
from flashtile.report import explanation, explanation_numbers, walk
from flashtile.spec import units

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def fragment() -> str:
    return explanation.html()


@pytest.fixture(scope="module")
def page(fragment: str) -> Reader:
    return Reader(fragment)


def test_the_page_in_docs_is_that_of_the_template(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "explanation_page.py"))
    assert script["main"](["--out", str(tmp_path / "page.md")]) == 0
    written = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8") == written, "run 'make explanation'"


def test_excerpts_are_lines_of_the_source() -> None:
    source = Path(tiled.__file__).read_text(encoding="utf-8")
    stripped = {line.strip() for line in source.splitlines()}
    blocks = re.findall(r"^```py\n(.*?)^```", explanation.markdown(), re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    of_tiled = [line for line in lines if line in stripped]
    assert len(blocks) >= 17 and len(of_tiled) >= 35
    assert {line for line in lines if line not in stripped} == {
        line for line in lines if "words" in line or "group" in line or "skipped" in line
    }, "the rest is the excerpt of spec/dropout.py"


def test_an_excerpt_that_the_source_no_longer_has_is_an_error_that_names_it() -> None:
    assert explanation.excerpt(tiled._slices, "return").startswith("return (slice(start")
    with pytest.raises(LookupError, match="0 lines of _slices begin with 'no such line'"):
        explanation.excerpt(tiled._slices, "return", "no such line")
    with pytest.raises(LookupError, match="2 lines of _statistics_of_sinks begin with 'return'"):
        explanation.excerpt(tiled._statistics_of_sinks, "return")


def test_costs_are_those_that_explain_prints() -> None:
    facts = explanation_numbers.facts()
    explained = flashtile.explain(seqlen_q=4096, heads_q=16, head_dim=128, device="h200", backend="triton")
    forward, backward = explained.costs
    assert facts["forward"] == forward and facts["backward"] == backward
    text = explanation.markdown()
    for cost in (forward, backward):
        assert units.in_bytes(cost.naive.traffic_bytes) in text
        assert units.in_flops(cost.tiled.flops) in text
    assert sum(step["num_bytes"] for step in facts["naive_steps"]) == forward.naive.traffic_bytes
    assert facts["score_traffic"] == 4 * 16 * 4096**2 * 4
    assert facts["score_traffic"] < forward.naive.traffic_bytes < 1.1 * facts["score_traffic"]
    assert facts["products"] == {"textbook": 5, "tiled": 7}


def test_the_share_of_attention_is_the_closed_form_that_the_text_has() -> None:
    for row in explanation_numbers.facts()["lengths"]:
        tokens, width = row["tokens"], explanation_numbers.LAYER_WIDTH
        assert row["share"] == pytest.approx(tokens / (tokens + 6 * width))


def test_what_fits_on_chip_is_what_the_plan_says() -> None:
    facts = explanation_numbers.facts()
    shared = sum(held["num_bytes"] for held in facts["on_chip"] if held["where"] == "shared memory")
    assert shared == facts["shared_memory"] <= facts["device"].shared_memory_bytes


def test_squares_have_areas_to_scale(fragment: str) -> None:
    sides = {name: float(side) for side, name in re.findall(r'--side:([\d.]+)"></i>(\w+)</li>', fragment)}
    assert set(sides) == {"q", "k", "v", "s", "p", "out", "lse"}
    assert (sides["s"] / sides["q"]) ** 2 == pytest.approx(4096 / 128, rel=1e-2)
    assert (sides["q"] / sides["lse"]) ** 2 == pytest.approx(128, rel=1e-2)


def test_the_fragment_is_one_well_formed_section(fragment: str, page: Reader) -> None:
    assert fragment.startswith('<section id="how-it-works">') and fragment.endswith("</section>")
    assert page.tags["section"] == 1 and page.tags["h1"] == 0 and page.tags["h2"] == 1
    ids = Counter(page.values("id"))
    assert max(ids.values()) == 1
    internal = [link[1:] for link in page.values("href") if link.startswith("#")]
    assert internal and set(internal) <= set(ids)
    assert page.tags["h3"] == len(re.findall(r"^## ", explanation.markdown(), re.MULTILINE))


def test_the_fragment_loads_nothing(fragment: str, page: Reader) -> None:
    assert not {"link", "iframe", "object", "base", "img"} & set(page.tags)
    assert not page.values("src") and not page.values("srcset")
    assert "@import" not in fragment and not re.search(r"url\((?!#)", fragment)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    outside = [value for tag, name, value in page.attributes if name == "href" and not value.startswith("#")]
    assert outside and all(value.startswith("https://arxiv.org/abs/") for value in outside)


def test_styles_stay_inside_the_section_and_take_the_colours_of_the_page() -> None:
    for name in ("explanation.css", "walk.css"):
        css = (Path(walk.__file__).parent / name).read_text(encoding="utf-8")
        rules = re.sub(r"@media[^{]+\{", "}", re.sub(r"/\*.*?\*/", "", css))
        selectors = re.findall(r"(?:^|\})\s*([^{}@]+)\{", rules)
        assert selectors
        for selector in selectors:
            assert selector.strip().startswith(("#how-it-works", "#walk")), selector
        own = set(re.findall(r"(--[\w-]+):", css))
        used = set(re.findall(r"var\((--[\w-]+)", css)) - own - {"--bar", "--heat", "--side"}
        of_the_page = {"--page", "--panel", "--edge", "--text", "--soft", "--accent", "--warn"}
        assert used <= of_the_page | set(re.findall(r"(--[\w-]+):", plots.THEME_CSS))
        assert not re.search(r"#[0-9a-f]{3,6}\b", css), "no colour of its own"


def test_embedded_data_cannot_end_its_script(monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = "</script><script>alert(1)</script><!--"
    monkeypatch.setattr(walk, "as_json", lambda: {"text": hostile})
    html = explanation.html()
    assert hostile not in html
    assert Reader(html).tags["script"] == 2


def test_tables_and_code_came_through_as_such(page: Reader) -> None:
    assert page.tags["table"] >= 15 and page.tags["pre"] >= 20
    assert (
        "| ---" not in page.text
        and "```" not in page.text
        and "{{" not in page.text
        and "**" not in page.text.replace("q.shape[1] ** -0.5", "")
    )


@pytest.mark.parametrize(
    ("module", "package"), [("jinja2", "jinja2"), ("markdown_it", "markdown-it-py"), ("pygments", "Pygments")]
)
def test_a_missing_package_is_named(module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf"{package} is not installed\. Remedy: pip install 'flashtile\[bench\]'"):
        explanation.html()
