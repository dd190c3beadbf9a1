"""The commands in several processes on this machine: what they make together, and how all end when one does."""

import argparse
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import specjax
from specjax.hf.config import decoder_config
from specjax.text.tokenizer import load_tokenizer
from specjax.training.data import train_tokenizer
from specjax.transformer.decoder import init_params

PATIENCE_S = 200  # the machine may be busy
PROGRAM = Path(__file__).parent / "one_of_several.py"


class Job:
    """Processes with numbers from 0, each in a folder of its own, as if on a host of its own; some may be missing."""

    def __init__(self, folder, count, *argv, each=lambda process: (), missing=()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        self.folder, self.processes = folder, {}
        for process in sorted(set(range(count)) - set(missing)):
            (folder / str(process)).mkdir(exist_ok=True)
            place = ["--coordinator", address, "--num-processes", count, "--process-id", process]
            command = [str(value) for value in (sys.executable, PROGRAM, *argv, *each(process), *place)]
            with open(folder / f"{process}.out", "wb") as out, open(folder / f"{process}.err", "wb") as err:
                files = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err, "cwd": folder / str(process)}
                self.processes[process] = subprocess.Popen(command, env=environment, **files)

    def stop_one(self, process, number):
        """Sends a signal to a process once all have talked with each other; all must end within a minute.

        A process that is only stopped is killed once the others have ended.
        """
        began = time.monotonic()
        while not all((self.folder / str(each) / "talks").exists() for each in self.processes):
            ended = [child for child in self.processes.values() if child.poll() is not None]
            if ended or time.monotonic() - began > PATIENCE_S:
                raise AssertionError(self.ends())
            time.sleep(0.1)
        self.processes[process].send_signal(number)
        signalled = time.monotonic()
        for other, child in self.processes.items():
            if other != process:
                child.wait(PATIENCE_S)
        if number == signal.SIGSTOP:
            self.processes[process].kill()
        ends = self.ends()
        assert time.monotonic() - signalled < 60
        return ends

    def says(self, process):
        """Returns the standard error of a process."""
        return (self.folder / f"{process}.err").read_text(errors="replace")

    def ends(self):
        """Returns the status of each process, its standard output and the errors that it names."""
        began = time.monotonic()
        try:
            for child in self.processes.values():
                child.wait(max(1, began + PATIENCE_S - time.monotonic()))
        finally:
            for child in self.processes.values():
                child.kill()
        found = {}
        for process, child in self.processes.items():
            out, err = ((self.folder / f"{process}.{end}").read_text(errors="replace") for end in ("out", "err"))
            lines = [line.replace(f" ({socket.gethostname()})", "") for line in err.splitlines()]
            found[process] = child.wait(), out, [line for line in lines if line.startswith("error: ")]
            print(f"process {process}:", err)
        return found


# What they make.

PROMPTS = ("abc", "def f(x):", "x")
NEW = 24
JOBS = {  # processes -> options: the rows are spread over both; or over two times two, which share the target
    2: ("--drafter", "model:target"),
    4: ("--drafter", "none", "--mesh", "data=2,tensor=2"),
}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A checkpoint whose next token is uncertain."""
    folder = tmp_path_factory.mktemp("model") / "target"
    tokenizer = train_tokenizer(["def f(x):\n    return x\n"] * 3, 262)
    config = {
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    params = init_params(decoder_config(config), jax.random.key(0))
    params["embed_tokens"]["weight"] *= 10.0
    specjax.save(folder, config, params, tokenizer, {})
    return folder


@pytest.fixture(scope="module")
def plain(target):
    """What one process emits behind each prompt by plain decoding: with ``coupled``, any drafter gives the same."""
    tokenizer, model = load_tokenizer(target), specjax.load(target)
    prompt_bt, length_b = specjax.pad_prompts([tokenizer.encode(prompt).ids for prompt in PROMPTS])
    sampling = specjax.Sampling(temperature=1.0, seed=3)
    tokens_bs = np.asarray(specjax.generate(model, prompt_bt, length_b, sampling=sampling, max_new_tokens=NEW).tokens)
    return [tokens_bs[row, length : length + NEW].tolist() for row, length in enumerate(length_b)]


@pytest.mark.parametrize("count", JOBS)
def test_processes_emit_the_tokens_of_one(count, target, plain, tmp_path):
    """Three rows over two parts; the first process alone has the file of a prompt, prints and writes."""
    for process in range(count):
        (tmp_path / str(process)).mkdir()
        (tmp_path / str(process) / "target").symlink_to(target)
    (tmp_path / "0" / "prompt.txt").write_text(PROMPTS[1] + "\n")
    argv = ["--target", "target", *JOBS[count], "--num-draft", 2, "--verify", "coupled", "--temperature", 1]
    argv += ["--seed", 3, "--max-new-tokens", NEW, "--json", "out.json"]
    argv += ["--prompt", PROMPTS[0], "--prompt-file", "prompt.txt", "--prompt", PROMPTS[2]]
    ends = Job(tmp_path, count, "generate", *argv).ends()
    assert [(status, errors) for status, _, errors in ends.values()] == [(0, [])] * count
    result = json.loads((tmp_path / "0" / "out.json").read_text())
    assert [prompt["tokens"] for prompt in result["prompts"]] == plain
    assert result["emitted"] == 3 * NEW and (result["drafted"] > 0) == (count == 2)
    assert result["settings"]["mesh"] == f"data 2, tensor {count // 2}, expert 1"
    decode = load_tokenizer(target).decode
    texts = [prompt + decode(tokens) for prompt, tokens in zip(PROMPTS, plain, strict=True)]
    ended = [text + ("" if text.endswith("\n") else "\n") for text in texts]
    assert ends[0][1] == "".join(f"--- prompt {row} of 3 ---\n{text}" for row, text in enumerate(ended, 1))
    for process in range(1, count):
        assert ends[process][1] == ""
        assert "tokens per second" not in (tmp_path / f"{process}.err").read_text()
        assert sorted(path.name for path in (tmp_path / str(process)).iterdir()) == ["target"]


RECIPE = """
[architecture]
vocab_size = 262
hidden_size = 16
intermediate_size = 16
num_hidden_layers = 1
num_attention_heads = 1
max_position_embeddings = 128
[[stages]]
loss = "next_token"
steps = 3
rows = 2
sequence = 32
peak_learning_rate = 1e-2
warmup_steps = 1
"""


def test_processes_train_as_one(tmp_path):
    """Fully sharded; all write what they hold, and one process opens it."""
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "recipe.toml").write_text(RECIPE)
    losses, jobs = [], {1: (), 2: ("--fully-sharded",)}
    for count, options in jobs.items():
        folder = tmp_path / str(count)
        folder.mkdir()
        places = ["--checkpoints", folder / "checkpoints", "--runs", folder / "runs"]
        ends = Job(folder, count, "train", tmp_path / "models" / "tiny", *places, *options).ends()
        assert [(status, errors) for status, _, errors in ends.values()] == [(0, [])] * count
        metrics = json.loads((folder / "checkpoints" / "tiny" / "metrics.json").read_text())
        losses.append([*metrics["stages"][0]["losses"], metrics["held_out_loss"]])
        assert specjax.load(folder / "checkpoints" / "tiny").vocab_size == 262
    assert len(set(losses[0])) == 4
    np.testing.assert_allclose(*losses, atol=2e-4)  # metrics.json has four places


# How they end.


LOST = "another process failed, was killed or is cut off; look at its messages ("
DIED = "This most likely indicates that another task died"  # JAX says so as it aborts a process


def test_a_killed_process_ends_the_others(tmp_path):
    """The collective operation that they are in fails."""
    ends = Job(tmp_path, 3, "talk").stop_one(1, signal.SIGKILL)
    assert ends[1] == (-signal.SIGKILL, "", [])
    for process, printed in ((0, "all of [0, 1, 2]\n"), (2, "")):
        status, out, (line,) = ends[process]
        assert (status, out) == (1, printed)
        assert line.startswith(f"error: process {process} of 3: {LOST}")


def test_a_process_that_is_cut_off_ends_the_others_and_is_named(tmp_path):
    """It keeps its connections and says nothing: JAX misses its heartbeats and aborts the others."""
    job = Job(tmp_path, 3, "talk")
    ends = job.stop_one(1, signal.SIGSTOP)
    assert ends[0][1] == "all of [0, 1, 2]\n"
    for process in (0, 2):
        assert ends[process][0] != 0
        said = job.says(process)
        assert DIED in said and "unhealthy (stopped sending heartbeats):\n1\n" in said


def test_when_the_first_is_killed_all_end_at_once(tmp_path):
    """The collective operation fails, and JAX aborts the others, since they meet at the first: one of both is told."""
    job = Job(tmp_path, 2, "talk")
    status, out, _ = job.stop_one(0, signal.SIGKILL)[1]
    assert status in (1, -signal.SIGABRT) and out == ""
    assert LOST in job.says(1) or DIED in job.says(1)


def test_an_interrupted_process_ends_the_others(tmp_path):
    """The first, after whose end JAX aborts the others."""
    job = Job(tmp_path, 2, "talk")
    ends = job.stop_one(0, signal.SIGINT)
    assert ends[0] == (128 + signal.SIGINT, "all of [0, 1]\n", ["error: process 0 of 2: ended by SIGINT"])
    assert ends[1][0] in (1, -signal.SIGABRT) and ends[1][1] == ""
    assert LOST in job.says(1) or DIED in job.says(1)


def test_an_exception_in_one_ends_all(tmp_path):
    """It is told, with its traceback, where it was raised."""
    ends = Job(tmp_path, 2, "talk", "--crashes", 1).ends()
    assert ends[1] == (1, "", ["error: process 1 of 2: the crash of one"])
    status, out, (line,) = ends[0]
    assert (status, out) == (1, "all of [0, 1]\n") and line.startswith(f"error: process 0 of 2: {LOST}")
    assert "RuntimeError: the crash\nof one" in (tmp_path / "1.err").read_text()
    tracebacks = ["Traceback" in (tmp_path / f"{process}.err").read_text() for process in range(2)]
    assert tracebacks == [False, True]


def test_processes_that_were_started_differently_are_refused(tmp_path):
    ends = Job(tmp_path, 2, "talk", each=lambda process: ("--crashes", process)).ends()
    says = "of 2: the argument crashes is 1 in process 1 and 0 in process 0; start all processes alike"
    for status, out, (line,) in ends.values():
        assert status > 0 and out == "" and line.endswith(says)


def test_a_checkpoint_that_one_lacks_is_refused(target, tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "target").symlink_to(target)
    ends = Job(tmp_path, 2, "generate", "--target", "target", "--drafter", "none", "--prompt", "x").ends()
    for status, out, (line,) in ends.values():
        assert status > 0 and out == ""
        assert "of 2: target is no folder of files in process 1 and a folder of " in line


@pytest.mark.parametrize("there", [0, 1])
def test_processes_that_do_not_come_are_not_waited_for_without_end(there, tmp_path):
    """JAX aborts the one that came, which has said for whom it waits and where."""
    job = Job(tmp_path, 2, "talk", "--come-within", 2, missing={1 - there})
    status, out, _ = job.ends()[there]
    assert status != 0 and out == ""
    said = job.says(there)
    assert f"process {there} of 2 waits for the others at 127.0.0.1:" in said and ", at most 2 s" in said
    assert "DEADLINE_EXCEEDED" in said


# Bad input, and one process.


@pytest.fixture(scope="module")
def hosts():
    return importlib.import_module("specjax.commands.hosts")


def parse(hosts, *argv):
    parser = argparse.ArgumentParser()
    hosts.add_mesh_options(parser)
    return parser.parse_args(argv)


BAD_OPTIONS = {
    "axis=2": "'axis=2' in 'axis=2' is not understood; give sizes of at least 1 to axes among data, tensor, expert",
    "data=2,tensor": "'tensor' in 'data=2,tensor'",
    "data=2,data=2": "'data=2' in",
    "data=0": "'data=0' in",
    "data=-1": "'data=-1' in",
    "data=2;tensor=2": "'data=2;tensor=2' in",
    "": "'' in ''",
}


@pytest.mark.parametrize("text", BAD_OPTIONS)
def test_a_mesh_that_is_none_is_refused(text, hosts, capsys):
    with pytest.raises(SystemExit):
        parse(hosts, "--mesh", text)
    assert BAD_OPTIONS[text] in capsys.readouterr().err


PLACE = {"--coordinator": "127.0.0.1:1234", "--num-processes": "2", "--process-id": "1"}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"--process-id": None}, "--process-id is missing; give all of --coordinator, --num-processes, --process-id"),
        ({"--coordinator": None, "--num-processes": None}, "--coordinator is missing"),
        ({"--process-id": "2"}, "--process-id is 2 and --num-processes 2; number the processes from 0"),
        ({"--process-id": "-1"}, "--process-id is -1"),
        ({"--coordinator": "nowhere.invalid:1"}, "--coordinator is nowhere.invalid:1: .*; give another HOST:PORT"),
        (
            dict.fromkeys(PLACE) | {"--distributed": ""},
            "finds no Cloud TPU, Slurm or other job here .*; without",
        ),
        (dict.fromkeys(PLACE) | {"--mesh": "tensor=999"}, "needs 999 devices and there are"),
    ],
)
def test_places_that_cannot_be_taken_are_refused(changed, says, hosts):
    options = {name: value for name, value in (PLACE | changed).items() if value is not None}
    args = parse(hosts, *(part for option in options.items() for part in option if part))
    with pytest.raises(ValueError, match=says), hosts.run(args):
        raise AssertionError("the body runs")


def test_a_port_that_is_taken_is_refused(hosts):
    with socket.create_server(("", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        args = parse(hosts, "--coordinator", address, "--num-processes", "2", "--process-id", "0")
        with (
            pytest.raises(ValueError, match=f"--coordinator is {address}: Address already in use .*; give"),
            hosts.run(args),
        ):
            raise AssertionError("the body runs")


def test_an_address_without_a_port_is_refused(hosts, capsys):
    for text in ("10.0.0.1", ":1234", "10.0.0.1:http", "10.0.0.1:65536"):
        with pytest.raises(SystemExit):
            parse(hosts, "--coordinator", text)
        assert f"{text!r} is no address; give HOST:PORT" in capsys.readouterr().err


def test_one_process_is_the_first_and_has_a_mesh_if_asked(hosts):
    with hosts.run(parse(hosts)) as mesh:
        assert (
            mesh is None
            and hosts.is_first()
            and hosts.describe(ValueError("y")) == "y"
            and hosts.exchange("x") == ["x"]
        )
    with pytest.raises(KeyError, match="own"), hosts.run(parse(hosts, "--mesh", "data=1")) as mesh:
        assert dict(mesh.shape) == {"data": 1, "tensor": 1, "expert": 1}
        assert jax.sharding.get_abstract_mesh().shape == mesh.shape
        raise KeyError("own")


def test_benchmarks_that_no_mesh_runs_are_refused(hosts):
    bench, mesh = importlib.import_module("specjax.commands.bench"), jax.sharding.AbstractMesh((2, 1, 1), hosts.AXES)
    with pytest.raises(ValueError, match="round runs on one device; with --mesh or --distributed, only speed runs"):
        bench.check_mesh(mesh, ["speed", "round"], [2])
    with pytest.raises(ValueError, match="--batch 3 does not divide over the 2 parts of the mesh axis data; give"):
        bench.check_mesh(mesh, ["speed"], [2, 3])
    bench.check_mesh(mesh, ["speed"], [2, 4])
    bench.check_mesh(None, ["round"], [3])
