"""The page and the notebook's view: nothing outside is asked for; Chromium shows all of it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from profiles import make_profile

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
               None)  # fmt: skip
VOID = {"meta", "link", "img", "br"}


@pytest.fixture(scope="module")
def profile():
    facts = {"model": "a <model> & \"more\"", "notes": ["a <note>"]}
    return make_profile(4, 16, 2, padding=0.1, facts=facts)


class Reader(HTMLParser):
    """Tags, whatever asks for something, and the text; fails where tags don't close in order."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.asked, self.text, self._open = [], [], "", []
        self.feed(page)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = dict(attrs)
        self.asked += [attributes[n] for n in ("src", "href", "srcset", "data") if n in attributes]
        self.asked += re.findall(r"url\((.*?)\)", attributes.get("style") or "")
        assert not any(name.startswith("on") for name in attributes), attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("view", ["to_html", "_repr_html_"])
def test_the_html_asks_for_nothing(profile, view):
    html = getattr(profile, view)()
    read = Reader(html)
    assert read.asked and all(address.startswith("data:") for address in read.asked)
    assert not {"script", "iframe", "object", "base"} & set(read.tags)
    assert "@import" not in html and "url(" not in html and "http" not in html
    for words in ("a <model> & \"more\"", "a <note>", "Least balanced in decode"):
        assert words in read.text  # escaped, and shown as they are


def test_the_page_has_every_figure_and_table(profile):
    html = profile.to_html()
    read = Reader(html)
    assert html.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert '<meta charset="utf-8">' in html
    assert '<link rel="icon" href="data:,">' in html
    assert read.tags.count("img") == read.tags.count("figcaption") == len(profile.figures) == 10
    assert read.tags.count("table") == 2  # by layer, by domain
    order = [read.text.index(words) for words in ("Findings", "Counted:", "By layer", "By domain")]
    assert order == sorted(order)


def test_the_notebooks_view_touches_nothing_outside(profile):
    html = profile._repr_html_()
    style = re.search(r"<style>(.*?)</style>", html, re.S).group(1)
    for selectors in re.findall(r"([^{}]+)\{", style):
        assert all(s.strip().startswith(".moeprof-profile") for s in selectors.split(","))
    assert not re.search(r"(?<!-)color: (?!inherit)", style)  # readable on dark and on light


def chromium(page, tmp_path, *options):
    """(what was logged, addresses asked for, the screenshot) of a page file."""
    shot, log = tmp_path / "shot.png", tmp_path / "net.json"
    command = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--no-first-run",
        "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
        f"--log-net-log={log}", f"--user-data-dir={tmp_path / 'user'}", *options,
        "--window-size=1300,5000", f"--screenshot={shot}", page.as_uri(),
    ]  # fmt: skip
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
def test_chromium_shows_the_page_and_asks_for_nothing(profile, tmp_path, dark):
    from matplotlib.image import imread

    page = tmp_path / "index.html"
    page.write_text(profile.to_html(), encoding="utf-8")
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


@needs_chromium
def test_a_page_that_did_ask_would_be_found_out(profile, tmp_path):
    page = tmp_path / "index.html"
    loads = '<img src="http://example.invalid/x.png"><script>console.error("no")</script></body>'
    page.write_text(profile.to_html().replace("</body>", loads), encoding="utf-8")
    console, asked, _ = chromium(page, tmp_path)
    assert "http://example.invalid/x.png" in asked and console
