"""The one error that this package raises for what its user can mend."""


class DndError(ValueError):
    """File, an adapter or a setting that does not fit; the message says what was got, what is needed, what to do."""
