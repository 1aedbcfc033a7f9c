"""The one exception that a user is meant to read."""


class ExperimentError(Exception):
    """A run cannot go on, and the user can change that.

    The message names the value, the rule that it breaks and the setting to change. The entrypoint
    prints it without a traceback.
    """
