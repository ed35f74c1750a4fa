"""How long a set-up takes with uv and with pip, from the same lock and with warm caches.

    python -m bench.setup [--python python3.12] [--torch cpu|cuda]

Each run makes a whole environment in an empty folder, as `make setup` does. The first run with each
tool fills its cache and does not count.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.common import ROOT

FILES = ["requirements.txt", "requirements", "tools/__init__.py", "tools/setup.py"]


def time_set_up(uv: Path | None, arguments: list[str]) -> float:
    """Seconds of a set-up in an empty folder, with uv on PATH or without."""
    search_path = [
        folder
        for folder in os.environ["PATH"].split(os.pathsep)
        if not (Path(folder) / "uv").exists()
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in map(Path, FILES):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / path).is_dir():
                shutil.copytree(ROOT / path, folder / path)
            else:
                shutil.copy(ROOT / path, folder / path)
        if uv:
            (folder / "bin").mkdir()
            (folder / "bin" / "uv").symlink_to(uv)
            search_path.insert(0, str(folder / "bin"))
        start = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "tools.setup", *arguments],
            cwd=folder,
            env=os.environ | {"PATH": os.pathsep.join(search_path)},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="set-up with uv and with pip")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--torch", default="")
    options = parser.parse_args()
    arguments = ["--python", options.python, "--torch", options.torch]
    uv = Path(sys.executable).parent / "uv"
    seconds: dict[str, list[float]] = {"uv": [], "pip": []}
    for attempt in range(3):
        for tool, path in (("uv", uv), ("pip", None)):
            duration = time_set_up(path, arguments)
            if attempt:
                seconds[tool].append(duration)
    for tool, durations in seconds.items():
        print(f"{tool:<4} {min(durations):5.0f} s  (of {', '.join(f'{d:.0f}' for d in durations)})")
    print(f"pip takes {min(seconds['pip']) / min(seconds['uv']):.1f} times as long as uv")


if __name__ == "__main__":
    main()
