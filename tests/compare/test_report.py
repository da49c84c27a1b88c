"""What a comparison leaves to be read: one page that needs nothing else, Markdown and JSON."""

import io
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from drawn_details import FIVE, THIRTEEN, Comparison, drawn_comparison
from rich.console import Console

from mp_lightning.compare.report import Repeat, write_report
from mp_lightning.compare.results import Details, Row
from mp_lightning.compare.summary import Summary, summarize
from mp_lightning.compare.table import terminal_table
from mp_lightning.compare.texts import number_text
from mp_lightning.compare.tuning import Budget, Tuned
from mp_lightning.runs import RunFolderError

HOW = Repeat(
    "python -m mp_lightning.meta compare target='<b>digits</b>' seeds=5",
    {"steps": 400, "tuning": {"values": 3}, "target": "<b>digits</b>"},
    Budget(3, 1),
    [Tuned("dropout", "p", 0.3, ((0.3, 0.91), (0.5, math.nan)))],
)
VOID = {"meta", "br", "wbr"}


class Page(HTMLParser):
    """Reads a page, and refuses tags that are not closed in their order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, Mapping[str, str | None]]] = []
        self.ids: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value and tag in ("section", "figure")]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data.replace("\u00a0", " ")


def report(folder: Path, comparison: Comparison, how: Repeat = HOW) -> tuple[Page, Summary]:
    rows, details = comparison
    summary = summarize(rows)
    write_report(folder, summary, rows, details, how)
    return Page((folder / "report.html").read_text(encoding="utf-8")), summary


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("five")
    report(folder, drawn_comparison())
    return folder


def read(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def without_nan(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON")


def test_verdict_then_tables_then_pictures_then_how_to_repeat_it(five: Path) -> None:
    order = ["verdict", "table", "pictures", "scores", "curves", "multiplier", "reliability", "reading", "repeat"]
    assert read(five).ids == order


def test_the_verdicts_of_the_headline_come_first_and_in_full(five: Path) -> None:
    page, summary = read(five), summarize(drawn_comparison()[0])
    places = [page.text.index(sentence) for sentence in summary.headline]
    assert places == sorted(places) and places[-1] < page.text.index("Scores on the test images")
    assert "metaperturb helps: accuracy +3" in page.text
    for arm in summary.arms.values():
        assert all(verdict.sentence in page.text for verdict in arm.verdicts.values())


def test_the_page_needs_no_other_file(five: Path) -> None:
    page = read(five)
    assert not {"script", "link", "iframe", "object", "img"} & {tag for tag, _ in page.tags}
    references = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href")]
    assert references and all(value and value.startswith("#") for value in references)
    assert "http" not in (five / "report.html").read_text(encoding="utf-8")


def test_the_table_has_means_with_intervals_and_differences_with_p(five: Path) -> None:
    arm = summarize(drawn_comparison()[0]).arms["metaperturb"]
    text = read(five).text
    estimate, against = arm.estimates["nll"], arm.against_baseline["nll"]
    assert f"{estimate.mean:.3f}" in text
    assert f"{estimate.low:.3f} to {estimate.high:.3f}" in text
    assert f"{against.difference.mean:+.3f}" in text
    assert f"{against.difference.low:+.3f} to {against.difference.high:+.3f}" in text
    assert f"{against.difference.smallest:.3f}" in text


@pytest.mark.parametrize(
    "fact",
    [
        HOW.command,
        "steps: 400",
        "tuning.values: 3",
        "3 values of each hyperparameter, 1 run each, judged on a part of the training images",
        "p=0.3 (0.3: 0.91, 0.5: nan)",
        HOW.versions["torch"],
        HOW.versions["mp_lightning"],
        HOW.date,
        "cpu",
        "results.csv",
        "25 runs",
    ],
)
def test_what_is_needed_to_repeat_it_is_there(five: Path, fact: str) -> None:
    assert fact in read(five).text


def test_scores_by_expected_noise_are_told_of_arms_with_noise_only(five: Path, tmp_path: Path) -> None:
    text = (five / "summary.md").read_text(encoding="utf-8")
    _, found, modes = text.partition("## Noise in evaluation")
    assert found
    lines = modes.partition("## Tests")[0].splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("|")][2:] == [
        "fixed\\_noise",
        "metaperturb",
    ]
    page, _ = report(tmp_path, drawn_comparison(("none", "dropout")))
    assert "Arms with noise in evaluation" not in page.text
    assert "multiplier" not in page.ids


HOSTILE = ("<script>alert(1)</script>", 'a"><img src=x onerror=alert(1)>', "--> & $x_1$ | `b`")


def test_a_name_cannot_bring_markup(tmp_path: Path) -> None:
    rows, details = drawn_comparison(("none", *HOSTILE), seeds=2)
    page, _ = report(tmp_path, ([replace(one, parameters=one.arm, device=one.arm) for one in rows], details))
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not any(attribute.startswith("on") for _, attrs in page.tags for attribute in attrs)
    assert all(page.text.count(name) >= 3 for name in HOSTILE)
    markdown = (tmp_path / "summary.md").read_text(encoding="utf-8").partition("## How to repeat it")[0]
    assert "<" not in markdown
    lines = [line.replace("\\|", "") for line in markdown.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {12, 10}


def test_the_verdict_is_in_json_without_nan(tmp_path: Path) -> None:
    rows, details = drawn_comparison(("none", "dropout"), seeds=3)
    rows[0] = replace(rows[0], nll=math.nan, ece=math.inf)
    page, summary = report(tmp_path, (rows, details), replace(HOW, settings={"clip": math.inf}))
    content = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"), parse_constant=without_nan)
    assert content["headline"] == summary.headline
    assert content["arms"]["none"]["estimates"]["nll"]["mean"] is None
    assert content["repeat"]["command"] == HOW.command
    assert content["repeat"]["settings"] == {"clip": None}
    assert "not finite" in page.text and "diverged" in page.text


@pytest.mark.parametrize(("arms", "seeds"), [(THIRTEEN, 5), (("none",), 1)], ids=["many", "one"])
def test_any_number_of_arms_without_details_makes_a_page(tmp_path: Path, arms: tuple[str, ...], seeds: int) -> None:
    rows, details = drawn_comparison(arms, seeds)
    page, _ = report(tmp_path, (rows, dict.fromkeys(details, Details())))
    assert page.ids == ["verdict", "table", "pictures", "scores", "reading", "repeat"]
    assert f"{len(arms)} arm{'s' if len(arms) > 1 else ''}, {seeds} seed" in page.text
    looks = {attrs["style"] for _, attrs in page.tags if attrs.get("class") == "arm"}
    assert len(looks) == len(arms), "two arms look the same"


def test_files_are_written_whole(five: Path) -> None:
    names = {"report.html", "summary.md", "summary.json"}
    assert {path.name for path in five.iterdir()} == names | {
        f"{name}.png" for name in ("scores", "curves", "multiplier", "reliability")
    }


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "file"
    folder.touch()
    with pytest.raises(RunFolderError, match=r"run folder '.*file' cannot be written"):
        report(folder, drawn_comparison(("none", "dropout"), seeds=1))


def printed(rows: list[Row]) -> list[str]:
    console = Console(file=io.StringIO(), width=100)
    console.print(terminal_table(summarize(rows)))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_the_table_of_the_terminal_has_a_line_for_each_arm() -> None:
    lines = printed(drawn_comparison(THIRTEEN[:-1])[0])
    for arm in THIRTEEN[:-1]:
        (line,) = [line for line in lines if line.split()[:1] == [arm]]
        assert line.endswith(("no evidence", "helps", "harms", "–"))
    (line,) = [line for line in lines if line.startswith(" metaperturb")]
    arm = summarize(drawn_comparison(THIRTEEN[:-1])[0]).arms["metaperturb"]
    estimate, against = arm.estimates["accuracy"], arm.against_baseline["accuracy"]
    assert f"{100 * estimate.mean:.1f} ±{50 * (estimate.high - estimate.low):.1f}" in line
    assert f"{100 * against.difference.mean:+.1f}  p " in line


def test_the_table_of_the_terminal_takes_a_name_as_it_is() -> None:
    rows = [replace(one, arm="[red]x[/red]") if one.arm == "dropout" else one for one in drawn_comparison(FIVE, 1)[0]]
    assert any(line.split()[:1] == ["[red]x[/red]"] for line in printed(rows))


def test_the_end_of_an_interval_below_zero_is_shown_below_it() -> None:
    assert number_text("accuracy", -0.0001, "+") == "+0.0"
    assert number_text("accuracy", -0.0001, "+", signed_zero=True) == "-0.0"
