"""Text that a target writes by itself: openings, rows that are replaced, loops, shards; texts of a user's own."""

import json

import numpy as np
import pytest
import tiny
from tokenizers import processors

import specjax
from specjax.text.chat import ChatTemplate
from specjax.training import corpus, own_text
from specjax.training.own_text import Document, Openings

LENGTH, ROWS, COUNT = 47, 8, 24


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return specjax.open(tiny.save_tiny(tmp_path_factory.mktemp("target") / "tiny"))


def write(opened, openings, numbers=range(COUNT), **settings):
    options: dict = {"seed": 5, "rows": ROWS, "length": LENGTH} | settings
    return own_text.write_documents(opened.model, openings, numbers, **options)


def test_a_chat_is_a_users_turn_and_an_answer(opened):
    """Both are the target's own: what generate writes after the same prompts with the same seeds."""
    openings = own_text.openings_of(opened)
    end, user, assistant = (opened.tokenizer.token_to_id(token) for token in tiny.SPECIAL)
    assert openings == Openings((user,), (end, assistant), (end,), (), chat=True)
    counted = []
    documents = write(opened, openings, on_tokens=counted.append)
    assert 12 < len(documents) <= COUNT and sum(counted) >= sum(len(text) - start for text, start in documents)
    most = openings.tokens(LENGTH)
    temperatures = set()
    for number in range(4):
        first = specjax.Sampling(seed=own_text._seed(5, number, 0))
        options = {"stop_tokens": openings.ends, "fixed": True, "slots": LENGTH + 1}
        (turn,) = specjax.generate(opened.model, [[user]], sampling=first, max_new_tokens=most, **options).rows()
        message = [token for token in turn.tolist() if token != end]
        if len(message) == 1:
            continue
        prompt = [*message, end, assistant]
        temperature = own_text.TEMPERATURES[number]
        sampling = specjax.Sampling(temperature=temperature, seed=own_text._seed(5, number, 1))
        rest = specjax.generate(
            opened.model, [prompt], sampling=sampling, max_new_tokens=LENGTH - len(prompt), **options
        ).rows()[0]
        found = [document for document in documents if document.tokens[: document.start].tolist() == prompt]
        assert own_text.cut_loop(rest).tolist() in [own_text.cut_loop(document.tokens).tolist() for document in found]
        temperatures.add(temperature)
    assert len(temperatures) > 2
    for tokens, start in documents:
        assert tokens[0] == user and tokens[start - 2 : start].tolist() == [end, assistant] and len(tokens) <= LENGTH
        assert len(tokens) == LENGTH or tokens[-1] == end or len(own_text.cut_loop(tokens)) < len(tokens)


def test_documents_are_a_function_of_their_numbers_and_the_seed(opened):
    openings = own_text.openings_of(opened)
    first, again = write(opened, openings), write(opened, openings)
    other = write(opened, openings, range(COUNT, 2 * COUNT))
    assert [each.tokens.tolist() for each in first] == [each.tokens.tolist() for each in again]
    assert not {each.tokens.tobytes() for each in first} & {each.tokens.tobytes() for each in other}
    assert write(opened, openings, seed=6)[0].tokens.tolist() != first[0].tokens.tolist()


def test_a_text_begins_with_the_first_token_of_the_tokenizer_else_with_any(opened):
    """Without a template, a target continues a beginning. Openings differ, also of greedy texts."""
    plain = specjax.Opened(opened.path, opened.model, opened.tokenizer, (0,), None, {})
    openings = own_text.openings_of(plain)
    assert not openings.before and openings.starts == tuple(range(3, opened.model.vocab_size)) and not openings.chat
    assert own_text.openings_of(
        specjax.Opened(opened.path, opened.model, opened.tokenizer, (0,), None, {"bos_token_id": 2})
    ).before == (2,)
    tokenizer = tiny.spelling_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", 1)])
    began = own_text.openings_of(specjax.Opened(opened.path, opened.model, tokenizer, (0,), None, {"bos_token_id": 2}))
    assert began == Openings((1,), (), (0,), (), chat=False)
    documents = write(opened, openings)
    assert len({document.tokens[0] for document in documents}) > 8
    assert all(document.start in (1, 1 + openings.tokens(LENGTH)) for document in documents)
    greedy = write(opened, began, range(0, 4 * COUNT, 4))
    assert len({document.tokens.tobytes() for document in greedy}) > COUNT // 2


TEMPLATES = {
    "a system text before": (
        "S{% for m in messages %}<|user|>{{ m.content | trim }}<|end|>{% endfor %}<|assistant|>",
        True,
    ),
    "no message": ("<|user|>hello<|assistant|>", False),
    "a message twice": ("<|user|>{{ messages[0].content }}{{ messages[0].content }}<|end|>", False),
    "capitals": ("<|user|>{{ messages[0].content | upper }}<|end|>", False),
    "its length": ("{{ messages[0].content | length }}<|user|>{{ messages[0].content }}<|end|>", False),
    "a refusal": ("{{ raise_exception('no') }}", False),
    "nothing after": ("<|user|>{{ messages[0].content }}", False),
}


@pytest.mark.parametrize(("source", "found"), TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_without_a_plain_users_turn_is_none(source, found):
    assert (own_text.user_turn(ChatTemplate(source), tiny.spelling_tokenizer()) is not None) == found


def test_a_template_that_leaves_no_place_for_an_answer_is_refused(opened):
    long = Openings((1,) * 40, (0, 2), (0,), (), chat=True)
    with pytest.raises(ValueError, match=r"at most 47 tokens.*takes 54"):
        write(opened, long)


def test_loops_are_cut_to_two_rounds():
    start, rng = [50, 51, 52, 53, 54], np.random.default_rng(0)
    for period in (1, 3, 4, 17, 64):
        loop = list(range(period))
        tokens = np.asarray((start + loop * 300)[:400])
        assert own_text.cut_loop(tokens).tolist() == start + loop * 2
        assert own_text.cut_loop(np.asarray([*start, *loop * 3][: 5 + 31])).size == min(5 + 3 * period, 36)
    random = rng.integers(0, 9, 400)
    assert own_text.cut_loop(random) is random
    left = np.asarray([1, 2] * 50 + [7])  # the loop ended
    assert own_text.cut_loop(left) is left


def test_a_row_in_a_loop_is_ended_and_replaced(opened, monkeypatch):
    """Any text of more than 20 tokens is taken for a loop here."""
    openings = own_text.openings_of(opened)
    whole = write(opened, openings)
    monkeypatch.setattr(own_text, "cut_loop", lambda tokens: tokens[:20])
    cut = {document.tokens[:12].tobytes(): document for document in write(opened, openings)}
    pairs = [(each, cut.get(each.tokens[:12].tobytes())) for each in whole]
    assert all(twin is not None and len(twin.tokens) <= len(each.tokens) for each, twin in pairs if each.start < 12)
    assert max(len(each.tokens) for each in cut.values()) < LENGTH == max(len(each.tokens) for each in whole)


# Shards.


def documents(number):
    """Ten documents; the last two of each shard are those of the first shard."""
    texts = [np.asarray([number, 70_000, i, i, number]) for i in range(8)] + [np.asarray([1, 2, i]) for i in range(2)]
    return [Document(text, 2) for text in texts]


def test_a_sampling_that_was_stopped_goes_on_to_the_same_bits(tmp_path):
    whole = corpus.OwnText(tmp_path / "whole", documents, 100_000)
    assert [whole.take() for _ in range(3)] == [46, 40, 40]  # copies do not count

    def stopped(number):
        if number == 2:
            raise KeyboardInterrupt
        return documents(number)

    parts = corpus.OwnText(tmp_path / "parts", stopped, 100_000)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(3):
            parts.take()
    calls = []
    parts = corpus.OwnText(tmp_path / "parts", lambda number: calls.append(number) or documents(number), 100_000)
    assert [parts.take() for _ in range(3)] == [46, 40, 40] and calls == [2]
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes()
    assert [each.tokens.tolist() for each in parts.documents] == [each.tokens.tolist() for each in whole.documents]
    assert parts.tokens == 126 == len(parts.trained) + sum(len(each.tokens) for each in parts.held_out)
    assert np.load(tmp_path / "whole" / "shard-00000.npz")["tokens"].dtype == np.uint32
    (tmp_path / "whole" / "shard-00000.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"shard-00000\.npz is no shard.*remove it"):
        corpus.OwnText(tmp_path / "whole", documents, 100_000).take()


# A user's own texts.


def test_texts_and_conversations_are_encoded_by_the_target(opened, tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    lines = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}, {"text": "z"}]
    (tmp_path / "b.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    tokens = corpus.encode_files([tmp_path / "a.txt", tmp_path / "b.jsonl"], opened)
    text = opened.tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
    assert text == "abc<|user|>hi<|end|><|assistant|>yo<|end|>z" and tokens.dtype == np.int32


BAD_FILES = {
    "not UTF-8": ("a.txt", b"\xff\xfe\xfa", "a.txt cannot be read as UTF-8"),
    "empty": ("a.txt", b" \n", "a.txt is empty; give a file with text"),
    "not JSON": ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl, line 2: Expecting value"),
    "no messages": ("a.jsonl", b'{"prompt": "a"}\n', "a.jsonl, line 1: it must be an object such as"),
    "half a message": ("a.jsonl", b'{"messages": "a"}\n', "a.jsonl, line 1: messages is 'a'"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_files_that_hold_something_else_are_refused(name, content, message, opened, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        corpus.encode_files([tmp_path / name], opened)
