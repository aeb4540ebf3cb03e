"""Runs every benchmark and writes benchmarks/RESULTS.md; `make bench` calls it.

    python benchmarks/run_all.py [NAME ...]

NAME is a script of this folder without ".py"; without any, all of them run, which takes more than an
hour. Sections of scripts that do not run stay as they are.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

import psutil
from harness import RESULTS

HERE = Path(__file__).parent
LINKS = ["2,5", "2,50", "2,100", "3,50", "4,50", "2,50,10", "2,50,100", "2,50,1000"]
# Options that keep each below half an hour.
BENCHMARKS = {
    "local_speed": ["--repeats", "3"],
    "swarm_speed": ["--repeats", "5"],
    "wide_area": [*(f"--link={link}" for link in LINKS), "--repeats", "2"],
    "traffic": [],
    "chaos": [],
    "lies": [],
    "fuzz": [],
    "privacy": [],
    "codec_speed": ["--repeats", "3"],
    "scale": ["--repeats", "2"],
    "gpu": [],
    "bloom_block": [],
    "loading_memory": [],
}


TITLE = """# Results

Written by `make bench`. Contenders take turns in one run; ratios are medians of each turn's.
"""


def main() -> None:
    names = sys.argv[1:] or list(BENCHMARKS)
    unknown = set(names) - BENCHMARKS.keys()
    if unknown:
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    results = HERE / "RESULTS.md"
    sections = _sections(results)
    packages = ("torch", "transformers", "peft", "hivemind", "petals")
    machine = (
        f"{date.today()}, {_processor()}, {os.cpu_count()} cores, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB; Python {platform.python_version()}, "
        f"{', '.join(f'{name} {version(name)}' for name in packages)}."
    )
    for name in names:
        print(f"bench: {name}", flush=True)
        with tempfile.TemporaryDirectory() as directory:
            tables = Path(directory, "tables.md")
            tables.touch()
            subprocess.run(
                [sys.executable, HERE / f"{name}.py", *BENCHMARKS[name]],
                check=True,
                env={**os.environ, RESULTS: str(tables)},
            )
            sections[name] = f"{machine}\n\n{tables.read_text(encoding='utf-8')}"
        written = [
            f"## {known}.py\n\n{sections[known].strip()}\n" for known in BENCHMARKS if known in sections
        ]
        results.write_text("\n".join([TITLE, *written]), encoding="utf-8")
    print(f"bench: {results} is written")


def _sections(results: Path) -> dict[str, str]:
    """What an earlier run wrote about each script."""
    if not results.exists():
        return {}
    _, *sections = results.read_text(encoding="utf-8").split("\n## ")
    return {section.partition(".py\n")[0]: section.partition(".py\n")[2] for section in sections}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
