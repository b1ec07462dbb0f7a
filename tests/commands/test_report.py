"""One run as one page: complete, escaped, and needing nothing but itself."""

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from recorded_run import RecordedRun

from esper.commands.views.page import page
from esper.runtime.run_document import RunView
from esper.runtime.run_document import run_document

Cli = Callable[..., Any]
Record = Callable[..., Any]


class Page(HTMLParser):
    """Refuses what is not closed; collects text and everything that would be fetched."""

    VOID = ("meta", "!doctype")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


async def whole(run: RecordedRun) -> None:
    await run.whole()


async def begun(run: RecordedRun) -> None:
    await run.begin()


async def failed(run: RecordedRun) -> RunView:
    await run.begin()
    await run.fail("ESP-601", "<script>alert(1)</script> & more")
    return RunView(record=await run.library.run(run.run_id))


def test_report_is_one_page_with_everything_of_the_run(cli: Cli, record: Record, folder: Path) -> None:
    record(whole)
    result = cli("report", "digits-1", "--json")
    assert (result.code, result.json) == (0, {"run_id": "digits-1", "output": "results/digits-1.html"})
    found = Page((folder / "results" / "digits-1.html").read_text())
    assert found.links == [] and "script" not in found.tags
    assert found.tags.count("polyline") == 2
    for told in ("Run digits-1", "completed, 4 of 4 epochs", "digits-1/a1", "fossilized", "missed", "the loss is flat"):
        assert told in found.text
    assert "870 to 886" in found.text
    assert "max_epochs: 4" in found.text
    assert cli("report", "digits-1", "--output", "here.html").out == "here.html\n"
    assert (folder / "here.html").read_bytes() == (folder / "results" / "digits-1.html").read_bytes()


def test_report_of_a_run_that_has_only_begun(cli: Cli, record: Record, folder: Path) -> None:
    record(begun)
    assert cli("report", "digits-1").code == 0
    found = Page((folder / "results" / "digits-1.html").read_text())
    assert "No epoch has been finished yet" in found.text
    assert "Nothing has been grown" in found.text


def test_what_others_wrote_is_escaped(record: Record) -> None:
    view = record(failed)
    found = Page(page(view, run_document(view, web_ui=None, output=None)))
    assert "script" not in found.tags
    assert "<script>alert(1)</script> & more" in found.text


@pytest.mark.parametrize("place", ["there", "file/page.html"])
def test_a_place_that_cannot_be_written_is_refused(cli: Cli, record: Record, folder: Path, place: str) -> None:
    record(begun)
    (folder / "there").mkdir()
    (folder / "file").write_text("")
    result = cli("report", "digits-1", "--output", place, "--json")
    assert (result.code, result.error["code"]) == (2, "ESP-208")
    assert sorted(path.name for path in folder.iterdir()) == ["file", "there"]


def test_report_of_an_unknown_run_is_not_found(cli: Cli) -> None:
    assert cli("report", "nothing").code == 6
