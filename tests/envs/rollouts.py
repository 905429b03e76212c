"""Random rollouts of vector environments, and their comparison. Import no JAX."""

import numpy as np


def rollout(env, steps, seed=0):
    """A list of the time steps of a reset and of ``steps`` calls with seeded random actions."""
    rng = np.random.default_rng(seed)
    return [env.reset(), *(env.step(env.sample_actions(rng)) for _ in range(steps))]


def assert_same(one, other):
    """Two lists of time steps are equal in all arrays and events."""
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        obs = (a.obs, b.obs) if isinstance(a.obs, dict) else ({"": a.obs}, {"": b.obs})
        assert obs[0].keys() == obs[1].keys()
        for name in obs[0]:
            np.testing.assert_array_equal(obs[0][name], obs[1][name])
        for name in ("reward", "is_first", "is_last", "is_terminal"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert a.events == b.events
