"""Draft heads in and out of folders, by kind: ``load_drafter`` and ``save_drafter`` in short."""

from types import SimpleNamespace

import specjax
from specjax.checkpoint.block import block_head
from specjax.checkpoint.eagle import eagle_head


def open_eagle(path, *arguments, **named):
    return specjax.load_drafter(f"eagle:{path}", *arguments, **named)


def open_block(path, *arguments, **named):
    return specjax.load_drafter(f"block:{path}", *arguments, **named)


def open_mtp(path, *arguments, **named):
    return specjax.load_drafter(f"mtp:{path}", *arguments, **named)


def open_medusa(path, *arguments, **named):
    return specjax.load_drafter(f"medusa:{path}", *arguments, **named)


def write_eagle(path, config, params, target, **named):
    drafter = specjax.FeatureDrafter(params, eagle_head(config, target))
    specjax.save_drafter(path, drafter, target, config, **named)


def write_block(path, config, params, target, **named):
    head = block_head(config, target)
    drafter = specjax.BlockDrafter(params, head, head.most_drafts)
    specjax.save_drafter(path, drafter, target, config, **named)


def write_mtp(path, config, params):
    """Writing reads the parameters alone."""
    drafter = specjax.MTPDrafter(params, SimpleNamespace(num_modules=len(params)), len(params))
    specjax.save_drafter(path, drafter, None, config)


def write_medusa(path, params, target_name=None):
    specjax.save_drafter(path, specjax.MedusaDrafter(params, len(params)), None, target_name=target_name)
