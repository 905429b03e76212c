"""Names of the arrays that have none: one convention for every layer."""

OBS = "obs"
"""The name of an observation that is a single array."""
ACTION = "action"
"""The name of an action that is a single array."""
