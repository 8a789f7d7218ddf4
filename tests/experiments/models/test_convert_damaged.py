"""Foreign files and model folders of any shape: understood or refused in one line, and nothing written elsewhere."""

import copy
import io
import itertools
import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from rich.console import Console

from common.data.config import BytePairConfig, SentencePieceConfig
from common.data.tokenizers import byte_pair, sentence_piece
from common.errors import UserError
from common.progress import ProgressBars
from experiments.models.convert import convert
from experiments.models.finding import find_model
from tests.common.weights import foreign
from tests.common.weights.foreign import GPT2, LLAMA, T5

PROGRESS = ProgressBars(Console(file=io.StringIO()))


def run(source, destination, **options):
    return convert(Path(source), Path(destination), PROGRESS, **options)


def test_a_model_folder_writes_nowhere_else(tmp_path):
    """Whatever file names model.json contains."""
    run(foreign.write_hugging_face(tmp_path / "in", LLAMA, foreign.llama()), tmp_path / "ours")
    manifest = json.loads((tmp_path / "ours" / "model.json").read_text())
    for name in (str(tmp_path / "x.safetensors"), "../x.safetensors", "a/x.safetensors", "..", "", "config.json", None):
        manifest["source"]["files"][0]["name"] = name
        (tmp_path / "ours" / "model.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match="model.json: source: "):
            run(tmp_path / "ours", tmp_path / "out", to="hf")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "ours"}


def places(value, path=()):
    """Yields the path of every value in a JSON value; in lists, of the first entries."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*path, key))


ABSENT = object()
WRONG = (ABSENT, None, True, -1, 1e400, 10**12, 0.5, "text", [], ["x", 1], {})


def mutations(value):
    """Yields (path, wrong value, the JSON with it), where each key is absent or has each kind of wrong value."""
    for path in places(value):
        for wrong in WRONG if path else WRONG[1:]:
            changed = {"": copy.deepcopy(value)}
            node, keys = changed, ("", *path)
            for key in keys[:-1]:
                node = node[key]
            if wrong is ABSENT:
                del node[keys[-1]]
            else:
                node[keys[-1]] = wrong
            yield path, wrong, changed[""]


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_any_manifest_is_read_or_a_one_line_error(tmp_path, every):
    """Each value absent and of each wrong kind; in the quick suite, every third of these manifests."""
    source = foreign.write_hugging_face(tmp_path / "in", GPT2 | {"vocab_size": 41}, foreign.gpt2())
    run(source, tmp_path / "ours")
    good = json.loads((tmp_path / "ours" / "model.json").read_text())
    good["text"]["tokenizer"] = {"kind": "byte_pair", "file": "source/tokenizer.json", "sentinels": 0, "add_bos": True}
    refused = 0
    for _, _, manifest in itertools.islice(mutations(good), 0, None, every):
        (tmp_path / "ours" / "model.json").write_text(json.dumps(manifest))
        for use in (
            lambda: run(tmp_path / "ours", tmp_path / "out", to="hf"),
            lambda: find_model(str(tmp_path / "ours")),
        ):
            try:
                use()
            except UserError:
                refused += 1
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert refused > 350 / every
    assert {path.name for path in tmp_path.iterdir()} == {"in", "ours"}


MORE_FIELDS = {
    "t5": {
        "is_gated_act": False,
        "dense_act_fn": "relu",
        "tie_word_embeddings": True,
        "scale_decoder_outputs": True,
        "is_decoder": False,
        "quantization_config": None,
    },
    "gpt2": {
        "n_inner": 48,
        "n_ctx": 16,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    "llama": {
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
        "use_sliding_window": False,
        "partial_rotary_factor": None,
        "attention_dropout": 0.0,
        "rope_scaling": {"rope_type": "default", "type": "default", "rope_theta": 500000.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "quantization_config": None,
    },
}
"""Such as a folder may have beside those of the smallest config."""
GENERATION = {"decoder_start_token_id": 0, "eos_token_id": [1], "pad_token_id": 0, "bos_token_id": 1}
SPECIALS = {"eos_token": {"content": "</s>"}, "unk_token": "<unk>", "add_bos_token": True, "extra_ids": 3} | {
    "additional_special_tokens": ["<extra_id_0>", {"content": "<extra_id_1>"}]
}


def small_tokenizers():
    """Returns a SentencePiece model, and a tokenizer.json that puts a token before each text."""
    lines = ["some words to be trained on, and more of them"] * 20
    pieces = sentence_piece.train_model(lines, SentencePieceConfig(vocab_size=275))
    model = tokenizers.Tokenizer.from_buffer(byte_pair.train_model(lines, BytePairConfig(vocab_size=262)))
    model.add_special_tokens(["</s>", "<unk>", "<s>"])
    front = ("<s>", model.token_to_id("<s>"))
    model.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[front])
    return pieces, json.loads(model.to_str())


@pytest.mark.parametrize(("config", "make"), [(T5, foreign.t5), (GPT2, foreign.gpt2), (LLAMA, foreign.llama)])
def test_any_foreign_file_is_read_or_a_one_line_error(tmp_path, monkeypatch, config, make):
    """Every key that is read, if absent, null or of a wrong kind or size, causes a one-line error quickly."""
    monkeypatch.setattr("experiments.models.convert.import_weights", lambda *_: None)
    config = config | {"vocab_size": 512}
    pieces, pairs = small_tokenizers()
    described = {"config.json": config | MORE_FIELDS[config["model_type"]], "generation_config.json": GENERATION}
    described |= {"tokenizer_config.json": SPECIALS}
    small = {name: value if name == "post_processor" else None for name, value in pairs.items()}
    source = foreign.write_hugging_face(tmp_path / "in", config, make(config))
    (source / ("spiece.model" if make is foreign.t5 else "tokenizer.json")).write_bytes(
        pieces if make is foreign.t5 else json.dumps(pairs).encode()
    )

    def use(name, value):
        (source / name).write_text(json.dumps(value))
        try:
            run(source, tmp_path / "ours")
            if name != "config.json":
                find_model(str(tmp_path / "ours")).open_text()
        except UserError:
            return "refused"
        finally:
            shutil.rmtree(tmp_path / "ours", ignore_errors=True)
        return "understood"

    for name, value in described.items():
        assert use(name, value) == "understood"
    cases = [(name, value, changed) for name, value in described.items() for *_, changed in mutations(value)]
    if make is foreign.gpt2:
        wholes = (pairs | changed if isinstance(changed, dict) else changed for *_, changed in mutations(small))
        cases += [("tokenizer.json", pairs, whole) for whole in wholes]
    ends = []
    for name, value, changed in cases:
        ends.append(use(name, changed))
        (source / name).write_text(json.dumps(value))
    assert ends.count("refused") > 150 and ends.count("understood") > 50


def test_a_duplicate_key_is_an_error(tmp_path):
    source = foreign.write_hugging_face(tmp_path / "in", GPT2, foreign.gpt2())
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace("{", '{"n_layer": 1,', 1))
    with pytest.raises(UserError, match=r"config.json .*'n_layer'"):
        run(source, tmp_path / "ours")


def test_a_huge_number_of_layers_is_an_error_at_once(tmp_path):
    for config, make, name in ((LLAMA, foreign.llama, "num_hidden_layers"), (T5, foreign.t5, "num_layers")):
        source = foreign.write_hugging_face(tmp_path / name, config | {name: 10**9}, make(config))
        with pytest.raises(UserError, match=r"config.json: .*layers"):
            run(source, tmp_path / "ours")


def test_impossible_destinations_are_errors(tmp_path):
    source = foreign.write_hugging_face(tmp_path / "in", GPT2, foreign.gpt2())
    for destination, message in (
        (source / "ours", "lies inside"),
        (tmp_path / "x" / ".." / "in" / "a" / "b", "lies inside"),
        ("-", "standard output"),
    ):
        with pytest.raises(UserError, match=message):
            run(source, destination)
    assert {path.name for path in source.iterdir()} == {"config.json", "model.safetensors"}
