"""`twinstack list`: the experiments and their questions."""

from experiments import registry


def list_experiments() -> None:
    width = max(map(len, registry.EXPERIMENTS), default=0)
    for name, question in registry.EXPERIMENTS.items():
        print(f"{name:<{width}}  {question}")
