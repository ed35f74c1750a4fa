"""Adds a base to the catalogue, or checks one that is in it.

    python -m tools add-model Qwen/Qwen3-1.7B                    config and tokenizer from the Hub
    python -m tools add-model Qwen/Qwen3-1.7B --folder ~/qwen    or from a folder

A new base gets its row in recipes/matrix.yaml, its architecture in recipes/models/ and its recipes.
What was checked, with which versions, is written to recipes/checks/<model>.json and shown on its
page. No weight is loaded: a tiny random model of the base's class stands in.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools import architectures, catalogue, models, recipes, rendering
from tools.base import describe, tokens, trial
from tools.base.findings import Finding, build_record, judge
from tools.common import ROOT, JobFailed, WrongInput, format_yaml, read_json, shown
from tools.hub_errors import explain_errors
from tools.train import scale, twins

FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
SIZES = {"hidden_size", "num_hidden_layers", "vocab_size"}  # that a base's own config.json states
# The modules of linear attention that do what the named ones do.
SAME_ROLE = {
    "q_proj": ["in_proj_qkv"],
    "o_proj": ["in_proj_z", "in_proj_b", "in_proj_a", "out_proj"],
}
WORK = ROOT / "runs" / ".base"
UNSEEN = "its real weights: none was loaded, trained or scored"


@dataclass(frozen=True)
class BaseSource:
    """Where a base's files are, and what the Hub says of it: None where it was not asked."""

    hub: str
    folder: Path
    gated: bool | None = None
    revision: str | None = None
    licence: str | None = None


def find_base_source(hub: str, folder: Path | None) -> BaseSource:
    """Where a base's config and tokenizer are: in a folder, or in the Hub's cache after a download.

    Raises WrongInput for a name that is none of the Hub's, and for a folder without config.json.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub):
        raise WrongInput(f'HUB="{hub}": a name on the Hub is needed, such as Qwen/Qwen3-1.7B')
    if folder:
        if not (folder / "config.json").is_file():
            raise WrongInput(
                f"{folder} has no config.json; FOLDER= needs a base's config and tokenizer"
            )
        return BaseSource(hub, folder)
    from huggingface_hub import HfApi, snapshot_download

    with explain_errors(f"the base {hub}"):
        info = HfApi().model_info(hub)
        path = snapshot_download(hub, allow_patterns=FILES, ignore_patterns=models.COPIES)
    licence = getattr(info.card_data, "license", None) if info.card_data else None
    return BaseSource(hub, Path(path), bool(info.gated), info.sha, licence)


def name_new_base(hub: str) -> str:
    """The name of a new base in the catalogue: the Hub's, without its owner and -instruct."""
    name = hub.partition("/")[2].lower()
    return re.sub(r"-(instruct|it|chat)(?=-|$)", "", name)


# ---- writing a new base


def build_row(source: BaseSource, config: Any, tokenizer: Any) -> dict[str, Any]:
    """The row of a base under `models` in recipes/matrix.yaml."""
    row: dict[str, Any] = {"hub": source.hub}
    row |= {"revision": source.revision} if source.revision else {}
    title = source.hub.partition("/")[2].replace("-", " ")
    row |= {"title": title, "gated": bool(source.gated)}
    row["settings"] = tokens.propose_settings(tokenizer)
    model = describe.build_empty(config)
    decoder = describe.find_decoder(model)
    names = {name.rpartition(".")[2] for name, _ in decoder.named_modules()}
    if "in_proj_qkv" in names:
        row["same_role"] = SAME_ROLE
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    outside = [name for name, _ in model.named_modules() if not name.startswith(f"{prefix}.")]
    if any(name.rpartition(".")[2] in architectures.MODULES for name in outside):
        row["target_modules"] = rf"{re.escape(prefix)}\.layers\.\d+\.(self_attn|mlp)\.(NAMES)"
    if any(describe.list_expert_modules(layer) for layer in decoder.layers):
        methods = recipes.read_matrix()["methods"]
        row["methods"] = [name for name, method in methods.items() if method["bits"] == 16]
    return row


def insert_row(text: str, table: str, row: dict[str, Any]) -> str:
    """The text of recipes/matrix.yaml with a row at the end of one of its tables."""
    lines = text.splitlines(keepends=True)
    start = lines.index(f"{table}:\n") + 1
    end = next(
        (place for place in range(start, len(lines)) if re.match(r"\S", lines[place])),
        len(lines),
    )
    while not lines[end - 1].strip():
        end -= 1
    new_lines = [f"  {line}\n" for line in format_yaml(row).splitlines()]
    return "".join([*lines[:end], *new_lines, *lines[end:]])


def write_base(source: BaseSource, model: str, config: Any, tokenizer: Any) -> None:
    """Writes the row and the architecture of a new base."""
    path = architectures.FOLDER / f"{model}.json"
    content = describe.describe_architecture(source.hub, config)
    rendering.write_text(path, json.dumps(content, indent=2) + "\n")
    matrix = recipes.FOLDER / "matrix.yaml"
    text = insert_row(matrix.read_text(), "models", {model: build_row(source, config, tokenizer)})
    starts = recipes.read_matrix()["licences"]
    if source.licence and not any(source.hub.startswith(start) for start in starts):
        text = insert_row(text, "licences", {source.hub: [source.licence]})
    rendering.write_text(matrix, text)
    recipes.clear_caches()
    architectures.read_architectures.cache_clear()
    print(f"add-model  {model}: its row is in {shown(matrix)}, its architecture in {shown(path)}")


# ---- checking a base


def check_architecture(source: BaseSource, config: Any) -> list[Finding]:
    """Whether transformers builds what recipes/models/ says, from the base's own config.json."""
    what = "transformers builds the architecture that the planner knows"
    text = architectures.find_text_part(read_json(source.folder / "config.json"))
    if not text.keys() >= SIZES:
        reason = "the base's own config.json was not at hand; its sizes are from public configs"
        return [Finding("architecture", what, "not verified", reason)]
    content = describe.describe_architecture(source.hub, config)
    built, recorded = architectures.parse_architecture(content), architectures.find(source.hub)
    reasons = []
    if built.parameters != recorded.parameters:
        reasons.append(f"{built.parameters:,} parameters, recorded {recorded.parameters:,}")
    elif built.list_layers() != recorded.list_layers():
        reasons.append("its layers are not those that recipes/models/ has")
    name = type(describe.build_empty(config)).__name__
    return [judge("architecture", what, reasons, f"{name}, {built.parameters:,} parameters")]


def collect_findings(source: BaseSource, model: str, methods: list[str]) -> list[Finding]:
    """All findings on a base of the catalogue: tokenizer, architecture, and some of its methods."""
    config = describe.read_config(source.folder)
    recipe = tokens.build_base_config(model, methods[0], str(source.folder))
    tokenizer = models.load_tokenizer(recipe)
    findings = tokens.check_tokens(recipe, tokenizer) + check_architecture(source, config)
    work = WORK / model
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    if getattr(config, "tie_word_embeddings", None) is not None:
        config.tie_word_embeddings = architectures.find(source.hub).tied
    twins.write_twin(config, tokenizer, work / "twin")
    for method in methods:
        findings += trial.check_method(model, method, work / "twin", work)
    if all(finding.verdict != "failed" for finding in findings):
        shutil.rmtree(work)  # a trial that failed keeps its log
    return findings


def choose_methods(model: str, names: str | None) -> list[str]:
    """The methods to try: those in `names`, else the two with a file, where they are offered."""
    row = recipes.read_matrix()["models"][model]
    offered = list(row.get("methods", recipes.read_matrix()["methods"]))
    if not names:
        return [name for name in ("r4", "qlora_all") if name in offered] or offered[:1]
    chosen = names.replace(",", " ").split()
    if unknown := [name for name in chosen if name not in offered]:
        raise WrongInput(f'METHODS: {model} has no "{unknown[0]}"; there are {", ".join(offered)}')
    return chosen


def add_model(hub: str, folder: Path | None, name: str | None, methods: str | None) -> None:
    """Adds a base, or checks one of the catalogue again; raises JobFailed if a check fails."""
    source = find_base_source(hub, folder)
    model = recipes.find_base(hub)[0]
    if not model:
        model = name or name_new_base(hub)
        if model in recipes.read_matrix()["models"]:
            raise WrongInput(
                f'MODEL="{model}" is another base of the catalogue; MODEL=… names this one'
            )
        from transformers import AutoTokenizer

        config = describe.read_config(source.folder)
        write_base(
            source,
            model,
            config,
            AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False),
        )
    chosen = choose_methods(model, methods)
    findings = collect_findings(source, model, chosen)
    path = recipes.FOLDER / "checks" / f"{model}.json"
    record = json.dumps(build_record(findings), indent=2, ensure_ascii=False) + "\n"
    rendering.write_text(path, record)
    catalogue.render()
    scale.write()
    print_findings(source, model, findings)


def print_findings(source: BaseSource, model: str, findings: list[Finding]) -> None:
    """Prints the findings and what was not verified; raises JobFailed if a check failed."""
    for finding in findings:
        print(f"{finding.part:<12} {finding}")
    unknown = [finding.what for finding in findings if finding.verdict == "not verified"]
    unknown += ["whether it is gated; its revision; its licence"] if source.gated is None else []
    print(f"not verified {'; '.join([*unknown, UNSEEN])}")
    failed = [finding for finding in findings if finding.verdict == "failed"]
    if failed:
        raise JobFailed(
            f"{model}: {len(failed)} check{'s' if len(failed) > 1 else ''} failed, first "
            f"{failed[0].part}: {failed[0].detail}; change its row in recipes/matrix.yaml and "
            f"repeat: make add-model HUB={source.hub}"
        )
    print(f"ready      make recipes MODEL={model}")
