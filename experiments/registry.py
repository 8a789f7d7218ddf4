"""All experiments by name. Importing this module imports no experiment."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.config import Experiment

EXPERIMENTS = {
    "first_light": "At equal compute, which learns more of translating phrases: encoder-decoder or decoder-only?",
    "ladder": "From encoder-decoder to decoder-only in four steps: what does each piece of structure buy?",
    "multi30k": "On real captions, English to German, at equal compute: what BLEU does each family reach?",
    "multi30k_accelerator": "The same with wider models and many more epochs, where neither is short of training.",
    "pydocs": "After a short pretraining on text by span corruption, at equal compute: which predicts spans better?",
    "xl": "At equal training FLOPs and at the scale of a pod slice: which family predicts spans better?",
}


def load(name: str) -> "Experiment":
    """Returns the experiment `name`, made by the function of that name in the module of that name."""
    module = importlib.import_module(f"experiments.{name}")
    experiment: Experiment = getattr(module, name)()
    assert experiment.name == name and experiment.question == EXPERIMENTS[name]
    return experiment
