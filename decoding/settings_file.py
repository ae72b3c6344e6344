"""How commands read YAML: as jsonargparse does, but without keys that are there twice."""

from typing import Any


def refuse_repeated_keys() -> None:
    """From now on a key that is there twice is an error of jsonargparse's: the last would win and say nothing.

    Both libraries are imported here, since a decode does without them.
    """
    import yaml
    from jsonargparse import get_loader, set_loader

    usual = get_loader("yaml")
    if getattr(usual, "refuses", False):
        return

    def load(text: str) -> Any:
        waiting = [yaml.compose(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))]
        while waiting:
            node = waiting.pop()
            if isinstance(node, yaml.SequenceNode):
                waiting += node.value
            elif isinstance(node, yaml.MappingNode):
                keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
                for key in keys:
                    if keys.count(key) > 1:
                        problem = f"found {key!r} twice; accepted: each key once"
                        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
                waiting += [value for _, value in node.value]
        return usual(text)

    load.refuses = True  # pyright: ignore[reportFunctionMemberAccess]
    set_loader("yaml", load, exceptions=(yaml.YAMLError,))
