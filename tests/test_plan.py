"""scripts/plan.py and its arithmetic, against figures worked out by hand."""

import dataclasses
import importlib
import itertools
import math
import sys
from pathlib import Path

import pytest

from specjax.hf.config import read_config
from specjax.transformer import DecoderConfig

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "specjax" / "planning" / "configs"
LLAMA_8B, LLAMA_70B, DEEPSEEK = "llama-3.1-8b", "llama-3.3-70b", "deepseek-v3"
PARAMS = {LLAMA_8B: 8_030_261_248, LLAMA_70B: 70_553_706_496, "llama-3.2-1b": 1_235_814_400, DEEPSEEK: 671_026_419_200}


@pytest.fixture(scope="module")
def plan():
    return importlib.import_module("specjax.commands.plan")


@pytest.fixture(scope="module")
def roofline():
    return importlib.import_module("specjax.planning")


@pytest.fixture(scope="module")
def model(roofline):
    return lambda name, **dtypes: roofline.Model(read_config(CONFIGS / f"{name}.json")[0], **dtypes)


@pytest.fixture(scope="module")
def hardware():
    return importlib.import_module("specjax.planning.hardware")


# Parameters and cache.


def llama_params(v, d, f, layers, heads, kv_heads, h, tied=False):
    """Embedding and head, the last norm; per layer q and o, k and v, the three of the MLP, two norms."""
    layer = 2 * d * heads * h + 2 * d * kv_heads * h + 3 * d * f + 2 * d
    return v * d * (1 if tied else 2) + d + layers * layer


@pytest.mark.parametrize("name", PARAMS)
def test_parameters_are_those_published(roofline, model, name):
    """8.03, 70.6 and 671 billion, as the models' cards say."""
    assert roofline.num_params(model(name).config) == PARAMS[name]


def test_parameters_of_llamas_by_hand(roofline, model):
    assert PARAMS[LLAMA_8B] == llama_params(128256, 4096, 14336, 32, 32, 8, 128)
    assert PARAMS[LLAMA_70B] == llama_params(128256, 8192, 28672, 80, 64, 8, 128)
    assert PARAMS["llama-3.2-1b"] == llama_params(128256, 2048, 8192, 16, 32, 8, 64, tied=True)


def test_one_device_holds_all(roofline, model):
    assert roofline.weights(model(LLAMA_8B)).held == 2 * PARAMS[LLAMA_8B]
    assert roofline.weights(model(LLAMA_8B, weights="float32")).held == 4 * PARAMS[LLAMA_8B]
    biases = 58 * 256  # for the choice of experts, float32 always
    assert roofline.weights(model(DEEPSEEK)).held == 2 * PARAMS[DEEPSEEK] + 2 * biases
    assert roofline.weights(model(DEEPSEEK, weights="float8")).held == PARAMS[DEEPSEEK] + 3 * biases


def test_a_mesh_splits_all_but_norms(roofline, model):
    norms = 65 * 4096
    share = roofline.weights(model(LLAMA_8B), roofline.Mesh(data=2, tensor=4))
    assert share.held == 2 * ((PARAMS[LLAMA_8B] - norms) / 4 + norms)
    copied = 32 * 2 * 4096 * 1024  # k and v: 8 heads do not divide by 16
    share = roofline.weights(model(LLAMA_8B), roofline.Mesh(tensor=16))
    assert share.held == 2 * ((PARAMS[LLAMA_8B] - norms - copied) / 16 + norms + copied)


def test_a_mesh_splits_experts_over_both_axes(roofline, model):
    experts = 58 * 256 * 3 * 7168 * 2048
    one, share = (roofline.weights(model(DEEPSEEK), mesh) for mesh in (roofline.Mesh(), roofline.Mesh(1, 8, 4)))
    assert (one.experts, share.experts) == (2 * experts, 2 * experts / 32)
    # Of the rest, the latents' projections, routers and norms are on each device.
    copied = 61 * (7168 * 1536 + 7168 * 576 + 1536 + 512 + 2 * 7168) + 58 * 7168 * 256 + 7168
    split = PARAMS[DEEPSEEK] - experts - copied - 58 * 256
    assert share.held == pytest.approx(2 * (experts / 32 + copied + split / 8) + 4 * 58 * 256, rel=1e-12)


def test_cache_per_token(roofline, model):
    assert roofline.token_bytes(model(LLAMA_8B)) == 131072
    assert roofline.token_bytes(model(LLAMA_70B)) == 2 * 80 * 8 * 128 * 2
    assert roofline.token_bytes(model(DEEPSEEK)) == (512 + 64) * 2 * 61
    assert roofline.token_bytes(model(LLAMA_8B, cache="float8"), roofline.Mesh(tensor=8)) == 131072 / 16
    for name, tensor in ((LLAMA_8B, 16), (DEEPSEEK, 8)):  # too few heads; one latent
        mesh = roofline.Mesh(tensor=tensor)
        assert roofline.token_bytes(model(name), mesh) == roofline.token_bytes(model(name))


def test_memory_by_hand(roofline, model):
    llama, one = model(LLAMA_8B), roofline.Mesh()
    setting = roofline.Setting(llama, one, 3, 1000, (0.5,) * 4, model("llama-3.2-1b"), one)
    memory = roofline.memory(setting, 4)
    assert memory.weights == 2 * PARAMS[LLAMA_8B]
    assert memory.cache == 3 * 1024 * 131072
    assert memory.draft == 2 * PARAMS["llama-3.2-1b"] + 3 * 1024 * 16 * 2 * 8 * 64 * 2
    assert memory.logits == 3 * (5 + 5 + 4) * 128256 * 4
    longer = dataclasses.replace(setting, context=1020)  # with 4 drafts and the token behind them 1025 slots
    assert roofline.memory(longer, 4).cache == 3 * 2048 * 131072


# Passes.


@pytest.mark.parametrize("num_experts, per_token, tokens", [(3, 1, 2), (4, 2, 1), (4, 2, 3), (5, 5, 2)])
def test_touched_experts_by_enumeration(roofline, num_experts, per_token, tokens):
    choices = list(itertools.combinations(range(num_experts), per_token))
    visited = [len(set().union(*chosen)) for chosen in itertools.product(choices, repeat=tokens)]
    expected = sum(visited) / len(visited)
    assert roofline.touched_experts(num_experts, per_token, tokens) == pytest.approx(expected, rel=1e-12)


def test_a_dense_pass_by_hand(roofline, model):
    work = roofline.forward(model(LLAMA_8B), roofline.Mesh(), 2, 5, 995)
    multiplied = PARAMS[LLAMA_8B] - 128256 * 4096  # the embedding is looked up
    assert work.read == 2 * multiplied + 2 * 1000 * 131072
    assert work.flops == 2 * 10 * multiplied + 10 * 32 * (2 * 32 * 2 * 128 * 1000)
    assert (work.messages, work.collectives, work.sent) == ((), 0, 0)


def test_a_tied_embedding_is_read_as_the_head(roofline, model):
    work = roofline.forward(model("llama-3.2-1b"), roofline.Mesh(), 1, 1, 9)
    assert work.read == 2 * PARAMS["llama-3.2-1b"] + 10 * 16 * 2 * 8 * 64 * 2


def test_sliding_windows_bound_what_is_read(roofline, model):
    llama = model(LLAMA_8B)
    layers = tuple(dataclasses.replace(x, window=64 if i % 2 else None) for i, x in enumerate(llama.config.each_layer))
    windowed = roofline.Model(dataclasses.replace(llama.config, layers=layers))
    full, half = (roofline.forward(m, roofline.Mesh(), 1, 1, 999) for m in (llama, windowed))
    assert full.read - half.read == 16 * (1000 - 64) * 4096
    assert full.flops - half.flops == 16 * (1000 - 64) * 4 * 32 * 128


def test_chunks_are_read_from_their_start(roofline, model):
    """With chunks of 64, a pass of 2 tokens after 130 sees the slots 128 to 131."""
    llama = model("llama-3.2-1b")
    layers = tuple(dataclasses.replace(x, chunk=64) for x in llama.config.each_layer)
    chunked = roofline.Model(dataclasses.replace(llama.config, layers=layers))
    passes = [roofline.forward(chunked, roofline.Mesh(), 1, 2, context) for context in (130, 2, 64 * 9 + 2)]
    whole = roofline.forward(llama, roofline.Mesh(), 1, 2, 2)
    assert passes == [whole] * 3


def test_a_pass_over_experts_by_hand(roofline, model):
    """Twelve tokens visit 256 (1 - (31/32)^12) of 256 experts; each multiplies with 8."""
    work = roofline.forward(model(DEEPSEEK), roofline.Mesh(), 4, 3, 997)
    experts, embedding = 58 * 256 * 3 * 7168 * 2048, 129280 * 7168
    rest = PARAMS[DEEPSEEK] - experts - embedding
    visited = 1 - (31 / 32) ** 12
    read = 2 * experts * visited + 2 * rest + 2 * 58 * 256 + 4 * 1000 * 576 * 2 * 61
    assert work.read == pytest.approx(read, rel=1e-12)
    attention = 61 * 2 * 128 * (512 + 64 + 512) * 1000
    assert work.flops == pytest.approx(12 * (2 * (experts / 32 + rest) + attention), rel=1e-12)


def test_collectives_of_a_dense_pass(roofline, model):
    """The embedding, and each layer's attention and MLP."""
    work = roofline.forward(model(LLAMA_8B), roofline.Mesh(data=2, tensor=4), 2, 5, 100)
    assert work.collectives == 1 + 2 * 32
    assert work.sent == 2 * 3 / 4 * 65 * 10 * 4096 * 2
    assert roofline.forward(model(LLAMA_8B), roofline.Mesh(data=8), 2, 5, 100).messages == ()


def test_collectives_of_a_pass_over_experts(roofline, model):
    """The embedding, 61 attentions, 3 dense MLPs, 58 shared experts; over both axes 58 mixtures."""
    deepseek, size = model(DEEPSEEK), 7168 * 2
    work = roofline.forward(deepseek, roofline.Mesh(tensor=8, expert=4), 1, 1, 100)
    assert work.messages == ((1 + 61 + 3 + 58, 8, size), (58, 32, size))
    work = roofline.forward(deepseek, roofline.Mesh(expert=4), 1, 1, 100)
    assert work.messages == ((58, 4, size),)
    work = roofline.forward(model(DEEPSEEK, weights="float32"), roofline.Mesh(expert=4), 1, 1, 100)
    assert work.messages == ((58, 4, 2 * size),)


@pytest.mark.parametrize("sampling, warp", [("greedy", 2), ("temperature", 2), ("filters", 2 + 2 + 10 + 10)])
def test_collectives_of_choosing_tokens_are_the_loops_budget(roofline, sampling, warp):
    """docs/distributed.md, which tests/on_eight_devices.py holds the loop to: 2 for a draw, 3 for verification."""
    mesh = roofline.Mesh(data=2, tensor=4)
    assert roofline.choosing(mesh, 6, 1, sampling) == ((warp, 4, 4 * 6), (2, 4, 4 * 6))
    assert roofline.choosing(mesh, 6, 3, sampling, verify=3) == ((warp + 3, 4, 4 * 18), (2, 4, 4 * 6))
    assert roofline.choosing(roofline.Mesh(data=2, expert=4), 6, 3, sampling) == ()


def test_time_of_an_all_reduce_by_hand(roofline, hardware):
    def took(name, devices):
        return roofline.all_reduce_seconds(hardware.HARDWARE[name], devices, 1e6)

    assert took("h100", 1) == 0
    assert took("h100", 8) == pytest.approx(1.75e6 / 450e9 + 10e-6)
    assert took("h100", 32) == pytest.approx(2 * 31 / 32 * 1e6 / 400e9 + 25e-6)  # over four machines
    assert took("v5e", 2) == pytest.approx(1e6 / 50e9 + 2e-6)  # one axis, there and back
    assert took("v5e", 16) == pytest.approx(2 * 15 / 16 * 1e6 / 100e9 + 12e-6)  # 4 x 4: three hops an axis and way
    assert took("v5p", 8) == pytest.approx(1.75e6 / 300e9 + 6e-6)  # 2 x 2 x 2
    with pytest.raises(ValueError, match="512 devices leaves the 256 that are joined"):
        took("v5e", 512)


def test_a_pass_takes_the_longer_of_reading_and_computing(roofline, hardware):
    flops = {"bfloat16": 100.0, "float8": 200.0}
    device = hardware.Hardware(bandwidth=10.0, flops=flops, link=1.0, latency=0.5, island=2)
    work = roofline.Pass(read=30.0, flops=500.0, messages=(roofline.Messages(3, 2, 1.0),))
    collectives = 3 * (1.0 + 0.5)
    assert roofline.seconds(work, device, "bfloat16") == (3.0, 5.0, collectives, 5.0 + collectives)
    assert roofline.seconds(work, device, "float8") == (3.0, 2.5, collectives, 3.0 + collectives)
    assert roofline.seconds(work, device, "int8").arithmetic == 5.0  # not named: multiplied in bfloat16
    taking_turns = dataclasses.replace(device, overlaps=False)
    assert roofline.seconds(work, taking_turns, "bfloat16").total == 8.0 + collectives


# Rounds.


def test_kept_drafts(roofline):
    assert roofline.kept([0.5, 0.5, 0.2]) == pytest.approx((0.5, 0.25, 0.05))
    assert roofline.kept([1.0, 0.0, 1.0]) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("acceptance, cost", [(0.8, 0.05), (0.6, 0.1), (0.9, 0.02), (0.5, 0.6), (0.0, 0.1), (1.0, 0.5)])
def test_best_number_of_drafts_where_only_weights_count(roofline, hardware, model, acceptance, cost):
    """Then a pass takes as long whatever its width, and theorem 3.8 of Leviathan et al. (2023) gives the speed-up."""
    device = hardware.Hardware(bandwidth=1e12, flops={"bfloat16": math.inf})
    small = model("llama-3.2-1b")
    config = dataclasses.replace(
        small.config, layers=tuple(dataclasses.replace(x, window=1) for x in small.config.layers)
    )
    setting = roofline.Setting(
        roofline.Model(config), roofline.Mesh(), 1, 100, roofline.kept([acceptance] * 12), cost, roofline.Mesh()
    )
    rounds = [roofline.plan_round(setting, device, g) for g in range(13)]
    gains = [sum(acceptance**i for i in range(g + 1)) / (1 + g * cost) for g in range(13)]
    speed_ups = [r.tokens_per_second / rounds[0].tokens_per_second for r in rounds]
    assert speed_ups == pytest.approx(gains, rel=1e-9)
    assert roofline.best(rounds).num_draft == max(range(13), key=lambda g: (round(gains[g], 9), -g))


def test_a_round_is_its_passes(roofline, hardware, model):
    device, mesh = hardware.HARDWARE["h100"], roofline.Mesh(tensor=4)
    target, draft = model(LLAMA_8B), model("llama-3.2-1b")
    setting = roofline.Setting(target, mesh, 8, 500, (0.9, 0.7, 0.4), draft, mesh)
    planned = roofline.plan_round(setting, device, 3)
    checked = roofline.choosing(mesh, 8, 4, "temperature", verify=3)
    drafted = roofline.choosing(mesh, 8, 1, "temperature")
    work = [
        roofline.forward(target, mesh, 8, 4, 500, checked),
        *(roofline.forward(draft, mesh, 8, width, 500, drafted) for width in (2, 1, 1)),
    ]
    times = [roofline.seconds(each, device, "bfloat16").total for each in work]
    assert planned.emitted == pytest.approx(3.0)
    assert planned.seconds == pytest.approx(sum(times)) and planned.drafting == pytest.approx(sum(times[1:]))
    assert planned.tokens_per_second == pytest.approx(8 * 3.0 / sum(times))
    assert planned.collectives == 1 + 2 * 32 + 2 + 3 + 2 + 3 * (1 + 2 * 16 + 2 + 2)
    assert (planned.read, planned.sent) == (sum(w.read for w in work), sum(w.sent for w in work))
    copied = roofline.plan_round(dataclasses.replace(setting, draft_mesh=roofline.Mesh()), device, 3)
    assert copied.collectives == 1 + 2 * 32 + 2 + 3 + 2 + 3 * (2 + 2)
    plain = roofline.plan_round(setting, device, 0)
    assert (plain.emitted, plain.drafting, plain.collectives) == (1.0, 0.0, 1 + 2 * 32 + 2 + 1 + 2)
    greedy = roofline.plan_round(dataclasses.replace(setting, sampling="greedy"), device, 3)
    assert planned.collectives == greedy.collectives


def test_rows_are_split_over_data(roofline, hardware, model):
    device, target = hardware.HARDWARE["h100"], model(LLAMA_8B)
    one = roofline.Setting(target, roofline.Mesh(), 4, 500, (0.8,), 0.1, roofline.Mesh())
    three = dataclasses.replace(one, mesh=roofline.Mesh(data=3), batch=12)
    rounds = [roofline.plan_round(setting, device, 1) for setting in (one, three)]
    assert rounds[1].seconds == rounds[0].seconds
    assert rounds[1].tokens_per_second == pytest.approx(3 * rounds[0].tokens_per_second)


# The script.

COMMON = [LLAMA_8B, "--draft", "llama-3.2-1b", "--acceptance", "0.8"]


def rows_of(text):
    """Returns the printed tables, each as a list of dicts."""
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    tables = [[line.strip("| ").split(" | ") for line in block.splitlines()] for block in tables]
    return [[dict(zip(table[0], row, strict=True)) for row in table[2:]] for table in tables]


def test_one_device_gives_a_table_over_g(plan, capsys):
    assert plan.main([*COMMON, "--hardware", "h100", "--max-draft", "5"]) == 0
    out = capsys.readouterr().out
    ((held,), rounds) = rows_of(out)
    assert held["weights, GB"] == "16.1"
    assert [row["g"] for row in rounds] == list("012345")
    # (16.06 - 1.05 + 4001 x 131072 / 1e9) GB at 3.35 TB/s; 1 / (1 - 0.8) is where the emitted tokens go.
    assert (rounds[0]["read, ms"], rounds[0]["tokens/s"], rounds[0]["speed-up"]) == ("4.64", "216", "1.00")
    assert [row["emitted"] for row in rounds] == ["1.00", "1.80", "2.44", "2.95", "3.36", "3.69"]
    fastest = max(rounds, key=lambda row: float(row["speed-up"]))
    assert out.endswith(f"best: g = {fastest['g']}, {fastest['tokens/s']} tokens/s\n")


def test_several_devices_give_a_line_each(plan, capsys):
    names = ["h100", "v5e", "v5p", "v6e"]
    assert plan.main([*COMMON, "--hardware", *names, "--mesh", "data=2,tensor=4", "--batch", "8"]) == 0
    _, lines = rows_of(capsys.readouterr().out)
    assert [line["hardware"] for line in lines] == names
    assert all(int(line["all-reduces"]) == 65 + 7 + 4 * int(line["g"]) for line in lines)


def test_filters_over_a_split_vocabulary_cost_all_reduces(plan, capsys):
    rounds = []
    for sampling in ("temperature", "filters"):
        assert plan.main([*COMMON, "--hardware", "h100", "--mesh", "tensor=4", "--sampling", sampling]) == 0
        rounds.append(rows_of(capsys.readouterr().out)[1])
    more = [int(dear["all-reduces"]) - int(cheap["all-reduces"]) for cheap, dear in zip(*rounds, strict=True)]
    assert more == [22 * (g + 1) for g in range(9)]


def test_shares_by_position_are_those_that_bench_prints(plan, capsys):
    shares = ["0.89", "0.80", "0.65", "0.60"]
    folder = ROOT / "checkpoints"
    arguments = [str(folder / "py-14m"), "--draft", str(folder / "py-14m-draft"), "--by-position", *shares]
    figures = ["--device-figures", "bandwidth=17.7e9, flops=88e9", "--no-overlap", "--context", "160"]
    assert plan.main([*arguments, *figures, "--weights", "float32", "--cache", "float32"]) == 0
    _, rounds = rows_of(capsys.readouterr().out)
    assert [row["emitted"] for row in rounds] == ["1.00", "1.89", "2.69", "3.34", "3.94"]
    plain = rounds[0]  # 14.2 million parameters, 4 bytes each
    assert (plain["GB read"], plain["read, ms"], plain["compute, ms"]) == ("0.058", "3.28", "0.344")
    assert float(plain["round, ms"]) == pytest.approx(3.28 + 0.344, abs=0.01)


def test_figures_replace_those_of_the_hardware(plan, capsys):
    assert plan.main([*COMMON, "--hardware", "h100", "--device-figures", "bandwidth=1.675e12"]) == 0
    assert rows_of(capsys.readouterr().out)[1][0]["read, ms"] == "9.27"


def test_plot(plan, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / "plan.png"
    assert plan.main([*COMMON, "--hardware", "h100", "v5p", "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    assert plan.main([*COMMON, "--hardware", "h100", "--plot", str(tmp_path / "no" / "plan.png")]) == 2
    assert plan.main([*COMMON, "--hardware", "h100", "--plot", str(tmp_path / "plan.xyz")]) == 2
    assert sorted(tmp_path.iterdir()) == [file]


def test_without_matplotlib_there_is_no_plot_but_a_table(plan, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plan.main([*COMMON, "--hardware", "h100", "--plot", str(tmp_path / "plan.png")]) == 0
    out = capsys.readouterr().out
    assert "matplotlib is not installed" in out and len(rows_of(out)) == 2
    assert not list(tmp_path.iterdir())


H100 = ["--hardware", "h100"]
MIXTURE = [DEEPSEEK, "--draft", "0.03", "--acceptance", "0.8"]
BAD = {
    "no device": (COMMON, "no device; give --hardware"),
    "half a device": ([*COMMON, "--device-figures", "bandwidth=1e12"], "with bandwidth and flops at least"),
    "unknown hardware": ([*COMMON, "--hardware", "h100", "h101"], "'h101'; choose from h100, v5e, v5p, v6e"),
    "unknown figure": ([*COMMON, *H100, "--device-figures", "speed=1"], "'speed=1'"),
    "figure below zero": ([*COMMON, *H100, "--device-figures", "flops=-1"], "give a number from 1e-12 to 1e+30"),
    "figure that is none": ([*COMMON, *H100, "--device-figures", "flops=fast"], "give a number from 1e-12 to 1e+30"),
    "figure twice": ([*COMMON, *H100, "--device-figures", "flops=1,flops=2"], "once at most"),
    "unknown axis": ([*COMMON, *H100, "--mesh", "pipeline=2"], "give each of data, tensor, expert once at most"),
    "no number": ([*COMMON, *H100, "--mesh", "tensor"], "give a number from 1e-12 to 1e+30"),
    "half a device on an axis": ([*COMMON, *H100, "--mesh", "tensor=1.5"], "give a whole number"),
    "heads": ([*COMMON, *H100, "--mesh", "tensor=3"], "tensor=3 does not divide num_attention_heads 32"),
    "rows": ([*COMMON, *H100, "--mesh", "data=2", "--batch", "3"], "data=2 does not divide --batch 3"),
    "no experts": ([*COMMON, *H100, "--mesh", "expert=2"], "the model has no experts"),
    "experts": ([*MIXTURE, *H100, "--mesh", "expert=3"], "expert=3 does not divide the 256 experts"),
    "no links": (
        [*COMMON, "--device-figures", "bandwidth=1e12,flops=1e12", "--mesh", "tensor=2"],
        "give link=BYTES_PER_SECOND",
    ),
    "beyond a pod": (
        [*MIXTURE, "--hardware", "v6e", "--mesh", "tensor=16,expert=32"],
        "512 devices leaves the 256 that are joined",
    ),
    "does not fit": ([*COMMON, "--hardware", "v5e"], "needs 19.2 GB"),
    "experts do not fit": ([*MIXTURE, "--hardware", "v5e"], "tensor=32,expert=4 would do"),
    "rows do not fit": (
        [*MIXTURE, *H100, "--batch", "4096"],
        "lower --batch, --context or --weights, or split the rows",
    ),
    "above one": ([LLAMA_8B, "--draft", "0", "--acceptance", "1.1", *H100], "1.1; give shares of 1, from 0 to 1"),
    "below zero": ([LLAMA_8B, "--draft", "0", "--by-position", "-0.1", *H100], "-0.1; give shares"),
    "no share": ([LLAMA_8B, "--draft", "0", "--acceptance", "nan", *H100], "nan; give shares"),
    "cost below zero": ([LLAMA_8B, "--draft", "-1", "--acceptance", "0.5", *H100], "--draft is -1"),
    "unknown model": (
        ["llama-9", "--draft", "0", "--acceptance", "0.5", *H100],
        "'llama-9' is no path, nor one of deep",
    ),
    "unknown draft": ([LLAMA_8B, "--draft", "llama-9", "--acceptance", "0.5", *H100], "'llama-9' is no path"),
    "folder without config": ([str(ROOT), "--draft", "0", "--acceptance", "0.5", *H100], "config.json does not exist"),
    "no rows": ([*COMMON, *H100, "--batch", "0"], "--batch is 0; give 1 to"),
    "no context": ([*COMMON, *H100, "--context", "-5"], "--context is -5"),
    "too long": ([*COMMON, *H100, "--context", "131073"], "--context is 131073; the model serves 131072"),
    "too many drafts": ([*COMMON, *H100, "--max-draft", "101"], "--max-draft is 101; give 1 to 100"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line(plan, capsys, arguments, message):
    assert plan.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("plan.py: error: ") and message in err and err.count("\n") == 1


def test_a_draft_that_the_mesh_does_not_divide_is_copied_unless_it_is_to_be_split(plan, capsys):
    draft = str(ROOT / "checkpoints" / "py-14m-draft")  # five heads
    arguments = [LLAMA_8B, "--draft", draft, "--acceptance", "0.5", *H100, "--mesh", "tensor=4", "--context", "100"]
    assert plan.main(arguments) == 0
    assert plan.main([*arguments, "--shard-draft"]) == 2
    assert "tensor=4 does not divide num_attention_heads 5; choose a divisor, or leave out" in capsys.readouterr().err


def test_the_mesh_that_would_do_does(plan, capsys):
    arguments = [LLAMA_70B, "--draft", "llama-3.2-1b", "--acceptance", "0.8", *H100]
    assert plan.main(arguments) == 2
    err = capsys.readouterr().err
    assert "needs 145.1 GB (weights 141.1, cache 1.3, draft 2.6" in err and "has 72.0" in err
    assert err.endswith(": tensor=4 would do\n")
    assert plan.main([*arguments, "--mesh", "tensor=4"]) == 0
    assert plan.main([*arguments, "--mesh", "tensor=2"]) == 2


def test_joint_norms_sum_squares_over_tensor(roofline):
    """Two all-reduces a layer, of a float32 for each token: one for queries, one for keys."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    plain = DecoderConfig(**sizes, query_key_norm="heads")
    joint = dataclasses.replace(plain, query_key_norm="joint")
    one, other = (
        roofline.forward(roofline.Model(config), roofline.Mesh(tensor=2), 1, 5, 10) for config in (plain, joint)
    )
    assert other.collectives - one.collectives == 2 * 3
    assert other.sent - one.sent == 2 * (2 - 1) / 2 * 4 * 5 * 6
