"""Reading a report's page as a program would: tables by heading, names, links, texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = {"meta", "link", "br", "hr", "img", "input"}
Row = dict[str, tuple[str, str | None]]


@dataclass
class Table:
    """A table's columns, and its rows as (text, data-v) by column."""

    columns: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


class Page(HTMLParser):
    """Checks nesting while it reads.

    Attributes:
        tables: by the id of their section's heading.
        tags: every start tag with its attributes.
        texts: the text inside each kind of tag.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[str, Table] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self._section = ""
        self._cells: list[tuple[str, str | None]] | None = None
        self._in_body = False
        self.feed(html)
        self.close()
        assert self._open == []

    @property
    def text(self) -> str:
        """All that is to be read."""
        skipped = ("script", "style")
        return " ".join(t for tag, texts in self.texts.items() if tag not in skipped for t in texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        if tag not in _VOID:
            self._open.append(tag)
        if tag == "section":
            self._section = values["aria-labelledby"] or ""
        elif tag == "table":
            self.tables[self._section] = Table()
        elif tag == "tbody":
            self._in_body = True
        elif tag == "tr":
            self._cells = []
        elif tag in ("td", "th") and self._cells is not None:
            self._cells.append(("", values.get("data-v")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "tbody":
            self._in_body = False
        if tag == "tr" and self._cells is not None:
            table = self.tables[self._section]
            if self._in_body:
                table.rows.append(dict(zip(table.columns, self._cells, strict=True)))
            else:
                table.columns = [text for text, _ in self._cells]
            self._cells = None

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)
        if self._cells:
            text, value = self._cells[-1]
            self._cells[-1] = ((text + data).strip(), value)
