"""What the compiled program is: one loop on the device that copies no cache, compiled once, in any precision.

The optimised HLO is read as text. XLA does not promise its form, so each reader of it here is first shown a program
that has what it looks for.
"""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import specjax
from specjax import ModelDrafter, NGramDrafter, Sampling, verify
from specjax.drafters.trees import drawn_tree
from specjax.engine import costs, programs
from specjax.engine.adapt import widths_of
from specjax.engine.request import lay_out
from specjax.testing import table_model
from specjax.transformer.config import DecoderConfig
from specjax.transformer.decoder import decoder_model, init_params
from specjax.types import whole_feed

DRAFTS, HEAD = 2, 8


def decoder(layers, kv_heads, seed, dtype="float32", scale=1):
    """A tiny decoder; ``scale`` multiplies its matrices."""
    config = DecoderConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=kv_heads,
        head_dim=HEAD,
    )
    params = init_params(config, jax.random.key(seed), jnp.dtype(dtype))
    return decoder_model(config, jax.tree.map(lambda x: x * jnp.asarray(scale if x.ndim == 2 else 1, x.dtype), params))


TARGET = decoder(2, 2, 0)
DRAFTER = ModelDrafter(decoder(1, 1, 1), DRAFTS)


def arguments(rows, slots, target=TARGET, drafter=DRAFTER, width=5, sampling=Sampling(), fixed=True):
    """Returns the positional and the static arguments of the jitted ``generate``."""
    prompt_bt = np.ones((rows, width), np.int32)
    prompt_bs, request, static = lay_out(target, drafter, prompt_bt, None, sampling, 8, (), slots, fixed=fixed)
    static |= {"classes": programs.classes_key(target, drafter), "verify": verify.default_rule(drafter)}
    return (target, prompt_bs, request, drafter), static


# Reading HLO.


def computations(hlo):
    """Returns the lines of each computation by its name, and the name of the entry."""
    lines, entry, name = {}, None, None
    for line in hlo.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            name = head[2]
            lines[name] = []
            entry = name if head[1] else entry
        elif name and line.startswith(" "):
            lines[name].append(line.strip())
    return lines, entry


def reachable(lines, root):
    """Returns the names of ``root`` and of all computations it calls, directly or not."""
    seen, waiting = set(), [root]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            # Names in attributes: calls=, body=, condition=, to_apply=, branch_computations={..}.
            waiting += [word for line in lines[name] for word in re.findall(r"[\w.-]+", line) if word in lines]
    return seen


def outer_loops(hlo):
    """Returns, for each ``while`` of the entry computation, all the lines that its body runs."""
    lines, entry = computations(hlo)
    bodies = [re.search(r"body=%?([\w.-]+)", line)[1] for line in lines[entry] if " while(" in line]
    return [[line for name in reachable(lines, body) for line in lines[name]] for body in bodies]


def copies(lines, slots):
    """Returns the shapes of the copies ``[.., slots, h]`` among the lines."""
    found = [re.search(r"= \(?(\w+\[[\d,]+\])\S*(?: .*\))? copy(?:-start)?\(", line) for line in lines]
    return [match[1] for match in found if match and re.search(rf"\b{slots},{HEAD}\]$", match[1])]


def talks_to_host(lines):
    """Returns the lines that call back to Python or exchange data with the host in another way."""
    return [line for line in lines if re.search(r"callback| (infeed|outfeed|send|recv)(-done)?\(", line)]


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile().as_text()


def test_a_copy_in_a_loop_is_found():
    def swap(a, b):
        return lax.fori_loop(0, 9, lambda i, ab: (ab[1].at[0, i % HEAD].set(jnp.tanh(ab[0]).sum()), ab[0]), (a, b))

    cache = jnp.zeros((4096, HEAD))  # large, since newer XLA moves small loops out of the entry
    (body,) = outer_loops(compiled(swap, cache, cache + 1))
    assert copies(body, 4096)
    assert not copies(body, 128)


def test_a_callback_in_a_loop_is_found():
    def chatty(x):
        return lax.while_loop(lambda x: x < 9, lambda x: jax.pure_callback(np.cos, x, x) + x, x)

    (body,) = outer_loops(compiled(chatty, jnp.float32(0)))
    assert talks_to_host(body)


# The compiled generate.


@pytest.fixture(scope="module", params=[(1, 128), (3, 128), (1, 1024), (3, 1024)], ids=lambda p: f"{p[0]} x {p[1]}")
def program(request):
    """The optimised HLO of ``generate`` for some rows and slots: with one attention window, and with several."""
    rows, slots = request.param
    args, static = arguments(rows, slots)
    return programs.generate_program.lower(*args, **static).compile().as_text(), slots


def test_generate_is_one_loop(program):
    hlo, _ = program
    loops = outer_loops(hlo)
    print(f"{sum(' while(' in line for line in loops[0])} loops inside of the round")
    assert len(loops) == 1
    assert "dot(" in " ".join(loops[0])


def test_generate_does_not_talk_to_the_host(program):
    hlo, _ = program
    assert not talks_to_host(hlo.splitlines())


def test_a_round_copies_no_cache(program):
    hlo, slots = program
    (body,) = outer_loops(hlo)
    assert copies(body, slots) == []


TREE = ModelDrafter(DRAFTER.model, 6, tree=drawn_tree(6, DRAFTS, "distinct"), siblings="distinct")


@pytest.mark.parametrize("drafter", [DRAFTER, NGramDrafter(DRAFTS), TREE], ids=["model", "n-gram", "tree"])
def test_rounds_of_all_widths_copy_no_cache(drafter):
    """The program that adapts has a loop for each width in its loop."""
    args, static = arguments(1, 1024, drafter=drafter, fixed=False)
    hlo = programs.generate_program.lower(*args, **static).compile().as_text()
    (body,) = outer_loops(hlo)
    assert copies(body, 1024) == [] and not talks_to_host(hlo.splitlines())
    assert sum(" while(" in line for line in body) >= len(widths_of(drafter))


def test_stream_copies_no_cache():
    """Of its donated state, neither on the way into the loop nor in it."""
    slots = 1024
    args, static = arguments(1, slots)
    rounds = {name: static.pop(name) for name in ("classes", "verify")}
    state = jax.eval_shape(lambda: programs.prefill_program(*args, classes=rounds["classes"], **static))
    hlo = (
        programs.rounds_program.lower(TARGET, state, DRAFTER, jnp.int32(1), blocks=False, **rounds).compile().as_text()
    )
    assert len(outer_loops(hlo)) == 1
    assert copies(hlo.splitlines(), slots) == []


# Compiled once.


@contextlib.contextmanager
def compilations():
    """Collects the names of all functions that are compiled, or fetched from the disk instead, meanwhile."""
    names = []

    def listen(event, seconds, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(about.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


TABLE = table_model(np.random.default_rng(0).normal(size=(5, 5)))
TABLE_DRAFTER = ModelDrafter(table_model(np.random.default_rng(1).normal(size=(5, 5))), DRAFTS)


def ask(prompts, sampling=Sampling(), max_new_tokens=10, stop_tokens=()):
    prompt, length = specjax.pad_prompts(prompts)
    settings = {"drafter": TABLE_DRAFTER, "fixed": True, "sampling": sampling, "stop_tokens": stop_tokens}
    out = specjax.generate(TABLE, prompt, length, max_new_tokens=max_new_tokens, **settings)
    return jax.block_until_ready(out)


@pytest.mark.parametrize(
    "changed",
    [
        {"prompts": [[4, 4, 4, 4, 4, 4, 4, 4, 4], [0]]},
        {"sampling": Sampling(temperature=0.3, seed=12345)},
        {"sampling": Sampling(temperature=0.0)},
        {"sampling": Sampling(top_k=2, top_p=0.5, min_p=0.1)},
        {"max_new_tokens": np.array([3, 7])},
        {"stop_tokens": (2,)},
        {"stop_tokens": (1, 2, 3)},
        {"stop_tokens": [[1, 2, 3], [4, -1, -1]]},
        {"max_new_tokens": 37},
    ],
    ids=[
        "prompt",
        "temperature",
        "greedy",
        "filters",
        "limits",
        "stop token",
        "stop tokens",
        "stop tokens of rows",
        "tokens",
    ],
)
def test_a_like_request_compiles_nothing(changed):
    first = {"prompts": [[1, 2, 3], [4, 4]]}
    ask(**first)
    with compilations() as names:
        ask(**first | changed)
    assert names == []


AHEAD = ModelDrafter(TABLE_DRAFTER.model, 3)  # a number of drafts that no other test has
PROMPTS = [[1, 2, 3, 4, 0] * 3, [4, 4]]


def ask_drafted(rounds=None, **changed):
    """Runs ``generate``, or ``stream`` with so many rounds."""
    settings = {"drafter": AHEAD, "max_new_tokens": 60, "stop_tokens": (2, 3), **changed}
    if rounds is None:
        return jax.block_until_ready(specjax.generate(TABLE, PROMPTS, **settings))
    return list(specjax.stream(TABLE, PROMPTS, rounds=rounds, **settings))


@pytest.mark.parametrize("meshed", [False, True], ids=["", "mesh"])
@pytest.mark.parametrize("rounds", [None, 1])
def test_what_is_compiled_ahead_is_all_that_a_request_needs(rounds, meshed, monkeypatch):
    """The costs of rounds are measured ahead, too."""
    sizes = {"rows": 2, "prompt_tokens": 9, "max_new_tokens": 64, "rounds": rounds}
    with jax.set_mesh(specjax.make_mesh(data=1)) if meshed else contextlib.nullcontext():
        with compilations() as names:
            specjax.compile(TABLE, drafter=AHEAD, **sizes)
        assert any("generate" in str(name) or "rounds" in str(name) for name in names)
        monkeypatch.setattr(costs, "_seconds", None)
        with compilations() as names:
            ask_drafted(rounds)
            ask_drafted(rounds, sampling=Sampling(temperature=[0.0, 0.7], top_k=3, seed=[8, 9]), max_new_tokens=[3, 9])
    assert names == []


@pytest.mark.parametrize("size", ["rows", "prompt_tokens"])
def test_sizes_to_compile_for_are_checked(size):
    with pytest.raises(ValueError, match=f"{size} is 0; give an integer of at least 1"):
        specjax.compile(TABLE, **{"rows": 1, "prompt_tokens": 1, "max_new_tokens": 1, size: 0})


def test_penalties_compile_once():
    """None counts nothing. Numbers and arrays of any of the three penalties share one program."""
    ask([[1, 2, 3], [4, 4]])
    with compilations() as names:
        ask([[1, 2, 3], [4, 4]], Sampling(repetition_penalty=1.0))
    assert sum("generate" in str(name) for name in names) == 1
    jax.block_until_ready(Sampling(presence_penalty=np.array([0.1, 0])).per_row(2))
    with compilations() as names:
        ask([[1, 2, 3], [4, 4]], Sampling(repetition_penalty=1.2, frequency_penalty=0.1))
        ask([[1, 2, 3], [4, 4]], Sampling(presence_penalty=np.array([0.1, 0])))
    assert names == []


@pytest.mark.parametrize("sampling, counted", [(Sampling(), False), (Sampling(frequency_penalty=0.0), True)])
def test_without_penalties_nothing_is_counted(sampling, counted):
    """Counts are scatters over the vocabulary. A program without penalties has no scatter."""
    args, static = arguments(2, 128, sampling=sampling)
    hlo = programs.generate_program.lower(*args, **static).as_text()
    assert ("stablehlo.scatter" in hlo) == counted


def test_a_larger_request_compiles():
    ask([[1]])
    with compilations() as names:
        ask([[1]], max_new_tokens=200)
    assert len(names) == 1 and "generate" in str(names[0])


def test_another_model_of_the_architecture_compiles_nothing():
    args, static = arguments(1, 128)
    other = decoder(2, 2, 5), *args[1:3], DRAFTER.replace(model=decoder(1, 1, 6))
    programs.generate_program(*args, **static)
    with compilations() as names:
        programs.generate_program(*other, **static)
    assert names == []


def test_the_loop_transfers_nothing():
    args, static = arguments(1, 128)
    on_device = jax.device_put(args)
    on_host = (args[0], np.asarray(args[1]), *args[2:])
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(programs.generate_program(*on_device, **static))
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            programs.generate_program(*on_host, **static)


# Half precision.


def test_bfloat16_differs_from_plain_decoding_only_at_near_ties():
    """A pass of g+1 tokens rounds otherwise than g+1 passes of one, so near-ties may fall the other way."""
    target = decoder(2, 2, 0, "bfloat16", scale=20)
    rows, new = 8, 40
    prompt_bt = np.random.default_rng(0).integers(0, 37, (rows, 5))
    settings = {"sampling": Sampling(temperature=0), "max_new_tokens": new}
    plain = specjax.generate(target, prompt_bt, **settings)
    drafted = specjax.generate(target, prompt_bt, drafter=NGramDrafter(DRAFTS, min_n=1), fixed=True, **settings)
    assert plain.tokens.shape == drafted.tokens.shape
    cache = target.init_cache(*plain.tokens.shape)
    whole_pass = jax.jit(target.forward)(target.params, whole_feed(plain.tokens), cache)
    assert drafted.stats.accepted.sum() > 0
    for i in range(rows):
        differs = np.flatnonzero(np.asarray(plain.tokens[i] != drafted.tokens[i]))
        if differs.size:
            logits_v = np.sort(whole_pass.logits_btv[i, differs[0] - 1])
            margin, size = logits_v[-1] - logits_v[-2], np.abs(logits_v).max()
            print(f"row {i} differs from token {differs[0]} on: margin {margin:.4f}, largest logit {size:.2f}")
            assert margin <= 4 * 2.0**-8 * size  # four units in the last place of bfloat16
