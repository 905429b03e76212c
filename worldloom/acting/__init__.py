"""Acting with a trained model: agents for environments, at the speed of the computation."""

from worldloom.acting.loading import load_policy
from worldloom.acting.policy import Latency, Policy

__all__ = ["Latency", "Policy", "load_policy"]
