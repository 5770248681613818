"""The content of a report as a tree, which each result builds once, and which the renderers of all formats show.

A renderer shows each type of node in one way. What only some outputs show is stated by `depth`. All texts may come from
strangers; renderers escape them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from holdfast.core.evidence import Columns

Depth = Literal["notebook", "text", "page"]
"""the shortest output that shows a node: a notebook, which is the shortest, a terminal and Markdown, or a page"""
Tone = Literal["pass", "fail", "unclear", "no gate"]
T = TypeVar("T")


@dataclass(frozen=True)
class Cell:
    """A cell of a table, with more than its text."""

    text: str
    small: tuple[str, ...] = ()
    """further texts, such as an interval; in brackets where an output has no smaller letters"""
    about: str = ""
    """meaning, which only a page shows"""
    bar: tuple[float, float, float] | None = None
    """value and interval as fractions, which a page draws as a bar"""
    pale: bool = False
    """whether the bar is drawn pale, without its interval"""
    heat: int | None = None
    """strength of the background on a page, from 0 to 10"""
    framed: bool = False
    href: str = ""
    """address of a page of the viewer"""


Row = Sequence[str | Cell]


@dataclass(frozen=True)
class Paragraph:
    """Sentences. A text without a full stop at its end gets one where sentences are shown."""

    text: str
    depth: Depth = "text"


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    texts: Sequence[str]
    depth: Depth = "text"


@dataclass(frozen=True)
class Facts:
    """Names with their values."""

    pairs: Sequence[tuple[str, str]]
    depth: Depth = "text"


@dataclass(frozen=True)
class Table:
    """A table, whose first column names its rows."""

    headings: Sequence[str]
    rows: Sequence[Row]
    title: str = ""
    """title in outputs that show tables without their sections; empty for the title of the section"""
    extra: frozenset[int] = frozenset()
    """columns that narrow outputs leave out"""
    texts: frozenset[int] = frozenset()
    """columns that contain words instead of numbers"""
    depth: Depth = "text"

    @property
    def heated(self) -> bool:
        """Whether cells have coloured backgrounds."""
        return any(isinstance(cell, Cell) and cell.heat is not None for row in self.rows for cell in row)

    @property
    def stacked(self) -> bool:
        """Whether a narrow page shows each cell on a line of its own, because the row would not fit."""
        longest = [
            max((len(_plain(row[place])) for row in self.rows), default=0)
            for place in range(len(self.headings))
        ]
        barred = any(isinstance(cell, Cell) and cell.bar for row in self.rows for cell in row)
        shown = sum(width for place, width in enumerate(longest) if place not in self.extra)
        return not barred and not self.heated and shown > _FITTING


_FITTING = 40
"""number of characters of a row that fit on a narrow page"""


def _plain(cell: str | Cell) -> str:
    return cell if isinstance(cell, str) else max((cell.text, *cell.small), key=len)


@dataclass(frozen=True)
class Path:
    """A line or an area of a chart as an SVG path. `look` is its class in the style sheet."""

    look: str
    d: str
    title: str = ""


@dataclass(frozen=True)
class Tick:
    """A tick on an axis of a chart, with its coordinate and its label."""

    at: float
    text: str


@dataclass(frozen=True)
class Mark:
    """A labelled straight line across a chart, from one point to another."""

    x1: float
    y1: float
    x2: float
    y2: float
    text: str
    text_x: float
    text_y: float
    anchor: Literal["start", "end"]


@dataclass(frozen=True)
class Drawing:
    """The coordinates of a chart at one size."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    paths: tuple[Path, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    mark: Mark | None = None


@dataclass(frozen=True)
class Chart:
    """A chart, drawn once for wide and once for narrow screens, with its description for those who do not see it."""

    drawings: Sequence[tuple[str, Drawing]]
    """name of each size, `wide` and `narrow`, with the coordinates; a page shows one of them"""
    axis: str
    """label of the horizontal axis"""
    alternative: str
    caption: str
    title: str = ""
    file: str = ""
    """name of a picture of the chart in the folder of a Markdown document; empty without one"""
    depth: Depth = "page"


@dataclass(frozen=True)
class Box:
    """A box over a picture, with a short name beside it."""

    look: Literal["found", "lost", "false"]
    """an object that is found, one that is not, drawn dashed, or a box without an object, drawn dotted"""
    corners: tuple[float, float, float, float]
    """x1, y1, x2, y2 in pixels of the picture's `size`"""
    text: str


@dataclass(frozen=True)
class Picture:
    """A picture as the data URL of a PNG, with its caption."""

    url: str
    caption: str
    alternative: str = ""
    """description for readers who do not see the picture; empty for the caption"""
    value: str = ""
    """what is stated below the caption, such as a prediction"""
    key: tuple[tuple[str, str], ...] = ()
    """names of the colours of a map, with the colours"""
    side: int = 0
    """number of points on each side of a map, whose middle is marked; 0 for a picture that is no map"""
    crossed: bool = False
    """whether the adversarial example is marked on a map"""
    boxes: tuple[Box, ...] = ()
    size: tuple[int, int] = (0, 0)
    """width and height in the pixels of the boxes; 0 for a picture without boxes"""


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side."""

    pictures: Sequence[Picture]
    alternative: str = ""
    columns: int = 0
    """number of pictures in a row; 0 for as many as fit"""
    large: bool = False
    depth: Depth = "page"


@dataclass(frozen=True)
class Key:
    """The meaning of the colours of pictures: names with their colours."""

    title: str
    colours: Sequence[tuple[str, str]]
    depth: Depth = "page"


@dataclass(frozen=True)
class Sound:
    """A clip as the data URL of a `.wav` file, with its caption."""

    url: str
    caption: str
    alternative: str
    """name of the player for readers who do not see it"""


@dataclass(frozen=True)
class Sounds:
    """Clips to play."""

    sounds: Sequence[Sound]
    depth: Depth = "page"


@dataclass(frozen=True)
class Changed:
    """A text with changed words: parts of it, each with what it replaces, or None for an unchanged part."""

    parts: Sequence[tuple[str, str | None]]
    depth: Depth = "notebook"


@dataclass(frozen=True)
class Code:
    """A command, or lines of another text, which are shown as they are."""

    lines: Sequence[str]
    label: str = ""
    depth: Depth = "text"


@dataclass(frozen=True)
class Gate:
    """A judged condition, in words and with what was measured."""

    text: str
    verdict: Literal["pass", "fail", "unclear"]
    reason: str
    measured: str = ""
    interval: str = ""
    scale: tuple[float, float, float, float] | None = None
    """value, interval and threshold as fractions, which a page draws"""


@dataclass(frozen=True)
class Gates:
    """The gates of a result."""

    gates: Sequence[Gate]
    depth: Depth = "notebook"


@dataclass(frozen=True)
class ShownDoubt:
    """A doubt of a result with its state and advice. `accepted` is the reason for which it was accepted."""

    name: str
    state: str
    title: str
    message: str
    meaning: str
    advice: str
    accepted: str | None = None


@dataclass(frozen=True)
class Doubts:
    """The doubts of a result: the raised ones, and groups of others that have the same reason."""

    raised: Sequence[ShownDoubt]
    calm: Sequence[Sequence[ShownDoubt]]
    signs: Sequence[tuple[str, str]]
    """name and state of each doubt, in the order of reports"""
    depth: Depth = "notebook"


@dataclass(frozen=True)
class Group:
    """Blocks under a heading. A folded group is opened by the reader of a page, and left out of a brief output."""

    title: str
    blocks: Sequence["Block"]
    folded: bool = False
    hidden: str = ""
    """continuation of the title for readers who do not see the page"""
    depth: Depth = "text"


@dataclass(frozen=True)
class Gallery:
    """Entries in a grid, each of them a group, such as an example with its pictures. A notebook shows the first."""

    entries: Sequence[Group]
    shown: int
    """number of entries that are shown before the reader expands the others"""
    noun: str = "examples"
    depth: Depth = "notebook"


Block = (
    Paragraph
    | Items
    | Facts
    | Table
    | Chart
    | Pictures
    | Key
    | Sounds
    | Changed
    | Code
    | Gates
    | Doubts
    | Group
    | Gallery
)


@dataclass(frozen=True)
class Section:
    """A section of a report."""

    title: str
    blocks: Sequence[Block]
    lead: str = ""
    """what the section shows, as a sentence"""
    anchor: str = ""
    """anchor on a page, if the list of sections of the page contains it"""
    short: str = ""
    """name in the list of sections of a page"""
    depth: Depth = "text"

    def tables(self) -> Iterator[Table]:
        """Yield the tables of the section, those inside of groups included."""
        return _of_kind(self.blocks, Table)


@dataclass(frozen=True)
class Highlight:
    """A number or a name that a page shows large, with what it is and what is to be known about it."""

    term: str
    value: str
    lines: tuple[str, ...] = ()
    tone: Tone | None = None


@dataclass(frozen=True)
class Check:
    """A test case of a CI system. A case that is neither passed nor failed is skipped, with its text as the reason."""

    group: str
    name: str
    state: Literal["pass", "fail", "unclear", "skipped"]
    text: str


@dataclass(frozen=True)
class Report:
    """A report of any result."""

    verb: str
    about: str
    """what the report is about, such as `mnist-cnn on mnist`"""
    headline: str
    """the result in one sentence or more"""
    content: Mapping[str, Any]
    """content of the JSON report"""
    sections: Sequence[Section] = ()
    tone: Tone = "no gate"
    badge: tuple[str, str] | None = None
    """sign and word of the verdict; None without one"""
    verdict_first: bool = False
    """whether the headline begins with the verdict in words"""
    title: str = ""
    """the result as the title of a page; empty for the headline"""
    subtitle: str = ""
    """addition to `about` on a page"""
    caution: str = ""
    """warning that comes before any number"""
    lead: Sequence[Block] = ()
    """what belongs to the verdict, such as the reasons for it"""
    highlights: Sequence[Highlight] = ()
    case: tuple[str, str] | None = None
    """group and name of the result as a test case; None for `verb` and `about`"""
    checks: Sequence[Check] = ()
    """test cases after the first one, which is the result itself"""
    properties: Mapping[str, str] = field(default_factory=dict)
    """further facts for CI systems"""
    created: str = ""
    seconds: float = 0.0
    footer: str = "Generated by Holdfast from the evidence."
    examples: "Columns | None" = None
    """columns with a row for each example, if the result has them"""

    def blocks(self, kind: type[T]) -> Iterator[T]:
        """Yield all blocks of a type, those inside of groups included."""
        for section in self.sections:
            yield from _of_kind(section.blocks, kind)


def _of_kind(blocks: Iterable[Block], kind: type[T]) -> Iterator[T]:
    for block in blocks:
        if isinstance(block, kind):
            yield block
        if isinstance(block, Group):
            yield from _of_kind(block.blocks, kind)


_DEPTHS: tuple[Depth, ...] = ("notebook", "text", "page")


def shown_in(output: Depth, depth: Depth) -> bool:
    """Return whether an output shows a node of some depth."""
    return _DEPTHS.index(depth) <= _DEPTHS.index(output)


def text_of(cell: str | Cell) -> str:
    """Return a cell as text on one line, with its further texts in brackets."""
    if isinstance(cell, str):
        return cell
    if not cell.text:
        return "; ".join(cell.small)
    return f"{cell.text} ({', '.join(cell.small)})" if cell.small else cell.text
