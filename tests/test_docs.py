"""Code in the pages for users runs as it stands, in a folder of tiny models by the names of the shipped ones."""

import contextlib
import io
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from adapted_texts import assert_texts_and_law, moved
from flax import nnx

import specjax
from specjax import training
from specjax.engine.costs import assumed
from specjax.hf.config import decoder_config
from specjax.transformer.decoder import init_params

ROOT = Path(__file__).parent.parent
TEXT = "".join(f"def f{i}(x):\n    return x + {i}\n\n\n" for i in range(40))
SIZES = {
    "vocab_size": 262,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": 256,
}
RECIPE = """head = "mtp"
drafts_for = "py-14m"
chain_steps = 1
[architecture]
{sizes}
[[stages]]
loss = "kl"
steps = 3
rows = 2
sequence = 16
peak_learning_rate = 1e-2
warmup_steps = 1
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what the pages name, which is the current one; dtypes and ranks promote as they do for users."""
    tokenizer = training.train_tokenizer([TEXT], SIZES["vocab_size"])
    raw = {"model_type": "llama", **SIZES, "vocab_size": tokenizer.get_vocab_size()}
    for seed, name in enumerate(("py-14m", "py-14m-draft")):
        specjax.save(
            tmp_path / "checkpoints" / name, raw, init_params(decoder_config(raw), jax.random.key(seed)), tokenizer, {}
        )
    (tmp_path / "models" / "py-14m-mtp").mkdir(parents=True)
    sizes = "\n".join(f"{name} = {raw[name]}" for name in SIZES)
    (tmp_path / "models" / "py-14m-mtp" / "recipe.toml").write_text(RECIPE.format(sizes=sizes))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def run(page, before=None):
    """Runs a page's blocks of Python one after the other, those before a heading; returns their names and what they
    print."""
    names, out = {"__name__": page}, io.StringIO()
    text = (ROOT / page).read_text(encoding="utf-8").split(f"\n{before}\n")[0]
    with contextlib.redirect_stdout(out):
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(compile(block, page, "exec"), names)
    return names, out.getvalue()


def test_the_readme_generates(place, monkeypatch):
    """Both prompts are printed with their text, and the figure after them is that of drafts which were made."""
    # Of models this small a pass over several tokens may cost so much that no draft could pay.
    monkeypatch.setattr(specjax.engine.measuring, "measured", lambda key, lasting, widths, *_: assumed(widths))
    names, out = run("README.md")
    assert out.count("\n---") == 2 and all(prompt in out for prompt in names["prompts"])
    stats = names["generation"].stats
    assert stats.drafted.min() > 0 and out.endswith(f"{stats.emitted / stats.rounds}\n")


def test_the_extensions_work(place):
    """The page's drafter and the head that it trains have the same greedy text; its model runs."""
    names, _ = run("docs/extending.md")
    assert names["generation"].stats.emitted.tolist() == [64, 64]
    assert len(names["losses"]) == 3 and np.isfinite(names["losses"]).all()
    target, ids = names["target"], names["tokenizer"].encode(TEXT[:40]).ids
    head = specjax.load_drafter("mtp:checkpoints/py-14m-docs", target, 1)
    texts = []
    for drafter in (names["BigramDrafter"](), head):
        sampling = specjax.Sampling(temperature=0.0)
        drafted = specjax.generate(
            target, np.asarray([ids]), drafter=drafter, fixed=True, sampling=sampling, max_new_tokens=24
        )
        assert drafted.stats.drafted[0] > 0
        texts.append(drafted.tokens.tolist())
    assert texts[0] == texts[1]


def test_rollouts_train_a_policy(place, monkeypatch):
    """The page's completions are the policy's, and its updates move policy and draft."""
    monkeypatch.setattr(specjax.engine.measuring, "measured", lambda key, lasting, widths, *_: assumed(widths))
    names, out = run("docs/rollouts.md")
    assert out.startswith("8 completions") and out.count("reward") == 3
    assert names["rollout"].completions(32).mask.sum() == names["rollout"].stats.emitted.sum()
    before = specjax.open("checkpoints/py-14m").model.params, names["drafter"]
    for old, new in zip(before, (names["policy"].params, names["draft"].drafter), strict=True):
        moved = [np.abs(x - y).max() for x, y in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)]
        assert np.isfinite(moved).all() and max(moved) > 1e-5


def test_your_model_works(place):
    """Another module has the functions of the first. Sections of packages are run by tests of these packages."""
    names, _ = run("docs/your_model.md", before="## Models of packages")
    assert names["generation"].stats.emitted.tolist() == [16, 16]
    target = specjax.adapt(names["model"], names["empty_cache"], max_positions=1024)
    assert target.forward is specjax.adapt(names["Decoder"](nnx.Rngs(3)), names["empty_cache"]).forward
    sections = re.findall(r"^### (.*)$", (ROOT / "docs/your_model.md").read_text(encoding="utf-8"), re.MULTILINE)
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_adapt_*.py"))
    assert sections and all(f'run_section("{section}")' in tests for section in sections)


def test_the_decoder_of_your_model_has_the_text_and_the_law_of_one_pass(place):
    names, _ = run("docs/your_model.md", before="## Three ways")
    model, empty_cache = names["model"], names["empty_cache"]
    nnx.update(model, jax.tree.map(moved, nnx.state(model)))
    second = names["Decoder"](nnx.Rngs(0))
    nnx.update(second, jax.tree.map(lambda x: 0.9 * x, nnx.state(model)))

    @nnx.jit
    def logits_of(tokens):
        (rows, places), place = tokens.shape, np.arange(tokens.shape[1])
        seen = np.broadcast_to(place[:, None] >= place, (rows, places, places))
        return model(tokens, np.broadcast_to(place, tokens.shape), empty_cache(rows, places), seen)[0]

    target, second = (specjax.adapt(each, empty_cache, max_positions=1024) for each in (model, second))
    assert_texts_and_law(target, second, logits_of)


@pytest.mark.parametrize("page", sorted(["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]))
def test_commands_name_scripts_and_options_that_there_are(page):
    """A script's options are those of the command that it runs."""
    sources = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "specjax" / "commands").glob("*.py")}
    runs = {
        path.name: re.findall(r'run\("([\w-]+)"\)', path.read_text(encoding="utf-8"))[0]
        for path in (ROOT / "scripts").glob("*.py")
    }
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", "")
    commands = re.findall(r"python scripts/(\w+\.py)((?: [^`|#\n]*)?)", text)
    commands += re.findall(r"(?<![\w./-])specjax (\w[\w-]*)((?: [^`|#\n]*--[^`|#\n]*)?)`", text)
    for script, arguments in commands:
        command = runs[script] if script.endswith(".py") else script
        assert command in runs.values()
        shared = {"hosts": "add_mesh_options", "compilation_cache": "compilation_cache.add_options"}
        shared |= {"drafter_spec": "add_tree(", "console": "add_dtype("}
        command = command.replace("-", "_")
        known = sources[command] + "".join(sources[name] for name, adds in shared.items() if adds in sources[command])
        for option in re.findall(r"(?<= )--[a-z][a-z-]*", arguments):
            assert f'"{option}"' in known, (script, option)


def test_the_table_of_families_is_that_of_the_tests():
    pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5.24")
    import families_table

    page = families_table.PAGE.read_text(encoding="utf-8")
    assert families_table.START in page and page == families_table.replaced(page)
