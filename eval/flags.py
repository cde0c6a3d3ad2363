"""Types of flags that every script has: a device that is here, a seed that every generator takes."""

from argparse import ArgumentTypeError

import torch

LAST_SEED = 2**32 - 1
"""torch's generator on the CPU heeds 32 bits of a seed: beyond, two seeds would be one."""


def device_name(text: str) -> str:
    """The name of a device on which a tensor can be made."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError, ImportError) as error:  # what torch raises for one that is unknown or absent
        raise ArgumentTypeError(f"{text}: not here ({str(error).splitlines()[0]}); cpu always is") from None
    return text


def seed_number(text: str) -> int:
    """A whole number from 0 to LAST_SEED."""
    if not text.isdecimal() or int(text) > LAST_SEED:
        raise ArgumentTypeError(f"{text}: choose a whole number from 0 to {LAST_SEED}")
    return int(text)
