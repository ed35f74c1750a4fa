"""An adapter is merged, served and talked to as it was trained."""

import importlib.util
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import GPU, METHODS, run, run_first
from tests.hub_server import Hub
from tools import models, sources, subjects, vllm
from tools.common import ROOT, JobFailed, WrongInput, spell_out
from tools.use import chat, merge, serve


@pytest.mark.parametrize("method", run_first(1, METHODS))
def test_the_merged_model_is_base_and_adapter_at_the_precision_of_training(adapters, method):
    folder = adapters[method]
    subject = subjects.find("", str(folder))
    target = merge.merge(subject.config, folder)
    assert {path.stat().st_mode & 0o444 for path in target.iterdir()} == {0o444}
    report = json.loads((target / "merge.json").read_text())
    assert report["precision"] == method.split(",")[0]
    # The tiny model's logits are of the order of 1; the adapter moves them by far more than this.
    assert report["largest_logit_difference"] < (0.05 if method == "int8" else 1e-3)
    merged, tokenizer = models.load({"base_model": str(target)})
    base, _ = models.load(subject.config)
    moved = merge.measure_difference(
        merge.compute_logits(merged, tokenizer, None), merge.compute_logits(base, tokenizer, None)
    )
    assert moved["largest_logit_difference"] > 0.1
    if method == "nf4":
        again = report["quantized_again"]["largest_logit_difference"]
        assert again > 10 * report["largest_logit_difference"]


@pytest.mark.slow
def test_a_merged_model_is_not_made_twice_and_anew_for_another_adapter(adapters):
    folder = adapters["full"]
    subject = subjects.find("", str(folder))
    target = merge.merge(subject.config, folder)
    first = (target / "merge.json").stat().st_mtime_ns
    merge.merge(subject.config, folder)
    assert (target / "merge.json").stat().st_mtime_ns == first
    report = json.loads((target / "merge.json").read_text())
    (target / "merge.json").write_text(json.dumps(report | {"adapter_sha256": "other"}))
    merge.merge(subject.config, folder)
    assert json.loads((target / "merge.json").read_text()) == report


def test_a_merge_that_is_not_base_and_adapter_is_refused_and_leaves_nothing(
    adapters, tmp_path, monkeypatch
):
    folder = tmp_path / "adapter"
    shutil.copytree(adapters["full"], folder, ignore=shutil.ignore_patterns("merged"))
    monkeypatch.setitem(merge.TOLERANCE, "float32", 0.0)
    before = sorted(os.listdir(folder))
    with pytest.raises(JobFailed, match="the merged model is not base \\+ adapter"):
        merge.merge(subjects.find("", str(folder)).config, folder)
    assert sorted(os.listdir(folder)) == before


def test_the_command_for_vllm_keeps_the_base_quantized_and_the_adapter_apart(adapters, tmp_path):
    folder = adapters["nf4"]
    subject = subjects.find("", str(folder))
    line = serve.build_vllm_command({"mine": subject}, ["--port", "1"], GPU, tmp_path)
    assert line[:3] == ["vllm", "serve", subject.config["base_model"]]
    assert line[line.index("--lora-modules") + 1] == f"mine={folder}"
    assert line[line.index("--served-model-name") + 1] == "mine-base"
    assert line[line.index("--quantization") + 1] == "bitsandbytes"
    assert line[line.index("--max-lora-rank") + 1] == "8"
    assert line[line.index("--dtype") + 1] == "bfloat16"
    # vLLM has no DoRA: the merged model is served.
    subject = subjects.find("", str(adapters["nf4, DoRA"]))
    line = serve.build_vllm_command({"mine": subject}, [], GPU, tmp_path)
    assert line[:3] == ["vllm", "serve", str(adapters["nf4, DoRA"] / "merged")]
    assert line[line.index("--served-model-name") + 1] == "mine"
    assert "--lora-modules" not in line


def test_a_gpu_computes_in_half_precision_and_a_cpu_in_float32():
    old = replace(GPU, dtypes=["float16", "float32"])  # Turing has no bfloat16
    cpu = replace(GPU, device="cpu")
    for engine, config, dtype in (
        (GPU, {}, "bfloat16"),
        (GPU, {"dtype": "float16"}, "float16"),
        (old, {}, "float16"),
        (old, {"dtype": "bfloat16"}, "float16"),
        (cpu, {}, "float32"),
    ):
        assert engine.choose_dtype(config) == dtype


@pytest.mark.slow
def test_a_folder_with_its_own_chat_template_is_served_talked_to_and_merged_with_it(
    adapters, tmp_path
):
    folder = Path(shutil.copytree(adapters["full"], tmp_path / "a,b=c d"))
    shutil.rmtree(folder / "merged", ignore_errors=True)
    for path in (*folder.glob("tokenizer*"), folder / "config.yaml"):
        path.unlink()
    own = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
    (folder / "chat_template.jinja").write_text(own)
    subject = subjects.find("", str(folder), "fp32")
    line = serve.build_vllm_command({"mine": subject}, [], GPU, tmp_path)
    assert Path(line[line.index("--chat-template") + 1]).read_text() == own
    # vLLM splits `name=path` at the first "=", and takes what has a comma for JSON.
    module = json.loads(line[line.index("--lora-modules") + 1])
    assert module == {"name": "mine", "path": str(folder)}
    _, tokenizer = models.load(subject.config, subject.adapter)
    merged = merge.merge(subject.config, subject.adapter)
    _, of_merged = models.load({"base_model": str(merged)})
    assert tokenizer.chat_template == of_merged.chat_template == own
    # Folders of older versions of transformers have it in another file.
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "old" + own}))
    assert models.load_tokenizer(subject.config, subject.adapter).chat_template == "old" + own


def make_script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_vllm_is_searched_beside_python_then_in_its_own_environment_then_on_the_path(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(vllm, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "beside" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert vllm.find_vllm() is None
    for folder in ("path", ".venv-vllm/bin", "beside"):
        script = make_script(tmp_path / folder / "vllm", "#!/bin/sh\n")
        assert vllm.find_vllm() == script


@pytest.mark.parametrize("head", ["#!{}\n", '#!/bin/sh\n\'\'\'exec\' "{}" "$0" "$@"\n'])
def test_a_vllm_that_does_not_start_says_why_in_one_line(tmp_path, head):
    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed beside this Python")
    with pytest.raises(JobFailed, match="does not start here .*No module named 'vllm'"):
        vllm.ask_vllm(make_script(tmp_path / "vllm", head.format(sys.executable)))
    for other in ("#!/no/such/python\n", "#!/bin/sh\n", "", "\x7fELF"):
        with pytest.raises(JobFailed, match="does not start here"):
            vllm.ask_vllm(make_script(tmp_path / "vllm", other))


def free_port():
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return taken.getsockname()[1]


@contextmanager
def serving(*arguments, **environment):
    """What a server prints up to its curl line; afterwards SIGTERM stops it and its children."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tools", "serve", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    output = ""
    try:
        while "curl" not in output:
            line = process.stdout.readline()
            assert line, output
            output += line
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield output
    finally:
        process.terminate()
        status = process.wait(60)
    assert (status, process.stdout.read()) == (0, "serve      stopped\n")
    with pytest.raises(ProcessLookupError):
        os.kill(int(child), 0)


def ask(output, *models):
    """What each model answers, by the address and names that were printed and by the curl line."""
    import openai

    url = output.split("ready: ")[1].split(",")[0]
    turn = [{"role": "user", "content": "Is it good?"}]
    with openai.OpenAI(base_url=url, api_key="none") as client:
        assert {model.id for model in client.models.list()} == set(models)
        answers = [
            client.chat.completions.create(model=name, messages=turn, max_tokens=12, temperature=0)
            for name in models
        ]
    curl = shlex.split(output[output.index("curl ") :])
    done = subprocess.run([*curl, "--silent", "--noproxy", "*"], capture_output=True, text=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"], done.stdout
    return [answer.choices[0].message.content.strip() for answer in answers]


@pytest.mark.slow
def test_the_openai_client_gets_the_answer_that_chat_gives(adapters, tmp_path):
    folder, port = adapters["nf4"], free_port()
    subject = subjects.find("", str(folder))
    merge.merge(subject.config, folder)
    arguments = ("--adapter", str(folder), "--port", str(port), "--engine", "transformers")
    with serving(*arguments, http_proxy="http://127.0.0.1:9") as output:
        (served,) = ask(output, folder.name)
        again = run("serve", *arguments)
        assert (again.returncode, again.stderr.count("\n")) == (2, 1)
        assert f"port {port} is taken" in again.stderr
    model, tokenizer = models.load({"base_model": str(folder / "merged")})
    expected = chat.answer(model, tokenizer, [{"role": "user", "content": "Is it good?"}])
    assert served and expected.startswith(served)


@pytest.mark.slow
def test_a_base_of_the_hub_is_downloaded_and_offline_one_line_says_that_it_is_not_here(
    tiny, adapters, tmp_path
):
    folder = tmp_path / "adapter"
    folder.mkdir()
    shutil.copy(adapters["full"] / "adapter_model.safetensors", folder)
    settings = json.loads((adapters["full"] / "adapter_config.json").read_text())
    settings |= {"base_model_name_or_path": "me/tiny"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with Hub() as hub:
        files = {path.name: path.read_bytes() for path in tiny.iterdir()}
        hub.put("me/tiny", files | {"pytorch_model.bin": b"a pickle"})
        own = {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"}
        arguments = ("--adapter", folder, "--precision", "fp32")
        for tool in ("serve", "merge", "chat"):
            done = run(tool, *arguments, **own)
            assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
            assert "the base me/tiny is not in the Hub's cache; HF_HUB_OFFLINE" in done.stderr
        done = run("merge", *arguments, **own | {"HF_HUB_OFFLINE": "0"})
        assert done.returncode == 0, done.stderr
    done = run("chat", "", "Is it good?", *arguments, **own)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "cache").rglob("*.bin"))


@pytest.mark.slow
def test_one_prompt_is_answered_by_base_and_adapter_and_lines_are_a_conversation(adapters):
    folder = str(adapters["nf4"])
    once = run("chat", "", "Is it good?", "--adapter", folder)
    assert once.returncode == 0, once.stderr
    assert "base, nf4" in once.stdout and "adapter, nf4" in once.stdout
    done = subprocess.run(
        [sys.executable, "-m", "tools", "chat", "--adapter", folder],
        input="Is it good?\nAnd now?\n\nnever asked\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    model, tokenizer = models.load(subjects.find("", folder).config, adapters["nf4"])
    messages = []
    for text in ("Is it good?", "And now?"):
        messages.append({"role": "user", "content": text})
        output = chat.answer(model, tokenizer, messages)
        messages.append({"role": "assistant", "content": output})
        assert spell_out(output)[:40] in done.stdout


def test_a_prompt_that_lacks_the_instruction_of_the_training_is_named():
    note = chat.explain_wording("sentiment", "Profits rose.")
    assert note.startswith("sentiment was trained on prompts of the form 'Instruction: What")
    assert "{negative/neutral/positive}" in note and "Input: …" in note
    worded = sources.word_text("sentiment", "Profits rose.")
    assert not chat.explain_wording("sentiment", worded)
    assert not chat.explain_wording("ner", "Profits rose.") and not chat.explain_wording(None, "x")


def test_what_a_model_says_does_not_steer_the_terminal():
    assert spell_out("a\x1b[2Jb\tc\nd\x07") == "a\\x1b[2Jb\tc\nd\\x07"


@pytest.mark.parametrize("tool", ["chat", "merge", "serve"])
def test_without_a_recipe_or_with_a_wrong_adapter_one_line_says_so(tool, tmp_path):
    for arguments, output in (
        ((), "RECIPE=… is needed"),
        (("--adapter", str(tmp_path)), "no adapter_config.json"),
        (("llama-3.1-8b/ner_r4",), "is not trained"),
    ):
        done = run(tool, *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert output in done.stderr
    if tool == "serve":
        for port in ("99999", "0", "²", "eighty"):
            done = run("serve", "x", "--port", port)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
            assert "PORT must be a whole number from 1 to 65535" in done.stderr


@pytest.mark.parametrize(
    ("text", "output"),
    [("4096", "number from 1 to 2048"), ("0", "number of at least 1"), ("1e3", "of at least 1")],
)
def test_a_length_that_the_base_has_no_room_for_is_refused(adapters, text, output):
    done = run("serve", "--adapter", adapters["full"], "--max-model-len", text)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "MAX_MODEL_LEN must be a" in done.stderr and output in done.stderr


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
def test_a_host_that_is_not_this_machine_is_one_line(host):
    with pytest.raises(WrongInput, match=host):
        serve.check_port(host, 8000)
