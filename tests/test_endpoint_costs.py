"""Endpoints: reasoning models, refusals, and what answers cost, against a real HTTP server."""

import json
import threading

import pytest

from evals import endpoint, page
from tests.conftest import call, run_first
from tests.test_backends import answered, ask, scored, server  # noqa: F401
from tests.test_eval import workplace  # noqa: F401
from tests.test_predict import write_rows

PRICES = ("--price-in", "2", "--price-out", "10")  # 100 tokens in and 20 out: 0.0004 USD


def bill(content, tokens_in=100, tokens_out=20, **more):
    """A reply with the tokens that it cost."""
    usage = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}
    return content | {"usage": usage | {"total_tokens": tokens_in + tokens_out} | more}


@pytest.fixture
def billed(server):  # noqa: F811
    """The server, which tells the tokens of each right answer."""

    def answer(handler, times, body):
        text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        handler.reply(bill(answered(server.key[text], "prompt" in body)))
        return True

    server.misbehave = answer
    return server


def stop(capsys, function, *arguments, code=1, **options):
    """The one line with which a job ends."""
    with pytest.raises(SystemExit) as stopped:
        function(*arguments, **options)
    assert stopped.value.code == code
    lines = capsys.readouterr().err.splitlines()  # the server complains of clients that go
    (line,) = [line for line in lines if line.startswith("error: ")]
    return line


# ---- reasoning models


def refuse_parameter(name):
    message = f"Unsupported parameter: '{name}' is not supported with this model."
    error = {"message": message, "type": "invalid_request_error"}
    return {"error": error | {"param": name, "code": "unsupported_parameter"}}


def reason(server):  # noqa: F811
    """An endpoint of a model that reasons: it takes no max_tokens and no temperature."""

    def answer(handler, times, body):
        for name in ("max_tokens", "temperature"):
            if name in body:
                handler.reply(refuse_parameter(name), 400)
                return True
        text = body["messages"][-1]["content"]
        details = {"completion_tokens_details": {"reasoning_tokens": 300}}
        handler.reply(bill(answered(server.key[text]), 100, 302, **details))
        return True

    return answer


def test_a_reasoning_model_gets_room_and_no_temperature(server, monkeypatch, capsys):  # noqa: F811
    server.misbehave = reason(server)
    line = stop(capsys, ask, monkeypatch, server, code=2)
    assert "takes no max_tokens" in line and "REASONING_TOKENS=4000" in line
    assert len(server.asked) <= endpoint.CONCURRENT
    ask(monkeypatch, server, "--reasoning-tokens", 2000)
    bodies = [body for _, body in server.bodies if "max_tokens" not in body]
    assert len(bodies) == 8
    for body in bodies:
        assert body.keys() == {"model", "messages", "max_completion_tokens"}
        assert body["max_completion_tokens"] == 2010
    content = scored("fpb_reasoning2000_sample8")
    assert content["metrics"]["accuracy"]["value"] == 1
    assert content["evaluated"]["reasoning_tokens"] == 2000
    assert content["usage"]["tokens_out"] == 8 * 302
    assert "up to 2,000 tokens of reasoning, sampled" in capsys.readouterr().out
    (entry,) = page.find_scored()
    assert entry.setting == "as served, 2000 tokens of reasoning, 8 rows"


def test_reasoning_without_an_end_is_asked_once_and_is_no_answer(server, monkeypatch):  # noqa: F811
    endless = []

    def answer(handler, times, body):
        with server.lock:
            text = body["messages"][-1]["content"]
            endless[:] = endless or [text]
        if text == endless[0]:
            handler.reply(bill(answered("", end="length"), 100, 2010))
            return True
        return reason(server)(handler, times, body)

    server.misbehave = answer
    ask(monkeypatch, server, "--reasoning-tokens", 2000)
    content = scored("fpb_reasoning2000_sample8")
    (row,) = [row for row in content["predictions"] if "refused" in row]
    assert row["refused"] == "finish_reason: length, with nothing but reasoning"
    assert content["refused_rows"] == 1 and len(server.asked) == 8
    assert content["usage"]["tokens_out"] == 7 * 302 + 2010


def test_reasoning_that_is_counted_in_the_total_alone_is_paid_for(server, monkeypatch):  # noqa: F811
    def answer(handler, times, body):
        text = body["messages"][-1]["content"]
        handler.reply(bill(answered(server.key[text]), total_tokens=100 + 20 + 500))
        return True

    server.misbehave = answer
    ask(monkeypatch, server, "--reasoning-tokens", 2000)
    assert scored("fpb_reasoning2000_sample8")["usage"]["tokens_out"] == 8 * 520


def test_a_completion_does_not_reason(server, monkeypatch, capsys):  # noqa: F811
    more = ("--reasoning-tokens", 2000, "--prompt-format", "bare")
    assert "PROMPT_FORMAT=chat" in stop(capsys, ask, monkeypatch, server, *more, code=2)


# ---- a model that refuses


def test_a_refusal_is_recorded_and_asked_once(server, monkeypatch):  # noqa: F811
    chosen = []

    def answer(handler, times, body):
        with server.lock:
            text = body["messages"][-1]["content"]
            chosen[:] = chosen or [text]
        if text == chosen[0]:
            reply = answered(None)
            reply["choices"][0]["message"]["refusal"] = "I cannot\nhelp with that."
            handler.reply(bill(reply))
        return text == chosen[0]

    server.misbehave = answer
    ask(monkeypatch, server)
    (row,) = [row for row in scored()["predictions"] if "refused" in row]
    assert row["refused"] == "refusal: I cannot help with that." and row["answer"] == ""
    assert len(server.asked) == 8


# ---- cost


def test_a_score_says_what_its_answers_cost(billed, monkeypatch, capsys):
    ask(monkeypatch, billed, *PRICES)
    usage = scored()["usage"]
    assert usage == {
        "tokens_in": 800,
        "tokens_out": 160,
        "replies": 8,
        "unreported": 0,
        "usd": pytest.approx(8 * 0.0004),
        "price_in": 2,
        "price_out": 10,
    }
    printed = capsys.readouterr().out
    assert "8 replies, 800 tokens in, 160 out, 0.0032 USD" in printed
    assert "fpb, base: 800 tokens in, 160 out, 0.0032 USD." in printed
    ask(monkeypatch, billed)  # a price changes no answer, so the score stands
    assert len(billed.asked) == 8


def test_a_reply_that_is_asked_for_again_is_paid_for(billed, monkeypatch):
    answer = billed.misbehave

    def cut_once(handler, times, body):
        if times == 0:
            handler.reply(bill(answered("posi", end=None), 100, 1))
            return True
        return answer(handler, times, body)

    billed.misbehave = cut_once
    ask(monkeypatch, billed, *PRICES)
    assert scored()["usage"] == scored()["usage"] | {
        "tokens_in": 1600,
        "tokens_out": 168,
        "replies": 16,
    }


def test_without_reported_tokens_no_cost_is_claimed(server, monkeypatch, capsys):  # noqa: F811
    ask(monkeypatch, server, *PRICES)
    assert scored()["usage"]["unreported"] == 8
    printed = capsys.readouterr().out
    assert "8 without a token count" in printed and "fpb, base: 0 tokens" not in printed
    line = stop(capsys, ask, monkeypatch, server, *PRICES, "--max-cost", 1, "--force")
    assert "reports no tokens, so MAX_COST and MAX_TOTAL_TOKENS cannot be kept" in line


@pytest.mark.parametrize(
    "budget, line",
    [
        (("--max-cost", "0.0021"), "MAX_COST=0.0021 is reached (5 replies, 500 tokens in"),
        (
            ("--max-total-tokens", "610"),
            "MAX_TOTAL_TOKENS=610 is reached (5 replies, 500 tokens in",
        ),
    ],
)
@pytest.mark.parametrize("concurrency", run_first(1, [8, 1]))
def test_a_budget_is_kept_and_the_same_command_goes_on(
    budget, line, concurrency, billed, monkeypatch, capsys
):
    more = (*PRICES, *budget, "--concurrency", concurrency)
    assert line in stop(capsys, ask, monkeypatch, billed, *more)
    assert len(billed.asked) == 5 and billed.most <= concurrency
    ask(monkeypatch, billed, *more)  # three rows are left, and the budget counts anew
    assert len(set(billed.asked)) == len(billed.asked) == 8
    content = scored()
    assert content["metrics"]["accuracy"]["value"] == 1
    assert content["usage"]["tokens_in"] == 800  # of both commands
    assert "usd" in content["usage"]


def test_a_budget_counts_over_the_datasets_of_a_command(billed, monkeypatch, capsys):
    rows = page.evaluation.find_rows("fiqa").read_text().splitlines()
    pairs = [json.loads(line)["messages"] for line in rows]
    billed.key |= {pair[0]["content"]: pair[1]["content"] for pair in pairs}
    arguments = ["--backend", "openai", "--base-url", billed.url, "--model-name", "teacher"]
    arguments += ["--tasks", "fpb,fiqa", "--limit", 8, *PRICES, "--max-cost", "0.0041"]
    line = stop(capsys, call, monkeypatch, "eval", *arguments)
    assert "MAX_COST=0.0041 is reached (10 replies" in line
    assert len(billed.asked) == 10 and scored()["usage"]["replies"] == 8


def test_so_many_requests_run_at_a_time_as_are_wanted(server, monkeypatch):  # noqa: F811
    together = threading.Barrier(12)  # opens when all stand before it
    server.misbehave = lambda handler, times, body: together.wait(60) < 0
    ask(monkeypatch, server, "--concurrency", 12, limit=24)
    assert server.most == 12


def test_predict_has_the_same_budget(billed, tmp_path, monkeypatch, capsys):
    data, out = tmp_path / "rows.csv", tmp_path / "out.csv"
    write_rows(data, [f"Sales rose by {n} %" for n in range(7)])
    billed.misbehave = lambda handler, times, body: (
        handler.reply(bill(answered("positive"))) or True
    )
    arguments = ["--backend", "openai", "--base-url", billed.url, "--model-name", "teacher"]
    arguments += ["--data", data, "--out", out, "--task", "fpb", *PRICES, "--max-cost", "0.0021"]
    line = stop(capsys, call, monkeypatch, "predict", *arguments)
    assert "MAX_COST=0.0021 is reached (5 replies" in line
    call(monkeypatch, "predict", *arguments)
    assert len(billed.asked) == 7 and len(out.read_text().splitlines()) == 8


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--price-in", "1"], "PRICE_IN and PRICE_OUT go together"),
        (["--max-cost", "1"], "MAX_COST needs PRICE_IN and PRICE_OUT"),
        (["--max-cost", "nan", *PRICES], "MAX_COST must be a number of at least 0"),
        (["--concurrency", "0"], "CONCURRENCY must be a whole number of at least 1"),
    ],
)
def test_a_wrong_budget_is_one_line(arguments, message, server, monkeypatch, capsys):  # noqa: F811
    assert message in stop(capsys, ask, monkeypatch, server, *arguments, code=2)
    assert not server.asked


@pytest.mark.parametrize("option", ["reasoning-tokens", "max-cost", "concurrency"])
def test_options_of_an_endpoint_go_with_an_endpoint(option, monkeypatch, capsys):
    name = option.upper().replace("-", "_")
    line = stop(capsys, call, monkeypatch, "eval", "sentiment_r4", f"--{option}", 8, code=2)
    assert f"options such as {name} go with BACKEND=openai" in line
