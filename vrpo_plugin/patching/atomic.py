"""See :mod:`vrpo_plugin.files`, which has the one writer."""

from vrpo_plugin.files import replace_bytes, why_read_only

__all__ = ["replace_bytes", "why_read_only"]
