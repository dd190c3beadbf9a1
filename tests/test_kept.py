"""Programs that a later process loads without tracing them; here the same process, which is made to forget."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tiny import CONFIG

import specjax
from specjax import ModelDrafter
from specjax.engine import kept, programs
from specjax.engine.request import lay_out
from specjax.hf.config import decoder_config
from specjax.transformer.decoder import decoder_model, init_params


def model(seed=0, **changes):
    config = decoder_config(CONFIG | changes)
    return decoder_model(config, jax.tree.map(lambda x: 5 * x, init_params(config, jax.random.key(seed))))


TARGET, DRAFTER = model(), ModelDrafter(model(1), 2)


@pytest.fixture
def folder(tmp_path):
    """An empty folder, and JAX's own switched off."""
    use_jax_folder(False)
    kept.keep_programs(tmp_path / "programs")
    yield tmp_path / "programs"
    kept.keep_programs(None)
    use_jax_folder(True)


def use_jax_folder(use):
    jax.config.update("jax_enable_compilation_cache", use)
    compilation_cache.reset_cache()


def names(folder):
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def times_of():
    """A kept function, which multiplies, and the list of the traces that were made of it."""
    traces = []

    @kept.Kept
    @functools.partial(jax.jit, static_argnames=("classes", "by"))
    def times(x, *, classes, by):
        traces.append(by)
        return {"product": jnp.sin(x) * by, "shape": None}

    return traces, functools.partial(times, classes=0)


X = np.arange(3, dtype=np.float32)


def test_a_later_process_does_not_trace(folder):
    plain = times_of()[1](X, by=3)
    traces, times = times_of()
    again = times(X, by=3)
    assert again["product"].tolist() == plain["product"].tolist() and again["shape"] is None
    assert traces == [] and len(names(folder)) == 1
    times(2 * X, by=3)
    times(X, by=4)
    times(X[:2], by=3)
    assert traces == [4, 3] and len(names(folder)) == 3, "another constant, and another shape"


def test_without_a_folder_and_in_the_callers_jit_it_is_the_jitted_function(folder):
    _, times = times_of()
    inside = jax.jit(lambda x: times(x, by=3)["product"])(X)
    with jax.set_mesh(specjax.make_mesh(data=1)):
        times(X, by=3)
    assert names(folder) == set()
    kept.keep_programs(None)
    assert times(X, by=3)["product"].tolist() == inside.tolist()
    assert names(folder) == set()


@pytest.mark.parametrize("what", ["source", "processor", "XLA_FLAGS", "SPECJAX_ATTENTION"])
def test_programs_are_of_one_source_processor_and_setting(folder, tmp_path, monkeypatch, what):
    times_of()[1](X, by=3)
    if what == "source":
        (tmp_path / "part.py").write_text("x = 1")
        monkeypatch.setattr(kept, "ROOT", tmp_path)
    elif what == "processor":
        monkeypatch.setattr(kept, "processor", lambda: ("another",))
    else:
        monkeypatch.setenv(what, "--another")
    kept.environment.cache_clear()
    traces, times = times_of()
    times(X, by=3)
    assert traces == [3] and len(names(folder)) == 2
    monkeypatch.undo()
    kept.environment.cache_clear()


def test_programs_are_of_one_precision(folder):
    """A setting that a caller may change for a while, where ``jit`` traces anew."""
    traces, times = times_of()
    for precision in ("highest", "default", "highest"):
        with jax.default_matmul_precision(precision):
            times(X, by=3)
    assert traces == [3, 3] and len(names(folder)) == 2


def test_broken_files_are_written_anew(folder):
    times_of()[1](X, by=3)
    (path,) = folder.iterdir()
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    traces, times = times_of()
    times(X, by=3)
    assert traces == [3] and path.stat().st_size == size


def test_what_jax_has_kept_is_not_kept_again(folder, tmp_path):
    """XLA for CPUs would write a copy that lacks functions."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    use_jax_folder(True)
    try:
        times_of()[1](X, by=3)
        (path,) = folder.iterdir()
        path.unlink()
        times = times_of()[1]
        assert times(X, by=3)["product"].tolist() == times_of()[1](X, by=3)["product"].tolist()
        assert names(folder) == set()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_folder_that_cannot_be_written_to_is_no_error(folder):
    folder.write_text("a file")
    assert times_of()[1](X, by=3)["product"].shape == (3,)


def test_old_programs_make_room(folder, monkeypatch):
    _, times = times_of()
    times(X, by=3)
    times(X, by=4)
    sizes = [path.stat().st_size for path in folder.iterdir()]
    monkeypatch.setattr(kept, "BOUND", sum(sizes) + 10)
    first = names(folder)
    times(X, by=5)
    assert len(names(folder)) == 2 and len(names(folder) - first) == 1
    assert not [name for name in names(folder) if "." in name], "no half-written file stays"


def key(target=TARGET, drafter=DRAFTER, new=20, prompt=(1, 2), verify=specjax.verify.block, costs=None, **options):
    prompt_bs, request, static = lay_out(
        target, drafter, [prompt], None, specjax.Sampling(**options.pop("sampling", {})), new, (), None, False, 0,
        options.get("fixed", False), costs,
    )  # fmt: skip
    args = target, prompt_bs, request, drafter
    return programs.generate_program.key(args, static | {"classes": id(target), "verify": verify})


OTHERS = {
    "a constant of the target": lambda: key(model(rope_theta=777.0)),
    "a constant of the draft": lambda: key(drafter=ModelDrafter(model(1, rms_norm_eps=1e-3), 2)),
    "another drafter": lambda: key(drafter=specjax.NGramDrafter(2)),
    "more drafts": lambda: key(drafter=ModelDrafter(model(1), 3)),
    "the rule": lambda: key(verify=specjax.verify.token),
    "fixed": lambda: key(fixed=True),
    "longer": lambda: key(new=150),
    "penalties": lambda: key(sampling={"repetition_penalty": 1.1}),
    "quantised": lambda: key(specjax.quantize(TARGET, "int8")),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_what_changes_a_program_changes_its_name(other):
    assert key() != other()


def test_what_changes_no_program_changes_no_name():
    assert key() == key(model(5), ModelDrafter(model(6), 2), 21, (3,), costs=(1, 2, 3), sampling={"temperature": 0.0})


def test_functions_that_no_text_tells_have_no_name():
    """The source of another package may change without a change of the name."""
    with pytest.raises(kept.UntoldError):
        key(TARGET.replace(forward=lambda *args: TARGET.forward(*args)))
    for value in (object(), np.zeros(2), pytest.MonkeyPatch):
        with pytest.raises(kept.UntoldError):
            kept._text(value)


def test_functions_differ_by_what_they_close_over():
    def closed(**changes):
        return decoder_model(decoder_config(CONFIG | changes), TARGET.params).forward

    assert kept._text(closed()) == kept._text(closed())
    assert kept._text(closed()) != kept._text(closed(rope_theta=5.0))
    assert kept._text(functools.partial(closed(), capture=(1,))) != kept._text(functools.partial(closed()))


def test_texts_are_the_same(folder):
    options = {"sampling": specjax.Sampling(1.0, seed=3), "max_new_tokens": 20, "costs": (1, 1.1, 1.2)}
    texts = []
    for place in (None, folder, folder):
        for function in (programs.prefill_program, programs.rounds_program):
            function._programs.clear()
        kept.keep_programs(place)
        *_, last = specjax.stream(TARGET, [[1, 2]], drafter=DRAFTER, **options)
        texts.append(last.tokens.tolist())
        assert place is None or [len(x._programs) for x in (programs.prefill_program, programs.rounds_program)] == [
            1,
            1,
        ]
    assert texts[0] == texts[1] == texts[2] and len(names(folder)) == 2
