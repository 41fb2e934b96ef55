"""The page, made from work directories that are written here: no network, no images."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from jfi.campaign import records
from jfi.errors import InputError
from jfi.faults import Faults
from jfi.outcomes import Outcomes
from jfi.report import figures, finished, narrowing, page, tally
from jfi.report.names import clean, shortened
from jfi.sampling.estimates import estimate

SECTIONS = ["answer", "asked", "figures", "worst", "warnings", "sure", "repeat"]
FIGURES = ["layers", "bits", "map", "images", "narrowed"]
NASTY = '<script>alert("x")</script>\x00\x1b[31m\n\u202e\ud800 $a_{ \U0010fffd 漢字'
IMAGES, WORDS = 20, 40
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def made(folder, sites=("conv1/kernel", "conv2/kernel"), net="lenet", keep_bits=False, shift=0):
    """A work directory of a campaign with faults of every bit of every site, half of the words."""
    rng = np.random.default_rng(shift)
    site, index, bit = (
        axis.ravel() for axis in np.meshgrid(range(len(sites)), range(WORDS // 2), range(32))
    )
    hit = rng.random((site.size, IMAGES)) < (np.where(bit >= 30, 0.3, 0.0) / (1 + site))[:, None]
    outcomes = Outcomes(
        critical=hit.sum(1),
        first_critical=np.where(hit.any(1), hit.argmax(1), -1),
        critical_bits=np.packbits(hit, axis=1) if keep_bits else None,
    )
    faults = Faults(site, index, bit, np.full(site.size, 2))
    population, cells = np.full((len(sites), 32), WORDS), (len(sites), 32)
    injections, critical = np.zeros(cells, int), np.zeros(cells, int)
    np.add.at(injections, (site, bit), 1)
    np.add.at(critical, (site, bit), hit.any(1))
    stratum = np.arange(population.size).reshape(cells)
    config = {"net": net, "dataset": "digits", "sampler": "data_unaware", "confidence": 0.99,
              "error_margin": 0.05, "fault_model": "flip", "seed": shift}  # fmt: skip
    manifest = {
        "config": config, "hashes": {"weights": "ab12cd34ef"}, "sites": sites, "images": IMAGES,
        "identity": {"request": [0.05, 0.99, None], "bits": list(range(32))},
        "versions": {"jax": "0.10"}, "left_out": {net: "bool words can't be broken"},
        "strata": [
            {"site": s, "bit": b, "population": WORDS, "injections": WORDS // 2, "p": 0.5}
            for s in range(len(sites)) for b in range(32)
        ],
    }  # fmt: skip
    (folder / "outcomes").mkdir(parents=True)
    # JSON keeps lone surrogates as escapes.
    (folder / "manifest.json").write_text(json.dumps(manifest))
    records.write_shard(folder, 0, np.arange(site.size), faults, outcomes)
    names = [name.encode(errors="replace").decode() for name in sites]
    found = estimate(names, population, injections, critical, stratum, confidence=0.99)
    found = [
        e._replace(unit=e.unit.replace(name, site), site=e.site and e.site.replace(name, site))
        for e in found
        for name, site in [next(((n, s) for n, s in zip(names, sites, strict=True) if n == e.site),
                                ("", ""))]
    ] if list(sites) != names else found  # fmt: skip
    verify = {"pairs": 100, "agreements": 100, "near_ties": 0, "disagreements": 0, "bound": 0.03,
              "worst": ""}  # fmt: skip
    summary = {"population": population.sum(), "injections": injections.sum(), "images": IMAGES,
               "estimates": found, "verify": verify, "measured": {"seconds": 1.5}}  # fmt: skip
    text = json.dumps(records._strict(summary))
    (folder / "summary.json").write_text(text)
    return folder


class Reader(HTMLParser):
    """Ids in order, figures that hold a drawing, tags, and addresses that the page would load."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.tags, self.addresses, self.drawn, self.open = [], set(), [], set(), None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.add(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.addresses += [
            found[key] for key in ("src", "href", "data", "xlink:href") if key in found
        ]
        if tag == "figure":
            self.open = found["id"]
        if tag == "svg" or (tag == "table" and self.open):
            self.drawn.add(self.open)

    def handle_endtag(self, tag):
        if tag == "figure":
            self.open = None


def test_the_page_is_whole_and_needs_nothing_beside_itself(tmp_path):
    path = page.write(made(tmp_path / "run"), command="python -m run --net='a b'")
    text = path.read_text()
    read = Reader(text)
    assert path == tmp_path / "run" / "report.html"
    assert [name for name in read.ids if name in SECTIONS] == SECTIONS
    assert read.drawn >= set(FIGURES)
    assert read.addresses == ["data:,"]
    assert "script" not in read.tags and not re.search(r"https?:|url\(|@import", text)
    assert len(text.encode()) < 3e6
    assert "With 99% confidence between " in text and "python -m run --net=&#39;a b&#39;" in text
    assert re.search(r'title="bit 31: [\d.]+% \([\d.]+% to [\d.]+%\)"', text)
    assert "The record does not hold the words themselves." in text
    assert "is the first to reveal" in text


def test_names_are_escaped_and_control_characters_harmless(tmp_path):
    sites = (f"a/{NASTY}", "b/" + 500 * "long", "c/kernel")
    text = page.write(made(tmp_path / "run", sites, net=NASTY)).read_text(encoding="utf-8")
    assert "<script" not in text and "&lt;script&gt;" in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    assert "\\x00" in text and "\\u202e" in text and "\\ud800" in text and "漢字" in text
    assert Reader(text).drawn >= set(FIGURES)


def test_a_page_of_many_layers_stays_small(tmp_path):
    sites = [f"block{k}/{'deep/' * 20}kernel" for k in range(270)]
    text = page.write(made(tmp_path / "run", sites)).read_text()
    assert len(text.encode()) < 3e6
    assert "more layers are in estimates.csv" in text


def test_the_worst_words_are_told_with_their_numbers(tmp_path):
    run = finished.read(made(tmp_path / "run", keep_bits=True))
    assert run.seen.every_image and run.seen.by_image.sum() == sum(
        int(shard["critical"].sum()) for shard in records.read_shards(tmp_path / "run")
    )
    words = run.worst
    assert len({(word.site, word.index) for word in words}) == len(words) == tally.WORST
    assert list(words) == sorted(words, key=lambda word: -word.images)
    word = words[0]._replace(index=1, bit=31, fault="flip")
    values = np.array([0.5, 1.5], np.float32)
    (told,) = tally.told([word], lambda site: values)
    assert (told.before, told.after) == ("1.5 (0x3fc00000)", "-1.5 (0xbfc00000)")
    assert tally.told([word], lambda site: None) == (word,)
    (small,) = tally.told([word._replace(bit=7)], lambda site: np.array([1, 2], np.int8))
    assert (small.before, small.after) == ("2 (0x02)", "-126 (0x82)")
    html = page.page(run._replace(worst=(told,)))
    assert "-1.5 (0xbfc00000)" in html and "that each image reveals" in html


def test_campaigns_stand_side_by_side(tmp_path):
    first = made(tmp_path / "first")
    text = page.write(first, [made(tmp_path / "other", shift=3), first]).read_text()
    read = Reader(text)
    assert read.ids[-2:] == ["versus", "versus-figure"] and "versus-figure" in read.drawn
    assert "B: other" in text and "<th>seed</th><td>0</td><td>3</td><td>0</td>" in text


def test_runs_of_different_estimates_are_not_set_side_by_side(tmp_path):
    run, other = made(tmp_path / "a"), made(tmp_path / "b")
    path = other / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["estimate"] = "pairs"
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"estimates pairs, the share of .* faults, the share of"):
        page.write(run, [other])


def test_the_page_of_pairs_narrows_to_its_interval(tmp_path):
    """Of a sample drawn at once, from random parts of it."""
    run = made(tmp_path / "a")
    path = run / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["estimate"] = "pairs"
    path.write_text(json.dumps(manifest))
    seen = finished.read(run).seen
    assert seen.outcomes.injections.sum() == 2 * 32 * WORDS // 2
    images = np.concatenate([shard["critical"] for shard in records.read_shards(run)])
    assert seen.outcomes.total.sum() == pytest.approx(images.sum() / IMAGES)
    assert seen.outcomes.squares.sum() == pytest.approx((images**2).sum() / IMAGES**2)
    steps = narrowing.steps(manifest, {}, finished.read(run).estimates, seen)
    widths = [step.high - step.low for step in steps]
    assert 2 < len(steps) <= tally.STEPS and widths[-1] < widths[0]
    assert steps[-1].estimate == pytest.approx(images.mean() / IMAGES)
    assert "Critical pairs per layer" in page.write(run).read_text()


def test_a_run_that_tells_nothing_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"run .*none holds no campaign: there is no manifest"):
        page.write(tmp_path / "none")
    run = made(tmp_path / "run")
    (run / "summary.json").rename(run / "kept")
    with pytest.raises(InputError, match=r"is not finished: it has no summary\.json; start its"):
        page.write(run)
    (run / "summary.json").write_text('{"estimates": [{"unit": 1}]}')
    with pytest.raises(InputError, match="another version of jfi, or is damaged"):
        page.write(run)


def test_the_estimate_narrows_to_the_one_reported(tmp_path):
    run = finished.read(made(tmp_path / "run"))
    bars = page._narrowed(run)["bars"]
    (network,) = run.units("network")
    assert len(bars) > 1 and f"{page.percent(network.cp_low)}% to " in bars[-1]["title"]
    told = {"rounds": [4, 6], "narrowed": [[0, 0.4], [0.1, 0.2]]}
    rounds = page._narrowed(run._replace(summary=run.summary | told))
    assert [bar["label"] for bar in rounds["bars"]] == ["4", "10"]
    assert rounds["times"] == "4.0"


@pytest.mark.parametrize(
    ("points", "ends", "log", "ticks"),
    [
        ([0.01, 0.02], [0.03, 0.04], False, [0, 1, 2, 3, 4]),
        ([0.0001, 0.2], [0.001, 0.3], True, [0.001, 0.01, 0.1, 1, 10]),
        ([0.0], [1.0], False, [0, 20, 40, 60, 80, 100]),
        ([], [], False, [0, 20, 40, 60, 80, 100]),
    ],
)
def test_an_axis_holds_its_marks(points, ends, log, ticks):
    axis = figures.axis(points, ends)
    assert axis.log == log
    assert axis.ticks == pytest.approx(ticks)
    assert axis.place(0.0) == 0 and all(0 <= axis.place(100 * x) <= 100 for x in points + ends)


def test_texts_are_made_fit():
    assert clean("a\tb\u200b漢 é") == "a\\x09b\\u200b漢 é"
    assert shortened("a" * 99, 11) == "aaaaa…aaaaa"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
@pytest.mark.parametrize("width", [1200, 400])
def test_chromium_shows_every_figure_and_no_error(tmp_path, width):
    """In a frame: windows have a least width. The frame's own page tells what it finds."""
    run = made(tmp_path / "run", ("conv1/kernel", f"b/{NASTY}"))
    html = page.write(run, [made(tmp_path / "other", shift=2)]).read_text(encoding="utf-8")
    content = base64.b64encode(html.encode()).decode()
    (tmp_path / "frame.html").write_text(PROBE % (width, json.dumps(content)))
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,900",
        "--virtual-time-budget=3000", "--dump-dom", (tmp_path / "frame.html").as_uri(),
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in ended.stderr
    found = json.loads(re.search(r"<pre>(.*)</pre>", ended.stdout).group(1))
    assert found["width"] <= width  # nothing to scroll sideways
    shown = {name for name, size in found["figures"].items() if min(size) > 20}
    assert shown == {*FIGURES, "versus-figure"}


PROBE = """<!DOCTYPE html><meta charset="utf-8"><link rel="icon" href="data:,">
<iframe style="border:0;width:%dpx;height:900px"></iframe><pre></pre><script>
const frame = document.querySelector("iframe");
const bytes = Uint8Array.from(atob(%s), c => c.charCodeAt(0));
frame.onload = () => {
  const page = frame.contentDocument, figures = {};
  for (const figure of page.querySelectorAll("figure")) {
    const drawn = figure.querySelector("svg, table").getBoundingClientRect();
    figures[figure.id] = [drawn.width, drawn.height];
  }
  const width = page.documentElement.scrollWidth;
  document.querySelector("pre").textContent = JSON.stringify({width, figures});
};
frame.srcdoc = new TextDecoder().decode(bytes);
</script>"""
