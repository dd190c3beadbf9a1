"""Trains the model of a recipe: ``python scripts/train.py models/NAME`` writes ``checkpoints/NAME``.

Stopped at any time, the same command goes on from the last checkpoint in ``runs/NAME`` and ends with the same bits.
"""

import argparse
from pathlib import Path
import platform

import jax
import jax.numpy as jnp
from tqdm import tqdm

from specjax import checkpoint
from specjax.training import data, losses
from specjax.training.loop import fit
from specjax.training.recipe import read_recipe
from specjax.transformer.decoder import bind, init_params


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    args = parser.parse_args()
    recipe = read_recipe(args.recipe)
    run = Path("runs") / recipe.name
    modules = data.stdlib_modules()
    train = [text for name, text in modules.items() if not data.is_held_out(name)]
    held = [text for name, text in modules.items() if data.is_held_out(name)]
    tokenizer = data.train_tokenizer(train, recipe.config.vocab_size)
    tokens, held_tokens = data.encode_texts(tokenizer, train), data.encode_texts(tokenizer, held)
    print(f"{len(train)} modules, {len(tokens)} tokens; held out {len(held)} modules, {len(held_tokens)} tokens",
          sum(map(len, train)) / len(tokens), "characters a token")
    params = init_params(recipe.config, jax.random.key(recipe.seed))

    def loss(params, tokens):
        logits = bind(recipe.config, params)(tokens, jnp.zeros(tokens.shape[0], jnp.int32), None)[0]
        return losses.next_token(logits, tokens)

    for number, stage in enumerate(recipe.stages):
        windows = data.Windows(tokens, stage.sequence, stage.rows, recipe.seed)
        print(windows.batches_per_epoch, "batches an epoch")
        bar = tqdm(total=stage.steps, mininterval=20)
        params, history = fit(loss, params, stage, windows.batch, run / f"stage-{number}",
                              lambda n, v: (bar.update(n - bar.n), bar.set_postfix(loss=f"{v:.3f}", refresh=False)))
    held_windows = data.Windows(held_tokens, 512, 4, 0)
    held_loss = sum(float(jax.jit(loss)(params, held_windows.batch(i))) for i in range(20)) / 20
    checkpoint.save(Path("checkpoints") / recipe.name, recipe.config, params, tokenizer,
                    {"recipe": recipe.digest, "python": platform.python_version(), "held_out_loss": held_loss, "losses": history})


main()
