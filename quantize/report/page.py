"""placeholder"""

from quantize.results import Outcome


def page(outcome: Outcome) -> str:
    """Page."""
    return outcome.name
