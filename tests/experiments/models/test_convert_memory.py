"""Conversions stream: their memory does not grow with the checkpoint."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.common.weights import foreign
from tests.common.weights.foreign import LLAMA

MEASURE = """
import sys
from pathlib import Path
from rich.console import Console
from common.progress import ProgressBars
from experiments.models.convert import convert

def peak():
    # Not getrusage: its peak includes that of the parent process.
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

before = peak()
convert(Path(sys.argv[1]), Path(sys.argv[2]), ProgressBars(Console()), to=sys.argv[3] or None)
print(peak() - before, file=sys.stderr)
"""


def peak_bytes(source, destination, to=""):
    """Converts in a new process; returns its peak memory, without that of its imports."""
    command = [sys.executable, "-c", MEASURE, str(source), str(destination), to]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return int(done.stderr.split()[-1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.slow
def test_memory_stays_far_below_the_checkpoints_size(tmp_path):
    config = LLAMA | {"vocab_size": 100_000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4}
    config |= {"num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64}
    source = foreign.write_hugging_face(tmp_path / "in", config, foreign.llama(config), shards=2)
    total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    largest = 100_000 * 768 * 4
    assert total > 7e8
    for begin, end, to in (("in", "ours", ""), ("ours", "out", "hf"), ("ours", "other", "t5like")):
        # The documented bound is 2 * largest + 2**30; this tighter one distinguishes streaming from loading.
        assert peak_bytes(tmp_path / begin, tmp_path / end, to) < 2 * largest < total
    assert digest(source) == digest(tmp_path / "out")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.slow
def test_memory_with_stacked_t5x(tmp_path):
    """A stacked array is read whole, but only one at a time."""
    tensors = foreign.scanned(foreign.t5x(vocab=1000, d=512, heads=8, size=64, f=16384, tied=True, gated=True))
    source = foreign.write_t5x(tmp_path / "in", tensors, chunk=512)
    largest, total = 3 * 512 * 16384 * 4, sum(value.nbytes for value in tensors.values())
    assert peak_bytes(source, tmp_path / "ours") < 2 * largest + 2**27 < total


def digest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
