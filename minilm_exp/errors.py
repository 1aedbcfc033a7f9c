"""The one exception that a user is meant to read, and what others say in short."""


class ExperimentError(Exception):
    """A run cannot go on, and the user can change that.

    The message names the value, the rule that it breaks and the setting to change. The entrypoint
    prints it without a traceback.
    """


class Interrupted(KeyboardInterrupt):
    """A signal ended the work; what was finished stands.

    Args:
        signal_name: SIGINT or SIGTERM.
        where: What it ended, and what is kept of it.
    """

    def __init__(self, signal_name: str, where: str) -> None:
        super().__init__(f"{signal_name}: {where}")
        self.signal_name = signal_name


def reason_of(error: Exception) -> str:
    """The first line of an error of a library, short enough for a message."""
    if "weights_only" in str(error):  # torch advises to run the code of the file
        return "its weights are not of tensors alone and would run code; get them as safetensors"
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def key_of(error: Exception) -> str:
    """The setting that an error of OmegaConf is about; empty where it does not say."""
    return str(getattr(error, "full_key", None) or "")
