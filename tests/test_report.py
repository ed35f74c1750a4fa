"""The page of scores: its numbers are those of the score files, hostile text stays text, and in a
real browser it works, fits and asks nothing of a network."""

import asyncio
import base64
import json
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser

import pytest
from sklearn.dummy import DummyClassifier
from sklearn.metrics import confusion_matrix, f1_score

from evals import figures, report
from evals import page as report_page
from evals import run as evaluation
from evals.answers import Prompts
from tests.conftest import call
from tests.test_eval import Speaker
from tools import common, recipes, sources
from tools import runs as runs_module
from tools import subjects as subject_of
from tools.train import plan

HOSTILE = [
    "<script>document.title = 'taken'</script>",
    "</script></pre></details><img src=http://127.0.0.1:9/x onerror=alert(1)>",
    '" onmouseover="alert(1)\' & <b>bold</b> {{ 7 * 7 }} {% raw %} $x^2$',
    "line\u2028separator, turned \u202e around, a bell \x07 and a zero\x00",
]
LABELS = ("negative", "neutral", "positive")
ROWS = 120
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def number(doc):
    return int(doc["messages"][0]["content"].split()[1])


def key(doc):
    return doc["messages"][1]["content"]


def base(doc):
    """Right on four rows, wrong on the next four."""
    return key(doc) if number(doc) // 4 % 2 else "no label </pre><script>1</script>"


def adapter(doc):
    """Wrong on every tenth row."""
    return LABELS[(LABELS.index(key(doc)) + 1) % 3] if number(doc) % 10 == 0 else key(doc)


METRICS: dict[
    tuple[str, str], dict
] = {}  # by dataset and side: they take seconds, and never change


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A base and an adapter, scored by the real code on rows whose prompts are hostile."""
    monkeypatch.setattr(sources, "CHAT", tmp_path / "data" / "chat")
    monkeypatch.setattr(runs_module, "RUNS", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    report_page.read_prompts.cache_clear()
    sources.CHAT.mkdir(parents=True)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Row {n} says: {HOSTILE[n % len(HOSTILE)]}"},
                {"role": "assistant", "content": LABELS[n * 7 % 5 % 3]},
            ]
        }
        for n in range(ROWS)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name in ("fpb_test", "fiqa_test", "sentiment_train"):
        (sources.CHAT / f"{name}.jsonl").write_text(lines)
    trained = [sources.CHAT / "sentiment_train.jsonl"]
    monkeypatch.setattr(sources, "list_training_files", lambda config: trained)
    folder = runs_module.RUNS / "smollm2-135m" / "sentiment_r4"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"an adapter")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["q_proj"]}
    common.write_json(folder / "adapter_config.json", settings)
    steps = [{"step": 0, "eval_loss": 2.5}, *({"step": n, "loss": 2 / n} for n in range(1, 30))]
    (folder / "progress.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    recipe = recipes.find("smollm2-135m/sentiment_r4")
    sha = common.digest(folder / "adapter_model.safetensors")
    data = [{"rows": ROWS, "split": "train"}]
    info = {"recipe": recipe.name, "adapter_sha256": sha, "data": data}
    common.write_json(folder / "run.json", info)
    subject = subject_of.Subject(
        recipe.name, recipe.config, folder, folder, folder.parent / "base_nf4", "sentiment", "chat"
    )
    for dataset in ("fpb", "fiqa"):
        for side, answer in (("base", base), ("adapter", adapter)):
            made, left_out = evaluation.measure(
                Speaker(answer), dataset, None, Prompts("chat", None)
            )
            if (dataset, side) not in METRICS:
                METRICS[dataset, side] = evaluation.score(made)
            content = {
                "evaluated": evaluation.identify(subject, side, dataset, None),
                "device": "cpu",
                "examples": len(made),
                "metrics": METRICS[dataset, side],
                "left_out": left_out,
                "cut_prompts": 0,
                "predictions": made,
            }
            common.write_json(subject.file(side, dataset, None), content)
    return subject


class Page(HTMLParser):
    """The texts of a page's table rows, its tags, and the text of each `pre` by its class."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.tags, self.shown, self.inside, self.cell = [], [], {}, None, False
        self.feed(text)
        self.rows = [[" ".join(cell.split()) for cell in row] for row in self.rows]

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
            self.cell = True
        elif tag == "pre":
            self.inside = dict(attributes)["class"]
            self.shown.setdefault(self.inside, []).append("")

    def handle_endtag(self, tag):
        if tag == "pre":
            self.inside = None
        if tag in ("td", "th"):
            self.cell = False

    def handle_data(self, text):
        if self.inside:
            self.shown[self.inside][-1] += text
        elif self.cell:
            self.rows[-1][-1] += f" {text}"


def add_adapter(runs, name, sha=None):
    """A copy of the run beside it, scored on FPB alone; with `sha` as another adapter."""
    other = runs.folder.with_name(name)
    shutil.copytree(runs.folder, other)
    shutil.rmtree(other / "evals")
    content = json.loads(runs.file("adapter", "fpb", None).read_text())
    if sha:
        content["evaluated"]["adapter_sha256"] = sha
    common.write_json(other / "evals" / "fpb.json", content)
    return other


def built(**hardware):
    def planner(config, rows, data):
        return plan.plan(config, plan.Hardware(**hardware), rows=rows, data=data)

    files = report_page.build(runs_module.RUNS / "report", planner)
    return files, Page(files[0].read_text())


# ---- what the page says


def test_the_table_says_what_the_score_files_say(runs):
    _, page = built()
    rows = [row for row in page.rows if len(row) == 9 and row[0] == "fpb"]
    known = {(row[2].split()[0], row[3]): row for row in rows}
    both = {
        side: json.loads(runs.file(side, "fpb", None).read_text()) for side in ("base", "adapter")
    }
    assert len(rows) == sum(len(content["metrics"]) for content in both.values())
    for side, name in (("base", "base"), ("adapter", "sentiment_r4")):
        for metric, value in both[side]["metrics"].items():
            row = known[name, report.title(metric)]
            texts = [f"{100 * value[part]:.1f}" for part in ("value", "low", "high")]
            assert re.findall(r"\d+\.\d", row[4]) == texts
            assert row[8] == "120"
    # Counted by hand: the base is right on 60 of 120 rows, the adapter on 108.
    assert known["base", "accuracy"][4].startswith("50.0")
    assert known["sentiment_r4", "accuracy"][4].startswith("90.0")
    assert known["sentiment_r4", "accuracy"][5].startswith("+40.0")
    pairs = [(row["expected"], row["answered"]) for row in both["adapter"]["predictions"]]
    f1 = f1_score(*zip(*pairs, strict=True), average="macro")
    assert known["sentiment_r4", "macro F1"][4].startswith(f"{100 * f1:.1f}")


def test_finloras_published_scores_stand_beside_the_metric_of_its_rule(runs):
    _, page = built()
    column = {
        (row[0], row[2].split()[0], row[3]): row[7].strip() for row in page.rows if len(row) == 9
    }
    assert column["fpb", "base", "accuracy, FinLoRA's"] == "68.7"
    assert column["fpb", "sentiment_r4", "accuracy, FinLoRA's"] == "84.2"
    assert column["fiqa", "sentiment_r4", "weighted F1, FinLoRA's"] == "87.4"
    assert column["fpb", "sentiment_r4", "accuracy"] == "–"


def test_a_confusion_matrix_is_scikit_learns(runs):
    content = json.loads(runs.file("adapter", "fpb", None).read_text())
    pairs = [row["values"]["f1_weighted"][0] for row in content["predictions"]]
    result = report_page.count_confusion(content)
    expected = confusion_matrix(*zip(*pairs, strict=True), labels=result["labels"])
    counts = [[count for count, _ in cells] for _, cells in result["rows"]]
    assert [row[:-1] for row in counts] == expected.tolist()
    content["predictions"][0]["values"]["f1_weighted"] *= 2  # tags: several labels a row
    assert report_page.count_confusion(content) is None
    base_side = report_page.count_confusion(json.loads(runs.file("base", "fpb", None).read_text()))
    assert sum(cells[-1][0] for _, cells in base_side["rows"]) == ROWS // 2  # no label


def test_the_majority_is_scikit_learns_and_stands_on_the_page(runs):
    content = json.loads(runs.file("adapter", "fpb", None).read_text())
    keys = [row["expected"] for row in content["predictions"]]
    dummy = DummyClassifier(strategy="most_frequent").fit(keys, keys)
    share = report.measure_majority(content)
    assert share == dummy.score(keys, keys)
    text = f"fpb: the most frequent answer alone has an accuracy of {100 * share:.1f} %."
    assert text in built()[0][0].read_text()
    content["predictions"].append({"values": {}})  # a row that could not be scored
    assert report.measure_majority(content) == share
    content["predictions"][0]["values"]["f1_macro"] *= 2  # tags: several labels a row
    assert report.measure_majority(content) is None
    assert report.measure_majority(content | {"predictions": []}) is None


def test_hostile_prompts_and_answers_stay_text(runs):
    files, page = built()
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not [tag for tag, _ in page.tags if tag in ("img", "link", "iframe")]
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    said = page.shown["prompt"]
    for n in range(3):
        assert any(text.endswith(HOSTILE[n]) for text in said)
    # What cannot be seen is spelled out.
    spelled = r"line\u2028separator, turned \u202e around, a bell \x07 and a zero\x00"
    assert any(text.endswith(spelled) for text in said)
    assert "\u2028" not in files[0].read_text() and "\x00" not in files[0].read_text()


def test_wrong_answers_are_limited_and_say_so(runs):
    files, page = built()
    # 60 wrong ones of the base and 12 of the adapter, on each of two datasets.
    assert len(page.shown["answer"]) == 2 * (report_page.WRONG + 12)
    text = files[0].read_text()
    assert text.count(f"{report_page.WRONG} of 60 shown") == 2 and text.count("12 of 12 shown") == 2


def test_prompts_of_other_data_than_was_scored_are_not_shown(runs):
    with open(sources.test_path("fpb"), "a") as file:
        file.write("{}\n")
    _, page = built()
    hidden = [text for text in page.shown["prompt"] if "is not the data that was scored" in text]
    assert len(hidden) == report_page.WRONG + 12


def test_the_figures_lie_beside_the_page(runs):
    files, _ = built(price=1.0)
    # One adapter: a single point against memory or cost would compare nothing.
    assert [file.name for file in files[1:]] == ["gain.png", "loss.png"]
    add_adapter(runs, "sentiment_r4_again")
    files, _ = built(price=1.0)
    assert [file.name for file in files[1:]] == ["gain.png", "memory.png", "cost.png", "loss.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files[1:])
    page = files[0].read_text()
    assert page.count("<svg") == 4 and "planned cost, USD" in page


def test_a_smoothed_loss_is_the_mean_of_the_last_steps():
    losses = [float(step) for step in range(20)]
    smoothed = figures.smooth(losses)
    assert smoothed[:3] == [0.0, 0.5, 1.0] and smoothed[-1] == sum(losses[-10:]) / 10
    assert figures.draw_losses({}) is None


def test_the_planned_memory_is_the_planners(runs):
    hardware = plan.Hardware("T4 16GB", price=2.0)
    adapter = next(one for one in report_page.find_scored() if one.is_adapter)
    planned = report_page.plan_training(
        adapter, lambda config, rows, data: plan.plan(config, hardware, rows=rows, data=data)
    )
    again = plan.plan(runs.config, hardware, data=[sources.CHAT / "sentiment_train.jsonl"])
    assert planned == again and planned["usd"] > 0


def test_adapters_are_compared_with_each_other_and_share_the_figures(runs):
    add_adapter(runs, "sentiment_r4_again")
    other = add_adapter(runs, "sentiment_r8", sha="e" * 64)
    (other / "run.json").unlink()
    (other / "progress.jsonl").write_text('{"step": 1, "loss": 1.5}\n')
    files, page = built()
    assert (
        "smollm2-135m/sentiment_r8, nf4 against smollm2-135m/sentiment_r4, nf4: fpb, accuracy: "
        "no difference shown: +0.0 points" in files[0].read_text()
    )
    names = [
        row[2] for row in page.rows if len(row) == 9 and (row[0], row[3]) == ("fpb", "accuracy")
    ]
    again = "sentiment_r4_again nf4"
    assert names == ["base nf4", "sentiment_r4 nf4", again, "sentiment_r8 nf4"]
    # Nothing says how the second one was trained.
    assert "Not planned: smollm2-135m/sentiment_r8, nf4." in files[0].read_text()


def test_scores_of_an_adapter_that_was_trained_again_do_not_count(runs, capsys):
    common.write_json(runs.folder / "run.json", {"recipe": runs.name, "adapter_sha256": "f" * 64})
    _, page = built()
    assert not [row for row in page.rows if len(row) == 9 and "sentiment_r4" in row[2]]
    assert "trained again" in capsys.readouterr().err


def test_scores_beside_a_damaged_run_json_are_left_out_and_named(runs, capsys):
    (runs.folder / "run.json").write_text('{"recipe": "smol')
    _, page = built()
    assert not [row for row in page.rows if len(row) == 9 and "sentiment_r4" in row[2]]
    assert "run.json" in capsys.readouterr().err


def test_without_a_score_it_says_so_and_stops(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs_module, "RUNS", tmp_path / "runs")
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, "report")
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: nothing is scored in ") and printed.count("\n") == 1


# ---- in a browser


class Browser:
    """A tab of headless Chromium by the DevTools protocol: what it asked for and complained of."""

    def __init__(self, socket):
        self.socket, self.count = socket, 0
        self.requests, self.complaints, self.loaded = [], [], 0

    async def call(self, method, **parameters):
        self.count += 1
        number = self.count
        await self.socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self.take()
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    async def take(self):
        message = await self.socket.receive_json(timeout=60)
        method, content = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(content["request"]["url"])
        elif method in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
            self.complaints.append(content)
        elif method == "Page.loadEventFired":
            self.loaded += 1
        return message

    async def show(self, file, width, scheme):
        for domain in ("Page", "Network", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        await self.call("Emulation.setDeviceMetricsOverride", **size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        await self.call("Emulation.setEmulatedMedia", features=[feature])
        before = self.loaded
        await self.call("Page.navigate", url=file.as_uri())
        while self.loaded == before:
            await self.take()

    async def ask(self, script):
        reply = await self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    async def picture(self, file):
        result = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(result["data"]))


@pytest.fixture
def chromium(tmp_path):
    """Runs a coroutine function with a `Browser`."""
    if not CHROMIUM:
        pytest.skip("no chromium is installed (Debian: apt-get install chromium)")
    import aiohttp

    profile = tmp_path / "profile"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", "--no-first-run"]
    flags += ["--disable-dev-shm-usage", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
    log = open(tmp_path / "chromium.log", "wb")  # noqa: SIM115
    process = subprocess.Popen([CHROMIUM, *flags, "about:blank"], stdout=log, stderr=log)
    port_file = profile / "DevToolsActivePort"
    while not (port_file.is_file() and port_file.read_text().count("\n")):
        assert process.poll() is None, (tmp_path / "chromium.log").read_text()
        time.sleep(0.1)
    address = f"http://127.0.0.1:{port_file.read_text().split()[0]}"

    def run(job):
        async def inside():
            async with aiohttp.ClientSession() as session:
                async with session.put(f"{address}/json/new?about:blank") as reply:
                    where = (await reply.json())["webSocketDebuggerUrl"]
                async with session.ws_connect(where, max_msg_size=0) as socket:
                    return await job(Browser(socket))

        return asyncio.run(inside())

    yield run
    process.terminate()
    process.wait(timeout=30)
    log.close()


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_without_a_complaint_or_a_request(
    runs, chromium, tmp_path, width, scheme
):
    (file, *_), _ = built(price=1.0)

    async def job(browser):
        await browser.show(file, width, scheme)
        wide = await browser.ask("document.documentElement.scrollWidth")
        paper = await browser.ask("getComputedStyle(document.body).backgroundColor")
        texts = """[...document.querySelectorAll("svg text")].map(
            (text) => text.getBoundingClientRect().height)"""
        heights = await browser.ask(texts)
        title = await browser.ask("document.title")
        await browser.ask('document.querySelector("details").open = true')
        await browser.picture(tmp_path / f"{width}-{scheme}.png")
        return wide, paper, min(heights), title, browser

    wide, paper, smallest, title, browser = chromium(job)
    assert wide <= width
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}[scheme]
    assert smallest >= 9  # px, of the figures' letters
    assert title == "Scores"
    assert browser.complaints == []
    assert browser.requests == [file.as_uri()]


def test_a_script_that_is_not_the_pages_own_does_not_run(runs, chromium, tmp_path):
    (file, *_), _ = built()
    bad = file.with_name("bad.html")
    bad.write_text(
        file.read_text().replace("<h1>", "<script>document.title = 'taken'</script><h1>")
    )

    async def job(browser):
        await browser.show(bad, 1400, "light")
        return await browser.ask("document.title"), browser.complaints

    title, complaints = chromium(job)
    assert title == "Scores" and "Content Security Policy" in json.dumps(complaints)


def test_filters_and_sorting_work(runs, chromium):
    (file, *_), page = built()
    rows = [row for row in page.rows if len(row) == 9][1:]
    typed = """(id, value) => { const e = document.getElementById(id); e.value = value;
        e.dispatchEvent(new Event("input", {bubbles: true})); }"""
    seen = """[...document.querySelectorAll(".scores tbody tr")].filter((row) => !row.hidden)
        .map((row) => [...row.cells].map((cell) => cell.dataset.sort ?? cell.textContent))"""
    click = 'document.querySelectorAll(".scores th button")[{}].click()'
    articles = """[...document.querySelectorAll("article")].filter((part) => !part.hidden)
        .map((part) => [...part.querySelectorAll("details")].filter((row) => !row.hidden).length)"""

    async def job(browser):
        await browser.show(file, 1400, "light")
        assert len(await browser.ask(seen)) == len(rows)
        await browser.ask(f'({typed})("find", "FPB r4")')
        result = await browser.ask(seen)
        assert 0 < len(result) < len(rows) and {row[0] for row in result} == {"fpb"}
        assert await browser.ask('document.getElementById("count").textContent') == str(len(result))
        await browser.ask(f'({typed})("find", "")')
        await browser.ask(f'({typed})("metric", "main")')
        result = await browser.ask(seen)
        assert [row[3] for row in result] == ["accuracy"] * 4
        await browser.ask(f'({typed})("metric", "")')
        for direction in (1, -1):
            await browser.ask(click.format(4))
            scores = [float(row[4]) for row in await browser.ask(seen)]
            assert scores == sorted(scores)[::direction] and len(set(scores)) > 2
        await browser.ask(click.format(5))  # bases have no gain: they stay last
        gains = [row[5] for row in await browser.ask(seen)]
        last = gains.index("–")
        assert set(gains[last:]) == {"–"}
        assert [float(g) for g in gains[:last]] == sorted(float(g) for g in gains[:last])
        await browser.ask(click.format(0))
        names = [row[0] for row in await browser.ask(seen)]
        assert names == sorted(names)

        assert await browser.ask(articles) == [report_page.WRONG, report_page.WRONG, 12, 12]
        await browser.ask(f'({typed})("dataset", "fiqa")')
        assert await browser.ask(articles) == [report_page.WRONG, 12]
        await browser.ask(f'({typed})("seek", "row 110 says")')
        assert await browser.ask(articles) == [1]
        assert browser.complaints == []

    chromium(job)
