"""
Small pictures as SVG text: labelled rows over one axis, and one panel of points. No dependency, no colour of its own.

Every picture has the same three columns: a name on the left, the drawing, the figures on the right. Colours come from
the page's style sheet by class; shapes, not colours, carry the meaning. Every text is escaped here.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT = 880, 190, 716  # the drawing lies between LEFT and RIGHT
TOP, FOOT = 8, 40
SMALL, LARGE = 1e-9, 1e12  # what an axis can show
PANEL = (290, 205)
SCATTER = 460  # height


@dataclass(frozen=True)
class Scale:
    """From values to pixels; values outside are drawn at the edge."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high = (self._place(edge) for edge in (self.low, self.high))
        part = (self._place(value) - low) / (high - low) if high > low else 0.0
        return round(self.start + min(max(part, 0.0), 1.0) * (self.end - self.start), 1)

    def _place(self, value: float) -> float:
        return math.log(max(value, SMALL)) if self.logarithmic else value


@dataclass(frozen=True)
class Label:
    """The two outer columns of a row: a name with a remark, and a figure with a remark."""

    name: str
    remark: str = ""
    figure: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Bar:
    """A length from zero. `part` of it is solid, the rest pale; `marks`: p90 and p99; `band`: low, stated, high."""

    label: Label
    value: float | None
    style: str
    part: float | None = None
    marks: tuple[float, ...] = ()
    band: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Ridge:
    """A histogram: `counts` between `edges`, with p50, p90 and p99."""

    label: Label
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    marks: tuple[float, ...]
    style: str


@dataclass(frozen=True)
class Span:
    """A dot on a line. `end` is drawn as an open diamond (the worst row), otherwise both ends are short strokes."""

    label: Label
    low: float
    middle: float
    high: float
    style: str
    diamond: bool = False


@dataclass(frozen=True)
class Point:
    """Median and 10th to 90th percentile of what was seen at x."""

    x: float
    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Mark:
    """A named place in a scatter; open ones are drawn as rings."""

    x: float
    y: float
    name: str
    style: str
    open: bool = False


@dataclass(frozen=True)
class Corner:
    """What is wanted: at most x, at least y."""

    x: float
    y: float
    name: str


def bars(key: str, title: str, description: str, items: Sequence[Bar], unit: str) -> str:
    """One bar per item from zero, the predicted band laid over it."""
    reach = [v for bar in items for v in (bar.value, *bar.marks, bar.band[2] if bar.band else None) if v is not None]
    scale = Scale(0, _nice(max(reach, default=1.0)), LEFT, RIGHT)
    return _rows(
        key,
        title,
        description,
        [(bar.label, 46) for bar in items],
        scale,
        unit,
        lambda i, y: _bar(key, items[i], scale, y),
    )


def ridges(key: str, title: str, description: str, items: Sequence[Ridge], scale: Scale, unit: str) -> str:
    """One histogram per item on one scale."""
    return _rows(
        key,
        title,
        description,
        [(item.label, 62) for item in items],
        scale,
        unit,
        lambda i, y: _ridge(items[i], scale, y),
    )


def spans(
    key: str,
    title: str,
    description: str,
    items: Sequence[Span],
    scale: Scale,
    unit: str,
    rest: tuple[float, float, float] | None = None,
) -> str:
    """One dot and line per item; `rest` is the value that means no change, and the zone around it that is noise."""
    back = ""
    if rest:
        low, middle, high = (scale(value) for value in rest)
        height = TOP + 40 * len(items)
        back = tag("rect", {"class": "zone", "x": low, "y": TOP, "width": round(high - low, 1), "height": height - TOP})
        back += _line("rest", middle, TOP, middle, height)
    return _rows(
        key,
        title,
        description,
        [(item.label, 40) for item in items],
        scale,
        unit,
        lambda i, y: _span(items[i], scale, y),
        back,
    )


def panel(
    key: str, title: str, description: str, points: Sequence[Point], axes: tuple[Scale, Scale], units: tuple[str, str]
) -> str:
    """Points with their spread; `axes` are made by `panel_axes`, so that several panels share them."""
    across, up = axes
    body = "".join(
        _line("grid", across.start, up(v), across.end, up(v)) + _text(across.start - 6, up(v) + 4, tick(v), "tick end")
        for v in ticks(up.low, up.high, 4)
    )
    body += "".join(_text(across(v), up.start + 16, tick(v), "tick middle") for v in ticks(across.low, across.high, 4))
    body += _line("axis", across.start, up.start, across.end, up.start)
    body += _text((across.start + across.end) / 2, PANEL[1] - 4, units[0], "tick middle")
    body += _text(0, 11, units[1], "tick")
    for point in points:
        body += _line("spread", across(point.x), up(point.low), across(point.x), up(point.high))
    for point in points:
        body += tag("circle", {"class": "dot", "cx": across(point.x), "cy": up(point.middle), "r": 2.6})
    return _picture(key, title, description, PANEL, body)


def scatter(
    key: str, title: str, description: str, marks: Sequence[Mark], corners: Sequence[Corner], units: tuple[str, str]
) -> str:
    """Named marks over a logarithmic axis, as wide as the row pictures; names avoid each other where there is room."""
    places: list[Mark | Corner] = [*marks, *corners]
    low, high = min(p.y for p in places), max(p.y for p in places)
    air = (high - low or 0.01) * 0.12
    across = Scale(min(p.x for p in places) * 0.8, max(p.x for p in places) * 1.5, 52, WIDTH - 12, logarithmic=True)
    up = Scale(low - air, high + air, SCATTER - FOOT, 24)
    body = _frame(across, up, units)
    for corner in corners:
        x, y = across(corner.x), up(corner.y)
        body += tag("path", {"class": "rest", "d": f"M{across.start:g} {y:g}H{x:g}V{up.end:g}"})
        body += _text(across.start + 6, y - 5, corner.name, "remark")
    taken = [(across(m.x) - 6, up(m.y) - 6, across(m.x) + 6, up(m.y) + 6) for m in marks]
    for mark in marks:
        x, y = across(mark.x), up(mark.y)
        dot = tag("circle", {"class": "open" if mark.open else "bar", "cx": x, "cy": y, "r": 5})
        body += tag("g", {"class": mark.style}, dot, _placed(mark.name, x, y, taken))
    return _picture(key, title, description, (WIDTH, SCATTER), body)


def _frame(across: Scale, up: Scale, units: tuple[str, str]) -> str:
    """Grid, ticks and the names of both axes."""
    body = ""
    for v in ticks(up.low, up.high, 6):
        body += _line("grid", across.start, up(v), across.end, up(v)) + _text(
            across.start - 8, up(v) + 4, tick(v), "tick end"
        )
    for v in ticks(across.low, across.high, 6, logarithmic=True):
        body += _line("grid", across(v), up.end, across(v), up.start) + _text(
            across(v), up.start + 16, tick(v), "tick middle"
        )
    body += _line("axis", across.start, up.start, across.end, up.start)
    body += _text((across.start + across.end) / 2, up.start + 33, units[0], "tick middle")
    return body + _text(0, 12, units[1], "tick")


def _placed(words: str, x: float, y: float, taken: list[tuple[float, float, float, float]]) -> str:
    """The name beside its mark, at the first place that nothing else has; `taken` gets its box."""
    wide = 6.1 * len(words)
    lifts = (0, -9, 9, -18, 18, -30, 30, -42, 42, -54, 54)
    beside = [(x + 9 * way, y + 4 + lift, side) for lift in lifts for way, side in ((1, ""), (-1, "end"))]
    beside += [(x, y + 4 + lift, "middle") for lift in (-14, 16, -28, 30, -42, 44, -56, 58)]

    def box(left: float, middle: float, side: str) -> tuple[float, float, float, float]:
        start = left - wide * {"": 0, "middle": 0.5, "end": 1}[side]
        return start, middle - 10, start + wide, middle + 3

    def free(place: tuple[float, float, str]) -> bool:
        a = box(*place)
        inside = a[0] >= 52 and a[2] <= WIDTH
        own = (x - 6, y - 6, x + 6, y + 6)
        return inside and not any(_overlap(a, b) for b in taken if b != own)

    chosen = next((place for place in beside if free(place)), beside[0])
    left, top, right, bottom = box(*chosen)
    taken.append((left, top, right, bottom))
    named = _text(chosen[0], chosen[1], words, f"remark {chosen[2]}".strip())
    if abs(chosen[1] - 4 - y) < 10:
        return named
    ends = min(max(x, left), right), top + 2 if top > y else bottom
    return _line("rest", x, y, *ends) + named  # which mark it names, where it is not beside it


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def panel_axes(right: float, top: float) -> tuple[Scale, Scale]:
    return Scale(0, _nice(right), 38, PANEL[0] - 10), Scale(0, _nice(top), PANEL[1] - 34, 20)


def ticks(low: float, high: float, count: int = 6, logarithmic: bool = False) -> list[float]:
    """Round values in [low, high]: multiples of 1, 2 or 5, or these times powers of ten on a logarithmic axis."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low]
    if logarithmic:
        first, last = math.floor(math.log10(max(low, SMALL))), math.ceil(math.log10(high))
        steps = (1, 2, 5) if last - first <= 4 else (1,)
        found = [step * 10.0**power for power in range(first, last, max((last - first) // 6, 1)) for step in steps]
        inside = [value for value in found if low <= value <= high]
        if len(inside) >= 3:
            return inside
        count = 8
    step = _step((high - low) / count)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def _step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def _nice(high: float) -> float:
    """The end of an axis from zero: a little air, then the next half step."""
    high = min(max(high, SMALL), LARGE)
    step = _step(high / 5) / 2
    return math.ceil(high * 1.02 / step) * step


def _rows(
    key: str,
    title: str,
    description: str,
    labels: Sequence[tuple[Label, int]],
    scale: Scale,
    unit: str,
    draw: Callable[[int, float], str],
    back: str = "",
) -> str:
    """The frame all row pictures share: grid, outer columns, axis. `draw(i, y)` draws row i around the height y."""
    bottom = TOP + sum(height for _, height in labels)
    body, y = back, float(TOP)
    for value in ticks(scale.low, scale.high, 6, scale.logarithmic):
        body += _line("grid", scale(value), TOP, scale(value), bottom)
        body += _text(scale(value), bottom + 16, tick(value), "tick middle")
    for i, (label, height) in enumerate(labels):
        middle = y + height / 2
        body += _outer(label, middle) + draw(i, middle)
        y += height
        if i + 1 < len(labels):
            body += _line("rule", 0, y, WIDTH, y)
    body += _line("axis", LEFT, bottom, RIGHT, bottom) + _text((LEFT + RIGHT) / 2, bottom + 33, unit, "tick middle")
    return _picture(key, title, description, (WIDTH, int(bottom) + FOOT), body)


def _outer(label: Label, middle: float) -> str:
    lift = -3 if label.remark else 4
    raised = -3 if label.detail else 4
    return (
        _text(0, middle + lift, _short(label.name, 23), "name")
        + (_text(0, middle + 13, _short(label.remark, 30), "remark") if label.remark else "")
        + (_text(WIDTH, middle + raised, label.figure, "figure end") if label.figure else "")
        + (_text(WIDTH, middle + 13, label.detail, "remark end") if label.detail else "")
    )


def _bar(key: str, bar: Bar, scale: Scale, y: float) -> str:
    body = ""
    if bar.value is not None:
        body += _box(f"bar {bar.style}" + (" pale" if bar.part is not None else ""), scale(0), scale(bar.value), y, 16)
        if bar.part is not None:
            body += _box(f"bar {bar.style}", scale(bar.value - bar.part), scale(bar.value), y, 16)
        if bar.marks:
            body += _line("whisker", scale(bar.value), y, scale(bar.marks[-1]), y)
            body += "".join(_line("whisker", scale(mark), y - 5, scale(mark), y + 5) for mark in bar.marks)
    if bar.band:
        low, stated, high = (scale(value) for value in bar.band)
        body += _box("band", low, high, y, 30, f"url(#{key}-hatch)") + _diamond("stated", stated, y)
    return body


def _ridge(ridge: Ridge, scale: Scale, y: float) -> str:
    floor, tallest = y + 18, max(ridge.counts, default=0)
    if not tallest:
        return ""
    path, height = f"M{scale(ridge.edges[0])} {floor}", 42 / tallest
    for left, right, count in zip(ridge.edges, ridge.edges[1:], ridge.counts, strict=False):
        level = round(floor - count * height, 1)
        path += f"L{scale(left)} {level}H{scale(right)}"
    body = tag("path", {"class": f"hill {ridge.style}", "d": f"{path}V{floor}Z"})
    body += _line("axis", LEFT, floor, RIGHT, floor)
    p50, p90, p99 = (scale(mark) for mark in ridge.marks)
    body += _line("mark", p50, floor, p50, floor - 44) + tag("circle", {"class": "p50", "cx": p50, "cy": floor, "r": 4})
    body += _diamond("p90", p90, floor)
    return body + tag("path", {"class": "p99", "d": f"M{p99} {floor - 5}l5 9h-10Z"})


def _span(span: Span, scale: Scale, y: float) -> str:
    low, middle, high = scale(span.low), scale(span.middle), scale(span.high)
    body = _line(f"range {span.style}", low, y, high, y)
    if span.diamond:
        body += _diamond(f"open {span.style}", low, y)
    elif span.high > span.low:
        body += "".join(_line(f"range {span.style}", x, y - 4, x, y + 4) for x in (low, high))
    return body + tag("circle", {"class": f"bar {span.style}", "cx": middle, "cy": y, "r": 5})


def _picture(key: str, title: str, description: str, size: tuple[int, int], body: str) -> str:
    hatch = tag("path", {"class": "hatch", "d": "M-1 1L1 -1M0 7L7 0M6 8L8 6"})
    pattern = {"id": f"{key}-hatch", "width": 7, "height": 7, "patternUnits": "userSpaceOnUse"}
    names = {"role": "img", "aria-labelledby": f"{key}-t {key}-d", "viewBox": f"0 0 {size[0]} {size[1]}"}
    return tag(
        "svg",
        names,
        tag("title", {"id": f"{key}-t"}, escape(title)),
        tag("desc", {"id": f"{key}-d"}, escape(description)),
        tag("defs", {}, tag("pattern", pattern, hatch)) if "-hatch)" in body else "",
        body,
    )


def tag(name: str, attributes: Mapping[str, object], *children: str) -> str:
    """An element; attributes are escaped, children are markup already."""
    said = "".join(f' {key}="{escape(str(value), quote=True)}"' for key, value in attributes.items())
    return f"<{name}{said}>{''.join(children)}</{name}>"


def _text(x: float, y: float, words: str, style: str) -> str:
    return tag("text", {"class": style, "x": round(x, 1), "y": round(y, 1)}, escape(words))


def _line(style: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return tag("path", {"class": style, "d": f"M{x1:g} {y1:g}L{x2:g} {y2:g}"})


def _box(style: str, left: float, right: float, y: float, height: float, fill: str = "") -> str:
    width = round(max(right - left, 1), 1)
    place: dict[str, object] = {
        "class": style,
        "x": left,
        "y": y - height / 2,
        "width": width,
        "height": height,
        "rx": 2,
    }
    return tag("rect", {**place, "fill": fill} if fill else place)


def _diamond(style: str, x: float, y: float) -> str:
    return tag("path", {"class": style, "d": f"M{x:g} {y - 5.5:g}l5.5 5.5l-5.5 5.5l-5.5 -5.5Z"})


def _short(words: str, most: int) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"
