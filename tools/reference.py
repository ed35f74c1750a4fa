"""Writes docs/commands.md from the command line, so that the page is never out of date.

make render
python -m tools check            fails where the page does not match
"""

import re
from typing import Any

import click

from tools.common import ROOT, format_markdown, update_page

PAGE = ROOT / "docs" / "commands.md"
MAKEFILE = ROOT / "Makefile"
INTRODUCTION = """# Commands

<!-- Written by `make render`. -->

Every job is a verb of `python -m tools`, and `make VERB` is the same call. An option is named like
its make variable, in lower case: `make train RECIPE=sentiment_r4 NPROC=2` is
`.venv/bin/python -m tools train sentiment_r4 --nproc 2`. For `--force` write `FORCE=1`, for
`--no-repair` write `REPAIR=0`. A make variable counts only on make's command line, except for those
in [networks.md](networks.md). `make` alone lists all jobs.
"""


def format_page(group: click.Group) -> str:
    """The page as Markdown: the verbs by panel, then the make targets that are no verbs."""
    targets = dict(re.findall(r"^([a-z-]+):.*?## (.*)$", MAKEFILE.read_text(), re.M))
    panels: dict[str, list[str]] = {}
    for name, verb in group.commands.items():
        text = format_verb(name, verb, name in targets)
        panels.setdefault(getattr(verb, "rich_help_panel", None) or "Other", []).append(text)
    sections = [f"## {panel}\n\n" + "\n".join(verbs) for panel, verbs in panels.items()]
    only_in_make = {name: targets[name] for name in targets if name not in group.commands}
    return "\n".join([INTRODUCTION, *sections, format_targets(only_in_make)])


def format_verb(name: str, verb: click.Command, is_target: bool) -> str:
    about, _, example = (verb.help or "").strip().partition("Example: ")
    about = " ".join(about.split()) + ("" if is_target else " (No make target.)")
    lines = [f"### {name}", "", about, ""]
    if example:
        lines += ["```", example.strip(), "```", ""]
    if verb.params:
        rows = [list_cells(parameter, is_target) for parameter in verb.params]
        lines.append(format_markdown(("option", "make variable", "meaning", "default"), rows, 4))
    return "\n".join(lines)


def list_cells(parameter: click.Parameter, is_target: bool) -> tuple[str, ...]:
    """A row of a verb's table; only a make target has variables."""
    is_argument = isinstance(parameter, click.Argument)
    names = [*parameter.opts, *parameter.secondary_opts]
    label = f"`{parameter.name}`" if is_argument else ", ".join(f"`{name}`" for name in names)
    variable = f"`{(parameter.name or '').upper()}`" if is_target else ""
    about = getattr(parameter, "help", None) or ""
    if isinstance(parameter.type, click.Choice):
        about += f" One of {', '.join(f'`{choice}`' for choice in parameter.type.choices)}."
    return label, variable, about.replace("|", "\\|"), describe_default(parameter)


def describe_default(parameter: click.Parameter) -> str:
    default: Any = parameter.default
    if parameter.required:
        return "required"
    if default is None or default is False:
        return ""
    return f"`{default}`"


def format_targets(targets: dict[str, str]) -> str:
    """{target: what `make` says of it · its variables} as a table."""
    rows = []
    for target, text in targets.items():
        about, _, variables = text.partition(" · ")
        usage = f"make {target} {variables}".strip().replace("|", "\\|")
        rows.append((f"`{usage}`", about))
    return "## Only in make\n\n" + format_markdown(("target", "does"), rows, 2)


def write(group: click.Group, check: bool = False) -> None:
    """Writes the page; with `check`, raises JobFailed where it does not match the command line."""
    update_page(PAGE, format_page(group), "make render", check)
