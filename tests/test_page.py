"""`sbk report`: what the page says of stored results, and that a browser draws it, in light and dark, wide and on a phone.

Chromium opens the page where one is installed; the charts' specifications are compiled everywhere.
"""

import dataclasses
import html
import itertools
import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from sbkernels import environment
from sbkernels.cli.main import main
from sbkernels.report import build, charts, performance, points, stored
from sbkernels.verify import record

vl_convert = pytest.importorskip("vl_convert", reason="vl-convert is not installed: pip install 'sbkernels[report]'")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=20000",
)  # fmt: skip
SCHEMES = {"dark": 0, "light": 1}  # Blink's numbers
PHONE = 390  # pixels; a window of Chromium is not made that narrow, a frame in it is
TOO_WIDE = "document.querySelector('main').style.width = '900px'; "
SECTIONS = ("speed", "roofline", "errors", "tuning", "verification", "profiles", "environment")


@pytest.fixture(scope="module")
def chromium():
    return next(filter(None, map(shutil.which, BROWSERS)), None) or pytest.skip("no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """The page of what comes with sbkernels."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    assert main(["report", "--output", str(path)]) == 0
    return path


def opened(chromium: str, page: pathlib.Path, folder: pathlib.Path, scheme: str = "light") -> tuple[str, list[str]]:
    """(the document after its scripts ran, what they wrote to the console, uncaught errors among it)."""
    command = [chromium, *FLAGS, f"--user-data-dir={folder}", f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"]
    result = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


def with_script(page: str, script: str) -> str:
    """The page with a script at its end; the library's text has ends of pages in it, too."""
    head, tail = page.rsplit("</body>", 1)
    return f"{head}<script>{script}</script></body>{tail}"


def charts_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_browser_draws_the_page(chromium, committed, tmp_path, scheme):
    """Every chart, without a word on the console; the theme is the reader's."""
    page = committed.read_text()
    probe = "document.body.dataset.background = getComputedStyle(document.body).backgroundColor"
    (tmp_path / "page.html").write_text(with_script(page, probe))
    drawn, console = opened(chromium, tmp_path / "page.html", tmp_path / "profile", scheme)
    assert console == []
    assert charts_of(page) and drawn.count('class="marks"') == len(charts_of(page))
    background = re.search(r'data-background="rgb\((\d+)', drawn)[1]
    assert (int(background) < 64) == (scheme == "dark")


@pytest.mark.parametrize("planted", ["", TOO_WIDE], ids=["as it is", "too wide"])
def test_a_phone_shows_the_page_without_scrolling_sideways(chromium, committed, tmp_path, planted):
    """And the test sees what is too wide."""
    root = "document.documentElement"
    say = f"parent.postMessage([{root}.scrollWidth > {root}.clientWidth, document.querySelectorAll('svg.marks').length], '*')"
    page = committed.read_text()
    (tmp_path / "page.html").write_text(with_script(page, f"{planted}setTimeout(() => {say}, 5000)"))
    listen = "<script>onmessage = (message) => { document.body.dataset.said = message.data.join(' ') }</script>"
    frame = f'<iframe src="page.html" style="width:{PHONE}px;height:800px;border:0"></iframe>'
    (tmp_path / "frame.html").write_text(f"<!doctype html><body>{listen}{frame}</body>")
    drawn, console = opened(chromium, tmp_path / "frame.html", tmp_path / "profile")
    too_wide = "true" if planted else "false"
    assert console == [] and re.search(r'data-said="(.*?)"', drawn)[1] == f"{too_wide} {len(charts_of(page))}"


def test_a_chart_that_cannot_be_drawn_is_seen(chromium, committed, tmp_path):
    """The test above would see it."""
    (tmp_path / "page.html").write_text(committed.read_text().replace('"type": "line"', '"type": "planted"', 1))
    drawn, console = opened(chromium, tmp_path / "page.html", tmp_path / "profile")
    assert console and "This chart could not be drawn." in drawn


def test_nothing_is_fetched(committed):
    page = committed.read_text()
    assert "default-src 'none'" in page and not re.findall(
        r"<(?:link|img|iframe)\b|<script[^>]+src=|@import|url\(http", page.split("<script>")[0]
    )
    assert re.findall(r'href="([^"#]+)"', page.split("<script>")[0]) == []


def test_committed_results(committed):
    """Each section's heading says what was found; the numbers are those of the records."""
    page = html.unescape(committed.read_text())
    assert re.findall(r'<section id="(\w+)">', page) == [*SECTIONS]
    assert re.search(r"<h2>\w+ is the fastest backend, [\d.]+ to [\d.]+ times FlashAttention-2's speed", page)
    verified = json.loads((record.FOLDER / "verify-h100.json").read_text())["report"]
    assert verified["failed"] == 0 and f"All {verified['ran']:,} checks passed on NVIDIA H100" in page
    for said in ("planted mistakes were caught", "random problems failed", "The default config is within 2 % of the best"):
        assert said in page, said


def test_a_record_is_stale_by_the_sources_of_its_own_backends(tmp_path):
    """As of `sbk verify --check-record`."""
    content = json.loads((record.FOLDER / "fuzz-torch-cpu.json").read_text())
    of, other = record.backends(content), "triton"
    assert of == {"torch"}
    for changed in (other, *of):
        content["environment"]["sources"] = environment.source_hashes() | {changed: "0" * 16}
        path = tmp_path / f"{changed}.json"
        path.write_text(json.dumps(content))
        heading = "All records are of" if changed == other else "1 of 1 records: kernel sources have changed since"
        assert heading in build.machines(stored.load([path])).heading and bool(record.stale(path)) == (changed != other)


def test_what_is_missing_is_said():
    compared = build.build(stored.load([record.FOLDER / "compare-h100.json"]))
    assert "No record of sbk bench is among the files" in compared and "roofline-" not in json.dumps(charts_of(compared))
    nothing = build.build(stored.load([]))
    assert all(f"No {what}" in nothing for what in ("times", "errors", "tuning", "verification", "record"))


def test_every_chart_compiles(committed):
    for id, specification in charts_of(committed.read_text()).items():
        assert vl_convert.vegalite_to_vega(specification)["marks"], id


def bench(path: pathlib.Path, **more) -> pathlib.Path:
    """A record in the form of sbk bench with made-up numbers, which no machine gave."""
    rows = []
    for D, N, direction in itertools.product((64, 128), (1024, 4096), ("forward", "backward")):
        for contender, ours, ms in (
            ("cuda", True, 1.0),
            ("ptx", True, 2.0),
            ("FlashAttention-2", False, 1.5),
            ("eager", False, 90.0),
        ):
            sizes = {"B": 4096 // N, "H": 8, "Hk": 8, "M": N, "N": N, "D": D, "Dv": D, "lengths": []}
            timed = {"ms": ms, "interval": [0.9 * ms, 1.1 * ms], "samples": [ms], "tflops": 200 / ms, "of_limit": 0.5 / ms}
            about = {"case": f"made up <b>{N}</b> {D}", "dtype": "bfloat16", "contender": contender, "ours": ours}
            ratios = {"FlashAttention-2": 1.5 / ms} if ours else {}
            rest = {"direction": direction, "limit": "special function", "ratios": ratios, "peak_bytes": 2**30}
            rows.append(sizes | timed | about | rest)
    untimed = {"contender": "triton", "ms": None, "tflops": None, "interval": None, "note": "out of memory"}
    rows += [rows[0] | untimed, rows[0] | {"contender": "wrong one", "ok": False, "note": "wrong on fresh inputs"}]
    for N in (1024, 4096):
        rows.append(rows[0] | {"case": f"decode {N}", "direction": "decode", "M": 1, "N": N, "ms": 0.1, "tflops": 0.1})
    rows.append(rows[0] | {"case": "a launch", "B": 1, "M": 64, "N": 64, "ms": 0.01, "tflops": 0.08})
    limits = {"tensor_tflops": 700.0, "special_function_gops": 4000.0, "memory_gbs": 3000.0}
    record.write(path, "bench", rows, set="training", limits=limits, **more)
    return path


def test_bench_records(tmp_path):
    """Curves for each pass and head dim, ceilings, the table; what was not timed or was wrong; names are no HTML."""
    found = stored.load([bench(tmp_path / "bench.json")])
    page = html.unescape(build.build(found))
    drawn, body = charts_of(page), page.split("<script>")[0]
    panels = [(way, D) for way in performance.PASSES for D in (64, 128)] + [("decode", 64)]
    assert {f"{kind}-0-{way}-{D}" for kind in ("speed", "roofline") for way, D in panels} == set(drawn)
    assert all(vl_convert.vegalite_to_vega(specification) for specification in drawn.values())
    for said in (
        "cuda reaches 50 % of what the special function limit allows", "700 TFLOP/s of matrix products", "1,024",  # MiB
        "cuda is the fastest backend, 1.50 times FlashAttention-2's speed", "2 without a time, and why", "out of memory",
        "wrong on fresh inputs", "No errors are stored", "No tuning is stored", "No verification is stored",
    ):  # fmt: skip
        assert said in body, said
    assert "made up &lt;b&gt;1024&lt;/b&gt; 64" in build.build(found)
    assert "eager" not in json.dumps(drawn["roofline-0-forward-64"]) and "eager" in json.dumps(drawn["speed-0-forward-64"])
    assert "wrong one" not in json.dumps(drawn)
    assert "a launch" not in json.dumps(drawn["roofline-0-forward-64"]) and "a launch" in body


def test_special_functions_may_be_unknown(tmp_path):
    path = bench(tmp_path / "bench.json")
    path.write_text(path.read_text().replace('"special_function_gops": 4000.0', '"special_function_gops": null'))
    page = build.build(stored.load([path]))
    specification = charts_of(page)["roofline-0-forward-64"]
    assert vl_convert.vegalite_to_vega(specification) and "special functions" not in json.dumps(specification)
    assert "special functions a second" not in page


def test_failures_are_shown(tmp_path):
    """Numbers that are infinite are words in records."""
    content = json.loads((record.FOLDER / "compare-cpu.json").read_text())
    content["rows"][0] |= {"ok": False, "to_baseline": "inf", "relative_l2": "nan"}
    (tmp_path / "compare.json").write_text(json.dumps(content))
    content = json.loads((record.FOLDER / "verify-h100.json").read_text())
    content["report"]["failed"] = 1
    content["report"]["checks"][0] |= {"failed": 1, "worst": "inf"}
    content["rows"][0] |= {"failed": 1, "worst": "inf"}
    (tmp_path / "verify.json").write_text(json.dumps(content))
    ran = content["report"]["ran"]
    page = build.build(stored.load([tmp_path / "compare.json", tmp_path / "verify.json"]))
    assert re.search(r"1 of \d+ results exceed their bound: errors at most inf times", page)
    assert f"1 of {ran:,} checks failed" in page
    assert all(vl_convert.vegalite_to_vega(specification) for specification in charts_of(page).values())


def test_a_bench_takes_the_place_of_comparisons(tmp_path):
    """Of the same machine alone, and only where it has times over N."""
    content = json.loads((record.FOLDER / "compare-cpu.json").read_text())
    compared = tmp_path / "compare.json"
    compared.write_text(json.dumps(content | {"environment": content["environment"] | {"cpu": "planted"}}))
    both = points.points(stored.load([compared, bench(tmp_path / "bench.json", device="cpu")]))
    assert len(both) == 2 and {p.problem for p in both["planted"]} >= {"small D=32", "layers.0"}
    (tmp_path / "bench.json").write_text((tmp_path / "bench.json").read_text().replace('"cpu":', '"cpu": "planted", "was":'))
    alone = points.points(stored.load([compared, tmp_path / "bench.json"]))
    assert list(alone) == ["planted"] and "layers.0" not in {p.problem for p in alone["planted"]}
    steps = json.loads((tmp_path / "bench.json").read_text())
    steps["rows"] = [row | {"direction": "step"} for row in steps["rows"][:4]]
    (tmp_path / "steps.json").write_text(json.dumps(steps))
    beside = points.points(stored.load([compared, tmp_path / "steps.json"]))
    assert {p.problem for p in beside["planted"]} >= {"layers.0", "made up <b>1024</b> 64"}


def test_comparisons_hold_softmax_too():
    found = points.points(stored.load([record.FOLDER / "compare-h100.json"]))["NVIDIA H100 80GB HBM3"]
    chosen = {p.contender: p for p in found if p.problem == "4x16 heads, 4k D=128" and p.direction == "forward"}
    assert {"cuda", "cuda (portable)", "FlashAttention-2", "cuDNN"} <= chosen.keys() and not chosen["cuDNN"].ours
    assert chosen["cuDNN"].ms == pytest.approx(chosen["cuda"].ms * chosen["cuda"].ratios["cuDNN"], rel=0.01)
    curves = points.curves(found, "forward")
    assert {D: sorted({p.N for p in curve}) for D, curve in curves.items()} == {64: [4096, 16384], 128: [1024, 4096, 16384]}


def test_intensity():
    """Forward moves q, k, v and out; backward those of q, k, v twice and dout."""
    p = points.Point("m", "p", "c", True, "forward", "bfloat16", (2, 4, 2, 128, 256, 64, 32), 1.0, None, 1.0, {})
    moved = 2 * 2 * (4 * 128 * 64 + 2 * 256 * (64 + 32) + 4 * 128 * 32)
    assert p.intensity() == pytest.approx(2 * (64 + 32) * 2 * 4 * 128 * (256 - 64) / moved)
    assert dataclasses.replace(p, direction="backward").flops_a_logit() == 2 * (3 * 64 + 2 * 32)
    assert p.rate() == 1.0 and dataclasses.replace(p, direction="decode").rate() == pytest.approx(moved / 1e6)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [(1.0, 1.0, 1.0), (1.0, 99.0, 100.0), (50.0,), tuple(map(float, range(1, 16)))])
def test_labels_do_not_touch(values, log):
    low, high = 1.0, 100.0
    places = sorted(charts.dodged({str(i): value for i, value in enumerate(values)}, low, high, log).values())
    heights = [charts.HEIGHT * charts.share_of(place, low, high, log) for place in places]
    assert all(upper - lower > charts.LABEL_HEIGHT - 0.01 for lower, upper in itertools.pairwise(heights))
    assert heights[-1] <= charts.HEIGHT + charts.LABEL_HEIGHT / 2 + 0.01


def test_styles_tell_contenders_apart():
    """Ours by colour or dashes, others by shape, also those that have no style of their own."""
    looks = charts.styles({"cuda", "cuda (portable)", "new", "newer"}, {"FlashAttention-2", "cuDNN", "eager", "torch.compile"})
    assert len(set(looks.values())) == len(looks)
    assert looks["cuda"].color == looks["cuda (portable)"].color and looks["cuda"].dash != looks["cuda (portable)"].dash


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "expected kind, environment and rows"),
        ("no", "is no record"),
        ('{"schema": "x"}', "is no export"),
        (None, "No such file"),
    ],
)
def test_files_that_are_refused(tmp_path, capsys, content, words):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    assert main(["report", str(path), "--output", str(tmp_path / "page.html")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "page.html").exists()


def test_the_library_is_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    assert main(["report", "--output", str(tmp_path / "page.html")]) == 2
    assert "pip install 'sbkernels[report]'" in " ".join(capsys.readouterr().err.split())


def test_profiles(tmp_path):
    """What sbk profile stored is shown with what it means."""
    path = tmp_path / "profile.json"
    counted = str(pathlib.Path(__file__).parent / "data" / "ncu-odd.csv")
    assert main(["profile", "--read", counted, "--json", str(path)]) == 0
    page = build.build(stored.load([path]))
    assert "hopper_forward: special-function pipe (XU) 91 %: bound by the logit stage" in page and charts_of(page) == {}
    assert "unknown, read on" in page  # the record's environment is not of the machine that was profiled
