"""Predicting: any format in and the same format out, with the answers of `make eval` beside."""

import csv
import gzip
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime

import pyarrow
import pytest
from pyarrow import parquet

from evals import run as evaluation
from evals.endpoint import Endpoint
from tests.conftest import call, run_first
from tests.test_backends import answered, server  # noqa: F401
from tests.test_eval import workplace  # noqa: F401
from tools import common, sources
from tools.common import WrongInput
from tools.data.formats import open_rows
from tools.use import predict

LABELS = ["negative", "neutral", "positive"]


def reply(handler, times, body):
    """An endpoint whose answer follows from the prompt."""
    text = body["messages"][-1]["content"]
    handler.reply(answered(f"It is {LABELS[len(text) % 3].upper()}."))
    return True


def word(text):
    """A headline as the prompts of `fpb` word it."""
    return sources.word_text("sentiment", text)


def expect_answer(text):
    return LABELS[len(word(text)) % 3]


@pytest.fixture
def endpoint(server):  # noqa: F811
    server.misbehave = reply
    return server


def ask(monkeypatch, endpoint, data, out, *more):
    model = ["--backend", "openai", "--base-url", endpoint.url, "--model-name", "teacher"]
    call(monkeypatch, "predict", "--data", data, "--out", out, *model, *more)


def write_rows(path, texts):
    """A file of headlines in the format of its suffix, with a column of its own beside."""
    rows = [{"id": f"r{n}", "text": text} for n, text in enumerate(texts)]
    name = path.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        content = "".join(json.dumps(row) + "\n" for row in rows)
    elif name.endswith(".json"):
        content = json.dumps(rows, indent=1)
    else:
        mark = "\t" if name.endswith(".tsv") else ";"
        content = "".join(mark.join(row) + "\r\n" for row in (rows[0], *map(dict.values, rows)))
    encoding = "utf-16" if name.startswith("wide") else "utf-8"
    pack = gzip.compress if path.suffix == ".gz" else bytes
    path.write_bytes(pack(content.encode(encoding)))


@pytest.mark.parametrize(
    "name",
    run_first(3, ["a.jsonl", "wide.csv", "a.csv.gz", "a.json", "a.csv", "a.tsv", "a.jsonl.gz"]),
)
def test_a_text_format_comes_back_with_the_answers(name, endpoint, tmp_path, monkeypatch):
    data, out = tmp_path / name, tmp_path / f"out_{name}"
    texts = [f"Die Aktie fällt um {'9' * n} Prozent" for n in range(7)]
    write_rows(data, texts)
    ask(monkeypatch, endpoint, data, out, "--task", "fpb")
    before, after = open_rows(str(data)), open_rows(str(out))
    assert (after.format, after.encoding) == (before.format, before.encoding)
    assert after.columns == ["id", "text", "predicted"]
    rows = [row for _, row in after]
    assert [row["text"] for row in rows] == texts
    assert [row["predicted"] for row in rows] == list(map(expect_answer, texts))
    if before.table:
        assert after.table.delimiter == before.table.delimiter
        assert after.table.line_end == "\r\n"


def make_table():
    names = ["down", "up"]
    metadata = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    metadata["info"]["features"]["text"] = {"dtype": "string", "_type": "Value"}
    metadata["info"]["features"]["when"] = {"dtype": "timestamp[us]", "_type": "Value"}
    columns = {
        "text": pyarrow.array(["Sales rose", "Sales fell sharply"]),
        "label": pyarrow.array([1, 0]),
        "when": pyarrow.array([datetime(2024, 1, 2, 3, 4, 5), None], pyarrow.timestamp("us")),
    }
    table = pyarrow.table(columns)
    return table.replace_schema_metadata({"huggingface": json.dumps(metadata)})


@pytest.mark.parametrize("kind", ["parquet", "folder", "arrow"])
def test_a_columnar_format_keeps_types_and_labels(kind, endpoint, tmp_path, monkeypatch):
    from datasets import Dataset, load_from_disk

    data, out = tmp_path / f"rows.{kind}", tmp_path / f"out.{kind}"
    table = make_table()
    if kind == "parquet":
        parquet.write_table(table, data)
    elif kind == "arrow":
        with pyarrow.ipc.new_stream(data, table.schema) as stream:
            stream.write_table(table)
    else:
        Dataset(table).save_to_disk(data)
    ask(monkeypatch, endpoint, data, out, "--task", "fpb", "--map", "prompt=text")
    rows = open_rows(str(out))
    assert rows.columns == ["text", "label", "when", "predicted"]
    assert rows.label_names == {"label": ["down", "up"]}
    assert [row for _, row in rows] == [
        row | {"predicted": expect_answer(row["text"])} for row in table.to_pylist()
    ]
    if kind == "folder":
        assert load_from_disk(out).features["label"].names == ["down", "up"]


def test_rows_without_an_answer_are_named_and_the_rest_goes_on(
    endpoint, tmp_path, monkeypatch, capsys
):
    data, out = tmp_path / "rows.csv", tmp_path / "out.csv"
    data.write_text("text,predicted\nSales rose,x\n,y\nOne,two,three\nRefuse this,z\nFell,w\n")

    def refuse(handler, times, body):
        if "Refuse" in body["messages"][-1]["content"]:
            return handler.reply({"error": {"message": "flagged"}}, 400) or True
        return reply(handler, times, body)

    endpoint.misbehave = refuse
    with pytest.raises(SystemExit) as end:
        ask(monkeypatch, endpoint, data, out, "--task", "fpb")
    assert end.value.code == 1
    printed = capsys.readouterr()
    assert (
        'left out   line 3: "text"' in printed.out and "left out   line 4: 3 cells" in printed.out
    )
    assert "3 of 5 rows have no answer" in printed.err
    rows = list(csv.DictReader(out.open()))
    assert [row["predicted"] for row in rows] == ["x", "y", "z", "w"]  # the file's own column
    wanted = [expect_answer("Sales rose"), "", "", expect_answer("Fell")]
    assert [row["predicted_2"] for row in rows] == wanted
    assert "empty" in rows[1]["predicted_error_2"] and "flagged" in rows[2]["predicted_error_2"]


@pytest.mark.slow
def test_a_killed_job_goes_on_from_its_last_row(endpoint, tmp_path, monkeypatch):
    data, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    texts = [f"Sales rose by {n} per cent" + "!" * (n % 3) for n in range(1500)]
    write_rows(data, texts)
    partial = tmp_path / ".out.jsonl.partial.jsonl"

    def stall(handler, times, body):
        if len(endpoint.asked) > 1200:  # in the second chunk
            endpoint.over.wait(60)
        return reply(handler, times, body)

    endpoint.misbehave = stall
    command = ["predict", "--task", "fpb", "--data", data, "--out", out, "--backend", "openai"]
    command += ["--base-url", endpoint.url, "--model-name", "teacher"]
    arguments = [sys.executable, "-m", "tools", *map(str, command)]
    job = subprocess.Popen(arguments, cwd=common.ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(endpoint.asked) <= 1200 and time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.1)
    time.sleep(0.5)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert not out.exists()
    saved = len(partial.read_text().splitlines()) - 1
    assert saved >= 1190
    with partial.open("a") as file:
        file.write('{"row": 3, "ans')  # the line that was being written
    endpoint.over.set()
    endpoint.asked.clear()
    endpoint.misbehave = reply
    finished = subprocess.run(arguments, cwd=common.ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert f"{saved:,} rows are answered already" in finished.stdout
    assert len(endpoint.asked) == len(texts) - saved
    rows = [row for _, row in open_rows(str(out))]
    assert [row["predicted"] for row in rows] == list(map(expect_answer, texts))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "out.jsonl",
        "rows.jsonl",
    ]


def test_answers_of_other_prompts_are_not_taken_for_these(endpoint, tmp_path, monkeypatch):
    data, out = tmp_path / "rows.csv", tmp_path / "out.csv"
    write_rows(data, ["Sales rose", "Sales fell"])
    request = predict.Request(str(data), out, "fpb", None, "Tone? {text}")
    other = predict.Request(str(data), out, "fpb", None, None)
    limited = replace(request, constrain=True)
    subject = Endpoint(endpoint.url, "teacher", "chat")
    identity = predict.Job(subject, request).saved.identity
    assert identity == predict.Job(subject, request).saved.identity
    assert identity != predict.Job(subject, other).saved.identity
    assert identity != predict.Job(subject, limited).saved.identity
    data.write_text(data.read_text() + "r2;Sales stood\r\n")
    assert identity != predict.Job(subject, request).saved.identity


def make_adapter(base, folder):
    """An adapter that PEFT saved before its first step: the base's own answers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    shape = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    get_peft_model(model, shape).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["fpb", "xbrl_term"])
def test_the_answers_are_those_of_eval(dataset, smollm2, workplace, monkeypatch):  # noqa: F811
    (workplace / "models").symlink_to(common.ROOT / "models")  # the base is named from here
    folder = make_adapter(smollm2, workplace / "adapter")
    count = 12
    call(monkeypatch, "eval", "--adapter", folder, "--tasks", dataset, "--limit", count,
         "--precision", "fp32")  # fmt: skip
    score = next(workplace.rglob(f"{dataset}*sample{count}.json"))
    scores = [json.loads(path.read_text()) for path in workplace.rglob(score.name)]
    predictions = next(
        content["predictions"] for content in scores if content["evaluated"]["adapter_sha256"]
    )
    lines = sources.test_path(dataset).read_text().splitlines()
    chats = [json.loads(lines[number]) for number in evaluation.pick_rows(dataset, count)]
    data, out = workplace / "rows.csv", workplace / "out.csv"
    with data.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["source", "headline"])
        writer.writerows([n, chat["messages"][0]["content"]] for n, chat in enumerate(chats))
    call(monkeypatch, "predict", "--adapter", folder, "--data", data, "--out", out,
         "--task", dataset, "--precision", "fp32")  # fmt: skip
    rows = list(csv.DictReader(out.open()))
    assert [row["source"] for row in rows] == [str(n) for n in range(count)]
    if dataset == "fpb":
        assert [row["predicted"] for row in rows] == [p["answered"] for p in predictions]
        assert {row["predicted"] for row in rows} & set(LABELS)
        for row, prediction in zip(rows, predictions, strict=True):
            shares = {label: float(row[f"p_{label}"]) for label in LABELS}
            assert shares == pytest.approx(prediction["probabilities"], abs=1e-4)
    else:
        assert [row["predicted"] for row in rows] == [p["answer"].strip() for p in predictions]


# ---- prompts


RECORDED = {
    "kind": "text and label",
    "columns": {"prompt": "text", "answer": "label"},
    "options": ["down", "up"],
}
OWN_TASK = {"eval": ["mine"], "shape": RECORDED}


def write_file(path, content):
    path.write_text(content)
    return open_rows(str(path))


def test_prompts_are_made_as_in_training(tmp_path):
    trained = predict.Shape(**RECORDED).build_chat({"text": "Sales rose", "label": "up"})
    request = predict.Request("", tmp_path, "mine")
    same = write_file(tmp_path / "a.csv", "text\nSales rose\n")
    shape = predict.find_shape(same, OWN_TASK, request)
    assert shape.build_prompt({"text": "Sales rose"})["messages"] == trained["messages"][:1]
    other = write_file(tmp_path / "b.csv", "title,day\nSales rose,Monday\n")
    request = predict.Request("", tmp_path, "mine", "prompt=title")
    shape = predict.find_shape(other, OWN_TASK, request)
    row = {"title": "Sales rose", "day": "Monday"}
    assert shape.build_prompt(row)["messages"] == trained["messages"][:1]
    request = predict.Request("", tmp_path, "mine", "prompt=title", "{day}: {title}")
    shape = predict.find_shape(other, OWN_TASK, request)
    assert shape.build_prompt(row)["messages"][0]["content"] == "Monday: Sales rose"


@pytest.mark.parametrize("task", ["sentiment", "fpb"])
@pytest.mark.parametrize(
    "content",
    [
        "headline\nSales rose\n",
        'context\n"{}"\n',
        'headline\n"{}"\n',
        "text,label\nSales rose,up\n",
    ],
)
def test_texts_are_worded_as_finlora_s_and_whole_prompts_are_left_alone(task, content, tmp_path):
    rows = write_file(tmp_path / "a.csv", content.replace("{}", word("Sales rose")))
    shape = predict.find_shape(rows, predict.find_task(task), predict.Request("", tmp_path, task))
    (row,) = (row for _, row in rows)
    assert shape.build_prompt(row)["messages"] == [{"role": "user", "content": word("Sales rose")}]


def test_a_task_without_a_wording_shows_how_its_prompts_read(
    endpoint, tmp_path, monkeypatch, capsys
):
    chat = tmp_path / "headline_test.jsonl"
    turns = [
        {"role": "user", "content": "Instruction: up?"},
        {"role": "assistant", "content": "Yes"},
    ]
    chat.write_text(json.dumps({"messages": turns}) + "\n")
    monkeypatch.setattr(predict, "find_rows", lambda dataset: chat)
    write_rows(tmp_path / "rows.csv", ["Gold rose", "Gold fell"])
    ask(monkeypatch, endpoint, tmp_path / "rows.csv", tmp_path / "out.csv", "--task", "headline")
    printed = capsys.readouterr().out
    assert "in training, a prompt was: Instruction: up?" in printed and "TEMPLATE=" in printed


def test_a_column_that_training_had_and_the_file_has_not_is_named(tmp_path):
    rows = write_file(tmp_path / "b.csv", "title,day\nSales rose,Monday\n")
    with pytest.raises(WrongInput, match=r'no column text, .*MAP="prompt=…"'):
        predict.find_shape(rows, OWN_TASK, predict.Request("", tmp_path, "mine"))


def test_a_file_without_the_passages_of_training_is_refused(tmp_path):
    columns = {"prompt": "question", "context": "passage", "answer": "answer"}
    task = {"eval": ["mine"], "shape": {"kind": "question and answer", "columns": columns}}
    rows = write_file(tmp_path / "b.csv", "question,day\nWhy?,Monday\n")
    with pytest.raises(WrongInput, match=r'no column passage, .*MAP="context=…" names another'):
        predict.find_shape(rows, task, predict.Request("", tmp_path, "mine"))


def test_columns_of_choices_that_are_missing_are_named_and_mapped(tmp_path):
    columns = {"prompt": "question", "choices": "A, B, C", "answer": "answer"}
    shape = {"kind": "question and answer", "columns": columns, "choice_columns": [*"ABC"]}
    rows = write_file(tmp_path / "b.jsonl", '{"question": "q", "options": ["x", "y"]}\n' * 2)
    task = {"eval": ["mine"], "shape": shape}
    with pytest.raises(WrongInput, match=r'no column A, .*MAP="choices=…" names another'):
        predict.find_shape(rows, task, predict.Request("", tmp_path, "mine"))
    request = predict.Request("", tmp_path, "mine", "prompt=question,choices=options")
    chat = predict.find_shape(rows, task, request).build_prompt(next(iter(rows))[1])
    assert chat["messages"][0]["content"] == "q\n\nA. x\nB. y"


def test_texts_are_taken_where_a_task_was_trained_on_turns(tmp_path):
    task = {"eval": ["mine"], "shape": {"kind": "messages", "columns": {"messages": "messages"}}}
    rows = write_file(tmp_path / "b.csv", "question,day\nWhy?,Monday\n")
    shape = predict.find_shape(rows, task, predict.Request("", tmp_path, "mine"))
    assert shape.build_prompt({"question": "Why?"})["messages"] == [
        {"role": "user", "content": "Why?"}
    ]


# ---- refusals


@pytest.mark.parametrize(
    "out, more, message",
    [
        ("there.csv", [], "already exists"),
        ("out.parquet", [], "rows of csv are not written as parquet"),
        ("out.xlsx", [], ".xlsx is none of the formats that are written: .jsonl"),
        ("out.csv", ["--task", "fpbb"], 'unknown task "fpbb"; did you mean fpb'),
        ("out.csv", ["--map", "prompt=headline"], 'names the column "headline"'),
        ("out.csv", ["--adapter", "x"], "do not go with BACKEND=openai"),
    ],
)
def test_wrong_input_is_one_line(out, more, message, endpoint, tmp_path, monkeypatch, capsys):
    data = tmp_path / "rows.csv"
    write_rows(data, ["Sales rose", "Sales fell"])
    (tmp_path / "there.csv").write_text("precious")
    with pytest.raises(SystemExit) as end:
        ask(monkeypatch, endpoint, data, tmp_path / out, *more)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "there.csv").read_text() == "precious" and not endpoint.asked


def test_data_and_out_are_needed(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(monkeypatch, "predict", "sentiment_r4")
    assert "DATA=headlines.csv and OUT=labelled.csv are needed" in capsys.readouterr().err


def test_a_file_with_no_prompt_at_all_is_refused(endpoint, tmp_path, monkeypatch, capsys):
    data = tmp_path / "rows.csv"
    data.write_text("id,text\n1,\n2,\n")
    with pytest.raises(SystemExit):
        ask(monkeypatch, endpoint, data, tmp_path / "out.csv")
    assert "no row has a prompt" in capsys.readouterr().err


def test_of_finished_chunks_nothing_is_held(tmp_path):
    saved = predict.Saved(tmp_path / "a.jsonl", {"identity": "x", "chunk": predict.CHUNK})
    saved.load()
    for number in range(2 * predict.CHUNK + 5):
        saved.add({"row": number, "answer": "a"})
    again = predict.Saved(saved.path, saved.identity)
    again.load()
    assert again.rows == 2 * predict.CHUNK and len(again.open_rows) == 5
    assert [len(chunk) for chunk in again.read_chunks()] == [predict.CHUNK, predict.CHUNK, 5]
