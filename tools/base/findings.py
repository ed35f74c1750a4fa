"""What the checks of a base found, and the file of recipes/checks/ that keeps it."""

import importlib.metadata
import platform
from dataclasses import asdict, dataclass
from typing import Any, Literal

PACKAGES = ("axolotl", "transformers", "peft", "bitsandbytes", "tokenizers", "torch")
Verdict = Literal["verified", "failed", "not verified"]


@dataclass(frozen=True)
class Finding:
    """The result of a check. `part`: tokenizer, architecture, or the name of a method."""

    part: str
    what: str
    verdict: Verdict
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.verdict}{f' ({self.detail})' if self.detail else ''}"


def judge(part: str, what: str, reasons: list[str], detail: str = "") -> Finding:
    """A finding: `failed` with the first of `reasons`, or `verified` where there are none."""
    return Finding(part, what, "failed" if reasons else "verified", (reasons or [detail])[0])


def describe_versions() -> dict[str, str]:
    """Python and the packages that the checks ran with."""
    versions = {name: importlib.metadata.version(name).split("+")[0] for name in PACKAGES}
    return {"python": platform.python_version()} | versions


def build_record(findings: list[Finding]) -> dict[str, Any]:
    """The content of recipes/checks/<model>.json."""
    return {"versions": describe_versions(), "findings": [asdict(finding) for finding in findings]}
