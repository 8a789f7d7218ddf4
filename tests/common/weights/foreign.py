"""Small checkpoints as other programs write them, spelled out independently of the tables that read them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore
from flax import serialization
from safetensors.numpy import save_file

Tensors = dict[str, np.ndarray]
BF16 = np.dtype(ml_dtypes.bfloat16)

T5 = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "vocab_size": 40,
    "d_model": 12,
    "d_kv": 4,
    "d_ff": 20,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 5,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "dropout_rate": 0.0,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "eos_token_id": 1,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "is_encoder_decoder": True,
}
T5_V1_1 = T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 41,
    "n_positions": 16,
    "n_embd": 12,
    "n_layer": 2,
    "n_head": 3,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "bos_token_id": 40,
    "eos_token_id": 40,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 41,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def fill(shapes: Mapping[str, tuple[int, ...]], seed: int = 0, dtype: Any = np.float32) -> Tensors:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def t5(c: Mapping[str, Any] = T5, dtype: Any = np.float32) -> Tensors:
    d, inner, buckets = c["d_model"], c["d_kv"] * c["num_heads"], c["relative_attention_num_buckets"]
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (c["vocab_size"], d)}
    for stack, layers in (("encoder", c["num_layers"]), ("decoder", c["num_decoder_layers"])):
        shapes[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (buckets, c["num_heads"])
        shapes[f"{stack}.final_layer_norm.weight"] = (d,)
        kinds = ["SelfAttention", "DenseReluDense"] if stack == "encoder" else ["SelfAttention", "EncDecAttention"]
        kinds += ["DenseReluDense"] if stack == "decoder" else []
        for layer in range(layers):
            for place, kind in enumerate(kinds):
                block = f"{stack}.block.{layer}.layer.{place}."
                shapes[f"{block}layer_norm.weight"] = (d,)
                if kind == "DenseReluDense":
                    for name in ("wi_0", "wi_1") if "gated" in c["feed_forward_proj"] else ("wi",):
                        shapes[f"{block}{kind}.{name}.weight"] = (c["d_ff"], d)
                    shapes[f"{block}{kind}.wo.weight"] = (d, c["d_ff"])
                else:
                    shapes |= {f"{block}{kind}.{name}.weight": (inner, d) for name in "qkv"}
                    shapes[f"{block}{kind}.o.weight"] = (d, inner)
    if c.get("tie_word_embeddings") is False:
        shapes["lm_head.weight"] = (c["vocab_size"], d)
    return fill(shapes, dtype=dtype)


def gpt2(c: Mapping[str, Any] = GPT2, dtype: Any = np.float32, prefix: str = "transformer.") -> Tensors:
    d = c["n_embd"]
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (c["vocab_size"], d), "wpe.weight": (c["n_positions"], d)}
    norms = ["ln_f", *(f"h.{layer}.{name}" for layer in range(c["n_layer"]) for name in ("ln_1", "ln_2"))]
    shapes |= {f"{name}.{part}": (d,) for name in norms for part in ("weight", "bias")}
    for layer in range(c["n_layer"]):
        for name, size in {
            "attn.c_attn": (d, 3 * d),
            "attn.c_proj": (d, d),
            "mlp.c_fc": (d, 4 * d),
            "mlp.c_proj": (4 * d, d),
        }.items():
            shapes[f"h.{layer}.{name}.weight"], shapes[f"h.{layer}.{name}.bias"] = size, size[1:]
    return fill({prefix + name: shape for name, shape in shapes.items()}, dtype=dtype)


def llama(c: Mapping[str, Any] = LLAMA, dtype: Any = np.float32) -> Tensors:
    d, f, size = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = size * c["num_attention_heads"], size * c["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], d), "model.norm.weight": (d,)}
    for layer in range(c["num_hidden_layers"]):
        for name, shape in {
            "input_layernorm": (d,),
            "post_attention_layernorm": (d,),
            "self_attn.q_proj": (q, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, q),
            "mlp.gate_proj": (f, d),
            "mlp.up_proj": (f, d),
            "mlp.down_proj": (d, f),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], d)
    return fill(shapes, dtype=dtype)


def write_hugging_face(
    folder: Path, config: Mapping[str, Any], tensors: Tensors, shards: int = 1, files: Mapping[str, str] | None = None
) -> Path:
    """Writes config.json, safetensors (several files and an index if `shards` > 1) and other small files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def read_hugging_face(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor's dtype, shape and bytes, read independently of the package (header, then bytes at offsets)."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
        header.pop("__metadata__", None)
        for name, about in header.items():
            start, stop = about["data_offsets"]
            assert name not in found
            found[name] = (about["dtype"], tuple(about["shape"]), body[start:stop])
    return found


def t5x(
    vocab: int = 40, d: int = 12, heads: int = 5, size: int = 4, f: int = 20, *, tied: bool, gated: bool
) -> Tensors:
    """An encoder of 2 and a decoder of 3 layers, each layer stored by itself."""
    attention = {"query": (d, heads * size), "key": (d, heads * size), "value": (d, heads * size)}
    attention |= {"out": (heads * size, d)}
    shapes: dict[str, tuple[int, ...]] = {"token_embedder/embedding": (vocab, d)}
    names = {
        "encoder": {"pre_attention_layer_norm": "attention"},
        "decoder": {
            "pre_self_attention_layer_norm": "self_attention",
            "pre_cross_attention_layer_norm": "encoder_decoder_attention",
        },
    }
    for (stack, attentions), layers in zip(names.items(), (2, 3), strict=True):
        shapes[f"{stack}/relpos_bias/rel_embedding"] = (heads, 8)
        shapes[f"{stack}/{stack}_norm/scale"] = (d,)
        for layer in range(layers):
            at = f"{stack}/layers_{layer}"
            for norm, name in attentions.items():
                shapes[f"{at}/{norm}/scale"] = (d,)
                shapes |= {f"{at}/{name}/{part}/kernel": shape for part, shape in attention.items()}
            shapes[f"{at}/pre_mlp_layer_norm/scale"] = (d,)
            shapes |= {f"{at}/mlp/{name}/kernel": (d, f) for name in (("wi_0", "wi_1") if gated else ("wi",))}
            shapes[f"{at}/mlp/wo/kernel"] = (f, d)
    if not tied:
        shapes["decoder/logits_dense/kernel"] = (d, vocab)
    return fill(shapes)


def scanned(tensors: Tensors) -> Tensors:
    """The same tensors with layers stacked on axis 1 of `encoder/encoder/...`, `decoder/decoder/...`."""
    stacked: dict[str, list[np.ndarray]] = {}
    rest = {}
    for name, value in tensors.items():
        before, found, after = name.partition("/layers_")
        if found:
            stacked.setdefault(f"{before}/{before.rpartition('/')[2]}/{after.partition('/')[2]}", []).append(value)
        else:
            rest[name] = value
    return rest | {name: np.stack(values, axis=1) for name, values in stacked.items()}


def write_t5x(folder: Path, tensors: Tensors, *, inline: int = 16, chunk: int = 5, old: bool = False) -> Path:
    """Writes a checkpoint as T5X does: leaves of more than `inline` elements as gzipped zarr, others in the index.

    `old`: writes specs as older versions wrote them to a bucket.
    """
    folder.mkdir(parents=True)
    target: dict[str, Any] = {}
    for name, value in tensors.items():
        *above, last = name.split("/")
        node = target
        for part in above:
            node = node.setdefault(part, {})
        if value.size <= inline:
            node[last] = value
            continue
        path = f"target.{name.replace('/', '.')}"
        metadata = {
            "compressor": {"id": "gzip", "level": 1},
            "shape": list(value.shape),
            "chunks": [min(chunk, size) for size in value.shape],
        }
        store = {"driver": "zarr", "dtype": value.dtype.name, "metadata": metadata}
        local = {"kvstore": {"driver": "file", "path": f"{folder}/{path}"}}
        tensorstore.open(store | local, create=True).result().write(value).result()
        bucket = {"kvstore": {"driver": "gcs", "bucket": "t5x-dummy-bucket"}, "path": path}
        node[last] = store | (bucket if old else {"kvstore": {"driver": "file", "path": path}})
    state = {"step": np.int32(7), "param_states": {"token_embedder": {"embedding": {"v": np.zeros(3, np.float32)}}}}
    contents = {"version": 3, "optimizer": {"target": target, "state": state}}
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(contents))
    return folder
