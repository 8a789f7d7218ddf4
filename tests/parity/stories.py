"""stories260K, a trained Llama stored in llama2.c's format: conversion to a Hugging Face folder, and its tokenizer.

Axes: N layers, V vocab, D model, H heads, G key-value heads, C head dim, F mlp, S positions.
"""

import json
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

BOS, EOS = 1, 2
NORM_EPSILON = 1e-5
"""A constant in llama2.c's source; its files do not store it."""


def write_hugging_face(path: Path, folder: Path) -> None:
    """Writes a model in llama2.c's first file format (no magic number, float32) as Transformers would save it."""
    data = path.read_bytes()
    D, F, N, H, G, signed_V, S = struct.unpack("<7i", data[:28])
    V, tied, C = abs(signed_V), signed_V > 0, D // H
    rest = np.frombuffer(data, "<f4", offset=28)

    def take(*shape: int) -> np.ndarray:
        nonlocal rest
        value, rest = rest[: np.prod(shape)], rest[np.prod(shape) :]
        return value.reshape(shape)

    tensors = {"model.embed_tokens.weight": take(V, D)}
    stacked = {
        "input_layernorm": take(N, D),
        "self_attn.q_proj": _halves(take(N, H, C, D)).reshape(N, H * C, D),
        "self_attn.k_proj": _halves(take(N, G, C, D)).reshape(N, G * C, D),
        "self_attn.v_proj": take(N, G * C, D),
        "self_attn.o_proj": take(N, D, H * C),
        "post_attention_layernorm": take(N, D),
        "mlp.gate_proj": take(N, F, D),
        "mlp.down_proj": take(N, D, F),
        "mlp.up_proj": take(N, F, D),
    }
    for name, values in stacked.items():
        tensors |= {f"model.layers.{n}.{name}.weight": value for n, value in enumerate(values)}
    tensors["model.norm.weight"] = take(D)
    take(2, S, C // 2)  # cosines and sines of RoPE
    if not tied:
        tensors["lm_head.weight"] = take(V, D)
    assert not rest.size, f"{path} has {rest.size} unread numbers"
    config = {
        "model_type": "llama",
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": N,
        "num_attention_heads": H,
        "num_key_value_heads": G,
        "rms_norm_eps": NORM_EPSILON,
        "tie_word_embeddings": tied,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    folder.mkdir()
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def _halves(rows_NHCD: np.ndarray) -> np.ndarray:
    """Reorders each head's rows, where RoPE rotates adjacent pairs, so that it rotates the two halves instead."""
    return np.concatenate([rows_NHCD[:, :, 0::2], rows_NHCD[:, :, 1::2]], axis=2)


class StoriesTokenizer:
    """Decodes ids with llama2.c's tokenizer file."""

    def __init__(self, path: Path):
        data = path.read_bytes()
        self._pieces: list[bytes] = []
        at = 4  # after the longest piece's length
        while at < len(data):
            _, length = struct.unpack_from("<fi", data, at)
            self._pieces.append(data[at + 8 : at + 8 + length])
            at += 8 + length

    def decode(self, ids: Iterable[int]) -> str:
        """Joins the pieces; the first one loses its leading space."""
        text = b"".join(self._piece(i) for i in ids if i not in (BOS, EOS))
        return text.removeprefix(b" ").decode()

    def _piece(self, i: int) -> bytes:
        piece = self._pieces[i]
        return bytes([int(piece[3:5], 16)]) if piece.startswith(b"<0x") else piece
