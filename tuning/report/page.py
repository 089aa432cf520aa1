"""Render Markdown as one self-contained HTML page: pictures and linked pages within it, light and dark."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from markdown_it import MarkdownIt
from markdown_it.token import Token

from llgbm.system.documents import COLOURS

MAY_BREAK = "\u200b"
OWN_STYLE = """
:root { --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --link: #7db8f5; } }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
nav { position: sticky; top: 0; background: var(--page); border-bottom: 1px solid var(--line); padding: .5rem 1rem;
  display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .85rem; z-index: 1; }
main { max-width: 72rem; margin: 0 auto; padding: 0 1rem 4rem; }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
h1 { margin: 1.5rem 0 .5rem; line-height: 1.2; }
h1 + p { font-size: 1.12rem; border-left: 4px solid var(--link); padding: .4rem 0 .4rem 1rem; }
h2 { margin-top: 2.6rem; padding-top: .4rem; border-top: 1px solid var(--line); scroll-margin-top: 3.5rem; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
th { background: var(--band); vertical-align: bottom; white-space: normal; }
tbody tr:hover { background: var(--band); }
img { max-width: 100%; height: auto; background: #ffffff; border: 1px solid var(--line); border-radius: 4px;
  padding: .4rem; }
iframe { width: 100%; height: 40rem; border: 1px solid var(--line); border-radius: 4px; }
img + em, p > em:only-child { color: var(--soft); font-size: .9rem; }
code { background: var(--band); padding: .1em .3em; border-radius: 3px; font-size: .88em; }
"""
STYLE = COLOURS + OWN_STYLE


def html_page(markdown: str, folder: Path) -> str:
    """Render Markdown; only files that lie directly in `folder` become pictures (PNG) and links (HTML).

    A linked page is shown in place, too: MLflow shows an artifact apart from those beside it. HTML is text, not run.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable("autolink")
    pages = {quote(page.name): page for page in folder.glob("*.html") if page.is_file()}
    tokens = list(_framed(parser.parse(markdown), pages))
    titles = _linked_headings(tokens)
    pictures = {picture.name: picture for picture in folder.glob("*.png") if picture.is_file()}
    for before, token in zip(tokens, tokens[1:], strict=False):
        for child in token.children or ():
            if child.type == "image":
                _inline(child, pictures)
            elif before.type == "th_open":
                child.content = re.sub("[/_]", rf"\g<0>{MAY_BREAK}", child.content)
    body = parser.renderer.render(tokens, parser.options, {})
    body = body.replace("<table>", '<div class="table"><table>').replace(
        "</table>", "</table></div>"
    )
    links = "".join(
        f'<a href="#{slug}">{html.escape(title)}</a>'
        for slug, title, level in titles
        if level == "h2"
    )
    title = html.escape(next((text for _, text, _ in titles), "Report"))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n"
        f'<body>\n<nav aria-label="sections">{links}</nav>\n<main>\n{body}</main>\n</body>\n</html>\n'
    )


def _linked_headings(tokens: Sequence[Token]) -> list[tuple[str, str, str]]:
    """Give each heading an id and return (id, text, level)."""
    found: list[tuple[str, str, str]] = []
    for token, inside in zip(tokens, tokens[1:], strict=False):
        if token.type == "heading_open":
            slug = f"s{len(found)}-" + re.sub(r"[^\w]+", "-", inside.content.lower()).strip("-")
            token.attrs["id"] = slug
            found.append((slug, inside.content, token.tag))
    return found


def _framed(tokens: Sequence[Token], pages: Mapping[str, Path]) -> Iterator[Token]:
    """Yield tokens with each linked page in a frame behind its paragraph; links to anything else become text."""
    linked: list[Path] = []
    for token in tokens:
        linked += _linked_pages(token, pages)
        yield token
        if token.type == "paragraph_close":
            yield from map(_frame, linked)
            linked = []


def _linked_pages(token: Token, pages: Mapping[str, Path]) -> Iterator[Path]:
    """Yield the pages that an inline token links; its other links become text."""
    is_kept = False
    for child in token.children or ():
        if child.type == "link_open":
            is_kept = str(child.attrs.get("href", "")) in pages
        if child.type in ("link_open", "link_close") and not is_kept:
            child.type, child.tag, child.attrs = "text", "", {}
        elif child.type == "link_open":
            yield pages[str(child.attrs["href"])]
            # Within MLflow's page the link leads nowhere: a sandbox then opens nothing.
            child.attrs |= {"target": "_blank", "rel": "noopener"}


def _frame(page: Path) -> Token:
    content = html.escape(page.read_text(encoding="utf-8"))
    title = html.escape(page.stem)
    frame = f'<iframe sandbox title="{title}" loading="lazy" srcdoc="{content}"></iframe>\n'
    return Token("html_block", "", 0, content=frame)


def _inline(image: Token, pictures: Mapping[str, Path]) -> None:
    """Put a picture's content into its tag; anything else becomes its alternative text."""
    source = str(image.attrs.get("src", ""))
    if source in pictures:
        content = base64.b64encode(pictures[source].read_bytes()).decode()
        image.attrs["src"] = f"data:image/png;base64,{content}"
    else:
        image.type, image.tag, image.children = "text", "", None
