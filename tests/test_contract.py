"""A row of any shape is trained on, scored, chatted with and served as the same tokens; and a model
that answers with the key is right in every task that `make new` can write.

Each base's real tokenizer is used where it is at hand (see tests/tokenizers.py).
"""

import copy
import io
import json
import logging
import operator
import shutil
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from datasets import load_dataset, load_from_disk
from lm_eval.api.model import LM

from evals import backends
from evals import own as evaluations
from evals import run as evaluation
from evals.answers import Answers, Prompts
from evals.endpoint import Endpoint
from evals.tasks import own, utils
from tests import tokenizers
from tests.conftest import run, run_first, write_recipe
from tools import common, custom, models, prompts, recipes, sources, subjects
from tools.data import bases, turns
from tools.train import checks
from tools.use import chat, serve


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


TOOL = {
    "type": "function",
    "function": {
        "name": "find_price",
        "description": "The price of a share",
        "parameters": {
            "type": "object",
            "properties": {"ticker": {"type": "string"}, "lots": {"type": "integer"}},
            "required": ["ticker"],
        },
    },
}
CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "find_price", "arguments": '{"ticker": "ALD", "lots": 2}'},
}
RESULT = {"role": "tool", "name": "find_price", "tool_call_id": "abcdefghi", "content": "12.50"}
ROWS = {
    "one turn": [user("Sales rose.\nAnswer:"), assistant("positive")],
    "system turn": [system("You label news."), user("Sales rose."), assistant("positive")],
    "three turns": [
        user("Sales rose."),
        assistant("positive"),
        user("How sure?"),
        assistant("Quite.\n\nReally."),
        user("Why?"),
        assistant("Sales rose by 12.5 %."),
    ],
    "system and turns": [
        system("You label news."),
        user("Sales rose."),
        assistant("positive"),
        user("How sure?"),
        assistant("Quite."),
    ],
    "list": [user("List the firms."), assistant('["Alder", "Fjord"]')],
    "other script": [user("这条新闻怎么样?"), assistant("正面")],
    "call": [user("What is ALD?"), assistant("", tool_calls=[CALL])],
    "call and result": [
        user("What is ALD?"),
        assistant("", tool_calls=[CALL]),
        RESULT,
        assistant("It is 12.50."),
    ],
}
# What a base's template refuses or leaves out, and what the message says of it.
LIMITS = {
    ("gemma-3-4b", "call"): "leaves out the tool find_price",
    ("gemma-3-4b", "call and result"): "refuses the turns user, assistant, tool, assistant",
    ("smollm2-135m", "call"): "leaves out the tool find_price",
    ("smollm2-135m", "call and result"): "leaves out the tool find_price",
    ("smollm3-3b", "call"): "leaves out the tool find_price",
    ("smollm3-3b", "call and result"): "leaves out the tool find_price",
    ("mistral-7b-v0.3", "system turn"): "leaves out a turn of the role system",
    ("mistral-7b-v0.3", "system and turns"): "leaves out a turn of the role system",
    # Axolotl puts a text in the place of the call to find it, and the roles do not alternate then.
    ("mistral-7b-v0.3", "call and result"): "refuses the turns user, assistant, tool, assistant",
}


def build_row(shape):
    tools = {"tools": [TOOL]} if "call" in shape else {}
    return {"messages": copy.deepcopy(ROWS[shape]), **tools}


@cache
def load_strategy(model):
    """What makes Axolotl's tokens of a base's rows."""
    from axolotl.prompt_strategies.chat_template import StrategyLoader
    from axolotl.utils.dict import DictDefault

    logging.getLogger("axolotl").setLevel(logging.ERROR)
    config = DictDefault(recipes.find(f"{model}/sentiment_r4").config)
    entry = DictDefault(dict(config.datasets[0]) | {"message_field_training": "train"})
    return StrategyLoader()(tokenizers.load(model), config, entry)


def tokenize(model, row):
    """What Axolotl trains on of a row: (ids, labels)."""
    result = load_strategy(model).tokenize_prompt(copy.deepcopy(row))
    return result["input_ids"], result["labels"]


def read_trained(tokenizer, labels):
    """The texts that the loss falls on."""
    parts, last = [], -100
    for label in labels:
        if label != -100:
            parts += [[]] if last == -100 else []
            parts[-1].append(label)
        last = label
    return [tokenizer.decode(part) for part in parts]


def get_options(model):
    return recipes.find(f"{model}/sentiment_r4").config.get("chat_template_kwargs")


@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("model", tokenizers.BASES)
def test_training_and_scoring_see_the_same_tokens(model, shape):
    tokenizer, row, options = tokenizers.load(model), build_row(shape), get_options(model)
    reason = prompts.explain_unrenderable(tokenizer, row, options)
    if words := LIMITS.get((model, shape)):
        assert words in reason
        return
    assert not reason
    ids, labels = tokenize(model, row)
    messages, tools = prompts.read_conversation(row)
    fed = prompts.tokens(tokenizer, messages[:-1], options, tools=tools)
    assert ids[: len(fed)] == fed
    assert labels[len(fed) - 1] == -100
    # The loss falls on the assistant's turns and their end tokens, and on nothing else.
    turns = [turn for turn in row["messages"] if turn["role"] == "assistant"]
    trained = read_trained(tokenizer, labels)
    assert len(trained) == len(turns)
    for turn, text in zip(turns, trained, strict=True):
        assert text.endswith(tokenizer.eos_token)
        answer = text.removesuffix(tokenizer.eos_token)
        if turn.get("tool_calls") and model == "qwen3.5-4b":
            # It writes calls as XML, which the scoring of calls does not read (docs/limits.md).
            assert "<function=find_price>" in answer and "ALD" in answer
        elif turn.get("tool_calls"):
            assert own.read_calls(answer) == own.read_calls(json.dumps(turn["tool_calls"]))
        else:
            assert answer == turn["content"]
    # Between the prompt and the first trained token there is a blank at the most: Mistral's "▁".
    first = next(place for place in range(len(fed), len(ids)) if labels[place] != -100)
    assert not tokenizer.decode(ids[len(fed) : first]).strip()


@pytest.mark.parametrize("model", tokenizers.BASES)
def test_earlier_answers_are_asked_for_as_they_were_trained_but_by_qwen3(model):
    tokenizer, options = tokenizers.load(model), get_options(model)
    for shape in ("three turns", "system and turns"):
        if (model, shape) in LIMITS:
            continue
        row = build_row(shape)
        text = prompts.render_row(tokenizer, row, options)
        for place, turn in enumerate(row["messages"][:-1]):
            if turn["role"] == "assistant":
                prompt = prompts.render(tokenizer, row["messages"][:place], options)
                if model in ("qwen3-8b", "qwen3.5-4b"):
                    prompt = prompt.removesuffix("<think>\n\n</think>\n\n")
                blank = " " if model == "mistral-7b-v0.3" else ""
                assert text.startswith(f"{prompt}{blank}{turn['content']}")


def test_an_answer_with_reasoning_is_named_where_its_prompt_forbids_it():
    reasoned = assistant("<think>\nSales rose.\n</think>\n\npositive")
    row = {"messages": [user("Sales rose."), reasoned]}
    assert list(prompts.pick_shapes([build_row("one turn"), row])) == [(2, row)]
    reason = prompts.explain_unrenderable(
        tokenizers.load("qwen3-8b"), row, {"enable_thinking": False}
    )
    assert "which no answer is trained after" in reason and "</think>" in reason
    for model in ("llama-3.1-8b", "smollm2-135m"):
        assert not prompts.explain_unrenderable(tokenizers.load(model), row, get_options(model))


@pytest.mark.parametrize("model", tokenizers.BASES)
def test_the_loss_falls_on_the_last_turn_alone_where_the_others_say_so(model):
    tokenizer, row = tokenizers.load(model), build_row("three turns")
    for turn in row["messages"][:-1]:
        turn |= {"train": False} if turn["role"] == "assistant" else {}
    _, labels = tokenize(model, row)
    assert read_trained(tokenizer, labels) == [f"Sales rose by 12.5 %.{tokenizer.eos_token}"]


@pytest.mark.slow
def test_a_run_trains_on_the_tokens_that_the_tests_compare(tiny, tmp_path):
    shapes = [shape for shape in ROWS if "call" not in shape]
    rows = [build_row(shape) for shape in shapes for _ in range(4)]
    for turn in (turn for row in rows[::2] for turn in row["messages"][:-1]):
        turn |= {"train": False} if turn["role"] == "assistant" else {}
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = write_recipe(tmp_path, "r4", tiny, data, max_steps=2, val_set_size=0)
    config = yaml.safe_load(recipe.read_text())
    config["datasets"][0]["message_field_training"] = "train"
    recipe.write_text(yaml.safe_dump({key: v for key, v in config.items() if key != "eval_steps"}))
    done = run("train", recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    (prepared,) = (path for path in (tmp_path / "r4" / "prepared").iterdir() if path.is_dir())
    trained = load_from_disk(str(prepared))
    expected = [tokenize("smollm2-135m", row) for row in rows]
    key = operator.itemgetter("input_ids", "labels")
    assert sorted(map(key, trained)) == sorted(expected)


@pytest.mark.parametrize("model", tokenizers.BASES)
def test_a_row_is_rendered_alike_whatever_other_rows_a_file_has(model, tmp_path):
    tokenizer, options = tokenizers.load(model), get_options(model)
    shapes = [shape for shape in ROWS if (model, shape) not in LIMITS]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(build_row(shape)) + "\n" for shape in shapes))
    loaded = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path))
    for shape, read in zip(shapes, loaded, strict=True):
        messages, tools = prompts.read_conversation(build_row(shape))
        text = prompts.render(tokenizer, messages[:-1], options, tools=tools)
        again, tools = prompts.read_conversation(read)
        assert prompts.render(tokenizer, again[:-1], options, tools=tools) == text
        assert tokenize(model, read) == tokenize(model, build_row(shape))


@pytest.mark.parametrize("shape", ["one turn", "three turns", "other script"])
def test_mistrals_own_library_has_the_same_tokens(shape):
    from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    kinds = {"user": UserMessage, "assistant": AssistantMessage}
    turns = ROWS[shape][:-1]
    request = ChatCompletionRequest(
        messages=[kinds[turn["role"]](content=turn["content"]) for turn in turns]
    )
    expected = MistralTokenizer.v3(is_tekken=False).encode_chat_completion(request).tokens
    assert prompts.tokens(tokenizers.load("mistral-7b-v0.3"), turns) == expected


# ---- a model that answers with the key


def labels_of(count):
    return [f"class {number}" for number in range(count)]


PARAGRAPH = "Revenue rose to 12,345.67 million, while costs — as in 2023 — fell by 8 %. " * 12
# What answers can be, by kind; each stands for a task that `make new` makes.
ANSWERS = {
    "labels": ["negative", "neutral", "positive"],
    "many classes": labels_of(77),
    "labels of several words": ["Strong Buy", "buy", "HOLD – no action", "sell (all)"],
    "labels with one another in them": ["up", "strongly up", "up or flat"],
    "letters": ["A", "B", "C", "D"],
    "ratings": ["AAA", "AA+", "AA", "AA-", "A", "BBB+", "B", "D"],
    "integers as labels": ["-1", "0", "1"],
    "stars": ["1", "2", "10"],
    "case alone": ["US", "us"],
    "Chinese": ["正面", "负面", "非正面"],
    "Arabic": ["إيجابي", "سلبي"],
    "Finnish": ["myönteinen", "kielteinen", "epäselvä"],
    "signs": ["+", "-", "?"],
    "amounts": [f"{1234567890123 + 9999991 * n}.{n % 90 + 10}" for n in range(20)],
    "money": [f"${n}.{n % 10} million" for n in range(3, 23)],
    "percent": [f"-{n},5 %" for n in range(20)],
    "lists": [json.dumps(["Alder", f"Firm {n}"]) for n in range(20)],
    "lists of one another": [json.dumps([n, [n + 1, None]]) for n in range(20)],
    "objects": [
        json.dumps({"firm": f"Älder {n}", "parts": [n, True], "x": None}) for n in range(9)
    ],
    "text": [f"{PARAGRAPH}It was {n}." for n in range(12)],
    "short text": [f"Up, as page {n} says." for n in range(12)],
    "text in Chinese": [f"公司在{n}年的销售额增长了。利润也是。" for n in range(12)],
    "text without words": ["…" * n for n in range(1, 12)],
    "code": [f"```\nSELECT {n}\n  FROM t;\n```" for n in range(12)],
}


class Echo(LM):
    """Answers with the tokens that a base is trained to answer with: those of the row's last turn,
    cut at the budget, stopped at the end token and decoded as evals/model.py does.
    """

    tokenizer_name = "real"
    max_length = 100_000

    def __init__(self, model, tokenizer):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    def generate_until(self, requests, **options):
        answers = []
        for request in requests:
            text, settings = request.args
            ids, labels = tokenize(self.model, request.doc)
            fed = self.tokenizer.encode(text, add_special_tokens=False)
            assert ids[: len(fed)] == fed
            new = ids[len(fed) :][: settings["max_gen_toks"]]
            if self.tokenizer.eos_token_id in new:
                new = new[: new.index(self.tokenizer.eos_token_id)]
            answers.append(self.tokenizer.decode(new, skip_special_tokens=True))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A project folder whose evaluations and rows a test writes."""
    shutil.copytree(evaluation.TASKS, tmp_path / "evals" / "tasks")
    shutil.rmtree(tmp_path / "evals" / "tasks" / "local", ignore_errors=True)
    monkeypatch.setattr(evaluation, "TASKS", tmp_path / "evals" / "tasks")
    monkeypatch.setattr(sources, "CHAT", tmp_path / "data" / "chat")
    monkeypatch.chdir(tmp_path)
    evaluation.read_tasks.cache_clear()
    yield tmp_path
    evaluation.read_tasks.cache_clear()


def write_task(folder, name, rows):
    """The files of a task as `make new` and `make data` leave them."""
    answers = [utils.key(row) for row in rows]
    labels = evaluations.find_labels(answers)
    content = evaluations.build_evaluation(name, answers, labels)
    path = folder / "evals" / "tasks" / "local" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    data = sources.test_path(name)
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = {"sha256": common.digest(data), "labels": dict.fromkeys(labels, 1)}
    common.write_json(sources.manifest_path(data), facts)
    evaluation.read_tasks.cache_clear()
    return content


def repeat_answers(answers):
    """Rows with some answers; where they are few, each stands in as many rows as labels need."""
    copies = 6 if len(answers) < 10 or answers == labels_of(77) else 1
    return [
        {"messages": [user(f"Question {n} of {len(answers)}?"), assistant(answer)]}
        for n, answer in enumerate(answers * copies)
    ]


def measure(lm, name, answers=None):
    options = get_options(lm.model)
    return evaluation.measure(lm, name, None, Prompts("chat", options), answers)


def find_wrong(rows):
    """The metrics that some row does not have in full."""
    return {
        metric
        for row in rows
        for metric, value in row["values"].items()
        if not (all(e == a for e, a in value) if isinstance(value, list) else value == 1)
    }


@pytest.mark.slow
@pytest.mark.parametrize("model", tokenizers.BASES)
def test_a_model_that_answers_with_the_key_is_right_in_every_metric(model, place):
    lm = Echo(model, tokenizers.load(model))
    tasks = {name: repeat_answers(answers) for name, answers in ANSWERS.items()}
    for shape in ROWS:
        if (model, shape) not in LIMITS:
            tasks[f"rows of {shape}"] = [build_row(shape)] * 5
    for number, (what, rows) in enumerate(tasks.items()):
        write_task(place, f"task_{number}", rows)
        answered, left_out = measure(lm, f"task_{number}")
        assert len(answered) == len(rows)
        assert all(row["values"] for row in answered) and not find_wrong(answered), (
            what,
            answered[:3],
        )
        assert set(left_out) <= {"bertscore"}


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        ("labels", "labels"),
        ("many classes", "labels"),
        ("letters", "labels"),
        ("integers as labels", "labels"),
        ("amounts", "numbers"),
        ("money", "numbers"),
        ("percent", "numbers"),
        ("lists", "lists"),
        ("objects", "objects"),
        ("text", "text"),
        ("text in Chinese", "text"),
    ],
)
def test_the_evaluation_fits_the_answers(answers, kind, place):
    content = write_task(place, "task", repeat_answers(ANSWERS[answers]))
    assert content["include"] == f"../_own_{kind}.yaml"
    if kind == "labels":
        (step, _) = content["filter_list"][0]["filter"]
        assert sorted(step["labels"]) == sorted(ANSWERS[answers])


def test_a_number_has_room_for_its_digits_by_every_tokenizer():
    answers = ANSWERS["amounts"]
    budget = evaluations.count_budget(answers)
    for model in (*tokenizers.BASES, "gpt-oss-20b"):
        tokenizer = tokenizers.load(model)
        longest = max(len(tokenizer.encode(a, add_special_tokens=False)) for a in answers)
        assert longest < budget, model


@pytest.mark.slow
def test_a_budget_without_a_tokenizer_is_no_smaller_than_with_one(monkeypatch):
    counted = {name: evaluations.count_budget(answers) for name, answers in ANSWERS.items()}
    monkeypatch.setattr(bases, "list_bases", list)
    for name, answers in ANSWERS.items():
        assert evaluations.count_budget(answers) >= 0.9 * counted[name], name


# ---- how answers are read

LETTERS, RATINGS = ANSWERS["letters"], ANSWERS["ratings"]


@pytest.mark.parametrize(
    ("answer", "labels", "label"),
    [
        ("This is a hard one: C", LETTERS, "C"),
        ("A hard one: D", LETTERS, "D"),
        ("The answer is B.", LETTERS, "B"),
        ("b", LETTERS, "B"),
        ("Bad news", LETTERS, utils.NONE),
        ("this is a hard one: c", ["a", "b", "c"], "c"),
        ("C", ["a", "b", "c"], "c"),
        ("N", ["Y", "N"], "N"),
        ("AA-", RATINGS, "AA-"),
        ("It is AA-rated.", RATINGS, "AA"),
        ("A strong firm: BBB+, stable", RATINGS, "BBB+"),
        ("aaa", RATINGS, utils.NONE),
        ("10", ["1", "10"], "10"),
        ("Stars: 1.", ["1", "10"], "1"),
        ("1.5", ["1", "10"], utils.NONE),
        ("这是正面的消息", ["正面", "负面"], "正面"),
        ("Ответ: ПОЛОЖИТЕЛЬНЫЙ.", ["положительный", "нет"], "положительный"),
        ("unpositive", ["positive", "negative"], utils.NONE),
        ("Positive, not negative", ["positive", "negative"], "positive"),
        ("a strong  BUY now", ["buy", "strong buy"], "strong buy"),
        ("us", ["US", "us"], "us"),
        ("Us", ["US", "us"], utils.NONE),
        ("I would buy it.", ["BUY", "HOLD", "SELL"], "BUY"),
        ("Baa1, stable", ["Aaa", "Baa1", "Ba"], "Baa1"),
        ("ıi", ["İ", "i"], utils.NONE),
        ("The 8-K form", ["10-K", "8-K"], "8-K"),
    ],
)
def test_a_label_is_found_as_it_is_meant(answer, labels, label):
    assert own.find_label(answer, labels) == label


def score_answer(rule, expected, answer):
    return rule({"messages": [user("?"), assistant(expected)]}, [answer])


def test_wrong_answers_are_wrong_and_partly_right_ones_partly():
    score = score_answer(own.items, '["a", "b"]', 'The list: ["b", "a"]')
    assert score == {"accuracy": 1.0, "exact_match": 0.0, "item_f1": 1.0}
    assert score_answer(own.items, '["a", "b"]', "['a', 'c']")["item_f1"] == 0.5
    assert score_answer(own.items, '["a"]', "none")["item_f1"] == 0
    assert score_answer(own.items, "[]", "nothing")["accuracy"] == 0
    assert score_answer(own.items, "[1]", "[true]")["accuracy"] == 0
    score = score_answer(own.fields, '{"a": 1, "b": "x"}', '```json\n{"b": "x", "a": 2}\n```')
    assert score == {"exact_match": 0.0, "field_accuracy": 0.5}
    assert score_answer(own.fields, '{"a": 1}', '{"a": 1.0}')["exact_match"] == 1
    assert score_answer(own.number, "12.50", "about 12.499") == {"accuracy": 1, "exact_match": 0}
    assert score_answer(own.number, "12.50", "13")["accuracy"] == 0
    assert score_answer(own.text, "销售额增长", "销售额下降")["token_f1"] == 0.6
    calls = json.dumps([CALL])
    other = '{"name": "find_price", "parameters": {"ticker": "BIR"}}'
    assert score_answer(own.calls, calls, other) == {"exact_match": 0.0, "name_accuracy": 1.0}
    assert score_answer(own.calls, calls, "I cannot.") == {"exact_match": 0, "name_accuracy": 0}


def test_a_row_that_cannot_be_scored_costs_no_answer(place, monkeypatch):
    rows = repeat_answers(ANSWERS["short text"])
    write_task(place, "task", rows)
    template = place / "evals" / "tasks" / "_own_text.yaml"
    template.write_text(template.read_text().replace("own.text", "fragile.fail"))
    (place / "evals" / "tasks" / "fragile.py").write_text(
        "def fail(doc, results):\n"
        "    if 'page 3' in results[0]:\n"
        "        raise TypeError('expected str instance, list found')\n"
        "    return {'exact_match': 1.0}\n"
    )
    answers = Answers(place / "partial.jsonl", {"of": "task"})
    lm = Echo("smollm2-135m", tokenizers.load("smollm2-135m"))
    answered, _ = measure(lm, "task", answers)
    assert [row["answer"] for row in answered] == ANSWERS["short text"]
    (reason,) = [row["unscored"] for row in answered if "unscored" in row]
    assert reason == "TypeError: expected str instance, list found"
    assert evaluation.score(answered)["exact_match"]["value"] == 1
    assert len((place / "partial.jsonl").read_text().splitlines()) == 1 + len(rows)


# ---- control tokens


def test_an_end_token_comes_off_an_answer_and_any_other_control_token_is_refused():
    messages = [user("Good?"), assistant("positive<|im_end|>\n</s>"), user("Sure?"), assistant("y")]
    assert turns.clean_turns(messages) == 1
    assert [turn["content"] for turn in messages] == ["Good?", "positive", "Sure?", "y"]
    for text in ("a <|im_start|>user b", "[INST] a", "<start_of_turn>", "a<|eot_id|>b"):
        for messages in ([user(text), assistant("y")], [user("x"), assistant(f"{text} c")]):
            with pytest.raises(ValueError, match="is a control token"):
                turns.clean_turns(copy.deepcopy(messages))
    for text in ("1 < 2 | 3 > 2", "<b>bold</b>", "[1] and [INSTRUMENT]", "<unk>"):
        assert turns.clean_turns([user(text), assistant(text)]) == 0


@pytest.mark.parametrize("model", tokenizers.BASES)
def test_no_control_token_of_a_base_gets_past_the_rule(model):
    tokenizer = tokenizers.load(model)
    plain = ("[control_", "<unused", "<unk>", "<pad>", "<mask>", "<end_of_image>")
    for token in map(str, tokenizer.all_special_tokens):
        if not token.startswith(plain) and not token.startswith(("[", "<image")):
            with pytest.raises(ValueError, match="is a control token"):
                turns.clean_turns([user(f"a {token} b")])


# ---- what a base cannot render is said before hours of work


def test_training_on_tools_that_the_template_drops_is_refused(tiny, tmp_path):
    rows = [build_row("one turn")] * 3 + [build_row("call")]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipes.find(str(write_recipe(tmp_path, "r4", tiny, data)))
    with pytest.raises(common.WrongInput, match=r"row 4: the chat template leaves out the tool"):
        checks.refuse_unrenderable(recipe)
    data.write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows[:3], build_row("three turns")])
    )
    checks.refuse_unrenderable(recipe)


def test_scoring_tool_calls_on_a_base_without_tools_is_refused(place):
    write_task(place, "task", [build_row("call and result")] * 2)
    lm = Echo("smollm2-135m", tokenizers.load("smollm2-135m"))
    with pytest.raises(common.WrongInput, match=r"row 1: .* leaves out the tool find_price"):
        measure(lm, "task")


def test_a_prompt_that_is_too_long_loses_the_middle_of_its_longest_turn():
    tokenizer = tokenizers.load("smollm2-135m")
    asking = Prompts("chat")
    turns = copy.deepcopy(ROWS["system and turns"])
    turns[1]["content"] = " ".join(f"word{n}" for n in range(500))
    asking.rows = {"text": {"messages": turns}}
    text = asking.fit(tokenizer, "text", 300)
    assert len(tokenizer.encode(text)) <= 300
    for part in ("You label news.", "word0 ", "[…]", "word499", "How sure?"):
        assert part in text
    assert asking.cut[text] > 1000


@pytest.mark.parametrize("model", run_first(2, tokenizers.BASES))
def test_a_server_renders_a_row_as_it_was_trained(model, tmp_path):
    tokenizer, config = tokenizers.load(model), recipes.find(f"{model}/sentiment_r4").config
    config = config | {"base_model": str(tokenizers.bring(model))}
    who = subjects.Subject("row", config, None, tmp_path, tmp_path, None, "chat")
    served = serve.build_template(who)
    for shape in ROWS:
        if (model, shape) in LIMITS:
            continue
        messages, tools = prompts.read_conversation(build_row(shape))
        # vLLM renders with a template and gives it no options.
        text = tokenizer.apply_chat_template(
            messages[:-1],
            tools=tools,
            chat_template=served,
            tokenize=False,
            add_generation_prompt=True,
        )
        assert text == prompts.render(tokenizer, messages[:-1], get_options(model), tools=tools)


def test_chat_begins_with_the_system_turn_that_it_is_given(tiny, smollm2, capsys, monkeypatch):
    model, tokenizer = models.load({"base_model": str(tiny)})
    who = subjects.Subject("tiny", {"base_model": str(tiny)}, None, tiny, tiny, None, "chat")
    turns = [*ROWS["system turn"][:1], user("Sales rose.")]
    expected = chat.answer(model, tokenizer, turns)
    assert expected != chat.answer(model, tokenizer, turns[1:])
    monkeypatch.setattr("sys.stdin", io.StringIO("Sales rose.\n\n"))
    chat.chat(who, None, "You label news.")
    said = capsys.readouterr().out.partition("the conversation\n")[2]
    assert "".join(said.split()) == "".join(common.spell_out(expected).split())


@pytest.fixture
def endpoint(monkeypatch):
    """A server that calls a tool where it is given tools, and keeps what it is sent."""
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            message, end = {"role": "assistant", "content": "Quite."}, "stop"
            if "tools" in bodies[-1]:
                message, end = message | {"content": None, "tool_calls": [CALL]}, "tool_calls"
            choice = {"index": 0, "finish_reason": end, "message": message}
            content = json.dumps({"id": "1", "object": "x", "choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    yield Endpoint(url, "teacher", "chat"), bodies
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("shape", ["system and turns", "call"])
def test_an_endpoint_gets_all_turns_and_tools_of_a_row(shape, place, endpoint):
    row, (served, bodies) = build_row(shape), endpoint
    write_task(place, "task", [row])
    with backends.open_endpoint(served)("base", "task", 1) as lm:
        (answered,), _ = evaluation.measure(lm, "task", None, Prompts("chat"))
    (body,) = bodies
    assert body["messages"] == row["messages"][:-1]
    assert body.get("tools") == row.get("tools")
    assert not find_wrong([answered]), answered


# ---- rows that went wrong for others

CASES = common.ROOT.parent / "shared" / "cases" / "data"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("numeric", "numbers"),
        ("letters", "labels"),
        ("list_answers", "lists"),
        ("eos", "labels"),
        ("qa_context", "text"),
        ("multiturn", "text"),
        ("system", "labels"),
    ],
)
def test_a_model_that_answers_with_the_key_is_right_in_the_cases(name, kind, place):
    if not CASES.is_dir():
        pytest.skip(f"{CASES} is not at hand")
    rows = []
    for line in (CASES / f"{name}.jsonl").read_text().splitlines():
        row = json.loads(line)
        question = row.get("question") or row.get("prompt")
        answer = row.get("answer") or row.get("completion")
        messages = row.get("messages") or [user(question), assistant(answer)]
        assert turns.clean_turns(messages) == (name == "eos")
        rows.append({"messages": messages})
    content = write_task(place, "task", rows)
    if name != "multiturn":  # which always ends with the same answer
        assert content["include"] == f"../_own_{kind}.yaml"
    lm = Echo("smollm2-135m", tokenizers.load("smollm2-135m"))
    answered, _ = measure(lm, "task")
    assert all(row["values"] for row in answered) and not find_wrong(answered)


@pytest.fixture
def own_place(place, monkeypatch):
    """A project folder in which `make new` makes tasks."""
    monkeypatch.setattr(recipes, "LOCAL", place / "recipes" / "local")
    monkeypatch.setattr(sources, "OWN", place / "recipes" / "local")
    monkeypatch.setattr(custom, "DATA", place / "data" / "local")
    monkeypatch.setattr(custom, "TASKS", place / "evals" / "tasks" / "local")
    custom.forget_tables()
    yield place
    custom.forget_tables()


@pytest.mark.parametrize("what", run_first(8, ["turns", "calls", *ANSWERS]))
def test_what_make_new_writes_is_right_for_a_model_that_answers_with_the_key(
    what, own_place, capsys
):
    model = "qwen3-8b" if what == "calls" else "smollm2-135m"
    shape = {"turns": "three turns", "calls": "call"}.get(what)
    rows = [build_row(shape) for _ in range(30)] if shape else repeat_answers(ANSWERS[what])
    for number, row in enumerate(rows):
        row["messages"][0]["content"] += f" Note {number}."
    path = own_place / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    custom.create_task("own_task", path)
    said = capsys.readouterr().out
    refused = "smollm2-135m cannot be trained on these rows: the chat template leaves out the tool"
    assert (refused in said) == (what == "calls")
    evaluation.read_tasks.cache_clear()
    answered, _ = measure(Echo(model, tokenizers.load(model)), "own_task")
    assert answered and all(row["values"] for row in answered)
    assert not find_wrong(answered), answered[:2]
