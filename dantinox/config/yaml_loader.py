"""Load a YAML mapping; errors are one line with the source and the line number."""

from typing import Any

import yaml

from dantinox.config.validation import ConfigError


class _Loader(yaml.SafeLoader):
    """A loader that refuses duplicate keys, of which PyYAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise yaml.constructor.ConstructorError(problem=f"line {line}: {key.value!r} occurs twice")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_yaml_mapping(text: str, source: str) -> dict[str, Any]:
    """Return the `name: value` pairs of a YAML text; an empty text has none. Tags cannot construct objects.

    Args:
        text: the YAML text.
        source: name of the text in messages.

    Raises:
        ConfigError: the text is not YAML, has a duplicate name, or is not a mapping with names as keys.
    """
    try:
        mapping = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        if isinstance(error, yaml.constructor.ConstructorError) and error.problem_mark is None:
            raise ConfigError(f"{source}: {error.problem}") from None
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(f"{source}: not YAML{f', line {mark.line + 1}' if mark else ''}") from None
    except (ValueError, RecursionError) as error:  # a date such as 2020-13-45, or deep nesting
        raise ConfigError(f"{source}: not YAML ({type(error).__name__})") from None
    if mapping is None:
        return {}
    if not isinstance(mapping, dict):
        raise ConfigError(f"{source}: expected `name: value` lines")
    if invalid := [name for name in mapping if not isinstance(name, str)]:
        raise ConfigError(f"{source}: {invalid[0]!r} is not a valid name")
    return mapping
