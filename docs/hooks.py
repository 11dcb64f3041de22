"""What MkDocs does beside rendering: files of the repository that pages link to become pages of the site.

On GitHub `[recipe](../launch/cpu_lora.yaml)` leads to the file itself, which a site does not hold.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(\.\./([\w./-]+)\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add a page for each file outside of docs/ that some page links to."""
    found = {name for page in ROOT.glob("docs/*.md") for name in LINK.findall(page.read_text(encoding="utf-8"))}
    for name in sorted(found):
        files.append(File.generated(config, f"source/{_page(name)}", content=_content(name)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Point links to files outside of docs/ at their pages."""
    if page.file.src_uri.startswith("source/"):
        return markdown
    return LINK.sub(lambda found: f"](source/{_page(found[1])})", markdown)


def _page(name: str) -> str:
    return name if name.endswith(".md") else f"{name}.md"


def _content(name: str) -> str:
    """A page of Markdown as it is, its links into docs/ as they lead from there; any other file as it stands."""
    text = (ROOT / name).read_text(encoding="utf-8")
    up = "../" * len(PurePosixPath(name).parts)
    if name.endswith(".md"):
        return re.sub(r"\]\((?:\.\./)*docs/", f"]({up}", text)
    indented = "".join(f"    {line}\n" for line in text.splitlines())
    return f"# {name}\n\n{indented}"
