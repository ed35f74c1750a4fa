"""Decides which modules of a base an adapter config names, as PEFT does, in bounded time.

    patterns.select({"target_modules": ["q_proj"], "r": 8, "lora_alpha": 16}, names)

PEFT matches the regular expressions of a config against every module name. Untrusted regular
expressions must not backtrack exponentially, so any that is more than a name runs in a child
process with limits. The result is a plain list, and PEFT receives nothing else.
"""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS = 5  # for the expressions of one config; honest ones take milliseconds
MEMORY = 2**29  # bytes
NAME = re.compile(r"[\w.]*")  # matches in linear time
EXPRESSIONS = (
    *("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"),
    *("rank_pattern", "alpha_pattern"),
)
KEYS = (*EXPRESSIONS, "r", "lora_alpha", "layers_to_transform")


class TooComplex(Exception):
    """The expressions of the keys in the message are malformed, or exceed the limits."""


def select(config: dict[str, Any], names: list[str]) -> dict[str, tuple[int, float]]:
    """{module: (rank, alpha)} of the modules among `names` that get LoRA; may raise TooComplex."""
    keys = [key for key in EXPRESSIONS if not all(map(NAME.fullmatch, _to_list(config.get(key))))]
    if not keys:
        return _select(config, names)
    try:
        child = subprocess.run(
            [sys.executable, "-I", Path(__file__)],
            input=json.dumps([{key: config.get(key) for key in KEYS}, names]).encode(),
            capture_output=True,
            timeout=SECONDS,
            check=True,
        )
    except subprocess.SubprocessError:
        raise TooComplex(", ".join(keys)) from None
    return {name: (rank, alpha) for name, rank, alpha in json.loads(child.stdout)}


def _to_list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _select(config: dict[str, Any], names: list[str]) -> dict[str, tuple[int, float]]:
    return {
        name: (
            find_by_pattern(config.get("rank_pattern"), name, config["r"]),
            find_by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]),
        )
        for name in names
        if _is_target(config, name)
    }


def _matches(value: Any, module: str) -> bool:
    """Whether an expression, or one of a list of names or ends of names, means a module."""
    if isinstance(value, str):
        return bool(re.fullmatch(value, module))
    return any(f".{module}".endswith(f".{name}") for name in value or ())


def _is_target(config: dict[str, Any], module: str) -> bool:
    """peft.tuners.tuners_utils.check_target_module_exists, on names alone."""
    if config.get("exclude_modules") and _matches(config["exclude_modules"], module):
        return False
    saved = config.get("modules_to_save") or ()
    if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved):
        return False
    targets = config["target_modules"]
    if not _matches(targets, module):
        return False
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    if not layers or isinstance(targets, str) or module in targets:
        return True
    patterns = _to_list(config.get("layers_pattern")) or [r"[^.]*"]
    numbers = (re.match(rf".*?\.{pattern}\.(\d+)\.", module) for pattern in patterns)
    number = next(filter(None, numbers), None)
    return number is not None and int(number[1]) in layers


def find_by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """peft.utils.other.get_pattern_key: the value of the first pattern that matches."""
    values = (v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", module))
    return next(values, default)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        selected = _select(*json.load(sys.stdin))
    except (re.error, RecursionError, MemoryError, OverflowError):
        sys.exit(1)
    json.dump([[name, *values] for name, values in selected.items()], sys.stdout)
