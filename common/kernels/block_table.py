"""Block sizes of the flash kernels, written by `python -m benchmarks.attention_blocks`: do not edit."""

LIBTPU, DATE = "0.0.52", "2026-11-29"
"""The compiler whose static schedules decided, and when."""

BLOCKS: dict[tuple[str, int, int], tuple[int, int]] = {  # (chip, head dim, length): (queries, keys)
    ("v5e", 64, 512): (512, 512),
    ("v5e", 64, 1024): (1024, 512),
    ("v5e", 64, 2048): (1024, 512),
    ("v5e", 64, 4096): (1024, 512),
}
