"""The axis that `flax.plan` learns in lifted models: scan, vmap, remat, recurrence, sharing."""

import functools

import pytest
from flax import linen as nn
from planning import planned, spec

X = spec(2, 8)


class Stack(nn.Module):
    """Dense layers stacked by `lift`."""

    lift: callable
    features: int = 8

    @nn.compact
    def __call__(self, x):
        return self.lift(functools.partial(nn.Dense, use_bias=False))(self.features)(x)


def scanned(axis, length):
    def lift(layer):
        class Body(nn.Module):
            features: int

            @nn.compact
            def __call__(self, x, _):
                return layer(self.features)(x), None

        scan = nn.scan(
            Body, variable_axes={"params": axis}, split_rngs={"params": True}, length=length
        )
        return lambda features: lambda x: scan(features)(x, None)[0]

    return lift


@pytest.mark.parametrize(
    ("axis", "length", "expected"),
    [
        (0, 4, (-2, 1, (-3,))),
        (0, 8, (-2, 1, (-3,))),  # 8x8x8: the shape does not determine the axis
        (1, 4, (-3, 1, (-2,))),
        (1, 8, (-3, 1, (-2,))),
        (2, 8, (-3, 1, (-1,))),
        (-1, 8, (-3, 1, (-1,))),
    ],
)
def test_layers_under_scan(axis, length, expected):
    assert list(planned(Stack(scanned(axis, length)), X).values()) == [expected]


def test_a_scan_within_a_scan():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return Stack(scanned(0, 4))(x), None

    outer = nn.scan(Inner, variable_axes={"params": 0}, split_rngs={"params": True}, length=8)()
    assert list(planned(outer, X, None).values()) == [(-2, 1, (-4, -3))]


@pytest.mark.parametrize(
    ("axis", "expected"), [(0, (-2, 1, (-3,))), (1, (-3, 1, (-2,))), (-1, (-3, 1, (-1,)))]
)
def test_layers_under_vmap(axis, expected):
    lift = lambda layer: nn.vmap(layer, variable_axes={"params": axis}, split_rngs={"params": True})  # noqa: E731
    assert list(planned(Stack(lift), spec(8, 2, 8)).values()) == [expected]


def test_layers_under_remat():
    assert list(planned(Stack(nn.remat), X).values()) == [(-2, 1, ())]
    assert list(planned(Stack(lambda layer: scanned(0, 8)(nn.remat(layer))), X).values()) == [
        (-2, 1, (-3,))
    ]


def test_recurrent_layers():
    kernels = planned(nn.RNN(nn.LSTMCell(8)), spec(2, 5, 12))
    assert kernels == {f"cell/{side}{gate}/kernel": (-2, 1, ()) for side in "ih" for gate in "ifgo"}
    assert set(planned(nn.RNN(nn.GRUCell(8), reverse=True), spec(2, 5, 12)).values()) == {
        (-2, 1, ())
    }


class Shared(nn.Module):
    twice: callable

    def setup(self):
        self.dense = nn.Dense(8)

    def __call__(self, x):
        return self.twice(self.dense, x)


def test_shared_modules_agree_or_stay_dense():
    assert planned(Shared(lambda dense, x: dense(dense(x))), X)["dense/kernel"] == (-2, 1, ())
    tied = planned(Shared(lambda dense, x: dense(x) @ dense.variables["params"]["kernel"].T), X)
    assert tied == {"dense/kernel": "shared by products that sum over different axes [-2, -1]"}


def test_parameters_that_every_step_of_a_scan_shares():
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(8)(x), None

    scan = nn.scan(Body, variable_broadcast="params", split_rngs={"params": False}, length=3)()
    assert planned(scan, X, None) == {"Dense_0/kernel": (-2, 1, ())}
