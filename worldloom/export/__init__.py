"""Policies as files: acting without worldloom, see :mod:`worldloom.policy_file` for the reader."""

from worldloom.export.writer import export_policy

__all__ = ["export_policy"]
