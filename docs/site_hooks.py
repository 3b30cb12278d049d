"""What mkdocs does not do by itself: README.md as the home page, and links to files outside docs/ as plain text."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

README = Path(__file__).resolve().parents[1] / "README.md"
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!\w+://|#)([^)#]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Adds the README as index.md; its links into docs/ become links between pages."""
    text = README.read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Writes a link that leads out of the site as text, with the file's place in the repository."""

    def text_of(link: re.Match[str]) -> str:
        label, target = link[1], link[2]
        if files.get_file_from_path(target) is not None:
            return link[0]
        place = target.removeprefix("../")
        return label if place in label else f"{label} (`{place}`)"

    return LINK.sub(text_of, markdown)
