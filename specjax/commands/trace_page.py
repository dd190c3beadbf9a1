"""The HTML page that shows the origin of each token of a generation, round by round."""

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

ORIGINS = {
    "accepted": "drafted, and accepted by the target",
    "corrected": "the target's own, in place of a rejected draft",
    "bonus": "the target's own, after drafts that were all accepted",
    "target": "the target's own, in a round without drafts",
}


class Token(NamedTuple):
    """A token that was emitted.

    Attributes:
      text: the text that this token settles. A token that ends inside a character, or inside the beginning of a stop
        string, has "". A later token then has the text of both.
      origin: a key of ``ORIGINS``.
      special: the name of a token that is not part of the text, such as a stop token; else "".
    """

    text: str
    origin: str
    special: str = ""


class Round(NamedTuple):
    """One round of a row: number of tokens drafted and accepted, and the tokens emitted."""

    drafted: int
    accepted: int
    tokens: Sequence[Token]


class Trace(NamedTuple):
    """A prompt and the rounds that continued it."""

    prompt: str
    rounds: Sequence[Round]


def render(traces: Sequence[Trace], settings: Mapping[str, str], figures: Mapping[str, str]) -> str:
    """Returns a self-contained page.

    Args:
      traces: one for each prompt.
      settings: settings of the text, by name.
      figures: figures to show large, by name.
    """
    # The parts come first, so that the template below reads like the page.
    rounds = [each for trace in traces for each in trace.rounds]
    present = {token.origin for each in rounds for token in each.tokens}
    cards = "".join(f"<div><b>{escape(value)}</b>{escape(name)}</div>" for name, value in figures.items())
    chips = "".join(f"<span>{escape(name)} <b>{escape(value)}</b></span>" for name, value in settings.items())
    legend = "".join(
        f'<li><span class="t {origin}">{origin}</span> {meaning}</li>'
        for origin, meaning in ORIGINS.items()
        if origin in present
    )
    sections = "".join(_section(number, trace, len(traces)) for number, trace in enumerate(traces, 1))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Where each token came from</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>Where each token came from</h1>
<p class="chips">{chips}</p>
</header>
<div class="cards">{cards}</div>
<div class="charts">{_acceptance(rounds)}{_tokens_per_round(rounds)}</div>
<ul class="legend"><li><span class="prompt">prompt</span></li>{legend}\
<li><span class="tick"></span> a round begins</li><li>hold the pointer over a round for its counts</li></ul>
{sections}
</body>
</html>
"""


def _section(number: int, trace: Trace, count: int) -> str:
    """Returns one prompt's strip of rounds and its text."""
    title = f"<h2>Prompt {number} of {count}</h2>" if count > 1 else ""
    emitted = sum(len(each.tokens) for each in trace.rounds)
    height = max(each.drafted for each in trace.rounds) + 1
    # A column of the strip links to its round in the text, by the round's name.
    strip, text = [], []
    for index, each in enumerate(trace.rounds, 1):
        name = f"p{number}r{index}"
        about = f"round {index}: {each.drafted} drafted, {each.accepted} accepted, {len(each.tokens)} emitted"
        cells = "".join(f'<i class="{token.origin}"></i>' for token in each.tokens)
        cells += '<i class="rejected"></i>' * (each.drafted - each.accepted)
        strip.append(f'<a href="#{name}" title="{about}">{cells}</a>')
        tokens = "".join(_token(token) for token in each.tokens)
        text.append(f'<span class="round" id="{name}" title="{about}">{tokens}</span>')
    return (
        f"<section>{title}"
        f'<p class="note">{emitted} tokens in {len(trace.rounds)} rounds. A column is a round, from the bottom: what '
        f"it emitted, then the drafts it rejected. Choose one to find it in the text.</p>"
        f'<div class="strip" style="--height:{height}">{"".join(strip)}</div>'
        f'<pre><span class="prompt">{_visible(trace.prompt)}</span>{"".join(text)}</pre></section>\n'
    )


def _token(token: Token) -> str:
    # The style sheet draws the mark of a line's end, so copied text does not contain the mark.
    text = _visible(token.text).replace("\n", "<i></i>\n")
    special = f"<em>{escape(token.special)}</em>" if token.special else ""
    return f'<span class="t {token.origin}">{text}{special}</span>'


def _visible(text: str) -> str:
    """Returns text escaped for HTML, with pictures in place of control characters, which HTML cannot hold."""
    return escape("".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text))


def _acceptance(rounds: Sequence[Round]) -> str:
    """Returns the chart of acceptance rates by draft position."""
    places = range(max(each.drafted for each in rounds))
    rows = []
    for place in places:
        drafted = sum(each.drafted > place for each in rounds)
        accepted = sum(each.accepted > place for each in rounds)
        rows.append(
            _bar(
                str(place + 1), accepted / drafted, f"{accepted / drafted:.0%}", f"{accepted} of {drafted}", "accepted"
            )
        )
    return _chart("Accepted, by draft position", rows)


def _tokens_per_round(rounds: Sequence[Round]) -> str:
    """Returns the chart of rounds by the number of tokens emitted."""
    counts = Counter(len(each.tokens) for each in rounds)
    rows = []
    for size in range(1, max(counts) + 1):
        share = counts[size] / len(rounds)
        rows.append(_bar(str(size), share, f"{share:.0%}", f"{counts[size]} of {len(rounds)} rounds", "neutral"))
    return _chart("Rounds, by tokens emitted", rows)


def _chart(title: str, rows: Sequence[str]) -> str:
    return f"<figure><figcaption>{title}</figcaption>{''.join(rows)}</figure>" if rows else ""


def _bar(name: str, share: float, value: str, about: str, kind: str) -> str:
    return (
        f'<div class="bar" title="{about}"><span>{name}</span><span class="track">'
        f'<i class="{kind}" style="width:{share:.1%}"></i></span><span>{value}</span></div>'
    )


# Colours of Okabe and Ito, which colour-blind readers can tell apart.
_STYLE = """
:root {
  color-scheme: light dark;
  --back: #ffffff; --panel: #f5f6f8; --line: #d9dce1; --ink: #1c2128; --soft: #68707c; --neutral: #8a93a0;
  --accepted: #00946b; --corrected: #d55e00; --bonus: #0072b2; --target: #8a93a0; --tint: 22%;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #14171c; --panel: #1d2127; --line: #343a43; --ink: #e4e7eb; --soft: #98a1ad; --neutral: #707987;
    --accepted: #16c596; --corrected: #ff8a3c; --bonus: #56b4e9; --target: #8d97a5; --tint: 30%;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 28px 24px 60px; max-width: 1080px; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0 0 8px; font-size: 24px; }
h2 { margin: 0 0 4px; font-size: 18px; }
.chips { margin: 0; display: flex; flex-wrap: wrap; gap: 6px; font-size: 13px; color: var(--soft); }
.chips span { padding: 1px 9px; border: 1px solid var(--line); border-radius: 12px; }
.chips b { color: var(--ink); font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 12px; margin: 20px 0 12px; }
.cards div, figure { margin: 0; padding: 12px 16px; background: var(--panel); border-radius: 8px;
  color: var(--soft); font-size: 13px; }
.cards b { display: block; color: var(--ink); font-size: 26px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 12px; }
figcaption { margin-bottom: 6px; color: var(--ink); font-weight: 600; }
.bar { display: grid; grid-template-columns: 20px 1fr 40px; gap: 8px; align-items: center;
  font-variant-numeric: tabular-nums; }
.bar span:last-child { text-align: right; color: var(--ink); }
.track { height: 12px; border-radius: 3px; background: var(--line); overflow: hidden; }
.track i { display: block; height: 100%; border-radius: 3px; }
i.accepted { background: var(--accepted); } i.corrected { background: var(--corrected); }
i.bonus { background: var(--bonus); } i.target { background: var(--target); } i.neutral { background: var(--neutral); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 22px; margin: 18px 0 22px; padding: 0; list-style: none;
  font-size: 13px; color: var(--soft); }
.legend .t, .legend .prompt { padding: 1px 6px; color: var(--ink);
  font: 13px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.tick { display: inline-block; width: 0; height: 13px; margin-right: 3px; vertical-align: -2px;
  border-left: 2px solid var(--ink); }
section { margin-top: 26px; }
.note { margin: 0 0 8px; font-size: 13px; color: var(--soft); }
.strip { display: flex; flex-wrap: wrap; align-items: flex-end; gap: 8px 2px; margin-bottom: 12px; }
.strip a { display: flex; flex-direction: column-reverse; gap: 1px; width: 9px; height: calc(var(--height) * 9px); }
.strip i { height: 8px; flex: none; border-radius: 1px; }
.strip i.rejected { border: 1px solid var(--line); }
.strip a:hover { outline: 2px solid var(--ink); outline-offset: 1px; border-radius: 1px; }
pre { margin: 0; padding: 16px 18px; background: var(--panel); border-radius: 8px; tab-size: 4; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 14px/1.7 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.prompt { color: var(--soft); }
.t { padding: 2px 0; border-radius: 2px; }
.t.accepted { background: color-mix(in srgb, var(--accepted) var(--tint), transparent); }
.t.corrected { background: color-mix(in srgb, var(--corrected) var(--tint), transparent); }
.t.bonus { background: color-mix(in srgb, var(--bonus) var(--tint), transparent); }
.t.target { background: color-mix(in srgb, var(--target) var(--tint), transparent); }
.t i::before { content: "\\21b5"; color: var(--soft); opacity: .75; }
.t:empty::before { content: "\\22ef"; color: var(--soft); }
.t em { color: var(--soft); }
.round > .t:first-child { box-shadow: inset 2px 0 0 color-mix(in srgb, var(--ink) 45%, transparent); }
.round { scroll-margin-top: 40vh; }
.round:hover .t, .round:target .t { outline: 2px solid var(--ink); }
"""
