"""scripts/generate.py, run in this process on a tiny random pair: figures, text, trace page, errors."""

import argparse
import contextlib
import html.parser
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from draft_heads import write_block, write_eagle, write_medusa, write_mtp
from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace

import specjax
from specjax import MedusaDrafter
from specjax.checkpoint.block import block_head
from specjax.checkpoint.generation import load_stop_tokens
from specjax.commands import places
from specjax.drafters.eagle import EagleHead
from specjax.drafters.medusa import init_medusa_params
from specjax.drafters.mtp import MTPConfig, MTPHead, init_mtp_params
from specjax.hf.config import decoder_config
from specjax.text.tokenizer import load_tokenizer
from specjax.training.data import train_tokenizer
from specjax.transformer.decoder import init_params

SCRIPTS = Path(__file__).parent.parent / "scripts"
PROMPTS = ("def f(x):", "# naïve\n<b> & \t'日本'", "x")
STOP = "<|endoftext|>"


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("specjax.commands.generate")


@pytest.fixture(scope="module")
def transcripts(script):
    """The module in which it takes note of what is emitted, and prints it."""
    return importlib.import_module("specjax.commands.transcript")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A target whose next token is uncertain, its draft, which is the target with noise, and a draft of other size."""
    folder = tmp_path_factory.mktemp("pair")
    for name, vocab_size in (("target", 262), ("other", 270)):
        tokenizer = train_tokenizer(["def f(x):\n    return x\n"] * 3, vocab_size)
        config = {
            "model_type": "llama",
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "eos_token_id": tokenizer.token_to_id(STOP),
        }
        params = init_params(decoder_config(config), jax.random.key(0))
        params["embed_tokens"]["weight"] *= 10.0
        specjax.save(folder / name, config, params, tokenizer, {})
        if name == "target":
            noisy = jax.tree.map(lambda x: x * (1 + 0.5 * jax.random.normal(jax.random.key(1), x.shape)), params)
            specjax.save(folder / "draft", config, noisy, tokenizer, {})
    return folder


SHIPPED_HEADS = {"mtp": MTPHead, "eagle": EagleHead, "medusa": MedusaDrafter}


@pytest.mark.parametrize("kind", SHIPPED_HEADS)
def test_a_head_is_opened_by_its_kind(kind, script, capsys):
    """Whose folder lies beside the target's; of an EAGLE head it is said which states it reads."""
    target = SCRIPTS.parent / "checkpoints" / "py-14m"
    spec = f"cascade:ngram,{kind}:{target}-{kind}"
    drafter = script.named_drafter(spec, specjax.load(target), None, 3)
    assert isinstance(drafter.first, specjax.NGramDrafter) and drafter.num_draft == 3
    assert isinstance(getattr(drafter.second, "head", drafter.second), SHIPPED_HEADS[kind])
    assert ("hidden states 2, 5, 8" in capsys.readouterr().err) == (kind == "eagle")


def stop_at(folder, *tokens):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens}))


def run(script, *argv):
    """Returns what the command wrote to standard output and standard error.

    The number of drafts is fixed: that program compiles in half the time.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        script.main(["--fixed", *(str(value) for value in argv)])
    return out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def batch(script, pair, tmp_path_factory):
    """Three prompts sampled as one batch, with every output asked for."""
    folder = tmp_path_factory.mktemp("batch")
    (folder / "prompt.txt").write_text(PROMPTS[1] + "\n", encoding="utf-8")
    argv = ["--prompt", PROMPTS[0], "--prompt-file", folder / "prompt.txt", "--prompt", PROMPTS[2]]
    argv += [
        "--target",
        pair / "target",
        "--drafter",
        f"model:{pair / 'draft'}",
        "--num-draft",
        2,
        "--temperature",
        1,
        "--seed",
        5,
    ]
    argv += ["--max-new-tokens", 60, "--compare", "--json", folder / "out.json", "--trace", folder / "out.html"]
    out, err = run(script, *argv)
    assert sorted(path.name for path in folder.iterdir()) == ["out.html", "out.json", "prompt.txt"]
    result = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    return out, err, result, (folder / "out.html").read_text(encoding="utf-8")


def test_json_agrees_with_the_library_and_with_itself(batch, pair):
    result = batch[2]
    target, tokenizer = specjax.load(pair / "target"), load_tokenizer(pair / "target")
    ids = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    stop = tokenizer.token_to_id(STOP)
    expected = specjax.generate(
        target,
        *specjax.pad_prompts(ids),
        drafter=specjax.load_drafter(f"model:{pair / 'draft'}", target, num_draft=2),
        fixed=True,
        sampling=specjax.Sampling(seed=5),
        max_new_tokens=60,
        stop_tokens=(stop,),
    )
    assert [prompt["prompt"] for prompt in result["prompts"]] == list(PROMPTS)
    for row, prompt in enumerate(result["prompts"]):
        text = np.asarray(expected.tokens[row, len(ids[row]) : expected.lengths[row]]).tolist()
        assert prompt["tokens"] == text
        assert prompt["text"] == tokenizer.decode(text)
        for name in ("rounds", "drafted", "accepted", "emitted"):
            assert prompt[name] == getattr(expected.stats, name)[row], name
        assert prompt["accepted_at"] == expected.stats.accepted_at[row].tolist()
        assert prompt["emitted"] == len(prompt["tokens"])
        assert prompt["accepted"] == sum(prompt["accepted_at"]) and len(prompt["accepted_at"]) == 2
        assert prompt["drafted"] == sum(prompt["drafted_at"])
        if stop not in prompt["tokens"]:
            assert prompt["emitted"] == prompt["accepted"] + prompt["rounds"] == 60
    emitted, rounds = (sum(prompt[name] for prompt in result["prompts"]) for name in ("emitted", "rounds"))
    assert result["emitted_per_round"] == pytest.approx(emitted / rounds)
    # The pair was made for rounds of all kinds: else the trace would show nothing.
    assert 1.5 < result["emitted_per_round"] < 2.8


def test_compare_gives_the_ratio_of_two_measured_speeds(batch):
    _, err, result, _ = batch
    speeds = result["comparison"]
    assert result["tokens_per_second"] > 0 and speeds["plain"] > 0
    assert result["speedup"] == pytest.approx(speeds["with_drafter"] / speeds["plain"])
    assert f"{result['speedup']:.2f} times plain decoding" in err


def test_standard_output_holds_each_prompt_and_its_text_in_order(batch):
    out, err, result, _ = batch
    wanted = ""
    for number, prompt in enumerate(result["prompts"], 1):
        text = prompt["prompt"] + prompt["text"]
        wanted += f"--- prompt {number} of 3 ---\n" + text + ("" if text.endswith("\n") else "\n")
    assert out == wanted
    assert "emitted per round" in err and "at position 2" in err


class Page(html.parser.HTMLParser):
    """Reads a trace page back: for each prompt its text, and the class and text of each token of each round."""

    def __init__(self, page):
        super().__init__()
        self.texts, self.prompts, self.rounds, self.links, self.open = [], [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [value for name, value in attributes.items() if name in ("src", "href")]
        if tag in ("meta", "i", "em"):
            return
        kind = attributes.get("class", "")
        self.open.append((tag, kind))
        if tag == "pre":
            self.texts.append("")
            self.prompts.append("")
            self.rounds.append([])
        elif ("pre", "") in self.open and kind == "round":
            self.rounds[-1].append((attributes["title"], []))
        elif ("pre", "") in self.open and kind.startswith("t "):
            self.rounds[-1][-1][1].append([kind.split()[1], ""])

    def handle_endtag(self, tag):
        if tag not in ("i", "em"):
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if ("pre", "") not in self.open:
            return
        self.texts[-1] += data
        if self.open[-1][1] == "prompt":
            self.prompts[-1] += data
        else:
            self.rounds[-1][-1][1][-1][1] += data


def pictures(text):
    """Replaces the control characters that HTML cannot hold by their pictures."""
    return text.translate({code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"})


def test_trace_page_holds_every_token_once_with_its_origin(batch, pair):
    _, _, result, text = batch
    page = Page(text)
    stop = load_tokenizer(pair / "target").token_to_id(STOP)
    seen = set()
    assert not page.open and len(page.texts) == 3
    for row, prompt in enumerate(result["prompts"]):
        end = STOP if prompt["tokens"][-1] == stop else ""
        assert page.prompts[row] == pictures(prompt["prompt"])
        assert page.texts[row] == pictures(prompt["prompt"] + prompt["text"]) + end
        assert len(page.rounds[row]) == prompt["rounds"]
        assert sum(len(tokens) for _, tokens in page.rounds[row]) == prompt["emitted"]
        drafted = accepted = 0
        for number, (title, tokens) in enumerate(page.rounds[row], 1):
            name, counts = title.split(": ")
            d, a, n = (int(part.split()[0]) for part in counts.split(", "))
            assert name == f"round {number}" and n == len(tokens)
            behind = "target" if d == 0 else "bonus" if a == d else "corrected"
            assert [origin for origin, _ in tokens] == (["accepted"] * a + [behind])[:n]
            drafted, accepted = drafted + d, accepted + a
            seen |= {origin for origin, _ in tokens}
        assert (drafted, accepted) == (prompt["drafted"], prompt["accepted"])
    assert {"accepted", "corrected", "bonus"} <= seen


def test_trace_page_is_self_contained(batch):
    text = batch[3]
    page = Page(text)
    assert page.links and all(link.startswith("#") for link in page.links)
    assert all(f'id="{link[1:]}"' in text for link in page.links)
    for word in ("http:", "https:", "//", "@import", "url(", "<script", "<link", "<img"):
        assert word not in text.split("<pre>")[0], word


def test_trace_page_of_plain_rounds(script):
    trace_page = importlib.import_module("specjax.commands.trace_page")
    plain_round = trace_page.Round(0, 0, [trace_page.Token("<i>\n", "target")])
    trace = trace_page.Trace("</pre>&amp;\r\n", [plain_round])
    page = Page(trace_page.render([trace], {"target": '"<x>"'}, {"tokens": "1"}))
    assert page.texts == ["</pre>&amp;\u240d\n<i>\n"]
    assert page.rounds == [[("round 1: 0 drafted, 0 accepted, 1 emitted", [["target", "<i>\n"]])]]


def generation(prompt, new, limit):
    """A generation of one row that has emitted ``new``, each token by a round of its own."""
    tokens = np.zeros((1, len(prompt) + limit), np.int32)
    tokens[0, : len(prompt) + len(new)] = [*prompt, *new]
    counts = np.full((1,), len(new), np.int32)
    none = np.zeros((1,), np.int32)
    stats = specjax.Stats(counts, none, none, counts, np.zeros((1, 0), np.int32), np.zeros((1, 0), np.int32))
    return specjax.Generation(tokens, np.asarray([len(prompt) + len(new)]), np.asarray([len(prompt)]), stats)


def streamed(transcripts, tokenizer, prompt, new, **how):
    """Returns what standard output gains with each of the tokens."""
    transcript = transcripts.Transcript(tokenizer, prompt, len(new), **how)
    out = io.StringIO()
    gains = []
    with contextlib.redirect_stdout(out):
        printer = transcripts.Printer([transcript])
        for count in range(1, len(new) + 1):
            before = len(out.getvalue())
            transcript.add(generation(transcript.prompt_ids, new[:count], len(new)), 0)
            printer.update()
            gains.append(out.getvalue()[before:])
    return out.getvalue(), gains


def test_streaming_never_splits_a_character(transcripts, pair):
    tokenizer = load_tokenizer(pair / "target")
    text = "é日本🙂!"
    new = tokenizer.encode(text).ids
    assert len(new) == len(text.encode())  # a token for each byte
    out, gains = streamed(transcripts, tokenizer, "# ", new)
    assert out == "# " + text + "\n"
    assert gains == ["", "é", "", "", "日", "", "", "本", "", "", "", "🙂", "!\n"]


def test_streaming_shows_broken_bytes_once_they_are_known_to_be_broken(transcripts, pair):
    tokenizer = load_tokenizer(pair / "target")
    lead, middle = tokenizer.encode("日").ids[:2]
    letter = tokenizer.encode("!").ids[0]
    out, gains = streamed(transcripts, tokenizer, "# ", [lead, letter, lead, middle])
    assert gains == ["", "\ufffd!", "", "\ufffd\n"]
    assert out == "# \ufffd!\ufffd\n"


def test_broken_bytes_before_the_stop_token_are_part_of_the_text(transcripts, pair):
    tokenizer = load_tokenizer(pair / "target")
    lead, stop = tokenizer.encode("日").ids[0], tokenizer.token_to_id(STOP)
    out, gains = streamed(transcripts, tokenizer, "# ", [lead, stop], stop_tokens=(stop,))
    assert gains == ["", "\ufffd\n"]
    assert out == "# \ufffd\n"


def test_text_that_may_become_a_stop_string_waits(transcripts, pair):
    tokenizer = load_tokenizer(pair / "target")
    out, gains = streamed(transcripts, tokenizer, "#", tokenizer.encode("é!?é!").ids, stop=("!!", "é!.", "?é!"))
    assert gains == ["", "", "", "é!", "", "", "\n"] and out == "#é!\n"
    out, gains = streamed(transcripts, tokenizer, "#", tokenizer.encode("a!?").ids, stop=("!?.",))
    assert gains == ["a", "", "!?\n"]


@pytest.fixture(scope="module")
def plain(script, pair, tmp_path_factory):
    """Two prompts as one batch, without stop strings: the arguments, standard output, result."""
    file = tmp_path_factory.mktemp("plain") / "out.json"
    argv = ["--target", pair / "target", "--drafter", f"model:{pair / 'draft'}", "--temperature", 1, "--seed", 5]
    argv += ["--max-new-tokens", 60, "--num-draft", 3, "--prompt", "def", "--prompt", "x ="]
    out, _ = run(script, *argv, "--json", file)
    return argv, out, json.loads(file.read_text(encoding="utf-8"))


def test_stop_strings_end_rows_and_then_the_run(script, plain, tmp_path, monkeypatch):
    argv, _, free = plain
    texts = [prompt["text"] for prompt in free["prompts"]]
    assert min(map(len, texts)) > 25
    stop = [text[place : place + 4] for text, place in zip(texts, (6, 18), strict=True)]
    rounds, stream = [], specjax.stream
    monkeypatch.setattr(
        specjax, "stream", lambda **request: (rounds.append(each) or each for each in stream(**request))
    )
    argv = [*argv, "--json", tmp_path / "out.json", "--trace", tmp_path / "out.html"]
    out, err = run(script, *argv, "--stop", stop[0], "--stop", stop[1])
    result = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    page = Page((tmp_path / "out.html").read_text(encoding="utf-8"))
    wanted = ""
    for row, (prompt, whole) in enumerate(zip(result["prompts"], free["prompts"], strict=True)):
        place, met = min((whole["text"].find(each), each) for each in stop if each in whole["text"])
        assert (prompt["text"], prompt["stopped"]) == (whole["text"][:place], met)
        assert prompt["tokens"] == whole["tokens"][: len(prompt["tokens"])]
        assert prompt["emitted"] == len(prompt["tokens"]) == prompt["rounds"] + prompt["accepted"] < whole["emitted"]
        assert [sum(prompt["drafted_at"]), sum(prompt["accepted_at"])] == [prompt["drafted"], prompt["accepted"]]
        assert [len(each) for _, each in page.rounds[row]] and len(page.rounds[row]) == prompt["rounds"]
        assert page.texts[row] == pictures(prompt["prompt"] + prompt["text"])
        wanted += f"--- prompt {row + 1} of 2 ---\n{prompt['prompt']}{prompt['text']}"
        wanted += "" if wanted.endswith("\n") else "\n"
    assert out == wanted
    assert result["emitted"] == sum(prompt["emitted"] for prompt in result["prompts"])
    assert result["drafted_at"] == [
        sum(pair) for pair in zip(*(p["drafted_at"] for p in result["prompts"]), strict=True)
    ]
    assert len(rounds) == 1 + max(prompt["rounds"] for prompt in result["prompts"])  # the first compiles
    assert f"tokens               {result['emitted']} in {result['rounds']} rounds" in err
    assert result["settings"]["stop strings"] == f"{stop[0]!r}, {stop[1]!r}"


def test_each_of_several_stop_tokens_ends_a_row_and_is_not_printed(script, pair, plain, tmp_path):
    argv, _, free = plain
    tokenizer = load_tokenizer(pair / "target")
    ends = [prompt["tokens"][place] for prompt, place in zip(free["prompts"], (9, 14), strict=True)]
    shutil.copytree(pair / "target", tmp_path / "target")
    stop_at(tmp_path / "target", *ends)
    argv = ["--target", tmp_path / "target", *argv[2:], "--json", tmp_path / "out.json"]
    run(script, *argv, "--trace", tmp_path / "out.html")
    result = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    page = Page((tmp_path / "out.html").read_text(encoding="utf-8"))
    for row, (prompt, whole) in enumerate(zip(result["prompts"], free["prompts"], strict=True)):
        place = next(place for place, token in enumerate(whole["tokens"]) if token in ends)
        assert prompt["tokens"] == whole["tokens"][: place + 1]
        assert prompt["text"] == tokenizer.decode(whole["tokens"][:place])
        assert page.texts[row] == pictures(prompt["prompt"] + prompt["text"]) + tokenizer.id_to_token(
            prompt["tokens"][-1]
        )


TEMPLATE = """{{ bos_token }}{% for m in messages %}({{ m.role }}) {{ m.content }}
{% endfor %}{% if add_generation_prompt %}(me) {% endif %}"""


@pytest.fixture(scope="module")
def chat(pair, tmp_path_factory):
    """A target with a chat template, and a tokenizer that puts the stop token first where it is let."""
    folder = tmp_path_factory.mktemp("chat") / "target"
    shutil.copytree(pair / "target", folder)
    tokenizer = load_tokenizer(folder)
    special = [(STOP, tokenizer.token_to_id(STOP))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{STOP} $A", special_tokens=special)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "bos_token": STOP}))
    return folder


@pytest.mark.parametrize("system", [None, "Brief\n"])
def test_chat_answers_messages(script, chat, tmp_path, system):
    argv = ["--target", chat, "--drafter", "none", "--temperature", 0, "--max-new-tokens", 20, "--chat"]
    argv += ["--prompt", "Hi", "--json", tmp_path / "out.json", "--trace", tmp_path / "out.html"]
    out, _ = run(script, *argv, *([] if system is None else ["--system", system]))
    result = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["prompts"][0]
    text = f"{STOP}(user) Hi\n(me) " if system is None else f"{STOP}(system) Brief\n\n(user) Hi\n(me) "
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Hi"}]
    assert (result["prompt"], result["messages"]) == (text, messages[system is None :])
    tokenizer = load_tokenizer(chat)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids.count(tokenizer.token_to_id(STOP)) == 1 and len(tokenizer.encode(text).ids) == len(ids) + 1
    expected = specjax.generate(
        specjax.load(chat),
        np.asarray([ids]),
        sampling=specjax.Sampling(temperature=0.0),
        max_new_tokens=20,
        stop_tokens=load_stop_tokens(chat),
    )
    assert result["tokens"] == expected.tokens[0, len(ids) : expected.lengths[0]].tolist()
    answer = tokenizer.decode(result["tokens"])
    assert out == f"Hi\n{answer}" + ("" if answer.endswith("\n") else "\n")
    page = Page((tmp_path / "out.html").read_text(encoding="utf-8"))
    assert page.prompts == [pictures(text)]


def test_options_of_chat_reach_the_template_and_the_tokens(transcripts, chat):
    tokenizer, stop = load_tokenizer(chat), load_tokenizer(chat).token_to_id(STOP)
    template = specjax.text.ChatTemplate({"default": "", "x": "{{ messages[0].content }}!" + STOP})
    for sanitized in (False, True):
        options = {"template": template, "chat_template": "x", "sanitize_control_tokens": sanitized}
        transcript = transcripts.Transcript(tokenizer, f"Hi{STOP}", 5, **options)
        assert transcript.prompt == f"Hi{STOP}!{STOP}"
        assert transcript.prompt_ids.count(stop) == 2 - sanitized and transcript.prompt_ids[-1] == stop


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ([], (0.8, 0, 1.0, 0.0, None)),
        (["--generation-defaults"], (0.6, 20, 1.0, 0.0, 1.1)),
        (["--generation-defaults", "--temperature", "0.8", "--top-p", "0.5"], (0.8, 20, 0.5, 0.0, 1.1)),
        (["--temperature", "0", "--top-k", "3", "--min-p", "0.1"], (0.0, 3, 1.0, 0.1, None)),
    ],
)
def test_sampling_comes_from_options_then_from_the_folder(script, tmp_path, argv, wanted):
    said = {"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    _, args = script.parse(["--target", str(tmp_path), *argv], "generate.py")
    script.fill_sampling(args)
    assert (args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty) == wanted


def test_prompts_get_the_tokenizers_special_tokens_without_chat(transcripts, chat):
    tokenizer = load_tokenizer(chat)
    transcript = transcripts.Transcript(tokenizer, "Hi", 5)
    assert transcript.prompt_ids == tokenizer.encode("Hi").ids
    assert transcript.prompt_ids[0] == tokenizer.token_to_id(STOP) and transcript.messages is None


@pytest.fixture
def no_stdin(monkeypatch):
    with open(os.devnull) as empty:
        monkeypatch.setattr(sys, "stdin", empty)
        yield


def test_coupled_gives_one_text_with_any_drafter(script, pair, tmp_path, no_stdin):
    texts = []
    for drafter in (f"model:{pair / 'draft'}", "ngram", "none"):
        argv = ["--target", pair / "target", "--drafter", drafter, "--verify", "coupled", "--temperature", 1]
        argv += ["--prompt", "f(x) f(x)", "--max-new-tokens", 40, "--num-draft", 2, "--json", tmp_path / "out.json"]
        out, _ = run(script, *argv)
        result = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
        texts.append((out, result["prompts"][0]["tokens"]))
        assert "speedup" not in result
        assert (result["emitted_per_round"] == 1) == (drafter == "none" or result["prompts"][0]["accepted"] == 0)
    assert all(text == texts[0] for text in texts)


@pytest.fixture(scope="module")
def heads(pair):
    """Freshly drawn heads of each kind for the target, in folders named after it."""
    raw = json.loads((pair / "target" / "config.json").read_text(encoding="utf-8"))
    layer = decoder_config(raw)
    module = init_mtp_params(MTPConfig(layer), jax.random.key(2))
    write_mtp(pair / "mtp", raw, module)
    eagle = EagleHead(layer, (0, 1))
    described = {
        "speculators_model_type": "eagle3",
        "draft_vocab_size": raw["vocab_size"],
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": [0, 1],
        "transformer_layer_config": {
            key: raw[key] for key in raw if key not in ("eos_token_id", "tie_word_embeddings")
        },
    }
    write_eagle(pair / "eagle", described, eagle.init_params(jax.random.key(3)), specjax.load(pair / "target"))
    block = {
        "speculators_model_type": "dspark",
        "draft_vocab_size": raw["vocab_size"],
        "block_size": 3,
        "mask_token_id": 1,
        "markov_rank": 4,
        "aux_hidden_state_layer_ids": [0],
        "transformer_layer_config": described["transformer_layer_config"],
    }
    target = specjax.load(pair / "target")
    write_block(pair / "block", block, block_head(block, target).init_params(jax.random.key(4)), target)
    kernel = specjax.load(pair / "target").params["embed_tokens"]["weight"].T
    write_medusa(pair / "medusa", init_medusa_params(kernel, 2))
    return pair


GREEDY = (
    "none",
    "mtp:{0}/mtp",
    "eagle:{0}/eagle",
    "block:{0}/block",
    "medusa:{0}/medusa",
    "early-exit:1",
    "cascade:ngram,early-exit:1",
)


def test_greedy_text_is_the_same_with_every_drafter(script, heads, tmp_path, no_stdin):
    """Of random heads, few drafts are accepted; the target's only layer drafts its own text."""
    found = {}
    for spec in GREEDY:
        argv = ["--target", heads / "target", "--drafter", spec.format(heads), "--temperature", 0, "--num-draft", 2]
        out, err = run(script, *argv, "--prompt", "f(x) f(x)", "--max-new-tokens", 24, "--json", tmp_path / "out.json")
        assert ("DSpark head, 1 layer of width 16" in err) == ("block" in spec)
        found[spec] = out, json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert len({out for out, _ in found.values()}) == 1
    assert len({tuple(result["prompts"][0]["tokens"]) for _, result in found.values()}) == 1
    assert all((result["drafted"] > 0) == (spec != "none") for spec, (_, result) in found.items())
    assert found["early-exit:1"][1]["accepted"] == found["early-exit:1"][1]["drafted"]


def test_a_draft_of_another_tokenizer_drafts_what_both_have(script, pair, tmp_path, no_stdin):
    """Byte-level vocabularies of 262 and 270 tokens; greedy text is that of plain decoding."""
    texts = []
    for drafter in (f"model:{pair / 'other'}", "none"):
        argv = ["--target", pair / "target", "--drafter", drafter, "--temperature", 0, "--prompt", "def f(x):"]
        out, err = run(script, *argv, "--max-new-tokens", 30, "--json", tmp_path / "out.json")
        texts.append(out)
        if drafter != "none":
            assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["drafted"] > 0
            shared = int(err.split("it drafts the ")[1].split(" of 262 tokens that both have")[0])
            vocabularies = [load_tokenizer(pair / name).get_vocab().keys() for name in ("target", "other")]
            assert shared == len(vocabularies[0] & vocabularies[1])
    assert texts[0] == texts[1]


def test_no_arguments_continue_the_built_in_prompt_with_the_shipped_pair(script, pair, tmp_path, monkeypatch, no_stdin):
    compile(script.PROMPT + " pass", "the built-in prompt", "exec")  # the opening of something that is Python
    monkeypatch.setattr(places, "REPOSITORY", tmp_path)
    (tmp_path / "checkpoints").symlink_to(pair)
    monkeypatch.setattr(script, "SHIPPED", "target")
    monkeypatch.setattr(script, "SHIPPED_DRAFT", "draft")
    monkeypatch.setattr(script, "PROMPT", "def f(x):")
    out, _ = run(script, "--json", tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert out.startswith("def f(x):")
    assert result["prompts"][0]["prompt"] == "def f(x):"
    assert (result["settings"]["target"], result["settings"]["drafter"]) == ("target", "draft")


def test_piped_text(script, tmp_path, monkeypatch, capsys, no_stdin):
    assert script.piped_text() == ""
    (tmp_path / "piped").write_bytes("naïve\n\n".encode())
    with open(tmp_path / "piped", encoding="ascii") as piped:
        monkeypatch.setattr(sys, "stdin", piped)
        assert script.piped_text() == "naïve\n"
    monkeypatch.setattr(sys, "stdin", None)
    assert script.piped_text() == ""
    monkeypatch.setattr(script, "STDIN_WAIT_S", 0.05)
    source, sink = os.pipe()  # open, and nobody writes
    with os.fdopen(source) as silent:
        monkeypatch.setattr(sys, "stdin", silent)
        assert script.piped_text() == ""
        assert "nothing was piped in" in capsys.readouterr().err
        os.write(sink, b"x = 1")
        os.close(sink)
        assert script.piped_text() == "x = 1"


ERRORS = {
    "empty prompt": (["--prompt", ""], "lengths [0]"),
    "prompt that is not text": (["--prompt", "\udcff"], "not UTF-8"),
    "missing prompt file": (["--prompt-file", "absent.py"], "absent.py cannot be read: No such file"),
    "binary prompt file": (["--prompt-file", "{pair}/binary"], "is not UTF-8 text"),
    "prompt too long": (["--prompt", "é" * 100], "the target has 256"),
    "missing target": (["--target", "{pair}/absent"], "absent is not a folder"),
    "truncated target": (["--target", "{pair}/truncated"], "truncated"),
    "target without tokenizer": (["--target", "{pair}/mute"], "tokenizer.json does not exist"),
    "draft of an unknown kind of tokenizer": (["--drafter", "model:{pair}/words"], "of an unknown kind"),
    "draft without a token in common": (["--drafter", "model:{pair}/foreign"], "no token of the target's vocabulary"),
    "missing draft": (["--drafter", "model:{pair}/absent"], "absent is not a folder"),
    "unknown drafter": (
        ["--drafter", "eagle"],
        "'eagle'; give model:DIR, eagle:DIR, block:DIR, mtp:DIR, medusa:DIR, assistant:DIR, ngram",
    ),
    "early exit without a number": (["--drafter", "early-exit:x"], "'early-exit:x'; give model:DIR"),
    "early exit too deep": (["--drafter", "early-exit:9"], "depth is 9 and the target has 1 layers"),
    "cascade of one": (["--drafter", "cascade:ngram"], "'cascade:ngram'; give model:DIR"),
    "cascade of none": (["--drafter", "cascade:ngram,none"], "'cascade:ngram,none'; give"),
    "heads that are none": (["--drafter", "medusa:{pair}/empty"], "config.json does not exist"),
    "drafter without folder": (
        ["--drafter", "model:"],
        "'model:'; give model:DIR, eagle:DIR, block:DIR, mtp:DIR, medusa:DIR, assistant:DIR, ngram",
    ),
    "unknown rule": (["--verify", "tree"], "invalid choice: 'tree'"),
    "no drafts": (["--num-draft", "0"], "num_draft must be an integer of at least 1, got 0"),
    "no new tokens": (["--max-new-tokens", "0"], "max_new_tokens is 0"),
    "too many new tokens": (["--max-new-tokens", "1000000000"], "the target has 256"),
    "negative temperature": (["--temperature", "-1"], "temperature is -1.0"),
    "temperature that is no number": (["--temperature", "nan"], "temperature is nan"),
    "top-k too small": (["--top-k", "-1"], "top_k is -1"),
    "top-k beyond int32": (["--top-k", "1099511627776"], "top_k is 1099511627776"),
    "top-p too large": (["--top-p", "1.5"], "top_p is 1.5"),
    "top-p zero": (["--top-p", "0"], "top_p is 0.0"),
    "min-p too large": (["--min-p", "2"], "min_p is 2.0"),
    "repetition penalty zero": (["--repetition-penalty", "0"], "repetition_penalty is 0.0"),
    "negative seed": (["--seed", "-1"], "seed is -1"),
    "seed too large": (["--seed", "4294967296"], "seed is 4294967296"),
    "nothing to compare": (["--drafter", "none", "--compare"], "--compare needs a drafter"),
    "output folder missing": (["--json", "{pair}/absent/out.json"], "cannot be written to: No such file"),
    "output folder is a file": (["--trace", "{pair}/binary/out.html"], "cannot be written to: Not a directory"),
    "output is a folder": (["--trace", "{pair}"], "is not a regular file"),
    "output is a device": (["--json", os.devnull], "is not a regular file"),
    "empty stop string": (["--stop", "x", "--stop", ""], "give a sequence of strings, none of them empty"),
    "stop string that is not text": (["--stop", "\udcff"], "not UTF-8"),
    "system message without chat": (["--system", "Be brief."], "--system is given without --chat"),
    "control tokens without chat": (["--sanitize-control-tokens"], "--sanitize-control-tokens is given without --chat"),
    "template without chat": (["--chat-template", "x"], "--chat-template is given without --chat"),
    "no such template": (["--chat", "--chat-template", "x", "--target", "{pair}/strict"], "chat_template is 'x'; "),
    "defaults that are none": (
        ["--generation-defaults", "--target", "{pair}/endless"],
        "generation_config.json: temperature is 'hot'; it must be a number",
    ),
    "target without template": (["--chat"], "target has neither chat_template.jinja nor a chat_template in"),
    "template that refuses": (["--chat", "--target", "{pair}/strict"], "refuses the messages: no"),
    "stop tokens that are none": (["--target", "{pair}/endless"], "eos_token_id"),
    "unknown argument": (["--speed", "9"], "unrecognized arguments: --speed 9"),
}


@pytest.fixture(scope="module")
def damaged(pair):
    (pair / "binary").write_bytes(b"\xff\xfe\x00")
    shutil.copytree(pair / "target", pair / "mute")
    (pair / "mute" / "tokenizer.json").unlink()
    for name, words, pre_tokenizer in (("words", {"a": 0}, None), ("foreign", {"\u4e16": 0}, Metaspace())):
        shutil.copytree(pair / "draft", pair / name)
        strange = Tokenizer(WordLevel(words, unk_token=next(iter(words))))
        if pre_tokenizer is not None:
            strange.pre_tokenizer = pre_tokenizer
        strange.save(str(pair / name / "tokenizer.json"))
    (pair / "empty").mkdir()
    shutil.copytree(pair / "target", pair / "strict")
    (pair / "strict" / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    shutil.copytree(pair / "target", pair / "endless")
    config = {"eos_token_id": [STOP], "temperature": "hot"}
    (pair / "endless" / "generation_config.json").write_text(json.dumps(config))
    shutil.copytree(pair / "target", pair / "truncated")
    for file in (pair / "truncated" / "params").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            os.truncate(file, file.stat().st_size // 2)
    return pair


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_one_line(script, damaged, capsys, case):
    argv, wanted = ERRORS[case]
    argv = [value.format(pair=damaged) for value in argv]
    for name, default in (("--target", damaged / "target"), ("--prompt", "x")):
        if not any(value.startswith(name) for value in argv):
            argv += [name, str(default)]
    with pytest.raises(SystemExit) as end:
        script.main(argv)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert wanted in err


def test_a_failed_write_leaves_what_was_there(script, tmp_path):
    file = tmp_path / "out.json"
    script.write_whole(file, "old")
    with pytest.raises(UnicodeEncodeError):
        script.write_whole(file, "new \udcff")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_command_line_ends_quietly_when_its_reader_leaves(pair):
    argv = [
        sys.executable,
        SCRIPTS / "generate.py",
        "--target",
        pair / "target",
        "--drafter",
        "none",
        "--prompt",
        "x\n",
    ]
    child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout.readline() == b"x\n"
    child.stdout.close()
    err = child.stderr.read()
    assert (child.wait(), err) == (-signal.SIGPIPE, b"")


@pytest.mark.parametrize(
    ("tree", "tree_rule", "verify", "wanted"),
    [
        (None, None, None, "block"),
        (None, None, "token", "token"),
        (8, None, None, "walk"),
        (8, "traversal", None, "traversal"),
        (None, "walk", None, "--tree-rule is walk and there is no --tree"),
        (8, None, "token", "--verify is token, a rule for chains"),
    ],
)
def test_trees_and_chains_have_rules_of_their_own(script, tree, tree_rule, verify, wanted):
    args = argparse.Namespace(tree=tree, tree_rule=tree_rule, verify=verify, siblings=None)
    if wanted.startswith("--"):
        with pytest.raises(ValueError, match=wanted):
            script.check_rule(args)
    else:
        script.check_rule(args)
        script.fill_rule(args, specjax.NGramDrafter(8, tree_depth=None if tree is None else 4))
        assert args.verify == wanted


def test_a_tree_needs_a_drafter_that_has_one(script, pair, capsys):
    for spec, message in (
        ("none", "--tree is 8 and --drafter is none"),
        ("early-exit:2", "tree is 8 and early-exit drafts chains"),
    ):
        with pytest.raises(SystemExit):
            script.main(["--target", str(pair / "target"), "--drafter", spec, "--tree", "8", "--prompt", "x"])
        assert message in capsys.readouterr().err
