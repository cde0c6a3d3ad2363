"""Types of flags that every script has: a device that is here, a seed that every generator
takes."""

import argparse
import math
from argparse import ArgumentParser, ArgumentTypeError, Namespace

import torch

LAST_SEED = 2**32 - 1
"""torch's generator on the CPU heeds 32 bits of a seed: beyond, two seeds would be one."""


OVERWRITE = {"action": "store_true", "help": "a finished run of other settings in --out"}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The script's docstring as it stands, and behind each flag's help its default, where it has
    one and does not tell it in words, as "(else: the model's own)"."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        none = action.default is False or action.default in (None, [], "")
        told = none or "(else: " in action.help
        return action.help if told else super()._get_help_string(action)


def device_name(text: str) -> str:
    """The name of a device on which a number can be had."""
    try:
        torch.zeros(1, device=text).item()  # of "meta" none can
    # what torch raises for one that is unknown or absent
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ArgumentTypeError(f"{text}: not here ({reason}); cpu always is") from None
    return text


def require_at_least(parser: ArgumentParser, args: Namespace, least: float, *names: str) -> None:
    """Ends the script with a line unless each argument that was given is finite and at least
    this."""
    for name in names:
        if getattr(args, name) is not None and not least <= getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: at least {least}")


DEVICE = {
    "type": device_name,
    "default": "cuda" if torch.cuda.is_available() else "cpu",
    "help": "cuda, cpu, ..",
}
"""--device of all scripts that compute."""

HELD_OUT = {
    "type": float,
    "default": 0.0,
    "metavar": "SHARE",
    "help": "of --source's patients that no stage trains on, where its table names no split",
}
"""--held-out of all scripts that read a site to train on."""


def plain_text(text: str) -> str:
    """What can be written in UTF-8, in one line: bytes of another encoding reach a script as halves
    of characters."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ArgumentTypeError(
            f"{text!r}: no text in this terminal's encoding; type it in UTF-8"
        ) from None
    return " ".join(text.splitlines())


TEMPLATE = {"type": plain_text, "help": 'of --source, such as "a chest X-ray with {class}"'}
"""--prompt-template of all scripts that caption a site."""


def seed_number(text: str) -> int:
    """A whole number from 0 to LAST_SEED."""
    if not text.isdecimal() or int(text) > LAST_SEED:
        raise ArgumentTypeError(f"{text}: choose a whole number from 0 to {LAST_SEED}")
    return int(text)
