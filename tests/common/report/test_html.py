"""The report page is complete and self-contained, escapes all texts, and has the same bytes when written again."""

import html.parser
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.report.examples import PairedExample
from common.report.html import write_report
from common.report.samples import choose, mark_difference
from tests.common.report.conftest import listed

Files = dict[str, Any]
EARLIER = Path(__file__).parents[2] / "data/run_schema_1"
EVIL = "<script>alert(1)</script>&\"' $x^2$ {{ 7*7 }} -->]]>"


class Page(html.parser.HTMLParser):
    """Collects a page's tags, ids and links."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for key, value in attrs:
            if key == "id":
                self.ids[value or ""] += 1
            elif key in ("src", "href", "xlink:href", "data", "action", "srcset"):
                self.links.append(value or "")
            assert not key.startswith("on"), (tag, key)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(path: Path) -> tuple[str, Page]:
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_page_is_complete_and_loads_nothing(write_run: Callable[..., Path]) -> None:
    run = write_run()
    path = write_report(run)
    assert path == run / "report.html" and {p.name for p in run.iterdir()} == {
        *("study.json", "runs.json", "report.html", "enc-dec", "dec-only")
    }
    text, page = read(path)
    assert page.open == [] and page.tags["svg"] == 3 + 2
    assert not {"script", "link", "img", "iframe", "object", "base", "style"} & (set(page.tags) - {"style"})
    assert page.tags["style"] == 1
    assert all(link.startswith("#") for link in page.links)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text)) and "@import" not in text
    assert max(page.ids.values()) == 1 and {link[1:] for link in page.links} <= set(page.ids)
    assert {t[1:] for t in re.findall(r"url\(([^)]*)\)", text)} <= set(page.ids)
    for part in (
        *("first light", "What does the structure", "Parity certificate", "every check agrees", "Side by side"),
        *("trained once", "unseen names", "time ranges (240)", "model.d_ff", "0.10.2", "0123abc", "Xeon", "4.10e14"),
    ):
        assert part in page.text, part


def test_importing_reports_and_metrics_loads_no_heavy_library() -> None:
    names = "common.report.html, common.evals.text_metrics, common.analysis.statistics"
    heavy = {"matplotlib", "jinja2", "sacrebleu", "scipy.stats", "rich", "jax"}
    program = f"import sys, {names}; print(*({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_same_files_same_bytes(write_run: Callable[..., Path]) -> None:
    run = write_run()
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_all_texts_are_escaped(write_run: Callable[..., Path]) -> None:
    def plant(files: Files) -> None:
        files["study.json"] |= {"name": EVIL, "question": EVIL, EVIL: EVIL}
        arm = 'b" onload=alert(1) <b>'
        files["runs.json"]["runs"][1] = listed(arm)
        for name in [name for name in files if name.startswith("dec-only/")]:
            files[name.replace("dec-only", arm)] = files.pop(name)
        files[f"{arm}/result.json"]["arm"] = arm
        files[f"{arm}/config.json"]["model"][EVIL] = EVIL
        files[f"{arm}/environment.json"]["cpu"] = EVIL
        for name in ("enc-dec", arm):
            files[f"{name}/samples.jsonl"][0] |= {"inputs": EVIL, "target": EVIL, "prediction": EVIL + "!"}
            files[f"{name}/samples.jsonl"][0] |= {"group": EVIL, "correct": False}
            for score in files[f"{name}/result.json"]["scores"]:
                score["group"] = EVIL if score["group"] == "dates" else score["group"]
                score["split"] = EVIL if score["split"] == "unseen names" else score["split"]

    text, page = read(write_report(write_run(plant)))
    assert page.open == [] and page.tags["script"] == 0 and page.tags["b"] == 0
    assert page.text.count(EVIL) >= 10, "shown literally in tables, samples and drawings"
    assert "<script" not in text and "49" not in re.findall(r"<title>(.*?)</title>", text)[0]


def test_a_differing_certificate_is_red_and_stated_before_the_verdicts(write_run: Callable[..., Path]) -> None:
    def differ(files: Files) -> None:
        files["dec-only/environment.json"]["tokenizer_hash"] = "beef"

    text, page = read(write_report(write_run(differ)))
    assert "certificate differ" in text and "certificate agree" not in text
    assert page.text.index("The arms were not treated the same") < page.text.index("Exact match, validation")
    assert "1 of 7 checks DIFFER" in page.text
    agreeing, _ = read(write_report(write_run()))
    assert "certificate agree" in agreeing and "not treated the same" not in agreeing


def test_a_partly_checked_certificate_is_neither_green_nor_red(write_run: Callable[..., Path]) -> None:
    def uncount(files: Files) -> None:
        files["dec-only/result.json"] |= {"xla_flops_per_step": None, "why_not_counted": "XlaError: <no> bound"}
        files["dec-only/result.json"] |= {"input_fill": None}

    text, page = read(write_report(write_run(uncount)))
    assert not any(words in text for words in ("certificate agree", "certificate differ", "not treated the same"))
    assert "no check differs, 1 could not be made" in page.text
    assert "dec-only not counted (XlaError: <no> bound)" in page.text and "no slots / 88.0 %" in page.text


def test_differing_fields_are_bold_and_come_first(write_run: Callable[..., Path]) -> None:
    text, _ = read(write_report(write_run()))
    bold = re.findall(r'<tr class="differs"><th scope="row"><code>(.*?)</code>', text)
    assert bold == ["model.kind", "model.d_ff"]
    assert text.index("model.d_ff</code>") < text.index("model.d_model</code>")


def test_errors_come_before_successes(write_run: Callable[..., Path]) -> None:
    _, page = read(write_report(write_run()))
    samples = page.text[page.text.index("Samples") : page.text.index("Configs")]
    errors, successes = samples.split("Right in every arm")
    assert errors.count("✘") >= 24 and "✘" not in successes and successes.count("✔") == 16


def test_language_model_arms_without_decoded_text(write_run: Callable[..., Path]) -> None:
    def undecoded(files: Files) -> None:
        for arm in ("enc-dec", "dec-only"):
            files[f"{arm}/result.json"]["scores"], files[f"{arm}/samples.jsonl"] = [], []

    _, page = read(write_report(write_run(undecoded)))
    assert page.tags["svg"] == 3 and "Samples" not in page.text and "validation loss, nats per token" in page.text


def test_a_lone_arm_and_a_non_finite_loss_are_drawn(write_run: Callable[..., Path]) -> None:
    def lone(files: Files) -> None:
        del files["runs.json"]["runs"][1]
        files["enc-dec/metrics.jsonl"][5]["loss"] = float("nan")
        files["enc-dec/metrics.jsonl"][7]["validation_loss"] = float("inf")
        del files["enc-dec/timings.jsonl"][:40]

    _, page = read(write_report(write_run(lone)))
    assert page.tags["svg"] == 5 and "dec-only" not in page.text and "nan" not in page.text


def breaking(name: str, text: str | None) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        (run / name).unlink() if text is None else (run / name).write_text(text, encoding="utf-8")

    return damage


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("study.json", None, "study.json is missing"),
        ("study.json", '{"schema_version": 2}', "has run schema 2, this version reads 1"),
        ("study.json", '{"parity": [{"data": "some"}]}', "study.json parity: 0.data: Input should be 'batches'"),
        ("study.json", "[1]", "JSON object"),
        ("runs.json", None, "runs.json is missing"),
        ("runs.json", '{"runs": [{"name": "x"}], "complete": true}', "runs.0.arm: Field required"),
        ("enc-dec/metrics.jsonl", None, "repeat its command"),
        ("enc-dec/result.json", '{"arm": "enc-dec"}', "parameters: Field required"),
        ("runs.json", "{", "delete it and repeat"),
        ("enc-dec/config.json", "{", "enc-dec and repeat the run's command"),
        ("dec-only/metrics.jsonl", '{"step": 1, "loss": 2.0', "metrics.jsonl line 1"),
        ("dec-only/metrics.jsonl", '\n{"step": 1}', "metrics.jsonl line 2: tokens"),
        ("dec-only/samples.jsonl", '{"split": 3}', "samples.jsonl line 1: split"),
        ("dec-only/environment.json", None, "environment.json is missing"),
    ],
)
def test_errors_name_a_missing_or_broken_file(
    write_run: Callable[..., Path], name: str, text: str | None, message: str
) -> None:
    run = write_run()
    breaking(name, text)(run)
    with pytest.raises(UserError) as error:
        write_report(run)
    assert message in str(error.value) and name in str(error.value) and "\n" not in str(error.value)
    assert not (run / "report.html").exists()


def test_a_run_with_one_arm_has_a_report(write_run: Callable[..., Path]) -> None:
    """The report covers that arm and names the missing one."""
    run = write_run()
    shutil.rmtree(run / "enc-dec")
    _, page = read(write_report(run))
    assert "Not in this report, because they have no result: enc-dec." in page.text and "BLEU" in page.text
    assert "only one arm" in page.text and "points [" not in page.text
    (run / "dec-only" / "result.json").unlink()
    with pytest.raises(UserError, match="has no finished run"):
        write_report(run)


def test_a_directory_of_an_earlier_version_has_a_report(tmp_path: Path) -> None:
    shutil.copytree(EARLIER, tmp_path / "run")
    _, page = read(write_report(tmp_path / "run"))
    assert "Who reverses words?" in page.text and "only one arm: nothing to compare" in page.text
    for content, message in (('{"name": "x"}', 'has no "arms"'), ('{"arms": {"../gpt": {}}}', "outside its folder")):
        (tmp_path / "run" / "experiment.json").write_text(content)
        with pytest.raises(UserError, match=message):
            write_report(tmp_path / "run")


def test_a_failed_report_leaves_the_old_one(write_run: Callable[..., Path]) -> None:
    run = write_run()
    old = write_report(run).read_bytes()
    (run / "enc-dec" / "result.json").write_text(json.dumps({}))
    with pytest.raises(UserError):
        write_report(run)
    assert (run / "report.html").read_bytes() == old and len(list(run.iterdir())) == 5


def test_unusual_line_separators_do_not_split_json_lines(write_run: Callable[..., Path]) -> None:
    def plant(files: Files) -> None:
        files["enc-dec/samples.jsonl"][0]["prediction"] = "a\u2028b\x85c"

    write_report(write_run(plant))


@pytest.mark.parametrize(
    ("target", "prediction", "marked"),
    [
        ("same <b>", "same <b>", "same &lt;b&gt;"),
        ("1. Mai", "1. März", "1. <del>März</del><ins>Mai</ins>"),
        ("5\u00a0€", "5 €", "5<del>⟨space⟩</del><ins>⟨no-break space⟩</ins>€"),
        ("", "<i>", "<del>&lt;i&gt;</del>"),
        ("a & b", "", "<ins>a &amp; b</ins>"),
        ("x", "%s %(y)d", "<del>%s %(y)d</del><ins>x</ins>"),
    ],
)
def test_marked_difference(target: str, prediction: str, marked: str) -> None:
    assert mark_difference(target, prediction) == marked


def test_samples_take_turns_by_kind() -> None:
    examples = [
        PairedExample(split="v", group=group, inputs=f"{group}{i}", target="", answers=())
        for group, n in (("a", 5), ("b", 1), ("c", 2))
        for i in range(n)
    ]
    assert [e.inputs for e in choose(examples, 6)] == ["a0", "b0", "c0", "a1", "c1", "a2"]
    assert len(choose(examples, 100)) == 8
