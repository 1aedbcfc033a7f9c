"""The one exception that a user is meant to read, and what others say in short."""


class ExperimentError(Exception):
    """A run cannot go on, and the user can change that.

    The message names the value, the rule that it breaks and the setting to change. The entrypoint
    prints it without a traceback.
    """


def reason_of(error: Exception) -> str:
    """The first line of an error of a library, short enough for a message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
