"""Which tensors of a Hugging Face folder make which parameters: one table per family.

A row is ``parameter: (tensor, layout)``.

- ``{i}`` is the number of a layer, ``{e}`` the number of an expert.
- A parameter whose tensor name has ``{e}`` is the stack of the tensors of all experts.
- Several parameters with one tensor name are parts of that tensor, in the table's order.

Example: in ``PHI3``, ``q_proj``, ``k_proj`` and ``v_proj`` all name ``qkv_proj``. With 8 query heads and 2 key heads
of width 64, rows 0 to 511 of that tensor are ``q_proj``, rows 512 to 639 ``k_proj``, and rows 640 to 767 ``v_proj``.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from specjax.transformer.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tensor's array becomes a parameter's array: it is split, then transposed.

    Attributes:
      axis: the axis along which a tensor holds the parts of several parameters.
      stride: parts alternate, entry by entry, with so many entries of all parts in a period; 1: they follow each other.
      transpose: whether the last two axes change places.
      by_head: whether the tensor's first axis holds the parts of each attention head in turn. The parameter then has
        an axis for the heads.
      by_key_head: the same for the key heads of a recurrence. The parameter has no such axis: the parts of all heads
        follow each other.
      middle: whether the tensor has a middle axis of size 1, which the parameter lacks.
    """

    axis: int = 0
    stride: int = 1
    transpose: bool = False
    by_head: bool = False
    by_key_head: bool = False
    middle: bool = False


SAME = Layout()
LINEAR = Layout(transpose=True)  # [out, in] -> [in, out]
CONV1D = Layout(axis=1)  # [in, out], as GPT-2 stores kernels
HEADS = Layout(axis=1, by_head=True)  # [heads * width, in] -> [heads, part of width, in]
BY_KEY_HEAD = Layout(transpose=True, by_key_head=True)  # [key heads * width, in] -> [in, key heads * part of width]
CONVOLUTION = Layout(transpose=True, middle=True)  # [channels, 1, taps] -> [taps, part of channels]

Table = Mapping[str, tuple[str, Layout]]

ENDS: Table = {
    "embed_tokens.weight": ("model.embed_tokens.weight", SAME),
    "norm.weight": ("model.norm.weight", SAME),
    "lm_head.kernel": ("lm_head.weight", LINEAR),
}


def linear(ours: str, theirs: str) -> Table:
    """Rows of a projection with kernel and bias. A model without the bias has no such parameter."""
    return {f"{ours}.kernel": (f"{theirs}.weight", LINEAR), f"{ours}.bias": (f"{theirs}.bias", SAME)}


def layer_path(name: str) -> str:
    """Returns the path of a layer's parameter."""
    return f"layers.{{i}}.{name}"


def layer_tensor(name: str) -> str:
    """Returns the name of a layer's tensor."""
    return f"model.layers.{{i}}.{name}"


def linears(*names: str) -> Table:
    """Rows of projections whose parameters and tensors have the same names."""
    rows: dict[str, tuple[str, Layout]] = {}
    for name in names:
        rows |= linear(layer_path(name), layer_tensor(name))
    return rows


def norms(**names: str) -> Table:
    """Rows of a layer's norms: parameter=tensor."""
    return {layer_path(f"{ours}.weight"): (layer_tensor(f"{theirs}.weight"), SAME) for ours, theirs in names.items()}


def expert_rows(block: str, gate: str, up: str, down: str) -> Table:
    """Rows of a router and its experts, whose tensors are in ``block``."""
    experts = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    return {layer_path("mlp.gate.kernel"): (layer_tensor(f"{block}.gate.weight"), LINEAR)} | {
        layer_path(f"mlp.experts.{ours}"): (layer_tensor(f"{block}.experts.{{e}}.{theirs}.weight"), LINEAR)
        for ours, theirs in experts.items()
    }


LAYER_NORMS = norms(input_layernorm="input_layernorm", post_attention_layernorm="post_attention_layernorm")
QUERY_KEY_NORMS = {
    layer_path(f"self_attn.{name}.weight"): (layer_tensor(f"self_attn.{name}.weight"), SAME)
    for name in ("q_norm", "k_norm")
}
ATTENTION = linears("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = linears("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def why_left_out(name: str, config: DecoderConfig, next_tokens: Any) -> str | None:
    """Returns why the decoder does not need a tensor, or None if the tensor must not be there.

    transformers leaves out the same tensors, whatever is in them.

    Args:
      name: the tensor's name in the family's table.
      config: the decoder's. It is tied only if a stored output head equals the embedding.
      next_tokens: the number of multi-token prediction layers in the folder, as its config says.
    """
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return "the output head is the embedding"
    if name.endswith(".rotary_emb.inv_freq") or re.search(r"(^|\.)h\.\d+\.attn\.(masked_)?bias$", name):
        return "a buffer, computed anew"
    shared = re.match(r"model\.layers\.(\d+)\.self_attn\.[kv]_(proj|norm)\.", name)
    if shared and any(layer.shares is not None for layer in config.each_layer[int(shared[1]) :][:1]):
        return "keys and values of a layer that shares an earlier layer's"
    if name.startswith("mtp."):
        return "a multi-token prediction layer, no part of the decoder"
    if name.startswith("medusa_head."):
        return "a Medusa head, no part of the decoder"
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    count = next_tokens if isinstance(next_tokens, int) else 0
    if name.startswith("model.mtp_layers.") and count:
        return "a multi-token prediction layer, no part of the decoder"
    if layer and 0 <= int(layer[1]) - config.num_hidden_layers < count:
        return "a multi-token prediction layer, no part of the decoder"
    return None


ParameterPath = tuple[str | int, ...]
"""The path of a parameter in nested dicts, such as ("layers", 0, "mlp", "up_proj", "kernel")."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """The part of a tensor that is a parameter, or one expert of a parameter.

    Attributes:
      parameter: the parameter's path.
      expert: index on the parameter's first axis, or None for the whole parameter.
      shape: shape of the parameter, or of one expert.
      layout: how the tensor's array becomes the parameter's array.
      start: first entry of the part on the tensor's split axis; of a layout by key heads, in the part of each of them.
      key_heads: of the recurrence, for layouts by key heads.
    """

    parameter: ParameterPath
    expert: int | None
    shape: tuple[int, ...]
    layout: Layout
    start: int
    key_heads: int = 1

    @property
    def view_shape(self) -> tuple[int, ...]:
        """The part's shape in the tensor, before it is transposed."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.layout.transpose else self.shape

    @property
    def end(self) -> int:
        """The entry where the next part starts on the tensor's split axis; as for ``start``."""
        if self.layout.stride > 1:
            return self.start + 1
        size = self.view_shape[self.layout.axis]
        return self.start + (size // self.key_heads if self.layout.by_key_head else size)

    def of(self, tensor: np.ndarray) -> np.ndarray:
        """Returns this part of a tensor's array in the parameter's layout: a view, or a copy if it is by key heads."""
        part = self._part(tensor)
        if self.layout.by_key_head:
            part = part.reshape(self.view_shape)
        return part.swapaxes(-1, -2) if self.layout.transpose else part

    def put(self, tensor: np.ndarray, array: np.ndarray) -> None:
        """Writes the parameter's array into its part of a tensor's array."""
        part = self._part(tensor)
        part[...] = (array.swapaxes(-1, -2) if self.layout.transpose else array).reshape(part.shape)

    def _part(self, tensor: np.ndarray) -> np.ndarray:
        """Returns a view of the part, with an axis for heads if the tensor is by heads."""
        layout, axis = self.layout, self.layout.axis
        if layout.by_head:
            tensor = tensor.reshape(self.shape[0], -1, tensor.shape[-1])
        elif layout.by_key_head:
            tensor, axis = tensor.reshape(self.key_heads, -1, tensor.shape[-1]), 1
        elif layout.middle:
            tensor = tensor.reshape(tensor.shape[0], tensor.shape[-1])
        taken = slice(self.start, self.end) if layout.stride == 1 else slice(self.start, None, layout.stride)
        return tensor[(slice(None),) * axis + (taken,)]


@dataclasses.dataclass(frozen=True)
class Source:
    """A tensor that holds parameters.

    Attributes:
      row: the tensor's name in the table, with ``{i}`` and ``{e}``.
      pieces: the parts that the tensor holds, in order.
    """

    row: str
    pieces: tuple[Piece, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        layout, view, end = self.pieces[0].layout, self.pieces[0].view_shape, self.pieces[-1].end
        if layout.stride > 1:
            end = layout.stride * view[layout.axis]
        if layout.by_head:
            return view[0] * end, view[2]
        if layout.by_key_head:
            return self.pieces[0].key_heads * end, view[1]
        if layout.middle:
            return end, 1, view[1]
        return (*view[: layout.axis], end, *view[layout.axis + 1 :])


def sources_of(table: Table, params: Any, first: int = 0, key_heads: int = 1) -> dict[str, Source]:
    """Returns the tensors that hold parameters, by their names in a table.

    Args:
      table: has a row for each parameter.
      params: nested dicts of leaves with a shape.
      first: added to the number in a parameter's path. Example: MTP module 0 after 61 layers, whose paths start with
        0, is in tensors ``model.layers.61.*``, so ``first`` is 61.
      key_heads: of the recurrence, if the model has one.
    """
    # In the table's order, in which the parts of one tensor follow each other.
    order = {row: place for place, row in enumerate(table)}
    leaves = {path: tuple(leaf.shape) for path, leaf in parameters(params).items()}
    found: dict[str, Source] = {}
    for path in sorted(leaves, key=lambda path: order[path_row(path)]):
        row, layout = table[path_row(path)]
        shape, stacked = leaves[path], "{e}" in row
        number = next((first + key for key in path if isinstance(key, int)), None)
        for expert in range(shape[0]) if stacked else (None,):
            name = row.format(i=number, e=expert)
            before = found[name].pieces if name in found else ()
            start = before[-1].end if before else 0
            piece = Piece(path, expert, shape[1:] if stacked else shape, layout, start, key_heads)
            found[name] = Source(row, (*before, piece))
    return found


def parameters(tree: Any) -> dict[ParameterPath, Any]:
    """Returns the leaves of nested dicts by their paths."""
    leaves: Any = flatten_dict(tree)
    return leaves


def path_row(path: ParameterPath) -> str:
    """Returns a parameter's path in the form of the tables, with ``{i}`` for a number."""
    return ".".join("{i}" if isinstance(part, int) else part for part in path)
