"""`twinstack generate`: text from a trained model, shown while it is made, or written to a file that can be resumed."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO

import jax
from rich.console import Console

from common.config import to_json
from common.errors import UserError, nearest
from common.files import read_rows, split_lines, user_lines, user_rows, write_rows
from common.infer.config import Beam, Greedy, Limits, Method, Sample
from common.infer.generate import Completion, Generator, Request
from common.infer.texts import EncodedPrompt, TextCodec, encode_prompt, tokenizer_of
from common.paths import check_file, is_special
from common.progress import ProgressBars
from common.ranges import Range, Rows, Seed, check_ranges
from common.recipe import Execution
from common.sharding.mesh import make_mesh
from common.sharding.shape import MeshShape
from common.terminal import harmless, marked_up
from experiments.models.finding import FoundModel, find_model, open_found
from experiments.running.jax_setup import set_up_jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """What to generate for each prompt."""

    method: Method
    limits: Limits
    seed: Seed = 0
    samples: Annotated[int, Range(1, 10**6, unit="texts")] = 1
    """Texts for each prompt."""
    rows: Rows = 8
    """Prompts decoded together on each device."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.samples > 1 and not isinstance(self.method, Sample | Beam):
            raise UserError(f"samples is {self.samples}, but greedy decoding makes one text: give a temperature")
        if isinstance(self.method, Beam) and self.samples > self.method.size:
            raise UserError(f"samples is {self.samples}, but there are {self.method.size} beams; nearest: that many")


def generate(
    *,
    model: str,
    prompt: Sequence[str] | None,
    file: Path | None,
    out: Path | None,
    max_new_tokens: int,
    min_new_tokens: int,
    stop: Sequence[str],
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    beams: int | None,
    length_penalty: float | None,
    samples: int,
    seed: int,
    rows: int,
    dtype: str | None,
) -> None:
    request = GenerateRequest(
        method=method_of(temperature=temperature, top_k=top_k, top_p=top_p, beams=beams, length_penalty=length_penalty),
        limits=Limits(max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens, stop=tuple(stop)),
        seed=seed,
        samples=samples,
        rows=rows,
    )
    prompts = prompt or read_prompts(file, sys.stdin)
    generate_texts(model, prompts, request, execution=execution_here(dtype), out=out)


def generate_texts(
    model: str, prompts: Sequence[str], request: GenerateRequest, *, execution: Execution, out: Path | None
) -> None:
    """Prints the text of a single prompt while it is generated; several texts become JSON lines in `out`, or printed.

    `out` has the order of the prompts. Until all are done, finished texts are kept in a file beside it, and the same
    call resumes from there. Raises UserError where `out` holds something else.
    """
    if out is not None:
        check_file(out, "--out")
    set_up_jax()
    progress = ProgressBars(Console(stderr=True))
    many = out is not None or len(prompts) != 1 or request.samples > 1
    found = find_model(model)
    text = found.open_text()
    encoded = [encode_prompt(prompt, text) for prompt in prompts]
    partial = None
    if out is not None and not is_special(out):
        partial = _Partial(out, _settings(found, text, prompts, request, execution), len(prompts) * request.samples)
    if partial is not None and partial.whole:
        progress.console.print(marked_up(f"{out} is whole already"))
        return
    devices = len(jax.devices())
    with progress.console.status("opening the model"):
        loaded = open_found(found, text, execution, make_mesh(MeshShape(data=devices)))
    generator = Generator(
        loaded.model,
        loaded.params,
        loaded.mesh,
        loaded.text,
        method=request.method,
        limits=request.limits,
        rows=request.rows * devices,
        seed=request.seed,
    )
    if not many:
        _show(generator, encoded[0], sys.stdout)
        return
    done = {} if partial is None else partial.done()
    for row in _make(generator, prompts, encoded, request, done, progress):
        done[row["index"]] = row
        if partial is not None:
            partial.add(row)
    rows = [{key: value for key, value in done[i].items() if key != "index"} for i in sorted(done)]
    if partial is not None:
        partial.finish(rows)
    elif out is not None:
        write_rows(out, rows)
    else:
        sys.stdout.writelines(harmless(json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)


def _make(
    generator: Generator,
    prompts: Sequence[str],
    encoded: Sequence[EncodedPrompt],
    request: GenerateRequest,
    done: dict[int, Any],
    progress: ProgressBars,
) -> Iterable[dict[str, Any]]:
    """Rows as they are finished; a row's index counts the samples of all prompts before it."""
    drawn = request.samples if isinstance(request.method, Sample) else 1
    kept = request.samples // drawn
    wanted = [
        (prompt, sample)
        for prompt in range(len(prompts))
        for sample in range(drawn)
        if any(prompt * request.samples + sample + place not in done for place in range(kept))
    ]
    requests = [Request(prompt=encoded[prompt], sample=sample) for prompt, sample in wanted]
    with progress.bar("generating", len(requests)) as advance:
        for i, completions in generator.complete(requests):
            prompt, sample = wanted[i]
            for place, completion in enumerate(completions[:kept]):
                yield {"index": prompt * request.samples + sample + place, **_row(prompts[prompt], completion)}
            advance(1)


def _row(prompt: str, completion: Completion) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": completion.text,
        "tokens": completion.tokens,
        "finish": completion.finish,
        "log_probability": completion.log_probability,
        "score": completion.score,
    }


def _show(generator: Generator, prompt: EncodedPrompt, stdout: TextIO) -> None:
    """Into a terminal piece by piece and made harmless; elsewhere as it is."""
    terminal = stdout.isatty()
    shown = ""

    def hear(_: int, piece: str) -> None:
        nonlocal shown
        shown += piece
        stdout.write(harmless(piece) if terminal else piece)
        stdout.flush()

    [(_, completions)] = generator.complete([Request(prompt=prompt)], hear)
    if not shown:  # beam search has nothing to show before its end
        hear(0, completions[0].text)
    stdout.write("\n")


def method_of(
    *,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    beams: int | None,
    length_penalty: float | None,
) -> Method:
    """What options ask for: greedy unless something is said. Raises UserError for options that exclude each other."""
    drawing = [
        name for name, given in (("temperature", temperature), ("top-k", top_k), ("top-p", top_p)) if given is not None
    ]
    if beams is not None:
        if drawing:
            raise UserError(f"beam search draws nothing: give --beams or --{drawing[0]}, not both")
        return Beam(size=beams) if length_penalty is None else Beam(size=beams, length_penalty=length_penalty)
    if length_penalty is not None:
        raise UserError("--length-penalty is beam search's: give --beams too")
    if temperature == 0 or (temperature is None and top_k is None and top_p is None):
        if top_k is not None or top_p is not None:
            raise UserError("temperature 0 is greedy decoding, which has no use for --top-k and --top-p")
        return Greedy()
    return Sample(
        temperature=1.0 if temperature is None else temperature, top_k=top_k, top_p=1.0 if top_p is None else top_p
    )


def execution_here(dtype: str | None) -> Execution:
    """Of this machine: on CPU unrolled layers, which are quicker there, and float32."""
    on_cpu = jax.default_backend() == "cpu"
    dtype = dtype or ("float32" if on_cpu else "bfloat16")
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {dtype}: {nearest(dtype, ('float32', 'bfloat16'))}")
    return Execution(dtype=dtype, scan_layers=not on_cpu)  # type: ignore[arg-type]


def read_prompts(path: Path | None, stdin: TextIO) -> list[str]:
    """One prompt a line, of a file or standard input; of a file of JSON lines, each one's `prompt`.

    Raises UserError for a file that cannot be read, or has no prompt where one is due.
    """
    if path is None:
        try:
            return split_lines(stdin.read())
        except UnicodeDecodeError as error:
            raise UserError(f"the prompts on standard input cannot be read ({error})") from None
    if path.suffix != ".jsonl":
        return user_lines(path)
    rows = user_rows(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("prompt"), str):
            raise UserError(f"{path}, line {number}: no text named prompt")
    return [row["prompt"] for row in rows]


def _settings(
    found: FoundModel, codec: TextCodec, prompts: Sequence[str], request: GenerateRequest, execution: Execution
) -> str:
    """Changes with whatever changes the texts, beyond rounding."""
    described = {
        "model": to_json(found.config),
        "parameters": found.parameters.content(),
        "text": [to_json(codec.conventions), codec.add_bos, tokenizer_of(codec).content_hash],
        "prompts": list(prompts),
        "job": to_json(dataclasses.replace(request, rows=1)),
        "precision": [execution.dtype, execution.matmul_precision],
    }
    return hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=8).hexdigest()


class _Partial:
    """An output file, and beside it, until that is whole, what has been made so far in whatever order."""

    def __init__(self, out: Path, settings: str, count: int):
        self._out, self._settings = out, settings
        self._path = out.with_name(f"{out.name}.partial")
        found = read_rows(out)
        if found and (len(found) != count or any(row.get("settings") != settings for row in found)):
            raise UserError(f"{out} exists and is not of this model, these prompts and these options: remove it")
        self.whole = bool(found)

    def done(self) -> dict[int, Any]:
        """Rows by index; what is added later is appended to these."""
        rows = read_rows(self._path)
        if any(row.get("settings") != self._settings for row in rows):
            raise UserError(f"{self._path} is of another model, other prompts or other options: remove it")
        write_rows(self._path, rows)  # without the half line that a killed writer may have left
        return {row["index"]: row for row in rows}

    def add(self, row: dict[str, Any]) -> None:
        row["settings"] = self._settings
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def finish(self, rows: list[dict[str, Any]]) -> None:
        write_rows(self._out, rows)
        self._path.unlink(missing_ok=True)
