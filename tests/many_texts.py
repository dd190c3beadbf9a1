# ruff: noqa: RUF001 (letters of other scripts are meant)
"""Texts on which tokenizers are compared."""

import numpy as np

SCRIPTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "Voix ambiguë d'un cœur qui, au zéphyr, préfère les jattes de kiwis.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "いろはにほへと ちりぬるを わかよたれそ つねならむ",
    "天地玄黃，宇宙洪荒。日月盈昃，辰宿列張。",
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.",
    "نص حكيم له سر قاطع وذو شأن عظيم",
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה",
    "ऋषियों को सताने वाले दुष्ट राक्षसों",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "Ą Ć Ę Ł Ń Ó Ś Ź Ż, ǅ ǈ ǋ ǲ, ʻokina",
    "😀😃👍🏽👩‍👩‍👧‍👦🏳️‍🌈 emoji 🇩🇪🇯🇵!",
    "1 12 123 1234 12345678 3.14159 1,000,000 ½ ² ⅧⅨ ١٢٣ १२३ 一二三",
    "I'm you're we've HE'LL THEY'D it's It'S o'clock 'tis ''s",
    "def f(x):\n    return {'a': x**2 + 1}  # comment\n\n\nclass A(B):\n\tpass\n",
    'for (int i = 0; i < 10; ++i) {\r\n  printf("%d\\n", i);\r\n}\r\n',
    '<html><body class="x">&nbsp;</body></html>',
    "SELECT * FROM t WHERE a >= 10 AND b <> 'it''s';",
    "camelCase snake_case SCREAMING_CASE kebab-case HTTPServer2Go",
    "$100.00 €5 £3 ¥7 — “quotes” ‘single’ … « guillemets »",
    "a\u0301 e\u0308 n\u0303 \uac00 \u1100\u1161 ﬁ ﬂ Ⅳ ａｂｃ",
    "https://example.com/path?query=value&other=1#fragment user@example.org",
    "x" * 40 + " " + "ab" * 20,
]
SPACES = [
    "",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    " \n ",
    "\t\t x",
    "a  b   c    d",
    " leading",
    "trailing ",
    "\u00a0nbsp\u3000wide",
]


def texts(count=200):
    """Texts of code, many scripts, emoji and odd spaces, and mixtures of their parts."""
    rng, made = np.random.default_rng(0), [*SCRIPTS, *SPACES]
    while len(made) < count:
        parts = []
        for _ in range(rng.integers(1, 5)):
            text = SCRIPTS[rng.integers(len(SCRIPTS))]
            start = rng.integers(len(text))
            parts += [text[start : start + rng.integers(1, 30)], SPACES[rng.integers(len(SPACES))]]
        made.append("".join(parts))
    return made


TEXTS = texts()
