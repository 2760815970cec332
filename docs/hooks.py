"""What mkdocs needs to show pages that lie outside docs/: reports, the model card, CONTRIBUTING and CHANGELOG.

They appear in the site under their paths in the repository, and links between them and docs/ lead there. A link to any
other file of the repository becomes plain text.
"""

from __future__ import annotations

import os
import posixpath
import re
from glob import glob
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "reports/**/*", "revit_fast/zoo/*/README.md")

LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]*)(?P<anchor>#[^)\s]*)?\)")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files from outside docs/."""
    for pattern in OUTSIDE:
        for name in sorted(glob(pattern, root_dir=ROOT, recursive=True)):
            if (ROOT / name).is_file():
                files.append(File.generated(config, Path(name).as_posix(), abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links that cross the border of docs/ into links of the site."""
    source = page.file.src_uri
    folder = posixpath.dirname(source)
    is_outside = not (ROOT / "docs" / source).is_file()
    in_repository = folder if is_outside else posixpath.join("docs", folder)

    def changed(link: re.Match) -> str:
        target = link["target"]
        if not target or ":" in target:
            return link[0]
        place = posixpath.normpath(posixpath.join(in_repository, target))
        if not (ROOT / place).exists():
            return link[0]  # mkdocs says that it leads nowhere
        uri = place.removeprefix("docs/")
        if files.get_file_from_path(uri) is None:
            return link["text"]
        return f"{link['image']}[{link['text']}]({posixpath.relpath(uri, folder or os.curdir)}{link['anchor'] or ''})"

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(changed, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(changed, markdown[end:])])
