"""How good a segmentation is: scores, statistics, pictures, a report."""
