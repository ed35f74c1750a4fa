"""Whether labels of a training file are swapped is decided from its rows, and said everywhere."""

import json
import os
import random
import subprocess
import sys
from collections import Counter

import pytest

from evals import report
from evals import run as evaluation
from tests.chat_files import read_turns, write_rows
from tests.conftest import run
from tools import recipes, sources
from tools.common import ROOT, WrongInput, write_json
from tools.data import convert, swap
from tools.data.chatfile import Options
from tools.hub import card
from tools.subjects import Subject
from tools.train import checks as checks_module

PUBLISHED = ROOT.parent / "shared" / "finlora" / "data" / "test"
SWAP = {"neutral": "positive", "positive": "neutral"}
TWEET = "Instruction: What is the sentiment of this tweet? Please choose an answer from {{negative/"
TWEET += "neutral/positive}}.\nInput: {}\nAnswer: "
NEWS = TWEET.replace("tweet", "news")
SOURCE = Counter(negative=347, neutral=1566, positive=475)


def make_up():
    """(prompt, right answer) of each source, of the sizes of FinLoRA's test sets."""
    posts = Counter(positive=82, negative=42, neutral=4)
    tfns, fiqa = (
        [(TWEET.format(f"{name} {n}"), label) for n, label in enumerate(classes.elements())]
        for name, classes in (("TFNS", SOURCE), ("FiQA", posts))
    )
    fiqa += [(NEWS.format(f"headline {n}"), "positive") for n in range(100)]
    fpb = [(NEWS.format(f"FPB {n}"), "neutral") for n in range(300)]
    return {"tfns": tfns, "fiqa": fiqa, "fpb": fpb}


def read_published():
    """The same of FinLoRA's own test files; the swap in that of TFNS is undone."""
    if not (PUBLISHED / "tfns_test.jsonl").is_file():
        pytest.skip("FinLoRA's test files are not beside the repository, in ../shared/finlora")
    parts: dict = {}
    for name in ("tfns", "fiqa", "fpb"):
        lines = (PUBLISHED / f"{name}_test.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        parts[name] = [(row["context"], row["target"]) for row in rows]
    parts["tfns"] = [(prompt, SWAP.get(answer, answer)) for prompt, answer in parts["tfns"]]
    return parts


@pytest.fixture(params=["made up", "published"])
def parts(request):
    return make_up() if request.param == "made up" else read_published()


def swap_labels(rows):
    return [(prompt, SWAP.get(answer, answer)) for prompt, answer in rows]


def construct(parts, tfns):
    """Rows as the script that builds FinLoRA's training file joins them, shuffled."""
    nwgi = [(f"What is the sentiment of this news? Text {n}", "mildly positive") for n in range(90)]
    rows = parts["fpb"] * 6 + parts["fiqa"] * 21 + tfns * 2 + nwgi
    random.Random(5).shuffle(rows)
    return rows


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHAT", tmp_path / "chat")
    return tmp_path


def write(folder, rows, file="train/finlora_sentiment_train.jsonl"):
    return write_rows(folder / file, rows)


def read_converted(task="sentiment"):
    """All rows of a converted training set, with those that validate."""
    return read_turns(sources.train_path(task)) + read_turns(sources.val_path(task))


def strip(rows):
    return Counter((prompt.strip(), answer) for prompt, answer in rows)


def read_check(task="sentiment"):
    return sources.manifest(sources.train_path(task))["label_check"]


def test_right_labels_stay(folder, parts):
    rows = construct(parts, parts["tfns"])
    write(folder, rows)
    convert.convert_task("sentiment", folder)
    assert strip(read_converted()) == strip(rows)
    check = read_check()
    assert check["outcome"] == "unchanged"
    assert check["text"].startswith("unchanged, shares as the source's: ")
    assert check["seen"] == dict(SOURCE)
    assert sources.manifest(sources.train_path("sentiment"))["repair"] is None


def test_swapped_labels_are_repaired_in_the_rows_of_their_source_alone(folder, parts, capsys):
    write(folder, construct(parts, swap_labels(parts["tfns"])))
    convert.convert_task("sentiment", folder)
    assert strip(read_converted()) == strip(construct(parts, parts["tfns"]))
    manifest = sources.manifest(sources.train_path("sentiment"))
    check = manifest["label_check"]
    assert (check["outcome"], check["rows"]) == ("repaired", 2 * SOURCE.total())
    assert manifest["repair"] == check["text"]
    held_out = sources.manifest(sources.val_path("sentiment"))
    assert held_out["label_check"] == check
    assert "repaired, neutral and positive were swapped in 4,776 rows" in capsys.readouterr().out


def test_half_swapped_labels_stop_the_conversion_until_a_person_decides(folder, parts):
    draw = random.Random(1)
    tfns = [(p, SWAP.get(a, a) if draw.random() < 0.5 else a) for p, a in parts["tfns"]]
    rows = construct(parts, tfns)
    write(folder, rows)
    with pytest.raises(WrongInput) as error:
        convert.convert_task("sentiment", folder)
    message = str(error.value)
    assert "finlora_sentiment_train.jsonl" in message and "\n" not in message
    assert "REPAIR=1 swaps them in the 4,776 rows" in message and "REPAIR=0 leaves" in message
    assert "the source has negative 14.5 %, neutral 65.6 %, positive 19.9 %" in message
    assert not sources.train_path("sentiment").exists()
    convert.convert_task("sentiment", folder, Options(repair=False))
    assert strip(read_converted()) == strip(rows)
    assert read_check()["text"].startswith("REPAIR=0, by hand: unchanged")
    convert.convert_task("sentiment", folder, Options(repair=True))
    assert strip(read_converted()) == strip(construct(parts, swap_labels(tfns)))
    assert read_check()["outcome"] == "forced"


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("right", [False, True])
def test_a_person_may_decide_against_the_rows(folder, right, repair):
    parts = make_up()
    tfns = parts["tfns"] if right else swap_labels(parts["tfns"])
    write(folder, construct(parts, tfns))
    convert.convert_task("sentiment", folder, Options(repair=repair))
    expected = swap_labels(tfns) if repair else tfns
    assert strip(read_converted()) == strip(construct(parts, expected))
    assert read_check()["text"].startswith(f"REPAIR={int(repair)}, by hand: ")


def test_the_command_decides_stops_and_is_overruled(folder):
    data, parts = folder / "finlora" / "data", make_up()
    source = write(data, construct(parts, swap_labels(parts["tfns"])))
    place = sources.CHAT
    script = (
        "import sys; from pathlib import Path; from tools import sources; "
        "from tools.__main__ import main; "
        f"sources.CHAT = Path({str(place)!r}); sys.argv[1:1] = ['data', 'sentiment']; main()"
    )

    def command(*option):
        return subprocess.run(
            [sys.executable, "-c", script, *option],
            cwd=ROOT,
            env=os.environ | {"FINLORA_DATA": str(data.parent), "REPAIR": "1"},
            capture_output=True,
            text=True,
        )

    done = command()
    assert done.returncode == 0, done.stderr
    assert "repaired, neutral and positive were swapped" in done.stdout
    assert read_check()["outcome"] == "repaired"
    done = command("--no-repair")
    assert "REPAIR=0, by hand: unchanged" in done.stdout and read_check()["outcome"] == "forced"
    half = swap_labels(parts["tfns"][::2]) + parts["tfns"][1::2]
    write(data, construct(parts, half))
    done = command()
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"{source}: its rows do not tell whether neutral and positive are swapped" in done.stderr


@pytest.mark.slow
def test_the_file_that_was_replaced_stays_whatever_its_size(folder):
    """3,634 x 6 + 938 x 21 + 9,543 x 2 + 16,184 rows, of which the labels are right."""
    # The counts of the source's training split.
    labels = Counter(negative=1442, neutral=6178, positive=1923).elements()
    tfns = [(TWEET.format(f"TFNS {label} {n}"), label) for n, label in enumerate(labels)]
    posts = [(TWEET.format(f"FiQA {n}"), "positive" if n % 3 else "negative") for n in range(500)]
    posts += [(NEWS.format(f"headline {n}"), "positive") for n in range(438)]
    fpb = [(NEWS.format(f"FPB {n}"), "neutral") for n in range(3634)]
    nwgi = [(NEWS.format(f"NWGI {n}"), "strong positive") for n in range(16184)]
    for tweets, outcome in ((tfns, "unchanged"), (swap_labels(tfns), "repaired")):
        rows = fpb * 6 + posts * 21 + tweets * 2 + nwgi
        assert len(rows) == 76772
        write(folder, rows)
        convert.convert_task("sentiment", folder)
        assert read_check()["outcome"] == outcome
        assert strip(read_converted()) == strip(fpb * 6 + posts * 21 + tfns * 2 + nwgi)
        assert sources.manifest(sources.train_path("sentiment"))["rows"] == 76772 - 1536


def test_copies_that_fit_both_sources_and_prompts_with_two_labels(folder):
    parts = make_up()
    twice = (TWEET.format("FiQA, two posts alike"), "neutral")  # 42 copies
    torn = [(TWEET.format("FiQA, of two minds"), label) for label in ("neutral", "negative")]
    parts["fiqa"] += [twice, twice, *torn]
    again = [(TWEET.format("TFNS, three times"), "neutral")] * 3
    both = [(TWEET.format("TFNS, of two minds"), label) for label in ("neutral", "positive")]
    parts["tfns"] += again + both
    write(folder, construct(parts, swap_labels(parts["tfns"])))
    convert.convert_task("sentiment", folder)
    assert strip(read_converted()) == strip(construct(parts, parts["tfns"]))
    assert read_check()["fit_both_sources"] == 1
    assert "1 prompts have copies that fit both sources" in read_check()["text"]


@pytest.mark.parametrize("kind", ["deduplicated", "sampled"])
def test_where_copies_tell_nothing_right_labels_stay_and_swapped_ones_stop(folder, kind):
    parts = make_up()

    def thin(rows):
        if kind == "deduplicated":
            return list(dict.fromkeys(rows))
        return random.Random(3).sample(rows, len(rows) // 4)

    right = thin(construct(parts, parts["tfns"]))
    write(folder, right)
    convert.convert_task("sentiment", folder)
    assert strip(read_converted()) == strip(right)
    assert read_check()["outcome"] == "unchanged" and not read_check()["copies_tell_sources_apart"]
    write(folder, thin(construct(parts, swap_labels(parts["tfns"]))))
    with pytest.raises(WrongInput, match="which rows are swapped.*copies do not tell them apart"):
        convert.convert_task("sentiment", folder)


def test_files_without_rows_of_the_source_stay_as_they_are(folder):
    parts = make_up()
    write(folder, parts["fpb"] * 6)
    convert.convert_task("sentiment", folder)
    assert read_check() is None
    write(folder, parts["fpb"] * 6 + parts["fiqa"] * 21)
    convert.convert_task("sentiment", folder)
    assert read_check()["text"].startswith("unchanged: no TFNS rows")
    convert.convert_task("sentiment", sources.SAMPLE)
    assert read_check() is None


def test_few_rows_do_not_tell(folder):
    parts = make_up()
    parts["tfns"] = parts["tfns"][::1200]
    write(folder, construct(parts, parts["tfns"]))
    with pytest.raises(WrongInput, match="do not tell"):
        convert.convert_task("sentiment", folder)


def test_a_bad_row_is_named_before_anything_is_decided(folder):
    parts = make_up()
    path = write(folder, construct(parts, swap_labels(parts["tfns"])))
    path.write_text(path.read_text() + '{"context": "x"}\n')
    with pytest.raises(WrongInput, match='line 7[0-9]*|the key "target" is missing'):
        convert.convert_task("sentiment", folder)
    convert.convert_task("sentiment", folder, Options(quarantine=True))
    assert read_check()["outcome"] == "repaired"
    assert sources.manifest(sources.train_path("sentiment"))["refused"] == 1


def test_a_joined_set_has_the_repaired_rows_and_says_so(folder):
    parts = make_up()
    write(folder, construct(parts, swap_labels(parts["tfns"])))
    names = [(f"Who is number {n}?", "person") for n in range(9000)]
    write(folder, names, "train/ner_train.jsonl")
    headlines = [(f"Did gold rise on {n}?", "Yes") for n in range(9000)]
    write(folder, headlines, "train/headline_train.jsonl")
    for task in ("sentiment", "headline", "ner", "general_multi"):
        convert.convert_task(task, folder)
    right = strip(construct(parts, parts["tfns"]))
    joined = strip(read_converted("general_multi"))
    assert read_check("general_multi")["outcome"] == "repaired"
    assert all(key in right for key in joined if "TFNS" in key[0])
    assert sum("TFNS" in prompt for prompt, _ in joined) > 1000


def test_a_multi_task_file_with_such_rows_is_decided_like_any_other(folder):
    parts = make_up()
    rows = construct(parts, swap_labels(parts["tfns"])) + [("Did gold rise?", "Yes")]
    write(folder, rows, "train/multi/general_multi.jsonl")
    convert.convert_task("general_multi", folder)
    assert read_check("general_multi")["outcome"] == "repaired"


@pytest.mark.parametrize("right", [False, True])
def test_another_test_file_of_the_source_is_decided_by_its_rows(folder, parts, right):
    rows = parts["tfns"] if right else swap_labels(parts["tfns"])
    source = write(folder, rows[::-1], "test/other_test.jsonl")  # not the published bytes
    done = run("convert", "tfns", source, folder / "out.jsonl")
    assert done.returncode == 0, done.stderr
    assert strip(read_turns(folder / "out.jsonl")) == strip(parts["tfns"])
    outcome = sources.manifest(folder / "out.jsonl")["label_check"]["outcome"]
    assert outcome == ("unchanged" if right else "repaired")


def test_a_test_file_whose_rows_do_not_tell_stops(folder):
    rows = make_up()["tfns"]
    half = rows[::2] + swap_labels(rows[1::2])
    source = write(folder, half, "test/other_test.jsonl")
    done = run("convert", "tfns", source, folder / "out.jsonl")
    assert done.returncode == 2 and "REPAIR=1" in done.stderr
    arguments = ("tfns", source, folder / "out.jsonl", "--repair")
    assert run("convert", *arguments).returncode == 0
    assert strip(read_turns(folder / "out.jsonl")) == strip(swap_labels(half))


def test_scores_on_tfns_are_compared_with_no_published_ones():
    rows = [{"row": n, "values": {"finlora_accuracy": float(n % 4 > 0)}} for n in range(400)]
    content = {
        "evaluated": {"limit": None, "data_selected": None, "data_from": "data/raw"},
        "metrics": {"finlora_accuracy": {"value": 0.75}},
        "predictions": rows,
        "examples": 400,
    }
    names = ["fpb", "tfns", "tfns_as_published"]
    compared = report.against_published(dict.fromkeys(names, content), "4bits_r4")
    assert list(compared) == ["fpb"]
    for name in names[1:]:
        assert "it is not known on which labels" in report.explain_incomparable(name)


def test_score_files_and_cards_say_what_was_decided(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHAT", tmp_path / "chat")
    parts = make_up()
    write(tmp_path, construct(parts, swap_labels(parts["tfns"])))
    write(tmp_path, parts["tfns"], "test/tfns_test.jsonl")
    convert.convert_task("sentiment", tmp_path)
    config = recipes.build_config("smollm2-135m/sentiment_r4")
    config["datasets"][0]["path"] = str(sources.train_path("sentiment"))
    config["test_datasets"][0]["path"] = str(sources.val_path("sentiment"))
    data = checks_module.describe_data(recipes.Recipe("mine", tmp_path / "mine.yaml", config, "1"))
    assert {entry["label_check"] for entry in data} == {read_check()["text"]}
    write_json(tmp_path / "run.json", {"data": data})
    subject = Subject("mine", config, tmp_path, tmp_path, tmp_path, "sentiment", "chat")
    checks = evaluation.collect_label_checks(subject, "adapter", "tfns")
    assert checks["training"] == read_check()["text"]
    assert checks["test"].startswith("unchanged, shares as the source's")
    assert evaluation.collect_label_checks(subject, "base", "tfns") == {"test": checks["test"]}
    (tmp_path / "run.json").write_text('{"data": [')
    with pytest.raises(WrongInput, match=r"run\.json"):
        evaluation.collect_label_checks(subject, "adapter", "tfns")
    pair = {"adapter": {"label_checks": checks, "evaluated": {"dataset": "tfns"}}}
    assert card.describe_repair(pair) == ""
    message = card.collect_label_checks(data, {"tfns": pair}, {})
    assert message == {"tfns": checks["test"], "training": checks["training"]}


def test_the_distance_allows_for_chance_on_few_rows():
    few, many = (swap.Evidence(Counter({"neutral": n}), n, frozenset()) for n in (50, 50_000))
    assert (
        swap.compute_allowance(few, SOURCE)
        > 2 * swap.compute_allowance(many, SOURCE)
        > 2 * swap.SLACK
    )
    draw = random.Random(0)
    names = list(SOURCE.elements())
    for size in (200, 2000):  # 400 honest samples: never taken for swapped, rarely for unclear
        verdicts = Counter(
            swap.judge(swap.Evidence(Counter(draw.choices(names, k=size)), size, frozenset()))[0]
            for _ in range(200)
        )
        assert verdicts["swapped"] == 0 and verdicts["right"] >= 198
