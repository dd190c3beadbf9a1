"""Compilation ahead of time: the readers of compiled text, and the promises of the compiled programs.

Readers are tested on short texts. Programs are compiled in processes of their own, for a TPU if libtpu is installed and
for an H100 if jax's CUDA plugin is; nothing needs a device.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from specjax.aot import cost, hlo, promises, rounds, thunks
from specjax.aot.programs import (
    SAMPLING,
    SMALL,
    Setting,
    draft_config,
    eagle_head,
    held_bytes,
    ideal_bytes,
    make_drafter,
    model,
)
from specjax.aot.report import check_memory
from specjax.aot.topology import TOPOLOGIES
from specjax.aot.values import Frame
from specjax.commands import aot, aot_table
from specjax.commands.aot_table import extrapolate
from specjax.commands.plan import open_config
from specjax.quantized import KINDS, quantize
from specjax.transformer.config import LayerConfig, plain_rope

ROOT = Path(__file__).parent.parent
needs_tpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu: pip install -e '.[aot]'")
needs_gpu = pytest.mark.skipif(
    not importlib.util.find_spec("jax_cuda13_plugin"), reason="jax's CUDA plugin: pip install -e '.[cuda]'"
)

# One round that writes a cache, halves 30 times if temperatures are above 0, and attends over a window of 16 or 64.
PROGRAM = """HloModule jit_generate_program, is_scheduled=true

%or.1 (a: pred[], b: pred[]) -> pred[] {
  %a = pred[] parameter(0)
  %b = pred[] parameter(1)
  ROOT %or = pred[] or(%a, %b)
}

%sampled.1 (temperature: f32[2]) -> pred[] {
  %temperature = f32[2]{0} parameter(0)
  %zero = f32[] constant(0)
  %zeros = f32[2]{0} broadcast(%zero), dimensions={}
  %above = pred[2]{0} compare(%temperature, %zeros), direction=GT
  %false = pred[] constant(false)
  ROOT %any = pred[] reduce(%above, %false), dimensions={0}, to_apply=%or.1
}

%write.1 (cache: bf16[2,4,64,8], new: bf16[2,4,3,8], at: s32[]) -> bf16[2,4,64,8] {
  %cache = bf16[2,4,64,8]{3,2,1,0} parameter(0)
  %new = bf16[2,4,3,8]{3,2,1,0} parameter(1)
  %at = s32[] parameter(2)
  ROOT %written = bf16[2,4,64,8]{3,2,1,0} dynamic-update-slice(%cache, %new, %at, %at, %at, %at)
}

%attend.1 (cache: bf16[2,4,64,8]) -> bf16[2,4,16,8] {
  %cache = bf16[2,4,64,8]{3,2,1,0} parameter(0)
  %part = bf16[2,4,16,8]{3,2,1,0} slice(%cache), slice={[0:2], [0:4], [0:16], [0:8]}
  ROOT %twice = bf16[2,4,16,8]{3,2,1,0} add(%part, %part)
}

%short (carry.1: (bf16[2,4,64,8])) -> bf16[2,4,16,8] {
  %carry.1 = (bf16[2,4,64,8]{3,2,1,0}) parameter(0)
  %cache.1 = bf16[2,4,64,8]{3,2,1,0} get-tuple-element(%carry.1), index=0
  ROOT %attended.1 = bf16[2,4,16,8]{3,2,1,0} fusion(%cache.1), kind=kLoop, calls=%attend.1
}

%long (carry.2: (bf16[2,4,64,8])) -> bf16[2,4,16,8] {
  %carry.2 = (bf16[2,4,64,8]{3,2,1,0}) parameter(0)
  %cache.2 = bf16[2,4,64,8]{3,2,1,0} get-tuple-element(%carry.2), index=0
  ROOT %attended.2 = bf16[2,4,16,8]{3,2,1,0} custom-call(%cache.2), custom_call_target="kernel"
}

%less (step.1: (s32[])) -> pred[] {
  %step.1 = (s32[]) parameter(0)
  %at.1 = s32[] get-tuple-element(%step.1), index=0
  %thirty = s32[] constant(30)
  ROOT %less.1 = pred[] compare(%at.1, %thirty), direction=LT
}

%halve (step.2: (s32[])) -> (s32[]) {
  %step.2 = (s32[]) parameter(0)
  %at.2 = s32[] get-tuple-element(%step.2), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%at.2, %one)
  %heavy = f32[8]{0} rng(%next), backend_config={"estimated_cycles":"100"}
  ROOT %stepped = (s32[]) tuple(%next)
}

%greedy (none.1: (s32[])) -> s32[] {
  %none.1 = (s32[]) parameter(0)
  ROOT %least = s32[] get-tuple-element(%none.1), index=0
}

%filtered (none.2: (s32[])) -> s32[] {
  %none.2 = (s32[]) parameter(0)
  %begin = s32[] get-tuple-element(%none.2), index=0
  %start = (s32[]) tuple(%begin)
  %halvings = (s32[]) while(%start), condition=%less, body=%halve
  ROOT %found = s32[] get-tuple-element(%halvings), index=0
}

%round (state: (bf16[2,4,64,8], f32[2], s32[2])) -> (bf16[2,4,64,8], f32[2], s32[2]) {
  %state = (bf16[2,4,64,8]{3,2,1,0}, f32[2]{0}, s32[2]{0}) parameter(0)
  %cache.3 = bf16[2,4,64,8]{3,2,1,0} get-tuple-element(%state), index=0
  %temperature.3 = f32[2]{0} get-tuple-element(%state), index=1
  %length.3 = s32[2]{0} get-tuple-element(%state), index=2
  %first = s32[] constant(0)
  %new.3 = bf16[2,4,3,8]{3,2,1,0} fusion(%length.3), kind=kLoop, calls=%make.1
  %wrote = bf16[2,4,64,8]{3,2,1,0} fusion(%cache.3, %new.3, %first), kind=kLoop, calls=%write.1
  %window = s32[] custom-call(%length.3), custom_call_target="unknowable"
  %given = (bf16[2,4,64,8]{3,2,1,0}) tuple(%wrote)
  %attended = bf16[2,4,16,8]{3,2,1,0} conditional(%window, %given, %given), branch_computations={%short, %long}
  %is_sampled = pred[] fusion(%temperature.3), kind=kLoop, calls=%sampled.1
  %nothing = (s32[]) tuple(%first)
  %drawn = s32[] conditional(%is_sampled, %nothing, %nothing), true_computation=%filtered, false_computation=%greedy
  ROOT %after = (bf16[2,4,64,8]{3,2,1,0}, f32[2]{0}, s32[2]{0}) tuple(%wrote, %temperature.3, %length.3)
}

%make.1 (length: s32[2]) -> bf16[2,4,3,8] {
  %length = s32[2]{0} parameter(0)
  ROOT %made = bf16[2,4,3,8]{3,2,1,0} custom-call(%length), custom_call_target="make"
}

%running (state.4: (bf16[2,4,64,8], f32[2], s32[2])) -> pred[] {
  %state.4 = (bf16[2,4,64,8]{3,2,1,0}, f32[2]{0}, s32[2]{0}) parameter(0)
  ROOT %unknown = pred[] custom-call(%state.4), custom_call_target="unknowable"
}

ENTRY %main (request_sampling_temperature: f32[2], length: s32[2]) -> (bf16[2,4,64,8], f32[2], s32[2]) {
  %request_sampling_temperature = f32[2]{0} parameter(0), metadata={op_name="request.sampling.temperature"}
  %length.5 = s32[2]{0} parameter(1), metadata={op_name="request.prompt_length_b"}
  %empty = bf16[] constant(0)
  %cache.5 = bf16[2,4,64,8]{3,2,1,0} broadcast(%empty), dimensions={}
  %copied = f32[2]{0} copy(%request_sampling_temperature)
  %begun = (bf16[2,4,64,8]{3,2,1,0}, f32[2]{0}, s32[2]{0}) tuple(%cache.5, %copied, %length.5)
  ROOT %rounds = (bf16[2,4,64,8]{3,2,1,0}, f32[2]{0}, s32[2]{0}) while(%begun), condition=%running, body=%round
}
"""
CACHES = rounds.Caches((("bf16", (2, 4, 64, 8)),))
WINDOWS = (16, 64)


def read(text=PROGRAM, temperature=0.0):
    """Returns the module, its entry and its loop over rounds."""
    module = hlo.parse(text)
    entry = Frame.entry(module, {"request.sampling.temperature": temperature})
    return module, entry, rounds.find_rounds(module, entry, CACHES)


def path(used=10):
    return rounds.TakenPath(WINDOWS, used, lambda i: sum(cost.moved(i)))


def runs(temperature, used=10, text=PROGRAM):
    """Returns how often a round runs each instruction, by name."""
    taken = path(used)
    found = {run.instruction.name: run.times for run in taken.runs(read(text, temperature)[2].frame)}
    assert taken.undecided == []
    return found


# Reading HLO.


def test_shapes_have_sizes_layouts_and_memories():
    (shape,) = hlo.shapes_in("bf16[2,5,64]{2,0,1:T(8,128)(2,1)S(1)}")
    assert (shape.dtype, shape.dims, shape.minor_to_major, shape.space) == ("bf16", (2, 5, 64), (2, 0, 1), 1)
    assert shape.bytes == 2 * 5 * 64 * 2 and shape.padded_bytes == 5 * 8 * 128 * 2
    assert [s.bytes for s in hlo.shapes_in("(pred[3]{0}, s4[3]{0}, f32[], f8e4m3fn[7]{0})")] == [3, 2, 4, 7]


def test_instructions_are_read_with_what_they_call():
    module = read()[0]
    drawn = module.computations["round"].instructions["drawn"]
    assert drawn.opcode == "conditional" and drawn.operands == ("is_sampled", "nothing", "nothing")
    assert [branch.name for branch in drawn.branches] == ["greedy", "filtered"]
    assert module.entry.root.opcode == "while" and module.entry.root.called("body")[0].name == "round"
    assert {i.name for i in module.entry.users["copied"]} == {"begun"}


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no line that starts with ENTRY"):
        hlo.parse("HloModule m\n")


# Values, branches and loops.


def test_a_request_decides_its_branches():
    assert read(temperature=0.0)[2].frame.branch(read()[0].computations["round"].instructions["drawn"]) in (0, 1)
    assert "least" in runs(0.0) and "heavy" not in runs(0.0)
    assert "least" not in runs(0.7)


def test_a_loop_runs_its_steps_whether_they_are_stated_or_counted():
    assert runs(0.7)["heavy"] == 30
    stated = PROGRAM.replace("body=%halve", 'body=%halve, backend_config={"known_trip_count":{"n":"12"}}')
    assert runs(0.7, text=stated)["heavy"] == 12


def test_tokens_in_use_decide_a_window_that_nothing_else_does():
    assert "attended.1" in runs(0.0, used=16) and "attended.2" in runs(0.0, used=17)


def test_a_branch_that_nothing_decides_is_the_dearest_and_is_reported():
    taken = rounds.TakenPath((1, 2, 3), 1, lambda i: sum(cost.moved(i)))
    names = {run.instruction.name for run in taken.runs(read()[2].frame)}
    assert taken.undecided == ["attended"] and "attended.2" in names  # the whole cache, not a slice


def test_a_branch_that_few_rounds_take_does_not_count():
    """What it runs says so: its names, of which XLA keeps more than of the conditional's own."""
    named = 'metadata={op_name="jit(keep)/seldom/cond/branch_0_fun/while"}'
    program = PROGRAM.replace("conditional(%is_sampled", "conditional(%unsaid").replace(
        "  %is_sampled = pred[] fusion(%temperature.3), kind=kLoop, calls=%sampled.1",
        '  %unsaid = pred[] custom-call(%length.3), custom_call_target="unknowable"',
    )
    seldom = program.replace("body=%halve\n", f"body=%halve, {named}\n")
    assert seldom != program and "heavy" not in runs(0.0, text=seldom)
    taken = rounds.TakenPath((1, 2, 3), 1, lambda i: len(i.name))
    names = {run.instruction.name for run in taken.runs(read(program)[2].frame)}
    assert "drawn" in taken.undecided and "heavy" in names


def test_rounds_in_blocks_are_found():
    body = PROGRAM[PROGRAM.index("%round (") :].split("}\n")[0] + "}\n"
    outer = body.replace("%round (", "%block (").split("\n")
    whole = "(bf16[2,4,64,8]{3,2,1,0}, f32[2]{0}, s32[2]{0})"
    trip = 'backend_config={"known_trip_count":{"n":"8"}}'
    loop = f"  ROOT %inner = {whole} while(%state), condition=%running, body=%round, {trip}"
    text = PROGRAM.replace("body=%round", "body=%block").replace(
        "ENTRY", "\n".join([*outer[:2], loop, "}", "", "ENTRY"])
    )
    found = read(text)[2]
    assert found.block == 8 and found.body.name == "round" and read()[2].block == 1


# Costs.


def moved(name, computation="round", text=PROGRAM):
    return cost.moved(read(text)[0].computations[computation].instructions[name])


def test_a_slice_reads_its_part_and_an_update_writes_its_part():
    part, new = 2 * 4 * 16 * 8 * 2, 2 * 4 * 3 * 8 * 2
    assert moved("attended.1", "short") == (part, part)
    assert moved("wrote") == (new + 4, new)
    assert moved("attended.2", "long") == (4 * part, part)


def test_an_asynchronous_start_moves_what_it_makes_and_not_its_operands():
    slow, fast = "bf16[2,4,64,8]{3,2,1,0}", "bf16[2,4,16,8]{3,2,1,0:S(1)}"
    start = f"%extra = (({slow}), {fast}, s32[]{{:S(2)}}) slice-start(%wrote), slice={{[0:2], [0:4], [0:16], [0:8]}}"
    assert moved("extra", text=in_round(start)) == (2 * 4 * 16 * 8 * 2, 0)
    back = f"%extra = ({slow}, {VMEM}, u32[]{{:S(2)}}) copy-start(%fast)"
    text = in_round(back).replace("  %extra", f'  %fast = {VMEM} custom-call(), custom_call_target="k"\n  %extra')
    assert moved("extra", text=text) == (0, 2 * 4 * 64 * 8 * 2)


def test_a_kernel_of_our_own_reads_the_share_in_use():
    call = read()[0].computations["long"].instructions["attended.2"]
    assert cost.moved(call, lambda shape: 0.25) == (2 * 4 * 16 * 8 * 2, 2 * 4 * 16 * 8 * 2)


def test_other_memories_cost_nothing():
    text = PROGRAM.replace(
        "ROOT %attended.2 = bf16[2,4,16,8]{3,2,1,0}", "ROOT %attended.2 = bf16[2,4,16,8]{3,2,1,0:T(8,128)S(1)}"
    )
    assert moved("attended.2", "long", text)[1] == 0


def test_kernels_and_cycles():
    heavy = read()[0].computations["halve"].instructions["heavy"]
    assert cost.cycles(heavy) == 100 and cost.is_kernel(heavy, gpu=False) and cost.is_kernel(heavy, gpu=True)
    assert not cost.is_kernel(read()[2].body.instructions["given"], gpu=True)


# Promises, each with a change to the program that breaks it and no other.


def check(text=PROGRAM, source="", devices=1, waits=0.0, limits=promises.Limits()):
    module, _, found = read(text)
    return promises.check(module, source, found, CACHES, 1, devices, waits, limits)


def broken(*args, **options):
    return [promise.name for promise in check(*args, **options) if not promise.holds]


def in_round(line):
    """The program with one more instruction in a round."""
    return PROGRAM.replace("  %window =", f"  {line}\n  %window =")


CACHE = "bf16[2,4,64,8]{3,2,1,0}"
VMEM = "bf16[2,4,64,8]{3,2,1,0:S(1)}"
BREAKS = {
    "one loop over rounds": PROGRAM.replace(
        "  ROOT %rounds", "  %other = (f32[2]{0}) while(%copied), condition=%running, body=%round\n  ROOT %rounds"
    ),
    "every cache is in the loop's carry": PROGRAM.replace(CACHE, "f32[2,4,64,8]{3,2,1,0}"),
    "no cache is padded": PROGRAM.replace(CACHE, "bf16[2,4,64,8]{3,2,1,0:T(8,128)}"),
    "no cache is copied or transposed in a round": in_round(f"%extra = {CACHE} copy(%wrote)"),
    "caches are written in place": in_round(f"%extra = {CACHE} select(%wrote, %wrote, %wrote)"),
    "loops in a round have a known length": PROGRAM.replace(
        "ROOT %less.1 = pred[] compare(%at.1, %thirty)", "ROOT %less.1 = pred[] custom-call(%at.1)"
    ),
    "a round does not talk to the host": in_round(
        '%extra = s32[] custom-call(%first), custom_call_target="xla_ffi_python_cpu_callback"'
    ),
    "no sort": in_round("%extra = f32[2,4096]{1,0} sort(%temperature.3), dimensions={1}"),
    "one device communicates with none": in_round("%extra = f32[2]{0} all-reduce(%temperature.3), to_apply=%or.1"),
}


def test_the_program_keeps_its_promises():
    assert broken() == [] and broken(devices=4) == []


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_promise_is_named(name):
    assert broken(BREAKS[name]) == [name]


def test_copies_within_a_memory_are_copies_and_between_memories_are_moves():
    copy = in_round(f"%extra = ({CACHE}, {CACHE}, u32[]) copy-start(%wrote)")
    assert broken(copy) == ["no cache is copied or transposed in a round"]
    moves = [f"%extra.{i} = ({VMEM}, {CACHE}, u32[]) copy-start(%wrote)" for i in range(3)]
    assert broken(in_round("\n  ".join(moves[:2]))) == []
    assert broken(in_round("\n  ".join(moves))) == ["at most 2 caches move between memories"]
    assert broken(in_round("\n  ".join(moves)), limits=promises.Limits(moves=None)) == []
    in_slices = f'%extra = {VMEM} custom-call(%wrote), custom_call_target="ConcatBitcast"'
    assert broken(in_round("\n  ".join([*moves[:2], in_slices]))) == ["at most 2 caches move between memories"]


def test_a_copy_inside_of_a_fusion_is_found():
    text = PROGRAM.replace("ROOT %twice", f"%inner = {CACHE} transpose(%cache), dimensions={{0,1,2,3}}\n  ROOT %twice")
    assert broken(text) == ["no cache is copied or transposed in a round"]


def test_writes_by_scatter_and_by_kernels_that_alias_are_in_place():
    scatter = "scatter(%cache, %at, %new), to_apply=%or.1"
    text = PROGRAM.replace("dynamic-update-slice(%cache, %new, %at, %at, %at, %at)", scatter)
    assert broken(text) == []
    kernel = f'%extra = {CACHE} custom-call(%wrote), custom_call_target="k"'
    assert broken(in_round(kernel)) == ["caches are written in place"]
    assert broken(in_round(kernel + ", output_to_operand_aliasing={{}: (0, {})}")) == []


def test_several_devices_only_reduce_and_gather():
    gather = in_round("%extra = f32[2]{0} all-gather(%temperature.3), dimensions={0}")
    assert broken(gather, devices=4) == []
    shuffle = gather.replace("all-gather(", "all-to-all(")
    assert broken(shuffle, devices=4) == ["devices only reduce and gather"]


def test_float64_is_found_before_xla_rewrites_it():
    source = "%1 = stablehlo.convert %0 : (tensor<2xf32>) -> tensor<2xf64>"
    assert broken(source=source) == ["nothing is in float64"]


def test_waits_are_held_to_their_limit():
    assert broken(waits=3, limits=promises.Limits(waits=3)) == []
    assert broken(waits=3, limits=promises.Limits(waits=2)) == ["the host waits at most 2 times a round"]


# Thunks.

THUNKS = """000: kCommandBuffer [source | next=1 (1)]
    001: kCustomKernel [source | sink] fusion grid: [1, 1, 1]
002: kWhile         [prev=000 (1) | sink]
condition:
    003: kCustomKernel [source | sink] fusion
  body:
    004: kCommandBuffer [source | next=9 (1)]
        005: kCustomKernel [source | sink] write
        006: kConditional  [prev=005 (1) | sink]
          branch_0:
            007: kCustomKernel [source | sink] attend
          branch_1:
            008: kCustomKernel [source | sink] attend
    009: kConditional   [prev=004 (1) | sink]
      false_branch:
        010: kWhile        [prev=165 (1) | next=172 (1)]
condition:
            011: kCustomKernel [source | sink] loop_compare_fusion
          body:
            012: kCustomKernel [source | sink] halve
      true_branch:
        No thunks.
"""


def waits(text=THUNKS, temperature=0.0, program=PROGRAM):
    _, entry, found = read(program, temperature)
    return thunks.host_waits(text, entry, found, path())


def test_the_host_waits_for_the_loop_and_for_conditionals_outside_of_command_buffers():
    assert waits() == waits(temperature=1.0) == 2


def test_only_the_branch_that_is_taken_waits():
    """A loop of unknown length waits; XLA calls the branch of a true condition "false_branch"."""
    unknown = BREAKS["loops in a round have a known length"]
    assert waits(program=unknown, temperature=0.0) == 2 and waits(program=unknown, temperature=1.0) == 3


def test_nobody_waits_in_a_command_buffer():
    inside = "\n".join(
        "    " + line if ":" in line and "condition" not in line else line for line in THUNKS.splitlines()
    )
    assert waits("000: kCommandBuffer [source | sink]\n" + inside) == 0


def test_thunks_of_another_program_are_refused():
    with pytest.raises(ValueError, match="give both of the same program"):
        waits(THUNKS.replace("006: kConditional", "006: kCustomKernel"))


# Settings and figures.


def test_drafters_are_made_from_the_target():
    draft = draft_config(open_config("llama-3.2-1b"))
    assert (draft.num_hidden_layers, draft.hidden_size, draft.vocab_size) == (4, 512, 128256)
    assert draft_config(SMALL).hidden_size == 128
    head = eagle_head(open_config("llama-3.1-8b"))
    assert (head.decoder.hidden_size, head.capture, head.draft_vocab_size) == (4096, (0, 16, 32), 32000)
    assert eagle_head(SMALL).draft_vocab_size is None
    # A draft head's layer is Llama's, whatever the target computes.
    gemma = dataclasses.replace(SMALL, layer_scale=True, value_norm=True, norm="rms_one_plus", norm_places="around")
    gemma = dataclasses.replace(gemma, residual_scale=0.5, layers=(LayerConfig(plain_rope(128), head_dim=128),) * 2)
    assert eagle_head(gemma) == eagle_head(SMALL)


def test_ideal_bytes_are_weights_and_what_is_used():
    target = open_config("llama-3.2-1b")
    setting = Setting(target, TOPOLOGIES["v5e:2x2"], "none")
    tokens = 512 * 16 * 2 * 8 * 64 * 2
    plain = ideal_bytes(setting)
    assert plain == pytest.approx(2471.6e6 + tokens, rel=1e-3)
    assert ideal_bytes(Setting(target, TOPOLOGIES["v5e:2x2"], "ngram")) == plain
    for drafter in ("model", "eagle"):
        extra = ideal_bytes(Setting(target, TOPOLOGIES["v5e:2x2"], drafter)) - plain
        again = ideal_bytes(Setting(target, TOPOLOGIES["v5e:2x2"], drafter, num_draft=8)) - plain
        assert 1.5 * extra < again <= 2 * extra


def test_a_tree_is_one_wider_pass_of_the_target_and_a_draft_pass_for_each_depth():
    for drafter in ("ngram", "model", "eagle"):
        chain = Setting(SMALL, TOPOLOGIES["v5e:2x2"], drafter)
        tree = dataclasses.replace(chain, tree=16)
        assert (chain.drafts, tree.drafts) == (4, 16)
        made = make_drafter(tree)
        assert (made.num_draft, made.tree_depth) == (16, 4)
        assert ideal_bytes(tree) == pytest.approx(ideal_bytes(chain), rel=0.01)
        assert ideal_bytes(dataclasses.replace(tree, tree=2)) < ideal_bytes(tree) or drafter == "ngram"


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights_are_counted_as_they_are_stored(kind):
    """Embeddings are tied, so a pass reads every parameter once."""
    target = dataclasses.replace(SMALL, tie_word_embeddings=True)
    setting = Setting(target, TOPOLOGIES["v5e:2x2"], "none", quantize=kind)
    bits = {"int4": 4, "bfloat16": 16, "float32": 32}
    leaves = jax.tree.leaves(quantize(model(target), kind).params)
    stored = sum(x.size * bits.get(str(x.dtype), 8) for x in leaves) / 8
    entries = setting.used * target.num_hidden_layers * 2 * target.kv_heads * target.head_width * 2
    assert ideal_bytes(setting) - entries == pytest.approx(stored, rel=0.01)


def test_a_request_names_its_values():
    for name, sampling in SAMPLING.items():
        known = Setting(SMALL, TOPOLOGIES["h100"], sampling=name).known
        assert known["request.sampling.temperature"] == sampling.temperature
        assert known["request.prompt_length_b"] == 512 and "request.sampling.seed" not in known


def test_a_model_that_is_too_large_is_refused_with_what_there_is():
    setting = Setting(open_config("llama-3.1-8b"), TOPOLOGIES["v5e:2x2"])
    with pytest.raises(ValueError, match=r"needs 16\.\d GB and a device of v5e:2x2 has 16 GB: set .*--tensor higher"):
        check_memory(setting, int(held_bytes(setting)), "all")
    check_memory(Setting(setting.target, setting.topology, tensor=4), int(held_bytes(setting)) // 4, "all")


def test_two_depths_give_any_depth():
    assert extrapolate(10, 14, (2, 4), 16) == 38 and extrapolate(10, 10, (16, 16), 16) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v9"], "--topology is 'v9'; choose from v5e:2x2, v6e:2x2, h100"),
        (["--tensor", "5"], "--tensor is 5; v5e:2x2 has 4 devices"),
        (["--topology", "h100", "--tensor", "2"], "h100 has 1 devices"),
        (["--target", "nowhere"], "--target is 'nowhere': no such file"),
        (["--rows", "0"], "--rows is 0; give 1 to"),
        (["--slots", "100"], "--slots is 100; give 389 to"),
        (["--used", "4000"], "--used is 4000; give"),
        (["--layers", "3"], "--layers is 3; give 1 to 2"),
        (["--tensor", "3"], "tensor=3 does not divide"),
        (["--rows", "1", "8"], "--rows has 2 numbers"),
        (["--table", "x", "--depths", "2", "2"], "--depths has [2, 2]; give one"),
        (["--table", "x", "--quantize", "int8"], "--quantize and --table are given"),
        (["--table", "x", "--tree", "8"], "--tree and --table are given"),
        (["--tree", "8", "--drafter", "none"], "--tree is 8 and there is no drafter"),
        (["--tree", "0"], "--tree is 0; give 1 to 256"),
        (["--target", "llama-3.3-70b"], "the model does not fit"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(aot, "prepare", lambda *_: None)
    monkeypatch.setattr("specjax.aot.topology.missing_compiler", lambda _: "")
    assert aot.main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_config_that_cannot_be_read_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("specjax.aot.topology.missing_compiler", lambda _: "")
    (tmp_path / "config.json").write_text("{")
    assert aot.main(["--target", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "config.json" in err and err.count("\n") == 1


def test_a_table_goes_on_where_it_was_cut_off(tmp_path, capsys, monkeypatch):
    """Lines that are there are not compiled again, and half a line is no line."""
    monkeypatch.setattr(aot, "prepare", lambda *_: None)
    monkeypatch.setattr("specjax.aot.topology.missing_compiler", lambda _: "")
    compiled = []
    program = type("Lowered", (), {"as_text": lambda self: "text"})()
    monkeypatch.setattr(aot_table, "lowered", lambda setting: program)
    monkeypatch.setattr(aot_table, "compile_program", lambda setting, source: compiled.append(setting))

    def report(setting, *_):
        figures = (
            "bytes",
            "ideal_bytes",
            "ideal_ms",
            "estimated_ms",
            "kernels",
            "host_waits",
            "cache_copies",
            "cache_moves",
        )
        made = dict.fromkeys(figures, 100 * setting.target.num_hidden_layers)
        names = {name: getattr(setting, name) for name in ("drafter", "rows", "sampling", "tensor")}
        where = {"topology": setting.topology.name, "layers": setting.target.num_hidden_layers}
        return names | where | made | {"collectives": {}, "promises": {"p": {"holds": True, "detail": ""}}}

    monkeypatch.setattr(aot_table, "report", report)
    file = tmp_path / "table.jsonl"
    options = ["--target", "llama-3.2-1b", "--table", str(file)]
    assert aot.main(options) == 0
    assert len(compiled) == 2 * 4  # two depths, four drafters; the samplings share a program
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 1 |")]
    assert len(rows) == 4 * 3 and all(row.split("|")[8].strip() == "1600" for row in rows)  # kernels, at 16 layers
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    compiled.clear()
    assert aot.main(options) == 0 and len(compiled) == 1
    assert aot.main(options) == 0 and len(compiled) == 1
    assert len(file.read_text().splitlines()) == len(lines)


@pytest.mark.parametrize(("topology", "extra"), [("v5e:2x2", "aot"), ("h100", "cuda")])
def test_a_missing_compiler_is_named_with_its_extra(topology, extra, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert aot.main(["--topology", topology]) == 2
    assert f"pip install -e '.[{extra}]'" in capsys.readouterr().err


# Programs.


def environment():
    """As users have it: the suite's own settings would turn optimisations off."""
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    return {name: value for name, value in kept.items() if not name.startswith("JAX_")} | {"PYTHONPATH": str(ROOT)}


def compiled(tmp_path, *arguments, status=0):
    """Returns the report of a run of the script, which must end with a status."""
    file = tmp_path / "report.json"
    command = [sys.executable, "scripts/aot.py", *arguments, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return json.loads(file.read_text())


KEYS = {"host_waits", "cache_copies", "estimated_ms", "ideal_ms", "bytes", "kernels", "collectives"}


@needs_tpu
def test_a_tpu_keeps_every_promise(tmp_path):
    made = compiled(tmp_path, "--rows", "2", "--sampling", "filters")
    assert made.keys() >= KEYS and all(of["holds"] for of in made["promises"].values())
    assert (made["host_waits"], made["cache_copies"], made["collectives"], made["undecided"]) == (0, 0, {}, [])
    assert made["estimated_ms"] > made["ideal_ms"] > 0 and made["memory_needed"] < made["memory_available"]


@needs_tpu
@pytest.mark.parametrize("drafter", ["eagle", "model"])
def test_a_tree_on_a_tpu_keeps_every_promise(drafter, tmp_path):
    made = compiled(tmp_path, "--rows", "2", "--drafter", drafter, "--tree", "8")
    assert (made["tree"], made["cache_copies"], made["undecided"]) == (8, 0, [])
    assert all(of["holds"] for of in made["promises"].values())


@needs_tpu
def test_four_tpus_keep_every_promise(tmp_path):
    made = compiled(tmp_path, "--topology", "v6e:2x2", "--tensor", "4", "--rows", "2", "--drafter", "eagle")
    assert made["collectives"].keys() == {"all-reduce"} and made["undecided"] == []


@pytest.fixture(scope="module")
def mutants():
    """The reports of a tiny program, whole and broken in one way at a time."""
    command = [sys.executable, "tests/aot_mutants.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


COPIED, IN_PLACE = "no cache is copied or transposed in a round", "caches are written in place"
MUTANTS = {
    "none": set(),
    "writes_by_vmap": {"no cache is padded", COPIED},
    "writes_by_select": {COPIED, IN_PLACE},
    "reverses_the_cache": {COPIED, IN_PLACE},
    "carries_one_array_for_two": {"every cache is in the loop's carry", IN_PLACE},
    "loops_twice": {"one loop over rounds"},
    "sorts": {"no sort"},
    "computes_in_float64": {"nothing is in float64"},
    "asks_the_host": {"a round does not talk to the host"},
    "loops_for_long": {"loops in a round have a known length"},
    "none on four": set(),
    "rolls_the_vocabulary": {"devices only reduce and gather"},
}


@needs_tpu
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutation_breaks_its_promises(name, mutants):
    made = mutants[name]
    assert "error" not in made, made
    assert {promise for promise, of in made["promises"].items() if not of["holds"]} == MUTANTS[name]
    assert (made["cache_copies"] > 0) == bool(MUTANTS[name] & {COPIED, IN_PLACE})
    assert (made["host_waits"] > 0) == (name == "asks_the_host")


@needs_tpu
def test_a_broken_promise_is_exit_status_1(tmp_path):
    made = compiled(tmp_path, "--layers", "1", "--most-waits", "-1", status=1)
    assert [name for name, of in made["promises"].items() if not of["holds"]] == [
        "the host waits at most -1 times a round"
    ]


@needs_gpu
@pytest.mark.parametrize("drafter", ["ngram", "model"])
def test_an_h100_keeps_every_promise(drafter, tmp_path):
    options = ["--topology", "h100", "--rows", "2", "--drafter", drafter, "--sampling"]
    made = compiled(tmp_path, *options, "filters", "--most-waits", "0.25")
    assert made.keys() >= KEYS and made["estimated_ms"] is None and made["undecided"] == []
    assert made["cache_copies"] == 0 and made["kernels"] > 100
    broken = compiled(tmp_path, *options, "filters", "--most-waits", "0", status=1)
    assert not broken["promises"]["the host waits at most 0 times a round"]["holds"]


@needs_gpu
@pytest.mark.parametrize("drafter", ["eagle", "model"])
def test_a_tree_on_an_h100_keeps_every_promise(drafter, tmp_path):
    options = ["--topology", "h100", "--rows", "2", "--drafter", drafter, "--tree", "8"]
    made = compiled(tmp_path, *options, "--most-waits", "0.25")
    assert (made["tree"], made["cache_copies"], made["undecided"]) == (8, 0, [])
    assert all(of["holds"] for of in made["promises"].values())


@needs_gpu
def test_filters_run_on_an_h100_only_where_a_row_asks(tmp_path):
    """XLA makes a select of a branch of cheap operations. Without the barrier in ``filters`` both counts are equal."""
    options = ["--topology", "h100", "--drafter", "none", "--sampling"]
    kernels = [compiled(tmp_path, *options, sampling)["kernels"] for sampling in ("temperature", "filters")]
    assert kernels[0] + 40 < kernels[1]


@needs_gpu
def test_an_h100_runs_generate_as_one_graph_where_xla_may_capture_loops(tmp_path):
    flags = "--flags=--xla_gpu_enable_command_buffer=+WHILE"
    assert compiled(tmp_path, "--topology", "h100", flags, "--most-waits", "0")["host_waits"] == 0
