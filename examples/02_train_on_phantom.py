"""Make phantom CTs, train a tiny AutoSAM on them from Python, and look at its validation Dice.

    python examples/02_train_on_phantom.py FOLDER [KEY=VALUE ...]
"""

import sys
from pathlib import Path

from autosam3d.data.folder import open_dataset
from autosam3d.data.phantom import write_phantom_dataset
from autosam3d.recipes.recipe import load_recipe
from autosam3d.training.train import Observer, train

folder, overrides = Path(sys.argv[1]), sys.argv[2:]

write_phantom_dataset(folder / "data", num_train=3, num_val=1, num_test=1, seed=7)
recipe = load_recipe("phantom", overrides)
cases = open_dataset(folder / "data", recipe)
result = train(recipe, cases, folder / "run", observer=Observer(on_message=print))
print(f"{result.epoch} epochs, best validation Dice {result.best_dice}")
