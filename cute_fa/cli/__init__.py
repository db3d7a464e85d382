"""The ``cute-fa`` command."""
