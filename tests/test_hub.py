"""The Hub: what is pushed is whole, what is pulled is checked, and nothing secret gets anywhere.

The real huggingface_hub client, in processes of its own, against tests/hub_server.py.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save

from evals import stats
from tests.conftest import call, run_first
from tests.hub_server import Hold, Hub, busy, cut, once
from tools import adapters, architectures, common, recipes
from tools.hub import card, client, pull, push
from tools.runs import Run
from tools.train import memory

RECIPE = "smollm2-135m/sentiment_r4"
REPO = "me/smollm2-135m-sentiment_r4"
SECRET_PROMPT = "Margins at Quillbrook narrowed"  # stands in a prompt that must not be published


@dataclass
class Place:
    """A checkout of the project with an empty Hub cache, as a user on a machine has it."""

    root: Path
    home: Path
    url: str
    token: str = ""
    outputs: list[str] = field(default_factory=list)

    def start(self, verb: str, *arguments: object, **env: str) -> subprocess.Popen[str]:
        own = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        own |= {"HF_HOME": str(self.home), "HF_ENDPOINT": self.url, "PYTHONPATH": ""}
        own |= {"HF_HUB_DISABLE_XET": "1"}  # the server speaks Git LFS
        own |= {"HF_TOKEN": self.token} if self.token else {}
        return subprocess.Popen(
            [sys.executable, "-m", "tools", verb, *map(str, arguments)],
            cwd=self.root,
            env=own | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
        out, err = process.communicate(timeout=300)
        self.outputs += [out, err]
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def run(self, verb: str, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
        return self.end(self.start(verb, *arguments, **env))

    def push(self, *arguments: object, name: str = RECIPE, **env: str):
        return self.run("push", name, "--namespace", "me", *arguments, **env)

    def pull(self, *arguments: object, **env: str):
        return self.run("pull", RECIPE, "--namespace", "me", *arguments, **env)

    @property
    def folder(self) -> Path:
        return self.root / "runs" / RECIPE

    @property
    def scores(self) -> Path:
        return self.folder / "evals" / "fpb.json"

    @property
    def info(self) -> dict:
        return read_json(self.folder / "run.json")

    def change_info(self, **changes: object) -> None:
        common.write_json(self.folder / "run.json", self.info | changes)

    def change_answers(self) -> None:
        content = scored(self.info["adapter_sha256"], "fpb", ["positive"] * 40)
        common.write_json(self.scores, content)

    def raise_version(self) -> None:
        """Another version of the recipe, which the run was trained with."""
        source = self.root / "recipes" / f"{RECIPE}.yaml"
        source.write_text(source.read_text().replace("# Version: 1.1.0", "# Version: 1.2.0"))
        self.change_info(recipe_version="1.2.0")

    def ask(self, code: str) -> str:
        """What a line of Python prints in this place."""
        arguments = [sys.executable, "-c", f"from tools import recipes; {code}"]
        result = subprocess.run(arguments, cwd=self.root, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def read_yaml(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def refused(result: subprocess.CompletedProcess[str], text: str, status: int = 2) -> None:
    """One line on stderr that says why, and the exit status."""
    assert result.returncode == status, result.stdout + result.stderr
    assert result.stderr.count("\n") == 1 and re.search(text, result.stderr), result.stderr


def good(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture
def server():
    with Hub() as running:
        yield running


@pytest.fixture(scope="module")
def base(smollm2):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def trained(smollm2, tmp_path_factory) -> Path:
    """A PEFT adapter of SmolLM2 as Axolotl leaves it, with weights that change its answers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    model.name_or_path = model.config._name_or_path = "models/smollm2-135m"
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        lora_dropout=0.05,
        target_modules=["q_proj", "k_proj", "v_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    get_peft_model(model, config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder)
    return folder


def scored(sha: str | None, dataset: str, answered: list[str]) -> dict:
    """A score file as evals/run.py writes it, with a prompt in it as a careless one might."""
    expected = ["neutral", "positive", "negative", "neutral"] * 10
    rows = [
        {
            "row": number,
            "values": {"accuracy": float(e == a), "f1_macro": [[e, a]]},
            "expected": e,
            "answered": a,
            "answer": f" {a}",
            "prompt": SECRET_PROMPT,
        }
        for number, (e, a) in enumerate(zip(expected, answered, strict=True))
    ]
    about = {"dataset": dataset, "precision": "nf4", "adapter_sha256": sha, "limit": None}
    about |= {"data_sha256": "d" * 64, "data_from": "FinLoRA or your own"}
    names = ("accuracy", "f1_macro")
    metrics = {n: stats.estimate(n, [row["values"][n] for row in rows]) for n in names}
    return {"evaluated": about, "examples": 40, "metrics": metrics, "predictions": rows}


def finish(folder: Path, recipe: recipes.Recipe, scores: bool = True, **changes: object) -> None:
    """What training and scoring write around an adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    config = recipe.config | {"bf16": False, "plugins": ["tools.train.plugin.RunPlugin"]}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    sha = common.digest(folder / adapters.WEIGHTS)
    info = {
        "recipe": recipe.name,
        "recipe_version": recipe.version,
        "recipe_digest": recipe.digest,
        "profile": "cpu",
        "base_model": recipe.config["base_model"],
        "data": [
            {
                "path": "data/chat/sentiment_train.jsonl",
                "sha256": "a" * 64,
                "rows": 900,
                "from": "FinLoRA or your own",
                "source": "test/fpb_test.jsonl",
            }
        ],
        "adapter_sha256": sha,
        "steps": 110,
        "last_loss": 0.25,
        "seconds": 360.0,
        "peak_memory_bytes": 4 * 10**9,
        "tokens_per_second": 222.8,
        "trainable_parameters": 322560,
        "device": "cpu",
        "processes": 1,
        "seed": 42,
        "packages": {"peft": "0.20.0"},
    }
    common.write_json(folder / "run.json", info | changes)
    if scores:
        names = ["neutral", "positive", "negative", "positive"] * 10
        common.write_json(folder / "evals" / "fpb.json", scored(sha, "fpb", names))
        beside = folder.with_name("base_nf4") / "evals" / "fpb.json"
        common.write_json(beside, scored(None, "fpb", ["neutral"] * 40))


@pytest.fixture
def place(server, smollm2, tmp_path):
    """Makes a Place: a copy of this project that has its own runs and its own Hub cache."""

    def make(name: str, token: str = "") -> Place:
        root = tmp_path / name / "project"
        root.mkdir(parents=True)
        skip = shutil.ignore_patterns("__pycache__", "local")
        for part in ("tools", "evals", "recipes", "data/sample"):
            shutil.copytree(common.ROOT / part, root / part, ignore=skip)
        shutil.copy(common.ROOT / "data" / "sources.yaml", root / "data")
        (root / "models").symlink_to(smollm2.parent)
        return Place(root, tmp_path / name / "cache", server.url, token)

    return make


@pytest.fixture
def me(place, server, trained) -> Place:
    """A user with a finished, scored run and a token that may write."""
    mine = place("me", server.user("me", orgs=(("lab", "write"), ("guild", "read"))))
    shutil.copytree(trained, mine.folder)
    finish(mine.folder, recipes.find(RECIPE))
    return mine


def logits(folder: Path, base):
    import torch
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, str(folder)).eval()
    with torch.inference_mode():
        result = model(torch.arange(5, 45).reshape(2, 20)).logits
    model.unload()
    return result


# --- Push ---


def test_a_dry_run_shows_files_and_card_and_needs_neither_network_nor_token(me, server):
    me.token, me.url = "", "http://127.0.0.1:9"
    output = good(me.push("--dry-run"))
    assert "adapter_model.safetensors" in output and "nothing is sent" in output
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in output and "## Limits" in output
    assert server.requests == []


def test_a_push_is_one_private_tagged_commit_with_the_evidence(me, server):
    output = good(me.push())
    repo = server.repos[REPO]
    assert repo.private and len(repo.commits) == 2  # the Hub makes the first one itself
    assert repo.tags == {"v1.1.0": repo.head} and repo.head[:12] in output
    files = server.files(REPO, "v1.1.0")
    assert set(files) == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "config.yaml"),
        *("evals/base/fpb.json", "evals/fpb.json", "run.json"),
    }
    assert files["config.yaml"] == (me.folder / "config.yaml").read_bytes()
    assert json.loads(files["run.json"]) == me.info
    settings = json.loads(files["adapter_config.json"])
    assert settings["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert settings["revision"] and settings["r"] == 4
    everything = b"".join(files.values())
    assert str(me.root).encode() not in everything and SECRET_PROMPT.encode() not in everything
    row = json.loads(files["evals/fpb.json"])["predictions"][1]
    values = {"accuracy": 1.0, "f1_macro": [["positive", "positive"]]}
    assert row.pop("values") == values  # so that each score can be computed again
    assert row == {"row": 1, "expected": "positive", "answered": "positive", "answer": " positive"}


@pytest.mark.slow
def test_the_same_content_again_sends_nothing(me, server):
    good(me.push())
    before = list(server.repos[REPO].commits)
    server.requests.clear()
    assert "is there already" in good(me.push())
    assert server.repos[REPO].commits == before
    assert not {"create", "preupload", "batch", "upload", "commit", "tag"} & set(server.requests)


@pytest.mark.slow
def test_other_content_under_the_same_version_is_refused_and_another_version_is_not(me, server):
    good(me.push())
    first = server.files(REPO, "v1.1.0")
    me.change_answers()
    server.requests.clear()
    refused(me.push(), r"v1\.1\.0 with another README.md, evals/fpb.json")
    assert server.files(REPO) == first and server.sent("commit") == 0

    me.raise_version()
    good(me.push())
    assert set(server.repos[REPO].tags) == {"v1.1.0", "v1.2.0"}
    assert server.files(REPO, "v1.1.0") == first != server.files(REPO, "v1.2.0")


STEPS = ["create", "validate", "preupload", "batch", "upload", "verify", "commit", "tag"]
MOMENTS = [(step, "at") for step in (*STEPS, "settings")] + [("commit", "after"), ("tag", "after")]


@pytest.mark.slow
@pytest.mark.parametrize(("step", "moment"), MOMENTS)
def test_a_push_killed_at_any_step_publishes_nothing_and_the_next_one_all(me, server, step, moment):
    hold = Hold()

    def stop(handler):
        hold(handler)
        cut(handler)

    getattr(server, moment)[step] = stop
    process = me.start("push", RECIPE, "--namespace", "me", "--public")
    assert hold.reached.wait(120), step
    process.send_signal(signal.SIGKILL)
    me.end(process)
    getattr(server, moment).clear()
    hold.release.set()
    if repo := server.repos.get(REPO):
        assert repo.private  # nobody else sees what there is
        assert not repo.tags or (step, moment) in (("settings", "at"), ("tag", "after"))

    good(me.push("--public"))
    repo = server.repos[REPO]
    assert len(repo.commits) == 2 and repo.tags == {"v1.1.0": repo.head} and not repo.private
    files = server.files(REPO, "v1.1.0")
    assert len(files) == 7
    assert files[adapters.WEIGHTS] == (me.folder / adapters.WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    "step",
    run_first(1, ["commit", "create", "tag", "upload"]),
)
@pytest.mark.slow
def test_a_connection_that_breaks_is_one_line_and_the_same_command_repairs_it(me, server, step):
    server.at[step] = once(cut)
    first = me.push()
    if first.returncode:  # huggingface_hub 1.31 tries an upload again by itself
        refused(first, "connection to the Hub broke.*run it again", status=1)
        assert not (server.repos[REPO].tags if REPO in server.repos else {})
    else:
        assert step == "upload"
    good(me.push())
    assert server.repos[REPO].tags == {"v1.1.0": server.repos[REPO].head}


@pytest.mark.slow
def test_a_hub_that_is_overloaded_for_a_moment_is_asked_again(me, server):
    server.at["upload"] = once(busy)
    good(me.push())
    assert server.sent("upload") == 2 and server.repos[REPO].tags


def test_two_pushes_of_the_same_run_at_once_make_one_commit(me, server):
    server.put(REPO, {".gitattributes": b""}, private=True)
    both = threading.Barrier(2, timeout=120)
    server.at["commit"] = lambda handler: both.wait()
    processes = [me.start("push", RECIPE, "--namespace", "me") for _ in range(2)]
    # The one that came second looks again, finds its content there, and does not commit anew.
    results = [me.end(process) for process in processes]
    assert [result.returncode for result in results] == [0, 0], results
    assert server.sent("commit") == 2 and len(server.repos[REPO].commits) == 2
    assert server.repos[REPO].tags == {"v1.1.0": server.repos[REPO].head}


@pytest.mark.slow
def test_of_two_different_pushes_of_a_version_at_once_one_is_refused(me, place, server):
    other = place("other", me.token)
    shutil.copytree(me.root / "runs", other.root / "runs")
    other.change_answers()
    server.put(REPO, {".gitattributes": b""}, private=True)
    both = threading.Barrier(2, timeout=120)
    server.at["commit"] = lambda handler: both.wait()
    places = (me, other)
    processes = [p.start("push", RECIPE, "--namespace", "me") for p in places]
    results = [p.end(process) for p, process in zip(places, processes, strict=True)]
    assert sorted(result.returncode for result in results) == [0, 2], results
    loser = results[0] if results[0].returncode else results[1]
    refused(loser, r"v1\.1\.0")
    repo = server.repos[REPO]
    assert len(repo.commits) == 2 and repo.tags == {"v1.1.0": repo.head}


@pytest.mark.parametrize(
    ("user", "role", "namespace", "why"),
    run_first(
        1,
        [
            ("me", "write", "stranger", "stranger is not yours: the token is of me, or lab"),
            ("me", "read", "me", "can only read"),
            ("me", "write", "guild", "guild is not yours"),
            ("me:elsewhere", "fineGrained", "me", "may not write to me"),
        ],
    ),
)
def test_a_token_without_the_right_is_refused_and_leaves_nothing(
    me, server, user, role, namespace, why
):
    me.token = server.user(user, role, orgs=(("lab", "write"), ("guild", "read")))
    refused(me.run("push", RECIPE, "--namespace", namespace), why)
    assert server.repos == {} and set(server.requests) == {"whoami"}


def test_a_wrong_token_and_none_are_one_line_each(me, server):
    me.token = "hf_" + "x" * 34
    refused(me.push(), "does not know this token")
    me.token = ""
    refused(me.push(), "no token.*hf auth login.*HF_TOKEN")
    assert server.repos == {}


@pytest.mark.slow
def test_a_fine_grained_token_an_organisation_and_a_login_may_push(me, server):
    me.token = server.user("me:me", "fineGrained")
    good(me.push())
    me.token, token = "", server.user("me", orgs=(("lab", "write"),))
    me.home.mkdir(exist_ok=True)
    (me.home / "token").write_text(token)  # where `hf auth login` keeps it
    good(me.run("push", RECIPE, "--namespace", "lab"))
    assert REPO in server.repos and "lab/smollm2-135m-sentiment_r4" in server.repos


def test_an_unfinished_run_and_one_without_scores_are_refused(me, server):
    shutil.rmtree(me.folder / "evals")
    refused(me.push(), f"no scores; `make eval RECIPE={RECIPE}`.*FORCE=1")
    good(me.push("--force"))
    text = server.files(REPO)["README.md"].decode()
    assert "**There are none.**" in text and "model-index" not in text

    (me.folder / "run.json").unlink()
    (me.folder / "checkpoint-20").mkdir()
    refused(me.push(), "is unfinished; `make train")
    shutil.rmtree(me.folder)
    refused(me.push(), "is not trained")


def test_scores_of_an_earlier_adapter_are_none(me):
    content = read_json(me.scores)
    content["evaluated"]["adapter_sha256"] = "0" * 64
    common.write_json(me.scores, content)
    refused(me.push(), "no scores")


@pytest.mark.parametrize(
    "secret",
    run_first(
        2, ["hf_" + "A1b2" * 8, "mine", "AKIAABCDEFGHIJKLMNOP", "-----BEGIN RSA PRIVATE KEY-----"]
    ),
)
def test_a_secret_in_any_file_is_refused_and_never_shown(me, server, secret):
    if secret == "mine":
        secret = "correct-horse-battery"
    config = read_yaml(me.folder / "config.yaml")
    (me.folder / "config.yaml").write_text(yaml.safe_dump(config | {"wandb_name": secret}))
    result = me.push(WANDB_API_KEY="correct-horse-battery")
    refused(result, r"config.yaml, line \d+: this looks like a secret")
    assert secret not in result.stdout + result.stderr and server.requests == []


@pytest.mark.slow
def test_a_score_is_never_paired_with_another_models(me):
    beside = me.folder.with_name("base_nf4") / "evals" / "fpb.json"
    content = read_json(beside)
    assert "| 50.0 (" in good(me.push("--dry-run"))
    for key, value in (
        ("base_model", "meta-llama/Llama-3.1-8B-Instruct"),
        ("base_revision", "0" * 40),
        ("base_files", {"model.safetensors": "0" * 64}),
        ("precision", "fp32"),
        ("chat_template_kwargs", {"enable_thinking": False}),
    ):
        about = content["evaluated"] | {key: value}
        common.write_json(beside, content | {"evaluated": about})
        output = good(me.push("--dry-run"))
        assert "not scored" in output and "| 50.0 (" not in output, key


@pytest.mark.slow
def test_data_whose_licence_forbids_it_is_never_made_public(me, server):
    me.change_info(data=[me.info["data"][0] | {"source": "train/headline_train.jsonl"}])
    refused(me.push("--public"), "must not be public.*CC-BY-NC-ND")
    assert server.requests == []
    good(me.push())
    assert server.repos[REPO].private
    assert b"license: cc-by-nc-nd-4.0" in server.files(REPO)["README.md"]


def test_a_run_that_diverged_or_was_trained_with_another_recipe_is_refused(me):
    tensors = load_file(me.folder / adapters.WEIGHTS)
    next(iter(tensors.values()))[0, 0] = np.inf
    (me.folder / adapters.WEIGHTS).write_bytes(save(tensors))
    refused(me.push(), "its adapter is not the one that run.json describes")
    me.change_info(adapter_sha256=common.digest(me.folder / adapters.WEIGHTS))
    refused(me.push(), "holds NaN or infinity")
    me.change_info(recipe_digest="0" * 64)
    refused(me.push(), "is not what .* was trained with")


@pytest.mark.slow
def test_public_is_only_what_was_asked_to_be(me, place, server):
    stranger = place("stranger", server.user("stranger"))
    good(me.push())
    refused(stranger.pull(), "is not on the Hub, or it is private")
    good(me.push("--public"))
    good(stranger.pull())
    me.raise_version()
    refused(me.push(), "is public already; PUBLIC=1")


@pytest.mark.slow
def test_a_repository_that_holds_something_else_is_left_alone(me, server):
    server.put(REPO, {"model.safetensors": b"mine"}, private=True)
    refused(me.push(), "holds something else")
    assert server.files(REPO) == {"model.safetensors": b"mine"}
    server.put(REPO, {"run.json": b'{"recipe_version": "1.1.0"}'})
    refused(me.push(), r"another v1\.1\.0 without its tag.*FORCE=1")
    good(me.push("--force"))
    assert set(server.repos[REPO].tags) == {"v1.1.0"}


def test_paths_of_this_machine_do_not_leave_it(me, server, tmp_path):
    secret = tmp_path / "secret place"
    content = recipes.build_config(RECIPE) | {"output_dir": str(secret / "mine")}
    content["datasets"][0]["path"] = str(secret / "sentiment_train.jsonl")
    path = tmp_path / "mine.yaml"
    path.write_text("# Version: 2.0.0\n" + yaml.safe_dump(content))
    shutil.copytree(me.folder, secret / "mine")
    finish(secret / "mine", recipes.find(str(path)))
    scores = secret / "mine" / "evals" / "fpb.json"
    measured = read_json(scores)
    measured["evaluated"]["base_model"] = str(secret / "base")
    common.write_json(scores, measured)
    good(me.push(name=str(path)))
    files = server.files("me/mine", "v2.0.0")
    assert b"secret place" not in b"".join(files.values())
    config = yaml.safe_load(files["config.yaml"])
    assert (config["output_dir"], config["base_model"]) == ("mine", "models/smollm2-135m")


@pytest.mark.slow
def test_tokenizer_and_chat_template_go_along_only_where_they_are_not_the_bases(me, server):
    path = me.folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"is_local": False}))
    output = good(me.push("--dry-run")).split("nothing is sent")[0]
    assert "tokenizer" not in output and "chat_template" not in output
    (me.folder / "chat_template.jinja").write_text("{{ messages }}")
    output = good(me.push("--dry-run")).split("nothing is sent")[0]
    assert "chat_template.jinja" in output and "tokenizer" not in output
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<|im_end|>"}))
    good(me.push())
    files = server.files(REPO)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert files[name] == (me.folder / name).read_bytes()


# --- The card ---


def test_the_card_holds_every_score_with_its_interval_and_reads_back(me, server):
    from huggingface_hub import ModelCard

    good(me.push())
    page = ModelCard(server.files(REPO)["README.md"].decode())
    data = page.data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (data["base_model_relation"], data.library_name, data.language) == (
        *("adapter", "peft", "en"),
    )
    assert data.license == "cc-by-nc-sa-3.0"  # Financial PhraseBank's; the base is Apache-2.0
    assert data.datasets == ["takala/financial_phrasebank"]
    scores = read_json(me.scores)["metrics"]
    results = {r.metric_name: r for r in data.eval_results}
    assert set(results) == {"accuracy", "macro F1"}
    for title, name in (("accuracy", "accuracy"), ("macro F1", "f1_macro")):
        assert results[title].metric_value == pytest.approx(scores[name]["value"])
        low, high = results[title].metric_args["interval"]
        assert (low, high) == pytest.approx((scores[name]["low"], scores[name]["high"]))
    # 30 of 40 right against 20 of 40: the difference is 25 points.
    assert "| fpb | accuracy | 50.0 (" in page.text and "| 75.0 (" in page.text
    assert "+25.0 (" in page.text and "Small sets" in page.text
    assert "- fpb: the most frequent answer alone has an accuracy of 50.0 %." in page.text
    for part in ("make train RECIPE=smollm2-135m/sentiment_r4", "Cost: no hardware was rented"):
        assert part in page.text


@pytest.mark.parametrize(
    ("base", "source", "licence"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "train/xbrl_term_train.jsonl", "apache-2.0"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "test/ner_test.jsonl", "cc-by-sa-3.0"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "train/financebench_train.jsonl", "cc-by-nc-4.0"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "my.jsonl", "other"),
        ("meta-llama/Llama-3.1-8B-Instruct", "train/xbrl_term_train.jsonl", "llama3.1"),
        ("meta-llama/Llama-3.1-8B-Instruct", "train/financebench_train.jsonl", "other"),
        ("nobody/knows", "train/xbrl_term_train.jsonl", "other"),
    ],
)
def test_the_cards_licence_follows_from_base_and_data(base, source, licence):
    metadata = card.choose_licence(base, [{"path": "x", "source": source}])
    assert metadata["license"] == licence
    assert (licence == "other") == ("license_name" in metadata)


def test_exams_and_no_derivatives_may_not_be_shared_and_the_examples_may():
    assert "not published" in card.explain_forbidden(
        [{"path": "x", "source": "train/cfa_train.jsonl"}]
    )
    assert "ND" in card.explain_forbidden([{"path": "x", "source": "test/headline_test.jsonl"}])
    assert (
        card.explain_forbidden([{"path": "x", "source": "train/financebench_train.jsonl"}]) is None
    )
    sample = [{"path": "x", "source": "train/headline_train.jsonl", "from": "data/sample"}]
    assert card.explain_forbidden(sample) is None
    assert card.choose_licence("Qwen/Qwen3-8B", sample) == {"license": "apache-2.0"}


@pytest.mark.slow
def test_the_cards_code_runs_as_it_stands(me, server, tiny, tmp_path):
    """PEFT's on a tiny base that the Hub on loopback holds; vLLM's needs a GPU, and compiles."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    server.put("tester/tiny", {p.name: p.read_bytes() for p in tiny.iterdir() if p.is_file()})
    content = recipes.build_config(RECIPE) | {
        "base_model": "tester/tiny",
        "output_dir": "runs/local/tiny",
    }
    recipe = me.root / "tiny.yaml"
    recipe.write_text("# Version: 1.1.0\n" + yaml.safe_dump(content))
    torch.manual_seed(0)
    wanted = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), wanted)
    model.save_pretrained(me.root / "runs" / "local" / "tiny")
    finish(me.root / "runs" / "local" / "tiny", recipes.find(str(recipe)))
    good(me.push(name="tiny.yaml"))
    text = server.files("me/tiny")["README.md"].decode()
    peft, vllm = re.findall(r"```python\n(.*?)```", text, re.S)
    compile(vllm, "card", "exec")
    script = tmp_path / "card.py"
    script.write_text(peft)
    env = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": server.url}
    result = subprocess.run(
        [sys.executable, script],
        env=env | {"HF_TOKEN": me.token},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(result.stdout) > 1  # a random model answers anything


# --- Pull ---


@pytest.mark.slow
def test_what_was_pulled_at_a_tag_gives_the_same_logits_to_the_bit(me, place, server, base):
    import torch

    good(me.push())
    commit = server.repos[REPO].head
    server.put(REPO, {"README.md": b"later"})  # main goes on; the tag does not
    bob = place("bob", me.token)
    output = good(bob.pull("--revision", "v1.1.0"))
    assert commit[:12] in output and "runs/smollm2-135m/sentiment_r4" in output
    info = read_json(bob.folder / "hub.json")
    assert (info["repo"], info["commit"], info["revision"]) == (REPO, commit, "v1.1.0")
    for name, content in server.files(REPO, "v1.1.0").items():
        assert (bob.folder / name).read_bytes() == content
    before, after = logits(me.folder, base), logits(bob.folder, base)
    assert torch.equal(before, after)
    assert not torch.equal(before, base(torch.arange(5, 45).reshape(2, 20)).logits)

    # What was pulled is a finished run for the rest of the project.
    assert bob.ask(f"print(recipes.find('{RECIPE}').read_trained_config()['lora_r'])") == "4"
    assert not list(bob.folder.parent.glob(".*.part"))


@pytest.mark.slow
def test_a_second_pull_downloads_nothing_and_a_new_version_moves_the_old_aside(me, place, server):
    good(me.push())
    bob = place("bob", me.token)
    good(bob.pull())
    server.requests.clear()
    assert "is there already" in good(bob.pull())
    assert not {"download", "resolve"} & set(server.requests)
    # A file that was tampered with is noticed, and comes again from the cache.
    (bob.folder / "adapter_config.json").write_text("{}")
    assert "what was there is in" in good(bob.pull())
    assert read_json(bob.folder / "adapter_config.json")["r"] == 4
    assert (bob.folder.parent / "sentiment_r4.previous" / "adapter_config.json").read_text() == "{}"


@pytest.mark.slow
def test_without_a_network_the_cache_is_enough(me, place, server):
    good(me.push())
    bob = place("bob", me.token)
    good(bob.pull("--revision", "v1.1.0"))
    for number, (url, env) in enumerate(
        [(server.url, {"HF_HUB_OFFLINE": "1"}), ("http://127.0.0.1:9", {})]
    ):
        carol = place(f"carol{number}", me.token)
        carol.home, carol.url = bob.home, url
        server.requests.clear()
        arguments = ("pull", RECIPE, "--namespace", "me", "--revision", "v1.1.0")
        assert "from the cache" in good(carol.run(*arguments, **env))
        assert server.requests == []
        assert (carol.folder / adapters.WEIGHTS).read_bytes() == (
            me.folder / adapters.WEIGHTS
        ).read_bytes()
        dave = place(f"dave{number}", me.token)
        dave.url = url
        refused(dave.run(*arguments, **env), "not in the cache, and the Hub", status=1)


@pytest.mark.slow
def test_a_damaged_download_is_not_kept(me, place, server):
    good(me.push())
    bob = place("bob", me.token)
    for name in (adapters.WEIGHTS, "run.json"):
        server.change[name] = lambda content: content[:-8] + bytes(8)
        refused(bob.pull(), f"{name} is damaged", status=1)
        assert not bob.folder.exists()
        server.change.clear()
    good(bob.pull())


def test_a_download_that_was_cut_goes_on_where_it_stopped(place, server):
    """The client writes 10 MB at a time, so the adapter is one of the larger base: 18.9 MB."""
    config, tensors = lora(
        architectures.find("meta-llama/Llama-3.1-8B-Instruct"), 8, kind=np.float32
    )
    server.put("wangd12/sentiment_llama_3_1_8b_8bits_r8", files_of(config, tensors))
    bob = place("bob")
    server.shorten[adapters.WEIGHTS] = 12_000_000
    folder = bob.root / "runs" / "llama-3.1-8b" / "sentiment_r8"
    first = bob.run("pull", "sentiment_r8")
    if first.returncode:  # huggingface_hub 1.31 goes on by itself
        refused(first, "connection to the Hub broke.*run it again", status=1)
        assert not folder.exists() and server.ranges == []
        good(bob.run("pull", "sentiment_r8"))
    assert server.ranges == [adapters.WEIGHTS]
    assert (folder / adapters.WEIGHTS).read_bytes() == save(tensors)


def test_a_run_that_was_trained_here_is_never_written_over(me, server):
    good(me.push())
    before = {p.name: p.read_bytes() for p in me.folder.iterdir() if p.is_file()}
    server.requests.clear()
    refused(me.pull(), "was made here; FORCE=1 moves it aside")
    assert server.requests == []
    assert {p.name: p.read_bytes() for p in me.folder.iterdir() if p.is_file()} == before
    good(me.pull("--force"))
    previous = me.folder.with_name("sentiment_r4.previous")
    assert {p.name: p.read_bytes() for p in previous.iterdir() if p.is_file()} == before


@pytest.mark.parametrize(
    ("address", "repo", "folder"),
    [
        ("me/mine", "me/mine", ""),
        ("https://huggingface.co/me/mine/", "me/mine", ""),
        ("https://huggingface.co/me/mine/tree/main/4bits/r4", "me/mine", "4bits/r4/"),
        ("me/mine/tree/mainly", "me/mine", "tree/mainly/"),
        *(
            (wrong, None, "")
            for wrong in ("mine", "me/tree/main", "../../etc", "me//mine", "me/.x")
        ),
    ],
)
def test_an_address_names_a_repository_or_a_folder_of_one(address, repo, folder):
    if repo:
        source = pull.find_source(None, None, address, None, None)
        assert (source.repo, source.folder, source.revision) == (repo, folder, "main")
        return
    with pytest.raises(common.WrongInput, match="is no name on the Hub"):
        pull.find_source(None, None, address, None, None)


@pytest.mark.slow
def test_unknown_names_are_one_line_each(me, place, server):
    good(me.push())
    bob = place("bob", me.token)
    refused(bob.run("pull", RECIPE, "--namespace", "nobody"), "is not on the Hub")
    refused(bob.pull("--revision", "v9"), "no such revision")
    refused(bob.run("pull", RECIPE), "FinLoRA published no")
    refused(bob.run("pull", "--adapter", "../../etc"), "is no name on the Hub")
    refused(bob.run("pull"), "RECIPE=… or ADAPTER=")
    assert not (bob.root / "runs").exists() or not list((bob.root / "runs").rglob("*.json"))


# --- What others publish ---


QKV = ("q_proj", "k_proj", "v_proj")


def lora(model: architectures.Model, rank: int = 4, modules=QKV, kind=np.float16, **changes):
    """(adapter_config.json, tensors) of an adapter for a base, as PEFT writes them."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.source,
        "r": rank,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "target_modules": list(modules),
        "bias": "none",
    }
    base = adapters.list_modules(model, "model.layers")
    adapted = adapters.Settings.model_validate(config).select(base, "the adapter")
    shapes = adapters.list_lora_tensors(base, adapted, changes.get("use_dora"))
    tensors = {name: np.full(shape, 0.01, kind) for name, shape in shapes.items()}
    return config | changes, tensors


SMOLLM2 = architectures.find("HuggingFaceTB/SmolLM2-135M-Instruct")
THEIRS = "stranger/adapter"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 12\n"


def files_of(config, tensors, **more: bytes) -> dict[str, bytes]:
    content = {adapters.CONFIG: json.dumps(config).encode(), adapters.WEIGHTS: save(tensors)}
    return content | more


def test_finloras_own_adapter_comes_by_the_name_of_its_recipe(place, server):
    llama = architectures.find("meta-llama/Llama-3.1-8B-Instruct")
    config, tensors = lora(llama, base_model_name_or_path="meta-llama/Meta-Llama-3.1-8B-Instruct")
    name = "wangd12/sentiment_llama_3_1_8b_4bits_r4"
    server.put(name, files_of(config, tensors, **{"training_args.bin": b"\x80\x04pickle"}))
    bob = place("bob")
    good(bob.run("pull", "sentiment_r4"))
    run = bob.root / "runs" / "llama-3.1-8b" / "sentiment_r4"
    assert not (run / "training_args.bin").exists()
    info, config = read_json(run / "run.json"), read_yaml(run / "config.yaml")
    assert info["prompt_format"] == "finlora" and info["recipe"] == "llama-3.1-8b/sentiment_r4"
    assert info["trainable_parameters"] == memory.count_trainable(
        llama, memory.Setup(rank=4, modules=("q_proj", "k_proj", "v_proj"))
    )
    assert (config["lora_alpha"], config["load_in_4bit"]) == (32, True)
    bob.ask("recipes.find('sentiment_r4').read_trained_config()")

    # By the repository's own name it lies apart, and its config is a recipe.
    good(bob.run("pull", "--adapter", name))
    config_file = bob.root / "runs" / "hub" / name / "config.yaml"
    folder = bob.ask(f"print(recipes.find('{config_file}').run.folder)")
    assert folder == str(config_file.parent.resolve())


def test_an_adapter_for_a_base_that_only_the_hub_knows_is_held_against_its_config(
    place, server, tiny
):
    shape = read_json(tiny / "config.json")
    server.put("tester/tiny", {"config.json": json.dumps(shape).encode()})
    model = architectures.parse_config("tester/tiny", shape)
    assert (model.layers, model.hidden, model.kv_heads, model.head_dim) == (2, 64, 2, 16)
    config, tensors = lora(model, modules=("q_proj", "down_proj"), use_dora=True)
    server.put(THEIRS, files_of(config, tensors))
    bob = place("bob")
    good(bob.run("pull", "--adapter", THEIRS))
    run = bob.root / "runs" / "hub" / THEIRS
    assert read_yaml(run / "config.yaml")["peft_use_dora"] is True
    assert "stranger/adapter at " in good(bob.run("adapters"))
    # Nothing says at which precision it was trained, so that is asked for.
    assert read_json(run / "run.json")["precision"] == "unknown"
    refused(bob.run("chat", "", "x", "--adapter", THEIRS), "PRECISION= is one of")
    good(bob.run("pull", "--adapter", THEIRS, "--precision", "nf4"))
    assert read_yaml(run / "config.yaml")["load_in_4bit"] is True


def test_an_adapter_in_a_folder_of_a_repository_comes_by_its_path(place, server):
    llama = architectures.find("meta-llama/Llama-3.1-8B-Instruct")
    mirror = "NousResearch/Meta-Llama-3.1-8B-Instruct"
    config, tensors = lora(llama, rank=8, base_model_name_or_path=mirror)
    folder = "8bits_r8/finer_llama_3_1_8b_8bits_r8"
    files = {f"{folder}/{name}": content for name, content in files_of(config, tensors).items()}
    server.put("lab/adapters", files | {"8bits_r8/other/adapter_model.bin": b"\x80\x04"})
    bob = place("bob")
    good(bob.run("pull", "--adapter", f"lab/adapters/{folder}"))
    run = bob.root / "runs" / "hub" / "lab" / "adapters" / folder
    info, config = read_json(run / "run.json"), read_yaml(run / "config.yaml")
    assert (info["prompt_format"], config["load_in_8bit"]) == ("finlora", True)
    assert (
        config["base_model"] == "meta-llama/Llama-3.1-8B-Instruct"
    )  # what the mirror is a copy of
    output = good(bob.run("pull", "--adapter", f"lab/adapters/{folder}"))
    assert "is there already" in output
    refused(bob.run("pull", "--adapter", "lab/adapters/8bits_r8"), "adapter_config.json is missing")


def test_a_nested_alternation_is_pulled_in_bounded_time(place, server):
    """It means the same modules as a list of names, and would never end where it does not match."""
    nested = "".join(f"({c}|({c}))" for c in "l" + "a" * 500)
    config, tensors = lora(SMOLLM2, target_modules=rf"{nested}|.*\.(q_proj|k_proj|v_proj)")
    server.put(THEIRS, files_of(config, tensors))
    good(place("bob").run("pull", "--adapter", THEIRS, "--precision", "nf4"))


def header_of(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


def tensors_of(dtype: str, shape: list[int], size: int, names: str = "a") -> bytes:
    """A safetensors file whose tensors all claim the same `size` bytes."""
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    return header_of(json.dumps(dict.fromkeys(names, entry)).encode(), bytes(size))


def hostile() -> dict[str, tuple[dict[str, bytes], str]]:
    """Repositories that must not be taken, and the reason."""
    config, tensors = lora(SMOLLM2)
    first = sorted(tensors)[0]
    plain = files_of(config, tensors)
    sha = hashlib.sha256(plain[adapters.WEIGHTS]).hexdigest()

    def changed(**changes) -> dict[str, bytes]:
        return files_of(config | changes, tensors)

    def weights(content: bytes) -> dict[str, bytes]:
        return plain | {adapters.WEIGHTS: content}

    def with_tensors(**changes) -> dict[str, bytes]:
        return files_of(config, tensors | changes)

    def axolotl(**changes) -> dict[str, bytes]:
        content = {"base_model": "x", "datasets": [{"path": "x"}]} | changes
        return plain | {"config.yaml": yaml.safe_dump(content).encode()}

    def config_file(text: bytes) -> dict[str, bytes]:
        return plain | {"config.yaml": b"datasets: [{path: x}]\n" + text}

    def run_info(**content) -> dict[str, bytes]:
        return plain | {"run.json": json.dumps({"adapter_sha256": sha} | content).encode()}

    def scores(content: dict) -> dict[str, bytes]:
        return plain | {"evals/fpb.json": json.dumps(content).encode()}

    bad = np.full(tensors[first].shape, 0.01, np.float16)
    bad[0, 0] = np.nan
    merges = [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12)]
    sound = scored(sha, "fpb", ["neutral"] * 40)
    other_dataset = sound | {"evaluated": sound["evaluated"] | {"dataset": "../fpb"}}
    pickle = {adapters.CONFIG: plain[adapters.CONFIG], "adapter_model.bin": b"\x80\x04cos\nsystem"}
    without_first = {name: tensor for name, tensor in tensors.items() if name != first}
    entry = {"path": "x", "rows": 1, "sha256": "0"}
    return {
        "only a pickle": (pickle, "a pickle, which can run code"),
        "no adapter": ({"README.md": b"x"}, "adapter_config.json is missing"),
        "a path outside": (plain | {"../../evil.json": b"{}"}, "leaves the folder"),
        "an absolute path": (plain | {"/etc/passwd": b"x"}, "leaves the folder"),
        "a huge header": (weights(struct.pack("<Q", 2**40) + b"{"), "its header claims"),
        "a header that is no JSON": (weights(header_of(b"not json")), "not JSON"),
        "a deep header": (weights(header_of(b"[" * 200_000)), "not JSON"),
        "a name twice": (weights(header_of(b'{"a": 1, "a": 2 }')), "is repeated"),
        "overlapping tensors": (weights(tensors_of("F16", [2], 4, "ab")), "does not add up"),
        "a tensor of pickles": (weights(tensors_of("I64", [1], 8)), "none of F32, F16, BF16"),
        "a shape that lies": (weights(tensors_of("F16", [9], 4)), "does not add up"),
        "wrong shapes": (with_tensors(**{first: np.zeros((4, 577), np.float16)}), "has shape"),
        "a wrong rank": (changed(r=8), "has shape"),
        "a tensor too many": (with_tensors(surprise=np.zeros(3, np.float16)), "does not name"),
        "a tensor too few": (files_of(config, without_first), "lacks the tensor"),
        "far too large": (
            weights(plain[adapters.WEIGHTS] + bytes(3 * 2**20)),
            "implies .* at most",
        ),
        "not a number": (with_tensors(**{first: bad}), "holds NaN or infinity"),
        "another base": (
            changed(base_model_name_or_path="meta-llama/Llama-3.2-1B-Instruct"),
            "adapter for meta-llama/Llama-3.2-1B-Instruct",
        ),
        "a base on its author's disk": (
            changed(base_model_name_or_path="/home/me/base"),
            "adapter for /home/me/base",
        ),
        "code to import": (
            changed(auto_mapping={"parent_library": "os", "base_model_class": "system"}),
            "auto_mapping",
        ),
        "another method": (changed(peft_type="PROMPT_TUNING"), "LORA is needed"),
        "whole modules": (changed(modules_to_save=["up_proj"]), "modules_to_save"),
        "a head that is not there": (changed(modules_to_save=["lm_head"]), "lacks .*lm_head"),
        "a rewritten base": (changed(init_lora_weights="pissa"), "init_lora_weights"),
        "a pointer": (weights(POINTER), "Git LFS pointer"),
        "a config that is a pointer": (plain | {adapters.CONFIG: POINTER}, "Git LFS pointer"),
        "a file that is cut off": (weights(plain[adapters.WEIGHTS][:-9]), "cut off"),
        "a regular expression without end": (
            changed(target_modules="(.*)*(.*)*(.*)*(.*)*(.*)*x"),
            "takes too long; a simpler expression",
        ),
        "a module that is none": (changed(target_modules=["nothing"]), "is no linear layer of"),
        "a config that is no object": (plain | {adapters.CONFIG: b"[]"}, "an object is needed"),
        "a large config": (plain | {adapters.CONFIG: b" " * (2**20 + 1)}, "is the most"),
        "another run.json": (run_info(adapter_sha256="0" * 64), "describes another adapter"),
        "a run.json of texts": (run_info(seconds="long"), "run.json: seconds is malformed"),
        "a run.json of other data": (
            run_info(data=[entry | {"rows": "many"}]),
            "run.json: data.0.rows is malformed",
        ),
        "remote code": (axolotl(trust_remote_code=True), "trust_remote_code"),
        "remote code in the data": (
            axolotl(datasets=[{"path": "x", "trust_remote_code": True}]),
            "trust_remote_code",
        ),
        "a plugin": (axolotl(plugins=["evil.Plugin"]), "plugin"),
        "plugins that are no list": (axolotl(plugins={"evil.Plugin": 1}), "plugins is malformed"),
        "data that is no mapping": (axolotl(datasets=["x"]), "datasets.0 is malformed"),
        "special tokens that are none": (axolotl(special_tokens={"x": "y"}), "only name tokens"),
        "YAML that makes objects": (
            config_file(b"x: !!python/object/apply:os.system [id]"),
            "not YAML",
        ),
        "deep YAML": (config_file(b"x: " + b"[" * 200_000), "nested deeper"),
        "YAML that expands": (
            config_file(f"a0: &a0 {{x: 1}}\n{''.join(merges)}".encode()),
            "aliases expand",
        ),
        "YAML in a circle": (config_file(b"x: &x [*x]"), "aliases expand"),
        "a date that is none": (config_file(b"x: 2001-99-99"), "not YAML"),
        "scores that are none": (scores({"evaluated": 3}), "malformed"),
        "scores of a path": (scores(other_dataset), "no name of a dataset"),
    }


@pytest.mark.parametrize("case", hostile())
def test_a_malicious_repository_is_refused_before_anything_is_loaded(
    server, tmp_path, monkeypatch, capsys, case
):
    """In this process, which the command would leave in the same way."""
    files, why = hostile()[case]
    server.put("me/mine", files)
    content = recipes.build_config(RECIPE) | {"output_dir": str(tmp_path / "runs" / "mine")}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "pull", tmp_path / "mine.yaml", "--namespace", "me")
    refused(subprocess.CompletedProcess([], ended.value.code, *capsys.readouterr()), why)
    assert [p for p in (tmp_path / "runs").rglob("*") if p.is_dir()] == []
    assert not [p for p in tmp_path.rglob("*") if p.name in ("evil.json", "adapter_model.bin")]


def test_files_of_other_programs_are_left_out_and_a_foreign_tokenizer_is_checked(
    server, tmp_path, monkeypatch, capsys
):
    """`make pull` writes what a run has, which makes no run of the tokenizer beside it."""
    files = files_of(*lora(SMOLLM2)) | {
        "run.json": b'{"id": "abc"}',
        "config.yaml": b"learning_rate: 1",
        "tokenizer.json": b"{}",
    }
    server.put("me/mine", files)
    run = Run(tmp_path / "runs" / "mine")
    content = recipes.build_config(RECIPE) | {"output_dir": str(run.folder)}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    call(monkeypatch, "pull", tmp_path / "mine.yaml", "--namespace", "me")
    output = capsys.readouterr().out
    assert "me/mine/run.json is another program's (it has no adapter_sha256)" in output
    assert "me/mine/config.yaml is another program's (it has no datasets)" in output
    assert run.is_intact and run.config["datasets"] == content["datasets"]
    assert run.tokenizer_file.is_file() and not run.has_tokenizer
    call(monkeypatch, "pull", tmp_path / "mine.yaml", "--namespace", "me")
    assert "is there already" in capsys.readouterr().out
    origin = read_json(run.origin_file)
    origin["remote"] |= {"run.json": "", "config.yaml": ""}  # as a run that was pushed has them
    common.write_json(run.origin_file, origin)
    assert run.has_tokenizer


def test_an_adapter_of_a_base_of_another_kind_is_refused_with_what_to_do(
    server, tmp_path, monkeypatch, capsys
):
    for kind, size in (("phi3", "num_attention_heads"), ("gpt2", "n_head")):
        base = {"model_type": kind, "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
        base |= {size: 4, "intermediate_size": 128}
        server.put(f"lab/{kind}", {"config.json": json.dumps(base).encode()})
        config, tensors = lora(SMOLLM2)
        config |= {"base_model_name_or_path": f"lab/{kind}", "target_modules": ["qkv_proj"]}
        server.put(f"me/{kind}", files_of(config, tensors))
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        with pytest.raises(SystemExit) as ended:
            call(monkeypatch, "pull", "--adapter", f"me/{kind}")
        result = subprocess.CompletedProcess([], ended.value.code, *capsys.readouterr())
        refused(result, "bases whose layers have Llama's names.*ADAPTER=path")


def test_an_adapter_of_every_kind_that_peft_writes_fits_its_own_config(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = architectures.parse_config("x/tiny", read_json(tiny / "config.json"))
    kinds = {
        "dora": {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
        "rslora": {"use_rslora": True, "target_modules": ["v_proj"]},
        "all": {"target_modules": "all-linear"},
        "expression": {"target_modules": r"model\.layers\.\d+\.self_attn\.(q_proj|o_proj)"},
    }
    for name, settings in kinds.items():
        whole = AutoModelForCausalLM.from_pretrained(tiny)
        wanted = get_peft_model(whole, LoraConfig(r=3, task_type="CAUSAL_LM", **settings))
        wanted.save_pretrained(tmp_path / name)
        count = sum(p.numel() for p in wanted.parameters() if p.requires_grad)
        assert adapters.check(tmp_path / name, model) == count, name


def test_infinities_of_every_type_of_number_are_found(tmp_path):
    import torch
    from safetensors.torch import save_file

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for value, sound in ((1e4, True), (float("nan"), False), (float("-inf"), False)):
            path = tmp_path / "x.safetensors"
            save_file(
                {"a": torch.ones(5, 7, dtype=dtype), "b": torch.tensor([value]).to(dtype)}, path
            )
            assert adapters.is_finite(path, adapters.read_header(path)["b"]) == sound


# --- List, and secrets ---


@pytest.mark.slow
def test_adapters_lists_the_runs_here_and_what_a_namespace_holds(me, server):
    good(me.push())
    output = good(me.run("adapters", "--namespace", "me"))
    here, there = output.split("me on ")
    assert RECIPE in here and "fpb accuracy 75.0" in here and "trained here" in here
    assert REPO in there and "v1.1.0" in there and "fpb accuracy 75.0" in there
    assert "private" in there
    me.token = ""
    assert "0 adapters" in good(me.run("adapters", "--namespace", "me"))


@pytest.mark.slow
def test_the_token_is_in_nothing_that_was_written_printed_or_sent_astray(me, place, server):
    bob = place("bob", me.token)
    server.at["tag"] = once(cut)
    me.push()
    good(me.push("--public", HF_DEBUG="1", DEBUG="1"))
    good(me.run("adapters", "--namespace", "me"))
    server.change[adapters.WEIGHTS] = lambda content: content[::-1]
    bob.pull(DEBUG="1")
    server.change.clear()
    good(bob.pull())
    bob.token = "hf_" + "Wrong" * 7
    bob.pull("--force")
    for token in (me.token, bob.token):
        for text in (*me.outputs, *bob.outputs):
            assert token not in text
        for where in (me, bob):
            for path in where.root.parent.rglob("*"):
                if path.is_file() and not path.is_relative_to(where.root / "models"):
                    assert token.encode() not in path.read_bytes(), path
    assert server.leaks == []


def test_what_is_compared_on_the_hub_is_gits_digest_or_sha256():
    # `printf 'hello\n' | git hash-object --stdin` and `sha256sum`.
    blob = "ce013625030ba8dba906f756967f9e9ca394464a"
    sha = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    assert client.has_digest(b"hello\n", blob) and client.has_digest(b"hello\n", sha)
    assert not client.has_digest(b"hello\n", blob[::-1])


def test_texts_of_a_score_file_are_kept_only_where_they_are_answers():
    rows = [{"row": 3, "expected": "x" * 500, "doc": {"q": "secret", "n": 2}, "p": [0.5, "t"]}]
    assert push.strip_texts(rows) == [
        {"row": 3, "expected": "x" * 200, "doc": {"n": 2}, "p": [0.5]}
    ]
