"""YAML as users write it: a mapping, with each mistake one line that says where."""

from typing import Any

import yaml

from dantinox.config.validation import ConfigError


class _Loader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise yaml.constructor.ConstructorError(problem=f"line {line}: {key.value!r} is there twice")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_yaml_mapping(text: str, source: str) -> dict[str, Any]:
    """The `name: value` pairs of a YAML text; empty where there are none. No tag makes an object.

    Args:
        source: what the text is called in messages.

    Raises:
        ConfigError: it is not YAML, holds a name twice, or is no mapping of names.
    """
    try:
        found = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        if isinstance(error, yaml.constructor.ConstructorError) and error.problem_mark is None:
            raise ConfigError(f"{source}: {error.problem}") from None
        where = getattr(error, "problem_mark", None)
        raise ConfigError(f"{source}: not YAML{f', line {where.line + 1}' if where else ''}") from None
    except (ValueError, RecursionError) as error:  # a date such as 2020-13-45, or brackets without end
        raise ConfigError(f"{source}: not YAML ({type(error).__name__})") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(f"{source}: it must hold `name: value` lines")
    if wrong := [name for name in found if not isinstance(name, str)]:
        raise ConfigError(f"{source}: {wrong[0]!r} is no name")
    return found
