"""One of the processes that ``test_hosts.py`` starts: ``one_of_several.py NAME OPTIONS``, of a script or ``talk``."""

import argparse
import importlib
import signal
import sys
import time
from pathlib import Path

import conftest  # noqa: F401  (the suite's strictness, and its compilations)
import jax
import numpy as np

import specjax
from specjax.commands import hosts, stdlib


def talk(argv):
    """Talks with the others until one is gone or crashes, and leaves a file once it does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--crashes", type=int, help="the process that does")
    parser.add_argument("--come-within", type=int, default=hosts.START_S)
    hosts.add_mesh_options(parser)
    args = parser.parse_args(argv)
    hosts.START_S, hosts.LOST_S = args.come_within, 10
    with hosts.run(args) as mesh:
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        numbers = np.arange(mesh.size, dtype=np.int32)
        apart = jax.make_array_from_callback(numbers.shape, rows, numbers.__getitem__)
        print(f"all of {specjax.sharding.gathered(apart).tolist()}", flush=True)
        if args.process_id == args.crashes:
            raise RuntimeError("the crash\nof one")
        Path("talks").touch()
        while True:
            specjax.sharding.gathered(apart)
            time.sleep(0.1)


def train(argv):
    """Trains on a small corpus; optax raises a decay rate to the power of a step count."""
    from test_train_script import MODULES  # which takes half a second, and is nothing to those that talk

    stdlib.modules = lambda: MODULES
    with jax.numpy_dtype_promotion("standard"):
        sys.exit(importlib.import_module("specjax.commands.train").main(argv))


if __name__ == "__main__":
    # A shell may have started the suite in the background, where SIGINT is ignored. Python inherits it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    name, *argv = sys.argv[1:]
    if name in ("talk", "train"):
        globals()[name](argv)
    else:
        importlib.import_module(f"specjax.commands.{name}").main(argv)
