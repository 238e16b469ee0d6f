"""Errors that are meant for the user.

The command line prints them as one line and exits with status 1. Any other exception is a bug.
"""


class AlignkitError(Exception):
    """A problem that the user can fix. The message states where, what was found, what was expected and what to do."""


class ConfigError(AlignkitError):
    """An invalid run file, flag or combination of settings."""


class PluginError(AlignkitError):
    """A plugin that is missing, cannot be imported or breaks its contract."""


class TransientError(AlignkitError):
    """A temporary failure, such as a server that does not respond or reports that it is busy.

    A reward that raises it is retried a few times (`[scoring] retries`) before the run stops.
    """
