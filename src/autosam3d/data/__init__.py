"""Datasets: found, downloaded, invented; cases cached, cropped, augmented."""
