"""From a trained model to a folder that runs without torch, and the proof that it says the same."""
