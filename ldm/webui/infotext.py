"""The text that AUTOMATIC1111's webui writes into its PNGs, in the chunk `parameters`: the prompts,
and below them all settings on one line. Its PNG Info tab and other viewers show it; written and
read here."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_SETTING = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_NEGATIVE = "Negative prompt:"
_LORA_TAG = re.compile(r"<lora:([^:>]+)(?::([^>]*))?>")


@dataclass(frozen=True)
class Infotext:
    """What a `parameters` text says; settings are strings by the webui's names, such as "CFG
    scale": "7"."""

    prompt: str
    negative_prompt: str = ""
    settings: dict[str, str] = field(default_factory=dict)


def format_parameters(prompt: str, negative_prompt: str, settings: Mapping[str, object]) -> str:
    """The text of an image: settings that are None are left out, and quoted where they hold a
    comma, colon or newline.

    prompt, negative_prompt: as a person typed them, LoRAs as <lora:name:weight>
    """
    pairs = [
        f"{name}: {_quote(str(value))}" for name, value in settings.items() if value is not None
    ]
    negative = f"\n{_NEGATIVE} {negative_prompt}" if negative_prompt else ""
    return f"{prompt}{negative}\n{', '.join(pairs)}".strip()


def parse_parameters(text: str) -> Infotext:
    """What a text says, by the webui's own rules; any text is one, at worst a prompt alone.

    The last line is the settings' if it holds three of them at least. A line that begins with
    "Negative prompt:" and all after it are the negative prompt; each line loses the blanks around
    it.
    """
    *lines, last = text.strip().split("\n")
    if len(_SETTING.findall(last)) < 3:
        lines, last = [*lines, last], ""
    lines = [line.strip() for line in lines]
    split = next((n for n, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    negative = [line.removeprefix(_NEGATIVE).strip() for line in lines[split:]]
    settings = {name: _unquote(value) for name, value in _SETTING.findall(last)}
    return Infotext("\n".join(lines[:split]), "\n".join(negative), settings)


def lora_tags(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """A prompt without its <lora:name:weight> tags, and their names and weights (1 where a tag has
    none).

    Raises ValueError where a weight is no number, or one of two, for text encoder and U-Net.
    """
    tags = [(name, float(weight or 1)) for name, weight in _LORA_TAG.findall(prompt)]
    return _LORA_TAG.sub("", prompt).strip() if tags else prompt, tags


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search("[,:\n]", value) else value


def _unquote(value: str) -> str:
    if len(value) < 2 or value[0] != '"' or value[-1] != '"':
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
