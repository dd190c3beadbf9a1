"""scripts/generate.py, run in this process on a tiny random pair: figures, text, trace page, errors."""

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

import specjax
from specjax import checkpoint
from specjax.training.data import train_tokenizer
from specjax.transformer.config import DecoderConfig
from specjax.transformer.decoder import init_params

SCRIPTS = Path(__file__).parent.parent / "scripts"
PROMPTS = ("def f(x):", "# naïve\n<b> & \t'日本'", "x")
STOP = "<|endoftext|>"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("generate")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A target whose next token is uncertain, its draft, which is the target with noise, and a draft of other size."""
    folder = tmp_path_factory.mktemp("pair")
    for name, vocab_size in (("target", 262), ("other", 270)):
        tokenizer = train_tokenizer(["def f(x):\n    return x\n"] * 3, vocab_size)
        config = DecoderConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=256,
            tie_word_embeddings=True,
        )
        params = init_params(config, jax.random.key(0))
        params["embed_tokens"]["weight"] *= 10.0
        checkpoint.save(folder / name, config, params, tokenizer, {})
        if name == "target":
            noisy = jax.tree.map(lambda x: x * (1 + 0.5 * jax.random.normal(jax.random.key(1), x.shape)), params)
            checkpoint.save(folder / "draft", config, noisy, tokenizer, {})
    return folder


def run(script, *argv):
    """Returns what the command wrote to standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        script.main([str(value) for value in argv])
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
    target, tokenizer = specjax.load(pair / "target"), specjax.load_tokenizer(pair / "target")
    ids = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    stop = tokenizer.token_to_id(STOP)
    expected = specjax.generate(
        target,
        *specjax.pad_prompts(ids),
        drafter=specjax.load_drafter(pair / "draft", target, num_draft=2),
        sampling=specjax.Sampling(seed=5),
        max_new_tokens=60,
        stop_tokens=(stop,),
    )
    assert [prompt["prompt"] for prompt in result["prompts"]] == list(PROMPTS)
    for row, prompt in enumerate(result["prompts"]):
        text = np.asarray(expected.tokens_bs[row, len(ids[row]) : expected.length_b[row]]).tolist()
        assert prompt["tokens"] == text
        assert prompt["text"] == tokenizer.decode(text)
        for name in ("rounds", "drafted", "accepted", "emitted"):
            assert prompt[name] == getattr(expected.stats, f"{name}_b")[row], name
        assert prompt["accepted_at"] == expected.stats.accepted_at_bg[row].tolist()
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
    stop = specjax.load_tokenizer(pair / "target").token_to_id(STOP)
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
    token, one_round = script.Token, script.Round
    trace = script.Trace("</pre>&amp;\r\n", [one_round(0, 0, [token("<i>\n", "target")])])
    page = Page(script.render([trace], {"target": '"<x>"'}, {"tokens": "1"}))
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


def streamed(script, tokenizer, prompt, new):
    """Returns what standard output gains with each of the tokens."""
    transcript = script.Transcript(tokenizer, prompt, len(new))
    out = io.StringIO()
    gains = []
    with contextlib.redirect_stdout(out):
        printer = script.Printer([transcript])
        for count in range(1, len(new) + 1):
            before = len(out.getvalue())
            transcript.add(generation(transcript.prompt_ids, new[:count], len(new)), 0)
            printer.update()
            gains.append(out.getvalue()[before:])
    return out.getvalue(), gains


def test_streaming_never_splits_a_character(script, pair):
    tokenizer = specjax.load_tokenizer(pair / "target")
    text = "é日本🙂!"
    new = tokenizer.encode(text).ids
    assert len(new) == len(text.encode())  # a token for each byte
    out, gains = streamed(script, tokenizer, "# ", new)
    assert out == "# " + text + "\n"
    assert gains == ["", "é", "", "", "日", "", "", "本", "", "", "", "🙂", "!\n"]


def test_streaming_shows_broken_bytes_once_they_are_known_to_be_broken(script, pair):
    tokenizer = specjax.load_tokenizer(pair / "target")
    lead, middle = tokenizer.encode("日").ids[:2]
    letter = tokenizer.encode("!").ids[0]
    out, gains = streamed(script, tokenizer, "# ", [lead, letter, lead, middle])
    assert gains == ["", "\ufffd!", "", "\ufffd\n"]
    assert out == "# \ufffd!\ufffd\n"


def test_broken_bytes_before_the_stop_token_are_part_of_the_text(script, pair):
    tokenizer = specjax.load_tokenizer(pair / "target")
    lead, stop = tokenizer.encode("日").ids[0], tokenizer.token_to_id(STOP)
    out, gains = streamed(script, tokenizer, "# ", [lead, stop])
    assert gains == ["", "\ufffd\n"]
    assert out == "# \ufffd\n"


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
    assert texts[0] == texts[1] == texts[2]


def test_no_arguments_continue_the_built_in_prompt_with_the_shipped_pair(script, pair, tmp_path, monkeypatch, no_stdin):
    compile(script.PROMPT + " pass", "the built-in prompt", "exec")  # the opening of something that is Python
    monkeypatch.setattr(script, "SHIPPED", pair / "target")
    monkeypatch.setattr(script, "SHIPPED_DRAFT", pair / "draft")
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
    "draft of another vocabulary": (["--drafter", "model:{pair}/other"], "vocabulary of 270 tokens"),
    "draft of another tokenizer": (["--drafter", "model:{pair}/foreign"], "other tokenizers"),
    "missing draft": (["--drafter", "model:{pair}/absent"], "absent is not a folder"),
    "unknown drafter": (["--drafter", "eagle"], "'eagle'; give model:DIR, ngram or none"),
    "drafter without folder": (["--drafter", "model:"], "'model:'; give model:DIR, ngram or none"),
    "unknown rule": (["--verify", "tree"], "invalid choice: 'tree'"),
    "no drafts": (["--num-draft", "0"], "num_draft is 0"),
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
    "unknown argument": (["--speed", "9"], "unrecognized arguments: --speed 9"),
}


@pytest.fixture(scope="module")
def damaged(pair):
    (pair / "binary").write_bytes(b"\xff\xfe\x00")
    shutil.copytree(pair / "target", pair / "mute")
    (pair / "mute" / "tokenizer.json").unlink()
    shutil.copytree(pair / "draft", pair / "foreign")
    train_tokenizer(["while true; do echo foreign; done\n"] * 3, 262).save(str(pair / "foreign" / "tokenizer.json"))
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
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    child = subprocess.Popen(
        argv, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout.readline() == b"x\n"
    child.stdout.close()
    err = child.stderr.read()
    assert (child.wait(), err) == (-signal.SIGPIPE, b"")
