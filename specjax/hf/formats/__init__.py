"""Formats of quantised weights in Hugging Face folders, dequantised as they are read.

- ``decode``: the tensors of a folder, with a ``Computed`` tensor in place of the stored tensors of each weight.
- ``read_format``: which format a ``quantization_config`` names.

A format is an object with the three methods of ``Format``. Each weight is decoded by itself, so a folder may hold
plain weights, too.
"""

from specjax.hf.formats.decode import Format as Format
from specjax.hf.formats.decode import decode as decode
from specjax.hf.formats.decode import is_plain as is_plain
from specjax.hf.formats.decode import why_left_out as why_left_out
from specjax.hf.formats.methods import check_named as check_named
from specjax.hf.formats.methods import read_format as read_format
