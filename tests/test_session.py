"""Sessions: strings in, strings out, on a tiny model that spells."""

import dataclasses

import numpy as np
import pytest
from tiny import LETTERS, save_tiny

import specjax
from specjax import session as session_module

PROMPTS = ["a quick fox", "b", "the lazy dog jumps"]
SPECS = (None, "ngram", "early-exit:1", "model")
SLOTS = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="module")
def opened(folder):
    """Special tokens have no place in the text of a model that was never trained, so they are banned in ``GREEDY``."""
    return specjax.open(folder)


@pytest.fixture(scope="module")
def session(opened):
    return specjax.Session(opened, "early-exit:1", 2, slots=SLOTS, fixed=True)


BIAS = np.where(np.arange(3 + len(LETTERS)) < 3, -np.inf, 0.0)
GREEDY = {"temperature": 0.0, "logit_bias": BIAS}


def continued(opened, prompt, max_new_tokens):
    """Returns the greedy text by ``generate`` alone, one program for all prompts."""
    tokens = opened.tokenizer.encode(prompt).ids
    padded = np.asarray([tokens + [0] * (32 - len(tokens))], np.int32)
    options = {"sampling": specjax.Sampling(**GREEDY), "max_new_tokens": max_new_tokens, "slots": SLOTS}
    generation = specjax.generate(opened.model, padded, [len(tokens)], **options)
    return opened.tokenizer.decode(generation.new_tokens()[0].tolist())


def user(content):
    return {"role": "user", "content": content}


class Calls:
    """Counts how often a session reads a whole prompt, and the tokens that it adds to one."""

    def __init__(self, monkeypatch):
        self.prefills, self.added = 0, []
        prefill, extend = session_module.prefill, session_module.extend

        def count_prefill(*arguments, **named):
            self.prefills += 1
            return prefill(*arguments, **named)

        def count_extend(target, state, tokens, **named):
            self.added.append(len(tokens[0]))
            return extend(target, state, tokens, **named)

        monkeypatch.setattr(session_module, "prefill", count_prefill)
        monkeypatch.setattr(session_module, "extend", count_extend)


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


# Completions.


@pytest.mark.parametrize("spec", SPECS)
def test_greedy_text_is_that_of_generate_with_every_drafter(spec, opened, folder):
    spec = f"model:{folder}" if spec == "model" else spec
    results = specjax.Session(opened, spec, 2, slots=SLOTS, fixed=True).complete(PROMPTS, 20, **GREEDY)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.text == str(result) == continued(opened, prompt, 20)
        assert result.tokens == opened.tokenizer.encode(result.text).ids and len(result.tokens) == 20
        assert (result.finish_reason, result.prompt_tokens) == ("length", len(prompt))
        assert result.rounds <= 20 and (result.drafted > 0) == (spec is not None)
        assert 0 <= result.accepted <= result.drafted


def test_a_folder_and_a_drafter_serve_as_well_as_their_names(opened, folder):
    wanted = continued(opened, "a", 12)
    drafter = specjax.load_drafter("early-exit:1", opened, 2)
    assert specjax.Session(folder, drafter, slots=SLOTS, fixed=True).complete("a", 12, **GREEDY).text == wanted
    assert specjax.Session(str(folder), "early-exit:2", fixed=True).complete("a", 12, **GREEDY).text == wanted


def test_one_text_gives_one_result_and_a_list_a_list(session):
    alone = session.complete("b", 8, **GREEDY)
    assert isinstance(alone, specjax.Completion)
    assert session.complete(["b"], 8, **GREEDY) == [alone]
    assert session.complete(PROMPTS, 8, **GREEDY)[1].text == alone.text


def test_a_limit_and_a_temperature_for_each_prompt(session):
    first, second = session.complete(["a", "b"], [3, 9], temperature=[0.0, 1.0], logit_bias=BIAS, seed=3)
    assert (len(first.tokens), len(second.tokens)) == (3, 9)
    assert first.text == session.complete("a", 3, **GREEDY).text


def test_a_prompt_without_a_seed_has_the_next_of_the_session(opened):
    texts = {seed: specjax.Session(opened, seed=seed).complete("a", 20).text for seed in (0, 1, 2)}
    assert len(set(texts.values())) == 3
    session = specjax.Session(opened)
    both = session.complete(["a", "a"], 20)
    assert [result.text for result in both] == [texts[0], texts[1]]
    assert session.complete("a", 20).text == texts[2]
    assert session.complete("a", 20, seed=1).text == texts[1]


def test_stop_tokens_end_a_text_and_are_no_part_of_it(opened):
    whole = continued(opened, "a quick fox", 30)
    stop = opened.tokenizer.token_to_id(whole[11])
    stopping = specjax.Session(dataclasses.replace(opened, stop_tokens=(stop,)), "early-exit:1", fixed=True)
    result = stopping.complete("a quick fox", 30, **GREEDY)
    assert result.finish_reason == "stop token"
    assert result.text == whole[: whole.index(whole[11])] and result.tokens[-1] == stop
    assert len(result.tokens) == len(result.text) + 1


def test_a_stop_string_ends_its_row_on_the_device(session, opened, monkeypatch):
    """The row is done after the look that finds the string; the others go on."""
    whole = {prompt: continued(opened, prompt, 60) for prompt in PROMPTS}
    stop = whole[PROMPTS[0]][3:6]
    done = []
    inner = session_module.stop

    def noted(state, rows):
        state = inner(state, rows)
        done.append(np.asarray(state.done_b))
        return state

    monkeypatch.setattr(session_module, "stop", noted)
    results = session.complete(PROMPTS, 60, stop=[stop, "never here"], **GREEDY)
    for prompt, result in zip(PROMPTS, results, strict=True):
        text, met, _ = whole[prompt].partition(stop)
        assert result.text == text and result.finish_reason == ("stop string" if met else "length")
        assert opened.tokenizer.decode(result.tokens) == text + met
    assert done and done[0][0] and results[0].rounds <= session_module._ROUNDS_PER_LOOK
    assert max(result.rounds for result in results) > 2 * session_module._ROUNDS_PER_LOOK


def test_a_session_remembers_what_it_wrote(opened):
    """Completions, streams and chats; the text stays, and later calls copy it."""
    drafter = specjax.SuffixDrafter.empty(opened.model.vocab_size, 512, 2)
    session = specjax.Session(opened, drafter, slots=SLOTS, fixed=True, remember=True)
    first, again = (session.complete(PROMPTS, 20, **GREEDY) for _ in range(2))
    assert [x.text for x in first] == [x.text for x in again] == [continued(opened, x, 20) for x in PROMPTS]
    assert sum(x.rounds for x in again) < sum(x.rounds for x in first)
    list(session.stream("a", 3, **GREEDY))
    answer = session.chat("fox", 3, **GREEDY)
    assert session.drafter.text_m.tolist()[-3:] == answer.tokens
    assert (drafter.text_m == -1).all()
    with pytest.raises(TypeError, match="a NoneType, which remembers nothing"):
        specjax.Session(opened, remember=True)


# Streams.


@pytest.mark.parametrize("stop", [(), ("e", "never here")])
def test_pieces_of_a_stream_are_the_text(stop, session):
    pieces, stream = [], session.stream("a quick fox", 40, stop=stop, **GREEDY)
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            result = end.value
            break
    wanted = session.complete("a quick fox", 40, stop=stop, **GREEDY)
    assert (result.text, result.tokens, result.finish_reason) == (wanted.text, wanted.tokens, wanted.finish_reason)
    assert "".join(pieces) == result.text and all(pieces)
    assert len(pieces) > 3 or stop


def test_a_stream_of_messages_is_a_chat_that_goes_on(session, opened, calls):
    messages = [user("a quick fox")]
    text = "".join(session.stream(messages, 12, **GREEDY))
    messages += [{"role": "assistant", "content": text}, user("and")]
    again = "".join(session.stream(messages, 12, **GREEDY))
    assert calls.prefills == 1 and calls.added == [len(["<|end|>", "<|user|>", *"and", "<|end|>", "<|assistant|>"])]
    assert again == specjax.Session(opened, slots=SLOTS).chat(messages, 12, **GREEDY).text


def test_a_stream_that_is_left_keeps_nothing(session, calls):
    stream = session.stream([user("a")], 12, **GREEDY)
    text = next(stream)
    stream.close()
    session.chat([user("a"), {"role": "assistant", "content": text}, user("b")], 4, **GREEDY)
    assert calls.prefills == 2 and not calls.added


# Conversations.


@pytest.mark.parametrize("spec", SPECS)
def test_turns_read_only_what_is_new_and_say_what_a_fresh_session_says(spec, opened, folder, calls):
    spec = f"model:{folder}" if spec == "model" else spec
    session, messages, read = specjax.Session(opened, spec, 2, slots=SLOTS, fixed=True), [], 0
    for turn, text in enumerate(("hello", "and you", "a", "the end of it")):
        messages.append(user(text))
        result = session.chat(messages, 12, **GREEDY)
        assert calls.prefills == turn + 1 and len(calls.added) == turn
        tokens = len(opened.tokenizer.encode(opened.chat_template.render(messages), add_special_tokens=False).ids)
        assert result.prompt_tokens == tokens and calls.added[-1:] == ([tokens - read] if turn else [])
        fresh = specjax.Session(opened, spec, 2, slots=SLOTS, fixed=True).chat(messages, 12, **GREEDY)
        assert (result.text, result.tokens) == (fresh.text, fresh.tokens)
        assert result.rounds <= 12 and result.accepted <= result.drafted
        assert (sum(result.drafted_at), sum(result.accepted_at)) == (result.drafted, result.accepted)
        assert len(result.drafted_at) == len(result.accepted_at) == (0 if spec is None else 2)
        messages.append(result.message)
        read = tokens + 12


def test_a_text_is_one_message_of_the_user(session):
    assert session.chat("hello", 8, **GREEDY).text == session.chat([user("hello")], 8, **GREEDY).text


def test_an_answer_that_ended_at_a_stop_token_goes_on(opened, calls):
    """The template ends answers with the token that ended this one."""
    stop = continued(opened, "hello", 20)[5]
    template = specjax.text.ChatTemplate("{% for message in messages %}{{ message.content }}" + stop + "{% endfor %}")
    ending = dataclasses.replace(opened, stop_tokens=(opened.tokenizer.token_to_id(stop),), chat_template=template)
    session, messages = specjax.Session(ending, slots=SLOTS), [user("hello")]
    messages += [session.chat(messages, 30, **GREEDY).message, user("more")]
    result = session.chat(messages, 30, **GREEDY)
    assert calls.prefills == 1 and calls.added == [len("more" + stop)]
    assert result.text == specjax.Session(ending, slots=SLOTS).chat(messages, 30, **GREEDY).text


def test_what_cannot_go_on_is_read_again(opened, calls):
    """Another history, an answer that the template changes, other sampling parameters, full slots, the same again."""
    fresh = specjax.Session(opened, slots=SLOTS)
    first = [user("hello")]
    answered = [*first, fresh.chat(first, 12, **GREEDY).message]
    cases = {
        "another question": ([user("other")], GREEDY),
        "another answer": ([*first, {"role": "assistant", "content": "something else"}, user("more")], GREEDY),
        "a shorter answer": ([*first, {"role": "assistant", "content": answered[1]["content"][:5]}, user("x")], GREEDY),
        "the same again": (first, GREEDY),
        "warm": ([*answered, user("more")], GREEDY | {"temperature": 0.0, "top_k": 5}),
        "a seed": ([*answered, user("more")], GREEDY | {"seed": 5}),
    }
    for name, (messages, sampling) in cases.items():
        session = specjax.Session(opened, slots=SLOTS)
        session.chat(first, 12, **GREEDY)
        before = calls.prefills
        assert session.chat(messages, 12, **sampling).text == fresh.chat(messages, 12, **sampling).text, name
        assert calls.prefills >= before + 1 and not calls.added, name
        calls.added.clear()

    session, messages = specjax.Session(opened), [user("hello" * 8)]  # slots are what one turn needs: 128
    for _ in range(3):
        messages += [session.chat(messages, 40, **GREEDY).message, user("more" * 5)]
    assert session.chat(messages, 8, **GREEDY).text == fresh.chat(messages, 8, **GREEDY).text


def test_a_conversation_that_comes_close_to_the_end_of_its_slots(opened, monkeypatch):
    """Whether a turn still fits is asked as the engine asks it, which needs more places where rounds adapt."""
    monkeypatch.setattr(session_module, "_CONVERSATION_SLOTS", 128)
    session, messages = specjax.Session(opened), [user("hello")]
    messages += [session.chat(messages, 8, **GREEDY).message, user("more")]
    tokens = opened.need_chat_template().encode(opened.tokenizer, messages)
    new = session._kept.state.tokens_bs.shape[1] - len(tokens) - 10  # places past the end
    fresh = specjax.Session(opened, slots=SLOTS).chat(messages, new, **GREEDY)
    assert session.chat(messages, new, **GREEDY).text == fresh.text


def test_a_stop_string_in_a_conversation(session, opened):
    """The caches hold what follows the string in its round, so the next turn reads everything."""
    messages = [user("hello")]
    whole = session.chat(messages, 20, **GREEDY).text
    result = session.chat(messages, 20, stop=[whole[4:6]], **GREEDY)
    assert result.text == whole[: whole.index(whole[4:6])] and result.finish_reason == "stop string"
    messages += [result.message, user("more")]
    fresh = specjax.Session(opened, slots=SLOTS).chat(messages, 8, **GREEDY)
    assert session.chat(messages, 8, **GREEDY).text == fresh.text


def test_variables_reach_the_template(opened):
    template = specjax.text.ChatTemplate("{% if short %}b{% else %}{{ messages[0].content }}{% endif %}")
    session = specjax.Session(dataclasses.replace(opened, chat_template=template))
    assert session.chat("hello", 8, variables={"short": True}, **GREEDY).text == continued(opened, "b", 8)
    assert session.chat("hello", 8, **GREEDY).text == continued(opened, "hello", 8)


# Bad input.


def test_folders_without_a_tokenizer_or_a_template(opened, tmp_path):
    with pytest.raises(ValueError, match=r"tiny/tokenizer\.json does not exist; add the model's"):
        specjax.Session(dataclasses.replace(opened, tokenizer=None))
    bare = specjax.Session(save_tiny(tmp_path / "bare", template=None))
    for call in (bare.chat, bare.stream):
        with pytest.raises(ValueError, match=r"bare has neither chat_template\.jinja nor a chat_template"):
            call([user("hello")])


@pytest.mark.parametrize("prompts", [None, 3, [3], ["a", None], {"role": "user"}, [user("a")], b"a"], ids=repr)
def test_prompts_of_a_wrong_type(prompts, session):
    with pytest.raises(TypeError, match=r"prompts is .*; give a text, or a list of texts"):
        session.complete(prompts)


def test_control_tokens_and_templates_of_a_chat(opened, session):
    """``<|end|>`` in a message is one token, or the letters of it that the tokenizer has."""
    typed = [user("a<|end|>b")]
    assert session.chat(typed, 4, **GREEDY).prompt_tokens == len("UaEbEA")
    assert session.chat(typed, 4, sanitize_control_tokens=True, **GREEDY).prompt_tokens == len("UaendbEA")
    pieces = session.stream(typed, 4, sanitize_control_tokens=True, **GREEDY)
    assert "".join(pieces) == session.chat(typed, 4, sanitize_control_tokens=True, **GREEDY).text
    templates = specjax.text.ChatTemplate({"default": "a", "tool_use": "bb", "rag": "ccc"})
    session = specjax.Session(dataclasses.replace(opened, chat_template=templates), slots=SLOTS, fixed=True)
    for variables, wanted in ((None, 1), ({"tools": []}, 2), ({"chat_template": "rag", "tools": []}, 3)):
        assert session.chat(typed, 1, variables=variables, **GREEDY).prompt_tokens == wanted


def test_prompts_without_tokens(session):
    with pytest.raises(ValueError, match=r"the prompt holds '\\udc00' at place 1, which is half of a character"):
        session.complete("a\udc00", 5)
    for prompts in ("", ["a", ""], "\u00e4"):
        with pytest.raises(ValueError, match="has no tokens; give at least one character"):
            session.complete(prompts, 5)
    with pytest.raises(ValueError, match="prompts have lengths"):
        session.complete([], 5)


def test_limits_that_do_not_fit(session):
    with pytest.raises(ValueError, match=r"max_new_tokens 300 need 301 positions; the target has 256"):
        session.complete("a", 300)
    with pytest.raises(ValueError, match=r"max_new_tokens is 0"):
        session.chat("a", 0)
    small = specjax.Session(session.opened, "ngram", slots=20, fixed=True)
    with pytest.raises(ValueError, match=r"slots is 20; .* need"):
        next(small.stream("a", 40))


def test_arguments_that_there_are_not(session, opened):
    with pytest.raises(TypeError, match="no argument 'temprature'; sampling parameters are temperature, top_k"):
        session.complete("a", temprature=0.5)
    with pytest.raises(ValueError, match=r"top_p is 2.0"):
        session.chat("a", 5, top_p=2.0)
    for stop in ("end", [""], [3]):
        with pytest.raises(ValueError, match=r"stop is .*; give a sequence of strings"):
            session.complete("a", 5, stop=stop)
    with pytest.raises(ValueError, match="messages is 3; give a list"):
        session.chat(3)
    with pytest.raises(ValueError, match="give model:DIR"):
        specjax.Session(opened, "no such drafter")
    with pytest.raises(ValueError, match="is not a folder"):
        specjax.Session("nowhere")


def test_a_chat_survives_an_error(opened, calls):
    session, messages = specjax.Session(opened, slots=SLOTS), [user("hello")]
    messages += [session.chat(messages, 8, **GREEDY).message, user("more")]
    with pytest.raises(ValueError, match="positions"):
        session.chat(messages, 1000, **GREEDY)
    fresh = specjax.Session(opened, slots=SLOTS).chat(messages, 8, **GREEDY)
    assert session.chat(messages, 8, **GREEDY).text == fresh.text


def test_trees(opened):
    """A session drafts trees by name, and takes the rule for them; what does not fit is refused at once."""
    session = specjax.Session(opened, "ngram", 3, tree=6, slots=SLOTS, fixed=True)
    assert (session.drafter.num_draft, session.drafter.tree_depth) == (6, 3)
    found = session.complete("ab ab ab ab", 20, **GREEDY)
    assert found.text == specjax.Session(opened, slots=SLOTS).complete("ab ab ab ab", 20, **GREEDY).text
    assert found.drafted > 0 and len(found.drafted_at) == 3
    for drafter, options, message in [
        ("ngram", {"tree": 6, "verify": specjax.verify.block}, "a rule for chains"),
        (specjax.NGramDrafter(), {"tree": 6}, "tree is 6, siblings None and drafter no text"),
        (None, {"siblings": "paths"}, "tree is None, siblings 'paths' and drafter no text"),
    ]:
        with pytest.raises(ValueError, match=message):
            specjax.Session(opened, drafter, 3, **options)
