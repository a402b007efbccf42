"""The page and the notebook's view: nothing outside is asked for; Chromium shows all of it."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from profiles import make_profile
from wording import says

from moeprof.profile import page as pages
from moeprof.profile.tables import layers
from moeprof.show.page import divided, document, html_table, table_block
from moeprof.show.tables import Table

pytestmark = pytest.mark.once

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
VOID = {"meta", "link", "img", "br"}


@pytest.fixture(scope="module")
def profile():
    machine = {"cpu": "a CPU", "features": [], "threads": 1, "started": "2026-11-30T03:24:50+00:00"}
    facts = {"model": 'a <model> & "more"', "notes": ["a <note>"], "machine": machine}
    return make_profile(4, 16, 2, padding=0.1, facts=facts)


@pytest.fixture(scope="module")
def html(profile):
    """With its pictures, in tests without `drawn` too."""
    html = profile.to_html()
    assert len(html) > 100_000
    return html


@pytest.fixture(scope="module")
def view(profile):
    """The notebook's, as `html` with its pictures."""
    return profile._repr_html_()


class Reader(HTMLParser):
    """Tags, whatever asks for something, and the text; fails where tags don't close in order."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.asked, self.ids, self.text, self._open = [], [], [], "", []
        self.feed(page)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = dict(attrs)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.asked += [attributes[n] for n in ("src", "href", "srcset", "data") if n in attributes]
        self.asked += re.findall(r"url\((.*?)\)", attributes.get("style") or "")
        assert not any(name.startswith("on") for name in attributes), attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.drawn
@pytest.mark.parametrize("which", ["html", "view"])
def test_the_html_asks_for_nothing(request, which):
    html = request.getfixturevalue(which)
    read = Reader(html)
    assert read.asked and all(address.startswith(("data:", "#")) for address in read.asked)
    assert not {"script", "iframe", "object", "base"} & set(read.tags)
    assert "@import" not in html and "url(" not in html and "http" not in html
    for words in ('a <model> & "more"', "a <note>", "Least balanced in decode"):
        assert words in read.text  # escaped, and shown as they are
    assert ("Made30 November 2026, 03:24 UTC" in read.text) == (which == "html")


def test_the_page_has_every_figure_and_table(profile, html):
    read = Reader(html)
    assert html.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert '<meta charset="utf-8">' in html
    assert '<link rel="icon" href="data:,">' in html
    # All tokens use 2 experts: a sentence says so in place of one figure.
    assert read.tags.count("img") == read.tags.count("figcaption") == len(profile.figures) - 1 == 9
    assert says(read.text, "Every token", "2 experts", "every layer")
    assert read.tags.count("table") == 3  # by layer, most and least used, by domain
    text = read.text[read.text.index("Counted:") :]  # behind the list of contents
    parts = (
        "By layer",
        "Most and least used experts",
        "By domain",
        "Load of the experts",
        "Roofline",
        "Glossary",
        "z_loss",
    )
    order = [text.index(words) for words in parts]
    assert order == sorted(order)


def test_experts_per_token_are_drawn_where_tokens_differ():
    made = make_profile(2, 8, 2, skip=0.3)
    read = Reader(made.to_html())
    assert read.tags.count("img") == len(made.figures) == 10
    assert "Every token uses" not in read.text


def test_the_contents_and_the_headings_lead_somewhere(html):
    read = Reader(html)
    places = [address[1:] for address in read.asked if address.startswith("#")]
    assert len(places) > 20 and set(places) <= set(read.ids)
    assert len(set(read.ids)) == len(read.ids)
    for heading, metric in (("k", "k_mean"), ("Gini", "expert_load_gini")):
        linked = f'<th><a href="#metric-{metric}">{heading}</a>'
        assert linked in html.replace(" class=first", "")


def test_a_wide_table_is_divided_where_its_groups_end():
    columns = [("", "layer"), *((g, str(n)) for g in ("one", "two", "three") for n in range(8))]
    table = Table("A title", "", columns, [[f"{n}.000"] * 25 for n in range(3)])
    parts = divided(table)
    assert [[g for g, _ in part.columns] for part in parts] == [
        ["", *["one"] * 8, *["two"] * 8],
        ["", *["three"] * 8],
    ]
    assert all(len(row) == len(part.columns) for part in parts for row in part.rows)
    long = Table("A title", "", [("", str(n)) for n in range(40)], [list(map(str, range(40)))])
    parts = divided(long)
    assert {row[0] for part in parts for row in part.rows} == {"0"}
    assert [cell for part in parts for cell in part.rows[0][1:]] == list(map(str, range(1, 40)))
    assert all(divided(part) == [part] for part in parts)


@pytest.mark.drawn
def test_figures_follow_dark_mode_and_need_no_font(profile, html):
    pictures = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', html)
    assert len(pictures) == 9
    for encoded in pictures:
        text = base64.b64decode(encoded).decode()
        ElementTree.fromstring(text)  # well-formed
        assert "prefers-color-scheme:dark" in text and "<text" not in text
        drawn = text[text.index("</style>") :]
        assert "var(--ink)" in drawn and not re.search(r"(fill|stroke): #(0{6}|f{6})\b", drawn)
    assert profile.to_html() == html


@pytest.mark.drawn
def test_the_page_is_no_larger_than_its_figures_as_pictures_were():
    assert len(make_profile(48, 16, 2).to_html()) < 1_100_000


@pytest.mark.drawn
def test_the_notebooks_view_touches_nothing_outside(view):
    style = re.search(r"<style>(.*?)</style>", view, re.S).group(1)
    for selectors in re.findall(r"([^{}]+)\{", style):
        assert all(s.strip().startswith(".moeprof-profile") for s in selectors.split(","))
    assert not re.search(r"(?<!-)color: (?!inherit)", style)  # readable on dark and on light


def chromium(page, tmp_path, *options, size="1300,5000"):
    """(what was logged, addresses asked for, the screenshot) of a page file."""
    shot, log = tmp_path / "shot.png", tmp_path / "net.json"
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--disable-background-networking",
        "--disable-component-update",
        "--no-first-run",
        "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
        f"--log-net-log={log}",
        f"--user-data-dir={tmp_path / 'user'}",
        *options,
        f"--window-size={size}",
        f"--screenshot={shot}",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and shot.exists(), done.stderr[-2000:]
    console = [line for line in done.stderr.split("\n") if "CONSOLE" in line]
    return console, _asked_for(log), shot


def _asked_for(log):
    """Addresses of the requests in Chromium's net log, other than of files and the browser's."""
    events = json.loads(log.read_text())["events"]
    urls = {e["params"]["url"] for e in events if "url" in e.get("params", {})}
    own = ("file:", "data:", "chrome", "devtools:", "about:")
    google = r"https?://([\w.-]+\.)?(google|googleapis|gvt1|gstatic)\.com[:/]"
    return {u for u in urls if not u.startswith(own) and not re.match(google, u)}


needs_chromium = pytest.mark.skipif(BROWSER is None, reason="chromium is not installed")


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_chromium_shows_the_page_and_asks_for_nothing(html, tmp_path, dark):
    from matplotlib.image import imread

    page = tmp_path / "index.html"
    page.write_text(html, encoding="utf-8")
    options = ("--blink-settings=preferredColorScheme=0",) if dark else ()
    console, asked, shot = chromium(page, tmp_path, *options)
    assert console == [] and asked == set()
    pixels = imread(shot)[..., :3]
    assert pixels.shape[:2] == (5000, 1300)
    ground = pixels[2, 2]
    assert (ground.mean() < 0.2) == dark
    written = (np.abs(pixels - ground) > 0.3).any((1, 2))
    assert written[:4500].mean() > 0.5  # text and figures all the way down
    assert np.ptp(pixels[:600], axis=(0, 1)).min() > 0.5  # the text stands out from the ground
    bright = (pixels > 0.9).all(-1).mean()
    assert bright < 0.1 if dark else bright > 0.5  # figures have the page's ground


@needs_chromium
def test_a_narrow_screen_scrolls_in_the_boxes_only(html, tmp_path):
    """The page itself is as wide as the screen: a script beside it reports both."""
    page = tmp_path / "index.html"
    measure = (
        "<script>const said = getComputedStyle(document.querySelector('.picture'), '::before');"
        "console.error('said', said.content);"
        "const box = document.querySelector('.picture'), image = box.firstChild;"
        "console.error('widths', document.documentElement.scrollWidth, innerWidth,"
        "box.clientWidth, image.clientWidth, document.querySelectorAll('.picture').length);"
        "console.error('tables', ...[...document.querySelectorAll('.table')].map(table =>"
        "[table.scrollWidth > table.clientWidth, table.querySelector('caption').offsetHeight > 9]))"
        "</script></body>"
    )
    narrow = table_block(Table("", "", [("", "k")], [["1"]]))
    page.write_text(html.replace("</body>", narrow + measure), encoding="utf-8")
    ((said, line, tables), _, _) = chromium(page, tmp_path, size="400,3000")
    assert "scroll to the side" in said  # what is cut off isn't gone
    wide_and_said = re.findall(r"(true|false),(true|false)", tables)
    assert len(wide_and_said) == 4 and wide_and_said[0] == ("true", "true")
    assert wide_and_said[-1] == ("false", "false")
    found = re.findall(r"\d+", line[line.index("widths") :])
    scroll, screen, box, image, boxes = map(int, found[:5])
    assert scroll == screen <= 500 and boxes == 9  # 500: the least that some versions open
    assert box < screen and image > 800  # so that letters keep their size


def printed(page, pdf):
    """The text of the page as it comes to paper, its sheets apart by form feeds."""
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--no-pdf-header-footer",
        "--blink-settings=preferredColorScheme=0",
        f"--user-data-dir={pdf.parent / 'user'}",
        f"--print-to-pdf={pdf}",
        page.as_uri(),
    ]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    done = subprocess.run(["pdftotext", "-layout", pdf, "-"], capture_output=True, timeout=60)
    return done.stdout.decode()


@needs_chromium
@pytest.mark.skipif(shutil.which("pdftotext") is None, reason="pdftotext is not installed")
def test_the_printed_page_is_whole(tmp_path):
    page, pdf = tmp_path / "index.html", tmp_path / "page.pdf"
    made = make_profile(90, 8, 2)  # more layers than a sheet has lines
    page.write_text(made.to_html(), encoding="utf-8")
    text = printed(page, pdf)
    rows = [line.split() for line in text.split("\n")]
    for row in layers(made, made.phases).rows:
        assert row in rows
    sheets = text.split("\f")
    holding = [s for s in sheets if re.search(r"^ *\d+ +2\.00 ", s, re.M)]
    assert len(holding) > 1 and all("Gini" in sheet for sheet in holding)  # heads are repeated
    assert "z_loss" in text


def test_a_number_breaks_before_its_interval_only_and_words_keep_their_blanks():
    columns = [("", "token"), ("", "loss")]
    made = html_table(Table("", "", columns, [["'\\n  ' 9 %", "1.5 (1.2 to 1.8)"]], ("token",)))
    assert "<td>1.5 (1.2\u00a0to\u00a01.8)</td>" in made
    assert "<td class=word>&#x27;\\n  &#x27; 9\u00a0%</td>" in made
    assert ".word { text-align: left; white-space: pre-wrap; }" in document("", "", [])


@needs_chromium
@pytest.mark.skipif(shutil.which("pdftotext") is None, reason="pdftotext is not installed")
def test_numbers_and_heads_are_whole_on_paper(tmp_path):
    """In a table that fills the sheet, and in one that has to be divided."""
    for pairs in (3, 8):
        columns = [("", "name"), *[("", "perplexity"), ("", "agreement")] * pairs]
        row = ["what a table calls its rows", *["0.069 (-0.068 to +0.070)", "0.812"] * pairs]
        page, pdf = tmp_path / "index.html", tmp_path / "page.pdf"
        shown = table_block(Table("", "", columns, [row], ("name",)))
        page.write_text(document("", "", [("", shown)]), encoding="utf-8")
        words = printed(page, pdf).replace("\u00a0", " ").split()
        for word in ("perplexity", "agreement", "0.069", "(-0.068", "+0.070)", "0.812"):
            assert words.count(word) == pairs


@needs_chromium
@pytest.mark.skipif(shutil.which("pdftotext") is None, reason="pdftotext is not installed")
def test_a_tables_note_is_on_the_sheet_of_the_table(tmp_path, monkeypatch):
    """Wherever on a sheet the table comes to stand."""
    monkeypatch.setattr(pages, "_figures", lambda *_: ())
    html = make_profile(4, 8, 2).to_html()
    page, pdf = tmp_path / "index.html", tmp_path / "page.pdf"
    for space in (60, 120, 180):
        filled = html.replace("By layer</h2>", f'By layer</h2><div style="height:{space}mm"></div>')
        page.write_text(filled, encoding="utf-8")
        for sheet in printed(page, pdf).split("\f"):
            assert ("Gini: " in sheet) == bool(re.search(r"^ *3 +2\.00 ", sheet, re.M))


@needs_chromium
def test_a_page_that_did_ask_would_be_found_out(html, tmp_path):
    page = tmp_path / "index.html"
    loads = '<img src="http://example.invalid/x.png"><script>console.error("no")</script></body>'
    page.write_text(html.replace("</body>", loads), encoding="utf-8")
    console, asked, _ = chromium(page, tmp_path)
    assert "http://example.invalid/x.png" in asked and console
