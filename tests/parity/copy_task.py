"""Two transformers trained to copy, read from npz files whose arrays are in the order of the network.

Axes: V vocab, D model, H heads, C head dim, F mlp, I source tokens.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.recipe import Recipe
from gpt.config import GptConfig
from t5like.config import T5LikeConfig

HEADS = 2
RECIPE = Recipe(positions="learned", norm="layernorm", mlp="relu", biases=True)
Tree = dict[str, Any]


def decoder_only(path: Path) -> tuple[GptConfig, Tree]:
    """(config, parameters)."""
    read = _arrays(path)
    table_VD, positions_SD = next(read), next(read)[0]
    layers = _stack([_layer(read), _layer(read)])
    final_norm, output = _head(read)
    config = GptConfig(num_layers=2, max_positions=len(positions_SD), recipe=RECIPE, **_sizes(table_VD, layers))
    params = {
        "embedding": {"table_VD": table_VD},
        "positions": {"table_SD": positions_SD},
        "layers": layers,
        "final_norm": final_norm,
        "output": output,
    }
    return config, params


def encoder_decoder(path: Path, source_length: int) -> tuple[T5LikeConfig, Tree]:
    """(config, parameters) for sources of `source_length` only.

    Here target positions continue from the source's in one table; this network numbers them from 0 in a second table.
    So our table is the first rows of the source's, followed by the target's.
    """
    read = _arrays(path)
    table_VD, source_SD = next(read), next(read)[0]
    encoder = _stack([_layer(read), _layer(read)])
    encoder_norm = _norm(read)
    target_SD = next(read)[0]  # targets share the token table: only their positions have a table
    decoder = _stack([_layer(read, crosses=True), _layer(read, crosses=True)])
    decoder_norm, output = _head(read)
    positions_SD = np.concatenate([source_SD[:source_length], target_SD])
    config = T5LikeConfig(
        encoder_layers=2,
        decoder_layers=2,
        max_positions=len(positions_SD),
        recipe=RECIPE,
        **_sizes(table_VD, encoder),
    )
    params = {
        "embedding": {"table_VD": table_VD},
        "positions": {"table_SD": positions_SD},
        "encoder": encoder,
        "encoder_norm": encoder_norm,
        "decoder": decoder,
        "decoder_norm": decoder_norm,
        "output": output,
    }
    return config, params


def _arrays(path: Path) -> Iterator[np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        for index in range(len(arrays.files)):
            yield arrays[f"arr_{index}"]


def _layer(read: Iterator[np.ndarray], *, crosses: bool = False) -> Tree:
    layer: Tree = {"attention_norm": _norm(read), "attention": _attention(read)}
    if crosses:
        layer |= {"cross_norm": _norm(read), "cross_attention": _attention(read)}
    layer |= {"mlp_norm": _norm(read)}
    mlp = {name: next(read) for name in ("in_DF", "in_bias_F", "out_FD", "out_bias_D")}
    return layer | {"mlp": mlp}


def _norm(read: Iterator[np.ndarray]) -> Tree:
    return {"scale_D": next(read), "bias_D": next(read)}


def _attention(read: Iterator[np.ndarray]) -> Tree:
    values: Tree = {}
    for name, axes in (("query", "HC"), ("key", "GC"), ("value", "GC")):
        weight, bias = next(read), next(read)
        values[f"{name}_D{axes}"] = weight.reshape(len(weight), HEADS, -1)
        values[f"{name}_bias_{axes}"] = bias.reshape(HEADS, -1)
    weight, bias = next(read), next(read)
    return values | {"out_HCD": weight.reshape(HEADS, -1, weight.shape[-1]), "out_bias_D": bias}


def _head(read: Iterator[np.ndarray]) -> tuple[Tree, Tree]:
    """(final norm, head). Our head has no bias: b_V = c_D @ weight_DV, and c_D is added to the norm's bias."""
    norm, weight_DV, bias_V = _norm(read), next(read), next(read)
    c_D = np.linalg.lstsq(weight_DV.T.astype(np.float64), bias_V.astype(np.float64))[0]
    np.testing.assert_allclose(c_D @ weight_DV, bias_V, atol=1e-6)
    assert next(read, None) is None, "arrays are left over"
    return norm | {"bias_D": (norm["bias_D"] + c_D).astype(np.float32)}, {"weight_DV": weight_DV}


def _stack(layers: list[Tree]) -> Tree:
    first = layers[0]
    return {
        name: _stack([layer[name] for layer in layers])
        if isinstance(first[name], dict)
        else np.stack([layer[name] for layer in layers])
        for name in first
    }


def _sizes(table_VD: np.ndarray, layers: Tree) -> dict[str, int]:
    _, d_model, heads, head_dim = layers["attention"]["query_DHC"].shape
    return {
        "vocab_size": len(table_VD),
        "d_model": d_model,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": head_dim,
        "d_ff": layers["mlp"]["in_DF"].shape[-1],
    }
