"""Names of the arrays that have none: one convention for every layer."""

OBS = "obs"
"""Name of an observation that is a single array."""

ACTION = "action"
"""Name of an action that is a single array."""
