"""``jax.jit`` for the tests' own passes and rounds, traced as fast as those of ``generate``."""

import functools

import jax

from specjax.platforms import platform_of


def jit(function=None, **options):
    """Returns ``jax.jit(function, **options)``, which knows the platform of its arguments as it is traced.

    So a choice by platform is traced one way, as in ``generate``, and not all ways.
    """
    if function is None:
        return functools.partial(jit, **options)
    jitted = jax.jit(function, **options)

    @functools.wraps(function)
    def call(*args, **kwargs):
        with platform_of((args, kwargs)):
            return jitted(*args, **kwargs)

    return call
