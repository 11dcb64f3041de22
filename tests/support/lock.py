"""requirements.lock from pip's reports: every package that an install takes, with the hashes of its files.

make lock       asks the index, for each Python, what it would install (`pip install --dry-run --report`)
python -m tests.support.lock REPORT... > requirements.lock
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

HEAD = """\
# What `make .venv LOCKED=1` installs: linux x86_64, Python {pythons}. Made by `make lock` from constraints.txt.
# pip takes no file that has another hash, and no package that is not listed."""


def lock(reports: list[dict[str, Any]]) -> str:
    """The lines of a lock for all `reports`, each of one Python. A package that not all of them have gets a marker."""
    pythons = sorted(report["environment"]["python_version"] for report in reports)
    hashes: dict[str, set[str]] = defaultdict(set)
    wanted_by: dict[str, set[str]] = defaultdict(set)
    for report in reports:
        for item in report["install"]:
            if "archive_info" in item["download_info"]:  # all but this package itself
                name = f"{item['metadata']['name'].lower().replace('_', '-')}=={item['metadata']['version']}"
                hashes[name].add(item["download_info"]["archive_info"]["hashes"]["sha256"])
                wanted_by[name].add(report["environment"]["python_version"])
    lines = [HEAD.format(pythons=" and ".join(pythons))]
    for name in sorted(hashes):
        versions = sorted(wanted_by[name])
        marker = " or ".join(f"python_version == '{version}'" for version in versions) if versions != pythons else ""
        lines.append(" \\\n    ".join([f"{name}{marker and f' ; {marker}'}", *_options(hashes[name])]))
    return "\n".join(lines) + "\n"


def _options(digests: set[str]) -> list[str]:
    return [f"--hash=sha256:{digest}" for digest in sorted(digests)]


if __name__ == "__main__":
    print(lock([json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:]]), end="")
