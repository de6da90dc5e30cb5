"""What to do next where nothing in integers passed for its answers.

Law of this file: pure; an outcome in, lines for people out. A command is whole: it can be copied.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

import msgspec

from quantize import verdict
from quantize.recipe import Data, Recipe
from quantize.results import Evaluated, Outcome
from quantize.scores import Difference

INTEGERS = ("int8", "int4")
LAYERED = (".onnx", ".tflite")  # what `sensitivity` reads
SEARCH_S = 600  # of a search of a network for small devices


def lines(outcome: Outcome) -> tuple[str, ...]:
    """Nothing where a variant in integers is shipped, or none was refused for its answers."""
    made = [one for one in outcome.evaluated if one.steps and one.precision in INTEGERS]
    wrong = [one for one in made if one.refusal.startswith((verdict.WORSE, verdict.UNPROVEN))]
    if not wrong or not all(one.refusal for one in made):
        return ()
    return (*_samples(outcome, wrong), *_commands(outcome))


def _samples(outcome: Outcome, wrong: Sequence[Evaluated]) -> Iterator[str]:
    """Of the variant that needs the fewest more."""
    needed = [
        (count, one.name)
        for one in wrong
        if one.against and (count := _enough(one.against, outcome))
    ]
    if needed:
        count, name = min(needed)
        yield f"judge with more samples: about {count} would prove {name} right"


def _enough(lost: Difference, outcome: Outcome) -> int:
    return verdict.enough(lost, outcome.samples, outcome.drop_max, outcome.confidence)


def _commands(outcome: Outcome) -> Iterator[str]:
    """Of the search where there was none, and of `sensitivity`."""
    try:
        recipe = msgspec.convert(outcome.recipe, Recipe)
    except msgspec.ValidationError:
        return  # an outcome of another version
    source = recipe.origin.source if recipe.origin else recipe.source
    plain = _is_plain(recipe)
    if plain and source.endswith(LAYERED) and not outcome.layers:
        shown = _command("sensitivity", source, recipe, {})
        yield f"see which layers suffer, and leave them float: {shown}"
    if recipe.search is None:
        seconds = f"search: {{time_s_max: {SEARCH_S}}} in the recipe"
        if plain:
            more = {"--target": " ".join(recipe.targets[:1]), "--search": str(SEARCH_S)}
            more["-o"] = f"{recipe.name}.bundle"
            seconds = _command("auto", source, recipe, more)
        yield f"let a search find what stays float: {seconds}"


def _is_plain(recipe: Recipe) -> bool:
    """Whether a command can say what the recipe does of data and metric."""
    known, data = Data(recipe.data.path), recipe.data
    same = ("width", "height", "mean", "std")
    return recipe.evaluation.metric != "callable" and all(
        getattr(known, name) == getattr(data, name) for name in same
    )


def _command(verb: str, source: str, recipe: Recipe, more: dict[str, str]) -> str:
    drop, metric = recipe.budgets.drop_max, recipe.evaluation.metric
    said = {
        "--data": recipe.data.path,
        "--calibration": recipe.data.calibration,
        "--drop-max": "" if drop is None else f"{drop:g}",
        "--metric": metric if verb == "auto" and metric != "auto" else "",
        **more,
    }
    pairs = [word for name, value in said.items() if value for word in (name, value)]
    return shlex.join(["edge-quantize", verb, source, *pairs])
