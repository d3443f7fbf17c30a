"""The one form in which every error of this package is worded."""


def invalid(op: str, argument: str, rule: str, got: object) -> ValueError:
    """Return (not raise) the ValueError ``"<op>: <argument> must <rule>, got <got>"``."""
    return ValueError(f"{op}: {argument} must {rule}, got {got}")


def shape(tensor) -> str:
    """A tensor's shape as users write it: ``[4, 16]``."""
    return str(list(tensor.shape))
