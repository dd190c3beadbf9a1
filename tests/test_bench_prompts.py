"""scripts/bench.py prompts: files of prompts, who answers what, and the figures by category. Never its times."""

import importlib
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import save_tiny

import specjax
from specjax.commands import prompts
from specjax.commands.prompt_files import groups, read

# The tiny model has a token for each letter and 256 positions. All prompts that are answered have at most 16 tokens.
MT = [
    {"question_id": 1, "category": "writing", "turns": ["say hi", "again"]},
    {"question_id": 2, "category": "math", "turns": ["add up"]},
    {"question_id": 3, "category": "math", "turns": ["sub it", "w" * 240]},
    {"question_id": 4, "category": "long", "turns": ["w" * 256, "why"]},
]
HUMAN = [{"task_id": "HumanEval/0", "prompt": "def f"}, {"prompt": [{"role": "user", "content": "sort"}]}]
GSM = [{"question": "how many", "answer": "two"}, {"messages": [{"role": "user", "content": "a b"}], "question": ""}]
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
NEW = 12


def write(path, lines):
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return path


def user(text):
    return {"role": "user", "content": text}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    save_tiny(folder / "target")
    save_tiny(folder / "plain", template=None)
    for name, lines in (("mt", MT), ("human", HUMAN), ("gsm", GSM)):
        write(folder / f"{name}.jsonl", lines)
    return folder


def bench(place, target, *argv):
    """Runs the command and returns what is written as JSON, and the page."""
    files = ["--json", place / "out.json", "--html", place / "out.html"]
    common = ["--target", place / target, "--num-draft", 2, "--new-tokens", NEW, "--torch-threads", 1, *files]
    main = importlib.import_module("specjax.commands.bench").main
    assert main([str(value) for value in ("prompts", *argv, *common)]) == 0
    return json.loads((place / "out.json").read_text()), (place / "out.html").read_text()


@pytest.fixture(scope="module")
def found(place):
    """All formats at temperatures 0 and 1, with one drafter, and transformers if it is installed."""
    there = all(importlib.util.find_spec(name) for name in ("transformers", "torch"))
    peer = ["--peer", "transformers"] if there else []
    return bench(place, "target", "--prompts", *(place / f"{name}.jsonl" for name in ("mt", "human", "gsm")), *peer)


def rows_of(found, decoding):
    return {(row["category"], row["temperature"]): row for row in found[0]["prompts"] if row["decoding"] == decoding}


FACTS = {
    "plain": (None, 0, None),
    "ngram, 2 drafts": ("ngram", 2, True),
    "ngram, 2 drafts or fewer": ("ngram", 2, False),
}
OWN = list(FACTS)
# Prompts and turns of each: the second turn of the third prompt and all of the fourth do not fit.
CATEGORIES = {"mt: writing": (1, 2), "mt: math": (2, 2), "mt": (3, 4), "human": (2, 2), "gsm": (2, 2)}
CATEGORIES["overall"] = (7, 8)


@pytest.mark.parametrize("decoding", OWN)
def test_each_category_and_all_have_a_row(found, decoding):
    rows = rows_of(found, decoding)
    assert list(rows) == [(category, temperature) for category in CATEGORIES for temperature in (0.0, 1.0)]
    for (category, temperature), row in rows.items():
        assert (row["prompts"], row["turns"]) == CATEGORIES[category]
        assert 0 < row["tokens"] <= NEW * row["turns"] and row["seconds"] > 0
        np.testing.assert_allclose(row["tokens/s"], row["tokens"] / row["seconds"])
        plain = rows_of(found, "plain")[category, temperature]
        np.testing.assert_allclose(row["speed-up"], row["tokens/s"] / plain["tokens/s"])
        count = row["prompts"]
        assert row["text equal"] == (None if temperature else f"{count} of {count}")
        if not temperature:
            assert row["tokens"] == plain["tokens"]
    counts = ["prompts", "turns", "tokens"] + ([] if decoding == "plain" else ["drafts", "accepted tokens"])
    for name in counts:
        assert rows["overall", 0.0][name] == sum(rows[part, 0.0][name] for part in ("mt", "human", "gsm"))
    assert (rows["overall", 0.0]["drafts"] is None) == (decoding == "plain")
    drafter, num_draft, fixed = FACTS[decoding]
    for row in rows.values():
        assert (row["drafter"], row["num_draft"], row["fixed"]) == (drafter, num_draft, fixed)


def test_counts_are_those_of_a_session(found, place):
    """The figures of one prompt of two turns, from the counts of a session with the same arguments."""
    session = specjax.Session(str(place / "target"), "ngram", 2, fixed=True)
    first = session.chat([user("say hi")], NEW, temperature=0.0, seed=0)
    second = session.chat([user("say hi"), first.message, user("again")], NEW, temperature=0.0, seed=0)
    row = rows_of(found, "ngram, 2 drafts")["mt: writing", 0.0]
    assert row["tokens"] == len(first.tokens) + len(second.tokens)
    assert row["draft tokens"] == first.drafted + second.drafted == sum(first.drafted_at) + sum(second.drafted_at)
    assert row["accepted tokens"] == first.accepted + second.accepted
    assert row["drafts"] == first.drafted_at[0] + second.drafted_at[0]
    assert row["draft acceptance rate"] == row["accepted tokens"] / row["draft tokens"]
    assert row["mean acceptance length"] == 1 + row["accepted tokens"] / row["drafts"]
    accepted = np.add(first.accepted_at, second.accepted_at)
    assert row["per-position acceptance rate"] == " ".join(f"{count / row['drafts']:.3f}" for count in accepted)


def test_the_page_has_a_plot_for_each_way_and_one_of_positions(found):
    ways = {(row["decoding"], row["temperature"]) for row in found[0]["prompts"] if row["decoding"] != "plain"}
    assert found[1].count("<svg") == len(ways) + 1 and found[1].count("mt: writing</text>") == len(ways)


def test_transformers_has_the_same_greedy_texts(found):
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    for decoding in ("transformers: plain", "transformers: prompt lookup, 2 drafts"):
        rows = rows_of(found, decoding)
        assert list(rows) == [(category, 0.0) for category in CATEGORIES]
        assert rows["overall", 0.0]["text equal"] == "7 of 7" and rows["overall", 0.0]["draft acceptance rate"] is None
    assert "stop tokens [0]" in found[0]["machine"]["peers"][0]


def test_a_target_without_a_template_continues_first_turns(place, capsys):
    file = write(place / "one.jsonl", MT[:1])
    (written, _), said = bench(place, "plain", "--prompts", file, "--temperature", 0), capsys.readouterr().out
    assert "no chat template: it continues the text of each first turn" in said
    assert [(row["category"], row["turns"]) for row in written["prompts"]] == [("writing", 1)] * len(OWN)
    file = write(place / "chat.jsonl", [{"messages": CHAT}])
    with pytest.raises(SystemExit, match="chat has messages, and the target no chat template; leave them out"):
        bench(place, "plain", "--prompts", file)


def test_prompts_that_are_too_long(place, capsys):
    with pytest.raises(SystemExit, match="1 of 1 prompts and 12 new tokens pass the 256 positions; give a smaller"):
        bench(place, "target", "--prompts", write(place / "long.jsonl", MT[3:]))


def test_a_run_that_compiles_is_repeated(monkeypatch):
    double, x, calls = jax.jit(lambda x: 2 * x), jnp.ones(3), []
    monkeypatch.setattr(prompts, "_answered", lambda x: calls.append(double(x)) or len(calls))
    assert [prompts._timed(x), prompts._timed(x)] == [2, 3]


def test_formats(place):
    """With a byte order mark, blank lines, and separators that end no line of JSONL."""
    file = place / "mixed.jsonl"
    lines = ["", json.dumps(MT[0]), "  ", '{"prompt": "a\u2028b"}\r', json.dumps(GSM[0]), json.dumps(HUMAN[1])]
    file.write_text("\n".join(lines), encoding="utf-8-sig")
    found = read([file])
    assert [prompt.category for prompt in found] == ["writing", "mixed", "mixed", "mixed"]
    texts = ["say hi", "a\u2028b", "how many", "sort"]
    assert [prompt.turns[0] for prompt in found] == [(user(text),) for text in texts]
    assert [prompt.text for prompt in found] == texts and len(found[0].turns) == 2
    (prompt,) = read([write(place / "chat.jsonl", [{"messages": CHAT}])])
    assert prompt.turns == (tuple(CHAT),) and prompt.text is None


def test_a_limit_is_spread_over_each_category_of_each_file(place):
    lines = [{"category": "ab"[i % 2], "prompt": str(i)} for i in range(10)]
    files = [write(place / f"{name}.jsonl", lines) for name in ("x", "y")]
    assert [prompt.text for prompt in read(files[:1], 2)] == ["0", "4", "1", "5"]
    assert len(read(files, 5)) == len(read(files, 6)) == len(read(files)) == 20
    assert groups(read(files, 1)) == {
        "x: a": [0], "x: b": [1], "x": [0, 1], "y: a": [2], "y: b": [3], "y": [2, 3], "overall": [0, 1, 2, 3]
    }  # fmt: skip
    assert groups(read(files[:1], 1)) == {"a": [0], "b": [1], "overall": [0, 1]}
    assert groups(read([write(place / "z.jsonl", [{"prompt": "a"}])])) == {"z": [0]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "has no prompts; give a file with one JSON object in each line"),
        (b"\n \n", "has no prompts"),
        (b"\xff\xfe", "cannot be read as UTF-8 text"),
        (b'{"prompt": "a"}\n{"prompt": ', "line 2 is not JSON"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b'\n\n["a"]', "line 3 is a list; give an object such as"),
        (b'{"text": "a", "id": 1}', 'none of the keys turns, messages, prompt, question, but ["text", "id"]; give one'),
        (b'{"turns": []}', "turns is []; give a list of texts that are not empty"),
        (b'{"turns": ["a", ""]}', 'turns is ["a", ""]; give a list of texts that are not empty'),
        (b'{"turns": "a"}', 'turns is "a"; give a list of texts'),
        (b'{"prompt": 3}', "prompt is 3; give a text that is not empty"),
        (b'{"question": ""}', 'question is ""; give a text that is not empty'),
        (b'{"prompt": []}', "prompt is []; give a list such as"),
        (b'{"messages": [{"role": "user"}]}', 'messages is [{"role": "user"}]; give a list such as'),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "ends with a message of the assistant; end with"),
        (b'{"prompt": "a", "category": 3}', "category is 3; give a text, or leave it out"),
        (b'{"prompt": "\\ud83d"}', "which is half of a character; leave it out"),
    ],
)
def test_lines_that_are_wrong(text, message, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(text)
    with pytest.raises(ValueError) as error:
        read([file])
    assert str(file) in str(error.value) and message in str(error.value)


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl cannot be read as UTF-8 text"):
        read([tmp_path / "none.jsonl"])
