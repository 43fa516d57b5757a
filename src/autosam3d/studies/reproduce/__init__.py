"""The tables and figures of the paper, made from runs of this project."""
