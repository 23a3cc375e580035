"""The runs: sizes, recipes with their small grids, and the matrix of runs by importance."""

import dataclasses
import fractions
from typing import Any, NamedTuple

import jaxsparse as js

TUNING_SEED = 100  # not among the seeds of the tables
TUNED_AT = "1:16"  # the pattern at which every recipe is tuned
LENGTH = 3000  # the steps that settings given in steps are meant for


@dataclasses.dataclass(frozen=True)
class Scale:
    """The sizes of everything.

    Attributes:
      width, depth, heads, context, batch: the sizes of the language model.
      images: the batch size for the digits.
      digits: the width of the models for digits.
      steps: the training steps of a run.
      validated: the largest number of windows or images to validate on.
      seeds: the seeds of the tables.
      together: whether seeds run under `jax.vmap`.
      rates: for each task, the learning rates among which the dense model chooses.
      tuned: the recipes that are tuned.
    """

    width: int
    depth: int
    heads: int
    context: int
    batch: int
    images: int
    digits: int
    steps: int
    validated: int
    seeds: tuple[int, ...]
    together: bool
    rates: tuple[tuple[str, tuple[float, ...]], ...]
    tuned: tuple[str, ...]


class Recipe(NamedTuple):
    """A recipe of the library, its fixed arguments, and the argument that is tuned.

    The argument has three values, of which the middle one is the start. `unit` is the unit of the
    value: "steps" are stretched for runs longer than `LENGTH`, "per step" is divided likewise, a
    "fraction" becomes steps, None is left alone.
    """

    function: str
    arguments: dict[str, Any] = {}  # noqa: RUF012
    tuned: str = ""
    grid: tuple[float, ...] = ()
    unit: str | None = None


DENSE_START = 0.05
FINE_TUNE = (0.15, 0.25, 0.4)
RECIPES = {
    "no exploitation": Recipe("explore_exploit", {"reset_every": None}),
    "RESET": Recipe("explore_exploit", {}, "reset_every", (30, 100, 300), "steps"),
    "FIX": Recipe(
        "explore_exploit", {"reset_every": None}, "fix_after", (0.1, 0.25, 0.5), "fraction"
    ),
    "REGULARIZE": Recipe(
        "explore_exploit", {"reset_every": None}, "weight_decay", (2e-3, 2e-2, 2e-1), "per step"
    ),
    "SR-STE": Recipe("sr_ste", {}, "weight_decay", (2e-4, 2e-3, 2e-2)),
    "SR-STE, dense start": Recipe(
        "sr_ste", {"dense_until": DENSE_START}, "weight_decay", (2e-4, 2e-3, 2e-2)
    ),
    "MDGF linear": Recipe(
        "mdgf", {"curve": "linear", "gradient": "masked"}, "fine_tune_from", FINE_TUNE
    ),
    "MDGF exponential": Recipe(
        "mdgf", {"curve": "exponential", "gradient": "masked"}, "fine_tune_from", FINE_TUNE
    ),
    "MDGF linear, straight-through": Recipe(
        "mdgf", {"curve": "linear", "gradient": "dense"}, "fine_tune_from", FINE_TUNE
    ),
    "MDGF exponential, straight-through": Recipe(
        "mdgf", {"curve": "exponential", "gradient": "dense"}, "fine_tune_from", FINE_TUNE
    ),
    "SDGF stepwise": Recipe("sdgf", {"stages": "stepwise"}, "fine_tune_from", FINE_TUNE),
    "SDGF geometric": Recipe("sdgf", {"stages": "geometric"}, "fine_tune_from", FINE_TUNE),
    "static": Recipe("static", {}, "dense_for", (0.1, 0.25, 0.5)),
    "fixed initial mask": Recipe("static"),
}
DECAYING = (
    *(
        "MDGF exponential",
        "MDGF linear",
        "MDGF exponential, straight-through",
        "MDGF linear, straight-through",
    ),
    *("SDGF stepwise", "SDGF geometric"),
)
WITHOUT_PLAN = ("dense", "SMALL")


LEARNING = (
    ("characters", (2.5e-3, 5e-3, 1e-2, 2e-2)),
    ("transformer", (3e-3, 1e-2, 3e-2)),
    ("convolutions", (1e-2, 3e-2, 1e-1)),
)
CPU = Scale(
    64, 2, 4, 64, 16, 64, 32, LENGTH, 2048, (0, 1, 2, 3, 4), False, LEARNING, tuple(RECIPES)
)
GPU = Scale(
    256,
    4,
    8,
    128,
    32,
    64,
    32,
    10_000,
    4096,
    (0, 1, 2, 3, 4),
    True,
    (("characters", (5e-4, 1e-3, 2e-3)),),
    (),
)


def tiny(scale):
    """A scale with small sizes and nothing to tune."""
    sizes = {
        "width": 32,
        "depth": 1,
        "heads": 2,
        "context": 16,
        "batch": 2,
        "images": 4,
        "steps": 32,
        "validated": 64,
        "seeds": (0, 1),
    }
    return dataclasses.replace(
        scale, **sizes, rates=tuple((task, (5e-3,)) for task, _ in scale.rates), tuned=()
    )


@dataclasses.dataclass(frozen=True)
class Cell:
    """One entry of a table: all settings of a run except its seed.

    Attributes:
      task: "characters", "transformer" or "convolutions".
      width: the width of the model.
      steps: the number of training steps.
      rate: the peak learning rate.
      pattern: a name that `as_pattern` reads.
      recipe: one of `RECIPES`, "dense", or "SMALL": dense with the hidden width cut to the density
        of the pattern.
      options: the arguments of the recipe.
      watched: whether weights and variances are recorded during training.
    """

    task: str
    width: int
    steps: int
    rate: float
    pattern: str
    recipe: str
    options: tuple[tuple[str, Any], ...] = ()
    watched: bool = False


def density(pattern):
    """The density of a pattern, from its name."""
    last = pattern.split()[-1]
    return 1.0 if last == "dense" else float(fractions.Fraction(last.replace(":", "/")))


def as_pattern(name):
    """Reads "2:4", "transposable 2:4", "unstructured 1/16" and "block 4x4 1/16"."""
    kind, *rest = name.split()
    if kind == "transposable":
        return js.TransposableNM(*map(int, rest[0].split(":")))
    if kind == "unstructured":
        return js.Unstructured(density(name))
    if kind == "block":
        return js.Block(tuple(map(int, rest[0].split("x"))), density(name))
    return name


WATCHED = [
    ("dense", "dense"),
    *(
        (TUNED_AT, r)
        for r in ("SR-STE", "SR-STE, dense start", "MDGF linear", "MDGF exponential", "RESET")
    ),
]


@dataclasses.dataclass(frozen=True)
class Cells:
    """Makes the cells of a scale with the tuned rates and settings: `cells("2:4", "RESET")`."""

    scale: Scale
    settings: dict[str, float]

    def __call__(
        self,
        pattern,
        recipe,
        task="characters",
        *,
        setting=None,
        rate=None,
        width=None,
        steps=None,
        **changes,
    ):
        """The cell of a pattern and a recipe.

        Args:
          pattern: the name of the pattern.
          recipe: the name of the recipe.
          task: the name of the task.
          setting: the value of the tuned argument; None for the tuned one.
          rate: the learning rate; None for the tuned one.
          width: the width of the model; None for that of the scale.
          steps: the number of training steps; None for that of the scale.
          **changes: other arguments of the recipe.
        """
        usual = (
            task == "characters"
            and not changes
            and all(one is None for one in (setting, rate, width, steps))
        )
        width = width or (self.scale.width if task == "characters" else self.scale.digits)
        steps = steps or self.scale.steps
        options = {}
        if recipe in RECIPES:
            _, arguments, tuned, _, unit = RECIPES[recipe]
            options = {**arguments}
            if tuned:
                options[tuned] = _in_steps(setting or self.settings[recipe], unit, steps)
            options |= changes
            if options.get("stages") == "geometric":
                options["k"] = _longest(width, pattern)
        watched = usual and (pattern, recipe) in WATCHED
        return Cell(
            task,
            width,
            steps,
            rate or self.settings[task],
            pattern,
            recipe,
            tuple(sorted(options.items())),
            watched,
        )


def _in_steps(value, unit, steps):
    stretched = max(1, steps / LENGTH)
    match unit:
        case "steps":
            return round(value * stretched)
        case "per step":
            return value / stretched
        case "fraction":
            return round(value * steps)
    return value


def _longest(width, pattern):
    """The largest k of SDGF-Geometric that the narrowest layer allows, up to 16 as in the paper."""
    m = int(pattern.split(":")[1])
    return min(16, width // m)


def tuning(cells):
    """The tuning runs: the rates of the dense models, then three settings of every recipe.

    The settings are tuned at one pattern, with the best rates.
    """
    rates = {
        task: [cells("dense", "dense", task, rate=rate) for rate in grid]
        for task, grid in cells.scale.rates
    }
    settings = {
        name: [cells(TUNED_AT, name, setting=setting) for setting in RECIPES[name].grid]
        for name in cells.scale.tuned
    }
    return rates, settings


def tuned(scale, records, start):
    """The rate of each task and the setting of each recipe that did best on the tuning seed.

    Args:
      scale: the sizes.
      records: maps (cell, seed) to the record of the run.
      start: settings for what has not been tuned, instead of the middle of the grids.
    """
    grids = (
        dict(scale.rates),
        {name: recipe.grid for name, recipe in RECIPES.items() if recipe.grid},
    )
    settings = {name: grid[len(grid) // 2] for part in grids for name, grid in part.items()} | start
    for part, grid in enumerate(grids):  # the settings need the rates
        for name, tried in tuning(Cells(scale, settings))[part].items():
            bits = [
                records[cell, TUNING_SEED]["bits"]
                for cell in tried
                if (cell, TUNING_SEED) in records
            ]
            if tried and len(bits) == len(tried):
                settings[name] = grid[name][bits.index(min(bits))]
    return settings


DENSITIES = {"2:4": "1/2", "1:8": "1/8", "1:16": "1/16", "1:32": "1/32"}
# the recipes at 1:8 and 1:32
LITTLE_KEPT = ("RESET", "SR-STE", "SR-STE, dense start", "MDGF exponential")
TIED = ("FIX", "REGULARIZE", "SR-STE", "MDGF exponential")  # compared with RESET at 2:4
# changes to RESET at 1:16: no exploitation, or no exploration
ABLATIONS = ("no exploitation", "fixed initial mask", "SMALL")
# r divides no run: masks made after the last step would be validated without having trained
SWEPT = {"every": (1, 70, 700), "grad_scale": (0.0, 1.0), "reset_every": (1, 1000)}
LENGTHS, WIDTHS = (1 / 3, 1), (1 / 2, 3 / 4, 1)  # fractions of those of the scale
COMPARED_WITH_DENSE = ("dense", "2:4", "transposable 2:4")
ON_DIGITS = {
    "dense": ("dense",),
    "2:4": ("RESET",),
    "transposable 2:4": ("RESET",),
    "1:16": ("RESET", "SR-STE, dense start", "MDGF exponential", "SMALL"),
}


def resets(cells, pattern, **changes):
    """The dense cell, or the cell of RESET at a sparse pattern."""
    return cells(pattern, "dense" if pattern == "dense" else "RESET", **changes)


def sweep(cells, argument):
    """The cells of one sweep of RESET, by the value of the argument.

    The usual value of the argument gives the usual cell.
    """
    usual = {
        "every": 1,
        "grad_scale": 1.0,
        "reset_every": dict(cells(TUNED_AT, "RESET").options)["reset_every"],
    }
    values = sorted({*SWEPT[argument], usual[argument]})
    return {
        value: cells(TUNED_AT, "RESET", **({} if value == usual[argument] else {argument: value}))
        for value in values
    }


def longer(cells):
    """Changes to a cell, by the number of steps that they set."""
    return _changes("steps", cells.scale.steps, LENGTHS)


def wider(cells):
    """Changes to a cell, by the width that they set."""
    return _changes("width", cells.scale.width, WIDTHS)


def _changes(name, usual, factors):
    values = [round(usual * factor) for factor in factors]
    return {value: {} if value == usual else {name: value} for value in values}


def matrix(cells):
    """The runs of the tables: (stage, cell), the most important first; cells may repeat."""
    yield from (("2:4 and dense", resets(cells, pattern)) for pattern in COMPARED_WITH_DENSE)
    yield from (("recipes at 1:16", cells("1:16", recipe)) for recipe in (*LITTLE_KEPT, *ABLATIONS))
    yield from (("recipes at 2:4", cells("2:4", recipe)) for recipe in TIED)
    if cells.scale.together:
        return
    yield from (
        (f"recipes at {pattern}", cells(pattern, recipe))
        for pattern in ("1:8", "1:32")
        for recipe in LITTLE_KEPT
    )
    yield from (("recipes at 1:16", cells("1:16", recipe)) for recipe in RECIPES)
    yield from (
        ("structures", cell)
        for pattern in DENSITIES
        for cell in at_density(cells, pattern).values()
    )
    yield from (("sweeps", cell) for name in SWEPT for cell in sweep(cells, name).values())
    for changes in (*longer(cells).values(), *wider(cells).values()):
        yield from (
            ("length and size", resets(cells, pattern, **changes))
            for pattern in COMPARED_WITH_DENSE
        )
    for task in ("transformer", "convolutions"):
        yield from (
            ("digits", cells(pattern, recipe, task))
            for pattern, recipes in ON_DIGITS.items()
            for recipe in recipes
        )


def at_density(cells, pattern):
    """The cells of other structures at the density of a pattern."""
    kinds = ("unstructured", "block 4x4")
    return {kind: cells(f"{kind} {DENSITIES[pattern]}", "RESET") for kind in kinds}
