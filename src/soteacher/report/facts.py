"""What was run, in words, from a run's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from soteacher.objectives import methods


def _plain(value: Any) -> str:
    """Return a value of the configuration in words: ``key value`` pairs, nested ones in parentheses."""
    if isinstance(value, Mapping):
        return ", ".join(setting_words(str(key), part) for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(part) for part in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def setting_words(key: str, value: Any) -> str:
    """Return one setting in words; a nested one with its own settings in parentheses."""
    name, text = key.replace("_", " "), _plain(value)
    if value is None:  # a term of the method that this arm leaves out
        return f"without {name}"
    if isinstance(value, Mapping | list | tuple):
        return f"{name} ({text})" if text else name
    return f"{name} {text}"


def run_facts(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what was run, as label and text, from the configuration. What is not set is left out.

    Args:
        config: what ``config.yaml`` holds.
    """
    sections: list[tuple[str, Any]] = [("Data", config.get("data"))]
    for role in ("teacher", "student"):
        arms = (config.get(f"{role}s") or {}).items()
        sections += [(f"{role.capitalize()} {arm}", _with_own_training(part)) for arm, part in arms]
    sections += [(key.capitalize(), config.get(key)) for key in ("training", "seeds", "baseline")]
    facts: list[tuple[str, str]] = []
    for label, section in sections:
        if isinstance(section, Mapping):
            section = {key: part for key, part in section.items() if part is not False and part not in (None, {}, [])}
        if section not in (None, {}, []):
            facts.append((label, _plain(section)))
    return facts


def _with_own_training(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return an arm's settings, its method followed by what that changes in the training and the arm leaves so."""
    settings = dict(settings or {})
    name = settings.get("method")
    found = methods().get(str(name))  # none where the package that has it is not there
    own = _left(found.training, settings.get("training") or {}) if found else {}
    return {**settings, "method": f"{name} (its own training: {_plain(own)})"} if own else settings


def _left(method: Mapping[str, Any], arm: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a method's training is in force below an arm's own settings, tables within tables."""
    left: dict[str, Any] = {}
    for key, value in method.items():
        if key not in arm:
            left[key] = value
        elif isinstance(value, Mapping) and isinstance(arm[key], Mapping):
            table, own = dict[str, Any](value), dict[str, Any](arm[key])
            same_kind = own.get("name", table.get("name")) == table.get("name")
            if rest := _left(table, own) if same_kind else {}:
                left[key] = rest
    return left
