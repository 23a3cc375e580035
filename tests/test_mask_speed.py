"""The time of a mask is a small multiple of reading the weights.

If XLA:CPU computes a group's result again for each member, it is m times that.
"""

import json
import pathlib

import aot
import jax
import programs
import pytest

import jaxsparse as js

TESTS = pathlib.Path(__file__).parent
RESULTS = TESTS.parent / "benchmarks" / "results"
CASES = {f"axis {axis} {dtype}" for axis in (0, 1) for dtype in ("float32", "bfloat16")}
PATTERNS = ("2:4", "4:8", "1:16", "1:128", "2:16")
# The tolerance above the figures in the README. Other programs slow down the mask and the stream
# alike, but ratios of CPU time still rise by up to 1.4 with twice as many programs as cores.
MARGIN = 1.5


def claimed():
    """The highest ratio in the README for each pattern, over axes and dtypes."""
    rows = json.loads((RESULTS / "masks.json").read_text())["rows"]
    ratios = {name: row for name, *row in rows}
    return {
        pattern: max(max(ratios[f"{pattern} axis {axis}"]) for axis in (0, 1))
        for pattern in PATTERNS
    }


@pytest.mark.slow
@pytest.mark.clock
def test_masks_cost_what_the_readme_says():
    bars = {pattern: MARGIN * ratio for pattern, ratio in claimed().items()}
    least = {}
    for _ in range(3):  # a mask that has become slower fails each time
        times = json.loads(programs.output(TESTS / "mask_times.py", *PATTERNS))
        assert times.keys() == CASES
        for case, ratios in times.items():
            assert ratios.keys() == bars.keys()
            for pattern, ratio in ratios.items():
                least[pattern, case] = min(ratio, least.get((pattern, case), ratio))
        above = {case: ratio for case, ratio in least.items() if ratio > bars[case[0]]}
        if not above:
            break
    assert not above, f"{above}, and the bars are {bars}"


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_bfloat16_is_ranked_as_integers(pattern, axis):
    """bfloat16 is compared as integers.

    XLA:CPU slices and reshapes it through float32, which leaves half as many lanes to compute in.
    """
    n, m = map(int, pattern.split(":"))
    w = jax.ShapeDtypeStruct((256, 256), "bfloat16")
    plan = js.plan({"w": w}, {"w": js.NM(n, m, axis=axis)})
    for f in (
        lambda w: js.magnitude_masks({"w": w}, plan)["w"],
        lambda w: js.nm_mask(w, n, m, axis=axis),
    ):
        assert "f32[" not in jax.jit(f).lower(w).compile().as_text()


@pytest.mark.aot
def test_a_gpu_reads_the_weights_once():
    for name, program in json.loads(aot.in_process(TESTS / "gpu_masks.py")).items():
        assert program["readers"] == ["fusion"], name
        assert set(program["kinds"]) <= {"fusion", "parameter", "bitcast", "get-tuple-element"}, (
            name
        )
