"""`twinstack generate`: text from a trained model, shown while it is made, or written to a file that can be resumed."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from common.config import to_json
from common.errors import UserError
from common.files import split_lines, user_lines, user_rows, write_rows
from common.infer.config import Beam, GenerationConfig, Greedy, Limits, Method, Sample
from common.infer.generate import Completion, Request
from common.infer.policy import Policy
from common.infer.texts import EncodedPrompt, TextCodec, encode_prompt, tokenizer_of
from common.paths import check_file, is_special
from common.progress import ProgressBars
from common.recipe import Dtype, Execution
from common.terminal import harmless, marked_up
from experiments.cli.resumable import ResumableOutput
from experiments.models.finding import FoundModel, find_model, open_found
from experiments.models.loading import execution_here, mesh_here
from experiments.running.jax_setup import set_up_jax


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
    dtype: Dtype | None,
) -> None:
    request = GenerationConfig(
        method=method_of(temperature=temperature, top_k=top_k, top_p=top_p, beams=beams, length_penalty=length_penalty),
        limits=Limits(max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens, stop=tuple(stop)),
        seed=seed,
        samples=samples,
        rows=rows,
    )
    prompts = prompt or read_prompts(file, sys.stdin)
    generate_texts(model, prompts, request, execution=execution_here(dtype), out=out)


def generate_texts(
    model: str, prompts: Sequence[str], request: GenerationConfig, *, execution: Execution, out: Path | None
) -> None:
    """Streams a single text to standard output; writes several as JSON lines, there or in `out`.

    Lines have the order of the prompts. With `out`, the same call resumes what a killed call has left (see
    `ResumableOutput`). Raises UserError where `out` contains something else.
    """
    if out is not None:
        check_file(out, "--out")
    set_up_jax()
    progress = ProgressBars(Console(stderr=True))
    many = out is not None or len(prompts) != 1 or request.samples > 1
    found = find_model(model)
    text = found.open_text()
    encoded = [encode_prompt(prompt, text) for prompt in prompts]
    output = None
    if out is not None and not is_special(out):
        settings = _settings_hash(found, text, prompts, request, execution)
        output = ResumableOutput(out, settings, len(prompts) * request.samples)
    if output is not None and output.complete:
        progress.console.print(marked_up(f"{out} is complete already"))
        return
    with progress.console.status("opening the model"):
        policy = open_found(found, text, execution, mesh_here())
    if not many:
        _stream(policy, encoded[0], request, sys.stdout)
        return
    done = {} if output is None else output.finished_rows()
    for row in _generate_rows(policy, prompts, encoded, request, done, progress):
        done[row["index"]] = row
        if output is not None:
            output.add(row)
    rows = [{key: value for key, value in done[i].items() if key != "index"} for i in sorted(done)]
    if output is not None:
        output.finish(rows)
    elif out is not None:
        write_rows(out, rows)
    else:
        sys.stdout.writelines(harmless(json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)


def _generate_rows(
    policy: Policy,
    prompts: Sequence[str],
    encoded: Sequence[EncodedPrompt],
    request: GenerationConfig,
    done: dict[int, Any],
    progress: ProgressBars,
) -> Iterable[dict[str, Any]]:
    """Yields rows as they are finished, without those in `done`.

    A row's index is `prompt * request.samples + sample`. Sampling decodes every sample on its own; beam search decodes
    a prompt once and returns its samples together.
    """
    per_decoding = request.samples // request.decodings
    wanted = [
        (prompt, sample)
        for prompt in range(len(prompts))
        for sample in range(request.decodings)
        if any(prompt * request.samples + sample + place not in done for place in range(per_decoding))
    ]
    requests = [Request(prompt=encoded[prompt], sample=sample) for prompt, sample in wanted]
    with progress.bar("generating", len(requests)) as advance:
        for i, completions in policy.complete(requests, request):
            prompt, sample = wanted[i]
            for place, completion in enumerate(completions):
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


def _stream(policy: Policy, prompt: EncodedPrompt, request: GenerationConfig, stdout: TextIO) -> None:
    """Writes the text piece by piece; in a terminal, control characters are escaped."""
    terminal = stdout.isatty()
    empty = True

    def write(_: int, piece: str) -> None:
        nonlocal empty
        empty = empty and not piece
        stdout.write(harmless(piece) if terminal else piece)
        stdout.flush()

    [(_, completions)] = policy.complete([Request(prompt=prompt)], request, write)
    if empty:  # beam search streams nothing
        write(0, completions[0].text)
    stdout.write("\n")


def method_of(
    *,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    beams: int | None,
    length_penalty: float | None,
) -> Method:
    """Returns the decoding method of the options, by default greedy.

    Raises UserError for options that exclude each other.
    """
    sampling = [
        name for name, given in (("temperature", temperature), ("top-k", top_k), ("top-p", top_p)) if given is not None
    ]
    if beams is not None:
        if sampling:
            raise UserError(f"beam search does not sample: give --beams or --{sampling[0]}, not both")
        return Beam(size=beams) if length_penalty is None else Beam(size=beams, length_penalty=length_penalty)
    if length_penalty is not None:
        raise UserError("--length-penalty is for beam search: give --beams too")
    if temperature == 0 or (temperature is None and top_k is None and top_p is None):
        if top_k is not None or top_p is not None:
            raise UserError("temperature 0 is greedy decoding, which does not use --top-k and --top-p")
        return Greedy()
    return Sample(
        temperature=1.0 if temperature is None else temperature, top_k=top_k, top_p=1.0 if top_p is None else top_p
    )


def read_prompts(path: Path | None, stdin: TextIO) -> list[str]:
    """Reads one prompt per line, from a file or standard input; from a .jsonl file, the field `prompt` of each line.

    Raises UserError for a file that cannot be read, and for a line without a prompt.
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


def _settings_hash(
    found: FoundModel, codec: TextCodec, prompts: Sequence[str], request: GenerationConfig, execution: Execution
) -> str:
    """Returns a hash of everything that the texts depend on, apart from rounding."""
    described = {
        "model": to_json(found.config),
        "parameters": found.parameters.content(),
        "text": [to_json(codec.conventions), codec.add_bos, tokenizer_of(codec).content_hash],
        "prompts": list(prompts),
        "job": to_json(dataclasses.replace(request, rows=1)),
        "precision": [execution.dtype, execution.matmul_precision],
    }
    return hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=8).hexdigest()
