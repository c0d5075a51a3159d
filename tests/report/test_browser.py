"""The page in a browser: it asks for nothing, says no error, and answers to mouse and keyboard."""

from __future__ import annotations

import dataclasses
import json

import pytest
from browser import CHROMIUM, Browser
from runs import random_scores, reproduction

from eapcore.graph.graph import Graph
from eapcore.report.page import write_page
from eapcore.report.run_folder import Run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")

DRAWN = "document.querySelectorAll('#lines .edge').length"
SHOWN = "[...document.querySelectorAll('#table tbody tr')].map(row => row.cells[{}].textContent)"


@pytest.fixture(scope="module")
def browser():
    found = Browser()
    yield found
    found.close()


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page([Run.read(folder)], path)
    return path


@pytest.fixture(scope="module")
def both(folder, other, tmp_path_factory):
    path = tmp_path_factory.mktemp("both") / "report.html"
    write_page([Run.read(folder), Run.read(other)], path)
    return path


@pytest.fixture(autouse=True)
def quiet(browser):
    """No error and no request, whatever a test does."""
    browser.resize(1000)
    browser.dark(False)
    yield
    assert browser.console == []
    asked = [url for url in browser.requests if not url.startswith("data:")]  # which is in the page
    assert [url for url in asked if not url.startswith("file:") or "report.html" not in url] == []


def test_the_slider_draws_more_or_fewer_edges(browser, page):
    browser.open(page)
    before = browser.run(DRAWN)
    assert before == 30  # the circuit's size
    browser.place("#count")
    browser.run("document.querySelector('#count').focus()")
    browser.press("ArrowLeft", times=60)
    fewer = browser.run(DRAWN)
    assert 0 < fewer < before and browser.run("Number(document.querySelector('#count-number').value)") == fewer
    browser.type("#count-number", "200")
    assert browser.run(DRAWN) == 200
    assert browser.run("document.querySelector('#count-says').textContent").startswith("200 of 262 edges")
    y = browser.place("#count")[1]
    left = browser.run("document.querySelector('#count').getBoundingClientRect().left")
    browser.click("#count", at=(left + 1, y))
    assert browser.run(DRAWN) == 0
    browser.run("(e => { e.value = 'circuit'; e.dispatchEvent(new Event('change')) })(document.querySelector('#set'))")
    browser.type("#count-number", "999")
    assert browser.run(DRAWN) == 30


def test_widths_are_scores_and_colours_signs(browser, page, folder):
    browser.open(page)
    found = browser.run(
        "[...document.querySelectorAll('#lines .edge')].map(e => [e.dataset.edge, e.getAttribute('stroke-width'), "
        "e.classList.contains('negative')])"
    )
    scores = Run.read(folder).scores
    most = abs(scores.top(1)[0][1])
    assert {edge for edge, _, _ in found} == {edge for edge, _ in scores.top(30)}
    for edge, width, negative in found:
        assert float(width) == pytest.approx(max(0.9, 7 * abs(scores[edge]) / most), abs=0.006)
        assert negative == (scores[edge] < 0)


def test_hovering_names_an_edge_and_a_click_follows_a_node(browser, page, folder):
    browser.open(page)
    scores = Run.read(folder).scores
    edge, score = scores.top(1)[0]
    x, y = browser.run(
        f"(() => {{ const e = document.querySelector('[data-edge={json.dumps(edge)}]');"
        "e.ownerSVGElement.scrollIntoView({block: 'center', behavior: 'instant'});"
        "const p = e.getPointAtLength(e.getTotalLength() * 0.85), m = e.getScreenCTM();"
        "return [p.x + m.e, p.y + m.f] })()"
    )
    browser.move(x, y)
    browser.settle()
    tip = browser.run("document.querySelector('#tip').textContent")
    assert edge.replace("->", " → ") in tip and f"{abs(score):.3g}"[:4] in tip and "rank 1 of 262" in tip
    node = edge.split("->")[0]
    browser.click(f'[data-node="{node}"]')
    touching = [
        name for name, _ in scores.top(30) if name.split("->")[0] == node or name.split("->")[1].split("<")[0] == node
    ]
    followed = browser.run("[...document.querySelectorAll('.edge.followed')].map(e => e.dataset.edge)")
    assert sorted(followed) == sorted(touching)
    assert f"drawn edges into {node}" in browser.run("document.querySelector('#followed').textContent")
    browser.press("Escape")
    assert browser.run("document.querySelectorAll('.edge.followed').length") == 0


def test_nodes_are_reached_by_keyboard(browser, page):
    browser.open(page)
    browser.run("document.querySelector('#paths').focus()")
    browser.press("Tab")
    here = "document.activeElement.getAttribute('data-node')"
    first = browser.run(here)
    assert first
    seen = {first}
    for key in ("ArrowUp", "ArrowUp", "ArrowRight", "ArrowLeft", "ArrowDown"):
        browser.press(key)
        seen.add(browser.run(here))
    assert len(seen) > 2 and None not in seen
    browser.press("Enter")
    assert browser.run("document.querySelectorAll('.node.chosen').length") == 1
    assert not browser.run("document.querySelector('#clear').disabled")


def test_the_table_sorts_and_finds(browser, page, folder):
    browser.open(page)
    scores = Run.read(folder).scores
    named = [edge.replace("->", " → ") for edge, _ in scores.top(262)]
    assert browser.run(SHOWN.format(1)) == named[:25]
    by_score = [edge.replace("->", " → ") for edge, _ in sorted(scores.top(262), key=lambda row: row[1])]
    browser.click('[data-column="score"]')
    assert browser.run(SHOWN.format(1)) == by_score[:25]
    browser.press("Enter")  # the button keeps the cursor
    assert browser.run(SHOWN.format(1)) == by_score[::-1][:25]
    browser.click('[data-column="edge"]')
    in_order = [scores.graph.edge_name(s, r).replace("->", " → ") for s, r in scores.mask.nonzero().tolist()]
    assert browser.run(SHOWN.format(1)) == in_order[:25]
    browser.click('[data-column="score"]')
    browser.press("Enter")
    sorts = "[...document.querySelectorAll('#table th[aria-sort]')].map(th => th.ariaSort)"
    assert browser.run(sorts).count("descending") == 1
    browser.type("#find", "logits a1")
    browser.run("new Promise(done => setTimeout(done, 200))")
    assert set(browser.run(SHOWN.format(1))) == {f"a1.h{head} → logits" for head in range(4)}


def test_all_charts_are_drawn_at_every_width_and_in_both_themes(browser, both, page):
    for path in (page, both):
        for width, dark in ((1000, False), (400, True)):
            browser.resize(width)
            browser.dark(dark)
            browser.open(path)
            assert browser.run("document.documentElement.scrollWidth") <= width
            for chart in ("faithfulness", "roc", "exact", "histogram"):
                assert browser.run(f"document.querySelectorAll('#{chart} svg').length") == 1, chart
            assert browser.run("document.querySelectorAll('#faithfulness .interval').length") >= 3
            for canvas in ("map-canvas", "positions-canvas"):
                browser.run(f"document.querySelector('#{canvas}').focus()")
                browser.press("ArrowRight", times=3)
                assert "\n" in browser.run("document.querySelector('#tip').textContent")
            card = browser.run("getComputedStyle(document.querySelector('.card')).backgroundColor")
            assert (sum(map(int, card[4:-1].split(","))) < 200) == dark


def test_a_large_score_shows_on_a_map_whose_cells_are_smaller_than_pixels(browser, tmp_path):
    path, graph = tmp_path / "report.html", Graph(12, 12, True)
    scores = random_scores(graph)
    scores.scores[scores.mask] = 1e-6
    for edge in ("embed->a5.h3<q>", "m2->a7.h0<k>", "a0.h1->m11"):
        scores.scores[graph.edge(edge)] = -5.0
    write_page([Run(scores)], path)
    full = (
        "(() => { const c = document.querySelector('#map-canvas'), d = c.getContext('2d').getImageData(0, 0, c.width,"
        "c.height).data; let n = 0; for (let i = 0; i < d.length; i += 4) n += d[i] === 31 && d[i + 1] === 102 &&"
        "d[i + 2] === 176; return n })()"
    )
    for width in (400, 1000):
        browser.resize(width)
        browser.open(path)
        assert browser.run(full) >= 3
        assert "largest 5" in browser.run("document.querySelector('#map .legend').textContent")


def test_two_runs_show_what_each_has_that_the_other_lacks(browser, both, folder, other):
    browser.open(both)
    browser.type("#count-number", "40")
    a, b = (Run.read(path).scores.top_n(40) for path in (folder, other))
    count = "document.querySelectorAll('#lines .edge.{}').length"
    assert browser.run(count.format("both")) == int((a.mask & b.mask).sum())
    for i, only in enumerate((a.mask & ~b.mask, b.mask & ~a.mask)):
        assert browser.run(count.format(f"only-{i}")) == int(only.sum()) > 0
        rows = browser.run(f"[...document.querySelectorAll('#only-{i} tbody tr')].map(r => r.cells[0].textContent)")
        names = [a.graph.edge_name(s, r).replace("->", " → ") for s, r in only.nonzero().tolist()]
        assert sorted(rows) == sorted(names)
    assert "Spearman" in browser.run("document.querySelector('#agreement').textContent")
    top = browser.run(SHOWN.format(1))
    browser.click('input[name="shown"][value="1"]')
    assert browser.run(SHOWN.format(1))[0] == Run.read(other).scores.top(1)[0][0].replace("->", " → ")
    assert top != browser.run(SHOWN.format(1))
    assert browser.run("[...document.querySelectorAll('[data-run]')].map(e => e.hidden)") == [True, False] * 2


def test_a_page_of_thirty_thousand_edges_does_not_freeze(browser, tmp_path):
    path, scores = tmp_path / "report.html", random_scores(Graph(12, 12, True))
    scores.scores[0, 0], scores.scores[0, 1] = float("inf"), -float("inf")
    write_page([Run(scores, circuit=scores.top_n(400))], path)
    browser.open(path)
    seconds = browser.run(
        "(async () => { const slider = document.querySelector('#count'); let longest = 0;"
        "for (const place of [0, 300, 600, 900, 1000, 200]) { const start = performance.now(); slider.value = place;"
        "slider.dispatchEvent(new Event('input')); await new Promise(d => requestAnimationFrame(() => setTimeout(d)));"
        "longest = Math.max(longest, performance.now() - start) } return longest / 1000 })()"
    )
    assert seconds < 2
    assert browser.run(DRAWN) > 0
    sort = (
        '(name => { const start = performance.now(); document.querySelector(`[data-column="${name}"]`).click();'
        "return (performance.now() - start) / 1000 })({!r})"
    )
    assert all(browser.run(sort.replace("{!r}", repr(name))) < 2 for name in ("edge", "in circuit", "|score|", "edge"))


def test_a_reproduction_s_pictures_and_tables_fit_at_every_width(browser, folder, tmp_path):
    write_page([dataclasses.replace(Run.read(folder), reproduction=reproduction())], tmp_path / "report.html")
    for width in (1000, 400):
        browser.resize(width)
        browser.open(tmp_path / "report.html")
        loaded = "[...document.querySelectorAll('#paper img')].map(i => i.complete && i.naturalWidth > 0)"
        assert browser.run(loaded) == [True] * 4
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.run("document.querySelectorAll('#paper table').length") >= 6
