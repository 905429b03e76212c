"""Policies as files: acting without worldloom, see :mod:`worldloom.policy_file` for the reader; and runs to share."""

from worldloom.export.publishing import push_to_hub, save_with_card
from worldloom.export.writer import export_policy

__all__ = ["export_policy", "push_to_hub", "save_with_card"]
