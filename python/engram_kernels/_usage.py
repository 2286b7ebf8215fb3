"""What the commands say of arguments that make no sense."""


class UsageError(Exception):
    """An argument makes no sense; the message says which. The command ends with exit code 2."""
