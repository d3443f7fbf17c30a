"""The one form in which every error of this package is worded."""


def invalid(op: str, argument: str, rule: str, got: object) -> ValueError:
    """Return (not raise) the ValueError ``"<op>: <argument> must <rule>, got <got>"``."""
    return ValueError(f"{op}: {argument} must {rule}, got {got}")


def check_whole(op: str, argument: str, value: object, least: int = 1) -> None:
    """Raise the ValueError that names the argument unless it is an integer of at least so much."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise invalid(op, argument, f"be an integer of at least {least}", repr(value))


def shape(tensor) -> str:
    """A tensor's shape as users write it: ``[4, 16]``."""
    return str(list(tensor.shape))
