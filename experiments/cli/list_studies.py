"""`twinstack list`: the studies and their questions."""

from experiments import find


def list_studies() -> None:
    names = find.names()
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {find.load(name).question}")
