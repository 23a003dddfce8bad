"""report.html in headless Chromium: nothing asked of the network, no script but ours, plots and tables that work."""

import json
import os
import shutil
import subprocess

import fabricate
import pytest
from conftest import PATIENCE
from helpers import ROOT
from reports import change, write_report

PEERS = ROOT / ".venv-peers" / "bin" / "python"
EVIL = "<script>document.title='evil'</script><img src=x onerror=alert(1)>ตอบว่า น้ำ ที่นี่ เก่ง"
BROWSER = """
import json, sys
from playwright.sync_api import sync_playwright

page_file, folder = sys.argv[1:]
found = {"console": [], "requests": [], "dialogs": 0, "views": {}}
with sync_playwright() as p:
    browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
    for width in (1280, 390):
        for scheme in ("light", "dark"):
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page = context.new_page()
            page.on("console", lambda m: found["console"].append(m.text) if m.type in ("error", "warning") else None)
            page.on("pageerror", lambda e: found["console"].append(str(e)))
            page.on("request", lambda r: found["requests"].append(r.url))
            def dismiss(d):
                found["dialogs"] += 1
                d.dismiss()
            page.on("dialog", dismiss)
            page.goto("file://" + page_file)
            page.evaluate('document.querySelectorAll("details").forEach((d) => { d.open = true; })')
            view = page.evaluate('''() => ({
              title: document.title,
              overflow: document.documentElement.scrollWidth - window.innerWidth,
              cut: [...document.querySelectorAll(".box")].filter((b) => b.scrollWidth > b.clientWidth).length,
              background: getComputedStyle(document.body).backgroundColor,
              ink: getComputedStyle(document.querySelector("#plot-gain text")).fill,
              plots: [...document.querySelectorAll("figure svg")].map((s) => {
                const r = s.getBoundingClientRect(), shapes = s.querySelectorAll("path").length;
                return [s.closest("figure").id, r.width, r.height, shapes];
              }),
              ids: [...document.querySelectorAll("[id]")].map((x) => x.id).filter((x, i, all) => all.indexOf(x) !== i),
              images: document.querySelectorAll("body img").length,
              scripts: document.querySelectorAll("script").length,
              answers: document.querySelector("#answers").innerText,
            })''')
            page.screenshot(path=f"{folder}/{width}-{scheme}.png", full_page=True)
            table = page.locator("#runs table")
            column = table.locator("thead th").all_inner_texts().index("tokens/s")
            cell = "td[data-name='tokens/s']"
            view["orders"] = []
            for _ in range(2):
                table.locator(f"thead th:nth-child({column + 1}) button").click()
                view["orders"].append([float(x.replace(",", "")) for x in table.locator(cell).all_inner_texts()])
            found["views"][f"{width} {scheme}"] = view
            context.close()
    browser.close()
print(json.dumps(found))
"""


pytestmark = pytest.mark.slow  # a browser


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    chromium = shutil.which("chromium")
    if not chromium or not PEERS.exists():
        what = "no chromium, or no .venv-peers (tests/peers.sh builds it)"
        pytest.fail(what) if os.environ.get("CI") else pytest.skip(what)
    root = tmp_path_factory.mktemp("page")
    fabricate.study(root, items=40, lines=10, reply=EVIL)
    for place in (root / "output", root / "results"):
        (place / "seed0" / "exp1-wangchan-ut4").rename(place / "seed0" / "<script>alert(2)<i>&quot;$x_1$|")
    for path in (root / "results" / "seed0").glob("*script*/*.json"):
        change(path, run=f"seed0/{path.parent.name}", experiment=path.parent.name)
    write_report(root, figures=True)
    code = BROWSER.replace("CHROMIUM", repr(chromium))
    command = [PEERS, "-c", code, root / "report.html", os.environ.get("SCREENSHOTS", root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_page_asks_for_nothing_and_has_no_errors(seen):
    assert seen["console"] == [] and seen["dialogs"] == 0
    assert [url for url in seen["requests"] if not url.startswith(("file://", "data:"))] == []
    assert len([url for url in seen["requests"] if url.startswith("file://")]) == len(seen["views"]) == 4


def test_what_runs_and_replies_say_is_text_plots_are_seen_and_tables_sort_in_light_and_dark_on_any_screen(seen):
    for name, view in seen["views"].items():
        assert view["title"] == "Does looping help a language model learn Thai?"
        assert view["images"] == 0 and view["scripts"] == 1 and view["ids"] == []
        assert EVIL in view["answers"] and "<script>alert(2)<i>&quot;$x_1$|" in view["answers"]
        assert len({figure for figure, *_ in view["plots"]}) == 8
        screen = int(name.split()[0])
        assert all(250 < w < screen and h > 90 and shapes > 10 for _, w, h, shapes in view["plots"]), "each is whole"
        dark = (view["background"], view["ink"]) == ("rgb(21, 23, 26)", "rgb(230, 230, 230)")
        light = (view["background"], view["ink"]) == ("rgb(255, 255, 255)", "rgb(26, 26, 27)")
        assert dark if "dark" in name else light
        assert view["overflow"] == 0 and view["cut"] == 0, "no column is out of sight"
        up, down = view["orders"]
        assert len(up) == 12 and up == sorted(up) and down == up[::-1]
