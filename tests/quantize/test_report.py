"""Text, JSON and page of an outcome; two outcomes beside each other."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from quantize import cli, comparing
from quantize.recipe import Budgets, Data, Recipe, Search
from quantize.report import advice, charts, names, page, saved, svg, text
from quantize.results import Outcome
from quantize.scores import Difference
from tests.quantize.outcomes import STEPS, outcome, variant

VOID = {"meta", "br", "hr", "img", "link"}


class Document(HTMLParser):
    """Elements that are open, texts, and what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.texts: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def read(one: Outcome) -> Document:
    document = Document()
    document.feed(page.page(one))
    assert document.open == []
    return document


def test_the_page_is_whole_asks_nothing_of_a_network_and_runs_no_script() -> None:
    document = read(outcome())
    assert document.fetched == []
    assert not document.seen & {"script", "iframe", "img", "link", "object"}
    assert "@import" not in page.page(outcome()) and "url(" not in page.page(outcome())


def test_the_page_shows_every_variant_reason_note_and_fault() -> None:
    said = " ".join(read(outcome()).texts)
    for part in (
        "int8 on onnxruntime is the fastest that passed",
        "2.50 times as fast",
        "answers are worse: 0.1",
        "openvino does not serve it",
        "computes in f32 <as told>",
        "clipped-ranges",
        "not tried: what nncf could do",
        "Sensitivity by layer",
        "/conv (Conv)",
        "Saturation by tensor",
        "25.00% wrong",
        "a processor",
    ):
        assert part in said, part


def test_names_from_files_cannot_become_markup() -> None:
    evil = msgspec.structs.replace(outcome(), name="<script>alert(1)</script>")
    assert "<script>" not in page.page(evil)


def test_a_page_of_the_float_model_alone_says_that_nothing_passed() -> None:
    whole = outcome()
    kept = tuple(one for one in whole.evaluated if one.name != "int8")
    alone = msgspec.structs.replace(whole, evaluated=kept, activations=(), layers=(), findings=())
    assert not alone.has_gain
    assert "Nothing but the float model passed" in " ".join(read(alone).texts)


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    some = [
        variant("slow", 0.93, 0.2, 1),
        variant("worse", 0.90, 0.3, 1),
        variant("quick", 0.92, 0.1, 1),
    ]
    assert [one.name for one in charts.front(some)] == ["quick", "slow"]


def test_ticks_are_round_and_within() -> None:
    assert svg.ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]
    assert svg.log_ticks(0.09, 6) == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5])


def test_an_outcome_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    saved.write(outcome(), tmp_path / "o.json")
    assert saved.read(tmp_path / "o.json") == outcome()


def test_the_text_tells_faults_and_refusals() -> None:
    said = text.text(outcome())
    assert "wrong with the data:" in said and "clipped-ranges: wrong: ranges" in said
    assert "broken: openvino does not serve it" in said


def refused(*refusals: str, **more: Any) -> Outcome:
    """The outcome of a run in which these variants in integers were refused."""
    lost = Difference(0.0, -0.01, 0.01, 0.0133, 1.0, 0, 0)
    made = [
        variant(
            f"v{number}", 0.93, 0.1, 1, precision="int8", steps=STEPS, refusal=one, against=lost
        )
        for number, one in enumerate(refusals)
    ]
    recipe = Recipe("net", "/a b/net.onnx", Data("/d.npz"), targets=("generic-x86_64",), **more)
    return msgspec.structs.replace(
        outcome(),
        samples=200,
        evaluated=(variant("fp32", 0.93, 0.2, 1), *made),
        recipe=msgspec.to_builtins(recipe),
        layers=(),
    )


def test_where_all_integers_answer_worse_the_next_commands_stand_in_text_and_page() -> None:
    worse = refused("answers are worse: 0.1", "openvino does not serve it")
    for said in (text.text(worse), " ".join(read(worse).texts)):
        assert "edge-quantize sensitivity '/a b/net.onnx' --data /d.npz" in said
        assert (
            "edge-quantize auto '/a b/net.onnx' --data /d.npz --target generic-x86_64 --search 600"
            " -o net.bundle" in said
        )


def test_the_commands_that_are_advised_are_commands() -> None:
    lines = advice.lines(refused("answers are worse: 0.1", budgets=Budgets(drop_max=0.002)))
    for line in lines:
        words = shlex.split(line.partition("edge-quantize ")[2])
        if words:
            given = cli._parser().parse_args(words)
            assert given.drop_max == 0.002 and str(given.model) == "/a b/net.onnx"
    assert sum("edge-quantize" in line for line in lines) == 2


def test_where_one_only_is_not_proven_right_the_number_of_samples_that_would_do_is_said() -> None:
    first = advice.lines(refused("not proven right: so", "answers are worse: 0.1"))[0]
    assert first == "judge with more samples: about 270 would prove v0 right"


def test_a_recipe_that_no_command_can_say_is_told_of_its_search() -> None:
    data = Data("/d.npz", mean=(0.5,))
    odd = msgspec.structs.replace(refused("answers are worse: 0"))
    odd.recipe["data"] = msgspec.to_builtins(data)
    (line,) = [one for one in advice.lines(odd) if "search" in one]
    assert "search: {time_s_max: 600} in the recipe" in line
    assert not any("edge-quantize" in one for one in advice.lines(odd))


def test_nothing_is_advised_where_integers_passed_or_were_searched_for() -> None:
    assert advice.lines(refused("", "answers are worse: 0.1")) == ()
    assert advice.lines(refused("it is not faster: 0.9 times")) == ()
    searched = advice.lines(refused("answers are worse: 0.1", search=Search()))
    assert not any("--search" in one for one in searched)


def test_report_writes_a_page_of_a_kept_outcome(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved.write(outcome(), tmp_path / "o.json")
    assert cli.main(["report", str(tmp_path / "o.json")]) == 0
    assert "refused:" in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path / "o.json"), "-o", str(tmp_path / "o.html")]) == 0
    assert (tmp_path / "o.html").read_text().startswith("<!doctype html>")


def test_report_shows_the_layers_of_a_kept_sensitivity_analysis(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved.write(msgspec.structs.replace(outcome(), layers=()), tmp_path / "o.json")
    model = Path("examples/fashion_mnist/fp32.onnx").resolve()
    rng = np.random.Generator(np.random.PCG64(1))
    np.savez(tmp_path / "data.npz", x=rng.random((90, 1, 28, 28), np.float32))
    assert (
        cli.main(["sensitivity", str(model), "--data", str(tmp_path / "data.npz"), "--json"]) == 0
    )
    (tmp_path / "s.json").write_text(capsys.readouterr().out)
    words = ["report", str(tmp_path / "o.json"), "--sensitivity", str(tmp_path / "s.json")]
    assert cli.main([*words, "-o", str(tmp_path / "o.html")]) == 0
    assert "Sensitivity by layer" in (tmp_path / "o.html").read_text()


def test_a_file_that_is_no_outcome_is_a_usage_error_with_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "o.json").write_text('{"name": 3}')
    assert cli.main(["report", str(tmp_path / "o.json")]) == 2
    assert "--out-json" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "none.json")]) == 3


def test_two_outcomes_are_compared_by_variant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = outcome()
    slower = variant("int8", 0.91, 0.16, 260_000, steps=first.evaluated[1].steps)
    second = msgspec.structs.replace(first, evaluated=(first.evaluated[0], slower))
    pairs, cautions = comparing.outcomes(first, second)
    by_name = {pair.name: pair for pair in pairs}
    assert by_name["int8"].changed and by_name["int8"].speedup == pytest.approx(0.5)
    assert by_name["wrong"].second is None and cautions == []
    for path, one in (("a.json", first), ("b.json", second)):
        saved.write(one, tmp_path / path)
    assert cli.main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    assert "refused -> absent" in capsys.readouterr().out


def test_times_of_different_machines_are_not_compared() -> None:
    other = msgspec.structs.replace(outcome(), machine={"processor": "another"})
    pairs, cautions = comparing.outcomes(outcome(), other)
    assert all(pair.speedup == 0 for pair in pairs)
    assert any("different machines" in caution for caution in cautions)


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (500, True)])
def test_a_browser_draws_the_page_within_its_width(tmp_path: Path, width: int, dark: bool) -> None:
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    path = tmp_path / "page.html"
    # Only in this copy a script measures: the page itself runs none.
    allowed = page.page(outcome()).replace("default-src 'none'; style-src 'unsafe-inline'", "")
    probe = (
        "<script>document.title = document.documentElement.scrollWidth - innerWidth</script></body>"
    )
    path.write_text(allowed.replace("</body>", probe))
    words = [program, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    words += ["--blink-settings=preferredColorScheme=0"] if dark else []
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(words, capture_output=True, timeout=60, check=True, text=True)
    too_wide = int(done.stdout.partition("<title>")[2].partition("<")[0])
    assert too_wide <= 0


def test_a_path_is_shown_by_its_end_and_other_names_whole() -> None:
    assert names.short("a/" + "b" * 60) == "…" + "b" * (names.WIDTH - 1)
    assert names.short("x" * 60) == "x" * 60 and names.short("a/b;c") == "a/b;c"
